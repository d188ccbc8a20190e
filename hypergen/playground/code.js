// The request of the form as code.
import { html, useState } from "./vendor/preact-htm.js";
import { address, key, toJson } from "./api.js";
import { modelOf, toBody } from "./fields.js";
import { editBody } from "./form.js";
import { app, notify } from "./state.js";
import { text } from "./text.js";
import { Dialog, Segments } from "./ui.js";

// Fields of OpenAI's own clients; the others go into `extra_body`.
const OPENAI = ["prompt", "model", "n", "size"];
// Field -> Hyperbolic's name for it; others are the same.
const HYPERBOLIC = { model: "model_name", num_inference_steps: "steps", guidance_scale: "cfg_scale", loras: "lora", control_image: "controlnet_image", control_model: "controlnet_name" };
const KEY_NAME = "HYPERGEN_API_KEY";

const quoted = (value) => `'${value.replaceAll("'", `'\\''`)}'`;
const indented = (json, spaces) => json.replaceAll("\n", `\n${" ".repeat(spaces)}`);

function curl(body, edit) {
  const head = `curl ${address()}/v1/images/${edit ? "edits" : "generations"}${key() ? ` \\\n  -H "Authorization: Bearer $${KEY_NAME}"` : ""}`;
  if (!edit) return `${head} \\\n  -H "Content-Type: application/json" \\\n  -d ${quoted(toJson(body, 2))}`;
  const fields = Object.entries(body).map(([name, value]) => `-F ${quoted(`${name}=${typeof value === "object" ? JSON.stringify(value) : value}`)}`);
  return [head, "-F image=@input.png", ...(edit.mask ? ["-F mask=@mask.png"] : []), ...fields].join(" \\\n  ");
}

/** Python's literals in the place of JSON's. */
const toPython = (value) => toJson({ value }, 4).slice(2, -2).trim().slice('"value": '.length).replace(/\btrue\b/g, "True").replace(/\bfalse\b/g, "False").replace(/\n {4}/g, "\n");

function parts(body) {
  const { seed, ...rest } = body;
  const own = Object.entries(rest).filter(([name]) => OPENAI.includes(name));
  const extra = Object.entries(rest).filter(([name]) => !OPENAI.includes(name));
  if (seed !== undefined) extra.push(["seed", seed]);
  return { own, extra };
}

function python(body, edit) {
  const { own, extra } = parts(body);
  const literal = (name, value) => (name === "seed" ? String(value) : toPython(value));
  const lines = edit ? ['image=open("input.png", "rb"),', ...(edit.mask ? ['mask=open("mask.png", "rb"),'] : [])] : [];
  lines.push(...own.map(([name, value]) => `${name}=${literal(name, value)},`));
  if (extra.length) lines.push("extra_body={", ...extra.map(([name, value]) => `    "${name}": ${literal(name, value)},`), "},");
  return `import base64
${key() ? "import os\n" : ""}from openai import OpenAI

client = OpenAI(base_url="${address()}/v1", api_key=${key() ? `os.environ["${KEY_NAME}"]` : '"unused"'})
result = client.images.${edit ? "edit" : "generate"}(
${lines.map((line) => `    ${line}`).join("\n")}
)
for index, image in enumerate(result.data):
    with open(f"image-{index}.png", "wb") as file:
        file.write(base64.b64decode(image.b64_json))
`;
}

function node(body, edit) {
  const { own, extra } = parts(body);
  const files = edit ? ['image: fs.createReadStream("input.png"),', ...(edit.mask ? ['mask: fs.createReadStream("mask.png"),'] : [])] : [];
  const literal = (name, value) => (name === "seed" ? value : indented(JSON.stringify(value, null, 2), 2));
  const lines = [...files, ...[...own, ...extra].map(([name, value]) => `${name}: ${literal(name, value)},`)];
  return `import fs from "node:fs";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: "${address()}/v1", apiKey: ${key() ? `process.env.${KEY_NAME}` : '"unused"'} });
const result = await client.images.${edit ? "edit" : "generate"}({
${lines.map((line) => `  ${line}`).join("\n")}
});
result.data.forEach((image, index) => {
  fs.writeFileSync(\`image-\${index}.png\`, Buffer.from(image.b64_json, "base64"));
});
`;
}

function hyperbolic(body, edit) {
  if (edit?.mask) return text.codeDialog.noEdits;
  const { size, ...rest } = body;
  const renamed = Object.fromEntries(Object.entries(rest).map(([name, value]) => [HYPERBOLIC[name] ?? name, value]));
  const [width, height] = (size ?? modelOf(app).defaults.size ?? "").split("x").map(Number);
  const sides = width ? { width, height } : {};
  const json = toJson({ model_name: modelOf(app).id, ...renamed, ...sides, ...(edit && { image: "BASE64" }) }, 2);
  return `curl ${address()}/v1/image/generation${key() ? ` \\\n  -H "Authorization: Bearer $${KEY_NAME}"` : ""} \\\n  -H "Content-Type: application/json" \\\n  -d ${quoted(json)}`;
}

const LANGUAGES = { curl, python, node, hyperbolic };

export function CodeDialog({ onClose }) {
  const [language, setLanguage] = useState("curl");
  const edit = app.tab === "edit" ? app.source : null;
  const body = toBody(app.settings, modelOf(app), (app.health?.models ?? []).length > 1);
  if (body.control_image) body.control_image = "BASE64";
  const code = LANGUAGES[language](edit ? editBody(body) : body, edit);
  const copy = async () => {
    await navigator.clipboard.writeText(code);
    notify(text.notice.copied);
  };
  return html`<${Dialog} title=${text.codeDialog.title} className="code" onClose=${onClose}>
    <div class="toolbar">
      <${Segments} name="language" label=${text.code} value=${language} options=${Object.entries(text.codeDialog.languages)} onChange=${setLanguage} />
      <span class="space"></span>
      ${navigator.clipboard && html`<button type="button" onClick=${copy}>${text.codeDialog.copy}</button>`}
    </div>
    <pre tabindex="0"><code>${code}</code></pre>
  <//>`;
}
