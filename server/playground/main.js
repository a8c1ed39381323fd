// The page: what happens at its start, and on what the user does to the form.

import { get, untilGood } from "./api.js";
import { $, say } from "./dom.js";
import { draw, isRunning } from "./drawing.js";
import { field, form, keepSeed, NAMES, remember, restore, seedChanged, useModel } from "./form.js";
import { loadGallery } from "./gallery.js";
import { imageChanged, startFrom } from "./initial-image.js";
import "./mask-keys.js";
import { choiceOf, modelsOf, served } from "./model.js";
import { onArrival } from "./picture-file.js";
import { complain } from "./problem.js";
import { hasPictures } from "./results.js";
import { bring } from "./reuse.js";

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (served.model && !isRunning()) draw();
});
form.addEventListener("input", seedChanged);
form.addEventListener("change", () => { imageChanged(); remember(); });
form.addEventListener("invalid", ({ target }) => { $("options").open ||= $("options").contains(target); }, true);
field.prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  form.requestSubmit();
});
addEventListener("hashchange", () => {
  form.reset();
  field.scheduler.value = served.model?.scheduler ?? "";
  field.loras.value = "";
  startFrom(null);
  restore(NAMES);
});
$("new-seed").onclick = () => { keepSeed(""); field.prompt.focus(); };
$("copy").onclick = ({ target }) => {
  if (target.type === "button") import("./copying.js").then(({ copy }) => copy(target.textContent), complain);
};
onArrival(bring, (now) => form.classList.toggle("dropping", now));

async function offerLoras() {
  const { name } = served.model, answer = await get(choiceOf(name) ? `loras?model=${encodeURIComponent(name)}` : "loras");
  const loras = answer.ok ? (await answer.json()).filter(({ usable }) => usable) : [];
  if (loras.length || !$("loras").hidden) (await import("./loras.js")).offer(loras);
}

form.addEventListener("model", () => offerLoras().catch(complain));

const waiting = (text) => { if (!isRunning()) say(text); };
const ask = async (path) => (await untilGood(path, waiting)).json();

startFrom(null);
restore(["prompt"]);
loadGallery();
served.models = await modelsOf(ask);
useModel();
$("generate").disabled = false;
restore(NAMES.filter((name) => name !== "prompt"));
await untilGood("v2/health/ready", waiting);
if (!isRunning() && !hasPictures()) say(field.seed.value ? "Press Generate to create the image of this link." : "");
