"""Scores of reconstructions, and the networks that measure: VGG16 or its stand-in, and Inception.

Each image is decoded once, encoded once for all VAEs with that encoder, and its perceptual features
are computed once. A CPU takes one image at a time, so no bit depends on order or number of
processes; a GPU takes batches of one size, the last one filled up, and they move the last bits of
float32 only.
"""

import contextlib
import importlib.metadata
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kl_f8_train import images as pixels
from kl_f8_train.core import metrics
from kl_f8_train.core.losses import PerceptualDistance, squared_differences, unweighted
from kl_f8_train.core.metrics import METRICS, SCORES, FeatureStatistics
from kl_f8_train.errors import MissingInputError, RunFailedError, UsageError
from kl_f8_train.output import Progress
from kl_f8_train.score.candidates import Candidate, outputs
from kl_f8_train.score.image_set import EvaluatedImage
from kl_f8_train.score.inception import FEATURES, Inception
from kl_f8_train.score.protocol import CARD, Protocol
from kl_f8_train.score.scores import SHIFT_METRICS, ImageScores, Tally
from kl_f8_train.weights import pretrained


@dataclass
class Networks:
    """The networks that measure, as far as this machine has them, and why others are missing."""

    perceptual: PerceptualDistance | None = None
    inception: Inception | None = None
    unmeasured: dict[str, str] = field(default_factory=dict)

    @property
    def measured(self) -> tuple[str, ...]:
        """Metrics with a number an image."""
        # LPIPS and PSIM are distances in VGG16's features, ST-LPIPS in those of another network.
        network = self.perceptual.name if self.perceptual else ""
        absent = {"lpips_vgg": {"st_lpips"}, "st_lpips_alex": {"psim", "lpips"}}
        without = absent.get(network, {"psim", "lpips", "st_lpips"})
        return tuple(name for name in METRICS if name not in without)


def find_networks(
    name: str | None,
    vgg: str | None,
    inception: str | None,
    device: str,
    say: Callable[[str], None],
    with_rfid: bool = True,
) -> Networks:
    """VGG16 or the stand-in (`name` None: neither) and Inception; reports what is not measured.

    Raises MissingInputError if a file that was named is not there; then it reports nothing else.
    """
    found = Networks()
    missing: dict[tuple[str, ...], MissingInputError | str] = {}
    distances: tuple[str, ...] = ("psim", "lpips")
    if name == "st_lpips_alex":
        missing[distances] = "the stand-in ST-LPIPS was asked for in place of VGG16"
        distances = ("st_lpips",)
    if name is not None:
        try:
            found.perceptual = pretrained.build(name, vgg, pretrained.VGG16.flag).to(device)
        except MissingInputError as error:
            if vgg:
                raise
            missing[distances] = error
    if with_rfid:
        try:
            found.inception = Inception(pretrained.find(pretrained.INCEPTION, inception)).to(device)
        except MissingInputError as error:
            if inception:
                raise
            missing[("rfid",)] = error
    for names, why in missing.items():
        say(f"not measured: {', '.join(SCORES[metric].label for metric in names)}: {why}")
        found.unmeasured |= dict.fromkeys(names, re.split("[;\n]", str(why))[0])  # first clause
    return found


@torch.no_grad()
def score(
    images: Tensor,
    reconstructions: Tensor,
    border: str = CARD.border,
    network: PerceptualDistance | None = None,
    targets: Sequence[Tensor] | None = None,
) -> dict[str, Tensor]:
    """uint8 (B, 3, H, W) pairs -> metric -> (B,) float64; `targets` are the images' features."""
    x, y = images.double() / 255.0, reconstructions.double() / 255.0  # (B, 3, H, W) in [0, 1]
    scores = {
        "psnr": metrics.psnr(x, y),
        "ssim": metrics.ssim(x, y, border),
        "sharpness": metrics.sharpness(y),
        **dict(zip(SHIFT_METRICS, metrics.colour_shift(x, y).unbind(dim=1), strict=True)),
    }
    if network is not None:
        if targets is None:
            targets = network.features(pixels.to_float(images))
        features = network.features(pixels.to_float(reconstructions))
        squared = squared_differences(targets, features)
        name = "lpips" if network.name == "lpips_vgg" else "st_lpips"
        scores[name] = network.weighted(squared).flatten().double()  # (B, 1, 1, 1) -> (B,)
        if network.name == "lpips_vgg":
            scores["psim"] = unweighted(squared).double()
    return scores


@contextlib.contextmanager
def _memory_remedy() -> Iterator[None]:
    """Raises RunFailedError with the remedy if a GPU's memory runs out."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise RunFailedError(f"out of GPU memory: {error}\nHalve --batch-size") from error


@_memory_remedy()
def measure(
    candidates: Sequence[Candidate],
    networks: Networks,
    protocol: Protocol,
    samples: Iterable[EvaluatedImage],
    *,
    device: str,
    batch_size: int,
    progress: Progress | None = None,
    total: int = 0,
) -> Tally:
    """Streams images through the VAEs and the metrics, `batch_size` of them at a time.

    Raises RunFailedError if a GPU's memory runs out.
    """
    tally = Tally(networks.measured)
    if networks.inception is not None:
        count = len(candidates) + 1
        tally.statistics = [FeatureStatistics.empty(FEATURES, device) for _ in range(count)]
    for done, batch in _batches(samples, batch_size, tally.problems):
        tally.rows += _measure_batch(
            candidates, networks, protocol, batch, device, batch_size, tally.statistics
        )
        if progress is not None:
            progress(done, total)
    return tally


def _batches(
    samples: Iterable[EvaluatedImage], size: int, problems: list[str]
) -> Iterator[tuple[int, list[EvaluatedImage]]]:
    """Usable images, `size` at a time, and how many images went by."""
    batch: list[EvaluatedImage] = []
    done = 0
    for done, sample in enumerate(samples, start=1):
        if sample.image is None:
            problems.append(sample.problem)
            continue
        batch.append(sample)
        if len(batch) == size:
            yield done, batch
            batch = []
    if batch:
        yield done, batch


@torch.no_grad()
def _measure_batch(
    candidates: Sequence[Candidate],
    networks: Networks,
    protocol: Protocol,
    batch: Sequence[EvaluatedImage],
    device: str,
    batch_size: int,
    statistics: Sequence[FeatureStatistics],
) -> list[ImageScores]:
    """Scores of each image of a batch by each VAE; adds Inception's features to `statistics`.

    uint8 (B, 3, H, W) images and reconstructions, B = `batch_size`. Raises RunFailedError if a VAE
    decodes one to values that are not finite.
    """
    real = len(batch)
    filled = [*batch, *[batch[-1]] * (batch_size - real)]  # other shapes may round differently
    # (B, 3, H, W), uint8
    images = torch.stack([s.image for s in filled if s.image is not None]).to(device)
    network, inception = networks.perceptual, networks.inception
    targets = None if network is None else network.features(pixels.to_float(images))
    if inception is not None:
        statistics[0].add(inception(images)[:real])
    columns: list[Tensor] = []  # of each VAE (real, metrics and finite)
    decoded = outputs(candidates, images, [s.key for s in filled], protocol)
    for number, output in enumerate(decoded, start=1):
        levels = pixels.to_uint8(output, protocol.quantize)
        scores = score(images, levels, protocol.border, network, targets)
        scores["finite"] = output.isfinite().flatten(1).all(dim=1).double()  # not seen in 8 bit
        columns.append(torch.stack([scores[m] for m in (*networks.measured, "finite")], 1)[:real])
        if inception is not None:
            statistics[number].add(inception(levels)[:real])
    values = torch.stack(columns, dim=1).cpu().numpy()  # (real, VAEs, metrics and finite)
    for image, vae in np.argwhere(values[..., -1] == 0):
        raise RunFailedError(
            f"{candidates[vae].name}: decodes {batch[image].key} to values that are not finite; "
            "its weights are broken: give others, such as an earlier checkpoint"
        )
    sharpness = metrics.sharpness(images.double() / 255.0).tolist()
    return [
        ImageScores(
            sample.index,
            sample.key,
            sample.sha256(),
            sharpness[i],
            values[i, :, :-1],
            sample.enlarged,
            sample.profile,
        )
        for i, sample in enumerate(batch)
    ]


def describe_networks(networks: Networks) -> dict[str, Any]:
    """For scores.json: which networks measured, by hash, and the versions of the packages."""
    network, inception = networks.perceptual, networks.inception
    vgg = network.sha256 if network is not None and network.name == "lpips_vgg" else None
    rfid = None
    if inception is not None:
        rfid = (
            "torch-fidelity's Inception of 2015-12-05, its 2,048 pooled features, against the "
            "same crops; statistics in float64"
        )
    packages = ("torch", "torchvision", "lpips", "torch-fidelity", "numpy", "pillow", "kl-f8-train")
    return {
        "perceptual": network.label if network is not None else None,
        "psim": "half of LPIPS' distance without its heads, VGG16" if vgg else None,
        "vgg": vgg,
        "rfid": rfid,
        "inception": inception.sha256 if inception is not None else None,
        "versions": {name: version for name in packages if (version := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """No TF32, and algorithms that give the same bits again."""
    flags = {"enabled": True, "benchmark": False, "deterministic": True, "allow_tf32": False}
    with torch.backends.cudnn.flags(**flags):
        yield


def own_device(asked: str | None) -> str:
    """As asked; "cuda", also by default where there is one, is this process's own GPU."""
    if (asked or "cpu").startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(
            f"--device {asked}: torch sees no GPU here; fix the driver, or give --device cpu"
        )
    if asked not in (None, "cuda") or not torch.cuda.is_available():
        return asked or "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
