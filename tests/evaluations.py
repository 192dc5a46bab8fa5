"""An evaluation directory for the tests, in exactly the form that `evaluate` writes."""

import csv
import hashlib
import io
import json
import math
from pathlib import Path

import numpy as np
import samples
import torch
from PIL import Image, ImageFilter

from kl_f8_train import images
from kl_f8_train.core import metrics
from kl_f8_train.core.metrics import METRICS

MODELS = ("kl-f8", "ft-EMA", "ft-MSE")
ODD = ("kl-f8", "<b>\"x\"&'y </script><script>document.title='broken'</script>", "größe 模型 `a|b`")
SHIFTS = {"red_shift": 0, "green_shift": 1, "blue_shift": 2}


def write(
    directory: Path, names: tuple[str, ...] = MODELS, count: int = 8, pictured: int = 8
) -> Path:
    """Writes scores.json, per_image.csv, pictures.json and pictures/ of three "models".

    The models are copies of photographs: a JPEG, a slight blur, a tinted stronger blur.
    """
    crops = _photographs(count)
    makers = (_jpeg, _blurred, _tinted)[: len(names)]
    rows, pictures = [], []
    for number, (key, picture) in enumerate(crops.items()):
        outputs = [maker(picture) for maker in makers]
        if number == 3:
            outputs[0] = picture.copy()  # a perfect reconstruction: infinite PSNR
        for name, output in zip(names, outputs, strict=True):
            rows.append({"model": name, "image": key, **_scores(picture, output)})
        if number < pictured:
            paths = _write_pictures(directory, number, [picture, *outputs])
            pictures.append(
                {
                    "image": key,
                    "input": paths[0],
                    "models": dict(zip(names, paths[1:], strict=True)),
                }
            )
    for item in pictures:
        item["why"] = _why(rows, item["image"], names)
    write_tables(directory, rows, names)
    (directory / "pictures.json").write_text(json.dumps(pictures, indent=2), encoding="utf-8")
    return directory


def write_tables(directory: Path, rows: list[dict], names: tuple[str, ...]) -> None:
    """scores.json and per_image.csv of these rows; rFID and PSIM are not measured."""
    directory.mkdir(parents=True, exist_ok=True)
    columns = ["model", "image", *METRICS]
    with (directory / "per_image.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    unmeasured = {"rfid": "no <Inception> weights: fetch them", "psim": "no VGG16 & no network"}
    models = {
        name: {
            **{
                m: _mean_std([r[m] for r in rows if r["model"] == name and m in r])
                for m in columns[2:]
            },
            "rfid": None,
        }
        for name in names
    }
    scores = {
        "models": models,
        "unmeasured": unmeasured,
        "warnings": ["rFID on fewer than 2,048 images is biased"],
        "protocol": {
            "name": "card",
            "size": 256,
            "posterior": "sampled, seed 0",
            "quantisation": "floor to 8 bit",
            "perceptual": None,
            "versions": {"torch": "2.15.0", "numpy": "2.4.6"},
            "SSIM": "11 x 11 Gaussian window, sigma 1.5, zero padding",
        },
        "weights": {
            name: {
                "path": f"runs/{number}/weights.safetensors",
                "sha256": hashlib.sha256(f"weights {number}".encode()).hexdigest(),
                "iteration": (246_803, 560_001, 840_001)[number],
                "frozen_sha256": hashlib.sha256(b"encoder").hexdigest(),
                "layout": "CompVis",
                "base": number == 0,
            }
            for number, name in enumerate(names)
        },
        "images": len({row["image"] for row in rows}),
        "images_sha256": hashlib.sha256(b"images").hexdigest(),
        "source": "data/photographs",
    }
    (directory / "scores.json").write_text(json.dumps(scores, indent=2), encoding="utf-8")


def _photographs(count: int) -> dict[str, np.ndarray]:
    """uint8 (256, 256, 3) crops of photographs that scikit-image ships, by odd file names."""
    names = ("astronaut", "chelsea", "coffee")
    keys = (
        "plain",
        "with space",
        "a \"quote\" & 'more'",
        "<i>html</i>",
        "straße-猫",
        "deep/er/path",
    )
    crops = {}
    for number in range(count):
        picture = samples.photograph(names[number % 3])
        top = (number // 3) * 48
        left = 40 + (number // 3) * 60
        crops[f"{keys[number % 6]}-{number}.png"] = picture[top : top + 256, left : left + 256]
    return crops


def _jpeg(picture: np.ndarray) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(samples.encode(picture, quality=22))))


def _blurred(picture: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(0.8)))


def _tinted(picture: np.ndarray) -> np.ndarray:
    blurred = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(1.6)), np.float64)
    return (blurred + np.array([2.5, 0, -1.5])).round().clip(0, 255).astype(np.uint8)


def _scores(picture: np.ndarray, output: np.ndarray) -> dict[str, float]:
    x, y = (
        torch.from_numpy(p.copy()).permute(2, 0, 1)[None].double() / 255 for p in (picture, output)
    )
    shift = 255 * (y - x).mean(dim=(0, 2, 3))
    spread = [255 * float((p.amax(dim=1) - p.amin(dim=1)).mean()) for p in (x, y)]
    return {
        "psnr": float(metrics.psnr(x, y)),
        "ssim": float(metrics.ssim(x, y)),
        "lpips": float((x - y).abs().mean()),
        "sharpness": float(metrics.sharpness(y)),
        **{name: float(shift[channel]) for name, channel in SHIFTS.items()},
        "saturation_shift": spread[1] - spread[0],
    }


def _write_pictures(directory: Path, number: int, pictures: list[np.ndarray]) -> list[str]:
    (directory / "pictures").mkdir(parents=True, exist_ok=True)
    paths = [f"pictures/{number:04d}-{slug}.png" for slug in ("input", "a", "b", "c")]
    for path, picture in zip(paths, pictures, strict=False):
        images.to_pil(torch.from_numpy(picture.copy()).permute(2, 0, 1)).save(directory / path)
    return paths[: len(pictures)]


def _why(rows: list[dict], image: str, names: tuple[str, ...]) -> list[str]:
    reasons = []
    for metric in ("psnr", "lpips"):
        for name in names:
            scores = sorted((r[metric], r["image"]) for r in rows if r["model"] == name)
            worst, best = (scores[0], scores[-1]) if metric == "psnr" else (scores[-1], scores[0])
            reasons += [
                f"{kind} {metric} of {name}"
                for kind, s in (("worst", worst), ("best", best))
                if s[1] == image
            ]
    return reasons


def _mean_std(values: list[float]) -> dict[str, float] | None:
    finite = [value for value in values if math.isfinite(value)]
    return {"mean": float(np.mean(finite)), "std": float(np.std(finite))} if finite else None
