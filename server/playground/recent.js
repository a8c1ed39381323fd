// The last prompts: arrow up in an empty prompt, or a list.

import { $, make } from "./dom.js";
import { recall, store } from "./storage.js";

const MOST = 50;
const prompt = $("prompt");

let prompts = recall("prompts", []);
let at = -1; // the one that arrow up has reached
let draft = ""; // what was there before

export function rememberPrompt(text) {
  prompts = [text, ...prompts.filter((one) => one !== text)].slice(0, MOST);
  at = -1;
  update();
}

function update() {
  store("prompts", prompts.length ? prompts : null);
  $("recent").hidden = !prompts.length;
  $("prompts").replaceChildren(...prompts.map(entry));
}

function entry(text) {
  const onclick = () => {
    show(text);
    $("recent").open = false;
    prompt.focus();
  };
  return make("li", {}, make("button", { type: "button", className: "link", onclick }, text));
}

function show(text) {
  prompt.value = text;
  prompt.dispatchEvent(new Event("input", { bubbles: true }));
}

/** Go so many prompts back in time. Only from the beginning of the prompt, or on the way: the arrows move the caret too. */
function go(steps) {
  const isOnTheWay = at >= 0 && prompt.value === prompts[at], isAtStart = prompt.selectionEnd === 0;
  const next = (isOnTheWay ? at : -1) + steps;
  if (next >= prompts.length || next < -1 || !(isOnTheWay || (isAtStart && steps > 0))) return false;
  if (!isOnTheWay) draft = prompt.value;
  at = next;
  show(at < 0 ? draft : prompts[at]);
  return true;
}

prompt.addEventListener("keydown", (event) => {
  const steps = { ArrowUp: 1, ArrowDown: -1 }[event.key];
  if (steps && !event.shiftKey && !event.isComposing && go(steps)) event.preventDefault();
});
$("forget").onclick = () => {
  prompts = [];
  update();
  prompt.focus();
};

update();
