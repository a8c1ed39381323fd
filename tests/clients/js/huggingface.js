// Calls the server at URL with Hugging Face's client: node huggingface.js CASE URL. Prints what it gave as JSON.
import { InferenceClient, InferenceClientProviderApiError } from "@huggingface/inference";

const [name, url] = process.argv.slice(2);
const client = new InferenceClient(undefined, { endpointUrl: `${url}/generate` });

async function encoded(blob) {
  return { type: blob.type, image: Buffer.from(await blob.arrayBuffer()).toString("base64") };
}

const cases = {
  async picture() {
    const parameters = { num_inference_steps: 4, seed: 7 };
    return encoded(await client.textToImage({ inputs: "a red heart", parameters }));
  },

  async defaults() {
    return encoded(await client.textToImage({ inputs: "a red heart" }));
  },

  async edit() {
    const inputs = await client.textToImage({ inputs: "a red heart", parameters: { num_inference_steps: 4 } });
    const parameters = { prompt: "a blue heart", num_inference_steps: 8 };
    return encoded(await client.imageToImage({ inputs, parameters }));
  },

  async invalid() {
    return refusal(() => client.textToImage({ inputs: "a cat", parameters: { num_inference_steps: 0 } }));
  },

  async full() {
    return refusal(() => client.textToImage({ inputs: "a cat" }));
  },

  async cancel() {
    const aborter = new AbortController();
    const slow = { inputs: "a cat", parameters: { num_inference_steps: 200 } };
    const call = client.textToImage(slow, { signal: aborter.signal });
    call.catch(() => {});
    while (!(await (await fetch(`${url}/metrics`)).text()).includes("latentd_requests_running 1.0"));
    aborter.abort();
    return call.then(() => ({ name: "an image" }), (error) => ({ name: error.name }));
  },
};

async function refusal(call) {
  try {
    await call();
  } catch (error) {
    if (!(error instanceof InferenceClientProviderApiError)) throw error;
    return { message: error.message, status: error.httpResponse.status };
  }
  throw new Error("it was not refused");
}

console.log(JSON.stringify(await cases[name]()));
