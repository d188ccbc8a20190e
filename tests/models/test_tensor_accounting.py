"""Whatever happens to one tensor of a checkpoint file, loading it names the tensor."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hypergen.errors import ModelError
from hypergen.model_families import EDM_MARKERS
from hypergen.model_store.diffusers_layout import CHECKPOINT
from hypergen.models.folder_accounting import account_for_folder
from hypergen.models.single_file_loading import account_for
from tests.support.checkpoint_layouts import LAYOUTS

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


def _header(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return json.loads(stream.read(int.from_bytes(stream.read(8), "little")))


def _write_header(file: Path, header: dict[str, Any]) -> None:
    """Write a file of this header and no values; the offsets are those of the size that it needs."""
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + max(ends))
