"""Watch an image appear in the terminal while it is generated, and save it: pip install openai pillow.

Needs a terminal with 24-bit colours.
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
parser.add_argument("prompt", nargs="?", default="two white hearts on a green background")
parser.add_argument("--url", default=os.environ.get("BASE_URL", "http://127.0.0.1:8000"))
parser.add_argument("--key", default=os.environ.get("API_KEY", "unused"))
parser.add_argument("--size", default="auto")
parser.add_argument("--steps", type=int)
parser.add_argument("--seed", type=int, default=14)
parser.add_argument("--columns", type=int, default=48, help="width of a preview in characters")
parser.add_argument("--output", type=Path, default=Path("image-streamed.png"))
options = parser.parse_args()


def show(data: bytes, columns: int) -> None:
    """Print an image; one character is two pixels, one above the other."""
    with Image.open(BytesIO(data)) as image:
        rows = max(1, round(columns * image.height / image.width / 2))
        small = image.convert("RGB").resize((columns, rows * 2))
    for row in range(rows):
        line = ""
        for column in range(columns):
            upper = ";".join(map(str, small.getpixel((column, row * 2))))
            lower = ";".join(map(str, small.getpixel((column, row * 2 + 1))))
            line += f"\033[38;2;{upper}m\033[48;2;{lower}m▀"
        print(line + "\033[0m")


client = OpenAI(base_url=f"{options.url}/v1", api_key=options.key)
stream = client.images.generate(
    prompt=options.prompt,
    size=options.size,
    stream=True,
    partial_images=3,
    extra_body={"seed": options.seed, "num_inference_steps": options.steps},
)
for event in stream:
    data = base64.b64decode(event.b64_json)
    show(data, options.columns)
    if event.type == "image_generation.partial_image":
        print(f"Preview {event.partial_image_index + 1}")
    else:
        options.output.write_bytes(data)
        print(f"Wrote {options.output}, {event.size}.")
