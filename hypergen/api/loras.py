"""LoRAs of a request: resolves the names and paths of a client to names of the registry."""

from __future__ import annotations

from collections.abc import Mapping

from hypergen.errors import InvalidRequestError
from hypergen.model_info import ModelInfo
from hypergen.model_store.lora_files import NOT_OFFERED, name_of


def resolve_loras(
    weights: Mapping[str, float], model_info: ModelInfo, param: str
) -> tuple[tuple[str, float], ...]:
    """Names and weights for a `GenerationRequest`, without LoRAs of weight 0.

    They are sorted by name, so that the order in the request does not change the sum.

    Args:
        weights: name, or path inside a LoRA folder, to a weight in range.
        param: the client's field, for errors.

    Raises:
        InvalidRequestError: a LoRA is not offered or named twice, or there are too many.
    """
    found: dict[str, float] = {}
    for name_or_path, weight in weights.items():
        name = name_of(name_or_path, model_info.loras, model_info.lora_folders)
        if name is None:
            raise InvalidRequestError(f"'{param}' {NOT_OFFERED}", param=param)
        if name in found:
            raise InvalidRequestError(f"'{param}' names a LoRA twice.", param=param)
        found[name] = weight
    if len(found) > model_info.max_loras:
        raise InvalidRequestError(
            f"'{param}' has {len(found)} LoRAs; at most {model_info.max_loras} can be combined.", param=param
        )
    return tuple(sorted((name, float(weight)) for name, weight in found.items() if weight != 0))
