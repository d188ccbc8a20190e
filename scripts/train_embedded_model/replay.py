"""Keep encoded pictures and captions to train on more than once, for encoding is a good part of a step."""

# diffusers and transformers leave out of their annotations what these calls rely on.
# pyright: reportAttributeAccessIssue=false

import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from .captions import random_caption, with_unknown_word
from .render import render
from .scenes import STEADY, Scene, Spread, elsewhere, training_scene
from .text_encoder import tokenize

CAPACITY = 4000  # pictures of each shape
FRESH = 0.12  # the share of a batch that is newly drawn before each step


@dataclass(frozen=True)
class Sample:
    """An encoded picture and its caption.

    `elsewhere` is another picture of the caption, with a single object in another of its places; where the
    caption leaves no choice, or nobody asks for it, it is the same.
    """

    latents: Tensor
    elsewhere: Tensor
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
        self.spread, self.moves = STEADY, False
        self.rng, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.pools: dict[tuple[int, int], list[Sample]] = defaultdict(list)

    def batch(self, size: int, height: int, width: int) -> Sample:
        """Renew a part of a pool, then draw samples from it, stacked."""
        pool = self.pools[height, width]
        whole, rest = divmod(FRESH * size, 1)
        fresh = int(whole) + (self.rng.random() < rest)
        self.renew(pool, 2 * size if len(pool) < 8 * size else fresh, height, width)
        samples = self.rng.sample(pool, size)
        return Sample(
            torch.stack([sample.latents for sample in samples]),
            torch.stack([sample.elsewhere for sample in samples]),
            torch.stack([sample.prompt_embeds for sample in samples]).float(),
        )

    def spread_by(self, spread: Spread, moves: bool = False) -> None:
        """From now on single objects vary like this, with a picture of them elsewhere if it `moves`.

        What is kept of others is dropped.
        """
        if spread is not self.spread or moves != self.moves:
            self.spread, self.moves = spread, moves
            self.pools.clear()

    @torch.no_grad()
    def renew(self, pool: list[Sample], count: int, height: int, width: int) -> None:
        """Put newly drawn scenes into a pool, in place of random ones once it is full."""
        if not count:
            return
        scenes = [training_scene(self.rng, self.spread) for _ in range(count)]
        texts = [with_unknown_word(random_caption(scene, self.rng).text, self.rng) for scene in scenes]
        moved = {
            index: elsewhere(scene, self.rng, self.spread)
            for index, scene in enumerate(scenes)
            if self.moves and scene.stands_anywhere
        }
        images = self.draw([*scenes, *moved.values()], 8 * height, 8 * width).to(self.device)
        latents = self.vae.encode(images).latent_dist.mode()
        others = dict(zip(moved, latents[count:], strict=True))
        prompt_embeds = self.embed(texts).bfloat16()  # half the memory; the text encoder's noise is larger
        for index in range(count):
            sample = Sample(latents[index], others.get(index, latents[index]), prompt_embeds[index])
            if len(pool) < CAPACITY:
                pool.append(sample)
            else:
                pool[self.rng.randrange(CAPACITY)] = sample

    @torch.no_grad()
    def embed(self, texts: list[str]) -> Tensor:
        """prompt_embeds of shape (B, 77, 128)."""
        return self.text_encoder(tokenize(self.tokenizer, texts).to(self.device)).last_hidden_state
