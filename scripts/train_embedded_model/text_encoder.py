"""Train the text encoder to represent the fields of captions, before the UNet.

Trained together with a UNet, a text encoder this small needs many times the steps. Here probes predict each
field of the scene (count, colours, shapes, ...) from its output. The probes are discarded, and the encoder
stays frozen.
"""

# diffusers and transformers leave out of their annotations what these calls rely on.
# pyright: reportArgumentType=false

import math
import random
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .captions import FIELDS, random_caption, with_unknown_word
from .progress import Run
from .scenes import random_scene
from .tokenizer import make_tokenizer

SEED = 2
WIDTH = 128
BATCH_SIZE = 96
FULL_LENGTH = 77


class Probes(nn.Module):
    """A classifier per field: a learnt query attends to the encoder's output, then a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(0.3 * torch.randn(len(FIELDS), WIDTH))
        self.keys = nn.Linear(WIDTH, WIDTH)
        self.values = nn.Linear(WIDTH, WIDTH)
        self.heads = nn.ModuleList(nn.Linear(WIDTH, len(values)) for values in FIELDS.values())

    def forward(self, prompt_embeds: Tensor) -> list[Tensor]:
        """Logits for each field from prompt embeddings of shape (B, length, WIDTH)."""
        weights = (self.queries @ self.keys(prompt_embeds).mT / WIDTH**0.5).softmax(-1)
        attended = weights @ self.values(prompt_embeds)
        return [head(attended[:, index]) for index, head in enumerate(self.heads)]


def train_text_encoder(folder: Path, steps: int, device: str) -> None:
    """Train the tokenizer and the text encoder, and save both in `folder`."""
    torch.manual_seed(SEED)
    tokenizer = make_tokenizer(folder / "tokenizer")
    text_encoder, probes = new_text_encoder(tokenizer).to(device), Probes().to(device)
    params = [*text_encoder.parameters(), *probes.parameters()]
    optimizer = torch.optim.AdamW(params, lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.01)
    run = Run(folder, steps, {"text_encoder": text_encoder, "probes": probes, "optimizer": optimizer})
    rng = random.Random(SEED + run.step)
    for step in run:
        done = step / steps
        cosine = 0.5 * (1 + math.cos(math.pi * done)) + 0.005
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * min(1, (step + 1) / 100) * cosine
        # No caption has more than 36 tokens; padding up to 77 is learnt at the end.
        input_ids, labels = random_batch(tokenizer, rng, BATCH_SIZE, 36 if done < 0.7 else FULL_LENGTH)
        logits = probes(text_encoder(input_ids.to(device)).last_hidden_state)
        targets = labels.to(device).unbind(1)
        loss = torch.stack(
            [functional.cross_entropy(*pair) for pair in zip(logits, targets, strict=True)]
        ).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        run.report(loss)
    text_encoder.eval().save_pretrained(folder / "text_encoder")
    print(accuracy(text_encoder, probes, tokenizer, rng, device))


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A CLIP text encoder of 0.7 M parameters."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=FULL_LENGTH,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def random_batch(
    tokenizer: CLIPTokenizer, rng: random.Random, size: int, length: int
) -> tuple[Tensor, Tensor]:
    """Random captions: token ids of shape (size, length) and labels of shape (size, fields)."""
    captions = [random_caption(random_scene(rng), rng) for _ in range(size)]
    texts = [with_unknown_word(caption.text, rng) for caption in captions]
    return tokenize(tokenizer, texts, length), torch.tensor([caption.labels for caption in captions])


def tokenize(tokenizer: CLIPTokenizer, texts: list[str], length: int = FULL_LENGTH) -> Tensor:
    """Token ids as in the pipeline."""
    return tokenizer(
        texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids


@torch.no_grad()
def accuracy(
    text_encoder: CLIPTextModel, probes: Probes, tokenizer: CLIPTokenizer, rng: random.Random, device: str
) -> dict[str, float]:
    """The accuracy of the probes on a thousand new captions, by field."""
    input_ids, labels = random_batch(tokenizer, rng, 1000, FULL_LENGTH)
    logits = probes(text_encoder(input_ids.to(device)).last_hidden_state)
    right = torch.stack([field.argmax(1) for field in logits], dim=1).cpu() == labels
    return dict(zip(FIELDS, right.float().mean(0).tolist(), strict=True))
