"""Replay buffer of encoded images and captions, because encoding takes a large part of a step."""

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
FRESH = 0.06  # share of a batch that is rendered before each step, so that a sample is used about 17 times


@dataclass(frozen=True)
class Sample:
    """Encoded images of a caption, and its prompt embeddings.

    `latents`: shape (positions, 4, height, width). If the caption leaves its object's position open, there is
    one image for each of OPEN_POSITIONS, in that order; else one. `prompt_embeds`: (77, 128), bfloat16.
    """

    latents: Tensor
    prompt_embeds: Tensor


class Replay:
    """Samples by the height and width of their latents, without held-out combinations."""

    def __init__(
        self,
        vae: AutoencoderKL,
        tokenizer: CLIPTokenizer,
        text_encoder: CLIPTextModel,
        seed: int,
        device: str,
        render_scenes: Callable[[list[Scene], int, int], Tensor] = render,
        new_scene: Callable[[random.Random], Scene] = training_scene,
    ):
        self.vae, self.tokenizer, self.text_encoder, self.device = vae, tokenizer, text_encoder, device
        self.render_scenes, self.new_scene = render_scenes, new_scene
        self.rng, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.pools: dict[tuple[int, int], list[Sample]] = defaultdict(list)

    def batch(self, size: int, height: int, width: int) -> list[Sample]:
        """Replace a part of a pool, then choose random samples from it."""
        pool = self.pools[height, width]
        whole, rest = divmod(FRESH * size, 1)
        fresh = int(whole) + (self.rng.random() < rest)
        self.renew(pool, 2 * size if len(pool) < 8 * size else fresh, height, width)
        return self.rng.sample(pool, size)

    @torch.no_grad()
    def renew(self, pool: list[Sample], count: int, height: int, width: int) -> None:
        """Add newly rendered scenes to a pool; in a full pool they replace random samples."""
        if not count:
            return
        scenes = [self.new_scene(self.rng) for _ in range(count)]
        texts = [with_unknown_word(random_caption(scene, self.rng).text, self.rng) for scene in scenes]
        possible = [possible_scenes(scene) for scene in scenes]
        images = self.render_scenes(list(chain.from_iterable(possible)), 8 * height, 8 * width).to(
            self.device
        )
        latents = self.vae.encode(images).latent_dist.mode().split([len(each) for each in possible])
        prompt_embeds = self.embed(
            texts
        ).bfloat16()  # half the memory; the rounding is below the text encoder's own noise
        for sample in map(Sample, latents, prompt_embeds):
            if len(pool) < CAPACITY:
                pool.append(sample)
            else:
                pool[self.rng.randrange(CAPACITY)] = sample

    @torch.no_grad()
    def embed(self, texts: list[str]) -> Tensor:
        """Prompt embeddings, shape (B, 77, 128)."""
        return self.text_encoder(tokenize(self.tokenizer, texts).to(self.device)).last_hidden_state
