"""The model store, with BentoML's real store in a temporary home and a small stand-in for the hub."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from hypergen import model_folder, store
from hypergen.errors import ModelError

ROOT = Path(__file__).parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.38.0",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "safety_checker": [None, None],
    "requires_safety_checker": False,
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Its own BENTOML_HOME; BentoML reads it once per process, so its providers are overridden too."""
    home = tmp_path / "home"
    (home / "models").mkdir(parents=True)
    monkeypatch.setenv("BENTOML_HOME", str(home))
    monkeypatch.setenv("BENTOML_DO_NOT_TRACK", "True")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what BentoML and its dependencies say of each other at import
        import bentoml.models
        from bentoml._internal.configuration.containers import BentoMLContainer
        from bentoml._internal.models import ModelStore

    assert bentoml.models
    with (
        BentoMLContainer.bentoml_home.patch(str(home)),
        BentoMLContainer.model_store.patch(ModelStore(home / "models")),
    ):
        yield home


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_model(tmp_path / "My Model")


def make_model(folder: Path, index: dict[str, Any] = INDEX) -> Path:
    """A folder in diffusers layout whose weights are a few numbers."""
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "README.md").write_text("A model.")
    for component in ("unet", "vae"):
        (folder / component).mkdir()
        (folder / component / "config.json").write_text("{}")
        save_file({"weight": np.arange(64, dtype=np.float32)}, folder / component / WEIGHTS)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "merges.txt").write_text("a b")
    return folder


def files_of(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def message(run: Any, *arguments: Any, **options: Any) -> str:
    """The one line that a call fails with."""
    with pytest.raises(ModelError) as caught:
        run(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Folders


def test_the_same_folder_is_imported_once(folder: Path):
    said: list[str] = []
    first = store.ensure(str(folder), progress=said.append)
    again = store.ensure(str(folder), progress=said.append)
    assert first == again
    assert first.source == str(folder)
    assert first.tag.startswith("my-model:")
    assert said == [f"Importing {folder} as {first.tag}"]
    assert store.import_model(str(folder)).tag == first.tag


def test_weights_are_hard_links_and_configurations_are_copies(folder: Path):
    stored = store.ensure(str(folder))
    assert (stored.path / "unet" / WEIGHTS).samefile(folder / "unet" / WEIGHTS)
    assert not (stored.path / "unet/config.json").samefile(folder / "unet/config.json")


def test_without_hard_links_small_models_are_copied(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "link", refuse_link)
    stored = store.ensure(str(folder))
    weights = stored.path / "unet" / WEIGHTS
    assert weights.read_bytes() == (folder / "unet" / WEIGHTS).read_bytes()
    assert not weights.samefile(folder / "unet" / WEIGHTS)


def test_without_hard_links_large_models_are_served_where_they_lie(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "link", refuse_link)
    monkeypatch.setattr(store, "MAX_COPY_BYTES", 100)
    stored = store.ensure(str(folder))
    assert (stored.path / "unet" / WEIGHTS).readlink() == folder / "unet" / WEIGHTS
    folder.rename(folder.with_name("elsewhere"))
    assert f"gone or changed since its import; import {folder} again" in message(store.find, stored.tag)
    assert store.list_models() == []


def refuse_link(*_: Any) -> None:
    raise OSError(18, "Invalid cross-device link")


def test_a_changed_folder_gets_a_new_tag(folder: Path):
    first = store.ensure(str(folder))
    save_file({"weight": np.zeros(64, dtype=np.float32)}, folder / "unet" / "new.safetensors")
    os.replace(folder / "unet" / "new.safetensors", folder / "unet" / WEIGHTS)
    second = store.ensure(str(folder))
    assert first.tag != second.tag
    assert store.find(first.tag) == first
    import bentoml

    assert str(bentoml.models.get("my-model:latest").tag) == second.tag
    assert store.find("my-model") == store.find("my-model:latest") == second


def test_weights_written_over_after_the_import_are_noticed(folder: Path):
    stored = store.ensure(str(folder))
    with (folder / "unet" / WEIGHTS).open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")
    os.utime(folder / "unet" / WEIGHTS, ns=(0, 0))
    assert "gone or changed" in message(store.find, stored.tag)
    assert store.ensure(str(folder)).tag != stored.tag


def test_only_what_the_pipeline_needs_is_taken(folder: Path):
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
    assert files_of(store.ensure(str(folder)).path) == {
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


def test_fp16_variants_are_taken_for_half_precision_under_the_plain_name(folder: Path):
    save_file(
        {"weight": np.zeros(3, dtype=np.float16)}, folder / "unet/diffusion_pytorch_model.fp16.safetensors"
    )
    half, full = store.ensure(str(folder), dtype="float16"), store.ensure(str(folder), dtype="float32")
    assert half.tag != full.tag
    assert half.size_bytes < full.size_bytes
    assert (half.path / "unet" / WEIGHTS).samefile(folder / "unet/diffusion_pytorch_model.fp16.safetensors")
    assert (full.path / "unet" / WEIGHTS).samefile(folder / "unet" / WEIGHTS)
    assert files_of(half.path) == files_of(full.path)


def test_sharded_fp16_weights_keep_the_names_that_their_index_lists():
    names = [
        "model_index.json",
        "t5/model-00001-of-00001.safetensors",
        "t5/model.safetensors.index.json",
        "t5/model.fp16-00001-of-00001.safetensors",
        "t5/model.safetensors.index.fp16.json",
    ]
    assert model_folder.select_files(names, ["t5"], half=True).files == {
        "model_index.json": "model_index.json",
        "t5/model.fp16-00001-of-00001.safetensors": "t5/model.fp16-00001-of-00001.safetensors",
        "t5/model.safetensors.index.json": "t5/model.safetensors.index.fp16.json",
    }


def test_an_interrupted_import_is_not_a_model_and_does_not_stand_in_the_way(folder: Path, home: Path):
    stored = store.ensure(str(folder))
    (stored.path / "vae" / WEIGHTS).unlink()
    (home / "models/my-model/half").mkdir()
    (home / "hypergen/my-model/my-model").mkdir(parents=True)
    assert store.list_models() == []
    assert store.ensure(str(folder)).tag == stored.tag
    assert [model.tag for model in store.list_models()] == [stored.tag]


def test_a_killed_import_leaves_no_model(folder: Path):
    program = """if True:
        import os, signal, sys
        from hypergen import store
        os.link = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        store.ensure(sys.argv[1])
        """
    killed = subprocess.run([sys.executable, "-c", program, str(folder)], cwd=ROOT, check=False)
    assert killed.returncode == -9
    assert store.list_models() == []
    assert store.ensure(str(folder)) == store.list_models()[0]


def test_two_processes_importing_at_once_make_one_entry(folder: Path):
    program = "import sys; from hypergen import store; print(store.ensure(sys.argv[1], progress=print).tag)"
    command = [sys.executable, "-c", program, str(folder)]
    processes = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0][-1] == outputs[1][-1] == store.list_models()[0].tag
    assert sum(line.startswith("Importing") for lines in outputs for line in lines) == 1
    assert len(store.list_models()) == 1


def test_a_model_that_someone_else_put_into_the_store_is_found(folder: Path):
    import shutil

    import bentoml

    with bentoml.models.create("theirs") as model:
        shutil.copytree(folder, model.path, dirs_exist_ok=True)
    found = store.find("theirs")
    assert store.ensure("theirs:latest") == found
    assert found.source == found.tag


def test_names_that_bentoml_would_refuse_are_changed(tmp_path: Path):
    assert store.ensure(str(make_model(tmp_path / ("X" * 90)))).tag.startswith("x" * 54)
    assert store.ensure(str(make_model(tmp_path / "модель"))).tag.startswith("model:")
    assert store.ensure(str(make_model(tmp_path / "hypergen-tiny"))).tag.startswith("hypergen-tiny-folder:")


# What was given


def test_a_folder_comes_before_a_tag_and_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_model(tmp_path / "owner/name")
    monkeypatch.chdir(tmp_path)
    assert store.ensure("owner/name").source == "owner/name"
    assert store.ensure("name").source == "owner/name"


@pytest.mark.parametrize("given", ["nothing", "no:such", "a/b/c", "", "owner/name:v1", "NAME:latest"])
def test_what_cannot_be_a_model_is_told_with_what_would_work(given: str, folder: Path):
    tag = store.ensure(str(folder)).tag
    text = message(store.ensure, given)
    assert f"'{given}'" in text
    assert "owner/name" in text
    assert tag in text


def test_missing_paths_are_told_as_such(tmp_path: Path):
    for given in (str(tmp_path / "none"), "./none", "../none", "~/none-of-mine", "~nobody-here/x"):
        assert message(store.ensure, given) == f"No such folder: {given}"
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "is a file" in message(store.ensure, str(tmp_path / "model.safetensors"))


@pytest.mark.skipif(not (store.EMBEDDED_FOLDER / "model_index.json").is_file(), reason="not trained yet")
def test_the_embedded_model_is_the_default():
    assert store.ensure(None) == store.ensure("hypergen-tiny")
    assert store.ensure(None).source == "hypergen-tiny"


# Checks of a folder


def test_a_whole_folder_passes(folder: Path):
    store.check_folder(folder)


def test_truncated_weights_are_named_with_both_sizes(folder: Path):
    weights = folder / "unet" / WEIGHTS
    size = weights.stat().st_size
    os.truncate(weights, size - 10)
    expected = f"unet/{WEIGHTS} is damaged: it should have {size} bytes and has {size - 10}."
    assert message(store.ensure, str(folder)) == f"{folder}: {expected}"


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 7, b"\xff" * 100, b"\x04" + b"\0" * 7 + b"[1]]", b"\x02" + b"\0" * 7 + b"[]"]
)
def test_broken_headers_are_named(folder: Path, content: bytes):
    (folder / "vae" / WEIGHTS).write_bytes(content)
    assert f"vae/{WEIGHTS} is damaged" in message(store.check_folder, folder)


def test_git_lfs_pointers_are_told_as_such(folder: Path):
    (folder / "vae" / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "git lfs pull" in message(store.check_folder, folder)


def test_missing_parts_are_named(folder: Path):
    (folder / "vae/config.json").unlink()
    assert "vae/config.json is missing" in message(store.check_folder, folder)
    (folder / "vae" / WEIGHTS).rename(folder / "vae/diffusion_pytorch_model.bin")
    assert "vae has only pickle weights" in message(store.check_folder, folder)
    (folder / "vae/diffusion_pytorch_model.bin").unlink()
    assert "vae has no safetensors weights" in message(store.check_folder, folder)
    (folder / "vae").rmdir()
    assert "'vae', but there is no such folder" in message(store.check_folder, folder)
    (folder / "model_index.json").write_text("{")
    assert "model_index.json is damaged" in message(store.check_folder, folder)
    (folder / "model_index.json").unlink()
    assert "has no model_index.json" in message(store.check_folder, folder)


def test_missing_shards_are_named(folder: Path):
    (folder / "unet" / WEIGHTS).rename(folder / "unet/model-00001-of-00002.safetensors")
    assert "without their safetensors.index.json" in message(store.check_folder, folder)
    index = folder / "unet" / f"{WEIGHTS}.index.json"
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index.write_text(json.dumps({"weight_map": shards}))
    assert "names 'model-00002-of-00002.safetensors'" in message(store.check_folder, folder)
    index.write_text(json.dumps({"weight_map": {"b": f"../vae/{WEIGHTS}"}}))
    assert "no such file beside it" in message(store.check_folder, folder)


@pytest.mark.parametrize(
    "change",
    [
        {"_class_name": ["pipeline", "Mine"]},
        {"unet": ["my_library", "UNet"]},
        {"unet": ["stable_diffusion", "UNet"]},
        {"../evil": ["diffusers", "UNet2DConditionModel"]},
        {"unet": ["diffusers"]},
        {"unet": ["diffusers", None]},
    ],
)
def test_a_pipeline_that_names_foreign_code_is_refused(tmp_path: Path, change: dict[str, Any]):
    folder = make_model(tmp_path / "model", INDEX | change)
    assert str(folder) in message(store.check_folder, folder)


def test_a_deleted_safety_checker_is_no_damage(tmp_path: Path):
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    folder = make_model(tmp_path / "model", INDEX | {"safety_checker": checker})
    store.check_folder(folder)
    assert store.ensure(str(folder)).tag


# The hub


@dataclass
class Hub:
    """What the stand-in serves, and what was asked of it."""

    files: dict[str, bytes]
    gated: bool = False
    commit: str = COMMIT
    asked: list[str] = field(default_factory=list)

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        self.asked.append(path)
        parts = path.partition("?")[0].strip("/").split("/")
        if "owner/model" not in path:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        if parts[:1] == ["api"]:
            if parts[4:5] == ["revision"] and parts[5] not in ("main", "v1", self.commit):
                return 404, {"X-Error-Code": "RevisionNotFound"}, b""
            if parts[4:5] == ["tree"]:
                tree = [
                    {"type": "file", "path": n, "size": len(c), "oid": etag(c)} for n, c in self.files.items()
                ]
                return 200, {}, json.dumps(tree).encode()
            siblings = [{"rfilename": name, "size": len(content)} for name, content in self.files.items()]
            return (
                200,
                {},
                json.dumps({"id": "owner/model", "sha": self.commit, "siblings": siblings}).encode(),
            )
        if self.gated:
            return 401, {"X-Error-Code": "GatedRepo"}, b""
        content = self.files.get("/".join(parts[4:]))
        if content is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        return 200, {"ETag": f'"{etag(content)}"', "X-Repo-Commit": self.commit}, content

    def fetched(self) -> set[str]:
        return {path.partition(f"/resolve/{self.commit}/")[2] for path in self.asked if "/resolve/" in path}


def etag(content: bytes) -> str:
    import hashlib

    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    for name in ("unet/diffusion_pytorch_model.bin", "model.ckpt", "run.py"):
        (folder / name).write_bytes(b"x")
    hub = Hub({name: (folder / name).read_bytes() for name in files_of(folder)})

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            status, headers, body = hub.answer(self.path)
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815  the name that http.server looks for

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    use_endpoint(f"http://127.0.0.1:{server.server_port}", tmp_path, monkeypatch)
    yield hub
    server.shutdown()
    server.server_close()


def use_endpoint(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_ENDPOINT and HF_HUB_CACHE, which huggingface_hub reads once, at its import."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def test_only_the_needed_files_come_from_the_hub(hub: Hub, folder: Path):
    said: list[str] = []
    stored = store.ensure("owner/model", progress=said.append)
    needed = files_of(folder) - {"unet/diffusion_pytorch_model.bin", "model.ckpt", "run.py"}
    assert hub.fetched() == needed
    assert files_of(stored.path) == needed | {"model.yaml"}
    assert stored.tag == f"owner--model:{COMMIT[:12]}"
    assert stored.source == "owner/model"
    assert [line.split()[0] for line in said] == ["Asking", "Downloading", "Importing"]
    assert (stored.path / "unet" / WEIGHTS).stat().st_nlink > 1


def test_a_stored_hub_model_needs_no_hub_until_it_is_imported_again(hub: Hub):
    first = store.ensure("owner/model")
    hub.asked.clear()
    assert store.ensure("owner/model") == first
    assert store.ensure("owner/model", dtype="float16") == first
    assert store.ensure("owner/model", revision=COMMIT) == first
    assert hub.asked == []
    hub.commit = COMMIT[::-1]
    assert store.ensure("owner/model", revision="v1").tag == f"owner--model:{COMMIT[::-1][:12]}"
    assert store.ensure("owner/model") == first
    assert store.import_model("owner/model") == store.find(f"owner--model:{COMMIT[::-1][:12]}")


def test_the_hub_gives_fp16_variants_for_half_precision(hub: Hub):
    hub.files["unet/diffusion_pytorch_model.fp16.safetensors"] = hub.files[f"unet/{WEIGHTS}"]
    half = store.ensure("owner/model", dtype="bfloat16")
    assert half.tag == f"owner--model:{COMMIT[:12]}-fp16"
    assert f"unet/{WEIGHTS}" not in hub.fetched()
    assert store.ensure("owner/model").tag == f"owner--model:{COMMIT[:12]}"


def test_failures_of_the_hub_are_one_line(hub: Hub):
    assert "owner/other is not on the hub" in message(store.ensure, "owner/other")
    assert "has no revision 'v9'" in message(store.ensure, "owner/model", revision="v9")
    hub.gated = True
    gated = message(store.ensure, "owner/model")
    assert "owner/model is gated" in gated
    assert "HF_TOKEN" in gated
    del hub.files[f"unet/{WEIGHTS}"]
    hub.gated = False
    assert "owner/model: unet has only pickle weights" in message(store.ensure, "owner/model")
    del hub.files["model_index.json"]
    assert "has no model_index.json" in message(store.ensure, "owner/model")
    assert store.list_models() == []


@pytest.mark.timeout(20)
def test_no_network_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        use_endpoint(f"http://127.0.0.1:{closed.getsockname()[1]}", tmp_path, monkeypatch)
        text = message(store.ensure, "owner/model")
    assert "owner/model" in text
    assert "not reachable" in text


def test_offline_mode_is_one_line(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in message(store.ensure, "owner/model")
    assert hub.asked == []


def test_torch_is_not_imported(folder: Path):
    program = "import sys; from hypergen import store; store.ensure(sys.argv[1])"
    program += "; from hypergen import hub; import huggingface_hub.hf_api"
    program += "; print(*sys.modules)"
    command = [sys.executable, "-c", program, str(folder)]
    modules = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    assert "bentoml" in modules
    assert not {"torch", "diffusers", "transformers"} & set(modules)
