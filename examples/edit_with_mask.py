"""Generate an image, then only its middle again: pip install openai pillow.

Transparent parts of the mask are generated, opaque ones are kept as they are, pixel by pixel.
"""

from __future__ import annotations

import argparse
import base64
import os
from io import BytesIO
from pathlib import Path

from openai import OpenAI
from PIL import Image

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--prompt", default="a red circle on a blue background", help="of the first image")
parser.add_argument("--change", default="a yellow star on a blue background", help="what the middle becomes")
parser.add_argument("--url", default=os.environ.get("BASE_URL", "http://127.0.0.1:8000"))
parser.add_argument("--key", default=os.environ.get("API_KEY", "unused"))
parser.add_argument("--size", default="auto")
parser.add_argument("--steps", type=int)
parser.add_argument("--seed", type=int, default=14)
parser.add_argument("--before", type=Path, default=Path("before.png"))
parser.add_argument("--output", type=Path, default=Path("after.png"))
options = parser.parse_args()

client = OpenAI(base_url=f"{options.url}/v1", api_key=options.key)
extensions = {"seed": options.seed}
if options.steps:
    extensions["num_inference_steps"] = options.steps

first = client.images.generate(
    prompt=options.prompt, size=options.size, response_format="b64_json", extra_body=extensions
)
options.before.write_bytes(base64.b64decode(first.data[0].b64_json))
print(f"Wrote {options.before}, {first.size}.")

with Image.open(options.before) as image:
    width, height = image.size
mask = Image.new("RGBA", (width, height), (0, 0, 0, 255))
mask.paste((0, 0, 0, 0), (width // 8, height // 8, width * 7 // 8, height * 7 // 8))
mask_file = BytesIO()
mask.save(mask_file, "PNG")

edited = client.images.edit(
    image=options.before,
    mask=("mask.png", mask_file.getvalue()),
    prompt=options.change,
    response_format="b64_json",
    extra_body=extensions,
)
options.output.write_bytes(base64.b64decode(edited.data[0].b64_json))
print(f"Wrote {options.output}, {edited.size}.")
