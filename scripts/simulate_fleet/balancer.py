"""Least connections: the replica with the fewest unfinished requests gets the next one."""

from __future__ import annotations

from collections import defaultdict

from scripts.simulate_fleet.replica import Replica


class Balancer:
    """The ready replicas by their connections; each operation takes constant time.

    Of several replicas with equally many, the one that has had as many for the longest time is chosen.
    """

    def __init__(self) -> None:
        self._by_connections: defaultdict[int, dict[Replica, None]] = defaultdict(dict)
        self._known: dict[Replica, int] = {}
        self._least = 0

    def __len__(self) -> int:
        return len(self._known)

    def update(self, replica: Replica) -> None:
        """Add a replica, or note that its connections have changed."""
        self.remove(replica)
        self._known[replica] = replica.connections
        self._by_connections[replica.connections][replica] = None
        self._least = min(self._least, replica.connections)

    def remove(self, replica: Replica) -> None:
        if replica in self._known:
            del self._by_connections[self._known.pop(replica)][replica]

    def __contains__(self, replica: Replica) -> bool:
        return replica in self._known

    def choose(self) -> Replica | None:
        """None if no replica is ready."""
        if not self._known:
            return None
        while not self._by_connections[self._least]:
            self._least += 1
        return next(iter(self._by_connections[self._least]))
