"""Random scenes of coloured shapes: the training data of the embedded model."""

import math
import random
from dataclasses import dataclass, replace

COLOURS = {
    "red": (220, 35, 35),
    "orange": (245, 140, 25),
    "yellow": (250, 220, 40),
    "green": (40, 165, 60),
    "cyan": (50, 205, 220),
    "blue": (40, 70, 215),
    "purple": (135, 50, 180),
    "pink": (250, 140, 190),
    "brown": (125, 75, 35),
    "black": (18, 18, 18),
    "white": (245, 245, 245),
    "gray": (130, 130, 130),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "heart", "cross", "ring", "hexagon", "moon")
STYLES = ("solid", "striped", "outlined", "dotted", "gradient", "checkered")
SIZES = ("", "small", "large")
COUNTS = ("", "one", "two", "three", "four")
RELATIONS = ("left", "right", "above", "below", "and")
POSITIONS = {
    "center": (0.5, 0.5),
    "left": (0.26, 0.5),
    "right": (0.74, 0.5),
    "top": (0.5, 0.26),
    "bottom": (0.5, 0.74),
    "top left": (0.26, 0.26),
    "top right": (0.74, 0.26),
    "bottom left": (0.26, 0.74),
    "bottom right": (0.74, 0.74),
}

# Radii are fractions of the image's shorter side, by the size in the caption. At 128 pixels, objects of one
# image are at least one latent (8 pixels) apart: closer ones merge in generated images.
RADII_PLACED = {"": (0.18, 0.22), "small": (0.12, 0.15), "large": (0.23, 0.24)}
RADII_IN_GROUP = {"": (0.14, 0.16), "small": (0.10, 0.12), "large": (0.17, 0.18)}
RADII_IN_PAIR = {"": (0.15, 0.18), "small": (0.10, 0.12), "large": (0.20, 0.21)}

OPEN_POSITIONS = (
    (0, 0),
    (-1, -1),
    (-1, 1),
    (1, -1),
    (1, 1),
)  # x to the right and y down from the middle, as on a die

LARGEST_ANGLE = 0.1  # radians: enough to vary, too little to make a diamond of a square


@dataclass(frozen=True)
class Spread:
    """The variation of a single object with an open position, by the size in the caption.

    `radii` are in shorter sides. The object is in the middle or, with `stops`, randomly in one of
    OPEN_POSITIONS; their unit is a stop, a share of either side. From there it is moved by at most `jitter`
    and rotated by at most `angle` radians. `singles` is the share of scenes with a single object.
    """

    radii: dict[str, tuple[float, float]]
    jitter: dict[str, float]
    stops: dict[str, float] | None = None
    angle: float = LARGEST_ANGLE
    singles: float = 0.42


STEADY = Spread(
    {"": (0.26, 0.34), "small": (0.15, 0.19), "large": (0.40, 0.45)},
    {"": 0.05, "small": 0.08, "large": 0.02},
)
# Images of one caption differ by the object's position: one of five, most of which overlap. Convolutions then
# see all of them at once; with positions far apart, the UNet filled two. Varying sizes and angles as well is
# too much for this UNet. Stops are whole latents (two at 128x128, four at 256x256, for large objects half of
# that), so that the latents of all positions are the same, shifted.
OVERLAPPING = Spread(
    {"": (0.28, 0.28), "small": (0.17, 0.17), "large": (0.42, 0.42)},
    {"": 0.0, "small": 0.0, "large": 0.0},
    {"": 0.125, "small": 0.125, "large": 0.0625},
    angle=0.0,
    singles=0.6,
)

GROUPS = {
    2: ((0.25, 0.5), (0.75, 0.5)),
    3: ((0.5, 0.25), (0.25, 0.74), (0.75, 0.74)),
    4: ((0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)),
}

# Scenes that the model generates worst are trained more often: thin parts, hexagons (small ones become
# circles), and objects whose colour is close to the background's.
HARD = ("star", "cross", "ring", "moon", "hexagon")
CLOSE = 125  # distance of two colours in RGB, of 442; the closest two of the palette are 82 apart
EASY_SHARE = 0.55  # share of the other scenes that is kept


@dataclass(frozen=True)
class Kind:
    """The properties of an object that a caption can mention; the size "" is the usual one."""

    shape: str
    colour: str
    style: str = "solid"
    size: str = ""


@dataclass(frozen=True)
class Thing:
    """One rendered object. x and y are fractions of the image's sides, radius of the shorter side."""

    kind: Kind
    x: float
    y: float
    radius: float
    angle: float


@dataclass(frozen=True)
class Scene:
    """A background, one to four things of one kind, or two kinds in a relation."""

    background: str
    kinds: tuple[Kind, ...]
    things: tuple[Thing, ...]
    relation: str = ""
    position: str = ""

    @property
    def count(self) -> int:
        """The number of things of the first kind."""
        return 1 if self.relation else len(self.things)

    @property
    def has_open_position(self) -> bool:
        """Whether it is a single object without a position in the caption."""
        return len(self.things) == 1 and not self.position

    @property
    def held_out(self) -> bool:
        """Whether a thing has a combination that is excluded from the UNet's training."""
        return any(is_held_out(kind.shape, kind.colour, self.background) for kind in self.kinds)

    @property
    def is_hard(self) -> bool:
        return any(
            kind.shape in HARD or distance(kind.colour, self.background) < CLOSE for kind in self.kinds
        )


def is_held_out(shape: str, colour: str, background: str) -> bool:
    """Whether a combination is reserved for the score: one in eleven, evenly over shapes and colours."""
    colours = list(COLOURS)
    return (7 * SHAPES.index(shape) + 5 * colours.index(colour) + 3 * colours.index(background)) % 11 == 0


def random_scene(rng: random.Random, spread: Spread = STEADY) -> Scene:
    """A random scene of any layout; a small share of the objects is textured."""
    others = 1 - spread.singles
    (layout,) = rng.choices(("single", "group", "pair"), (spread.singles, 0.52 * others, 0.48 * others))
    return single(rng, spread) if layout == "single" else {"group": group, "pair": pair}[layout](rng)


def training_scene(rng: random.Random) -> Scene:
    """A random scene without held-out combinations; difficult ones are more frequent."""
    while True:
        scene = random_scene(rng, OVERLAPPING)
        if not scene.held_out and (scene.is_hard or rng.random() < EASY_SHARE):
            return scene


def single(rng: random.Random, spread: Spread = STEADY) -> Scene:
    """One object, usually near the middle."""
    background = rng.choice(list(COLOURS))
    kind = random_kind(rng, background)
    placed = kind.size != "large" and rng.random() < 0.25
    if placed:
        position = rng.choice(list(POSITIONS))
        thing = place(rng, kind, POSITIONS[position], rng.uniform(*RADII_PLACED[kind.size]), 0.02)
        return Scene(background, (kind,), (thing,), position=position)
    return Scene(background, (kind,), (in_open_position(rng, kind, spread),))


def in_open_position(rng: random.Random, kind: Kind, spread: Spread) -> Thing:
    """A single object with an open position."""
    radius = rng.uniform(*spread.radii[kind.size])
    x, y = POSITIONS["center"]
    if spread.stops:
        stop = spread.stops[kind.size]
        across, down = rng.choice(OPEN_POSITIONS)
        x, y = x + stop * across, y + stop * down
    return place(rng, kind, (x, y), radius, spread.jitter[kind.size], spread.angle)


def possible_scenes(scene: Scene) -> list[Scene]:
    """The scene with its object in each of OPEN_POSITIONS if its position is open, else the scene alone."""
    if not scene.has_open_position:
        return [scene]
    (thing,) = scene.things
    assert OVERLAPPING.stops
    stop = OVERLAPPING.stops[thing.kind.size]
    x, y = POSITIONS["center"]
    return [
        replace(scene, things=(replace(thing, x=x + stop * across, y=y + stop * down),))
        for across, down in OPEN_POSITIONS
    ]


def group(rng: random.Random) -> Scene:
    """Two, three or four objects of one kind, radius and angle."""
    background = rng.choice(list(COLOURS))
    kind = random_kind(rng, background)
    centres = GROUPS[rng.choice((2, 3, 4))]
    radius = rng.uniform(*RADII_IN_GROUP[kind.size])
    things = [place(rng, kind, centre, radius, 0.03) for centre in centres]
    return Scene(background, (kind,), tuple(replace(thing, angle=things[0].angle) for thing in things))


def pair(rng: random.Random) -> Scene:
    """Two objects of different colours, next to each other or one above the other."""
    background = rng.choice(list(COLOURS))
    first = random_kind(rng, background)
    second = random_kind(rng, background, first.colour)
    relation = rng.choice(RELATIONS)
    near, far, across = 0.25, 0.75, 0.5
    first_centre, second_centre = {
        "left": ((near, across), (far, across)),
        "and": ((near, across), (far, across)),
        "right": ((far, across), (near, across)),
        "above": ((across, near), (across, far)),
        "below": ((across, far), (across, near)),
    }[relation]
    things = (
        place(rng, first, first_centre, rng.uniform(*RADII_IN_PAIR[first.size]), 0.02),
        place(rng, second, second_centre, rng.uniform(*RADII_IN_PAIR[second.size]), 0.02),
    )
    return Scene(background, (first, second), things, relation=relation)


def random_kind(rng: random.Random, *other_colours: str) -> Kind:
    """Random properties of an object, in a colour that is not among the others."""
    colour = rng.choice([name for name in COLOURS if name not in other_colours])
    style = "solid" if rng.random() < 0.88 else rng.choice(STYLES[1:])
    (size,) = rng.choices(SIZES, (0.7, 0.15, 0.15))
    return Kind(rng.choice(SHAPES), colour, style, size)


def place(
    rng: random.Random,
    kind: Kind,
    centre: tuple[float, float],
    radius: float,
    spread: float,
    angle: float = LARGEST_ANGLE,
) -> Thing:
    """An object at most `spread` from a centre on either axis, rotated by at most `angle`."""
    x, y = (value + rng.uniform(-spread, spread) for value in centre)
    return Thing(kind, x, y, radius, rng.uniform(-angle, angle))


def distance(colour: str, other: str) -> float:
    return math.dist(COLOURS[colour], COLOURS[other])
