"""What an iteration costs in arithmetic, traffic and memory, counted on the iteration itself.

It runs on torch's meta device, whose tensors have shapes and types but no values, so full-size
networks take no memory and a second. Arithmetic is that of products: convolutions, matrix products
and attention, as torch's own flop counter counts them; everything else (normalisation, activations,
optimizers, EMA) is below a thousandth. Memory is that of all tensors alive at a time, traffic what
kernels read and write of it.

torch.compile fuses everything but products into few kernels. Counted is then what those kernels
need: a tensor between two products is in memory only if a product reads it or if it outlives its
phase (what the backward pass needs does); a sum is in memory, and reads what it is a sum of.
tests/counted_memory.csv holds what torch's allocator and inductor really took.
"""

import math
import weakref
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from kl_f8_train.core import machine, perceptual
from kl_f8_train.core.batch import Batch, timed_by
from kl_f8_train.core.discriminator import Discriminator
from kl_f8_train.core.losses import GROUP
from kl_f8_train.core.model import FROZEN, TRAINED, AutoencoderKL, autocast
from kl_f8_train.core.step import Finetuner, Loop
from kl_f8_train.divisors import divisors
from kl_f8_train.settings import KL_F8, Config
from kl_f8_train.weights import pretrained

GIB = 2**30
HEADROOM_BYTES = 2 * GIB  # CUDA's context and the allocator's losses, assumed
ALLOCATED = 512  # bytes: CUDA's allocator hands out multiples of it
FEW, MORE = 3, 6  # micro-batches, in images or perceptual parts, between which memory is a line
SUM = 8  # a result this many times smaller than what it is computed from is a sum
ONCE = ("optimizer", "ema")  # phases that an iteration has once, however many micro-batches
# Over each trained parameter: weight, gradient and two moments read, all but the gradient written.
ADAM_PASSES = 7


@dataclass
class PhaseCost:
    """What a phase takes."""

    flops: Counter[torch.dtype] = field(default_factory=Counter)  # of products, by type
    product_bytes: int = 0  # that products read and write
    other_bytes: int = 0  # that all other kernels do
    peak: int = 0  # bytes alive


@dataclass(frozen=True)
class Fused:
    """A tensor that no kernel has written to memory."""

    size: int  # bytes, if it ever is
    sources: tuple[UntypedStorage, ...]  # what it is computed from, kept alive until then


class CostCounter(TorchDispatchMode):
    """What an iteration takes, by phase; called at the end of each.

    With `fuse` as if all but products were compiled; else every operation is a kernel. torch's own
    FlopCounterMode hooks modules, which does not go with gradients at a leaf.
    """

    def __init__(self, fuse: bool = False) -> None:
        super().__init__()
        self.fuse = fuse
        self.phases: dict[str, PhaseCost] = {}
        self._now = PhaseCost()
        self._alive: dict[int, int] = {}  # bytes by storage, by its address in C++
        self._fused: dict[int, Fused] = {}  # those of them that are not in memory
        self._bytes = 0
        self._last_read: frozenset[int] = frozenset()

    def reset(self) -> None:
        """Forgets what was counted; tensors that are alive stay."""
        self("before")
        self.phases, self._now = {}, PhaseCost(peak=self._bytes)

    def __call__(self, phase: str) -> None:
        peak = self._now.peak
        self._write(list(self._fused))  # they outlive the phase
        self._now.peak = max(peak, self._bytes)
        tally = self.phases.setdefault(phase, PhaseCost())
        tally.flops.update(self._now.flops)
        tally.product_bytes += self._now.product_bytes
        tally.other_bytes += self._now.other_bytes
        tally.peak = max(tally.peak, self._now.peak)
        self._now = PhaseCost(peak=self._bytes)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = _tensors((args, kwargs))
        product = flop_registry.get(func._overloadpacket)  # torch's formula of its operations
        if product:
            self._write(t.untyped_storage()._cdata for t in inputs)
        result = func(*args, **kwargs)
        outputs = _tensors(result)
        new = {s._cdata: s for t in outputs if (s := t.untyped_storage())._cdata not in self._alive}
        # What the kernel computes and moves; a view has no kernel.
        if product:
            self._now.flops[inputs[0].dtype] += product(*args, **kwargs, out_val=result)
            self._now.product_bytes += _bytes([*inputs, *outputs])
        elif not self.fuse and (new or func._schema.is_mutable):
            self._now.other_bytes += _bytes([*inputs, *outputs])
        elif self.fuse and not new and func._schema.is_mutable:
            self._now.other_bytes += self._read(inputs) + _bytes(outputs)
        # What it leaves behind: fused, only sums are in memory at once, the rest when it is read.
        largest = max((t.nbytes for t in inputs), default=0)
        sums = [s for s in new.values() if largest >= SUM * _allocated(s)]
        read = [t.untyped_storage() for t in inputs]
        for storage in sums:
            self._add(storage, read, in_memory=True, counts=self.fuse and not product)
        for address, storage in new.items():
            if address not in self._alive:  # a norm's output needs its sums
                self._add(storage, [*read, *sums], in_memory=bool(product or not self.fuse))
        return result

    def _add(
        self,
        storage: UntypedStorage,
        sources: Sequence[UntypedStorage],
        in_memory: bool,
        counts: bool = False,
    ) -> None:
        """Puts a new tensor into memory, or remembers how it would be computed."""
        address, size = storage._cdata, _allocated(storage)
        if counts:
            self._now.other_bytes += self._read(sources) + size
        self._alive[address] = size
        weakref.finalize(storage, self._freed, address)
        if in_memory:
            self._take(size)
        else:
            self._fused[address] = Fused(size, tuple(sources))

    def keep(self, tensor: Tensor) -> Tensor:
        """Writes a tensor that is kept for the backward pass at once, and returns it."""
        self._write([tensor.untyped_storage()._cdata])
        return tensor

    def _write(self, addresses: Iterable[int]) -> None:
        """Puts fused tensors into memory, by a kernel that reads what they are computed from."""
        for address in addresses:
            fused = self._fused.pop(address, None)
            if fused is not None:
                self._now.other_bytes += self._read(fused.sources) + fused.size
                size = fused.size
                del fused  # its sources may end before it begins
                self._take(size)

    def _read(self, sources: Iterable[Tensor | UntypedStorage]) -> int:
        """Bytes in memory behind these; 0 if the kernel before read them too: they are one."""
        found: dict[int, int] = {}
        ahead = [s.untyped_storage() if isinstance(s, Tensor) else s for s in sources]
        while ahead:
            address = ahead.pop()._cdata
            if address in found:
                continue
            fused = self._fused.get(address)
            found[address] = 0 if fused else self._alive.get(address, 0)
            ahead += fused.sources if fused else ()
        read = frozenset(address for address, size in found.items() if size)
        if read <= self._last_read:
            return 0
        self._last_read = read
        return sum(found.values())

    def _take(self, size: int) -> None:
        self._bytes += size
        self._now.peak = max(self._now.peak, self._bytes)

    def _freed(self, address: int) -> None:
        size = self._alive.pop(address)
        if self._fused.pop(address, None) is None:
            self._bytes -= size


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor)]


def _allocated(storage: UntypedStorage) -> int:
    """Bytes that it takes of the memory."""
    return -(-storage.nbytes() // ALLOCATED) * ALLOCATED


def _bytes(tensors: Iterable[Tensor]) -> int:
    different = {id(tensor): tensor for tensor in tensors}
    return sum(tensor.nbytes for tensor in different.values())


@dataclass(frozen=True)
class Counts:
    """Of an iteration."""

    images: int
    phases: dict[str, PhaseCost] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)  # by network


_COUNTED: dict[str, Counts] = {}  # by what they depend on
AHEAD = " ahead"  # what is decoded for the adaptive weight before the micro-batches


def counts(config: Config, batch: int, images: int | None = None) -> Counts:
    """Counts an iteration of `images` in micro-batches of `batch`, recomputation included.

    By default in one micro-batch.
    """
    images = images or batch
    fuse = run_compiles(config)
    compute = replace(
        config.compute,
        accelerator="cpu",
        compile=False,
        channels_last=False,
        per_device_batch=batch,
    )
    config = replace(config, compute=compute)
    parts = (config.model, config.data.crop, config.loss, config.adversarial, compute)
    rest = (config.precision, config.second_forward, len(config.ema.decays), batch, images, fuse)
    key = repr(parts + rest)
    if key not in _COUNTED:
        _COUNTED[key] = _count(config, images, fuse)
    return _COUNTED[key]


def _count(config: Config, images: int, fuse: bool) -> Counts:
    with torch.device("meta"), CostCounter(fuse) as counter:
        vgg = config.loss.perceptual == "lpips_vgg"
        network = perceptual.lpips_vgg({}) if vgg else pretrained.build(config.loss.perceptual)
        finetuner = untrained(config, network.to("meta"))
        moments = [torch.empty(2, _parameters(m)) for m in (finetuner.ema, finetuner.discriminator)]
        for adam in finetuner.adams:  # its kernel does not know the meta device
            adam.step = lambda closure=None: None  # type: ignore[method-assign]
        side, latents = config.data.crop, latent_side(config)
        pixels = torch.empty(images, 3, side, side, dtype=torch.uint8)
        noise = torch.empty(2, images, config.model.embed_dim, latents, latents)

        def backward(tensor: Tensor, gradient: Tensor) -> None:
            with autocast(config.precision, tensor.device):  # for what is computed again
                tensor.backward(gradient)

        def ended(phase: str) -> None:
            ahead = accumulating and "backward" not in counter.phases
            counter(phase + AHEAD if ahead and phase in ("decode", "losses") else phase)

        def decode(*args: Any) -> Tensor:  # what is kept is written by a kernel that there is
            with saved_tensors_hooks(counter.keep, lambda kept: kept):
                return Finetuner.decode(finetuner, *args)

        accumulating = config.adversarial is not None and len(finetuner.micro_batches(images)) > 1
        finetuner.decode = decode  # type: ignore[method-assign,assignment]
        counter.reset()
        with timed_by(ended):
            finetuner.run_iteration(Batch(pixels, noise, [""] * images, []), Loop(backward))
        counter("rest")
        del moments
    model = finetuner.autoencoder
    sizes = {
        "encoder": sum(_parameters(getattr(model, name)) for name in FROZEN),
        "decoder": sum(_parameters(getattr(model, name)) for name in TRAINED),
        "discriminator": _parameters(finetuner.discriminator),
        "perceptual": _parameters(finetuner.perceptual),
    }
    trained = sizes["decoder"] + sizes["discriminator"]
    counter.phases["optimizer"].other_bytes += 4 * ADAM_PASSES * trained
    return Counts(images, counter.phases, sizes)


def untrained(config: Config, network: perceptual.PerceptualDistance) -> Finetuner:
    """The recipe's networks without their weights; the adversarial term counts from the start."""
    autoencoder, discriminator = AutoencoderKL(**asdict(config.model)), None
    if config.adversarial is not None:
        discriminator = Discriminator(config.adversarial.ndf, config.adversarial.n_layers)
        config = replace(config, adversarial=replace(config.adversarial, start_iteration=0))
    return Finetuner(config, autoencoder, discriminator, network)


def _parameters(module: nn.Module | None) -> int:
    return 0 if module is None else sum(p.numel() for p in module.parameters())


# --- what runs ------------------------------------------------------------------------------


def on_gpu(config: Config) -> bool:
    """Whether the run is meant for a GPU: of this machine or, of full size, of another one."""
    if config.compute.accelerator == "auto":
        return torch.cuda.is_available() or is_full_size(config)
    return config.compute.accelerator == "cuda"


def is_full_size(config: Config) -> bool:
    """Whether the networks have kl-f8's shape: figures for GPUs say nothing about smaller ones."""
    return config.model == KL_F8


def run_compiles(config: Config) -> bool:
    """Whether the run will be compiled; on a GPU of another machine it is by default."""
    if config.compute.compile is None and not torch.cuda.is_available():
        return on_gpu(config)
    return machine.compiles(config.compute)


# --- arithmetic and traffic -----------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What an image takes, forward and backward, and what an iteration takes once."""

    flops: dict[torch.dtype, float]  # of products, by the type that they are computed in
    product_bytes: float  # read and written by products
    other_bytes: float  # by all other kernels
    once_bytes: float  # by optimizers and moving average


def work(config: Config, accumulating: bool = False) -> Work:
    """Counted for an image of several micro-batches, or of one.

    With an adversarial term and several micro-batches the decoder runs forward once more, ahead,
    for the adaptive weight of all images.
    """
    found = _counts_for_work(config, accumulating)
    flops: Counter[torch.dtype] = Counter()
    for tally in found.phases.values():
        flops.update(tally.flops)
    each = [tally for phase, tally in found.phases.items() if phase not in ONCE]
    return Work(
        {kind: number / found.images for kind, number in flops.items()},
        sum(tally.product_bytes for tally in each) / found.images,
        sum(tally.other_bytes for tally in each) / found.images,
        sum(found.phases[phase].other_bytes for phase in ONCE if phase in found.phases),
    )


def _counts_for_work(config: Config, accumulating: bool) -> Counts:
    batch = MORE * config.compute.perceptual_parts
    return counts(config, batch, 2 * batch if accumulating else batch)


def flops_per_image(config: Config, accumulating: bool = False) -> int:
    """Operations of an iteration for one image, with what activation checkpointing repeats."""
    return sum(flops_by_phase(config, accumulating).values())


def flops_by_phase(config: Config, accumulating: bool = False) -> dict[str, int]:
    """Operations of one image's encode, decode, losses, backward and discriminator."""
    found = _counts_for_work(config, accumulating)
    flops: Counter[str] = Counter()
    for phase, tally in found.phases.items():
        flops[phase.removesuffix(AHEAD)] += sum(tally.flops.values()) // found.images
    return {phase: number for phase, number in flops.items() if number}


# --- memory ---------------------------------------------------------------------------------


def parameters(config: Config) -> dict[str, int]:
    """How many parameters each network has, quant_conv and post_quant_conv included."""
    return _counts_for_work(config, accumulating=False).parameters


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


def peak_bytes(config: Config, batch: int, share: int | None = None) -> float:
    """The most that an iteration holds for micro-batches of `batch`, without allocator's overhead.

    `share`: a device's images of an iteration, by default one micro-batch. In each phase memory is
    a line over the number of images of a micro-batch, drawn through two that are counted. Several
    micro-batches keep more: gradients, the loss's gradients at all images, and what the
    discriminator sees together, which is another line over the images.
    """
    share = share or batch
    parts = config.compute.perceptual_parts
    if batch % parts:
        parts = 1
    config = replace(config, compute=replace(config.compute, perceptual_parts=parts))
    few, more = FEW * parts, MORE * parts
    if share == batch:
        below, above = _peaks(counts(config, few)), _peaks(counts(config, more))
        slopes = {phase: (above[phase] - below[phase]) / (more - few) for phase in below}
        return max(below[phase] + (batch - few) * slope for phase, slope in slopes.items())
    if share <= 2 * more:
        return max(_peaks(counts(config, batch, share)).values())
    images = 2 * max(more, GROUP)
    below, above = _peaks(counts(config, few, images)), _peaks(counts(config, more, images))
    longer = _peaks(counts(config, more, images + more))
    return max(
        least
        + (batch - few) * (above[phase] - least) / (more - few)
        + (share - images) * (longer[phase] - above[phase]) / more  # kept of each image
        for phase, least in below.items()
    )


def _peaks(found: Counts) -> dict[str, int]:
    return {phase: tally.peak for phase, tally in found.phases.items()}


def batch_that_fits(config: Config, room_bytes: float) -> int:
    """Images per micro-batch that fit into `room_bytes`, by `peak_bytes`; 0 if not even one."""
    return largest_that_fits(lambda images: peak_bytes(config, images) <= room_bytes)


def largest_that_fits(fits: Callable[[int], bool], start: int = 1, most: float = math.inf) -> int:
    """The largest number for which `fits` holds, by doubling from `start`, then by bisection.

    Beyond `most` it is not doubled any more.
    """
    low, high = 0, start
    while high <= most and fits(high):
        low, high = high, 2 * high
    return bisect_left(range(high), True, low + 1, key=lambda number: not fits(number)) - 1


def largest_divisor(config: Config, share: int, room_bytes: float) -> int:
    """The largest divisor of `share`, a device's images of an iteration, that fits as micro-batch.

    0 if not even one image fits.
    """
    largest_first = reversed(divisors(share))
    return next((n for n in largest_first if peak_bytes(config, n, share) <= room_bytes), 0)


def latent_side(config: Config) -> int:
    """Latents per side: crop / 8 for kl-f8."""
    return config.data.crop // config.model.downsampling
