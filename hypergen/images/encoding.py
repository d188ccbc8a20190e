"""Encode pixels as a PNG, JPEG or WebP file, with the generation settings as metadata."""

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

# The keyword of the PNG text chunk; JPEG and WebP have the metadata as EXIF image description.
METADATA_KEY = "hypergen"
# Request fields of few models; in the metadata only if they were given.
_OPTIONAL_FIELDS = ("prompt_2", "negative_prompt_2", "clip_skip", "enable_refiner")
# EXIF must fit into one JPEG segment of at most 64 KB, with the tags around the text.
_JPEG_METADATA_BYTES = 65_000


@dataclass(frozen=True)
class ImageFormat:
    """One output format.

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
    # Pillow's manual advises a quality of at most 95. Passed on unchanged, because the API promises that a
    # lower number gives a smaller file over the whole range.
    if metadata is not None and len(metadata) > _JPEG_METADATA_BYTES:
        metadata = None  # a truncated prompt would describe a different image
    image.save(file, "JPEG", quality=max(compression, 1), exif=_exif(metadata))


def _save_webp(image: Image.Image, file: BytesIO, compression: int, metadata: str | None) -> None:
    image.save(file, "WEBP", quality=compression, exif=_exif(metadata))


def _exif(metadata: str | None) -> bytes:
    if metadata is None:
        return b""
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = metadata
    return exif.tobytes()


OUTPUT_FORMATS: dict[str, ImageFormat] = {
    "png": ImageFormat("png", "image/png", _save_png),
    "jpeg": ImageFormat("jpg", "image/jpeg", _save_jpeg),
    "webp": ImageFormat("webp", "image/webp", _save_webp),
}


def encode_image(pixels: np.ndarray, request: GenerationRequest, index: int, model_id: str) -> bytes:
    """The file of image `index` of a request.

    The pixels are cropped or resized to the requested size. With a mask, the input image is then composited
    over its kept region; grey mask values blend both.

    Args:
        pixels: uint8, shape (height, width, 3), at the generation size.
    """
    image = resize_to_request_size(Image.fromarray(pixels), (request.width, request.height))
    if request.image is not None and request.mask is not None:
        image = Image.composite(image, _to_image(request.image), _to_image(request.mask))
    file = BytesIO()
    metadata = json.dumps(_metadata(request, index, model_id)) if request.metadata else None
    OUTPUT_FORMATS[request.output_format].save(image, file, request.output_compression, metadata)
    return file.getvalue()


def _to_image(image: InputImage) -> Image.Image:
    size = (image.width, image.height)
    return Image.frombytes("L" if len(image.pixels) == size[0] * size[1] else "RGB", size, image.pixels)


def _metadata(request: GenerationRequest, index: int, model_id: str) -> dict[str, Any]:
    """Every setting that determines this image, but no n, time, request id or dialect. So image j of n has
    the same bytes as a single image with its seed.
    """
    loras = {name: weight for name, weight in request.loras if weight != 0}
    has_negative_prompt = request.negative_prompt or request.negative_prompt_2
    true_cfg_scale = request.true_cfg_scale if has_negative_prompt else None
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
        **{name: value for name in _OPTIONAL_FIELDS if (value := getattr(request, name))},
        **_input_image_metadata(request),
    }


def _input_image_metadata(request: GenerationRequest) -> dict[str, Any]:
    """The input images, each as the SHA-256 of its pixels, with their settings."""
    metadata: dict[str, Any] = {}
    if request.image is not None:
        metadata |= {"image": _digest(request.image), "strength": request.strength}
    if request.mask is not None:
        metadata["mask"] = _digest(request.mask)
    if request.control is not None:
        control = {field.name: getattr(request.control, field.name) for field in fields(request.control)}
        metadata["control"] = {**control, "image": _digest(request.control.image)}
    return metadata


def _digest(image: InputImage) -> str:
    return hashlib.sha256(image.pixels).hexdigest()
