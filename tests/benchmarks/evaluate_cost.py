"""What three VAEs cost to evaluate, two of them with one encoder, against one: CPU time an image.

    python tests/benchmarks/evaluate_cost.py

Random weights cost what trained ones do. E, D and V: an encoder, a decoder, VGG16 (once for the
image, once for each VAE). The floor by counted operations is (2 E + 3 D + 4 V) / (E + D + 2 V);
what stays the same for three VAEs (reading, decoding, hashing) can only push below it.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import skimage
import torch
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import vgg16

from kl_f8_train.core import perceptual
from kl_f8_train.core.losses import PerceptualDistance
from kl_f8_train.core.model import AutoencoderKL
from kl_f8_train.score import measure
from kl_f8_train.score.candidates import load_candidates
from kl_f8_train.score.image_set import ImageSet
from kl_f8_train.score.measure import Networks
from kl_f8_train.score.protocol import CARD
from kl_f8_train.weights import pretrained, weight_file

DEMO = {"ch": 32, "ch_mult": (1, 2, 2, 2), "num_res_blocks": 1}
FULL = {"ch": 128, "ch_mult": (1, 2, 4, 4), "num_res_blocks": 2}
CASES = (("demo", DEMO, 128, 4), ("demo", DEMO, 256, 2), ("full", FULL, 64, 1))
REPEATS = 3


def write_weights(folder: Path, shape: dict[str, Any]) -> list[tuple[str, Path, str]]:
    """a and b with one encoder, c with another."""
    models = []
    for seed in range(3):
        torch.manual_seed(seed)
        models.append(AutoencoderKL(**shape))
    models[1].encoder, models[1].quant_conv = models[0].encoder, models[0].quant_conv
    for name, model in zip("abc", models, strict=True):
        weight_file.write_safetensors(folder / f"{name}.safetensors", model.state_dict(), {})
    return [(name, folder / f"{name}.safetensors", "ema") for name in "abc"]


def write_photographs(folder: Path) -> Path:
    """JPEGs of 512 x 512, as a data set has them."""
    picture = Image.open(Path(skimage.__file__).parent / "data" / "astronaut.png").convert("RGB")
    (folder / "photos").mkdir()
    for number in range(8):
        turned = picture.rotate(5 * number)
        turned.save(folder / "photos" / f"{number}.jpg", quality=95)
    return folder / "photos"


def vgg(folder: Path) -> PerceptualDistance:
    """LPIPS on a VGG16 of random weights."""
    path = folder / "vgg.safetensors"
    state = {k: v for k, v in vgg16(weights=None).state_dict().items() if k.startswith("features.")}
    weight_file.write_safetensors(path, state, {})
    return perceptual.lpips_vgg(*pretrained.vgg_features(path))


def gflop(module: nn.Module, *shape: int) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module.to("meta")(torch.empty(1, *shape, device="meta"))
    return counter.get_total_flops() / 1e9


def floors(shape: dict[str, Any], size: int) -> tuple[float, float, float]:
    """GFLOP of E, D and V for an image."""
    model = AutoencoderKL(**shape)
    low = size // model.downsampling
    trunk = vgg16(weights=None).features
    return (
        gflop(model.encoder, 3, size, size),
        gflop(model.decoder, 4, low, low),
        gflop(trunk, 3, size, size),
    )


def seconds(
    named: list[tuple[str, Path, str]], photos: Path, size: int, count: int, networks: Networks
) -> float:
    """CPU seconds an image, from the file to the scores; the median of some repeats."""
    group = load_candidates(named, "cpu")
    image_set = ImageSet(str(photos), size)
    taken = []
    for _ in range(REPEATS + 1):  # the first warms up
        began = time.process_time()
        stream = image_set.stream(range(count), threads=1)
        measure.measure(group, networks, CARD, stream, device="cpu", batch_size=1)
        taken.append((time.process_time() - began) / count)
    return statistics.median(taken[1:])


def main() -> None:
    torch.set_num_threads(1)
    print("| network, size | metrics | one | three | ratio | floor |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photos, network = write_photographs(folder), vgg(folder)
        for label, shape, size, count in CASES:
            named = write_weights(folder, shape)
            e, d, v = floors(shape, size)
            for metrics, networks, w in (
                ("no network", Networks(), 0.0),
                ("VGG16", Networks(network), v),
            ):
                one = seconds(named[:1], photos, size, count, networks)
                three = seconds(named, photos, size, count, networks)
                floor = (2 * e + 3 * d + 4 * w) / (e + d + 2 * w)
                print(
                    f"| {label}, {size} | {metrics} | {one:.2f} s | {three:.2f} s | "
                    f"{three / one:.2f} | {floor:.2f} |",
                    flush=True,
                )
        e, d, v = floors(FULL, 256)
    print(f"\nfull, 256: E {e:.0f}, D {d:.0f}, V {v:.0f} GFLOP")
    print(
        f"floor of full, 256: {(2 * e + 3 * d) / (e + d):.2f} without, "
        f"{(2 * e + 3 * d + 4 * v) / (e + d + 2 * v):.2f} with VGG16; all three encoders equal: "
        f"{(e + 3 * d) / (e + d):.2f}"
    )


if __name__ == "__main__":
    main()
