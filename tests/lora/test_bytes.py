"""Same seed, same bytes with LoRAs: alone, batched with other LoRAs, and without a LoRA."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from hypergen.errors import RequestError
from hypergen.events import Event, Progress
from hypergen.lora.batched_lora import BatchSizeProbe
from hypergen.lora.manager import LoraManager, lora_context
from hypergen.models import loading
from hypergen.models.cfg import map_rows, random_rows
from hypergen.request import GenerationRequest
from tests.support.lora_files import EVERYTHING, TEXT, save_lora
from tests.support.sync_engine import InlineEngine, make_request, make_settings, prepare_image

# Name of the LoRA -> its layers.
_LORAS = {
    "rank4": {"rank": 4, "text": TEXT},
    "rank8": {"rank": 8, "targets": EVERYTHING},
    "rank16": {"rank": 16},
    "rank48": {"rank": 48},
    "dora": {"rank": 4, "targets": ("to_v", "conv2"), "use_dora": True},
}
_CHOICES: list[tuple[tuple[str, float], ...]] = [
    (),
    *(((name, 1.0),) for name in _LORAS),
    (("rank4", 0.5), ("rank8", 0.9)),
    (("dora", 1.0), ("rank16", 2.0), ("rank8", 0.25)),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, sd_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("loras")
    pipeline: Any = StableDiffusionPipeline.from_pretrained(sd_folder, safety_checker=None)
    for seed, (name, config) in enumerate(_LORAS.items()):
        save_lora(folder / f"{name}.safetensors", pipeline, seed=seed, **config)
    return folder


@pytest.fixture(scope="module")
def family(sd_folder: Path, folder: Path) -> Any:
    return loading.load(sd_folder, make_settings(lora_dir=[str(folder)]))


def _requests(chance: random.Random, count: int) -> list[GenerationRequest]:
    return [
        make_request(
            loras=_CHOICES[number % len(_CHOICES)],
            num_inference_steps=chance.randint(2, 5),
            guidance_scale=chance.choice([1.0, 4.0]),
            seed=chance.randrange(2**32),
        )
        for number in range(count)
    ]


def _one_after_another(engine: InlineEngine, requests: list[GenerationRequest]) -> None:
    remaining = iter(requests[1:])

    def submit_next(_id: str, event: Event | RequestError) -> None:
        if isinstance(event, Progress) and event.step == event.steps and (request := next(remaining, None)):
            engine.submit(request)

    engine.run(requests[0], on_event=submit_next)


def test_an_image_has_the_same_bytes_alone_and_batched_with_other_loras(family: Any, sd_folder: Path) -> None:
    chance = random.Random(3)
    tested = _requests(chance, 16)
    alone = InlineEngine(family)
    _one_after_another(alone, tested)
    assert max(alone.images[request.id][0].shared_forwards for request in tested) == 0

    queued = [*tested, *_requests(chance, 8)]
    chance.shuffle(queued)
    first = [queued.pop(0) for _ in range(4)]
    batched = InlineEngine(family, aging=0)

    def submit_more(_id: str, event: Event | RequestError) -> None:
        if isinstance(event, Progress) and queued and (event.step == event.steps or chance.random() < 0.1):
            batched.submit(queued.pop(0))

    batched.run(*first, on_event=submit_more)
    shared = [batched.images[request.id][0].shared_forwards > 0 for request in tested]
    assert sum(shared) >= len(tested) - 2
    assert [r.loras for r in tested if batched.final_latents[r.id] != alone.final_latents[r.id]] == []
    assert [r.loras for r in tested if batched.data(r) != alone.data(r)] == []

    without_loras = InlineEngine(loading.load(sd_folder, make_settings()))
    base = [request for request in tested if not request.loras]
    without_loras.run(*base)
    assert [request.id for request in base if without_loras.data(request) != batched.data(request)] == []


def test_weight_zero_is_the_base_model(family: Any) -> None:
    nothing, base, real = (
        make_request(loras=(("rank8", 0.0),)),
        make_request(),
        make_request(loras=(("rank8", 0.1),)),
    )
    engine = InlineEngine(family)
    engine.run(nothing, base, real)
    assert engine.data(nothing) == engine.data(base)
    assert engine.final_latents[real.id] != engine.final_latents[base.id]


@torch.inference_mode()
def test_every_row_of_a_batch_has_its_own_loras(family: Any) -> None:
    """Batches of arbitrary rows are bit-exact, as probed per layer."""
    lora_manager: LoraManager = family.lora_manager
    InlineEngine(family).probe_shapes(make_request())  # replaces the layers
    rows = random_rows(prepare_image(family, make_request()), 9, torch.Generator().manual_seed(0))
    loras = [lora_manager.load(_CHOICES[row % len(_CHOICES)]) for row in range(9)]

    def run(chosen: list[int]) -> torch.Tensor:
        with lora_context(lora_manager, [loras[row] for row in chosen]):
            return family.forward(*map_rows(rows, lambda tensor: tensor[chosen]))

    alone = [run([row])[0] for row in range(9)]
    for count in (2, 3, 4, 6, 8):
        chosen = random.Random(count).sample(range(9), count)
        for row, output in zip(chosen, run(chosen), strict=True):
            assert torch.equal(output, alone[row])
    assert lora_manager.batch is None


def test_a_model_offers_the_loras_in_its_folder(sd_folder: Path, folder: Path, tmp_path: Path) -> None:
    for part in sd_folder.iterdir():
        (tmp_path / part.name).symlink_to(part)
    (tmp_path / "loras").symlink_to(folder)
    settings = make_settings(lora=[f"rank8={folder / 'rank16.safetensors'}"])
    family: Any = loading.load(tmp_path, settings)
    info = family.model_info("small")
    assert set(info.loras) == set(_LORAS)
    assert (info.default_lora, info.lora_folders, info.max_loras) == (None, (), 4)
    assert "loras" in info.capabilities
    # What the operator gave wins.
    (lora, _), *_ = family.lora_manager.load((("rank8", 1.0),))
    assert {weights.up.shape[1] for weights in lora.layers.values()} == {32}
    assert not any("conv" in name for name in lora.layers)


def test_a_batch_size_that_changes_bits_is_not_used() -> None:
    batch_sizes = BatchSizeProbe(strict=True)
    probed: list[int] = []

    def probe(size: int) -> bool:
        probed.append(size)
        return size in (2, 8)

    assert [batch_sizes.largest("shape", rows, probe) for rows in (1, 2, 5, 9, 20)] == [1, 2, 2, 8, 8]
    assert sorted(probed) == [2, 4, 8, 16]
    assert BatchSizeProbe(strict=False).largest("shape", 5, probe) == 4


def test_an_evicted_lora_is_loaded_again(sd_folder: Path, folder: Path) -> None:
    """Also while images that use it run, and with the same bytes."""
    small = loading.load(sd_folder, make_settings(lora_dir=[str(folder)], lora_cache_mb=0))
    large = loading.load(sd_folder, make_settings(lora_dir=[str(folder)]))
    requests = [make_request(loras=choice, num_inference_steps=2) for choice in _CHOICES]
    engines = [InlineEngine(small), InlineEngine(large)]
    for engine in engines:
        engine.run(*requests)
    assert [r.loras for r in requests if engines[0].data(r) != engines[1].data(r)] == []
