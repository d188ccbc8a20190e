"""Steps of the engine on the fake CUDA device: the host waits for nothing, and the GPU gets few launches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from hypergen.models import loading
from tests.support.fake_cuda import FakeCuda, fake_cuda
from tests.support.samplers import ALL_FLOW_NAMES, SOME_NAMES
from tests.support.small_models import CLIPPING, save_sd, save_sd3, save_with_scheduler
from tests.support.sync_engine import InlineEngine, make_request, make_settings

_IMAGES = 8
_SAVE: dict[str, Callable[[Path], Path]] = {
    "sd": save_sd,
    **{name: partial(save_with_scheduler, scheduler=scheduler) for name, scheduler in CLIPPING.items()},
    "sd3": save_sd3,
}


class _Outside:
    """Launches of the engine outside of the forward passes of a family."""

    def __init__(self, device: FakeCuda, family: Any) -> None:
        self._device, self._forward = device, family.forward
        self._inside = 0
        family.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        before = self._device.launched
        output = self._forward(*args, **kwargs)
        self._inside += self._device.launched - before
        return output

    @property
    def launches(self) -> int:
        replays = sum(count for entry, count in self._device.launches.items() if entry.startswith("graph "))
        return self._device.launched - self._inside - replays


class _Engine:
    """An engine on the fake device, for one sampler after another."""

    def __init__(self, device: FakeCuda, family: Any) -> None:
        self._device = device
        self._outside = _Outside(device, family)
        self.engine = InlineEngine(family, device="cuda")
        self.engine.engine.warm_up()
        self.engine.probe_shapes(_request(0, None))

    @property
    def _forwards(self) -> int:
        return self.engine.engine.status().forwards

    def steady_steps(self, sampler: str | None) -> tuple[float, list[str]]:
        """Launches outside the forward pass in a step of all images, and all waits of three steps."""
        requests = [_request(seed, sampler) for seed in range(_IMAGES)]
        for request in requests:
            self.engine.submit(request)
        forwards = self._forwards
        while self._forwards < forwards + 3 or len(self.engine.engine._running) < _IMAGES:
            self.engine.step()
        self._device.reset()
        before, forwards = self._outside.launches, self._forwards
        while self._forwards < forwards + 3:
            self.engine.step()
        launches = (self._outside.launches - before) / 3
        waits = list(self._device.waits)
        for request in requests:
            self.engine.cancel(request)
        self.engine.step()
        return launches, waits


def _request(seed: int, sampler: str | None) -> Any:
    return make_request(seed=seed, num_inference_steps=12, guidance_scale=5.0, sampler=sampler)


@pytest.fixture(scope="module")
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Engine]:
    folder = _SAVE[request.param](tmp_path_factory.mktemp("cuda") / request.param)
    # What libraries import at a first load must not see the fake device.
    loading.load(folder, make_settings())
    with fake_cuda() as device:
        engine = _Engine(device, loading.load(folder, make_settings(device="cuda")))
        yield engine
        engine.engine.engine.close()


@pytest.mark.parametrize(
    ("engine", "most_launches"),
    [("sd", 2 * _IMAGES), ("clip_sample", 2 * _IMAGES), ("thresholding", 24)],
    indirect=["engine"],
)
@pytest.mark.parametrize("sampler", [None, *SOME_NAMES])
def test_the_host_waits_for_nothing_in_a_step(
    engine: _Engine, most_launches: int, sampler: str | None
) -> None:
    launches, waits = engine.steady_steps(sampler)
    assert not waits
    assert launches <= most_launches


@pytest.mark.parametrize("engine", ["sd3"], indirect=True)
@pytest.mark.parametrize("sampler", ALL_FLOW_NAMES)
def test_flow_samplers_wait_for_nothing(engine: _Engine, sampler: str) -> None:
    launches, waits = engine.steady_steps(sampler)
    assert not waits
    assert launches <= 2 * _IMAGES
