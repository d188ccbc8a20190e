"""Reordered weights: the same results as torch's layers, for every number of rows, in no more memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hypergen.engine.reordered_weights import can_reorder, reorder_weights
from hypergen.lora.batched_lora import BatchSizeProbe, LoraBatch
from hypergen.lora.weights import LayerWeights, Lora, LoraFile

_COUNTS = (1, 2, 3, 4, 6, 8, 16)

pytestmark = pytest.mark.skipif(
    not can_reorder(nn.Linear(1, 1)), reason="this processor has no kernels for reordered weights"
)


@pytest.fixture(autouse=True)
def _inference(two_threads: None) -> Iterator[None]:
    with torch.inference_mode():
        yield


def _convolution(channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(channels, channels, kernel_size, stride, padding=kernel_size // 2)


def _latents(channels: int, side: int) -> Tensor:
    return torch.randn((16, channels, side, side), generator=torch.Generator().manual_seed(1))


def _is_batch_invariant(layer: nn.Module, rows: Tensor) -> bool:
    outputs = [layer(rows[:count])[:1] for count in _COUNTS]
    return all(torch.equal(output, outputs[0]) for output in outputs)


@pytest.mark.parametrize("channels", [48, 64])
@pytest.mark.parametrize(("kernel_size", "stride"), [(3, 1), (3, 2), (1, 1)])
def test_a_convolution_is_batch_invariant_at_every_size(channels: int, kernel_size: int, stride: int) -> None:
    layer = _convolution(channels, kernel_size, stride)
    weight, bias = layer.weight.clone(), layer.bias
    reorder_weights(layer)
    for side in (2, 4, 7, 8, 16, 33):
        rows = _latents(channels, side)
        expected = functional.conv2d(rows, weight, bias, stride, kernel_size // 2)
        assert torch.allclose(layer(rows), expected, atol=1e-5)
        assert _is_batch_invariant(layer, rows)
        assert layer(rows).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("channels", [48, 64, 96])
@pytest.mark.parametrize(("kernel_size", "stride"), [(3, 1), (3, 2), (1, 1)])
def test_bits_do_not_depend_on_earlier_sizes(channels: int, kernel_size: int, stride: int) -> None:
    sides = (2, 4, 8, 16, 32)
    layer = _convolution(channels, kernel_size, stride)
    reorder_weights(layer)
    for side in (*sides, *reversed(sides)):
        fresh = _convolution(channels, kernel_size, stride)
        reorder_weights(fresh)
        rows = _latents(channels, side)
        assert torch.equal(layer(rows), fresh(rows))


@pytest.mark.parametrize("shape", [(16, 1536), (16, 1, 1536), (16, 5, 64), (16, 64, 64)])
def test_a_linear_layer_is_batch_invariant(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(shape[-1], 256)
    rows = torch.randn(shape)
    expected = layer(rows)
    reorder_weights(layer)
    assert torch.allclose(layer(rows), expected, atol=1e-5)
    assert _is_batch_invariant(layer, rows)


def test_reordered_weights_replace_the_original_ones() -> None:
    first, second, linear = _convolution(64, 3), _convolution(64, 1), nn.Linear(16, 32)
    layers = (first, second, linear)
    originals = [layer.weight.clone() for layer in layers]
    freed = [weakref.ref(layer.weight) for layer in layers]
    reorder_weights(nn.ModuleList(layers))
    for side in (2, 16):  # the second convolution has another layout at each
        second(first(_latents(64, side)))
    gc.collect()
    assert [reference() for reference in freed] == [None] * 3
    for layer, original in zip(layers, originals, strict=True):
        assert layer.weight.is_mkldnn
        assert torch.equal(layer.weight.to_dense(), original)
        assert (layer.weight.shape, layer.weight.dtype, layer.weight.device) == (
            original.shape,
            original.dtype,
            original.device,
        )


# SD 1.5's layers with the most irregular layouts: without AVX-512 they depend on rows, size and threads.
@pytest.mark.parametrize(("inputs", "outputs", "side"), [(320, 320, 32), (640, 640, 32), (640, 320, 24)])
def test_no_forward_pass_reorders_the_weights_of_a_convolution_again(
    capfd: pytest.CaptureFixture[str], inputs: int, outputs: int, side: int
) -> None:
    layer = nn.Conv2d(inputs, outputs, 3, padding=1)
    reorder_weights(layer)
    batches = [
        _latents(inputs, side)[:count].contiguous(memory_format=torch.channels_last) for count in (1, 2, 3, 8)
    ]
    assert "reorder" in _primitives(capfd, lambda: [layer(batch) for batch in batches])
    assert _primitives(capfd, lambda: [layer(batch) for batch in batches]) == {"convolution"}


def test_no_forward_pass_reorders_the_weights_of_a_linear_layer_again(
    capfd: pytest.CaptureFixture[str],
) -> None:
    layer = nn.Linear(640, 640)
    assert "reorder" in _primitives(capfd, lambda: reorder_weights(layer))
    for rows, tokens in ((1, 1), (2, 1), (1, 77), (2, 77), (2, 1024), (8, 256)):
        x = torch.randn(rows, tokens, 640)
        assert _primitives(capfd, lambda x=x: layer(x)) == {"inner_product"}


def _primitives(capfd: pytest.CaptureFixture[str], run: Callable[[], object]) -> set[str]:
    """The kinds of oneDNN's primitives that run."""
    capfd.readouterr()
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
        run()
    lines = capfd.readouterr().out.splitlines()
    return {
        line.split(",primitive,exec,cpu,")[1].split(",")[0] for line in lines if ",primitive,exec," in line
    }


def test_layers_of_another_dtype_or_padding_are_unchanged() -> None:
    circular = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
    network = nn.Sequential(circular, nn.Conv2d(4, 4, 3, padding="same"), nn.Linear(4, 4).double())
    reorder_weights(network)
    assert not any("forward" in vars(layer) for layer in network)


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_dora_reads_the_original_weights(kind: str) -> None:
    layer = nn.Linear(64, 64) if kind == "linear" else _convolution(64, 3)
    x = torch.randn(2, 5, 64) if kind == "linear" else _latents(64, 8)[:2]
    down = torch.randn(4, *layer.weight.shape[1:])
    weights = LayerWeights(down, torch.randn(64, 4), torch.rand(64))
    batch = LoraBatch([((Lora(LoraFile({"layer": weights})), 0.5),)] * 2, BatchSizeProbe(strict=True))
    expected = layer(x)
    batch.add(layer, "layer", x, expected)
    reorder_weights(layer)
    output = layer(x)
    batch.add(layer, "layer", x, output)
    assert torch.allclose(output, expected, atol=1e-4)
