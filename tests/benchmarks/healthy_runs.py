"""Curves of good runs and of some that went wrong, for docs/healthy-run.md.

    python tests/benchmarks/healthy_runs.py RUN_DIR [PICTURE_DIR]

Finetunes kl_f8_mini, the small base that ships with the package, five times. Writes an SVG of each,
and prints what the tables hold and what `kl-f8-train status` says.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from kl_f8_train import config, demo, shipped
from kl_f8_train.files import write_text
from kl_f8_train.run import curves, status
from kl_f8_train.run.curves import Chart
from kl_f8_train.run.train import train
from kl_f8_train.run_dir import Row, read_rows
from kl_f8_train.settings import Config
from kl_f8_train.weights import weight_file

LENGTH = 150  # iterations of a run
COMMON = ("log.every=5", "log.pictures_every=25", "checkpoint.every=1000")


@dataclass(frozen=True)
class Case:
    """A run: its title, settings, and whether it begins with a new discriminator."""

    title: str
    overrides: tuple[str, ...] = ()
    new: bool = False


CASES = {
    "healthy": Case("Healthy: the base's own discriminator"),
    "new": Case("A new discriminator that has learned nothing yet", new=True),
    "warm": Case(
        "A new discriminator after its warm-up", ("adversarial.warmup_iterations=500",), True
    ),
    "won": Case("A discriminator that wins", ("adversarial.weight=0.005",)),
    "rate": Case("A learning rate far too high", ("optimizer.learning_rate=2e-3",)),
}
PANELS = (
    ("training loss, per pixel", ("reconstruction_loss", "pixel_loss"), True),
    ("held-out PSNR, dB", ("psnr_ema", "psnr_raw"), False),
    ("mean logits", ("logits_real", "logits_fake"), False),
    ("discriminator's loss", ("discriminator_loss",), False),
    ("adaptive weight", ("adaptive_weight",), True),
    ("norm of the decoder's gradient", ("decoder_gradient_norm",), True),
)
TABLE = (
    "logits_real",
    "logits_fake",
    "discriminator_loss",
    "adaptive_weight",
    "adaptive_weight_clamped",
    "reconstruction_loss",
    "psnr_ema",
    "psnr_raw",
)


def main(root: Path, pictures: Path = Path("docs/healthy-run")) -> None:
    """Runs what has not been run, draws all."""
    base, pruned = prepare(root)
    for name, case in CASES.items():
        run_dir = root / name
        train(
            recipe(
                root,
                f"run_dir={run_dir}",
                f"name={name}",
                f"init.weights={pruned if case.new else base}",
                f"stop_iteration={demo.base_iteration() + LENGTH}",
                f"log.pictures={shipped.HELD_OUT}",
                *COMMON,
                *case.overrides,
            )
        )
        write_text(pictures / f"{name}.svg", picture(case.title, run_dir, root / "healthy"))
    print("\n| run | " + " | ".join(f"`{column}`" for column in TABLE) + " |")
    print("|" + "---|" * (1 + len(TABLE)))
    for name in CASES:
        print(f"| {name} | " + " | ".join(late(root / name)) + " |")
    for name in CASES:
        for warning in status.read_status(root / name, time.time()).warnings:
            print(f"{name}: {warning}")


def recipe(root: Path, *overrides: str) -> Config:
    """The demo's recipe on its photographs below `root`."""
    shards = f"data.sources={root}/shards"
    return config.load(config.find_recipe("demo"), [shards, *overrides])


def prepare(root: Path) -> tuple[Path, Path]:
    """The base, and the same without its discriminator."""
    demo.pack_photographs(root)
    pruned = root / "pruned.ckpt"
    if not pruned.is_file():
        state = weight_file.read(shipped.WEIGHTS).tensors
        kept = {k: v for k, v in state.items() if not k.startswith("loss.discriminator.")}
        architecture = {"norm_num_groups": 4}
        iteration = demo.base_iteration()
        weight_file.write_torch(
            pruned, {"state_dict": kept, "global_step": iteration, "architecture": architecture}
        )
    return shipped.WEIGHTS, pruned


def rows_of(run_dir: Path) -> list[Row]:
    """The log's and the validation's rows, without the warm-up's."""
    rows = read_rows(run_dir / "metrics.csv")
    return [row for row in rows if "decoder_gradient_norm" in row] + read_rows(
        run_dir / "validation.csv"
    )


def picture(title: str, run_dir: Path, healthy: Path) -> str:
    """Six small charts over the iteration in one SVG file, light and dark, on a healthy run's."""
    charts = []
    for name, names, log in PANELS:
        lines = lines_of(run_dir, names)
        if run_dir != healthy:
            lines |= lines_of(healthy, names, "healthy ")
        charts.append((len(names), Chart(name, lines, log)))
    across, down = curves.WIDTH, curves.HEIGHT + 34
    panels = "".join(
        f'<g class="own{own}" transform="translate({i % 2 * across} {40 + i // 2 * down})">'
        f"{panel(chart, own)}</g>"
        for i, (own, chart) in enumerate(charts)
    )
    key = "" if run_dir == healthy else "grey: the healthy run"
    width, height = 2 * across, 40 + down * len(charts) // 2
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="sans-serif">\n<style>{page_style()}{STYLE}</style>\n'
        f'<rect width="{width}" height="{height}"/>\n'
        f'<text class="head" x="12" y="24">{escape(title)}</text>\n'
        f'<text class="key" x="{width - 12}" y="24">{key}</text>\n{panels}</svg>\n'
    )


def page_style() -> str:
    """The style of the status page."""
    page = curves.STATUS_PAGE.read_text(encoding="utf-8")
    return page.partition("<style>")[2].partition("</style>")[0]


def lines_of(run_dir: Path, names: Sequence[str], prefix: str = "") -> dict[str, curves.Points]:
    """Points over the iteration, by column."""
    rows = rows_of(run_dir)
    return {prefix + n: [(row["iteration"], row[n]) for row in rows if n in row] for n in names}


def panel(chart: Chart, own: int) -> str:
    """A chart under its title and the names of its `own` first lines in their colours."""
    xs = [x for line in chart.lines.values() for x, _ in line]
    drawn = curves.svg(chart, {}, (min(xs), max(xs)))
    place = f'<svg y="22" width="{curves.WIDTH}" height="{curves.HEIGHT}" '
    names = "".join(
        f'<tspan class="n{i}" dx="10">{escape(name)}</tspan>'
        for i, name in enumerate(list(chart.lines)[:own])
    )
    return (
        f'<text x="12" y="16"><tspan class="title">{escape(chart.title)}</tspan>{names}</text>'
        f"{drawn.replace('<svg ', place, 1)}"
        f'<text x="{(curves.LEFT + curves.WIDTH) / 2}" y="{curves.HEIGHT + 16}" '
        'text-anchor="middle">iteration</text>\n'
    )


STYLE = """
rect { fill: var(--card); }
.head { fill: var(--text); font-size: 15px; font-weight: 600; }
.key { text-anchor: end; }
.title { fill: var(--text); font-size: 11px; font-weight: 600; }
.n0 { fill: var(--c0); } .n1 { fill: var(--c1); }
.own1 .c1, .own2 .c2, .own2 .c3 { stroke: var(--soft); opacity: 0.5; }
"""


def late(run_dir: Path) -> list[str]:
    """The mean of each column of TABLE over the last quarter of its rows."""
    found = []
    for column in TABLE:
        values = [row[column] for row in rows_of(run_dir) if column in row]
        last = values[-max(1, len(values) // 4) :]
        found.append(f"{sum(last) / len(last):,.4g}")
    return found


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
