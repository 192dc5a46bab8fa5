"""AutoencoderKL of latent diffusion (CompVis/latent-diffusion), with its state-dict keys.

Shapes: B images, H x W pixels, h x w = H/f x W/f latents, f = 2 ** (levels - 1) = 8 for kl-f8.
Images are (B, 3, H, W) in [-1, 1]; latents are (B, 4, h, w), unscaled (no 0.18215).
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ContextDecorator, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from kl_f8_train.facts import Facts

FROZEN = ("encoder", "quant_conv")
TRAINED = ("decoder", "post_quant_conv")
EPS = 1e-6  # of every GroupNorm, as in the original
Pending = tuple[Tensor, Tensor | None]  # (B, C, H, W), and what is still to be added to it, (C,)


@dataclass(frozen=True)
class Posterior:
    """A diagonal Gaussian over latents; the log variance is clamped to [-30, 20]."""

    mean: Tensor  # (B, 4, h, w)
    logvar: Tensor  # (B, 4, h, w)

    @classmethod
    def from_moments(cls, moments: Tensor) -> "Posterior":
        """Splits the encoder's (B, 8, h, w) output into mean and log variance."""
        mean, logvar = moments.chunk(2, dim=1)
        return cls(mean, logvar.clamp(-30.0, 20.0))

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise, with standard normal `noise` of the latents' shape."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise.reshape(self.mean.shape)

    def kl(self) -> Tensor:
        """Kullback-Leibler divergence from N(0, 1), summed over latents: (B,), in nats."""
        terms = self.mean.square() + self.logvar.exp() - 1.0 - self.logvar  # (B, 4, h, w)
        return 0.5 * terms.sum(dim=(1, 2, 3))


class AutoencoderKL(nn.Module):
    """Encoder, decoder and the 1x1 convolutions around the latents: 248 tensors for kl-f8.

    `ch` channels times `ch_mult` at each level, `num_res_blocks` a level, latents of `embed_dim`
    channels; without `quant_conv` as in SD3 and FLUX. Raises ValueError for channels that
    `norm_num_groups` does not divide.
    """

    facts = Facts()  # that its file states, for the file that it is saved to

    def __init__(
        self,
        ch: int = 128,
        ch_mult: tuple[int, ...] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        z_channels: int = 4,
        embed_dim: int = 4,
        norm_num_groups: int = 32,
        quant_conv: bool = True,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(ch, ch_mult, num_res_blocks, z_channels, norm_num_groups)
        self.decoder = Decoder(ch, ch_mult, num_res_blocks, z_channels, norm_num_groups)
        # SD3's and FLUX's autoencoders have neither of these two.
        pointwise = ExactConv2d if quant_conv else nn.Identity
        self.quant_conv = pointwise(2 * z_channels, 2 * embed_dim, 1)
        self.post_quant_conv = pointwise(embed_dim, z_channels, 1)
        self.downsampling = 2 ** (len(ch_mult) - 1)
        self.embed_dim = embed_dim

    def encode(self, images: Tensor) -> Posterior:
        """(B, 3, H, W) in [-1, 1], sides multiples of f -> posterior over (B, 4, h, w)."""
        return Posterior.from_moments(self.quant_conv(self.encoder(images)))

    def decode(self, latents: Tensor) -> Tensor:
        """(B, 4, h, w) -> (B, 3, H, W), about [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(latents))

    def decode_at_last_layer(self, latents: Tensor) -> Tensor:
        """As `decode`, but with a graph of the last layer alone: nothing else is kept."""
        with torch.no_grad():
            features = self.decoder.features(self.post_quant_conv(latents))
        return self.decoder.conv_out(features)

    @property
    def last_layer(self) -> Tensor:
        """decoder.conv_out.weight, where the adaptive weight compares gradients."""
        return self.decoder.conv_out.weight

    def freeze_encoder(self) -> "AutoencoderKL":
        """Freezes encoder and quant_conv: no gradient, and always in eval mode."""
        for name in FROZEN:
            getattr(self, name).requires_grad_(False)
        return self.train(self.training)

    def train(self, mode: bool = True) -> "AutoencoderKL":
        """Sets the mode; frozen parts stay in eval."""
        super().train(mode)
        for name in FROZEN:
            part = getattr(self, name)
            if not any(p.requires_grad for p in part.parameters()):
                part.eval()
        return self


class ExactConv2d(nn.Conv2d):
    """A convolution at the latents, which autocast leaves in the weights' precision.

    Rounded to bfloat16, moments and latents would lose a third of the posterior's deviation.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not _autocast_dtype(input):
            return super().forward(input)
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.to(self.weight.dtype))


def _autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The precision that autocast would compute in; None where it is off."""
    kind = tensor.device.type
    if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


class Encoder(nn.Module):
    """(B, 3, H, W) -> (B, 2 * z_channels, h, w)."""

    def __init__(
        self, ch: int, ch_mult: tuple[int, ...], blocks: int, z_channels: int, groups: int
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        widths = [ch * multiplier for multiplier in ch_mult]
        inputs = [ch, *widths]  # level i takes the output of level i - 1
        self.down = nn.ModuleList(
            DownLevel(inputs[level], width, blocks, groups, downsample=level < len(widths) - 1)
            for level, width in enumerate(widths)
        )
        self.mid = Middle(widths[-1], groups)
        self.norm_out = NormSwish(groups, widths[-1])
        self.conv_out = ExactConv2d(widths[-1], 2 * z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(self.norm_out(self.mid(h)))


class Decoder(nn.Module):
    """(B, z_channels, h, w) -> (B, 3, H, W); one residual block per level more than the encoder."""

    def __init__(
        self, ch: int, ch_mult: tuple[int, ...], blocks: int, z_channels: int, groups: int
    ) -> None:
        super().__init__()
        widths = [ch * multiplier for multiplier in ch_mult]
        self.conv_in = ExactConv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], groups)
        inputs = [*widths[1:], widths[-1]]  # level i takes the output of level i + 1
        self.up = nn.ModuleList(
            UpLevel(inputs[level], width, blocks + 1, groups, upsample=level > 0)
            for level, width in enumerate(widths)
        )
        self.norm_out = NormSwish(groups, widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        return self.conv_out(self.features(z))

    def features(self, z: Tensor) -> Tensor:
        """(B, z_channels, h, w) -> the last layer's input, (B, ch, H, W)."""
        h = self.conv_in(z)
        h = self.mid(h.to(_autocast_dtype(h) or h.dtype))
        doubling = None
        for level in reversed(self.up):
            norm = self.norm_out if level is self.up[0] else None
            h = level(h, doubling=doubling, norm=norm)
            doubling = getattr(level, "upsample", None)
        return h


class DownLevel(nn.Module):
    """Residual blocks at one resolution, then a halving."""

    def __init__(
        self, inputs: int, outputs: int, blocks: int, groups: int, downsample: bool
    ) -> None:
        super().__init__()
        widths = [inputs] + [outputs] * blocks
        self.block = nn.ModuleList(ResnetBlock(a, b, groups) for a, b in pairwise(widths))
        self.attn = nn.ModuleList()
        if downsample:
            self.downsample = Downsample(outputs)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return self.downsample(x) if hasattr(self, "downsample") else x


class UpLevel(nn.Module):
    """Residual blocks at one resolution; `upsample` is the doubling that leads to the next."""

    def __init__(self, inputs: int, outputs: int, blocks: int, groups: int, upsample: bool) -> None:
        super().__init__()
        widths = [inputs] + [outputs] * blocks
        self.block = nn.ModuleList(ResnetBlock(a, b, groups) for a, b in pairwise(widths))
        self.attn = nn.ModuleList()
        self.recompute = False  # blocks keep their input only, and run again in the backward pass
        if upsample:
            self.upsample = Upsample(outputs)

    def forward(
        self, x: Tensor, doubling: "Upsample | None" = None, norm: "NormSwish | None" = None
    ) -> Tensor:
        """With the doubling before it and the norm behind it, which are compiled with it."""
        added = None
        if doubling is not None:
            x, added = doubling.pending(x)
        for block in self.block:
            assert isinstance(block, ResnetBlock)
            if self.recompute and torch.is_grad_enabled():
                x, added = checkpoint(
                    block.pending, x, added, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x, added = block.pending(x, added)
        return _plus(x, added) if norm is None else norm(x, added=added)


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = Attention(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class ResnetBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))), with a 1x1 shortcut where widths differ."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1 = NormSwish(groups, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = NormSwish(groups, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return _plus(*self.pending(x))
        h = self.conv2(self.norm2(self.conv1(self.norm1(x))))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h

    def pending(self, x: Tensor, added: Tensor | None = None) -> Pending:
        """As of x + added, (C,), with a bias that is still to be added if it is compiled.

        Biases wait for the next norm: its backward pass has the sums that are their gradients, so
        that no pass over the image is needed for them.
        """
        if not torch.compiler.is_compiling():
            return self(x), None
        h, bias = _apart(self.conv1, self.norm1(x, added))
        h, bias = _apart(self.conv2, self.norm2(h, bias))
        if hasattr(self, "nin_shortcut"):
            if added is not None:  # as constant channels, through the 1x1 convolution
                added = (self.nin_shortcut.weight.flatten(1) * added).sum(1)
            x, of_shortcut = _apart(self.nin_shortcut, x)
            bias = bias + of_shortcut
        return x + h, bias if added is None else bias + added


def _apart(layer: nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor]:
    """A convolution without its bias, (B, D, h, w), and the bias, (D,)."""
    assert layer.bias is not None
    return F.conv2d(x, layer.weight, None, layer.stride, layer.padding), layer.bias


class Attention(nn.Module):
    """Single-head self-attention over all h * w positions, as 1x1 convolutions."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, EPS)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        b, c, height, width = h.shape
        q, k, v = (
            part(h).reshape(b, 1, c, -1).transpose(2, 3) for part in (self.q, self.k, self.v)
        )
        out = F.scaled_dot_product_attention(q, k, v)  # (B, 1, h*w, C), scale 1 / sqrt(C)
        return x + self.proj_out(out.transpose(2, 3).reshape(b, c, height, width))


class Downsample(nn.Module):
    """Stride-2 convolution, padded at the right and the bottom only, as in the original."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # left, right, top, bottom; (B, C, H/2, W/2)


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a convolution.

    With `subpixel` both are one convolution at the low resolution: a 3x3 window over doubled
    pixels sees only 2x2 different ones, so its taps are added up beforehand, once for each parity
    of row and column. The result differs by rounding only, at 4/9 of the arithmetic and without
    the doubled input. Formula: Shi et al. 2016 (arXiv:1609.07009), for nearest-neighbour input.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.subpixel = True

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return _plus(*self.pending(x))
        if not self.subpixel:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        assert self.conv.bias is not None
        bias = self.conv.bias.repeat(4)
        return interleave(F.conv2d(x, subpixel_kernel(self.conv.weight), bias, padding=1))

    def pending(self, x: Tensor) -> Pending:
        """As a residual block's."""
        if not torch.compiler.is_compiling():
            return self(x), None
        if not self.subpixel:
            return _apart(self.conv, F.interpolate(x, scale_factor=2.0))
        return interleave(F.conv2d(x, subpixel_kernel(self.conv.weight), padding=1)), self.conv.bias


def subpixel_kernel(weight: Tensor) -> Tensor:
    """(C, D, 3, 3) on a doubled image -> (4 C, D, 2, 2) on the image itself.

    The first axis runs over row parity, column parity, output channel.
    """
    rows = _parities(weight, 2)  # (row parity, row tap, C, D, 3)
    both = _parities(rows, 4)  # (column parity, column tap, row parity, row tap, C, D)
    return both.permute(2, 0, 4, 5, 3, 1).flatten(0, 2)


def _parities(weight: Tensor, axis: int) -> Tensor:
    """Taps before, at and after a pixel -> (parity, tap, ...) on the pixels before doubling."""
    before, here, after = weight.unbind(axis)
    # Doubled, pixel i is at 2 i and 2 i + 1. Around 2 i lie pixels i - 1, i, i: two taps fall on i.
    # Around 2 i + 1 lie i, i, i + 1.
    even = torch.stack((before, here + after))
    odd = torch.stack((before + here, after))
    return torch.stack((even, odd))


def interleave(parts: Tensor) -> Tensor:
    """(B, 4 C, H + 1, W + 1) -> (B, C, 2 H, 2 W): each parity's image into its rows and columns.

    A part of even rows begins one pixel early, as its window reaches up; so do even columns. The
    layout in memory, NCHW or NHWC, stays.
    """
    kind = _FusedInterleave if torch.compiler.is_compiling() else _Interleave
    whole: Tensor = kind.apply(parts)
    return whole


class _Interleave(torch.autograd.Function):
    """With its gradient as one copy: autograd's own adds four padded images, part by part."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor) -> Tensor:
        batch, four, height, width = parts.shape
        of_image, of_channel, of_row, of_column = parts.stride()
        odd = four // 4 * of_channel  # from an even column's part to the odd one's
        every = {  # axis: its length, and how far apart in memory
            "image": (batch, of_image),
            "channel": (four // 4, of_channel),
            "row": (height - 1, of_row),
            "parity of row": (2, 2 * odd + of_row),
            "column": (width - 1, of_column),
            "parity of column": (2, odd + of_column),
        }
        sizes, strides = zip(*every.values(), strict=True)
        shape = batch, four // 4, 2 * (height - 1), 2 * (width - 1)
        view = parts.as_strided(sizes, strides)
        if not parts.is_contiguous(memory_format=torch.channels_last):
            return view.reshape(shape)
        return view.permute(0, 2, 3, 4, 5, 1).reshape(batch, *shape[2:], -1).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        parts = [
            F.pad(gradient[:, :, p::2, q::2], (q, 1 - q, p, 1 - p)) for p in (0, 1) for q in (0, 1)
        ]
        return torch.cat(parts, dim=1)


class _FusedInterleave(torch.autograd.Function):
    """The same by plain indexing in NHWC order, for the compiler to fuse with what is around it."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor) -> Tensor:
        rows, columns = (torch.arange(2 * n - 2, device=parts.device) for n in parts.shape[2:])
        rows = rows[:, None]
        cells = parts.permute(0, 2, 3, 1).unflatten(3, (2, 2, -1))  # (B, H + 1, W + 1, 2, 2, C)
        places = rows // 2 + rows % 2, columns // 2 + columns % 2, rows % 2, columns % 2
        return cells[:, *places].permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        padded = F.pad(gradient, (1, 1, 1, 1)).permute(0, 2, 3, 1)  # begins with an odd row
        cells = padded.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).flip(2, 4)
        return cells.permute(0, 1, 3, 2, 4, 5).flatten(3).permute(0, 3, 1, 2)


class NormSwish(nn.GroupNorm):
    """x * sigmoid(x) of the normalised input.

    With `lean` the backward pass computes the normalised input again, from the input and the
    groups' statistics, instead of keeping it; and under autocast the output has autocast's type,
    to which the convolution behind it would round it anyway. The values are the same.
    """

    def __init__(self, groups: int, channels: int) -> None:
        super().__init__(groups, channels, EPS)
        self.lean = True

    def forward(self, input: Tensor, added: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> the same; `added`, (C,), is a convolution's bias, still to be added."""
        numbers = self.num_groups, self.eps, _autocast_dtype(input) or input.dtype
        output: Tensor
        if self.lean and torch.compiler.is_compiling():
            output = _FusedNormSwish.apply(input, added, self.weight, self.bias, *numbers)
            return output
        input = _plus(input, added)
        if not self.lean:
            return F.silu(super().forward(input))
        output = _LeanNormSwish.apply(input, self.weight, self.bias, *numbers)
        return output


class _LeanNormSwish(torch.autograd.Function):
    """silu(group_norm(x)) by torch's own kernels; keeps x, the mean and 1 / std of each group."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (B, C, H, W)
        weight: Tensor,  # (C,)
        bias: Tensor,  # (C,)
        groups: int,
        eps: float,
        dtype: torch.dtype,  # of the output
    ) -> Tensor:
        exact = torch.promote_types(weight.dtype, torch.float32)
        y, mean, rstd = torch.native_group_norm(
            x.to(exact), weight.to(exact), bias.to(exact), *_shape(x), groups, eps
        )
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return F.silu(y).to(dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        groups, exact = mean.shape[1], mean.dtype
        scale = _of_channels(rstd, x) * _column(weight)
        shift = _column(bias) - _of_channels(mean, x) * scale
        x_exact = x.to(exact)
        through_swish = torch.ops.aten.silu_backward(
            gradient.to(exact), torch.addcmul(shift, x_exact, scale)
        )
        found = torch.ops.aten.native_group_norm_backward(
            *(through_swish, x_exact, mean, rstd, weight.to(exact), *_shape(x), groups),
            list(ctx.needs_input_grad[:3]),
        )
        types = (x.dtype, weight.dtype, bias.dtype)
        of_inputs = (g if g is None else g.to(t) for g, t in zip(found, types, strict=True))
        return (*of_inputs, None, None, None)


class _FusedNormSwish(torch.autograd.Function):
    """The same in plain operations, for the compiler to fuse, from sums over each channel.

    torch's statistics of a group read a few of the channels beside each other in NHWC memory, and
    skip the rest; sums of a channel's pixels read all of them in a row. The bias of the convolution
    before it is added here, which saves a pass over the image, and one for its gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (B, C, H, W)
        added: Tensor | None,  # (C,), to x
        weight: Tensor,  # (C,)
        bias: Tensor,  # (C,)
        groups: int,
        eps: float,
        dtype: torch.dtype,  # of the output
    ) -> Tensor:
        exact = torch.promote_types(weight.dtype, torch.float32)
        mean, rstd = group_statistics(x.to(exact), added, groups, eps)
        ctx.save_for_backward(x, added, weight, bias, mean, rstd)
        normal = _normalized(x, added, mean, rstd)
        return F.silu(normal * _column(weight) + _column(bias)).to(dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, added, weight, bias, mean, rstd = ctx.saved_tensors
        normal = _normalized(x, added, mean, rstd)  # (B, C, H, W)
        y = normal * _column(weight) + _column(bias)
        share = torch.sigmoid(y)
        of_y = gradient.to(mean.dtype) * share * (1 + y * (1 - share))  # d silu(y) / d y
        of_bias, of_weight = of_y.sum(3), (of_y * normal).sum(3)  # (B, C, H)
        first, second = (  # means over each group of w d y and of w d y (x - mean) / std
            (part * weight[:, None]).unflatten(1, (mean.shape[1], -1)).mean((2, 3)) / x.shape[3]
            for part in (of_bias, of_weight)
        )
        first, second, scale = (_of_channels(part, x) for part in (first, second, rstd))
        of_x = scale * (of_y * _column(weight) - first - normal * second)
        of_added = None
        if added is not None:  # of_x summed over pixels, from sums that are there
            first, second, scale = (part.flatten(2) for part in (first, second, scale))
            sums = of_bias * weight[:, None] - x.shape[3] * first - normal.sum(3) * second
            of_added = (scale * sums).sum((0, 2)).to(added.dtype)
        of_weight = of_weight.sum((0, 2)).to(weight.dtype)
        of_bias = of_bias.sum((0, 2)).to(bias.dtype)
        return (of_x.to(x.dtype), of_added, of_weight, of_bias, None, None, None)


def group_statistics(
    x: Tensor, added: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(variance + eps) of each group of x + added, both (B, groups).

    x is (B, C, H, W), `added` (C,). The variance is that within rows and that between their means:
    a mean that is large beside the deviation costs it no digits.
    """
    first = x.mean(3)  # (B, C, H)
    within = (x - first[..., None]).square().mean(3)
    means = first if added is None else first + added[:, None]
    between, mean = torch.var_mean(means.unflatten(1, (groups, -1)), (2, 3), correction=0)
    within = within.unflatten(1, (groups, -1)).mean((2, 3))
    return mean, (within + between + eps).rsqrt()


def _plus(x: Tensor, added: Tensor | None) -> Tensor:
    """x + added, (C,), if there is one, in x's type."""
    return x if added is None else x + _column(added.to(x.dtype))


def _shape(x: Tensor) -> tuple[int, int, int]:
    """Images, channels, pixels."""
    return x.shape[0], x.shape[1], x.shape[2] * x.shape[3]


def _column(vector: Tensor) -> Tensor:
    """(C,) -> (1, C, 1, 1)."""
    return vector.view(1, -1, 1, 1)


def _of_channels(of_groups: Tensor, x: Tensor) -> Tensor:
    """(B, groups) -> (B, C, 1, 1): each channel its group's value."""
    size = x.shape[1] // of_groups.shape[1]
    return of_groups[:, :, None].expand(-1, -1, size).flatten(1)[:, :, None, None]


def _normalized(x: Tensor, added: Tensor | None, mean: Tensor, rstd: Tensor) -> Tensor:
    """(x + added - mean) / std of its group, in the statistics' type."""
    offset = _of_channels(mean, x)
    offset = offset if added is None else offset - _column(added)
    return (x.to(mean.dtype) - offset) * _of_channels(rstd, x)


# --- the precision that networks are computed in ---------------------------------------------


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Convolutions and products in bfloat16, if the precision says so; weights stay as they are."""
    if device.type == "meta":
        return _bfloat16_convolutions() if precision == "bfloat16" else nullcontext()
    return torch.autocast(device.type, torch.bfloat16, precision == "bfloat16")


@contextmanager
def _bfloat16_convolutions() -> Iterator[None]:
    """What autocast does to these networks, for the meta device, which has none."""
    convolve = F.conv2d

    def rounded(*tensors: Tensor | None, **options: Any) -> Tensor:
        args, options = tree_map_only(Tensor, Tensor.bfloat16, (tensors, options))
        return convolve(*args, **options)

    F.conv2d = rounded  # type: ignore[assignment]
    try:
        yield
    finally:
        F.conv2d = convolve


class Kernels(ContextDecorator):
    """While entered, how CUDA computes: the fastest kernels by trial, and TF32 by precision.

    "float32" means float32, while torch's default for convolutions is TF32; "tf32" has it in
    convolutions and matrix products; "bfloat16" has it in the convolutions that it leaves in
    float32, the perceptual network's. Nothing of it changes a CPU's arithmetic.

    `deterministic` takes kernels that give the same bits in every run on one kind of GPU; torch
    raises RuntimeError, named by `with_remedy`, where an operation has none.
    """

    def __init__(self, precision: str, deterministic: bool = False) -> None:
        self.deterministic, self.strict = deterministic, True
        self.entered = False
        self.other: dict[str, bool] = {  # flags of torch.backends: ours, and while entered, torch's
            "cudnn.benchmark": not deterministic,  # shapes are those of the iteration before
            "cudnn.allow_tf32": precision != "float32",
            "cuda.matmul.allow_tf32": precision == "tf32",
        }
        if deterministic:
            self.other["cudnn.deterministic"] = True

    def __enter__(self) -> None:
        if not self.entered:  # it is after a fit that has failed
            self._exchange()

    def __exit__(self, *error: object) -> None:
        if self.entered:
            self._exchange()

    def _exchange(self) -> None:
        self.entered = not self.entered
        for name, value in self.other.items():
            place, _, flag = name.rpartition(".")
            module = attrgetter(place)(torch.backends)
            self.other[name] = getattr(module, flag)
            setattr(module, flag, value)
        if self.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at its first use
            before = torch.are_deterministic_algorithms_enabled()
            torch.use_deterministic_algorithms(self.strict)
            self.strict = before
