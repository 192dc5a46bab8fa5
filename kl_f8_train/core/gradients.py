"""Gradients and Adam: building, clearing, norms, and averages over all ranks."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Adam

from kl_f8_train.config import Optimizer


def build_adam(parameters: Iterable[nn.Parameter], settings: Optimizer) -> Adam:
    """A fused Adam with the recipe's settings and no weight decay."""
    options: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": (settings.betas[0], settings.betas[1]),
        "eps": settings.eps,
        "fused": True,
    }
    return Adam(parameters, **options)


def parameters_of(adam: Adam) -> list[nn.Parameter]:
    """All parameters that it steps."""
    return [parameter for group in adam.param_groups for parameter in group["params"]]


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Without gradients of the parameters; a compiled module would compute them all."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)


def set_rate(adam: Adam, rate: float) -> None:
    """Sets the learning rate."""
    for group in adam.param_groups:
        group["lr"] = rate


def clip(gradients: list[Tensor], norm: Tensor, most: float) -> Tensor:
    """Scales gradients of this norm down to `most` in place; returns 1 if it acted, else 0, ()."""
    torch._foreach_mul_(gradients, (most / norm).clamp(max=1.0))
    return (norm > most).to(norm.dtype)


def norm_of(tensors: list[Tensor]) -> Tensor:
    """The norm of all tensors together, ()."""
    return torch.stack(torch._foreach_norm(tensors)).norm()


def mean_of_each(terms: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Means over several passes, by name."""
    if len(terms) < 2:
        return dict(*terms)
    means = torch.stack([torch.stack(list(term.values())) for term in terms]).mean(0)
    return dict(zip(terms[0], means.unbind(), strict=True))


def average_over_ranks(tensors: list[Tensor]) -> None:
    """Replaces tensors by their mean over all ranks, in one call; nothing on one process."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
