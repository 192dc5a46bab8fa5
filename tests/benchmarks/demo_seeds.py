"""Does the demo show its pattern whatever the seed, the instruction set and the threads?

    python tests/benchmarks/demo_seeds.py RUN_DIR [--seeds 0 1 2] [--capabilities native default]
        [--threads 1 2]

Runs `kl-f8-train demo` once for each combination, for docs/results.md, and prints a row each: mean
differences of PSNR and ST-LPIPS on the demo's held-out photographs and their 95 % intervals.
`default` is ATEN_CPU_CAPABILITY=default, torch's kernels without AVX; `native`, the machine's own.
A run that is there is not run again. Exit code 1 if one does not show the pattern.
"""

import argparse
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

from kl_f8_train.score import compare

COLUMNS = (
    ("psnr", "base", "ft-EMA"),
    ("psnr", "ft-EMA", "ft-MSE"),
    ("st_lpips", "base", "ft-EMA"),
    ("psnr", "8 x 8 means", "ft-MSE"),
)


def main(root: Path, seeds: list[int], capabilities: list[str], threads: list[int]) -> int:
    """Runs what has not been run and prints the table; 0 if every row shows the pattern."""
    titles = [f"{metric}: {b} against {a}" for metric, a, b in COLUMNS]
    print("| seed | instructions | threads | minutes | " + " | ".join(titles) + " |")
    print("|---" * (4 + len(COLUMNS)) + "|")
    shown = True
    for capability, count, seed in itertools.product(capabilities, threads, seeds):
        folder = root / f"seed{seed}-{capability}-{count}"
        if not (folder / "table.json").is_file():
            run(folder, seed, capability, count)
        minutes = (folder / "minutes").read_text(encoding="utf-8")
        found = [cell(folder, *column) for column in COLUMNS]
        shown &= all(better for _, better in found)
        cells = " | ".join(text for text, _ in found)
        print(f"| {seed} | {capability} | {count} | {minutes} | {cells} |", flush=True)
    return 0 if shown else 1


def run(folder: Path, seed: int, capability: str, threads: int) -> None:
    """One demo in a process of its own; its screen goes to a log beside its pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    environment.pop("ATEN_CPU_CAPABILITY", None)
    if capability != "native":
        environment["ATEN_CPU_CAPABILITY"] = capability
    command = [
        sys.executable,
        "-m",
        "kl_f8_train",
        "demo",
        "--run-dir",
        str(folder),
        f"seed={seed}",
    ]
    began = time.perf_counter()
    with (folder / "demo.log").open("w", encoding="utf-8") as log:
        subprocess.run(
            [*command, f"seed={seed}"], check=True, stdout=log, stderr=log, env=environment
        )
    minutes = (time.perf_counter() - began) / 60
    (folder / "minutes").write_text(f"{minutes:.1f}", encoding="utf-8")


def cell(folder: Path, metric: str, a: str, b: str) -> tuple[str, bool]:
    """B minus A with its interval, and whether B is better."""
    rows = compare.read_image_scores(folder / "evaluation" / "per_image.csv")
    found = compare.verdict(metric, a, b, *compare.paired(compare.per_image(rows, metric), a, b))
    digits = 2 if metric == "psnr" else 4
    ends = f"[{found.low:+.{digits}f}, {found.high:+.{digits}f}]"
    return f"{found.difference:+.{digits}f} {ends}", found.verdict == "better"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("root", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--capabilities", nargs="+", default=["native", "default"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    sys.exit(main(options.root, options.seeds, options.capabilities, options.threads))
