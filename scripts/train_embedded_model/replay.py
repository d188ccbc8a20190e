"""Keep encoded pictures and captions to train on more than once, for encoding is a good part of a step."""

# diffusers and transformers leave out of their annotations what these calls rely on.
# pyright: reportAttributeAccessIssue=false

import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from .captions import random_caption, with_unknown_word
from .render import render
from .scenes import Scene, possible_scenes, training_scene
from .text_encoder import tokenize

CAPACITY = 4000  # samples of each shape, for each thread
FRESH = 0.06  # of a batch are newly drawn before each step, so that a sample is seen some 17 times


@dataclass(frozen=True)
class Sample:
    """Encoded pictures of a caption, and the caption.

    `latents` have the shape (places, 4, height, width): a picture for each of OPEN_PLACES, in that order,
    where the caption leaves the place of its object open, else one. `prompt_embeds`: (77, 128), bfloat16.
    """

    latents: Tensor
    prompt_embeds: Tensor


class Replay:
    """Samples by the height and width of their latents; nothing held out is in it."""

    def __init__(
        self,
        vae: AutoencoderKL,
        tokenizer: CLIPTokenizer,
        text_encoder: CLIPTextModel,
        seed: int,
        device: str,
        draw: Callable[[list[Scene], int, int], Tensor] = render,
    ):
        self.vae, self.tokenizer, self.text_encoder, self.device = vae, tokenizer, text_encoder, device
        self.draw = draw
        self.rng, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.pools: dict[tuple[int, int], list[Sample]] = defaultdict(list)

    def batch(self, size: int, height: int, width: int) -> list[Sample]:
        """Renew a part of a pool, then draw samples from it."""
        pool = self.pools[height, width]
        whole, rest = divmod(FRESH * size, 1)
        fresh = int(whole) + (self.rng.random() < rest)
        self.renew(pool, 2 * size if len(pool) < 8 * size else fresh, height, width)
        return self.rng.sample(pool, size)

    @torch.no_grad()
    def renew(self, pool: list[Sample], count: int, height: int, width: int) -> None:
        """Put newly drawn scenes into a pool, in place of random ones once it is full."""
        if not count:
            return
        scenes = [training_scene(self.rng) for _ in range(count)]
        texts = [with_unknown_word(random_caption(scene, self.rng).text, self.rng) for scene in scenes]
        possible = [possible_scenes(scene) for scene in scenes]
        images = self.draw(list(chain.from_iterable(possible)), 8 * height, 8 * width).to(self.device)
        latents = self.vae.encode(images).latent_dist.mode().split([len(each) for each in possible])
        prompt_embeds = self.embed(texts).bfloat16()  # half the memory; the text encoder's noise is larger
        for sample in map(Sample, latents, prompt_embeds):
            if len(pool) < CAPACITY:
                pool.append(sample)
            else:
                pool[self.rng.randrange(CAPACITY)] = sample

    @torch.no_grad()
    def embed(self, texts: list[str]) -> Tensor:
        """prompt_embeds of shape (B, 77, 128)."""
        return self.text_encoder(tokenize(self.tokenizer, texts).to(self.device)).last_hidden_state
