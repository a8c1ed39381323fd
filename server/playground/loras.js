// The LoRAs of the server, of which several may be chosen, each with its weight. The form has them as text, for the
// address and for earlier pictures.

import { $, make } from "./dom.js";
import { field, form, lorasIn } from "./form.js";

const list = $("lora");
const MOST = 2; // of a weight, on the slider

function choose(loras) {
  field.loras.value = loras.length ? JSON.stringify(loras) : "";
  field.loras.dispatchEvent(new Event("change", { bubbles: true }));
}

function show() {
  const chosen = lorasIn(field.loras.value);
  $("chosen-loras").replaceChildren(...chosen.map((lora) => row(lora, chosen)));
  for (const option of list.options) option.disabled = chosen.some(({ name }) => name === option.value);
}

function row(lora, chosen) {
  const shown = make("span", {}, String(lora.weight));
  const slider = make("input", { type: "range", min: -MOST, max: MOST, step: 0.05, value: lora.weight });
  slider.ariaLabel = `Weight of ${lora.name}`;
  slider.oninput = () => { shown.textContent = slider.value; };
  slider.onchange = () => {
    lora.weight = Number(slider.value);
    choose(chosen);
  };
  const remove = make("button", { type: "button", className: "link" }, "Remove");
  remove.ariaLabel = `Remove ${lora.name}`;
  remove.onclick = () => {
    choose(chosen.filter((other) => other !== lora));
    show();
    list.focus();
  };
  return make("li", {}, make("div", {}, `${lora.name} `, shown, slider), remove);
}

/** Offer these usable ones of /loras. */
export function offer(loras) {
  const options = loras.map(({ name, title, trigger_words: words }) => {
    const option = new Option(name, name);
    option.title = [title, words && `trigger words: ${words}`].filter(Boolean).join(", ");
    return option;
  });
  list.replaceChildren(new Option("Add a LoRA", ""), ...options);
  $("loras").hidden = !loras.length;
  show();
}

list.onchange = (event) => {
  event.stopPropagation();
  if (list.value) choose([...lorasIn(field.loras.value), { name: list.value, weight: 1 }]);
  list.value = "";
  show();
};
form.addEventListener("filled", show);
