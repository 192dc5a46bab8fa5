"""The discriminator with its settings and its optimizer: what it adds to an iteration.

x: images, y: reconstructions, both (B, 3, H, W) in [-1, 1]; g: the generator's loss.

The discriminator sees fixed groups of consecutive images, 12 as each of the original's GPUs did, or
the largest divisor below. BatchNorm takes its statistics over a group, so that neither losses nor
statistics depend on the micro-batch of the machine.
"""

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Adam

from kl_f8_train.config import Config
from kl_f8_train.core import machine
from kl_f8_train.core.batch import parts
from kl_f8_train.core.discriminator import Discriminator
from kl_f8_train.core.losses import (
    adversarial_factor,
    blended,
    generator_loss,
    judged,
    weighed,
)
from kl_f8_train.core.machine import Compiled, phase
from kl_f8_train.core.updates import (
    Update,
    average_over_ranks,
    build_adam,
    finite_images,
    frozen,
    joined,
    mean,
    mean_of_each,
    step_if_finite,
    total,
)

GROUP = 12  # images; the original: 16 GPUs x 12
Judgement = tuple[Tensor, dict[str, Tensor], Tensor]  # loss, (); figures; finite images, (B,) bool


class Look(NamedTuple):
    """Both losses' gradients on some images, at y and at the decoder's last layer."""

    y: Tensor  # (B, 3, H, W), without a graph
    g: Tensor  # ()
    grad_nll: Tensor  # (B, 3, H, W)
    grad_g: Tensor
    nll_at_last_layer: Tensor  # (3, ch, 3, 3)
    g_at_last_layer: Tensor


class Adversary:
    """A discriminator in training."""

    def __init__(self, network: Discriminator, config: Config) -> None:
        assert config.adversarial is not None, "a discriminator without its settings"
        self.network, self.config = network, config.adversarial
        self.precision, self.optimizer = config.precision, config.optimizer
        self.fool: Callable[..., Tensor] = self._fool
        self.judge: Callable[..., Judgement] = self._judge
        self.weighed, self.blended = weighed, blended

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

    def factor(self, iteration: int) -> float:
        """0 before its start, 1 from there on."""
        return adversarial_factor(iteration, self.config.start_iteration)

    def logits(self, *batches: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> (B, 1, h, w), each, in the images' precision."""
        with machine.autocast(self.precision, batches[0].device):  # casts weights once for all
            logits = [self.network(images) for images in batches]
        return [one.to(images.dtype) for one, images in zip(logits, batches, strict=True)]

    def _fool(self, y: Tensor) -> Tensor:
        """g, ()."""
        return generator_loss(*self.logits(y))

    def _judge(self, x: Tensor, y: Tensor, factor: float) -> "Judgement":
        """The network's loss on a group, and what is known of it."""
        loss, figures = judged(*self.logits(x, y))
        return factor * loss, figures, finite_images(x + y, loss.detach())

    @phase("losses")
    def look(self, y: Tensor, at_y: Tensor, grad_nll: Tensor, layer: Tensor, pieces: int) -> "Look":
        """The generator's loss on `at_y`, and both losses' gradients there and at the last layer.

        `y` has a graph that reaches `layer`; losses are of means over `pieces` calls like this one.
        """
        g, grad_g = self._generator(at_y, pieces)
        of_nll, of_g = (
            torch.autograd.grad(y, layer, part.to(y.dtype), retain_graph=True)[0]
            for part in (grad_nll, grad_g)
        )
        return Look(at_y, g, grad_nll, grad_g, of_nll, of_g)

    def _generator(self, y: Tensor, pieces: int) -> tuple[Tensor, Tensor]:
        """g and d (g / pieces) / d y, group by group."""
        groups = parts(len(y), GROUP)
        losses: list[Tensor] = []
        gradients: list[Tensor] = []
        for group in groups:
            part = y[group].detach().requires_grad_()
            with frozen(self.network):
                g = self.fool(part)
            gradients += torch.autograd.grad(g, part)
            losses.append(g.detach())
        g, share = mean(losses), pieces * len(groups)
        gradient = joined(gradients) if share == 1 else joined(gradients) / share
        return g, gradient + 0.0 * g  # a loss that is not finite makes its gradient so

    def weigh(
        self, looks: list["Look"], iteration: int
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """The weight of g in the decoder's loss, d nll / d y, d g / d y, and the figures behind it.

        The adaptive weight compares both losses' gradients at the last layer, of the iteration's
        images on all ranks; with `per_gpu_weight`, as in the original, of this rank's.
        """
        _, g, grad_nll, grad_g, nll_at_last_layer, g_at_last_layer = zip(*looks, strict=True)
        at_last_layer = [total(nll_at_last_layer), total(g_at_last_layer)]
        if not self.config.per_gpu_weight:
            average_over_ranks(at_last_layer)
        numbers = self.factor(iteration), self.config.max_weight, self.config.weight
        figures = self.weighed(at_last_layer[0], at_last_layer[1], mean(g), *numbers)
        weight = figures.pop("weight")
        return weight, joined(grad_nll), joined(grad_g), figures

    def update(
        self,
        pairs: Iterable[tuple[Tensor, Tensor]],
        groups: int,
        factor: float,
        bad: Tensor | None = None,
    ) -> tuple[Update, dict[str, Tensor]]:
        """One step on (x, y without a graph) of each group; returns it and its figures.

        It is left out if a gradient is not finite, or if the decoder's update was `bad`.
        """
        finite, terms = self._backward(pairs, groups, factor)
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        loss, most = terms["discriminator_loss"], self.optimizer.clip_norm
        average_over_ranks([*gradients, loss])
        with phase("optimizer"):
            update = step_if_finite(self.adam, gradients, finite, most, losses=[loss], unless=bad)
        return update, terms | update.figures("discriminator")

    @phase("discriminator")
    def _backward(
        self, pairs: Iterable[tuple[Tensor, Tensor]], groups: int, factor: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Adds all groups' gradients; returns which images are finite, (B,), and mean figures."""
        terms, finite = [], []
        for x, y in pairs:
            loss, figures, of_group = self.judge(x, y, factor)
            (loss / groups if groups > 1 else loss).backward()
            finite.append(of_group)
            terms.append({"discriminator_loss": loss.detach(), **figures})
        return joined(finite), mean_of_each(terms)


class NoAdversary(Adversary):
    """What stands in an adversary's place where the recipe has none."""

    def __init__(self) -> None: ...

    def compile_functions(self, compiled: Compiled) -> None:
        """Nothing."""

    def runs(self, iteration: int) -> bool:
        """Never."""
        return False
