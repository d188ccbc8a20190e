"""Runs jobs of the shared queue in this replica, as many as its engines have room for."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from dataclasses import replace

from hypergen.api.job_store import JobState, report_end
from hypergen.api.redis_jobs.job_queue import TOO_LATE, Entry, JobQueue
from hypergen.api.redis_jobs.job_run import JobRun
from hypergen.api.redis_jobs.records import decode_request, encode_images
from hypergen.api.validated_request import ValidatedRequest
from hypergen.config import Settings
from hypergen.engine_protocol import ImageGenerator
from hypergen.errors import (
    DeadlineExceededError,
    GenerationError,
    NotFoundError,
    QueueFullError,
    RequestError,
    UnavailableError,
)
from hypergen.events import ImageFinished, Progress, Started
from hypergen.metrics import record_shared_jobs

logger = logging.getLogger(__name__)

# A replica without a heartbeat for this long is dead: others take over its jobs.
SILENT_S = 10.0
# A job that was delivered more often failed because replicas end while they run it.
MAX_DELIVERIES = 5
_BEAT_S = 0.5
_TAKE_OVER_EVERY_S = 2.0
_READ_S = 1.0
_ROOM_S = 0.1
_RETRY_S = 1.0
_CLOSE_S = 5.0
_CANCEL_S = 1.0
_FORGET_EVERY_S = 600.0


class Worker:
    """Takes jobs from the queue, generates them, and keeps them by heartbeats meanwhile."""

    def __init__(self, queue: JobQueue, generator: ImageGenerator, settings: Settings) -> None:
        self._queue = queue
        self._generator = generator
        self._max_batch_size = settings.engine.max_batch_size
        self._max_queue_size = settings.queue.max_queue_size
        self._keep_results_s = settings.server.url_lifetime_s
        self._runs: dict[str, JobRun] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._run_ended = asyncio.Event()
        self._away = False

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._take_jobs()), asyncio.create_task(self._send_beats())]

    async def close(self) -> None:
        """Stop, and leave unfinished jobs to other replicas."""
        await _cancel(*self._tasks)
        runs = list(self._runs.values())
        await asyncio.gather(*(self.stop(run.entry.job_id) for run in runs))
        with suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_S):
                releases = (self._queue.release(run.entry) for run in runs)
                await asyncio.gather(*releases, return_exceptions=True)

    async def stop(self, job_id: str) -> None:
        """Stop to run a job, without a change of its record; nothing if this replica does not run it."""
        run = self._runs.get(job_id)
        if run is not None and run.task is not None:
            await _cancel(run.task)
            self._forget(run)  # the task was cancelled before it ran

    async def _take_jobs(self) -> None:
        while True:
            try:
                await self._queue.create_group()
                await self._take_jobs_until_away()
            except UnavailableError as error:
                self._note_away(error)
                await asyncio.sleep(_RETRY_S)
            except Exception:  # Isolate the failure: nothing awaits this task.
                logger.exception("The job queue could not be read.")
                await asyncio.sleep(_RETRY_S)

    async def _take_jobs_until_away(self) -> None:
        # Others, too, could send no heartbeats while Redis was away.
        next_take_over = next_forget = time.monotonic() + SILENT_S
        while True:
            room = self._room()
            if room <= 0:
                await self._wait_for_room()
                continue
            entries: list[Entry] = []
            if time.monotonic() >= next_take_over:
                entries = await self._queue.take_over(room, SILENT_S)
                next_take_over = time.monotonic() + _TAKE_OVER_EVERY_S
            if time.monotonic() >= next_forget:
                await self._queue.forget_replicas(_FORGET_EVERY_S)
                next_forget = time.monotonic() + _FORGET_EVERY_S
            for entry in entries or await self._queue.read(room, _READ_S):
                await self._take(entry)

    def _room(self) -> int:
        """How many jobs fill the batches of the engines that are ready, after the other requests."""
        status = self._generator.status()
        if status.state != "ready":
            return 0
        engines = sum(engine.state == "ready" for engine in status.engines)
        unfinished = max(status.queue_size, len(self._runs))
        waiting = status.waiting + status.overflow
        return min(self._max_batch_size * engines - unfinished, self._max_queue_size - waiting)

    async def _wait_for_room(self) -> None:
        self._run_ended.clear()
        with suppress(TimeoutError):  # another request may have ended
            async with asyncio.timeout(_ROOM_S):
                await self._run_ended.wait()

    async def _take(self, entry: Entry) -> None:
        if entry.job_id in self._runs:  # taken over from this replica itself, after a stall
            return
        fields = await self._queue.take(entry)
        if not fields:
            return
        deliveries = int(fields["deliveries"])
        created, deadline = float(fields["created"]), float(fields["deadline"])
        try:
            _, validated = await asyncio.to_thread(decode_request, fields)
            self._check_model(validated)
        except RequestError as error:
            # Another replica may take it, as if this one had died.
            logger.warning("%s cannot run here: %s", entry.job_id, error.message)
            if deliveries > MAX_DELIVERIES:
                await self._queue.finish(entry.job_id, "failed", error)
            return
        run = JobRun(entry, validated, created, deadline)
        if deliveries > MAX_DELIVERIES:
            message = f"Replicas ended {MAX_DELIVERIES} times while they ran this job; not retrying."
            await self._write_end(run, "failed", GenerationError(message, code="poison"))
            return
        if deliveries > 1:
            logger.info("Took over %s, delivery %d.", entry.job_id, deliveries)
        self._runs[entry.job_id] = run
        run.task = asyncio.create_task(self._run(run))

    def _check_model(self, validated: ValidatedRequest) -> None:
        """
        Raises:
            NotFoundError: this replica does not serve the model.
        """
        model = validated.generation.model
        if model is not None and self._generator.find_model(model) is None:
            raise NotFoundError(f"No replica serves the model '{model}'.", code="model_not_found")

    async def _run(self, run: JobRun) -> None:
        try:
            await self._run_to_end(run)
        except Exception:  # Isolate the failure: nothing awaits this task.
            logger.exception("%s failed.", run.entry.job_id)
            await self._end(run, "failed", GenerationError("The server failed on this job; see its log."))
        finally:
            self._forget(run)

    async def _run_to_end(self, run: JobRun) -> None:
        try:
            async with asyncio.timeout(run.deadline - time.time()):
                await self._generate(run)
        except TimeoutError:
            await self._end(run, "failed", DeadlineExceededError(TOO_LATE))
        except UnavailableError as error:
            logger.info("%s is left to another replica: %s", run.entry.job_id, error.message)
            with suppress(UnavailableError):
                await self._queue.release(run.entry)
        except RequestError as error:
            await self._end(run, "failed", run.validated.with_client_field_names(error))
        else:
            await self._end(run, "succeeded")

    async def _generate(self, run: JobRun) -> None:
        """Fill `run.images`. Raises UnavailableError if this replica cannot finish the job."""
        while True:
            run.images.clear()
            try:
                await self._generate_once(run)
                return
            except QueueFullError:  # other requests were faster
                pass
            except UnavailableError as error:
                if error.code not in ("loading", "recovering"):
                    raise
            await asyncio.sleep(_RETRY_S)

    async def _generate_once(self, run: JobRun) -> None:
        request = run.validated.generation
        # The limits of the key were checked for the whole fleet when the job was created.
        key = replace(request.api_key, max_requests=None, images_per_minute=None)
        request = replace(request, id=run.entry.job_id, api_key=key)
        with await self._generator.submit(request) as handle:
            async for event in handle:
                if isinstance(event, Started):
                    run.state, run.started_at = "running", time.monotonic()
                elif isinstance(event, Progress):
                    run.step, run.steps = event.step, event.steps
                elif isinstance(event, ImageFinished):
                    run.images.append(event)
        if len(run.images) != request.n:
            raise GenerationError("The engine ended the job before all images were generated.")
        run.images.sort(key=lambda image: image.index)

    async def _end(self, run: JobRun, state: JobState, error: RequestError | None = None) -> None:
        """Write the end of a job. While Redis is away, it is kept and tried again."""
        run.generated = True
        keep_until = time.monotonic() + self._keep_results_s
        while True:
            try:
                await self._write_end(run, state, error)
                return
            except UnavailableError as away:
                self._note_away(away)
                if time.monotonic() > keep_until:
                    logger.error("The result of %s is lost: Redis was away too long.", run.entry.job_id)
                    return
                await asyncio.sleep(_RETRY_S)

    async def _write_end(self, run: JobRun, state: JobState, error: RequestError | None) -> None:
        if state == "succeeded":
            files = {image.index: image.data for image in run.images}
            described = encode_images(run.images)
            outcome = await self._queue.finish(run.entry.job_id, state, error, described, files, run.steps)
        else:
            outcome = await self._queue.finish(run.entry.job_id, state, error)
        if outcome == "done":
            report_end(run.entry.job_id, run.validated.generation, state, error, time.time() - run.created)
        elif outcome == "unknown":
            logger.warning("The result of %s is dropped: Redis has lost the job.", run.entry.job_id)

    def _forget(self, run: JobRun) -> None:
        if self._runs.get(run.entry.job_id) is run:
            del self._runs[run.entry.job_id]
        self._run_ended.set()

    async def _send_beats(self) -> None:
        while True:
            await asyncio.sleep(_BEAT_S)
            try:
                lost = await self._queue.beat([run.beat() for run in self._runs.values()])
                record_shared_jobs(await self._queue.waiting())
                self._note_back()
                for job_id in lost:
                    run = self._runs.get(job_id)
                    if run is not None and not run.generated:
                        await self.stop(job_id)
            except UnavailableError as error:
                self._note_away(error)
            except Exception:  # Isolate the failure: nothing awaits this task.
                logger.exception("A heartbeat could not be sent.")

    def _note_away(self, error: UnavailableError) -> None:
        if not self._away:
            self._away = True
            logger.warning("Redis is away (%s): no new jobs; running ones go on.", error.__cause__)

    def _note_back(self) -> None:
        if self._away:
            self._away = False
            logger.info("Redis is back.")


async def _cancel(*tasks: asyncio.Task[None]) -> None:
    """Cancel tasks and wait for them, again and again: libraries swallow a cancellation now and then."""
    pending = {task for task in tasks if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=_CANCEL_S)
