"""The pretended CUDA device makes the mistakes fail that a real one punishes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.support.fake_cuda import FakeCuda, fake_cuda

CUDA = torch.device("cuda:0")


@pytest.fixture
def device() -> Iterator[FakeCuda]:
    with fake_cuda() as device:
        yield device


def test_operations_give_the_numbers_of_the_cpu(device: FakeCuda) -> None:
    layer = torch.nn.Conv2d(3, 4, 3)
    x = torch.randn(2, 3, 8, 8)
    expected = layer(x).relu()
    result = layer.to(CUDA)(x.to(CUDA)).relu_()
    assert result.is_cuda
    assert result.device == CUDA
    assert torch.equal(result.cpu(), expected)
    assert [entry.partition(" ")[0] for entry in device.launches] == ["convolution", "relu_"]


def test_tensors_of_two_devices_do_not_mix(device: FakeCuda) -> None:
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(3, device=CUDA) + torch.ones(3)
    assert (
        torch.ones(3, device=CUDA) * torch.tensor(2.0)
    ).sum().item() == 6  # a number of the host may be used


@pytest.mark.parametrize("wait", ["stream", "event", "device"])
def test_an_asynchronous_copy_holds_garbage_until_it_is_waited_for(device: FakeCuda, wait: str) -> None:
    source = torch.ones(4, device=CUDA)
    copy = source.to("cpu", non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    assert copy.isnan().all()
    {
        "stream": torch.cuda.current_stream().synchronize,
        "event": event.synchronize,
        "device": torch.cuda.synchronize,
    }[wait]()
    assert torch.equal(copy, torch.ones(4))


def test_an_event_recorded_before_a_copy_does_not_wait_for_it(device: FakeCuda) -> None:
    source = torch.ones(4, device=CUDA)
    event = torch.cuda.Event()
    event.record()
    copy = source.to("cpu", non_blocking=True)
    event.synchronize()
    assert copy.isnan().all()


def test_streams_must_wait_for_what_others_write(device: FakeCuda) -> None:
    x = torch.ones(4, device=CUDA) * 2
    other = torch.cuda.Stream()
    with torch.cuda.stream(other), pytest.raises(RuntimeError, match="Race"):
        x + 1
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        y = x + 1
    x[0] = 5  # written again
    with torch.cuda.stream(other), pytest.raises(RuntimeError, match="Race"):
        x + 1
    with pytest.raises(RuntimeError, match="Race"):
        y + 1
    other.synchronize()
    assert (y + 1).sum().item() == 16


def test_pinned_memory_must_stay_as_it_is_until_it_was_copied(device: FakeCuda) -> None:
    pinned = torch.ones(4).pin_memory()
    pinned.to(CUDA, non_blocking=True)
    pinned.zero_()
    with pytest.raises(RuntimeError, match="Pinned memory"):
        torch.cuda.synchronize()


def test_waits_of_the_host_are_counted_with_their_place(device: FakeCuda) -> None:
    x = torch.ones(4, device=CUDA)
    device.reset()
    pinned = torch.ones(4).pin_memory()
    x.add_(pinned.to(CUDA, non_blocking=True))
    assert not device.waits
    x.sum().item()
    x.add_(torch.ones(4).to(CUDA))
    assert torch.equal(x, x)
    assert [entry.partition(" @ ")[0] for entry in device.waits] == ["item", "copy to the device", "equal"]
    assert all("tests/test_fake_cuda.py:" in entry for entry in device.waits)


def test_events_give_times_once_they_have_passed(device: FakeCuda) -> None:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    torch.ones(4, device=CUDA) + 1
    end.record()
    assert not end.query()
    with pytest.raises(RuntimeError, match="not ready"):
        start.elapsed_time(end)
    end.synchronize()
    assert start.elapsed_time(end) > 0


def test_a_graph_computes_when_it_is_replayed(device: FakeCuda) -> None:
    layer = torch.nn.Linear(4, 4).to(CUDA)
    x = torch.zeros(2, 4, device=CUDA)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        y = layer(x).view(-1) * 2
    assert y.cpu().isnan().all()
    for value in (1.0, -3.0):
        x.fill_(value)
        device.reset()
        graph.replay()
        assert sum(device.launches.values()) == 1
        with torch.inference_mode():
            assert torch.equal(y.cpu(), (layer(x).view(-1) * 2).cpu())


def test_waits_are_counted_after_a_capture(device: FakeCuda) -> None:
    x = torch.ones(4, device=CUDA)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        y = x * 2
    graph.replay()
    device.reset()
    y.sum().item()
    assert [entry.partition(" @ ")[0] for entry in device.waits] == ["item"]


def test_nothing_waits_while_a_graph_is_captured(device: FakeCuda) -> None:
    x = torch.zeros(2, 4, device=CUDA)
    with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(RuntimeError, match="capturing"):
        x.sum().item()
    with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(RuntimeError, match="capturing"):
        x.add_(torch.ones(2, 4).to(CUDA))


@pytest.mark.parametrize("mode", ["global", "thread_local"])
def test_another_thread_may_work_while_a_graph_is_captured_in_thread_local_mode(
    device: FakeCuda, mode: str
) -> None:
    x, y = torch.ones(2, device=CUDA), torch.ones(2, device=CUDA)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode=mode), ThreadPoolExecutor(1) as thread:
        x.add_(1)
        other = thread.submit(lambda: y.add_(1).sum().item())
        error = other.exception()
    assert (error is None) == (mode == "thread_local")
    before = float(y.sum())
    graph.replay()
    assert y.sum() == before  # not captured


@pytest.mark.parametrize("shared", ["pool", "stream", "nothing"])
def test_graphs_that_run_at_the_same_time_share_nothing(device: FakeCuda, shared: str) -> None:
    x = torch.ones(2, device=CUDA)
    graphs = [torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()]
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
    for graph in graphs:
        with torch.cuda.graph(
            graph,
            pool=pool if shared == "pool" else torch.cuda.graph_pool_handle(),
            stream=stream if shared == "stream" else torch.cuda.Stream(),
        ):
            x + 1
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    graphs[0].replay()
    with torch.cuda.stream(other):
        if shared == "nothing":
            graphs[1].replay()
            return
        with pytest.raises(RuntimeError, match="Race"):
            graphs[1].replay()
        other.wait_stream(torch.cuda.default_stream())
        graphs[1].replay()


def test_the_memory_of_tensors_is_counted_and_limited(device: FakeCuda) -> None:
    x = torch.ones(1000, device=CUDA)
    view = x[:10]
    assert torch.cuda.memory_allocated() == 4000
    y = x + 1
    del x, y
    assert (torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()) == (4000, 8000)
    torch.cuda.set_per_process_memory_fraction(6000 / device.total_memory)
    with pytest.raises(torch.OutOfMemoryError):
        torch.ones(1000, device=CUDA)
    del view
    torch.ones(1000, device=CUDA)


def test_an_allocation_fails_on_demand(device: FakeCuda) -> None:
    device.fails = lambda size: size > 1000
    torch.ones(100, device=CUDA)
    with pytest.raises(torch.OutOfMemoryError):
        torch.ones(1000, device=CUDA)


def test_other_threads_see_the_device_too(device: FakeCuda) -> None:
    made: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: made.append(torch.ones(2).to(CUDA) + torch.ones(2, device=CUDA)))
    thread.start()
    thread.join()
    assert torch.equal(made[0].cpu(), torch.full((2,), 2.0))
