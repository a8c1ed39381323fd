// One request at a time, from Generate to its pictures, or to Cancel.

import { generate } from "./api.js";
import { $, say } from "./dom.js";
import { body, remember } from "./form.js";
import { keepPictures } from "./gallery.js";
import { initialOf } from "./initial-image.js";
import { clearProblem, complain } from "./problem.js";
import { rememberPrompt } from "./recent.js";
import { hangFrames, showPictures, showStep } from "./results.js";

let running = null; // the AbortController of the request

export const isRunning = () => running !== null;
export const cancel = () => running?.abort();

export async function draw() {
  const request = body(), initial = initialOf();
  const { signal } = running = new AbortController();
  clearProblem();
  say("Sending…");
  busy(true);
  remember();
  rememberPrompt(request.prompt);
  $("about").hidden = true;
  const before = hangFrames(request);
  reveal();
  try {
    const pictures = showPictures(await generate(request, listeners(), signal));
    $("result").scrollIntoView({ block: "nearest" });
    keepPictures(pictures.map((picture) => Object.assign(picture, { initial })));
    before.release();
  } catch (error) {
    before.restore();
    say(signal.aborted ? "Cancelled." : "");
    if (!signal.aborted) complain(error);
  } finally {
    running.abort(); // in any case, close the stream, which frees the rows
    running = null;
    busy(false);
    $("about").hidden = false;
  }
}

/** What the server reports, in words. Screen readers hear the status, and not the seconds beside it. */
function listeners() {
  let started = performance.now();
  const tell = (text, aside = "") => {
    if ($("status").textContent !== text) say(text);
    $("step").textContent = aside;
  };
  return {
    waiting: (text, seconds) => tell(text, seconds ? `Trying again in ${seconds} s` : ""),
    queued: ({ position, estimate_s: seconds }) =>
      tell(position ? `Queued: ${position} ahead of you.` : "Starting…", seconds ? `at most ${Math.ceil(seconds)} s` : ""),
    started: () => { started = performance.now(); tell("Generating…"); },
    step: (data) => showStep(data, (performance.now() - started) / 1000),
  };
}

/** Bring the result into view: no further than needed, or Cancel leaves the pointer. A phone shows little else. */
function reveal() {
  const isPhone = matchMedia("(max-width: 34rem)").matches;
  if (isPhone && document.activeElement === $("prompt")) $("prompt").blur(); // closes its keyboard
  if (isPhone) $("result").scrollIntoView({ block: "start" });
  else $("bar").scrollIntoView({ block: "nearest" });
}

function busy(now) {
  const focused = [$("generate"), $("cancel")].includes(document.activeElement);
  $("generate").hidden = now;
  $("cancel").hidden = !now;
  if (focused) $(now ? "cancel" : "generate").focus();
  $("bar").removeAttribute("value");
  $("bar").classList.toggle("idle", !now);
  $("pictures").setAttribute("aria-busy", now);
  $("step").textContent = "";
}

$("cancel").onclick = (event) => { if (event.detail < 2) cancel(); }; // a double click on Generate ends here
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) cancel();
});
