"""The score reads what is in a picture: right captions pass it and wrong ones do not."""

import random

import pytest

from scripts.train_embedded_model.captions import FIELDS, plain_caption, random_caption
from scripts.train_embedded_model.render import render
from scripts.train_embedded_model.scenes import Scene, random_scene, training_scene
from scripts.train_embedded_model.score import held_out_scenes, score

SCENES = held_out_scenes({"single": 20, "group": 15, "pair": 15})


@pytest.mark.parametrize("size", [128, 256])
def test_rendered_scenes_score_full_marks(size: int) -> None:
    assert min(score(SCENES, render(SCENES, size, size)).values()) >= 0.99


def test_captions_of_other_pictures_score_next_to_nothing() -> None:
    others = [next(other for other in SCENES if differ(scene, other)) for scene in SCENES]
    assert max(score(others, render(SCENES, 128, 128)).values()) <= 0.1


def differ(first: Scene, second: Scene) -> bool:
    """Whether two scenes of one layout have nothing else in common."""
    kinds = zip(first.kinds, second.kinds, strict=False)
    return (
        len(first.kinds) == len(second.kinds)
        and (first.count > 1) == (second.count > 1)
        and first.background != second.background
        and (first.count != second.count or first.count == 1)
        and all(one.colour != other.colour and one.shape != other.shape for one, other in kinds)
    )


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
