"""POST /v1/image/generation as Hyperbolic's two documents describe it."""

from __future__ import annotations

import base64
import time
from io import BytesIO
from typing import Any

import httpx
import pytest
import yaml
from PIL import Image

from hypergen.api.dialects import hyperbolic
from hypergen.api.dialects.hyperbolic import price
from hypergen.config import ServerSettings
from hypergen.errors import InvalidRequestError
from hypergen.generation import GenerationRequest, ModelDefaults, ModelDescription
from tests.api.conftest import TightServer
from tests.api.files import BROKEN, as_base64, as_data_url, as_file, gradient
from tests.api.schemas import validate
from tests.api.wire import JSON, as_json, assert_error, client_of, draw_bytes
from tests.live import LiveServer

PATH = "/v1/image/generation"
BODY: dict[str, Any] = {"model_name": "SDXL1.0-base", "prompt": "a red circle", "steps": 1}

# The answers of Hyperbolic's OpenAPI file, to check ours by.
SCHEMAS = yaml.safe_load("""
ImageGenerationResponse:
  type: object
  properties:
    images:
      type: array
      items:
        type: object
        properties:
          image: {type: string}
          seed: {type: integer}
    inference_time: {type: number}
ErrorResponse:
  type: object
  properties:
    error:
      type: object
      properties:
        message: {type: string}
        type: {type: string}
        code: {type: string}
""")

# A model that has everything, as far as a request can tell.
ABLE = ModelDescription(
    id="m",
    family="sdxl",
    defaults=ModelDefaults(num_inference_steps=50, guidance_scale=7.5, width=1024, height=1024),
    samplers={"euler": 1},
    min_steps=1,
    device="cpu",
    dtype="float32",
    options=frozenset({"prompt_2", "negative_prompt", "enable_refiner", "image", "mask", "control", "loras"}),
    loras=("Pixel_Art", "Logo", "Paint_Splash"),
    control_models=("canny", "depth"),
)
SETTINGS = ServerSettings.model_validate({})


def request_of(**fields: Any) -> GenerationRequest:
    return hyperbolic.to_request({**BODY, **fields}, ABLE, SETTINGS, "id").generation


def refusal(**fields: Any) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as raised:
        request_of(**fields)
    return raised.value


def draw(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = client.post(PATH, json={**BODY, **fields})
    assert response.status_code == 200, response.text
    return response.json()


NOT_A_STRING = [True, 1, 1.5, [], {}]
NOT_AN_INTEGER = [True, 1.5, "2", "", [], {}]
NOT_A_NUMBER = [True, "2", "", [], {}]
PICTURE = as_base64(as_file(gradient()))

REFUSED: dict[str, list[Any]] = {
    "model_name": [*NOT_A_STRING, ""],
    "prompt": [*NOT_A_STRING, "", " ", "a" * 32001],
    "negative_prompt": [*NOT_A_STRING, "a" * 32001],
    "steps": [*NOT_AN_INTEGER, 0, -1, 101],
    "cfg_scale": [*NOT_A_NUMBER, 0, 0.99, 20.01, -1],
    "width": [*NOT_AN_INTEGER, 0, 56, 65, 100, 2056, 2432, 4096],
    "height": [*NOT_AN_INTEGER, 0, 56, 65, 100, 2056, 2432, 4096],
    "seed": [*NOT_AN_INTEGER, -1, 2**63, 2**70],
    "n": [*NOT_AN_INTEGER, 0, 5, -1],
    "sampler": [*NOT_A_STRING, "", "eular"],
    "backend": ["", "AUTO", "onnx", 1, True],
    "prompt_2": [*NOT_A_STRING, "a" * 32001],
    "negative_prompt_2": NOT_A_STRING,
    "enable_refiner": ["true", 1, 0, ""],
    "image": [*NOT_A_STRING, "", "abc", "https://example.com/a.png"],
    "strength": [*NOT_A_NUMBER, -0.1, 1.1],
    "lora": [True, "Pixel_Art", ["Pixel_Art"], {"Pixel_Art": 1.0}, {"Pixel_Art": 3}, {"Pixel_Art": "1"}],
    "controlnet_name": [*NOT_A_STRING, "", "canny"],
    "controlnet_image": [*NOT_A_STRING, PICTURE],
    "control_preprocessor": ["", "depth", 1],
    "controlnet_conditioning_scale": [*NOT_A_NUMBER, -0.1, 2.1],
    "control_guidance_start": [*NOT_A_NUMBER, -0.1, 1.1],
    "control_guidance_end": [*NOT_A_NUMBER, -0.1, 1.1],
}
ACCEPTED: dict[str, list[Any]] = {
    "model_name": ["FLUX.1-dev", "SD1.5", "x"],
    "negative_prompt": ["", "blurry"],
    "steps": [1, 50],
    "cfg_scale": [1, 5, 20, 7.5],
    "seed": [0, 42, 2**63 - 1],
    "n": [1, 4],
    "sampler": ["euler"],
    "backend": ["auto", "tvm", "torch"],
    "prompt_2": ["", "in oil"],
    "negative_prompt_2": ["", "blurry"],
    "enable_refiner": [True, False],
    "strength": [0, 1, 0.7],
    "lora": [{}],
    "unknown": [1, "x", []],
}


def pairs(table: dict[str, list[Any]]) -> list[Any]:
    return [
        pytest.param(field, value, id=f"{field}-{number}-{ascii(value)[:20]}")
        for field, values in table.items()
        for number, value in enumerate(values)
    ]


@pytest.mark.parametrize(("field", "value"), pairs(REFUSED))
def test_a_bad_value_is_refused_by_the_name_of_its_field(
    client: httpx.Client, field: str, value: Any
) -> None:
    response = client.post(PATH, content=as_json({**BODY, field: value}), headers=JSON)
    assert_error(response, 400, param=field)
    validate(response.json(), SCHEMAS["ErrorResponse"])


@pytest.mark.parametrize(("field", "value"), pairs(ACCEPTED))
def test_a_good_value_is_drawn(client: httpx.Client, field: str, value: Any) -> None:
    answer = draw(client, **{field: value})
    assert len(answer["images"]) == (value if field == "n" else 1)
    validate(answer, SCHEMAS["ImageGenerationResponse"])


@pytest.mark.parametrize("field", [field for field in REFUSED if field not in ("model_name", "prompt")])
def test_null_counts_as_not_given(client: httpx.Client, field: str) -> None:
    draw(client, **{"steps": 1, field: None} if field != "steps" else {})


@pytest.mark.parametrize("field", ["model_name", "prompt"])
def test_required_fields_are_named(client: httpx.Client, field: str) -> None:
    response = client.post(PATH, json={name: value for name, value in BODY.items() if name != field})
    assert_error(response, 400, param=field, code="missing_required_parameter")


def test_the_answer_has_pictures_seeds_and_the_time(client: httpx.Client) -> None:
    started = time.perf_counter()
    answer = draw(client, n=3, seed=8, width=64, height=72, steps=4)
    wall_s = time.perf_counter() - started
    assert set(answer) == {"images", "inference_time"}
    assert 0 < answer["inference_time"] <= wall_s
    assert [set(image) for image in answer["images"]] == [{"image", "seed"}] * 3
    assert [image["seed"] for image in answer["images"]] == [8, 9, 10]
    for image in answer["images"]:
        picture = Image.open(BytesIO(base64.b64decode(image["image"], validate=True)))
        assert (picture.format, picture.size) == ("PNG", (64, 72))


def test_each_seed_draws_its_picture_alone(client: httpx.Client) -> None:
    answer = draw(client, n=2)
    second = answer["images"][1]
    assert draw(client, seed=second["seed"])["images"][0]["image"] == second["image"]


def test_the_same_settings_give_the_same_file_in_both_dialects(client: httpx.Client) -> None:
    ours = draw(
        client, seed=5, steps=3, cfg_scale=4, width=64, height=128, negative_prompt="blue", sampler="heun"
    )
    theirs = draw_bytes(
        client,
        seed=5,
        num_inference_steps=3,
        guidance_scale=4,
        size="64x128",
        negative_prompt="blue",
        sampler="heun",
    )
    assert [base64.b64decode(image["image"]) for image in ours["images"]] == theirs


def test_errors_have_the_status_codes_of_the_document(client: httpx.Client, keyed_server: LiveServer) -> None:
    for body in (b"[]", b"{", b"", b'{"model_name": NaN}'):
        assert_error(client.post(PATH, content=body, headers=JSON), 400, code="invalid_json")
    with httpx.Client(base_url=keyed_server.url) as stranger:
        response = stranger.post(PATH, json=BODY)
    assert_error(response, 401)
    validate(response.json(), SCHEMAS["ErrorResponse"])
    with client_of(keyed_server) as friend:
        draw(friend)


def test_absent_values_are_the_documents_unless_the_model_was_made_for_others() -> None:
    bare = {"model_name": "x", "prompt": "a"}
    usual = hyperbolic.to_request(bare, ABLE, SETTINGS, "id").generation
    assert (usual.num_inference_steps, usual.guidance_scale) == (30, 7.5)
    assert (usual.width, usual.height, usual.n, usual.seed_given) == (1024, 1024, 1, False)
    turbo = ModelDefaults(num_inference_steps=4, guidance_scale=1.0, width=512, height=512)
    fields = {name: getattr(ABLE, name) for name in ABLE.__slots__}
    quick = hyperbolic.to_request(
        bare, ModelDescription(**{**fields, "defaults": turbo}), SETTINGS, "id"
    ).generation
    assert (quick.num_inference_steps, quick.guidance_scale, quick.width) == (4, 1.0, 512)


@pytest.mark.parametrize(
    "size",
    [
        "1024x1024",
        "1152x896",
        "1216x832",
        "1344x768",
        "1536x640",
        "1664x2432",
        "2048x2048",
        "2432x1664",
        "640x1536",
        "768x1344",
        "832x1216",
    ],
)
def test_every_resolution_of_the_document_is_taken(size: str) -> None:
    width, height = map(int, size.split("x"))
    request = request_of(width=width, height=height, n=4, steps=100)
    assert (request.width, request.height) == (width, height)


def test_other_sizes_beyond_2048_are_refused() -> None:
    for width, height in ((2432, 1024), (2432, 2432), (2432, 1656), (1664, 2424)):
        assert refusal(width=width, height=height).param in ("width", "height")
    small = ServerSettings.model_validate({"max_side": 512})
    for width, height in ((1664, 2432), (520, 64)):
        with pytest.raises(InvalidRequestError):
            hyperbolic.to_request({**BODY, "width": width, "height": height}, ABLE, small, "id")


@pytest.mark.parametrize(
    ("width", "steps", "told"),
    [(1024, 25, "0.01"), (1024, 50, "0.02"), (2048, 25, "0.04"), (2048, 50, "0.08"), (512, 25, "0.0025")],
)
def test_the_price_is_that_of_the_documents_table(width: int, steps: int, told: str) -> None:
    assert price(request_of(width=width, height=width, steps=steps), 0.01) == told
    rated = ServerSettings.model_validate({"price_rate": 0.01})
    body = {**BODY, "width": width, "height": width, "steps": steps}
    assert hyperbolic.to_request(body, ABLE, rated, "id").headers == {"x-hypergen-price": told}


def test_pictures_are_priced_each() -> None:
    assert price(request_of(width=1024, height=1024, steps=25, n=4), 0.01) == "0.04"


def test_the_price_stands_in_a_header_where_a_rate_is_set(tight: TightServer) -> None:
    response = tight.client.post(PATH, json={**BODY, "width": 128, "height": 128, "steps": 5, "n": 2})
    assert response.status_code == 200
    assert response.headers["x-hypergen-price"] == "0.0000625"


def test_no_price_is_told_unless_a_rate_is_set(client: httpx.Client) -> None:
    assert "x-hypergen-price" not in client.post(PATH, json=BODY).headers


def test_a_picture_is_read_and_fitted() -> None:
    for text in (PICTURE, as_data_url(as_file(gradient(), "JPEG"), "image/jpeg")):
        request = request_of(image=text, width=192, height=128, strength=0.25)
        assert request.image is not None
        assert (request.image.width, request.image.height, request.strength) == (192, 128, 0.25)
        assert len(request.image.pixels) == 192 * 128 * 3
    assert request_of(image=PICTURE).strength == 0.7


@pytest.mark.parametrize("data", [*BROKEN.values()], ids=[*BROKEN])
def test_a_picture_that_cannot_be_read_is_refused(data: bytes) -> None:
    assert refusal(image=as_base64(data)).param == "image"


@pytest.mark.parametrize("text", ["https://example.com/a.png", "file:///etc/passwd", "not base64!", "abc"])
def test_a_picture_that_is_no_base64_is_refused_and_not_fetched(text: str) -> None:
    assert refusal(image=text).param == "image"


@pytest.mark.parametrize("model_name", ["FLUX.1-dev", "FLUX.1-schnell", "flux"])
def test_flux_draws_from_no_picture(client: httpx.Client, model_name: str) -> None:
    assert refusal(model_name=model_name, image=PICTURE).param == "image"
    response = client.post(PATH, json={**BODY, "model_name": model_name, "image": PICTURE})
    assert "FLUX" in assert_error(response, 400, param="image")


def test_loras_are_taken_by_name_with_their_weights() -> None:
    loras = {"Pixel_Art": 0.5, "Logo": 0.5, "Paint_Splash": 0.9}
    assert request_of(lora=loras).loras == tuple(loras.items())
    assert request_of(lora={}).loras == ()
    assert "Sci-fi" in (error := refusal(lora={"Logo": 1, "Sci-fi": 1})).message
    assert error.param == "lora"
    for weight in (-0.1, 2.1, "1", True, None, float("nan")):
        assert refusal(lora={"Logo": weight}).param == "lora"


def test_what_only_some_models_have_reaches_those() -> None:
    request = request_of(prompt_2="in oil", negative_prompt_2="blurry", enable_refiner=True)
    assert (request.prompt_2, request.negative_prompt_2, request.enable_refiner) == ("in oil", "blurry", True)


def test_what_only_some_models_have_changes_nothing_on_the_others(client: httpx.Client) -> None:
    fields = {"prompt_2": "in oil", "negative_prompt_2": "blurry", "enable_refiner": True}
    assert draw(client, seed=4, **fields)["images"] == draw(client, seed=4)["images"]


def test_a_control_picture_is_read_with_its_options() -> None:
    request = request_of(
        controlnet_name="depth",
        controlnet_image=PICTURE,
        control_preprocessor="canny",
        controlnet_conditioning_scale=0.5,
        control_guidance_start=0.1,
        control_guidance_end=0.9,
        width=64,
        height=64,
    )
    control = request.control
    assert control is not None
    assert (control.model, control.preprocessor) == ("depth", "canny")
    assert (control.scale, control.start, control.end) == (0.5, 0.1, 0.9)
    assert (control.image.width, control.image.height) == (64, 64)


def test_contradictory_control_fields_are_refused() -> None:
    assert refusal(controlnet_name="depth").param == "controlnet_image"
    assert refusal(controlnet_image=PICTURE).param == "controlnet_name"
    assert "canny, depth" in refusal(controlnet_name="x", controlnet_image=PICTURE).message
    assert refusal(controlnet_name="canny", controlnet_image="x").param == "controlnet_image"
    fields = {"controlnet_name": "canny", "controlnet_image": PICTURE}
    assert refusal(**fields, control_guidance_start=0.5, control_guidance_end=0.5).param == (
        "control_guidance_start"
    )


def test_what_the_model_lacks_is_refused(client: httpx.Client) -> None:
    assert_error(client.post(PATH, json={**BODY, "lora": {"Pixel_Art": 1}}), 400, param="lora")
    response = client.post(PATH, json={**BODY, "controlnet_image": PICTURE})
    message = assert_error(response, 400, param="controlnet_image", code="unsupported_parameter")
    assert "SDXL" in message  # a family that has it
