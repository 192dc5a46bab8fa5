"""Makes a decoder safe in fp16 without training: the same function, smaller activations.

Every branch of the decoder begins with a GroupNorm, which divides by the standard deviation of its
input. So the residual stream, and the output of each block's first convolution, may be multiplied
by a constant without a change of the result. With a power of two, 2^-k, no bit of a weight is lost
and float32 computes the same to the bit, but for the norms' eps = 1e-6: it is added to a variance
that is 4^-k times what it was. `Rescaling.eps_share` says how much that is.

The stream is written by conv_in, by each block's conv2 and by the attention's proj_out (weight and
bias are scaled); nin_shortcut and the upsampling convolution carry it (their bias is scaled).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kl_f8_train.core.model import AutoencoderKL
from kl_f8_train.errors import RunFailedError
from kl_f8_train.publish import half_precision

HEADROOM = 8  # how far below fp16's limit the largest activation seen must lie
EXACT_LEVELS = 1e-2  # of 255, the most that eps may change in float32

WRITES = re.compile(
    r"decoder\.(conv_in|mid\.attn_1\.proj_out|(mid\.block_\d|up\.\d+\.block\.\d+)\.conv2)\.\w+"
)
CARRIES = re.compile(r"decoder\.up\.\d+\.(upsample\.conv|block\.\d+\.nin_shortcut)\.bias")
STREAM = re.compile(  # modules whose outputs are the stream, or a summand of it
    r"(conv_in|conv2|proj_out|nin_shortcut|attn_1|upsample(\.conv)?|block_\d|block\.\d+)$"
)
INNER = re.compile(r"decoder\.(mid\.block_\d|up\.\d+\.block\.\d+)\.conv1\.\w+")


@dataclass
class Rescaling:
    """Powers of two by which activations are divided, and what that does."""

    stream: int  # k of the residual stream, divided by 2^k
    inner: dict[str, int]  # block -> k of its first convolution's output; 0 is left out
    proof: dict[str, Any] = field(default_factory=dict)

    @property
    def changes(self) -> bool:
        """Whether anything is divided."""
        return self.stream > 0 or bool(self.inner)

    def apply(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict with the decoder rescaled; raises RunFailedError if a weight loses bits."""
        return {name: self._scaled(name, value) for name, value in state.items()}

    def _scaled(self, name: str, value: Tensor) -> Tensor:
        inner = INNER.fullmatch(name)
        k = self.inner.get(f"decoder.{inner[1]}", 0) if inner else 0
        if WRITES.fullmatch(name) or CARRIES.fullmatch(name):
            k = self.stream
        scaled = value * 2.0**-k
        # A power of two only moves the exponent, unless that leaves float32's range.
        if not torch.equal(scaled * 2.0**k, value):
            raise RunFailedError(f"{name} would lose bits at 2^-{k}; the decoder stays as it is")
        return scaled if k else value


@torch.no_grad()
def plan_rescaling(model: AutoencoderKL, latents: list[Tensor]) -> Rescaling:
    """The least powers of two that keep all activations seen below fp16's limit / HEADROOM."""
    with half_precision.largest_outputs(model) as largest:
        for z in latents:
            model.decode(z)
    powers = {name: _power(most) for name, most in largest.items()}
    stream = [k for name, k in powers.items() if STREAM.search(name)]
    inner = {}
    for name, k in powers.items():
        if name.endswith(".conv1") and k > 0:
            inner[name.removesuffix(".conv1")] = k
    return Rescaling(max(0, *stream), inner)


def probes(latents: list[Tensor]) -> list[Tensor]:
    """Latents of photographs, and extremes of theirs: doubled, noise and flat areas at the ends."""
    low = min(float(z.min()) for z in latents)
    high = max(float(z.max()) for z in latents)
    first = latents[0]
    noise = torch.rand(first.shape, generator=torch.Generator().manual_seed(0))
    extremes = [
        low + (high - low) * noise,
        torch.full_like(first, low),
        torch.full_like(first, high),
    ]
    return [*latents, *(2 * z for z in latents), *extremes]


@torch.no_grad()
def prove(
    rescaling: Rescaling, before: AutoencoderKL, after: AutoencoderKL, latents: list[Tensor]
) -> None:
    """Compares the two decoders on latents, in float32; fills in `proof`.

    Raises RunFailedError if they differ by more than EXACT_LEVELS.
    """
    norms = {name: m for name, m in after.decoder.named_modules() if isinstance(m, nn.GroupNorm)}
    with half_precision.noted(norms, _eps_share) as share:
        pairs = [(before.decode(z), after.decode(z)) for z in latents]
    most = max(half_precision.levels(a, b)[1] for a, b in pairs)
    rescaling.proof = {
        "stream": f"2^-{rescaling.stream}",
        "inner": {name: f"2^-{k}" for name, k in rescaling.inner.items()},
        "probes": len(latents),
        "float32_bit_equal": all(torch.equal(a, b) for a, b in pairs),
        "float32_largest_difference_in_levels": most,
        "largest_eps_share": max(share.values(), default=0.0),
    }
    if not most <= EXACT_LEVELS:
        raise RunFailedError(
            f"rescaling would change images by {most:.2g} of 255 levels, as the norms' eps is "
            f"{rescaling.proof['largest_eps_share']:.2g} of a variance; the decoder stays as it is"
        )


def _power(most: float) -> int:
    """The least k with most / 2^k <= LIMIT / HEADROOM; negative where there is room to spare."""
    return math.ceil(math.log2(max(most, 1e-30) * HEADROOM / half_precision.LIMIT))


def _eps_share(norm: nn.GroupNorm, inputs: tuple[Tensor, ...], output: Tensor) -> float:
    """eps as a share of the variance of a norm's smallest group."""
    # (B, groups, C/groups H W)
    groups = inputs[0].unflatten(1, (norm.num_groups, -1)).flatten(2)
    return norm.eps / float(groups.var(dim=2, correction=0).min().clamp_min(1e-30))
