"""Exponential moving averages of the trained part, once per decoder update, in float32.

A run has one, `ema`, and perhaps further ones of other decays beside it. A selection of weights is
called `ema`, `ema-0.9999` or `raw`; the averages lie in checkpoints below `ema.`, `ema_0_9999.`
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kl_f8_train.units import shortest


def selection(decay: float) -> str:
    """The name of the weights averaged with a decay: `ema-0.9999`."""
    return f"ema-{shortest(decay)}"


def label(selected: str) -> str:
    """A selection for people: `EMA`, `EMA 0.9999`, `raw`."""
    return selected.replace("ema", "EMA").replace("-", " ", 1)


def module_name(selected: str) -> str:
    """`ema-0.9999` -> `ema_0_9999`: a further average's part of a finetuner and its checkpoints."""
    return selected.replace("-", "_", 1).replace(".", "_")


def module_names(decays: Sequence[float]) -> dict[float, str]:
    """Each decay's average in a finetuner and its checkpoints; the first is the run's, `ema`."""
    further = {decay: module_name(selection(decay)) for decay in decays[1:]}
    return {decays[0]: "ema", **further}


def ema_decay(number: int, decay: float, warmup: bool) -> float:
    """Share of the average kept at update `number` (1, 2, ...).

    With warm-up it is min(decay, (1 + n) / (10 + n)), as in the original's LitEma: 0.18 at first,
    which forgets imported weights, so it is off where the average starts from a trained model.
    """
    return min(decay, (1 + number) / (10 + number)) if warmup else decay


def ema_update(averaged: nn.Module, module: nn.Module, decay: float) -> None:
    """averaged += (1 - decay) * (module - averaged), in one fused call.

    Raises ValueError if the two do not have the same parameters.
    """
    move(*paired(averaged, module), decay)


def paired(averaged: nn.Module, module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters of both, in one order.

    Raises ValueError if the two do not have the same.
    """
    ours, theirs = dict(averaged.named_parameters()), dict(module.named_parameters())
    if ours.keys() != theirs.keys():
        raise ValueError(f"parameters differ: {sorted(ours.keys() ^ theirs.keys())}")
    return list(ours.values()), [theirs[name] for name in ours]


@torch.no_grad()
def move(averaged: list[Tensor], parameters: list[Tensor], decay: float) -> None:
    """averaged += (1 - decay) * (parameters - averaged)."""
    # lerp(a, b, w) = a + w (b - a) is rounded once at the size of a, decay * a + (1 - decay) * b
    # twice; over 100,000 updates that each add 1e-4 of a small difference, it counts.
    torch._foreach_lerp_(averaged, parameters, 1.0 - decay)


@torch.no_grad()
def ema_distance(averaged: nn.ModuleDict, module: nn.Module) -> float:
    """|averaged - module| / |module|, over the parts that `averaged` holds by their names."""
    # Parameters of both in one order: norms of lists of tensors are one launch, not one for each.
    ours: list[Tensor] = [p for _, part in averaged.items() for p in part.parameters()]
    theirs: list[Tensor] = [p for name in averaged for p in getattr(module, name).parameters()]
    apart = torch._foreach_norm(torch._foreach_sub(ours, theirs))
    return float(torch.stack(apart).norm() / torch.stack(torch._foreach_norm(theirs)).norm())
