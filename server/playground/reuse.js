// Earlier pictures, and picture files of any program, as the start of the next one.

import { $, say } from "./dom.js";
import { field, fillForm, form, valuesOf } from "./form.js";
import { setStrength, startFrom, take } from "./initial-image.js";
import { complain } from "./problem.js";

const VARIATION = 0.6; // strength: the same subject, drawn anew
const HEAD = 1 << 20; // bytes of a file that are searched for settings
const WORDS = {
  num_inference_steps: "steps", guidance_scale: "guidance scale", negative_prompt: "negative prompt",
  original_size: "original size", target_size: "target size", crops_coords_top_left: "crop",
  cache: "quality",
};

/** The form's values, as text, that give this one picture again. */
const valuesOfOne = ({ parameters, seed, model }) => valuesOf({ ...parameters, seed, num_images: 1 }, model);

/** Fill the form with these values, and say which of them, and which `others`, it cannot have. */
function restore(values, others) {
  const refused = fillForm(values).map((name) => `${WORDS[name] ?? name} ${values[name]}`);
  const lost = [...refused, ...others].join(", ");
  say(`The settings are restored.${lost && ` Not available here: ${lost}.`}`);
  field.prompt.focus();
  form.scrollIntoView({ block: "nearest" });
}

/** Fill the form so that it gives this picture again. */
export async function restoreSettings(picture) {
  startFrom(null);
  if (picture.initial) await take(picture.initial.file);
  restore(valuesOfOne(picture), picture.initial?.isMasked ? ["the mask"] : []);
  if (picture.initial) setStrength(picture.parameters.strength);
}

/** Generate from a picture, with its settings and a new seed. */
export async function vary(picture) {
  fillForm({ ...valuesOfOne(picture), seed: "" });
  if (!await take(new File([picture.blob], picture.name))) return;
  setStrength(VARIATION);
  form.requestSubmit();
}

/** Start from a file that the user brings, and offer the settings that are in it. */
export async function bring(file) {
  $("offer").hidden = true;
  const [, found] = await Promise.all([take(file), settingsIn(file).catch(complain)]);
  if (found) offer(found);
}

async function settingsIn(file) {
  const { readParameters } = await import("./metadata.js");
  const head = await file.slice(0, HEAD).arrayBuffer().catch(() => new ArrayBuffer(0)); // `take` says that it is unreadable
  const text = await readParameters(new Uint8Array(head));
  return text && parse(text);
}

async function parse(text) {
  const { parseInfotext, settingsOf } = await import("./infotext.js");
  const parsed = parseInfotext(text);
  return parsed && { ...settingsOf(parsed), isFromImage: "Denoising strength" in parsed.fields };
}

function offer(found) {
  $("offer").hidden = false;
  $("restore").onclick = () => {
    $("offer").hidden = true;
    restoreFound(found);
  };
}

function restoreFound({ values, others, isFromImage }) {
  startFrom(null);
  restore(values, isFromImage ? [...others, "the initial image"] : others);
}

/** A prompt with settings below it, as the web UI writes them, is restored as a whole. */
field.prompt.addEventListener("paste", async (event) => {
  const text = event.clipboardData.getData("text/plain");
  if (!/\nSteps: \d+, /.test(text)) return;
  event.preventDefault();
  const found = await parse(text).catch(complain);
  if (found) restoreFound(found);
  else field.prompt.setRangeText(text);
});
$("file").onchange = ({ target }) => {
  if (target.files.length) bring(target.files[0]);
  target.value = ""; // so that the same file can be chosen again
};
