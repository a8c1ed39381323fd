// Picture files that the user chooses.

import { make } from "./dom.js";
import { Problem } from "./problem.js";

const MAX_FILE = 12 * 1024 * 1024, MAX_PIXELS = 16_777_216;
const PICTURE = /^(\x89PNG|\xff\xd8\xff|RIFF....WEBP)/s; // how such a file begins

/** The picture in a file: { name, url, width, height }. A Problem says what to choose instead. */
export async function readPicture(file) {
  const problem = (detail) => new Problem({ detail: `${file.name} ${detail}` });
  const unreadable = () => { throw problem("cannot be read: choose another image."); };
  const head = new Uint8Array(await file.slice(0, 12).arrayBuffer().catch(unreadable));
  if (!PICTURE.test(String.fromCharCode(...head))) throw problem("is not a PNG, JPEG or WebP file: choose one that is.");
  if (file.size > MAX_FILE) throw problem(`has ${(file.size / 2 ** 20).toFixed(1)} MiB: choose a file of at most 12 MiB.`);
  const image = make("img", { src: await dataUrl(file) });
  await image.decode().catch(unreadable);
  const { src: url, naturalWidth: width, naturalHeight: height } = image; // upright, as the server turns it
  if (width * height > MAX_PIXELS) throw problem(`has ${width} × ${height} pixels: choose an image of at most 16 million pixels.`);
  return { name: file.name, url, width, height };
}

async function dataUrl(file) {
  const reader = new FileReader();
  await new Promise((resolve) => { reader.onloadend = resolve; reader.readAsDataURL(file); });
  return reader.result;
}

/** Call `take` with a picture file that is dropped on the page or pasted; `dropping` hears whether one is held over it. */
export function onArrival(take, dropping) {
  addEventListener("dragover", (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    dropping(true);
  });
  addEventListener("dragleave", ({ relatedTarget }) => { if (!relatedTarget) dropping(false); });
  addEventListener("drop", (event) => {
    dropping(false);
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    if (event.dataTransfer.files.length) take(event.dataTransfer.files[0]);
  });
  addEventListener("paste", (event) => {
    const { files, types } = event.clipboardData;
    if (!files.length || types.includes("text/plain")) return; // copied from a document: its words, not a picture of them
    event.preventDefault();
    take(files[0]);
  });
}
