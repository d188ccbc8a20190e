"""The engine in this thread: joining, leaving, failing, and who goes first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from hypergen.denoising.denoising_state import ModelInputs
from hypergen.engine.batch_invariance.shape_profiles import ShapeProfiles
from hypergen.engine.postprocess import DecodedImage
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

    def join_at_the_third_step(request_id: str, event: Event | RequestError) -> None:
        if request_id == long.id and event == Progress(3, 12):
            engine.submit(short)

    engine.run(long, on_event=join_at_the_third_step)
    # From its joining on, the short one is in every pass, and then the long one goes on alone.
    assert engine.progress == (
        [(long.id, step) for step in (1, 2, 3)]
        + sorted(engine.progress[3:9], key=lambda entry: entry[1] - 3 * (entry[0] == long.id))
        + [(long.id, step) for step in range(7, 13)]
    )
    assert engine.images[short.id][0].shared_forwards == 3
    assert engine.images[long.id][0].shared_forwards == 3
    assert engine.engine.status().forwards == 12
    assert engine.engine.status().image_steps == 15


def test_each_request_is_told_when_it_starts_how_far_it_is_and_what_was_drawn(inline: MakeEngine) -> None:
    request = make_request(n=2, num_inference_steps=2)
    engine = inline()
    engine.probe_shapes(request)
    engine.run(request)
    events = [event for _, event in engine.events]
    assert events[0] == Started()
    assert [event for event in events if isinstance(event, Progress)] == [Progress(2, 4), Progress(4, 4)]
    assert sorted(event.index for event in events if isinstance(event, ImageFinished)) == [0, 1]
    assert [engine.images[request.id][index].seed for index in (0, 1)] == [7, 8]


def test_image_j_of_a_request_is_the_single_image_of_seed_plus_j(inline: MakeEngine) -> None:
    several = make_request(n=3, seed=40, sampler="euler_a")
    singles = [make_request(seed=40 + j, sampler="euler_a") for j in range(3)]
    engine = inline()
    engine.probe_shapes(several)
    engine.run(several, *singles)
    for j, single in enumerate(singles):
        assert engine.data(several, j) == engine.data(single)


def test_a_cancelled_request_leaves_before_its_next_step(inline: MakeEngine) -> None:
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
    assert not engine.engine._requests


def test_a_request_cancelled_before_it_joined_is_never_drawn(inline: MakeEngine) -> None:
    running, waiting = make_request(num_inference_steps=6), make_request(width=72)
    engine = inline(max_batch_size=1)

    def cancel_the_waiting_one(request_id: str, event: Event | RequestError) -> None:
        if request_id == running.id and event == Progress(1, 6):
            engine.submit(waiting)
        if request_id == running.id and event == Progress(2, 6):  # its size is being probed just now
            engine.cancel(waiting)

    engine.run(running, on_event=cancel_the_waiting_one)
    assert engine.data(running)
    assert waiting.id not in {request_id for request_id, _ in engine.events}


def test_running_images_advance_while_a_new_size_is_probed(inline: MakeEngine) -> None:
    running, newcomer = make_request(num_inference_steps=30), make_request(width=120, height=88)
    engine = inline()
    started_at: list[int] = []

    def submit_the_newcomer(request_id: str, event: Event | RequestError) -> None:
        if request_id == running.id and event == Progress(1, 30):
            engine.submit(newcomer)
        if request_id == newcomer.id and isinstance(event, Started):
            started_at.append(engine.steps(running))

    engine.run(running, on_event=submit_the_newcomer)
    assert started_at[0] >= 2  # the probe's passes stand between the steps, not before them


def test_a_request_of_a_known_size_does_not_wait_for_the_probe_of_another(inline: MakeEngine) -> None:
    first, newcomer = make_request(num_inference_steps=1), make_request(width=120, height=88)
    known, twin = make_request(num_inference_steps=1), make_request(width=120, height=88, seed=8)
    engine = inline()
    ended: list[str] = []

    def submit_the_others(request_id: str, event: Event | RequestError) -> None:
        if isinstance(event, ImageFinished):
            ended.append(request_id)
        if request_id == first.id and isinstance(event, ImageFinished):
            for request in (newcomer, twin, known):
                engine.submit(request)

    engine.run(first, on_event=submit_the_others)
    assert ended[:2] == [first.id, known.id]
    assert set(ended[2:]) == {newcomer.id, twin.id}


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_numbers_that_are_none_fail_their_request_and_no_other(inline: MakeEngine) -> None:
    bad, good = make_request(seed=1), make_request(seed=2)
    undisturbed = inline()
    undisturbed.run(good)
    engine = inline()
    engine.probe_shapes(make_request())

    def spoil(request_id: str, event: Event | RequestError) -> None:
        if request_id == bad.id and event == Progress(2, 4):
            engine.state(bad).latents = torch.full((1, 4, 8, 8), torch.nan)

    engine.run(bad, good, on_event=spoil)
    assert isinstance(engine.errors[bad.id], GenerationError)
    assert engine.data(good) == undisturbed.data(good)
    assert engine.images[good.id][0].shared_forwards > 0


@pytest.mark.parametrize("spoilt", ["embeds", "scheduler"])
def test_a_request_that_makes_a_pass_fail_fails_alone(inline: MakeEngine, spoilt: str) -> None:
    bad = make_request(n=2, num_inference_steps=6, sampler="dpmpp_2m")
    good = [make_request(seed=seed, num_inference_steps=6) for seed in range(3)]
    engine = inline()

    def spoil(request_id: str, event: Event | RequestError) -> None:
        if request_id == bad.id and isinstance(event, Progress) and bad.id not in engine.errors:
            state = engine.state(bad)
            if spoilt == "scheduler":
                state.scheduler.model_outputs = None
            else:
                state.positive = ModelInputs(state.positive.encoder_hidden_states[..., :5])

    engine.run(bad, *good, on_event=spoil)
    assert "log says why" in engine.errors[bad.id].message
    assert [request_id for request_id, event in engine.events if isinstance(event, RequestError)] == [bad.id]
    assert bad.id not in engine.images
    assert all(engine.data(request) for request in good)


@pytest.mark.parametrize("spoilt", ["embeds", "sigmas"])
@pytest.mark.parametrize("index", [0, 1])
def test_one_image_that_fails_ends_its_request_and_no_other(
    inline: MakeEngine, spoilt: str, index: int
) -> None:
    """In a batch with its sibling, whose own forward call and step succeed, and with other requests."""
    bad, good = (make_request(n=2, sampler="euler", guidance_scale=1.0, seed=seed) for seed in (1, 2))
    undisturbed = inline()
    undisturbed.run(good)
    engine = inline()
    engine.probe_shapes(bad)

    def spoil(request_id: str, event: Event | RequestError) -> None:
        if request_id == bad.id and event == Progress(4, 8):
            image = next(t for t in engine.engine._running if t.request is bad and t.index == index)
            if spoilt == "sigmas":
                # Enough for the forward call, not for the step.
                image.scheduler.sigmas = image.scheduler.sigmas[: image.step_index + 1]
            else:
                image.positive = ModelInputs(image.positive.encoder_hidden_states[..., :5])

    engine.run(bad, good, on_event=spoil)
    assert isinstance(engine.errors[bad.id], GenerationError)
    assert [request_id for request_id, event in engine.events if isinstance(event, RequestError)] == [bad.id]
    assert [engine.data(good, j) for j in (0, 1)] == [undisturbed.data(good, j) for j in (0, 1)]
    assert all(image.shared_forwards for image in engine.images[good.id].values())


def test_images_that_no_thread_can_encode_do_not_end_the_engine(inline: MakeEngine) -> None:
    engine = inline()
    bad, waiting = make_request(partial_images=2), make_request(width=72, num_inference_steps=50)
    encoders = engine.engine._postprocessor.encoders

    def close_the_encoders(request_id: str, event: Event | RequestError) -> None:
        if request_id == bad.id and event == Progress(1, 4):
            encoders.shutdown()  # as where no thread can be started
        if request_id == bad.id and isinstance(event, RequestError):
            engine.cancel(waiting)

    engine.run(bad, waiting, on_event=close_the_encoders)
    assert isinstance(engine.errors[bad.id], GenerationError)
    assert not engine.engine._requests


def test_a_request_whose_files_cannot_be_read_fails_alone(sd_folder: Path) -> None:
    family: Any = loading.load(sd_folder, make_settings())
    family.lora_manager._loading_threads.shutdown()  # as where no thread can be started
    engine = InlineEngine(family)
    bad, good = make_request(loras=(("style", 1.0),)), make_request()
    engine.run(bad, good)
    assert isinstance(engine.errors[bad.id], GenerationError)
    assert engine.data(good)


def test_a_device_lost_while_a_file_is_encoded_ends_the_engine(inline: MakeEngine) -> None:
    """Else the request would never end: the threads that encode have nobody to tell."""

    class LostDevice:
        def synchronize(self) -> None:
            raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    engine = inline().engine
    image = prepare_image(engine.family, make_request())
    decoded = DecodedImage(
        torch.zeros(64, 64, 3, dtype=torch.uint8), torch.tensor(True), cast(Any, LostDevice())
    )
    engine._postprocessor.submit_encode(image, decoded)
    engine._postprocessor.shutdown()
    with pytest.raises(torch.AcceleratorError):
        engine.step()


def test_a_file_that_cannot_be_written_ends_the_drawing_of_its_request(inline: MakeEngine) -> None:
    format_of_no_codec: Any = "nope"
    bad = make_request(n=4, num_inference_steps=3, output_format=format_of_no_codec)
    engine = inline(max_batch_size=1)
    engine.run(bad)
    assert isinstance(engine.errors[bad.id], GenerationError)


def test_a_short_request_overtakes_a_long_one(inline: MakeEngine) -> None:
    long, short = make_request(num_inference_steps=100), make_request(num_inference_steps=4)
    engine = inline(max_batch_size=1)
    long_steps_at_the_end_of_the_short_one: list[int] = []

    def join_at_the_fifth_step(request_id: str, event: Event | RequestError) -> None:
        if request_id == long.id and event == Progress(5, 100):
            engine.submit(short)
        if request_id == short.id and event == Progress(4, 4):
            long_steps_at_the_end_of_the_short_one.append(engine.steps(long))

    engine.run(long, on_event=join_at_the_fifth_step)
    assert long_steps_at_the_end_of_the_short_one[0] < 20


@pytest.mark.parametrize("aging", [0.0, 2.0])
def test_a_long_request_in_a_stream_of_short_ones_finishes_when_waiting_counts(
    inline: MakeEngine, aging: float
) -> None:
    long = make_request(num_inference_steps=30, seed=1)
    engine = inline(max_batch_size=1, aging=aging)
    shorts = [make_request(num_inference_steps=2) for _ in range(400 if aging else 20)]
    stream = iter(shorts)

    def keep_two_short_ones_waiting(request_id: str, event: Event | RequestError) -> None:
        goes_on = isinstance(event, Started) and long.id not in engine.images
        if request_id != long.id and goes_on and (short := next(stream, None)):
            engine.submit(short)

    engine.run(next(stream), next(stream), long, on_event=keep_two_short_ones_waiting)
    left = sum(1 for _ in stream)
    assert engine.data(long)
    # Without ageing it has to wait for the end of the stream, however long that is.
    assert (left > 0) == (aging > 0)


def test_requests_that_arrive_together_start_together(inline: MakeEngine) -> None:
    """Eight one-step images of 16 rows in all; admitting one for each step would make it eight passes."""
    known = make_request(num_inference_steps=1)
    together = [make_request(num_inference_steps=1, seed=seed) for seed in range(8)]
    engine = inline()
    engine.probe_shapes(make_request())

    def submit_the_others(request_id: str, event: Event | RequestError) -> None:
        if request_id == known.id and isinstance(event, ImageFinished):
            for request in together:
                engine.submit(request)

    engine.run(known, on_event=submit_the_others)
    knee = next(iter(engine.engine.shapes.costs.values())).efficient_rows()
    assert engine.engine.status().forwards - 1 <= 16 // knee + 2


def test_prompts_of_unequal_length_do_not_share_a_pass_and_all_finish(inline: MakeEngine) -> None:
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


def test_what_is_learned_of_shapes_is_bounded(inline: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ShapeProfiles, "_KEPT", 2)
    engine = inline()
    first, *others = [make_request(width=width, num_inference_steps=1) for width in (64, 72, 80, 88)]

    def submit_the_next(_request_id: str, event: Event | RequestError) -> None:
        if isinstance(event, ImageFinished) and others:
            engine.submit(others.pop(0))

    engine.run(first, on_event=submit_the_next)
    assert len(engine.images) == 4
    assert len(engine.engine.status().determinism) <= 3
    assert len(engine.engine.shapes.costs) == len(engine.engine.status().determinism)


def test_the_warm_up_draws_the_default_size(inline: MakeEngine) -> None:
    engine = inline()
    engine.engine.warm_up()
    assert engine.engine.status().determinism.keys() == {"128x128"}


def test_a_request_of_a_new_size_does_not_wait_for_large_passes_to_be_proved(inline: MakeEngine) -> None:
    engine = inline(max_batch_size=8)
    request = make_request(num_inference_steps=3)
    engine.run(request)
    assert engine.data(request)
    assert engine.step() == 0
    while engine.step() == 0:
        pass
    image = prepare_image(engine.engine.family, request)
    assert len(engine.engine.shapes.costs[batch_key(image)].seconds) >= 4


def test_larger_passes_are_proved_as_soon_as_more_images_wait(inline: MakeEngine) -> None:
    engine = inline(max_batch_size=8, aging=0)
    engine.run(*(make_request(num_inference_steps=20, seed=seed) for seed in range(8)))
    status = engine.engine.status()
    assert status.image_steps / status.forwards > 2  # one guided image is two rows, proved at once
