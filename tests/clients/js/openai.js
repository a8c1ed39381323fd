// Calls the server at URL with OpenAI's client: node openai.js CASE URL. Prints what the client gave as JSON.
import OpenAI, { APIError, toFile } from "openai";

const [name, url] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const quick = { num_inference_steps: 4, seed: 7 };

const cases = {
  async picture() {
    const { data, size } = await client.images.generate({ prompt: "a red heart", n: 2, ...quick });
    return { size, images: data.map((image) => image.b64_json), urls: data.map((image) => image.url) };
  },

  async stream() {
    const stream = await client.images.generate({ prompt: "a red heart", stream: true, partial_images: 2, ...quick });
    const events = [];
    for await (const event of stream) events.push([event.type, event.partial_image_index ?? null]);
    return { events };
  },

  async edit() {
    const { data } = await client.images.generate({ prompt: "a red heart", ...quick });
    const image = await toFile(Buffer.from(data[0].b64_json, "base64"), "image.png", { type: "image/png" });
    const edited = await client.images.edit({ image, prompt: "a blue heart", num_inference_steps: 8 });
    return { images: edited.data.map((one) => one.b64_json) };
  },

  async models() {
    const models = [];
    for await (const model of client.models.list()) models.push(model.id);
    return { models };
  },

  async invalid() {
    return refusal(() => client.images.generate({ prompt: "a cat", n: 11 }));
  },

  async unknown() {
    return refusal(() => client.images.generate({ prompt: "a cat", model: "dall-e-3" }));
  },

  async full() {
    return refusal(() => client.images.generate({ prompt: "a cat" }));
  },

  async cancel() {
    const slow = { prompt: "a cat", stream: true, partial_images: 3, num_inference_steps: 200 };
    const stream = await client.images.generate(slow);
    for await (const event of stream) {
      stream.controller.abort();
      return { first: event.type };
    }
  },
};

async function refusal(call) {
  try {
    await call();
  } catch (error) {
    if (!(error instanceof APIError)) throw error;
    const { status, code, param, type, requestID } = error;
    const retryAfter = Number(error.headers.get("retry-after"));
    return { class: error.constructor.name, status, code, param, type, requestID, retryAfter };
  }
  throw new Error("it was not refused");
}

console.log(JSON.stringify(await cases[name]()));
