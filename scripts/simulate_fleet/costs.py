"""What a model costs: seconds of a forward pass by batch size, and of an image's encoding and decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator

from hypergen.errors import ConfigurationError

_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Share = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Model(BaseModel, frozen=True, extra="forbid"):
    """One model of the traffic; `assumed.yaml` says what the fields are."""

    share: _Share
    steps: dict[Annotated[int, Field(ge=1)], _Share] = Field(min_length=1)
    step_s: dict[Annotated[int, Field(ge=1)], Annotated[float, Field(gt=0, allow_inf_nan=False)]]
    image_s: _Seconds = 0.0

    @field_validator("step_s")
    @classmethod
    def _check_one(cls, step_s: dict[int, float]) -> dict[int, float]:
        if 1 not in step_s:
            raise ValueError("must have the seconds for 1 image")
        return dict(sorted(step_s.items()))

    def seconds_per_step(self, max_batch_size: int) -> list[float]:
        """Seconds of a forward pass of 0, 1, 2 ... images: linear between the sizes, in proportion beyond."""
        sizes, seconds = list(self.step_s), list(self.step_s.values())
        if max_batch_size > sizes[-1]:
            per_image = seconds[-1] / sizes[-1]
            sizes.append(max_batch_size)
            seconds.append(per_image * max_batch_size)
        return [0.0, *np.interp(range(1, max_batch_size + 1), sizes, seconds).tolist()]

    @property
    def extra_steps(self) -> float:
        """Encoding and decoding, as steps: both take their turn between forward passes, image by image."""
        return self.image_s / self.step_s[1]


class Traffic(BaseModel, frozen=True, extra="forbid"):
    """The models of a file such as `assumed.yaml`."""

    models: dict[str, Model] = Field(min_length=1)

    @property
    def device_s(self) -> float:
        """Mean seconds of a GPU for one request that runs alone."""
        shares = sum(model.share for model in self.models.values())
        return sum(model.share * _alone_s(model) for model in self.models.values()) / shares


def _alone_s(model: Model) -> float:
    steps = sum(count * share for count, share in model.steps.items()) / sum(model.steps.values())
    return (steps + model.extra_steps) * model.step_s[1]


def read_traffic(file: Path) -> Traffic:
    """
    Raises:
        ConfigurationError: the file cannot be read, or a value is wrong.
    """
    try:
        return Traffic.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{file} cannot be read: {error}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        raise ConfigurationError(f"{file}: '{name}': {first['msg']}.") from None
