"""The parts of the training, continued from the shipped model."""

import random
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from scripts.train_embedded_model.assemble import assemble
from scripts.train_embedded_model.captions import plain_caption
from scripts.train_embedded_model.continuing import unpack_model
from scripts.train_embedded_model.denoising import Share, add_noise, latents_at, positions_from_noise
from scripts.train_embedded_model.looks import LOOKS
from scripts.train_embedded_model.muon import MATRICES_PER_BATCH, muon_and_adamw, orthogonalise
from scripts.train_embedded_model.pipeline import load_text_encoder, load_vae
from scripts.train_embedded_model.progress import Run
from scripts.train_embedded_model.replay import Replay, Sample
from scripts.train_embedded_model.scenes import OPEN_POSITIONS, OVERLAPPING, pair, possible_scenes, single
from scripts.train_embedded_model.threads import step_together
from scripts.train_embedded_model.unet import LAST_ROUND, ROUNDS, TOTAL_STEPS, load_unet, rate_of, round_of
from scripts.train_embedded_model.vae import Share as VaeShare
from scripts.train_embedded_model.vae import new_vae

EMBEDDED = Path(__file__).parents[2] / "hypergen" / "embedded"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training") / "parts"
    unpack_model(EMBEDDED, folder)
    return folder


@pytest.fixture
def workers() -> Iterator[Executor]:
    with ThreadPoolExecutor(3) as workers:
        yield workers


def test_an_unpacked_and_reassembled_model_has_the_same_weights(parts: Path, tmp_path: Path) -> None:
    assemble(parts, tmp_path)
    for weights in tmp_path.glob("*/*.safetensors"):
        shipped, again = (
            load_file(folder / weights.relative_to(tmp_path)) for folder in (EMBEDDED, tmp_path)
        )
        assert shipped.keys() == again.keys()
        assert all(torch.equal(value, again[name]) for name, value in shipped.items())


def test_the_loras_continue_from_the_shipped_weights(parts: Path) -> None:
    for name in LOOKS:
        run = torch.load(parts / "loras" / name / "checkpoint.pt")
        shipped = load_file(EMBEDDED / "loras" / f"{name}.safetensors")
        assert run["run"]["step"] == 0
        assert all(torch.equal(value.half(), shipped[f"unet.{key}"]) for key, value in run["lora"].items())


def test_the_unet_continues_with_its_last_round(parts: Path) -> None:
    step = torch.load(parts / "unet" / "checkpoint.pt")["run"]["step"]
    last = ROUNDS[-1]
    assert round_of(step) == (last, 0)
    assert round_of(TOTAL_STEPS - 1) == (last, last.steps - 1)
    assert round_of(step - 1) == (ROUNDS[-2], ROUNDS[-2].steps - 1)
    assert rate_of(step) == pytest.approx(last.rate / 40)  # warmup, because the optimizers restart
    assert rate_of(step + 40) == last.rate


def test_a_checkpoint_with_too_many_steps_is_refused(parts: Path) -> None:
    with pytest.raises(ValueError, match="another recipe"):
        Run(parts / "unet", LAST_ROUND - 1, {})


def test_unpacking_into_an_existing_folder_is_refused(parts: Path) -> None:
    with pytest.raises(FileExistsError):
        unpack_model(EMBEDDED, parts)


def sign(number: float) -> int:
    return (number > 0) - (number < 0)


def test_open_positions_have_the_same_caption() -> None:
    rng = random.Random(0)
    for scene in (single(rng, OVERLAPPING) for _ in range(100)):
        possible = possible_scenes(scene)
        assert {plain_caption(other) for other in possible} == {plain_caption(scene)}
        assert scene in possible
        if scene.has_open_position:
            things = [other.things[0] for other in possible]
            assert [(sign(thing.x - 0.5), sign(thing.y - 0.5)) for thing in things] == list(OPEN_POSITIONS)
        else:
            assert len(possible) == 1
    assert all(len(possible_scenes(pair(rng))) == 1 for _ in range(20))


@pytest.mark.parametrize(("height", "width"), [(16, 16), (12, 32)])
def test_noise_determines_the_position_of_an_object(height: int, width: int) -> None:
    noise = torch.randn(2000, 4, height, width, generator=torch.Generator().manual_seed(0))

    def positions(noise: Tensor) -> list[tuple[int, int]]:
        return [OPEN_POSITIONS[index] for index in positions_from_noise(noise)]

    found = positions(noise)
    shares = [found.count(position) / len(found) for position in OPEN_POSITIONS]
    assert min(shares) > 0.17  # all five are equally likely
    assert max(shares) < 0.23
    assert positions(noise.flip(3)) == [(-right, down) for right, down in found]
    assert positions(noise.flip(2)) == [(right, -down) for right, down in found]
    noise[:, 0, height // 2 :, width // 2 :] += 1
    assert positions(noise).count((1, 1)) > 1900


def test_latents_of_an_open_position_are_selected() -> None:
    latents, prompt_embeds = torch.randn(5, 4, 8, 8), torch.zeros(77, 128)
    for position in range(5):
        assert torch.equal(latents_at(Sample(latents, prompt_embeds), position), latents[position])
        assert torch.equal(latents_at(Sample(latents[:1], prompt_embeds), position), latents[0])


def test_the_velocity_leads_to_the_latents_with_any_displacement() -> None:
    latents, displacement, noise = torch.randn(3, 6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    alpha_squared = torch.linspace(0.01, 0.99, 6)[:, None, None, None]
    for offset in (torch.zeros_like(displacement), displacement):
        noisy_latents, velocity = add_noise(latents, offset, noise, alpha_squared)
        found = alpha_squared.sqrt() * noisy_latents - (1 - alpha_squared).sqrt() * velocity
        assert torch.allclose(found, latents, atol=1e-4)
    undisplaced, _ = add_noise(latents, torch.zeros_like(displacement), noise, alpha_squared)
    assert torch.allclose(noisy_latents - undisplaced, alpha_squared.sqrt() * displacement, atol=1e-5)


def test_a_share_of_the_batch_is_pure_noise_at_the_last_timestep(parts: Path) -> None:
    tokenizer, text_encoder = load_text_encoder(parts / "text")
    replay = Replay(load_vae(parts / "vae"), tokenizer, text_encoder, 0, "cpu")
    unet = load_unet(parts / "unet")
    inputs_seen: list[tuple[Tensor, Tensor]] = []
    unet.register_forward_pre_hook(lambda _, inputs: inputs_seen.append(inputs[:2]))
    share = Share(unet, replay)
    for _ in range(10):
        replay.generator.manual_seed(len(inputs_seen))
        share.loss(16, 8, 8, pure_noise=0.15)
    noises = [torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(10)]
    same = [
        torch.equal(x, y)
        for (latents, _), noise in zip(inputs_seen, noises, strict=True)
        for x, y in zip(latents, noise, strict=True)
    ]
    timesteps = torch.cat([timesteps for _, timesteps in inputs_seen])
    assert 0.1 < sum(same) / len(same) < 0.2  # of 160
    assert set(timesteps[torch.tensor(same)].tolist()) == {999}


@pytest.mark.parametrize("blend", [0.0, 0.5])
def test_the_finished_model_has_a_low_loss_and_gradients(parts: Path, blend: float) -> None:
    tokenizer, text_encoder = load_text_encoder(parts / "text")
    replay = Replay(load_vae(parts / "vae"), tokenizer, text_encoder, 0, "cpu")
    unet = load_unet(parts / "unet").requires_grad_(True)
    share = Share(unet, replay)
    loss = torch.stack([share.loss(8, 16, 16, blend) for _ in range(2)]).mean()
    assert loss < 0.5  # an untrained UNet has a loss of about 1
    loss.backward()
    assert all(parameter.grad is not None for parameter in unet.parameters())


def test_a_step_uses_the_mean_gradient_of_all_threads(workers: Executor) -> None:
    layer = nn.Linear(3, 1, bias=False)
    before = layer.weight.detach().clone()
    inputs = [torch.tensor([1.0, 0.0, 2.0]), torch.tensor([3.0, 4.0, 0.0])]
    compute_losses = [lambda x=x: layer(x).sum() for x in inputs]
    optimizers = [torch.optim.SGD(layer.parameters(), lr=1.0)]
    loss = step_together(workers, compute_losses, layer, optimizers, max_norm=100.0)
    assert torch.allclose(before - layer.weight, torch.tensor([[2.0, 2.0, 1.0]]))
    assert torch.allclose(loss, (before @ torch.stack(inputs).T).mean())
    assert layer.weight.grad is None


@pytest.mark.parametrize("slowest", range(3))
def test_gradients_are_summed_in_the_same_order_whichever_thread_is_slowest(
    workers: Executor, slowest: int
) -> None:
    layer = nn.Linear(1, 1, bias=False)
    before = layer.weight.detach().clone()

    def loss(index: int, x: float) -> Tensor:
        if index == slowest:
            time.sleep(0.1)
        return layer(torch.tensor([x])).sum()

    # In float32 this sum is 0 in the order of the shares, and 1 if the middle one is added last.
    compute_losses = [partial(loss, index, x) for index, x in enumerate((1e8, 1.0, -1e8))]
    step_together(
        workers, compute_losses, layer, [torch.optim.SGD(layer.parameters(), lr=1.0)], max_norm=100.0
    )
    assert torch.equal(layer.weight, before)


def test_muon_gives_the_same_result_with_and_without_workers(workers: Executor) -> None:
    def updated(workers: Executor | None) -> list[Tensor]:
        torch.manual_seed(0)
        layers = nn.ModuleList(nn.Linear(16, 24) for _ in range(2 * MATRICES_PER_BATCH + 3))
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


def test_training_the_vae_with_threads_is_deterministic(workers: Executor) -> None:
    def trained() -> tuple[list[float], nn.Module]:
        torch.manual_seed(0)
        vae = new_vae()
        optimizers = muon_and_adamw(
            vae, 7e-5, 2e-4, except_for=("conv_in", "conv_out", "quant"), workers=workers
        )
        compute_losses = [partial(VaeShare(vae, seed, crops=2).loss, 96) for seed in range(3)]
        steps = [step_together(workers, compute_losses, vae, optimizers, max_norm=1.0) for _ in range(3)]
        return [loss.item() for loss in steps], vae

    (losses, vae), (losses_again, vae_again) = trained(), trained()
    assert losses == losses_again
    pairs = zip(vae.parameters(), vae_again.parameters(), strict=True)
    assert all(torch.equal(param, again) for param, again in pairs)
    torch.manual_seed(0)
    untrained = zip(vae.parameters(), new_vae().parameters(), strict=True)
    assert not any(torch.equal(param, before) for param, before in untrained)
