"""Scores any number of VAEs on the same images, streaming, on one or several processes."""

import contextlib
import datetime
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from kl_f8_train.errors import RunFailedError, UsageError
from kl_f8_train.files import check_writable, write_json
from kl_f8_train.launch import meeting, world_size
from kl_f8_train.output import Progress, Say
from kl_f8_train.output import say as say_aloud
from kl_f8_train.score import compare, report, tiled
from kl_f8_train.score.candidates import (
    Candidate,
    Means,
    baselines,
    load_candidates,
    perturbed,
    reconstruct,
)
from kl_f8_train.score.image_set import ImageSet
from kl_f8_train.score.measure import (
    Networks,
    describe_networks,
    exact_float32,
    find_networks,
    measure,
    own_device,
)
from kl_f8_train.score.protocol import CARD, Protocol, Selected, selections
from kl_f8_train.score.scores import Tally, choose_pictures, screen, slugs, summarise, write_scores
from kl_f8_train.units import counted

BATCH_SIDE = 256  # pixels; the size of images that a batch size is given for
LATENT_NOISE = (
    "decoded from z + sigma std(z) e: std over an image's own latents, e standard normal by "
    "(seed 0, sigma, name of the image), the same for all VAEs with latents of one shape"
)


# --- several processes ----------------------------------------------------------------------


@contextlib.contextmanager
def processes() -> Iterator[tuple[int, int, Say]]:
    """Rank, number of processes, and what prints on the first; a launcher's meet over gloo."""
    world = world_size()
    if world == 1:
        yield 0, 1, say_aloud
        return
    # Not torchrun's, the variables may be those of another start, with which this waits in vain.
    doubt = "" if "LOCAL_WORLD_SIZE" in os.environ else "; unset WORLD_SIZE to evaluate alone"
    if doubt or os.environ["RANK"] == "0":
        say_aloud(f"waiting for {world} processes at {meeting()}{doubt}")
    dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=30))
    try:
        yield dist.get_rank(), world, say_aloud if dist.get_rank() == 0 else lambda line: None
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


def _of_all(mine: Any, rank: int, world: int) -> list[Any]:
    """What every process has, on rank 0; nothing on the others."""
    if world == 1:
        return [mine]
    parts: list[Any] = [None] * world
    dist.gather_object(mine, parts if rank == 0 else None)
    return parts if rank == 0 else []


def _gather(tally: Tally, rank: int, world: int) -> None:
    """Everybody's rows and sums, on rank 0, in the order of the images."""
    parts = _of_all((tally.rows, tally.problems, [s.count for s in tally.statistics]), rank, world)
    if world > 1:
        for number, statistics in enumerate(tally.statistics):
            # rFID's statistics are sums, so those of all processes add up: no features travel.
            statistics.count = sum(part[2][number] for part in parts)
            statistics.total = statistics.total.cpu()
            statistics.products = statistics.products.cpu()
            dist.reduce(statistics.total, 0)
            dist.reduce(statistics.products, 0)
    tally.rows = sorted((row for part in parts for row in part[0]), key=lambda row: row.index)
    tally.problems = sorted(problem for part in parts for problem in part[1])
    seen: Counter[str] = Counter()
    for row in tally.rows:  # shards of other sources may hold equal names
        seen[row.key] += 1
        row.key += f" ({seen[row.key]})" if seen[row.key] > 1 else ""


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
    say: Say
    progress: Progress | None
    compared: Sequence[str]
    sigmas: Sequence[float]
    tile: int | None

    @property
    def vaes(self) -> list[Candidate]:
        """As given: without baselines and rows of noise on their latents."""
        return [c for c in self.candidates if not c.sigma and not isinstance(c.model, Means)]


def evaluate(
    named: Mapping[str, str | Path] | Sequence[Selected],
    where: str | Path,
    out: str | Path,
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
    """Scores VAEs {name: file} or (name, file, selection) on a folder or shards; writes to `out`.

    A selection is "ema", "raw", or as "ema-0.9999" one EMA of several. `with_baselines` adds the
    rows of BASELINES, `latent_noise` a row for each VAE and sigma; `tile`, in pixels, as `size`,
    measures tiled decoding. Each of several sizes is evaluated by itself, into a folder of `out` of
    that name. Prints how the second of the `compared` models does against the first, and the table.
    Returns what scores.json holds, of several sizes by size ("512"), on the first process, and None
    on the others. Raises MissingInputError for missing files, or if no image can be used,
    UsageError for a size that does not divide, RunFailedError if an output is not finite.
    """
    sizes, out = [size] if isinstance(size, int) else size, Path(out)
    with processes() as (rank, world, say), exact_float32():
        device = own_device(device)
        vaes = load_candidates(selections(named, compared), device)
        candidates = vaes + perturbed(vaes, latent_noise) + (baselines() if with_baselines else [])
        _check_sizes(candidates, sizes, tile)
        images = ImageSet(where, sizes[0], limit, say, out)
        check_writable(out)  # errors first, then what the missing networks cost
        networks = find_networks(perceptual_name, vgg, inception, device, say)
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
            images.size = one
            own = out if isinstance(size, int) else out / str(one)
            results[str(one)] = _evaluate_size(session, images, own)
    if rank > 0:
        return None
    return results[str(size)] if isinstance(size, int) else results


def batch_of(batch_size: int, size: int) -> int:
    """Images of `size` pixels at once that take the memory of `batch_size` of BATCH_SIDE."""
    return max(1, batch_size * BATCH_SIDE**2 // max(size, BATCH_SIDE) ** 2)


def _evaluate_size(session: Session, image_set: ImageSet, out: Path) -> dict[str, Any] | None:
    """Scores all candidates on images of one size; what scores.json holds, on the first process."""
    candidates, networks, size = session.candidates, session.networks, image_set.size
    rank, world, say = session.rank, session.world, session.say
    models = counted(len(candidates), "model", "s")
    say(f"{models}, {counted(image_set.count, 'image', 's')}, {size} x {size}")
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
        seams = tiled.measure(
            session.vaes,
            session.protocol,
            image_set.stream(own, threads),
            session.tile,
            device=session.device,
            progress=session.progress,
            total=len(own),
        )
    _gather(tally, rank, world)
    seams = [seam for part in _of_all(seams, rank, world) for seam in part]
    if rank > 0:
        return None
    conditions = {**session.protocol.describe(), "size": size, **describe_networks(networks)}
    if session.sigmas:
        conditions["latent_noise"] = LATENT_NOISE
    weights = {candidate.name: candidate.record for candidate in candidates}
    result = summarise(tally, weights, conditions, networks.unmeasured, image_set.where)
    if session.tile and seams:
        result["tiled"] = tiled.seam_summary(seams, session.tile)
    write_scores(out, result, tally)
    _write_pictures(out, image_set, session, tally)
    if session.compared:
        a, b = session.compared
        say(compare.HEADING)
        for verdict in report.write_comparison(out, a, b, session.sigmas):
            say(verdict.text)
    say(screen(result, said=networks.unmeasured))
    return result


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


# --- pictures -------------------------------------------------------------------------------


def _write_pictures(out: Path, image_set: ImageSet, session: Session, tally: Tally) -> None:
    """Makes the chosen images and reconstructions again, exactly, and writes them as PNG.

    They are chosen by the VAEs without noise on their latents.
    """
    candidates = [c for c in session.candidates if not isinstance(c.model, Means)]
    batch_size = batch_of(session.batch_size, image_set.size)
    names = [candidate.name for candidate in candidates]
    chosen = choose_pictures(tally.rows, [vae.name for vae in session.vaes], tally.measured)
    former = report.listed_pictures(out / "pictures.json")
    entries = []
    for number, (place, why) in enumerate(chosen.items()):
        row = tally.rows[place]
        sample = image_set.load(row.index)
        assert sample.image is not None
        batch = sample.image[None].expand(batch_size, -1, -1, -1).to(session.device)
        outputs = reconstruct(candidates, batch, [sample.key] * batch_size, session.protocol)
        shown = f"pictures/{number:04d}-input.png"
        report.save_png(out / shown, sample.image, sync=True)
        models: dict[str, str] = {}
        for name, slug, output in zip(names, slugs(names), outputs, strict=True):
            models[name] = f"pictures/{number:04d}-{slug}.png"
            report.save_png(out / models[name], output[0], sync=True)
        entries.append({"image": row.key, "input": shown, "models": models, "why": why})
    write_json(out / "pictures.json", entries)
    for path in former - report.listed_pictures(out / "pictures.json"):
        for folder in ("pictures", "zooms", "errors"):  # the report's have the same names
            (out / folder / Path(path).name).unlink(missing_ok=True)
    if former:
        (out / "comparison.json").unlink(missing_ok=True)
