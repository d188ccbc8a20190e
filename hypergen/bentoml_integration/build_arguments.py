"""What a Bento keeps of its build: settings given as `bentoml build --arg NAME=VALUE`, and the models.

BentoML stores the arguments in bento.yaml and passes them to the service whenever it serves the Bento.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import bentoml
from _bentoml_sdk.service.factory import ServiceEnvConfig
from bentoml._internal.utils.args import set_arguments

from hypergen.errors import ConfigurationError, HyperGenError
from hypergen.served_model_config import ModelEntry

_TORCH_BACKEND = re.compile(r"cpu|xpu|cu\d+|rocm[\d.]+")
# Settings that find a model; a Bento has it by its tag.
_FIND_MODELS = {"models", "revision", "single_file_config", "refiner"}


@dataclass(frozen=True)
class BuildArguments:
    """
    Attributes:
        torch_backend: which build of torch the image gets, as uv's `--torch-backend`, for example cpu or
            cu130; None: the one of the package index.
        settings: setting -> value.
    """

    torch_backend: str | None
    settings: dict[str, Any]

    @property
    def is_for_cuda(self) -> bool:
        return (self.torch_backend or "").startswith("cu")

    def image_environment(self) -> list[ServiceEnvConfig]:
        """Variables with values: one without a value would be required to serve, also outside an image."""
        variables: list[ServiceEnvConfig] = [{"name": "BENTOML_DO_NOT_TRACK", "value": "True"}]
        if self.torch_backend:
            variables.append({"name": "UV_TORCH_BACKEND", "value": self.torch_backend})
        return variables


def read_arguments() -> BuildArguments:
    """The arguments of `bentoml build` or `bentoml serve`, or those that the Bento was built with.

    Raises:
        ConfigurationError: `torch_backend` is not one of uv's.
    """
    settings = vars(bentoml.use_arguments()).copy()
    torch_backend = settings.pop("torch_backend", None)
    if torch_backend is not None and not _TORCH_BACKEND.fullmatch(str(torch_backend)):
        raise ConfigurationError(
            f"Argument 'torch_backend' must be cpu, xpu, or a version such as cu130 or rocm7.1 "
            f"(given: {torch_backend!r})."
        )
    return BuildArguments(torch_backend, settings)


def keep_models(arguments: BuildArguments, models: Iterable[ModelEntry]) -> None:
    """Let a Bento that is being built serve these models; for a service that is served this changes nothing.

    Args:
        models: with tags as sources, because the Bento has the models in a store of its own. Other sources
            may not exist where it is served.
    """
    kept: dict[str, Any] = {
        name: value for name, value in arguments.settings.items() if name not in _FIND_MODELS
    }
    if arguments.torch_backend:
        kept["torch_backend"] = arguments.torch_backend
    kept["models"] = [model.model_dump(mode="json", exclude_defaults=True) for model in models]
    set_arguments(kept)


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """End the process with the message of an error in the settings or models, without a traceback."""
    try:
        yield
    except HyperGenError as error:
        sys.exit(f"Error: {error}")
