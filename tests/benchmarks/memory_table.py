"""The tables for choosing of docs/performance.md: batch, crop, precision, levels checkpointed.

    python tests/benchmarks/memory_table.py             # computed, for GPUs
    python tests/benchmarks/memory_table.py --measure   # this machine: takes minutes on a CPU

Measured rows are `kl-f8-train benchmark --json`, each in a process of its own.
"""

import json
import subprocess
import sys
from itertools import product

from kl_f8_train import config, cost, scaling

PATHS = ("run_dir=none", "init.weights=none", "data.sources=none", "data.shorter_side=null")
CARDS = tuple(gpu for gpu in scaling.GPUS if gpu.torch_name in ("A100", "H100", "RTX 4090"))


def computed(crop: int, precision: str, levels: int, batch: int) -> list[str]:
    """Memory, arithmetic and each card's images/s; a dash where it does not fit or is not known."""
    settings = config.load("configs/ft_ema.yaml", [*PATHS, *overrides(crop, precision, levels)])
    memory = cost.peak_bytes(settings, batch)
    flops = cost.flops_per_image(settings) + cost.recomputed_flops(settings)
    speeds = [
        f"{gpu.flops * scaling.SHARE / flops:,.0f}"
        if precision == "bfloat16" and memory + 2 * cost.GIB < gpu.memory_bytes
        else "-"
        for gpu in CARDS
    ]
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


def main() -> None:
    """Prints a Markdown table."""
    head = ["batch", "crop", "precision", "levels checkpointed"]
    if "--measure" in sys.argv:
        head += ["memory", "computed", "images/s", "of the matmul rate"]
        rows = product((64, 128), ("float32", "bfloat16"), (0, 4), (1, 4))
        fill = measured
    else:
        head += ["memory", "GFLOP an image", *(f"{gpu.name}, images/s" for gpu in CARDS)]
        rows = product((256, 512), ("bfloat16", "float32"), (0, 4), (4, 12, 24))
        fill = computed
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for crop, precision, levels, batch in rows:
        cells = [str(batch), str(crop), precision, str(levels)]
        print(f"| {' | '.join([*cells, *fill(crop, precision, levels, batch)])} |", flush=True)


if __name__ == "__main__":
    main()
