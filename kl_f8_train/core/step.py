"""One training iteration of the decoder, as a LightningModule. Parts are passed in.

The gradients of nll and g are taken at the reconstruction y, not at the parameters, so that each
loss network runs backward once: d loss / d theta = (d nll / d y + w d g / d y) (d y / d theta),
and the adaptive weight w needs only the last layer's share of each. This is exact.
"""

import copy
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adam

from kl_f8_train.averages import module_names
from kl_f8_train.core import machine
from kl_f8_train.core.batch import Batch, parts, phase, plain_batch
from kl_f8_train.core.discriminator import Discriminator
from kl_f8_train.core.hashes import tensors_sha256
from kl_f8_train.core.losses import (
    GROUP,
    Adversary,
    Distance,
    NoAdversary,
    reconstruction_loss,
)
from kl_f8_train.core.model import TRAINED, AutoencoderKL, Kernels, Posterior, autocast
from kl_f8_train.core.run_state import RunState
from kl_f8_train.core.updates import (
    PLAINLY,
    Guard,
    Remembered,
    Step,
    Update,
    average_over_ranks,
    build_adam,
    checked,
    ema_decay,
    gradients_of,
    joined,
    learning_rate,
    mean_of_each,
    move,
    paired,
    step_if_finite,
)
from kl_f8_train.errors import MissingInputError, RunFailedError
from kl_f8_train.facts import ENTRY
from kl_f8_train.images import to_float
from kl_f8_train.settings import Config


@dataclass(frozen=True)
class Loop:
    """How gradients are made and reduced and the decoder is stepped; here, by this process alone.

    `no_sync` is the context in which gradients of the decoder are not reduced over ranks.
    """

    backward: Callable[..., None] = Tensor.backward  # (tensor, gradient=...)
    no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext
    step: Step = PLAINLY


ALONE = Loop()
TERMS = ("pixel", "perceptual_weight", "l1_weight", "mse_weight", "gradient_weight")  # of nll
if TYPE_CHECKING:
    _Base = LightningModule
else:
    _Base = object  # pytorch_lightning's and lightning's Trainer take their own modules only
RUN_STATE = "kl_f8_train.run_state"  # in a checkpoint of Lightning's own


class Finetuner(_Base):
    """Holds the networks and runs iterations; counts decoder updates itself, in `run_state`.

    Finetuner(config, autoencoder, discriminator, perceptual, run_state=None, log_metrics=True)

    `config` is of `recipe`. The autoencoder is trained in place, in float32; the discriminator is
    None for a recipe without an adversarial term. `perceptual` is a module that takes images and
    reconstructions, (B, 3, H, W) in [-1, 1], to distances, (B, 1, 1, 1).

    A loader gives a Batch, or images alone: a tensor, or a tuple or list that begins with one,
    (B, 3, H, W), uint8 or floating point in [-1, 1]. Their noise then follows from the seed, the
    iteration and the rank. Raises ValueError for anything else, for networks that do not fit the
    recipe, and for a Trainer whose precision is not "32-true": `precision` in the configuration
    decides.

    With `log_metrics` the figures of each iteration go to the Trainer's loggers.
    """

    perceptual: nn.Module  # frozen

    def __new__(cls, *args: Any, **kwargs: Any) -> "Finetuner":
        """A LightningModule of `lightning.pytorch` where that is imported, else of ours."""
        return super().__new__(bound(cls))

    def __init__(
        self,
        config: Config,
        autoencoder: AutoencoderKL,
        discriminator: Discriminator | None,
        perceptual: nn.Module,
        run_state: RunState | None = None,
        log_metrics: bool = True,
    ) -> None:
        super().__init__()
        check_parts(config, autoencoder, discriminator, perceptual)
        self.log_metrics = log_metrics
        self.automatic_optimization = False
        self.config = config
        self.nhwc = machine.channels_last(config.compute)  # layout of networks and images
        machine.apply(config.compute, autoencoder, discriminator, perceptual)
        self.autoencoder = autoencoder.freeze_encoder()
        for name in TRAINED:  # a loaded autoencoder is frozen as a whole
            getattr(autoencoder, name).requires_grad_(True)
        self.ema = trained_copy(autoencoder)
        for name in list(module_names(config.ema.decays).values())[1:]:  # further averages
            self.add_module(name, trained_copy(autoencoder))
        self.discriminator = discriminator
        self.adversary = Adversary(discriminator, config) if discriminator else NoAdversary()
        self.terms: dict[str, Any] = {name: getattr(config.loss, name) for name in TERMS}
        self.logvar = nn.Parameter(torch.zeros(()), requires_grad=config.loss.learn_logvar)
        self.__dict__["perceptual"] = perceptual  # not a submodule: not in the state dict, nor DDP
        precision = config.loss.perceptual_precision
        own = {} if precision == "float32" else {"precision": precision}
        self.distance: Distance = partial(perceptual, **own)  # no submodule, either
        start = RunState(iteration=config.init.iteration or 0, facts=autoencoder.facts)
        self.run_state = run_state or start
        self.guard = Guard(config.max_bad_updates)
        self.kernels = Kernels(config.precision, config.compute.deterministic)
        self.metrics: dict[str, Tensor] = {}  # of the last iteration
        self.reconstruction_loss, self.checked = reconstruction_loss, checked
        self.sampled = sampled
        if machine.compiles(config.compute):
            compiled = machine.compile_networks(autoencoder, perceptual)
            self.reconstruction_loss = compiled(reconstruction_loss)
            self.checked, self.sampled = compiled(checked), compiled(sampled)
            self.adversary.compile_functions(compiled)
        self.train()  # the discriminator's BatchNorm, above all; what is frozen stays in eval mode

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickled by the class that stands in a module, as `bound_to` makes an instance's own."""
        kind, module = type(self).__bases__
        state = super().__reduce_ex__(protocol)[2:]
        return (unpickled, (module, kind), *state)

    @property
    def iteration(self) -> int:
        """Decoder updates so far, those of the imported weights included."""
        return self.run_state.iteration

    @property
    def ema_updates(self) -> int:
        """Updates of the moving average so far."""
        return self.run_state.ema_updates

    @property
    def warmup_left(self) -> int:
        """Iterations of the discriminator alone that are still to come."""
        return self.run_state.warmup_left

    @property
    def warmup_done(self) -> int:
        """Warm-up iterations done, while some are left; 0 otherwise."""
        config = self.config.adversarial
        return config.warmup_iterations - self.warmup_left if config and self.warmup_left else 0

    @cached_property
    def decoder_adam(self) -> Adam:
        """Adam over decoder and post_quant_conv, and logvar, if learned."""
        trained = [p for p in self.autoencoder.parameters() if p.requires_grad]
        trained += [self.logvar] if self.logvar.requires_grad else []
        return build_adam(trained, self.config.optimizer)

    @property
    def learning_rate(self) -> float:
        """The rate of the next update; in a warm-up, the discriminator's."""
        run = self.run_state
        done = self.warmup_done if run.warmup_left else run.iteration - run.first_iteration
        return learning_rate(self.config.optimizer, done)

    @cached_property
    def adams(self) -> list[Adam]:
        """The decoder's optimizer, and the discriminator's, if there is one."""
        return [self.decoder_adam, *([self.adversary.adam] if self.discriminator else [])]

    @cached_property
    def averages(self) -> dict[float, nn.ModuleDict]:
        """The averaged decoder and post_quant_conv of each decay, the run's own first."""
        names = module_names(self.config.ema.decays)
        return {decay: getattr(self, name) for decay, name in names.items()}

    @cached_property
    def _averaged(self) -> dict[float, tuple[list[Tensor], list[Tensor]]]:
        """Each average's parameters, and those that it follows."""
        trained = trained_part(self.autoencoder)
        return {decay: paired(average, trained) for decay, average in self.averages.items()}

    def averaged(self, decay: float | None = None) -> AutoencoderKL:
        """A copy of the autoencoder with the averaged decoder, frozen and in eval mode.

        `decay` is one of `ema.decay`; None: the first. Raises KeyError for any other.
        """
        model = copy.deepcopy(self.autoencoder)
        for name, part in (self.ema if decay is None else self.averages[decay]).items():
            getattr(model, name).load_state_dict(part.state_dict())
        return model.requires_grad_(False).eval()

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> "Finetuner":
        """Lightning's own; the finetuner's parts are given by name, as to `Finetuner` itself."""
        kind = bound(cls)
        return super(Finetuner, kind).load_from_checkpoint(*args, **kwargs)

    # --- Lightning's hooks ------------------------------------------------------------------

    def configure_optimizers(self) -> list[Adam]:
        """The finetuner's own, which may have been restored before the trainer started."""
        return self.adams

    def setup(self, stage: str) -> None:
        """Keeps out of DDP what it must not reduce: the discriminator's gradients and logvar's.

        They are reduced here, in one call; DDP would wait for them in every backward pass.
        """
        if self.trainer.precision not in ("32-true", "64-true"):
            raise ValueError(
                f"Trainer(precision={self.trainer.precision!r}): leave it at '32-true'. The "
                "finetuner autocasts by itself, as `precision` in its configuration says; now "
                f"{self.config.precision}"
            )
        names = ["logvar", ".logvar"]  # DDP calls a module's own parameters by both
        tensors = [*self.named_parameters(), *self.named_buffers()]
        names += [name for name, _ in tensors if name.startswith("discriminator.")]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, names)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the counters, and what a reader must know, to a checkpoint of Lightning's own."""
        self.guard.judge()
        groups = self.autoencoder.decoder.norm_out.num_groups
        checkpoint[ENTRY] = replace(self.run_state.facts, norm_num_groups=groups).stated()
        checkpoint["iteration"] = self.iteration
        checkpoint[RUN_STATE] = asdict(self.run_state)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the counters out of it; raises MissingInputError if there are none."""
        if RUN_STATE not in checkpoint:
            raise MissingInputError(
                "ckpt_path: not the checkpoint of a Finetuner; to start from the weights in it, "
                "give load_autoencoder(FILE) to a new Finetuner"
            )
        self.run_state.load(checkpoint[RUN_STATE])

    def on_fit_start(self) -> None:
        """Moves what Lightning leaves behind, and checks that all ranks start alike.

        From here to the end of the fit CUDA computes as `precision` says.
        """
        self.kernels.__enter__()
        self.perceptual.to(self.device)
        for adam in self.adams:
            for parameter, state in adam.state.items():  # restored; the fused Adam reads it
                state["step"] = state["step"].to(parameter.device)
        self._compare_ranks()

    def on_fit_end(self) -> None:
        """Puts torch's flags back."""
        self.kernels.__exit__()

    def _compare_ranks(self) -> None:
        """Raises RunFailedError if a rank resumed another state, or sees other data."""
        if not dist.is_initialized():
            return
        networks = {} if self.discriminator is None else self.discriminator.state_dict()
        mine = {
            "iteration": self.iteration,
            "warm-up left": self.warmup_left,
            "EMA updates": self.ema_updates,
            "optimizer states": [len(adam.state) for adam in self.adams],
            "discriminator": tensors_sha256(networks)[:12],
            **self.run_state.identity,
        }
        seen: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(seen, mine)
        if lines := disagreements(seen):
            raise RunFailedError(
                "the ranks start from different states:\n" + "\n".join(lines) + "\n"
                f"run_dir={self.config.run_dir}, data and weights must be the same files, and the "
                "programs the same versions, on every node"
            )

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Batch:
        """A loader's batch as a Batch, with noise."""
        return batch if isinstance(batch, Batch) else self.batch_of(batch)

    def batch_of(self, images: Any) -> Batch:
        """Images of any loader with the noise of the next iteration, for `run_iteration`.

        Raises ValueError if they are not as the class takes them.
        """
        draws = 2 if self.config.second_forward else 1
        source = (self.config.seed, self.iteration - self.warmup_left, self.global_rank)
        model = self.autoencoder
        made = plain_batch(images, draws, model.embed_dim, model.downsampling, source)
        return made.with_perturbation(source) if self.config.latents.noise else made

    def training_step(self, batch: Batch, batch_index: int) -> None:
        """One iteration; before the first, those of the discriminator's warm-up."""
        rate = self.learning_rate
        if self.run_state.warmup_left:
            self.run_warm_up(batch)
        else:
            no_sync = getattr(self.trainer.strategy, "block_backward_sync", nullcontext)
            self.run_iteration(batch, Loop(self.manual_backward, no_sync, self._step_counted))
        if self.log_metrics:
            self.log_dict(self.metrics | {"learning_rate": rate}, batch_size=len(batch.images))

    def _step_counted(self, adam: Adam) -> None:
        """The decoder's step, which Lightning counts: its global_step grows by 1 an iteration."""
        wrappers = self.optimizers()
        (wrappers[0] if isinstance(wrappers, list) else wrappers).step()

    # --- one iteration ----------------------------------------------------------------------

    def run_iteration(self, batch: Batch, loop: Loop = ALONE) -> None:
        """One iteration: decoder, its moving averages, discriminator.

        x: images, y: reconstructions, both (B, 3, H, W) in [-1, 1]; z: latents, (B, 4, h, w).
        A loss or gradient that is not finite, on any rank, leaves an update out on all ranks. That
        is decided on the device; the host reads it an iteration later (updates.py).
        """
        run, adversary, layer = self.run_state, self.adversary, self.autoencoder.last_layer
        buffers, x = self._prepare(), self.images(batch)  # (B, 3, H, W)
        micro = self.micro_batches(len(x))
        adversarial = adversary.runs(run.iteration)
        twice = adversarial and len(micro) > 1  # decoded ahead, for the weight of all images
        pieces = parts(len(x), GROUP) if twice else micro
        looks, terms, finite = [], [], []

        # Each loss's gradient at y: d nll / d y and d g / d y, of their means over all images.
        z, kl = self.encode(x, batch, draw=0)  # (B, 4, h, w), no graph
        for piece in pieces:
            y = self.decode(z[piece], twice)  # (B, 3, H, W), with its graph, or the last layer's
            at_y = y.detach().to(x.dtype)
            grad_nll, of_piece, good = self.reconstruction(x[piece], at_y, len(pieces))
            if adversarial:
                looks.append(adversary.look(y, at_y, grad_nll, layer, len(pieces)))
            else:
                self.backpropagate(y, grad_nll, loop, last=piece is pieces[-1])
            terms.append(of_piece)
            finite.append(good)
        self.guard.judge()  # the iteration before
        self.metrics = mean_of_each(terms) | {"kl_loss": kl}
        if adversarial:
            weight, grad_nll, grad_g, figures = adversary.weigh(looks, run.iteration)
            seen = joined([look.y for look in looks])  # (B, 3, H, W)
            looks.clear()  # which frees what was joined
            self.metrics |= figures
            for part in micro:
                y = self.decode(z[part]) if twice else y
                gradient = adversary.blended(grad_nll[part], grad_g[part], weight, y.dtype)
                self.backpropagate(y, gradient, loop, last=part is micro[-1])

        # Decoder, then its moving averages.
        updates = {"decoder": self._step_decoder(joined(finite), loop)}
        self._average_decoder()

        # Discriminator, on images and detached reconstructions.
        if adversarial:
            factor, bad = adversary.factor(run.iteration), updates["decoder"].bad
            updates["discriminator"] = self._step_discriminator(x, batch, seen, factor, bad)
        buffers.restore(torch.stack([update.bad for update in updates.values()]).any())
        self.guard.watch(run.iteration, batch.keys, updates)
        run.iteration += 1  # also after an update that was left out: the data goes on

    def run_warm_up(self, batch: Batch) -> None:
        """One iteration of the discriminator alone, on reconstructions without a graph."""
        run, buffers, x = self.run_state, self._prepare(), self.images(batch)  # (B, 3, H, W)
        z, _ = self.encode(x, batch, draw=0)  # (B, 4, h, w)
        y = self._decode_without_graph(z)  # (B, 3, H, W)
        self.guard.judge()
        self.metrics = {}
        update = self._step_discriminator(x, batch, y, factor=1.0)
        buffers.restore(update.bad)
        self.guard.watch(run.iteration, batch.keys, {"discriminator": update})
        run.warmup_left -= 1

    # --- its parts --------------------------------------------------------------------------

    def _prepare(self) -> Remembered:
        """Clears gradients, sets mode and rate, and remembers BatchNorm's buffers."""
        if not self.training:  # else a loop over all modules
            self.train()
        for adam in self.adams:
            adam.zero_grad()
            for group in adam.param_groups:
                group["lr"] = self.learning_rate
        return Remembered(self.discriminator)

    def micro_batches(self, count: int) -> tuple[slice, ...]:
        """`count` images as micro-batches, of `compute.per_device_batch` or at most 12 images."""
        return parts(count, self.config.compute.per_device_batch or 12)

    def images(self, batch: Batch) -> Tensor:
        """(B, 3, H, W) in [-1, 1], in the weights' precision and layout."""
        images = batch.images
        layout = torch.channels_last if self.nhwc else torch.preserve_format
        if images.dtype == torch.uint8:
            images = to_float(images.to(torch.float32, memory_format=layout))
        return images.to(self.autoencoder.last_layer.dtype, memory_format=layout)

    @phase("encode")
    @torch.no_grad()
    def encode(self, x: Tensor, batch: Batch, draw: int) -> tuple[Tensor, Tensor]:
        """Latents sampled with one draw of the noise, (B, 4, h, w), and the mean KL divergence."""
        latents, divergences = [], []
        for part in self.micro_batches(len(x)):
            with autocast(self.config.precision, x.device):
                posterior = self.autoencoder.encode(x[part])
            z, kl = self.sampled(posterior, batch.noise[draw, part].to(x.dtype))
            if self.config.latents.noise:
                z = self._perturbed(z, batch.noise[-1, part])
            latents.append(z)
            divergences.append({"kl": kl})
        return joined(latents), mean_of_each(divergences)["kl"]

    def _perturbed(self, z: Tensor, draw: Tensor) -> Tensor:
        """z + tau std(z) u e, with the draw of u e, and the deviation of each image's latents."""
        deviation = z.std(dim=(1, 2, 3), keepdim=True)  # (B, 1, 1, 1)
        return z + self.config.latents.noise * deviation * draw.to(z.dtype)

    @phase("decode")
    def decode(self, z: Tensor, last_layer_only: bool = False) -> Tensor:
        """(B, 4, h, w) -> (B, 3, H, W) with a graph of the decoder, or of its last layer alone."""
        with autocast(self.config.precision, z.device):
            model = self.autoencoder
            return model.decode_at_last_layer(z) if last_layer_only else model.decode(z)

    @torch.no_grad()
    def _decode_without_graph(self, z: Tensor) -> Tensor:
        micro = self.micro_batches(len(z))
        return joined([self.decode(z[part]).to(z.dtype) for part in micro])

    @phase("losses")
    def reconstruction(
        self, x: Tensor, y: Tensor, pieces: int
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """d (nll / pieces) / d y, nll's terms, and which images are finite, (B,) bool.

        Where nll itself is not finite, neither is the gradient: that of all ranks is not, then.
        """
        gradients, terms, finite = [], [], []
        count = self.config.compute.perceptual_parts
        count = 1 if len(y) % count else count
        for part in parts(len(y), len(y) // count):  # each frees what its backward pass needs
            leaf = y[part].detach().requires_grad_()
            p = self.distance(x[part], leaf).to(x.dtype)  # (b, 1, 1, 1)
            nll, own = self.reconstruction_loss(x[part], leaf, p, logvar=self.logvar, **self.terms)
            wanted = [leaf, self.logvar] if self.logvar.requires_grad else [leaf]
            (nll / (count * pieces)).backward(inputs=wanted)
            assert leaf.grad is not None
            gradient, good = self.checked(leaf.grad, nll.detach())
            gradients.append(gradient)
            terms.append(own)
            finite.append(good)
        return joined(gradients), mean_of_each(terms), joined(finite)

    @phase("backward")
    def backpropagate(self, y: Tensor, gradient: Tensor, loop: Loop, last: bool) -> None:
        """Adds (d loss / d y) (d y / d theta) to the decoder's gradients; the last are reduced."""
        with nullcontext() if last else loop.no_sync():
            loop.backward(y, gradient=gradient.to(y.dtype))

    @phase("optimizer")
    def _step_decoder(self, finite: Tensor, loop: Loop) -> Update:
        """Steps the decoder, unless a gradient is not finite."""
        if self.logvar.grad is not None:
            average_over_ranks([self.logvar.grad])
        adam, most = self.decoder_adam, self.config.optimizer.clip_norm
        update = step_if_finite(adam, gradients_of(adam), finite, most, step=loop.step)
        self.metrics |= update.figures("decoder")
        return update

    @phase("ema")
    def _average_decoder(self) -> None:
        self.run_state.ema_updates += 1
        for decay, (averaged, trained) in self._averaged.items():
            kept = ema_decay(self.run_state.ema_updates, decay, self.config.ema.warmup)
            move(averaged, trained, kept)

    def _step_discriminator(
        self, x: Tensor, batch: Batch, y: Tensor, factor: float, bad: Tensor | None = None
    ) -> Update:
        """Steps the discriminator on the batch's images x and reconstructions y."""
        if self.config.second_forward:  # the original: new noise, updated decoder
            y = self._decode_without_graph(self.encode(x, batch, draw=1)[0])
        update, figures = self.adversary.update(x, y, factor, bad)
        self.metrics |= figures
        return update


def sampled(posterior: Posterior, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Latents, (B, 4, h, w), and the mean KL divergence."""
    return posterior.sample(noise), posterior.kl().mean()


def check_parts(
    config: Config,
    autoencoder: AutoencoderKL,
    discriminator: Discriminator | None,
    perceptual: nn.Module,
) -> None:
    """Raises ValueError for networks that do not fit the recipe, or in half precision."""
    for name, part in (("autoencoder", autoencoder), ("perceptual", perceptual)):
        if not isinstance(part, nn.Module):
            raise ValueError(f"{name}: got a {type(part).__name__}, expected a network")
    wanted = config.adversarial is not None
    if wanted != (discriminator is not None):
        with_term = "an adversarial term: give a Discriminator, or the setting adversarial=null"
        without = "no adversarial term: give None as discriminator"
        raise ValueError(f"recipe {config.name} has {with_term if wanted else without}")
    for network in (autoencoder, discriminator):
        types = {p.dtype for p in network.parameters()} if network is not None else set()
        if not types <= {torch.float32} and types != {torch.float64}:
            found = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in types))
            raise ValueError(
                f"{type(network).__name__}: its parameters are {found}; give float32, and "
                "precision=bfloat16 among the settings to compute in it"
            )


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


def bound(kind: type[Finetuner]) -> type[Finetuner]:
    """The finetuner, or a subclass of it, as a LightningModule of the package that is in use."""
    if issubclass(kind, nn.Module):
        return kind
    other = sys.modules.get("lightning.pytorch")
    return bound_to(LightningModule if other is None else other.LightningModule, kind)


@cache
def bound_to(module: type, kind: type = Finetuner) -> type[Finetuner]:
    """The same as a subclass of one package's LightningModule."""
    return type(kind.__name__, (kind, module), {"__module__": kind.__module__})


def unpickled(module: type, kind: type) -> Finetuner:
    """An empty one, to be filled by pickle."""
    made = bound_to(module, kind)
    return made.__new__(made)


def trained_part(autoencoder: AutoencoderKL) -> nn.ModuleDict:
    """Decoder and post_quant_conv themselves."""
    return nn.ModuleDict({name: getattr(autoencoder, name) for name in TRAINED})


def trained_copy(autoencoder: AutoencoderKL) -> nn.ModuleDict:
    """A frozen copy of the trained part."""
    return copy.deepcopy(trained_part(autoencoder)).requires_grad_(False).eval()
