"""A network's update: its rate, gradients, Adam's step, left out if not finite, and the average.

The host never waits for the device inside an iteration: a fused Adam looks at a flag of its own
(`found_inf`, made for torch's GradScaler), and the flags travel to the host while it queues on. It
reads and reports them an iteration later.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import methodcaller
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torch.optim import Adam

from kl_f8_train.errors import RunFailedError
from kl_f8_train.output import say
from kl_f8_train.settings import Optimizer
from kl_f8_train.units import printable

Step = Callable[[Adam], None]
PLAINLY: Step = methodcaller("step")  # without a trainer
Copied = TypeVar("Copied")  # a tensor, or several


# --- Adam and its rate ----------------------------------------------------------------------


def build_adam(parameters: Iterable[nn.Parameter], config: Optimizer) -> Adam:
    """A fused Adam with the recipe's settings and no weight decay."""
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.betas[0], config.betas[1]),
        "eps": config.eps,
        "fused": True,  # looks at `found_inf` on the device, which skips a bad update
    }
    return Adam(parameters, **options)


def parameters_of(adam: Adam) -> list[nn.Parameter]:
    """All parameters that it steps."""
    return [parameter for group in adam.param_groups for parameter in group["params"]]


def gradients_of(adam: Adam) -> list[Tensor]:
    """The gradients that there are of them."""
    return [p.grad for p in parameters_of(adam) if p.grad is not None]


def learning_rate(config: Optimizer, done: int) -> float:
    """The rate of the update after `done` of this run: warm-up times decay.

    It rises linearly to the whole rate over `warmup_iterations`, and decays from the run's start
    over `decay_iterations` to `final_learning_rate`, where it stays.
    """
    rate = config.learning_rate if config.decay == "constant" else _decayed(config, done)
    return rate * min(1.0, (done + 1) / max(1, config.warmup_iterations))


def _decayed(config: Optimizer, done: int) -> float:
    assert config.decay_iterations is not None
    progress = min(1.0, done / config.decay_iterations)
    if config.decay == "cosine":
        progress = 0.5 - 0.5 * math.cos(math.pi * progress)
    return config.learning_rate + (config.final_learning_rate - config.learning_rate) * progress


def describe_rate(config: Optimizer, updates: int) -> str:
    """The rate in words; with a schedule, at the start, the middle and the end of `updates`."""
    if config.decay == "constant" and not config.warmup_iterations:
        return f"{config.learning_rate:g}, absolute"
    at = {"start": 0, "middle": updates // 2, "end": max(0, updates - 1)}
    rates = ", ".join(f"{learning_rate(config, n):.3g} at the {name}" for name, n in at.items())
    return f"{config.learning_rate:g}, absolute, by its schedule {rates}"


# --- gradients ------------------------------------------------------------------------------


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Without gradients of the parameters; a compiled module would compute them all."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)


def clip(gradients: list[Tensor], norm: Tensor, most: float) -> Tensor:
    """Scales gradients of this norm down to `most` in place; returns 1 if it acted, else 0, ()."""
    # A norm that is not finite makes them NaN or 0; such an update is skipped anyway.
    torch._foreach_mul_(gradients, (most / norm).clamp(max=1.0))
    return (norm > most).to(norm.dtype)


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """All along the first axis; one alone is not copied."""
    return torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0]


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
    # One buffer, one message: hundreds of small ones would each cost the network's latency.
    flat = torch.cat([tensor.flatten() for tensor in tensors])  # gradients may lie as NHWC
    dist.all_reduce(flat)  # the sum; gloo has no average
    spread(flat / dist.get_world_size(), tensors)


def spread(flat: Tensor, tensors: list[Tensor]) -> None:
    """Copies flattened and joined tensors back into their places."""
    parts = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [part.view_as(t) for part, t in zip(parts, tensors, strict=True)])


# --- steps that are left out ----------------------------------------------------------------


@dataclass(frozen=True)
class Update:
    """One network's update, on the device; `bad` is alike on all ranks."""

    bad: Tensor  # (), bool: not finite, and left out
    finite: Tensor  # (B,), bool: which images of this rank are
    norm: Tensor  # (), of all gradients
    clipped: Tensor | None  # (), 1 if they were scaled down, else 0

    def figures(self, network: str) -> dict[str, Tensor]:
        """For the log."""
        clipped = {} if self.clipped is None else {f"{network}_clipped": self.clipped}
        return {f"{network}_gradient_norm": self.norm, **clipped}


def step_if_finite(
    adam: Adam,
    gradients: list[Tensor],
    finite: Tensor,
    clip_norm: float | None,
    *,
    step: Step = PLAINLY,
    losses: Sequence[Tensor] = (),
    unless: Tensor | None = None,
) -> Update:
    """Clips the gradients to `clip_norm` and steps a fused Adam.

    Weights and Adam's state stay where a gradient or one of `losses` is not finite, or the bool
    `unless` is true.
    """
    norms = torch._foreach_norm([*gradients, *(0.0 * loss for loss in losses)])
    norm = torch.stack(norms).norm()
    bad = norm - norm != 0.0  # infinite or NaN, in two kernels: isfinite takes four
    clipped = None if clip_norm is None else clip(gradients, norm, clip_norm)
    adam.found_inf = (bad if unless is None else bad | unless).float()  # type: ignore[attr-defined]
    step(adam)
    return Update(bad, finite, norm, clipped)


def checked(gradient: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient, not finite if the loss is not, and which images of it are, (B,) bool."""
    return gradient + 0.0 * loss, finite_images(gradient, loss)


def finite_images(tensor: Tensor, loss: Tensor) -> Tensor:
    """Which images are finite in a (B, ...) tensor; none if only their common loss is not: (B,)."""
    finite = tensor.isfinite().flatten(1).all(1)
    return finite & (loss.isfinite() | ~finite.all())


class Remembered:
    """A network's buffers as they are now: a bad batch also goes through BatchNorm."""

    def __init__(self, module: nn.Module | None) -> None:
        kinds: defaultdict[torch.dtype, list[Tensor]] = defaultdict(list)  # in one tensor each
        for buffer in module.buffers() if module is not None else ():
            kinds[buffer.dtype].append(buffer)
        self.kinds = [(buffers, parameters_to_vector(buffers)) for buffers in kinds.values()]

    @torch.no_grad()
    def restore(self, bad: Tensor) -> None:
        """Puts them back where `bad`, a bool, is true."""
        for buffers, before in self.kinds:
            spread(torch.where(bad, before, parameters_to_vector(buffers)), buffers)


class HostCopy(Generic[Copied]):
    """Tensors on their way to the host; from CUDA that takes time."""

    def __init__(self, tensors: Copied, from_cuda: bool) -> None:
        self._tensors, self._arrival = tensors, None
        if from_cuda:
            self._arrival = torch.cuda.Event(blocking=True)  # who waits leaves its core to loaders
            self._arrival.record()

    def read(self) -> Copied:
        """The tensors, once they have arrived; does not wait for what was queued afterwards."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._tensors


def to_host(tensor: Tensor) -> HostCopy[Tensor]:
    """A copy of a small tensor; from CUDA it is only queued, to page-locked memory."""
    copied = tensor.to("cpu", non_blocking=True) if tensor.is_cuda else tensor
    return HostCopy(copied, tensor.is_cuda)


class Guard:
    """Counts updates that were left out, and ends a run after too many in a row.

    The flags of one iteration are read one iteration later, when they have reached the host.
    """

    def __init__(self, most: int) -> None:
        self.most = most  # in a row, before the run ends
        self.in_a_row = 0
        self.in_all = 0  # since this process started
        self._pending: tuple[int, list[str], list[str], HostCopy[Tensor]] | None = None

    def watch(self, iteration: int, keys: list[str], updates: dict[str, Update]) -> None:
        """Takes an iteration's updates, by network; their flags are read later."""
        flags = torch.cat([part for u in updates.values() for part in (u.bad.view(1), u.finite)])
        flags = flags.view(len(updates), -1)  # (networks, 1 + B)
        self._pending = iteration, keys, list(updates), to_host(flags)

    def judge(self) -> None:
        """Counts and logs whether the last update was left out, once; on all ranks together.

        Raises RunFailedError after `most` of them in a row.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        iteration, keys, networks, flags = pending
        for network, (bad, *finite) in zip(networks, flags.read().tolist(), strict=True):
            if bad:
                named = suspects(keys, finite)
                cause = f"loss or gradient of the {network} is not finite; {named}"
                return self._count(iteration, cause)
        self.in_a_row = 0

    def _count(self, iteration: int, cause: str) -> None:
        self.in_a_row += 1
        self.in_all += 1
        message = (
            f"iteration {iteration}: update left out on all ranks ({self.in_a_row} in a "
            f"row, {self.in_all} in all): {cause}"
        )
        if self.in_a_row >= self.most:
            raise RunFailedError(
                f"{message}\n{self.in_a_row} updates in a row were not finite; the last "
                "checkpoint is untouched. Lower optimizer.learning_rate, or try precision=float32"
            )
        if not dist.is_initialized() or dist.get_rank() == 0:
            say(message)


def suspects(keys: list[str], finite: list[bool]) -> str:
    """Names the images that are not finite, by rank; all ranks call it together."""
    mine = [printable(key) for key, good in zip(keys, finite, strict=True) if not good]
    found: list[list[str]] = [mine]
    if dist.is_initialized():
        found = found * dist.get_world_size()
        dist.all_gather_object(found, mine)
    named = [
        f"rank {rank}: {', '.join(bad[:4])}" + (f" and {len(bad) - 4} more" if bad[4:] else "")
        for rank, bad in enumerate(found)
        if bad
    ]
    return f"caused by {'; '.join(named)}" if named else "every image's own loss is finite"


# --- moving averages -------------------------------------------------------------------------


def ema_decay(number: int, decay: float, warmup: bool) -> float:
    """Share of the average kept at update `number` (1, 2, ...).

    With warm-up it is min(decay, (1 + n) / (10 + n)), as in the original's LitEma: 0.18 at first,
    which forgets imported weights, so it is off where the average starts from a trained model.
    """
    return min(decay, (1 + number) / (10 + number)) if warmup else decay


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
