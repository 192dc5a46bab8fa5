"""How long a run takes to its first iteration, and how long it waits for data.

    python tests/benchmarks/start_up.py

`kl-f8-train train` on shards, with one loader: a tiny network, then the full-size one at 64 px, one
image an iteration. The wait is `data_wait_share` of metrics.csv, the median after five rows.
"""

import csv
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import runs
from test_full_size import FULL

TINY = ("stop_iteration=140", "data.workers=1")
LARGE = (
    *FULL,
    "global_batch=1",
    "data.workers=1",
    "stop_iteration=246823",
    "checkpoint.every=100",
)


def main() -> None:
    """Prints a line for each network."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs.make_shards(folder, size=72)
        runs.make_weights(folder / "model.ckpt")
        measure("tiny", folder, *TINY)
        runs.make_weights(
            folder / "model.ckpt", (1, 2, 4, 4), ch=128, num_res_blocks=2, z_channels=4, embed_dim=4
        )
        measure("full-size", folder, *LARGE)


def measure(network: str, folder: Path, *extra: str) -> None:
    """Runs it and prints its figures."""
    began = time.perf_counter()
    process = runs.start(folder, network, *extra)
    assert process.stdout is not None
    first = 0.0
    for line in process.stdout:
        if line.startswith("iteration ") and " of " in line and not first:
            first = time.perf_counter() - began
    assert process.wait() == 0
    with (folder / network / "metrics.csv").open() as file:
        waits = [float(row["data_wait_share"]) for row in csv.DictReader(file)][5:]
    print(
        f"{network}: first iteration after {first:.1f} s; waits for data "
        f"{statistics.median(waits):.2%} of the time",
        flush=True,
    )


if __name__ == "__main__":
    main()
