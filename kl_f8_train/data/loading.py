"""Which image is the i-th of iteration t, and how it is loaded: decode, resize, crop, noise.

All of it is arithmetic on seed, iteration and counts, so a batch is the same whatever the number of
GPUs, workers and restarts, and nothing needs to be stored to resume.

The shards of a source, permuted anew in each pass, form one stream with the samples permuted inside
each shard; the stream is cut into L equal lanes, and every iteration takes the next few samples of
each lane. What does not fill the lanes, fewer than L samples, is left out of a pass, others each
time.
"""

import atexit
import functools
import hashlib
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from kl_f8_train import images
from kl_f8_train.core.batch import Batch, random_state
from kl_f8_train.data.handover import FEW_FILES, Handover, Parcel, raise_open_files
from kl_f8_train.data.shard_cache import ShardCache
from kl_f8_train.data.sources import FolderSource, ImageSource, TarSource, open_source
from kl_f8_train.errors import ImageError, MissingInputError, SmallImageError
from kl_f8_train.files import cache_dir
from kl_f8_train.launch import SIGNALS, end_children
from kl_f8_train.lifetime import start_child
from kl_f8_train.rules import side_range, source_shares
from kl_f8_train.settings import Config
from kl_f8_train.units import counted, printable

MAX_NEIGHBOURS = 100  # bad samples in a row before the run stops
IDLE = -(2**63)  # no position
atexit.register(end_children)  # before multiprocessing waits for them; SIGTERM does not end them


@functools.lru_cache(maxsize=512)
def permutation(size: int, *parts: int | str) -> np.ndarray:
    """A permutation of 0 .. size - 1 that depends on its arguments alone."""
    return random_state(*parts).permutation(size)


class SourcePlan:
    """Deals the samples of one source: `share` of them in every iteration."""

    def __init__(self, name: str, counts: Sequence[int], share: int, lanes: int, seed: int) -> None:
        self.name, self.share, self.seed = name, share, seed
        self.counts = np.asarray(counts, np.int64)
        total = int(self.counts.sum())
        # A divisor of the share, so that every lane gives equally many samples to each iteration.
        self.lanes = max(d for d in range(1, min(lanes, share, total) + 1) if share % d == 0)
        self.lane_length = total // self.lanes  # samples of a lane in each pass
        self.per_lane = share // self.lanes  # samples of a lane in each iteration
        self._pass: tuple[int | None, np.ndarray, np.ndarray] = None, self.counts, self.counts

    def locate(self, iteration: int, index: int) -> tuple[int, int]:
        """(shard, sample) of the index-th sample (0 .. share - 1) of an iteration."""
        lane, offset = divmod(index, self.per_lane)
        # The lane has given `iteration * per_lane + offset` samples before, over all passes.
        number, place = divmod(iteration * self.per_lane + offset, self.lane_length)
        place += lane * self.lane_length  # in the stream of pass `number`
        if (kept := self._pass)[0] != number:  # its shards in order, and where each ends
            order = permutation(len(self.counts), self.seed, self.name, "shards", number)
            kept = self._pass = number, order, np.cumsum(self.counts[order])
        _, order, ends = kept
        row = int(np.searchsorted(ends, place, side="right"))  # first shard to end behind it
        shard = int(order[row])
        count = int(self.counts[shard])
        samples = permutation(count, self.seed, self.name, "samples", number, shard)
        return shard, int(samples[place - int(ends[row] - count)])

    def passes(self, iterations: int) -> float:
        """How many times that many iterations go through the source."""
        return iterations * self.per_lane / self.lane_length


class Plan:
    """Deals all sources: position = iteration * batch + slot -> which sample."""

    def __init__(
        self, counts: Mapping[str, Sequence[int]], shares: dict[str, int], lanes: int, seed: int
    ) -> None:
        self.batch = sum(shares.values())
        self.plans = {
            name: SourcePlan(name, counts[name], share, lanes, seed)
            for name, share in shares.items()
        }
        self.slots = mixed_slots(shares)

    def digest(self) -> str:
        """A short hash of the counts; nodes that see other shards have another."""
        counts = [plan.counts.tobytes() for plan in self.plans.values()]
        return hashlib.sha256(b"/".join(counts)).hexdigest()[:12]

    def locate(self, position: int) -> tuple[str, int, int]:
        """(source, shard, sample) at a position; warm-up iterations are negative."""
        iteration, slot = divmod(position, self.batch)
        name, index = self.slots[slot]
        return (name, *self.plans[name].locate(iteration, index))


def mixed_slots(shares: dict[str, int]) -> list[tuple[str, int]]:
    """The slots of a batch, sources evenly mixed: [(source, index within its share), ...]."""
    # Each source's images lie at equal distances in (0, 1). Read in this order, any stretch of
    # slots, such as a rank's or a micro-batch's, holds the sources in about their proportion.
    places = [
        ((index + 0.5) / share, name, index)
        for name, share in shares.items()
        for index in range(share)
    ]
    return [(name, index) for _, name, index in sorted(places)]


@dataclass
class Sample:
    """One position: its image, noise and name."""

    image: Tensor  # (3, crop, crop) uint8
    noise: Tensor  # (draws, embed_dim, crop / f, crop / f) float32
    key: str
    skipped: list[str]  # `NAME: reason` of the image of this position, if it cannot be used
    profile: str = ""  # the colour profile it was converted from


class PositionDataset(Dataset[Sample]):
    """position = iteration * global_batch + slot -> Sample."""

    def __init__(self, plan: Plan, sources: Mapping[str, ImageSource], config: Config) -> None:
        self.plan, self.sources = plan, dict(sources)
        self.seed = config.seed
        sides = side_range(config.data)
        self.side = None if sides is None else sides[0]  # the shorter one, after resizing
        self.sides = sides if sides and sides[0] < sides[1] else None  # where it is drawn
        self.shown_side = "null" if sides is None else str(config.data.shorter_side)
        self.crop, self.flip, self.draft = config.data.crop, config.data.flip, config.data.draft
        self.factor = config.model.downsampling
        side = config.data.crop // self.factor
        self.watch(workers=0)
        self.perturbs = config.latents.noise > 0
        self.noise_shape = (2 if config.second_forward else 1, config.model.embed_dim, side, side)

    def watch(self, workers: int) -> None:
        """Allocates a shared array in which each worker records the position it is reading."""
        self.reading = multiprocessing.RawArray("q", [IDLE] * max(1, workers))

    def __getitem__(self, position: int) -> Sample:
        """Raises MissingInputError if MAX_NEIGHBOURS samples in a row are bad.

        Meanwhile `reading` holds the position of each worker, for the main process too.
        """
        worker = get_worker_info()
        slot = 0 if worker is None else worker.id
        self.reading[slot] = position
        try:
            return self._sample(position)
        finally:
            self.reading[slot] = IDLE

    def _sample(self, position: int) -> Sample:
        name, shard, first = self.plan.locate(position)
        source = self.sources[name]
        count = int(source.counts[shard])
        bad: list[tuple[str, ImageError]] = []
        for step in range(min(count, MAX_NEIGHBOURS)):
            number = (first + step) % count  # a bad sample gives way to its neighbour
            key = ""
            try:
                key, data = source.read(shard, number)
                image, profile = self._load(data, position)
            except ImageError as error:
                bad.append((printable(f"{name}/{key or source.name(shard, number)}"), error))
            else:
                skipped = [f"{file}: {error}" for file, error in bad[:1]]
                return Sample(image, self._noise(position), f"{name}/{key}", skipped, profile)
        raise self._exhausted(bad, source.location(shard))

    def _exhausted(self, bad: Sequence[tuple[str, ImageError]], where: str) -> MissingInputError:
        """The error where no image can be used; its remedy is another if all are too small."""
        sides = [error.side for _, error in bad if isinstance(error, SmallImageError)]
        remedy = f"check {where} and data.shorter_side={self.shown_side}, data.crop={self.crop}"
        if len(sides) == len(bad):
            remedy = self._fitting_crop(min(sides))
        first, error = bad[0]
        return MissingInputError(
            f"{counted(len(bad), 'image', 's')} in a row cannot be used, from {first}: {error}; "
            + remedy
        )

    def _fitting_crop(self, side: int) -> str:
        """What to set where all images are smaller than the crop, the smallest of `side` pixels."""
        crop = side // self.factor * self.factor
        smaller = f"set data.crop to {crop} or less, or " if crop else "set "
        return f"{smaller}data.shorter_side={self.crop} (which enlarges them)"

    def _load(self, data: bytes, position: int) -> tuple[Tensor, str]:
        """The crop, and the colour profile that the image was converted from."""
        # Always three draws, so that crops do not depend on data.flip.
        top, left, mirror = random_state(self.seed, "crop", position).random_sample(3)
        side = self._drawn_side(self.sides, position) if self.sides else self.side
        image, profile = images.picture(data, side if self.draft else None)  # (3, H, W) uint8
        if side is not None:
            image = images.resize_shorter(image, side)
        image = images.crop(image, self.crop, float(top), float(left))  # (3, crop, crop)
        return (images.flip(image) if self.flip and mirror < 0.5 else image), profile

    def _drawn_side(self, sides: tuple[int, int], position: int) -> int:
        """One of the shorter sides, from a stream of its own: crops stay as they are."""
        least, most = sides
        return int(random_state(self.seed, "scale", position).randint(least, most + 1))

    def _noise(self, position: int) -> Tensor:
        draw = random_state(self.seed, "noise", position).standard_normal(self.noise_shape)
        if self.perturbs:
            draw = np.concatenate([draw, self._perturbation(position)])
        return torch.from_numpy(draw).float()

    def _perturbation(self, position: int) -> np.ndarray:
        """u e, (1, C, h, w), from a stream of its own: the noise stays as it is."""
        state = random_state(self.seed, "latents", position)
        share: np.ndarray = state.random_sample() * state.standard_normal(self.noise_shape[1:])
        return share[None]


class IterationSampler(Sampler[list[int]]):
    """The positions of one rank, an iteration at a time: warm-up (-n .. -1), then start .. stop."""

    def __init__(
        self, start: int, stop: int, warmup: int, batch: int, rank: int, world: int
    ) -> None:
        self.iterations = (range(-warmup, 0), range(start, stop))
        self.batch, self.rank, self.per_rank = batch, rank, batch // world

    def __iter__(self) -> Iterator[list[int]]:
        for part in self.iterations:
            for iteration in part:
                # Consecutive slots for each rank: their order is the batch's, whatever the number
                # of ranks.
                first = iteration * self.batch + self.rank * self.per_rank
                yield list(range(first, first + self.per_rank))

    def __len__(self) -> int:
        return sum(len(part) for part in self.iterations)


def open_data(
    config: Config, warn: Callable[[str], None] = print
) -> tuple[Plan, dict[str, TarSource | FolderSource]]:
    """Opens every source of a configuration and deals them.

    Raises MissingInputError for shards that are missing, broken, empty or not indexed.
    """
    cache = shard_cache(config)
    data = config.data
    sources = {
        name: open_source(
            name,
            source.shards,
            source.filters,
            cache,
            bad_shards=data.bad_shards,
            index_dir=data.index_dir,
            warn=warn,
        )
        for name, source in data.sources.items()
    }
    counts = {name: source.counts.tolist() for name, source in sources.items()}
    return Plan(counts, source_shares(config), data.lanes, config.seed), sources


def shard_cache(config: Config) -> ShardCache:
    """The node's cache of remote shards."""
    root = Path(config.data.cache_dir or cache_dir() / "shards")
    return ShardCache(root, round(config.data.cache_gib * 2**30))


def upcoming(
    plan: Plan,
    sources: Mapping[str, ImageSource],
    iterations: range,
    rank: int,
    world: int,
) -> list[str]:
    """Locations of the shards that a rank reads in these iterations, in the order of their use."""
    found: dict[str, None] = {}
    for positions in IterationSampler(
        iterations.start, iterations.stop, 0, plan.batch, rank, world
    ):
        for position in positions:
            name, shard, _ = plan.locate(position)
            found[sources[name].location(shard)] = None
    return list(found)


def collate(samples: list[Sample]) -> Batch:
    """Stacks samples into a batch."""
    return Batch(
        images=torch.stack([s.image for s in samples]),  # (B, 3, crop, crop) uint8
        noise=torch.stack([s.noise for s in samples], dim=1),  # (draws, B, C, h, w)
        keys=[s.key for s in samples],
        skipped=[bad for s in samples for bad in s.skipped],
        profiles=[s.profile for s in samples if s.profile],
    )


class Collate:
    """`collate` in a loader process, which then hands the batch over."""

    def __init__(self, by_pipe: bool) -> None:
        self.handover = Handover()
        self.handover.by_pipe = by_pipe

    def __call__(self, samples: list[Sample]) -> Parcel:
        """Arrives in the main process as a Batch."""
        return self.handover(collate(samples))


def loader(
    dataset: PositionDataset, sampler: IterationSampler, workers: int, pin_memory: bool = False
) -> DataLoader[Sample]:
    """Loads whole iterations in worker processes, for a GPU into page-locked memory."""
    dataset.watch(workers)
    few_files = raise_open_files() < FEW_FILES
    # torch would say it twice at each start; workers that wait cost little
    warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=Collate(few_files) if workers else collate,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=functools.partial(start_worker, os.getpid()),
    )


def start_worker(parent: int, worker: int) -> None:
    """Prepares a loader: single-threaded, ignores the run's signals, and ends with `parent`.

    SLURM sends signals to every process; the main process ends its loaders. torch's own check on
    the parent would miss one that died before the loader came to it.
    """
    start_child(parent, *SIGNALS)
