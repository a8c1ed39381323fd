// A ZIP archive without compression, which image files do not need (APPNOTE.TXT, sections 4.3.7, 4.3.12 and 4.3.16).

const LOCAL = 0x04034b50, CENTRAL = 0x02014b50, END = 0x06054b50;
const VERSION = 20, UTF8_NAMES = 0x0800;

const TABLE = Uint32Array.from({ length: 256 }, (_, byte) => {
  let rest = byte;
  for (let bit = 0; bit < 8; bit += 1) rest = rest & 1 ? 0xedb88320 ^ (rest >>> 1) : rest >>> 1;
  return rest;
});

function crc32(bytes) {
  let sum = ~0;
  for (const byte of bytes) sum = TABLE[(sum ^ byte) & 0xff] ^ (sum >>> 8);
  return ~sum >>> 0;
}

/** Little-endian fields, each [bytes, value]. */
function pack(...fields) {
  const view = new DataView(new ArrayBuffer(fields.reduce((sum, [size]) => sum + size, 0)));
  let at = 0;
  for (const [size, value] of fields) {
    if (size === 2) view.setUint16(at, value, true);
    else view.setUint32(at, value, true);
    at += size;
  }
  return new Uint8Array(view.buffer);
}

/** A date and time of MS-DOS, in two-second steps since 1980. */
function dosTime(date) {
  const time = date.getHours() << 11 | date.getMinutes() << 5 | date.getSeconds() >> 1;
  const day = Math.max(0, date.getFullYear() - 1980) << 9 | date.getMonth() + 1 << 5 | date.getDate();
  return [[2, time], [2, day]];
}

/** The archive, a Blob, of entries { name, blob, date }. Names are to differ. */
export async function zip(entries) {
  const parts = [], directory = [];
  let at = 0;
  for (const { name, blob, date } of entries) {
    const path = new TextEncoder().encode(name), sum = crc32(new Uint8Array(await blob.arrayBuffer()));
    const about = [
      [2, VERSION], [2, UTF8_NAMES], [2, 0], ...dosTime(date), [4, sum], [4, blob.size], [4, blob.size],
      [2, path.length], [2, 0],
    ];
    directory.push(pack([4, CENTRAL], [2, VERSION], ...about, [2, 0], [2, 0], [2, 0], [4, 0], [4, at]), path);
    const header = pack([4, LOCAL], ...about);
    parts.push(header, path, blob);
    at += header.length + path.length + blob.size;
  }
  const size = directory.reduce((sum, part) => sum + part.length, 0), count = entries.length;
  const end = pack([4, END], [2, 0], [2, 0], [2, count], [2, count], [4, size], [4, at], [2, 0]);
  return new Blob([...parts, ...directory, end], { type: "application/zip" });
}

/** `names`, with a number where one has occurred before. */
export function different(names) {
  const seen = new Map();
  return names.map((name) => {
    const times = (seen.get(name) ?? 0) + 1;
    seen.set(name, times);
    return times === 1 ? name : name.replace(/(\.\w+)?$/, ` (${times})$1`);
  });
}
