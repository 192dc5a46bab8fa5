"""Scores any number of VAEs on the same images, streaming, on one or several processes.

Each image is decoded once, encoded once for all VAEs with that encoder, and its perceptual features
are computed once. The posterior's noise follows from (seed, name of the image). A CPU takes one
image at a time, so no bit depends on order or number of processes; a GPU takes batches of one size,
the last one filled up, and they move the last bits of float32 only.
"""

import contextlib
import datetime
import hashlib
import importlib.metadata
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from kl_f8_train import images as pixels
from kl_f8_train.core import metrics
from kl_f8_train.core.batch import random_state
from kl_f8_train.core.hashes import frozen_sha256
from kl_f8_train.core.losses import PerceptualDistance, squared_differences, unweighted
from kl_f8_train.core.metrics import METRICS, SCORES, FeatureStatistics
from kl_f8_train.core.model import AutoencoderKL
from kl_f8_train.data import sources
from kl_f8_train.data.shard_cache import ShardCache
from kl_f8_train.errors import ImageError, MissingInputError, RunFailedError, UsageError
from kl_f8_train.facts import Facts
from kl_f8_train.files import cache_dir, check_writable, write_json
from kl_f8_train.folders import ahead
from kl_f8_train.launch import meeting, world_size
from kl_f8_train.output import Progress
from kl_f8_train.output import say as say_aloud
from kl_f8_train.score import report, tiled
from kl_f8_train.score.compare import noisy_name
from kl_f8_train.score.inception import FEATURES, Inception
from kl_f8_train.score.scores import (
    SHIFT_METRICS,
    ImageScores,
    Tally,
    choose_pictures,
    screen,
    slugs,
    summarise,
    write_scores,
)
from kl_f8_train.units import counted
from kl_f8_train.weights import pretrained, weight_file

SEED = 0
BATCH_SIDE = 256  # pixels; the size of images that a batch size is given for
LATENT_NOISE = (
    "decoded from z + sigma std(z) e: std over an image's own latents, e standard normal by "
    "(seed 0, sigma, name of the image), the same for all VAEs with latents of one shape"
)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The conventions that move the numbers."""

    name: str
    sampled: bool  # the posterior; otherwise its mode
    quantize: str  # "floor" or "round", to 8 bit
    border: str  # of SSIM: "zero" or "valid"

    def describe(self) -> dict[str, Any]:
        """For scores.json."""
        ssim = "11 x 11 Gaussian, sigma 1.5, C1 = 0.01^2, C2 = 0.03^2, data range 1, "
        return {
            "name": self.name,
            "resize": "shorter side to size, bicubic with antialiasing, on 8-bit values",
            "crop": "centre",
            "posterior": "sampled" if self.sampled else "mode",
            "seed": SEED if self.sampled else None,
            "quantize": f"clamped, {self.quantize} to 8 bit",
            "ssim": ssim
            + ("zero padding, whole map" if self.border == "zero" else "where the window fits"),
            "psnr": "10 log10(1 / mse) an image; infinite ones are left out of the mean",
            "std": "population (ddof 0) over images",
        }


CARD = Protocol(name="card", sampled=True, quantize="floor", border="zero")
STANDARD = Protocol(name="standard", sampled=False, quantize="round", border="valid")
PROTOCOLS = {protocol.name: protocol for protocol in (CARD, STANDARD)}


# --- images ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvaluatedImage:
    """One image of the set, or why it cannot be used."""

    index: int
    key: str
    image: Tensor | None  # uint8 (3, size, size)
    problem: str = ""
    enlarged: bool = False  # its shorter side was smaller than `size`
    profile: str = ""  # the colour profile it was converted from

    def sha256(self) -> str:
        """Of the name and the pixels."""
        assert self.image is not None
        return hashlib.sha256(self.key.encode() + b"\0" + self.image.numpy().tobytes()).hexdigest()


class ImageSet:
    """A folder or shards as centre crops, each decoded when it is asked for."""

    def __init__(
        self,
        where: str,
        size: int,
        limit: int | None = None,
        warn: Callable[[str], None] = print,
        out: Path | None = None,
    ) -> None:
        """Leaves out what lies below `out`, a former evaluation's pictures.

        Raises MissingInputError if there is none.
        """
        cache = ShardCache(cache_dir() / "shards", 100 * 2**30)
        self.source = sources.open_source(
            "images", where, [], cache, bad_shards="skip", warn=warn, label=f"--images {where}"
        )
        if out is not None and isinstance(self.source, sources.FolderSource):
            self.source.leave_out(out)
            if not self.source.files:
                raise MissingInputError(f"--images {where}: no images but those of --out {out}")
        self.size = size
        self.ends = np.cumsum(self.source.counts)
        self.count = min(int(self.ends[-1]), limit or int(self.ends[-1]))

    def load(self, index: int) -> EvaluatedImage:
        """The index-th image."""
        shard = int(np.searchsorted(self.ends, index, side="right"))
        first = int(self.ends[shard]) - int(self.source.counts[shard])
        key = self.source.name(shard, index - first)
        try:
            key, data = self.source.read(shard, index - first)
            whole, profile = pixels.picture(data)
            image = pixels.crop(pixels.resize_shorter(whole, self.size), self.size)
            small = min(whole.shape[1:]) < self.size
            return EvaluatedImage(index, key, image, enlarged=small, profile=profile)
        except ImageError as error:
            return EvaluatedImage(index, key, None, f"{key}: {error}; left out")

    def stream(self, indices: Iterable[int], threads: int) -> Iterator[EvaluatedImage]:
        """Images in order, decoded some ahead of their use."""
        for loaded in ahead(self.load, indices, threads):
            yield loaded.result()


# --- VAEs -----------------------------------------------------------------------------------


class Means(nn.Module):
    """A yardstick beside the VAEs: the mean colour of every block of an image.

    `block` is its side in pixels; None takes the whole image as one block.
    """

    def __init__(self, block: int | None) -> None:
        super().__init__()
        self.block = block
        self.downsampling = block or 1

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> the same shape, constant in each block."""
        if self.block is None:
            return x.mean((2, 3), keepdim=True).expand_as(x)
        means = F.avg_pool2d(x, self.block)  # (B, 3, H / block, W / block)
        return F.interpolate(means, scale_factor=float(self.block), mode="nearest")


BASELINES = {"mean colour": None, "8 x 8 means": 8}  # name -> block


@dataclass
class Candidate:
    """A VAE (or a baseline) with its name in the table, and where it came from."""

    name: str
    model: AutoencoderKL | Means
    record: dict[str, Any]
    facts: Facts = field(default_factory=Facts)  # what its file states
    sigma: float = 0.0  # of the noise on its latents, in standard deviations of them


def baselines() -> list[Candidate]:
    """Rows of the table that any useful VAE is far above."""
    absent = ("iteration", "frozen_sha256", "layout", "select")
    record = {"path": "", "sha256": "", "base": False, "baseline": True, **dict.fromkeys(absent)}
    return [Candidate(name, Means(block), dict(record)) for name, block in BASELINES.items()]


def autoencoder(candidate: Candidate) -> AutoencoderKL:
    """The network of a candidate that is a VAE, as all are that `load_candidates` loads."""
    assert isinstance(candidate.model, AutoencoderKL)
    return candidate.model


def load_candidates(named: Sequence[tuple[str, Path, str]], device: str) -> list[Candidate]:
    """(name, weights, "ema", "ema-0.9999" or "raw") -> VAEs; equal encoders are one module."""
    candidates: list[Candidate] = []
    shared: dict[str, AutoencoderKL] = {}
    for name, path, select in named:
        contents, weights = weight_file.read_weights(path, select)
        model = weight_file.build_autoencoder(contents, weights).to(device)
        digest = frozen_sha256(model.state_dict())
        # One module for equal encoders: the others' tensors are freed.
        first = shared.setdefault(digest, model)
        model.encoder, model.quant_conv = first.encoder, first.quant_conv
        record = {
            "path": contents.path.name,
            "sha256": weight_file.sha256(contents.path),
            "iteration": contents.iteration,
            "frozen_sha256": digest,
            "layout": weights.layout,
            "select": select,
            "base": not candidates,
        }
        candidates.append(Candidate(name, model, record, weight_file.facts_of(contents, weights)))
    return candidates


def perturbed(candidates: Sequence[Candidate], sigmas: Sequence[float]) -> list[Candidate]:
    """The VAEs once more at each sigma but 0: rows of their own, on latents with that much noise.

    Raises UsageError if one of their names is taken.
    """
    rows = [
        replace(
            vae,
            name=noisy_name(vae.name, sigma),
            record={**vae.record, "base": False, "vae": vae.name, "latent_noise": sigma},
            sigma=sigma,
        )
        for sigma in sigmas
        if sigma
        for vae in candidates
    ]
    taken = {vae.name for vae in candidates} & {row.name for row in rows}
    if taken:
        raise UsageError(f"{min(taken)} is the name of a row of --latent-noise; give another NAME=")
    return rows


def reconstruct(
    candidates: Sequence[Candidate],
    images: Tensor,
    keys: Sequence[str],
    protocol: Protocol = CARD,
) -> Iterator[Tensor]:
    """uint8 (B, 3, H, W) -> each VAE's reconstructions, the same; one encoding per encoder."""
    for output in _outputs(candidates, images, keys, protocol):
        yield pixels.to_uint8(output, protocol.quantize)


@torch.no_grad()
def _outputs(
    candidates: Sequence[Candidate], images: Tensor, keys: Sequence[str], protocol: Protocol
) -> Iterator[Tensor]:
    """The output of each decoder, float, about [-1, 1], not clamped."""
    latents: dict[str, Tensor] = {}
    for candidate in candidates:
        if isinstance(candidate.model, Means):
            yield candidate.model(pixels.to_float(images))
            continue
        encoder = candidate.record["frozen_sha256"]
        if encoder not in latents:
            latents[encoder] = _latents(candidate.model, images, keys, protocol)
        yield candidate.model.decode(with_noise(latents[encoder], keys, candidate.sigma))


@torch.no_grad()
def _latents(
    model: AutoencoderKL, images: Tensor, keys: Sequence[str], protocol: Protocol
) -> Tensor:
    """uint8 (B, 3, H, W) -> (B, C, h, w), sampled or the mode as the protocol says."""
    posterior = model.encode(pixels.to_float(images))
    if not protocol.sampled:
        return posterior.mean
    return posterior.sample(posterior_noise(keys, posterior.mean))


def with_noise(z: Tensor, keys: Sequence[str], sigma: float) -> Tensor:
    """z + sigma std(z) e, std of each image's own latents: (B, C, h, w) -> the same.

    As `latents.noise` trains, with u tau = sigma. e is standard normal by (seed 0, sigma, name of
    the image), so VAEs whose latents have one shape are compared on the same draw.
    """
    if not sigma:
        return z
    deviation = z.std(dim=(1, 2, 3), keepdim=True)  # (B, 1, 1, 1)
    shape = tuple(z.shape[1:])  # (C, h, w)
    draws = [
        random_state(SEED, "latent-noise", f"{sigma:g}", key).standard_normal(shape) for key in keys
    ]
    return z + sigma * deviation * torch.from_numpy(np.stack(draws)).to(z)


def posterior_noise(keys: Sequence[str], like: Tensor, seed: int = SEED) -> Tensor:
    """Standard normal noise that depends on seed and image name alone, shaped as `like`."""
    shape = tuple(like.shape[1:])
    draws = [random_state(seed, "evaluate", key).standard_normal(shape) for key in keys]
    return torch.from_numpy(np.stack(draws)).to(like)


# --- scores ---------------------------------------------------------------------------------


@dataclass
class Networks:
    """The networks that measure, as far as this machine has them, and why others are missing."""

    perceptual: PerceptualDistance | None = None
    inception: Inception | None = None
    unmeasured: dict[str, str] = field(default_factory=dict)

    def leave_out(
        self, metrics: Sequence[str], error: MissingInputError | str, say: Callable[[str], None]
    ) -> None:
        """Says what is missing and which metrics it costs; the first clause is kept for each."""
        say(f"not measured: {', '.join(SCORES[metric].label for metric in metrics)}: {error}")
        self.unmeasured |= dict.fromkeys(metrics, re.split("[;\n]", str(error))[0])

    @property
    def measured(self) -> tuple[str, ...]:
        """Metrics with a number an image."""
        network = self.perceptual.name if self.perceptual else ""
        absent = {"lpips_vgg": {"st_lpips"}, "st_lpips_alex": {"psim", "lpips"}}
        without = absent.get(network, {"psim", "lpips", "st_lpips"})
        return tuple(name for name in METRICS if name not in without)


def find_networks(
    name: str, vgg: str | None, inception: str | None, device: str, say: Callable[[str], None]
) -> Networks:
    """VGG16 (or the stand-in) and Inception; says what is missing and so not measured.

    Raises MissingInputError if a file that was named is not there.
    """
    found = Networks()
    find_perceptual(found, name, vgg, device, say)
    find_inception(found, inception, device, say)
    return found


def find_perceptual(
    found: Networks, name: str, vgg: str | None, device: str, say: Callable[[str], None]
) -> None:
    """Adds VGG16 or the stand-in, as `find_networks` does."""
    missing: tuple[str, ...] = ("psim", "lpips")
    if name != "lpips_vgg":
        why = "the stand-in ST-LPIPS was asked for in place of VGG16"
        found.leave_out(missing, why, say)
        missing = ("st_lpips",)
    try:
        found.perceptual = pretrained.build(name, vgg, pretrained.VGG16.flag).to(device)
    except MissingInputError as error:
        if vgg:
            raise
        found.leave_out(missing, error, say)


def find_inception(
    found: Networks, inception: str | None, device: str, say: Callable[[str], None]
) -> None:
    """Adds Inception, as `find_networks` does."""
    try:
        found.inception = Inception(pretrained.find(pretrained.INCEPTION, inception)).to(device)
    except MissingInputError as error:
        if inception:
            raise
        found.leave_out(["rfid"], error, say)


@torch.no_grad()
def score(
    images: Tensor,
    reconstructions: Tensor,
    border: str = CARD.border,
    network: PerceptualDistance | None = None,
    targets: Sequence[Tensor] | None = None,
) -> dict[str, Tensor]:
    """uint8 (B, 3, H, W) pairs -> metric -> (B,) float64; `targets` are the images' features."""
    x, y = images.double() / 255.0, reconstructions.double() / 255.0
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
    real = len(batch)
    filled = [*batch, *[batch[-1]] * (batch_size - real)]  # other shapes may round differently
    images = torch.stack([s.image for s in filled if s.image is not None]).to(device)
    network, inception = networks.perceptual, networks.inception
    targets = None if network is None else network.features(pixels.to_float(images))
    if inception is not None:
        statistics[0].add(inception(images)[:real])
    columns: list[Tensor] = []
    outputs = _outputs(candidates, images, [s.key for s in filled], protocol)
    for number, output in enumerate(outputs, start=1):
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


# --- several processes ----------------------------------------------------------------------


@contextlib.contextmanager
def processes() -> Iterator[tuple[int, int]]:
    """(rank, number of processes), joined over gloo where a launcher such as torchrun says so."""
    world = world_size()
    if world == 1:
        yield 0, 1
        return
    if os.environ["RANK"] == "0":
        say_aloud(f"waiting for {world} processes at {meeting()}")
    dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=30))
    try:
        yield dist.get_rank(), world
    finally:
        dist.destroy_process_group()


def _agree(candidates: Sequence[Candidate], images: int, networks: Networks, world: int) -> None:
    """Raises RunFailedError on every rank if they see other files."""
    what = {
        "weights": [c.record["sha256"] for c in candidates],
        "numbers of images": images,
        "metrics": [*networks.measured, "rfid" if networks.inception else ""],
    }
    seen: list[Any] = [None] * world
    if world > 1:
        dist.all_gather_object(seen, what)
        for key in what:
            values = [str(other[key]) for other in seen]
            if len(set(values)) > 1:
                raise RunFailedError(
                    f"the processes see different {key}: {', '.join(values)}; give all of them the "
                    "same files"
                )


def _gather(tally: Tally, rank: int, world: int) -> Tally:
    """Everybody's rows and sums, on rank 0, in the order of the images."""
    if world > 1:
        parts: list[Any] = [None] * world
        mine = (tally.rows, tally.problems, [s.count for s in tally.statistics])
        dist.gather_object(mine, parts if rank == 0 else None)
        for number, statistics in enumerate(tally.statistics):
            # rFID's statistics are sums, so those of all processes add up: no features travel.
            statistics.total = statistics.total.cpu()
            statistics.products = statistics.products.cpu()
            dist.reduce(statistics.total, 0)
            dist.reduce(statistics.products, 0)
            if rank == 0:
                statistics.count = sum(part[2][number] for part in parts)
        if rank == 0:
            tally.rows = [row for part in parts for row in part[0]]
            tally.problems = [problem for part in parts for problem in part[1]]
    tally.rows.sort(key=lambda row: row.index)
    tally.problems.sort()
    seen: Counter[str] = Counter()
    for row in tally.rows:  # shards of other sources may hold equal names
        seen[row.key] += 1
        row.key += f" ({seen[row.key]})" if seen[row.key] > 1 else ""
    return tally


# --- the verb -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Session:
    """What the evaluations of all sizes share."""

    candidates: Sequence[Candidate]
    networks: Networks
    protocol: Protocol
    device: str
    batch_size: int  # at BATCH_SIDE pixels
    rank: int
    world: int
    say: Callable[[str], None]
    progress: Progress | None
    compared: Sequence[str]
    sigmas: Sequence[float]
    tile: int | None


def evaluate(
    named: Sequence[tuple[str, Path, str]],
    where: str,
    out: Path,
    *,
    protocol: Protocol = CARD,
    size: int | Sequence[int] = 256,
    limit: int | None = None,
    perceptual_name: str = "lpips_vgg",
    vgg: str | None = None,
    inception: str | None = None,
    device: str | None = None,
    batch_size: int = 16,
    progress: Progress | None = None,
    with_baselines: bool = False,
    compared: Sequence[str] = (),
    latent_noise: Sequence[float] = (),
    tile: int | None = None,
) -> dict[str, Any] | None:
    """Scores weights (name, file, selection) on a folder or shards; writes them to `out`.

    A selection is "ema", "raw", or as "ema-0.9999" one EMA of several. `with_baselines` adds the
    rows of BASELINES, `latent_noise` a row for each VAE and sigma; `tile`, in pixels, measures
    tiled decoding. Of several sizes each is an evaluation of its own, in a folder of `out` of that
    name. Prints how the second of the `compared` models does against the first, and the table.
    Returns what scores.json holds, or of several sizes the same by size ("512"), on the first
    process, and None on the others. Raises MissingInputError for missing files, or if no image can
    be used, UsageError for a size that does not divide, RunFailedError if an output is not finite.
    """
    sizes = [size] if isinstance(size, int) else size
    with processes() as (rank, world), exact_float32():
        say = say_aloud if rank == 0 else _silent
        device = own_device(device)
        vaes = load_candidates(named, device)
        candidates = vaes + perturbed(vaes, latent_noise) + (baselines() if with_baselines else [])
        _check_sizes(candidates, sizes, tile)
        networks = find_networks(perceptual_name, vgg, inception, device, say)
        check_writable(out)
        session = Session(
            candidates=candidates,
            networks=networks,
            protocol=protocol,
            device=device,
            batch_size=batch_size if device.startswith("cuda") else 1,
            rank=rank,
            world=world,
            say=say,
            progress=progress if rank == 0 else None,
            compared=compared,
            sigmas=[sigma for sigma in latent_noise if sigma],
            tile=tile,
        )
        results = {}
        for one in sizes:
            images = ImageSet(where, one, limit, say if one == sizes[0] else _silent, out)
            own = out if isinstance(size, int) else out / str(one)
            results[str(one)] = _evaluate_size(session, images, where, own)
    if rank > 0:
        return None
    return results[str(size)] if isinstance(size, int) else results


def batch_of(batch_size: int, size: int) -> int:
    """Images of `size` pixels at once that take the memory of `batch_size` of BATCH_SIDE."""
    return max(1, batch_size * BATCH_SIDE**2 // max(size, BATCH_SIDE) ** 2)


def _evaluate_size(
    session: Session, image_set: ImageSet, where: str, out: Path
) -> dict[str, Any] | None:
    """Scores all candidates on images of one size; what scores.json holds, on the first process."""
    candidates, networks, size = session.candidates, session.networks, image_set.size
    rank, world, say = session.rank, session.world, session.say
    models, images = (
        counted(count, noun, "s")
        for count, noun in ((len(candidates), "model"), (image_set.count, "image"))
    )
    say(f"{models}, {images}, {size} x {size}")
    _agree(candidates, image_set.count, networks, world)
    # Every n-th image, not a stretch: sizes vary along a folder, and all processes end together.
    own = range(rank, image_set.count, world)
    threads = max(1, min(8, (os.cpu_count() or 1) // world))
    tally = measure(
        candidates,
        networks,
        session.protocol,
        image_set.stream(own, threads),
        device=session.device,
        batch_size=batch_of(session.batch_size, size),
        progress=session.progress,
        total=len(own),
    )
    seams: tiled.Measured = []
    if session.tile and size > session.tile // 2:
        decodes = _decodes(session, image_set.stream(own, threads))
        seams = tiled.measure(decodes, session.tile, session.progress, len(own))
    tally, seams = _gather(tally, rank, world), _gathered(seams, rank, world)
    if rank > 0:
        return None
    conditions = {**session.protocol.describe(), "size": size, **describe_networks(networks)}
    if session.sigmas:
        conditions["latent_noise"] = LATENT_NOISE
    weights = {candidate.name: candidate.record for candidate in candidates}
    result = summarise(tally, weights, conditions, networks.unmeasured, where)
    if session.tile and seams:
        result["tiled"] = tiled.seam_summary(seams, session.tile)
    write_scores(out, result, tally)
    _write_pictures(out, image_set, session, tally)
    verdicts = []
    if session.compared:
        a, b = session.compared
        verdicts = report.write_comparison(out, a, b, session.sigmas)
    for verdict in verdicts:
        say(verdict.text)
    say(screen(result, said=networks.unmeasured))
    return result


def _decodes(session: Session, samples: Iterable[EvaluatedImage]) -> Iterator[tiled.Decodable]:
    """Each image with each VAE's latents of it, for tiled decoding."""
    for sample in samples:
        if sample.image is None:
            continue
        image = sample.image[None].to(session.device)
        for vae in session.candidates:
            if isinstance(vae.model, AutoencoderKL) and not vae.sigma:
                z = _latents(vae.model, image, [sample.key], session.protocol)
                factor = vae.model.downsampling
                yield tiled.Decodable(sample.key, image, vae.name, vae.model.decode, z, factor)


def _gathered(found: tiled.Measured, rank: int, world: int) -> tiled.Measured:
    """Everybody's seams, on rank 0."""
    if world == 1:
        return found
    parts: list[Any] = [None] * world
    dist.gather_object(found, parts if rank == 0 else None)
    return [entry for part in parts if part for entry in part]


def describe_networks(networks: Networks) -> dict[str, Any]:
    """For scores.json: which networks measured, by hash, and the versions of the packages."""
    network, inception = networks.perceptual, networks.inception
    vgg = network.sha256 if network is not None and network.name == "lpips_vgg" else None
    packages = ("torch", "torchvision", "lpips", "torch-fidelity", "numpy", "pillow", "kl-f8-train")
    return {
        "perceptual": network.label if network is not None else None,
        "psim": "half of LPIPS' distance without its heads, VGG16" if vgg else None,
        "vgg": vgg,
        "rfid": "torch-fidelity's Inception of 2015-12-05, its 2,048 pooled features, against the "
        "same crops; statistics in float64"
        if inception is not None
        else None,
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


def _check_sizes(candidates: Sequence[Candidate], sizes: Sequence[int], tile: int | None) -> None:
    """Raises UsageError for a size that a VAE's downsampling or SSIM's window does not allow.

    Or for tiles that do not divide, or are so large that nothing is tiled.
    """
    for size, candidate in itertools.product(sizes, candidates):
        if size % candidate.model.downsampling or size < 11:
            raise UsageError(
                f"--size {size}: expected at least 11 pixels (SSIM's window) and a multiple of "
                f"{candidate.model.downsampling}, the downsampling of {candidate.name}"
            )
    if tile is None:
        return
    largest = max(sizes)
    for vae in (one for one in candidates if not isinstance(one.model, Means)):
        step = 4 * vae.model.downsampling
        if tile < step or tile % step:
            raise UsageError(
                f"--tiled {tile}: expected a multiple of {step} pixels, four latents of {vae.name}"
            )
    if largest <= tile // 2:
        raise UsageError(
            f"--tiled {tile}: images of {largest} x {largest} fit in one tile; give a larger "
            f"--size, such as {2 * tile}, or smaller tiles"
        )


def _silent(message: str) -> None:
    pass


# --- pictures -------------------------------------------------------------------------------


def _write_pictures(
    out: Path,
    image_set: ImageSet,
    session: Session,
    tally: Tally,
) -> None:
    """Makes the chosen images and reconstructions again, exactly, and writes them as PNG.

    They are chosen by the VAEs without noise on their latents.
    """
    candidates = [c for c in session.candidates if not isinstance(c.model, Means)]
    protocol, device = session.protocol, session.device
    batch_size = batch_of(session.batch_size, image_set.size)
    names = [candidate.name for candidate in candidates]
    clean = [candidate.name for candidate in candidates if not candidate.sigma]
    chosen = choose_pictures(tally.rows, clean, tally.measured)
    former = _pictures(out)
    entries = []
    for number, (place, why) in enumerate(chosen.items()):
        sample = image_set.load(tally.rows[place].index)
        assert sample.image is not None
        batch = sample.image[None].expand(batch_size, -1, -1, -1).to(device)
        outputs = list(reconstruct(candidates, batch, [sample.key] * batch_size, protocol))
        shown = f"pictures/{number:04d}-input.png"
        report.save_png(out / shown, sample.image, sync=True)
        models: dict[str, str] = {}
        for name, slug, output in zip(names, slugs(names), outputs, strict=True):
            models[name] = f"pictures/{number:04d}-{slug}.png"
            report.save_png(out / models[name], output[0], sync=True)
        key = tally.rows[place].key
        entries.append({"image": key, "input": shown, "models": models, "why": why})
    write_json(out / "pictures.json", entries)
    for name in former - _pictures(out):  # the report's have the same names
        for folder in ("pictures", "zooms", "errors"):
            (out / folder / name).unlink(missing_ok=True)
    if former:
        (out / "comparison.json").unlink(missing_ok=True)


def _pictures(out: Path) -> set[str]:
    """Names of the pictures that an evaluation has written to `out`."""
    listed = out / "pictures.json"
    text = listed.read_text(encoding="utf-8", errors="replace") if listed.is_file() else ""
    return set(re.findall(r'"pictures/(\d{4}-[a-z0-9-]+\.png)"', text))
