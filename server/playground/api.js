// The server's API. All paths are relative, so that they work under any prefix.

import { events } from "./events.js";
import { askForKey, authorization } from "./key.js";
import { Problem } from "./problem.js";

const LONGEST_WAIT = 300; // seconds; a server that asks for more is not waited for
const UNEXPLAINED = {
  403: "The server does not allow this: your API key, or a proxy in front of the server, forbids it.",
  413: "The request is too large for the server or a proxy in front of it: choose a smaller image.",
};

const pause = (seconds, signal) => new Promise((resolve, reject) => {
  setTimeout(resolve, seconds * 1000);
  signal?.addEventListener("abort", () => reject(signal.reason), { once: true });
});

/** fetch with the API key; where the server asks for one, the user is asked. */
async function send(path, options = {}) {
  for (;;) {
    const answer = await fetch(path, { ...options, headers: { ...options.headers, ...authorization() } });
    if (answer.status !== 401) return answer;
    await askForKey((await problemOf(answer)).message, options.signal);
  }
}

/** One answer, good or not. */
export const get = (path) => send(path);

async function problemOf(answer) {
  const detail = UNEXPLAINED[answer.status] ?? `The server returned status ${answer.status} without an explanation.`;
  return new Problem(await answer.json().catch(() => ({ detail })), answer.headers.get("Retry-After"));
}

/** Ask until the answer is good; `waiting` hears what is being waited for. */
export async function untilGood(path, waiting, signal) {
  for (;;) {
    const answer = await send(path, { signal }).catch(() => signal?.throwIfAborted());
    if (answer?.ok) return answer;
    waiting(answer ? "The model is loading. Please wait." : "The server does not respond. Retrying…");
    await pause(2, signal);
  }
}

async function post(request, waiting, signal) {
  for (;;) {
    const answer = await send("generate", {
      method: "POST", body: JSON.stringify(request), signal,
      headers: { "Content-Type": "application/json", Accept: "text/event-stream" },
    });
    if (answer.ok) return answer;
    const problem = await problemOf(answer);
    if (![429, 503].includes(answer.status) || problem.retryAfter > LONGEST_WAIT) throw problem;
    for (let left = problem.retryAfter || 1; left > 0; left -= 1) {
      waiting(problem.message, left);
      await pause(1, signal);
    }
    if (answer.status === 503) await untilGood("v2/health/ready", waiting, signal);
  }
}

/**
 * One request from its first event to its last; returns what `completed` says.
 * `on` has a function for each other event (queued, started, step), and `waiting(text, seconds)` for what is waited for
 * before them, with the seconds left where they are known.
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
