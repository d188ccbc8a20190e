"""The training's own parts, on what it is given to go on from: the shipped model."""

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scripts.train_embedded_model.assemble import assemble
from scripts.train_embedded_model.captions import plain_caption
from scripts.train_embedded_model.continuing import take_apart
from scripts.train_embedded_model.denoising import Share
from scripts.train_embedded_model.looks import LOOKS
from scripts.train_embedded_model.pipeline import load_text_encoder, load_vae
from scripts.train_embedded_model.replay import Replay
from scripts.train_embedded_model.scenes import OVERLAPPING, elsewhere, pair, single
from scripts.train_embedded_model.unet import load_unet

EMBEDDED = Path(__file__).parents[2] / "hypergen" / "embedded"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training") / "parts"
    take_apart(EMBEDDED, folder)
    return folder


def test_a_model_taken_apart_and_put_together_has_the_same_weights(parts: Path, tmp_path: Path) -> None:
    assemble(parts, tmp_path)
    for weights in tmp_path.glob("*/*.safetensors"):
        shipped, again = (
            load_file(folder / weights.relative_to(tmp_path)) for folder in (EMBEDDED, tmp_path)
        )
        assert shipped.keys() == again.keys()
        assert all(torch.equal(value, again[name]) for name, value in shipped.items())


def test_the_loras_go_on_from_what_they_are(parts: Path) -> None:
    for name in LOOKS:
        run = torch.load(parts / "loras" / name / "checkpoint.pt")
        shipped = load_file(EMBEDDED / "loras" / f"{name}.safetensors")
        assert run["run"]["step"] == 0
        assert all(torch.equal(value.half(), shipped[f"unet.{key}"]) for key, value in run["lora"].items())


def test_parts_that_are_there_are_not_lost(parts: Path) -> None:
    with pytest.raises(FileExistsError):
        take_apart(EMBEDDED, parts)


def test_an_object_elsewhere_has_the_same_caption() -> None:
    rng = random.Random(0)
    scenes = [scene for scene in (single(rng, OVERLAPPING) for _ in range(200)) if scene.stands_anywhere]
    others = [elsewhere(scene, rng, OVERLAPPING) for scene in scenes]
    assert [plain_caption(scene) for scene in scenes] == [plain_caption(other) for other in others]
    moved = sum(scene.things[0].x != other.things[0].x for scene, other in zip(scenes, others, strict=True))
    assert 0.5 < moved / len(scenes) < 0.8  # of two draws of left, middle and right as on a die, 0.64 differ
    assert not any(pair(rng).stands_anywhere for _ in range(20))


@pytest.mark.parametrize("blend", [0.0, 0.5])
def test_a_step_of_training_leads_on_from_the_finished_model(parts: Path, blend: float) -> None:
    tokenizer, text_encoder = load_text_encoder(parts / "text")
    replay = Replay(load_vae(parts / "vae"), tokenizer, text_encoder, 0, "cpu")
    replay.spread_by(OVERLAPPING, moves=blend > 0)
    unet = load_unet(parts / "unet").requires_grad_(True)
    sample = replay.batch(8, 16, 16)
    assert torch.equal(sample.latents, sample.elsewhere) == (blend == 0)
    losses = [Share(unet, replay).backward(8, 16, 16, blend).item() for _ in range(4)]
    assert sum(losses) / len(losses) < 0.5  # an untrained UNet has a loss of about 1
    assert all(parameter.grad is not None for parameter in unet.parameters())
