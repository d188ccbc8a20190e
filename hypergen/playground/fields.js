// The settings of a request: their ranges and defaults, as the server tells them, and the body of the request.

const TEXTS = ["negative_prompt", "prompt_2", "negative_prompt_2", "size", "sampler", "scheduler"];
const NUMBERS = ["num_inference_steps", "guidance_scale", "true_cfg_scale", "clip_skip"];
const CONTROL_NUMBERS = { controlnet_conditioning_scale: 1, control_guidance_start: 0, control_guidance_end: 1 };
const OTHERS = ["prompt", "model", "seed", "strength", "control_model"];
export const EMPTY = {
  ...Object.fromEntries([...TEXTS, ...NUMBERS, ...OTHERS].map((name) => [name, ""])), // the server's default
  seedMode: "random", // or "fixed", "increment"
  n: 1,
  loras: {},
  enable_refiner: false,
  control_image: null, // a data: URL
  control_preprocessor: "none",
  ...CONTROL_NUMBERS,
};
export const FALLBACK_SIZE = "512x512"; // of a model without a size of its own
const RATIOS = [[1, 1], [5, 4], [4, 3], [3, 2], [16, 9], [4, 5], [3, 4], [2, 3], [9, 16]];
const OPTIONAL = ["negative_prompt", "prompt_2", "clip_skip", "true_cfg_scale", "enable_refiner", "loras"];
const NO_MODEL = { id: "", options: [], samplers: [], schedules: {}, loras: [], control_models: [], defaults: {} };
// Of the model that comes with HyperGen; it has a page of its own in the documents.
export const EMBEDDED_MODEL = "hypergen-tiny";

/** The chosen model, else the first; without a loaded model, one without capabilities. */
export const modelOf = ({ models, settings }) => models.find(({ id }) => id === settings.model) ?? models[0] ?? NO_MODEL;

/** Whether a model has a field: /health lists the fields that only some models have. */
export function has(model, field) {
  const option = field === "negative_prompt_2" ? "prompt_2" : field;
  return !OPTIONAL.includes(option) || model.options.includes(option);
}

/** The range of a numeric field, or of the values of an object, in /openapi.json and within the limits of this server. */
export function rangeOf({ schema, health }, field) {
  const property = schema?.[field] ?? {};
  const options = [property, ...(property.anyOf ?? [])].flatMap((option) => [option, option.additionalProperties ?? {}]);
  const { minimum = 0, maximum = 1 } = options.find((option) => option.maximum !== undefined) ?? {};
  const most = field === "num_inference_steps" ? health?.limits?.max_steps : undefined;
  return { min: minimum, max: Math.min(maximum, most ?? Infinity) };
}

/** Sizes with the area of the model's own, in the usual aspect ratios: [size, ratio] each. */
export function sizesOf(model, maxSide = 2048) {
  const [width, height] = (model.defaults.size ?? FALLBACK_SIZE).split("x").map(Number);
  const step = Math.min(width, height) > 512 ? 64 : 8;
  const side = (ratio) => Math.round(Math.sqrt(width * height * ratio) / step) * step;
  const sizes = RATIOS.map(([x, y]) => ({ sides: [side(x / y), side(y / x)], ratio: `${x}:${y}` }));
  return sizes.filter(({ sides }) => Math.max(...sides) <= maxSide).map(({ sides, ratio }) => [sides.join("x"), ratio]);
}

/** The body of POST /v1/images/generations, with what is not the default and what the model has. */
export function toBody({ settings, models, tab, source }) {
  const model = modelOf({ settings, models });
  const body = { prompt: settings.prompt };
  const add = (name, toValue = (value) => value) => {
    const value = settings[name];
    if (value !== "" && value !== EMPTY[name] && has(model, name)) body[name] = toValue(value);
  };
  if (models.length > 1) body.model = model.id;
  for (const name of TEXTS) add(name);
  if (!body.sampler) delete body.scheduler;
  for (const name of [...NUMBERS, "n"]) add(name, Number);
  if (settings.seedMode !== "random") add("seed");
  if (Object.keys(settings.loras).length) add("loras");
  add("enable_refiner");
  if (settings.control_image && model.control_models.length) {
    body.control_image = settings.control_image;
    body.control_model = settings.control_model || model.control_models[0];
    add("control_preprocessor");
    for (const name of Object.keys(CONTROL_NUMBERS)) add(name, Number);
  }
  if (tab === "edit" && source) add("strength", Number);
  return body;
}

/** Settings from those of an image, so that "use these settings" generates it again. */
export function toSettings(found, seed) {
  const isKnown = ([name, value]) => name in EMPTY && name !== "n" && value !== undefined && value !== null;
  const fixed = /^\d+$/.test(seed) && { seed: String(seed), seedMode: "fixed" };
  return { ...EMPTY, ...Object.fromEntries(Object.entries(found).filter(isKnown)), ...fixed };
}
