// The pictures of a request: empty frames, previews, then the files.

import { actionsOf, link, pictureOf, veil } from "./actions.js";
import { $, BLANK, lines, make, many, say, short, words } from "./dom.js";
import { field, keepSeed, showing, valuesOf } from "./form.js";
import { enlarge } from "./gallery.js";

let figures = [];

export const hasPictures = () => figures.length > 0;

/** Hang up empty frames for a request; returns functions that bring the pictures before them back, or give them up. */
export function hangFrames(request) {
  const before = figures;
  hangUp(Array.from({ length: request.num_images }, () => frame(request)));
  return { restore: () => hangUp(before), release: () => release(before) };
}

function hangUp(next) {
  figures = next;
  $("pictures").replaceChildren(...figures);
  $("pictures").classList.toggle("grid", figures.length > 1);
}

function release(old) {
  for (const { href } of old.flatMap((figure) => [...figure.querySelectorAll("a")])) URL.revokeObjectURL(href);
}

/** An empty frame. A picture of few pixels is enlarged, by a whole number where the page is wide enough. */
function frame({ width, height, num_images }) {
  const small = Math.max(width, height) < 200, room = num_images > 1 ? 256 : 384, mat = num_images > 1 ? 0 : 16;
  const image = make("img", { src: BLANK, alt: "" });
  const figure = make("figure", {}, make("div", { className: "frame" }, image), make("figcaption"));
  figure.style.maxWidth = `${(small ? width * Math.floor(room / width) : width) + mat}px`;
  image.style.aspectRatio = `${width} / ${height}`;
  return figure;
}

/** Show a `step` event, `seconds` after the first step began. */
export function showStep({ step, steps, preview, previews = [preview] }, seconds) {
  const left = seconds / step * (steps - step);
  $("bar").value = step / steps;
  $("step").textContent = `Step ${step} of ${steps}` + (step > 2 && left > 2 ? `, ${Math.ceil(left)} s left` : "");
  previews.forEach((url, index) => {
    if (url?.startsWith("data:image/")) figures[index].querySelector("img").src = url;
  });
}

/** Show what `completed` says; returns the pictures. */
export function showPictures(reply) {
  const { images, model, parameters, timings, warnings } = reply;
  const pictures = images.map((image) => pictureOf(image, reply));
  pictures.forEach((picture, index) => hang(figures[index], picture));
  showing(parameters.strength === null ? valuesOf(parameters, model) : null);
  say(`${images.length > 1 ? `${images.length} images` : "Done"} in ${words(timings.total)}.`);
  lines("about", [`${parameters.width} × ${parameters.height} pixels. ${spent(parameters, timings)}.`, ...warnings]);
  return pictures;
}

function hang(figure, picture) {
  const { blob, seed, parameters } = picture, url = URL.createObjectURL(blob);
  const keep = link("", () => keepSeed(field.seed.value === String(seed) ? "" : seed));
  keep.dataset.seed = seed;
  Object.assign(figure.querySelector("img"), { src: url, alt: parameters.prompt, onclick: () => enlarge(picture) });
  veil(figure.querySelector(".frame"), picture);
  figure.querySelector("figcaption").replaceChildren(
    make("span", {}, `Seed ${seed}`), make("div", {}, link("Enlarge", () => enlarge(picture)), keep, ...actionsOf(picture, url)));
}

function spent({ num_inference_steps: steps, strength }, timings) {
  const made = Math.floor(steps * (strength ?? 1)); // the last of the way, from a picture
  const stages = Object.entries({
    "queued": timings.queue, "text encoding": timings.encode,
    [`denoising (${many(made, "step")})`]: timings.denoise,
    "decoding": timings.decode + timings.image,
  });
  return stages.filter(([, seconds]) => seconds >= 0.05).map(([what, seconds]) => `${short(seconds)} ${what}`).join(", ");
}
