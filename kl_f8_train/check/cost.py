"""What an iteration costs in arithmetic and memory, counted on the iteration itself.

It runs on torch's meta device, whose tensors have shapes and types but no values, so full-size
networks take no memory and a second. Operations are those that torch's own flop counter knows, of
convolutions, matrix products and attention; everything else (normalisation, activations,
optimizers, EMA) is below a thousandth. Memory is that of all tensors alive at a time.
"""

import weakref
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from kl_f8_train.config import Config
from kl_f8_train.core import machine, perceptual
from kl_f8_train.core.batch import Batch
from kl_f8_train.core.discriminator import Discriminator
from kl_f8_train.core.machine import timed_by
from kl_f8_train.core.model import FROZEN, TRAINED, AutoencoderKL
from kl_f8_train.core.step import Finetuner, Loop
from kl_f8_train.weights import pretrained

GIB = 2**30
HEADROOM_BYTES = 2 * GIB  # CUDA's context and the allocator's losses, assumed
ALLOCATED = 512  # bytes: CUDA's allocator hands out multiples of it
FEW, MORE = 2, 6  # micro-batches, in images or perceptual parts, between which memory is a line


class FlopCounter(TorchDispatchMode):
    """Adds up the operations of matrix products, convolutions and attention, as torch counts them.

    torch's own FlopCounterMode hooks modules, which does not go with gradients at a leaf.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=result)
        return result


class Counter(FlopCounter):
    """Operations, and bytes of the tensors alive, by phase; called at the end of each."""

    def __init__(self) -> None:
        super().__init__()
        self.flops: dict[str, int] = {}
        self.peaks: dict[str, int] = {}
        self._alive: set[int] = set()  # storages, by their address in C++
        self._bytes = self._peak = 0

    def reset(self) -> None:
        """Forgets what was counted; tensors that are alive stay."""
        self.total, self._peak = 0, self._bytes
        self.flops, self.peaks = {}, {}

    def __call__(self, phase: str) -> None:
        self.flops[phase] = self.flops.get(phase, 0) + self.total
        self.peaks[phase] = max(self.peaks.get(phase, 0), self._peak)
        self.total, self._peak = 0, self._bytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._allocated(tensor.untyped_storage())
        return result

    def _allocated(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address in self._alive:
            return
        size = -(-storage.nbytes() // ALLOCATED) * ALLOCATED
        self._alive.add(address)
        self._bytes += size
        self._peak = max(self._peak, self._bytes)
        weakref.finalize(storage, self._freed, address, size)

    def _freed(self, address: int, size: int) -> None:
        self._alive.discard(address)
        self._bytes -= size


@dataclass(frozen=True)
class Counts:
    """Of one iteration of one micro-batch."""

    flops: dict[str, int] = field(default_factory=dict)  # by phase
    peaks: dict[str, int] = field(default_factory=dict)  # bytes, by phase
    parameters: dict[str, int] = field(default_factory=dict)  # by network


_COUNTED: dict[str, Counts] = {}  # by what they depend on


def counts(config: Config, batch: int) -> Counts:
    """Counts an iteration of `batch` images, uncompiled, recomputation included."""
    compute = replace(
        config.compute,
        accelerator="cpu",
        compile=False,
        channels_last=False,
        per_device_batch=batch,
    )
    adversarial = config.adversarial and replace(config.adversarial, start_iteration=0)
    config = replace(config, compute=compute, adversarial=adversarial)
    parts = (config.model, config.data.crop, config.loss, adversarial, compute, config.precision)
    key = repr((*parts, config.second_forward, len(config.ema.decays), batch))
    if key not in _COUNTED:
        _COUNTED[key] = _count(config, batch)
    return _COUNTED[key]


def _count(config: Config, batch: int) -> Counts:
    with torch.device("meta"), Counter() as counter:
        finetuner = _finetuner(config)
        moments = [torch.empty(2, _parameters(m)) for m in (finetuner.ema, finetuner.discriminator)]
        for adam in finetuner.adams:  # its kernel does not know the meta device
            adam.step = lambda closure=None: None  # type: ignore[method-assign]
        side, latents = config.data.crop, latent_side(config)
        images = torch.empty(batch, 3, side, side, dtype=torch.uint8)
        noise = torch.empty(2, batch, config.model.embed_dim, latents, latents)

        def backward(tensor: Tensor, gradient: Tensor) -> None:
            with machine.autocast(config.precision, tensor.device):  # for what is computed again
                tensor.backward(gradient)

        counter.reset()
        with timed_by(counter):
            finetuner.run_iteration(Batch(images, noise, [""] * batch, []), Loop(backward))
        counter("rest")
        del moments
    model = finetuner.autoencoder
    return Counts(
        {phase: number for phase, number in counter.flops.items() if number},
        dict(counter.peaks),
        {
            "encoder": sum(_parameters(getattr(model, name)) for name in FROZEN),
            "decoder": sum(_parameters(getattr(model, name)) for name in TRAINED),
            "discriminator": _parameters(finetuner.discriminator),
            "perceptual": _parameters(finetuner.perceptual),
        },
    )


def _finetuner(config: Config) -> Finetuner:
    adversarial, discriminator = config.adversarial, None
    if adversarial is not None:
        discriminator = Discriminator(adversarial.ndf, adversarial.n_layers)
    if config.loss.perceptual == "lpips_vgg":
        network = perceptual.lpips_vgg({})
    else:
        network = pretrained.build(config.loss.perceptual)
    return Finetuner(
        config, AutoencoderKL(**asdict(config.model)), discriminator, network.to("meta")
    )


def _parameters(module: nn.Module | None) -> int:
    return 0 if module is None else sum(p.numel() for p in module.parameters())


# --- arithmetic -----------------------------------------------------------------------------


def flops_per_image(config: Config) -> int:
    """Operations of an iteration for one image, with what activation checkpointing repeats."""
    return sum(flops_by_phase(config).values())


def flops_by_phase(config: Config) -> dict[str, int]:
    """Operations of one image's encode, decode, losses, backward and discriminator."""
    return counts(config, 1).flops


# --- memory ---------------------------------------------------------------------------------


def parameters(config: Config) -> dict[str, int]:
    """How many parameters each network has, quant_conv and post_quant_conv included."""
    return counts(config, 1).parameters


def state_bytes(config: Config) -> int:
    """What stays in memory, in float32: networks, EMAs, gradients and Adam's two moments."""
    count = parameters(config)
    trained = count["decoder"] + count["discriminator"]
    averages = len(config.ema.decays) * count["decoder"]
    return 4 * (sum(count.values()) + averages + 3 * trained)


def reduced_bytes(config: Config) -> int:
    """What each process sends and receives once an iteration, as float32 gradients."""
    count = parameters(config)
    return 4 * (count["decoder"] + count["discriminator"])


def peak_bytes(config: Config, batch: int) -> float:
    """The most that an iteration holds for micro-batches of `batch`, without allocator's overhead.

    In each phase memory is a line over the number of images, drawn through two that are counted.
    """
    parts = config.compute.perceptual_parts
    if batch % parts:
        parts = 1
    config = replace(config, compute=replace(config.compute, perceptual_parts=parts))
    few, more = FEW * parts, MORE * parts
    below, above = counts(config, few).peaks, counts(config, more).peaks
    slopes = {phase: (above[phase] - below[phase]) / (more - few) for phase in below}
    return max(below[phase] + (batch - few) * slope for phase, slope in slopes.items())


def batch_that_fits(config: Config, room_bytes: float) -> int:
    """Images per micro-batch that fit into `room_bytes`, by `peak_bytes`; 0 if not even one."""
    low, high = 0, 1
    while peak_bytes(config, high) <= room_bytes:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if peak_bytes(config, middle) <= room_bytes else (low, middle)
    return low


def largest_divisor(config: Config, share: int, room_bytes: float) -> int:
    """The largest divisor of `share`, a device's images of an iteration, that fits as micro-batch.

    0 if not even one image fits.
    """
    divisors = (n for n in range(1, share + 1) if share % n == 0)
    return max((n for n in divisors if peak_bytes(config, n) <= room_bytes), default=0)


def latent_side(config: Config) -> int:
    """Latents per side: crop / 8 for kl-f8."""
    return int(config.data.crop // 2 ** (len(config.model.ch_mult) - 1))
