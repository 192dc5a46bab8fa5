"""How long a checkpoint of the full-size network stops training, and how long it is written.

    python tests/benchmarks/checkpoint_pause.py [DIRECTORY] [--saves 5]

DIRECTORY is where run directories will lie (default: a temporary directory). Weights are random.

CPU seconds are those of the one thread that is named: other programs on the machine lengthen the
clock's seconds, hardly these. With priority over them, on Linux:

    sh -c 'echo -15 > /proc/self/autogroup; python tests/benchmarks/checkpoint_pause.py'    # root
"""

import argparse
import contextlib
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from kl_f8_train import config
from kl_f8_train.core.discriminator import Discriminator
from kl_f8_train.core.hashes import frozen_sha256
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
        parts = Parts()
        parts.follow("waits for the save before", saving, "_look")
        parts.follow("copies", saving.memory, "copy")
        parts.follow("SHA-256 of the frozen part, in the thread", checkpoint, "frozen_sha256")
        parts.follow("looks for what is not finite, in the thread", checkpoint, "_check_finite")
        parts.follow("SHA-256 of all tensors, in the thread", checkpoint, "content_sha256")
        parts.follow("writes the file, in the thread", weight_file, "write_plain")
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
        described = parts.describe()
        parts.close()
        floor = plain_copy(saving.memory.block)
        with timed(before):
            state = checkpoint.snapshot(finetuner, optimizers, frozen, checkpoint.HostMemory())
            checkpoint.write(state, path)
        with timed(reading):
            checkpoint.check_content(weight_file.read(path))
    pause = statistics.median(pauses)
    print(f"checkpoint of {size / 1e9:.2f} GB: a pause of {pause:.2f} s, median of {len(pauses)}")
    print(f"  all: {', '.join(f'{p:.2f}' for p in pauses)} s")
    busy = statistics.median(computing)
    each = ", ".join(f"{seconds:.2f}" for seconds in computing)
    print(f"  of it CPU time, which others hardly lengthen: {busy:.2f} s; all: {each} s")
    print("  parts, by the clock and in CPU time of their thread, medians:")
    print("\n".join(f"    {line}" for line in described))
    print(
        "  its floor, one copy of so many bytes to memory that is there: "
        f"{floor[0]:.2f} s, CPU time {floor[1]:.2f} s ({size / 1e9 / floor[1]:.1f} GB/s)"
    )
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


class Parts:
    """Times functions where they stand, by the clock and in CPU time of the thread that calls."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[tuple[float, float]]] = defaultdict(list)
        self.patches = contextlib.ExitStack()

    def follow(self, part: str, owner: Any, name: str) -> None:
        """Times `owner.name` as `part` from now on."""
        function = getattr(owner, name)

        def measured(*args: Any, **kwargs: Any) -> Any:
            began, cpu_began = time.perf_counter(), time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                took = time.perf_counter() - began, time.thread_time() - cpu_began
                self.seconds[part].append(took)

        self.patches.enter_context(patch.object(owner, name, measured))

    def describe(self) -> list[str]:
        """A line for each."""
        medians = {
            part: [statistics.median(each) for each in zip(*seconds, strict=True)]
            for part, seconds in self.seconds.items()
        }
        return [f"{part}: {m[0]:.2f} s, CPU time {m[1]:.2f} s" for part, m in medians.items()]

    def close(self) -> None:
        """Times nothing any more."""
        self.patches.close()


def plain_copy(block: torch.Tensor) -> tuple[float, float]:
    """Seconds and CPU seconds of one copy of memory; the best of five."""
    memory = checkpoint.HostMemory()
    memory.reserve(block.numel(), pinned=False)
    times = []
    for _ in range(5):
        began, cpu_began = time.perf_counter(), time.thread_time()
        memory.block.copy_(block)
        times.append((time.perf_counter() - began, time.thread_time() - cpu_began))
    return min(times, key=lambda seconds: seconds[1])


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
