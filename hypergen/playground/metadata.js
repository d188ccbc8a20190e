// Reads the settings in image files of HyperGen, A1111 (and Forge, Civitai) and ComfyUI.
// Source of A1111's format: its `parse_generation_parameters`.
import { toSettings } from "./fields.js";

/** { from, settings } of a PNG, JPEG or WebP file; null if it has none that are known. */
export async function readSettings(file) {
  try {
    const texts = await readTexts(file);
    if (texts.hypergen) return { from: "HyperGen", settings: ofHyperGen(JSON.parse(texts.hypergen)) };
    if (texts.parameters) return { from: "A1111", settings: ofA1111(texts.parameters) };
    if (texts.prompt) return { from: "ComfyUI", settings: ofComfyUi(JSON.parse(texts.prompt)) };
  } catch {
    // No image, or text of another program under the same name.
  }
  return null;
}

function ofHyperGen({ width, height, seed, ...settings }) {
  return toSettings({ ...settings, size: `${width}x${height}`, ...splitSampler(settings.sampler ?? "") }, seed);
}

function splitSampler(name) {
  const [, sampler, scheduler = ""] = name.match(/^(.*?)(?:_(karras|exponential|beta|sgm_uniform|simple|normal))?$/);
  return { sampler, scheduler };
}

const toName = (label) => label.toLowerCase().replaceAll("+", "p").replaceAll(" ", "_");
const A1111_VALUE = /\s*([\w ]+):\s*(?:("(?:\\.|[^"\\])+")|([^,]*))(?:,|$)/g;
const LORA = /\s*<lora:([^:>]+):([\d.]+)[^>]*>/g;

function ofA1111(infotext) {
  const lines = infotext.trim().split("\n");
  const hasValues = /\bSteps: \d/.test(lines.at(-1));
  const toEntry = ([, name, quoted, plain]) => [name.trim(), quoted ? JSON.parse(quoted) : plain.trim()];
  const values = Object.fromEntries([...(hasValues ? lines.pop() : "").matchAll(A1111_VALUE)].map(toEntry));
  const [prompt, negative = ""] = lines.join("\n").split(/^Negative prompt: ?/m);
  const loras = [...prompt.matchAll(LORA)].map(([, name, weight]) => [name, Number(weight)]);
  const schedule = values["Schedule type"];
  const found = {
    prompt: prompt.replaceAll(LORA, "").trim(),
    negative_prompt: negative.trim(),
    loras: Object.fromEntries(loras),
    num_inference_steps: values.Steps,
    guidance_scale: values["Distilled CFG Scale"] ?? values["CFG scale"],
    true_cfg_scale: values["Distilled CFG Scale"] ? values["CFG scale"] : undefined,
    size: values.Size,
    strength: values["Denoising strength"],
    clip_skip: values["Clip skip"],
    ...splitSampler(toName(values.Sampler ?? "")),
  };
  if (schedule && schedule !== "Automatic") found.scheduler = toName(schedule);
  return toSettings(found, values.Seed);
}

/** Settings of the first sampler node of a ComfyUI graph: node id -> { class_type, inputs }. */
function ofComfyUi(graph) {
  const follow = (value) => (Array.isArray(value) ? graph[value[0]] : undefined);
  const search = (node, wanted, depth = 0) => {
    if (!node || depth > 12) return undefined;
    const deeper = (input) => search(follow(input), wanted, depth + 1);
    return wanted(node) ?? Object.values(node.inputs).map(deeper).find((found) => found !== undefined);
  };
  const textOf = ({ inputs: { text, text_g, string } }) => [text, text_g, string].find((value) => typeof value === "string");
  const { inputs } = Object.values(graph).find(({ class_type: type }) => type.startsWith("KSampler"));
  const latents = search(follow(inputs.latent_image), (node) => (node.inputs.width ? node.inputs : undefined));
  const loras = Object.values(graph).filter((node) => node.class_type.startsWith("LoraLoader"));
  const weightOf = ({ inputs: { lora_name: file, strength_model: weight } }) => [file.replace(/\.safetensors$/, ""), weight];
  const found = {
    prompt: search(follow(inputs.positive), textOf) ?? "",
    negative_prompt: search(follow(inputs.negative), textOf) ?? "",
    num_inference_steps: inputs.steps,
    guidance_scale: inputs.cfg,
    sampler: inputs.sampler_name,
    scheduler: inputs.scheduler,
    strength: inputs.denoise < 1 ? inputs.denoise : undefined,
    size: latents && `${latents.width}x${latents.height}`,
    loras: Object.fromEntries(loras.map(weightOf)),
  };
  return toSettings(found, inputs.seed ?? inputs.noise_seed);
}

/** The text in a file by its name; `hypergen` is ours, `parameters` A1111's, `prompt` ComfyUI's. */
async function readTexts(file) {
  await import("./vendor/exif-reader.js"); // sets the global ExifReader
  const { hypergen, parameters, prompt, UserComment, ImageDescription, ...others } = await ExifReader.load(file, { async: true });
  // In JPEG and WebP files: our description, unlike a photo's, is JSON; ComfyUI's name stands in the text.
  const texts = [ImageDescription, ...Object.values(others)].map((tag) => String(tag?.description));
  return {
    hypergen: hypergen?.description ?? (texts[0].startsWith("{") ? texts[0] : undefined),
    parameters: parameters?.description ?? (UserComment && readComment(Uint8Array.from(UserComment.value))),
    prompt: prompt?.description ?? texts.find((each) => each.startsWith("prompt:"))?.slice(7),
  };
}

/** The text of an EXIF comment, after the eight bytes that name its encoding. */
function readComment(bytes) {
  const content = bytes.subarray(8);
  const unicode = content[0] ? "utf-16le" : "utf-16be";
  const isUnicode = new TextDecoder().decode(bytes).startsWith("UNICODE");
  return new TextDecoder(isUnicode ? unicode : "utf-8").decode(content);
}
