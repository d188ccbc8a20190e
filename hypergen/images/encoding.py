"""Codec: pixels to the bytes of a PNG, JPEG or WebP file that says how it was made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from io import BytesIO
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from hypergen.images.geometry import resize_to_request_size
from hypergen.images.png import write_png
from hypergen.request import GenerationRequest, InputImage

# The name of the picture's settings in PNG text; elsewhere they are the EXIF image description.
METADATA_KEY = "hypergen"
# Fields of requests that few models have; they stand there when they were given.
_SELDOM = ("prompt_2", "negative_prompt_2", "enable_refiner")
# EXIF stands in one JPEG segment of at most 64 KB; some of it goes to the tags around the text.
_JPEG_METADATA_BYTES = 65_000


@dataclass(frozen=True)
class Format:
    """How one output format is written.

    Args:
        save: writes an image with a compression of 0 to 100 and its metadata as JSON text, if any.
    """

    extension: str
    media_type: str
    save: Callable[[Image.Image, BytesIO, int, str | None], None]


def _save_png(image: Image.Image, file: BytesIO, _compression: int, metadata: str | None) -> None:
    texts = {} if metadata is None else {METADATA_KEY: metadata}
    file.write(write_png(np.asarray(image), texts))


def _save_jpeg(image: Image.Image, file: BytesIO, compression: int, metadata: str | None) -> None:
    # 100 would switch quantisation nearly off; Pillow's manual advises 95 as the most that makes sense, but
    # the contract wants lower numbers to be smaller all the way, so the number is passed on as it is.
    if metadata is not None and len(metadata) > _JPEG_METADATA_BYTES:
        metadata = None  # a prompt that was cut off would tell of another picture
    image.save(file, "JPEG", quality=max(compression, 1), exif=_exif(metadata))


def _save_webp(image: Image.Image, file: BytesIO, compression: int, metadata: str | None) -> None:
    image.save(file, "WEBP", quality=compression, exif=_exif(metadata))


def _exif(metadata: str | None) -> bytes:
    if metadata is None:
        return b""
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = metadata
    return exif.tobytes()


FORMATS: dict[str, Format] = {
    "png": Format("png", "image/png", _save_png),
    "jpeg": Format("jpg", "image/jpeg", _save_jpeg),
    "webp": Format("webp", "image/webp", _save_webp),
}


def encode(pixels: np.ndarray, request: GenerationRequest, index: int, model_id: str) -> bytes:
    """The file of image `index` of a request.

    Args:
        pixels: uint8, shape (drawn height, drawn width, 3); cropped or resized to the size that was asked
            for. What the request's mask keeps is then put over it, softly where the mask is soft.
    """
    image = resize_to_request_size(Image.fromarray(pixels), (request.width, request.height))
    if request.image is not None and request.mask is not None:
        image = Image.composite(image, _to_image(request.image), _to_image(request.mask))
    file = BytesIO()
    metadata = json.dumps(_determinants(request, index, model_id)) if request.metadata else None
    FORMATS[request.output_format].save(image, file, request.output_compression, metadata)
    return file.getvalue()


def _to_image(picture: InputImage) -> Image.Image:
    size = (picture.width, picture.height)
    return Image.frombytes("L" if len(picture.pixels) == size[0] * size[1] else "RGB", size, picture.pixels)


def _determinants(request: GenerationRequest, index: int, model_id: str) -> dict[str, Any]:
    """What determines this image and nothing else: no n, time, request id or dialect. So image j of n has the
    same bytes as the single image with its seed.
    """
    loras = {name: weight for name, weight in request.loras if weight != 0}
    unwanted = request.negative_prompt or request.negative_prompt_2
    true_cfg_scale = request.true_cfg_scale if unwanted else None
    return {
        "model": model_id,
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "width": request.width,
        "height": request.height,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "sampler": request.sampler,
        "seed": request.seed + index,
        **({} if true_cfg_scale is None else {"true_cfg_scale": true_cfg_scale}),
        **({"loras": loras} if loras else {}),
        **{name: value for name in _SELDOM if (value := getattr(request, name))},
        **_conditions(request),
    }


def _conditions(request: GenerationRequest) -> dict[str, Any]:
    """The pictures that an image was made from, by the SHA-256 of their pixels, and how."""
    conditions: dict[str, Any] = {}
    if request.image is not None:
        conditions |= {"image": _digest(request.image), "strength": request.strength}
    if request.mask is not None:
        conditions["mask"] = _digest(request.mask)
    if request.control is not None:
        control = {field.name: getattr(request.control, field.name) for field in fields(request.control)}
        conditions["control"] = {**control, "image": _digest(request.control.image)}
    return conditions


def _digest(picture: InputImage) -> str:
    return hashlib.sha256(picture.pixels).hexdigest()
