// Server-sent events of a response, which EventSource cannot read from a POST.

/** The events of a byte stream, as the HTML standard reads them; an event cut off at the end is dropped. */
export async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", name = "", data = [];
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    const lines = (rest + part.value).split(/\r\n|\n|\r(?!$)/); // a last \r may be half of \r\n
    rest = lines.pop();
    for (const line of lines) {
      const [, key, value] = /^([^:]*):? ?(.*)$/s.exec(line);
      if (key === "event") name = value;
      else if (key === "data") data.push(value);
      else if (line === "") {
        if (data.length) yield { name, data: JSON.parse(data.join("\n")) };
        [name, data] = ["", []];
      }
    }
  }
}
