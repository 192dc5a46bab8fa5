"""How far gradients in bfloat16 are from float32's: python tests/benchmarks/bfloat16_gradients.py.

One iteration of both stages from the shipped base, on its held-out photographs with equal noise:
the decoder's gradient of ft_ema's loss (L1, perceptual, adversarial) and of ft_mse's (MSE, 0.1
perceptual), all parameters as one vector: relative distance and cosine. ST-LPIPS stands in for
LPIPS. Two lines between show what it is made of: without the adversarial term, and with MSE in
place of L1.

    ... [IMAGES [SIDE]]       4 photographs of 128 px without
"""

import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from kl_f8_train import config, images, shipped
from kl_f8_train.check import benchmark
from kl_f8_train.core.batch import Batch
from kl_f8_train.core.step import Finetuner
from kl_f8_train.settings import Config
from kl_f8_train.weights import weight_file

LOSSES = {
    "ft_ema": (),
    "ft_ema without the adversarial term": ("adversarial=null",),
    "ft_ema with MSE in place of L1": ("loss.pixel=mse",),
    "ft_mse": ("adversarial=null", "loss.pixel=mse", "loss.perceptual_weight=0.1"),
}


def main(count: str = "4", side: str = "128") -> None:
    """Prints a line for each loss."""
    batch = photographs(int(count), int(side))
    for name, changes in LOSSES.items():
        size = f"data.crop={side}", "data.shorter_side=null", f"global_batch={count}"
        exact, rough = (
            gradient(config.load(config.find_recipe("demo"), [*size, *changes, precision]), batch)
            for precision in ("precision=float32", "precision=bfloat16")
        )
        apart = float((rough - exact).norm() / exact.norm())
        cosine = float(rough @ exact / (rough.norm() * exact.norm()))
        print(f"{name}: {apart:.1%} apart, cosine {cosine:.4f}", flush=True)


def photographs(count: int, side: int) -> Batch:
    """Held-out photographs as a batch."""
    paths = sorted(shipped.HELD_OUT.iterdir())[:count]
    pixels = torch.stack([images.squares(path.read_bytes(), [side])[0] for path in paths])
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, count, 4, side // 8, side // 8, generator=generator)
    return Batch(pixels, noise, [path.stem for path in paths], [])


def gradient(settings: Config, batch: Batch) -> Tensor:
    """Of one iteration at the decoder's parameters, as one vector in float64."""
    tuner = from_base(settings)
    benchmark.iteration_of(tuner, torch.device("cpu"))(batch)
    found = [p.grad for p in trained(tuner) if p.grad is not None]
    return torch.cat([g.flatten() for g in found]).double()


def from_base(settings: Config) -> Finetuner:
    """A finetuner with the weights of the shipped base, and its discriminator's."""
    tuner = benchmark.build_finetuner(settings, [])
    weights = weight_file.read_weights(shipped.WEIGHTS, "ema")[1]
    tuner.autoencoder.load_state_dict(weights.autoencoder)
    if tuner.discriminator is not None:
        assert weights.discriminator is not None
        tuner.discriminator.load_state_dict(weights.discriminator)
    return tuner


def trained(tuner: Finetuner) -> Iterator[torch.nn.Parameter]:
    """The decoder's parameters."""
    return (p for p in tuner.autoencoder.parameters() if p.requires_grad)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
