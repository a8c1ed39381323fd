// The sizes that condition models such as Stable Diffusion XL. The API has [height, width] and [top, left].

import { $ } from "./dom.js";
import { served } from "./model.js";

const field = $("form").elements;
const SIZES = ["original_size", "target_size"], CROP = "crops_coords_top_left";
export const CONDITIONS = [...SIZES, CROP];

/** Have fields for them only where the model has such conditions. */
export function fillConditions() {
  const has = Boolean(served.model.size_conditions);
  for (const name of CONDITIONS) {
    field[name].parentElement.hidden = field[name].disabled = !has;
    if (!has) field[name].value = "";
  }
}

/** The fields of a request: those that were filled in. */
export function conditions() {
  const given = CONDITIONS.filter((name) => field[name].value);
  const pair = (name) => field[name].value.split(/[x×,]/).map(Number);
  return Object.fromEntries(given.map((name) => [name, name === CROP ? pair(name) : pair(name).reverse()]));
}

/** The values, as text, of parameters: empty where they are the defaults. */
export function conditionsOf(parameters) {
  const own = `${parameters.width}x${parameters.height}`;
  const sizes = SIZES.map((name) => [name, [...parameters[name] ?? []].reverse().join("x")]);
  const crop = parameters[CROP]?.some(Boolean) ? parameters[CROP].join(", ") : "";
  return { ...Object.fromEntries(sizes.map(([name, text]) => [name, text === own ? "" : text])), [CROP]: crop };
}
