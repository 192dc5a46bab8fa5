"""The two losses of the decoder and the one of the discriminator.

Source: CompVis/latent-diffusion, LPIPSWithDiscriminator, with taming's hinge loss.

x: images, y: reconstructions, both (B, 3, H, W) in [-1, 1]; p: perceptual distance (B, 1, 1, 1).

    rec = |x - y| + w p          (or (x - y)^2 + w p; p is broadcast, so it counts 3 H W times)
    nll = sum(rec / exp(logvar) + logvar) / B      (sum over pixels, mean over images)
    g   = -mean D(y)
    adaptive weight = ||d nll / d W|| / (||d g / d W|| + 1e-4), W the decoder's last layer
    decoder loss       = nll + adaptive weight * g
    discriminator loss = (mean relu(1 - D(x)) + mean relu(1 + D(y))) / 2
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def reconstruction_loss(
    images: Tensor,
    reconstructions: Tensor,
    perceptual: Tensor,
    *,
    pixel: str,
    perceptual_weight: float,
    logvar: Tensor,
    l1_weight: float | None = None,
    mse_weight: float | None = None,
    gradient_weight: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """nll, summed over pixels and averaged over images, and its terms.

    Terms named `_loss` are means per pixel, those named `_nll` their shares of nll as used.

    `pixel` is "l1" or "mse"; `perceptual` is (B, 1, 1, 1); `logvar` is a scalar. The pixel term is
    l1_weight |x - y| + mse_weight (x - y)^2 where one of these two weights is given.
    """
    error = images - reconstructions  # (B, 3, H, W)
    pixel_term = error.abs() if pixel == "l1" else error.square()
    if l1_weight is not None or mse_weight is not None:
        l1 = float(pixel == "l1") if l1_weight is None else l1_weight
        mse = float(pixel == "mse") if mse_weight is None else mse_weight
        pixel_term = l1 * error.abs() + mse * error.square()
    rec = pixel_term + perceptual_weight * perceptual  # (B, 3, H, W)
    gradient = sobel(error) if gradient_weight else None
    if gradient is not None:
        rec = rec + gradient_weight * gradient
    variance = logvar.exp()
    nll = torch.sum(rec / variance + logvar) / images.shape[0]
    scale = images[0].numel() / variance  # from a mean per pixel to the share of nll
    pixel_mean, perceptual_mean = pixel_term.mean(), perceptual.mean()
    terms = {
        "pixel_loss": pixel_mean,
        "perceptual_loss": perceptual_mean,
        "reconstruction_loss": rec.mean(),
        "pixel_nll": scale * pixel_mean,
        "perceptual_nll": scale * perceptual_weight * perceptual_mean,
        "nll_loss": nll,
    }
    if l1_weight and mse_weight:
        terms |= {"l1_loss": error.abs().mean(), "mse_loss": error.square().mean()}
    if gradient is not None:
        terms["gradient_loss"] = gradient.mean()
        terms["gradient_nll"] = scale * gradient_weight * gradient.mean()
    return nll, {name: value.detach() for name, value in terms.items()}


def sobel(error: Tensor) -> Tensor:
    """(B, 3, H, W) -> |d / d row| + |d / d column| by Sobel's kernels / 8, 0 at the border."""
    smooth, slope = error.new_tensor([1.0, 2.0, 1.0]) / 4, error.new_tensor([-1.0, 0.0, 1.0]) / 2
    kernels = torch.stack([torch.outer(slope, smooth), torch.outer(smooth, slope)])  # (2, 3, 3)
    channels = error.flatten(0, 1)[:, None]  # (3 B, 1, H, W)
    edges = F.conv2d(channels, kernels[:, None]).abs().sum(1)
    return F.pad(edges, (1, 1, 1, 1)).view_as(error)


def generator_loss(logits_fake: Tensor) -> Tensor:
    """g: minus the mean logit of the reconstructions."""
    return -logits_fake.mean()


def judged(logits_real: Tensor, logits_fake: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The discriminator's loss, and the mean logits."""
    figures = {"logits_real": logits_real.mean(), "logits_fake": logits_fake.mean()}
    return discriminator_loss(logits_real, logits_fake), {k: v.detach() for k, v in figures.items()}


def discriminator_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Hinge loss."""
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())


def adaptive_weight(grad_nll: Tensor, grad_g: Tensor, maximum: float = 1e4) -> Tensor:
    """Ratio of the last layer's two gradient norms, clamped to [0, maximum], detached."""
    # detached: it is a weight of this iteration, not a term to minimise
    return (grad_nll.norm() / (grad_g.norm() + 1e-4)).clamp(0.0, maximum).detach()


def weighed(
    grad_nll: Tensor, grad_g: Tensor, g: Tensor, factor: float, maximum: float, weight: float
) -> dict[str, Tensor]:
    """The figures of the adaptive weight from the last layer's two gradients and g, (); all ().

    "weight" is what g has in the decoder's loss.
    """
    ratio = adaptive_weight(grad_nll, grad_g, maximum)
    scaled = ratio * weight
    return {
        "weight": scaled * factor,
        "generator_loss": g,
        "adversarial_loss": scaled * factor * g,  # as used, beside nll_loss
        "adaptive_weight": scaled,
        "adaptive_weight_clamped": (ratio >= maximum).to(ratio.dtype),
        "adversarial_factor": torch.full_like(ratio, factor),
    }


def blended(grad_nll: Tensor, grad_g: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """grad_nll + weight * grad_g, in the type of what it is the gradient of."""
    return (grad_nll + weight * grad_g).to(dtype)


def adversarial_factor(iteration: int, start_iteration: int) -> float:
    """0 before `start_iteration`, 1 from there on."""
    return float(iteration >= start_iteration)
