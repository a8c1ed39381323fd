// The pictures in the browser's database: { blob, name, seed, at, model, parameters, flagged, initial }, and the `id` of each.

import { SCOPE } from "./storage.js";

const done = (request) => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});

let database = null; // a promise

function open() {
  const request = indexedDB.open(SCOPE, 1);
  request.onupgradeneeded = () => request.result.createObjectStore("pictures", { keyPath: "id", autoIncrement: true });
  return done(request);
}

async function pictures(mode, use) {
  database ??= open();
  const transaction = (await database).transaction("pictures", mode);
  const result = done(use(transaction.objectStore("pictures")));
  await new Promise((resolve, reject) => {
    transaction.oncomplete = resolve;
    transaction.onabort = () => reject(transaction.error); // such as QuotaExceededError
  });
  return result;
}

/** All of them, the newest first. */
export const storedPictures = async () => (await pictures("readonly", (all) => all.getAll())).reverse();
/** Resolves to the id. */
export const storePicture = (picture) => pictures("readwrite", (all) => all.add(picture));
export const unstorePicture = (id) => pictures("readwrite", (all) => all.delete(id));
