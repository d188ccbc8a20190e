"""Whatever happens to one tensor of a checkpoint file, loading it names the tensor."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen2Config, Qwen2Model

from hypergen.errors import ModelError
from hypergen.model_families import EDM_MARKERS
from hypergen.model_store.diffusers_layout import CHECKPOINT
from hypergen.models.folder_accounting import account_for_component, account_for_folder
from hypergen.models.single_file_loading import account_for
from hypergen.models.tensor_accounting import Account
from tests.support.checkpoint_layouts import LAYOUTS

_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I64": 8, "U8": 1}
_CHANGED = 8  # tensors of each model, each in four ways


@pytest.fixture(
    scope="module",
    params=[
        "SD 1.5",
        "SD 2.1",
        "SDXL",
        "Playground 2.5",
        "SD 3 without text encoders",
        "FLUX fp8_scaled",
        "FLUX fp8_scaled, later names",
    ],
)
def entry(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the store makes it: a configuration and `checkpoint.safetensors`."""
    file, configuration, _ = LAYOUTS[request.param].build(tmp_path_factory.mktemp("entry"))
    shutil.copy(file, configuration / CHECKPOINT)
    return configuration


def test_a_checkpoint_is_used_up(entry: Path) -> None:
    account = account_for(entry)
    assert account.fault is None
    weights = _header(entry / CHECKPOINT).keys() - {"__metadata__", *EDM_MARKERS}
    assert account.used | account.ignored.keys() == weights


def test_a_changed_tensor_is_named(entry: Path) -> None:
    original = _header(entry / CHECKPOINT)
    file = entry / CHECKPOINT
    for changed, names in _changes(original, account_for(entry).ignored.keys()):
        _write_header(file, changed)
        fault = _fault(entry)
        assert fault is not None, names
        assert any(f"'{name}'" in fault for name in names), (names, fault)
        assert "\n" not in fault
    _write_header(file, original)


def _fault(entry: Path) -> str | None:
    try:
        return account_for(entry).fault
    except ModelError as error:  # by the names alone
        return str(error)


def _changes(header: dict[str, Any], ignored: Any) -> Iterator[tuple[dict[str, Any], tuple[str, ...]]]:
    """Headers with one change, and the names of which the message must have one."""
    source = random.Random(0)
    weights = [name for name in header if name not in ignored and name != "__metadata__"]
    special = [name for name in weights if name in EDM_MARKERS]
    for name in special + source.sample(weights, _CHANGED):
        rest = {key: value for key, value in header.items() if key != name}
        entry = header[name]
        renamed = f"{name}_renamed"
        # diffusers skips a layer without its weight, so that its bias is what is left over.
        yield rest, (name, f"{name.removesuffix('weight')}bias", *_network_names(name))
        yield {**rest, renamed: entry}, (renamed, name, *_network_names(name))
        yield {**header, f"{name}.more": entry}, (f"{name}.more",)
        *shape, last = entry["shape"] or [1]
        yield {**rest, name: {**entry, "shape": [*shape, last + 1]}}, (name,)


def _network_names(name: str) -> tuple[str, ...]:
    """Names in transformers' classes of tensors that OpenCLIP names in a way of their own."""
    return {
        "token_embedding.weight": (
            "text_model.embeddings.token_embedding.weight",
            "embeddings.token_embedding.weight",
        ),
    }.get(name.partition(".model.")[2], ())


def test_a_folder_is_accounted_for(tmp_path: Path) -> None:
    folder = LAYOUTS["SDXL"].save(tmp_path / "model")
    assert account_for_folder(folder, {}).fault is None
    file = next((folder / "unet").glob("*.safetensors"))
    original = _header(file)
    for changed, names in _changes(original, ()):
        _write_header(file, changed)
        fault = account_for_folder(folder, {}).fault
        assert fault is not None, names
        assert any(f"'{name}'" in fault for name in names), (names, fault)


def test_a_network_that_only_transformers_knows_is_accounted_for(tmp_path: Path) -> None:
    network = Qwen2Model(
        Qwen2Config(
            vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
        )
    )
    network.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    original = load_file(file)
    norm = original["norm.weight"]

    def account(tensors: dict[str, Tensor]) -> Account:
        save_file(tensors, file)
        return account_for_component(tmp_path, Qwen2Model, "text_encoder")

    assert account(original) == Account()
    assert account({**original, "lm_head.weight": norm.clone()}).ignored.keys() == {"lm_head.weight"}
    for changed, name in (
        ({key: tensor for key, tensor in original.items() if key != "norm.weight"}, "norm.weight"),
        ({**original, "surplus": norm.clone()}, "surplus"),
        ({**original, "norm.weight": norm[:-1].clone()}, "norm.weight"),
    ):
        fault = account(changed).fault
        assert fault is not None
        assert f"'{name}'" in fault
        assert "\n" not in fault


def _header(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return json.loads(stream.read(int.from_bytes(stream.read(8), "little")))


def _write_header(file: Path, header: dict[str, Any]) -> None:
    """Write a file of these tensors' names, dtypes and shapes, and no values."""
    end, content = 0, dict[str, Any]()
    for name, entry in header.items():
        if name == "__metadata__":
            content[name] = entry
            continue
        start, end = end, end + math.prod(entry["shape"]) * _BYTES[entry["dtype"]]
        content[name] = {**entry, "data_offsets": [start, end]}
    text = json.dumps(content).encode()
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
