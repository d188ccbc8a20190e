"""Generate an image with Hyperbolic's API, with LoRAs or without, and save it: pip install requests."""

from __future__ import annotations

import argparse
import base64
import os
from pathlib import Path

import requests

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("prompt", nargs="?", default="a purple diamond on a yellow background")
parser.add_argument("--url", default=os.environ.get("BASE_URL", "http://127.0.0.1:8000"))
parser.add_argument("--key", default=os.environ.get("API_KEY", "unused"))
parser.add_argument("--model", default="SDXL1.0-base")
parser.add_argument("--width", type=int, help="absent: the model's own")
parser.add_argument("--height", type=int)
parser.add_argument("--steps", type=int)
parser.add_argument("--seed", type=int, default=14)
parser.add_argument("--lora", action="append", default=[], metavar="NAME=WEIGHT", help="may be repeated")
parser.add_argument("--output", type=Path, default=Path("image-hyperbolic.png"))
options = parser.parse_args()

response = requests.post(
    f"{options.url}/v1/image/generation",
    headers={"Authorization": f"Bearer {options.key}"},
    json={
        "model_name": options.model,
        "prompt": options.prompt,
        "width": options.width,
        "height": options.height,
        "steps": options.steps,
        "seed": options.seed,
        "lora": {name: float(weight) for name, _, weight in (lora.partition("=") for lora in options.lora)},
    },
    timeout=600,
)
answer = response.json()
if not response.ok:
    raise SystemExit(f"{response.status_code}: {answer['error']['message']}")
image = answer["images"][0]
options.output.write_bytes(base64.b64decode(image["image"]))
print(f"Wrote {options.output}, seed {image['seed']}, {answer['inference_time']:.1f} s.")
if price := response.headers.get("x-hypergen-price"):
    print(f"It costs {price}.")
