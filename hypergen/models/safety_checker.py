"""The content filter of --safety-checker: diffusers' network, or a function of the operator."""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from hypergen.errors import ContentPolicyError, GenerationError, ModelError, SettingError
from hypergen.model_store.safety_checkers import folders_of, split_function
from hypergen.models.folder_accounting import account_for_component

# Images and their prompt -> for each image whether it is refused.
Check = Callable[[list[Image.Image], str], Sequence[bool]]


class SafetyChecker:
    """Refuses images, one at a time, in any thread."""

    def __init__(self, check: Check) -> None:
        self._check = check
        self._lock = threading.Lock()

    def check(self, image: Image.Image, prompt: str) -> None:
        """
        Raises:
            ContentPolicyError: the image is refused.
            GenerationError: the checker has no verdict, so that the image is not sent.
        """
        with self._lock:
            verdicts = list(self._check([image], prompt))
        if len(verdicts) != 1 or not isinstance(verdicts[0], (bool, np.bool_)):
            raise GenerationError("The safety checker must return one bool for each image.")
        if verdicts[0]:
            raise ContentPolicyError("The image was refused by the server's content filter.")


@functools.cache
def load_safety_checker(source: str) -> SafetyChecker:
    """One checker for all models of this process, on the CPU.

    Args:
        source: from `find_safety_checker`.

    Raises:
        SettingError: it cannot be loaded.
    """
    function = split_function(source)
    try:
        check = _function(*function) if function else _network(Path(source))
    except Exception as error:  # whatever the operator's module raises
        reason = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(".")
        raise SettingError("safety_checker", f"{source} cannot be loaded: {reason[:300]}.") from None
    return SafetyChecker(check)


def _function(module: str, name: str) -> Check:
    check = getattr(importlib.import_module(module), name)
    if not callable(check):
        raise TypeError(f"{name} is not callable")
    return cast(Check, check)


def _network(folder: Path) -> Check:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPImageProcessor

    network_folder, processor_folder = folders_of(folder)
    if fault := account_for_component(
        network_folder, StableDiffusionSafetyChecker, network_folder.name
    ).fault:
        raise ModelError(fault)
    processor: Any = CLIPImageProcessor.from_pretrained(processor_folder, local_files_only=True)
    network: Any = StableDiffusionSafetyChecker.from_pretrained(
        network_folder, use_safetensors=True, local_files_only=True, dtype=torch.float32
    )
    network.eval()

    @torch.inference_mode()
    def check(images: list[Image.Image], _prompt: str) -> list[bool]:
        inputs = processor(images, return_tensors="pt").pixel_values
        # It also replaces refused images by black ones, which are not needed.
        _, refused = network(clip_input=inputs, images=[np.zeros((1, 1, 3))] * len(images))
        return refused

    return check
