"""The body of /health: the state of the server, the queue, the models and the engines."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from hypergen import __version__
from hypergen.api.validation import default_size
from hypergen.config import ServerSettings, Settings
from hypergen.device_names import device_type
from hypergen.engine_protocol import ImageGenerator
from hypergen.events import EngineStatus, ServerStatus
from hypergen.model_info import ModelInfo
from hypergen.served_model import ServedModel

_STARTED_AT = time.monotonic()


def health_body(
    generator: ImageGenerator, status: ServerStatus, models: Sequence[ServedModel], settings: Settings
) -> dict[str, Any]:
    """The body of /health; `device` is the setting until an engine has chosen one."""
    devices = (engine.device for engine in status.engines if engine.device)
    return {
        "status": "healthy" if status.state == "ready" else status.state,
        "version": __version__,
        "uptime_s": round(time.monotonic() - _STARTED_AT),
        "model": models[0].id,
        "models": [
            _model(model, generator.model_info(model.id), status, settings.server) for model in models
        ],
        "queue_size": status.queue_size,
        "device": next(map(device_type, devices), settings.engine.device_type or "auto"),
        "running": status.running,
        "waiting": status.waiting,
        "overflow": status.overflow,
        "reason": status.reason,
        **_capabilities(generator.model_info()),
        "limits": _limits(settings.server),
        "engines": [_engine(engine) for engine in status.engines],
    }


def _model(
    model: ServedModel, model_info: ModelInfo | None, status: ServerStatus, server: ServerSettings
) -> dict[str, Any]:
    return {
        "id": model.id,
        "aliases": list(model.aliases),
        "family": model_info.family if model_info else None,
        "in_memory": any(model.id in engine.models for engine in status.engines),
        "defaults": _defaults(model_info, server) if model_info else {},
        "max_loras": model_info.max_loras if model_info else 0,
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


def _defaults(model_info: ModelInfo, server: ServerSettings) -> dict[str, Any]:
    """The values of the fields that a request leaves out, under the names of the fields."""
    width, height = default_size(model_info, server.max_side)
    return {
        "size": f"{width}x{height}",
        "num_inference_steps": min(model_info.defaults.num_inference_steps, server.max_steps),
        "guidance_scale": model_info.defaults.guidance_scale,
        "lora_path": model_info.default_lora,
    }


def _limits(server: ServerSettings) -> dict[str, float]:
    """The limits on a request, under the names of the settings."""
    return {
        "max_side": server.max_side,
        "max_steps": server.max_steps,
        "max_megapixel_steps": server.max_megapixel_steps,
        "max_body_mb": server.max_body_mb,
    }


def _engine(engine: EngineStatus) -> dict[str, Any]:
    images_per_forward = round(engine.image_steps / engine.forwards, 3) if engine.forwards else None
    return {**asdict(engine), "images_per_forward": images_per_forward}
