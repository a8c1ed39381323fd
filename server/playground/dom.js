// Elements and words. Data reaches the page as text only.

export const BLANK = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"; // one clear pixel

export const $ = (id) => document.getElementById(id);

export const make = (tag, properties, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};

export const say = (text) => { $("status").textContent = text; };
export const lines = (id, texts) => $(id).replaceChildren(...texts.map((text) => make("p", {}, text)));
export const many = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
export const short = (seconds) => `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
export const words = (seconds) => seconds < 90 ? `${seconds.toFixed(seconds < 10 ? 1 : 0)} seconds`
  : `${many(Math.floor(seconds / 60), "minute")} ${many(Math.floor(seconds % 60), "second")}`;
