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
) -> tuple[Tensor, dict[str, Tensor]]:
    """nll, summed over pixels and averaged over images, and its terms.

    Terms named `_loss` are means per pixel, those named `_nll` their shares of nll as used.

    `pixel` is "l1" or "mse"; `perceptual` is (B, 1, 1, 1); `logvar` is a scalar.
    """
    error = images - reconstructions
    pixel_term = error.abs() if pixel == "l1" else error.square()
    rec = pixel_term + perceptual_weight * perceptual  # (B, 3, H, W)
    nll = torch.sum(rec / logvar.exp() + logvar) / images.shape[0]
    scale = images[0].numel() / logvar.exp()  # from a mean per pixel to the share of nll
    terms = {
        "pixel_loss": pixel_term.mean(),
        "perceptual_loss": perceptual.mean(),
        "reconstruction_loss": rec.mean(),
        "pixel_nll": scale * pixel_term.mean(),
        "perceptual_nll": scale * perceptual_weight * perceptual.mean(),
        "nll_loss": nll,
    }
    return nll, {name: value.detach() for name, value in terms.items()}


def generator_loss(logits_fake: Tensor) -> Tensor:
    """g: minus the mean logit of the reconstructions."""
    return -logits_fake.mean()


def discriminator_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Hinge loss."""
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())


def adaptive_weight(grad_nll: Tensor, grad_g: Tensor, maximum: float = 1e4) -> Tensor:
    """Ratio of the last layer's two gradient norms, clamped to [0, maximum], detached."""
    return (grad_nll.norm() / (grad_g.norm() + 1e-4)).clamp(0.0, maximum).detach()


def adversarial_factor(iteration: int, start_iteration: int) -> float:
    """0 before `start_iteration`, 1 from there on."""
    return float(iteration >= start_iteration)
