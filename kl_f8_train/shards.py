"""Which image is the i-th of iteration t, and its bytes, from WebDataset shards.

Each shard is indexed once from its tar headers. A plan then is arithmetic: the shards of a source,
permuted anew in each pass, form one stream with the samples permuted inside each shard; the stream
is cut into L equal lanes, and every iteration takes the next few samples of each lane. Nothing
depends on the number of processes or workers, and nothing needs to be stored to resume.
"""

import glob
import hashlib
import os
import tarfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from webdataset.shardlists import expand_urls
from webdataset.writer import ShardWriter

from kl_f8_train.errors import MissingInputError, UsageError
from kl_f8_train.images import SUFFIXES


@dataclass(frozen=True)
class Shard:
    """The images of one tar file: where their bytes lie."""

    path: Path
    keys: tuple[str, ...]
    offsets: np.ndarray
    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, sample: int) -> bytes:
        """The encoded image of one sample."""
        with self.path.open("rb") as file:
            return os.pread(file.fileno(), int(self.sizes[sample]), int(self.offsets[sample]))


# --- finding and indexing -------------------------------------------------------------------


def expand(pattern: str) -> list[Path]:
    """Brace pattern, glob, directory, list file (.txt) or single tar -> paths of shards.

    Raises MissingInputError naming what is not there.
    """
    path = Path(pattern)
    try:
        parts = list(expand_urls(pattern))
    except (ValueError, AssertionError) as error:
        raise MissingInputError(f"no shards: {pattern} is not a pattern: {error}") from error
    if path.is_dir():
        paths = sorted(path.glob("*.tar"))
        if not paths:
            raise MissingInputError(
                f"no shards: {path} holds no .tar files (`kl-f8-train pack` makes them)"
            )
    elif path.suffix == ".txt" and path.is_file():
        paths = [Path(line.strip()) for line in path.read_text().splitlines() if line.strip()]
    elif any(letter in pattern for letter in "*?["):
        paths = [Path(found) for part in parts for found in sorted(glob.glob(part))]
    else:
        paths = [Path(part) for part in parts]
    missing = [str(p) for p in paths if not p.is_file()]
    if missing or not paths:
        shown = ", ".join(missing[:3]) or pattern
        raise MissingInputError(
            f"no shards: {len(missing)} of {len(paths)} files are missing ({shown})"
        )
    return paths


def index_shard(path: Path) -> Shard:
    """Reads the headers of one tar.

    Raises MissingInputError if it is cut short (also at a header boundary) or is no tar.
    """
    keys: list[str] = []
    offsets: list[int] = []
    sizes: list[int] = []
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                name = member.name.rsplit("/", 1)[-1]
                key, _, extension = name.partition(".")
                if member.isfile() and f".{extension.lower()}" in SUFFIXES:
                    keys.append(key)
                    offsets.append(member.offset_data)
                    sizes.append(member.size)
            end = archive.offset
        with path.open("rb") as file:
            file.seek(end)
            block = file.read(512)
        marked = len(block) == 512 and not block.strip(b"\0")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise MissingInputError(
            f"shard {path} is broken: {error} after {len(keys)} images"
        ) from error
    if not marked:
        raise MissingInputError(f"shard {path} is cut short: no end mark after {len(keys)} images")
    return Shard(path, tuple(keys), np.array(offsets, np.int64), np.array(sizes, np.int64))


def index_source(
    name: str, pattern: str, bad_shards: str = "stop", warn: Callable[[str], None] = print
) -> list[Shard]:
    """Indexes every shard of a source; a broken one stops, or is left out and named ("skip").

    Raises MissingInputError if shards are missing or broken, or hold no image at all.
    """
    try:
        paths = expand(pattern)
    except MissingInputError as error:
        raise MissingInputError(f"data.sources.{name}.shards={pattern}: {error}") from error
    with ThreadPoolExecutor(max_workers=8) as pool:
        found = list(pool.map(_try_index, paths))
    broken = [str(item) for item in found if isinstance(item, MissingInputError)]
    shards = [item for item in found if isinstance(item, Shard) and len(item)]
    if broken and bad_shards == "stop":
        raise MissingInputError(
            "\n".join(broken[:10])
            + f"\n{len(broken)} of {len(paths)} shards of {name} are broken; "
            "mend them, or leave them out with data.bad_shards=skip"
        )
    for message in broken:
        warn(f"{message}; left out")
    if not shards:
        raise MissingInputError(
            f"data.sources.{name}.shards={pattern}: no image in {len(paths)} shards"
        )
    return shards


def _try_index(path: Path) -> Shard | MissingInputError:
    try:
        return index_shard(path)
    except MissingInputError as error:
        return error


# --- the plan -------------------------------------------------------------------------------


def random_state(*parts: int | str) -> np.random.RandomState:
    """A generator that depends on its arguments alone; its stream is frozen across releases."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return np.random.RandomState(np.frombuffer(digest, np.uint32))


@lru_cache(maxsize=512)
def permutation(size: int, *parts: int | str) -> np.ndarray:
    """A permutation of 0 .. size - 1 that depends on its arguments alone."""
    return random_state(*parts).permutation(size)


class SourcePlan:
    """Deals the samples of one source: `share` of them in every iteration."""

    def __init__(self, name: str, counts: Sequence[int], share: int, lanes: int, seed: int) -> None:
        self.name, self.share, self.seed = name, share, seed
        self.counts = np.asarray(counts, np.int64)
        total = int(self.counts.sum())
        self.lanes = max(d for d in range(1, min(lanes, share, total) + 1) if share % d == 0)
        self.lane_length = total // self.lanes  # samples of a lane in each pass
        self.per_lane = share // self.lanes  # samples of a lane in each iteration

    def locate(self, iteration: int, index: int) -> tuple[int, int]:
        """(shard, sample) of the index-th sample (0 .. share - 1) of an iteration."""
        lane, offset = divmod(index, self.per_lane)
        number, place = divmod(iteration * self.per_lane + offset, self.lane_length)
        return self._at(number, lane * self.lane_length + place)

    def _at(self, number: int, place: int) -> tuple[int, int]:
        """The sample at a place of the stream of pass `number`."""
        order = permutation(len(self.counts), self.seed, self.name, "shards", number)
        ends = _ends(self.counts.tobytes(), order.tobytes())
        row = int(np.searchsorted(ends, place, side="right"))
        shard = int(order[row])
        count = int(self.counts[shard])
        inside = place - int(ends[row] - count)
        samples = permutation(count, self.seed, self.name, "samples", number, shard)
        return shard, int(samples[inside])


@lru_cache(maxsize=16)
def _ends(counts: bytes, order: bytes) -> np.ndarray:
    return np.cumsum(np.frombuffer(counts, np.int64)[np.frombuffer(order, np.int64)])


class Plan:
    """Deals all sources: position = iteration * batch + slot -> which sample."""

    def __init__(
        self, sources: dict[str, list[Shard]], shares: dict[str, int], lanes: int, seed: int
    ):
        self.batch = sum(shares.values())
        self.shards = sources
        self.plans = {
            name: SourcePlan(name, [len(s) for s in shards], shares[name], lanes, seed)
            for name, shards in sources.items()
        }
        self.slots = interleave(shares)

    def locate(self, position: int) -> tuple[str, Shard, int]:
        """(source, shard, sample) at a position; warm-up iterations are negative."""
        iteration, slot = divmod(position, self.batch)
        name, index = self.slots[slot]
        shard, sample = self.plans[name].locate(iteration, index)
        return name, self.shards[name][shard], sample


def interleave(shares: dict[str, int]) -> list[tuple[str, int]]:
    """The slots of a batch, sources evenly mixed: [(source, index within its share), ...]."""
    places = [
        ((index + 0.5) / share, name, index)
        for name, share in shares.items()
        for index in range(share)
    ]
    return [(name, index) for _, name, index in sorted(places)]


# --- packing --------------------------------------------------------------------------------


def pack(files: Sequence[Path], out: Path, per_shard: int = 1000) -> list[Path]:
    """Writes image files, as they are, into shards `out/00000.tar`, ... with a key each.

    Raises UsageError if `out` already holds shards.
    """
    if out.is_dir() and any(out.glob("*.tar")):
        raise UsageError(f"{out} already holds shards; name an empty directory")
    out.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(str(out / "%05d.tar"), maxcount=per_shard, verbose=0, mtime=0)
    with writer:
        for number, file in enumerate(files):
            suffix = file.suffix.lower().lstrip(".")
            writer.write(
                {
                    "__key__": f"{number:09d}",
                    suffix: file.read_bytes(),
                    "json": {"file_name": file.name},
                }
            )
    return sorted(out.glob("*.tar"))
