// Styles: words at the end of the prompt, where they are seen and can be edited.

import { $ } from "./dom.js";
import { served } from "./model.js";

const STYLES = {
  "Photograph": ", photograph, natural light, sharp focus", "Oil painting": ", oil painting, visible brush strokes",
  "Watercolour": ", watercolour painting, soft washes", "Line drawing": ", black ink line drawing on white paper",
  "Comic": ", comic book art, bold outlines, flat colours", "Pixel art": ", pixel art, limited palette",
  "3D render": ", 3D render, studio lighting", "Poster": ", vintage travel poster, screen print",
};
const COLOURS = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "white", "black", "gray"];
const BACKGROUNDS = Object.fromEntries(COLOURS.map((name) => [name, ` on a${name === "orange" ? "n" : ""} ${name} background`]));

const list = $("style"), prompt = $("prompt");

const chosen = () => [...list.options].find(({ value }) => value && prompt.value.trimEnd().endsWith(value));

/** Offer what the model can draw: the demo model knows no styles. */
export function fillStyles() {
  const isDemo = served.model.name === "latentd-demo";
  $("style-label").textContent = isDemo ? "Background" : "Style";
  const all = Object.entries(isDemo ? BACKGROUNDS : STYLES);
  list.replaceChildren(new Option("As in the prompt", ""), ...all.map(([name, words]) => new Option(name, words)));
  styleChanged();
}

/** Show which style the prompt ends with. */
export const styleChanged = () => { list.value = chosen()?.value ?? ""; };

list.onchange = () => {
  const { value } = list, before = chosen()?.value.length ?? 0, text = prompt.value.trimEnd();
  prompt.value = text.slice(0, text.length - before) + value;
};
prompt.addEventListener("input", styleChanged);
