"""One iteration's images and noise."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Batch:
    """One iteration of one rank."""

    images: Tensor  # (B, 3, crop, crop) uint8
    noise: Tensor  # (draws, B, embed_dim, h, w) float32, standard normal
    keys: list[str]
    skipped: list[str]

    def first(self, count: int) -> "Batch":
        """Its first images alone."""
        return Batch(self.images[:count], self.noise[:, :count], self.keys[:count], [])

    def pin_memory(self) -> "Batch":
        """Page-locked tensors, for the copy to the GPU."""
        return Batch(self.images.pin_memory(), self.noise.pin_memory(), self.keys, self.skipped)

    def to(self, device: torch.device, non_blocking: bool = True) -> "Batch":
        """The batch with its tensors on `device`."""
        images, noise = (t.to(device, non_blocking=non_blocking) for t in (self.images, self.noise))
        return Batch(images, noise, self.keys, self.skipped)
