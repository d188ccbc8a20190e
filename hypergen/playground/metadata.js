// Reads the settings in image files of HyperGen, A1111 (and Forge, Civitai) and ComfyUI.
// Sources: PNG (third edition) section 11.3, EXIF 2.32, the WebP container; `parse_generation_parameters` of A1111.
import { toSettings } from "./fields.js";

/** { from, settings } of a PNG, JPEG or WebP file; null if it has none that are known. */
export async function readSettings(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  const texts = await readTexts(bytes);
  try {
    if (texts.hypergen) return { from: "HyperGen", settings: ofHyperGen(JSON.parse(texts.hypergen)) };
    if (texts.parameters) return { from: "A1111", settings: ofA1111(texts.parameters) };
    if (texts.prompt) return { from: "ComfyUI", settings: ofComfyUi(JSON.parse(texts.prompt)) };
  } catch {
    // Text of another program under the same name.
  }
  return null;
}

function ofHyperGen({ width, height, seed, ...settings }) {
  return toSettings({ ...defined(settings), size: `${width}x${height}`, ...splitSampler(settings.sampler) }, seed);
}

const SCHEDULES = ["karras", "exponential", "beta", "sgm_uniform", "simple", "normal"];

function splitSampler(name) {
  if (!name) return { sampler: "", scheduler: "" };
  const schedule = SCHEDULES.find((ending) => name.endsWith(`_${ending}`));
  return schedule ? { sampler: name.slice(0, -schedule.length - 1), scheduler: schedule } : { sampler: name, scheduler: "" };
}

const defined = (values) => Object.fromEntries(Object.entries(values).filter(([, value]) => value !== null && value !== undefined));
const toName = (label) => label.toLowerCase().replaceAll("+", "p").replaceAll(" ", "_");

export function ofA1111(infotext) {
  const lines = infotext.trim().split("\n");
  const hasValues = /\bSteps: \d/.test(lines.at(-1));
  const values = {};
  for (const [, name, quoted, plain] of (hasValues ? lines.pop() : "").matchAll(/\s*([\w ]+):\s*(?:("(?:\\.|[^"\\])+")|([^,]*))(?:,|$)/g)) {
    values[name.trim()] = quoted ? JSON.parse(quoted) : plain.trim();
  }
  const [prompt, negative = ""] = lines.join("\n").split(/^Negative prompt: ?/m);
  const loras = {};
  const found = {
    prompt: prompt.replace(/\s*<lora:([^:>]+):([\d.]+)[^>]*>/g, (_, name, weight) => ((loras[name] = Number(weight)), "")).trim(),
    negative_prompt: negative.trim(),
    loras,
    num_inference_steps: number(values.Steps),
    guidance_scale: number(values["Distilled CFG Scale"] ?? values["CFG scale"]),
    true_cfg_scale: values["Distilled CFG Scale"] ? number(values["CFG scale"]) : undefined,
    size: values.Size,
    strength: number(values["Denoising strength"]),
    clip_skip: number(values["Clip skip"]),
    ...splitSampler(values.Sampler && toName(values.Sampler)),
  };
  const schedule = values["Schedule type"];
  if (schedule && schedule !== "Automatic") found.scheduler = toName(schedule);
  return toSettings(defined(found), values.Seed);
}

const number = (value) => (value === undefined || value === "" ? undefined : Number(value));

/** Settings of the first sampler node of a ComfyUI graph: node id -> { class_type, inputs }. */
export function ofComfyUi(graph) {
  const follow = (value) => (Array.isArray(value) ? graph[value[0]] : undefined);
  const search = (node, wanted, depth = 0) => {
    if (!node || depth > 12) return undefined;
    const value = wanted(node);
    if (value !== undefined) return value;
    return Object.values(node.inputs).map((input) => search(follow(input), wanted, depth + 1)).find((found) => found !== undefined);
  };
  const prompt = (link) => search(follow(link), ({ inputs }) => [inputs.text, inputs.text_g, inputs.string].find((value) => typeof value === "string"));
  const sampler = Object.values(graph).find(({ class_type: type }) => type.startsWith("KSampler"));
  const { inputs } = sampler;
  const latents = search(follow(inputs.latent_image), (node) => (node.inputs.width ? node.inputs : undefined));
  const loras = Object.values(graph).filter((node) => node.class_type.startsWith("LoraLoader"));
  const found = {
    prompt: prompt(inputs.positive) ?? "",
    negative_prompt: prompt(inputs.negative) ?? "",
    num_inference_steps: inputs.steps,
    guidance_scale: inputs.cfg,
    sampler: inputs.sampler_name,
    scheduler: inputs.scheduler,
    strength: inputs.denoise < 1 ? inputs.denoise : undefined,
    size: latents && `${latents.width}x${latents.height}`,
    loras: Object.fromEntries(loras.map((node) => [node.inputs.lora_name.replace(/\.safetensors$/, ""), node.inputs.strength_model])),
  };
  return toSettings(defined(found), inputs.seed ?? inputs.noise_seed);
}

const latin = (bytes) => new TextDecoder("latin1").decode(bytes);
const utf8 = (bytes) => new TextDecoder().decode(bytes);

/** The text in a file by its name; `hypergen` is ours, `parameters` A1111's, `prompt` ComfyUI's. */
async function readTexts(bytes) {
  const texts = {};
  for (const [type, data] of partsOf(bytes)) {
    if (["tEXt", "zTXt", "iTXt"].includes(type)) Object.assign(texts, await readPngText(type, data));
    if (type !== "EXIF" && type !== APP1) continue;
    const exif = latin(data.subarray(0, 4)) === "Exif" ? data.subarray(6) : data; // WebP may omit this name
    if (/^(II|MM)/.test(latin(exif.subarray(0, 2)))) Object.assign(texts, readExif(exif));
  }
  return texts;
}

const APP1 = "\xff\u00e1"; // JPEG's part with EXIF
const PIXELS = "\xff\u00da"; // of a JPEG

/** The parts of a PNG, WebP or JPEG file: [type, data] each. */
function* partsOf(bytes) {
  const view = new DataView(bytes.buffer);
  const isPng = latin(bytes.subarray(1, 4)) === "PNG";
  const isWebp = latin(bytes.subarray(8, 12)) === "WEBP";
  for (let at = isPng ? 8 : isWebp ? 12 : 2; at + 8 < bytes.length; ) {
    const [from, length] = isPng ? [4, 4] : isWebp ? [0, 4] : [0, 2];
    const type = latin(bytes.subarray(at + from, at + from + length));
    if (type === PIXELS) return;
    const start = at + (isPng || isWebp ? 8 : 4);
    const size = isPng ? view.getUint32(at) : isWebp ? view.getUint32(at + 4, true) : view.getUint16(at + 2) - 2;
    yield [type, bytes.subarray(start, start + size)];
    at = start + size + (isPng ? 4 : isWebp ? size % 2 : 0); // a checksum, a padding byte
  }
}

async function readPngText(type, data) {
  const end = data.indexOf(0);
  const name = latin(data.subarray(0, end));
  if (type === "tEXt") return { [name]: latin(data.subarray(end + 1)) };
  if (type === "zTXt") return { [name]: latin(await inflate(data.subarray(end + 2))) };
  const language = data.indexOf(0, end + 3);
  const content = data.subarray(data.indexOf(0, language + 1) + 1);
  return { [name]: utf8(data[end + 1] ? await inflate(content) : content) };
}

async function inflate(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

const DESCRIPTION = 0x010e;
const EXIF_TABLE = 0x8769;
const USER_COMMENT = 0x9286;

function readExif(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  const little = latin(bytes.subarray(0, 2)) === "II";
  const texts = {};
  const readTable = (start) => {
    for (let index = 0; index < view.getUint16(start, little); index++) {
      const entry = start + 2 + index * 12;
      const [tag, type, size] = [view.getUint16(entry, little), view.getUint16(entry + 2, little), view.getUint32(entry + 4, little)];
      if (tag === EXIF_TABLE) readTable(view.getUint32(entry + 8, little));
      if (type !== 2 && type !== 7) continue; // neither text nor bytes
      const from = size > 4 ? view.getUint32(entry + 8, little) : entry + 8;
      const data = bytes.subarray(from, from + size);
      if (tag === USER_COMMENT) texts.parameters = readComment(data);
      else if (tag === DESCRIPTION) texts.hypergen = utf8(data).replace(/\0+$/, "");
      else if (latin(data.subarray(0, 7)) === "prompt:") texts.prompt = utf8(data.subarray(7)).replace(/\0+$/, "");
    }
  };
  readTable(view.getUint32(4, little));
  if (!texts.hypergen?.startsWith("{")) delete texts.hypergen; // a photo's description
  return texts;
}

function readComment(data) {
  const content = data.subarray(8);
  if (latin(data.subarray(0, 7)) !== "UNICODE") return utf8(content);
  return new TextDecoder(content[0] ? "utf-16le" : "utf-16be").decode(content);
}
