"""How long a checkpoint of the full-size network stops training, and how long it is written.

    python tests/benchmarks/checkpoint_pause.py [DIRECTORY] [--saves 5]

DIRECTORY is where run directories will lie (default: a temporary directory). Weights are random.
"""

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from kl_f8_train import config
from kl_f8_train.core.discriminator import Discriminator
from kl_f8_train.core.hashes import frozen_sha256, tensors_sha256
from kl_f8_train.core.model import AutoencoderKL
from kl_f8_train.core.step import Finetuner
from kl_f8_train.run.callback import Course
from kl_f8_train.run.saving import Checkpoints
from kl_f8_train.run_dir import list_checkpoints
from kl_f8_train.weights import checkpoint, weight_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", nargs="?", type=Path, default=None)
    parser.add_argument("--saves", type=int, default=5)
    args = parser.parse_args()
    recipe = config.load(
        config.find_recipe("ft_ema"),
        ["run_dir=run", "init.weights=model.ckpt", "data.sources=/data"],
    )
    finetuner = Finetuner(recipe, AutoencoderKL(), Discriminator(), nn.Identity())
    optimizers = finetuner.adams
    for optimizer in optimizers:  # one step, so that Adam has its moments
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.full_like(parameter, 1e-3)
        optimizer.step()
    frozen = frozen_sha256(finetuner.autoencoder.state_dict())

    alone: Any = SimpleNamespace(is_global_zero=True, optimizers=optimizers)
    with tempfile.TemporaryDirectory(dir=args.directory) as folder:
        keep = replace(recipe.checkpoint, every=1, keep_last=1)
        saving = Checkpoints(Path(folder), keep, frozen, Course())
        saving.on_train_start(alone, finetuner)
        saving.on_train_batch_start(alone, finetuner, None, 0)
        saving._look(wait=True)  # the thread has its memory, as after a minute of training
        pauses: list[float] = []
        computing: list[float] = []
        writing: list[float] = []
        gaps: list[float] = []
        plain: list[float] = []
        before: list[float] = []
        reading: list[float] = []
        for _ in range(args.saves):
            finetuner.run_state.iteration += 1
            with timed(pauses), timed(computing, time.thread_time):
                saving.on_train_batch_end(alone, finetuner)
            with timed(writing):
                gaps.append(longest_gap(saving.writing[-1]))
            path = list_checkpoints(Path(folder))[0]
            size = path.stat().st_size
            with timed(plain):
                (Path(folder) / "plain").write_bytes(path.read_bytes())
        with timed(before):
            checkpoint.save(finetuner, optimizers, Path(folder), frozen)
        with timed(reading):
            checkpoint.check_content(weight_file.read(path))
        parts = {
            "SHA-256 of the frozen part": lambda: frozen_sha256(finetuner.autoencoder.state_dict()),
            "SHA-256 of all tensors": lambda: tensors_sha256(weight_file.read(path).tensors),
        }
        for name, part in parts.items():
            seconds: list[float] = []
            with timed(seconds):
                part()
            print(f"  {name}: {seconds[0]:.2f} s")

    pause = statistics.median(pauses)
    print(f"checkpoint of {size / 1e9:.2f} GB: a pause of {pause:.2f} s, median of {len(pauses)}")
    print(f"  all: {', '.join(f'{p:.2f}' for p in pauses)} s")
    busy = statistics.median(computing)
    print(f"  of it computing, which others on this CPU do not lengthen: {busy:.2f} s")
    print(f"  checked and written while training goes on: {statistics.median(writing):.2f} s;")
    print(f"  the longest time for which it could not run: {max(gaps):.3f} s")
    print(f"  copied, checked and written while training waits: {before[0]:.2f} s")
    print(f"  read and write a plain copy, unflushed: {statistics.median(plain):.2f} s")
    print(f"  reading it back, with its check: {reading[0]:.2f} s")
    for every in (100, 1000):
        least = pause / (0.05 * every)
        print(f"checkpoint.every={every}: at most 5 % if an iteration takes {least:.3f} s or more")
        for iteration in (0.5, 1.0, 2.0):
            share = 100 * pause / (every * iteration)
            print(f"  {share:.2f} % at {iteration:g} s an iteration")


def longest_gap(writing: Future[None]) -> float:
    """The longest time for which this thread did not run until `writing` was done."""
    longest, last = 0.0, time.perf_counter()
    while not writing.done():
        time.sleep(0.001)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    return longest


@contextlib.contextmanager
def timed(into: list[float], clock: Callable[[], float] = time.perf_counter) -> Iterator[None]:
    began = clock()
    yield
    into.append(clock() - began)


if __name__ == "__main__":
    main()
