"""CUDA graphs of the denoiser's forward pass, with ControlNets and LoRAs."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from dataclasses import replace

from torch import Tensor

from hypergen.config import EngineSettings
from hypergen.denoising.denoising_state import ModelInputs
from hypergen.engine.cuda_graphs import CudaGraphs, Inputs
from hypergen.lora.accelerator_batch import AcceleratorLoraBatch, RowWeights
from hypergen.lora.batched_lora import Loras
from hypergen.lora.weights import Lora
from hypergen.models.family import Family

# Before the names of a batch's `RowWeights` among the inputs of its graph.
_LORA = "lora_"


def uses_graphs(family: Family, settings: EngineSettings) -> bool:
    """Whether forward passes run as CUDA graphs; offloaded networks have no fixed addresses."""
    return family.device.type == "cuda" and settings.cuda_graphs and settings.offload == "off"


class ForwardGraphs:
    """Runs forward passes as CUDA graphs, one for each shape, row count, ControlNet and layout of LoRAs.

    The output is overwritten by the next forward pass. Belongs to the engine's thread.

    Args:
        what: runs, for the log.
    """

    def __init__(self, family: Family, what: str = "The forward pass") -> None:
        self._family = family
        self._graphs: CudaGraphs[Tensor] = CudaGraphs(what)

    def clear(self) -> None:
        """Free the memory of all graphs."""
        self._graphs.clear()

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        inputs: ModelInputs,
        batch_key_extra: tuple[Hashable, ...] = (),
        loras: Sequence[Loras] = (),
    ) -> Tensor:
        """See `Family.forward`.

        Args:
            loras: of each row. A batch runs eagerly if a LoRA is not plain, or if not all fit into slots.
        """
        manager = self._family.lora_manager
        batch = None if manager is None else manager.make_batch(loras)
        slots: list[Lora] | None = []
        tensors: dict[str, Tensor | None] = {"latents": latents, "timesteps": timesteps, **vars(inputs)}
        key = type(inputs), batch_key_extra
        if manager is not None and isinstance(batch, AcceleratorLoraBatch):
            slots = manager.slots.fill(batch.loras)
            if slots is None:
                with manager.applied(batch):
                    return self._family.forward(latents, timesteps, inputs, batch_key_extra=batch_key_extra)
            tensors |= {_LORA + name: tensor for name, tensor in batch.row_loras.weights._asdict().items()}
            key = *key, batch.structure, tuple(slot.number for slot in slots)

        def forward(given: Inputs) -> Tensor:
            own = None
            if isinstance(batch, AcceleratorLoraBatch):
                static = {name: given[_LORA + name] for name in RowWeights._fields}
                own = batch.with_slots(slots, RowWeights(**static))
            with nullcontext() if manager is None else manager.applied(own):
                return self._family.forward(
                    given["latents"],
                    given["timesteps"],
                    replace(inputs, **{name: given.get(name) for name in vars(inputs)}),
                    batch_key_extra=batch_key_extra,
                )

        present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        return self._graphs.run(key, present, forward)
