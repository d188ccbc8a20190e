"""Imports of folders into BentoML's real store, in a temporary home."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from hypergen.model_store import diffusers_layout, entries, store
from tests.support.model_folders import ROOT, WEIGHTS, error_message, files_of, make_model


def test_an_unchanged_folder_is_imported_once(folder: Path):
    lines: list[str] = []
    first = store.get_or_import(str(folder), report_progress=lines.append)
    again = store.get_or_import(str(folder), report_progress=lines.append)
    assert first == again
    assert first.source == str(folder)
    assert first.tag.startswith("my-model:")
    assert lines == [f"Importing {folder} as {first.tag}"]
    assert store.import_model(str(folder)).tag == first.tag


def test_weights_are_hard_links_and_configurations_are_copies(folder: Path):
    stored = store.get_or_import(str(folder))
    assert (stored.path / "unet" / WEIGHTS).samefile(folder / "unet" / WEIGHTS)
    assert not (stored.path / "unet/config.json").samefile(folder / "unet/config.json")


def test_the_loras_of_a_model_are_stored_with_it(folder: Path):
    before = store.get_or_import(str(folder)).tag
    (folder / "loras").mkdir()
    save_file({"unet.a.lora_A.weight": np.ones((2, 2))}, folder / "loras" / "Pixel_Art.safetensors")
    (folder / "loras" / "notes.txt").write_text("not stored")
    stored = store.get_or_import(str(folder))
    assert stored.tag != before
    assert [file.name for file in (stored.path / "loras").iterdir()] == ["Pixel_Art.safetensors"]


def test_without_hard_links_small_models_are_copied(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "link", refuse_link)
    stored = store.get_or_import(str(folder))
    weights = stored.path / "unet" / WEIGHTS
    assert weights.read_bytes() == (folder / "unet" / WEIGHTS).read_bytes()
    assert not weights.samefile(folder / "unet" / WEIGHTS)


def test_without_hard_links_large_models_are_symbolic_links(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "link", refuse_link)
    monkeypatch.setattr(entries, "MAX_COPY_BYTES", 100)
    stored = store.get_or_import(str(folder))
    assert (stored.path / "unet" / WEIGHTS).readlink() == folder / "unet" / WEIGHTS
    folder.rename(folder.with_name("elsewhere"))
    assert f"is missing or has changed since the import; import {folder} again" in error_message(
        store.find_by_tag, stored.tag
    )
    assert store.list_models() == []


def refuse_link(*_: Any) -> None:
    raise OSError(18, "Invalid cross-device link")


def test_a_changed_folder_gets_a_new_tag(folder: Path):
    first = store.get_or_import(str(folder))
    save_file({"weight": np.zeros(64, dtype=np.float32)}, folder / "unet" / "new.safetensors")
    os.replace(folder / "unet" / "new.safetensors", folder / "unet" / WEIGHTS)
    second = store.get_or_import(str(folder))
    assert first.tag != second.tag
    assert store.find_by_tag(first.tag) == first
    import bentoml

    assert str(bentoml.models.get("my-model:latest").tag) == second.tag
    assert store.find_by_tag("my-model") == store.find_by_tag("my-model:latest") == second


def test_weights_changed_after_the_import_are_noticed(folder: Path):
    stored = store.get_or_import(str(folder))
    with (folder / "unet" / WEIGHTS).open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")
    os.utime(folder / "unet" / WEIGHTS, ns=(0, 0))
    assert "is missing or has changed" in error_message(store.find_by_tag, stored.tag)
    assert store.get_or_import(str(folder)).tag != stored.tag


def test_only_files_that_the_pipeline_needs_are_stored(folder: Path):
    for name in (
        "unet/diffusion_pytorch_model.bin",
        "vae/x.ckpt",
        "v1.safetensors",
        "run.py",
        "tokenizer/t.model",
    ):
        (folder / name).write_bytes(b"x")
    save_file({"w": np.zeros(1)}, folder / "unet/diffusion_pytorch_model.non_ema.safetensors")
    (folder / "other").mkdir()
    (folder / "other/config.json").write_text("{}")
    assert files_of(store.get_or_import(str(folder)).path) == {
        "model.yaml",
        "model_index.json",
        "README.md",
        f"unet/{WEIGHTS}",
        "unet/config.json",
        f"vae/{WEIGHTS}",
        "vae/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/merges.txt",
        "tokenizer/t.model",
    }


def test_fp16_variants_are_stored_for_half_precision_under_the_plain_name(folder: Path):
    save_file(
        {"weight": np.zeros(3, dtype=np.float16)}, folder / "unet/diffusion_pytorch_model.fp16.safetensors"
    )
    half, full = (
        store.get_or_import(str(folder), prefer_fp16=True),
        store.get_or_import(str(folder)),
    )
    assert half.tag != full.tag
    assert half.size_bytes < full.size_bytes
    assert (half.path / "unet" / WEIGHTS).samefile(folder / "unet/diffusion_pytorch_model.fp16.safetensors")
    assert (full.path / "unet" / WEIGHTS).samefile(folder / "unet" / WEIGHTS)
    assert files_of(half.path) == files_of(full.path)


def test_sharded_fp16_weights_keep_the_names_in_their_index():
    names = [
        "model_index.json",
        "t5/model-00001-of-00001.safetensors",
        "t5/model.safetensors.index.json",
        "t5/model.fp16-00001-of-00001.safetensors",
        "t5/model.safetensors.index.fp16.json",
    ]
    assert diffusers_layout.select_files(names, ["t5"], prefer_fp16=True).files == {
        "model_index.json": "model_index.json",
        "t5/model.fp16-00001-of-00001.safetensors": "t5/model.fp16-00001-of-00001.safetensors",
        "t5/model.safetensors.index.json": "t5/model.safetensors.index.fp16.json",
    }


def test_an_interrupted_import_is_not_listed_and_can_be_repeated(folder: Path, home: Path):
    stored = store.get_or_import(str(folder))
    (stored.path / "vae" / WEIGHTS).unlink()
    (home / "models/my-model/half").mkdir()
    (home / "hypergen/my-model/my-model").mkdir(parents=True)
    assert store.list_models() == []
    assert store.get_or_import(str(folder)).tag == stored.tag
    assert [model.tag for model in store.list_models()] == [stored.tag]


def test_a_killed_import_leaves_no_model(folder: Path):
    program = """if True:
        import os, signal, sys
        from hypergen.model_store import store
        os.link = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        store.get_or_import(sys.argv[1])
        """
    killed = subprocess.run([sys.executable, "-c", program, str(folder)], cwd=ROOT, check=False)
    assert killed.returncode == -9
    assert store.list_models() == []
    assert store.get_or_import(str(folder)) == store.list_models()[0]


def test_two_concurrent_imports_write_one_entry(folder: Path):
    program = "import sys; from hypergen.model_store import store; "
    program += "print(store.get_or_import(sys.argv[1], report_progress=print).tag)"
    command = [sys.executable, "-c", program, str(folder)]
    processes = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0][-1] == outputs[1][-1] == store.list_models()[0].tag
    assert sum(line.startswith("Importing") for output in outputs for line in output) == 1
    assert len(store.list_models()) == 1


def test_a_model_stored_by_another_program_is_found(folder: Path):
    import shutil

    import bentoml

    with bentoml.models.create("theirs") as model:
        shutil.copytree(folder, model.path, dirs_exist_ok=True)
    found = store.find_by_tag("theirs")
    assert store.get_or_import("theirs:latest") == found
    assert found.source == found.tag


def test_names_that_bentoml_does_not_allow_are_changed(tmp_path: Path):
    assert store.get_or_import(str(make_model(tmp_path / ("X" * 90)))).tag.startswith("x" * 54)
    assert store.get_or_import(str(make_model(tmp_path / "модель"))).tag.startswith("model:")
    assert store.get_or_import(str(make_model(tmp_path / "hypergen-tiny"))).tag.startswith(
        "hypergen-tiny-folder:"
    )


def test_torch_is_not_imported(folder: Path):
    program = "import sys; from hypergen.model_store import store; store.get_or_import(sys.argv[1])"
    program += "; from hypergen.model_store import hub; import huggingface_hub.hf_api"
    program += "; print(*sys.modules)"
    command = [sys.executable, "-c", program, str(folder)]
    modules = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    assert "bentoml" in modules
    assert not {"torch", "diffusers", "transformers"} & set(modules)
