"""The score of rendered scenes: full with the right captions, low with wrong ones."""

import random

import pytest

from scripts.train_embedded_model.captions import FIELDS, plain_caption, random_caption
from scripts.train_embedded_model.render import render
from scripts.train_embedded_model.scenes import random_scene, training_scene
from scripts.train_embedded_model.score import PROMPTS, held_out_scenes, score, wrong_scenes

SCENES = held_out_scenes(PROMPTS)


@pytest.mark.parametrize("size", [128, 256])
def test_rendered_scenes_have_the_full_score(size: int) -> None:
    assert min(score(SCENES, render(SCENES, size, size)).values()) >= 0.99


def test_wrong_captions_have_a_low_score() -> None:
    assert max(score(wrong_scenes(SCENES), render(SCENES, 128, 128)).values()) <= 0.1


def test_an_additional_object_is_wrong() -> None:
    singles, pairs = held_out_scenes({"single": 10}), held_out_scenes({"pair": 10})
    assert score(singles, render(pairs, 128, 128))["single, everything"] == 0


def test_the_score_uses_only_held_out_combinations() -> None:
    rng = random.Random(0)
    trained = [training_scene(rng) for _ in range(5000)]
    combinations = {(kind.shape, kind.colour, scene.background) for scene in trained for kind in scene.kinds}
    scored = {(kind.shape, kind.colour, scene.background) for scene in SCENES for kind in scene.kinds}
    assert not scored & combinations
    assert len(combinations) > 1000


def test_the_score_has_two_hundred_different_prompts() -> None:
    assert len({plain_caption(scene) for scene in SCENES}) == len(SCENES) >= 200


def test_training_has_more_difficult_scenes() -> None:
    rng = random.Random(0)
    shares = [
        sum(sample(rng).is_hard for _ in range(1000)) / 1000 for sample in (random_scene, training_scene)
    ]
    assert shares[1] > shares[0] + 0.1


def test_different_scenes_have_different_plain_captions() -> None:
    captions = [plain_caption(scene) for scene in SCENES]
    assert len(set(captions)) == len(SCENES)
    assert all(" on a" in caption and "background" in caption for caption in captions)


def test_labels_of_a_caption_match_its_scene() -> None:
    rng = random.Random(0)
    for scene in (random_scene(rng) for _ in range(200)):
        values = {
            field: options[label]
            for (field, options), label in zip(FIELDS.items(), random_caption(scene, rng).labels, strict=True)
        }
        assert values["background"] in ("", scene.background)
        assert values["colour1"] in ("", scene.kinds[0].colour)
        assert values["relation"] == scene.relation
