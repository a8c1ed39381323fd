// The scheduler's whole name, such as dpmpp_2m_karras, as two choices: a method and a noise schedule.

import { $ } from "./dom.js";
import { served } from "./model.js";

const field = $("form").elements;
const whole = (name, kind) => kind === "default" ? name : `${name}_${kind}`;

export function fillSchedulers() {
  $("method").replaceChildren(...served.model.schedulers.map(({ name, title }) => new Option(title, name)));
  field.scheduler.value = served.model.scheduler;
}

/** Show a scheduler by its whole name, or the model's own where there is none of that name. */
export function chooseScheduler(wanted) {
  const { model } = served, { schedulers } = model;
  const pairs = schedulers.flatMap(({ name, sigmas }) => sigmas.map((kind) => [name, kind]));
  const find = (one) => pairs.find((pair) => whole(...pair) === one);
  const [name, kind] = find(wanted) ?? find(model.scheduler) ?? pairs[0];
  const { sigmas, summary, calls_per_step: calls } = schedulers.find((one) => one.name === name);
  field.scheduler.value = whole(name, kind);
  $("method").value = name;
  $("sigmas").replaceChildren(...sigmas.map((one) => new Option(one[0].toUpperCase() + one.slice(1), one)));
  $("sigmas").value = kind;
  $("sigmas").parentElement.hidden = sigmas.length < 2;
  const slower = calls > 1 ? [`Each step takes ${calls === 2 ? "twice" : `${calls} times`} as long.`] : [];
  $("summary").textContent = [summary, ...slower, ...ofModel(model, name)].join(" ");
}

/** What the model sets besides, with its own method or with any: a sentence for each that is not the usual. */
function* ofModel({ scheduler, timestep_spacing: spacing, eta, timesteps, num_inference_steps: steps }, name) {
  const isOwn = scheduler === name || scheduler.startsWith(`${name}_`);
  if (spacing) yield `This model has ${spacing} timestep spacing.`;
  if (isOwn && typeof eta === "number") yield `Its eta is ${eta}.`;
  if (isOwn && timesteps) yield `Its timesteps are ${timesteps.join(", ")}, at ${steps} step${steps === 1 ? "" : "s"}.`;
}

const plain = (name) => name.toLowerCase().replace(/[^a-z0-9+]/g, "");

/** The whole name of what this server, diffusers or AUTOMATIC1111's web UI calls so; undefined where it is unknown. */
export function findScheduler(wanted) {
  const names = served.model.schedulers.flatMap(({ name, title, aliases, sigmas }) =>
    [name, title, ...aliases].flatMap((alias) => sigmas.map((kind) => [whole(alias, kind), whole(name, kind)])));
  return names.find(([alias]) => plain(alias) === plain(wanted))?.[1];
}

function schedulerChanged() {
  const name = $("method").value, kind = $("sigmas").value;
  const { sigmas } = served.model.schedulers.find((one) => one.name === name);
  chooseScheduler(sigmas.includes(kind) ? whole(name, kind) : name);
}

$("method").oninput = $("sigmas").oninput = schedulerChanged;
