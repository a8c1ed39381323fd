// Small values in the browser's own storage. Servers under other paths of the same host have others.

export const SCOPE = `latentd ${location.pathname}`;

const path = (name) => `${SCOPE} ${name}`;

/** The value that was stored, or `otherwise`: nothing is stored where the browser forbids it. */
export function recall(name, otherwise, area = "localStorage") {
  try {
    return JSON.parse(window[area].getItem(path(name))) ?? otherwise;
  } catch {
    return otherwise;
  }
}

/** Store a value; null removes it. Says whether that was possible. */
export function store(name, value, area = "localStorage") {
  try {
    if (value === null) window[area].removeItem(path(name));
    else window[area].setItem(path(name), JSON.stringify(value));
    return true;
  } catch { // no room, or forbidden in a private window
    return false;
  }
}
