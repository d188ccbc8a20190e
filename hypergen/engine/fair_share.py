"""Start-time fair queueing (Goyal, Vin and Cheng 1996) over API keys: whose images run next."""

from __future__ import annotations

from collections import Counter

import numpy as np

from hypergen.request import ApiKey


class FairShare:
    """The engine time that each key has had, divided by its weight; the key with the least is next.

    A key without images gains nothing by waiting: when it comes back, it starts with the least of the others.

    Attributes:
        times: the times by `id_of` a key, in any unit.
    """

    def __init__(self) -> None:
        self.times = np.zeros(0)
        self._ids: dict[str, int] = {}
        self._images: Counter[int] = Counter()

    @property
    def is_shared(self) -> bool:
        """Whether more than one key has images."""
        return len(self._images) > 1

    def id_of(self, key: ApiKey) -> int:
        """The index of a key."""
        known = self._ids.setdefault(key.name, len(self._ids))
        if known == len(self.times):
            self.times = np.append(self.times, 0.0)
        return known

    def time_of(self, key: ApiKey) -> float:
        key_id = self.id_of(key)
        return float(self.times[key_id])

    def add_image(self, key: ApiKey) -> None:
        key_id = self.id_of(key)
        if key_id not in self._images:
            least = min((self.times[other] for other in self._images), default=0.0)
            self.times[key_id] = max(self.times[key_id], least)
        self._images[key_id] += 1

    def remove_image(self, key: ApiKey) -> None:
        key_id = self.id_of(key)
        self._images[key_id] -= 1
        if not self._images[key_id]:
            del self._images[key_id]
        if not self._images:
            self.times[:] = 0

    def charge(self, key: ApiKey, cost: float) -> None:
        """Count engine time for a key."""
        self.times[self.id_of(key)] += cost / key.weight
