"""Models of the hub, from a small local server with the same endpoints."""

from __future__ import annotations

import json
import shutil
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as save_torch_file

from hypergen.conditioning import controlnet
from hypergen.config import EngineSettings
from hypergen.model_families import servable
from hypergen.model_store import store
from hypergen.model_store.components import download_controlnets, find_vae
from hypergen.model_store.safety_checkers import find_safety_checker
from hypergen.resolve_models import prefers_fp16
from tests.models.test_safety_checker import save_checker
from tests.support.checkpoint_layouts import LAYOUTS
from tests.support.model_check import refuse_unusable
from tests.support.model_folders import COMMIT, WEIGHTS, error_message, files_of
from tests.support.small_models import save_sd


@dataclass
class Hub:
    """The files of the fake hub, the paths that were requested, and those of which only a part was."""

    files: dict[str, bytes]
    gated: bool = False
    commit: str = COMMIT
    requested: list[str] = field(default_factory=list)
    in_part: set[str] = field(default_factory=set)

    def respond(self, path: str, range_given: str | None) -> tuple[int, dict[str, str], bytes]:
        if range_given is None:
            self.requested.append(path)
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
        headers = {"ETag": f'"{etag(content)}"', "X-Repo-Commit": self.commit}
        if range_given is None:
            return 200, headers, content
        self.in_part.add("/".join(parts[4:]))
        first, last = map(int, range_given.removeprefix("bytes=").split("-"))
        part = content[first : last + 1]
        headers["Content-Range"] = f"bytes {first}-{first + len(part) - 1}/{len(content)}"
        return 206, headers, part

    def downloaded(self) -> set[str]:
        return {
            path.partition(f"/resolve/{self.commit}/")[2] for path in self.requested if "/resolve/" in path
        }


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
            status, headers, body = hub.respond(self.path, self.headers.get("Range"))
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815  http.server needs this name

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    use_endpoint(f"http://127.0.0.1:{server.server_port}", tmp_path, monkeypatch)
    yield hub
    server.shutdown()
    server.server_close()


def use_endpoint(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set HF_ENDPOINT and HF_HUB_CACHE, which huggingface_hub only reads at import."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def test_only_needed_files_are_downloaded(hub: Hub, folder: Path):
    lines: list[str] = []
    stored = store.get_or_import("owner/model", report_progress=lines.append)
    needed = files_of(folder) - {"unet/diffusion_pytorch_model.bin", "model.ckpt", "run.py"}
    assert hub.downloaded() == needed
    assert files_of(stored.path) == needed | {"model.yaml"}
    assert stored.tag == f"owner--model:{COMMIT[:12]}"
    assert stored.source == "owner/model"
    assert [line.split()[0] for line in lines] == ["Looking", "Downloading", "Importing"]
    assert (stored.path / "unet" / WEIGHTS).stat().st_nlink > 1


def test_a_stored_hub_model_is_used_without_requests_until_it_is_imported_again(hub: Hub):
    first = store.get_or_import("owner/model")
    hub.requested.clear()
    assert store.get_or_import("owner/model") == first
    assert store.get_or_import("owner/model", prefer_fp16=True) == first
    assert store.get_or_import("owner/model", revision=COMMIT) == first
    assert hub.requested == []
    hub.commit = COMMIT[::-1]
    assert store.get_or_import("owner/model", revision="v1").tag == f"owner--model:{COMMIT[::-1][:12]}"
    assert store.get_or_import("owner/model") == first
    assert store.import_model("owner/model") == store.find_by_tag(f"owner--model:{COMMIT[::-1][:12]}")


def test_fp16_variants_are_downloaded_for_half_precision(hub: Hub):
    hub.files["unet/diffusion_pytorch_model.fp16.safetensors"] = hub.files[f"unet/{WEIGHTS}"]
    half = store.get_or_import("owner/model", prefer_fp16=True)
    assert half.tag == f"owner--model:{COMMIT[:12]}-fp16"
    assert f"unet/{WEIGHTS}" not in hub.downloaded()
    assert store.get_or_import("owner/model").tag == f"owner--model:{COMMIT[:12]}"


def _served(**engine: Any) -> str:
    """The store's tag of the files that a server with these engine settings would take."""
    settings = EngineSettings.model_validate(engine)
    return store.get_or_import("owner/model", prefer_fp16=prefers_fp16(settings)).tag


def test_a_gpu_server_downloads_fp16_files_and_a_cpu_server_fp32(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    hub.files["unet/diffusion_pytorch_model.fp16.safetensors"] = hub.files[f"unet/{WEIGHTS}"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    fp32, fp16 = f"owner--model:{COMMIT[:12]}", f"owner--model:{COMMIT[:12]}-fp16"
    assert _served(device="cuda") == fp16
    assert f"unet/{WEIGHTS}" not in hub.downloaded()
    assert _served(device="cpu", dtype="float16") == fp16
    assert _served(device="cuda", dtype="float32") == fp32
    assert _served(device="cpu") == fp32
    assert _served(device="cuda") == fp16


def test_stored_fp32_files_serve_a_gpu_without_another_download(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    hub.files["unet/diffusion_pytorch_model.fp16.safetensors"] = hub.files[f"unet/{WEIGHTS}"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    stored = _served(device="cpu")
    hub.requested.clear()
    assert _served(device="cuda") == stored
    assert hub.requested == []
    imported = store.import_model("owner/model", prefer_fp16=True)
    assert _served(device="cuda") == imported.tag != stored


def test_hub_errors_are_one_line(hub: Hub):
    assert "owner/other is not on the hub" in error_message(store.get_or_import, "owner/other")
    assert "has no revision 'v9'" in error_message(store.get_or_import, "owner/model", revision="v9")
    hub.gated = True
    gated = error_message(store.get_or_import, "owner/model")
    assert "owner/model is gated" in gated
    assert "HF_TOKEN" in gated
    del hub.files[f"unet/{WEIGHTS}"]
    hub.gated = False
    assert "owner/model: unet has only pickle weights" in error_message(store.get_or_import, "owner/model")
    del hub.files["model_index.json"]
    assert "has no model_index.json" in error_message(store.get_or_import, "owner/model")
    assert store.list_models() == []


@pytest.mark.timeout(20)
def test_no_network_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        use_endpoint(f"http://127.0.0.1:{closed.getsockname()[1]}", tmp_path, monkeypatch)
        text = error_message(store.get_or_import, "owner/model")
    assert "owner/model" in text
    assert "not reachable" in text


def test_offline_mode_is_one_line(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in error_message(store.get_or_import, "owner/model")
    assert hub.requested == []


def test_only_files_that_a_checkpoint_lacks_are_downloaded(hub: Hub, folder: Path, tmp_path: Path):
    file = tmp_path / "unet.safetensors"
    save_file({"conv_in.weight": np.zeros((8, 4, 3, 3), np.float32)}, file)
    stored = store.get_or_import(str(file), single_file_config="owner/model")
    not_downloaded = {f"unet/{WEIGHTS}", "unet/diffusion_pytorch_model.bin", "model.ckpt", "run.py"}
    assert hub.downloaded() == files_of(folder) - not_downloaded
    assert files_of(stored.path) == files_of(folder) - not_downloaded | {
        "model.yaml",
        "checkpoint.safetensors",
    }
    assert (stored.path / "checkpoint.safetensors").read_bytes() == file.read_bytes()
    hub.requested.clear()
    assert store.get_or_import(str(file), single_file_config="owner/model") == stored
    assert hub.requested == []


def test_a_model_that_is_not_a_refiner_is_refused_before_its_weights_are_downloaded(hub: Hub):
    assert "is not a refiner" in error_message(store.get_or_import_refiner, "owner/model")
    assert hub.downloaded() == {"model_index.json"}
    index = json.loads(hub.files["model_index.json"])
    index["_class_name"] = "StableDiffusionXLImg2ImgPipeline"
    hub.files["model_index.json"], hub.commit = json.dumps(index).encode(), COMMIT[::-1]
    refiner = store.get_or_import_refiner("owner/model")
    assert refiner is not None
    assert refiner.source == "owner/model"


@pytest.mark.parametrize("resolve", [store.get_or_import, store.import_model])
def test_a_pipeline_that_needs_an_image_is_refused_by_its_index(hub: Hub, resolve: Any):
    index = json.loads(hub.files["model_index.json"])
    index["_class_name"] = "StableDiffusionInstructPix2PixPipeline"
    hub.files["model_index.json"] = json.dumps(index).encode()
    assert "needs 'image'" in error_message(resolve, "owner/model", pipelines=servable())
    assert hub.downloaded() == {"model_index.json"}


def test_configurations_are_checked_before_weights_are_downloaded(hub: Hub, tmp_path: Path):
    model = save_sd(tmp_path / "model")
    hub.files = {name: (model / name).read_bytes() for name in files_of(model)}
    name = "scheduler/scheduler_config.json"
    config = json.loads(hub.files[name])
    hub.files[name] = json.dumps({**config, "prediction_type": "noise"}).encode()
    message = error_message(store.get_or_import, "owner/model", check_files=refuse_unusable)
    assert "prediction_type" in message
    assert hub.downloaded() == {name for name in hub.files if not name.endswith(".safetensors")}
    assert not store.list_models()


@pytest.mark.parametrize("change", ["a tensor more", "a tensor less", "another shape", "no header"])
def test_tensors_are_compared_before_weights_are_downloaded(hub: Hub, tmp_path: Path, change: str):
    model = save_sd(tmp_path / "model")
    hub.files = {name: (model / name).read_bytes() for name in files_of(model)}
    weights = {name for name in hub.files if name.endswith(".safetensors")}
    name = "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(model / name)
    if change == "a tensor more":
        tensors["surplus"] = tensors["conv_in.bias"].clone()
    elif change == "a tensor less":
        del tensors["conv_in.bias"]
    else:
        tensors["conv_in.bias"] = tensors["conv_in.bias"][:-1].clone()
    save_torch_file(tensors, tmp_path / "changed.safetensors")
    content = (tmp_path / "changed.safetensors").read_bytes()
    hub.files[name] = content[:8] + b"[" + content[9:] if change == "no header" else content
    message = error_message(store.get_or_import, "owner/model", check_files=refuse_unusable)
    expected = {"a tensor more": "'surplus'", "no header": f"owner/model: {name} is damaged"}
    assert expected.get(change, "conv_in.bias") in message
    assert hub.downloaded() == set(hub.files) - weights
    assert name in hub.in_part <= weights
    assert not store.list_models()


def test_a_checkpoint_is_checked_before_the_weights_that_it_lacks_are_downloaded(hub: Hub, tmp_path: Path):
    file, _, model = LAYOUTS["FLUX fp8_scaled"].build(tmp_path)
    hub.files = {name: (model / name).read_bytes() for name in files_of(model)}
    tensors = load_file(file)
    tensors["surplus"] = tensors["x_embedder.bias"].clone()
    bad = tmp_path / "bad.safetensors"
    save_torch_file(tensors, bad)
    options: dict[str, Any] = {"single_file_config": "owner/model", "check_files": refuse_unusable}
    assert "'surplus'" in error_message(store.get_or_import, str(bad), **options)
    assert hub.downloaded() == {name for name in hub.files if not name.endswith(".safetensors")}
    assert not store.list_models()
    stored = store.get_or_import(str(file), **options)
    assert hub.downloaded() == {name for name in hub.files if not name.startswith("transformer/diff")}
    assert (stored.path / "checkpoint.safetensors").is_file()


def test_a_configuration_of_another_family_is_refused_by_its_index(hub: Hub, tmp_path: Path):
    file, _, _ = LAYOUTS["FLUX fp8_scaled"].build(tmp_path)
    message = error_message(store.get_or_import, str(file), single_file_config="owner/model")
    assert "owner/model is of a StableDiffusionPipeline" in message
    assert hub.downloaded() == {"model_index.json"}


def _save_controlnet(model: Path, folder: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    ControlNetModel.from_unet(cast(Any, unet)).save_pretrained(folder)


_NETWORKS = {
    "ControlNet": (
        _save_controlnet,
        lambda model: Path(download_controlnets({"edges": "owner/model"}, model, None)["edges"]),
    ),
    "VAE": (
        lambda model, folder: shutil.copytree(model / "vae", folder),
        lambda model: Path(str(find_vae("owner/model", model))),
    ),
    "safety checker": (
        lambda _, folder: save_checker(folder, 0.5),
        lambda _: Path(str(find_safety_checker("owner/model"))),
    ),
}


@pytest.mark.parametrize("kind", _NETWORKS)
def test_a_network_is_compared_before_its_weights_are_downloaded(hub: Hub, tmp_path: Path, kind: str):
    save, find = _NETWORKS[kind]
    model = save_sd(tmp_path / "model")
    save(model, tmp_path / "network")
    (file,) = (tmp_path / "network").glob("*.safetensors")
    hub.files = {name: (tmp_path / "network" / name).read_bytes() for name in files_of(tmp_path / "network")}
    good = hub.files[file.name]
    tensors = load_file(file)
    tensors["surplus"] = next(iter(tensors.values())).clone()
    save_torch_file(tensors, file, {"format": "pt"})
    hub.files[file.name] = file.read_bytes()
    assert "'surplus'" in error_message(find, model)
    assert hub.downloaded() == set(hub.files) - {file.name}

    hub.files[file.name], hub.commit = good, COMMIT[::-1]
    found = find(model)
    assert (found / file.name).read_bytes() == good
    hub.requested.clear()
    assert find(model) == found
    assert hub.requested == []


@pytest.mark.parametrize("has_fp16", [True, False])
def test_a_controlnet_is_downloaded_in_half_precision_if_that_is_enough(
    hub: Hub, tmp_path: Path, has_fp16: bool
):
    model = save_sd(tmp_path / "model")
    _save_controlnet(model, tmp_path / "network")
    files = {name: (tmp_path / "network" / name).read_bytes() for name in files_of(tmp_path / "network")}
    weights, fp16_weights = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"
    if has_fp16:
        tensors = load_file(tmp_path / "network" / weights)
        halved = {name: tensor.half() for name, tensor in tensors.items()}
        save_torch_file(halved, tmp_path / fp16_weights, {"format": "pt"})
        files[fp16_weights] = (tmp_path / fp16_weights).read_bytes()
    hub.files = files
    found = download_controlnets({"edges": "owner/model"}, model, None, prefer_fp16=True)
    taken = fp16_weights if has_fp16 else weights
    folder = Path(found["edges"])
    assert {file.name for file in folder.iterdir()} == {"config.json", taken}
    unet = cast(Any, UNet2DConditionModel.from_pretrained(model / "unet"))
    assert set(controlnet.load(found, unet, torch.float16)) == {"edges"}
    hub.requested.clear()
    assert download_controlnets({"edges": "owner/model"}, model, None, prefer_fp16=True) == found
    assert hub.requested == []


@pytest.mark.usefixtures("check_process")
def test_a_network_for_another_model_is_not_downloaded(hub: Hub, tmp_path: Path):
    model = save_sd(tmp_path / "model")
    _save_controlnet(model, tmp_path / "network")
    hub.files = {name: (tmp_path / "network" / name).read_bytes() for name in files_of(tmp_path / "network")}
    config = json.loads((model / "unet/config.json").read_bytes())
    config["cross_attention_dim"] *= 2
    (model / "unet/config.json").write_text(json.dumps(config))
    message = error_message(download_controlnets, {"edges": "owner/model"}, model, None)
    assert "controlnet 'edges' (owner/model): It is for another model: its cross_attention_dim" in message
    assert hub.downloaded() == {"config.json"}
    del hub.files[WEIGHTS]
    assert f"owner/model on the hub has no {WEIGHTS}" in error_message(find_vae, "owner/model", model)
