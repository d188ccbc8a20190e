"""`hypergen generate`: one engine for one request, with a progress bar, without a server."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hypergen import events
from hypergen.api.dialects import openai_images
from hypergen.api.validation import check_capability
from hypergen.cli.start_checks import CheckedModel
from hypergen.config import Settings
from hypergen.engine_client.accelerators import find_accelerators
from hypergen.engine_client.pool import EnginePool
from hypergen.errors import ConfigurationError, InvalidRequestError, ModelError
from hypergen.events import ImageFinished
from hypergen.images.encoding import OUTPUT_FORMATS
from hypergen.model_families import PIPELINES
from hypergen.model_info import Capability, ModelDefaults, ModelInfo
from hypergen.model_store.diffusers_layout import pipeline_class_of
from hypergen.model_store.lora_files import name_of
from hypergen.model_store.model_arguments import ModelSamplers, clip_layers, samplers_of, too_many_layers
from hypergen.model_store.pipeline_arguments import call_arguments
from hypergen.sampler_names import SAMPLERS
from hypergen.served_model import ServedModel

_NEEDED_CAPABILITIES: dict[str, Capability] = {
    "negative_prompt": "negative_prompt",
    "prompt_2": "prompt_2",
    "negative_prompt_2": "prompt_2",
    "enable_refiner": "enable_refiner",
}
_FORMATS = {
    ".jpeg": "jpeg",
    **{f".{file_format.extension}": name for name, file_format in OUTPUT_FORMATS.items()},
}


def generate_files(
    settings: Settings, model: ServedModel, options: dict[str, Any], output: Path
) -> list[tuple[Path, int]]:
    """Generate the images of one request; returns their files and seeds.

    Args:
        options: fields of an OpenAI request; None means not given.

    Raises:
        ConfigurationError: a file cannot be written.
        RequestError: an option is invalid for this model, or the generation failed.
        ModelError: the model cannot be loaded.
    """
    images = asyncio.run(_generate(settings, model, _body(options, output)))
    files: list[tuple[Path, int]] = []
    for image in images:
        file = output if len(images) == 1 else output.with_stem(f"{output.stem}-{image.index}")
        try:
            file.write_bytes(image.data)
        except OSError as error:
            raise ConfigurationError(f"{file} cannot be written: {error.strerror}.") from None
        files.append((file, image.seed))
    return files


def check_request(settings: Settings, model: CheckedModel, options: dict[str, Any], output: Path) -> None:
    """Check options as far as that is possible before the model is loaded.

    Args:
        options, output: as for `generate_files`.

    Raises:
        ConfigurationError: a file cannot be written to `output`, or a LoRA is unknown.
        InvalidRequestError: an option is invalid.
    """
    if output.suffix.lower() not in _FORMATS:
        raise ConfigurationError(
            f"The extension of --output {output.name} must be one of {', '.join(sorted(_FORMATS))}."
        )
    if not output.parent.is_dir():
        raise ConfigurationError(f"--output {output}: no such folder: {output.parent}.")
    if not os.access(output if output.exists() else output.parent, os.W_OK):
        raise ConfigurationError(f"--output {output} cannot be written.")
    info = _expected_info(model, options.get("loras") or {})
    for name in options.get("loras") or {}:
        if name_of(name, info.loras, info.lora_folders) is None:
            offered = ", ".join(sorted(info.loras)) or "none"
            raise ConfigurationError(
                f"--lora {name}: no such file, and no LoRA of the model; it has {offered}."
            )
    body = _body(options, output)
    _refuse_unsupported(body, info)
    request = openai_images.to_request(body, info, settings.server, uuid.uuid4().hex).generation
    layers = None if model.folder is None else clip_layers(model.folder)
    if layers is not None and request.clip_skip is not None and request.clip_skip > layers:
        raise InvalidRequestError(f"'clip_skip' {too_many_layers(layers)}", param="clip_skip")


def _expected_info(model: CheckedModel, loras: Iterable[str]) -> ModelInfo:
    """What is known of a model before it is loaded. What is unknown is the most that a model could support.

    Args:
        loras: names of LoRAs, which a model that is not downloaded yet may have.
    """
    pipeline_class = "" if model.folder is None else pipeline_class_of(model.folder, model.name)
    spec = PIPELINES.get(pipeline_class)
    samplers = ModelSamplers(SAMPLERS, 1)
    if model.folder is not None:
        samplers = samplers_of(model.folder, model.entry.options)
    # No sampler needs more than two steps.
    smallest = ModelDefaults(num_inference_steps=2, guidance_scale=1, width=64, height=64)
    return ModelInfo(
        id=model.name,
        family=spec.name if spec else pipeline_class,
        defaults=replace(smallest, **model.entry.defaults.model_dump(exclude_none=True)),
        samplers={name: info.min_steps for name, info in samplers.samplers.items()},
        min_steps=samplers.min_steps,
        device="",
        dtype="",
        capabilities=_expected_capabilities(model, pipeline_class),
        loras=(*model.registry.files, *(() if model.on_this_machine else loras)),
        lora_folders=tuple(map(str, model.registry.folders)),
        default_lora=model.registry.default,
        max_loras=model.engine.max_loras,
        schedules={name: info.schedules for name, info in samplers.samplers.items()},
    )


def _expected_capabilities(model: CheckedModel, pipeline_class: str) -> frozenset[Capability]:
    if (spec := PIPELINES.get(pipeline_class)) is not None:
        has_refiner = model.entry.refiner or model.engine.refiner
        return frozenset(spec.capabilities) | frozenset[Capability](["enable_refiner"] if has_refiner else [])
    arguments = call_arguments(pipeline_class) if pipeline_class else []
    every: tuple[Capability, ...] = get_args(Capability)
    return frozenset() if arguments and "negative_prompt" not in arguments else frozenset(every)


def _body(options: dict[str, Any], output: Path) -> dict[str, Any]:
    """The fields of an OpenAI request."""
    given = {name: value for name, value in options.items() if value is not None}
    return given | {"output_format": _FORMATS[output.suffix.lower()]}


async def _generate(settings: Settings, model: ServedModel, body: dict[str, Any]) -> list[ImageFinished]:
    pool = EnginePool(settings, accelerators=find_accelerators(settings.engine)[:1])
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("loading", total=None)
        try:
            await pool.start([model])
            model_info = await _wait_until_loaded(pool)
            _refuse_unsupported(body, model_info)
            request = openai_images.to_request(body, model_info, settings.server, uuid.uuid4().hex).generation
            images: list[ImageFinished] = []
            async for event in await pool.submit(request):
                if isinstance(event, events.Progress):
                    progress.update(task, description="generating", completed=event.step, total=event.steps)
                elif isinstance(event, ImageFinished):
                    images.append(event)
            return sorted(images, key=lambda image: image.index)
        finally:
            await pool.stop()


def _refuse_unsupported(body: dict[str, Any], model_info: ModelInfo) -> None:
    """Refuse what the API would ignore: it would be another image than the one that the options describe."""
    for name, capability in _NEEDED_CAPABILITIES.items():
        if body.get(name):
            check_capability(capability, name, model_info)


async def _wait_until_loaded(pool: EnginePool) -> ModelInfo:
    while (model_info := pool.model_info()) is None:
        status = pool.status()
        if status.state == "failed":
            raise ModelError(f"The model could not be loaded: {status.reason}")
        await asyncio.sleep(0.02)
    return model_info


def with_lora_files(settings: Settings, given: tuple[str, ...]) -> tuple[Settings, dict[str, float]]:
    """The settings with the LoRA files given by path, and the LoRAs of the request: name -> weight."""
    weights: dict[str, float] = {}
    files = list(settings.engine.lora)
    for text in given:
        name, colon, weight = text.rpartition(":")
        try:
            name, scale = (name, float(weight)) if colon else (text, 1.0)
        except ValueError:
            name, scale = text, 1.0
        path = Path(name).expanduser()
        if path.suffix == ".safetensors" and path.is_file():
            name = path.stem
            files.append(f"{name}={path}")
        weights[name] = scale
    engine = settings.engine.model_copy(update={"lora": tuple(files)})
    return settings.model_copy(update={"engine": engine}), weights
