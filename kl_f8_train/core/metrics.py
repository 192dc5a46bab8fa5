"""Reconstruction metrics, one number per image, and the Frechet distance of two sets.

Images are (B, 3, H, W) in [0, 1]. PSNR and SSIM by the formulas of the authors' published evaluator
(pesser/stable-diffusion, after SynSin); SSIM is equation 13 of Wang et al. 2004.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Metric:
    """How a per-image metric is called, printed and read."""

    label: str
    digits: int
    better: str | None  # "higher", "lower"; None: neither is better
    unit: str = ""


COLOURS = ("red", "green", "blue", "saturation")  # in the order of `colour_shift`
METRICS = {
    "psnr": Metric("PSNR", 2, "higher", "dB"),
    "ssim": Metric("SSIM", 3, "higher"),
    "psim": Metric("PSIM", 3, "lower"),
    "lpips": Metric("LPIPS", 4, "lower"),
    "st_lpips": Metric("ST-LPIPS (stand-in, not LPIPS)", 4, "lower"),
    "sharpness": Metric("sharpness", 0, None),
    **{f"{name}_shift": Metric(f"{name} shift", 2, None, "levels") for name in COLOURS},
}
SCORES = {"rfid": Metric("rFID", 2, "lower"), **METRICS}  # rFID is of all images together


def psnr(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, (B,): 10 log10(1 / mse); inf where equal."""
    mse = (images - reconstructions).square().mean(dim=(1, 2, 3))
    return -10.0 * torch.log10(mse)


def ssim(images: Tensor, reconstructions: Tensor, border: str = "zero") -> Tensor:
    """Structural similarity, (B,): 11 x 11 Gaussian window (sigma 1.5), C1 = 0.01^2, C2 = 0.03^2.

    Mean over channels and, with border "zero", over the whole map, zeros beyond the edge, as the
    authors did; with "valid", over the places where the window fits, as scikit-image does.
    """
    line = _gaussian_line(images)
    rows, columns = line.view(1, 1, 1, 11), line.view(1, 1, 11, 1)  # the window is separable
    reach = 5 if border == "zero" else 0

    def blur(x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)[:, None]  # (3 B, 1, H, W)
        blurred = F.conv2d(F.conv2d(flat, rows, padding=(0, reach)), columns, padding=(reach, 0))
        return blurred.view(*x.shape[:2], *blurred.shape[2:])

    mean_x, mean_y = blur(images), blur(reconstructions)  # (B, 3, H, W); smaller with "valid"
    # E[x^2] - E[x]^2 cancels in smooth parts, which is why callers give float64
    var_x = blur(images * images) - mean_x.square()
    var_y = blur(reconstructions * reconstructions) - mean_y.square()
    covariance = blur(images * reconstructions) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    numerator = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    denominator = (mean_x.square() + mean_y.square() + c1) * (var_x + var_y + c2)
    return (numerator / denominator).mean(dim=(1, 2, 3))  # mean of channels and map: (B,)


def sharpness(images: Tensor) -> Tensor:
    """Variance of the 4-neighbour Laplacian of the luma, in 8-bit levels squared, (B,)."""
    weights = images.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)  # ITU-R BT.601
    luma = 255.0 * (images * weights).sum(dim=1, keepdim=True)
    kernel = images.new_tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
    return F.conv2d(luma, kernel.view(1, 1, 3, 3)).flatten(1).var(dim=1, correction=0)


def colour_shift(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Mean of reconstruction - image in 8-bit levels, (B, 4): of each of COLOURS.

    Saturation is the largest channel minus the smallest.
    """
    channels = (reconstructions - images).mean(dim=(2, 3))  # (B, 3)
    spread = _saturation(reconstructions) - _saturation(images)
    return 255.0 * torch.cat([channels, spread[:, None]], dim=1)


def _saturation(images: Tensor) -> Tensor:
    return (images.amax(dim=1) - images.amin(dim=1)).mean(dim=(1, 2))


def _gaussian_line(like: Tensor) -> Tensor:
    """(11,), sums to 1; its outer product with itself is the window."""
    offsets = torch.arange(-5, 6, dtype=like.dtype, device=like.device)
    line = torch.exp(-offsets.square() / (2 * 1.5**2))
    return line / line.sum()


# --- Frechet distance -----------------------------------------------------------------------


@dataclass
class FeatureStatistics:
    """Sums over feature vectors, float64: enough for mean and covariance, whatever their number."""

    count: int
    total: Tensor  # (D,)
    products: Tensor  # (D, D), sum of x x^T

    @classmethod
    def empty(cls, width: int, device: str = "cpu") -> "FeatureStatistics":
        """Of no vectors yet."""
        zeros = torch.zeros(width, width, dtype=torch.float64, device=device)
        return cls(0, zeros[0].clone(), zeros)

    def add(self, features: Tensor) -> None:
        """Counts (B, D) features in."""
        exact = features.double()  # sums of squares over 50,000 images lose digits in float32
        self.count += len(exact)
        self.total += exact.sum(dim=0)
        self.products += exact.mT @ exact

    def mean(self) -> Tensor:
        """(D,)."""
        return self.total / self.count

    def covariance(self) -> Tensor:
        """(D, D), with n - 1 in the denominator; needs two vectors."""
        mean = self.mean()
        return (self.products - self.count * torch.outer(mean, mean)) / (self.count - 1)


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), A and B the covariances, float64.

    Heusel et al. 2017. tr (A B)^(1/2) is the sum of the singular values of A^(1/2) B^(1/2), which
    stays real where the covariances have no full rank.
    """
    cov_a, cov_b = a.covariance(), b.covariance()
    # With M = A^(1/2) B^(1/2), A B has the eigenvalues of M M^T, so their roots are M's singular
    # values. Roots of A B itself, which is not symmetric, may come out complex.
    cross = torch.linalg.svdvals(_matrix_root(cov_a) @ _matrix_root(cov_b)).sum()
    means = (a.mean() - b.mean()).square().sum()
    return float(means + cov_a.trace() + cov_b.trace() - 2.0 * cross)


def _matrix_root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)  # rounding makes zeros slightly negative
    return vectors * values.clamp(min=0.0).sqrt() @ vectors.mT
