"""The stage that straightens contours, on the shipped model."""

import copy
import random
from pathlib import Path

import pytest
import torch

from scripts.train_embedded_model.continuing import unpack_model
from scripts.train_embedded_model.contours import GATES
from scripts.train_embedded_model.pipeline import GUIDANCE_SCALE, load_text_encoder, load_vae
from scripts.train_embedded_model.replay import Replay
from scripts.train_embedded_model.straighten import (
    SHOWN,
    Share,
    any_scene,
    brightness,
    contour_scene,
    measured_scene,
)
from scripts.train_embedded_model.unet import load_unet

EMBEDDED = Path(__file__).parents[2] / "hypergen" / "embedded"


@pytest.fixture(scope="module")
def share(tmp_path_factory: pytest.TempPathFactory) -> Share:
    folder = tmp_path_factory.mktemp("straightening") / "parts"
    unpack_model(EMBEDDED, folder)
    tokenizer, text_encoder = load_text_encoder(folder / "text")
    replay = Replay(load_vae(folder / "vae"), tokenizer, text_encoder, 0, "cpu")
    before = load_unet(folder / "unet")
    return Share(copy.deepcopy(before).requires_grad_(True), before, replay)


def test_an_unchanged_unet_is_kept(share: Share) -> None:
    assert share.kept_loss(4, 8, 8).item() == pytest.approx(0, abs=1e-9)


def test_the_unet_is_kept_on_what_it_sampled_from_noise(share: Share) -> None:
    sampled = share.sample(share.replay.batch(2, 8, 8))
    timesteps = {int(each.timestep) for each in sampled}
    assert {999, 749, 499, 249} < timesteps  # all of a short sampling
    assert {timestep for timestep in timesteps if timestep < SHOWN} == {499, 249}
    assert len(sampled) == 2 * (4 + 4 + 8)  # two short samplings, and of twenty steps those from SHOWN on
    assert all(each.noisy_latents.shape == (4, 8, 8) for each in sampled)


def test_a_half_of_the_scenes_has_measured_shapes() -> None:
    rng = random.Random(0)
    scenes = [any_scene(rng) for _ in range(400)]
    assert not any(scene.held_out for scene in scenes)
    measured = sum(
        len(scene.things) == 1 and scene.kinds[0].shape in GATES and scene.kinds[0].style == "solid"
        for scene in scenes
    )
    assert 0.5 <= measured / len(scenes) < 0.75


def test_the_trained_prediction_has_the_usual_guidance(share: Share) -> None:
    noisy_latents, prompt_embeds = torch.randn(2, 4, 8, 8), share.replay.embed(["a red circle"] * 2)
    with torch.no_grad():
        guided, cond = share.predict(share.before, noisy_latents, torch.tensor([100, 500]), prompt_embeds)
        uncond = share.before(
            noisy_latents, torch.tensor([100, 500]), share.no_prompt.expand(2, -1, -1)
        ).sample
    assert torch.allclose(guided, uncond + GUIDANCE_SCALE * (cond - uncond), atol=1e-4)


def test_the_loss_of_contours_has_gradients_where_the_unet_sampled(share: Share) -> None:
    loss = share.contour_loss()
    assert 0 < loss < 1
    loss.backward()
    assert all(parameter.grad is not None for parameter in share.unet.parameters())
    assert {int(sample.timestep) for sample in share.on_path} == {*range(49, SHOWN, 50)}
    assert {sample.scene.kinds[0].shape for sample in share.on_path} <= set(GATES)


def test_most_scenes_of_the_loss_of_contours_are_as_in_the_gates() -> None:
    rng = random.Random(0)
    scenes = [contour_scene(rng) for _ in range(400)]
    assert not any(scene.held_out for scene in scenes)
    rings = sum(scene.kinds[0].shape == "ring" for scene in scenes)
    assert 0.3 < rings / len(scenes) < 0.5
    assert sum(not scene.kinds[0].size and not scene.position for scene in scenes) > 0.8 * len(scenes)


def test_colours_of_nearly_one_brightness_are_more_frequent() -> None:
    rng = random.Random(0)
    assert (brightness("black"), brightness("white")) == pytest.approx((18, 245))
    shares = []
    for new_scene in (contour_scene, measured_scene):
        scenes = [new_scene(rng) for _ in range(400)]
        differences = [abs(brightness(s.kinds[0].colour) - brightness(s.background)) for s in scenes]
        shares.append(sum(difference < 40 for difference in differences) / len(scenes))
    assert shares[0] > 1.5 * shares[1]
