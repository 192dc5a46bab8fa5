"""The tables for choosing of docs/performance.md: by card; by batch, crop, precision and levels.

    python tests/benchmarks/memory_table.py             # computed, for GPUs, both tables
    python tests/benchmarks/memory_table.py --measure   # this machine: takes minutes on a CPU

Measured rows are `kl-f8-train benchmark --json`, each in a process of its own.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import scaling_tables

from kl_f8_train import config
from kl_f8_train.check import cost, scaling
from kl_f8_train.output import markdown_table
from kl_f8_train.settings import Config

PATHS = ("run_dir=none", "init.weights=none", "data.sources=none", "data.shorter_side=null")
CARDS = tuple(gpu for gpu in scaling.GPUS if gpu.torch_name in ("A100", "H100", "RTX 4090"))
ALL = 192  # images of an iteration, all of them on one card: the most that it has to hold
LEVELS = range(5)  # compute.checkpoint_levels: none to all


def which_batch() -> str:
    """For each card the settings of ft_ema, memory and images/s; and the time of single_gpu."""
    head = ["GPU", "`compute.per_device_batch`", "`compute.checkpoint_levels`", "memory"]
    head += [f"images/s on {count}" for count in (1, 8)]
    head += ["single_gpu on 1"]
    return markdown_table(head, [_row(gpu) for gpu in scaling.GPUS])


def _row(gpu: scaling.Gpu) -> list[str]:
    batch, levels, memory = choose(gpu.memory_bytes)
    speeds = [predict("ft_ema", levels, gpu, count).images_per_second for count in (1, 8)]
    return [
        *(gpu.name, str(batch), str(levels), f"{memory / cost.GIB:.1f} GiB"),
        *(f"{speed:,.0f}" for speed in speeds),
        in_words(predict("single_gpu", levels, gpu, 1).days),
    ]


def choose(memory_bytes: float) -> tuple[int, int, float]:
    """ft_ema's micro-batch, levels checkpointed, bytes: 12 if it fits, with as few levels as do."""
    for batch, levels in product((12, 8, 6, 4, 3, 2, 1), LEVELS):
        needed = cost.peak_bytes(load("ft_ema", levels), batch, ALL)
        if needed + cost.HEADROOM_BYTES <= memory_bytes:
            return batch, levels, needed
    raise ValueError(f"not even one image fits {memory_bytes / cost.GIB:.1f} GiB")


def predict(name: str, levels: int, gpu: scaling.Gpu, count: int) -> scaling.Prediction:
    """A recipe on `count` GPUs, what the levels compute again included."""
    settings = load(name, levels)
    work = scaling_tables.published_workload(settings)
    return scaling.predict(work, scaling.seconds_per_image(work, gpu, count), count, gpu)


def load(name: str, levels: int) -> Config:
    """A shipped recipe with so many levels checkpointed."""
    settings = scaling_tables.load_published(name)
    return replace(settings, compute=replace(settings.compute, checkpoint_levels=levels))


def in_words(days: float) -> str:
    """In hours below a day."""
    return f"{days:.2g} d" if days >= 1 else f"{24 * days:.2g} h"


def computed(crop: int, precision: str, levels: int, batch: int) -> list[str]:
    """Memory, arithmetic and each card's images/s; a dash where it does not fit."""
    extra = ["compute.compile=true", f"global_batch={batch}", f"compute.per_device_batch={batch}"]
    settings = config.load(
        config.find_recipe("ft_ema"), [*PATHS, *extra, *overrides(crop, precision, levels)]
    )
    memory, work = cost.peak_bytes(settings, batch), scaling.workload(settings, 1)
    speeds = [
        f"{1 / scaling.seconds_per_image(work, gpu):,.0f}" if memory <= gpu.room_bytes else "-"
        for gpu in CARDS
    ]
    flops = cost.flops_per_image(settings)
    return [f"{memory / cost.GIB:.1f} GiB", f"{flops / 1e9:,.0f}", *speeds]


def measured(crop: int, precision: str, levels: int, batch: int) -> list[str]:
    """Memory measured and computed, images/s, and the share of this machine's matmul rate."""
    settings = [*overrides(crop, precision, levels), f"compute.per_device_batch={batch}"]
    command = [sys.executable, "-m", "kl_f8_train", "benchmark", "ft_ema", *settings]
    found = json.loads(
        subprocess.run(
            [*command, "--iterations", "3", "--json"], check=True, capture_output=True, text=True
        ).stdout
    )
    return [
        f"{found['peak_memory_bytes'] / cost.GIB:.2f} GiB",
        f"{found['computed_memory_bytes'] / cost.GIB:.2f} GiB",
        f"{found['images_per_second']:.3f}",
        f"{found['share_of_matmul']:.0%}",
    ]


def overrides(crop: int, precision: str, levels: int) -> list[str]:
    """The settings of a row."""
    return [f"data.crop={crop}", f"precision={precision}", f"compute.checkpoint_levels={levels}"]


def rows(measure: bool) -> Iterator[str]:
    """The lines of the long table."""
    head = ["batch", "crop", "precision", "levels checkpointed"]
    if measure:
        head += ["memory", "computed", "images/s", "of the matmul rate"]
        settings = product((64, 128), ("float32", "bfloat16"), (0, 4), (1, 4))
    else:
        head += ["memory", "GFLOP an image", *(f"{gpu.name}, images/s" for gpu in CARDS)]
        settings = product((256, 512), ("bfloat16", "float32"), (0, 4), (4, 12, 24))
    fill = measured if measure else computed
    yield from markdown_table(head, []).splitlines()
    for crop, precision, levels, batch in settings:
        cells = [str(batch), str(crop), precision, str(levels)]
        yield f"| {' | '.join([*cells, *fill(crop, precision, levels, batch)])} |"


def main() -> None:
    """Prints Markdown tables."""
    measure = "--measure" in sys.argv
    if not measure:
        print(which_batch(), end="\n\n")
    for line in rows(measure):
        print(line, flush=True)


if __name__ == "__main__":
    main()
