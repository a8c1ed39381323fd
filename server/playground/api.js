// The server's API. All paths are relative, so that they work under any prefix.

import { events } from "./events.js";
import { Problem } from "./problem.js";

const pause = (seconds, signal) => new Promise((resolve, reject) => {
  setTimeout(resolve, seconds * 1000);
  signal?.addEventListener("abort", () => reject(signal.reason), { once: true });
});

/** Ask until the answer is good; `waiting` hears what is being waited for. */
export async function untilGood(path, waiting, signal) {
  for (;;) {
    const answer = await fetch(path, { signal }).catch(() => signal?.throwIfAborted());
    if (answer?.ok) return answer;
    waiting(answer ? "The model is loading. Please wait." : "The server does not respond. Retrying…");
    await pause(2, signal);
  }
}

async function post(request, waiting, signal) {
  for (;;) {
    const answer = await fetch("generate", {
      method: "POST", body: JSON.stringify(request), signal,
      headers: { "Content-Type": "application/json", Accept: "text/event-stream" },
    });
    if (answer.ok) return answer;
    if (answer.status !== 503) throw await problemOf(answer);
    waiting("The model is loading. Your request is sent as soon as it is ready.");
    await pause(1, signal);
    await untilGood("v2/health/ready", waiting, signal);
  }
}

async function problemOf(answer) {
  const unexplained = { detail: `The server returned status ${answer.status} without an explanation.` };
  return new Problem(await answer.json().catch(() => unexplained), answer.headers.get("Retry-After"));
}

/**
 * One request from its first event to its last; returns what `completed` says.
 * `on` has a function for each other event (queued, started, step), and `waiting` for words about the wait before them.
 */
export async function generate(request, on, signal) {
  const answer = await post(request, on.waiting, signal);
  for await (const { name, data } of events(answer.body)) {
    if (name === "completed") return data;
    if (name === "error") throw new Problem(data);
    on[name]?.(data);
  }
  throw new Problem({ detail: "The connection closed before the image was complete: try again." });
}
