"""Keep encoded pictures and captions to train on more than once, for encoding is a good part of a step."""

# diffusers and transformers leave out of their annotations what these calls rely on.
# pyright: reportAttributeAccessIssue=false

import random
from collections import defaultdict
from collections.abc import Callable

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from .captions import random_caption, with_unknown_word
from .render import render
from .scenes import STEADY, Scene, Spread, training_scene
from .text_encoder import tokenize

CAPACITY = 4000  # pictures of each shape
FRESH = 0.2  # the share of a batch that is newly drawn before each step


class Replay:
    """Latents with their prompt_embeds, by the height and width of the latents; nothing held out is in it."""

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
        self.spread = STEADY
        self.rng, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.pools: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)

    def batch(self, size: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Renew a part of a pool, then draw latents and prompt_embeds from it."""
        pool = self.pools[height, width]
        whole, rest = divmod(FRESH * size, 1)
        fresh = int(whole) + (self.rng.random() < rest)
        self.renew(pool, 2 * size if len(pool) < 8 * size else fresh, height, width)
        latents, prompt_embeds = zip(*self.rng.sample(pool, size), strict=True)
        return torch.stack(latents), torch.stack(prompt_embeds).float()

    def spread_by(self, spread: Spread) -> None:
        """From now on single objects vary like this; what is kept of others is dropped."""
        if spread is not self.spread:
            self.spread = spread
            self.pools.clear()

    @torch.no_grad()
    def renew(self, pool: list[tuple[Tensor, Tensor]], count: int, height: int, width: int) -> None:
        """Put newly drawn scenes into a pool, in place of random ones once it is full."""
        if not count:
            return
        scenes = [training_scene(self.rng, self.spread) for _ in range(count)]
        images = self.draw(scenes, 8 * height, 8 * width).to(self.device)
        texts = [with_unknown_word(random_caption(scene, self.rng).text, self.rng) for scene in scenes]
        latents = self.vae.encode(images).latent_dist.mode()
        prompt_embeds = self.embed(texts).bfloat16()  # half the memory; the text encoder's noise is larger
        for pair in zip(latents, prompt_embeds, strict=True):
            if len(pool) < CAPACITY:
                pool.append(pair)
            else:
                pool[self.rng.randrange(CAPACITY)] = pair

    @torch.no_grad()
    def embed(self, texts: list[str]) -> Tensor:
        """prompt_embeds of shape (B, 77, 128)."""
        return self.text_encoder(tokenize(self.tokenizer, texts).to(self.device)).last_hidden_state
