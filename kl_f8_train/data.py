"""Samples -> batches: decode, resize, crop, noise.

Crop and noise are drawn from (seed, position), so a batch is the same whatever the number of
GPUs, workers and restarts.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from kl_f8_train import images
from kl_f8_train.config import Config, source_shares
from kl_f8_train.errors import ImageError, MissingInputError
from kl_f8_train.shards import Plan, Shard, index_source, random_state

MAX_NEIGHBOURS = 100  # bad samples in a row before the run stops


@dataclass
class Sample:
    """One position: its image, noise and name."""

    image: Tensor  # (3, crop, crop) uint8
    noise: Tensor  # (draws, embed_dim, crop / f, crop / f) float32
    key: str
    skipped: list[str]


@dataclass
class Batch:
    """One iteration of one rank."""

    images: Tensor  # (B, 3, crop, crop) uint8
    noise: Tensor  # (draws, B, embed_dim, h, w) float32, standard normal
    keys: list[str]
    skipped: list[str]

    def pin_memory(self) -> "Batch":
        """Page-locked tensors, for the copy to the GPU."""
        return Batch(self.images.pin_memory(), self.noise.pin_memory(), self.keys, self.skipped)

    def to(self, device: torch.device, non_blocking: bool = True) -> "Batch":
        """The batch with its tensors on `device`."""
        images, noise = (t.to(device, non_blocking=non_blocking) for t in (self.images, self.noise))
        return Batch(images, noise, self.keys, self.skipped)


class PositionDataset(Dataset[Sample]):
    """position = iteration * global_batch + slot -> Sample."""

    def __init__(self, plan: Plan, config: Config) -> None:
        self.plan = plan
        self.seed = config.seed
        self.shorter_side = config.data.shorter_side
        self.crop = config.data.crop
        side = config.data.crop // 2 ** (len(config.model.ch_mult) - 1)
        self.noise_shape = (2 if config.second_forward else 1, config.model.embed_dim, side, side)

    def __getitem__(self, position: int) -> Sample:
        """Raises MissingInputError if MAX_NEIGHBOURS samples in a row are bad."""
        source, shard, first = self.plan.locate(position)
        top, left = random_state(self.seed, "crop", position).random_sample(2)
        skipped: list[str] = []
        for step in range(min(len(shard), MAX_NEIGHBOURS)):
            number = (first + step) % len(shard)  # a bad sample gives way to its neighbour
            key = f"{source}/{shard.path.name}/{shard.keys[number]}"
            try:
                image = self._load(shard, number, float(top), float(left))
            except ImageError as error:
                skipped.append(f"{key}: {error}")
                continue
            return Sample(image, self._noise(position), key, skipped)
        raise MissingInputError(
            f"{len(skipped)} images in a row cannot be used, from {skipped[0]}; "
            f"check {shard.path} and data.shorter_side={self.shorter_side}, data.crop={self.crop}"
        )

    def _load(self, shard: Shard, number: int, top: float, left: float) -> Tensor:
        image = images.decode(shard.read(number))
        if self.shorter_side is not None:
            image = images.resize_shorter(image, self.shorter_side)
        return images.crop(image, self.crop, top, left)

    def _noise(self, position: int) -> Tensor:
        draw = random_state(self.seed, "noise", position).standard_normal(self.noise_shape)
        return torch.from_numpy(draw).float()


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
                first = iteration * self.batch + self.rank * self.per_rank
                yield list(range(first, first + self.per_rank))

    def __len__(self) -> int:
        return sum(len(part) for part in self.iterations)


def build_plan(config: Config, warn=print) -> Plan:  # type: ignore[no-untyped-def]
    """Indexes every source of a configuration and deals them.

    Raises MissingInputError for shards that are missing, broken or empty.
    """
    sources = {
        name: index_source(name, source.shards, config.data.bad_shards, warn)
        for name, source in config.data.sources.items()
    }
    return Plan(sources, source_shares(config), config.data.lanes, config.seed)


def collate(samples: list[Sample]) -> Batch:
    """Stacks samples into a batch."""
    return Batch(
        images=torch.stack([s.image for s in samples]),
        noise=torch.stack([s.noise for s in samples], dim=1),
        keys=[s.key for s in samples],
        skipped=[line for s in samples for line in s.skipped],
    )


def loader(dataset: PositionDataset, sampler: IterationSampler, workers: int) -> DataLoader[Sample]:
    """Loads whole iterations in worker processes."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_single_thread,
    )


def _single_thread(worker: int) -> None:
    torch.set_num_threads(1)
