"""The benchmark of a forward pass on a CPU, with a small UNet."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from scripts.bench import cpu, scheduling

_SMALL: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
}


@pytest.fixture(autouse=True)
def _threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_each_runtime_is_measured_and_compared() -> None:
    times = cpu.measure(_SMALL, sides=(64,))
    assert {(entry.side, entry.runtime) for entry in times} >= {(64, "stock"), (64, "HyperGen")}
    assert all(second > 0 for entry in times for second in entry.seconds)
    (shares,) = [entry.shares for entry in times if entry.shares]
    assert sum(shares.values()) == pytest.approx(1)
    assert all(0 < share < 1 for share in shares.values())


def test_gates_compare_medians_and_name_what_is_missing() -> None:
    times = [
        cpu.ForwardTimes(256, "stock", (3.0, 4.0, 50.0)),
        cpu.ForwardTimes(256, "HyperGen", (2.0, 2.0, 90.0)),
        cpu.ForwardTimes(512, "stock", (10.0,)),
        cpu.ForwardTimes(512, "HyperGen", (11.0,)),
    ]
    gates, unmeasured = cpu.gates_of(times)
    assert [(gate.measured, gate.limit, gate.reached) for gate in gates] == [
        (0.5, 0.75, True),
        (1.1, 1.02, False),
    ]
    assert [line.endswith("over OpenVINO's (pip install openvino)") for line in unmeasured] == [True]


def test_the_choice_of_a_batch_is_measured() -> None:
    gate = scheduling.gate(images=20)
    assert gate.measured > 0
    assert (gate.limit, gate.at_most) == (0.2, True)
