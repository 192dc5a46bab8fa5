"""The images of a source by shard and number: indexed tar shards, after filters, or a folder."""

import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from kl_f8_train.data.index import (
    GONE,
    PART_SHARDS,
    TAR_BLOCK,
    UNFETCHED,
    UNREADABLE,
    build_index,
    expand,
    fingerprints,
    index_directories,
    index_directory,
    tars_in,
)
from kl_f8_train.data.shard_cache import ShardCache
from kl_f8_train.errors import ImageError, MissingInputError, UsageError, about
from kl_f8_train.files import cache_dir, one_at_a_time
from kl_f8_train.folders import Listing, list_folder
from kl_f8_train.images import patiently, read_file
from kl_f8_train.launch import available_cores
from kl_f8_train.overrides import source_setting
from kl_f8_train.transfer import is_remote, plain_paths
from kl_f8_train.units import are, counted, printable

AUTOMATIC = 2000  # local shards that are indexed without being asked
COMPARISONS = {  # a longer sign before the one it begins with
    ">=": np.greater_equal,
    "<=": np.less_equal,
    "==": np.equal,
    "!=": np.not_equal,
    ">": np.greater,
    "<": np.less,
}


@dataclass(frozen=True)
class Filter:
    """`field operator number`; a sample without the field is dropped."""

    field: str
    operator: str
    number: float

    @classmethod
    def parse(cls, text: str) -> "Filter":
        """Reads "width >= 256". Raises UsageError for anything else."""
        signs = "|".join(COMPARISONS)
        match = re.fullmatch(rf"\s*([\w.]+)\s*({signs})\s*([-+.\deE]+)\s*", text)
        if not match:
            raise UsageError(
                f"filter {text!r}: expected FIELD OPERATOR NUMBER, such as 'width >= 256', with "
                f"one of {' '.join(COMPARISONS)}"
            )
        try:
            return cls(match[1], match[2], float(match[3]))
        except ValueError:
            raise UsageError(f"filter {text!r}: got {match[3]}, expected a number") from None

    def __str__(self) -> str:
        return f"{self.field} {self.operator} {self.number:g}"

    def mask(self, values: np.ndarray) -> np.ndarray:
        """Which values pass; a missing one (NaN) does not."""
        passed: np.ndarray = COMPARISONS[self.operator](values, np.float32(self.number))
        return passed & ~np.isnan(values)


def parse_filters(texts: Iterable[str]) -> list[Filter]:
    """Conditions, also several in one string: "width >= 256, aesthetic > 5"."""
    return [Filter.parse(part) for text in texts for part in text.split(",") if part.strip()]


class TarSource:
    """Indexed shards, after filters."""

    def __init__(self, directory: Path, filters: Sequence[Filter], cache: ShardCache) -> None:
        header = json.loads((directory / "index.json").read_text(encoding="utf-8"))
        self.directory, self.cache, self.filters = directory, cache, list(filters)
        self.locations: list[str] = header["locations"]
        self.remote = [is_remote(place) for place in self.locations]
        self.fingerprints: list[list[int]] = header["fingerprints"]
        self.broken = {str(place): str(why) for place, why in header["broken"].items()}
        self.without_image: int = header["without_image"]
        self.columns: list[str] = header["columns"]
        self.starts = np.concatenate([[0], np.cumsum(np.array(header["counts"], np.int64))])
        self.blocks, self.sizes = self._mapped("blocks"), self._mapped("sizes")
        self.dropped: Counter[str] = Counter()  # filter -> images
        self.counts = self._filtered_counts()
        # A loader reads from a few shards at a time.
        self._kept = lru_cache(maxsize=256)(self._kept_rows)

    def __reduce__(self) -> tuple[type["TarSource"], tuple[Any, ...]]:
        """For loader processes: they map the arrays again."""
        return TarSource, (self.directory, self.filters, self.cache)

    def changed(self) -> list[str]:
        """Local shards that are not what was indexed."""
        now = fingerprints(self.locations)
        return [
            place
            for place, before, after in zip(self.locations, self.fingerprints, now, strict=True)
            if before != after and not (before in (UNFETCHED, GONE) and is_remote(place))
        ]

    def unfetched(self) -> int:
        """How many of its shards could not be fetched; those that are broken do not count."""
        return self.fingerprints.count(UNFETCHED)

    def read(self, shard: int, sample: int) -> tuple[str, bytes]:
        """Name, from the header in front of the data, and encoded image.

        Raises MissingInputError if the shard is gone, or is another than the one indexed.
        """
        row = self._kept(shard)[sample]
        # One read: the header, a block in front of the data, begins with 100 bytes of name (POSIX
        # ustar).
        offset, size = (int(self.blocks[row]) - 1) * TAR_BLOCK, int(self.sizes[row])
        place = self.locations[shard]
        try:
            file = patiently(partial(self._open, shard))
        except OSError as error:
            raise _gone(place, error) from error
        with file:
            try:
                data = patiently(lambda: os.pread(file.fileno(), TAR_BLOCK + size, offset))
            except OSError as error:
                raise ImageError(f"cannot be read: {error.strerror or error}") from error
            status = os.fstat(file.fileno())
        same = [status.st_size, status.st_mtime_ns] == self.fingerprints[shard]
        if not (same or self.remote[shard] or _is_member(data, size)):
            raise _changed(place)
        member = data[:100].split(b"\0", 1)[0].decode("utf-8", "replace").rpartition("/")[2]
        return f"{os.path.basename(place)}/{member or f'image {sample}'}", data[TAR_BLOCK:]

    def _open(self, shard: int) -> BinaryIO:
        place = self.locations[shard]
        return self.cache.open(place) if self.remote[shard] else open(place, "rb")

    def name(self, shard: int, sample: int) -> str:
        """The shard, and the number of the image in it."""
        return f"{printable(self.locations[shard])}, image {sample}"

    def location(self, shard: int) -> str:
        """Path or address of a shard."""
        return self.locations[shard]

    def describe(self) -> list[str]:
        """Images, shards, and the share that each filter dropped."""
        total, kept = int(self.starts[-1]), int(self.counts.sum())
        lines = [f"{counted(kept, 'image', 's')} in {counted(len(self.locations), 'shard', 's')}"]
        for text, number in self.dropped.items():
            lines.append(f"{text} dropped {number:,} ({100 * number / max(total, 1):.1f} %)")
        if self.without_image:
            lines.append(f"{counted(self.without_image, 'sample', 's')} without an image")
        return lines

    def files_held(self) -> Iterable[tuple[str, int, int]]:
        """(name, bytes of its images, images after filters) of each shard."""
        for shard, place in enumerate(self.locations):
            rows = slice(int(self.starts[shard]), int(self.starts[shard + 1]))
            held = int(self.sizes[rows].sum(dtype=np.int64))
            yield os.path.basename(place), held, int(self.counts[shard])

    def of_sizes(self, sizes: set[int]) -> Iterator[tuple[int, int]]:
        """By the index, without opening a shard."""
        wanted = np.array(sorted(sizes), np.int64)
        for shard in range(len(self.locations)):
            for sample in np.flatnonzero(np.isin(self.sizes[self._kept(shard)], wanted)):
                yield shard, int(sample)

    def _filtered_counts(self) -> np.ndarray:
        """Images of each shard that pass, a stretch of shards at a time to bound the memory."""
        counts = np.diff(self.starts)
        if not self.filters:
            return counts
        for first in range(0, len(counts), 1000):
            edges = self.starts[first : first + 1001]
            keep = self._passing(edges[0], edges[-1], self.dropped)
            running = np.concatenate([[0], np.cumsum(keep)])  # images kept before each row
            counts[first : first + 1000] = np.diff(running[edges - edges[0]])  # of each shard
        return counts

    def _kept_rows(self, shard: int) -> np.ndarray:
        start, stop = self.starts[shard : shard + 2]
        return np.flatnonzero(self._passing(start, stop, Counter())) + start

    def _passing(self, start: int, stop: int, dropped: Counter[str]) -> np.ndarray:
        """Which rows of the index pass all filters; counts those that each of them drops."""
        keep = np.ones(stop - start, bool)
        for item in self.filters:
            passed = item.mask(self._column(item.field)[start:stop])
            dropped[str(item)] += int((keep & ~passed).sum())
            keep &= passed
        return keep

    def _column(self, name: str) -> np.ndarray:
        if name not in self.columns:
            known = ", ".join(self.columns) or "none at all"
            raise UsageError(
                f"no image has a field {name!r} to filter by, which is a number at the top of its "
                f"JSON; there are {known}"
            )
        return self._mapped(f"column-{self.columns.index(name)}")

    def _mapped(self, name: str) -> np.ndarray:
        """An array of the index; ValueError if it is not as long as index.json says."""
        array: np.ndarray = np.load(self.directory / f"{name}.npy", mmap_mode="r")
        if len(array) != self.starts[-1]:
            raise ValueError(f"{name}.npy: got {len(array)} rows, expected {self.starts[-1]}")
        return array


def _gone(place: str, error: OSError) -> MissingInputError:
    return MissingInputError(
        f"shard {place} cannot be opened any more: {error.strerror or error}; put it back, then "
        "run the same command again"
    )


def _changed(place: str) -> MissingInputError:
    return MissingInputError(
        f"shard {place} has changed since it was indexed; put the old one back, or run the same "
        "command again, which indexes it anew and says what has changed"
    )


def _is_member(data: bytes, size: int) -> bool:
    """Whether a tar's header and as many bytes as it states, `size`, are there."""
    try:
        stated = int(data[124:136].strip(b" \0"), 8)  # POSIX ustar
    except ValueError:
        return False
    return stated == size and len(data) == TAR_BLOCK + size


class FolderSource:
    """A folder of image files, as one shard."""

    def __init__(self, folder: Path, listing: Listing | None = None) -> None:
        self.folder = folder
        self.listing = listing or list_folder(folder)
        self.files = self.listing.files
        self.counts = np.array([len(self.files)], np.int64)

    def leave_out(self, inner: Path) -> None:
        """Forgets the files below a folder in this one."""
        where, inner = self.folder.resolve(), inner.resolve()
        if where in inner.parents:
            self.files = [file for file in self.files if inner not in (where / file).parents]
            self.counts = np.array([len(self.files)], np.int64)

    def read(self, shard: int, sample: int) -> tuple[str, bytes]:
        """The file's path below the folder, and its bytes."""
        return self.files[sample], read_file(self.folder / self.files[sample])

    def name(self, shard: int, sample: int) -> str:
        """The file's path below the folder, printable."""
        return printable(self.files[sample])

    def location(self, shard: int) -> str:
        """The folder."""
        return str(self.folder)

    def files_held(self) -> Iterable[tuple[str, int, int]]:
        """(path below the folder, bytes, 1) of each file; one that is gone has -1 bytes."""
        places = [os.path.join(self.folder, file) for file in self.files]
        for file, (size, _) in zip(self.files, fingerprints(places), strict=True):
            yield file, size, 1

    def of_sizes(self, sizes: set[int]) -> Iterator[tuple[int, int]]:
        """As the file system says now."""
        for sample, (_, held, _) in enumerate(self.files_held()):
            if held in sizes:
                yield 0, sample

    def describe(self) -> list[str]:
        """How many files are used, and how many of which kind are not."""
        rest = self.listing.describe()
        images = counted(len(self.files), "image", "s")
        return [f"{images} in a folder; {rest}" if rest else f"{images} in a folder"]


ImageSource = TarSource | FolderSource


def open_source(
    name: str,
    pattern: str,
    filters: Sequence[str],
    cache: ShardCache,
    *,
    bad_shards: str = "stop",
    index_dir: str | None = None,
    warn: Callable[[str], None] = print,
    label: str | None = None,
) -> ImageSource:
    """Opens a source; a small local one is indexed here, a large or remote one beforehand.

    `label` is where the user named it, for errors.

    Raises MissingInputError if shards are missing, broken or not indexed, or nothing is left.
    """
    where = label or source_setting(name, pattern)
    pattern = plain_paths(pattern)
    with about(where):
        parsed = parse_filters(filters)
        folder = Path(pattern)
        if folder.is_dir() and (listing := _photographs(folder)):
            if parsed:
                raise UsageError(
                    "filters need shards with metadata; this is a plain folder: `kl-f8-train pack` "
                    "it, or leave them out"
                )
            return FolderSource(folder, listing)
        source = TarSource(_index_of(pattern, cache, index_dir), parsed, cache)
    broken = list(source.broken.values())
    if broken and bad_shards == "stop":
        raise MissingInputError(
            "\n".join(broken[:10])
            + f"\n{len(broken):,} of {counted(len(source.locations), 'shard', 's')} of {name} "
            f"{are(len(broken))} broken; repair them, or "
            "leave them out with data.bad_shards=skip; `kl-f8-train index` retries those that "
            "could not be fetched"
        )
    for message in broken[:20]:
        warn(f"{message}; left out")
    if not source.counts.sum():
        lines = "; ".join(source.describe())
        remedy = "; loosen the filters" if parsed else "; pack some with `kl-f8-train pack`"
        raise MissingInputError(f"{where}: no image is left: {lines}{remedy}")
    return source


def _photographs(folder: Path) -> Listing | None:
    """The photographs of a folder; None unless it has more of them than shards."""
    listing = list_folder(folder)
    return listing if len(listing.files) > len(tars_in(folder)) else None


def _fresh(directory: Path, cache: ShardCache) -> bool:
    """Whether there is an index that can be read, of the shards as they are now."""
    try:
        source = TarSource(directory, [], cache)
        for name in source.columns:
            source._column(name)
        return not source.changed()
    except UNREADABLE:
        return False


def _index_of(pattern: str, cache: ShardCache, index_dir: str | None) -> Path:
    """Where the index of these shards lies; it is built first if it is not there, or outdated."""
    locations = expand(pattern)
    for directory in index_directories(locations, index_dir):
        if _fresh(directory, cache):
            return directory
    directory = index_directory(locations, index_dir)
    with one_at_a_time(directory):  # one rank builds, the others wait
        if not _fresh(directory, cache):
            _build_here(locations, directory, cache, pattern, index_dir)
    return directory


def _build_here(
    locations: Sequence[str],
    directory: Path,
    cache: ShardCache,
    pattern: str,
    index_dir: str | None,
) -> None:
    """Indexes a small local source; MissingInputError for another, with the command that does."""
    remote = sum(is_remote(place) for place in locations)
    if remote or len(locations) > AUTOMATIC:
        flags = ["--index-dir", index_dir] if index_dir else []
        if cache.root != cache_dir() / "shards":
            flags += ["--cache-dir", str(cache.root)]
        raise MissingInputError(
            f"{counted(len(locations), 'shard', 's')} ({remote:,} remote) not indexed yet; run "
            f"once, which reads every shard: "
            f"{shlex.join(['kl-f8-train', 'index', pattern, *flags])}"
        )
    workers = available_cores() if len(locations) > PART_SHARDS else 1
    build_index(locations, directory, cache, workers)
