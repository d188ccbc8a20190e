"""Generate one prompt with many seeds at once, on one contact sheet: pip install openai pillow.

The requests are sent at the same time. The server generates them in the same batches, and each seed gives the
image that it gives alone.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import os
from io import BytesIO
from pathlib import Path

from openai import AsyncOpenAI
from PIL import Image, ImageDraw

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("prompt", nargs="?", default="an orange moon on a blue background")
parser.add_argument("--url", default=os.environ.get("BASE_URL", "http://127.0.0.1:8000"))
parser.add_argument("--key", default=os.environ.get("API_KEY", "unused"))
parser.add_argument("--size", default="auto")
parser.add_argument("--steps", type=int)
parser.add_argument("--seeds", type=int, nargs="+", default=list(range(12)))
parser.add_argument("--columns", type=int, default=4)
parser.add_argument("--output", type=Path, default=Path("sheet.png"))
options = parser.parse_args()


async def generate(client: AsyncOpenAI, seed: int) -> Image.Image:
    result = await client.images.generate(
        prompt=options.prompt,
        size=options.size,
        response_format="b64_json",
        extra_body={"seed": seed, "num_inference_steps": options.steps},
    )
    return Image.open(BytesIO(base64.b64decode(result.data[0].b64_json)))


async def generate_all() -> list[Image.Image]:
    async with AsyncOpenAI(base_url=f"{options.url}/v1", api_key=options.key) as client:
        return await asyncio.gather(*(generate(client, seed) for seed in options.seeds))


images = asyncio.run(generate_all())
width, height = images[0].size
caption, gap = 16, 8
rows = -(-len(images) // options.columns)
sheet_size = (options.columns * (width + gap) + gap, rows * (height + caption + gap) + gap)
sheet = Image.new("RGB", sheet_size, "white")
write = ImageDraw.Draw(sheet)
for position, (seed, image) in enumerate(zip(options.seeds, images, strict=True)):
    row, column = divmod(position, options.columns)
    x, y = gap + column * (width + gap), gap + row * (height + caption + gap)
    sheet.paste(image, (x, y))
    write.text((x, y + height + 2), f"seed {seed}", fill="black")
sheet.save(options.output)
print(f"Wrote {options.output}, {len(images)} images of {width}x{height}.")
