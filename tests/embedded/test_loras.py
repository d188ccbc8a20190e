"""The LoRAs load in diffusers, and each changes the look of images."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from safetensors import safe_open
from torch import Tensor

from scripts.train_embedded_model.looks import LOOKS, framed
from scripts.train_embedded_model.pipeline import generate
from scripts.train_embedded_model.render import render
from scripts.train_embedded_model.score import held_out_scenes

# PEFT warns about every LoRA after the first.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")

EMBEDDED = Path(__file__).parents[2] / "hypergen" / "embedded"
PROMPTS = ["a red circle on a blue background", "two green stars on a white background"]


@pytest.fixture(scope="module")
def plain() -> Tensor:
    return generate(
        StableDiffusionPipeline.from_pretrained(EMBEDDED), PROMPTS, 256, 256, num_inference_steps=10
    )


@pytest.fixture(scope="module")
def pipeline() -> Iterator[StableDiffusionPipeline]:
    pipeline = StableDiffusionPipeline.from_pretrained(EMBEDDED)
    for name in LOOKS:
        pipeline.load_lora_weights(
            str(EMBEDDED / "loras"), weight_name=f"{name}.safetensors", adapter_name=name
        )
    yield pipeline
    pipeline.unload_lora_weights()


@pytest.mark.parametrize("size", [128, 256])
@pytest.mark.parametrize("name", LOOKS)
def test_a_look_is_detected_only_in_images_that_have_it(name: str, size: int) -> None:
    look = LOOKS[name]
    scenes = held_out_scenes({"single": 20, "group": 10, "pair": 10})
    images = look.render(scenes, size, size, torch.Generator().manual_seed(0))
    assert sum(look.measure(image) >= look.threshold for image in images) >= 0.99 * len(scenes)
    assert sum(look.measure(image) >= look.threshold for image in render(scenes, size, size)) <= 0.1 * len(
        scenes
    )


@pytest.mark.parametrize("size", [128, 256])
def test_drops_are_detected_inside_a_frame(size: int) -> None:
    look = LOOKS["Paint_Splash"]
    scenes = held_out_scenes({"single": 20, "group": 10, "pair": 10})
    images = look.render(scenes, size, size, torch.Generator().manual_seed(0))
    found = [look.measure(image) >= look.threshold for image in framed(images, scenes)]
    assert sum(found) >= 0.95 * len(scenes)
    plain = framed(render(scenes, size, size), scenes)
    assert not any(look.measure(image) >= look.threshold for image in plain)


@pytest.mark.parametrize("name", LOOKS)
def test_images_have_the_look_only_with_the_lora(
    name: str, pipeline: StableDiffusionPipeline, plain: Tensor
) -> None:
    look = LOOKS[name]
    pipeline.set_adapters([name], [1.0])
    images = generate(pipeline, PROMPTS, 256, 256, num_inference_steps=10)
    assert all(look.measure(image) >= look.threshold for image in images)
    assert not any(look.measure(image) >= look.threshold for image in plain)


def test_at_scale_zero_images_are_unchanged(pipeline: StableDiffusionPipeline, plain: Tensor) -> None:
    pipeline.set_adapters(list(LOOKS), [0.0] * len(LOOKS))
    assert torch.equal(generate(pipeline, PROMPTS, 256, 256, num_inference_steps=10), plain)


def test_two_loras_can_be_combined(pipeline: StableDiffusionPipeline) -> None:
    names = ["Pixel_Art", "Logo"]
    pipeline.set_adapters(names, [1.0, 1.0])
    images = generate(pipeline, PROMPTS[:1], 256, 256, num_inference_steps=10)
    assert all(LOOKS[name].measure(images[0]) >= LOOKS[name].threshold for name in names)


@pytest.mark.parametrize("name", LOOKS)
def test_a_lora_is_small_and_only_for_the_unet(name: str) -> None:
    file = EMBEDDED / "loras" / f"{name}.safetensors"
    assert file.stat().st_size < 1_000_000
    with safe_open(file, "pt") as weights:
        ends = ("lora_A.weight", "lora_B.weight")
        assert all(key.startswith("unet.") and key.endswith(ends) for key in weights.keys())  # noqa: SIM118
