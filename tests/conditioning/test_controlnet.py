"""Control models against diffusers' own pipelines, alone and in a crowd, and how they are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
)

from hypergen.engine.scheduler import batch_key
from hypergen.errors import InvalidRequestError, ModelError
from hypergen.models import loading
from hypergen.request import ControlInput, GenerationRequest
from tests.support.diffusers_edits import (
    assert_same,
    generate_with_diffusers,
    left_half_mask,
    pixels_of,
    record_rows,
    sample_image,
    to_pillow,
)
from tests.support.sync_engine import InlineEngine, generate_alone, make_request, make_settings, prepare_image


def random_control_model(parts: dict[str, Any], seed: int) -> Any:
    """Like the UNet, with outputs that are not zero as in one that was never trained."""
    torch.manual_seed(seed)
    model: Any = ControlNetModel.from_unet(parts["unet"])
    outputs = [
        *model.controlnet_down_blocks,
        model.controlnet_mid_block,
        model.controlnet_cond_embedding.conv_out,
    ]
    with torch.no_grad():
        for layer in outputs:
            layer.weight.normal_(std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def models(parts: dict[str, Any]) -> dict[str, Any]:
    return {"edges": random_control_model(parts, 1), "depth": random_control_model(parts, 2)}


@pytest.fixture(scope="module")
def sources(models: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("control")
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return {name: str(folder / name) for name in models}


@pytest.fixture(scope="module")
def controlled(sd_folder: Path, sources: dict[str, str]) -> Any:
    return loading.load(sd_folder, make_settings(controlnet=sources))


def _request(model: str = "edges", **changes: Any) -> GenerationRequest:
    names = ("scale", "start", "end", "preprocessor")
    options = {name: changes.pop(name) for name in names if name in changes}
    control = ControlInput(model=model, image=sample_image(seed=4), **options)
    given: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 1.0, **changes}
    return make_request(control=control, **given)


def _expected(
    kind: Any, parts: dict[str, Any], models: dict[str, Any], request: GenerationRequest, **pictures: Any
) -> np.ndarray:
    control = request.control
    assert control is not None
    return generate_with_diffusers(
        kind(**parts, controlnet=models[control.model]),
        request,
        controlnet_conditioning_scale=control.scale,
        control_guidance_start=control.start,
        control_guidance_end=control.end,
        **pictures,
    )


def test_every_picture_is_that_of_the_stock_pipeline(
    parts: dict[str, Any], models: dict[str, Any], controlled: Any
) -> None:
    requests = [
        _request(guidance_scale=5.0, negative_prompt="blurred"),
        _request(scale=0.4, sampler="heun"),
        _request(scale=2.0, start=0.25, end=0.75, sampler="euler_a", seed=8),
        _request("depth", end=0.5, guidance_scale=3.0, sampler="dpmpp_2m"),
    ]
    crowd = InlineEngine(controlled)
    crowd.run(*requests)
    for request in requests:
        assert request.control is not None
        image = to_pillow(request.control.image)
        expected = _expected(StableDiffusionControlNetPipeline, parts, models, request, image=image)
        assert_same(generate_alone(controlled, request), expected)
        assert_same(pixels_of(crowd.data(request)), expected)


def test_it_goes_together_with_a_picture_and_a_mask(
    parts: dict[str, Any], models: dict[str, Any], controlled: Any
) -> None:
    """The window is then one of the steps that are left."""
    request = _request(image=sample_image(), strength=0.8, num_inference_steps=5, start=0.3, end=0.8)
    assert request.control is not None
    control_image = to_pillow(request.control.image)
    given = {"image": to_pillow(sample_image()), "control_image": control_image, "strength": request.strength}
    kind: Any = StableDiffusionControlNetImg2ImgPipeline
    assert_same(generate_alone(controlled, request), _expected(kind, parts, models, request, **given))

    masked = _request(
        image=sample_image(), mask=left_half_mask(), strength=0.8, num_inference_steps=5, end=0.8
    )
    kind = StableDiffusionControlNetInpaintPipeline
    expected = _expected(kind, parts, models, masked, **given, mask_image=to_pillow(left_half_mask()))
    assert_same(generate_alone(controlled, masked), expected)


def test_rows_of_one_control_model_share_a_pass_whatever_their_scales_and_windows(controlled: Any) -> None:
    requests = [_request(guidance_scale=4.0), _request(scale=0.3, start=0.5), _request(end=0.5, seed=9)]
    other, plain = _request("depth"), make_request(guidance_scale=1.0)
    keys = [batch_key(prepare_image(controlled, request)) for request in (*requests, other, plain)]
    assert len(set(keys[:3])) == 1
    assert len(set(keys)) == 3

    alone = {request.id: InlineEngine(controlled) for request in requests}
    for request in requests:
        alone[request.id].run(request)
    crowd = InlineEngine(controlled)
    crowd.probe_shapes(requests[0], plain)
    rows, stop_recording = record_rows(controlled)
    crowd.run(*requests, plain)
    stop_recording()
    assert max(rows) == 4  # of three images, one of them guided
    for request in requests:
        assert crowd.data(request) == alone[request.id].data(request)


def test_scale_and_window_count_and_outside_of_them_nothing_changes(controlled: Any) -> None:
    plain = generate_alone(controlled, make_request(guidance_scale=1.0))
    none, weak, strong = (generate_alone(controlled, _request(scale=scale)) for scale in (0.0, 0.5, 2.0))
    changes = [np.abs(drawn.astype(int) - plain).mean() for drawn in (none, weak, strong)]
    assert changes[0] == 0
    assert changes[0] < changes[1] < changes[2]
    # A window between two steps holds none of them.
    assert (generate_alone(controlled, _request(start=0.3, end=0.45)) == plain).all()


def test_the_probe_covers_the_control_model(controlled: Any) -> None:
    """Its layers are replaced like the denoiser's, on rows that differ in pictures and scales."""
    engine = InlineEngine(controlled)
    seen: list[tuple[torch.Tensor, ...]] = []
    model = controlled.control_models["edges"]
    hook = model.register_forward_hook(
        lambda _module, _inputs, named, _output: seen.append(
            (named["controlnet_cond"], named["conditioning_scale"])
        ),
        with_kwargs=True,
    )
    engine.probe_shapes(_request())
    hook.remove()
    pictures, scales = max(seen, key=lambda inputs: len(inputs[0]))
    assert len(pictures) == 2 * engine.engine.settings.max_batch_size
    assert len({tuple(one.flatten().tolist()) for one in pictures}) == len(pictures)
    assert len(set(scales.flatten().tolist())) == len(pictures)
    assert engine.engine.status().determinism == {"64x64": "exact"}
    assert any("forward" in vars(layer) for layer in model.modules() if isinstance(layer, torch.nn.Linear))


def test_the_description_names_control_models_only_where_there_are_some(controlled: Any, family: Any) -> None:
    described = controlled.model_info("m")
    assert described.control_models == ("edges", "depth")
    assert {"image", "mask", "control"} <= described.capabilities
    without = family.model_info("m")
    assert without.control_models == ()
    assert {"image", "mask"} <= without.capabilities
    assert "control" not in without.capabilities


def test_an_unknown_control_model_is_refused(controlled: Any) -> None:
    request = _request("pose")
    engine = InlineEngine(controlled)
    engine.run(request)
    error = engine.errors[request.id]
    assert isinstance(error, InvalidRequestError)
    assert error.param == "control_model"
    assert "edges, depth" in error.message


def test_a_control_model_for_another_kind_of_model_is_refused(
    sd_folder: Path, parts: dict[str, Any], tmp_path: Path
) -> None:
    config = {**parts["unet"].config, "cross_attention_dim": 64}
    names = (
        "block_out_channels",
        "layers_per_block",
        "down_block_types",
        "norm_num_groups",
        "cross_attention_dim",
    )
    ControlNetModel(**{name: config[name] for name in names}).save_pretrained(tmp_path / "other")
    with pytest.raises(
        ModelError, match="'wide' is for another kind of model: its cross_attention_dim is 64"
    ):
        loading.load(sd_folder, make_settings(controlnet={"wide": str(tmp_path / "other")}))


def test_a_folder_that_is_no_control_model_is_one_line_without_its_path(
    sd_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"^Control model 'edges': ") as raised:
        loading.load(sd_folder, make_settings(controlnet={"edges": str(tmp_path)}))
    assert str(tmp_path) not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_canny_draws_edges_before_the_control_model_reads_them(controlled: Any) -> None:
    image = prepare_image(controlled, _request(preprocessor="canny")).positive.controlnet_cond
    assert image is not None
    assert set(image.flatten().tolist()) == {0.0, 1.0}
    assert (image[:, 0] == image[:, 2]).all()
    # The rectangle of the picture ends at a third of the width.
    assert image[0, 0, 18:30, 19:23].any(dim=1).float().mean() > 0.8
    assert (
        generate_alone(controlled, _request(preprocessor="canny")) != generate_alone(controlled, _request())
    ).any()


def test_in_half_precision_it_is_the_stock_picture_within_one_of_255(
    sd_folder: Path, sources: dict[str, str]
) -> None:
    dtype = torch.bfloat16
    model: Any = ControlNetModel.from_pretrained(sources["edges"], torch_dtype=dtype)
    stock: Any = StableDiffusionControlNetInpaintPipeline.from_pretrained(
        sd_folder, controlnet=model, dtype=dtype, safety_checker=None
    )
    family: Any = loading.load(sd_folder, make_settings(controlnet=sources, dtype="bfloat16"))
    request = _request(
        image=sample_image(), mask=left_half_mask(), strength=0.8, scale=0.7, sampler="euler_a"
    )
    assert request.control is not None
    expected = generate_with_diffusers(
        stock,
        request,
        image=to_pillow(sample_image()),
        mask_image=to_pillow(left_half_mask()),
        control_image=to_pillow(request.control.image),
        controlnet_conditioning_scale=0.7,
        strength=0.8,
    )
    assert np.abs(generate_alone(family, request).astype(int) - expected).mean() <= 1
