// A picture, { blob, name, seed, at, model, parameters, flagged, initial }, and what can be done with it.

import { make } from "./dom.js";
import { useAsStart } from "./initial-image.js";
import { vary } from "./reuse.js";

/** The picture of an image in an answer of the server. */
export function pictureOf({ seed, format, image, nsfw_content_detected: flagged }, { model, parameters }) {
  const bytes = Uint8Array.from(atob(image), (letter) => letter.charCodeAt(0));
  const blob = new Blob([bytes], { type: `image/${format}` });
  const words = parameters.prompt.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60).replace(/^-|-$/g, "");
  return {
    blob, name: `${words || "image"}-${seed}.${format}`, seed, at: Date.now(), model, parameters,
    flagged: Boolean(flagged),
  };
}

export const link = (text, onclick) => make("button", { type: "button", className: "link", onclick }, text);

/** Buttons for a picture that is shown from `url`; `before` runs before one that leads elsewhere. */
export const actionsOf = (picture, url, before = () => {}) => [
  link("Vary", () => { before(); vary(picture); }),
  link("Use as initial image", () => { before(); useAsStart(new File([picture.blob], picture.name)); }),
  make("a", { href: url, download: picture.name }, "Download"),
];

/** Blur a flagged picture in its frame until the user asks for it. */
export function veil(frame, { flagged }) {
  frame.querySelector(".veil")?.remove();
  frame.classList.toggle("flagged", flagged);
  if (!flagged) return;
  const show = make("button", { type: "button", className: "veil" }, "This image may be unsafe. Show it");
  show.onclick = () => {
    frame.classList.remove("flagged");
    show.remove();
  };
  frame.append(show);
}
