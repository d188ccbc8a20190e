"""Make docs/edits.webp with a running server: python -m scripts.make_edit_examples. A row is a feature."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import click
import httpx
from PIL import Image, ImageDraw

SIDE = 256  # pixels; the embedded model's native size
GAP = 4
SCALES = (1.0, 2.0, 4.0, 7.0, 12.0)
STRENGTHS = (0.2, 0.3, 0.4, 0.6, 1.0)
LORAS: tuple[dict[str, float], ...] = (
    {},
    {"Pixel_Art": 1.0},
    {"Logo": 1.0},
    {"Pixel_Art": 0.8, "Logo": 0.8},
    {"Crayons": 1.0},
    {"Paint_Splash": 1.0},
)


class Client:
    """A client for OpenAI's images API, with Pillow images."""

    def __init__(self, url: str, key: str | None) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=300)

    def generate(self, prompt: str, seed: int, **fields: Any) -> Image.Image:
        """One image of `SIDE` x `SIDE`; an edit if the fields have `images`."""
        path = "/v1/images/edits" if "images" in fields else "/v1/images/generations"
        body = {"prompt": prompt, "seed": seed, "size": f"{SIDE}x{SIDE}", "response_format": "b64_json"}
        response = self._http.post(path, json={**body, **fields})
        if response.is_error:
            raise click.ClickException(response.json()["error"]["message"])
        return Image.open(io.BytesIO(base64.b64decode(response.json()["data"][0]["b64_json"]))).convert("RGB")


@click.command()
@click.option(
    "--url", default="http://127.0.0.1:8000", show_default=True, help="a server with the embedded model"
)
@click.option("--key", envvar="HYPERGEN_API_KEY", help="the server's bearer key")
@click.option("--output", type=Path, default=Path("docs/edits.webp"), show_default=True)
def main(url: str, key: str | None, output: Path) -> None:
    """Generate every row and save them as one image."""
    client = Client(url, key)
    rows = [
        change_colour(client),
        inpaint_half(client),
        negative_prompts(client),
        [client.generate("a gray star on a cyan background", 3, guidance_scale=scale) for scale in SCALES],
        [client.generate("a green heart on a white background", 5, loras=loras) for loras in LORAS],
    ]
    image_grid(rows).save(output, quality=85, method=6)


def change_colour(client: Client) -> list[Image.Image]:
    """A red circle, and edits of it to a blue one with increasing strength."""
    red = client.generate("a red circle on a white background", 14)
    prompt = "a blue circle on a white background"
    images = [{"image_url": data_url(red)}]
    return [red, *(client.generate(prompt, 14, images=images, strength=strength) for strength in STRENGTHS)]


def inpaint_half(client: Client) -> list[Image.Image]:
    """Two squares, a mask of the right one, three results, and the pixels that differ in the first result."""
    before = client.generate("a red square to the left of a green square on a white background", 4)
    mask = Image.new("RGBA", before.size, (0, 0, 0, 255))
    ImageDraw.Draw(mask).rectangle((SIDE // 2, 0, SIDE, SIDE), fill=(0, 0, 0, 0))
    fields = {"images": [{"image_url": data_url(before)}], "mask": {"image_url": data_url(mask)}}
    prompt = "a red square to the left of a blue star on a white background"
    after = [client.generate(prompt, seed, **fields) for seed in (1, 2, 3)]
    changed = Image.new("RGB", before.size, "white")
    first, second = before.load(), after[0].load()
    assert first is not None
    assert second is not None
    for x in range(SIDE):
        for y in range(SIDE):
            if first[x, y] != second[x, y]:
                changed.putpixel((x, y), (0, 0, 0))
    visible_mask = Image.new("RGB", before.size, "black")
    visible_mask.paste("white", mask=mask.getchannel("A").point(lambda alpha: 255 - alpha))
    return [before, visible_mask, *after, changed]


def negative_prompts(client: Client) -> list[Image.Image]:
    """A prompt without a colour, with three seeds: alone, then with the result's colour as negative."""
    prompt = "a large shape on a white background"
    images: list[Image.Image] = []
    for seed in (1, 2, 3):
        plain = client.generate(prompt, seed)
        images += [plain, client.generate(prompt, seed, negative_prompt=nearest_colour(plain))]
    return images


def nearest_colour(image: Image.Image) -> str:
    """The name of the colour in the middle."""
    names = {
        "red": (220, 40, 40),
        "orange": (240, 140, 30),
        "yellow": (245, 220, 50),
        "green": (50, 160, 60),
        "cyan": (50, 200, 210),
        "blue": (40, 70, 200),
        "purple": (130, 50, 170),
        "pink": (240, 130, 180),
        "brown": (130, 80, 40),
        "black": (20, 20, 20),
        "gray": (128, 128, 128),
    }
    centre = image.resize((1, 1), Image.Resampling.BOX, box=(SIDE * 0.4, SIDE * 0.4, SIDE * 0.6, SIDE * 0.6))
    pixel = centre.getpixel((0, 0))
    assert isinstance(pixel, tuple)
    return min(names, key=lambda name: sum((a - b) ** 2 for a, b in zip(names[name], pixel, strict=True)))


def data_url(image: Image.Image) -> str:
    """An image as data: URL."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def image_grid(rows: list[list[Image.Image]]) -> Image.Image:
    """Rows of images with white gaps."""
    width, height = max(map(len, rows)) * (SIDE + GAP) - GAP, len(rows) * (SIDE + GAP) - GAP
    grid = Image.new("RGB", (width, height), "white")
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            grid.paste(image, (column * (SIDE + GAP), row * (SIDE + GAP)))
    return grid


if __name__ == "__main__":
    main()
