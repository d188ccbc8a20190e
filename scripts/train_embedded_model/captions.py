"""Captions of scenes, with labels of what they mention: the text encoder is trained on the labels."""

import random
import string
from dataclasses import dataclass

from .scenes import COLOURS, COUNTS, POSITIONS, RELATIONS, SHAPES, SIZES, STYLES, Kind, Scene

# The first synonym is used in plain captions; one that is listed twice is used twice as often.
SYNONYMS = {
    "small": ("small", "tiny", "little"),
    "large": ("large", "big", "huge"),
    "outlined": ("outlined", "outline", "hollow"),
    "striped": ("striped", "stripy"),
    "gray": ("gray", "gray", "grey"),
    "two": ("two", "two", "2"),
    "three": ("three", "three", "3"),
    "four": ("four", "four", "4"),
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "over", "on top of"),
    "below": ("below", "under", "underneath"),
    "and": ("and", "next to", "beside"),
}
BACKGROUNDS = (
    " on {0} background",
    " on {0} background",
    " on {0} background",
    " against {0} background",
    " with {0} background",
    ", {1} background",
)
POSITION_PHRASES = {
    "center": (" in the center", " in the middle"),
    "left": (" on the left", " on the left side"),
    "right": (" on the right", " on the right side"),
    "top": (" at the top",),
    "bottom": (" at the bottom",),
}
MEDIA = (
    "photo",
    "picture",
    "image",
    "drawing",
    "painting",
    "simple drawing",
    "rendering",
    "icon",
    "illustration",
)
QUALITIES = (
    "high quality",
    "4k",
    "detailed",
    "minimalist",
    "flat design",
    "simple",
    "clean",
    "vector art",
    "sharp",
)

# The possible values of each field of a scene; "" means that the caption does not mention the field.
FIELDS: dict[str, tuple[str, ...]] = {
    "count": COUNTS,
    "relation": ("", *RELATIONS),
    "background": ("", *COLOURS),
    "position": ("", *POSITIONS),
    **{
        f"{field}{which}": words
        for which in (1, 2)
        for field, words in {
            "shape": ("", *SHAPES),
            "colour": ("", *COLOURS),
            "style": ("", *STYLES),
            "size": SIZES,
        }.items()
    },
}


@dataclass(frozen=True)
class Caption:
    """A text, and the value that it mentions for fields of FIELDS; fields may be missing."""

    text: str
    values: dict[str, str]

    @property
    def labels(self) -> list[int]:
        """The index of each field's value in FIELDS."""
        return [options.index(self.values.get(field, "")) for field, options in FIELDS.items()]


def plain_caption(scene: Scene) -> str:
    """Describe everything in the simplest words: "a red circle on a blue background"."""
    parts = [
        noun_phrase(kind, scene.count if which == 1 else 1, {}) for which, kind in enumerate(scene.kinds, 1)
    ]
    link = {word: synonyms[0] for word, synonyms in SYNONYMS.items()}.get(scene.relation, "")
    return (
        f" {link} ".join(parts)
        + position_phrase(scene.position, 0)
        + f" on {article(scene.background)} background"
    )


def random_caption(scene: Scene, rng: random.Random) -> Caption:
    """Describe a scene with random wording; sometimes shapes, colours or the background are omitted."""
    wording = {word: rng.choice(synonyms) for word, synonyms in SYNONYMS.items()}
    omission_rate = 0.3 if rng.random() < 0.12 else 0.0
    values = {"relation": scene.relation}
    parts = []
    for which, kind in enumerate(scene.kinds, 1):
        count = scene.count if which == 1 else 1
        colour = "" if rng.random() < omission_rate else kind.colour
        shape = "" if rng.random() < omission_rate else kind.shape
        style = "" if kind.style == "solid" and rng.random() < 0.95 else kind.style
        mentioned = {"shape": shape, "colour": colour, "style": style, "size": kind.size}
        values |= {f"{field}{which}": value for field, value in mentioned.items()}
        parts.append(noun_phrase(Kind(shape, colour, style, kind.size), count, wording))
    values["count"] = COUNTS[scene.count]
    text = f" {wording.get(scene.relation, '')} ".join(parts)
    values["position"] = scene.position
    text += position_phrase(scene.position, rng.randrange(2))
    if rng.random() > 0.08:
        values["background"] = scene.background
        colour = wording.get(scene.background, scene.background)
        plain = rng.choice(("plain ", "solid ")) if rng.random() < 0.1 else ""
        text += rng.choice(BACKGROUNDS).format(article(plain + colour), plain + colour)
    return Caption(decorate(text, rng), values)


def noun_phrase(kind: Kind, count: int, wording: dict[str, str]) -> str:
    """Describe objects of one kind: "a large striped red circle", "three shapes"."""
    style = "" if kind.style == "solid" and not wording else kind.style
    words = [wording.get(word, word) for word in (kind.size, style, kind.colour) if word]
    words.append(kind.shape or "shape")
    if count > 1:
        words[-1] += "es" if words[-1].endswith("s") else "s"
        return " ".join([wording.get(COUNTS[count], COUNTS[count]), *words])
    return article(" ".join(words))


def position_phrase(position: str, choice: int) -> str:
    """The phrase for a position, such as " in the center"; empty for an open position."""
    if not position:
        return ""
    phrases = POSITION_PHRASES.get(position, (f" in the {position}", f" in the {position} corner"))
    return phrases[choice % len(phrases)]


def article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def decorate(text: str, rng: random.Random) -> str:
    """Add text that users write around a subject and that does not change the image."""
    if rng.random() < 0.1:
        text = text.removeprefix("an ").removeprefix("a ")
    if rng.random() < 0.2:
        text = f"{article(rng.choice(MEDIA))} of {text}"
    if rng.random() < 0.2:
        text += ", " + ", ".join(rng.sample(QUALITIES, rng.choice((1, 1, 2))))
    if rng.random() < 0.3:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.1 else text


def with_unknown_word(text: str, rng: random.Random) -> str:
    """Insert a word of random letters into one caption in eight, so that unknown words are ignored."""
    if rng.random() > 0.12:
        return text
    words = text.split(" ")
    unknown = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9)))
    words.insert(rng.choice((0, len(words))), unknown)
    return " ".join(words)
