// Checks of the image API with OpenAI's client for Node, against BASE_URL: node speak.mjs PACKAGE.
// Prints the name of each check that passed.
import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";

const { default: OpenAI, toFile } = await import(process.argv[2]);
const { BASE_URL, API_KEY, INPUT_IMAGE } = process.env;
const options = { baseURL: `${BASE_URL}/v1`, apiKey: API_KEY, maxRetries: 0 };
const client = new OpenAI(options);
const quick = { num_inference_steps: 4, seed: 5 };
const image = await readFile(INPUT_IMAGE);
const png = () => toFile(image, "image.png", { type: "image/png" });

async function errorOf(errorClass, promise) {
  const error = await promise.then(() => assert.fail("no error"), (reason) => reason);
  assert.ok(error instanceof errorClass, `${error}`);
  return error;
}

const checks = {
  async models() {
    const ids = [];
    for await (const model of client.models.list()) ids.push(model.id);
    assert.equal(ids.length, 1);
    assert.equal((await client.models.retrieve(ids[0])).owned_by, "hypergen");
  },
  async generations() {
    const fields = { model: "dall-e-3", prompt: "a red circle", style: "vivid", quality: "hd", ...quick };
    const encoded = await client.images.generate({ ...fields, response_format: "b64_json" });
    assert.equal(encoded.data[0].url, undefined);
    assert.equal(encoded.data[0].seed, 5);
    const stored = await client.images.generate({ ...fields, response_format: "url" });
    assert.equal(stored.data[0].b64_json, undefined);
    const file = Buffer.from(await (await fetch(stored.data[0].url)).arrayBuffer());
    assert.equal(file.toString("base64"), encoded.data[0].b64_json);
    assert.equal(encoded.usage.total_tokens, encoded.usage.input_tokens + encoded.usage.output_tokens);
  },
  async edits() {
    const fields = { prompt: "a blue square", response_format: "b64_json", ...quick };
    const one = await client.images.edit({ image: await png(), ...fields });
    const list = await client.images.edit({ image: [await png(), await png()], n: 2, ...fields });
    assert.equal(list.data.length, 2);
    assert.equal(list.data[0].b64_json, one.data[0].b64_json);
    const masked = await client.images.edit({ image: await png(), mask: await png(), ...fields });
    assert.equal(masked.data.length, 1);
  },
  async variations() {
    const result = await client.images.createVariation({ image: await png(), n: 2, ...quick });
    assert.equal(result.data.length, 2);
  },
  async streams() {
    const fields = { prompt: "a red circle", ...quick, num_inference_steps: 8 };
    const whole = await client.images.generate({ ...fields, response_format: "b64_json" });
    const events = [];
    for await (const event of await client.images.generate({ ...fields, stream: true, partial_images: 2 })) {
      events.push(event);
    }
    const partial = "image_generation.partial_image";
    assert.deepEqual(events.map((event) => event.type), [partial, partial, "image_generation.completed"]);
    assert.deepEqual(events.slice(0, 2).map((event) => event.partial_image_index), [0, 1]);
    assert.equal(events[2].b64_json, whole.data[0].b64_json);
    assert.notEqual(events[0].b64_json, events[1].b64_json);
  },
  async errors() {
    let error = await errorOf(OpenAI.BadRequestError, client.images.generate({ prompt: "a", n: 99 }));
    assert.deepEqual([error.status, error.param, error.type], [400, "n", "invalid_request_error"]);
    error = await errorOf(OpenAI.NotFoundError, client.models.retrieve("owner/unknown"));
    assert.equal(error.code, "model_not_found");
    const clientWithWrongKey = new OpenAI({ ...options, apiKey: "sk-wrong" });
    error = await errorOf(OpenAI.AuthenticationError, clientWithWrongKey.images.generate({ prompt: "a" }));
    assert.equal(error.code, "invalid_api_key");
    await errorOf(OpenAI.BadRequestError, client.images.generate({ prompt: "a", n: 99, stream: true }));
  },
};

for (const [name, check] of Object.entries(checks)) {
  await check();
  console.log(name);
}
