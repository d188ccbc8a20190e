"""BentoML's adaptive batching, fitted to calls that take seconds and to an engine that batches by itself.

The stock dispatcher learns from millisecond calls how long to hold a request back, sheds the oldest when the
sum looks too long, and lets one batch run at a time. With pictures that refuses requests although there is
room, delays lone ones by up to twice their drawing time, and keeps the engine half empty. Here a batch leaves
at once and many run at a time: what waits meanwhile still arrives together, and the engine batches by
denoising step. Calls share no batch: BentoML answers a whole batch at once, so a small call would wait for a
large one that came in the same moment.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from _bentoml_impl.server.app import ServiceAppFactory
from _bentoml_sdk.service.factory import Service
from bentoml._internal.marshal.dispatcher import CorkDispatcher, Job, NonBlockSema
from bentoml._internal.server.http.instruments import RunnerTrafficMetricsMiddleware
from starlette.middleware import Middleware
from uvicorn.config import HTTP_PROTOCOLS

from hypergen.bentoml_integration.metric_paths import NamedEndpoints, TruePaths

_BATCHES_IN_FLIGHT = 1024


class _AppFactory(ServiceAppFactory):
    """The app of a service, whose requests are counted by endpoint and not by path."""

    @property
    def middlewares(self) -> list[Middleware]:
        counting, *others = super().middlewares
        if counting.cls is not RunnerTrafficMetricsMiddleware:  # metrics are switched off
            return [counting, *others]
        return [Middleware(NamedEndpoints), counting, Middleware(TruePaths), *others]


class ContinuousBatchingService(Service[Any]):
    """A BentoML service whose batches neither wait nor shed nor queue behind each other, over connections
    with limits.

    Given to `bentoml.service(service_class=...)`. What it adjusts is internal to BentoML 1.4 and uvicorn; a
    test asserts that it is still there.
    """

    def to_asgi(self, is_main: bool = True) -> Any:
        # BentoML makes uvicorn's configuration after this call, and does not say which protocol.
        HTTP_PROTOCOLS["auto"] = "hypergen.api.http_protocol:GuardedProtocol"
        self.inject_config()
        factory = _AppFactory(self, is_main=is_main)
        for dispatcher in factory.dispatchers.values():
            optimizer: Any = dispatcher.optimizer
            # Predicted latency = wait + a * n + b: with zeros it asks for no wait and predicts no overload.
            optimizer.o_a = optimizer.o_b = optimizer.wait = 0.0
            optimizer.log_outbound = lambda *_args, **_kwargs: None
            optimizer.trigger_refresh = lambda: None
            dispatcher._sema = NonBlockSema(_BATCHES_IN_FLIGHT)
            dispatcher._get_inputs = partial(_one_call, dispatcher)
        return factory()


def _one_call(
    dispatcher: CorkDispatcher[Any, Any], num_batches: int | None = None
) -> Iterator[Job[Any, Any]]:
    """The batch to run next: all items of the call that came first, and of no other."""
    yield dispatcher._queue.popleft()
