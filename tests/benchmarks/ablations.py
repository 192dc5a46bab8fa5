"""What each choice of the recipes is worth, from the shipped base, for docs/results.md.

    python tests/benchmarks/ablations.py RUN_DIR [--length 1.0] [--only NAME ...]

Finetunes kl_f8_mini once for each variant, all with as many iterations, and compares every one with
the recipe that it varies on the demo's held-out photographs: mean difference of PSNR and ST-LPIPS
(a stand-in for LPIPS), 95 % interval. A run that is there is not run again.
"""

import argparse
from pathlib import Path

from kl_f8_train import config, demo, shipped
from kl_f8_train.run.train import train
from kl_f8_train.score import compare, evaluate
from kl_f8_train.weights import weight_file

MSE = ("loss.pixel=mse", "loss.perceptual_weight=0.1", "adversarial=null")
NEW = "new discriminator"  # variants that start without the base's own
VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {  # name -> the recipe it varies, settings
    "ft-EMA": ("ft-EMA", ()),
    "the original's order (second forward)": ("ft-EMA", ("second_forward=true",)),
    f"{NEW}, warm-up 200": ("ft-EMA", ("adversarial.warmup_iterations=200",)),
    f"{NEW}, no warm-up": ("ft-EMA", ()),
    "adversarial weight 0.5": ("ft-EMA", ("adversarial.weight=0.5",)),
    "no adversarial term": ("ft-EMA", ("adversarial=null",)),
    "rate x 10": ("ft-EMA", ("optimizer.learning_rate=1e-3",)),
    "rate / 10": ("ft-EMA", ("optimizer.learning_rate=1e-5",)),
    "batch x 4": ("ft-EMA", ("global_batch=8",)),
    "ft-MSE": ("ft-MSE", MSE),
    "MSE alone": ("ft-MSE", (*MSE, "loss.perceptual_weight=0")),
    "MSE + 1.0 perceptual": ("ft-MSE", (*MSE, "loss.perceptual_weight=1")),
}


def main(root: Path, length: float, only: list[str]) -> None:
    """Runs what has not been run, scores all, prints the table."""
    shards = demo.pack_photographs(root)
    bare = without_discriminator(root / "bare.safetensors")
    iterations = round(demo.STAGE_A * length)
    chosen = {name: parts for name, parts in VARIANTS.items() if not only or name in only}
    for number, (name, (_, overrides)) in enumerate(chosen.items()):
        settings = [
            f"name=variant-{number}",
            f"run_dir={root / name.replace('/', 'over')}",
            f"init.weights={bare if name.startswith(NEW) else shipped.BASE_NAME}",
            f"data.sources={shards}",
            f"stop_iteration={demo.base_iteration() + iterations}",
            "log.pictures_every=0",
            *overrides,
        ]
        train(config.load(config.find_recipe("demo"), settings))
    runs = {name: root / name.replace("/", "over") for name in chosen}
    named = [("base", shipped.WEIGHTS, "ema")]
    for name, run in runs.items():
        named += [(name, run, "ema"), (f"{name}, raw", run, "raw")]
    out = root / "evaluation"
    evaluate.evaluate(named, str(shipped.HELD_OUT), out, perceptual_name="st_lpips_alex")
    rows = compare.read_image_scores(out / "per_image.csv")
    print(f"| variant | against | PSNR | ST-LPIPS |\n{'|---' * 4}|")
    for name, (against, _) in chosen.items():
        print_row(rows, name, "base" if name == against else against)
        print_row(rows, f"{name}, raw", name)


def print_row(rows: list[dict[str, str]], name: str, against: str) -> None:
    """One line: B minus A and its interval, by metric."""
    cells = []
    for metric in ("psnr", "st_lpips"):
        values = compare.per_image(rows, metric)
        found = compare.verdict(metric, against, name, *compare.paired(values, against, name))
        digits = 2 if metric == "psnr" else 4
        low, high = found.low or 0.0, found.high or 0.0
        cells.append(f"{found.difference:+.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]")
    print(f"| {name} | {against} | {' | '.join(cells)} |", flush=True)


def without_discriminator(path: Path) -> Path:
    """The base as a pruned file."""
    contents = weight_file.read(shipped.WEIGHTS)
    kept = {k: v for k, v in contents.tensors.items() if not k.startswith("loss.discriminator.")}
    if not path.is_file():
        weight_file.write_safetensors(path, kept, contents.metadata)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("root", type=Path)
    parser.add_argument("--length", type=float, default=1.0)
    parser.add_argument("--only", nargs="*", default=[])
    options = parser.parse_args()
    main(options.root, options.length, options.only)
