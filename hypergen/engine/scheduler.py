"""Which images take the next step together: the group key, the cost of a forward pass, the choice of rows."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from hypergen.denoising.denoising_state import DenoisingState


class BatchKey(NamedTuple):
    """What the rows of one forward pass have in common.

    Steps, guidance, seed, sampler and negative prompt are not in it: they differ freely from row to row.
    """

    latent_shape: tuple[int, ...]
    # Prompts of unequal length cannot share a pass, and padding one because of a neighbour would change its
    # image.
    prompt_length: int
    # What else the family says that they must share, see DenoisingState.batch_key_extra.
    batch_key_extra: tuple[Hashable, ...] = ()
    # The id of an image that must run alone, see DenoisingState.must_run_alone.
    alone: int | None = None

    @property
    def shared(self) -> BatchKey:
        """The key of the same shape for images that may share their passes."""
        return self._replace(alone=None)


def batch_key(state: DenoisingState) -> BatchKey:
    shape = tuple(state.latents.shape[1:])
    alone = id(state) if state.must_run_alone else None
    return BatchKey(shape, state.positive.encoder_hidden_states.shape[1], state.batch_key_extra, alone)


@dataclass
class CostCurve:
    """What a forward pass of a group costs, learned: rows -> seconds.

    The first points come from the probe at load, later ones from the passes themselves.

    Args:
        max_rows: what fits into memory, as far as is known.
        row_counts: the only sizes of a pass that may serve, because only they were proved exact; None is any.
    """

    max_rows: int
    row_counts: frozenset[int] | None = None
    seconds: dict[int, float] = field(default_factory=dict)
    _passes: int = 0

    # A pass with at least this share of the best throughput is good enough: more rows would only add latency.
    GOOD_ENOUGH = 0.95
    # The machine may have been busy when the curve was learned, so once in a while a larger pass is tried
    # again.
    TRY_LARGER_EVERY = 50

    def record(self, rows: int, seconds: float) -> None:
        self._passes += 1
        known = self.seconds.get(rows)
        if known is None:
            self.seconds[rows] = seconds
        else:  # faster is believed sooner than slower: another process can only have made it slower
            rate = 0.5 if seconds < known else 0.1
            self.seconds[rows] = known + rate * (min(seconds, 3 * known) - known)

    def efficient_rows(self) -> int:
        """The fewest rows that reach nearly the best throughput; all that fit as long as nothing is known."""
        known = {rows: rows / seconds for rows, seconds in self.seconds.items() if rows <= self.max_rows}
        if not known:
            return self.max_rows
        best = max(known.values())
        knee = min(rows for rows, throughput in known.items() if throughput >= self.GOOD_ENOUGH * best)
        if self._passes % self.TRY_LARGER_EVERY == self.TRY_LARGER_EVERY - 1:
            knee *= 2
        return min(max(knee, 2), self.max_rows)  # a guided image takes two rows

    def allows(self, rows: int) -> bool:
        """Whether a pass of so many rows may be made; one image alone always may."""
        return self.row_counts is None or rows in self.row_counts or rows <= 2

    def seconds_per_row(self) -> float:
        """At the knee; 0 as long as nothing is known."""
        if not self.seconds:
            return 0.0
        rows = min(self.seconds, key=lambda rows: abs(rows - self.efficient_rows()))
        return self.seconds[rows] / rows


def next_batch(
    active: Iterable[DenoisingState],
    costs: Mapping[BatchKey, CostCurve],
    max_batch_size: int,
    aging: float,
    now: float,
) -> list[DenoisingState]:
    """Choose the images that take the next step.

    Shortest remaining work goes first, so that short requests do not wait for long ones; waiting counts
    against remaining work at the rate `aging`, so that long ones do not starve. The first image names the
    group, and its group fills the pass up to the knee of its cost curve.
    """

    seconds_per_row = {key: curve.seconds_per_row() for key, curve in costs.items()}

    def urgency(state: DenoisingState) -> float:
        remaining_rows = state.remaining_steps * state.rows
        remaining_s = remaining_rows * seconds_per_row[batch_key(state).shared]
        return remaining_s - aging * (now - state.queued_at)

    ordered = sorted(active, key=urgency)
    if not ordered:
        return []
    key = batch_key(ordered[0])
    room = costs[key.shared].efficient_rows()
    batch: list[DenoisingState] = []
    for state in ordered:
        if len(batch) == max_batch_size or room <= 0:
            break
        fits = state.rows <= room or not batch
        if fits and batch_key(state) == key:
            batch.append(state)
            room -= state.rows
    while not costs[key.shared].allows(sum(state.rows for state in batch)):
        batch.pop()
    return batch
