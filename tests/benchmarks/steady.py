"""Whether time and memory stay flat: python tests/benchmarks/steady.py [ITERATIONS].

A tiny network on random images, the adversarial recipe. CPU time and resident memory of each tenth
of the run.
"""

import sys
import time

import torch

from kl_f8_train import config
from kl_f8_train.check import benchmark

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


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(int, sys.argv[1:]))
