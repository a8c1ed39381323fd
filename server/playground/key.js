// The API key of a server that asks for one. It stays in this browser.

import { $ } from "./dom.js";
import { recall, store } from "./storage.js";

let key = recall("key", null, "sessionStorage") ?? recall("key", null);
let asked = null; // while the form is shown: { promise, resolve }

/** The headers that carry it. */
export const authorization = () => key ? { Authorization: `Bearer ${key}` } : {};

/** Ask for one, saying why; resolves when it is given. */
export function askForKey(reason, signal) {
  if (!asked) {
    asked = withResolvers();
    showForm(reason);
  }
  return Promise.race([asked.promise, aborted(signal)]);
}

function withResolvers() {
  let resolve;
  return { promise: new Promise((given) => { resolve = given; }), resolve };
}

const aborted = (signal) => new Promise((_, reject) => {
  signal?.addEventListener("abort", () => reject(signal.reason), { once: true });
});

function showForm(reason) {
  $("key-reason").textContent = reason;
  $("access").hidden = false;
  $("key").value = "";
  $("key").focus();
}

function use(next) {
  key = next;
  const stays = $("key-stays").checked;
  store("key", stays ? key : null);
  store("key", stays ? null : key, "sessionStorage");
  $("change-key").hidden = !key;
}

$("access").addEventListener("submit", (event) => {
  event.preventDefault();
  use($("key").value.trim());
  $("access").hidden = true;
  asked?.resolve();
  asked = null;
  $("prompt").focus();
});
$("change-key").onclick = () => showForm("This key replaces the one in use.");
$("change-key").hidden = !key;
