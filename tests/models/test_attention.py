"""Attention backends of diffusers: where they work or are refused, and how their kernels are fetched."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from hypergen.engine.model_loader import Loader
from hypergen.errors import SettingError
from hypergen.model_families import PIPELINES
from hypergen.model_store.attention_kernels import provide_attention_kernel
from hypergen.model_store.diffusers_layout import pipeline_class_of
from hypergen.models import attention, loading
from hypergen.models.networks import component_classes, empty_network
from tests.support.full_pipelines import save_pixart
from tests.support.small_models import save_flux, save_sd, save_sd3, save_sdxl
from tests.support.sync_engine import InlineEngine, make_request, make_settings, served_model


@pytest.fixture(scope="module")
def flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_flux(tmp_path_factory.mktemp("attention") / "flux")


@pytest.fixture(autouse=True)
def _default_backend_afterwards() -> Iterator[None]:
    yield
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)  # pyright: ignore[reportArgumentType]


def _latents(folder: Path, **settings: Any) -> np.ndarray:
    engine = InlineEngine(loading.load(folder, make_settings(**settings)), **settings)
    request = make_request(num_inference_steps=2)
    engine.run(request)
    assert not engine.errors
    return np.frombuffer(engine.final_latents[request.id], dtype=np.float32)


def test_a_transformer_uses_the_backend(flux_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _latents(flux_folder)
    backend = _AttentionBackendRegistry._backends[AttentionBackendName._NATIVE_MATH]
    calls: list[None] = []

    def record(**arguments: Any) -> Any:
        calls.append(None)
        return backend(**arguments)

    monkeypatch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName._NATIVE_MATH, record)
    latents = _latents(flux_folder, attention="_native_math")
    assert calls
    assert np.linalg.norm(latents - expected) <= 1e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize("save", [save_flux, save_sd, save_sd3, save_sdxl])
def test_the_families_with_backends_are_known_without_torch(save: Any, tmp_path: Path) -> None:
    classes = dict(component_classes(save(tmp_path)))
    name = "unet" if "unet" in classes else "transformer"
    supported = attention.supports_attention_backends(empty_network(tmp_path / name, classes[name]))
    spec = PIPELINES[pipeline_class_of(tmp_path, "model")]
    assert supported == ("attention" in spec.settings)


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("flash_5", "attention flash_5 is unknown to diffusers; it has .*_flash_3_hub.* sage_hub"),
        ("sage", "attention sage cannot be used: .*install `sageattention"),
        ("_flash_3_hub", "attention _flash_3_hub cannot be used: .*pip install kernels"),
    ],
)
def test_missing_backends_are_errors(flux_folder: Path, backend: str, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        loading.load(flux_folder, make_settings(attention=backend))


@pytest.mark.parametrize("save", [save_sd, save_sd3, save_pixart])
def test_models_without_backends_are_refused(tmp_path: Path, save: Any) -> None:
    folder, settings = save(tmp_path), make_settings(attention="native")
    with pytest.raises(SettingError, match=r"attention is not supported for .*; it is for FLUX and other"):
        loading.load_any(folder, settings)
    assert loading.load_any(folder, settings, alone=False)  # the setting may be for another model


def test_a_backend_that_fails_in_the_warm_up_is_an_error_at_start(flux_folder: Path) -> None:
    load = Loader(lambda _id, _event: None, alone=True)
    with pytest.raises(SettingError, match="attention _native_cudnn failed in the warm-up: RuntimeError"):
        load(served_model(flux_folder, attention="_native_cudnn"), lambda: None)


def test_kernels_of_the_hub_need_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_KERNELS", raising=False)
    with pytest.raises(SettingError, match=r"^attention sage_hub needs the package kernels: pip"):
        provide_attention_kernel("sage_hub")


# A stand-in for the package and the hub, which need a network. Its kernel is torch's attention.
_PACKAGE = """
import importlib.util, pathlib

def get_kernel(repo_id, **options):
    folder = pathlib.Path(__file__).parents[1] / "hub" / repo_id
    file = folder / "build" / "torch-cpu" / "__init__.py"
    spec = importlib.util.spec_from_file_location("kernel", file)
    module = importlib.util.module_from_spec(spec)
    __import__("sys").modules["kernel"] = module
    spec.loader.exec_module(module)
    return module
"""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in {
        "kernels/__init__.py": _PACKAGE,
        "kernels-0.17.2.dist-info/METADATA": "Metadata-Version: 2.1\nName: kernels\nVersion: 0.17.2\n",
        "hub/SageAttention/sage-attention/build/torch-cpu/__init__.py": "def sageattn(): ...\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("LOCAL_KERNELS", "")
    return tmp_path / "hub"


def test_a_kernel_is_fetched_once_for_the_engines(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[str] = []
    provide_attention_kernel("sage_hub", reports.append)
    assert (
        os.environ["LOCAL_KERNELS"] == f"SageAttention/sage-attention={hub / 'SageAttention/sage-attention'}"
    )
    provide_attention_kernel("sage_hub", reports.append)
    assert reports == ["Fetching the kernel of the attention backend sage_hub"]


@pytest.mark.parametrize("backend", ["_flash_3_hub", "unknown_hub"])
def test_a_kernel_that_cannot_be_fetched_is_one_line(hub: Path, backend: str) -> None:
    with pytest.raises(
        SettingError, match=f"^attention {backend} needs a kernel that cannot be fetched: "
    ) as error:
        provide_attention_kernel(backend)
    assert "\n" not in str(error.value)
    assert not os.environ["LOCAL_KERNELS"]


def test_other_backends_need_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_KERNELS", "")
    for backend in (None, "sage", "_native_math"):
        provide_attention_kernel(backend)
    assert not os.environ["LOCAL_KERNELS"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_transformer_uses_the_backend_on_cuda(flux_folder: Path) -> None:
    settings = {"device": "cuda", "dtype": "bfloat16"}
    expected = _latents(flux_folder, **settings)
    latents = _latents(flux_folder, attention="_native_cudnn", **settings)
    assert np.linalg.norm(latents - expected) <= 3e-2 * np.linalg.norm(expected)
