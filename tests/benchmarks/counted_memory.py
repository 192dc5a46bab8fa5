"""Counts the memory of iterations on a GPU, for tests/counted_memory.csv.

    python tests/benchmarks/counted_memory.py [--import MODULE] counted.csv
    python tests/benchmarks/counted_memory.py more.csv ft_ema --compiled 1 --batches 12x12

A row has the peak of torch's allocator in a third iteration, and its phase. Compiled, inductor
makes its graphs and allocates their buffers, but its Triton kernels are neither compiled nor
launched: values are meaningless, sizes true. The first row of a batch takes a minute or two of a
CPU, most others seconds. Rows that FILE holds already are kept, and not counted again. MODULE is
imported first, where it stands in for a GPU.
"""

import argparse
import csv
import gc
import importlib
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch

from kl_f8_train import config
from kl_f8_train.check import benchmark
from kl_f8_train.core.batch import timed_by
from kl_f8_train.settings import Config

RECIPES = ("ft_ema", "ft_mse", "flux_vae")
LEVELS = (0, 2, 4)
BATCHES = ("1x1", "4x4", "12x12", "24x24", "4x24", "12x48")  # images of a micro-batch x in all
HEAD = ("recipe", "compiled", "levels", "micro_batch", "images", "bytes", "phase")
PATHS = ("run_dir=none", "init.weights=none", "data.sources=none")


def settings(recipe: str, compiled: bool, levels: int, micro: int, images: int) -> Config:
    """A shipped recipe with these switches."""
    switches = (
        f"compute.compile={str(compiled).lower()}",
        f"compute.checkpoint_levels={levels}",
        f"compute.per_device_batch={micro}",
        f"global_batch={images}",
    )
    return config.load(config.find_recipe(recipe), [*PATHS, *switches])


def peaks(setup: Config, images: int) -> dict[str, int]:
    """The most bytes that torch had allocated in each phase of an iteration."""
    found: dict[str, int] = {}

    def ended(phase: str) -> None:
        found[phase] = max(found.get(phase, 0), torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats()

    run = benchmark.iteration_of(benchmark.build_finetuner(setup, []), torch.device("cuda"))
    batch = next(benchmark._random_batches(setup, images)).to(torch.device("cuda"))
    for _ in range(2):
        run(batch)
    torch.cuda.reset_peak_memory_stats()
    with timed_by(ended):
        run(batch)
    ended("rest")
    return found


class NoKernel:
    """In the place of a Triton kernel."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def leave_out_kernels() -> None:
    """Makes inductor compile no Triton kernel, and launch none."""
    from torch._inductor import async_compile

    setattr(async_compile.AsyncCompile, "triton", lambda *args, **kwargs: NoKernel())  # noqa: B010


def rows(args: argparse.Namespace, there: set[tuple[str, ...]]) -> Iterator[tuple[Any, ...]]:
    """One for each combination that is not there, as they are counted."""
    combinations = product(args.batches, args.compiled, args.recipes, args.levels)
    for batch, compiled, recipe, levels in combinations:
        micro, images = map(int, batch.split("x"))
        if tuple(map(str, (recipe, compiled, levels, micro, images))) in there:
            continue
        gc.collect()
        setup = settings(recipe, bool(compiled), levels, micro, images)
        found = peaks(setup, images)
        phase = max(found, key=lambda name: found[name])
        yield recipe, compiled, levels, micro, images, found[phase], phase


def main() -> None:
    """Writes a table of comma-separated values, row by row, to the end of a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    parser.add_argument("--import", dest="module")
    parser.add_argument("--compiled", type=int, nargs="*", default=(0, 1))
    parser.add_argument("--levels", type=int, nargs="*", default=LEVELS)
    parser.add_argument("--batches", nargs="*", default=BATCHES)
    args = parser.parse_args()
    if args.module:
        importlib.import_module(args.module)
    leave_out_kernels()
    with args.file.open("a+", newline="", encoding="utf-8") as file:
        file.seek(0)
        there = {tuple(row[:5]) for row in csv.reader(file)}
        table = csv.writer(file, lineterminator="\n")
        if not there:
            table.writerow(HEAD)
        for row in rows(args, there):
            table.writerow(row)
            file.flush()


if __name__ == "__main__":
    main()
