"""Whether bfloat16 trains as float32 does: python tests/benchmarks/bfloat16.py [ITERATIONS].

The demo's base, adversarial recipe and photographs: float32 and bfloat16 with each of two seeds of
crops and noise. The seeds' distance is the noise that the precisions' distance is held against.
PSNR of the EMA on held-out photographs.
"""

import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from kl_f8_train import config, demo, images, shipped
from kl_f8_train.check import benchmark
from kl_f8_train.core import metrics
from kl_f8_train.core.model import AutoencoderKL
from kl_f8_train.settings import Config
from kl_f8_train.weights import weight_file

SMALL = ("data.crop=64", "global_batch=4", "data.workers=0", "ema.decay=0.98")


def main(iterations: int = 200) -> None:
    """Trains the four runs, and prints each one's PSNR."""
    with tempfile.TemporaryDirectory() as name:
        shards = demo.pack_photographs(Path(name))
        config_ = config.load("configs/demo.yaml", [*SMALL, f"data.sources={shards}"])
        start = shipped.WEIGHTS
        held_out = torch.stack(
            [images.decode(path.read_bytes()) for path in sorted(shipped.HELD_OUT.iterdir())]
        )
        print(f"start: {score(weight_file.load_autoencoder(start, 'ema'), held_out):.3f} dB")
        for seed in (1, 2):
            for precision in ("float32", "bfloat16"):
                one = replace(config_, seed=seed, precision=precision)
                result = score(train(one, start, iterations), held_out)
                print(f"seed {seed}, {precision}: {result:.3f} dB", flush=True)


def train(settings: Config, start: Path, iterations: int) -> AutoencoderKL:
    """The EMA after so many iterations from `start`, as an autoencoder."""
    finetuner = benchmark.build_finetuner(settings, [])
    weights = weight_file.read_weights(start, "ema")[1]
    finetuner.autoencoder.load_state_dict(weights.autoencoder)
    assert finetuner.discriminator is not None
    assert weights.discriminator is not None
    finetuner.discriminator.load_state_dict(weights.discriminator)
    for name, averaged in finetuner.ema.items():
        averaged.load_state_dict(getattr(finetuner.autoencoder, name).state_dict())
    run = benchmark.iteration_of(finetuner, torch.device("cpu"))
    batches = benchmark.open_batches(settings, settings.global_batch, [])
    for _ in range(iterations):
        run(next(batches))
    assert finetuner.ema_updates == iterations
    for name, averaged in finetuner.ema.items():
        getattr(finetuner.autoencoder, name).load_state_dict(averaged.state_dict())
    return finetuner.autoencoder


@torch.no_grad()
def score(model: AutoencoderKL, held_out: torch.Tensor) -> float:
    """Mean PSNR over the held-out photographs, from the posterior's mean."""
    scores = []
    for x in images.to_float(held_out).split(1):
        y = model.decode(model.encode(x).mean).clamp(-1, 1)
        scores.append(metrics.psnr((x + 1) / 2, (y + 1) / 2).item())
    return statistics.mean(scores)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(int, sys.argv[1:]))
