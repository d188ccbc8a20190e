// The settings of a request: their ranges and defaults, as the server tells them, and the body of the request.

// "" is the server's default.
export const EMPTY = {
  prompt: "",
  negative_prompt: "",
  prompt_2: "",
  negative_prompt_2: "",
  model: "",
  size: "",
  num_inference_steps: "",
  guidance_scale: "",
  true_cfg_scale: "",
  clip_skip: "",
  sampler: "",
  scheduler: "",
  seed: "",
  seedMode: "random", // or "fixed", "increment"
  n: 1,
  loras: {},
  enable_refiner: false,
  strength: "",
  control_image: null, // a data: URL
  control_model: "",
  control_preprocessor: "none",
  controlnet_conditioning_scale: 1,
  control_guidance_start: 0,
  control_guidance_end: 1,
};
const NUMBERS = ["num_inference_steps", "guidance_scale", "true_cfg_scale", "clip_skip"];
const TEXTS = ["negative_prompt", "prompt_2", "negative_prompt_2", "size", "sampler", "scheduler"];
const CONTROL_NUMBERS = ["controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end"];
// Field -> the option in /health that a model needs for it.
const NEEDS = {
  negative_prompt: "negative_prompt",
  prompt_2: "prompt_2",
  negative_prompt_2: "prompt_2",
  clip_skip: "clip_skip",
  true_cfg_scale: "true_cfg_scale",
  enable_refiner: "enable_refiner",
};
// Of the model that comes with HyperGen; it has a page of its own in the documents.
export const EMBEDDED_MODEL = "hypergen-tiny";

/** The chosen model, else the first; without a loaded model, one without capabilities. */
export function modelOf({ health, settings }) {
  const none = { id: "", options: [], samplers: [], schedules: {}, loras: [], control_models: [], defaults: {} };
  const models = health?.models ?? [];
  return models.find((model) => model.id === settings.model) ?? models[0] ?? none;
}

export const has = (model, field) => !(field in NEEDS) || model.options.includes(NEEDS[field]);

/** The range of a numeric field in /openapi.json, within the limits of this server. */
export function rangeOf({ schema, health }, field) {
  const property = schema[field] ?? {};
  const found = [property, ...(property.anyOf ?? [])].find((option) => option.maximum !== undefined) ?? {};
  const limits = health?.limits ?? {};
  const most = field === "num_inference_steps" ? limits.max_steps : undefined;
  return { min: found.minimum ?? 0, max: Math.min(found.maximum ?? 1, most ?? Infinity) };
}

/** Sizes with the area of the model's own, in the usual aspect ratios. */
export function sizesOf(model, maxSide = 2048) {
  const [width, height] = (model.defaults.size ?? "512x512").split("x").map(Number);
  const ratios = [[1, 1], [5, 4], [4, 3], [3, 2], [16, 9], [4, 5], [3, 4], [2, 3], [9, 16]];
  const step = Math.min(width, height) > 512 ? 64 : 8;
  const side = (value) => Math.round(value / step) * step;
  const sizes = ratios.map(([x, y]) => {
    const scale = Math.sqrt((width * height) / (x * y));
    return { ratio: `${x}:${y}`, width: side(x * scale), height: side(y * scale) };
  });
  return sizes.filter((size) => Math.max(size.width, size.height) <= maxSide);
}

/** The body of POST /v1/images/generations, with what is not the default and what the model has. */
export function toBody(settings, model, several) {
  const body = { prompt: settings.prompt };
  if (several) body.model = model.id;
  for (const name of TEXTS) if (settings[name] && has(model, name)) body[name] = settings[name];
  if (!body.sampler) delete body.scheduler;
  for (const name of NUMBERS) {
    if (settings[name] !== "" && has(model, name)) body[name] = Number(settings[name]);
  }
  if (settings.seedMode !== "random" && settings.seed !== "") body.seed = settings.seed;
  if (Number(settings.n) !== 1) body.n = Number(settings.n);
  if (model.options.includes("loras") && Object.keys(settings.loras).length) body.loras = settings.loras;
  if (settings.enable_refiner && has(model, "enable_refiner")) body.enable_refiner = true;
  if (settings.control_image && model.control_models.length) {
    body.control_image = settings.control_image;
    body.control_model = settings.control_model || model.control_models[0];
    body.control_preprocessor = settings.control_preprocessor;
    for (const name of CONTROL_NUMBERS) if (settings[name] !== "") body[name] = Number(settings[name]);
  }
  return body;
}

/** Settings from those of an image, so that "use these settings" generates it again. */
export function toSettings(found, seed) {
  const { n: _n, ...known } = Object.fromEntries(Object.entries(found).filter(([name]) => name in EMPTY));
  const fixed = seed === undefined || seed === null ? {} : { seed: String(seed), seedMode: "fixed" };
  return { ...EMPTY, ...known, ...fixed };
}
