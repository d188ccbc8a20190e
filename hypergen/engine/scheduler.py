"""The scheduler: which images share the next denoising step, by batch key, cost curve and priority."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from hypergen.denoising.denoising_state import DenoisingState


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
        rows = min(self.seconds, key=lambda rows: abs(rows - self.efficient_rows()))
        return self.seconds[rows] / rows


def next_batch(
    running: Iterable[DenoisingState],
    costs: Mapping[BatchKey, CostCurve],
    max_batch_size: int,
    aging: float,
    now: float,
) -> list[DenoisingState]:
    """Choose the images of the next denoising step.

    The image with the shortest remaining work goes first. Each second of waiting subtracts `aging` seconds
    of work, so that long requests do not starve. The first image determines the batch key; images with the
    same key fill the batch up to its efficient rows.
    """

    seconds_per_row = {key: curve.seconds_per_row() for key, curve in costs.items()}

    def priority(state: DenoisingState) -> float:
        """The lowest goes first."""
        remaining_rows = state.remaining_steps * state.rows
        remaining_s = remaining_rows * seconds_per_row[batch_key(state).shared]
        return remaining_s - aging * (now - state.queued_at)

    ordered = sorted(running, key=priority)
    if not ordered:
        return []
    key = batch_key(ordered[0])
    free_rows = costs[key.shared].efficient_rows()
    batch: list[DenoisingState] = []
    for state in ordered:
        if len(batch) == max_batch_size or free_rows <= 0:
            break
        fits = state.rows <= free_rows or not batch
        if fits and batch_key(state) == key:
            batch.append(state)
            free_rows -= state.rows
    return batch
