"""POST /v1/images/edits and /v1/images/variations: forms, JSON, and their input images."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from hypergen.api.dialects import openai_edits
from hypergen.errors import InvalidRequestError
from hypergen.request import GenerationRequest
from tests.api.conftest import TightServer
from tests.api.test_multipart_form import form_of
from tests.support.full_capability_model import FULL_MODEL_INFO, SETTINGS
from tests.support.http_client import QUICK, assert_error
from tests.support.image_files import BROKEN, as_base64, as_data_url, as_file, gradient
from tests.support.live_server import LiveServer

EDITS = "/v1/images/edits"
VARIATIONS = "/v1/images/variations"
INPUT_IMAGE = as_file(gradient(96, 64))
MASK = as_file(Image.new("RGBA", (96, 64), (0, 0, 0, 0)))
OTHER_MASK = as_file(Image.new("RGBA", (96, 64), (0, 0, 0, 255)))


def in_json(data: bytes) -> dict[str, str]:
    return {"image_url": as_data_url(data)}


def edit(**fields: Any) -> GenerationRequest:
    body = {"prompt": "a", "images": [in_json(INPUT_IMAGE)], **fields}
    body = {name: value for name, value in body.items() if value is not None}
    return openai_edits.to_edit(body, FULL_MODEL_INFO, SETTINGS, "id").generation


def rejection(**fields: Any) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as raised:
        edit(**fields)
    assert str(raised.value.param) in raised.value.message
    return raised.value


def test_the_form_and_json_make_the_same_request() -> None:
    fields = {"prompt": "a", "seed": 5, "n": 2, "strength": 0.5, "size": "64x128"}
    from_form = openai_edits.to_edit(
        form_of(
            [("image", ("a", INPUT_IMAGE)), ("mask", ("m", MASK))],
            {name: str(value) for name, value in fields.items()},
        ),
        FULL_MODEL_INFO,
        SETTINGS,
        "id",
    ).generation
    assert from_form == edit(mask=in_json(MASK), **fields)
    assert (from_form.seed, from_form.n, from_form.strength) == (5, 2, 0.5)


@pytest.mark.parametrize(
    ("input_size", "expected"),
    [((96, 64), (96, 64)), ((101, 79), (96, 72)), ((30, 90), (64, 192)), ((4096, 1024), (2048, 512))],
)
def test_the_default_size_is_that_of_the_input_image(
    input_size: tuple[int, int], expected: tuple[int, int]
) -> None:
    for size in (None, "auto"):
        request = edit(images=[in_json(as_file(gradient(*input_size)))], size=size)
        assert request.image is not None
        assert (request.width, request.height) == (request.image.width, request.image.height) == expected


def test_input_images_are_resized_to_the_requested_size() -> None:
    request = edit(size="128x256", mask=in_json(MASK))
    assert request.image is not None
    assert request.mask is not None
    for image in (request.image, request.mask):
        assert (image.width, image.height) == (request.width, request.height) == (128, 256)


def test_strength_defaults_to_0_7_and_with_a_mask_to_1() -> None:
    assert edit().strength == 0.7
    assert edit(mask=in_json(MASK)).strength == 1.0
    assert edit(mask=in_json(MASK), strength=0.3).strength == 0.3
    assert edit(strength=0).strength == 0


def test_transparent_pixels_of_the_mask_are_generated() -> None:
    half = Image.new("RGBA", (96, 64), (0, 0, 0, 255))
    half.paste((0, 0, 0, 0), (0, 0, 48, 64))
    mask = edit(mask=in_json(as_file(half))).mask
    assert mask is not None
    values = np.frombuffer(mask.pixels, np.uint8).reshape(64, 96)
    assert (values[:, :48] == 255).all()
    assert (values[:, 48:] == 0).all()


def test_only_the_first_input_image_is_used() -> None:
    others = [in_json(as_file(Image.new("RGB", (20, 20), "red")))] * 15
    assert edit(images=[in_json(INPUT_IMAGE), *others], seed=1) == edit(seed=1)
    assert rejection(images=[in_json(INPUT_IMAGE), in_json(b"x")]).param == "images"


@pytest.mark.parametrize(
    "image",
    [
        as_data_url(INPUT_IMAGE),
        {"image_url": {"url": as_data_url(INPUT_IMAGE)}},
        {"image_url": {"url": as_data_url(INPUT_IMAGE), "detail": "high"}, "type": "image_url"},
        {"image_url": as_data_url(INPUT_IMAGE), "type": "input_image", "file_id": None},
        {"url": as_data_url(INPUT_IMAGE), "type": "image_url"},
        {"b64_json": as_base64(INPUT_IMAGE)},
    ],
)
def test_an_image_in_json_may_have_any_of_the_usual_forms(image: Any) -> None:
    assert edit(images=[image], seed=1) == edit(images=image, seed=1) == edit(seed=1)
    mask = {"b64_json": as_base64(MASK)}
    assert edit(images=[image], mask=mask, seed=1) == edit(mask=in_json(MASK), seed=1)


@pytest.mark.parametrize(
    "names", [["mask[]"], ["mask[0]"], ["mask", "mask"], ["mask", "mask[]"], ["mask[]", "mask[]"]]
)
def test_a_mask_may_be_sent_as_a_list_or_twice(names: list[str]) -> None:
    parts = [("image", ("a", INPUT_IMAGE)), *((name, ("m", MASK)) for name in names)]
    body = form_of(parts, {"prompt": "a", "seed": "1"})
    expected = edit(mask=in_json(MASK), seed=1)
    assert openai_edits.to_edit(body, FULL_MODEL_INFO, SETTINGS, "id").generation == expected
    assert edit(mask=[in_json(MASK)] * len(names), seed=1) == expected


def test_of_one_mask_per_image_the_first_is_used() -> None:
    images = [in_json(INPUT_IMAGE), in_json(INPUT_IMAGE)]
    masks = [in_json(MASK), in_json(OTHER_MASK)]
    assert edit(images=images, mask=masks, seed=1) == edit(mask=in_json(MASK), seed=1)
    assert rejection(images=images, mask=[in_json(MASK), in_json(b"x")]).param == "mask"


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
def test_an_unreadable_image_is_rejected(data: bytes) -> None:
    assert rejection(images=[in_json(data)]).param == "images"
    assert rejection(images=None, image=[data]).param == "image"
    assert rejection(mask=in_json(data)).param == "mask"


REJECTED: dict[str, list[Any]] = {
    "images": [
        [],
        "x",
        1,
        {},
        [1],
        [{}],
        [None],
        [{"image_url": 1}],
        [{"image_url": {"url": "data:"}}],
        [{"image_url": {"url": "https://x/"}}],
        [{"image_url": {"url": {"url": as_data_url(INPUT_IMAGE)}}}],
        [{"url": "https://x/"}],
        [{"type": "image_url"}],
        [{"b64_json": "?"}],
        [{"b64_json": as_base64(INPUT_IMAGE), **in_json(INPUT_IMAGE)}],
        [{"image_url": "http://127.0.0.1:1/x.png"}],
        [{"image_url": "https://[::1]/x.png"}],
        [{"image_url": "file:///etc/passwd"}],
        [{"file_id": "file-1"}],
        [{"file_id": "file-1", **in_json(INPUT_IMAGE)}],
        [in_json(INPUT_IMAGE)] * 17,
    ],
    "mask": [
        "x",
        1,
        {},
        [[in_json(MASK)]],
        [in_json(MASK), in_json(OTHER_MASK)],
        in_json(as_file(gradient(64, 64))),
        {"image_url": "https://x/"},
    ],
    "strength": [-0.1, 1.1, "1", True],
    "input_fidelity": ["", "medium", 1],
    "markup": ["<x/>"],
    "image": [[INPUT_IMAGE]],
    "n": [0, 11, 1.5],
    "size": ["100x100", "8x8", "x", "4096x4096"],
    "prompt": [" ", 1],
    "background": ["transparent"],
    "stream": ["yes", 1],
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in REJECTED.items() for value in values]
)
def test_an_invalid_value_is_rejected_with_its_param(field: str, value: Any) -> None:
    assert rejection(**{field: value}).param == field


def test_missing_fields_are_rejected_with_their_param() -> None:
    assert rejection(prompt=None).code == rejection(images=None).code == "missing_required_parameter"
    assert rejection(prompt=None).param == "prompt"
    assert rejection(images=None).param == "images"


def test_a_variation_needs_no_prompt() -> None:
    body = form_of([("image", ("a", INPUT_IMAGE))], {"n": "2", "size": "256x256"})
    request = openai_edits.to_variation(body, FULL_MODEL_INFO, SETTINGS, "id").generation
    assert (request.n, request.width, request.strength) == (2, 256, 0.7)
    assert request.image is not None
    assert request.mask is None


def test_unsupported_image_fields_are_rejected() -> None:
    fields = {name: getattr(FULL_MODEL_INFO, name) for name in FULL_MODEL_INFO.__slots__}
    for capabilities, field in ((frozenset(), "images"), (frozenset({"image"}), "mask")):
        plain = type(FULL_MODEL_INFO)(**{**fields, "capabilities": capabilities})
        body = {"prompt": "a", "images": [in_json(INPUT_IMAGE)], "mask": in_json(MASK)}
        with pytest.raises(
            InvalidRequestError, match=r"is not supported by the served model \(sdxl\)"
        ) as raised:
            openai_edits.to_edit(body, plain, SETTINGS, "id")
        assert (raised.value.param, raised.value.code) == (field, "unsupported_parameter")


# Over HTTP.


def send(client: httpx.Client, path: str = EDITS, **parts: Any) -> httpx.Response:
    fields = {"prompt": "a", "num_inference_steps": "1"}
    return client.post(path, data=fields, files={"image": ("upload", INPUT_IMAGE), **parts})


def test_invalid_forms_are_rejected_over_http(client: httpx.Client) -> None:
    for path in (EDITS, VARIATIONS):
        assert_error(send(client, path, image=("a.png", b"x", "image/png")), 400, param="image")
        assert_error(client.post(path, files={"prompt": (None, "a")}), 400, param="image")
        headers = {"Content-Type": "multipart/form-data"}
        assert_error(client.post(path, content=b"x", headers=headers), 400, code="invalid_form")
        assert "multipart/form-data" in assert_error(client.post(path, data={"prompt": "a"}), 415)
    for path in (EDITS, VARIATIONS):
        assert_error(client.post(path, json=QUICK), 400, param="images", code="missing_required_parameter")
    assert_error(client.post(EDITS, json={**QUICK, "images": []}), 400, param="images")
    assert_error(client.post(EDITS, files={"image": ("upload", INPUT_IMAGE)}), 400, param="prompt")
    many = [("image[]", ("upload", INPUT_IMAGE))] * 17
    assert_error(client.post(EDITS, data={"prompt": "a"}, files=many), 400, param="image")
    assert client.get("/health").json()["queue_size"] == 0


def test_a_form_beyond_the_limit_is_too_large(tight: TightServer) -> None:
    response = send(tight.client, image=("upload", b"x" * 200_000))
    assert_error(response, 413, code="payload_too_large")


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")  # variations, in the client
def test_the_official_client_raises_bad_request(server: LiveServer) -> None:
    with server.openai() as client:
        with pytest.raises(openai.BadRequestError) as raised:
            client.images.edit(image=[("a.png", b"not an image")], prompt="a", mask=("m.png", MASK))
        assert raised.value.param == "image"
        with pytest.raises(openai.BadRequestError) as raised:
            client.images.create_variation(image=("a.png", b"not an image"), model="dall-e-2")
        assert raised.value.param == "image"


@pytest.mark.parametrize("field", ["prompt_2", "negative_prompt_2"])
def test_generations_accept_the_extensions(client: httpx.Client, field: str) -> None:
    plain = client.post("/v1/images/generations", json={**QUICK, "seed": 1, "response_format": "b64_json"})
    body = {**QUICK, "seed": 1, "response_format": "b64_json", field: "in oil", "enable_refiner": True}
    extended = client.post("/v1/images/generations", json=body)
    assert extended.json()["data"] == plain.json()["data"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"strength": 2}, "strength"),
        ({"prompt_2": 1}, "prompt_2"),
        ({"enable_refiner": "yes"}, "enable_refiner"),
        ({"control_image": as_base64(INPUT_IMAGE)}, "control_image"),
        ({"control_model": "canny"}, "control_model"),
        ({"controlnet_conditioning_scale": 3}, "controlnet_conditioning_scale"),
    ],
)
def test_extensions_are_validated_in_generations(
    client: httpx.Client, fields: dict[str, Any], param: str
) -> None:
    assert_error(client.post("/v1/images/generations", json={**QUICK, **fields}), 400, param=param)
