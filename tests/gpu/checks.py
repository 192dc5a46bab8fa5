"""What the checks on GPUs stand on: where they run, and iterations of random networks."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pretended
import pytest
import torch
from torch import Tensor

from kl_f8_train import config as configs
from kl_f8_train.check import benchmark, cost
from kl_f8_train.settings import Config

REHEARSING = os.environ.get("ACCEPTANCE") == "cpu"
PRETENDED = pretended.is_here()
COUNTED = [pytest.mark.gpu]  # on GPUs, pretended ones too
REHEARSED = [] if REHEARSING else COUNTED  # on CPUs, too, in an acceptance run there
# A check whose verdict needs values or times is made everywhere, to its end; where they mean
# nothing, its verdict is left out (conftest.py).
OF_VALUES = [*REHEARSED, pytest.mark.of_values]
OF_TIMES = [*REHEARSED, pytest.mark.of_times]

EAGER = "compute.compile=false"
SMALL = ("model.ch=32", "data.crop=64", "compute.per_device_batch=2")
TINY = (*SMALL[:1], "model.ch_mult=[1,1]", "model.num_res_blocks=1", "data.crop=32", *SMALL[2:])
SIZE = TINY if REHEARSING else ()  # the recipe's own on GPUs


def recipe(name: str, device: torch.device, *overrides: str) -> Config:
    """A shipped recipe for the device, without inputs; what it lacks is random."""
    given = (f"compute.accelerator={device.type}", *overrides)
    return configs.load_without_inputs(configs.find_recipe(name), list(given))


class Ready:
    """A finetuner on a device, its iteration as training runs it, and a batch.

    `dtype` is that of the weights.
    """

    def __init__(
        self,
        config: Config,
        device: torch.device,
        images: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.size = images or benchmark.batch_size(config, device)
        self.finetuner = benchmark.build_finetuner(config, []).to(dtype)
        self.finetuner.perceptual.to(dtype)
        self.run = benchmark.iteration_of(self.finetuner, device)
        self.batch = next(benchmark.open_batches(config, self.size, [])).to(device)

    def iterate(self, times: int = 1) -> None:
        """Runs iterations; does not wait for the last one."""
        for _ in range(times):
            self.run(self.batch)


@contextmanager
def ready(*given: object, **options: object) -> Iterator[Ready]:
    """The same; its memory is given back in the end."""
    made = Ready(*given, **options)  # type: ignore[arg-type]
    try:
        yield made
    finally:
        del made
        give_back_memory()


def skip_if_too_large(config: Config, images: int) -> None:
    """Skips a test whose micro-batch does not fit on the GPU, by computation."""
    if REHEARSING:
        return
    computed, room = cost.peak_bytes(config, images), torch.cuda.mem_get_info()[0]
    if computed + cost.HEADROOM_BYTES > room:
        pytest.skip(f"takes {computed / cost.GIB:.1f} GiB, computed; free {room / cost.GIB:.1f}")


def give_back_memory() -> None:
    """Collects what is unreachable, and empties CUDA's cache."""
    gc.collect()
    torch.cuda.empty_cache()


def gradients(
    config: Config, device: torch.device, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Of one iteration, by network: one long vector each, in float64 on the CPU."""
    found: dict[str, list[Tensor]] = {}
    with ready(config, device, dtype=dtype) as made:
        made.iterate()
        for name, parameter in made.finetuner.named_parameters():
            if parameter.grad is not None:
                values = parameter.grad.detach().double().cpu().flatten()
                found.setdefault(name.split(".")[0], []).append(values)
    return {network: torch.cat(values) for network, values in found.items()}


def difference(a: Tensor, b: Tensor) -> float:
    """Norm of the difference, relative to a's norm."""
    return float((a - b).norm() / a.norm())


def cosine(a: Tensor, b: Tensor) -> float:
    """Of the angle between two vectors."""
    return float(a @ b / (a.norm() * b.norm()))
