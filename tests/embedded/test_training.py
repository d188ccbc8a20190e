"""The training's own parts, on what it is given to go on from: the shipped model."""

import random
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from scripts.train_embedded_model.assemble import assemble
from scripts.train_embedded_model.captions import plain_caption
from scripts.train_embedded_model.continuing import take_apart
from scripts.train_embedded_model.denoising import Share
from scripts.train_embedded_model.looks import LOOKS
from scripts.train_embedded_model.muon import AT_ONCE, muon_and_adamw, orthogonalise
from scripts.train_embedded_model.pipeline import load_text_encoder, load_vae
from scripts.train_embedded_model.replay import Replay
from scripts.train_embedded_model.scenes import OVERLAPPING, elsewhere, pair, single
from scripts.train_embedded_model.threads import step_together
from scripts.train_embedded_model.unet import load_unet
from scripts.train_embedded_model.vae import Share as VaeShare
from scripts.train_embedded_model.vae import new_vae

EMBEDDED = Path(__file__).parents[2] / "hypergen" / "embedded"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training") / "parts"
    take_apart(EMBEDDED, folder)
    return folder


@pytest.fixture
def workers() -> Iterator[Executor]:
    with ThreadPoolExecutor(2) as workers:
        yield workers


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


def test_threads_that_share_a_step_take_it_by_the_mean_of_their_gradients(workers: Executor) -> None:
    layer = nn.Linear(3, 1, bias=False)
    before, inputs = (
        layer.weight.detach().clone(),
        [torch.tensor([1.0, 0.0, 2.0]), torch.tensor([3.0, 4.0, 0.0])],
    )

    def share(x: Tensor) -> Tensor:
        loss = layer(x).sum()
        loss.backward()
        return loss.detach()

    tasks = [lambda x=x: share(x) for x in inputs]
    optimizers = [torch.optim.SGD(layer.parameters(), lr=1.0)]
    loss = step_together(workers, tasks, layer.parameters(), optimizers, max_norm=100.0)
    assert torch.allclose(before - layer.weight, torch.tensor([[2.0, 2.0, 1.0]]))
    assert torch.allclose(loss, (before @ torch.stack(inputs).T).mean())
    assert layer.weight.grad is None


def test_muon_steps_the_same_whoever_works(workers: Executor) -> None:
    def updated(workers: Executor | None) -> list[Tensor]:
        torch.manual_seed(0)
        layers = nn.ModuleList(nn.Linear(16, 24) for _ in range(2 * AT_ONCE + 3))
        optimizers = muon_and_adamw(layers, 1e-2, 1e-2, except_for=(), workers=workers)
        for _ in range(2):
            for param in layers.parameters():
                param.grad = torch.randn_like(param)
            for optimizer in optimizers:
                optimizer.step()
        return [param.detach() for param in layers.parameters()]

    pairs = zip(updated(None), updated(workers), strict=True)
    assert all(torch.equal(alone, together) for alone, together in pairs)


def test_muons_updates_have_singular_values_near_one() -> None:
    values = torch.linalg.svdvals(
        orthogonalise(torch.randn(4, 96, 384, generator=torch.Generator().manual_seed(0)))
    )
    assert 0.5 < values.min() < values.max() < 1.3


def test_two_threads_train_the_autoencoder_the_same_way_every_time(workers: Executor) -> None:
    def trained() -> tuple[list[float], nn.Module]:
        torch.manual_seed(0)
        vae = new_vae()
        optimizers = muon_and_adamw(
            vae, 7e-5, 2e-4, except_for=("conv_in", "conv_out", "quant"), workers=workers
        )
        shares = [VaeShare(vae, seed, crops=2) for seed in (0, 1)]
        tasks = [lambda share=share: share.backward(96) for share in shares]
        steps = [step_together(workers, tasks, vae.parameters(), optimizers, max_norm=1.0) for _ in range(3)]
        return [loss.item() for loss in steps], vae

    (losses, vae), (losses_again, vae_again) = trained(), trained()
    assert losses == losses_again
    pairs = zip(vae.parameters(), vae_again.parameters(), strict=True)
    assert all(torch.equal(param, again) for param, again in pairs)
    torch.manual_seed(0)
    untrained = zip(vae.parameters(), new_vae().parameters(), strict=True)
    assert not any(torch.equal(param, before) for param, before in untrained)
