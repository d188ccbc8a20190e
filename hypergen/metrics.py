"""Metrics in addition to BentoML's own; BentoML serves all of them at /metrics.

Labels have no values that a request can choose, so that no client adds series.
"""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import Counter

_PRICE = Counter("hypergen_price", "price of generated images, in the currency of --price-rate", ["model"])


@dataclass(frozen=True)
class Price:
    """The price of one finished request; `model` is an id of /v1/models."""

    model: str
    amount: float

    def count(self) -> None:
        """Add the price to `hypergen_price_total`."""
        _PRICE.labels(model=self.model).inc(self.amount)
