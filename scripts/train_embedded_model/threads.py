"""Data-parallel training steps: each thread has a share of the batch, from rendering to gradients.

Threads that synchronize once per step wait less than threads that divide every operation, especially on
busy cores.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer


def step_together(
    workers: Executor,
    compute_losses: Sequence[Callable[[], Tensor]],
    model: Module,
    optimizers: Sequence[Optimizer],
    max_norm: float,
) -> Tensor:
    """Run one optimizer step with the mean gradient of all shares; returns their mean loss.

    Each of `compute_losses` returns the loss of one share. All shares have the same size.
    """
    params = list(model.parameters())

    def differentiate(compute_loss: Callable[[], Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        loss = compute_loss()
        return loss.detach(), torch.autograd.grad(loss, params)

    # `map` returns shares in order, not by completion: sums of three or more numbers depend on the order.
    shares = list(workers.map(differentiate, compute_losses))
    for param, first, *others in zip(params, *(grads for _, grads in shares), strict=True):
        param.grad = sum(others, first) / len(shares)
    torch.nn.utils.clip_grad_norm_(params, max_norm)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack([loss for loss, _ in shares]).mean()
