"""Weights in pinned main memory: what is copied, what is waited for, and that no bit changes."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hypergen.denoising import host_weights
from hypergen.denoising.host_weights import HostWeights, host_bytes
from hypergen.denoising.offload import ModelOffloader
from tests.support.fake_cuda import FakeCuda, fake_cuda

CUDA = torch.device("cuda:0")


@pytest.fixture
def device() -> Iterator[FakeCuda]:
    with fake_cuda() as device:
        yield device


class _Network(nn.Module):
    """All kinds of tensors that networks have."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3).half()
        self.conv = nn.Conv2d(4, 8, 3)
        self.conv.weight.data = self.conv.weight.data.contiguous(memory_format=torch.channels_last)
        self.tied = nn.Linear(5, 3, bias=False)
        self.tied.weight = self.linear.weight
        self.positions: Tensor
        self.register_buffer("positions", torch.arange(7).expand(2, 7), persistent=False)
        self.register_buffer("scale", torch.tensor(0.3))
        self.register_buffer("empty", torch.zeros(0))
        self.register_buffer("absent", None)


def _on_device() -> _Network:
    network = _Network().to(CUDA)
    network.tied.weight = network.linear.weight  # torch unties parameters of the fake device
    return network


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    return dict([*network.named_parameters(), *network.named_buffers()])


def _bits(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in _tensors(network).items()}


def _assert_bits(network: nn.Module, expected: dict[str, Tensor], device: str) -> None:
    found = _tensors(network)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.device.type == device, name
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor.cpu(), expected[name]), name


@pytest.mark.parametrize("chunk_bytes", [1 << 29, 600])
def test_only_the_first_move_copies_to_the_host_and_later_ones_wait_for_nothing(
    device: FakeCuda, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr(host_weights, "_CHUNK_BYTES", chunk_bytes)
    network = _on_device()
    expected, strides = _bits(network), network.conv.weight.stride()
    device.reset()
    weights = HostWeights([network], CUDA, pin=True)
    _assert_bits(network, expected, "cpu")
    assert device.copies.total() == len(expected)
    assert device.waits.total() == 1
    # Each tensor but the empty one is alone in the smaller chunks.
    chunks = 1 if chunk_bytes > 600 else len(expected) - 1
    for _ in range(3):
        device.reset()
        weights.load()
        assert device.copies.total() == chunks
        assert all(entry.startswith("host to device") for entry in device.copies)
        assert not device.waits
        assert not device.launches
        _assert_bits(network, expected, "cuda")
        assert network.tied.weight is network.linear.weight
        assert isinstance(network.linear.weight, nn.Parameter)
        assert network.conv.weight.stride() == strides
        device.reset()
        weights.unload()
        assert not device.copies
        assert not device.waits
        _assert_bits(network, expected, "cpu")


def test_the_memory_is_known_before_it_is_taken(device: FakeCuda) -> None:
    network = _on_device()
    before = host_bytes([network, network.conv])
    weights = HostWeights([network, network.conv], CUDA, pin=True)
    assert weights.nbytes == before
    assert before & (before - 1) == 0  # one allocation, rounded up by torch
    assert before // 2 < device.pinned_bytes <= before
    del network, weights
    assert device.pinned_bytes == 0


def test_the_device_has_no_weights_after_they_were_unloaded(device: FakeCuda) -> None:
    network = _on_device()
    on_device = [weakref.ref(tensor) for tensor in _tensors(network).values()]
    weights = HostWeights([network], CUDA, pin=True)
    assert not any(reference() is not None for reference in on_device)
    weights.load()
    on_device = [weakref.ref(tensor) for tensor in _tensors(network).values()]
    weights.unload()
    assert not any(reference() is not None for reference in on_device)


def test_weights_stay_in_main_memory_if_the_device_has_none(device: FakeCuda) -> None:
    network = _on_device()
    expected = _bits(network)
    weights = HostWeights([network], CUDA, pin=True)
    device.fails = lambda _bytes: True
    with pytest.raises(torch.OutOfMemoryError):
        weights.load()
    _assert_bits(network, expected, "cpu")
    device.fails = lambda _bytes: False
    weights.load()
    _assert_bits(network, expected, "cuda")


@pytest.mark.usefixtures("offload_small_networks")
@pytest.mark.parametrize("pinned", [True, False])
def test_offload_copies_nothing_back(
    device: FakeCuda, caplog: pytest.LogCaptureFixture, pinned: bool
) -> None:
    device.pinning_fails = lambda _bytes: not pinned
    networks = [nn.Linear(64, 64), nn.Linear(64, 64)]
    expected = [_bits(network) for network in networks]
    offloader = ModelOffloader(CUDA)
    for network in networks:
        offloader.register(network)
    for network in networks:  # makes the pinned copies
        network(torch.ones(1, 64))
    assert ("without pinned memory" in caplog.text) != pinned
    for _ in range(2):
        for network, other, bits, other_bits in zip(
            networks, networks[::-1], expected, expected[::-1], strict=True
        ):
            offloader.load(other)
            device.reset()
            offloader.load(network)
            assert device.copies.total() == 1
            assert all(entry.startswith("host to device") for entry in device.copies)
            assert device.waits.total() == (0 if pinned else 1)
            _assert_bits(network, bits, "cuda")
            _assert_bits(other, other_bits, "cpu")


def test_small_networks_stay_on_the_device(device: FakeCuda) -> None:
    network: Any = nn.Linear(4, 4)
    offloader = ModelOffloader(CUDA)
    offloader.register(network)
    assert network.weight.is_cuda
    assert not hasattr(network, "_hf_hook")
    network(torch.ones(1, 4, device=CUDA))
    assert device.pinned_bytes == 0
