"""Does an adversarial recipe depend on the micro-batch?

    python tests/benchmarks/micro_batches.py [ITERATIONS]

A small network, the same start and data for each `compute.per_device_batch`: the mean adaptive
weight, and how far the decoder ends from that of one micro-batch, relative to its movement. Adam's
first steps make a whole step of a gradient that is zero but for rounding.
"""

import sys
from dataclasses import asdict

import torch

from kl_f8_train import AutoencoderKL, Batch, Discriminator, Finetuner, perceptual_network, recipe
from kl_f8_train.core.discriminator import initialize


def train(size: int, iterations: int) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Mean adaptive weight, and the decoder's parameters before and after."""
    config = recipe(
        "demo", "model.ch_mult=[1,1]", "global_batch=12", f"compute.per_device_batch={size}"
    )
    torch.manual_seed(0)
    network = Discriminator(16, 2)
    initialize(network, 0)
    model = AutoencoderKL(**asdict(config.model))
    tuner = Finetuner(config, model, network, perceptual_network("st_lpips_alex"))
    start = torch.nn.utils.parameters_to_vector(model.decoder.parameters()).detach().clone()
    generator = torch.Generator().manual_seed(1)
    weights = []
    for _ in range(iterations):
        images = 2 * torch.rand(12, 3, 32, 32, generator=generator) - 1
        noise = torch.randn(1, 12, 4, 16, 16, generator=generator)
        tuner.run_iteration(Batch(images, noise, ["random"] * 12, []))
        weights.append(float(tuner.metrics["adaptive_weight"]))
    end = torch.nn.utils.parameters_to_vector(model.decoder.parameters()).detach()
    return sum(weights) / len(weights), start, end


if __name__ == "__main__":
    torch.set_num_threads(1)
    count = int(sys.argv[1]) if sys.argv[1:] else 20
    *_, whole = train(12, count)
    for size in (12, 4, 1):
        mean, start, end = train(size, count)
        apart = float((end - whole).norm() / (whole - start).norm())
        print(
            f"per_device_batch={size}: mean adaptive weight {mean:.6g}; decoder apart {apart:.2g}"
        )
