"""The training loop of every stage: progress bar, loss curve, and checkpoints to resume from."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

CHECKPOINT_EVERY_S = 150
POINT_EVERY = 50  # steps averaged into one point of the curve


class Stateful(Protocol):
    """A module or an optimizer."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


class Run:
    """The steps of a stage, resumed from the checkpoint in its folder if there is one.

    Iterating gives the step numbers; `report` takes that step's loss. `seconds` and `cpu_seconds` are sums
    over all processes that worked on the run.
    """

    def __init__(self, folder: Path, steps: int, parts: dict[str, Stateful]):
        self.folder, self.steps, self.parts = folder, steps, parts
        self.step, self.seconds, self.cpu_seconds = 0, 0.0, 0.0
        self.losses: list[float] = []
        self.curve: list[tuple[int, float]] = []
        self.saved_at, self.cpu_at = time.monotonic(), time.process_time()
        folder.mkdir(parents=True, exist_ok=True)
        if self.checkpoint.exists():
            self.load()
        if self.step > steps:
            raise ValueError(
                f"{self.checkpoint} is at step {self.step} of {steps}; it is from another recipe."
            )

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def __iter__(self) -> Iterator[int]:
        with tqdm(initial=self.step, total=self.steps, desc=self.folder.name, mininterval=5) as self.bar:
            while self.step < self.steps:
                yield self.step
                self.step += 1
                self.bar.update()
                if time.monotonic() - self.saved_at > CHECKPOINT_EVERY_S or self.step == self.steps:
                    self.save()

    def report(self, loss: Tensor) -> None:
        """Record this step's loss for the progress bar and the curve."""
        self.losses.append(loss.item())
        if len(self.losses) == POINT_EVERY:
            mean = sum(self.losses) / POINT_EVERY
            self.curve.append((self.step, mean))
            self.bar.set_postfix(loss=f"{mean:.4f}")
            self.losses.clear()

    def save(self) -> None:
        now, cpu_now = time.monotonic(), time.process_time()
        self.seconds += now - self.saved_at
        self.cpu_seconds += cpu_now - self.cpu_at
        self.saved_at, self.cpu_at = now, cpu_now
        own = {name: getattr(self, name) for name in ("step", "seconds", "cpu_seconds", "curve")}
        state = {name: part.state_dict() for name, part in self.parts.items()}
        temporary = self.checkpoint.with_suffix(".tmp")
        torch.save({"run": own, **state}, temporary)
        os.replace(temporary, self.checkpoint)  # keeps the last checkpoint if saving is interrupted
        (self.folder / "run.json").write_text(json.dumps(own))
        plot_curve(self.curve).save(self.folder / "loss.png")

    def load(self) -> None:
        state = torch.load(self.checkpoint)
        vars(self).update(state.pop("run"))
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


def rising_then_falling(step: int, steps: int, warmup: int, flat: float) -> float:
    """Learning rate schedule: linear warmup, constant for a share of the steps, then linear decay."""
    done = step / steps
    return min(1, (step + 1) / warmup) * min(1, max(0.02, (1 - done) / (1 - flat)))


def plot_curve(curve: list[tuple[int, float]], width: int = 640, height: int = 360) -> Image.Image:
    """Plot losses on a logarithmic axis."""
    image = Image.new("RGB", (width, height), "white")
    if len(curve) < 2:
        return image
    draw = ImageDraw.Draw(image)
    steps, losses = torch.tensor([step for step, _ in curve]), torch.tensor([loss for _, loss in curve]).log()
    low, high = losses.min(), losses.max()
    x = 50 + (width - 70) * steps / steps.max()
    y = height - 30 - (height - 50) * (losses - low) / (high - low)
    draw.line(list(zip(x.tolist(), y.tolist(), strict=True)), fill="black", width=2)
    draw.text((5, 12), f"{high.exp():.3f}", fill="black")
    draw.text((5, height - 38), f"{low.exp():.3f}", fill="black")
    draw.text((width - 60, height - 20), f"{curve[-1][0]}", fill="black")
    return image


def image_grid(images: Tensor, columns: int) -> Image.Image:
    """Arrange images of shape (B, 3, H, W) in -1..1 in a grid."""
    rows = images.split(columns)
    blank = torch.ones_like(images[0])
    lines = [torch.cat([*row, *[blank] * (columns - len(row))], dim=2) for row in rows]
    pixels = ((torch.cat(lines, dim=1).clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())
