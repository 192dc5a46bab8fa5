"""The two losses of the decoder and the one of the discriminator, and the networks behind them.

Source: CompVis/latent-diffusion, LPIPSWithDiscriminator, with taming's hinge loss.

x: images, y: reconstructions, both (B, 3, H, W) in [-1, 1]; p: perceptual distance (B, 1, 1, 1).

    rec = |x - y| + w p          (or (x - y)^2 + w p; p is broadcast, so it counts 3 H W times)
    nll = sum(rec / exp(logvar) + logvar) / B      (sum over pixels, mean over images)
    g   = -mean D(y)
    adaptive weight = ||d nll / d W|| / (||d g / d W|| + 1e-4), W the decoder's last layer
    decoder loss       = nll + adaptive weight * g
    discriminator loss = (mean relu(1 - D(x)) + mean relu(1 + D(y))) / 2

The discriminator sees fixed groups of consecutive images, 12 as each of the original's GPUs did, or
the largest divisor below. BatchNorm takes its statistics over a group, so that neither losses nor
statistics depend on the micro-batch of the machine.
"""

from collections.abc import Callable, Sequence
from functools import cached_property, partial, reduce
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam
from torch.utils.checkpoint import checkpoint

from kl_f8_train.core.batch import parts, phase
from kl_f8_train.core.discriminator import Discriminator
from kl_f8_train.core.machine import Compiled
from kl_f8_train.core.model import autocast
from kl_f8_train.core.updates import (
    Update,
    average_over_ranks,
    build_adam,
    finite_images,
    frozen,
    gradients_of,
    joined,
    mean_of_each,
    step_if_finite,
)
from kl_f8_train.settings import Config

GROUP = 12  # images; the original: 16 GPUs x 12
Distance = Callable[[Tensor, Tensor], Tensor]  # images, reconstructions -> (B, 1, 1, 1)
Judgement = tuple[Tensor, dict[str, Tensor], Tensor]  # loss, (); figures; finite images, (B,) bool


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
    """nll, (), summed over pixels and averaged over images, and its terms.

    Terms named `_loss` are means per pixel, those named `_nll` their shares of nll as used. Images
    are (B, 3, H, W) in [-1, 1], `perceptual` (B, 1, 1, 1), `logvar` (). The pixel term, of `pixel`
    "l1" or "mse", is l1_weight |x - y| + mse_weight (x - y)^2 where one of these two is given.
    """
    if pixel not in ("l1", "mse"):
        raise ValueError(f"pixel={pixel!r}: expected l1 or mse")
    error = images - reconstructions  # (B, 3, H, W)
    pixel_term = error.abs() if pixel == "l1" else error.square()
    if l1_weight is not None or mse_weight is not None:
        pixel_term = mixed(error, pixel, l1_weight, mse_weight)
    rec = pixel_term + perceptual_weight * perceptual.reshape(-1, 1, 1, 1)  # (B, 3, H, W)
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


def mixed(error: Tensor, pixel: str, l1_weight: float | None, mse_weight: float | None) -> Tensor:
    """l1_weight |error| + mse_weight error^2; a weight that is not given is 1 for `pixel`'s own."""
    l1 = float(pixel == "l1") if l1_weight is None else l1_weight
    mse = float(pixel == "mse") if mse_weight is None else mse_weight
    return l1 * error.abs() + mse * error.square()


def sobel(error: Tensor) -> Tensor:
    """(B, 3, H, W) -> |d / d row| + |d / d column| by Sobel's kernels / 8, 0 at the border."""
    smooth, slope = error.new_tensor([1.0, 2.0, 1.0]) / 4, error.new_tensor([-1.0, 0.0, 1.0]) / 2
    kernels = torch.stack([torch.outer(slope, smooth), torch.outer(smooth, slope)])  # (2, 3, 3)
    channels = error.flatten(0, 1)[:, None]  # (3 B, 1, H, W)
    edges = F.conv2d(channels, kernels[:, None]).abs().sum(1)
    return F.pad(edges, (1, 1, 1, 1)).view_as(error)


def generator_loss(logits_fake: Tensor) -> Tensor:
    """g, (): minus the mean of the discriminator's logits on reconstructions, (B, 1, h, w)."""
    return -logits_fake.mean()


def discriminator_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Hinge loss (Lim and Ye 2017), (): pushes real logits above 1, those of y below -1."""
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())


def adaptive_weight(grad_nll: Tensor, grad_g: Tensor, maximum: float = 1e4) -> Tensor:
    """Ratio of the last layer's two gradient norms, (), clamped to [0, maximum], detached.

    Gradients of nll and g there, both (3, ch, 3, 3). Equation 7 of Esser et al. 2021, with the
    original's 1e-4: the adversarial gradient becomes as large as that of the reconstruction.
    """
    # detached: it is a weight of this iteration, not a term to minimise
    return (grad_nll.norm() / (grad_g.norm() + 1e-4)).clamp(0.0, maximum).detach()


def weighed(
    at_last_layer: Tensor, gs: list[Tensor], factor: float, maximum: float, weight: float
) -> dict[str, Tensor]:
    """The adaptive weight's figures, all (), from both gradients, (2, 3, ch, 3, 3), and g's."""
    ratio = adaptive_weight(at_last_layer[0], at_last_layer[1], maximum)
    scaled, g = ratio * weight, torch.stack(gs).mean()
    return {
        "weight": scaled * factor,  # of g in the decoder's loss
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


# --- the perceptual distance -----------------------------------------------------------------


class PerceptualDistance(nn.Module):
    """Weighted distance of unit-length features; frozen, always in eval mode."""

    def __init__(
        self,
        name: str,
        scaling: nn.Module,
        trunk: nn.Module,
        heads: Sequence[Tensor],
        label: str = "",
        sha256: str | None = None,
        published: bool = True,
    ) -> None:
        super().__init__()
        self.name, self.label = name, label or name  # in the configuration, and for people
        self.sha256 = sha256  # of the trunk's tensors, whatever file they came in
        self.published = published  # whether these are the tensors that its authors published
        self.scaling = scaling
        self.trunk = trunk  # images -> sequence of feature maps
        self.heads = nn.ParameterList(head.detach().clone() for head in heads)  # (1, C, 1, 1)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "PerceptualDistance":
        """Stays in eval mode: dropout in the heads would change the loss."""
        return super().train(False)

    def forward(
        self, images: Tensor, reconstructions: Tensor, precision: str = "float32"
    ) -> Tensor:
        """Both (B, 3, H, W) in [-1, 1] -> (B, 1, 1, 1). Only the second may need a gradient."""
        with torch.no_grad():
            targets = self.layers(images, precision)
        layers = self.layers(reconstructions, precision)
        compare = squared_difference
        if torch.compiler.is_compiling():  # the backward pass computes again what it would keep
            compare = partial(checkpoint, compare, use_reentrant=False, preserve_rng_state=False)
        with autocast("float32", images.device):
            squared = [compare(a, b) for a, b in zip(targets, layers, strict=True)]
        return self.weighted(squared)

    def features(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) in [-1, 1] -> the layers' features, of unit length over channels."""
        with autocast("float32", images.device):
            return [unit_length(layer) for layer in self.layers(images)]

    def layers(self, images: Tensor, precision: str = "float32") -> list[Tensor]:
        """(B, 3, H, W) in [-1, 1] -> the trunk's layers, each (B, C, h, w).

        With "bfloat16" the convolutions run in it; lengths and distances never do.
        """
        exact = self.heads[0].dtype
        with autocast(precision, images.device):
            layers = self.trunk(self.scaling(images.to(exact)))
        return [layer.to(exact) for layer in layers]

    def weighted(self, squared: Sequence[Tensor]) -> Tensor:
        """Squared differences of features -> the distance, (B, 1, 1, 1)."""
        pairs = zip(squared, self.heads, strict=True)
        with autocast("float32", squared[0].device):
            layers = [weighted_sum(*pair).mean(dim=(2, 3), keepdim=True) for pair in pairs]
        return torch.stack(layers).sum(dim=0)


def weighted_sum(squared: Tensor, head: Tensor) -> Tensor:
    """(B, C, H, W) and weights (1, C, 1, 1) -> (B, 1, H, W).

    Compiled, a plain sum, which never writes the squares to memory.
    """
    if torch.compiler.is_compiling():
        return (squared * head).sum(dim=1, keepdim=True)
    return F.conv2d(squared, head)


def squared_difference(target: Tensor, layer: Tensor) -> Tensor:
    """Of a layer's two outputs, each pixel's of unit length over channels: (B, C, h, w)."""
    return (unit_length(target) - unit_length(layer)).square()


def squared_differences(targets: Sequence[Tensor], features: Sequence[Tensor]) -> list[Tensor]:
    """(target - feature)^2, a layer at a time."""
    return [(a - b).square() for a, b in zip(targets, features, strict=True)]


def unweighted(squared: Sequence[Tensor]) -> Tensor:
    """Half the distance without heads, (B,): the sum over layers of 1 - mean cosine similarity.

    PSIM, if the features are VGG16's.
    """
    # Of unit vectors |a - b|^2 = 2 - 2 a b, so half of it is 1 - cosine.
    return 0.5 * torch.stack([part.sum(dim=1).mean(dim=(1, 2)) for part in squared]).sum(dim=0)


def unit_length(features: Tensor) -> Tensor:
    """x / (|x| + 1e-10) over channels; zero with zero gradient where |x| = 0."""
    squares = features.square().sum(dim=1, keepdim=True)  # (B, 1, h, w)
    zero = squares == 0  # where the gradient of sqrt is infinite, and 0 x inf is NaN
    norm = squares.masked_fill(zero, 1.0).sqrt()
    return (features / (norm + 1e-10)).masked_fill(zero, 0.0)


# --- the adversary ---------------------------------------------------------------------------


class Look(NamedTuple):
    """Both losses' gradients on some images, at y and at the decoder's last layer."""

    y: Tensor  # (B, 3, H, W), without a graph
    grad_nll: Tensor  # (B, 3, H, W)
    grad_g: Tensor
    at_last_layer: Tensor  # (2, 3, ch, 3, 3)
    gs: list[Tensor]  # () for each group


class Adversary:
    """The discriminator with its settings and its optimizer: what it adds to an iteration."""

    def __init__(self, network: Discriminator, config: Config) -> None:
        assert config.adversarial is not None, "a discriminator without its settings"
        self.network, self.config = network, config.adversarial
        self.precision, self.optimizer = config.precision, config.optimizer
        self.fool: Callable[..., Tensor] = self._fool
        self.judge: Callable[..., Judgement] = self._judge
        self.weighed, self.blended = weighed, blended
        start = config.adversarial.start_iteration
        self.factor = partial(adversarial_factor, start_iteration=start)  # of an iteration

    def compile_functions(self, compiled: Compiled) -> None:
        """Compiles the network with its losses, for each of its two uses, and the weight."""
        self.fool, self.judge = compiled(self._fool), compiled(self._judge)
        self.weighed, self.blended = compiled(weighed), compiled(blended)

    @cached_property
    def adam(self) -> Adam:
        """Its optimizer; built late, as `to(device)` may replace parameters."""
        return build_adam(self.network.parameters(), self.optimizer)

    def runs(self, iteration: int) -> bool:
        """Whether it takes part in an iteration."""
        return self.config.run_before_start or self.factor(iteration) > 0

    def logits(self, *batches: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> (B, 1, h, w), each, in the images' precision."""
        with autocast(self.precision, batches[0].device):  # casts weights once for all
            logits = [self.network(images) for images in batches]
        return [one.to(images.dtype) for one, images in zip(logits, batches, strict=True)]

    def _fool(self, y: Tensor) -> Tensor:
        """g, ()."""
        return generator_loss(*self.logits(y))

    def _judge(self, x: Tensor, y: Tensor, factor: float) -> Judgement:
        """The network's loss on a group, and what is known of it."""
        real, fake = self.logits(x, y)
        loss = discriminator_loss(real, fake)
        figures = {"logits_real": real.detach().mean(), "logits_fake": fake.detach().mean()}
        return factor * loss, figures, finite_images(x + y, loss.detach())

    @phase("losses")
    def look(self, y: Tensor, at_y: Tensor, grad_nll: Tensor, layer: Tensor, pieces: int) -> Look:
        """The generator's loss on `at_y`, and both losses' gradients there and at the last layer.

        `y` has a graph that reaches `layer`; losses are of means over `pieces` calls like this one.
        """
        gs, gradients, groups = [], [], parts(len(at_y), GROUP)
        for group in groups:
            part = at_y[group].detach().requires_grad_()
            # The decoder's loss: no gradient of the discriminator's own parameters is computed.
            with frozen(self.network):
                g = self.fool(part)
            (gradient,) = torch.autograd.grad(g / (len(groups) * pieces), part)
            gs.append(g.detach())
            gradients.append(gradient + 0.0 * gs[-1])  # not finite if the loss is not
        grad_g = joined(gradients)
        at_last_layer = [
            torch.autograd.grad(y, layer, part.to(y.dtype), retain_graph=True)[0]
            for part in (grad_nll, grad_g)
        ]
        return Look(at_y, grad_nll, grad_g, torch.stack(at_last_layer), gs)

    def weigh(
        self, looks: list[Look], iteration: int
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """The weight of g in the decoder's loss, d nll / d y, d g / d y, and the figures behind it.

        The adaptive weight compares both losses' gradients at the last layer, of the iteration's
        images on all ranks; with `per_gpu_weight`, as in the original, of this rank's.
        """
        _, grad_nll, grad_g, at_last_layer, gs = zip(*looks, strict=True)
        both = reduce(torch.add, at_last_layer)  # (2, 3, ch, 3, 3)
        if not self.config.per_gpu_weight:
            average_over_ranks([both])
        numbers = self.factor(iteration), self.config.max_weight, self.config.weight
        figures = self.weighed(both, list(chain(*gs)), *numbers)
        return figures.pop("weight"), joined(grad_nll), joined(grad_g), figures

    def update(
        self, x: Tensor, y: Tensor, factor: float, bad: Tensor | None
    ) -> tuple[Update, dict[str, Tensor]]:
        """One step on x and on y, reconstructions without a graph, all (B, 3, H, W); its figures.

        It is left out if a gradient is not finite, or if the decoder's update was `bad`.
        """
        terms, finite, groups = [], [], parts(len(y), GROUP)
        with phase("discriminator"):
            for group in groups:
                loss, figures, of_group = self.judge(x[group], y[group], factor)
                (loss / len(groups)).backward()
                finite.append(of_group)
                terms.append({"discriminator_loss": loss.detach(), **figures})
        means, gradients = mean_of_each(terms), gradients_of(self.adam)
        losses, most = [means["discriminator_loss"]], self.optimizer.clip_norm
        # DDP does not know these parameters (step.py, `setup`): one message, the loss in it too.
        average_over_ranks([*gradients, *losses])
        with phase("optimizer"):
            update = step_if_finite(
                self.adam, gradients, joined(finite), most, losses=losses, unless=bad
            )
        return update, means | update.figures("discriminator")


class NoAdversary(Adversary):
    """The adversary of a recipe without an adversarial term: it never runs."""

    def __init__(self) -> None: ...

    def compile_functions(self, compiled: Compiled) -> None:
        """Nothing."""

    def runs(self, iteration: int) -> bool:
        """Never."""
        return False
