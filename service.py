"""The BentoML service: one class, the HTTP half in its process, each engine in a process of its own.

`bentoml serve` in this folder, or `hypergen serve`. Settings come from the environment (HYPERGEN_...) or from
the file that HYPERGEN_CONFIG names. Importing this file starts nothing and imports no torch.
"""

import asyncio
import logging
import os
import signal

os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")

import bentoml
from bentoml.models import BentoModel

from hypergen import log_setup
from hypergen.api.api_keys import ApiKeys
from hypergen.api.middleware import OuterMiddleware
from hypergen.api.schemas import BatchResult
from hypergen.app import create_app
from hypergen.bentoml_integration import metrics_folder, server_logs, tracing
from hypergen.bentoml_integration.batch_api import BatchContext, BatchItems, generate_item
from hypergen.bentoml_integration.dispatcher import ContinuousBatchingService, tls_options
from hypergen.engine_client.pool import EnginePool
from hypergen.load_settings import load_settings
from hypergen.process_lifecycle import drain_on_sigterm, leave_with_parent
from hypergen.resolve_models import find_models

logger = logging.getLogger("hypergen.service")
settings = load_settings(environment=os.environ)
# Uvicorn reads it; its own default trusts every process of this machine.
os.environ["FORWARDED_ALLOW_IPS"] = ",".join(settings.server.trusted_proxy)
log_setup.export(settings.server.log_format, settings.server.log_level)
server_logs.use_our_form()
metrics_folder.use_own_folder()
keys = ApiKeys(settings.server)
models = find_models(settings)
pool = EnginePool(settings)


@bentoml.asgi_app(create_app(settings, pool, models), path="/")
@bentoml.service(
    name="hypergen",
    service_class=ContinuousBatchingService.with_keep_alive(settings.server.keep_alive_s),
    workers=1,  # one queue, one set of limits; more accelerators are more engines, not more workers
    # Deadlines and limits are ours: BentoML's would answer before the key check and without Retry-After.
    traffic={"timeout": 86400, "concurrency": settings.engine.max_batch_size},
    logging={"access": {"enabled": False}},
    backlog=settings.server.backlog,
    ssl=tls_options(settings.server),
)
class HyperGen:
    # BentoML takes those for the service's own that are attributes of the class: one each.
    tags = dict.fromkeys(tag for model in models for tag in model.tags)
    vars().update({f"model_{index}": BentoModel(tag) for index, tag in enumerate(tags)})

    @bentoml.on_startup
    async def start(self) -> None:
        log_setup.configure("http")
        drain_on_sigterm(pool, settings.queue.drain_timeout_s)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, keys.reload)
        launcher = os.environ.get("_HYPERGEN_LAUNCHER_PID")
        if not keys and not launcher:
            logger.warning("No API key is set: whoever reaches this server can use it.")
        self.watch = asyncio.create_task(leave_with_parent(int(launcher) if launcher else None))
        await pool.start(models)

    @bentoml.on_shutdown
    async def stop(self) -> None:
        self.watch.cancel()
        await pool.stop()

    @bentoml.api(
        batchable=True, max_batch_size=max(2, settings.engine.max_batch_size), max_latency_ms=86_400_000
    )
    async def generate(self, items: BatchItems) -> list[BatchResult]:
        """Generate every item; its fields are those of POST /v1/images/generations."""
        return await asyncio.gather(*(generate_item(pool, settings, item) for item in items))

    def __is_ready__(self) -> bool:
        return pool.status().state == "ready"

    def __is_alive__(self) -> bool:
        return pool.status().state != "failed"


HyperGen.add_asgi_middleware(
    OuterMiddleware,  # pyright: ignore[reportArgumentType]  BentoML's Protocol describes a function, not a class
    keys=keys,
    settings=settings,
    tracing=tracing.request_tracing,
)
HyperGen.add_asgi_middleware(
    BatchContext,  # pyright: ignore[reportArgumentType]  the same
    path="/generate",
    max_text_bytes=int(settings.server.max_text_body_mb * 1e6),
)
