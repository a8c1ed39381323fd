// The text `parameters` of an image file: a chunk of PNG, or the comment of the EXIF block of JPEG and WebP.

const LONGEST = 1 << 20; // bytes of such a text

const ascii = (bytes) => String.fromCharCode(...bytes);

/** UTF-8, or Latin-1 where it is not: what PNG says of tEXt, and what programs write. */
function decode(bytes) {
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch {
    return new TextDecoder("latin1").decode(bytes);
  }
}

/** The text in the bytes of an image file; null where there is none. Broken files have none. */
export async function readParameters(bytes) {
  try {
    if (ascii(bytes.subarray(1, 4)) === "PNG") return await inPng(bytes);
    const exif = bytes[0] === 0xff ? exifOfJpeg(bytes) : ascii(bytes.subarray(8, 12)) === "WEBP" ? exifOfWebp(bytes) : null;
    return exif && userComment(exif);
  } catch { // it is cut off, or not what it says it is: the errors of views, decoders and decompression differ
    return null;
  }
}

const view = (bytes) => new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);

async function inPng(bytes) {
  const data = view(bytes);
  for (let at = 8; at + 12 <= bytes.length; at += 12 + data.getUint32(at)) {
    const kind = ascii(bytes.subarray(at + 4, at + 8)), length = data.getUint32(at);
    const content = bytes.subarray(at + 8, at + 8 + length), end = content.indexOf(0);
    if (!["tEXt", "zTXt", "iTXt"].includes(kind) || ascii(content.subarray(0, Math.max(0, Math.min(end, 80)))) !== "parameters") continue;
    if (kind === "tEXt") return decode(content.subarray(end + 1));
    if (kind === "zTXt") return decode(await inflate(content.subarray(end + 2)));
    const isCompressed = content[end + 1] === 1, language = content.indexOf(0, end + 3);
    const text = content.subarray(content.indexOf(0, language + 1) + 1);
    return decode(isCompressed ? await inflate(text) : text);
  }
  return null;
}

async function inflate(bytes) {
  const parts = [];
  let size = 0;
  for await (const part of new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"))) {
    size += part.length;
    if (size > LONGEST) throw new RangeError("the text is too long");
    parts.push(part);
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

function exifOfJpeg(bytes) {
  const data = view(bytes);
  for (let at = 2; bytes[at] === 0xff && bytes[at + 1] !== 0xda; at += 2 + data.getUint16(at + 2)) {
    if (bytes[at + 1] === 0xe1 && ascii(bytes.subarray(at + 4, at + 8)) === "Exif") return bytes.subarray(at + 10, at + 2 + data.getUint16(at + 2));
  }
  return null;
}

function exifOfWebp(bytes) {
  const data = view(bytes);
  for (let at = 12; at + 8 <= bytes.length;) {
    const size = data.getUint32(at + 4, true), content = bytes.subarray(at + 8, at + 8 + size);
    if (ascii(bytes.subarray(at, at + 4)) === "EXIF") return ascii(content.subarray(0, 4)) === "Exif" ? content.subarray(6) : content;
    at += 8 + size + size % 2;
  }
  return null;
}

const EXIF_IFD = 0x8769, USER_COMMENT = 0x9286;

/** The comment in a TIFF structure. */
function userComment(tiff) {
  const data = view(tiff), little = tiff[0] === 0x49; // II or MM
  const entry = (ifd, wanted) => {
    for (let at = ifd + 2, left = data.getUint16(ifd, little); left > 0; at += 12, left -= 1) {
      if (data.getUint16(at, little) === wanted) return { count: data.getUint32(at + 4, little), value: data.getUint32(at + 8, little) };
    }
    return null;
  };
  const ifd = entry(data.getUint32(4, little), EXIF_IFD), comment = ifd && entry(ifd.value, USER_COMMENT);
  return comment && commentText(tiff.subarray(comment.value, comment.value + comment.count), little);
}

function commentText(bytes, little) {
  const code = ascii(bytes.subarray(0, 8)), text = bytes.subarray(8);
  if (!code.startsWith("UNICODE")) return decode(text).replace(/\0+$/, "");
  const isLittle = text[0] === 0 ? false : text[1] === 0 ? true : little; // most write one order whatever the file's is
  return new TextDecoder(isLittle ? "utf-16le" : "utf-16be").decode(text);
}
