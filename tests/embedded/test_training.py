"""The training's own parts, on what it is given to go on from: the shipped model."""

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
from scripts.train_embedded_model.continuing import take_apart
from scripts.train_embedded_model.denoising import Share, add_noise, latents_at, places_told_by
from scripts.train_embedded_model.looks import LOOKS
from scripts.train_embedded_model.muon import AT_ONCE, muon_and_adamw, orthogonalise
from scripts.train_embedded_model.pipeline import load_text_encoder, load_vae
from scripts.train_embedded_model.progress import Run
from scripts.train_embedded_model.replay import Replay, Sample
from scripts.train_embedded_model.scenes import OPEN_PLACES, OVERLAPPING, pair, possible_scenes, single
from scripts.train_embedded_model.threads import step_together
from scripts.train_embedded_model.unet import LAST_ROUND, ROUNDS, TOTAL_STEPS, load_unet, rate_of, round_of
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
    with ThreadPoolExecutor(3) as workers:
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


def test_the_unet_goes_on_with_its_last_round(parts: Path) -> None:
    step = torch.load(parts / "unet" / "checkpoint.pt")["run"]["step"]
    last = ROUNDS[-1]
    assert round_of(step) == (last, 0)
    assert round_of(TOTAL_STEPS - 1) == (last, last.steps - 1)
    assert round_of(step - 1) == (ROUNDS[-2], ROUNDS[-2].steps - 1)
    assert rate_of(step) == pytest.approx(last.rate / 40)  # warming up, for the optimizers begin anew
    assert rate_of(step + 40) == last.rate


def test_a_checkpoint_of_more_steps_than_there_are_is_not_taken_for_finished(parts: Path) -> None:
    with pytest.raises(ValueError, match="another recipe"):
        Run(parts / "unet", LAST_ROUND - 1, {})


def test_parts_that_are_there_are_not_lost(parts: Path) -> None:
    with pytest.raises(FileExistsError):
        take_apart(EMBEDDED, parts)


def sign(number: float) -> int:
    return (number > 0) - (number < 0)


def test_an_object_in_another_of_its_places_has_the_same_caption() -> None:
    rng = random.Random(0)
    for scene in (single(rng, OVERLAPPING) for _ in range(100)):
        possible = possible_scenes(scene)
        assert {plain_caption(other) for other in possible} == {plain_caption(scene)}
        assert scene in possible
        if scene.stands_anywhere:
            things = [other.things[0] for other in possible]
            assert [(sign(thing.x - 0.5), sign(thing.y - 0.5)) for thing in things] == list(OPEN_PLACES)
        else:
            assert len(possible) == 1
    assert all(len(possible_scenes(pair(rng))) == 1 for _ in range(20))


@pytest.mark.parametrize(("height", "width"), [(16, 16), (12, 32)])
def test_noise_tells_the_place_of_an_object(height: int, width: int) -> None:
    noise = torch.randn(2000, 4, height, width, generator=torch.Generator().manual_seed(0))

    def told_by(noise: Tensor) -> list[tuple[int, int]]:
        return [OPEN_PLACES[index] for index in places_told_by(noise)]

    found = told_by(noise)
    shares = [found.count(place) / len(found) for place in OPEN_PLACES]
    assert min(shares) > 0.17  # each of the five is as likely
    assert max(shares) < 0.23
    assert told_by(noise.flip(3)) == [(-right, down) for right, down in found]
    assert told_by(noise.flip(2)) == [(right, -down) for right, down in found]
    noise[:, 0, height // 2 :, width // 2 :] += 1
    assert told_by(noise).count((1, 1)) > 1900


def test_the_place_that_noise_tells_is_taken_where_it_is_open() -> None:
    latents, prompt_embeds = torch.randn(5, 4, 8, 8), torch.zeros(77, 128)
    for place in range(5):
        assert torch.equal(latents_at(Sample(latents, prompt_embeds), place), latents[place])
        assert torch.equal(latents_at(Sample(latents[:1], prompt_embeds), place), latents[0])


def test_the_velocity_leads_to_the_latents_from_wherever_they_strayed() -> None:
    latents, strayed, noise = torch.randn(3, 6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    alpha_squared = torch.linspace(0.01, 0.99, 6)[:, None, None, None]
    for away in (torch.zeros_like(strayed), strayed):
        noisy_latents, velocity = add_noise(latents, away, noise, alpha_squared)
        found = alpha_squared.sqrt() * noisy_latents - (1 - alpha_squared).sqrt() * velocity
        assert torch.allclose(found, latents, atol=1e-4)
    unstrayed, _ = add_noise(latents, torch.zeros_like(strayed), noise, alpha_squared)
    assert torch.allclose(noisy_latents - unstrayed, alpha_squared.sqrt() * strayed, atol=1e-5)


def test_the_unet_meets_noise_alone_as_sampling_begins(parts: Path) -> None:
    tokenizer, text_encoder = load_text_encoder(parts / "text")
    replay = Replay(load_vae(parts / "vae"), tokenizer, text_encoder, 0, "cpu")
    unet = load_unet(parts / "unet")
    met: list[tuple[Tensor, Tensor]] = []
    unet.register_forward_pre_hook(lambda _, inputs: met.append(inputs[:2]))
    share = Share(unet, replay)
    for _ in range(10):
        replay.generator.manual_seed(len(met))
        share.loss(16, 8, 8, pure_noise=0.15)
    drawn = [torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(10)]
    same = [
        torch.equal(x, y)
        for (latents, _), noise in zip(met, drawn, strict=True)
        for x, y in zip(latents, noise, strict=True)
    ]
    timesteps = torch.cat([timesteps for _, timesteps in met])
    assert 0.1 < sum(same) / len(same) < 0.2  # of 160
    assert set(timesteps[torch.tensor(same)].tolist()) == {999}


@pytest.mark.parametrize("blend", [0.0, 0.5])
def test_a_step_of_training_leads_on_from_the_finished_model(parts: Path, blend: float) -> None:
    tokenizer, text_encoder = load_text_encoder(parts / "text")
    replay = Replay(load_vae(parts / "vae"), tokenizer, text_encoder, 0, "cpu")
    unet = load_unet(parts / "unet").requires_grad_(True)
    share = Share(unet, replay)
    loss = torch.stack([share.loss(8, 16, 16, blend) for _ in range(2)]).mean()
    assert loss < 0.5  # an untrained UNet has a loss of about 1
    loss.backward()
    assert all(parameter.grad is not None for parameter in unet.parameters())


def test_threads_that_share_a_step_take_it_by_the_mean_of_their_gradients(workers: Executor) -> None:
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
def test_gradients_are_added_in_the_same_order_whoever_is_last(workers: Executor, slowest: int) -> None:
    layer = nn.Linear(1, 1, bias=False)
    before = layer.weight.detach().clone()

    def loss(index: int, x: float) -> Tensor:
        if index == slowest:
            time.sleep(0.1)
        return layer(torch.tensor([x])).sum()

    # In float32 this sum is 0 in the order of the shares, and 1 where the middle one comes last.
    compute_losses = [partial(loss, index, x) for index, x in enumerate((1e8, 1.0, -1e8))]
    step_together(
        workers, compute_losses, layer, [torch.optim.SGD(layer.parameters(), lr=1.0)], max_norm=100.0
    )
    assert torch.equal(layer.weight, before)


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


def test_threads_train_the_autoencoder_the_same_way_every_time(workers: Executor) -> None:
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
