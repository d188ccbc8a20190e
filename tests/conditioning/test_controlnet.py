"""ControlNet against diffusers' pipelines, alone and in a batch, and loading of ControlNets."""

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
from safetensors.torch import load_file, save_file

from hypergen.engine.scheduler import batch_key
from hypergen.errors import InvalidRequestError, SettingError
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


def random_controlnet(parts: dict[str, Any], seed: int) -> Any:
    """A ControlNet for the UNet, with random output layers instead of zeros."""
    torch.manual_seed(seed)
    network: Any = ControlNetModel.from_unet(parts["unet"])
    outputs = [
        *network.controlnet_down_blocks,
        network.controlnet_mid_block,
        network.controlnet_cond_embedding.conv_out,
    ]
    with torch.no_grad():
        for layer in outputs:
            layer.weight.normal_(std=0.2)
    return network.eval()


@pytest.fixture(scope="module")
def controlnets(parts: dict[str, Any]) -> dict[str, Any]:
    return {"edges": random_controlnet(parts, 1), "depth": random_controlnet(parts, 2)}


@pytest.fixture(scope="module")
def sources(controlnets: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("control")
    for name, network in controlnets.items():
        network.save_pretrained(folder / name)
    return {name: str(folder / name) for name in controlnets}


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
    pipeline_class: Any,
    parts: dict[str, Any],
    controlnets: dict[str, Any],
    request: GenerationRequest,
    **images: Any,
) -> np.ndarray:
    control = request.control
    assert control is not None
    return generate_with_diffusers(
        pipeline_class(**parts, controlnet=controlnets[control.model]),
        request,
        controlnet_conditioning_scale=control.scale,
        control_guidance_start=control.start,
        control_guidance_end=control.end,
        **images,
    )


def test_every_image_equals_that_of_diffusers(
    parts: dict[str, Any], controlnets: dict[str, Any], controlled: Any
) -> None:
    requests = [
        _request(guidance_scale=5.0, negative_prompt="blurred"),
        _request(scale=0.4, sampler="heun"),
        _request(scale=2.0, start=0.25, end=0.75, sampler="euler_a", seed=8),
        _request("depth", end=0.5, guidance_scale=3.0, sampler="dpmpp_2m"),
    ]
    batched = InlineEngine(controlled)
    batched.run(*requests)
    for request in requests:
        assert request.control is not None
        image = to_pillow(request.control.image)
        expected = _expected(StableDiffusionControlNetPipeline, parts, controlnets, request, image=image)
        assert_same(generate_alone(controlled, request), expected)
        assert_same(pixels_of(batched.data(request)), expected)


def test_controlnet_combines_with_an_input_image_and_a_mask(
    parts: dict[str, Any], controlnets: dict[str, Any], controlled: Any
) -> None:
    """The window is then a share of the steps that run."""
    request = _request(image=sample_image(), strength=0.8, num_inference_steps=5, start=0.3, end=0.8)
    assert request.control is not None
    control_image = to_pillow(request.control.image)
    given = {"image": to_pillow(sample_image()), "control_image": control_image, "strength": request.strength}
    pipeline_class: Any = StableDiffusionControlNetImg2ImgPipeline
    assert_same(
        generate_alone(controlled, request), _expected(pipeline_class, parts, controlnets, request, **given)
    )

    masked = _request(
        image=sample_image(), mask=left_half_mask(), strength=0.8, num_inference_steps=5, end=0.8
    )
    pipeline_class = StableDiffusionControlNetInpaintPipeline
    expected = _expected(
        pipeline_class, parts, controlnets, masked, **given, mask_image=to_pillow(left_half_mask())
    )
    assert_same(generate_alone(controlled, masked), expected)


def test_rows_of_one_controlnet_share_a_batch_at_any_scale_and_window(controlled: Any) -> None:
    requests = [_request(guidance_scale=4.0), _request(scale=0.3, start=0.5), _request(end=0.5, seed=9)]
    other, plain = _request("depth"), make_request(guidance_scale=1.0)
    keys = [batch_key(prepare_image(controlled, request)) for request in (*requests, other, plain)]
    assert len(set(keys[:3])) == 1
    assert len(set(keys)) == 3

    alone = {request.id: InlineEngine(controlled) for request in requests}
    for request in requests:
        alone[request.id].run(request)
    batched = InlineEngine(controlled)
    batched.probe_shapes(requests[0], plain)
    rows, stop_recording = record_rows(controlled)
    batched.run(*requests, plain)
    stop_recording()
    assert max(rows) == 4  # three images, one of them with guidance
    for request in requests:
        assert batched.data(request) == alone[request.id].data(request)


def test_the_image_changes_with_the_scale_and_only_inside_the_window(controlled: Any) -> None:
    plain = generate_alone(controlled, make_request(guidance_scale=1.0))
    none, weak, strong = (generate_alone(controlled, _request(scale=scale)) for scale in (0.0, 0.5, 2.0))
    changes = [np.abs(image.astype(int) - plain).mean() for image in (none, weak, strong)]
    assert changes[0] == 0
    assert changes[0] < changes[1] < changes[2]
    # A window between two steps contains none.
    assert (generate_alone(controlled, _request(start=0.3, end=0.45)) == plain).all()


def test_the_probe_covers_the_controlnet(controlled: Any) -> None:
    """Its layers are replaced like the denoiser's, on rows with different control images and scales."""
    engine = InlineEngine(controlled)
    seen: list[tuple[torch.Tensor, ...]] = []
    network = controlled.controlnets["edges"]
    hook = network.register_forward_hook(
        lambda _module, _inputs, named, _output: seen.append(
            (named["controlnet_cond"], named["conditioning_scale"])
        ),
        with_kwargs=True,
    )
    engine.probe_shapes(_request())
    hook.remove()
    images, scales = max(seen, key=lambda inputs: len(inputs[0]))
    assert len(images) == 2 * engine.engine.settings.max_batch_size
    assert len({tuple(image.flatten().tolist()) for image in images}) == len(images)
    assert len(set(scales.flatten().tolist())) == len(images)
    assert engine.engine.status().determinism == {"64x64": "exact"}
    assert any("forward" in vars(layer) for layer in network.modules() if isinstance(layer, torch.nn.Linear))


def test_model_info_lists_controlnets_only_if_there_are_some(controlled: Any, family: Any) -> None:
    with_controlnets = controlled.model_info("m")
    assert with_controlnets.controlnets == ("edges", "depth")
    assert {"image", "mask", "control"} <= with_controlnets.capabilities
    without = family.model_info("m")
    assert without.controlnets == ()
    assert {"image", "mask"} <= without.capabilities
    assert "control" not in without.capabilities


def test_an_unknown_controlnet_is_an_error(controlled: Any) -> None:
    request = _request("pose")
    engine = InlineEngine(controlled)
    engine.run(request)
    error = engine.errors[request.id]
    assert isinstance(error, InvalidRequestError)
    assert error.param == "control_model"
    assert "edges, depth" in error.message


def test_a_controlnet_for_another_unet_is_an_error(
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
    with pytest.raises(SettingError, match="'wide': It is for another model: its cross_attention_dim is 64"):
        loading.load(sd_folder, make_settings(controlnet={"wide": str(tmp_path / "other")}))


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_every_tensor_of_a_controlnet_is_accounted_for(
    sd_folder: Path, parts: dict[str, Any], tmp_path: Path, change: str
) -> None:
    folder = tmp_path / "edges"
    random_controlnet(parts, 1).save_pretrained(folder)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    bias = tensors.pop("conv_in.bias")
    if change == "unexpected":
        tensors |= {"conv_in.bias": bias, "surplus": bias.clone()}
    save_file(tensors, file, {"format": "pt"})
    name = "conv_in.bias" if change == "missing" else "surplus"
    with pytest.raises(SettingError, match=f"controlnet 'edges': {change} tensor '{name}'"):
        loading.load(sd_folder, make_settings(controlnet={"edges": str(folder)}))


def test_the_error_for_a_folder_without_a_controlnet_is_one_line_without_its_path(
    sd_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SettingError, match=r"^controlnet 'edges': ") as raised:
        loading.load(sd_folder, make_settings(controlnet={"edges": str(tmp_path)}))
    assert str(tmp_path) not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_canny_preprocessor_finds_edges(controlled: Any) -> None:
    image = prepare_image(controlled, _request(preprocessor="canny")).positive.controlnet_cond
    assert image is not None
    assert set(image.flatten().tolist()) == {0.0, 1.0}
    assert (image[:, 0] == image[:, 2]).all()
    # The rectangle in the test image ends at a third of the width.
    assert image[0, 0, 18:30, 19:23].any(dim=1).float().mean() > 0.8
    assert (
        generate_alone(controlled, _request(preprocessor="canny")) != generate_alone(controlled, _request())
    ).any()


def test_half_precision_is_within_one_of_255_of_diffusers(sd_folder: Path, sources: dict[str, str]) -> None:
    dtype = torch.bfloat16
    network: Any = ControlNetModel.from_pretrained(sources["edges"], torch_dtype=dtype)
    stock: Any = StableDiffusionControlNetInpaintPipeline.from_pretrained(
        sd_folder, controlnet=network, dtype=dtype, safety_checker=None
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
