"""BentoML's adaptive batching, adapted to calls that take seconds and to an engine with step-level batching.

The stock dispatcher estimates from millisecond calls how long to delay a request, sheds the oldest if the
total is too long, and runs one batch at a time. With images this refuses requests although the queue has
room, delays single ones by up to twice their generation time, and keeps the engine half empty. Here a batch
is dispatched at once and many run in parallel, because the engine batches by denoising step. Calls share no
batch: BentoML responds to a whole batch at once, so a small call would wait for a large one.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar, cast

from _bentoml_impl.server.app import ServiceAppFactory
from _bentoml_sdk.service.factory import Service
from bentoml._internal.marshal.dispatcher import CorkDispatcher, Job, NonBlockSema
from bentoml._internal.server.http.instruments import RunnerTrafficMetricsMiddleware
from starlette.middleware import Middleware
from uvicorn.config import HTTP_PROTOCOLS

from hypergen.api.http_protocol import GuardedProtocol
from hypergen.bentoml_integration.metric_paths import NamedEndpoints, TruePaths

_BATCHES_IN_FLIGHT = 1024


class _AppFactory(ServiceAppFactory):
    """The app of a service, with metrics by endpoint and not by path."""

    @property
    def middlewares(self) -> list[Middleware]:
        counting, *others = super().middlewares
        if counting.cls is not RunnerTrafficMetricsMiddleware:  # metrics are switched off
            return [counting, *others]
        return [Middleware(NamedEndpoints), counting, Middleware(TruePaths), *others]


class ContinuousBatchingService(Service[Any]):
    """A BentoML service whose batches are dispatched at once, with connection limits.

    For `bentoml.service(service_class=...)`. It patches internals of BentoML 1.4 and uvicorn; a test asserts
    that they exist.
    """

    protocol: ClassVar[type[GuardedProtocol]] = GuardedProtocol

    @classmethod
    def with_keep_alive(cls, keep_alive_s: float) -> type[ContinuousBatchingService]:
        """The same service, whose connections stay open for this long between two requests."""
        protocol = type("Protocol", (GuardedProtocol,), {"keep_alive_s": keep_alive_s})
        return type(cls.__name__, (cls,), {"protocol": protocol})

    def to_asgi(self, is_main: bool = True) -> Any:
        # BentoML creates uvicorn's configuration after this call, without a protocol. Uvicorn imports names,
        # and takes classes as they are.
        cast(dict[str, Any], HTTP_PROTOCOLS)["auto"] = self.protocol
        self.inject_config()
        factory = _AppFactory(self, is_main=is_main)
        for dispatcher in factory.dispatchers.values():
            optimizer: Any = dispatcher.optimizer
            # Predicted latency = wait + a * n + b: with zeros there is no wait and no predicted overload.
            optimizer.o_a = optimizer.o_b = optimizer.wait = 0.0
            optimizer.log_outbound = lambda *_args, **_kwargs: None
            optimizer.trigger_refresh = lambda: None
            dispatcher._sema = NonBlockSema(_BATCHES_IN_FLIGHT)
            dispatcher._get_inputs = partial(_one_call, dispatcher)
        return factory()


def _one_call(
    dispatcher: CorkDispatcher[Any, Any], num_batches: int | None = None
) -> Iterator[Job[Any, Any]]:
    """The next batch: all items of the first call, and of no other."""
    yield dispatcher._queue.popleft()
