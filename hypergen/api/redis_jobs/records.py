"""A job as the fields of a Redis hash, and back. Nothing is pickled, so that no data runs code."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cache

from pydantic import TypeAdapter, ValidationError

from hypergen.api.dialects.endpoint import Endpoint
from hypergen.api.dialects.endpoints import ENDPOINTS
from hypergen.api.errors import to_json
from hypergen.api.validated_request import ValidatedRequest
from hypergen.errors import RequestError, UnavailableError, pack, unpack
from hypergen.events import ImageFinished
from hypergen.request import GenerationRequest, InputImage

Fields = Mapping[str, bytes]
_IMAGES = TypeAdapter(list[ImageFinished])


def encode_request(endpoint: Endpoint, validated: ValidatedRequest) -> dict[str, bytes]:
    """The fields of a new job. Takes milliseconds per megabyte of input images."""
    inputs = _input_images(validated.generation)
    without_pixels = {name: replace(image, pixels=b"") for name, image in inputs.items()}
    generation = _with_input_images(validated.generation, without_pixels)
    fields = {
        "endpoint": endpoint.path.encode(),
        "request": _to_json(replace(validated, generation=generation)),
    }
    return fields | {name: zlib.compress(image.pixels, 1) for name, image in inputs.items()}


def decode_request(fields: Fields) -> tuple[Endpoint, ValidatedRequest]:
    """The request of a job; without the pixels of its input images once it has ended.

    Raises:
        UnavailableError: another version of HyperGen made the job, with fields that are unknown here.
    """
    path = fields["endpoint"].decode()
    endpoint = next((endpoint for endpoint in ENDPOINTS if endpoint.path == path), None)
    if endpoint is None:
        raise _unknown_version()
    try:
        tree = json.loads(fields["request"])
        validated = _adapter(endpoint.validated).validate_python(tree)
    except ValidationError:
        raise _unknown_version() from None
    if json.loads(_to_json(validated)) != tree:  # it has a field that is unknown here
        raise _unknown_version()
    inputs = {
        name: replace(image, pixels=zlib.decompress(fields[name]))
        for name, image in _input_images(validated.generation).items()
        if name in fields
    }
    return endpoint, replace(validated, generation=_with_input_images(validated.generation, inputs))


def encode_images(images: list[ImageFinished]) -> bytes:
    """What is known about finished images, without their files."""
    return to_json([{**asdict(replace(image, data=b"")), "data": ""} for image in images])


def decode_images(fields: Fields, files: Mapping[int, bytes]) -> list[ImageFinished]:
    """
    Args:
        files: by the index of the image.
    """
    described = _IMAGES.validate_json(fields["images"])
    return [replace(image, data=files[image.index]) for image in described]


def encode_error(error: RequestError) -> bytes:
    return to_json(pack(error))


def decode_error(fields: Fields) -> RequestError | None:
    packed = fields.get("error")
    return unpack(tuple(json.loads(packed))) if packed else None


def _to_json(validated: ValidatedRequest) -> bytes:
    return json.dumps(asdict(validated), default=bytes.decode, separators=(",", ":")).encode("ascii")


@cache
def _adapter(request_type: type[ValidatedRequest]) -> TypeAdapter[ValidatedRequest]:
    return TypeAdapter(request_type)


def _input_images(request: GenerationRequest) -> dict[str, InputImage]:
    """Field of the record -> input image."""
    images = {
        "image": request.image,
        "mask": request.mask,
        "control": request.control and request.control.image,
    }
    return {name: image for name, image in images.items() if image is not None}


def _with_input_images(request: GenerationRequest, images: Mapping[str, InputImage]) -> GenerationRequest:
    control = request.control
    if control is not None and "control" in images:
        control = replace(control, image=images["control"])
    return replace(
        request,
        image=images.get("image", request.image),
        mask=images.get("mask", request.mask),
        control=control,
    )


def _unknown_version() -> UnavailableError:
    return UnavailableError(
        "The job was made by another version of HyperGen.", code="other_version", retry_after_s=5
    )
