"""Pipelines without a family of their own: drawn whole, as diffusers draws them."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from hypergen.api.validation import read_sampler
from hypergen.engine.model_loader import Loader
from hypergen.engine.pipeline_engine import PipelineEngine
from hypergen.errors import InvalidRequestError, ModelError, RequestError
from hypergen.events import Event, ImageFinished, Progress
from hypergen.model_families import FAMILIES, servable
from hypergen.models import loading
from hypergen.models.diffusers_pipeline import DiffusersPipeline
from hypergen.request import GenerationRequest
from hypergen.served_model import ServedModel
from tests.support.full_pipelines import save_cogview, save_pixart
from tests.support.sync_engine import make_request, make_settings


@pytest.fixture(scope="module", params=[save_pixart, save_cogview])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return request.param(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def model(folder: Path) -> DiffusersPipeline:
    model = loading.load_any(folder, make_settings())
    assert isinstance(model, DiffusersPipeline)
    return model


class _Drawing:
    """A `PipelineEngine` in the test's own thread."""

    def __init__(self, model: DiffusersPipeline) -> None:
        self.engine = PipelineEngine(model, "whole", make_settings(), self._report)
        self.events: list[tuple[str, Event | RequestError]] = []
        self.on_event: Callable[[str, Event | RequestError], None] = lambda _id, _event: None

    def run(self, *requests: GenerationRequest) -> None:
        for request in requests:
            self.engine.add_request(request)
        while self.engine.step() == 0:
            pass

    def pictures(self, request: GenerationRequest) -> list[np.ndarray]:
        finished = [event for event in self.of(request) if isinstance(event, ImageFinished)]
        return [np.asarray(Image.open(io.BytesIO(event.data))) for event in finished]

    def of(self, request: GenerationRequest) -> list[Event | RequestError]:
        return [event for request_id, event in self.events if request_id == request.id]

    def _report(self, request_id: str, event: Event | RequestError) -> None:
        self.events.append((request_id, event))
        self.on_event(request_id, event)


def test_a_picture_is_that_of_the_stock_pipeline(folder: Path, model: DiffusersPipeline) -> None:
    request = make_request(n=2, width=96, height=64, num_inference_steps=3, negative_prompt="blurred")
    drawing = _Drawing(model)
    drawing.run(request)
    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    own = {name: False for name in ("use_resolution_binning", "clean_caption") if name in model.parameters}
    for index, picture in enumerate(drawing.pictures(request)):
        stock = pipeline(
            request.prompt,
            negative_prompt=request.negative_prompt,
            width=96,
            height=64,
            num_inference_steps=3,
            guidance_scale=request.guidance_scale,
            generator=torch.Generator().manual_seed(request.seed + index),
            **own,
        ).images[0]
        assert np.array_equal(picture, np.asarray(stock))
    steps = [event.step for event in drawing.of(request) if isinstance(event, Progress)]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_cancelled_request_ends_at_its_next_step_and_the_others_are_drawn(model: DiffusersPipeline) -> None:
    gone, waiting, last = (make_request(num_inference_steps=4, seed=seed) for seed in range(3))
    drawing = _Drawing(model)

    def on_event(request_id: str, event: Event | RequestError) -> None:
        if request_id == gone.id and event == Progress(2, 4):
            drawing.engine.cancel(gone.id)
            drawing.engine.cancel(waiting.id)

    drawing.on_event = on_event
    drawing.run(gone, waiting, last)
    assert drawing.of(gone)[-1] == Progress(2, 4)
    assert drawing.of(waiting) == []
    assert len(drawing.pictures(last)) == 1


def test_a_size_between_the_multiples_is_cut_from_the_middle(model: DiffusersPipeline) -> None:
    request = make_request(width=72, height=104, num_inference_steps=1)
    drawing = _Drawing(model)
    drawing.run(request)
    assert drawing.pictures(request)[0].shape == (104, 72, 3)


def test_a_failure_is_told_to_its_request_alone(model: DiffusersPipeline) -> None:
    format_of_no_codec: Any = "nope"
    bad, good = make_request(output_format=format_of_no_codec), make_request(num_inference_steps=2)
    drawing = _Drawing(model)
    drawing.run(bad, good)
    assert isinstance(drawing.of(bad)[-1], RequestError)
    assert len(drawing.pictures(good)) == 1


def test_the_log_says_what_such_a_model_does_not_get(
    model: DiffusersPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "hypergen"):
        _Drawing(model)
    assert "runs as a full diffusers pipeline, one image at a time" in caplog.text
    assert model.model_info("whole").capabilities == {"negative_prompt"}


def test_every_family_and_every_other_pipeline_of_diffusers_can_be_named() -> None:
    assert set(FAMILIES) <= servable()
    assert {"QwenImagePipeline", "ZImagePipeline", "PixArtSigmaPipeline", "SanaPipeline"} <= servable()
    assert "StableDiffusionNonsense" not in servable()


def test_a_pipeline_that_wants_more_than_a_prompt_is_refused(folder: Path) -> None:
    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(folder)

    class Wanting(type(pipeline)):
        def __call__(
            self, image: object, prompt: str, num_inference_steps: int = 1, generator: object = None
        ) -> None:
            """Draw nothing."""

    pipeline.__class__ = Wanting
    with pytest.raises(ModelError, match="also wants image"):
        DiffusersPipeline(pipeline, {})


@pytest.mark.parametrize(
    ("scheduler", "fewest"),
    [(diffusers.DPMSolverMultistepScheduler, 1), (diffusers.PNDMScheduler, 4)],
)
def test_the_fewest_steps_that_a_pipeline_can_do_are_published(
    tmp_path: Path, scheduler: Any, fewest: int
) -> None:
    """PNDM cannot begin with fewer than 4, and raises a ValueError in its step or before it."""
    folder = save_pixart(tmp_path)
    scheduler().save_pretrained(folder / "scheduler")
    index = folder / "model_index.json"
    named = json.loads(index.read_text(encoding="utf-8")) | {"scheduler": ["diffusers", scheduler.__name__]}
    index.write_text(json.dumps(named), encoding="utf-8")
    model = ServedModel(id="whole", path=folder, settings=make_settings())
    loaded = Loader(lambda _id, _event: None, alone=True)(model, lambda: None)
    assert loaded.model_info.min_steps == fewest
    if fewest > 1:
        with pytest.raises(InvalidRequestError, match=f"must be at least {fewest} ") as refused:
            read_sampler(None, fewest - 1, loaded.model_info, "num_inference_steps")
        assert refused.value.param == "num_inference_steps"


@pytest.mark.parametrize(
    "settings",
    [
        {"compile": "on"},
        {"channels_last": True},
        {"attention": "math"},
        {"decode_stream": True},
        {"batched_euler": False},
        {"lora_dir": ("loras",)},
    ],
    ids=str,
)
def test_settings_of_the_step_by_step_engine_are_refused(folder: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=f"The setting {next(iter(settings))} goes with .*, not with this"):
        loading.load_any(folder, make_settings(**settings))
    # Beside other models they may be meant for those.
    assert loading.load_any(folder, make_settings(**settings), alone=False)


@pytest.mark.parametrize("alone", [True, False])
def test_loras_of_a_model_that_takes_none_are_refused(folder: Path, alone: bool) -> None:
    with pytest.raises(ModelError, match="LoRAs go with Stable Diffusion, SDXL and FLUX"):
        loading.load_any(folder, make_settings(lora=("style=style.safetensors",)), alone=alone)
