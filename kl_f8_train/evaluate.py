"""Reconstructs a set of images with any number of VAEs and scores each image.

Protocol "card", the authors' published evaluator: shorter side to 256, centre crop, posterior
sampled with a fixed seed, clamped, floored to 8 bit; population standard deviation.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kl_f8_train import checkpoint, metrics, perceptual
from kl_f8_train import images as pixels
from kl_f8_train.errors import ImageError, MissingInputError
from kl_f8_train.model import AutoencoderKL
from kl_f8_train.perceptual import LABELS, PerceptualDistance
from kl_f8_train.plan import random_state

METRICS = ("psnr", "ssim", "perceptual", "psim", "sharpness")


@dataclass
class Scores:
    """Per-image scores of one model, in the order of the images."""

    per_image: dict[str, list[float]]

    def summary(self) -> dict[str, dict[str, float] | None]:
        """Mean and population standard deviation; infinite PSNR is left out, as the authors did.

        None where nothing is left, as for the PSNR of perfect reconstructions.
        """
        return {name: _mean_std(values) for name, values in self.per_image.items()}


def load_images(
    folder: Path, size: int, report: Callable[[str], None] = print
) -> dict[str, Tensor]:
    """Images below a folder as uint8 (3, size, size) centre crops, by file name.

    An unreadable image is named and left out. Raises MissingInputError if none is left.
    """
    files = pixels.list_folder(folder) if folder.is_dir() else []
    loaded: dict[str, Tensor] = {}
    for file in files:
        try:
            image = pixels.resize_shorter(pixels.decode(file.read_bytes()), size)
            loaded[str(file.relative_to(folder))] = pixels.crop(image, size)
        except ImageError as error:
            report(f"{file}: {error}; left out")
    if not loaded:
        raise MissingInputError(f"no images in {folder}: expected a folder of .jpg, .png or .webp")
    return loaded


@torch.no_grad()
def reconstruct(
    model: AutoencoderKL,
    images: Sequence[Tensor],
    *,
    quantize: str = "floor",
    sample: bool = True,
    seed: int = 0,
    device: str = "cpu",
    batch_size: int = 8,
) -> list[Tensor]:
    """uint8 (3, H, W) images -> uint8 reconstructions; image i has noise of its own, (seed, i)."""
    model = model.to(device)
    outputs: list[Tensor] = []
    for start in range(0, len(images), batch_size):
        batch = torch.stack(list(images[start : start + batch_size])).to(device)
        posterior = model.encode(pixels.to_float(batch))
        latents = posterior.mean
        if sample:
            shape = tuple(latents.shape[1:])
            draws = [
                random_state(seed, "evaluate", start + i).standard_normal(shape)
                for i in range(len(batch))
            ]
            noise = torch.stack([torch.from_numpy(draw).float() for draw in draws])
            latents = posterior.sample(noise.to(device))
        outputs += list(pixels.to_uint8(model.decode(latents), quantize).cpu())
    return outputs


@torch.no_grad()
def score(
    images: Sequence[Tensor],
    reconstructions: Sequence[Tensor],
    network: PerceptualDistance | None,
    device: str = "cpu",
    batch_size: int = 8,
) -> Scores:
    """Scores uint8 reconstructions against uint8 images; PSIM only with VGG16 features."""
    rows: dict[str, list[float]] = {name: [] for name in METRICS}
    if network is not None:
        network.to(device)
    for start in range(0, len(images), batch_size):
        part = slice(start, start + batch_size)
        x, y = (torch.stack(list(s[part])).to(device) for s in (images, reconstructions))
        x01, y01 = x.double() / 255.0, y.double() / 255.0
        rows["psnr"] += metrics.psnr(x01, y01).tolist()
        rows["ssim"] += metrics.ssim(x01, y01).tolist()
        rows["sharpness"] += metrics.sharpness(y01).tolist()
        if network is not None:
            x11, y11 = pixels.to_float(x), pixels.to_float(y)
            rows["perceptual"] += network(x11, y11).flatten().tolist()
            if network.name == "lpips_vgg":
                rows["psim"] += network.unweighted(x11, y11).tolist()
    return Scores({name: values for name, values in rows.items() if values})


def table(summaries: dict[str, dict[str, Any]], perceptual_name: str | None) -> str:
    """The card's table in Markdown; `summaries`: model -> {"iteration", metric -> mean and std}."""
    label = LABELS.get(perceptual_name or "", "LPIPS")
    columns = [("psnr", "PSNR", 2), ("ssim", "SSIM", 3), ("psim", "PSIM", 3)]
    columns += [("perceptual", label, 4), ("sharpness", "sharpness", 0)]
    lines = ["| model | iteration | " + " | ".join(c[1] for c in columns) + " |"]
    lines.append("|---" * (2 + len(columns)) + "|")
    for name, row in summaries.items():
        step = row.get("iteration")
        shown = [_cell(row, key, digits) for key, _, digits in columns]
        lines.append(
            f"| {name} | {'' if step is None else f'{step:,}'} | " + " | ".join(shown) + " |"
        )
    return "\n".join(lines)


def evaluate_files(
    named: Sequence[tuple[str, Path]],
    folder: Path,
    out: Path,
    size: int = 256,
    perceptual_name: str = "lpips_vgg",
    vgg: str | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Scores weight files on a folder; writes scores.json, per_image.csv and table.md to `out`.

    Without the perceptual network's weights its metrics are "not measured", and why is said.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    originals = load_images(folder, size)
    unmeasured: dict[str, str] = {"rfid": "not part of this version"}
    network: PerceptualDistance | None = None
    try:
        network = perceptual.build(perceptual_name, vgg)
    except MissingInputError as error:
        unmeasured |= {"perceptual": str(error), "psim": str(error)}
        print(f"not measured: {LABELS[perceptual_name]}, PSIM: {error}", flush=True)
    if perceptual_name != "lpips_vgg":
        unmeasured["psim"] = "PSIM needs VGG16; ST-LPIPS is a stand-in"
    summaries: dict[str, dict[str, Any]] = {}
    rows: list[list[str]] = []
    for name, path in named:
        contents, _ = checkpoint.read_weights(path)
        model = checkpoint.load_autoencoder(path)
        outputs = reconstruct(model, list(originals.values()), device=device)
        scores = score(list(originals.values()), outputs, network, device)
        summaries[name] = {"iteration": contents.iteration, **scores.summary()}
        for index, image in enumerate(originals):
            values = [f"{column[index]:.6g}" for column in scores.per_image.values()]
            rows.append([name, image, *values])
        header = ["model", "image", *scores.per_image]
        print(f"{name}: {len(originals)} images", flush=True)
    shown = table(summaries, network.name if network else None)
    result = {
        "models": {
            name: {**dict.fromkeys(unmeasured), **{k: v for k, v in s.items() if k != "iteration"}}
            for name, s in summaries.items()
        },
        "unmeasured": unmeasured,
        "protocol": {
            "name": "card",
            "size": size,
            "posterior": "sampled, seed 0",
            "quantize": "floor",
            "perceptual": LABELS[network.name] if network else None,
        },
        "images": len(originals),
    }
    checkpoint.write_json(out / "scores.json", result)
    checkpoint.write_text(out / "table.md", shown + "\n")
    lines = [",".join(row) for row in [header, *rows]]
    checkpoint.write_text(out / "per_image.csv", "\n".join(lines) + "\n")
    print(f"\n{len(originals)} images from {folder}, {size} x {size}, protocol card\n\n{shown}")
    return result


def _cell(row: dict[str, Any], key: str, digits: int) -> str:
    value = row.get(key)
    if value is None:
        return "infinite" if key in row else "not measured"
    return f"{value['mean']:.{digits}f} +/- {value['std']:.{digits}f}"


def _mean_std(values: list[float]) -> dict[str, float] | None:
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return None
    mean = math.fsum(finite) / len(finite)
    return {
        "mean": mean,
        "std": math.sqrt(math.fsum((v - mean) ** 2 for v in finite) / len(finite)),
    }
