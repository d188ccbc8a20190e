"""Divide a step of training among threads, each with a share of the batch, from rendering to gradients.

Threads that meet once a step lose less to waiting than threads that divide every operation, above all where
other work wants the cores too.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer


def step_together(
    workers: Executor,
    shares: Sequence[Callable[[], Tensor]],
    params: Iterable[Parameter],
    optimizers: Sequence[Optimizer],
    max_norm: float,
) -> Tensor:
    """Let every share add its gradients, take one step by their mean, and return the mean loss.

    Each share returns its loss, and all of them have the same size.
    """
    params = list(params)
    futures = [workers.submit(share) for share in shares]
    loss = torch.stack([future.result() for future in futures]).mean()
    for param in params:
        assert param.grad is not None
        param.grad /= len(shares)
    torch.nn.utils.clip_grad_norm_(params, max_norm)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss
