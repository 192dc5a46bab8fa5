"""What warm-ups are worth: of a missing discriminator, and of a new Adam's learning rate.

    python tests/benchmarks/warmup.py RUN_DIR [SEED ...]
    python tests/benchmarks/warmup.py --rate RUN_DIR [ITERATIONS ...]

Finetunes the decoder of kl_f8_mini, the small base of the package, with L1 + perceptual until the
held-out scores stand still, then goes on from the EMA in four ways on the same images: without an
adversarial term, to compare; with the base's own discriminator; with a new one that trained alone
first; with a new one that did not. Scores are means over the demo's held-out photographs.

With --rate it goes on from kl_f8_mini itself, with its own discriminator and an
`optimizer.warmup_iterations` of each of ITERATIONS, and scores the first RATE_SHOWN photographs.
"""

import sys
import time
from pathlib import Path

import torch

from kl_f8_train import config, demo, images, shipped
from kl_f8_train.core import metrics
from kl_f8_train.run.train import train
from kl_f8_train.run_dir import checkpoint_path
from kl_f8_train.settings import Config
from kl_f8_train.weights import pretrained, weight_file

BASE = demo.base_iteration()
SETTLED = BASE + 600  # iteration
RATE = 1e-4
WARMUP = 200
SHOWN = (0, 5, 10, 25, 50)
WAYS = {
    "none": ("adversarial=null",),
    "new, no warm-up": (),
    f"new, warm-up {WARMUP}": (f"adversarial.warmup_iterations={WARMUP}",),
    "its own": (),
}
RATE_ITERATIONS = 25
RATE_SHOWN = 6  # photographs
HEAD = "L1 raw | PSNR raw | ST-LPIPS raw | L1 EMA | PSNR EMA | ST-LPIPS EMA |\n" + "|---" * 8 + "|"


def main(root: Path, seeds: list[int]) -> None:
    """Runs all and prints their scores by iterations after the adversarial term sets in."""
    began = time.process_time()
    demo.pack_photographs(root)
    base, settled = shipped.WEIGHTS, root / "settle"
    settling = ("adversarial=null", f"init.weights={base}", f"stop_iteration={SETTLED}")
    train(recipe(root, *settling, f"run_dir={settled}", "checkpoint.every=100"))
    tiles = held_out()
    print(f"| settling | iteration | {HEAD}")
    for iteration in range(BASE + 200, SETTLED + 1, 200):
        path = checkpoint_path(settled, iteration)
        print(f"| | {iteration:,} | {scores(path, *tiles)} |", flush=True)

    own, none = write_starts(root, settled)
    print(f"| discriminator | iterations after | {HEAD}")
    for seed in seeds:
        for number, (name, extra) in enumerate(WAYS.items()):
            start = own if name == "its own" else none
            run_dir = root / f"seed-{seed}-{number}"
            settings = (
                f"init.weights={start}",
                f"run_dir={run_dir}",
                f"stop_iteration={SETTLED + SHOWN[-1]}",
                f"seed={seed}",
                *extra,
            )
            train(recipe(root, *settings))
            for after in SHOWN:
                path = checkpoint_path(run_dir, SETTLED + after) if after else start
                print(f"| {name} | {after} | {scores(path, *tiles)} |", flush=True)
    print(f"{time.process_time() - began:.0f} s of CPU, {torch.get_num_threads()} thread(s)")


def rates(root: Path, warmups: list[int]) -> None:
    """What a new Adam's first iterations cost, by iterations of the rate's warm-up."""
    began = time.process_time()
    demo.pack_photographs(root)
    photographs = [tensor[:RATE_SHOWN] for tensor in held_out()]
    print(f"| rate's warm-up | iterations after | {HEAD}")
    print(f"| | 0 | {scores(shipped.WEIGHTS, *photographs)} |", flush=True)
    for iterations in warmups:
        run_dir = root / f"rate-{iterations}"
        settings = (
            "data.crop=96",
            f"run_dir={run_dir}",
            f"stop_iteration={BASE + RATE_ITERATIONS}",
            f"optimizer.warmup_iterations={iterations}",
        )
        train(recipe(root, *settings))
        for after in (n for n in SHOWN if 0 < n <= RATE_ITERATIONS):
            path = checkpoint_path(run_dir, BASE + after)
            print(f"| {iterations} | {after} | {scores(path, *photographs)} |", flush=True)
    print(f"{time.process_time() - began:.0f} s of CPU, {torch.get_num_threads()} thread(s)")


def recipe(root: Path, *overrides: str) -> Config:
    """The demo's recipe on its photographs below `root`, with many checkpoints and little talk."""
    common = (
        f"data.sources={root}/shards",
        f"optimizer.learning_rate={RATE}",
        "checkpoint.every=5",
        "checkpoint.keep_last=99",
        "log.every=5",
        "log.pictures_every=0",
    )
    return config.load(config.find_recipe("demo"), [*common, *overrides])


def write_starts(root: Path, settled: Path) -> tuple[Path, Path]:
    """The settled EMA with the base's discriminator, and without any."""
    decoder = weight_file.load_autoencoder(settled).state_dict()
    theirs = weight_file.read(shipped.WEIGHTS).tensors
    discriminator = {k: v for k, v in theirs.items() if k.startswith("loss.")}
    own, none = root / "own.ckpt", root / "none.ckpt"
    for path, extra in ((own, discriminator), (none, {})):
        state = {**decoder, **extra}
        architecture = {"norm_num_groups": 4}
        weight_file.write_torch(
            path, {"state_dict": state, "global_step": SETTLED, "architecture": architecture}
        )
    return own, none


@torch.no_grad()
def held_out() -> tuple[torch.Tensor, torch.Tensor]:
    """Held-out photographs in [-1, 1], and their latents, which no finetune changes."""
    files = sorted(shipped.HELD_OUT.glob("*.jpg"))
    x = images.to_float(torch.stack([images.decode(file.read_bytes()) for file in files]))
    return x, weight_file.load_autoencoder(shipped.WEIGHTS).encode(x).mean


@torch.no_grad()
def scores(path: Path, x: torch.Tensor, latents: torch.Tensor) -> str:
    """Mean L1 in [-1, 1], PSNR and perceptual distance of raw weights and EMA, in 8 bit."""
    network = pretrained.build("st_lpips_alex")
    cells = []
    for select in ("raw", "ema"):
        model = weight_file.load_autoencoder(path, select)
        y = images.to_float(images.to_uint8(model.decode(latents)))
        l1, distance = (x - y).abs().mean(), network(x, y).mean()
        psnr = metrics.psnr((x + 1) / 2, (y + 1) / 2).mean()
        cells.append(f"{l1:.4f} | {psnr:.2f} | {distance:.4f}")
    return " | ".join(cells)


if __name__ == "__main__":
    measure = rates if "--rate" in sys.argv else main
    given = [text for text in sys.argv[1:] if text != "--rate"]
    measure(
        Path(given[0]),
        [int(text) for text in given[1:]] or ([0, 10, 25] if measure is rates else [0]),
    )
