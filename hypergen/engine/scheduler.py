"""The scheduler: which images share the next denoising step, by API key, batch key, cost curve and
priority."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from hypergen.denoising.denoising_state import DenoisingState
from hypergen.engine.fair_share import FairShare

# Sizes of LoRA products in a batch; each takes kernel launches in every layer, see lora/accelerator_batch.py.
_MAX_LORA_SIZES = 2


class BatchKey(NamedTuple):
    """Only images with the same batch key can share a forward pass.

    Steps, guidance, seed, sampler and negative prompt are not part of it: they may differ between rows.
    """

    latent_shape: tuple[int, ...]
    # Prompts of different lengths cannot share a batch: padding one for the other would change its image.
    prompt_length: int
    # Other conditions of the model family, see DenoisingState.batch_key_extra.
    batch_key_extra: tuple[Hashable, ...] = ()
    # The id of an image that must run alone, see DenoisingState.must_run_alone.
    alone: int | None = None

    @property
    def shared(self) -> BatchKey:
        """The key of the same shape for images that may share a batch."""
        return self._replace(alone=None)


def batch_key(state: DenoisingState) -> BatchKey:
    shape = tuple(state.latents.shape[1:])
    alone = id(state) if state.must_run_alone else None
    return BatchKey(shape, state.positive.encoder_hidden_states.shape[1], state.batch_key_extra, alone)


@dataclass
class CostCurve:
    """The measured cost of a forward pass for one batch key: rows -> seconds.

    The first points come from the probe, later ones from the forward passes of requests.

    Args:
        max_rows: the most rows that fit in memory, as far as known.
        row_counts: the only row counts that may be used, because the probe found them bit-exact; None: any.
            A batch is padded to the next of them.
    """

    max_rows: int
    row_counts: frozenset[int] | None = None
    seconds: dict[int, float] = field(default_factory=dict)
    _forwards: int = 0

    # This share of the best throughput is good enough: more rows would mostly add latency.
    EFFICIENT_THROUGHPUT = 0.95
    # The curve may be from a time when the machine was busy, so a larger batch is retried now and then.
    RETRY_LARGER_EVERY = 50

    def record(self, rows: int, seconds: float) -> None:
        self._forwards += 1
        known = self.seconds.get(rows)
        if known is None:
            self.seconds[rows] = seconds
        else:  # faster counts more than slower: other processes can only make a forward pass slower
            rate = 0.5 if seconds < known else 0.1
            self.seconds[rows] = known + rate * (min(seconds, 3 * known) - known)

    def efficient_rows(self) -> int:
        """The fewest rows with nearly the best throughput; `max_rows` before the first measurement."""
        throughputs = {
            rows: rows / seconds for rows, seconds in self.seconds.items() if rows <= self.max_rows
        }
        if not throughputs:
            return self.max_rows
        target = self.EFFICIENT_THROUGHPUT * max(throughputs.values())
        efficient = min(rows for rows, throughput in throughputs.items() if throughput >= target)
        if self._forwards % self.RETRY_LARGER_EVERY == self.RETRY_LARGER_EVERY - 1:
            efficient *= 2
        return min(max(efficient, 2), self.max_rows)  # a guided image takes two rows

    def padded(self, rows: int) -> int:
        """The row count of a forward pass for a batch of this many rows.

        One image alone is always allowed: with more rows than any of `row_counts` it runs without padding.
        """
        return min((count for count in self.row_counts or () if count >= rows), default=rows)

    def seconds_per_row(self) -> float:
        """The cost of a row in the most efficient batch; 0 before the first measurement."""
        if not self.seconds:
            return 0.0
        efficient = self.efficient_rows()
        rows = min(self.seconds, key=lambda rows: abs(rows - efficient))
        return self.seconds[rows] / rows


class RunningImages:
    """The images between their first and last step, grouped by shape.

    Choosing a batch costs a few array operations, however many images wait. Belongs to the engine's thread.
    """

    def __init__(self, images: Iterable[DenoisingState] = ()) -> None:
        self._groups: dict[BatchKey, _Group] = {}
        self._keys: dict[DenoisingState, BatchKey] = {}
        self.fair_share = FairShare()
        for image in images:
            self.add(image)

    def __iter__(self) -> Iterator[DenoisingState]:
        return iter(list(self._keys))

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, state: object) -> bool:
        return state in self._keys

    def add(self, state: DenoisingState) -> None:
        self.fair_share.add_image(state.request.api_key)
        self._group(state)

    def _group(self, state: DenoisingState) -> None:
        key = self._keys[state] = batch_key(state).shared
        self._groups.setdefault(key, _Group()).add(state, self.fair_share.id_of(state.request.api_key))

    def remove(self, state: DenoisingState) -> None:
        self._ungroup(state)
        self.fair_share.remove_image(state.request.api_key)

    def _ungroup(self, state: DenoisingState) -> None:
        key = self._keys.pop(state)
        group = self._groups[key]
        group.remove(state)
        if not group.states:
            del self._groups[key]

    def remove_request(self, request_id: str) -> None:
        for state in [state for state in self._keys if state.request.id == request_id]:
            self.remove(state)

    def advanced(self, state: DenoisingState) -> None:
        """Note that an image has taken a step, with which it may have changed its denoiser."""
        key = self._keys[state]
        if batch_key(state).shared == key:
            self._groups[key].update(state)
        else:
            self._ungroup(state)
            self._group(state)

    def next_batch(
        self, costs: Mapping[BatchKey, CostCurve], max_batch_size: int, aging: float, now: float
    ) -> list[DenoisingState]:
        """Choose the images of the next denoising step.

        The API key with the smallest share so far goes first, and of its images the one with the shortest
        remaining work. Each second of waiting subtracts `aging` seconds of work, so that long requests do not
        starve. The first image determines the batch key; images with the same key fill the batch up to its
        efficient rows.
        """
        priorities = {
            key: group.priorities(costs[key].seconds_per_row(), aging, now, self._times())
            for key, group in self._groups.items()
        }
        if not priorities:
            return []
        key = min(priorities, key=lambda key: priorities[key].first())
        batch = self._fill(key, priorities[key], costs[key].efficient_rows(), max_batch_size)
        seconds = costs[key].seconds_per_row() or 1.0
        for state in batch:
            self.fair_share.charge(state.request.api_key, state.rows * seconds)
        return batch

    def _times(self) -> np.ndarray | None:
        return self.fair_share.times if self.fair_share.is_shared else None

    def _fill(
        self, key: BatchKey, priorities: _Priorities, free_rows: int, max_batch_size: int
    ) -> list[DenoisingState]:
        batch: list[DenoisingState] = []
        sizes: frozenset[int] = frozenset()
        for state in self._groups[key].in_order(priorities):
            if len(batch) == max_batch_size or free_rows <= 0:
                break
            fits = state.rows <= free_rows or not batch
            alone = state.must_run_alone or (batch and batch[0].must_run_alone)
            all_sizes = sizes | state.lora_sizes
            few_sizes = len(all_sizes) <= _MAX_LORA_SIZES or _have_same_loras(state, batch)
            if fits and few_sizes and not (batch and alone):
                batch.append(state)
                sizes = all_sizes
                free_rows -= state.rows
        return batch


def _have_same_loras(state: DenoisingState, batch: Sequence[DenoisingState]) -> bool:
    """Whether all images of which LoRA products run have the same LoRAs."""
    loras = [{lora for lora, _ in each.loras} for each in (state, *batch) if each.lora_sizes]
    return all(own == loras[0] for own in loras)


class _Priorities(NamedTuple):
    """Of the images of a group: the lowest time of the API key goes first, then the lowest work."""

    times: np.ndarray | None  # None: all have the same key
    work: np.ndarray

    def first(self) -> tuple[float, float]:
        if self.times is None:
            return 0.0, float(self.work.min())
        least = self.times.min()
        return float(least), float(self.work[self.times == least].min())


class _Group:
    """Images of one shape, with their remaining rows, arrival and API key in arrays."""

    def __init__(self) -> None:
        self.states: list[DenoisingState] = []
        self._index: dict[DenoisingState, int] = {}
        self._remaining_rows = np.empty(8)
        self._queued_at = np.empty(8)
        self._api_keys = np.empty(8, int)

    def add(self, state: DenoisingState, api_key: int) -> None:
        if len(self.states) == len(self._queued_at):
            self._remaining_rows = np.concatenate([self._remaining_rows, np.empty(len(self.states))])
            self._queued_at = np.concatenate([self._queued_at, np.empty(len(self.states))])
            self._api_keys = np.concatenate([self._api_keys, np.empty(len(self.states), int)])
        self._index[state] = len(self.states)
        self.states.append(state)
        self._queued_at[self._index[state]] = state.queued_at
        self._api_keys[self._index[state]] = api_key
        self.update(state)

    def update(self, state: DenoisingState) -> None:
        self._remaining_rows[self._index[state]] = state.remaining_steps * state.rows

    def remove(self, state: DenoisingState) -> None:
        """The last image takes the place of the removed one."""
        index, last = self._index.pop(state), self.states.pop()
        if last is not state:
            self.states[index] = last
            self._index[last] = index
            self._remaining_rows[index] = self._remaining_rows[len(self.states)]
            self._queued_at[index] = self._queued_at[len(self.states)]
            self._api_keys[index] = self._api_keys[len(self.states)]

    def priorities(
        self, seconds_per_row: float, aging: float, now: float, times: np.ndarray | None
    ) -> _Priorities:
        """The priority of each image.

        Args:
            times: of all API keys; None if one has all images.
        """
        count = len(self.states)
        work = self._remaining_rows[:count] * seconds_per_row - aging * (now - self._queued_at[:count])
        return _Priorities(None if times is None else times[self._api_keys[:count]], work)

    def in_order(self, priorities: _Priorities) -> Iterator[DenoisingState]:
        """Lowest priority first, then in order of arrival."""
        columns = [self._queued_at[: len(self.states)], priorities.work]
        if priorities.times is not None:
            columns.append(priorities.times)
        for index in np.lexsort(columns):
            yield self.states[index]
