"""Whether bfloat16 trains as float32 does: python tests/benchmarks/bfloat16.py [ITERATIONS].

The demo's network and adversarial recipe, on crops of photographs that scikit-image ships. One
start, then float32 and bfloat16 with each of two seeds of crops and noise: the seeds' distance is
the noise that the precisions' distance is held against. PSNR of the EMA on held-out crops.
"""

import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import skimage.data
import torch

from kl_f8_train import config, images
from kl_f8_train.check import benchmark
from kl_f8_train.config import Config
from kl_f8_train.core import metrics
from kl_f8_train.data.pack import pack
from kl_f8_train.demo import _tile, train_base
from kl_f8_train.weights import weight_file

SMALL = ("data.crop=32", "global_batch=4", "data.workers=0", "ema.decay=0.98")


def main(iterations: int = 500, base: int = 400) -> None:
    """Trains the start and the four runs, and prints each one's PSNR."""
    photographs = Path(skimage.data.__file__).parent
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for photograph in ("astronaut.png", "coffee.png"):
            _tile(photographs / photograph, folder / "tiles", stride=96)
        _tile(photographs / "chelsea.png", folder / "held_out", stride=128, size=64)
        pack(folder / "tiles", folder / "shards", per_shard=100, workers=1)
        settings = config.load(
            "configs/demo.yaml",
            [*SMALL, f"data.sources={folder / 'shards'}", f"stop_iteration={base}"],
        )
        start = folder / "model.ckpt"
        train_base(settings, start)
        held_out = torch.stack(
            [images.decode(path.read_bytes()) for path in sorted((folder / "held_out").iterdir())]
        )
        print(f"start: {score(weight_file.load_autoencoder(start, 'ema'), held_out):.3f} dB")
        for seed in (1, 2):
            for precision in ("float32", "bfloat16"):
                one = replace(settings, seed=seed, precision=precision)
                result = score(train(one, start, iterations), held_out)
                print(f"seed {seed}, {precision}: {result:.3f} dB", flush=True)


def train(settings: Config, start: Path, iterations: int) -> torch.nn.Module:
    """The EMA after so many iterations from `start`, as an autoencoder."""
    finetuner = benchmark.build_finetuner(settings, [])
    weights = weight_file.read_weights(start, "ema")[1]
    finetuner.autoencoder.load_state_dict(weights.autoencoder)
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
def score(model: torch.nn.Module, held_out: torch.Tensor) -> float:
    """Mean PSNR over the held-out crops, from the posterior's mean."""
    x = images.to_float(held_out)
    y = model.decode(model.encode(x).mean).clamp(-1, 1)
    return statistics.mean(metrics.psnr((x + 1) / 2, (y + 1) / 2).tolist())


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(int, sys.argv[1:]))
