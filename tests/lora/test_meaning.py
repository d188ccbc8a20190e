"""Every layout of LoRA files: what is applied equals what the file means, layer by layer and in outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hypergen.lora.manager import LoraManager, lora_context
from tests.support.lora_layouts import LAYOUTS, Layout, merge, write
from tests.support.lora_networks import MODELS
from tests.support.sync_engine import make_settings


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@torch.inference_mode()
def test_a_file_changes_each_layer_as_it_means(layout: Layout, tmp_path: Path) -> None:
    make, run = MODELS[layout.model]
    pipeline: Any = make()
    file = tmp_path / "style.safetensors"
    meaning = write(layout, file, pipeline)
    lora_manager = LoraManager(pipeline, make_settings(lora=[f"style={file}"]))
    loras = lora_manager.load((("style", 0.7),))

    [(lora, _)] = loras
    assert {*lora.layers, *lora.norms} == {*meaning.weights, *meaning.biases}
    for name, weights in lora.layers.items():
        expected = meaning.weights.get(name)
        delta = (weights.up @ weights.down.flatten(1)).flatten()
        torch.testing.assert_close(
            delta, torch.zeros_like(delta) if expected is None else expected.flatten(), rtol=1e-5, atol=1e-5
        )
        assert (weights.bias is None) == (name not in meaning.biases)
        if weights.bias is not None:
            torch.testing.assert_close(weights.bias, meaning.biases[name])
    for name, norm in lora.norms.items():
        torch.testing.assert_close(norm.weight, meaning.weights[name])
        torch.testing.assert_close(norm.bias, meaning.biases.get(name, torch.zeros_like(norm.bias)))

    base = run(pipeline)
    with lora_context(lora_manager, [loras]):
        ours = run(pipeline)
    assert all(torch.equal(one, other) for one, other in zip(run(pipeline), base, strict=True))
    merged = make()
    merge(merged, meaning, 0.7)
    changes: list[float] = []
    for one, expected, plain in zip(ours, run(merged), base, strict=True):
        changes.append(float((expected - plain).abs().max()))
        assert (one - expected).abs().max() <= 0.01 * changes[-1]
    assert max(changes) > 1e-3
