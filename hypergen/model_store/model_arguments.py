"""Arguments that a model does not have, found in its configurations without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hypergen.errors import SettingError
from hypergen.model_families import PIPELINES
from hypergen.model_store.checkpoint_file import is_edm_checkpoint, options_of
from hypergen.model_store.diffusers_layout import (
    PIPELINE_FILE,
    pipeline_class_of,
    read_components,
    read_json,
)
from hypergen.sampler_names import (
    EDM_SAMPLERS,
    FLOW_SAMPLERS,
    SAMPLERS,
    SamplerInfo,
    find_info,
    unknown_scheduler,
)
from hypergen.served_model_config import ModelOptions

_CLIP_LAYERS = 12  # the default of transformers


@dataclass(frozen=True)
class ModelSamplers:
    """
    Attributes:
        samplers: empty: requests cannot choose one.
        min_steps: of requests without a sampler.
    """

    samplers: Mapping[str, SamplerInfo]
    min_steps: int


def samplers_of(folder: Path, options: ModelOptions) -> ModelSamplers:
    """The samplers of the model in a folder, as `SchedulerFactory` has them.

    Args:
        options: of its served-model file.

    Raises:
        ModelError: a file is damaged.
        SettingError: the model lacks the sampler of the options.
    """
    model = str(folder)
    published = _scheduler_class(folder)
    if pipeline_class_of(folder, model) not in PIPELINES:
        return ModelSamplers({}, _min_steps(published, ModelOptions()))
    name = options.scheduler
    options = options_of(folder, options)
    samplers, min_steps = SAMPLERS, 1
    if published.startswith("FlowMatch"):
        samplers = FLOW_SAMPLERS
    elif is_edm_model(folder):
        samplers = EDM_SAMPLERS
    else:
        min_steps = _min_steps(published, options)
        if _has_zero_terminal_snr(folder, options):
            samplers = {name: info for name, info in SAMPLERS.items() if info.zero_terminal_snr}
    if name is None:
        return ModelSamplers(samplers, min_steps)
    if (default := find_info(samplers, name)) is None:
        raise SettingError("scheduler", unknown_scheduler(name, samplers))
    return ModelSamplers(samplers, default.min_steps)


def is_edm_model(folder: Path) -> bool:
    """Whether a model has EDM's preconditioning, by its scheduler or its checkpoint file."""
    return _scheduler_class(folder).startswith("EDM") or is_edm_checkpoint(folder)


def _scheduler_class(folder: Path) -> str:
    return read_components(folder / PIPELINE_FILE, str(folder)).get("scheduler", "")


def _min_steps(published: str, options: ModelOptions) -> int:
    """The fewest steps of the model's own scheduler, which options that it lacks replace by Euler's."""
    own = [info for info in SAMPLERS.values() if info.scheduler == published]
    is_replaced = any(
        (options.zero_terminal_snr is not None and not info.zero_terminal_snr)
        or ((options.timestep_spacing or options.zero_terminal_snr) and "normal" not in info.schedules)
        for info in own
    )
    return 1 if is_replaced else max((info.min_steps for info in own), default=1)


def _has_zero_terminal_snr(folder: Path, options: ModelOptions) -> bool:
    if options.zero_terminal_snr is not None:
        return options.zero_terminal_snr
    name = "scheduler/scheduler_config.json"
    return bool(read_json(folder / name, str(folder), name).get("rescale_betas_zero_snr"))


def clip_layers(folder: Path) -> int | None:
    """The fewest layers of the model's text encoders; None: `clip_skip` does not apply to it."""
    model = str(folder)
    spec = PIPELINES.get(pipeline_class_of(folder, model))
    if spec is None or "clip_skip" not in spec.capabilities:
        return None
    components = read_components(folder / PIPELINE_FILE, model)
    files = [f"{name}/config.json" for name in ("text_encoder", "text_encoder_2") if name in components]
    return min(read_json(folder / file, model, file).get("num_hidden_layers", _CLIP_LAYERS) for file in files)


def too_many_layers(layers: int) -> str:
    return f"must be at most {layers}, the number of layers of this model's text encoder."


def check_options(folder: Path, options: ModelOptions) -> None:
    """
    Args:
        options: of its served-model file.

    Raises:
        SettingError: the model lacks the sampler or the layer of CLIP.
    """
    pipeline_class = pipeline_class_of(folder, str(folder))
    spec = PIPELINES.get(pipeline_class)
    if spec is None and options.scheduler is not None:
        raise SettingError(
            "scheduler", f"does not apply to a {pipeline_class}, which runs as a full diffusers pipeline."
        )
    samplers_of(folder, options)
    if (clip_skip := options_of(folder, options).clip_skip) is None:
        return
    if (layers := clip_layers(folder)) is None:
        name = spec.name if spec else pipeline_class
        raise SettingError("clip_skip", f"does not apply to models of {name}.")
    if clip_skip > layers:
        raise SettingError("clip_skip", too_many_layers(layers))
