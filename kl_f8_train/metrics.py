"""Reconstruction metrics, one number per image. Images are (B, 3, H, W) in [0, 1].

Formulas of the authors' published evaluator (pesser/stable-diffusion, after SynSin).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def psnr(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, (B,): 10 log10(1 / mse); inf where equal."""
    mse = (images - reconstructions).square().mean(dim=(1, 2, 3))
    return -10.0 * torch.log10(mse)


def ssim(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Structural similarity, (B,): 11 x 11 Gaussian window (sigma 1.5), zero padding.

    C1 = 0.01^2, C2 = 0.03^2; mean over channels and the whole map.
    """
    line = _gaussian_line(images)
    rows, columns = line.view(1, 1, 1, 11), line.view(1, 1, 11, 1)  # the window is separable

    def blur(x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)[:, None]  # (3 B, 1, H, W)
        return F.conv2d(F.conv2d(flat, rows, padding=(0, 5)), columns, padding=(5, 0)).view_as(x)

    mean_x, mean_y = blur(images), blur(reconstructions)
    var_x = blur(images * images) - mean_x.square()
    var_y = blur(reconstructions * reconstructions) - mean_y.square()
    covariance = blur(images * reconstructions) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    numerator = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    denominator = (mean_x.square() + mean_y.square() + c1) * (var_x + var_y + c2)
    return (numerator / denominator).mean(dim=(1, 2, 3))


def sharpness(images: Tensor) -> Tensor:
    """Variance of the 4-neighbour Laplacian of the luma, in 8-bit levels squared, (B,)."""
    weights = images.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    luma = 255.0 * (images * weights).sum(dim=1, keepdim=True)
    kernel = images.new_tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
    return F.conv2d(luma, kernel.view(1, 1, 3, 3)).flatten(1).var(dim=1, correction=0)


def _gaussian_line(like: Tensor) -> Tensor:
    """(11,), sums to 1; its outer product with itself is the window."""
    offsets = torch.arange(-5, 6, dtype=like.dtype, device=like.device)
    line = torch.exp(-offsets.square() / (2 * 1.5**2))
    return line / line.sum()
