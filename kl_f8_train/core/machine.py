"""The machine's switches, `compute.*`, on the networks: layout, recomputation, compilation.

None changes what is computed but for rounding, and none changes a state dict's keys. Also here:
which of them to change when memory or the compiler fails.
"""

import errno
import os
import shutil
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kl_f8_train.core.model import AutoencoderKL, NormSwish, UpLevel, Upsample
from kl_f8_train.errors import RunFailedError, UsageError
from kl_f8_train.files import check_writable
from kl_f8_train.settings import Compute
from kl_f8_train.units import written

Compiled = Callable[[Callable[..., Any]], Callable[..., Any]]  # compiles a function
COMPILE_CACHE = "TORCHINDUCTOR_CACHE_DIR"  # torch's name for the folder of compiled kernels
NORM_KEEPS_NHWC = (2, 15)  # torch's GroupNorm on CUDA; before, its output was NCHW
GRAPHS_PER_CLASS = 64  # four levels, with and without gradients, of a few networks in a process
# Out-of-memory messages for which torch has no exception class: CPU allocator, CUDA, cuDNN, cuBLAS.
OUT_OF_MEMORY = (
    "DefaultCPUAllocator",
    "out of memory",
    "unable to find an engine",
    "Unable to find a valid cuDNN algorithm",
    "STATUS_ALLOC_FAILED",
    "Cannot allocate memory",
    "can't allocate memory",
)
MORE_MEMORY = "lower data.workers, or give the job more memory"
MORE_SHARED = (
    "shared memory is full: give Docker --shm-size=8g or --ipc=host, or lower data.workers"
)
MORE_FILES = "the limit of open files: raise it (`ulimit -n 4096`), or lower data.workers"
MORE_PROCESSES = "the limit of processes: raise it (`ulimit -u`), or lower data.workers"
LIMITS = {  # what a failure's message holds -> what helps
    "killed by signal: Killed": f"most likely for memory: {MORE_MEMORY}",
    "exited unexpectedly": f"most likely for memory: {MORE_MEMORY}",
    "killed by signal: Bus error": MORE_SHARED,
    "shared memory": MORE_SHARED,
    "open files": MORE_FILES,
    "ancdata": MORE_FILES,
    "start new thread": MORE_PROCESSES,
    "Resource temporarily unavailable": MORE_PROCESSES,
    "temporary directory": "name a directory that can be written: TMPDIR=/some/where",
    "AF_UNIX path too long": "give TMPDIR a shorter name, such as TMPDIR=/tmp",
}


def apply(
    config: Compute,
    autoencoder: AutoencoderKL,
    discriminator: nn.Module | None,
    perceptual: nn.Module,
) -> None:
    """Sets the networks' memory layout and how the decoder runs.

    The discriminator's and the perceptual network's layouts are set too.
    """
    for network in (autoencoder, discriminator, perceptual):
        if network is not None and channels_last(config):
            network.to(memory_format=torch.channels_last)
    levels = [part for part in autoencoder.modules() if isinstance(part, UpLevel)]
    for number, level in enumerate(levels):  # from full resolution down
        level.recompute = number < config.checkpoint_levels
    for part in autoencoder.modules():
        if isinstance(part, Upsample):
            part.subpixel = config.subpixel_upsample
        elif isinstance(part, NormSwish):
            part.lean = config.lean_norm


def channels_last(config: Compute) -> bool:
    """Whether networks and images lie as NHWC: as set, or on CUDA (a CPU is slower with it).

    On CUDA only where GroupNorm keeps that layout: torch's own did not before 2.15, and every
    convolution behind it would copy its input. The compiled lean norm keeps it with any torch.
    """
    if config.channels_last is not None:
        return config.channels_last
    kept = torch_version() >= NORM_KEEPS_NHWC or (config.lean_norm and compiles(config))
    return on_cuda(config) and kept


def torch_version() -> tuple[int, ...]:
    """Major and minor version of torch."""
    return tuple(int(part) for part in torch.__version__.split(".")[:2])


def compiles(config: Compute) -> bool:
    """Whether the networks are compiled."""
    return compilation(config)[0]


def compilation(config: Compute) -> tuple[bool, str]:
    """Whether to compile, and why: as set, or on CUDA if there are a C compiler and Python.h."""
    if config.compile is not None:
        return config.compile, f"compute.compile={written(config.compile)}"
    if not on_cuda(config):
        return False, "on a CPU, unless compute.compile=true"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return False, "no C compiler found: install gcc, or name one in CC"
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        return False, f"{header} is missing: install Python's headers, such as python3-dev"
    return True, "the default on a GPU"


def describe(config: Compute) -> str:
    """One line: whether the networks are compiled, and why; their layout in memory."""
    chosen, why = compilation(config)
    how = "compiled by torch.compile" if chosen else "not compiled"
    if channels_last(config):
        layout = "NHWC"
    elif on_cuda(config) and config.channels_last is None:
        layout = f"NCHW, as GroupNorm of torch {torch.__version__} does not keep NHWC"
    else:
        layout = "NCHW"
    return f"{how} ({why}); {layout} in memory"


def compile_cache() -> str:
    """Where compiled kernels are kept, and how to keep them longer, in words."""
    if folder := os.environ.get(COMPILE_CACHE):
        return f"kernels are kept in {folder}"
    return (
        "kernels are kept among the temporary files of this machine; "
        f"{COMPILE_CACHE}=FOLDER keeps them elsewhere"
    )


def check_compile_cache(config: Compute) -> None:
    """Raises UsageError if compiled kernels cannot be written where the variable says."""
    folder = os.environ.get(COMPILE_CACHE)
    if not folder or not compiles(config):
        return
    try:
        check_writable(Path(folder))
    except RunFailedError as error:
        raise UsageError(f"{COMPILE_CACHE}: {error}, or unset it") from error


def compiled_graphs() -> int:
    """Graphs that torch.compile has made so far in this process."""
    from torch._dynamo.utils import counters  # seconds to import

    return int(counters["stats"]["unique_graphs"])


def on_cuda(config: Compute) -> bool:
    """Whether networks will run on a GPU of this machine."""
    return config.accelerator != "cpu" and torch.cuda.is_available()


def available_memory() -> int:
    """Bytes that processes can still have: Linux's estimate, elsewhere all of the memory."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def compile_networks(
    autoencoder: AutoencoderKL, perceptual: nn.Module, backend: str = "inductor"
) -> Compiled:
    """Compiles encoder, decoder and perceptual network, each in place.

    The decoder in parts, without its last convolution: a compiled region computes all its gradients
    or none, and the adaptive weight needs the last layer's alone, twice. A part is a level, with
    the doubling before it and the norm behind it. Returns what compiles a function in the same way.
    """
    decoder = autoencoder.decoder
    compile_each([autoencoder.encoder, decoder.mid, *decoder.up, perceptual], backend)
    return partial(torch.compile, **_options(backend))


def compile_each(parts: Iterable[nn.Module], backend: str = "inductor") -> None:
    """Compiles each part by itself, in place, with room for many of one class."""
    # The decoder's levels are of one class, so they share one limit; beyond it they run eagerly.
    dynamo = torch._dynamo.config
    limit = "recompile_limit" if hasattr(dynamo, "recompile_limit") else "cache_size_limit"  # 2.6
    setattr(dynamo, limit, GRAPHS_PER_CLASS)
    # DDP's own splitting of graphs fails on recomputed levels in torch 2.6. Without it the hooks
    # that reduce gradients run after each part's backward pass, while the next part's is computed.
    dynamo.optimize_ddp = False
    for part in parts:
        part.compile(**_options(backend))


def _options(backend: str) -> dict[str, Any]:
    """Arguments of torch.compile, with how inductor fuses.

    Within its own limits on what a kernel may read and compute it writes the images between
    GroupNorm and swish to memory, and reads them again; and sums over rows join the kernel that
    writes an image only where its loops may be cut as theirs. Small kernels that do not depend on
    each other, mostly casts of weights and sums for biases, become one; a CPU has no such kernels.
    """
    fusion: dict[str, Any] = {
        "combo_kernels": torch.cuda.is_available(),
        "realize_reads_threshold": 64,
        "realize_acc_reads_threshold": 64,
        "realize_opcount_threshold": 1000,
        "triton.tiling_prevents_reduction_fusion": False,
    }
    options = fusion if backend == "inductor" else None
    return {"backend": backend, "dynamic": False, "options": options}


@contextmanager
def with_remedy() -> Iterator[None]:
    """Raises RunFailedError with the remedy for a machine's limit or the compiler's failure."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        remedy = _remedy_for(error)
        if remedy is None:
            raise
        raise RunFailedError(f"{str(error).splitlines()[0]}\n{remedy}") from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out; near its end cuDNN finds no kernel that fits, and says only that."""
    known = (torch.cuda.OutOfMemoryError, MemoryError)
    return isinstance(error, known) or any(text in str(error) for text in OUT_OF_MEMORY)


def _remedy_for(error: Exception) -> str | None:
    """What helps against a machine's limit or the compiler's failure; None for any other."""
    for sign, remedy in LIMITS.items():
        if sign in str(error):
            return remedy
    if isinstance(error, OSError) and error.errno == errno.ENOSPC and not error.filename:
        return (
            "a temporary file or shared memory is full: make room in the directory for temporary "
            "files (TMPDIR names another) and in /dev/shm (Docker: --shm-size)"
        )
    if is_out_of_memory(error):
        return (
            "out of memory: halve compute.per_device_batch (the global batch stays, by "
            "accumulation), or give compute.checkpoint_levels=4, or precision=bfloat16, or fewer "
            "data.workers if the machine's memory is short"
        )
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return "torch.compile failed: give compute.compile=false"
    if "does not have a deterministic implementation" in str(error):
        return (
            "compute.deterministic=true: this operation prevents it on this device; give "
            "compute.deterministic=false, or, where it is upsampling, compute.subpixel_upsample="
            "true, and where it is padding, loss.perceptual=lpips_vgg"
        )
    return None
