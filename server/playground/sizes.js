// The sizes that the model was built for, by shape.

import { $, make } from "./dom.js";
import { served } from "./model.js";

const list = $("form").elements.size;
const SHAPES = { Square: (way) => way === 0, Portrait: (way) => way < 0, Landscape: (way) => way > 0 };
const sides = (size) => size.split("x").map(Number);
const swapped = (size) => size.split("x").reverse().join("x");

export function fillSizes() {
  const { resolutions } = served.model, isDefault = (size) => size === resolutions[0];
  const option = (size) => new Option(size.replace("x", " × "), size, isDefault(size), isDefault(size));
  const groups = Object.entries(SHAPES).map(([label, fits]) => {
    const sizes = resolutions.filter((size) => { const [width, height] = sides(size); return fits(width - height); });
    return make("optgroup", { label }, ...sizes.map(option));
  });
  list.replaceChildren(...groups.filter((group) => group.children.length));
  sizeChanged();
}

/** Offer to swap width and height where the other size exists. */
export function sizeChanged() {
  const other = swapped(list.value);
  $("swap").hidden = other === list.value || !served.model?.resolutions.includes(other);
}

$("swap").onclick = () => {
  list.value = swapped(list.value);
  list.dispatchEvent(new Event("change", { bubbles: true }));
};
