// What the server says about itself.

/** `model` is the entry of /models, and `schedulers` are those of /schedulers; null and empty until they are known. */
export const served = { model: null, schedulers: [] };
