"""How far each convention of an evaluation moves each metric, on photographs of yours.

    python tests/benchmarks/conventions.py FOLDER WEIGHTS [--size 128] [--limit 200]

The first row is the card protocol; every other row is the difference to it when one thing changes
(mean over the images). FOLDER should hold photographs larger than --size, or the resize rows are
about nothing. Without VGG16 on this machine, ST-LPIPS stands in for LPIPS and PSIM.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from skimage.metrics import structural_similarity
from torch import Tensor

from kl_f8_train import images
from kl_f8_train.core.model import AutoencoderKL
from kl_f8_train.errors import MissingInputError
from kl_f8_train.folders import list_folder
from kl_f8_train.images import read_file
from kl_f8_train.score import measure
from kl_f8_train.score.candidates import load_candidates, posterior_noise
from kl_f8_train.score.protocol import CARD, STANDARD
from kl_f8_train.weights import pretrained

Scores = dict[str, float]


def by_pillow(kernel: Image.Resampling) -> Callable[[Tensor, int], Tensor]:
    def resize(image: Tensor, side: int) -> Tensor:
        picture = images.to_pil(image)
        scale = side / min(picture.size)
        size = (round(picture.width * scale), round(picture.height * scale))
        return torch.from_numpy(np.array(picture.resize(size, kernel))).permute(2, 0, 1)

    return resize


def without_antialiasing(image: Tensor, side: int) -> Tensor:
    scale = side / min(image.shape[1:])
    size = [round(length * scale) for length in image.shape[1:]]
    resized = F.interpolate(image[None].float(), size=size, mode="bicubic")[0]
    return resized.round().clamp(0, 255).to(torch.uint8)


RESIZE = {
    "bicubic by Pillow": by_pillow(Image.Resampling.BICUBIC),
    "Lanczos by Pillow": by_pillow(Image.Resampling.LANCZOS),
    "bilinear by Pillow, antialiased": by_pillow(Image.Resampling.BILINEAR),
    "bicubic without antialiasing": without_antialiasing,
}


class Bench:
    """One VAE and one perceptual network."""

    def __init__(self, weights: Path) -> None:
        ((self.candidate),) = load_candidates([("vae", weights, "ema")], "cpu")
        assert isinstance(self.candidate.model, AutoencoderKL)
        self.model = self.candidate.model
        try:
            self.network = pretrained.build("lpips_vgg")
        except MissingInputError:
            self.network = pretrained.build("st_lpips_alex")
        self.target: Tensor | None = None
        self.features: list[Tensor] = []

    def reconstruct(self, x: Tensor, key: str, sampled: bool = True, seed: int = 0) -> Tensor:
        """uint8 (1, 3, H, W) -> float, not clamped."""
        posterior = self.model.encode(images.to_float(x))
        noise = posterior_noise([key], posterior.mean, seed)
        return self.model.decode(posterior.sample(noise) if sampled else posterior.mean)

    def score(self, x: Tensor, y: Tensor, border: str = CARD.border) -> Scores:
        """Of a uint8 pair, or of levels in 0..255 that are not whole numbers."""
        if self.target is not x:  # its features serve all variants that leave the image alone
            self.target, self.features = x, self.network.features(images.to_float(x))
        scores = measure.score(x, y, border, self.network, self.features)
        keep = ("psnr", "ssim", "psim", "lpips", "st_lpips", "sharpness")
        return {name: float(scores[name]) for name in keep if name in scores}

    def variants(self, image: Tensor, key: str, size: int) -> Iterator[tuple[str, Scores]]:
        """(what was changed, its scores) for one decoded photograph."""
        x = images.crop(images.resize_shorter(image, size), size)[None]
        raw, mode = self.reconstruct(x, key), self.reconstruct(x, key, sampled=False)
        y = images.to_uint8(raw, "floor")
        card = self.score(x, y)
        yield "card", card
        yield (
            "all of protocol standard",
            self.score(x, images.to_uint8(mode, "round"), STANDARD.border),
        )
        yield "posterior: mode", self.score(x, images.to_uint8(mode, "floor"))
        other = self.reconstruct(x, key, seed=1)
        yield "posterior: another seed", self.score(x, images.to_uint8(other, "floor"))
        yield "8 bit: rounded", self.score(x, images.to_uint8(raw, "round"))
        yield "8 bit: not at all", self.score(x, (raw.clamp(-1, 1) + 1) * 127.5)
        yield "neither 8 bit nor clamped", self.score(x, (raw + 1) * 127.5)
        a, b = (part[0].permute(1, 2, 0).numpy() / 255.0 for part in (x, y))
        yield "SSIM: where the window fits", {**card, "ssim": self.score(x, y, "valid")["ssim"]}
        default = structural_similarity(a, b, data_range=1, channel_axis=2)
        yield "SSIM: skimage's default, 7 x 7 uniform", {**card, "ssim": float(default)}
        grey = [part @ np.array([0.299, 0.587, 0.114]) for part in (a, b)]
        ssim = structural_similarity(
            *grey, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        yield "SSIM: of the luma, where the window fits", {**card, "ssim": float(ssim)}
        for name, resize in RESIZE.items():
            x = images.crop(resize(image, size), size)[None]
            y = images.to_uint8(self.reconstruct(x, key), "floor")
            yield f"resize: {name}", self.score(x, y)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--limit", type=int, default=200)
    args = parser.parse_args()
    bench = Bench(args.weights)
    gathered: dict[str, list[Scores]] = {}
    files = list_folder(args.folder).files[: args.limit]
    for file in files:
        image = images.decode(read_file(args.folder / file)).contiguous()
        for name, scores in bench.variants(image, file, args.size):
            gathered.setdefault(name, []).append(scores)
    metrics = list(gathered["card"][0])
    means = {
        name: [np.mean([row[metric] for row in rows]) for metric in metrics]
        for name, rows in gathered.items()
    }
    print(f"{len(files)} photographs, {args.size} x {args.size}\n")
    print(f"| change | {' | '.join(metrics)} |")
    print("|---" * (1 + len(metrics)) + "|")
    for name, row in means.items():
        cells = row if name == "card" else np.subtract(row, means["card"])
        sign = "" if name == "card" else "+"
        print(f"| {name} | {' | '.join(f'{value:{sign}.4f}' for value in cells)} |")
    psnr = np.array([row["psnr"] for row in gathered["card"]])
    of_mean = -10 * np.log10(np.mean(10 ** (-psnr / 10)))
    print(f"| PSNR: of the mean error of the set | {of_mean - psnr.mean():+.4f} |")
    print(f"\nPSNR's deviation: ddof 0 {psnr.std():.4f}, ddof 1 {psnr.std(ddof=1):.4f}")


if __name__ == "__main__":
    main()
