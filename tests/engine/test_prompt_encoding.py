"""Prompts are read in a thread of their own, where that is asked for: the same bytes, and nobody waits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from hypergen.engine.optimizations import accelerate
from hypergen.engine.prompt_encoding import quiet
from hypergen.errors import InvalidRequestError, ModelError, RequestError
from hypergen.events import Event, ImageFinished, Progress
from hypergen.models import loading
from hypergen.models.memory import place
from hypergen.request import GenerationRequest
from tests.support.lora_files import TEXT, save_lora
from tests.support.small_models import save_flux, save_refiner, save_sd3, save_sdxl
from tests.support.sync_engine import InlineEngine, make_request, make_settings

_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel")


@contextmanager
def _readers() -> Iterator[set[str]]:
    """Names of the threads in which text encoders run."""
    names: set[str] = set()

    def note(module: nn.Module, _inputs: Any) -> None:
        if type(module).__name__ in _ENCODERS:
            names.add(threading.current_thread().name)
            assert quiet.locked()  # no model is loaded meanwhile

    hook = torch.nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield names
    finally:
        hook.remove()


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory, sd_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("loras")
    pipeline: Any = StableDiffusionPipeline.from_pretrained(sd_folder, safety_checker=None)
    style = save_lora(folder / "style.safetensors", pipeline, text=TEXT)
    (folder / "broken.safetensors").write_bytes(style.read_bytes()[:-10])
    return folder


@pytest.fixture
def load(sd_folder: Path, loras: Path, tmp_path: Path) -> Callable[[str], Any]:
    """A family of a kind that remembers no prompt and no LoRA longer than it is needed."""

    def load(kind: str) -> Any:
        changes: dict[str, Any] = {"prompt_cache_mb": 0}
        if kind == "sd":
            return loading.load(sd_folder, make_settings(lora_dir=[str(loras)], lora_cache_mb=0, **changes))
        if kind == "sdxl":
            base = save_sdxl(tmp_path / "base")
            changes["refiner"] = str(save_refiner(tmp_path / "refiner", base))
            return loading.load(base, make_settings(**changes))
        save = {"sd3": save_sd3, "flux": save_flux}[kind]
        return loading.load(save(tmp_path), make_settings(**changes))

    return load


_ASKED: dict[str, dict[str, Any]] = {
    "sd": {"loras": (("style", 0.8),)},
    "sdxl": {"prompt_2": "a dog", "enable_refiner": True},
    "sd3": {"prompt_2": "a dog"},
    "flux": {"prompt_2": "a dog", "true_cfg_scale": 2.0},
}


@pytest.mark.parametrize("kind", _ASKED)
def test_a_thread_of_its_own_reads_every_prompt_and_changes_no_bytes(
    kind: str, load: Callable[[str], Any]
) -> None:
    long = "a cat on a mat, " * 20  # more chunks than the negative prompt has
    asked = make_request(prompt=long, negative_prompt="a bird", n=2, num_inference_steps=6, **_ASKED[kind])
    others = [make_request(prompt="an owl", seed=1), make_request(prompt="a fox", guidance_scale=1.0)]
    family = load(kind)
    engine = InlineEngine(family)
    with _readers() as names:
        engine.run(asked, *others)
    assert names == {threading.current_thread().name}
    beside = InlineEngine(family, text_thread=True)
    with _readers() as names:
        beside.run(asked, *others)
    assert names == {"prompts_0"}
    for request in (asked, *others):
        images, expected = beside.images[request.id], engine.images[request.id]
        assert {i: image.data for i, image in images.items()} == {
            i: image.data for i, image in expected.items()
        }
        assert [i.prompt_tokens for i in images.values()] == [i.prompt_tokens for i in expected.values()]


def test_running_images_go_on_while_a_prompt_is_read(load: Callable[[str], Any]) -> None:
    first, second = make_request(), make_request(prompt="an owl")
    engine = InlineEngine(load("sd"), text_thread=True)
    reader = engine.engine._reader
    assert reader is not None
    go_on = threading.Event()

    def follow(request_id: str, event: Event | RequestError) -> None:
        if request_id == first.id and isinstance(event, Progress) and event.step == 1:
            reader._thread.submit(go_on.wait, 60)
            engine.submit(second)
        if request_id == first.id and isinstance(event, ImageFinished):
            assert not engine.steps(second)
            go_on.set()

    engine.run(first, on_event=follow)
    assert engine.images[second.id]


def test_a_request_that_leaves_while_its_prompt_is_read_does_not_come_back(
    load: Callable[[str], Any],
) -> None:
    left, stays = make_request(), make_request()
    engine = InlineEngine(load("sd"), text_thread=True)
    reader = engine.engine._reader
    assert reader is not None
    go_on = threading.Event()
    reader._thread.submit(go_on.wait, 60)
    engine.submit(left)
    engine.submit(stays)
    engine.cancel(left)
    go_on.set()
    engine.run()
    assert {request_id for request_id, _ in engine.events} == {stays.id}


def test_prompts_of_requests_that_left_are_not_read(load: Callable[[str], Any]) -> None:
    engine = InlineEngine(load("sd"), text_thread=True)
    reader = engine.engine._reader
    assert reader is not None
    go_on = threading.Event()
    reader._thread.submit(go_on.wait, 60)
    left = [make_request(prompt=f"{number} cats") for number in range(5)]
    stays = make_request(negative_prompt="a dog")
    read = list[str]()
    family: Any = engine.engine.family
    read_prompts = family.read_prompts

    def noted(request: GenerationRequest) -> Any:
        read.append(request.id)
        return read_prompts(request)

    family.read_prompts = noted
    for request in (*left, stays):
        engine.submit(request)
    for request in left:
        engine.cancel(request)
    go_on.set()
    engine.run()
    assert read == [stays.id]
    assert engine.images.keys() == {stays.id}


def test_an_engine_that_closes_reads_no_prompts_of_those_who_left(
    load: Callable[[str], Any], caplog: pytest.LogCaptureFixture
) -> None:
    engine = InlineEngine(load("sd"), text_thread=True)
    reader = engine.engine._reader
    assert reader is not None
    reading, go_on = threading.Event(), threading.Event()
    reader._thread.submit(lambda: (reading.set(), go_on.wait(60)))
    assert reading.wait(60)
    plain, with_file = make_request(), make_request(loras=(("style", 0.5),))
    for request in (plain, with_file):
        engine.submit(request)
        engine.engine.cancel(request.id)
    assert engine.engine.turn(wait=False) is False
    assert engine.engine.resting
    with _readers() as names:
        go_on.set()
        engine.engine.close()
    assert not names
    assert not caplog.records


def test_a_prompt_without_room_beside_a_pass_is_read_between_two(load: Callable[[str], Any]) -> None:
    """The device's answer is made up here: a CPU has no error of this kind."""
    request = make_request()
    engine = InlineEngine(family := load("sd"))
    engine.run(request)

    def refuse(_module: nn.Module, _inputs: Any) -> None:
        if threading.current_thread().name.startswith("prompts"):
            raise torch.OutOfMemoryError

    beside = InlineEngine(family, text_thread=True)
    hook = family.text_encoder.register_forward_pre_hook(refuse)
    try:
        beside.run(request)
    finally:
        hook.remove()
    assert beside.data(request) == engine.data(request)


def test_texts_are_not_read_beside_passes_whose_attention_is_chosen_for_the_process(sd_folder: Path) -> None:
    settings = make_settings(attention="math", text_thread=True)
    with pytest.raises(ModelError, match="attention and text_thread do not go together"):
        accelerate(loading.load(sd_folder, settings), settings)


def test_a_lora_that_cannot_be_read_fails_its_request_alone(load: Callable[[str], Any]) -> None:
    broken, missing = make_request(loras=(("broken", 1.0),)), make_request(loras=(("missing", 1.0),))
    plain = make_request()
    engine = InlineEngine(load("sd"), text_thread=True)
    engine.run(broken, missing, plain)
    assert isinstance(engine.errors[broken.id], InvalidRequestError)
    assert isinstance(engine.errors[missing.id], InvalidRequestError)
    assert engine.images[plain.id]


def test_text_encoders_that_take_turns_with_the_denoiser_are_not_read_beside_it(sd_folder: Path) -> None:
    pipeline: Any = StableDiffusionPipeline.from_pretrained(sd_folder, safety_checker=None)
    with pytest.raises(ModelError, match="offload and text_thread do not go together"):
        place(pipeline, make_settings(offload="model", text_thread=True), torch.device("meta"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_a_stream_of_its_own_changes_no_bytes(sd_folder: Path, loras: Path) -> None:
    settings = make_settings(device="cuda", lora_dir=[str(loras)], prompt_cache_mb=0)
    family = loading.load(sd_folder, settings)
    requests = [
        make_request(prompt=f"{i} cats", seed=i, loras=(("style", 0.8),) * (i % 2)) for i in range(12)
    ]
    engine, beside = (InlineEngine(family, device="cuda", text_thread=flag) for flag in (False, True))
    for each in (engine, beside):
        each.run(*requests)
    assert [engine.data(request) for request in requests] == [beside.data(request) for request in requests]
