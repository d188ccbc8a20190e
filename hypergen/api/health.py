"""The body of /health: the state of the server, its queue, its models and its engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from hypergen.engine_protocol import ImageGenerator
from hypergen.events import EngineStatus, ServerStatus
from hypergen.model_info import ModelInfo
from hypergen.served_model import ServedModel


def health_body(
    generator: ImageGenerator, status: ServerStatus, models: Sequence[ServedModel], device: str
) -> dict[str, Any]:
    """What /health answers.

    Args:
        device: the one in the settings, told until an engine has chosen.
    """
    return {
        "status": "healthy" if status.state == "ready" else status.state,
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


def _model(model: ServedModel, info: ModelInfo | None, status: ServerStatus) -> dict[str, Any]:
    return {
        "id": model.id,
        "aliases": list(model.aliases),
        "family": info.family if info else None,
        "in_memory": any(model.id in engine.models for engine in status.engines),
        **_capabilities(info),
    }


def _capabilities(info: ModelInfo | None) -> dict[str, Any]:
    """What requests to a model may use; empty until it is loaded."""
    return {
        "samplers": list(info.samplers) if info else [],
        "options": sorted(info.capabilities) if info else [],
        "loras": list(info.loras) if info else [],
        "control_models": list(info.controlnets) if info else [],
    }


def _engine(engine: EngineStatus) -> dict[str, Any]:
    images_per_forward = round(engine.image_steps / engine.forwards, 3) if engine.forwards else None
    return {**asdict(engine), "images_per_forward": images_per_forward}
