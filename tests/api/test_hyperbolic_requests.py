"""Hyperbolic's fields as a `GenerationRequest`, for a model with all capabilities."""

from __future__ import annotations

from typing import Any

import pytest

from hypergen.api.dialects import hyperbolic, openai_images
from hypergen.config import ServerSettings
from hypergen.errors import InvalidRequestError
from hypergen.model_info import ModelDefaults, ModelInfo
from hypergen.request import GenerationRequest
from tests.api.test_hyperbolic import BODY, INPUT_IMAGE
from tests.support.full_capability_model import FULL_MODEL_INFO, SETTINGS
from tests.support.image_files import BROKEN, as_base64, as_data_url, as_file, gradient


def request_of(**fields: Any) -> GenerationRequest:
    return hyperbolic.to_request({**BODY, **fields}, FULL_MODEL_INFO, SETTINGS, "id").generation


def rejection(**fields: Any) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as raised:
        request_of(**fields)
    assert str(raised.value.param) in raised.value.message
    return raised.value


def test_defaults_are_those_of_the_documents_or_of_the_model() -> None:
    bare = {"model_name": "x", "prompt": "a"}
    usual = hyperbolic.to_request(bare, FULL_MODEL_INFO, SETTINGS, "id").generation
    assert (usual.num_inference_steps, usual.guidance_scale) == (30, 7.5)
    assert (usual.width, usual.height, usual.n, usual.seed_given) == (1024, 1024, 1, False)
    assert not request_of(seed=-1).seed_given
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
def test_every_documented_resolution_is_accepted(size: str) -> None:
    width, height = map(int, size.split("x"))
    request = request_of(width=width, height=height, n=4, steps=100)
    assert (request.width, request.height) == (width, height)


def test_other_sizes_beyond_2048_are_rejected() -> None:
    for width, height in ((2432, 1024), (2432, 2432), (2432, 1656), (1664, 2424)):
        assert rejection(width=width, height=height).param in ("width", "height")
    small = ServerSettings.model_validate({"max_side": 512})
    for width, height in ((1664, 2432), (520, 64)):
        with pytest.raises(InvalidRequestError):
            hyperbolic.to_request({**BODY, "width": width, "height": height}, FULL_MODEL_INFO, small, "id")


@pytest.mark.parametrize(
    ("width", "steps", "expected"),
    [(1024, 25, "0.01"), (1024, 50, "0.02"), (2048, 25, "0.04"), (2048, 50, "0.08"), (512, 25, "0.0025")],
)
def test_the_price_equals_that_of_the_documented_table(width: int, steps: int, expected: str) -> None:
    assert request_of(width=width, height=width, steps=steps).price(0.01) == pytest.approx(float(expected))
    rated = ServerSettings.model_validate({"price_rate": 0.01})
    body = {**BODY, "width": width, "height": width, "steps": steps}
    validated = hyperbolic.to_request(body, FULL_MODEL_INFO, rated, "id")
    assert validated.headers == {"x-hypergen-price": expected}


def test_the_price_is_per_image() -> None:
    assert request_of(width=1024, height=1024, steps=25, n=4).price(0.01) == pytest.approx(0.04)


def test_an_input_image_is_decoded_and_resized() -> None:
    for text in (INPUT_IMAGE, as_data_url(as_file(gradient(), "JPEG"), "image/jpeg")):
        request = request_of(image=text, width=192, height=128, strength=0.25)
        assert request.image is not None
        assert (request.image.width, request.image.height, request.strength) == (192, 128, 0.25)
        assert len(request.image.pixels) == 192 * 128 * 3
    assert request_of(image=INPUT_IMAGE).strength == 0.7


@pytest.mark.parametrize("data", [*BROKEN.values()], ids=[*BROKEN])
def test_an_unreadable_image_is_rejected(data: bytes) -> None:
    assert rejection(image=as_base64(data)).param == "image"


@pytest.mark.parametrize("text", ["https://example.com/a.png", "file:///etc/passwd", "not base64!", "abc"])
def test_an_image_that_is_not_base64_is_rejected_and_not_fetched(text: str) -> None:
    assert rejection(image=text).param == "image"


def test_loras_are_given_by_name_with_weights() -> None:
    loras = {"Pixel_Art": 0.5, "Logo": 0.5, "Paint_Splash": 0.9}
    assert request_of(lora=loras).loras == tuple(sorted(loras.items()))
    assert request_of(lora={}).loras == ()
    assert "Sci-fi" in (error := rejection(lora={"Logo": 1, "Sci-fi": 1})).message
    assert error.param == "lora"
    for weight in (-0.1, 2.1, "1", True, None, float("nan")):
        assert rejection(lora={"Logo": weight}).param == "lora"


def test_optional_capabilities_reach_models_that_have_them() -> None:
    request = request_of(prompt_2="in oil", negative_prompt_2="blurry", enable_refiner=True)
    assert (request.prompt_2, request.negative_prompt_2, request.enable_refiner) == ("in oil", "blurry", True)


def test_true_cfg_scale_is_rejected_by_models_without_it() -> None:
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


def test_a_control_image_is_decoded_with_its_options() -> None:
    request = request_of(
        controlnet_name="depth",
        controlnet_image=INPUT_IMAGE,
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


def test_the_error_quotes_an_unknown_sampler() -> None:
    assert "'DPM++ 9M'" in rejection(sampler="DPM++ 9M").message


def test_control_options_with_default_values_need_no_control_image() -> None:
    assert request_of(control_preprocessor="none", controlnet_conditioning_scale=1.0).control is None


def test_invalid_combinations_of_control_fields_are_rejected() -> None:
    assert rejection(controlnet_name="depth").param == "controlnet_image"
    assert rejection(controlnet_image=INPUT_IMAGE).param == "controlnet_name"
    for option in ({"control_preprocessor": "canny"}, {"control_guidance_end": 0.5}):
        error = rejection(**option)
        assert error.param == "controlnet_image"
        assert f"'{next(iter(option))}'" in error.message
    assert "canny, depth" in rejection(controlnet_name="x", controlnet_image=INPUT_IMAGE).message
    assert rejection(controlnet_name="canny", controlnet_image="x").param == "controlnet_image"
    fields = {"controlnet_name": "canny", "controlnet_image": INPUT_IMAGE}
    assert rejection(**fields, control_guidance_start=0.5, control_guidance_end=0.5).param == (
        "control_guidance_start"
    )


def test_an_image_for_a_flux_model_name_is_rejected() -> None:
    assert rejection(model_name="FLUX.1-dev", image=INPUT_IMAGE).param == "image"


@pytest.mark.parametrize(
    ("engine_param", "param"),
    [
        ("loras", "lora"),
        ("control_model", "controlnet_name"),
        ("num_inference_steps", "steps"),
        ("guidance_scale", "cfg_scale"),
        ("prompt", "prompt"),
    ],
)
def test_errors_of_the_engine_use_the_dialects_field_names(engine_param: str, param: str) -> None:
    validated = hyperbolic.to_request(BODY, FULL_MODEL_INFO, SETTINGS, "id")
    error = validated.with_client_field_names(InvalidRequestError("It is too much.", param=engine_param))
    assert (error.param, error.message) == (param, f"'{param}': It is too much.")
    assert (
        validated.with_client_field_names(InvalidRequestError("It is too much.")).message == "It is too much."
    )
