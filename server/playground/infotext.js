// The text that AUTOMATIC1111's web UI writes into images, and latentd too:
//
//   a red heart
//   Negative prompt: blurry
//   Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 42, Size: 512x512, Model: sd15

const NEGATIVE = "Negative prompt:";
const FEWEST_FIELDS = 3; // of a last line that is not the prompt's
const FIELD = /\s*(\w[\w /-]+):\s*("(?:\\.|[^\\"])+"(?=,|$)|[^,]*)(?:,|$)/g;
const OWN = { // names of the form's fields, and what the text calls them
  model: "Model", num_inference_steps: "Steps", guidance_scale: "CFG scale", seed: "Seed", size: "Size",
  original_size: "Original size", target_size: "Target size", cache: "Cache",
};
const WITHOUT_EFFECT = [ // here, or restored as a part of another one
  "Steps", "CFG scale", "Seed", "Size", "Sampler", "Schedule type", "Model", "Model hash", "Version", "RNG",
  "VAE", "VAE hash", "Timestep spacing", "Final sigmas type", "Cache", "Full steps", "Exact", "Denoising strength",
  "Lora hashes", "VAE Decoder", "Original size", "Target size", "Crop top", "Crop left",
];

/** Prompts and fields: { prompt, negative, fields }, the fields by their own names; null where it is no such text. */
export function parseInfotext(text) {
  const lines = text.trim().split("\n").map((line) => line.trim());
  const fields = Object.fromEntries([...lines.pop().matchAll(FIELD)].map(([, key, value]) => [key, unquote(value.trim())]));
  if (Object.keys(fields).length < FEWEST_FIELDS) return null;
  const found = lines.findIndex((line) => line.startsWith(NEGATIVE)), start = found < 0 ? lines.length : found;
  return {
    prompt: lines.slice(0, start).join("\n").trim(),
    negative: lines.slice(start).join(" ").slice(NEGATIVE.length).trim(), fields,
  };
}

function unquote(value) {
  if (!value.startsWith('"')) return value;
  try {
    return String(JSON.parse(value));
  } catch {
    return value;
  }
}

/** The form's values, as text, of a parsed text, and the names of those of its fields that the form does not have. */
export function settingsOf({ prompt, negative, fields }) {
  const values = { prompt, negative_prompt: negative, num_images: "1" };
  for (const [name, key] of Object.entries(OWN)) if (fields[key]) values[name] = fields[key];
  const crop = ["Crop top", "Crop left"].map((key) => fields[key] ?? "0");
  if (crop.some(Number)) values.crops_coords_top_left = crop.join(", ");
  if (fields["VAE Decoder"] === "TAESD") values.decoder = "fast";
  if (fields.Sampler) values.scheduler = samplerName(fields.Sampler, fields["Schedule type"]);
  return { values, others: Object.keys(fields).filter((key) => !WITHOUT_EFFECT.includes(key)) };
}

const samplerName = (sampler, kind) =>
  /^(karras|exponential|beta)$/i.test(kind ?? "") && !sampler.toLowerCase().endsWith(kind.toLowerCase())
    ? `${sampler} ${kind}` : sampler;
