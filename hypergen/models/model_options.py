"""Apply what a model's files state, and what its served-model file says, to a loaded pipeline."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EDMDPMSolverMultistepScheduler, EulerDiscreteScheduler
from safetensors import safe_open

from hypergen.denoising.schedulers import FLOW_SAMPLERS, ignored_field, is_edm
from hypergen.errors import ModelError, SettingError
from hypergen.model_families import FamilySpec
from hypergen.model_store.checkpoint_detection import METADATA
from hypergen.model_store.diffusers_layout import PIPELINE_FILE, safetensors_header, variant_of
from hypergen.models.checkpoint_conversion import convert
from hypergen.models.folder_accounting import account_for_component
from hypergen.models.networks import assign_weights, empty_network
from hypergen.models.single_file_loading import edm_statistics
from hypergen.models.tensor_accounting import take_account, traced
from hypergen.served_model_config import ModelOptions

_FLOW = tuple(sampler.scheduler for sampler in FLOW_SAMPLERS.values())


def apply_options(pipeline: Any, path: Path, options: ModelOptions) -> None:
    """Change the configurations of a pipeline's scheduler and VAE.

    Raises:
        SettingError: the scheduler does not support an option.
    """
    statistics = edm_statistics(path)
    if statistics:
        pipeline.vae.register_to_config(**statistics)
    scheduler = with_options(pipeline.scheduler, options, is_edm_model=bool(statistics))
    pipeline.register_modules(scheduler=scheduler)


def with_options(scheduler: Any, options: ModelOptions, *, is_edm_model: bool) -> Any:
    """The scheduler of a model with these options.

    Args:
        is_edm_model: the checkpoint file says so.

    Raises:
        SettingError: the scheduler does not support an option.
    """
    changes: dict[str, Any] = {}
    if options.prediction_type is not None:
        changes["prediction_type"] = options.prediction_type
    if options.zero_terminal_snr is not None:
        changes["rescale_betas_zero_snr"] = options.zero_terminal_snr
        if options.zero_terminal_snr:  # the last timestep is the only one without signal
            changes["timestep_spacing"] = "trailing"
    if options.timestep_spacing is not None:
        changes["timestep_spacing"] = options.timestep_spacing
    if is_edm_model and not is_edm(scheduler):
        scheduler = EDMDPMSolverMultistepScheduler()
    return _changed(scheduler, changes) if changes else scheduler


def _changed(scheduler: Any, changes: dict[str, Any]) -> Any:
    if isinstance(scheduler, _FLOW):
        raise SettingError(_option(next(iter(changes))), "does not apply to flow matching models.")
    config = {**scheduler.config, **changes}
    if config.get("rescale_betas_zero_snr") and config.get("prediction_type", "epsilon") == "epsilon":
        if "rescale_betas_zero_snr" not in changes:
            raise SettingError("prediction_type", "must be v_prediction for a model with zero terminal SNR.")
        raise SettingError(
            "zero_terminal_snr", "needs prediction_type v_prediction: noise alone tells nothing."
        )
    classes = [type(scheduler)] if is_edm(scheduler) else [type(scheduler), EulerDiscreteScheduler]
    for scheduler_class in classes:
        known = inspect.signature(scheduler_class.__init__).parameters
        if all(name in known for name in changes):
            # As arguments: from_config drops changes of fields that the model's file leaves out.
            return scheduler_class.from_config(scheduler.config, **changes)
    raise SettingError(_option(next(iter(changes))), f"does not apply to {type(scheduler).__name__}.")


def _option(field: str) -> str:
    return "zero_terminal_snr" if field == "rescale_betas_zero_snr" else field


def check_configurations(path: Path, spec: FamilySpec, scheduler: Any, vae_class: Any) -> None:
    """Refuse fields of a model's configurations that its family would ignore.

    Raises:
        ModelError: names the first one.
    """
    index = json.loads((path / PIPELINE_FILE).read_bytes())
    if index.get("requires_aesthetics_score"):
        raise ModelError(
            f"{PIPELINE_FILE} has requires_aesthetics_score, which only refiners may have (--refiner)."
        )
    if isinstance(scheduler, _FLOW) != (spec.name in ("flux", "sd3")):
        raise ModelError(f"Models of {spec.name} cannot use the scheduler {type(scheduler).__name__}.")
    if (field := ignored_field(type(scheduler), scheduler.config)) is not None:
        raise ModelError(
            f"scheduler/scheduler_config.json has {field}, which {type(scheduler).__name__} does not have; "
            "change its _class_name, for example to EulerDiscreteScheduler."
        )
    _try_step(scheduler)
    if not issubclass(vae_class, AutoencoderKL):
        raise ModelError(f"The VAE is an {vae_class.__name__}; only AutoencoderKL is supported.")
    if not (path / "vae/config.json").is_file():
        return
    config = json.loads((path / "vae/config.json").read_bytes())
    known = inspect.signature(AutoencoderKL.__init__).parameters
    for field, value in config.items():
        if field not in known and not field.startswith("_") and value is not None:
            raise ModelError(f"vae/config.json has {field}, which AutoencoderKL does not have.")


def _try_step(scheduler: Any) -> None:
    """Schedulers raise for some values of their configuration only in a step."""
    scheduler = type(scheduler).from_config(scheduler.config)
    latents = torch.zeros(1, 4, 8, 8)
    try:
        scheduler.set_timesteps(2, **({"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}))
        scheduler.step(latents, scheduler.timesteps[0], latents)
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"scheduler/scheduler_config.json cannot be used: {reason}") from None


def check_vae_channels(source: Path, path: Path) -> None:
    """
    Args:
        source: the folder of another VAE for the model in `path`.

    Raises:
        ModelError: its latents have another number of channels.
    """
    networks: Any = (empty_network(folder, AutoencoderKL) for folder in (source, path / "vae"))
    its, ours = (network.config.latent_channels for network in networks)
    if its != ours:
        raise ModelError(f"The VAE is for another model: its latents have {its} channels instead of {ours}.")


def check_vae(source: Path, path: Path) -> None:
    """
    Args:
        source: another VAE for the model in `path`, see `load_vae`.

    Raises:
        ModelError: its tensors do not fit; names the first one.
    """
    if source.is_dir():
        check_vae_channels(source, path)
        if fault := account_for_component(source, AutoencoderKL, "vae").fault:
            raise ModelError(f"{source}: {fault}")
        return
    network = empty_network(path / "vae", AutoencoderKL)
    header: dict[str, Any] = json.loads(safetensors_header(source, str(source.parent), source.name))
    header.pop(METADATA, None)
    try:
        converted = convert(network, traced(header, header), "", torch.float32)
        fault = take_account(header, {"vae": (network, converted)}).fault
    except ModelError as error:
        fault = str(error)
    if fault:
        raise ModelError(f"{source.name} is not a VAE for this model: {fault}")


def load_vae(source: Path, path: Path, dtype: torch.dtype, device: torch.device | None = None) -> Any:
    """Another VAE for the model in `path`.

    Args:
        source: a folder with config.json, or a .safetensors file in the layout of diffusers or of the
            original code.
        device: where to load the weights, tensor by tensor; None: the CPU.

    Raises:
        ModelError: see `check_vae`.
    """
    check_vae(source, path)
    if source.is_dir():
        return AutoencoderKL.from_pretrained(
            source,
            dtype=dtype,
            device_map=device and device.type,
            variant=variant_of(source),
            use_safetensors=True,
            local_files_only=True,
        )
    network = empty_network(path / "vae", AutoencoderKL)
    with safe_open(source, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    assign_weights(network, convert(network, tensors, "", dtype), dtype, device)
    return network
