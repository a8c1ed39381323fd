// The request that the form describes, as a link, or as a program that makes it.

import { $ } from "./dom.js";
import { body, form, remember } from "./form.js";
import { initialName } from "./initial-image.js";
import { authorization } from "./key.js";

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`; // for a shell

function parts() {
  const { image, mask, preview_every: _, ...fields } = body();
  const files = { ...(image && { image: initialName() }), ...(mask && { mask: "mask.png" }) };
  const key = authorization().Authorization && { Authorization: "Bearer YOUR_API_KEY" };
  return { fields: JSON.parse(JSON.stringify(fields)), files, key, url: new URL("generate", location).href };
}

/** The fields of a dictionary, a line each; `read` is the expression for a file's content in base64. */
const entries = ({ fields, files }, read) => [
  ...Object.entries(fields).map(([name, value]) => `    "${name}": ${JSON.stringify(value)},`),
  ...Object.entries(files).map(([name, file]) => `    "${name}": ${read(JSON.stringify(file))},`),
].join("\n");

const text = (value) => typeof value === "object" ? JSON.stringify(value) : value; // of a form's field

const headers = (all) => JSON.stringify(all).replaceAll(",", ", ").replaceAll('":', '": ');

const LANGUAGES = {
  Link() {
    remember();
    return location.href;
  },
  curl() {
    const { fields, files, key, url } = parts(), isOne = fields.num_images === 1;
    const path = (file) => `@"${file.replace(/["\\]/g, "\\$&")}"`;
    const form = Object.entries(fields).map(([name, value]) => `--form-string ${quoted(`${name}=${text(value)}`)}`);
    const uploads = Object.entries(files).map(([name, file]) => `--form ${quoted(`${name}=${path(file)}`)}`);
    return [
      `curl ${quoted(url)} --fail-with-body`, `--output ${isOne ? "image.png" : "images.json"}`,
      `--header 'Accept: ${isOne ? "image/png" : "application/json"}'`,
      ...key ? [`--header 'Authorization: ${key.Authorization}'`] : [],
      ...uploads.length ? [...form, ...uploads] : ["--header 'Content-Type: application/json'", `--data ${quoted(JSON.stringify(fields))}`],
    ].join(" \\\n  ");
  },
  Python() {
    const { key, url, ...request } = parts();
    return `import base64
import requests

answer = requests.post("${url}", headers=${headers({ Accept: "application/json", ...key })}, json={
${entries(request, (file) => `base64.b64encode(open(${file}, "rb").read()).decode()`)}
})
answer.raise_for_status()
for image in answer.json()["images"]:
    with open(f"{image['seed']}.{image['format']}", "wb") as file:
        file.write(base64.b64decode(image["image"]))`;
  },
  JavaScript() {
    const { key, url, ...request } = parts();
    return `import { readFile, writeFile } from "node:fs/promises";

const answer = await fetch("${url}", {
  method: "POST",
  headers: ${headers({ "Content-Type": "application/json", Accept: "application/json", ...key })},
  body: JSON.stringify({
${entries(request, (file) => `await readFile(${file}, "base64")`)}
  }),
});
if (!answer.ok) throw new Error(await answer.text());
for (const { seed, format, image } of (await answer.json()).images) await writeFile(\`\${seed}.\${format}\`, image, "base64");`;
  },
};

/** Show the request in this language, and put it on the clipboard. */
export async function copy(language) {
  const text = $("code");
  text.value = LANGUAGES[language]();
  text.hidden = false;
  const { mask } = body();
  $("mask-file").hidden = !mask;
  $("mask-file").href = `data:image/png;base64,${mask}`;
  text.select();
  const isCopied = await navigator.clipboard?.writeText(text.value).then(() => true, () => false); // HTTPS or localhost only
  $("copied").textContent = isCopied ? "Copied." : "Press Ctrl+C to copy it.";
}

form.addEventListener("input", () => { $("code").hidden = true; });
