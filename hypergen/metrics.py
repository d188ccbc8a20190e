"""What the server counts beside BentoML's own metrics; BentoML tells all of it at /metrics.

Labels hold nothing that a request could choose, so that no client makes more series.
"""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import Counter

_PRICE = Counter("hypergen_price", "price of the pictures drawn, in the currency of --price-rate", ["model"])


@dataclass(frozen=True)
class Price:
    """What one request costs once its pictures are drawn; `model` is an id of /v1/models."""

    model: str
    amount: float

    def count(self) -> None:
        """Add it to `hypergen_price_total`."""
        _PRICE.labels(model=self.model).inc(self.amount)
