"""The BentoML service: one class, the HTTP half in its process, each engine in a process of its own.

`bentoml serve` in this folder, or `hypergen serve`. Settings come from the environment (HYPERGEN_...), the
file that HYPERGEN_CONFIG names, or `bentoml build --arg NAME=VALUE`, whose arguments a Bento keeps. Importing
this file starts nothing and imports no torch.
"""

import asyncio
import logging
import os
import signal
from pathlib import Path

os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")
# Engines choose among all accelerators; BentoML would show as many as the resources name.
os.environ.setdefault("BENTOML_DISABLE_GPU_ALLOCATION", "1")

import bentoml
from bentoml.images import Image
from bentoml.models import BentoModel

from hypergen import __version__, log_setup
from hypergen.api.api_keys import ApiKeys
from hypergen.api.middleware import OuterMiddleware
from hypergen.api.schemas import BatchResult
from hypergen.app import check_shared_store, create_app
from hypergen.bentoml_integration import metrics_folder, server_logs, tracing
from hypergen.bentoml_integration.batch_api import BatchContext, BatchItems, generate_item
from hypergen.bentoml_integration.build_arguments import errors_in_one_line, keep_models, read_arguments
from hypergen.bentoml_integration.dispatcher import ContinuousBatchingService, tls_options
from hypergen.bentoml_integration.listen_check import check_port_of_bentoml_serve
from hypergen.engine_client.accelerators import find_accelerators
from hypergen.engine_client.pool import EnginePool
from hypergen.images.storage import open_storage
from hypergen.load_settings import load_named_settings
from hypergen.process_lifecycle import drain_on_sigterm, leave_with_parent
from hypergen.resolve_models import find_models, resolved_entries

logger = logging.getLogger("hypergen.service")
with errors_in_one_line():
    arguments = read_arguments()
    settings, names = load_named_settings(environment=os.environ, arguments=arguments.settings)
# Uvicorn reads it; its own default trusts every process of this machine.
os.environ["FORWARDED_ALLOW_IPS"] = ",".join(settings.server.trusted_proxy)
log_setup.export(settings.server.log_format, settings.server.log_level)
server_logs.use_our_form()
metrics_folder.use_own_folder()
with errors_in_one_line(), names.in_messages(settings):
    keys = ApiKeys(settings.server)
    models = find_models(settings)
    pool = EnginePool(settings)
    app = create_app(settings, pool, models)
keep_models(arguments, resolved_entries(settings, models))

# No distribution, because BentoML installs compilers and git in those that it knows; all packages are wheels.
image = Image(base_image="python:3.11-slim", distro="none", python_version="3.11", lock_python_packages=False)
image.python_packages(*Path(__file__).with_name("requirements.txt").read_text().splitlines())
image.run("install -d -o bentoml -g bentoml /var/lib/hypergen")  # for a volume with the state


@bentoml.asgi_app(app, path="/")
@bentoml.service(
    name="hypergen",
    description="file:README.md",
    labels={"project": "hypergen", "version": __version__},
    image=image,
    envs=arguments.image_environment(),
    resources={"gpu": 1} if arguments.is_for_cuda else {"cpu": "2", "memory": "4Gi"},
    service_class=ContinuousBatchingService.with_keep_alive(settings.server.keep_alive_s),
    workers=1,  # one queue, one set of limits; more accelerators are more engines, not more workers
    # Deadlines and limits are ours: BentoML's would answer before the key check and without Retry-After.
    traffic={
        "timeout": 86400,
        "concurrency": settings.engine.max_batch_size * max(1, len(settings.engine.devices)),
    },
    logging={"access": {"enabled": False}},
    backlog=settings.server.backlog,
    ssl=tls_options(settings.server),
)
class HyperGen:
    # BentoML takes those for the service's own that are attributes of the class: one each.
    tags = dict.fromkeys(tag for model in models for tag in model.tags)
    vars().update({f"model_{index}": BentoModel(tag) for index, tag in enumerate(tags)})

    @bentoml.on_deployment
    def check() -> None:
        """Called once, by `bentoml serve` before it starts the process of the HTTP half."""
        with errors_in_one_line():
            check_port_of_bentoml_serve()
        with errors_in_one_line(), names.in_messages(settings):
            find_accelerators(settings.engine)  # reports missing devices
            open_storage(settings.server).check()
            check_shared_store(settings.server)

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
