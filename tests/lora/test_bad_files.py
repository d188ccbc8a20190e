"""Files that are not a LoRA for the model: an error that names the LoRA, and no trace in later images."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from hypergen.errors import InvalidRequestError
from hypergen.models import loading
from tests.support.lora_files import save_lora
from tests.support.sync_engine import InlineEngine, make_request, make_settings

State = dict[str, Tensor]


def _first(state: State, part: str) -> str:
    return next(key for key in state if part in key)


def _rename(state: State) -> None:
    for key in list(state):
        state[key.replace("mid_block", "no_block")] = state.pop(key)


def _transpose(state: State) -> None:
    key = _first(state, "attn2.to_k.lora_A")
    state[key] = torch.zeros(state[key].shape[0], state[key].shape[1] + 8)


def _other_rank(state: State) -> None:
    key = _first(state, "lora_B")
    state[key] = torch.zeros(state[key].shape[0], state[key].shape[1] + 1)


def _set(part: str, value: float) -> Callable[[State], None]:
    def change(state: State) -> None:
        state[_first(state, part)].view(-1)[3] = value

    return change


CHANGES: dict[str, Callable[[State], Any]] = {
    "layers of another model": _rename,
    "shapes of another model": _transpose,
    "ranks that differ": _other_rank,
    "not a number": _set("lora_A", torch.nan),
    "infinite": _set("lora_B", torch.inf),
    "half a layer": lambda state: state.pop(_first(state, "lora_B")),
    "no lora": lambda state: [state.pop(key) for key in list(state)] and state.update(a=torch.zeros(2)),
    "more than lora": lambda state: state.update({"unet.conv_in.bias": torch.zeros(32)}),
    "of no component": lambda state: state.update({"prior.to_q.lora_A.weight": torch.zeros(2, 2)}),
    "rank zero": lambda state: state.update(
        {key: value[:0] if "lora_A" in key else value[:, :0] for key, value in state.items()}
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, sd_folder: Path) -> Path:
    """One valid file and many invalid ones."""
    folder = tmp_path_factory.mktemp("loras")
    pipeline: Any = StableDiffusionPipeline.from_pretrained(sd_folder, safety_checker=None)
    good = save_lora(folder / "good.safetensors", pipeline)
    for name, change in CHANGES.items():
        state = load_file(good)
        change(state)
        save_file(state, folder / f"{name}.safetensors")
    data = good.read_bytes()
    (folder / "truncated.safetensors").write_bytes(data[:-100])
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "long header.safetensors").write_bytes((2**40).to_bytes(8, "little") + data[8:])
    (folder / "pickle.safetensors").write_bytes(pickle.dumps(load_file(good)))
    (folder / "torch.safetensors").write_bytes(b"")
    torch.save(load_file(good), folder / "torch.safetensors")
    return folder


def _weights(family: Any) -> dict[str, torch.Tensor]:
    """Copies; an engine on a CPU may have reordered the original ones."""
    state = family.denoiser.state_dict()
    return {key: value.to_dense() if value.is_mkldnn else value.clone() for key, value in state.items()}


def test_every_bad_file_is_an_error_and_leaves_no_trace(sd_folder: Path, folder: Path) -> None:
    family: Any = loading.load(sd_folder, make_settings(lora_dir=[str(folder)]))
    names = sorted(set(family.model_info("small").loras) - {"good"})
    assert len(names) == len(CHANGES) + 5
    before = _weights(family)
    engine = InlineEngine(family)
    base, good = make_request(), make_request(loras=(("good", 1.0),))
    bad = [make_request(loras=(("good", 1.0), (name, 1.0))) for name in names]
    again = [make_request(loras=((name, 0.5),)) for name in names]
    engine.run(base, *bad, *again, good)
    for request in [*bad, *again]:
        error = engine.errors[request.id]
        assert isinstance(error, InvalidRequestError)
        assert error.param == "loras"
        assert f"'{request.loras[-1][0]}'" in error.message
        assert str(folder) not in error.message
    after = InlineEngine(family)
    after.run(base, good)
    assert after.data(base) == engine.data(base)
    assert after.data(good) == engine.data(good)
    assert all(torch.equal(value, before[key]) for key, value in _weights(family).items())
    untouched = InlineEngine(loading.load(sd_folder, make_settings()))
    untouched.run(base)
    assert untouched.data(base) == engine.data(base)


def test_a_file_above_the_size_limit_is_an_error_without_being_read(sd_folder: Path, tmp_path: Path) -> None:
    with (tmp_path / "huge.safetensors").open("wb") as file:
        file.truncate(3_000_000_000)
    family = loading.load(sd_folder, make_settings(lora_dir=[str(tmp_path)]))
    request = make_request(loras=(("huge", 1.0),))
    engine = InlineEngine(family)
    engine.run(request)
    assert "larger than 2048 MB" in engine.errors[request.id].message
