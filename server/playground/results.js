// The pictures of a request: empty frames, previews, then the files.

import { $, BLANK, lines, make, many, say, short, words } from "./dom.js";
import { field, keepSeed, showing, valuesOf } from "./form.js";
import { useAsStart } from "./initial-image.js";

let figures = [];

export const hasPictures = () => figures.length > 0;

/** Hang up empty frames for a request; returns a function that brings the pictures before them back. */
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
export function showStep({ step, steps, preview }, seconds) {
  const left = seconds / step * (steps - step);
  $("bar").value = step / steps;
  $("step").textContent = `Step ${step} of ${steps}` + (step > 2 && left > 2 ? `, ${Math.ceil(left)} s left` : "");
  if (preview?.startsWith("data:image/")) figures[0].querySelector("img").src = preview; // of the first picture
}

/** Show what `completed` says. */
export function showPictures({ images, parameters, timings, warnings }) {
  images.forEach((image, index) => hang(figures[index], image, parameters.prompt));
  showing(parameters.strength === null ? valuesOf(parameters) : null);
  say(`${images.length > 1 ? `${images.length} images` : "Done"} in ${words(timings.total)}.`);
  lines("about", [`${parameters.width} × ${parameters.height} pixels. ${spent(parameters, timings)}.`, ...warnings]);
}

function hang(figure, { seed, format, image }, prompt) {
  const bytes = Uint8Array.from(atob(image), (letter) => letter.charCodeAt(0));
  const file = new Blob([bytes], { type: `image/${format}` }), url = URL.createObjectURL(file);
  const name = fileName(prompt, seed, format);
  const keep = make("button", { type: "button", className: "link" });
  keep.dataset.seed = seed;
  keep.onclick = () => keepSeed(field.seed.value === String(seed) ? "" : seed);
  const use = make("button", { type: "button", className: "link" }, "Use as initial image");
  use.onclick = () => useAsStart(new File([file], name));
  Object.assign(figure.querySelector("img"), { src: url, alt: prompt });
  figure.querySelector("figcaption").replaceChildren(
    make("span", {}, `Seed ${seed}`), make("div", {}, keep, use, make("a", { href: url, download: name }, "Download")));
}

function fileName(prompt, seed, format) {
  const words = prompt.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60).replace(/^-|-$/g, "");
  return `${words || "image"}-${seed}.${format}`;
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
