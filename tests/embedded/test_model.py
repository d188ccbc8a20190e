"""The embedded model is a small diffusers folder, and its images match their prompts."""

import json
import logging
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging

from hypergen.model_info import Vocabulary
from scripts.train_embedded_model import contours
from scripts.train_embedded_model.captions import POSITION_PHRASES, SYNONYMS, noun_phrase, plain_caption
from scripts.train_embedded_model.features import colours, generate_as_served, mean_difference
from scripts.train_embedded_model.pipeline import generate, new_scheduler
from scripts.train_embedded_model.reading import DetectedScene, detect_scene
from scripts.train_embedded_model.scenes import COLOURS, SHAPES, STYLES, Kind
from scripts.train_embedded_model.score import held_out_scenes, score

EMBEDDED = Path(__file__).parents[2] / "hypergen" / "embedded"
LORAS = {f"loras/{name}.safetensors" for name in ("Pixel_Art", "Logo", "Paint_Splash", "Crayons")}


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(EMBEDDED)


def test_the_folder_is_small_and_complete() -> None:
    files = {
        str(file.relative_to(EMBEDDED)): file.stat().st_size for file in EMBEDDED.rglob("*") if file.is_file()
    }
    assert sum(size for name, size in files.items() if name not in LORAS) <= 13_000_000
    assert all(files[name] < 1_000_000 for name in LORAS)
    assert files.keys() == LORAS | {
        "LICENSE",
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


def test_its_vocabulary_has_the_words_of_the_captions() -> None:
    vocabulary = Vocabulary.of_card(json.loads((EMBEDDED / "hypergen.json").read_text(encoding="utf-8")))
    assert vocabulary is not None
    nouns = [noun_phrase(Kind(shape, ""), count, {}) for shape in (*SHAPES, "") for count in (1, 2)]
    synonyms = [word for words in SYNONYMS.values() for word in words]
    words = set(" ".join([*nouns, *synonyms, *COLOURS, *STYLES, *POSITION_PHRASES]).split())
    # Articles, and words that only join others or say nothing about the image.
    assert vocabulary.words == (words | {"middle"}) - {"a", "an", "of", "to", "the", "on", "solid"}
    assert vocabulary.understood(vocabulary.unknown_prompt) is None
    assert vocabulary.understood("Two (cats), 4k") is None
    assert vocabulary.understood("a cat, 4k, redder") == "a shape on a background"


@pytest.mark.parametrize("options", [{}, {"dtype": torch.float32}, {"dtype": torch.bfloat16}])
def test_it_loads_in_one_dtype_without_a_warning(
    options: dict[str, torch.dtype], caplog: pytest.LogCaptureFixture
) -> None:
    transformers.utils.logging.enable_propagation()  # otherwise caplog gets no warnings
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


def test_it_generates_held_out_combinations(pipeline: StableDiffusionPipeline) -> None:
    scenes = held_out_scenes({"single": 8, "group": 6, "pair": 4})
    table = score(scenes, generate(pipeline, [plain_caption(scene) for scene in scenes], 128, 128))
    assert table["background"] == 1
    assert table["object colour"] >= 0.9
    assert table["single, everything"] >= 0.85
    assert table["group, count"] >= 0.8
    assert table["pair, colours placed"] >= 0.75


def test_a_few_steps_are_enough(pipeline: StableDiffusionPipeline) -> None:
    scenes = held_out_scenes({"single": 90})
    prompts = [plain_caption(scene) for scene in scenes]
    images = generate(pipeline, prompts, 128, 128, num_inference_steps=4, guidance_scale=2)
    assert score(scenes, images)["single, everything"] >= 0.85


@pytest.mark.parametrize("shape", contours.GATES)
def test_contours_are_round_and_straight(pipeline: StableDiffusionPipeline, shape: str) -> None:
    prompts = [plain_caption(scene) for scene in contours.held_out_scenes(shape, 12)]
    images = generate(pipeline, prompts, contours.SIDE, contours.SIDE)
    assert sum(contours.is_within(contours.measure(shape, image)) for image in images) >= 10


@pytest.mark.parametrize(("height", "width"), [(160, 96), (256, 192)])
def test_oblong_images_have_the_right_colour_background_and_count(
    pipeline: StableDiffusionPipeline, height: int, width: int
) -> None:
    scenes = held_out_scenes({"single": 4, "group": 3})
    images = generate(pipeline, [plain_caption(scene) for scene in scenes], height, width)
    table = score(scenes, images)
    assert table["background"] == 1
    assert table["object colour"] >= 0.85
    assert table["group, count"] >= 0.65


def test_small_images_have_the_right_colour_background_and_count(pipeline: StableDiffusionPipeline) -> None:
    scenes = held_out_scenes({"single": 4, "group": 6})
    images = generate_as_served(pipeline, [plain_caption(scene) for scene in scenes], 64, 64)
    assert images.shape[2:] == (64, 64)
    table = score(scenes, images)
    assert table["background"] == 1
    assert table["object colour"] >= 0.9
    assert table["group, count"] >= 0.8


def test_other_words_and_capitals_do_no_harm(pipeline: StableDiffusionPipeline) -> None:
    prompts = [
        "a photo of a red circle on a blue background, high quality",
        "A RED CIRCLE ON A BLUE BACKGROUND",
    ]
    assert [seen(detect_scene(image)) for image in generate(pipeline, prompts, 128, 128)] == [
        ("blue", [("red", "circle")])
    ] * 2


def seen(reading: DetectedScene) -> tuple[str, list[tuple[str, str]]]:
    return reading.background, [(blob.colour, blob.shape) for blob in reading.blobs]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_image(
    pipeline: StableDiffusionPipeline,
) -> None:
    first, again = (
        generate(pipeline, ["a white square on a green background"] * 2, 128, 128) for _ in range(2)
    )
    assert torch.equal(first, again)
    assert (first[0] - first[1]).abs().mean() / 2 > 0.002


def test_images_of_one_prompt_differ_by_a_twentieth_of_the_range(
    pipeline: StableDiffusionPipeline,
) -> None:
    prompts = [plain_caption(scene) for scene in held_out_scenes({"single": 6})]
    assert mean_difference([generate(pipeline, [prompt] * 4, 128, 128) for prompt in prompts]) >= 0.05


def test_a_negative_prompt_removes_its_colour(pipeline: StableDiffusionPipeline) -> None:
    prompts = ["a large shape on a white background"] * 8
    before = [colours(image) for image in generate(pipeline, prompts, 128, 128)]
    negative_prompts = [next(iter(sorted(found)), "red") for found in before]
    after = [
        colours(image) for image in generate(pipeline, prompts, 128, 128, negative_prompts=negative_prompts)
    ]
    assert sum(colour in found for colour, found in zip(negative_prompts, after, strict=True)) <= 1
