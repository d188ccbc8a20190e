"""The engine in the test's thread: step-level batching, failures and scheduling."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hypergen.denoising.denoising_state import ModelInputs
from hypergen.engine.batch_invariance.shape_profiles import ShapeProfiles
from hypergen.engine.host_copy import HostCopy
from hypergen.engine.scheduler import batch_key
from hypergen.errors import GenerationError, RequestError
from hypergen.events import Event, ImageFinished, Progress, Started
from hypergen.models import loading
from tests.support.sync_engine import InlineEngine, make_request, make_settings, prepare_image

MakeEngine = Callable[..., InlineEngine]


def test_images_join_and_leave_between_steps(inline: MakeEngine) -> None:
    long = make_request(num_inference_steps=12, seed=1)
    short = make_request(num_inference_steps=3, sampler="euler", guidance_scale=1.0, seed=2)
    engine = inline(aging=0)
    engine.probe_shapes(long)

    def submit_at_step_3(request_id: str, event: Event | RequestError) -> None:
        if request_id == long.id and event == Progress(3, 12):
            engine.submit(short)

    engine.run(long, on_event=submit_at_step_3)
    # Once it joins, the short one is in every batch; then the long one continues alone.
    assert engine.progress == (
        [(long.id, step) for step in (1, 2, 3)]
        + sorted(engine.progress[3:9], key=lambda entry: entry[1] - 3 * (entry[0] == long.id))
        + [(long.id, step) for step in range(7, 13)]
    )
    assert engine.images[short.id][0].shared_forwards == 3
    assert engine.images[long.id][0].shared_forwards == 3
    assert engine.engine.status().forwards == 12
    assert engine.engine.status().image_steps == 15


def test_events_report_start_progress_and_images(inline: MakeEngine) -> None:
    request = make_request(n=2, num_inference_steps=2)
    engine = inline()
    engine.probe_shapes(request)
    engine.run(request)
    events = [event for _, event in engine.events]
    assert isinstance(events[0], Started)
    assert [event for event in events if isinstance(event, Progress)] == [Progress(2, 4), Progress(4, 4)]
    assert sorted(event.index for event in events if isinstance(event, ImageFinished)) == [0, 1]
    assert [engine.images[request.id][index].seed for index in (0, 1)] == [7, 8]


def test_image_j_of_a_request_equals_a_single_image_with_seed_plus_j(inline: MakeEngine) -> None:
    several = make_request(n=3, seed=40, sampler="euler_a")
    singles = [make_request(seed=40 + j, sampler="euler_a") for j in range(3)]
    engine = inline()
    engine.probe_shapes(several)
    engine.run(several, *singles)
    for j, single in enumerate(singles):
        assert engine.data(several, j) == engine.data(single)


def test_a_cancelled_request_stops_before_its_next_step(inline: MakeEngine) -> None:
    cancelled = make_request(num_inference_steps=50, n=2)
    other = make_request(num_inference_steps=10)
    engine = inline()
    engine.probe_shapes(other)

    def cancel_once_running(request_id: str, event: Event | RequestError) -> None:
        if request_id == cancelled.id and engine.steps(cancelled) >= 4:
            engine.cancel(cancelled)

    engine.run(cancelled, other, on_event=cancel_once_running)
    assert engine.steps(cancelled) == 4
    assert cancelled.id not in engine.images
    assert engine.steps(other) == 10
    assert not engine.engine._requests


def test_a_request_cancelled_during_its_probe_is_never_started(inline: MakeEngine) -> None:
    running, waiting = make_request(num_inference_steps=6), make_request(width=72)
    engine = inline(max_batch_size=1)

    def cancel_waiting(request_id: str, event: Event | RequestError) -> None:
        if request_id == running.id and event == Progress(1, 6):
            engine.submit(waiting)
        if request_id == running.id and event == Progress(2, 6):  # its size is being probed now
            engine.cancel(waiting)

    engine.run(running, on_event=cancel_waiting)
    assert engine.data(running)
    assert waiting.id not in {request_id for request_id, _ in engine.events}


def test_running_images_advance_while_a_new_size_is_probed(inline: MakeEngine) -> None:
    running, unknown_size = make_request(num_inference_steps=30), make_request(width=120, height=88)
    engine = inline()
    started_at: list[int] = []

    def submit_unknown_size(request_id: str, event: Event | RequestError) -> None:
        if request_id == running.id and event == Progress(1, 30):
            engine.submit(unknown_size)
        if request_id == unknown_size.id and isinstance(event, Started):
            started_at.append(engine.steps(running))

    engine.run(running, on_event=submit_unknown_size)
    assert started_at[0] >= 2  # the probe's forward passes run between the steps


def test_a_request_of_a_known_size_does_not_wait_for_the_probe_of_another(inline: MakeEngine) -> None:
    first, unknown_size = make_request(num_inference_steps=1), make_request(width=120, height=88)
    known, same_size = make_request(num_inference_steps=1), make_request(width=120, height=88, seed=8)
    engine = inline()
    ended: list[str] = []

    def submit_others(request_id: str, event: Event | RequestError) -> None:
        if isinstance(event, ImageFinished):
            ended.append(request_id)
        if request_id == first.id and isinstance(event, ImageFinished):
            for request in (unknown_size, same_size, known):
                engine.submit(request)

    engine.run(first, on_event=submit_others)
    assert ended[:2] == [first.id, known.id]
    assert set(ended[2:]) == {unknown_size.id, same_size.id}


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_nan_latents_fail_only_their_request(inline: MakeEngine) -> None:
    bad, good = make_request(seed=1), make_request(seed=2)
    reference = inline()
    reference.run(good)
    engine = inline()
    engine.probe_shapes(make_request())

    def break_it(request_id: str, event: Event | RequestError) -> None:
        if request_id == bad.id and event == Progress(2, 4):
            engine.state(bad).latents = torch.full((1, 4, 8, 8), torch.nan)

    engine.run(bad, good, on_event=break_it)
    assert isinstance(engine.errors[bad.id], GenerationError)
    assert "NaN or Inf latents" in engine.errors[bad.id].message
    assert engine.data(good) == reference.data(good)
    assert engine.images[good.id][0].shared_forwards > 0


@pytest.mark.parametrize("broken", ["embeds", "scheduler"])
def test_only_the_request_that_makes_a_batch_fail_fails(inline: MakeEngine, broken: str) -> None:
    bad = make_request(n=2, num_inference_steps=6, sampler="dpmpp_2m")
    good = [make_request(seed=seed, num_inference_steps=6) for seed in range(3)]
    engine = inline()

    def break_it(request_id: str, event: Event | RequestError) -> None:
        if request_id == bad.id and isinstance(event, Progress) and bad.id not in engine.errors:
            state = engine.state(bad)
            if broken == "scheduler":
                state.scheduler.model_outputs = None
            else:
                state.positive = ModelInputs(state.positive.encoder_hidden_states[..., :5])

    engine.run(bad, *good, on_event=break_it)
    assert "server's log" in engine.errors[bad.id].message
    assert [request_id for request_id, event in engine.events if isinstance(event, RequestError)] == [bad.id]
    assert bad.id not in engine.images
    assert all(engine.data(request) for request in good)


@pytest.mark.parametrize("broken", ["embeds", "sigmas"])
@pytest.mark.parametrize("index", [0, 1])
def test_a_failing_image_fails_only_its_request(inline: MakeEngine, broken: str, index: int) -> None:
    """Its batch also has another image of its request, whose step succeeds, and images of other requests."""
    bad, good = (make_request(n=2, sampler="euler", guidance_scale=1.0, seed=seed) for seed in (1, 2))
    reference = inline()
    reference.run(good)
    engine = inline()
    engine.probe_shapes(bad)

    def break_it(request_id: str, event: Event | RequestError) -> None:
        if request_id == bad.id and event == Progress(4, 8):
            image = next(s for s in engine.engine._running if s.request is bad and s.index == index)
            if broken == "sigmas":
                # Enough for the forward pass, not for the step.
                image.scheduler.sigmas = image.scheduler.sigmas[: image.step_index + 1]
            else:
                image.positive = ModelInputs(image.positive.encoder_hidden_states[..., :5])

    engine.run(bad, good, on_event=break_it)
    assert isinstance(engine.errors[bad.id], GenerationError)
    assert [request_id for request_id, event in engine.events if isinstance(event, RequestError)] == [bad.id]
    assert [engine.data(good, j) for j in (0, 1)] == [reference.data(good, j) for j in (0, 1)]
    assert all(image.shared_forwards for image in engine.images[good.id].values())


def test_failing_encoder_threads_do_not_crash_the_engine(inline: MakeEngine) -> None:
    engine = inline()
    bad, waiting = make_request(partial_images=2), make_request(width=72, num_inference_steps=50)
    encoders = engine.engine._postprocessor.encoders

    def close_encoders(request_id: str, event: Event | RequestError) -> None:
        if request_id == bad.id and event == Progress(1, 4):
            encoders.shutdown()  # as if no thread could be started
        if request_id == bad.id and isinstance(event, RequestError):
            engine.cancel(waiting)

    engine.run(bad, waiting, on_event=close_encoders)
    assert isinstance(engine.errors[bad.id], GenerationError)
    assert not engine.engine._requests


def test_failing_lora_threads_fail_only_their_request(sd_folder: Path) -> None:
    family: Any = loading.load(sd_folder, make_settings())
    family.lora_manager._loading_threads.shutdown()  # as if no thread could be started
    engine = InlineEngine(family)
    bad, good = make_request(loras=(("style", 1.0),)), make_request()
    engine.run(bad, good)
    assert isinstance(engine.errors[bad.id], GenerationError)
    assert engine.data(good)


def test_a_device_lost_during_encoding_crashes_the_engine(inline: MakeEngine) -> None:
    """Otherwise the request would never end."""

    class LostDevice(HostCopy):
        def wait(self) -> tuple[torch.Tensor, ...]:
            raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    engine = inline().engine
    image = prepare_image(engine.family, make_request())
    engine._postprocessor.submit_encode(image, LostDevice())
    engine._postprocessor.shutdown()
    with pytest.raises(torch.AcceleratorError):
        engine.step()


def test_an_encoding_failure_stops_the_other_images_of_the_request(inline: MakeEngine) -> None:
    unknown_format: Any = "nope"
    bad = make_request(n=4, num_inference_steps=3, output_format=unknown_format)
    engine = inline(max_batch_size=1)
    engine.run(bad)
    assert isinstance(engine.errors[bad.id], GenerationError)


def test_a_short_request_overtakes_a_long_one(inline: MakeEngine) -> None:
    long, short = make_request(num_inference_steps=100), make_request(num_inference_steps=4)
    engine = inline(max_batch_size=1)
    long_steps_at_end_of_short: list[int] = []

    def submit_at_step_5(request_id: str, event: Event | RequestError) -> None:
        if request_id == long.id and event == Progress(5, 100):
            engine.submit(short)
        if request_id == short.id and event == Progress(4, 4):
            long_steps_at_end_of_short.append(engine.steps(long))

    engine.run(long, on_event=submit_at_step_5)
    assert long_steps_at_end_of_short[0] < 20


@pytest.mark.parametrize("aging", [0.0, 2.0])
def test_aging_prevents_starvation_of_a_long_request(inline: MakeEngine, aging: float) -> None:
    long = make_request(num_inference_steps=30, seed=1)
    engine = inline(max_batch_size=1, aging=aging)
    shorts = [make_request(num_inference_steps=2) for _ in range(400 if aging else 20)]
    stream = iter(shorts)

    def keep_two_short_waiting(request_id: str, event: Event | RequestError) -> None:
        submit_more = isinstance(event, Started) and long.id not in engine.images
        if request_id != long.id and submit_more and (short := next(stream, None)):
            engine.submit(short)

    engine.run(next(stream), next(stream), long, on_event=keep_two_short_waiting)
    left = sum(1 for _ in stream)
    assert engine.data(long)
    # Without aging it waits for the end of the stream.
    assert (left > 0) == (aging > 0)


def test_requests_that_arrive_together_share_batches(inline: MakeEngine) -> None:
    """Eight one-step images have 16 rows; starting one per step would need eight forward passes."""
    known = make_request(num_inference_steps=1)
    together = [make_request(num_inference_steps=1, seed=seed) for seed in range(8)]
    engine = inline()
    engine.probe_shapes(make_request())

    def submit_others(request_id: str, event: Event | RequestError) -> None:
        if request_id == known.id and isinstance(event, ImageFinished):
            for request in together:
                engine.submit(request)

    engine.run(known, on_event=submit_others)
    rows = next(iter(engine.engine.shape_profiles.costs.values())).efficient_rows()
    assert engine.engine.status().forwards - 1 <= 16 // rows + 2


def test_prompts_of_different_lengths_do_not_share_a_batch(inline: MakeEngine) -> None:
    short = make_request(num_inference_steps=8)
    long = make_request(num_inference_steps=8, prompt="much longer than one chunk " * 5)
    negative = make_request(num_inference_steps=8, negative_prompt="blurred, ugly, dull " * 5)
    too_long = make_request(num_inference_steps=8, prompt="longer than everything " * 50)
    engine = inline()
    engine.probe_shapes(long)
    engine.run(short, long, negative, too_long)
    images = {request.id: engine.images[request.id][0] for request in (short, long, negative, too_long)}
    assert images[short.id].shared_forwards == 0
    assert images[too_long.id].prompt_tokens == 4 * 75
    assert images[long.id].shared_forwards == images[negative.id].shared_forwards > 0  # two chunks each
    assert engine.engine.status().determinism == {"64x64": "exact"}


def test_shape_profiles_are_evicted(inline: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ShapeProfiles, "_MAX_SHAPES", 2)
    engine = inline()
    first, *others = [make_request(width=width, num_inference_steps=1) for width in (64, 72, 80, 88)]

    def submit_next(_request_id: str, event: Event | RequestError) -> None:
        if isinstance(event, ImageFinished) and others:
            engine.submit(others.pop(0))

    engine.run(first, on_event=submit_next)
    assert len(engine.images) == 4
    assert len(engine.engine.status().determinism) <= 3
    assert len(engine.engine.shape_profiles.costs) == len(engine.engine.status().determinism)


def test_the_warm_up_generates_the_default_size(inline: MakeEngine) -> None:
    engine = inline()
    engine.engine.warm_up()
    assert engine.engine.status().determinism.keys() == {"128x128"}


def test_a_request_of_a_new_size_does_not_wait_for_the_probe_of_large_batches(inline: MakeEngine) -> None:
    engine = inline(max_batch_size=8)
    request = make_request(num_inference_steps=3)
    engine.generate(request)
    assert engine.data(request)
    assert engine.step() == 0
    while engine.step() == 0:
        pass
    image = prepare_image(engine.engine.family, request)
    assert len(engine.engine.shape_profiles.costs[batch_key(image)].seconds) >= 4


def test_larger_batches_are_probed_when_more_images_wait(inline: MakeEngine) -> None:
    engine = inline(max_batch_size=8, aging=0)
    engine.run(*(make_request(num_inference_steps=20, seed=seed) for seed in range(8)))
    status = engine.engine.status()
    assert status.image_steps / status.forwards > 2  # the first part of the probe covers one guided image
