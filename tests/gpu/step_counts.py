"""What an iteration does on the pretended GPU: kernels, memory, host time and waits, graphs.

    python tests/gpu/pretended.py python tests/gpu/step_counts.py ft_ema compute.compile=false

Prints one JSON object on stdout. Of the host's milliseconds it gives the least and the median.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import pretended
import torch

from kl_f8_train import config as configs
from kl_f8_train.check import benchmark, cost
from kl_f8_train.core import machine
from kl_f8_train.core.batch import Batch

WARM_UP, TIMED = 2, 40  # iterations
LENIENT = "max_bad_updates=1000"


def count(recipe: str, overrides: list[str]) -> dict[str, object]:
    """Counts the third iteration of one micro-batch, with random weights and images."""
    config = configs.load_without_inputs(configs.find_recipe(recipe), overrides)
    device = torch.device("cuda:0")
    size = benchmark.batch_size(config, device)
    finetuner = benchmark.build_finetuner(config, [])
    run = benchmark.iteration_of(finetuner, device)
    batch = next(benchmark.open_batches(config, size, [])).to(device)
    for _ in range(WARM_UP):
        run(batch)
    graphs = machine.compiled_graphs()
    benchmark.reset_peak(device)
    before = pretended.counts()
    with bytes_of_triton() as gigabytes:
        run(batch)
    done = pretended.counts() - before
    seconds = sorted(host_seconds(run, batch) for _ in range(TIMED))
    return {
        "kernels": pretended.kernels(done),
        **done,
        "triton gigabytes": round(sum(gigabytes), 2),
        "peak bytes": benchmark.peak_memory(device),
        "computed bytes": cost.peak_bytes(config, size),
        "host milliseconds": [round(1e3 * t, 1) for t in (seconds[0], seconds[TIMED // 2])],
        "host waits": benchmark.synchronizations(run, batch, device),
        "graphs": graphs,
        "graph breaks": benchmark.graph_breaks(),
        "recompiles": machine.compiled_graphs() - graphs,
    }


@contextmanager
def bytes_of_triton() -> Iterator[list[float]]:
    """Gigabytes that each launched kernel reads and writes, as inductor counts them."""
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    run, found = CachingAutotuner.run, []

    def counted(kernel: CachingAutotuner, *args: Any, **kwargs: Any) -> Any:
        found.append(kernel.inductor_meta.get("kernel_num_gb") or 0.0)
        return run(kernel, *args, **kwargs)

    CachingAutotuner.run = counted  # type: ignore[method-assign]
    try:
        yield found
    finally:
        CachingAutotuner.run = run  # type: ignore[method-assign]


def host_seconds(run: benchmark.Iteration, batch: Batch) -> float:
    """CPU time of an iteration whose kernels do nothing."""
    began = time.process_time()
    run(batch)
    return time.process_time() - began


def count_apart(folder: Path, recipe: str, *overrides: str) -> dict[str, object]:
    """The same in a process of its own, from one that has no GPU; the library is in `folder`."""
    environment = pretended.environment(folder)
    command = [sys.executable, __file__, recipe, *overrides]
    ended = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def main() -> None:
    """Counts here."""
    recipe, *overrides = sys.argv[1:]
    with redirect_stdout(sys.stderr):  # values are meaningless, so updates may be left out
        counted = count(recipe, [LENIENT, *overrides])
    print(json.dumps(counted, indent=1), flush=True)
    os._exit(0)  # torch's threads would end with an error where kernels take no time


if __name__ == "__main__":
    main()
