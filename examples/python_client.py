"""Generate an image with OpenAI's Python client, and save it: pip install openai."""

from __future__ import annotations

import argparse
import base64
import os
from pathlib import Path

from openai import BadRequestError, OpenAI

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("prompt", nargs="?", default="a red circle on a blue background")
parser.add_argument("--url", default=os.environ.get("BASE_URL", "http://127.0.0.1:8000"))
parser.add_argument("--key", default=os.environ.get("API_KEY", "unused"))
parser.add_argument("--size", default="auto", help="for example 512x512; auto is the model's own")
parser.add_argument("--steps", type=int, help="absent: the model's own")
parser.add_argument("--seed", type=int, default=14)
parser.add_argument("--output", type=Path, default=Path("image.png"))
options = parser.parse_args()

client = OpenAI(base_url=f"{options.url}/v1", api_key=options.key)
for model in client.models.list():
    print(f"The server has {model.id}.")

# What OpenAI's API does not know goes through extra_body.
extensions = {"seed": options.seed, "num_inference_steps": options.steps, "negative_prompt": "blurry"}
try:
    result = client.images.generate(
        prompt=options.prompt, size=options.size, response_format="b64_json", extra_body=extensions
    )
except BadRequestError as error:  # it names the field
    raise SystemExit(f"{error.param}: {error.message}") from None
image = result.data[0]
options.output.write_bytes(base64.b64decode(image.b64_json))
print(f"Wrote {options.output}, {result.size}, seed {image.seed}.")
