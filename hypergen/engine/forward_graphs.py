"""CUDA graphs of the denoiser's forward pass, with ControlNets and LoRAs."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from dataclasses import replace

from torch import Tensor

from hypergen.denoising.denoising_state import ModelInputs
from hypergen.engine.cuda_graphs import CudaGraphs, Inputs
from hypergen.lora.accelerator_batch import AcceleratorLoraBatch, RowWeights
from hypergen.lora.batched_lora import Loras
from hypergen.lora.weights import Lora
from hypergen.models.family import Family


class ForwardGraphs:
    """Runs forward passes as CUDA graphs, one for each shape, row count, ControlNet and layout of LoRAs.

    The output is overwritten by the next forward pass. Belongs to the engine's thread.
    """

    def __init__(self, family: Family) -> None:
        self._family = family
        self._graphs: CudaGraphs[Tensor] = CudaGraphs("The forward pass")

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
            loras: of each row. A batch with DoRA, or more LoRAs than the slots have room for, runs eagerly.
        """
        manager = self._family.lora_manager
        tensors: dict[str, Tensor | None] = {"latents": latents, "timesteps": timesteps, **vars(inputs)}
        slots: list[Lora] = []
        if manager is not None and isinstance(batch := manager.make_batch(loras), AcceleratorLoraBatch):
            filled = manager.slots.fill(batch.loras)
            if filled is None:
                with manager.applied(batch):
                    return self._family.forward(latents, timesteps, inputs, batch_key_extra=batch_key_extra)
            slots = filled
            tensors |= {"lora_scales": batch.weights.scales, "rows_without": batch.weights.without}

        def forward(given: Inputs) -> Tensor:
            own = None
            if slots:
                own = AcceleratorLoraBatch(slots, RowWeights(given["lora_scales"], given.get("rows_without")))
            with nullcontext() if manager is None else manager.applied(own):
                return self._family.forward(
                    given["latents"],
                    given["timesteps"],
                    replace(inputs, **{name: given.get(name) for name in vars(inputs)}),
                    batch_key_extra=batch_key_extra,
                )

        key = type(inputs), batch_key_extra, tuple(slot.number for slot in slots)
        present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        return self._graphs.run(key, present, forward)
