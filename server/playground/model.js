// What the server says about its models.

/**
 * `models` are the entries of /models, the default first, each with its `schedulers` of /schedulers; `model` is the one that
 * the form is for. Empty and null until they are known.
 */
export const served = { models: [], model: null };

/** The models of the server, for which `ask(path)` gives what it answers. */
export async function modelsOf(ask) {
  const models = await ask("models"), isOne = models.length === 1;
  const path = ({ name }) => isOne ? "schedulers" : `schedulers?model=${encodeURIComponent(name)}`;
  return Promise.all(models.map(async (model) => ({ ...model, schedulers: await ask(path(model)) })));
}

/** A model's name as the form has it: empty where there is no choice. */
export const choiceOf = (name) => served.models.length > 1 ? name : "";
