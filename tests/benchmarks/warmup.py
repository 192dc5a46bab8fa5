"""What a missing discriminator does to the decoder, with and without a warm-up.

    python tests/benchmarks/warmup.py [RUN_DIR] [BASE_ITERATIONS] [WARMUP_ITERATIONS]

Trains the demo's stand-in for kl-f8, takes its discriminator away, and goes on with L1 +
perceptual + adversarial: with warm-up, without, and, to compare, with the discriminator it had.
Scores the raw decoder on the demo's held-out photographs: means over 128-pixel tiles.
"""

import sys
import tempfile
import time
from pathlib import Path

import torch

from kl_f8_train import checkpoint, config, demo, evaluate, images, perceptual
from kl_f8_train.train import train

EVERY = 10
SHOWN = (0, 10, 20, 50, 100)
SETTINGS = (
    f"checkpoint.every={EVERY}",
    "checkpoint.keep_last=99",
    "log.every=100",
    "log.pictures_every=0",
)


def main(root: Path, base_iterations: int = 600, warmup: int = 200) -> None:
    """Runs the three and prints their scores by iterations after the adversarial term sets in."""
    began = time.process_time()
    shards = demo._pack_photographs(root)
    base, pruned = root / "base" / "model.ckpt", root / "pruned.ckpt"
    common = [f"data.sources={shards}", *SETTINGS]

    def recipe(*extra: str) -> config.Config:
        return config.load(config.find_recipe("demo"), [*common, *extra])

    if not base.is_file():
        demo.train_base(recipe(f"init.weights={base}", f"stop_iteration={base_iterations}"), base)
    state = checkpoint.read(base).tensors
    kept = {k: v for k, v in state.items() if not k.startswith("loss.discriminator.")}
    checkpoint.write_torch(pruned, {"state_dict": kept, "global_step": base_iterations})

    runs = {
        "its own discriminator": (base, 0),
        f"a new one, warm-up {warmup}": (pruned, warmup),
        "a new one, no warm-up": (pruned, 0),
    }
    pictures = list(evaluate.load_images(root / "held_out", 128, print).values())
    network = perceptual.build("st_lpips_alex")
    print("| discriminator | iterations after | L1 | PSNR | ST-LPIPS | sharpness |")
    print("|" + "---|" * 6)
    for number, (name, (weights, iterations)) in enumerate(runs.items()):
        run_dir = root / f"run-{number}"
        train(
            recipe(
                f"init.weights={weights}",
                f"run_dir={run_dir}",
                f"stop_iteration={base_iterations + SHOWN[-1]}",
                f"adversarial.warmup_iterations={iterations}",
            )
        )
        for after in SHOWN:
            path = checkpoint.checkpoint_path(run_dir, base_iterations + after)
            scores = score(path if after else weights, pictures, network)
            print(f"| {name} | {after} | {scores} |", flush=True)
    print(f"{time.process_time() - began:.0f} s of CPU, {torch.get_num_threads()} thread(s)")


def score(
    weights: Path, pictures: list[torch.Tensor], network: perceptual.PerceptualDistance
) -> str:
    """Mean L1 in [-1, 1], PSNR, perceptual distance and sharpness of the raw decoder."""
    model = checkpoint.load_autoencoder(weights, "raw")
    outputs = evaluate.reconstruct(model, pictures)
    pairs = zip(pictures, outputs, strict=True)
    l1 = [float((images.to_float(x) - images.to_float(y)).abs().mean()) for x, y in pairs]
    found = evaluate.score(pictures, outputs, network).per_image
    means = {key: sum(values) / len(values) for key, values in found.items()}
    return (
        f"{sum(l1) / len(l1):.4f} | {means['psnr']:.2f} | {means['perceptual']:.4f} "
        f"| {means['sharpness']:.0f}"
    )


if __name__ == "__main__":
    numbers = [int(text) for text in sys.argv[2:]]
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]), *numbers)
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder))
