"""The embedded model is an ordinary small diffusers folder that draws what it is asked for."""

import logging
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging

from scripts.train_embedded_model.captions import plain_caption
from scripts.train_embedded_model.pipeline import draw, new_scheduler
from scripts.train_embedded_model.score import held_out_scenes, score

EMBEDDED = Path(__file__).parents[2] / "hypergen" / "embedded"


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(EMBEDDED)


def test_the_folder_is_small_and_complete() -> None:
    files = {
        str(file.relative_to(EMBEDDED)): file.stat().st_size for file in EMBEDDED.rglob("*") if file.is_file()
    }
    assert sum(files.values()) <= 13_000_000
    assert files.keys() == {
        "README.md",
        "hypergen.json",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }


@pytest.mark.parametrize("options", [{}, {"dtype": torch.float32}, {"dtype": torch.bfloat16}])
def test_it_loads_in_one_dtype_without_a_warning(
    options: dict[str, torch.dtype], caplog: pytest.LogCaptureFixture
) -> None:
    transformers.utils.logging.enable_propagation()  # else their warnings never reach caplog
    diffusers_logging.enable_propagation()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline = StableDiffusionPipeline.from_pretrained(EMBEDDED, **options)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    dtypes = {parameter.dtype for part in parts for parameter in part.parameters()}
    assert dtypes == {options.get("dtype", torch.float32)}


def test_its_scheduler_is_the_one_it_was_trained_with(tmp_path: Path) -> None:
    new_scheduler().save_pretrained(tmp_path)
    name = "scheduler_config.json"
    assert (EMBEDDED / "scheduler" / name).read_text() == (tmp_path / name).read_text()


def test_it_draws_held_out_combinations(pipeline: StableDiffusionPipeline) -> None:
    scenes = held_out_scenes({"single": 8, "group": 4})
    images = draw(pipeline, [plain_caption(scene) for scene in scenes], 128, 128)
    table = score(scenes, images)
    assert table["background"] == 1
    assert table["object colour"] >= 0.9
    assert table["single, everything"] >= 0.85
    assert table["group, count"] >= 0.75
