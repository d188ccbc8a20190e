"""The status of an engine process, from that of each of its models."""

from __future__ import annotations

from collections.abc import Sequence

from hypergen.cache_lookups import cache_lookups
from hypergen.engine.device_memory import memory_bytes
from hypergen.engine.model_slot import ModelSlot
from hypergen.events import EngineStatus


def status_of(slots: Sequence[ModelSlot], startup_s: dict[str, float]) -> EngineStatus:
    """The status of an engine process with these models."""
    in_memory = [(slot, model.engine.status()) for slot in slots if (model := slot.in_memory) is not None]
    loaded = [(slot, status) for slot, status in in_memory if slot.loaded is not None]
    latest = {slot.model.id: slot.last_status for slot in slots}
    latest |= {slot.model.id: status for slot, status in in_memory}
    # Sizes have a model id only if there are several models.
    prefixes = {model_id: f"{model_id} " if len(slots) > 1 else "" for model_id in latest}
    return EngineStatus(
        state="ready",
        device=next((status.device for status in latest.values() if status.device), None),
        determinism={
            prefixes[model_id] + size: verdict
            for model_id, status in latest.items()
            for size, verdict in status.determinism.items()
        },
        row_counts={
            prefixes[model_id] + size: counts
            for model_id, status in latest.items()
            for size, counts in status.row_counts.items()
        },
        forwards=sum(slot.forwards for slot in slots) + sum(s.forwards for _, s in in_memory),
        image_steps=sum(slot.image_steps for slot in slots) + sum(s.image_steps for _, s in in_memory),
        models=tuple(slot.model.id for slot, _ in loaded),
        startup_s=startup_s,
        load_s={slot.model.id: slot.load_s for slot in slots if slot.load_s},
        memory_bytes=memory_bytes(),
        loras=sum(status.loras for _, status in loaded),
        cache_lookups=cache_lookups(),
    )
