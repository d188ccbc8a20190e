"""A generation request: plain frozen values that can be pickled, without tensors and HTTP."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, Self

OutputFormat = Literal["png", "jpeg", "webp"]


Preprocessor = Literal["none", "canny"]


Priority = Literal["low", "normal", "high"]
_WEIGHTS: dict[Priority, int] = {"low": 1, "normal": 4, "high": 16}


@dataclass(frozen=True, slots=True)
class ApiKey:
    """An API key by its name, without the secret.

    `max_requests` are those that may be unfinished at once. None: not limited.
    """

    name: str
    priority: Priority = "normal"
    max_requests: int | None = None
    images_per_minute: int | None = None

    @property
    def weight(self) -> int:
        """Its share of queue and engine, relative to other keys."""
        return _WEIGHTS[self.priority]


# All requests to a server without keys.
ANONYMOUS = ApiKey("anonymous")


@dataclass(frozen=True, slots=True)
class InputImage:
    """An image that a client sent: decoded, upright, and resized to the requested size.

    `pixels` are rows of bytes from the top left: three per pixel (RGB), one per pixel in a mask.
    """

    width: int
    height: int
    pixels: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlInput:
    """The input of a ControlNet.

    `preprocessor` is applied to `image` first. The ControlNet is active between the shares `start` and `end`
    of the steps.
    """

    model: str
    image: InputImage
    preprocessor: Preprocessor = "none"
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One request for `n` images: defaults resolved, ranges checked, seed chosen.

    Image j uses `seed + j`. `seed_given` is true if the client sent the seed, and so expects the same bytes.
    With an `image`, `strength` (0..1) is the share of the steps that run; with a `mask`, only pixels that are
    255 in it are generated and the rest is kept. `loras` are names in the server's registry with their
    weights, in the order in which they are summed.
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
    api_key: ApiKey = ANONYMOUS
    sampler: str | None = None  # None: the model's own scheduler
    model: str | None = None  # id of a served model; None: the first
    prompt_2: str | None = None  # for the second text encoder; None: the same prompt
    negative_prompt_2: str | None = None
    # Classifier-free guidance for models whose guidance_scale is an input; None: the model's default.
    true_cfg_scale: float | None = None
    enable_refiner: bool = False
    image: InputImage | None = None
    strength: float = 1.0
    mask: InputImage | None = None
    control: ControlInput | None = None
    loras: tuple[tuple[str, float], ...] = ()
    output_format: OutputFormat = "png"
    output_compression: int = 100
    partial_images: int = 0  # previews per image
    metadata: bool = True

    @property
    def work(self) -> float:
        """Rough cost for queue estimates: megapixels x steps x images, twice with guidance.

        With an input image only the share `strength` of the steps counts.
        """
        rows = 2 if self.guidance_scale > 1 else 1
        steps = self.num_inference_steps * (self.strength if self.image is not None else 1)
        return self.n * rows * steps * self.width * self.height / 1e6

    def price(self, rate: float) -> float:
        """What the images cost by Hyperbolic's formula.

        Args:
            rate: price of a 1024x1024 image with 25 steps.

        Source: price = rate x (width / 1024) x (height / 1024) x (steps / 25), per image.
        """
        return self.n * rate * (self.width / 1024) * (self.height / 1024) * (self.num_inference_steps / 25)

    @property
    def input_image_bytes(self) -> int:
        """Memory of the input images."""
        images = (self.image, self.mask, self.control and self.control.image)
        return sum(len(image.pixels) for image in images if image is not None)

    def without_input_images(self) -> Self:
        """The same request without its input images."""
        return replace(self, image=None, mask=None, control=None)
