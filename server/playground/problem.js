// What went wrong, and the lines that say so.

import { $, lines, many } from "./dom.js";

/** An error whose message is for the user: problem details of the server (RFC 9457), or of the page itself. */
export class Problem extends Error {
  constructor({ detail, title, errors = [] }, retryAfter = null) {
    super(detail || title);
    Object.assign(this, { errors, retryAfter: Number(retryAfter) });
  }
}

const LOST = "The connection to the server was lost: check that the server is running, then try again.";

export const clearProblem = () => lines("problem", []);

export function complain(error) {
  const known = error instanceof Problem;
  if (!known) console.error(error);
  const text = known ? error.message : LOST;
  const others = known ? error.errors.filter(({ message }) => !text.includes(message)) : [];
  const retry = error.retryAfter > 0 ? [`Try again in ${many(error.retryAfter, "second")}.`] : [];
  lines("problem", [text, ...others.map(({ field, message }) => `${field}: ${message}`), ...retry]);
  $("problem").scrollIntoView({ block: "nearest" });
}
