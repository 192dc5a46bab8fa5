"""One training iteration of the decoder, as a LightningModule.

Parts are passed in. The order of an iteration, for each micro-batch: encode (no graph) -> decode
-> the gradients of both losses at the reconstruction -> one backward pass through the decoder ->
the discriminator's loss on the detached reconstruction. Then both Adams step, then the EMA.

The gradients of nll and g are taken at the reconstruction y, not at the parameters, so that each
loss network runs backward once: d loss / d theta = (d nll / d y + w d g / d y) (d y / d theta),
and the adaptive weight w needs only the last layer's share of each. This is exact.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.optim import Adam

from kl_f8_train.config import Config
from kl_f8_train.core import machine
from kl_f8_train.core.batch import Batch
from kl_f8_train.core.discriminator import Discriminator
from kl_f8_train.core.ema import ema_decay, ema_update
from kl_f8_train.core.finite import Judgement, Remembered, Verdict, finite_images, step_unless
from kl_f8_train.core.hashes import tensors_sha256
from kl_f8_train.core.losses import (
    adaptive_weight,
    adversarial_factor,
    discriminator_loss,
    generator_loss,
    reconstruction_loss,
)
from kl_f8_train.core.model import TRAINED, AutoencoderKL
from kl_f8_train.core.perceptual import distance_in_parts
from kl_f8_train.errors import RunFailedError
from kl_f8_train.facts import Facts
from kl_f8_train.images import to_float
from kl_f8_train.output import say

Backward = Callable[[Tensor, Tensor | None], None]


def plain_backward(tensor: Tensor, gradient: Tensor | None) -> None:
    """Backward without a trainer."""
    tensor.backward(gradient)


def nothing(phase: str) -> None:
    """No clock."""


class Finetuner(LightningModule):
    """Holds the networks and runs one iteration; counts `iteration`, decoder updates, itself."""

    def __init__(
        self,
        config: Config,
        autoencoder: AutoencoderKL,
        discriminator: Discriminator | None,
        perceptual: nn.Module,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.config = config
        machine.apply(config.compute, autoencoder, discriminator, perceptual)
        self.autoencoder = autoencoder.freeze_encoder()
        self.ema = trained_copy(autoencoder)
        self.discriminator = discriminator
        self.logvar = nn.Parameter(torch.zeros(()), requires_grad=config.loss.learn_logvar)
        self._outside = [perceptual]  # a list keeps it out of the state dict and of DDP
        self.iteration = config.init.iteration or 0
        self.warmup_left = 0
        self.ema_updates = 0
        self.bad_updates = 0  # in a row
        self.bad_updates_in_all = 0  # since this process started
        self.unjudged: Judgement | None = None  # the last iteration's, on its way to the host
        self.micro_batch = config.compute.per_device_batch or config.global_batch
        self.metrics: dict[str, Tensor] = {}
        self.prepared_optimizers: list[Adam] = []
        self.identity: dict[str, str] = {}  # of data, perceptual network and versions
        self.base: dict[str, str] = {}  # name and SHA-256 of the imported file
        self.facts = Facts()  # that the imported file stated
        self.changes: list[str] = []  # of the recipe, on resuming
        self.phase_ended: Callable[[str], None] = nothing  # a benchmark's clock
        if machine.compiles(config.compute):
            machine.compile_networks(autoencoder, discriminator, perceptual)

    @property
    def perceptual(self) -> nn.Module:
        """The frozen perceptual network."""
        return self._outside[0]

    @property
    def warmup_done(self) -> int:
        """Warm-up iterations done, while some are left; 0 otherwise."""
        settings = self.config.adversarial
        return settings.warmup_iterations - self.warmup_left if settings and self.warmup_left else 0

    # --- Lightning's hooks ------------------------------------------------------------------

    def configure_optimizers(self) -> list[Adam]:
        """The optimizers that were built, and perhaps restored, before the trainer started."""
        return self.prepared_optimizers or build_optimizers(self)

    def on_fit_start(self) -> None:
        """Moves what Lightning leaves behind, and checks that all ranks start alike."""
        self.perceptual.to(self.device)
        for optimizer in self.prepared_optimizers:
            for parameter, state in optimizer.state.items():  # restored; the fused Adam reads it
                state["step"] = state["step"].to(parameter.device)
        self._compare_ranks()

    def _compare_ranks(self) -> None:
        """Raises RunFailedError if a rank resumed another state, or sees other data."""
        if not dist.is_initialized():
            return
        networks = {} if self.discriminator is None else self.discriminator.state_dict()
        mine = {
            "iteration": self.iteration,
            "warm-up left": self.warmup_left,
            "EMA updates": self.ema_updates,
            "optimizer states": [len(optimizer.state) for optimizer in self.prepared_optimizers],
            "discriminator": tensors_sha256(networks)[:12],
            **self.identity,
        }
        seen: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(seen, mine)
        if lines := disagreements(seen):
            raise RunFailedError(
                "the ranks start from different states:\n" + "\n".join(lines) + "\n"
                f"run_dir={self.config.run_dir}, data and weights must be the same files, and the "
                "programs the same versions, on every node"
            )

    def transfer_batch_to_device(
        self, batch: Batch, device: torch.device, dataloader_idx: int
    ) -> Batch:
        """Copies a batch to the device."""
        return batch.to(device)

    def training_step(self, batch: Batch, batch_index: int) -> None:
        """One iteration."""
        optimizers = self.trainer.optimizers  # Lightning's wrappers would count steps of their own
        decoder, discriminator = (*optimizers, None)[:2]
        assert isinstance(decoder, Adam)
        assert discriminator is None or isinstance(discriminator, Adam)
        self.run_iteration(batch, decoder, discriminator, self._manual_backward, self._no_sync)

    def _manual_backward(self, tensor: Tensor, gradient: Tensor | None) -> None:
        self.manual_backward(tensor, gradient=gradient)

    def _no_sync(self) -> AbstractContextManager[Any]:
        block = getattr(self.trainer.strategy, "block_backward_sync", nullcontext)
        context: AbstractContextManager[Any] = block()
        return context

    # --- one iteration ----------------------------------------------------------------------

    def run_iteration(
        self,
        batch: Batch,
        decoder: Adam,
        critic: Adam | None = None,
        backward: Backward = plain_backward,
        no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Updates decoder, EMA and discriminator once; in warm-up the discriminator alone.

        A loss or gradient that is not finite, on any rank, leaves that update out on all ranks:
        weights, Adam's state and BatchNorm's buffers stay. That is decided on the device; `judge`
        tells the host, an iteration later, so that it need not wait for the device here.
        """
        self.train()
        zero_grad(decoder, critic)
        number, warming_up, adversarial = (
            self.iteration,
            self.warmup_left > 0,
            self._adversarial_runs(),
        )
        batch_norm = Remembered(self.discriminator)
        parts = range(0, len(batch.images), self.micro_batch)
        terms, fakes, finite = [], [], []
        for start in parts:
            x, noise = self._micro(batch, start)  # (B, 3, H, W) in [-1, 1]
            z, kl = self._encode(x, noise[0])  # (B, 4, h, w), no graph
            self.phase_ended("encode")
            if warming_up:
                fakes.append(self._decode(z))  # no graph either
                continue
            with nullcontext() if start == parts[-1] else no_sync():
                y, of_part, good = self._decoder_backward(x, z, len(parts), backward, adversarial)
            terms.append({**of_part, "kl_loss": kl})
            fakes.append(y)
            finite.append(good)
        self.judge()  # the iteration before
        self.metrics = mean_of_each(terms)
        verdicts: dict[str, Verdict] = {}
        if not warming_up:
            verdicts["decoder"] = self._update_decoder(decoder, torch.cat(finite))
        if critic is not None and (adversarial or warming_up):
            before = [verdict.bad for verdict in verdicts.values()]
            verdicts["discriminator"] = self._update_discriminator(batch, fakes, critic, *before)
        self.iteration += not warming_up  # also after an update that was left out: the data goes on
        self.warmup_left -= warming_up
        batch_norm.restore(torch.stack([verdict.bad for verdict in verdicts.values()]).any())
        self.unjudged = Judgement(number, batch.keys, verdicts)

    def _micro(self, batch: Batch, start: int) -> tuple[Tensor, Tensor]:
        """Images in [-1, 1] and noise of one micro-batch, in the weights' precision."""
        part = slice(start, start + self.micro_batch)
        images = batch.images[part]
        if images.dtype == torch.uint8:
            images = to_float(images)
        dtype = self.autoencoder.last_layer.dtype
        nhwc = machine.channels_last(self.config.compute)
        layout = torch.channels_last if nhwc else torch.preserve_format
        return images.to(dtype, memory_format=layout), batch.noise[:, part].to(dtype)

    def _autocast(self) -> AbstractContextManager[Any]:
        enabled = self.config.precision == "bfloat16"
        return torch.autocast(self.autoencoder.last_layer.device.type, torch.bfloat16, enabled)

    @torch.no_grad()
    def _encode(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Sampled latents, without a graph, and the mean KL divergence."""
        with self._autocast():
            posterior = self.autoencoder.encode(images)
        return posterior.sample(noise), posterior.kl().mean()

    def _decoder_backward(
        self, images: Tensor, latents: Tensor, parts: int, backward: Backward, adversarial: bool
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Adds this micro-batch's gradients to the decoder.

        Returns y, detached, the loss's terms, and which images are finite, (B,) bool.
        """
        with self._autocast():
            reconstruction = self.autoencoder.decode(latents)
        self.phase_ended("decode")
        y = reconstruction.detach().to(images.dtype).requires_grad_()
        parts_of_it = self.config.compute.perceptual_parts
        distance = distance_in_parts(self.perceptual, images, y, parts_of_it)  # (B, 1, 1, 1)
        nll, terms = reconstruction_loss(
            images,
            y,
            distance.to(images.dtype),
            pixel=self.config.loss.pixel,
            perceptual_weight=self.config.loss.perceptual_weight,
            logvar=self.logvar,
        )
        if self.logvar.requires_grad:
            grad_y, grad_logvar = torch.autograd.grad(nll / parts, (y, self.logvar))
            accumulated = 0.0 if self.logvar.grad is None else self.logvar.grad
            self.logvar.grad = accumulated + grad_logvar
        else:
            (grad_y,) = torch.autograd.grad(nll / parts, y)
        loss = nll.detach()
        finite = finite_images(grad_y, loss)
        if adversarial:
            grad_g, more = self._adversarial_gradient(reconstruction, y, grad_y * parts)
            grad_y = grad_y + grad_g / parts
            loss = loss + more["generator_loss"]
            terms |= more
        grad_y = grad_y + 0.0 * loss  # a loss that is not finite makes all ranks' gradients so
        self.phase_ended("losses")
        backward(reconstruction, grad_y.to(reconstruction.dtype))
        self.phase_ended("backward")
        return y.detach(), terms, finite

    def _adversarial_gradient(
        self, reconstruction: Tensor, y: Tensor, grad_nll: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """d (adaptive weight * g) / d y, and the figures behind it."""
        settings = self.config.adversarial
        assert settings is not None
        assert self.discriminator is not None
        with frozen(self.discriminator), self._autocast():
            logits = self.discriminator(y)
        g = generator_loss(logits.to(y.dtype))
        (grad_g,) = torch.autograd.grad(g, y)
        last_layer = self.autoencoder.last_layer
        at_last_layer = [
            torch.autograd.grad(
                reconstruction, last_layer, part.to(reconstruction.dtype), retain_graph=True
            )[0]
            for part in (grad_nll, grad_g)
        ]
        if not settings.per_gpu_weight:
            average_over_ranks(at_last_layer)
        weight = adaptive_weight(at_last_layer[0], at_last_layer[1], settings.max_weight)
        factor = adversarial_factor(self.iteration, settings.start_iteration)
        scaled = weight * settings.weight
        terms = {
            "generator_loss": g.detach(),
            "adversarial_loss": scaled * factor * g.detach(),  # as used, beside nll_loss
            "adaptive_weight": scaled,
            "adaptive_weight_clamped": (weight >= settings.max_weight).to(y.dtype),
            "adversarial_factor": torch.full_like(weight, factor),
        }
        return scaled * factor * grad_g, terms

    def _adversarial_runs(self) -> bool:
        settings = self.config.adversarial
        if settings is None:
            return False
        return settings.run_before_start or self.iteration >= settings.start_iteration

    def _update_decoder(self, optimizer: Adam, finite: Tensor) -> Verdict:
        """Steps decoder and EMA; only the EMA, if a gradient is not finite."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if self.logvar.grad is not None:
            average_over_ranks([self.logvar.grad])
        norm = norm_of([p.grad for p in parameters if p.grad is not None])
        self.metrics["decoder_gradient_norm"] = norm
        verdict = Verdict(~norm.isfinite(), finite)
        step_unless(verdict.bad, optimizer)
        self.phase_ended("optimizer")
        self.ema_updates += 1
        decay = ema_decay(self.ema_updates, self.config.ema.decay, self.config.ema.warmup)
        ema_update(self.ema, trained_part(self.autoencoder), decay)
        self.phase_ended("ema")
        return verdict

    def _update_discriminator(
        self, batch: Batch, fakes: list[Tensor], optimizer: Adam, bad: Tensor | None = None
    ) -> Verdict:
        """One step of the discriminator on images and detached reconstructions.

        It is left out if a gradient is not finite, or if the decoder's update was `bad`.
        """
        assert self.discriminator is not None
        assert self.config.adversarial is not None
        factor = adversarial_factor(self.iteration, self.config.adversarial.start_iteration)
        if self.warmup_left:
            factor = 1.0
        terms, finite = [], []
        for index, fake in enumerate(fakes):
            images, noise = self._micro(batch, index * self.micro_batch)
            if self.config.second_forward:  # the original: new noise, updated decoder
                fake = self._reconstruct(images, noise[1])
            with self._autocast():
                real_logits = self.discriminator(images)
                fake_logits = self.discriminator(fake)
            loss = discriminator_loss(real_logits.to(images.dtype), fake_logits.to(images.dtype))
            (factor * loss / len(fakes)).backward()
            finite.append(finite_images(images + fake, loss.detach()))
            terms.append(
                {
                    "discriminator_loss": factor * loss.detach(),
                    "logits_real": real_logits.detach().to(images.dtype).mean(),
                    "logits_fake": fake_logits.detach().to(images.dtype).mean(),
                }
            )
        self.phase_ended("discriminator")
        gradients = [p.grad for p in self.discriminator.parameters() if p.grad is not None]
        metrics = mean_of_each(terms)
        average_over_ranks([*gradients, metrics["discriminator_loss"]])
        norm = norm_of([*gradients, 0.0 * metrics["discriminator_loss"]])  # its loss counts, too
        self.metrics |= metrics | {"discriminator_gradient_norm": norm}
        verdict = Verdict(~norm.isfinite(), torch.cat(finite))
        left_out = verdict.bad if bad is None else verdict.bad | bad
        step_unless(left_out, optimizer)
        self.phase_ended("optimizer")
        return verdict

    @torch.no_grad()
    def _decode(self, latents: Tensor) -> Tensor:
        with self._autocast():
            return self.autoencoder.decode(latents).to(latents.dtype)

    def _reconstruct(self, images: Tensor, noise: Tensor) -> Tensor:
        return self._decode(self._encode(images, noise)[0])

    def judge(self) -> None:
        """Counts and tells whether the last iteration's update was left out, once; on all ranks.

        Raises RunFailedError after `max_bad_updates` of them in a row.
        """
        judged, self.unjudged = self.unjudged, None
        if judged is None:
            return
        blame = judged.blame()
        if blame is None:
            self.bad_updates = 0
            return
        self.bad_updates += 1
        self.bad_updates_in_all += 1
        message = (
            f"iteration {judged.iteration}: update left out on all ranks ({self.bad_updates} in a "
            f"row, {self.bad_updates_in_all} in all): {blame}"
        )
        if self.bad_updates >= self.config.max_bad_updates:
            raise RunFailedError(
                f"{message}\n{self.bad_updates} updates in a row were not finite; the last "
                "checkpoint is untouched. Lower optimizer.learning_rate, or try precision=float32"
            )
        self.print_once(message)

    def print_once(self, message: str) -> None:
        """Prints on the first rank."""
        if not dist.is_initialized() or dist.get_rank() == 0:
            say(message)


def disagreements(seen: list[dict[str, Any]]) -> list[str]:
    """A line for each rank with what is not the same on all of them; none if all agree."""
    names = dict.fromkeys(name for state in seen for name in state)
    differ = [name for name in names if any(s.get(name) != seen[0].get(name) for s in seen)]
    if not differ:
        return []
    return [
        f"  rank {rank}: " + ", ".join(f"{name} {state.get(name)}" for name in differ)
        for rank, state in enumerate(seen)
    ]


def trained_part(autoencoder: AutoencoderKL) -> nn.ModuleDict:
    """Decoder and post_quant_conv themselves."""
    return nn.ModuleDict({name: getattr(autoencoder, name) for name in TRAINED})


def trained_copy(autoencoder: AutoencoderKL) -> nn.ModuleDict:
    """A frozen copy of the trained part."""
    return copy.deepcopy(trained_part(autoencoder)).requires_grad_(False).eval()


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Without gradients of the parameters; a compiled module would compute them all."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)


def build_optimizers(finetuner: Finetuner) -> list[Adam]:
    """Adam over decoder and post_quant_conv (and logvar, if learned); one for the discriminator."""
    settings = finetuner.config.optimizer
    options: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": (settings.betas[0], settings.betas[1]),
        "eps": settings.eps,
        "fused": True,
    }
    trained = [p for p in finetuner.autoencoder.parameters() if p.requires_grad]
    trained += [finetuner.logvar] if finetuner.logvar.requires_grad else []
    optimizers = [Adam(trained, **options)]
    if finetuner.discriminator is not None:
        optimizers.append(Adam(finetuner.discriminator.parameters(), **options))
    return optimizers


def zero_grad(*optimizers: Adam | None) -> None:
    """Forgets the gradients."""
    for optimizer in filter(None, optimizers):
        optimizer.zero_grad(set_to_none=True)


def mean_of_each(terms: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Means over the micro-batches."""
    return {key: torch.stack([t[key] for t in terms]).mean() for key in (terms or [{}])[0]}


def norm_of(tensors: list[Tensor]) -> Tensor:
    """The norm of all tensors together."""
    return torch.stack(torch._foreach_norm(tensors)).norm()


def average_over_ranks(tensors: list[Tensor]) -> None:
    """Replaces tensors by their mean over all ranks, in one call; nothing on one process."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
