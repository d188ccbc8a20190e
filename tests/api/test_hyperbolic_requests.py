"""What Hyperbolic's fields become, for a model that has everything."""

from __future__ import annotations

from typing import Any

import pytest

from hypergen.api.dialects import hyperbolic, openai_images
from hypergen.api.dialects.hyperbolic import price
from hypergen.config import ServerSettings
from hypergen.errors import InvalidRequestError
from hypergen.metrics import Price
from hypergen.model_info import ModelDefaults, ModelInfo
from hypergen.request import GenerationRequest
from tests.api.test_hyperbolic import BODY, PICTURE
from tests.support.full_capability_model import FULL_MODEL_INFO, SETTINGS
from tests.support.image_files import BROKEN, as_base64, as_data_url, as_file, gradient


def request_of(**fields: Any) -> GenerationRequest:
    return hyperbolic.to_request({**BODY, **fields}, FULL_MODEL_INFO, SETTINGS, "id").generation


def refusal(**fields: Any) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as raised:
        request_of(**fields)
    assert str(raised.value.param) in raised.value.message
    return raised.value


def test_absent_values_are_the_documents_unless_the_model_was_made_for_others() -> None:
    bare = {"model_name": "x", "prompt": "a"}
    usual = hyperbolic.to_request(bare, FULL_MODEL_INFO, SETTINGS, "id").generation
    assert (usual.num_inference_steps, usual.guidance_scale) == (30, 7.5)
    assert (usual.width, usual.height, usual.n, usual.seed_given) == (1024, 1024, 1, False)
    turbo = ModelDefaults(num_inference_steps=4, guidance_scale=1.0, width=512, height=512)
    fields = {name: getattr(FULL_MODEL_INFO, name) for name in FULL_MODEL_INFO.__slots__}
    quick = hyperbolic.to_request(bare, ModelInfo(**{**fields, "defaults": turbo}), SETTINGS, "id").generation
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
            hyperbolic.to_request({**BODY, "width": width, "height": height}, FULL_MODEL_INFO, small, "id")


@pytest.mark.parametrize(
    ("width", "steps", "told"),
    [(1024, 25, "0.01"), (1024, 50, "0.02"), (2048, 25, "0.04"), (2048, 50, "0.08"), (512, 25, "0.0025")],
)
def test_the_price_is_that_of_the_documents_table(width: int, steps: int, told: str) -> None:
    assert price(request_of(width=width, height=width, steps=steps), 0.01) == pytest.approx(float(told))
    rated = ServerSettings.model_validate({"price_rate": 0.01})
    body = {**BODY, "width": width, "height": width, "steps": steps}
    asked = hyperbolic.to_request(body, FULL_MODEL_INFO, rated, "id")
    assert asked.headers == {"x-hypergen-price": told}
    assert asked.price == Price(FULL_MODEL_INFO.id, price(asked.generation, 0.01))


def test_pictures_are_priced_each() -> None:
    assert price(request_of(width=1024, height=1024, steps=25, n=4), 0.01) == pytest.approx(0.04)


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


def test_loras_are_taken_by_name_with_their_weights() -> None:
    loras = {"Pixel_Art": 0.5, "Logo": 0.5, "Paint_Splash": 0.9}
    assert request_of(lora=loras).loras == tuple(sorted(loras.items()))
    assert request_of(lora={}).loras == ()
    assert "Sci-fi" in (error := refusal(lora={"Logo": 1, "Sci-fi": 1})).message
    assert error.param == "lora"
    for weight in (-0.1, 2.1, "1", True, None, float("nan")):
        assert refusal(lora={"Logo": weight}).param == "lora"


def test_what_only_some_models_have_reaches_those() -> None:
    request = request_of(prompt_2="in oil", negative_prompt_2="blurry", enable_refiner=True)
    assert (request.prompt_2, request.negative_prompt_2, request.enable_refiner) == ("in oil", "blurry", True)


def test_a_true_cfg_scale_is_for_the_models_that_have_one() -> None:
    fields = {name: getattr(FULL_MODEL_INFO, name) for name in FULL_MODEL_INFO.__slots__}
    flux = ModelInfo(
        **{**fields, "family": "flux", "capabilities": FULL_MODEL_INFO.capabilities | {"true_cfg_scale"}}
    )
    for dialect, body in ((hyperbolic, BODY), (openai_images, {"prompt": "a cat"})):
        for scale in (1, 2.5, 20):
            request = dialect.to_request({**body, "true_cfg_scale": scale}, flux, SETTINGS, "id").generation
            assert request.true_cfg_scale == scale
        assert dialect.to_request(body, flux, SETTINGS, "id").generation.true_cfg_scale is None
        with pytest.raises(InvalidRequestError, match="not supported by the served model") as raised:
            dialect.to_request({**body, "true_cfg_scale": 4.0}, FULL_MODEL_INFO, SETTINGS, "id")
        assert raised.value.param == "true_cfg_scale"
        assert raised.value.code == "unsupported_parameter"


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


def test_an_unknown_sampler_is_told_as_it_was_written() -> None:
    assert "'DPM++ 9M'" in refusal(sampler="DPM++ 9M").message


def test_control_options_as_nobody_gave_them_need_no_picture() -> None:
    assert request_of(control_preprocessor="none", controlnet_conditioning_scale=1.0).control is None


def test_contradictory_control_fields_are_refused() -> None:
    assert refusal(controlnet_name="depth").param == "controlnet_image"
    assert refusal(controlnet_image=PICTURE).param == "controlnet_name"
    for option in ({"control_preprocessor": "canny"}, {"control_guidance_end": 0.5}):
        error = refusal(**option)
        assert error.param == "controlnet_image"
        assert f"'{next(iter(option))}'" in error.message
    assert "canny, depth" in refusal(controlnet_name="x", controlnet_image=PICTURE).message
    assert refusal(controlnet_name="canny", controlnet_image="x").param == "controlnet_image"
    fields = {"controlnet_name": "canny", "controlnet_image": PICTURE}
    assert refusal(**fields, control_guidance_start=0.5, control_guidance_end=0.5).param == (
        "control_guidance_start"
    )


def test_flux_draws_from_no_picture_whatever_the_model_can() -> None:
    assert refusal(model_name="FLUX.1-dev", image=PICTURE).param == "image"


@pytest.mark.parametrize(
    ("found", "param"),
    [
        ("loras", "lora"),
        ("control_model", "controlnet_name"),
        ("num_inference_steps", "steps"),
        ("guidance_scale", "cfg_scale"),
        ("prompt", "prompt"),
    ],
)
def test_what_the_engine_finds_is_told_by_the_clients_name(found: str, param: str) -> None:
    asked = hyperbolic.to_request(BODY, FULL_MODEL_INFO, SETTINGS, "id")
    error = asked.with_client_field_names(InvalidRequestError("It is too much.", param=found))
    assert (error.param, error.message) == (param, f"'{param}': It is too much.")
    assert asked.with_client_field_names(InvalidRequestError("It is too much.")).message == "It is too much."
