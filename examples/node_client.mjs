// Generate an image with OpenAI's client for Node, and save it: npm ci, then node node_client.mjs [PROMPT].
// BASE_URL, API_KEY, SIZE, STEPS, SEED and OUTPUT in the environment say where, how and what.
import { writeFile } from "node:fs/promises";
import OpenAI from "openai";

const { BASE_URL = "http://127.0.0.1:8000", API_KEY = "unused", SIZE = "auto", STEPS, SEED = "14" } = process.env;
const { OUTPUT = "image-node.png" } = process.env;
const prompt = process.argv[2] ?? "a green square on a white background";

const client = new OpenAI({ baseURL: `${BASE_URL}/v1`, apiKey: API_KEY });
for await (const model of client.models.list()) {
  console.log(`The server has ${model.id}.`);
}

// What OpenAI's API does not know stands among the other fields.
const result = await client.images.generate({
  prompt,
  size: SIZE,
  response_format: "b64_json",
  seed: Number(SEED),
  num_inference_steps: STEPS ? Number(STEPS) : null,
});
const image = result.data[0];
await writeFile(OUTPUT, Buffer.from(image.b64_json, "base64"));
console.log(`Wrote ${OUTPUT}, ${result.size}, seed ${image.seed}.`);
