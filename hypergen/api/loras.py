"""LoRAs of a request: from what a client names to names that the engine knows."""

from __future__ import annotations

from collections.abc import Mapping

from hypergen.errors import InvalidRequestError
from hypergen.model_info import ModelInfo
from hypergen.model_store.lora_files import NOT_OFFERED, name_of


def resolve_loras(
    weights: Mapping[str, float], description: ModelInfo, param: str
) -> tuple[tuple[str, float], ...]:
    """Names and weights as a `GenerationRequest` has them: sorted, so that the same LoRAs are summed in the
    same order however they were written; weight 0 is the base model and left out.

    Args:
        weights: name, or path inside a LoRA folder, to weight; already in range.
        param: the client's field, for errors.

    Raises:
        InvalidRequestError: one is not offered, one is named twice, or there are more than the server mixes.
    """
    found: dict[str, float] = {}
    for given, weight in weights.items():
        name = name_of(given, description.loras, description.lora_folders)
        if name is None:
            raise InvalidRequestError(f"'{param}' {NOT_OFFERED}", param=param)
        if name in found:
            raise InvalidRequestError(f"'{param}' names one LoRA twice.", param=param)
        found[name] = weight
    if len(found) > description.max_loras:
        raise InvalidRequestError(
            f"'{param}' has {len(found)} LoRAs; this server mixes {description.max_loras}.", param=param
        )
    return tuple(sorted((name, float(weight)) for name, weight in found.items() if weight != 0))
