"""What was asked, what comes back, and who draws it: plain values that both halves of the server share.

Nothing here knows tensors or HTTP. Everything is frozen and can be pickled, because it crosses from the HTTP
process to the engine process and back.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Literal, Protocol

from hypergen.errors import GenerationError

OutputFormat = Literal["png", "jpeg", "webp"]
Preprocessor = Literal["none", "canny"]
# exact: rows of one forward pass do not depend on their neighbours, proved by a probe; close: they do, in the
# last bits.
Verdict = Literal["exact", "close"]
State = Literal["loading", "ready", "recovering", "failed", "draining"]


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture that a client sent: decoded, upright, and of the size that is asked for.

    `pixels` are rows of bytes from the top left: three for each pixel (RGB), one in a mask.
    """

    width: int
    height: int
    pixels: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """A picture that a control model follows.

    `preprocessor` says what is done to it first. `start` and `end` are the shares of the steps between which
    it is followed.
    """

    model: str
    image: Picture
    preprocessor: Preprocessor = "none"
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One request for `n` pictures: defaults resolved, ranges checked, seed drawn.

    Image j starts from `seed + j`. `seed_given` tells whether the client asked for this seed, and so for
    these bytes. With an `image`, `strength` (0..1) says how much of it may change; with a `mask`, only what
    is 255 in it is drawn and the rest is kept. `loras` are names that the server knows, with their weights;
    the order is the one in which they are summed.
    """

    id: str
    prompt: str
    negative_prompt: str | None
    width: int  # pixels
    height: int  # pixels
    num_inference_steps: int
    guidance_scale: float
    seed: int
    seed_given: bool
    n: int = 1
    sampler: str | None = None  # None: the scheduler that the model was published with
    model: str | None = None  # id of a served model; None: the first
    prompt_2: str | None = None  # for the second text encoder; None: the same prompt
    negative_prompt_2: str | None = None
    # How far away from the negative prompt, where guidance_scale means something else; None: the model's own.
    true_cfg_scale: float | None = None
    enable_refiner: bool = False
    image: Picture | None = None
    strength: float = 1.0
    mask: Picture | None = None
    control: Control | None = None
    loras: tuple[tuple[str, float], ...] = ()
    output_format: OutputFormat = "png"
    output_compression: int = 100
    partial_images: int = 0  # previews of each image while it is drawn
    metadata: bool = True

    @property
    def work(self) -> float:
        """Rough cost for queue estimates: megapixels x steps x images, twice when guided.

        Of a picture that is changed only the steps that its strength leaves count.
        """
        rows = 2 if self.guidance_scale > 1 else 1
        steps = self.num_inference_steps * (self.strength if self.image is not None else 1)
        return self.n * rows * steps * self.width * self.height / 1e6

    @property
    def picture_bytes(self) -> int:
        """Memory of the pictures that it came with."""
        pictures = (self.image, self.mask, self.control and self.control.image)
        return sum(len(picture.pixels) for picture in pictures if picture is not None)


# What not every family can do, by the field of `GenerationRequest` that asks for it.
Option = Literal[
    "prompt_2", "negative_prompt", "true_cfg_scale", "enable_refiner", "image", "mask", "control", "loras"
]


@dataclass(frozen=True, slots=True)
class ModelDefaults:
    """What a request gets that does not say."""

    num_inference_steps: int
    guidance_scale: float
    width: int
    height: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDescription:
    """What the HTTP half knows about a loaded model; dialects check requests against it and nothing else."""

    id: str
    family: str
    defaults: ModelDefaults
    samplers: dict[str, int]  # public name -> fewest steps it can do
    min_steps: int  # of the scheduler that the model was published with
    device: str
    dtype: str
    options: frozenset[Option] = frozenset()
    loras: tuple[str, ...] = ()  # names that requests may use
    lora_folders: tuple[str, ...] = ()  # whose files they may give by path
    default_lora: str | None = None  # for requests that name none
    max_loras: int = 0  # in one request
    control_models: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Started:
    """The first image of the request joined the batch: the request no longer waits."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Denoising steps done and due, over all images of the request."""

    step: int
    steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFinished:
    """One finished picture as the bytes of its file."""

    index: int
    seed: int
    data: bytes
    prompt_tokens: int
    # Forward passes in which rows of other requests ran beside this image's.
    shared_forwards: int
    engine_s: float = 0.0  # seconds from when the engine took the request to decoded pixels
    encode_s: float = 0.0  # seconds that a thread took to write the file


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """What a running image would be if it ended now, as the bytes of a file.

    After the death of an engine an image starts again and its previews come again, with the same numbers.
    """

    index: int
    number: int  # 0, 1, 2 ... of this image
    data: bytes


Event = Started | Progress | Preview | ImageFinished


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    """What one engine last said of itself."""

    state: State
    device: str | None = None
    reason: str | None = None
    determinism: dict[str, Verdict] = field(
        default_factory=dict[str, Verdict]
    )  # "512x512" -> verdict of the probe
    forwards: int = 0  # forward passes since the start
    image_steps: int = 0  # images in those passes, summed
    restarts: int = 0
    models: tuple[str, ...] = ()  # ids of those in memory
    # Stage of the start -> seconds it took: imports, weights, warm-up.
    startup_s: dict[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratorStatus:
    """What `/health` tells: the state of the whole, its requests, and each engine."""

    state: State
    reason: str | None
    running: int
    waiting: int
    at_the_door: int
    engines: tuple[EngineStatus, ...]

    @property
    def queue_size(self) -> int:
        """Requests accepted and unfinished, the door included."""
        return self.running + self.waiting + self.at_the_door


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a waiting request has before it."""

    position: int  # requests that came earlier and wait too
    expected_s: float | None  # until its pictures are done, at the measured pace; None: nothing measured yet


class ImageGenerator(Protocol):
    """Whoever draws, as the HTTP half sees it: the pool of engine processes."""

    def describe(self, name: str | None = None) -> ModelDescription | None:
        """The served model of this name, else the first; None until they are loaded."""
        ...

    def status(self) -> GeneratorStatus:
        """The state right now; never waits."""
        ...

    def outlook(self, request_id: str) -> Outlook | None:
        """How things stand for a request that waits; None if it does not, or not any more."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Draw; yields events until the last `ImageFinished`. Closing the generator cancels the request.

        Raises:
            RequestError: from the generator, when the request cannot be finished.
        """
        ...


async def draw_all(generator: ImageGenerator, request: GenerationRequest) -> list[ImageFinished]:
    """Draw every image of a request and give them back in order."""
    images: list[ImageFinished] = []
    events = generator.generate(request)
    try:
        async for event in events:
            if isinstance(event, ImageFinished):
                images.append(event)
    finally:
        await events.aclose()
    if len(images) != request.n:
        raise GenerationError("The engine ended the request before all pictures were drawn.")
    return sorted(images, key=lambda image: image.index)
