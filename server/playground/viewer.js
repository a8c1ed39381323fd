// One picture of the gallery, with its settings.

import { actionsOf, link, veil } from "./actions.js";
import { $, make } from "./dom.js";
import { restoreSettings } from "./reuse.js";

let pictures = [], at = 0, remove = null, url = "";

/** Show `picture`, one of `all`; `removed(picture)` deletes one. */
export function openViewer(all, picture, removed) {
  [pictures, at, remove] = [all, all.indexOf(picture), removed];
  show();
  $("viewer").showModal();
}

const close = () => $("viewer").close();

function show() {
  const picture = pictures[at];
  URL.revokeObjectURL(url);
  url = URL.createObjectURL(picture.blob);
  $("viewer-title").textContent = `Image ${at + 1} of ${pictures.length}`;
  const { width, height, prompt } = picture.parameters, scale = width < 200 ? Math.floor(384 / width) : 1;
  Object.assign($("viewed"), { src: url, alt: prompt });
  $("viewed").style.width = `${width * scale}px`;
  $("viewed").classList.toggle("tiny", scale > 1);
  $("viewed").style.aspectRatio = `${width} / ${height}`;
  veil($("viewed").parentElement, picture);
  $("settings").replaceChildren(...facts(picture).flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, String(value))]));
  $("viewer-actions").replaceChildren(
    link("Restore settings", () => { close(); restoreSettings(picture); }),
    ...actionsOf(picture, url, close), link("Delete", drop));
  $("previous").disabled = at === 0;
  $("next").disabled = at === pictures.length - 1;
}

function facts({ parameters: made, seed, model, at: time }) {
  const all = [
    ["Prompt", made.prompt], ["Negative prompt", made.negative_prompt], ["Seed", seed],
    ["Size", `${made.width} × ${made.height}`], ["Steps", made.num_inference_steps],
    ["Guidance scale", made.guidance_scale], ["Scheduler", made.scheduler],
    ["Decoder", made.decoder === "fast" ? "fast" : ""],
    ["Strength", made.strength === null ? "" : `${made.strength}, from an initial image`],
    ["Model", model], ["Made", new Date(time).toLocaleString()],
  ];
  return all.filter(([, value]) => value !== "");
}

function drop() {
  const [picture] = pictures.splice(at, 1);
  remove(picture);
  if (!pictures.length) return close();
  at = Math.min(at, pictures.length - 1);
  show();
  $("viewer-actions").lastElementChild.focus();
}

function go(steps) {
  const next = at + steps;
  if (!pictures[next]) return;
  at = next;
  show();
}

/** At its own size, a pixel for each, or as large as there is room. */
function zoom() {
  const isActual = $("viewer").classList.toggle("actual");
  $("zoom").textContent = isActual ? "Fit" : "100 %";
}

$("zoom").onclick = $("viewed").onclick = zoom;
$("previous").onclick = () => go(-1);
$("next").onclick = () => go(1);
$("close").onclick = close;
$("viewer").addEventListener("keydown", ({ key }) => {
  if (key === "ArrowLeft") go(-1);
  if (key === "ArrowRight") go(1);
  if (key === "z") zoom();
});
$("viewer").addEventListener("click", ({ target }) => { if (target === $("viewer")) close(); }); // beside it
$("viewer").addEventListener("close", () => {
  URL.revokeObjectURL(url);
  $("viewed").removeAttribute("src");
  if (document.activeElement === document.body) $("thumbnails").querySelector("[tabindex='0']")?.focus();
});
