"""The score reads what is in a picture: right captions pass it and wrong ones do not."""

import random

import pytest

from scripts.train_embedded_model.captions import FIELDS, plain_caption, random_caption
from scripts.train_embedded_model.render import render
from scripts.train_embedded_model.scenes import random_scene, training_scene
from scripts.train_embedded_model.score import PROMPTS, held_out_scenes, score, wrong_scenes

SCENES = held_out_scenes(PROMPTS)


@pytest.mark.parametrize("size", [128, 256])
def test_rendered_scenes_score_full_marks(size: int) -> None:
    assert min(score(SCENES, render(SCENES, size, size)).values()) >= 0.99


def test_captions_of_other_pictures_score_next_to_nothing() -> None:
    assert max(score(wrong_scenes(SCENES), render(SCENES, 128, 128)).values()) <= 0.1


def test_one_object_too_many_is_not_right() -> None:
    singles, pairs = held_out_scenes({"single": 10}), held_out_scenes({"pair": 10})
    assert score(singles, render(pairs, 128, 128))["single, everything"] == 0


def test_the_score_asks_only_for_combinations_that_training_never_draws() -> None:
    rng = random.Random(0)
    trained = [training_scene(rng) for _ in range(5000)]
    combinations = {(kind.shape, kind.colour, scene.background) for scene in trained for kind in scene.kinds}
    asked = {(kind.shape, kind.colour, scene.background) for scene in SCENES for kind in scene.kinds}
    assert not asked & combinations
    assert len(combinations) > 1000


def test_the_score_asks_two_hundred_different_prompts() -> None:
    assert len({plain_caption(scene) for scene in SCENES}) == len(SCENES) >= 200


def test_training_draws_more_often_what_is_hard_to_draw() -> None:
    rng = random.Random(0)
    shares = [sum(draw(rng).is_hard for _ in range(1000)) / 1000 for draw in (random_scene, training_scene)]
    assert shares[1] > shares[0] + 0.1


def test_a_plain_caption_says_everything_about_a_scene() -> None:
    captions = [plain_caption(scene) for scene in SCENES]
    assert len(set(captions)) == len(SCENES)
    assert all(" on a" in caption and "background" in caption for caption in captions)


def test_labels_of_a_caption_are_what_its_scene_shows() -> None:
    rng = random.Random(0)
    for scene in (random_scene(rng) for _ in range(200)):
        said = {
            field: words[label]
            for (field, words), label in zip(FIELDS.items(), random_caption(scene, rng).labels, strict=True)
        }
        assert said["background"] in ("", scene.background)
        assert said["colour1"] in ("", scene.kinds[0].colour)
        assert said["relation"] == scene.relation
