"""POST /v1/images/edits and /v1/images/variations: forms and JSON, and how their pictures are read."""

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
PICTURE = as_file(gradient(96, 64))
MASK = as_file(Image.new("RGBA", (96, 64), (0, 0, 0, 0)))


def in_json(data: bytes) -> dict[str, str]:
    return {"image_url": as_data_url(data)}


def edit(**fields: Any) -> GenerationRequest:
    body = {"prompt": "a", "images": [in_json(PICTURE)], **fields}
    body = {name: value for name, value in body.items() if value is not None}
    return openai_edits.to_edit(body, FULL_MODEL_INFO, SETTINGS, "id").generation


def refusal(**fields: Any) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as raised:
        edit(**fields)
    assert str(raised.value.param) in raised.value.message
    return raised.value


def test_the_form_and_json_make_the_same_request() -> None:
    fields = {"prompt": "a", "seed": 5, "n": 2, "strength": 0.5, "size": "64x128"}
    from_form = openai_edits.to_edit(
        form_of(
            [("image", ("a", PICTURE)), ("mask", ("m", MASK))],
            {name: str(value) for name, value in fields.items()},
        ),
        FULL_MODEL_INFO,
        SETTINGS,
        "id",
    ).generation
    assert from_form == edit(mask=in_json(MASK), **fields)
    assert (from_form.seed, from_form.n, from_form.strength) == (5, 2, 0.5)


@pytest.mark.parametrize(
    ("sent", "drawn"),
    [((96, 64), (96, 64)), ((101, 79), (96, 72)), ((30, 90), (64, 192)), ((4096, 1024), (2048, 512))],
)
def test_without_a_size_the_pictures_own_is_drawn(sent: tuple[int, int], drawn: tuple[int, int]) -> None:
    for size in (None, "auto"):
        request = edit(images=[in_json(as_file(gradient(*sent)))], size=size)
        assert request.image is not None
        assert (request.width, request.height) == (request.image.width, request.image.height) == drawn


def test_a_size_that_is_asked_for_is_drawn() -> None:
    request = edit(size="128x256", mask=in_json(MASK))
    assert request.image is not None
    assert request.mask is not None
    for picture in (request.image, request.mask):
        assert (picture.width, picture.height) == (request.width, request.height) == (128, 256)


def test_strength_is_what_was_asked_or_what_suits() -> None:
    assert edit().strength == 0.7
    assert edit(mask=in_json(MASK)).strength == 1.0
    assert edit(mask=in_json(MASK), strength=0.3).strength == 0.3
    assert edit(strength=0).strength == 0


def test_the_mask_draws_where_it_is_transparent() -> None:
    half = Image.new("RGBA", (96, 64), (0, 0, 0, 255))
    half.paste((0, 0, 0, 0), (0, 0, 48, 64))
    mask = edit(mask=in_json(as_file(half))).mask
    assert mask is not None
    seen = np.frombuffer(mask.pixels, np.uint8).reshape(64, 96)
    assert (seen[:, :48] == 255).all()
    assert (seen[:, 48:] == 0).all()


def test_of_several_pictures_the_first_is_the_base() -> None:
    others = [in_json(as_file(Image.new("RGB", (20, 20), "red")))] * 15
    assert edit(images=[in_json(PICTURE), *others], seed=1) == edit(seed=1)
    assert refusal(images=[in_json(PICTURE), in_json(b"x")]).param == "images"


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
def test_a_picture_that_cannot_be_read_is_refused(data: bytes) -> None:
    assert refusal(images=[in_json(data)]).param == "images"
    assert refusal(images=None, image=[data]).param == "image"
    assert refusal(mask=in_json(data)).param == "mask"


REFUSED: dict[str, list[Any]] = {
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
        [{"image_url": "http://127.0.0.1:1/x.png"}],
        [{"image_url": "https://[::1]/x.png"}],
        [{"image_url": "file:///etc/passwd"}],
        [{"file_id": "file-1"}],
        [{"file_id": "file-1", **in_json(PICTURE)}],
        [in_json(PICTURE)] * 17,
    ],
    "mask": ["x", 1, {}, [in_json(MASK)], in_json(as_file(gradient(64, 64))), {"image_url": "https://x/"}],
    "strength": [-0.1, 1.1, "1", True],
    "input_fidelity": ["", "medium", 1],
    "markup": ["<x/>"],
    "image": [[PICTURE]],
    "n": [0, 11, 1.5],
    "size": ["100x100", "8x8", "x", "4096x4096"],
    "prompt": [" ", 1],
    "background": ["transparent"],
    "stream": ["yes", 1],
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in REFUSED.items() for value in values]
)
def test_a_bad_value_is_refused_by_the_name_of_its_field(field: str, value: Any) -> None:
    assert refusal(**{field: value}).param == field


def test_missing_fields_are_named() -> None:
    assert refusal(prompt=None).code == refusal(images=None).code == "missing_required_parameter"
    assert refusal(prompt=None).param == "prompt"
    assert refusal(images=None).param == "images"


def test_a_variation_needs_no_prompt() -> None:
    body = form_of([("image", ("a", PICTURE))], {"n": "2", "size": "256x256"})
    request = openai_edits.to_variation(body, FULL_MODEL_INFO, SETTINGS, "id").generation
    assert (request.n, request.width, request.strength) == (2, 256, 0.7)
    assert request.image is not None
    assert request.mask is None


def test_a_model_that_draws_from_prompts_only_says_so() -> None:
    fields = {name: getattr(FULL_MODEL_INFO, name) for name in FULL_MODEL_INFO.__slots__}
    for capabilities, field in ((frozenset(), "images"), (frozenset({"image"}), "mask")):
        plain = type(FULL_MODEL_INFO)(**{**fields, "capabilities": capabilities})
        body = {"prompt": "a", "images": [in_json(PICTURE)], "mask": in_json(MASK)}
        with pytest.raises(
            InvalidRequestError, match=r"is not supported by the served model \(sdxl\)"
        ) as raised:
            openai_edits.to_edit(body, plain, SETTINGS, "id")
        assert (raised.value.param, raised.value.code) == (field, "unsupported_parameter")


# Over HTTP.


def send(client: httpx.Client, path: str = EDITS, **parts: Any) -> httpx.Response:
    fields = {"prompt": "a", "num_inference_steps": "1"}
    return client.post(path, data=fields, files={"image": ("upload", PICTURE), **parts})


def test_bad_forms_are_refused_over_http(client: httpx.Client) -> None:
    for path in (EDITS, VARIATIONS):
        assert_error(send(client, path, image=("a.png", b"x", "image/png")), 400, param="image")
        assert_error(client.post(path, files={"prompt": (None, "a")}), 400, param="image")
        headers = {"Content-Type": "multipart/form-data"}
        assert_error(client.post(path, content=b"x", headers=headers), 400, code="invalid_form")
        assert "multipart/form-data" in assert_error(client.post(path, data={"prompt": "a"}), 415)
    for path in (EDITS, VARIATIONS):
        assert_error(client.post(path, json=QUICK), 400, param="images", code="missing_required_parameter")
    assert_error(client.post(EDITS, json={**QUICK, "images": []}), 400, param="images")
    assert_error(client.post(EDITS, files={"image": ("upload", PICTURE)}), 400, param="prompt")
    many = [("image[]", ("upload", PICTURE))] * 17
    assert_error(client.post(EDITS, data={"prompt": "a"}, files=many), 400, param="image")
    assert client.get("/health").json()["queue_size"] == 0


def test_a_form_beyond_the_limit_is_too_large(tight: TightServer) -> None:
    response = send(tight.client, image=("upload", b"x" * 200_000))
    assert_error(response, 413, code="payload_too_large")


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")  # variations, in the client
def test_the_official_client_raises_bad_request(server: LiveServer) -> None:
    with server.openai() as client:
        with pytest.raises(openai.BadRequestError) as raised:
            client.images.edit(image=[("a.png", b"no picture")], prompt="a", mask=("m.png", MASK))
        assert raised.value.param == "image"
        with pytest.raises(openai.BadRequestError) as raised:
            client.images.create_variation(image=("a.png", b"no picture"), model="dall-e-2")
        assert raised.value.param == "image"


@pytest.mark.parametrize("field", ["prompt_2", "negative_prompt_2"])
def test_generations_take_the_extensions(client: httpx.Client, field: str) -> None:
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
        ({"control_image": as_base64(PICTURE)}, "control_image"),
        ({"control_model": "canny"}, "control_model"),
        ({"controlnet_conditioning_scale": 3}, "controlnet_conditioning_scale"),
    ],
)
def test_extensions_are_checked_in_generations(
    client: httpx.Client, fields: dict[str, Any], param: str
) -> None:
    assert_error(client.post("/v1/images/generations", json={**QUICK, **fields}), 400, param=param)
