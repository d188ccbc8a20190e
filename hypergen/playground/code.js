// The request of the form as code.
import { html, useState } from "./vendor/preact-htm.js";
import { address, key, toJson } from "./api.js";
import { modelOf } from "./fields.js";
import { requestOfForm } from "./form.js";
import { app, notify, update } from "./state.js";
import { text } from "./text.js";
import { Dialog, Segments } from "./ui.js";

// Fields of OpenAI's own clients; Python's takes the others as `extra_body`.
const OPENAI = ["prompt", "model", "n", "size"];
// Field -> Hyperbolic's name for it; others are the same.
const HYPERBOLIC = {
  num_inference_steps: "steps", guidance_scale: "cfg_scale", loras: "lora",
  control_image: "controlnet_image", control_model: "controlnet_name",
};
const KEY_NAME = "HYPERGEN_API_KEY";
const LANGUAGES = { curl: openaiCurl, python, node, hyperbolic };

const quoted = (value) => `'${value.replaceAll("'", `'\\''`)}'`;
const lines = (all, spaces) => all.join("\n").replaceAll(/^/gm, " ".repeat(spaces));
/** The files of an edit: [field, name] each. */
const filesOf = (edit) => [["image", "input.png"], ["mask", "mask.png"]].slice(0, edit?.mask ? 2 : edit ? 1 : 0);
/** A value as JSON; a seed is text already, because it may exceed JavaScript's exact integers. */
const literal = (name, value) => (name === "seed" ? value : JSON.stringify(value, null, 2));

function curl(path, arguments_) {
  const authorization = key() ? [`-H "Authorization: Bearer $${KEY_NAME}"`] : [];
  return [`curl ${address()}/v1/${path}`, ...authorization, ...arguments_].join(" \\\n  ");
}

const curlJson = (path, body) => curl(path, ['-H "Content-Type: application/json"', `-d ${quoted(toJson(body, 2))}`]);

function openaiCurl(body, edit) {
  if (!edit) return curlJson("images/generations", body);
  // Not -F, which reads files and types from values.
  const fields = Object.entries(body).map(([name, value]) => {
    return `--form-string ${quoted(`${name}=${typeof value === "object" ? JSON.stringify(value) : value}`)}`;
  });
  return curl("images/edits", [...filesOf(edit).map(([name, file]) => `-F ${name}=@${file}`), ...fields]);
}

function python(body, edit) {
  const all = Object.entries(body).map(([name, value]) => [name, value === true ? "True" : literal(name, value)]);
  const { own, extra } = Object.groupBy(all, ([name]) => (OPENAI.includes(name) ? "own" : "extra"));
  const call = [
    ...filesOf(edit).map(([name, file]) => `${name}=open("${file}", "rb"),`),
    ...own.map(([name, value]) => `${name}=${value},`),
    ...(extra ? ["extra_body={", lines(extra.map(([name, value]) => `"${name}": ${value},`), 4), "},"] : []),
  ];
  return `import base64
${key() ? "import os\n" : ""}from openai import OpenAI

client = OpenAI(base_url="${address()}/v1", api_key=${key() ? `os.environ["${KEY_NAME}"]` : '"unused"'})
result = client.images.${edit ? "edit" : "generate"}(
${lines(call, 4)}
)
for index, image in enumerate(result.data):
    with open(f"image-{index}.png", "wb") as file:
        file.write(base64.b64decode(image.b64_json))
`;
}

function node(body, edit) {
  const call = [
    ...filesOf(edit).map(([name, file]) => `${name}: fs.createReadStream("${file}"),`),
    ...Object.entries(body).map(([name, value]) => `${name}: ${literal(name, value)},`),
  ];
  return `import fs from "node:fs";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: "${address()}/v1", apiKey: ${key() ? `process.env.${KEY_NAME}` : '"unused"'} });
const result = await client.images.${edit ? "edit" : "generate"}({
${lines(call, 2)}
});
result.data.forEach((image, index) => {
  fs.writeFileSync(\`image-\${index}.png\`, Buffer.from(image.b64_json, "base64"));
});
`;
}

function hyperbolic({ size, model, ...body }, edit) {
  if (edit?.mask) return text.codeDialog.noEdits;
  const renamed = Object.fromEntries(Object.entries(body).map(([name, value]) => [HYPERBOLIC[name] ?? name, value]));
  const { id, defaults } = modelOf(app);
  const [width, height] = (size ?? defaults.size ?? "").split("x").map(Number);
  const sides = width ? { width, height } : {};
  return curlJson("image/generation", { model_name: model ?? id, ...renamed, ...sides, ...(edit && { image: "BASE64" }) });
}

export function CodeDialog() {
  const [language, setLanguage] = useState("curl");
  const { body, edit } = requestOfForm();
  if (body.control_image) body.control_image = "BASE64";
  const code = LANGUAGES[language](body, edit);
  const languages = Object.entries(text.codeDialog.languages);
  const copy = () => navigator.clipboard.writeText(code).then(() => notify(text.codeDialog.copied));
  return html`<${Dialog} title=${text.codeDialog.title} className="code" onClose=${() => update({ asksCode: false })}>
    <div class="toolbar">
      <${Segments} name="language" label=${text.code} value=${language} options=${languages} onChange=${setLanguage} />
      <span class="space"></span>
      ${navigator.clipboard && html`<button type="button" onClick=${copy}>${text.codeDialog.copy}</button>`}
    </div>
    <pre tabindex="0"><code>${code}</code></pre>
  <//>`;
}
