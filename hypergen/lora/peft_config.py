"""PEFT's configuration of a LoRA: in `adapter_config.json`, or in the header of diffusers' files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from hypergen.lora.factors import IncompatibleLoraError

# The key of the file's header under which diffusers stores the configuration.
_HEADER_KEY = "lora_adapter_metadata"
_TYPES = ("LORA", "LOHA", "LOKR")
# They change base weights before training, or what a layer computes.
_UNSUPPORTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_ga_config",
    "monteclora_config",
    "target_parameters",
    "use_bdlora",
    "use_qalora",
)
_UNSUPPORTED_STARTS = ("pissa", "olora", "loftq", "corda")


@dataclass(frozen=True)
class PeftConfig:
    """
    Attributes:
        networks: prefix of the layer names -> fields of PEFT's `LoraConfig`, `LoHaConfig` or `LoKrConfig`.
    """

    networks: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])

    def check(self, *, has_magnitudes: bool) -> None:
        """
        Args:
            has_magnitudes: the file has those of DoRA.

        Raises:
            IncompatibleLoraError: a field has a meaning that is not implemented.
        """
        for values in self.networks.values():
            reason = next((name for name in _UNSUPPORTED if values.get(name)), None)
            if (values.get("peft_type") or _TYPES[0]) not in _TYPES:
                reason = f"peft_type {values['peft_type']}"
            if str(values.get("init_lora_weights")).lower().startswith(_UNSUPPORTED_STARTS):
                reason = f"init_lora_weights {values['init_lora_weights']}"
            if values.get("use_dora") and not has_magnitudes:
                reason = "use_dora without magnitudes"
            if reason is not None:
                raise IncompatibleLoraError(f"has an unsupported configuration: {reason[:100]}")

    def scale(self, name: str, rank: int) -> float:
        """alpha / rank of a layer; without a configuration alpha is the rank.

        Args:
            name: of the layer in the file.

        Raises:
            IncompatibleLoraError: the configuration is for another rank.
        """
        prefix = next((prefix for prefix in self.networks if name.startswith(prefix)), None)
        if prefix is None:
            return 1.0
        values, layer = self.networks[prefix], name.removeprefix(prefix)
        given_rank = _of_layer(values.get("rank_pattern"), layer, values.get("r"))
        alpha = _of_layer(values.get("alpha_pattern"), layer, values.get("lora_alpha", values.get("alpha")))
        if values.get("peft_type") in _TYPES[1:]:
            rank = given_rank or rank
        elif given_rank is not None and given_rank != rank:
            raise IncompatibleLoraError(f"has rank {rank}, but {given_rank} in its configuration")
        if alpha is None:
            return 1.0
        return float(alpha) / (rank**0.5 if values.get("use_rslora") else rank)


def read_header(metadata: Mapping[str, str]) -> PeftConfig:
    """The configuration in the header of a file, whose fields start with the name of their network."""
    networks: dict[str, dict[str, Any]] = {}
    for key, value in json.loads(metadata.get(_HEADER_KEY) or "{}").items():
        network, _, name = key.partition(".")
        networks.setdefault(f"{network}.", {})[name] = value
    return PeftConfig(networks)


def read_json(data: bytes) -> PeftConfig:
    """The configuration in `adapter_config.json`."""
    return PeftConfig({"base_model.model.": json.loads(data)})


def _of_layer(patterns: dict[str, Any] | None, layer: str, default: Any) -> Any:
    """The value of the first pattern that matches, as in PEFT."""
    for pattern, value in (patterns or {}).items():
        with suppress(re.error):
            if re.fullmatch(rf"(.*\.)?({pattern})", layer):
                return value
    return default
