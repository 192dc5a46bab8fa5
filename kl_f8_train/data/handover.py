"""How a batch travels from a loader process to its run, within the machine's limits.

torch hands tensors over in shared memory, and pickles them in a thread: what fails there (a full
/dev/shm, no file descriptor left, no place for a socket) is printed, the batch is dropped, and the
run waits for it forever. Here a loader pickles its batch itself. If that fails, this and all later
batches go through the loader's pipe, which needs none of these things and is somewhat slower.
"""

import contextlib
import pickle
import resource
import shutil
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kl_f8_train.core.batch import Batch
from kl_f8_train.output import say
from kl_f8_train.settings import Config
from kl_f8_train.units import counted, memory

SHARED_MEMORY = Path("/dev/shm")
PREFETCH = 2  # batches that each loader prepares ahead
OPEN_FILES = 65_536  # as many as a run ever needs
FEW_FILES = 256  # with fewer, batches do not hand descriptors over


class Handover:
    """Of one loader process; `by_pipe` once shared memory has failed it."""

    def __init__(self) -> None:
        self.by_pipe = False

    def __call__(self, batch: Batch) -> "Parcel":
        """The batch, pickled as far as it can fail."""
        if not self.by_pipe:
            try:
                return Parcel(batch, bytes(ForkingPickler.dumps(batch)))
            except (OSError, RuntimeError) as error:
                self.by_pipe = True
                say(f"note: {str(error).splitlines()[0]}; this loader's batches go through a pipe")
        return Parcel(batch, None)


class Parcel:
    """A batch on its way: it arrives as the batch itself."""

    def __init__(self, batch: Batch, shared: bytes | None) -> None:
        self.batch, self.shared = batch, shared

    def __reduce__(self) -> tuple[Callable[..., Batch], tuple[Any, ...]]:
        if self.shared is not None:
            return pickle.loads, (self.shared,)  # in the main process: maps the shared memory
        # numpy's arrays are pickled by value, torch's tensors by a handle of shared memory.
        b = self.batch
        return _unpack, (b.images.numpy(), b.noise.numpy(), b.keys, b.skipped, b.profiles)


def _unpack(images: np.ndarray, noise: np.ndarray, *names: list[str]) -> Batch:
    return Batch(torch.from_numpy(images), torch.from_numpy(noise), *names)


def raise_open_files() -> int:
    """Raises the limit of open files as far as is allowed, and returns it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return OPEN_FILES if soft == resource.RLIM_INFINITY else soft


def batch_bytes(config: Config, images: int) -> int:
    """Bytes of a batch of that many images, with their noise."""
    latent = config.data.crop // config.model.downsampling
    draws = 1 + config.second_forward + (config.latents.noise > 0)
    noise = 4 * draws * config.model.embed_dim * latent**2
    return images * (3 * config.data.crop**2 + noise)  # uint8 pixels, float32 noise


def shared_memory_note(config: Config, images: int, processes: int) -> str:
    """What to say if the batches under way do not fit into /dev/shm; empty if they do.

    `images` of each of the `processes` on this machine in every iteration.
    """
    free = 0
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(SHARED_MEMORY).free
    loaders = config.data.workers * processes
    # What loaders hold ready, and one batch that each process works on.
    needed = batch_bytes(config, images) * (PREFETCH * loaders + processes)
    if not loaders or needed <= free:
        return ""
    wanted = -(-needed * 5 // 4 // 2**30)  # GiB, with a quarter to spare
    return (
        f"{SHARED_MEMORY} has {memory(free)} free, but the batches of "
        f"{counted(loaders, 'loader', 's')} take up to {memory(needed)}: those that do not fit go "
        f"through pipes, which is slower. In Docker give --shm-size={wanted}g or --ipc=host (in "
        "Kubernetes an emptyDir of medium Memory there), or lower data.workers"
    )
