"""Full pipelines: models without a family, against diffusers."""

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
from hypergen.errors import InvalidRequestError, ModelError, RequestError, SettingError
from hypergen.events import Event, ImageFinished, Progress
from hypergen.model_families import PIPELINES, servable
from hypergen.models import loading
from hypergen.models.diffusers_pipeline import DiffusersPipeline
from hypergen.request import GenerationRequest
from hypergen.served_model import ServedModel
from tests.support.full_pipelines import save_cogview, save_pixart
from tests.support.sync_engine import make_request, make_settings


@pytest.fixture(scope="module", params=[save_pixart, save_cogview])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return request.param(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def model(folder: Path) -> DiffusersPipeline:
    model = loading.load_any(folder, make_settings())
    assert isinstance(model, DiffusersPipeline)
    return model


class _InlinePipelineEngine:
    """A `PipelineEngine` in the test's own thread."""

    def __init__(self, model: DiffusersPipeline) -> None:
        self.engine = PipelineEngine(model, "pipeline", make_settings(), self._report)
        self.events: list[tuple[str, Event | RequestError]] = []
        self.on_event: Callable[[str, Event | RequestError], None] = lambda _id, _event: None

    def run(self, *requests: GenerationRequest) -> None:
        for request in requests:
            self.engine.add_request(request)
        while self.engine.step() == 0:
            pass

    def images(self, request: GenerationRequest) -> list[np.ndarray]:
        finished = [event for event in self.of(request) if isinstance(event, ImageFinished)]
        return [np.asarray(Image.open(io.BytesIO(event.data))) for event in finished]

    def of(self, request: GenerationRequest) -> list[Event | RequestError]:
        return [event for request_id, event in self.events if request_id == request.id]

    def _report(self, request_id: str, event: Event | RequestError) -> None:
        self.events.append((request_id, event))
        self.on_event(request_id, event)


def test_an_image_equals_that_of_diffusers(folder: Path, model: DiffusersPipeline) -> None:
    request = make_request(n=2, width=96, height=64, num_inference_steps=3, negative_prompt="blurred")
    engine = _InlinePipelineEngine(model)
    engine.run(request)
    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    own = {name: False for name in ("use_resolution_binning", "clean_caption") if name in model.parameters}
    for index, image in enumerate(engine.images(request)):
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
        assert np.array_equal(image, np.asarray(stock))
    steps = [event.step for event in engine.of(request) if isinstance(event, Progress)]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_cancelled_request_ends_at_its_next_step_and_the_others_run(model: DiffusersPipeline) -> None:
    running, waiting, last = (make_request(num_inference_steps=4, seed=seed) for seed in range(3))
    engine = _InlinePipelineEngine(model)

    def on_event(request_id: str, event: Event | RequestError) -> None:
        if request_id == running.id and event == Progress(2, 4):
            engine.engine.cancel(running.id)
            engine.engine.cancel(waiting.id)

    engine.on_event = on_event
    engine.run(running, waiting, last)
    assert engine.of(running)[-1] == Progress(2, 4)
    assert engine.of(waiting) == []
    assert len(engine.images(last)) == 1


def test_a_size_between_multiples_is_cropped_from_the_center(model: DiffusersPipeline) -> None:
    request = make_request(width=72, height=104, num_inference_steps=1)
    engine = _InlinePipelineEngine(model)
    engine.run(request)
    assert engine.images(request)[0].shape == (104, 72, 3)


def test_a_failure_fails_only_its_request(model: DiffusersPipeline) -> None:
    format_of_no_codec: Any = "nope"
    bad, good = make_request(output_format=format_of_no_codec), make_request(num_inference_steps=2)
    engine = _InlinePipelineEngine(model)
    engine.run(bad, good)
    assert isinstance(engine.of(bad)[-1], RequestError)
    assert len(engine.images(good)) == 1


def test_a_warning_lists_what_full_pipelines_do_not_support(
    model: DiffusersPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "hypergen"):
        _InlinePipelineEngine(model)
    assert "runs as a full diffusers pipeline, one image at a time" in caplog.text
    assert model.model_info("pipeline").capabilities == {"negative_prompt"}


def test_families_and_all_other_diffusers_pipelines_are_servable() -> None:
    assert set(PIPELINES) <= servable()
    assert {"QwenImagePipeline", "ZImagePipeline", "PixArtSigmaPipeline", "SanaPipeline"} <= servable()
    assert "StableDiffusionNonsense" not in servable()


def test_a_pipeline_that_needs_more_than_a_prompt_is_an_error(folder: Path) -> None:
    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(folder)

    class NeedsImage(type(pipeline)):
        def __call__(
            self, image: object, prompt: str, num_inference_steps: int = 1, generator: object = None
        ) -> None:
            """Generate nothing."""

    pipeline.__class__ = NeedsImage
    with pytest.raises(ModelError, match="also needs 'image'"):
        DiffusersPipeline(pipeline, {})


@pytest.mark.parametrize(
    ("scheduler", "min_steps"),
    [(diffusers.DPMSolverMultistepScheduler, 1), (diffusers.PNDMScheduler, 4)],
)
def test_the_minimum_steps_of_a_pipeline_are_in_its_model_info(
    tmp_path: Path, scheduler: Any, min_steps: int
) -> None:
    """PNDM needs at least 4, and raises a ValueError in or before its step."""
    folder = save_pixart(tmp_path)
    scheduler().save_pretrained(folder / "scheduler")
    index = folder / "model_index.json"
    named = json.loads(index.read_text(encoding="utf-8")) | {"scheduler": ["diffusers", scheduler.__name__]}
    index.write_text(json.dumps(named), encoding="utf-8")
    model = ServedModel(id="pipeline", path=folder, settings=make_settings())
    loaded = Loader(lambda _id, _event: None, alone=True)(model, lambda: None)
    assert loaded.model_info.min_steps == min_steps
    if min_steps > 1:
        with pytest.raises(InvalidRequestError, match=f"must be at least {min_steps} ") as refused:
            read_sampler(None, None, min_steps - 1, loaded.model_info, "num_inference_steps")
        assert refused.value.param == "num_inference_steps"


@pytest.mark.parametrize(
    "settings",
    [
        {"compile": "on"},
        {"lora_dir": ("loras",)},
    ],
    ids=str,
)
def test_step_level_settings_are_errors_for_full_pipelines(folder: Path, settings: dict[str, Any]) -> None:
    (setting,) = settings
    with pytest.raises(SettingError, match=f"{setting} is not supported for "):
        loading.load_any(folder, make_settings(**settings))
    # With several models the settings may be for others.
    assert loading.load_any(folder, make_settings(**settings), alone=False)


@pytest.mark.parametrize("alone", [True, False])
def test_loras_are_an_error_for_models_without_lora_support(folder: Path, alone: bool) -> None:
    with pytest.raises(SettingError, match="lora is only supported for flux, sd, sdxl models; this is "):
        loading.load_any(folder, make_settings(lora=("style=style.safetensors",)), alone=alone)
