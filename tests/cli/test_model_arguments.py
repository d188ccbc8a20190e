"""Settings and options that a model cannot have are refused before it is imported or loaded."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers import ControlNetModel, DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file

from hypergen.model_store.diffusers_layout import PIPELINE_FILE
from tests.cli.conftest import Run, refuse
from tests.support.checkpoint_layouts import with_fields
from tests.support.full_pipelines import save_pixart
from tests.support.lora_files import ATTENTION, save_lora
from tests.support.original_layout import save_original
from tests.support.small_models import (
    save_flux,
    save_playground,
    save_refiner,
    save_sd,
    save_sd3,
    save_sdxl,
)


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work/empty").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    Path("text.safetensors").write_text("not a LoRA")
    torch.save(torch.zeros(1, 40), "cat.pt")
    save_file({"encoder.conv_in.weight": torch.zeros(8, 3, 3, 3)}, "vae.safetensors")


SCHEDULER = "scheduler/scheduler_config.json"
ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
SINGLESTEP = with_fields(save_sd, PIPELINE_FILE, scheduler=["diffusers", "DPMSolverSinglestepScheduler"])
# What generate refuses by a model's configurations: how the model is made, options, words of the message.
GENERATE_FOR: tuple[tuple[Callable[[Path], Path], str, str], ...] = (
    (save_flux, "--sampler dpmpp_2m", "--sampler 'dpmpp_2m' is unknown; available samplers: euler, heun."),
    (save_flux, "--sampler heun_karras", "--sampler: heun has no schedule 'karras'; available: none."),
    (save_sd, "--sampler ddim_karras", "--sampler: ddim has no schedule 'karras'; available: sgm_uniform, "),
    (save_playground, "--sampler heun", "--sampler 'heun' is unknown; available samplers: dpmpp_2m, "),
    (with_fields(save_sd, SCHEDULER, **ZERO_SNR), "--sampler heun", "--sampler 'heun' is unknown; "),
    (SINGLESTEP, "--steps 1", "--steps must be at least 2 with the default sampler (given: 1)."),
    (save_pixart, "--sampler euler", "--sampler 'euler' is unknown; available samplers: none."),
    (
        with_fields(save_pixart, PIPELINE_FILE, scheduler=["diffusers", "DPMSolverSinglestepScheduler"]),
        "--device cpu --steps 1",
        "--steps must be at least 2 with the default sampler (given: 1).",
    ),
)


@pytest.mark.parametrize(("save", "options", "words"), GENERATE_FOR, ids=[case[1] for case in GENERATE_FOR])
def test_generate_refuses_what_the_model_lacks(
    hypergen: Run, home: Path, save: Callable[[Path], Path], options: str, words: str
) -> None:
    save(Path("model"))
    refuse(hypergen, home, ["generate", "cat", "-m", "./model", "-o", "cat.png", *options.split()], words)


def save_for_refiner(folder: Path) -> Path:
    """SDXL, with a refiner beside it whose prompt embeddings have the same width."""
    save_sdxl(folder)
    save_refiner(Path("refiner"), folder, width=80)
    return folder


def save_playground_and_refiner(folder: Path) -> Path:
    save_playground(folder)
    save_refiner(Path("refiner"), folder)
    return folder


def save_with_controlnet(folder: Path) -> Path:
    """Stable Diffusion, with a ControlNet for SDXL beside it."""
    unet: Any = UNet2DConditionModel.from_pretrained(save_sdxl(Path("sdxl")) / "unet")
    cast(Any, ControlNetModel).from_unet(unet).save_pretrained("controlnet")
    return save_sd(folder)


ZERO_SNR_SD = with_fields(save_sd, SCHEDULER, **ZERO_SNR)
# What is refused by a model: how it is made, its served-model file, flags, words of the message.
FOR_MODEL: tuple[tuple[Callable[[Path], Path], str, str, str], ...] = (
    (save_sd, "", "--refiner ./model", "--refiner is only supported for sdxl models; this is sd."),
    (save_sdxl, "", "--refiner ./model", "./model is not a refiner: it must be a StableDiffusionXLImg2Img"),
    (save_for_refiner, "", "--refiner ./refiner", "./refiner is not a refiner of this model: its prompt emb"),
    (save_playground_and_refiner, "", "--refiner ./refiner", "--refiner is not supported for models with an"),
    (
        save_flux,
        "",
        "--embedding cat=cat.pt",
        "--embedding is only supported for sd, sdxl models; this is flux",
    ),
    (
        save_sd,
        "",
        "--embedding cat=cat.pt",
        "'cat' is for another model: 'emb_params' has vectors of width 40",
    ),
    (save_flux, "", "--prompt-weighting", "--prompt-weighting is only supported for sd, sd3, sdxl models; "),
    (
        save_flux,
        "",
        "--controlnet edges=./controlnet",
        "--controlnet is only supported for sd, sdxl models; ",
    ),
    (save_with_controlnet, "", "--controlnet edges=./controlnet", "--controlnet 'edges' ("),
    (
        save_sd3,
        "",
        "--lora text.safetensors",
        "--lora is only supported for flux, sd, sdxl models; this is sd3",
    ),
    (save_sd3, "", "--lora-dir empty", "--lora-dir is not supported for sd3."),
    (save_pixart, "", "--compile on", "--compile is not supported for PixArtSigmaPipeline."),
    (save_sd, "", "--device cpu --offload model", "--offload needs a CUDA device, whose memory is its own; "),
    (save_sd, "", "--offload model --compile on", "--offload: cannot be combined with --compile on"),
    (
        save_sd,
        "",
        "--attention sage",
        "--attention is not supported for sd, whose attention is always torch's",
    ),
    (save_flux, "", "--attention nosuch", "--attention nosuch is unknown to diffusers; it has "),
    (save_flux, "scheduler: dpmpp_2m", "", "model.yaml, line 3: scheduler must be one of euler, heun"),
    (
        ZERO_SNR_SD,
        "scheduler: heun_karras",
        "",
        "model.yaml, line 3: scheduler must be one of ddim",
    ),
    (save_pixart, "scheduler: euler", "", "line 3: scheduler does not apply to a PixArtSigmaPipeline"),
    (save_flux, "clip_skip: 2", "", "line 3: clip_skip does not apply to models of flux."),
    (save_sd, "clip_skip: 12", "", "line 3: clip_skip must be at most "),
    (
        save_flux,
        "prediction_type: v_prediction",
        "",
        "model.yaml, line 3: prediction_type does not apply to flow",
    ),
    (save_sd, "zero_terminal_snr: true", "", "zero_terminal_snr needs prediction_type v_prediction"),
    (save_sd, "vae: ./vae.safetensors", "", "vae.safetensors is not a VAE for this model: "),
)
NEEDS_TORCH = [case for case in FOR_MODEL if case[0] is save_with_controlnet or case[3].startswith("'cat'")]
NEEDS_TORCH += [case for case in FOR_MODEL if "nosuch" in case[2] or ": true" in case[1] or "vae" in case[1]]


def save_model(case: tuple[Callable[[Path], Path], str, str, str]) -> list[str]:
    """Saves the model and the files of a case; returns its arguments."""
    save, lines, flags, _ = case
    save(Path("model"))
    if "controlnet" in flags and not Path("controlnet").exists():
        save_with_controlnet(Path("other"))
    Path("model.yaml").write_text(f"source: ./model\nname: small\n{lines}\n")
    return ["model.yaml" if lines else "./model", *flags.split()]


@pytest.mark.parametrize("case", FOR_MODEL, ids=lambda case: case[1] or case[2])
def test_serve_refuses_what_the_model_lacks(
    hypergen: Run, home: Path, case: tuple[Callable[[Path], Path], str, str, str]
) -> None:
    refuse(hypergen, home, ["serve", *save_model(case)], case[3])


@pytest.mark.parametrize("case", NEEDS_TORCH, ids=lambda case: case[1] or case[2])
def test_serve_refuses_it_for_a_model_of_the_store(
    hypergen: Run, home: Path, case: tuple[Callable[[Path], Path], str, str, str]
) -> None:
    arguments = save_model(case)
    assert hypergen("import", "./model")[0] == 0
    refuse(hypergen, home, ["serve", *arguments], case[3])


# How the file settings.yaml begins, and the words about it. The model is Stable Diffusion.
OF_FILES: tuple[tuple[str, str], ...] = (
    (
        "models: ./model\nengine:\n  device: cpu\n  offload: model\n",
        "line 4: engine.offload needs a CUDA device",
    ),
    ("models: ./model\nengine: {refiner: ./model}\n", "line 2: engine.refiner is only supported for sdxl"),
    ("models: [{source: ./model,\n  clip_skip: 12}]\n", "line 2: models.0.clip_skip must be at most "),
    (
        "models:\n- ./model\n- {source: ./model, name: b, refiner: ./model}\n",
        "line 3: models.1.refiner is only supported for sdxl",
    ),
    ("models: [./model, model.yaml]\n", "model.yaml, line 5: loras x="),
    (
        "engine:\n  lora: [nosuch.safetensors]\n",
        "line 2: engine.lora nosuch.safetensors: no such .safetensors",
    ),
    (
        "models: [./model]\nengine:\n  embedding:\n    a: cat.pt\n",
        "line 4: engine.embedding 'a' is for another m",
    ),
    ("models:\n- ./model\n- ./nosuch\n", "settings.yaml, line 3: No such folder: ./nosuch"),
    (
        "served_model_name: x\nmodels: [./model, hypergen-tiny]\n",
        "line 1: served_model_name applies to one model",
    ),
    (
        "server:\n  ssl_keyfile: a.pem\n  ssl_certfile: a.pem\n",
        "line 3: server.ssl_certfile a.pem cannot be read",
    ),
    (
        "server:\n  port: 0\n  jobs: redis://127.0.0.1:9/0\n",
        "line 3: server.jobs redis://127.0.0.1:9/0 ca",
    ),
    (
        "server:\n  host: 127.0.0.1\n  port: {port}\n",
        "line 3: server.port {port} cannot be used on 127.0.0.1",
    ),
)


@pytest.mark.parametrize(("text", "words"), OF_FILES, ids=[case[1] for case in OF_FILES])
def test_messages_name_the_line_of_a_file(hypergen: Run, home: Path, text: str, words: str) -> None:
    save_sd(Path("model"))
    Path("model.yaml").write_text("# a comment\nsource: ./model\nname: b\nloras:\n  x: nosuch.safetensors\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        Path("settings.yaml").write_text(text.replace("{port}", port))
        refuse(hypergen, home, ["serve", "--config", "settings.yaml"], words.replace("{port}", port))


def test_messages_name_variables_and_flags(
    hypergen: Run, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_sd(Path("model"))
    Path("settings.yaml").write_text("engine: {refiner: ./other}\n")
    monkeypatch.setenv("HYPERGEN_CONFIG", "settings.yaml")
    monkeypatch.setenv("HYPERGEN_REFINER", "./model")
    refuse(hypergen, home, ["serve", "./model"], "Error: HYPERGEN_REFINER is only supported for sdxl models")
    refuse(
        hypergen, home, ["serve", "./model", "--refiner", "./model"], "Error: --refiner is only supported for"
    )
    monkeypatch.delenv("HYPERGEN_REFINER")
    monkeypatch.setenv("HYPERGEN_MODELS", '[{"source": "./model", "clip_skip": 12}]')
    refuse(hypergen, home, ["serve"], "Error: settings.yaml, line 1: engine.refiner: No such folder: ./other")
    monkeypatch.delenv("HYPERGEN_CONFIG")
    refuse(hypergen, home, ["serve"], "Error: HYPERGEN_MODELS: models.0.clip_skip must be at most ")


def test_a_lora_for_another_model_is_refused(hypergen: Run, home: Path) -> None:
    pipeline: Any = DiffusionPipeline.from_pretrained(save_sdxl(Path("sdxl")))
    save_lora(Path("style.safetensors"), pipeline, rank=4, targets=ATTENTION, seed=1)
    Path("folder").mkdir()
    os.link("style.safetensors", "folder/other.safetensors")
    save_sd(Path("model"))
    Path("model.yaml").write_text("source: ./model\nname: small\nloras: {offered: ./style.safetensors}\n")
    sd: Any = DiffusionPipeline.from_pretrained("model")
    save_lora(Path("good.safetensors"), sd, rank=4, targets=ATTENTION, seed=1)
    Path("wrong.yaml").write_text("engine:\n  lora: [offered=style.safetensors]\n")
    Path("right.yaml").write_text("engine:\n  lora: [offered=good.safetensors]\n")
    for file, lora, words in (
        ("wrong.yaml", "good.safetensors", "wrong.yaml, line 2: engine.lora 'offered' is for another model"),
        ("right.yaml", "style.safetensors", "Error: --lora 'style' is for another model"),
    ):
        given = f"generate cat -m ./model -o cat.png --config {file} --lora {lora}"
        refuse(hypergen, home, given.split(), words)
    commands = (
        ("generate cat -m ./model -o cat.png --lora style.safetensors", "style"),
        ("generate cat -m ./model -o cat.png --lora-dir ./folder --lora other", "other"),
        ("serve ./model --lora style.safetensors", "style"),
        ("serve ./model --lora offered=style.safetensors", "offered"),
        ("serve model.yaml", "offered"),
    )
    for command, name in commands:
        refuse(hypergen, home, command.split(), f"'{name}' is for another model")
    assert hypergen("import", "./model")[0] == 0
    for command, name in commands:
        refuse(hypergen, home, command.split(), f"'{name}' is for another model")


def test_models_imported_before_a_refused_one_do_not_stay(hypergen: Run, home: Path) -> None:
    save_sd(Path("model"))
    save_flux(Path("flux"))
    Path("flux.yaml").write_text("source: ./flux\nname: flow\nprediction_type: v_prediction\n")
    words = "flux.yaml, line 3: prediction_type does not apply to flow"
    refuse(hypergen, home, ["serve", "./model", "flux.yaml"], words, progress=1)
    assert hypergen("import", "./model")[0] == 0
    refuse(hypergen, home, ["serve", "./model", "flux.yaml"], words)


def test_an_attention_backend_that_no_model_can_use_is_refused(hypergen: Run, home: Path) -> None:
    save_sd(Path("model"))
    save_flux(Path("flux"))
    Path("other.yaml").write_text("source: ./model\nname: other\n")
    unused = ["serve", "./model", "other.yaml", "--attention", "native"]
    refuse(
        hypergen, home, unused, "--attention is not supported for ./model, other, whose attention is always"
    )
    assert hypergen("import", "./model")[0] == 0
    unknown = ["serve", "./model", "./flux", "--attention", "nosuch"]
    refuse(hypergen, home, unknown, "./flux: --attention nosuch is unknown to diffusers")


def test_generate_refuses_what_a_checkpoint_file_lacks(hypergen: Run, home: Path) -> None:
    """Its configuration, in the folder with its name, is found when it is imported."""
    pipeline: Any = DiffusionPipeline.from_pretrained(ZERO_SNR_SD(Path("small")))
    save_original(pipeline, Path("small.safetensors"))
    for options, words in (
        ("--sampler heun", "--sampler 'heun' is unknown; available samplers: ddim, "),
        (
            "--device cpu --embedding cat=cat.pt",
            "'cat' is for another model: 'emb_params' has vectors of wid",
        ),
    ):
        given = ["generate", "cat", "-m", "small.safetensors", "-o", "cat.png", *options.split()]
        refuse(hypergen, home, given, words)
