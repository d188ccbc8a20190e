"""Any other text-to-image pipeline of diffusers: called whole, with a look in after every step."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from hypergen.denoising.offload import device_of
from hypergen.errors import ModelError
from hypergen.model_info import ModelDefaults, ModelInfo
from hypergen.models.resolution import round_up
from hypergen.request import GenerationRequest

# What every such pipeline can be arguments for; most want sides that are a multiple of 16 or 32.
_MULTIPLE = 32
_NATIVE_SIDE = 1024
_NEEDED = ("prompt", "num_inference_steps", "generator")


class DiffusersPipeline:
    """A pipeline as diffusers made it.

    Args:
        model_card: what the diffusers files cannot say about a model, see `StableDiffusion`.

    Attributes:
        min_steps: the fewest that it can do, as far as was tried.

    Raises:
        ModelError: this pipeline does not draw from a prompt alone.
    """

    def __init__(self, pipeline: Any, model_card: dict[str, Any]) -> None:
        self.pipeline = pipeline
        self.model_card = model_card
        self.min_steps = 1
        self.parameters = inspect.signature(pipeline.__call__).parameters
        self.name = type(pipeline).__name__
        missing = [name for name in _NEEDED if name not in self.parameters]
        wanted = [
            name
            for name, parameter in self.parameters.items()
            if parameter.default is parameter.empty
            and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
            and name != "prompt"
        ]
        if missing or wanted:
            lacks = f"takes no {missing[0]}" if missing else f"also wants {wanted[0]}"
            raise ModelError(f"It is a {self.name}, which {lacks}: no text-to-image pipeline.")
        pipeline.set_progress_bar_config(disable=True)
        # A negative prompt and its scale: some models have a scale of another kind besides.
        self._scale = next((n for n in ("true_cfg_scale", "guidance_scale") if n in self.parameters), None)

    @property
    def device(self) -> torch.device:
        """Where it draws, even if its parts wait elsewhere."""
        denoiser = getattr(self.pipeline, "unet", None) or getattr(self.pipeline, "transformer", None)
        return self.pipeline.device if denoiser is None else device_of(denoiser)

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
        """Image `index` of a request: uint8, shape (drawn height, drawn width, 3).

        Args:
            on_step: told the number of steps that are done; what it raises ends the drawing.
        """
        arguments: dict[str, Any] = {
            "prompt": request.prompt,
            "num_inference_steps": request.num_inference_steps,
            "generator": torch.Generator("cpu").manual_seed(request.seed + index),
            "width": round_up(request.width, _MULTIPLE),
            "height": round_up(request.height, _MULTIPLE),
            "output_type": "pil",
            # Some would draw another size that they know better, and resize.
            "use_resolution_binning": False,
            "clean_caption": False,  # or lower-case the prompt and cut addresses out of it
            **self._callbacks(on_step),
        }
        if self._scale:
            arguments[self._scale] = request.guidance_scale
        if request.negative_prompt:
            arguments["negative_prompt"] = request.negative_prompt
        known = {name: value for name, value in arguments.items() if name in self.parameters}
        return np.asarray(self.pipeline(**known).images[0].convert("RGB"))

    def count_tokens(self, text: str) -> int:
        """Tokens of a text as the model's own tokenizer counts them; 0 if it has none."""
        tokenizer: Any = getattr(self.pipeline, "tokenizer", None)
        return len(tokenizer(text, add_special_tokens=False).input_ids) if tokenizer is not None else 0

    def _default(self, name: str | None, otherwise: Any) -> Any:
        parameter = self.parameters.get(name or "")
        return (
            otherwise
            if parameter is None or parameter.default in (None, parameter.empty)
            else parameter.default
        )

    def _native_side(self) -> int:
        """In pixels, where the pipeline knows it as all older ones do."""
        latent_side = getattr(self.pipeline, "default_sample_size", None)
        if not isinstance(latent_side, int):
            return _NATIVE_SIDE
        return latent_side * getattr(self.pipeline, "vae_scale_factor", 8)

    def _callbacks(self, on_step: Callable[[int], None]) -> dict[str, Any]:
        """The callback under the name that the pipeline has for it."""

        def after_step(_pipeline: Any, step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            on_step(step + 1)
            return values

        def after_old_step(step: int, _timestep: Any, _latents: Any) -> None:
            on_step(step + 1)

        if "callback_on_step_end" in self.parameters:
            return {"callback_on_step_end": after_step}
        return {"callback": after_old_step}
