"""What a client asked for: plain frozen values that can be pickled, without tensors and HTTP."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Self

OutputFormat = Literal["png", "jpeg", "webp"]


Preprocessor = Literal["none", "canny"]


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
    def input_image_bytes(self) -> int:
        """Memory of the pictures that it came with."""
        pictures = (self.image, self.mask, self.control and self.control.image)
        return sum(len(picture.pixels) for picture in pictures if picture is not None)

    def without_input_images(self) -> Self:
        """The same without what takes memory."""
        return replace(self, image=None, mask=None, control=None)
