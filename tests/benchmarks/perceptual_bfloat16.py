"""Whether LPIPS' gradient survives bfloat16: python tests/benchmarks/perceptual_bfloat16.py VGG16.

VGG16 is a file of its features, such as the one that `kl-f8-train fetch vgg` wrote; `st_lpips_alex`
takes the stand-in, `random` a VGG16 of random weights. The gradient of the distance at the shipped
base's reconstructions of its held-out photographs, in `loss.perceptual_precision=bfloat16` against
float32: cosine and relative distance, of all images together, and the least cosine of an image.
Exit code 1 if the cosine is below 0.999.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

from kl_f8_train import images, load_autoencoder, shipped
from kl_f8_train.core.losses import PerceptualDistance
from kl_f8_train.core.perceptual import lpips_vgg
from kl_f8_train.weights import pretrained

WANTED = 0.999  # cosine


def main(weights: str, count: str = "8", side: str = "256") -> int:
    """Prints the comparison; returns the exit code."""
    torch.manual_seed(0)
    network = build(weights)
    model = load_autoencoder(shipped.WEIGHTS)
    paths = sorted(shipped.HELD_OUT.iterdir())[: int(count)]
    rows = []
    for path in paths:
        x = images.to_float(images.squares(path.read_bytes(), [int(side)])[0])[None]
        with torch.no_grad():
            y = model.decode(model.encode(x).mean)
        rows.append([gradient(network, x, y, kind) for kind in ("float32", "bfloat16")])
    exact, rough = (torch.stack(column).flatten(1) for column in zip(*rows, strict=True))
    overall = cosine(exact.flatten(), rough.flatten())
    least, place = torch.stack([cosine(*row) for row in zip(exact, rough, strict=True)]).min(0)
    apart = (rough - exact).norm() / exact.norm()
    print(
        f"{network.label} of {weights}: gradient in bfloat16 against float32, {len(paths)} images "
        f"of {side} px: cosine {overall:.5f}, {apart:.2%} apart; least cosine of an image "
        f"{least:.5f} ({paths[int(place)].stem})"
    )
    print(f"wanted: {WANTED}; {'reached' if overall >= WANTED else 'NOT reached'}")
    return int(overall < WANTED)


def build(weights: str) -> PerceptualDistance:
    """The perceptual network of a file, the stand-in, or a random one."""
    if weights == "st_lpips_alex":
        return pretrained.build(weights)
    return lpips_vgg({}) if weights == "random" else pretrained.build("lpips_vgg", weights)


def gradient(network: PerceptualDistance, x: Tensor, y: Tensor, precision: str) -> Tensor:
    """Of the distance at y."""
    y = y.clone().requires_grad_()
    (found,) = torch.autograd.grad(network(x, y, precision=precision).sum(), y)
    return found


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Of two vectors, in float64."""
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) < 2 or (Path(sys.argv[1]).suffix and not Path(sys.argv[1]).is_file()):
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    sys.exit(main(*sys.argv[1:]))
