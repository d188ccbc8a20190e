"""The field `size`: its format, its limits, and the size of the generated file."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import httpx
import pytest

from hypergen.api.dialects import hyperbolic, openai_images
from hypergen.api.validation import default_size
from hypergen.config import ServerSettings
from hypergen.errors import InvalidRequestError
from hypergen.model_info import ModelDefaults, ModelInfo
from tests.support.http_client import GENERATIONS, QUICK, assert_error, generate, generate_image

MODEL_INFO = ModelInfo(
    id="m",
    family="sd",
    defaults=ModelDefaults(num_inference_steps=50, guidance_scale=7.5, width=512, height=512),
    samplers={"euler": 1},
    min_steps=1,
    device="cpu",
    dtype="float32",
)

MALFORMED = [
    "",
    "x",
    "512",
    "512x",
    "x512",
    "512x512x512",
    "512 x512",
    " 512x512",
    "512x512\n",
    "512X512",
    "512*512",
    "512,512",
    "+512x512",
    "-512x512",
    "512x-512",
    "0x512",
    "0512x512",
    "5_12x512",
    "51.2x512",
    "1e3x8",
    "0x200x0x200",
    "AUTO",
    "large",
    "\uff15\uff11\uff12x512",  # full-width digits
    "\u0661\u0662\u0668x\u0661\u0662\u0668",  # Arabic digits
    "\u096b\u0967\u0968x512",  # Devanagari digits
    "512\u0445512",  # a Cyrillic letter
    "512\xd7512",  # a multiplication sign
    "512x512\0",
    "512\0x512",
    "9" * 100_000 + "x512",
    f"{2**64}x{2**64}",
]
REJECTED = ["100x100", "1001x1000", "1000x1001", "56x64", "64x56", "8x8", "2056x64", "64x2056", "65536x65536"]
NOT_A_STRING = [True, 512, 512.0, ["512x512"], {"width": 512}]


@pytest.mark.parametrize("size", MALFORMED, ids=lambda size: ascii(size)[:30])
def test_a_malformed_size_gets_the_documented_message(client: httpx.Client, size: str) -> None:
    message = assert_error(client.post(GENERATIONS, json={**QUICK, "size": size}), 400, param="size")
    assert message == f"Invalid size format: {size[:40]}. Use format like '1024x1024'"


@pytest.mark.parametrize("size", [*REJECTED, *NOT_A_STRING], ids=str)
def test_an_unsupported_size_is_rejected(client: httpx.Client, size: Any) -> None:
    message = assert_error(client.post(GENERATIONS, json={**QUICK, "size": size}), 400, param="size")
    assert "8" in message or "string" in message


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("1000x1000", (1000, 1000)),
        ("64x64", (64, 64)),
        ("2048x2048", (2048, 2048)),
        ("64x2048", (64, 2048)),
        ("1024x1792", (1024, 1792)),
        ("auto", (512, 512)),
        (None, (512, 512)),
    ],
)
def test_every_multiple_of_8_within_the_limits_is_accepted(
    size: str | None, expected: tuple[int, int]
) -> None:
    body = {"prompt": "a"} if size is None else {"prompt": "a", "size": size}
    generation = openai_images.to_request(
        body, MODEL_INFO, ServerSettings.model_validate({}), "id"
    ).generation
    assert (generation.width, generation.height) == expected


def test_the_documented_maxima_are_within_the_work_limit() -> None:
    body = {"prompt": "a", "n": 10, "num_inference_steps": 150, "size": "2048x2048"}
    openai_images.to_request(body, MODEL_INFO, ServerSettings.model_validate({}), "id")
    with pytest.raises(InvalidRequestError, match="images x steps x megapixels"):
        openai_images.to_request(
            body, MODEL_INFO, ServerSettings.model_validate({"max_megapixel_steps": 6000}), "id"
        )


@pytest.mark.parametrize(("width", "height"), [(72, 136), (136, 72), (64, 64)])
@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_the_file_has_exactly_the_requested_size(
    client: httpx.Client, width: int, height: int, output_format: str
) -> None:
    image = generate_image(client, size=f"{width}x{height}", output_format=output_format)
    assert image.size == (width, height)
    assert image.mode == "RGB"


@pytest.mark.parametrize("fields", [{}, {"size": "auto"}])
def test_the_default_size_is_the_models(client: httpx.Client, fields: dict[str, Any]) -> None:
    assert generate(client, **fields)["size"] == "128x128"
    assert generate_image(client, **fields).size == (128, 128)


def test_server_limits_reduce_the_models_default_size_and_steps() -> None:
    small = ServerSettings.model_validate({"max_side": 128, "max_steps": 4})
    own = openai_images.to_request({"prompt": "a"}, MODEL_INFO, small, "id").generation
    assert (own.width, own.height, own.num_inference_steps) == (128, 128, 4)
    body: dict[str, Any] = {"prompt": "a", "model_name": "a"}
    theirs = hyperbolic.to_request(body, MODEL_INFO, small, "id").generation
    assert (theirs.width, theirs.height, theirs.num_inference_steps) == (128, 128, 4)
    with pytest.raises(InvalidRequestError, match="at most 4") as raised:
        openai_images.to_request({**body, "num_inference_steps": 5}, MODEL_INFO, small, "id")
    assert raised.value.param == "num_inference_steps"
    with pytest.raises(InvalidRequestError, match="at most 4") as raised:
        hyperbolic.to_request({**body, "steps": 5}, MODEL_INFO, small, "id")
    assert raised.value.param == "steps"


@pytest.mark.parametrize(("width", "height", "expected"), [(1024, 512, (128, 64)), (2048, 64, (128, 64))])
def test_a_reduced_default_size_keeps_the_aspect_ratio(
    width: int, height: int, expected: tuple[int, int]
) -> None:
    own = replace(MODEL_INFO, defaults=replace(MODEL_INFO.defaults, width=width, height=height))
    assert default_size(own, 128) == expected
