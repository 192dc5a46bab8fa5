"""Tensors copied to host memory, while training waits as little as possible."""

from collections.abc import Mapping

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes: where a copy begins


class HostMemory:
    """Memory that is kept for copy after copy.

    New memory is slow to get: the kernel makes its pages at their first use, in seconds a gigabyte
    where the machine is short of it, and CUDA pins them. Copied to pages that are there, a
    gigabyte takes a fraction of a second.
    """

    def __init__(self) -> None:
        self.block = torch.empty(0, dtype=torch.uint8)

    def reserve(self, size: int, pinned: bool) -> None:
        """Gets memory for `size` bytes, with its pages; `pinned` if they will come from CUDA."""
        if self.block.numel() < size:
            self.block = torch.empty(0, dtype=torch.uint8)  # the old one first
            self.block = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
            self.block.zero_()

    def copy(self, tensors: Mapping[str, Tensor]) -> "Copies":
        """Contiguous copies, which overwrite those of the call before.

        From CUDA they are only queued, before whatever changes the tensors next.
        """
        on_cuda = any(tensor.is_cuda for tensor in tensors.values())
        self.reserve(sum(room(tensor) for tensor in tensors.values()), on_cuda)
        copied, start = {}, 0
        for name, tensor in tensors.items():
            part = self.block[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            copied[name] = part.copy_(tensor.detach(), non_blocking=True)
            start += room(tensor)
        return Copies(copied, on_cuda)


class Arrival:
    """When what was queued so far has reached the host; from CUDA alone it takes time."""

    def __init__(self, on_cuda: bool) -> None:
        self._event = None
        if on_cuda:
            # blocking: a host that waits leaves its core to loaders
            self._event = torch.cuda.Event(blocking=True)
            self._event.record()

    def wait(self) -> None:
        """Waits for that alone, not for what was queued afterwards."""
        if self._event is not None:
            self._event.synchronize()


class Copies:
    """Copies that may still be on their way from the device."""

    def __init__(self, tensors: dict[str, Tensor], on_cuda: bool) -> None:
        self._tensors, self._arrival = tensors, Arrival(on_cuda)

    def tensors(self) -> dict[str, Tensor]:
        """All of them; waits until they have arrived. They share one block of memory."""
        self._arrival.wait()
        return self._tensors


class HostCopy:
    """A small tensor that is being copied to the host."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        if tensor.is_cuda:
            self._tensor = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
        self._arrival = Arrival(tensor.is_cuda)

    def read(self) -> Tensor:
        """The values, once they have arrived."""
        self._arrival.wait()
        return self._tensor


def room(tensor: Tensor) -> int:
    """Bytes that a copy takes."""
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
