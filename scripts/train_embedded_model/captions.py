"""Say what a scene shows, and note what was said: the text encoder learns from the notes."""

import random
import string
from dataclasses import dataclass

from .scenes import COLOURS, COUNTS, POSITIONS, RELATIONS, SHAPES, SIZES, STYLES, Kind, Scene

# The first way to say a thing is the plain one; a way that is listed twice is said twice as often.
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
PLACES = {
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

# What can be said of each field of a scene; the empty word stands for "not said".
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
    """A text, and the word that it says for each field of FIELDS (fields not said are missing)."""

    text: str
    said: dict[str, str]

    @property
    def labels(self) -> list[int]:
        """The index of each field's word."""
        return [words.index(self.said.get(field, "")) for field, words in FIELDS.items()]


def plain_caption(scene: Scene) -> str:
    """Say everything, in the plainest words: "a red circle on a blue background"."""
    parts = [
        noun_phrase(kind, scene.count if which == 1 else 1, {}) for which, kind in enumerate(scene.kinds, 1)
    ]
    link = {word: ways[0] for word, ways in SYNONYMS.items()}.get(scene.relation, "")
    return (
        f" {link} ".join(parts)
        + place_phrase(scene.position, 0)
        + f" on {article(scene.background)} background"
    )


def random_caption(scene: Scene, rng: random.Random) -> Caption:
    """Say a scene in one of many ways, now and then leaving out what the picture does not need."""
    ways = {word: rng.choice(synonyms) for word, synonyms in SYNONYMS.items()}
    leave_out = 0.3 if rng.random() < 0.12 else 0.0
    said = {"relation": scene.relation}
    parts = []
    for which, kind in enumerate(scene.kinds, 1):
        count = scene.count if which == 1 else 1
        colour = "" if rng.random() < leave_out else kind.colour
        shape = "" if rng.random() < leave_out else kind.shape
        style = "" if kind.style == "solid" and rng.random() < 0.95 else kind.style
        words = {"shape": shape, "colour": colour, "style": style, "size": kind.size}
        said |= {f"{field}{which}": word for field, word in words.items()}
        parts.append(noun_phrase(Kind(shape, colour, style, kind.size), count, ways))
    said["count"] = COUNTS[scene.count]
    text = f" {ways.get(scene.relation, '')} ".join(parts)
    said["position"] = scene.position
    text += place_phrase(scene.position, rng.randrange(2))
    if rng.random() > 0.08:
        said["background"] = scene.background
        colour = ways.get(scene.background, scene.background)
        plain = rng.choice(("plain ", "solid ")) if rng.random() < 0.1 else ""
        text += rng.choice(BACKGROUNDS).format(article(plain + colour), plain + colour)
    return Caption(decorate(text, rng), said)


def noun_phrase(kind: Kind, count: int, ways: dict[str, str]) -> str:
    """Name one or several objects, "a large striped red circle", "three shapes"; no empty word is said."""
    style = "" if kind.style == "solid" and not ways else kind.style
    words = [ways.get(word, word) for word in (kind.size, style, kind.colour) if word]
    words.append(kind.shape or "shape")
    if count > 1:
        words[-1] += "es" if words[-1].endswith("s") else "s"
        return " ".join([ways.get(COUNTS[count], COUNTS[count]), *words])
    return article(" ".join(words))


def place_phrase(position: str, way: int) -> str:
    """Say where the only object is, if the scene names a place."""
    if not position:
        return ""
    ways = PLACES.get(position, (f" in the {position}", f" in the {position} corner"))
    return ways[way % len(ways)]


def article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def decorate(text: str, rng: random.Random) -> str:
    """Add what people write around a subject and what changes nothing in the picture."""
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
    """Put a word of random letters into one caption in eight, so that unknown words come to mean nothing."""
    if rng.random() > 0.12:
        return text
    words = text.split(" ")
    unknown = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9)))
    words.insert(rng.choice((0, len(words))), unknown)
    return " ".join(words)
