"""Updates that are not finite: skipped on the device, reported to the host an iteration later.

The host never waits for the device inside an iteration: a fused Adam looks at a flag of its own
(`found_inf`, made for torch's GradScaler), and the flags travel to the host while it queues on.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Adam

from kl_f8_train.errors import RunFailedError
from kl_f8_train.output import say


def step_plainly(adam: Adam) -> None:
    """A step without a trainer."""
    adam.step()


class HostCopy:
    """A small tensor that is being copied to the host."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._arrived = tensor, None
        if tensor.device.type == "cuda":
            self._tensor = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event(
                blocking=True
            )  # a host that waits leaves its core to loaders
            self._arrived.record()

    def read(self) -> Tensor:
        """The values; waits for them alone, not for what was queued after them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensor


@dataclass(frozen=True)
class UpdateFlags:
    """One network's update: `bad`, bool, alike on all ranks; `finite`, this rank's images (B,)."""

    bad: Tensor
    finite: Tensor


class Judgement:
    """The verdicts over one iteration, by network, on their way to the host."""

    def __init__(self, iteration: int, keys: list[str], verdicts: dict[str, UpdateFlags]) -> None:
        self.iteration, self.keys, self._networks = iteration, keys, list(verdicts)
        flags = [torch.cat([v.bad.view(1), v.finite]) for v in verdicts.values()]
        self._flags = HostCopy(torch.stack(flags))  # (networks, 1 + B)

    def blame(self) -> str | None:
        """What was not finite, and the images behind it; None if all is well.

        All ranks call it together.
        """
        flags = self._flags.read().tolist()
        for network, (bad, *finite) in zip(self._networks, flags, strict=True):
            if bad:
                named = suspects(self.keys, finite)
                return f"loss or gradient of the {network} is not finite; {named}"
        return None


class Remembered:
    """A network's buffers as they are now: a bad batch goes through BatchNorm, too."""

    def __init__(self, module: nn.Module | None) -> None:
        kinds: defaultdict[torch.dtype, list[Tensor]] = defaultdict(list)  # in one tensor each
        for buffer in module.buffers() if module is not None else ():
            kinds[buffer.dtype].append(buffer)
        self.kinds = [(buffers, _joined(buffers)) for buffers in kinds.values()]

    @torch.no_grad()
    def restore(self, bad: Tensor) -> None:
        """Puts them back where `bad`, a bool, is true."""
        for buffers, before in self.kinds:
            kept = torch.where(bad, before, _joined(buffers))
            parts = kept.split([buffer.numel() for buffer in buffers])
            torch._foreach_copy_(
                buffers, [part.view_as(b) for part, b in zip(parts, buffers, strict=True)]
            )


def _joined(tensors: list[Tensor]) -> Tensor:
    """All elements in a row."""
    return torch.cat([tensor.flatten() for tensor in tensors])


class Guard:
    """Counts updates that were left out, and ends a run after too many in a row.

    The verdicts on an iteration are read one iteration later, when they have reached the host.
    """

    def __init__(self, most: int) -> None:
        self.most = most  # in a row, before the run ends
        self.in_a_row = 0
        self.in_all = 0  # since this process started
        self._pending: Judgement | None = None

    def watch(self, judgement: Judgement) -> None:
        """Takes an iteration's verdicts, to be read later."""
        self._pending = judgement

    def judge(self) -> None:
        """Counts and logs whether the last update was left out, once; on all ranks together.

        Raises RunFailedError after `most` of them in a row.
        """
        judged, self._pending = self._pending, None
        if judged is None:
            return
        blame = judged.blame()
        if blame is None:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        self.in_all += 1
        message = (
            f"iteration {judged.iteration}: update left out on all ranks ({self.in_a_row} in a "
            f"row, {self.in_all} in all): {blame}"
        )
        if self.in_a_row >= self.most:
            raise RunFailedError(
                f"{message}\n{self.in_a_row} updates in a row were not finite; the last "
                "checkpoint is untouched. Lower optimizer.learning_rate, or try precision=float32"
            )
        if not dist.is_initialized() or dist.get_rank() == 0:
            say(message)


def step_unless(bad: Tensor, adam: Adam, step: Callable[[Adam], None] = step_plainly) -> None:
    """One step of a fused Adam; weights and Adam's state stay where `bad`, a bool, is true."""
    adam.found_inf = bad.float()  # type: ignore[attr-defined]
    step(adam)


def finite_images(tensor: Tensor, loss: Tensor) -> Tensor:
    """Which images are finite in a (B, ...) tensor; none if only their common loss is not: (B,)."""
    finite = tensor.isfinite().flatten(1).all(1)
    return finite & (loss.isfinite() | ~finite.all())


def is_bad(norm: Tensor) -> Tensor:
    """Whether it is infinite or NaN, in two kernels: torch's `~norm.isfinite()` takes five."""
    return norm - norm != 0.0


def suspects(keys: list[str], finite: list[bool]) -> str:
    """Names the images that are not finite, by rank; all ranks call it together."""
    mine = [key for key, good in zip(keys, finite, strict=True) if not good]
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
