// The last pictures, below the result; they stay when the page is closed.

import { $, make, many } from "./dom.js";
import { storedPictures, storePicture, unstorePicture } from "./picture-store.js";
import { openViewer } from "./viewer.js";

const MOST = 100;

let shown = []; // the newest first: { picture, item, url }

const note = (text) => { $("gallery-note").textContent = text; };

function notStored(error) {
  note(error?.name === "QuotaExceededError"
    ? "The browser has no room for more: new images are lost when this page is closed. Download or delete some."
    : "This browser does not store images, as in a private window: they are lost when this page is closed.");
}

export async function loadGallery() {
  const pictures = await storedPictures().catch((error) => { notStored(error); return []; });
  shown = [...shown, ...pictures.map(thumbnail)].slice(0, MOST);
  update();
}

/** Add the pictures of a request, once they are stored: what is shown stays, and can be deleted for good. */
export async function keepPictures(pictures) {
  const old = shown.slice(Math.max(0, MOST - pictures.length));
  try {
    for (const { picture } of old) await removePicture(picture);
    for (const picture of pictures) picture.id = await storePicture(picture);
  } catch (error) {
    notStored(error);
  }
  shown = [...pictures.map(thumbnail).reverse(), ...shown];
  update();
}

export async function removePicture(picture) {
  const gone = shown.find((one) => one.picture === picture);
  shown = shown.filter((one) => one !== gone);
  if (!gone) return; // long ago
  URL.revokeObjectURL(gone.url);
  update();
  if (picture.id !== undefined) await unstorePicture(picture.id);
}

function thumbnail(picture) {
  const url = URL.createObjectURL(picture.blob);
  const image = make("img", { src: url, alt: "", loading: "lazy", decoding: "async" });
  const button = make("button", { type: "button", onclick: () => enlarge(picture) }, image);
  button.ariaLabel = `${picture.parameters.prompt}, seed ${picture.seed}${picture.flagged ? ", may be unsafe" : ""}`;
  button.classList.toggle("flagged", picture.flagged);
  return { picture, item: make("li", {}, button), url };
}

export function enlarge(picture) {
  const all = neighbours();
  openViewer(all.includes(picture) ? all : [picture], picture, removePicture);
}

const neighbours = () => shown.map(({ picture }) => picture);
const buttons = () => [...$("thumbnails").querySelectorAll("button")];

function update() {
  const focused = buttons().indexOf(document.activeElement);
  $("thumbnails").replaceChildren(...shown.map(({ item }) => item));
  $("gallery").hidden = !shown.length && !$("gallery-note").textContent;
  $("gallery-count").textContent = `${many(shown.length, "image")}, in this browser only`;
  reach(Math.max(0, focused), focused >= 0);
}

/** One thumbnail is in the tab order, and the arrows lead to the others. */
function reach(index, isFocused) {
  const all = buttons(), at = Math.max(0, Math.min(index, all.length - 1));
  all.forEach((button, position) => { button.tabIndex = position === at ? 0 : -1; });
  if (isFocused) all[at]?.focus();
}

function columns() {
  const [first, ...others] = buttons().map((button) => button.offsetTop);
  const below = others.findIndex((top) => top > first);
  return below < 0 ? others.length + 1 : below + 1;
}

$("thumbnails").addEventListener("keydown", (event) => {
  const at = buttons().indexOf(document.activeElement), last = shown.length - 1;
  const next = {
    ArrowLeft: () => at - 1, ArrowRight: () => at + 1, Home: () => 0, End: () => last,
    ArrowUp: () => at - columns(), ArrowDown: () => at + columns(),
  }[event.key]?.();
  if (next === undefined) return;
  event.preventDefault();
  if (next >= 0 && next <= last) reach(next, true);
});
$("thumbnails").addEventListener("focusin", ({ target }) => reach(buttons().indexOf(target), false));

$("download-all").onclick = async () => {
  const { different, zip } = await import("./zip.js");
  const names = different(shown.map(({ picture }) => picture.name));
  const entries = shown.map(({ picture }, index) => ({ name: names[index], blob: picture.blob, date: new Date(picture.at) }));
  const href = URL.createObjectURL(await zip(entries));
  make("a", { href, download: "latentd-images.zip" }).click();
  setTimeout(() => URL.revokeObjectURL(href), 60_000); // once the browser has begun to read it
};
$("delete-all").onclick = async () => {
  if (!confirm(`Delete ${many(shown.length, "image")} from this browser?`)) return;
  note("");
  try {
    for (const picture of neighbours()) await removePicture(picture);
  } catch (error) {
    notStored(error);
  }
  $("prompt").focus();
};
