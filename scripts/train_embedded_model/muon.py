"""The Muon optimizer: momentum with orthogonalized updates.

With about the same number of steps, the VAE and the UNet became better than with AdamW.
Source, also of the coefficients of the Newton-Schulz iteration: Keller Jordan,
https://kellerjordan.github.io/posts/muon.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.optim import Optimizer

MATRICES_PER_BATCH = 8  # small matrices are cheaper in batches, and there are enough batches for the threads


class Muon(Optimizer):
    """Updates parameters of two or more dimensions, reshaped to matrices of output x all other dimensions.

    With `workers`, batches of matrices are updated in parallel by its threads.
    """

    def __init__(
        self,
        params: Iterable[Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.02,
        workers: Executor | None = None,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.workers = workers

    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]  no closure here
        map_batches = self.workers.map if self.workers else map
        for group in self.param_groups:
            list(map_batches(partial(self.update, group), batches(group["params"])))

    @torch.no_grad()  # not on `step`: it only applies to the current thread
    def update(self, group: dict[str, Any], params: list[Parameter]) -> None:
        """Update matrices of one shape as one batch."""
        shape = matrix_shape(params[0])
        # Updates as large as AdamW's (Liu et al. 2025, arXiv:2502.16982).
        scale = group["lr"] * 0.2 * max(shape) ** 0.5
        updates = orthogonalise(
            torch.stack([self.nesterov(p, group["momentum"]).reshape(shape) for p in params])
        )
        for param, update in zip(params, updates, strict=True):
            param.mul_(1 - group["lr"] * group["weight_decay"])
            param.add_(update.view_as(param), alpha=-scale)

    def nesterov(self, param: Parameter, momentum: float) -> Tensor:
        """Add the gradient to the running mean and return the Nesterov direction."""
        assert param.grad is not None
        state = self.state[param]
        if "mean" not in state:
            state["mean"] = torch.zeros_like(param)
        state["mean"].lerp_(param.grad, 1 - momentum)
        return torch.lerp(param.grad, state["mean"], momentum)


def batches(params: Iterable[Parameter]) -> Iterator[list[Parameter]]:
    """Batches of matrices with the same shape."""
    same_shape: dict[tuple[int, int], list[Parameter]] = defaultdict(list)
    for param in params:
        same_shape[matrix_shape(param)].append(param)
    for matrices in same_shape.values():
        for start in range(0, len(matrices), MATRICES_PER_BATCH):
            yield matrices[start : start + MATRICES_PER_BATCH]


def matrix_shape(param: Tensor) -> tuple[int, int]:
    return param.shape[0], param[0].numel()


def orthogonalise(matrices: Tensor) -> Tensor:
    """Bring the singular values of a batch of matrices near 1 by four Newton-Schulz steps, in bfloat16."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = (x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)).bfloat16()
    for _ in range(4):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices)


def muon_and_adamw(
    model: Module,
    muon_lr: float,
    adamw_lr: float,
    except_for: tuple[str, ...],
    workers: Executor | None = None,
) -> list[Optimizer]:
    """Muon for the matrices; AdamW for other parameters, and for layers whose name contains `except_for`."""
    matrices, others = [], []
    for name, param in model.named_parameters():
        is_hidden_matrix = param.ndim >= 2 and not any(part in name for part in except_for)
        (matrices if is_hidden_matrix else others).append(param)
    return [
        Muon(matrices, muon_lr, workers=workers),
        torch.optim.AdamW(others, adamw_lr, betas=(0.9, 0.98), weight_decay=0),
    ]


def set_learning_rates(optimizers: list[Optimizer], fraction: float) -> None:
    """Set every learning rate to a fraction of its initial value."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * fraction
