"""What `latents.noise` is worth to a decoder, from the shipped base, for docs/choosing.md.

    python tests/benchmarks/latent_noise.py RUN_DIR [--iterations N] [--tau TAU ...] [--limit N]

Finetunes kl_f8_mini once for each tau, on the same images, crops and seed, without an adversarial
term, and scores the raw weights on the demo's held-out photographs: from clean latents, and from
latents with noise of sigma 0.1, 0.2 and 0.4 of their standard deviation. Means, and paired 95 %
intervals of the differences to the first tau.
"""

import argparse
from pathlib import Path

from kl_f8_train import config, demo, shipped
from kl_f8_train.run.train import train
from kl_f8_train.score import compare, evaluate

SIGMAS = (0.0, 0.1, 0.2, 0.4)


def main(root: Path, iterations: int, taus: list[float], crop: int, limit: int | None) -> None:
    """Trains what has not been trained, scores all, prints the table."""
    named = [("base", shipped.WEIGHTS, "ema")]
    for tau in taus:
        named.append((f"tau {tau:g}", finetuned(root, iterations, tau, crop), "raw"))
    evaluate.evaluate(
        named,
        str(shipped.HELD_OUT),
        root / "evaluation",
        perceptual_name="st_lpips_alex",
        latent_noise=SIGMAS,
        limit=limit,
    )
    rows = compare.read_image_scores(root / "evaluation" / "per_image.csv")
    print(f"| sigma | decoder | PSNR | ST-LPIPS | PSNR against {named[1][0]} |\n{'|---' * 5}|")
    for sigma in SIGMAS:
        names = [compare.noisy_name(name, sigma) for name, *_ in named]
        for name, (plain, *_) in zip(names, named, strict=True):
            psnr, distance = (mean(rows, metric, name) for metric in ("psnr", "st_lpips"))
            against = "" if name == names[1] else difference(rows, names[1], name)
            print(f"| {sigma:g} | {plain} | {psnr:.2f} | {distance:.4f} | {against} |", flush=True)


def finetuned(root: Path, iterations: int, tau: float, crop: int) -> Path:
    """The run directory of one tau; a run that is there is not run again."""
    settings = (
        f"run_dir={root / f'tau-{tau:g}'}",
        f"data.sources={demo.pack_photographs(root)}",
        f"stop_iteration={demo.base_iteration() + iterations}",
        f"latents.noise={tau}",
        f"data.crop={crop}",
        "adversarial=null",
        "log.pictures_every=0",
    )
    found = config.load(config.find_recipe("demo"), settings)
    train(found)
    return Path(found.run_dir)


def mean(rows: list[dict[str, str]], metric: str, name: str) -> float:
    """Over the photographs."""
    values = compare.per_image(rows, metric)[name]
    return sum(values.values()) / len(values)


def difference(rows: list[dict[str, str]], first: str, second: str) -> str:
    """`+0.36 [0.30, 0.42]`: the second's PSNR minus the first's."""
    values = compare.per_image(rows, "psnr")
    found = compare.verdict("psnr", first, second, *compare.paired(values, first, second))
    return f"{found.difference:+.2f} [{found.low or 0:.2f}, {found.high or 0:.2f}]"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("root", type=Path)
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--tau", type=float, nargs="+", default=[0.0, 0.4])
    parser.add_argument("--crop", type=int, default=128, help="in pixels")
    parser.add_argument("--limit", type=int, help="only the first photographs")
    options = parser.parse_args()
    main(options.root, options.iterations, options.tau, options.crop, options.limit)
