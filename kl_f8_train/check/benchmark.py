"""How fast a recipe runs on this machine, where the time goes, and how far that is from the floor.

An iteration here is one micro-batch of one device. Everything works without weights and shards:
what is not there is random, and the result says so.
"""

import gc
import os
import resource
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kl_f8_train import __version__
from kl_f8_train.check import cost
from kl_f8_train.core import machine, perceptual
from kl_f8_train.core.batch import Batch, timed_by
from kl_f8_train.core.discriminator import initialize
from kl_f8_train.core.model import Kernels
from kl_f8_train.core.step import Finetuner
from kl_f8_train.data.loading import IterationSampler, PositionDataset, loader, open_data
from kl_f8_train.errors import MissingInputError, UsageError
from kl_f8_train.rules import micro_batch
from kl_f8_train.settings import Config
from kl_f8_train.units import counted, duration, memory, speed
from kl_f8_train.weights import pretrained

WARM_UP = 3  # iterations before the clock starts: kernels are chosen, and compiled
PHASES = ("data", "encode", "decode", "losses", "backward", "discriminator", "optimizer", "ema")
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Iteration = Callable[[Batch], None]
BUSY = (
    "the threads waited for a fifth of the time or more: the machine is busy, or the "
    "images too few for so many threads; the figures are rough"
)


@dataclass
class Timings:
    """Iterations of `run`, as they are measured."""

    run: Iteration
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    graphs: int = 0  # compiled meanwhile

    def add(self, batch: Batch, device: torch.device) -> None:
        """Measures one more."""
        graphs, cpu_began = machine.compiled_graphs(), time.process_time()
        self.seconds.append(timed(self.run, batch, device))
        self.cpu_seconds.append(time.process_time() - cpu_began)
        self.graphs += machine.compiled_graphs() - graphs


# --- the verb -------------------------------------------------------------------------------


@machine.with_remedy()
def benchmark(
    config: Config,
    iterations: int = 10,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measures an iteration of `config` on this machine and returns the figures.

    Raises UsageError if CUDA is asked for and not there, RunFailedError with the remedy if memory
    runs out.
    """
    device = find_device(config)
    size = batch_size(config, device)
    figures = _measure_training(config, device, size, iterations, say)
    # Its networks' memory is room for the largest batch.
    return figures | {"largest_batch": largest_batch(config, device, size)}


def _measure_training(
    config: Config, device: torch.device, size: int, iterations: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """The figures of iterations with `size` images."""
    before = memory_in_use(device)
    began = time.perf_counter()
    notes: list[str] = []
    finetuner = build_finetuner(config, notes)
    ours = iteration_of(finetuner, device)
    batches = open_batches(config, size, notes)
    say(f"{device_name(device)}: {size} x {config.data.crop} px, {config.precision}")

    batch = next(batches).to(device)
    first_seconds = timed(ours, batch, device)
    first_iteration = time.perf_counter() - began
    left = WARM_UP - 1 + iterations
    say(
        f"the first iteration took {first_seconds:.2g} s; {left} more take "
        f"{'at most' if machine.compiles(config.compute) else 'about'} "
        f"{duration(left * first_seconds)}"
    )
    flops_per_image = count_flops(ours, batch) / size
    reset_peak(device)  # after compiling, and after the count, which runs eagerly
    for _ in range(WARM_UP - 2):
        ours(batch)
    memory, breaks = peak_memory(device) - before, graph_breaks()
    timings, phases = measure(ours, batches, device, iterations)
    rates = _matmul_rates(config.precision, device)
    seconds, cpu_seconds = map(statistics.median, (timings.seconds, timings.cpu_seconds))
    if device.type == "cpu" and is_busy(seconds, cpu_seconds, torch.get_num_threads()):
        notes.append(BUSY)
    images_per_second = size / (seconds + 1e-3 * phases["data"])
    achieved = flops_per_image * images_per_second
    share = achieved / rates[config.precision]
    return {
        **_conditions(config, device, size),
        "iterations": iterations,
        "images_per_second": images_per_second,
        "seconds_quartiles": quartiles(timings.seconds),
        "cpu_seconds": cpu_seconds,
        "flops_per_image": flops_per_image,
        "flops_per_second": achieved,
        "matmul_flops_per_second": rates,
        "share_of_matmul": share,
        "phases_ms": phases,
        "peak_memory_bytes": memory,
        "limited_by": limit(phases, share),
        "first_iteration_seconds": first_iteration,
        "graph_breaks": breaks,
        "recompiles_after_warm_up": timings.graphs,
        "synchronizations": synchronizations(ours, batch, device),
        "notes": notes,
    }


def _conditions(config: Config, device: torch.device, size: int) -> dict[str, Any]:
    """What is measured, and what is known of it beforehand."""
    return {
        "device": device_name(device),
        "precision": config.precision,
        "batch": size,
        "crop": config.data.crop,
        "flops_floor": cost.flops_per_image(as_it_runs(config)),
        "computed_memory_bytes": cost.peak_bytes(as_it_runs(config), size),
        "compiled": machine.compiles(config.compute),
        "settings": {
            "name": config.name,
            "model": asdict(config.model),
            "compute": asdict(config.compute),
        },
        "versions": {"kl_f8_train": __version__, "torch": str(torch.__version__)},
    }


def describe(result: Mapping[str, Any]) -> str:
    """The figures as text."""
    phases = result["phases_ms"]
    total = sum(phases.values())
    rates = result["matmul_flops_per_second"]
    first, median, third = result["seconds_quartiles"]
    giga = 1e9
    lines = [
        f"{speed(result['images_per_second'])}, {result['batch']} at a time; "
        f"{counted(result['iterations'], 'iteration', 's')} of {median:.3g} s (median; quartiles "
        f"{first:.3g} and {third:.3g} s), the first one after "
        f"{result['first_iteration_seconds']:.0f} s",
        *(f"  {name:14}{ms:10.1f} ms {ms / total:6.1%}" for name, ms in phases.items()),
        f"arithmetic: {result['flops_per_image'] / giga:,.1f} GFLOP an image, floor "
        f"{result['flops_floor'] / giga:,.1f}; {result['flops_per_second'] / giga:,.0f} GFLOP/s, "
        f"{result['share_of_matmul']:.0%} of this machine's matmul "
        f"(float32 {rates['float32'] / giga:,.0f}, bfloat16 {rates['bfloat16'] / giga:,.0f})",
        f"memory: {memory(result['peak_memory_bytes'])} at the peak (computed "
        f"{memory(result['computed_memory_bytes'])}); largest per-device batch "
        f"{result['largest_batch']}",
        f"limited by: {result['limited_by']}",
    ]
    if result["compiled"]:
        lines.append(
            f"compiled: {result['graph_breaks']} graph breaks, "
            f"{result['recompiles_after_warm_up']} recompiles after warm-up"
        )
    if result["synchronizations"] is not None:
        lines.append(f"host waits for the device {result['synchronizations']} times an iteration")
    return "\n".join([*lines, *result["notes"]])


def limit(phases: Mapping[str, float], share: float) -> str:
    """What to look at first: the data, the arithmetic, or everything that is not arithmetic."""
    # Shares at which the advice changes; see docs/performance.md.
    wait = phases["data"] / sum(phases.values())
    if wait > 0.02:
        return f"data: {wait:.0%} of the time; raise data.workers"
    if share > 0.6:
        return f"arithmetic: {share:.0%} of the matmul rate"
    if share >= 0.4:
        return f"arithmetic and memory traffic alike: {share:.0%} of the matmul rate"
    slowest = max(phases, key=lambda name: phases[name])
    return f"memory traffic and launches: {share:.0%} of the matmul rate; most time in {slowest}"


def quartiles(seconds: Sequence[float]) -> list[float]:
    """25 %, 50 % and 75 %, of one number or more."""
    return list(np.quantile(seconds, (0.25, 0.5, 0.75)).tolist())


def is_busy(seconds: float, cpu_seconds: float, threads: int) -> bool:
    """Whether the clock went on for a quarter longer than the threads computed."""
    # Alone on a machine, `threads` busy threads use `threads` seconds of CPU time per second.
    return seconds > 1.25 * cpu_seconds / threads


# --- parts ----------------------------------------------------------------------------------


def build_finetuner(config: Config, notes: list[str]) -> Finetuner:
    """The recipe's networks with random weights; notes what stands in for what."""
    torch.manual_seed(config.seed)
    try:
        network = pretrained.build(config.loss.perceptual, config.loss.perceptual_weights)
    except MissingInputError:
        if config.loss.perceptual != "lpips_vgg":
            raise
        notes.append("VGG16's weights are not here: random ones of its shape")
        network = perceptual.lpips_vgg({})
    finetuner = cost.untrained(config, network)
    if finetuner.discriminator is not None:
        initialize(finetuner.discriminator, config.seed)
    return finetuner


def iteration_of(finetuner: Finetuner, device: torch.device) -> Iteration:
    """The finetuner's iteration, one micro-batch each, on `device`."""
    finetuner.to(device)
    finetuner.perceptual.to(device)

    def run(batch: Batch) -> None:
        with finetuner.kernels:
            finetuner.run_iteration(batch)

    return run


def open_batches(config: Config, size: int, notes: list[str]) -> Iterator[Batch]:
    """Endless batches of the configured data, or one of random images again and again."""
    if not config.data.sources:
        notes.append("random images: no data.sources given")
        return _random_batches(config, size)
    config = replace(config, global_batch=size)
    try:
        dataset = PositionDataset(*open_data(config, notes.append), config)
    except (MissingInputError, UsageError) as error:
        notes.append(f"random images: {str(error).splitlines()[0]}")
        return _random_batches(config, size)
    # The first images of a run, as its only process.
    sampler = IterationSampler(0, 10**9, 0, size, 0, 1)
    return iter(loader(dataset, sampler, config.data.workers, machine.on_cuda(config.compute)))


def _random_batches(config: Config, size: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(config.seed)
    crop, side = config.data.crop, cost.latent_side(config)
    images = torch.randint(256, (size, 3, crop, crop), dtype=torch.uint8, generator=generator)
    noise = torch.randn(2, size, config.model.embed_dim, side, side, generator=generator)
    while True:
        yield Batch(images, noise, ["random"] * size, [])


def batch_size(config: Config, device: torch.device) -> int:
    """Images per micro-batch: as training would, but one on a CPU unless it is given."""
    if config.compute.per_device_batch is None and device.type == "cpu":
        return 1
    return config.compute.per_device_batch or micro_batch(config, 1)


# --- measuring ------------------------------------------------------------------------------


def measure(
    run: Iteration, batches: Iterator[Batch], device: torch.device, iterations: int
) -> tuple[Timings, dict[str, float]]:
    """Times iterations; also returns the milliseconds of each phase, medians over them."""
    timings, clock = Timings(run), Clock(device)
    milliseconds: dict[str, list[float]] = defaultdict(list)
    for _ in range(iterations):
        clock.start()
        batch = next(batches).to(device)
        clock("data")
        with timed_by(clock):
            timings.add(batch, device)
        for name, value in clock.read().items():
            milliseconds[name].append(value)
    phases = (name for name in PHASES if name in milliseconds)
    return timings, {name: statistics.median(milliseconds[name]) for name in phases}


def timed(run: Iteration, batch: Batch, device: torch.device) -> float:
    """Seconds of one iteration."""
    synchronize(device)
    began = time.perf_counter()
    run(batch)
    synchronize(device)
    return time.perf_counter() - began


class Clock:
    """Called at the end of each phase; CUDA's phases are timed by events, without waiting."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[str, Any]] = []

    def start(self) -> None:
        """Forgets all marks and begins."""
        self.marks = []
        self("start")

    def __call__(self, phase: str) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((phase, event))
        else:
            self.marks.append((phase, time.perf_counter()))

    def read(self) -> dict[str, float]:
        """Milliseconds of each phase since `start`; waits for the device."""
        if self.cuda:
            torch.cuda.synchronize()
        totals: dict[str, float] = defaultdict(float)
        for (_, before), (phase, mark) in pairwise(self.marks):
            totals[phase] += before.elapsed_time(mark) if self.cuda else 1e3 * (mark - before)
        return totals


def count_flops(run: Iteration, batch: Batch) -> int:
    """Operations of one iteration, compiled parts run eagerly."""
    with torch.compiler.set_stance("force_eager"), cost.CostCounter() as counter:
        run(batch)
        counter("all")
    return sum(counter.phases["all"].flops.values())


def matmul_rate(device: torch.device, kind: torch.dtype, repeats: int = 5) -> float:
    """FLOP/s of a square matrix product, best of `repeats` runs; TF32 stays off."""
    # Large enough to be bound by arithmetic, small enough to take a second.
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
    seconds = []
    for _ in range(repeats + 1):
        synchronize(device)
        began = time.perf_counter()
        a @ b
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    # A multiplication and an addition for each of side^3 products; the first run warms up.
    return 2 * side**3 / min(seconds[1:])


def _matmul_rates(precision: str, device: torch.device) -> dict[str, float]:
    """Precision -> FLOP/s; that of TF32 only where the run uses it."""
    rates = {name: matmul_rate(device, kind) for name, kind in PRECISIONS.items()}
    if precision == "tf32":
        with Kernels("tf32"):
            rates["tf32"] = matmul_rate(device, torch.float32)
    return rates


# torch's warning of each. In the same mode it also warns once that the mode is a prototype.
HOST_WAIT = "called a synchronizing CUDA operation"


def synchronizations(run: Iteration, batch: Batch, device: torch.device) -> int | None:
    """How often the host waits for the device in an iteration, as torch reports it; CUDA only."""
    if device.type != "cuda":
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum(HOST_WAIT in str(item.message) for item in caught)


def graph_breaks() -> int:
    """Places where torch.compile fell back to Python."""
    from torch._dynamo.utils import counters

    return sum(counters["graph_break"].values())


# --- the machine ----------------------------------------------------------------------------


def find_device(config: Config) -> torch.device:
    """The device that training would take; UsageError if CUDA is asked for and not there."""
    if config.compute.accelerator == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "compute.accelerator=cuda, but torch sees no GPU here; fix the driver, or give "
            "compute.accelerator=cpu"
        )
    return torch.device("cuda" if machine.on_cuda(config.compute) else "cpu")


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} of {counted(os.cpu_count() or 1, 'thread', 's')}"


def synchronize(device: torch.device) -> None:
    """Waits until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def memory_in_use(device: torch.device) -> int:
    """Bytes on the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated()
    return _status_bytes("VmRSS")


def reset_peak(device: torch.device) -> None:
    """Begins a new peak; on a CPU only where Linux allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """The most bytes since `reset_peak`."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else _status_bytes("VmHWM")


def room_bytes(device: torch.device) -> int:
    """Bytes for tensors on a GPU, whatever is there now, or still left on this machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory - cost.HEADROOM_BYTES
    return machine.available_memory()


def _status_bytes(key: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def as_it_runs(config: Config) -> Config:
    """The configuration with `compute.compile` as this machine settles it."""
    return replace(
        config, compute=replace(config.compute, compile=machine.compiles(config.compute))
    )


def largest_batch(config: Config, device: torch.device, size: int) -> int:
    """The largest micro-batch that fits: tried on CUDA, where it runs uncompiled, else computed.

    Each try would be compiled for minutes.
    """
    if device.type == "cpu" or machine.compiles(config.compute):
        return cost.batch_that_fits(as_it_runs(config), room_bytes(device))
    one_pass = replace(config.compute, compile=False, per_device_batch=2**30)  # whatever is tried
    eager = replace(config, compute=one_pass)
    gc.collect()
    torch.cuda.empty_cache()
    run = iteration_of(build_finetuner(eager, []), device)

    def fits(number: int) -> bool:
        try:
            run(next(_random_batches(config, number)).to(device))
            return True
        except RuntimeError as error:
            if not machine.is_out_of_memory(error):
                raise
            return False
        finally:
            torch.cuda.empty_cache()

    return cost.largest_that_fits(fits, size, most=4096)  # a small network never fills a GPU
