"""`hypergen generate`: one engine for one request, with a progress bar, without a server."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hypergen import events
from hypergen.api.dialects import openai_images
from hypergen.api.validation import check_capability
from hypergen.config import Settings
from hypergen.engine_client.pool import EnginePool
from hypergen.errors import ConfigurationError, ModelError
from hypergen.events import ImageFinished
from hypergen.images.encoding import OUTPUT_FORMATS
from hypergen.model_info import Capability, ModelInfo
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
        ConfigurationError: the extension of `output` is no known format.
        InvalidRequestError: an option is invalid.
        ModelError: the model cannot be loaded.
    """
    if output.suffix.lower() not in _FORMATS:
        raise ConfigurationError(
            f"The extension of {output.name} must be one of {', '.join(sorted(_FORMATS))}."
        )
    body = {name: value for name, value in options.items() if value is not None}
    body["output_format"] = _FORMATS[output.suffix.lower()]
    images = asyncio.run(_generate(settings, model, body))
    output.parent.mkdir(parents=True, exist_ok=True)
    files: list[tuple[Path, int]] = []
    for image in images:
        file = output if len(images) == 1 else output.with_stem(f"{output.stem}-{image.index}")
        file.write_bytes(image.data)
        files.append((file, image.seed))
    return files


async def _generate(settings: Settings, model: ServedModel, body: dict[str, Any]) -> list[ImageFinished]:
    pool = EnginePool(settings, accelerators=[{}])
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
