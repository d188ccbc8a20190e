"""Encode pixels as a PNG, JPEG or WebP file, with the generation settings as metadata."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from io import BytesIO
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from hypergen.images.geometry import resize_to_request_size
from hypergen.images.infotext import infotext
from hypergen.images.png import write_png
from hypergen.request import GenerationRequest, InputImage

# Keywords of PNG text chunks: the settings as JSON, and as A1111's text. JPEG and WebP have them in EXIF, as
# image description and user comment.
METADATA_KEY = "hypergen"
INFOTEXT_KEY = "parameters"
# Of a user comment in UTF-16, whose byte order EXIF leaves open; A1111 and Civitai read big-endian.
_UNICODE = b"UNICODE\0"
# Request fields of few models; in the metadata only if they were given.
_OPTIONAL_FIELDS = ("prompt_2", "negative_prompt_2", "clip_skip", "enable_refiner")
# A JPEG segment has at most 65,535 bytes, two of them its length.
_JPEG_EXIF_BYTES = 65_533


@dataclass(frozen=True)
class _Metadata:
    """The settings of an image, as JSON in ASCII and as A1111's text."""

    settings: str
    infotext: str


@dataclass(frozen=True)
class ImageFormat:
    """One output format.

    Args:
        save: writes an image with a compression of 0 to 100 and its metadata, if any.
    """

    extension: str
    media_type: str
    save: Callable[[Image.Image, BytesIO, int, _Metadata | None], None]


def _save_png(image: Image.Image, file: BytesIO, _compression: int, metadata: _Metadata | None) -> None:
    # Some readers only look at the first text.
    texts = {INFOTEXT_KEY: metadata.infotext, METADATA_KEY: metadata.settings} if metadata else {}
    file.write(write_png(np.asarray(image), texts))


def _save_jpeg(image: Image.Image, file: BytesIO, compression: int, metadata: _Metadata | None) -> None:
    # What does not fit is left out, first A1111's text: a truncated prompt would describe a different image.
    exif = _exif(metadata)
    if metadata and len(exif) > _JPEG_EXIF_BYTES:
        exif = _exif(replace(metadata, infotext=""))
    if len(exif) > _JPEG_EXIF_BYTES:
        exif = b""
    # Pillow's manual advises a quality of at most 95. Passed on unchanged, because the API promises that a
    # lower number gives a smaller file over the whole range.
    image.save(file, "JPEG", quality=max(compression, 1), exif=exif)


def _save_webp(image: Image.Image, file: BytesIO, compression: int, metadata: _Metadata | None) -> None:
    image.save(file, "WEBP", quality=compression, exif=_exif(metadata))


def _exif(metadata: _Metadata | None) -> bytes:
    if metadata is None:
        return b""
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = metadata.settings
    if metadata.infotext:
        comment = _UNICODE + metadata.infotext.encode("utf-16-be")
        exif[ExifTags.IFD.Exif] = {ExifTags.Base.UserComment: comment}
    return exif.tobytes()


OUTPUT_FORMATS: dict[str, ImageFormat] = {
    "png": ImageFormat("png", "image/png", _save_png),
    "jpeg": ImageFormat("jpg", "image/jpeg", _save_jpeg),
    "webp": ImageFormat("webp", "image/webp", _save_webp),
}


def encode_image(pixels: np.ndarray, request: GenerationRequest, index: int, model_id: str) -> bytes:
    """The file of image `index` of a request, from the decoded pixels; see `finished_image`."""
    return encode_finished(finished_image(pixels, request), request, index, model_id)


def finished_image(pixels: np.ndarray, request: GenerationRequest) -> Image.Image:
    """The image of decoded pixels, cropped or resized to the requested size.

    With a mask, the input image is then composited over its kept region; grey mask values blend both.

    Args:
        pixels: uint8, shape (height, width, 3), at the generation size.
    """
    image = resize_to_request_size(Image.fromarray(pixels), (request.width, request.height))
    if request.image is not None and request.mask is not None:
        image = Image.composite(image, _to_image(request.image), _to_image(request.mask))
    return image


def encode_finished(image: Image.Image, request: GenerationRequest, index: int, model_id: str) -> bytes:
    """The file of an image, with the settings of image `index` of a request as metadata."""
    file = BytesIO()
    metadata = None
    if request.metadata:
        settings = _settings(request, index, model_id)
        metadata = _Metadata(json.dumps(settings), infotext(settings))
    OUTPUT_FORMATS[request.output_format].save(image, file, request.output_compression, metadata)
    return file.getvalue()


def _to_image(image: InputImage) -> Image.Image:
    size = (image.width, image.height)
    return Image.frombytes("L" if len(image.pixels) == size[0] * size[1] else "RGB", size, image.pixels)


def _settings(request: GenerationRequest, index: int, model_id: str) -> dict[str, Any]:
    """Every setting that determines this image, but no n, time, request id or dialect. So image j of n has
    the same bytes as a single image with its seed.
    """
    loras = {name: weight for name, weight in request.loras if weight != 0}
    has_negative_prompt = request.negative_prompt or request.negative_prompt_2
    true_cfg_scale = request.true_cfg_scale if has_negative_prompt else None
    compression = request.output_compression
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
        **_input_image_settings(request),
        **({} if compression == 100 else {"output_compression": compression}),
    }


def _input_image_settings(request: GenerationRequest) -> dict[str, Any]:
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
