"""Any other text-to-image pipeline of diffusers: runs as a full pipeline, with a callback after each step."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from hypergen.denoising.offload import device_of
from hypergen.errors import ModelError
from hypergen.model_info import ModelDefaults, ModelInfo
from hypergen.models.resolution import round_up
from hypergen.request import GenerationRequest

# Most pipelines need sides that are a multiple of 16 or 32.
_MULTIPLE = 32
_NATIVE_SIDE = 1024
_REQUIRED = ("prompt", "num_inference_steps", "generator")


def require_text_to_image(pipeline_class: Any) -> None:
    """
    Raises:
        ModelError: a pipeline class does not generate an image from a prompt alone.
    """
    parameters = inspect.signature(pipeline_class.__call__).parameters
    missing = [name for name in _REQUIRED if name not in parameters]
    extra = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        and name not in ("self", "prompt")
    ]
    if missing or extra:
        reason = f"has no argument '{missing[0]}'" if missing else f"also needs '{extra[0]}'"
        raise ModelError(f"{pipeline_class.__name__} is not a text-to-image pipeline: it {reason}.")


class DiffusersPipeline:
    """A diffusers pipeline without step-level batching.

    Args:
        model_card: the model's `hypergen.json`, see `StableDiffusion`.

    Attributes:
        min_steps: fewest steps that worked during warmup.

    Raises:
        ModelError: the pipeline is not text-to-image.
    """

    def __init__(self, pipeline: Any, model_card: dict[str, Any]) -> None:
        self.pipeline = pipeline
        self.model_card = model_card
        self.min_steps = 1
        self.parameters = inspect.signature(pipeline.__call__).parameters
        self.name = type(pipeline).__name__
        require_text_to_image(type(pipeline))
        pipeline.set_progress_bar_config(disable=True)
        # The scale of classifier-free guidance; FLUX and others also have a distilled `guidance_scale`.
        self._scale = next((n for n in ("true_cfg_scale", "guidance_scale") if n in self.parameters), None)

    @property
    def device(self) -> torch.device:
        """The device that it runs on, even while its networks are offloaded."""
        denoiser = getattr(self.pipeline, "unet", None) or getattr(self.pipeline, "transformer", None)
        return self.pipeline.device if denoiser is None else device_of(denoiser)

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """All networks that are in memory."""
        return tuple(part for part in self.pipeline.components.values() if isinstance(part, nn.Module))

    def model_info(self, model_id: str) -> ModelInfo:
        defaults = {
            "num_inference_steps": self._default("num_inference_steps", 50),
            "guidance_scale": max(1.0, float(self._default(self._scale, 1.0))),
            "width": self._default("width", self._native_side()),
            "height": self._default("height", self._native_side()),
        }
        return ModelInfo(
            id=model_id,
            family=self.name,
            defaults=ModelDefaults(**{**defaults, **self.model_card.get("defaults", {})}),
            samplers={},
            min_steps=self.min_steps,
            device=self.device.type,
            dtype=str(self.pipeline.dtype).removeprefix("torch."),
            capabilities=frozenset(["negative_prompt"] if "negative_prompt" in self.parameters else []),
        )

    def generate(self, request: GenerationRequest, index: int, on_step: Callable[[int], None]) -> np.ndarray:
        """Generate image `index` of a request: uint8, shape (height, width, 3) at the generation size.

        Args:
            on_step: called with the number of finished steps; an exception in it ends the generation.
        """
        arguments: dict[str, Any] = {
            "prompt": request.prompt,
            "num_inference_steps": request.num_inference_steps,
            "generator": torch.Generator("cpu").manual_seed(request.seed + index),
            "width": round_up(request.width, _MULTIPLE),
            "height": round_up(request.height, _MULTIPLE),
            "output_type": "pil",
            # Otherwise some pipelines generate a size of their own and resize.
            "use_resolution_binning": False,
            "clean_caption": False,  # otherwise some lower-case the prompt and remove URLs
            **self._callbacks(on_step),
        }
        if self._scale:
            arguments[self._scale] = request.guidance_scale
        if request.negative_prompt:
            arguments["negative_prompt"] = request.negative_prompt
        known = {name: value for name, value in arguments.items() if name in self.parameters}
        return np.asarray(self.pipeline(**known).images[0].convert("RGB"))

    def count_tokens(self, text: str) -> int:
        """Number of tokens by the model's tokenizer; 0 if it has none."""
        tokenizer: Any = getattr(self.pipeline, "tokenizer", None)
        return len(tokenizer(text, add_special_tokens=False).input_ids) if tokenizer is not None else 0

    def _default(self, name: str | None, fallback: Any) -> Any:
        parameter = self.parameters.get(name or "")
        if parameter is None or parameter.default in (None, parameter.empty):
            return fallback
        return parameter.default

    def _native_side(self) -> int:
        """In pixels; older pipelines know it."""
        latent_side = getattr(self.pipeline, "default_sample_size", None)
        if not isinstance(latent_side, int):
            return _NATIVE_SIDE
        return latent_side * getattr(self.pipeline, "vae_scale_factor", 8)

    def _callbacks(self, on_step: Callable[[int], None]) -> dict[str, Any]:
        """The step callback, under the name of the pipeline's argument."""

        def after_step(_pipeline: Any, step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            on_step(step + 1)
            return values

        def after_step_legacy(step: int, _timestep: Any, _latents: Any) -> None:
            on_step(step + 1)

        if "callback_on_step_end" in self.parameters:
            return {"callback_on_step_end": after_step}
        return {"callback": after_step_legacy}
