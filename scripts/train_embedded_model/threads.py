"""Divide a step of training among threads, each with a share of the batch, from rendering to gradients.

Threads that meet once a step lose less to waiting than threads that divide every operation, above all where
other work wants the cores too.
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
    """Take one step by the mean of the shares' gradients, and return their mean loss.

    Each of `compute_losses` computes that of its share, and all shares have the same size.
    """
    params = list(model.parameters())

    def differentiate(compute_loss: Callable[[], Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        loss = compute_loss()
        return loss.detach(), torch.autograd.grad(loss, params)

    # In the order of the shares, whichever is ready first: sums of three or more numbers depend on it.
    shares = list(workers.map(differentiate, compute_losses))
    for param, first, *others in zip(params, *(grads for _, grads in shares), strict=True):
        param.grad = sum(others, first) / len(shares)
    torch.nn.utils.clip_grad_norm_(params, max_norm)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack([loss for loss, _ in shares]).mean()
