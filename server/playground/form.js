// The form, and the URL fragment that restores it.

import { $, make } from "./dom.js";
import { imageFields, imageChanged } from "./initial-image.js";
import { choiceOf, served } from "./model.js";
import { chooseScheduler, fillSchedulers, findScheduler } from "./scheduler.js";
import { CONDITIONS, conditions, conditionsOf, fillConditions } from "./size-conditions.js";
import { fillSizes } from "./sizes.js";
import { fillStyles, styleChanged } from "./styles.js";

export const form = $("form");
export const field = form.elements;
export const NAMES = [ // the model first: others are chosen from what it has
  "model", "prompt", "negative_prompt", "size", "num_inference_steps", "guidance_scale", "scheduler", "seed", "num_images",
  "cache", "decoder", "loras", ...CONDITIONS,
];
const TAG = /<(?:lora|lyco):([^<>:]+)(?::([^<>:]+))?>/gi;

let shown = null; // the form's values, as text, that give the pictures on the page, if those alone do

/** The LoRAs that a text of the form's field has, [{ name, weight }]; none if it is not such a text. */
export function lorasIn(text) {
  try {
    return JSON.parse(text || "[]").filter(({ name, weight }) => typeof name === "string" && Number.isFinite(weight));
  } catch {
    return [];
  }
}

/** The same, as text, of parameters, without those that tags in the prompt name. */
function lorasOf({ prompt, loras = [] }) {
  const key = (name, weight) => `${name.trim().split("/").pop()}:${Number(weight)}`;
  const tagged = [...prompt.matchAll(TAG)].map(([, name, weight = 1]) => key(name, weight));
  const others = loras.filter(({ name, weight }) => !tagged.includes(key(name, weight)));
  return others.length ? JSON.stringify(others) : "";
}

/** The request that the form describes. */
export function body() {
  const number = (name) => field[name].value === "" ? undefined : Number(field[name].value);
  const [width, height] = field.size.value.split("x").map(Number);
  const steps = number("num_inference_steps"), loras = lorasIn(field.loras.value);
  return {
    prompt: field.prompt.value, negative_prompt: field.negative_prompt.value, width, height,
    num_inference_steps: steps, guidance_scale: number("guidance_scale"), seed: number("seed"),
    num_images: number("num_images"), scheduler: field.scheduler.value, preview_every: Math.ceil(steps / 10),
    cache: field.cache.value || undefined, model: field.model.value || undefined, decoder: field.decoder.value || undefined,
    ...loras.length ? { loras } : {}, ...conditions(), ...imageFields(),
  };
}

/** The values, as text, of a form that gives the pictures of `parameters` by the model of this name again. */
export function valuesOf(parameters, model) {
  const state = { ...parameters, size: `${parameters.width}x${parameters.height}`, model: choiceOf(model),
    cache: served.model.step_cache ? parameters.cache ?? "" : "", decoder: parameters.decoder === "fast" ? "fast" : "",
    loras: lorasOf(parameters), ...conditionsOf(parameters) };
  return Object.fromEntries(NAMES.map((name) => [name, String(state[name])]));
}

/** Say which values give the pictures on the page; null where values alone do not. */
export function showing(values) {
  shown = values;
  seedChanged();
  remember();
}

/** Keep the form in the address, with the seed and the step cache of the pictures shown where they are what it describes. */
export function remember() {
  styleChanged();
  const state = Object.fromEntries(NAMES.map((name) => [name, field[name].value]));
  const same = shown && NAMES.every((name) => state[name] === shown[name] || (["seed", "cache"].includes(name) && state[name] === ""));
  const kept = Object.entries(same ? shown : state).filter(([, value]) => value !== "");
  history.replaceState(null, "", "#" + new URLSearchParams(kept));
}

/** Fill the fields of these names from the address. */
export function restore(names) {
  const state = new URLSearchParams(location.hash.slice(1));
  if (served.model) useModel(state.get("model"));
  for (const name of names.filter((name) => name !== "model" && state.has(name))) setField(name, state.get(name));
  if (served.model) chooseScheduler(field.scheduler.value);
  imageChanged();
  seedChanged();
  form.dispatchEvent(new Event("filled"));
}

/** Set a field, if it can have the value; says whether it can. */
function setField(name, value) {
  const before = field[name].value;
  if (!field[name].disabled) field[name].value = value; // disabled are those that this model does not have
  if (field[name].value === "" && field[name].required) field[name].value = before;
  if (field[name].selectedIndex === -1) field[name].value = before; // this model does not have it
  return field[name].value === value;
}

/** Fill the form with values, as text; others get their defaults. Returns the names of those that are not available. */
export function fillForm({ model, ...values }) {
  form.reset();
  const refused = useModel(model) ? [] : ["model"];
  field.scheduler.value = served.model.scheduler;
  field.loras.value = "";
  refused.push(...Object.keys(values).filter((name) => name !== "scheduler" && !setField(name, values[name])));
  const scheduler = values.scheduler && findScheduler(values.scheduler);
  if (values.scheduler && !scheduler) refused.push("scheduler");
  chooseScheduler(scheduler || served.model.scheduler);
  imageChanged();
  seedChanged();
  remember();
  form.dispatchEvent(new Event("filled"));
  return refused;
}

export function keepSeed(seed) {
  field.seed.value = seed;
  seedChanged();
  remember();
}

export function seedChanged() {
  const kept = field.seed.value;
  $("kept").hidden = kept === "";
  $("seed-kept").textContent = kept;
  for (const button of document.querySelectorAll("[data-seed]")) {
    button.textContent = button.dataset.seed === kept ? "Random seed" : "Fix this seed";
  }
}

const DEFAULTS = { // of fields, by model
  size: ({ resolutions }) => resolutions[0], num_inference_steps: (model) => String(model.num_inference_steps),
  guidance_scale: (model) => String(model.guidance_scale), scheduler: ({ scheduler }) => scheduler,
};

/**
 * Have the form be for the model of this name, or the first: fields that have the default of the model before get its own.
 * Says whether there is such a model.
 */
export function useModel(name) {
  const { models, model: before } = served, found = models.find((one) => choiceOf(one.name) === (name ?? ""));
  served.model = found ?? models[0];
  if (served.model !== before) {
    const kept = before ? Object.keys(DEFAULTS).filter((one) => field[one].value !== DEFAULTS[one](before)) : [];
    const values = kept.map((one) => [one, field[one].value]);
    describe();
    if (before) for (const one in DEFAULTS) setField(one, DEFAULTS[one](served.model));
    for (const [one, value] of values) setField(one, value);
    chooseScheduler(field.scheduler.value);
  }
  field.model.value = choiceOf(served.model.name);
  return Boolean(found) || !choiceOf(name);
}

field.model.onchange = ({ target }) => useModel(target.value);

/** Offer what the model has. */
function describe() {
  const { model, models } = served;
  const most = Math.max(1, Math.min(4, Math.floor(model.max_rows / 2))); // a guided picture takes two rows
  $("model").textContent = model.name;
  $("model").title = `${model.backend}, ${model.precision}`;
  $("notes").textContent = model.notes ?? "";
  field.model.replaceChildren(...models.map(({ name }) => new Option(name, choiceOf(name))));
  field.model.parentElement.hidden = models.length < 2;
  fillSizes();
  fillDecoders();
  fillConditions();
  field.cache.parentElement.hidden = field.cache.disabled = !model.step_cache;
  if (!model.step_cache) field.cache.value = "";
  fillStyles();
  fillSchedulers();
  fill("num_images", [1, 2, 3, 4].slice(0, most), 1);
  for (const name of ["num_inference_steps", "guidance_scale"]) field[name].defaultValue = model[name];
  $("examples").replaceChildren(...model.examples.slice(0, 6).map(example));
  $("examples").hidden = !model.examples.length;
  form.dispatchEvent(new Event("model"));
}

/** Have the choice only where the model has a decoder besides its VAE. */
function fillDecoders() {
  const has = Boolean(served.model.fast_decoder);
  field.decoder.parentElement.hidden = field.decoder.disabled = !has;
  if (!has) field.decoder.value = "";
}

function fill(name, options, chosen) {
  const entries = options.map((option) => new Option(option, option, option === chosen, option === chosen));
  field[name].replaceChildren(...entries);
}

function example(text) {
  const onclick = () => {
    field.prompt.value = text;
    form.requestSubmit();
  };
  return make("li", {}, make("button", { type: "button", onclick }, text));
}
