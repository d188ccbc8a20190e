"""Shared fixtures: small models on disk, and servers that serve them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

# Must be set before torch is imported: threads that spin while they wait are slow on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers fill the cores; small models take a quarter more time with more threads, also in servers.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from transformers.utils import logging as transformers_logging

import hypergen
from tests.support.live_server import LiveServer, start_server

# A hint of transformers at this import would be printed after pytest's summary.
transformers_logging.set_verbosity_error()
from tests.support.small_models import save_sd

transformers_logging.set_verbosity_warning()


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Stable Diffusion 1.x with random weights; native size 128x128."""
    return save_sd(tmp_path_factory.mktemp("models") / "small-sd")


@pytest.fixture
def offload_small_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--offload model` offloads networks of any size."""
    monkeypatch.setattr("hypergen.denoising.offload._MIN_OFFLOADED_BYTES", 0)


@pytest.fixture(scope="session")
def v_prediction_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Stable Diffusion 2.x with random weights, predicting velocity."""
    return save_sd(tmp_path_factory.mktemp("models") / "small-sd2", "v_prediction")


@pytest.fixture(scope="session")
def lora_folder(tmp_path_factory: pytest.TempPathFactory, sd_folder: Path) -> Path:
    """A LoRA for the small Stable Diffusion, `style`, and a damaged one, `broken`."""
    from diffusers import StableDiffusionPipeline

    from tests.support.lora_files import save_lora

    folder = tmp_path_factory.mktemp("loras")
    pipeline = StableDiffusionPipeline.from_pretrained(sd_folder, safety_checker=None)
    style = save_lora(folder / "style.safetensors", pipeline)
    (folder / "broken.safetensors").write_bytes(style.read_bytes()[:-10])
    return folder


@pytest.fixture(scope="session")
def server(
    tmp_path_factory: pytest.TempPathFactory, sd_folder: Path, lora_folder: Path
) -> Iterator[LiveServer]:
    """A server without a key and with a fast model with random weights, which generates noise."""
    arguments = (str(sd_folder), "--device", "cpu", "--dtype", "float32", "--lora-dir", str(lora_folder))
    with start_server(tmp_path_factory.mktemp("server"), *arguments) as server:
        yield server


@pytest.fixture(scope="session")
def keyed_server(tmp_path_factory: pytest.TempPathFactory, sd_folder: Path) -> Iterator[LiveServer]:
    """The same with a bearer key."""
    arguments = (str(sd_folder), "--device", "cpu", "--dtype", "float32")
    with start_server(tmp_path_factory.mktemp("keyed"), *arguments, api_key="sk-right-key") as server:
        yield server


@pytest.fixture(scope="session")
def documented_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server of the embedded model, with the model name and the key in the documents.

    It generates at most 128x128 and resizes, because the samples request many images of 1024x1024. It knows
    every word, as the model of the documents does, whose answer repeats the prompt.
    """
    folder = tmp_path_factory.mktemp("documented")
    model = shutil.copytree(Path(hypergen.__file__).parent / "embedded", folder / "embedded")
    model_card = json.loads((model / "hypergen.json").read_text(encoding="utf-8"))
    model_card = {**model_card, "max_native_area": 128 * 128, "vocabulary": None}
    (model / "hypergen.json").write_text(json.dumps(model_card), encoding="utf-8")
    environment = {
        "HYPERGEN_SERVED_MODEL_NAME": "stabilityai/stable-diffusion-xl-base-1.0",
        "HYPERGEN_PRICE_RATE": "0.01",
    }
    with start_server(folder, str(model), environment=environment, api_key="sk-hypergen-123456") as server:
        yield server
