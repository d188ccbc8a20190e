"""The body of /health: the state of the server, the queue, the models and the engines."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from hypergen import __version__
from hypergen.engine_protocol import ImageGenerator
from hypergen.events import EngineStatus, ServerStatus
from hypergen.model_info import ModelInfo
from hypergen.served_model import ServedModel

_STARTED_AT = time.monotonic()


def health_body(
    generator: ImageGenerator, status: ServerStatus, models: Sequence[ServedModel], device: str
) -> dict[str, Any]:
    """The body of /health.

    Args:
        device: the setting; reported until an engine has chosen its device.
    """
    return {
        "status": "healthy" if status.state == "ready" else status.state,
        "version": __version__,
        "uptime_s": round(time.monotonic() - _STARTED_AT),
        "model": models[0].id,
        "models": [_model(model, generator.model_info(model.id), status) for model in models],
        "queue_size": status.queue_size,
        "device": next((engine.device for engine in status.engines if engine.device), device),
        "running": status.running,
        "waiting": status.waiting,
        "overflow": status.overflow,
        "reason": status.reason,
        **_capabilities(generator.model_info()),
        "engines": [_engine(engine) for engine in status.engines],
    }


def _model(model: ServedModel, model_info: ModelInfo | None, status: ServerStatus) -> dict[str, Any]:
    return {
        "id": model.id,
        "aliases": list(model.aliases),
        "family": model_info.family if model_info else None,
        "in_memory": any(model.id in engine.models for engine in status.engines),
        "embeddings": sorted(model.settings.embedding),
        **_capabilities(model_info),
    }


def _capabilities(model_info: ModelInfo | None) -> dict[str, Any]:
    """What requests may use of a model; empty until it is loaded."""
    return {
        "samplers": list(model_info.samplers) if model_info else [],
        "schedules": model_info.schedules if model_info else {},
        "options": sorted(model_info.capabilities) if model_info else [],
        "loras": list(model_info.loras) if model_info else [],
        "control_models": list(model_info.controlnets) if model_info else [],
    }


def _engine(engine: EngineStatus) -> dict[str, Any]:
    images_per_forward = round(engine.image_steps / engine.forwards, 3) if engine.forwards else None
    return {**asdict(engine), "images_per_forward": images_per_forward}
