"""Whether time and memory stay flat: python tests/benchmarks/steady.py [ITERATIONS].

A tiny network on random images, the adversarial recipe. CPU time and resident memory of each tenth
of the run; then the seconds that `kl-f8-train train` takes to the first log line.
"""

import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import runs

from kl_f8_train import benchmark, config

TINY = ("model.ch_mult=1,1", "data.crop=32", "global_batch=1", "adversarial.n_layers=1")


def main(iterations: int = 10_000) -> None:
    """Prints a row for each tenth."""
    settings = config.load("configs/demo.yaml", [*TINY, "data.sources=none"])
    finetuner = benchmark.build_finetuner(settings, [])
    device = torch.device("cpu")
    run = benchmark.iteration_of(finetuner, device)
    batches = benchmark.open_batches(settings, 1, [])
    for _ in range(20):
        run(next(batches))
    tenth = iterations // 10
    for part in range(10):
        began = time.process_time()
        for _ in range(tenth):
            run(next(batches))
        milliseconds = 1e3 * (time.process_time() - began) / tenth
        memory = benchmark.memory_in_use(device) / 2**20
        print(f"{(part + 1) * tenth:7,}: {milliseconds:6.2f} ms, {memory:7.1f} MiB", flush=True)
    print(f"start to the first iteration: {start_up():.1f} s")


def start_up() -> float:
    """Seconds from the command to its first log line, for a tiny run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs.make_shards(folder)
        runs.make_weights(folder / "model.ckpt")
        began = time.perf_counter()
        process = runs.start(folder, "run", "stop_iteration=101")
        assert process.stdout is not None
        for line in process.stdout:
            if "iteration 101 of" in line:
                seconds = time.perf_counter() - began
        process.wait()
    return seconds


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(int, sys.argv[1:]))
