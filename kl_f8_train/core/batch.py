"""One iteration's images and noise, and the parts and phases that it is computed in."""

import hashlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import record_function

from kl_f8_train.divisors import divisor_up_to


@dataclass
class Batch:
    """One iteration of one rank: images with the noise of their latents.

    `noise` has one draw; with `second_forward` two, and with `latents.noise` one more, the last.
    """

    images: Tensor  # (B, 3, H, W), uint8, or floating point in [-1, 1]
    noise: Tensor  # (draws, B, embed_dim, h, w) float32, standard normal
    keys: list[str]
    skipped: list[str]  # `NAME: reason` of images that cannot be used
    profiles: list[str] = field(default_factory=list)  # colour profiles that were converted

    def first(self, count: int) -> "Batch":
        """Its first images alone."""
        return Batch(self.images[:count], self.noise[:, :count], self.keys[:count], [])

    def with_perturbation(self, source: tuple[int, ...]) -> "Batch":
        """With one more draw, u e: u uniform in [0, 1] and e normal, of each image."""
        state = random_state(*source, "latents")
        shape = tuple(self.noise.shape[1:])
        draw = state.random_sample((shape[0], 1, 1, 1)) * state.standard_normal(shape)
        more = torch.from_numpy(draw)[None].to(self.noise)
        return replace(self, noise=torch.cat([self.noise, more]))

    def pin_memory(self) -> "Batch":
        """Page-locked tensors, for the copy to the GPU."""
        return replace(self, images=self.images.pin_memory(), noise=self.noise.pin_memory())

    def to(self, device: torch.device, non_blocking: bool = True) -> "Batch":
        """The batch with its tensors on `device`."""
        images, noise = (t.to(device, non_blocking=non_blocking) for t in (self.images, self.noise))
        return replace(self, images=images, noise=noise)


@cache
def parts(count: int, most: int) -> tuple[slice, ...]:
    """`count` images as slices of one size, the largest divisor that is at most `most`."""
    size = divisor_up_to(count, most)
    return tuple(slice(start, start + size) for start in range(0, count, size))


def plain_batch(
    loaded: Any, draws: int, channels: int, downsampling: int, source: tuple[int, ...]
) -> Batch:
    """Images of any loader, with noise for their latents that depends on `source` alone.

    `loaded` is a tensor (B, 3, H, W), uint8 or floating point in [-1, 1], or a tuple or list that
    begins with one. Raises ValueError otherwise; warns of images in [0, 1].
    """
    images = loaded[0] if isinstance(loaded, list | tuple) and loaded else loaded
    if not isinstance(images, Tensor):
        raise ValueError(
            f"images of a batch: got a {type(images).__name__}, expected a tensor (B, 3, H, W), or "
            "a tuple that begins with one; the loader's collate_fn makes them"
        )
    if images.dim() != 4 or images.shape[1] != 3 or not len(images):
        raise ValueError(
            f"images of a batch: got {tuple(images.shape)}, expected a tensor (B, 3, H, W)"
        )
    height, width = images.shape[2:]
    if height % downsampling or width % downsampling:
        raise ValueError(
            f"images of {height} x {width} pixels: both sides must be multiples of {downsampling}"
        )
    if images.dtype != torch.uint8:
        _check_values(images)
    shape = (draws, len(images), channels, height // downsampling, width // downsampling)
    noise = random_state(*source).standard_normal(shape)
    keys = [f"image {number} of its batch" for number in range(len(images))]
    return Batch(images, torch.from_numpy(noise).float(), keys, [])


def random_state(*parts: int | str) -> np.random.RandomState:
    """A generator that depends on its arguments alone; its stream is frozen across releases."""
    # Not hash(), which differs from process to process.
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return np.random.RandomState(np.frombuffer(digest, np.uint32))


def _check_values(images: Tensor) -> None:
    """Raises ValueError for integers, and for images that cannot be in [-1, 1]."""
    if not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}; expected uint8, or float in [-1, 1]")
    lowest, highest = map(float, images.aminmax())
    largest = max(-lowest, highest)
    if largest > 1.01:
        raise ValueError(f"images reach {largest:.4g}; floating point ones must be in [-1, 1]")
    if 0 <= lowest < highest:  # once from one place in the code
        warnings.warn(
            "images of a batch lie in [0, 1], as ToTensor makes them; expected [-1, 1]: 2 * x - 1",
            stacklevel=2,
        )


# --- phases: spans for torch's profiler, and marks for a benchmark's clock -------------------

_clocks: list[Callable[[str], None]] = []  # formulas stay without one: phases are decorators


@contextmanager
def phase(name: str) -> Iterator[None]:
    """A phase; its end is reported to the clock, if one runs."""
    with record_function(name):
        yield
    for clock in _clocks:
        clock(name)


@contextmanager
def timed_by(clock: Callable[[str], None]) -> Iterator[None]:
    """Calls `clock(name)` at the end of every phase."""
    _clocks.append(clock)
    try:
        yield
    finally:
        _clocks.remove(clock)
