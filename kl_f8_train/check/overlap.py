"""Whether validation pictures are trained on: equal files, and near-duplicates."""

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from kl_f8_train.data import near
from kl_f8_train.data.sources import ImageSource
from kl_f8_train.errors import ImageError
from kl_f8_train.folders import list_folder
from kl_f8_train.images import read_file
from kl_f8_train.transfer import is_remote
from kl_f8_train.units import counted, printable

# Most that is compared, so that large data sets take only seconds.
CHECKED_PICTURES = 200  # of the validation's folder, from its beginning
SAME_SIZE = 500  # images of a source whose bytes are compared: those as long as a picture
LOOKS = 1000  # images, evenly over all sources, that are decoded to find near-duplicates


@dataclass
class Overlap:
    """What validation pictures and training images have in common."""

    pictures: int  # compared
    checked: str  # with what: "147 training images"
    common: dict[str, str] = field(default_factory=dict)  # picture -> a training image like it

    def __str__(self) -> str:
        known = len(self.common) or "none"
        return f"{self.pictures} compared with the {self.checked}: {known} in common"


def find(folder: Path, sources: Mapping[str, ImageSource]) -> Overlap:
    """Compares the pictures of a folder with the images of local sources; shards elsewhere are not.

    Equal files are found by their length in all of a source, near-duplicates in a sample of it.
    """
    pictures = list(_readable(folder, islice(list_folder(folder).files, CHECKED_PICTURES)))
    local = {name: source for name, source in sources.items() if not is_remote(source.location(0))}
    common = dict(_equal(pictures, local))
    places = list(_spread(local))
    total = sum(int(source.counts.sum()) for source in local.values())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        seen = [found for found in pool.map(_look_of, places) if found]
    if seen and pictures:
        mine = np.stack([look for *_, look in pictures])
        theirs = np.stack([look for *_, look in seen])
        for one, other in near.alike(mine, theirs):
            common.setdefault(pictures[one][0], seen[other][0])
    sampled = "" if len(places) == total else f" (equal files; near-duplicates in {len(places):,})"
    remote = "; those in remote shards were not compared" if len(local) < len(sources) else ""
    return Overlap(
        len(pictures), f"{counted(total, 'training image', 's')}{sampled}{remote}", common
    )


def _readable(folder: Path, files: Iterable[str]) -> Iterator[tuple[str, bytes, np.ndarray]]:
    """(name, bytes, look) of each picture that can be decoded."""
    for file in files:
        with contextlib.suppress(ImageError):
            data = read_file(folder / file)
            yield printable(file), data, near.look(data)


def _equal(
    pictures: Iterable[tuple[str, bytes, np.ndarray]], sources: Mapping[str, ImageSource]
) -> Iterator[tuple[str, str]]:
    """(picture, training image) of each that has the same bytes."""
    known = {hashlib.sha256(data).digest(): name for name, data, _ in pictures}
    lengths = {len(data) for _, data, _ in pictures}
    for name, source in sources.items():
        for shard, sample in islice(source.of_sizes(lengths), SAME_SIZE):
            with contextlib.suppress(ImageError):
                key, data = source.read(shard, sample)
                if (picture := known.get(hashlib.sha256(data).digest())) is not None:
                    yield picture, printable(f"{name}/{key}")


def _spread(sources: Mapping[str, ImageSource]) -> Iterator[tuple[str, ImageSource, int, int]]:
    """(source's name, source, shard, sample) of up to LOOKS images, evenly over all."""
    total = sum(int(source.counts.sum()) for source in sources.values())
    for name, source in sources.items():
        ends = np.cumsum(source.counts)
        step = max(1.0, total / LOOKS)
        for number in np.arange(0, int(ends[-1]), step).astype(np.int64):
            shard = int(np.searchsorted(ends, number, side="right"))
            yield name, source, shard, int(number - (ends[shard] - source.counts[shard]))


def _look_of(place: tuple[str, ImageSource, int, int]) -> tuple[str, np.ndarray] | None:
    """The name of a training image and its look; None if it cannot be decoded."""
    name, source, shard, sample = place
    try:
        key, data = source.read(shard, sample)
        return printable(f"{name}/{key}"), near.look(data)
    except ImageError:
        return None
