"""PatchGAN discriminator (taming-transformers' NLayerDiscriminator), with its state-dict keys."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Discriminator(nn.Module):
    """(B, 3, H, W) in [-1, 1] -> one logit per patch, (B, 1, 30, 30) at 256 x 256.

    4x4 convolutions, strides 2, 2, 2, 1, 1 for n_layers 3; 2,765,633 parameters for ndf 64, the
    channels of the first layer. A new one starts as torch's layers do; `initialize_discriminator`
    gives it the original's start. `sync_batchnorm` takes BatchNorm's statistics over all ranks.
    """

    def __init__(self, ndf: int = 64, n_layers: int = 3, sync_batchnorm: bool = False) -> None:
        super().__init__()
        norm = SyncBatchNorm2d if sync_batchnorm else nn.BatchNorm2d
        # ndf 64, n_layers 3: 64, 128, 256, 512 channels; a logit sees 70 x 70 pixels (Isola 2017)
        widths = [ndf * min(2**level, 8) for level in range(n_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, ndf, 4, 2, 1), nn.LeakyReLU(0.2)]
        for level in range(1, n_layers + 1):
            stride = 2 if level < n_layers else 1
            layers += [
                nn.Conv2d(widths[level - 1], widths[level], 4, stride, 1, bias=False),
                norm(widths[level]),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(widths[-1], 1, 4, 1, 1))
        self.main = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.main(images)


class SyncBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over the equal batches of all ranks; unlike torch's, also on the CPU."""

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        # Ioffe and Szegedy 2015, over all ranks: mean = sum_r mean_r / R as batches are equal, then
        # variance = sum_r mean_r((x - mean)^2) / R. In the weights' type, as autocast's BatchNorm.
        world, dtype, x = dist.get_world_size(), x.dtype, x.to(self.weight.dtype)
        shape = (1, -1, 1, 1)
        mean: Tensor = _SumOverRanks.apply(x.mean((0, 2, 3))) / world  # (C,)
        x = x - mean.view(shape)
        variance: Tensor = _SumOverRanks.apply(x.square().mean((0, 2, 3))) / world
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        with torch.no_grad():  # running statistics take the unbiased variance, as torch's do
            count = world * x[:, 0].numel()
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt()
        return (x * scale.view(shape) + self.bias.view(shape)).to(dtype)


class _SumOverRanks(torch.autograd.Function):
    """all_reduce; its gradient is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total: Tensor = _SumOverRanks.apply(gradient)
        return total


def shape_of(state: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """(ndf, n_layers) of a state dict; None if it is of another kind of discriminator."""
    kernels = [value for key, value in state.items() if key.endswith("weight") and value.ndim == 4]
    if len(kernels) < 3:
        return None
    ndf, n_layers = kernels[0].shape[0], len(kernels) - 2  # but for the first and the last
    with torch.device("meta"):
        expected = Discriminator(ndf, n_layers).state_dict()
    same = {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in expected.items()}
    return (ndf, n_layers) if same else None


def initialize(discriminator: Discriminator, seed: int) -> None:
    """The original's start: convolutions N(0, 0.02), norms N(1, 0.02) with bias 0.

    Drawn from uniform bits, which do not depend on the CPU's vector instructions, so that all
    ranks agree.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in discriminator.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data.copy_(_normal(module.weight.shape, generator) * 0.02)
            if module.bias is not None:  # torch's own default: uniform within 1 / sqrt(fan_in)
                bound = module.weight[0].numel() ** -0.5
                draw = torch.rand(module.bias.shape, generator=generator)
                module.bias.data.copy_((2 * draw - 1) * bound)
        elif isinstance(module, nn.BatchNorm2d):
            module.weight.data.copy_(1.0 + _normal(module.weight.shape, generator) * 0.02)
            module.bias.data.zero_()


def _normal(shape: torch.Size, generator: torch.Generator) -> Tensor:
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64).clamp_min(1e-12)
    return torch.special.ndtri(uniform).float()
