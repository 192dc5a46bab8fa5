"""Where the images of tar shards lie.

A shard is indexed once from its tar headers and JSON members: where each image lies, and every
number known of it. The index of a source is a directory of arrays that are mapped, not read, so
that 100,000 shards of 1,000 images open in seconds.
"""

import contextlib
import glob
import hashlib
import importlib.util
import itertools
import json
import os
import re
import tarfile
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from webdataset.shardlists import expand_urls

from kl_f8_train.data.patterns import COMPRESSED, UNPACK, check_named, existing, files_of
from kl_f8_train.data.shard_cache import ShardCache
from kl_f8_train.errors import MissingInputError, RunFailedError, like_path
from kl_f8_train.files import (
    DAMAGED,
    DiskError,
    atomic_path,
    beginning,
    cache_dir,
    check_writable,
    is_writable,
    temporary_dir,
    write_json,
)
from kl_f8_train.folders import (
    FIRST_BYTES,
    NO_IMAGES,
    SUFFIXES,
    is_system,
    list_folder,
    looks_like_image,
)
from kl_f8_train.images import MAX_BYTES
from kl_f8_train.lifetime import process_pool
from kl_f8_train.output import Progress
from kl_f8_train.transfer import is_remote, plain_paths, shown
from kl_f8_train.units import counted

TAR_BLOCK = 512  # bytes; everything in a tar starts at a multiple of it
TAR_RECORD = 1 << 16  # bytes, more than the 10,240 to which GNU tar pads
PART_SHARDS = 64  # shards indexed as one resumable part
MOST = 1_000_000  # shards of one pattern
JSON_BYTES = 16 << 20  # of the metadata of one image; a header may claim any size
UNREADABLE = (OSError, EOFError, zipfile.BadZipFile, *DAMAGED)  # of an index

# What tarfile raises of a broken tar; the last three where a header claims an absurd size.
BROKEN = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, MemoryError)

# In place of a fingerprint, and not what any shard has: what failed today is tried again.
UNFETCHED = [-2, 0]  # could not be fetched
GONE = [-3, 0]  # not there, or not readable
GIVE_UP = 3  # shards of a chunk that a server does not give after all attempts
PHOTOGRAPH_FIELDS = ("image", "img", "photo", "picture", "rgb", "input", "input_image", "original")


# --- finding --------------------------------------------------------------------------------


def expand(pattern: str) -> list[str]:
    """Brace pattern, glob, directory, list file (.txt), single tar or address -> shards.

    Raises MissingInputError naming what is not there.
    """
    pattern = plain_paths(pattern)
    path = Path(pattern)
    if os.path.isdir(pattern):
        found = tars_in(path)
        if not found:
            raise MissingInputError(_without_shards(path))
        return found
    if os.path.isfile(pattern):  # whatever signs its name holds
        return files_of(path)
    if "{" not in pattern:  # else each missing file is counted
        check_named(pattern)
    if pattern.startswith("pipe:"):
        return [pattern]
    try:
        if (count := _alternatives(pattern)) > MOST:
            raise ValueError(f"{count:,} shards, expected {MOST:,} at most")
        parts = list(expand_urls(pattern))
    except (ValueError, AssertionError) as error:
        raise MissingInputError(
            f"no shards: {pattern} is not a pattern: {error}; expected one as 00{{00..99}}.tar"
        ) from error
    if not is_remote(pattern) and any(letter in pattern for letter in "*?["):
        parts = [n for p in parts for n in sorted(glob.glob(p, recursive=True))] or parts
    return existing(parts)


def tars_in(folder: Path) -> list[str]:
    """The shards of a folder itself, sorted; a link to one that is gone is among them."""
    tars = (path for path in folder.glob("*.[tT][aA][rR]") if path.is_file() or _is_gone(path))
    return sorted(str(path) for path in tars if not path.name.startswith("."))


def _is_gone(link: Path) -> bool:
    """Whether a name in a folder is a link to what is not there; one in a circle is not."""
    try:
        link.stat()
    except FileNotFoundError:
        return True
    except OSError:
        pass
    return False


def _without_shards(folder: Path) -> str:
    """What is wrong with a folder that itself holds no .tar, and what may be meant."""
    none, listing = f"no shards and no images in {folder}", list_folder(folder)
    entries = sorted(folder.iterdir())
    packed = [entry.name for entry in entries if COMPRESSED.search(entry.name)]
    if packed:
        return f"{none}, but {packed[0]}: {UNPACK}"
    below = [entry.name for entry in entries if os.path.isdir(entry) and tars_in(entry)]
    if below:
        return (
            f"{none}, but in its folders {', '.join(below[:3])}{', ...' * (len(below) > 3)}: "
            f"name them, as '{folder}/*/*.tar'"
        )
    if listing.files:
        found = counted(len(listing.files), "photograph", "s")
        return f"no shards in {folder}, but {found}: a folder of photographs needs no index"
    return (
        f"{none}; expected .tar files or photographs as .jpg, .png, .webp, .tif, .bmp or .gif; "
        f"{listing.describe() or 'it is empty'}"
    )


def _alternatives(pattern: str) -> int:
    """How many places a brace pattern names, at most, without making them."""
    count = 1
    while group := re.search(r"\{([^{}]*)\}", pattern):  # the innermost ones first
        ends = re.fullmatch(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?", group[1])
        if ends:
            count *= abs(int(ends[2]) - int(ends[1])) // max(1, int(ends[3] or 1)) + 1
        elif letters := re.match(r"([a-zA-Z])\.\.([a-zA-Z])", group[1]):
            count *= abs(ord(letters[2]) - ord(letters[1])) + 1
        else:
            count *= group[1].count(",") + 1
        pattern = pattern[: group.start()] + pattern[group.end() :]
    return count


# --- one tar --------------------------------------------------------------------------------


@dataclass
class Member:
    """A file of a tar that may matter: an image, or numbers about one."""

    folder: str
    name: str
    offset: int  # bytes
    size: int  # bytes
    is_image: bool
    numbers: dict[str, float]  # in its own JSON; of an image that is indexed, in its sample's

    def key(self, dotted: bool) -> tuple[str, str]:
        """What the files of one sample share: the name up to its first dot, or its last."""
        return self.folder, self.name.rpartition(".")[0] if dotted else self.name.partition(".")[0]

    @property
    def field(self) -> str:
        """The part of the name that distinguishes a sample's files, as WebDataset reads names."""
        return self.name.partition(".")[2].lower()


@dataclass
class TarIndex:
    """The images of one tar, one of each sample, by the sample's key."""

    images: list[tuple[str, Member]] = field(default_factory=list)
    without_image: int = 0  # samples


def index_tar(path: Path) -> TarIndex:
    """Reads the headers and JSON members of one tar.

    Raises MissingInputError if it is cut short (also at a header boundary) or is not a tar.
    """
    members: list[Member] = []
    try:
        with path.open("rb") as file:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                members += filter(None, (_member(entry, file) for entry in archive))
                end = archive.offset
            file.seek(end)
            block, behind = file.read(TAR_BLOCK), file.read(TAR_RECORD)
    except BROKEN as error:
        found = f"is broken: {str(error) or 'it claims absurd sizes'} after {_images(members)}"
        if isinstance(error, FileNotFoundError):
            found = f"is not there{like_path(path)}"
        with contextlib.suppress(OSError), path.open("rb") as file:
            head = file.read(TAR_BLOCK)
            if not members and head[257:262] != b"ustar":  # POSIX, the header's magic
                found = f"is not a tar but {_what(head)}"
        raise MissingInputError(f"shard {path} {found}") from error
    # A tar ends with blocks of zeros (POSIX). tarfile also stops, without an error, where a file
    # was cut between two members.
    if len(block) != TAR_BLOCK or block.strip(b"\0"):
        raise MissingInputError(f"shard {path} is cut short: no end mark after {_images(members)}")
    if behind.lstrip(b"\0")[257:262] == b"ustar":
        raise MissingInputError(
            f"shard {path} holds another tar behind its end mark, after {_images(members)}, as "
            "`cat A.tar B.tar` joins them: no tool reads that part; join them by `tar -Af A B`"
        )
    return _index(members)


def _what(head: bytes) -> str:
    """What a file in place of a shard is."""
    if looks_like_image(head[:FIRST_BYTES]):
        return "an image; name the folder it lies in"
    known = beginning(head[:FIRST_BYTES])
    return known or f"a file that begins with {head[:9]!r}; expected shards, or a folder of images"


def _images(members: list[Member]) -> str:
    return counted(sum(member.is_image for member in members), "image", "s")


def _member(entry: tarfile.TarInfo, file: BinaryIO) -> Member | None:
    """What a file in a tar is; None for folders, links, and what a system keeps for itself."""
    folder, _, name = entry.name.rpartition("/")
    parts = [part for part in entry.name.split("/") if part.strip(".")]
    if entry.size < 0:
        raise tarfile.HeaderError(f"{entry.name!a} has a negative size")
    if not entry.isfile() or entry.issparse() or any(map(is_system, parts)):
        return None
    suffix = os.path.splitext(name)[1].lower()
    numbers: dict[str, float] = {}
    if suffix == ".json":
        text = os.pread(file.fileno(), min(JSON_BYTES, entry.size), entry.offset_data)
        numbers = _json_numbers(text)
    is_image = suffix in SUFFIXES
    if not is_image and suffix not in NO_IMAGES:
        head = os.pread(file.fileno(), min(FIRST_BYTES, entry.size), entry.offset_data)
        is_image = looks_like_image(head)
    is_image = is_image and entry.size <= MAX_BYTES
    return Member(folder, name, entry.offset_data, entry.size, is_image, numbers)


def _index(members: list[Member]) -> TarIndex:
    """One image of each sample, with the sample's numbers.

    A sample's files are neighbours that share the name up to its first dot, as WebDataset has it:
    `0.image.jpg`, `0.mask.png`. Where several images share it, but no field is there twice, or is
    known as a photograph's, the dots are the names' own (`IMG.1.jpg`, `IMG.2.jpg`), and the name
    ends at its last dot.
    """
    dotted = _are_dotted(members)
    found = TarIndex()
    for group in _groups(members, dotted):
        candidates = [member for member in group if member.is_image]
        if not candidates:
            found.without_image += 1
            continue
        chosen = candidates[0] if dotted else min(candidates, key=_field_rank)
        chosen.numbers = {k: v for member in group for k, v in member.numbers.items()}
        found.images.append((chosen.key(dotted)[1], chosen))
    return found


def _are_dotted(members: list[Member]) -> bool:
    """Whether images that share a name up to its first dot are samples of their own."""
    fields: list[str] = []
    rivals: list[str] = []
    for group in _groups(members, dotted=False):
        own = [member.field for member in group if member.is_image]
        fields += own
        rivals += own if len(own) > 1 else []
    if len(set(fields)) < len(fields) or any(map(_is_photograph, rivals)):
        return False
    return bool(rivals) and all("." in field for field in rivals)


def _groups(members: list[Member], dotted: bool) -> list[list[Member]]:
    """The files of each sample; where a name comes again, another sample begins."""
    groups: list[list[Member]] = []
    last: tuple[str, str] | None = None
    names: set[str] = set()
    for member in members:
        key = member.key(dotted)
        if key != last or member.name in names:
            groups.append([])
            names.clear()
        groups[-1].append(member)
        names.add(member.name)
        last = key
    return groups


def _field_rank(member: Member) -> int:
    """Which of a sample's images is the photograph: `jpg`, then `image.png`, then any other."""
    if f".{member.field}" in SUFFIXES:
        return 0
    return 1 if _is_photograph(member.field) else 2


def _is_photograph(field: str) -> bool:
    return field.partition(".")[0] in PHOTOGRAPH_FIELDS


def add_neighbours(found: TarIndex, path: Path) -> TarIndex:
    """What img2dataset wrote beside a shard: `_stats.json` checks it, `.parquet` adds numbers.

    The parquet is read only for images without JSON, and where pyarrow is installed. Raises
    MissingInputError if the shard holds fewer images than the statistics say.
    """
    stats = path.with_name(f"{path.stem}_stats.json")
    if stats.is_file():
        expected = _json_numbers(stats.read_bytes()).get("successes", 0)
        if len(found.images) < expected:
            raise MissingInputError(
                f"shard {path} holds {counted(len(found.images), 'image', 's')}, "
                f"{stats.name} says {expected:.0f} (delete that file if images were taken out on "
                "purpose)"
            )
    table = path.with_suffix(".parquet")
    bare = [(key, image) for key, image in found.images if not image.numbers]
    if bare and table.is_file() and importlib.util.find_spec("pyarrow"):
        from pyarrow import parquet

        rows = {str(row.get("key")): _numeric(row) for row in parquet.read_table(table).to_pylist()}
        for key, image in bare:
            image.numbers = rows.get(key, {})
    return found


def _json_numbers(text: bytes) -> dict[str, float]:
    """The numeric fields of a JSON object; broken JSON, or one nested too deep, has none."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return _numeric(values) if isinstance(values, dict) else {}


def _numeric(values: dict[Any, Any]) -> dict[str, float]:
    largest = float(np.finfo(np.float32).max)  # a column's type
    return {
        str(key): float(value)
        for key, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= largest
    }


# --- the index of a source ------------------------------------------------------------------


def index_directories(locations: Sequence[str], given: str | None = None) -> list[Path]:
    """Where the index of these shards may be kept, the best place first.

    As given, or beside them, in the user's cache, and among the temporary files.
    """
    name = hashlib.sha256("\n".join(locations).encode(errors="surrogateescape")).hexdigest()[:16]
    if given:
        return [Path(given) / name]
    elsewhere = [cache_dir() / "index" / name, temporary_dir() / "index" / name]
    beside = Path(locations[0]).parent / ".kl_f8_index" / name
    return elsewhere if is_remote(locations[0]) else [beside, *elsewhere]


def index_directory(locations: Sequence[str], given: str | None = None) -> Path:
    """The first of `index_directories` that can be written; RunFailedError if there is none."""
    places = index_directories(locations, given)
    if (writable := next(filter(is_writable, places), None)) is not None:
        return writable
    tried = ", ".join(str(place.parent) for place in places)
    raise RunFailedError(
        f"the index of the shards cannot be written in {tried}: give data.index_dir "
        "(`index --index-dir`) a directory that can be written and has room"
    )


def build_index(
    locations: Sequence[str],
    directory: Path,
    cache: ShardCache,
    workers: int = 1,
    progress: Progress | None = None,
) -> None:
    """Indexes shards in resumable parts and merges them; a part of unchanged shards is kept."""
    check_writable(directory)
    chunks = [list(locations[i : i + PART_SHARDS]) for i in range(0, len(locations), PART_SHARDS)]
    tasks = [(directory / f"part-{n:06d}.npz", chunk, cache) for n, chunk in enumerate(chunks)]
    with process_pool(min(workers, len(tasks))) as run:
        for done in itertools.accumulate(run(_index_chunk, tasks)):
            if progress is not None:
                progress(done, len(locations))
    _merge_parts([part for part, *_ in tasks], locations, directory)


def _index_chunk(task: tuple[Path, list[str], ShardCache]) -> int:
    """Indexes a chunk of shards into one part file, unless it is there and still right."""
    part, chunk, cache = task
    now = fingerprints(chunk)
    # Made of the same files, in an earlier call that was interrupted or is repeated.
    if _made_of(part) == now:
        return len(chunk)
    tars: list[TarIndex] = []
    broken: dict[str, str] = {}
    unreachable = 0
    for number, place in enumerate(chunk):
        path = None
        try:
            path = cache.path(place)
            one = index_tar(path)
            tars.append(one if is_remote(place) else add_neighbours(one, path))
        except DiskError:
            raise
        except (MissingInputError, RunFailedError) as error:
            tars.append(TarIndex())
            broken[place] = str(error).replace(str(path or place), shown(place))
            if isinstance(error, RunFailedError):
                now[number] = UNFETCHED
                unreachable += 1
                if unreachable == GIVE_UP:
                    raise
            elif path is None or is_remote(place) or isinstance(error.__cause__, OSError):
                now[number] = GONE
            if path is not None and is_remote(place):  # perhaps cut short, or a page in its place
                cache.forget(place)
    _write_part(part, tars, now, broken)
    return len(chunk)


def _write_part(
    part: Path, tars: Sequence[TarIndex], made_of: list[list[int]], broken: dict[str, str]
) -> None:
    """Writes what was found in a chunk's shards as arrays over its images, and a header."""
    images = [image for one in tars for _, image in one.images]
    names = sorted({key for image in images for key in image.numbers})
    columns = {}
    for number, name in enumerate(names):
        values = [image.numbers.get(name, np.nan) for image in images]
        columns[f"column_{number}"] = np.array(values, np.float32)
    header = {
        "fingerprints": made_of,
        "counts": [len(one.images) for one in tars],
        "columns": names,
        "broken": broken,
        "without_image": sum(one.without_image for one in tars),
    }
    with atomic_path(part) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            header=np.frombuffer(json.dumps(header).encode(), np.uint8),
            blocks=np.array([i.offset // TAR_BLOCK for i in images], np.uint32),  # up to 2 TiB
            sizes=np.array([i.size for i in images], np.uint32),
            **columns,  # type: ignore[arg-type]
        )


def _made_of(part: Path) -> list[list[int]] | None:
    """Of the shards that a part was made of; None if it is not there, or cannot be read."""
    try:
        found: list[list[int]] = _part_header(part)["fingerprints"]
    except UNREADABLE:
        return None
    return found


def _part_header(part: Path) -> dict[str, Any]:
    with np.load(part) as arrays:
        if damaged := arrays.zip.testzip():
            raise ValueError(f"{part}: {damaged} is damaged")
        header: dict[str, Any] = json.loads(arrays["header"].tobytes())
    return header


def fingerprints(places: Sequence[str]) -> list[list[int]]:
    """[size, mtime in ns] of each local file; [-1, -1] without one, [0, 0] for a remote one."""
    with ThreadPoolExecutor(16) as pool:  # a stat on a network disk mostly waits
        return list(pool.map(_fingerprint, places))


def _fingerprint(place: str) -> list[int]:
    if is_remote(place):
        return [0, 0]
    try:
        status = os.stat(place)
    except OSError:
        return [-1, -1]
    return [status.st_size, status.st_mtime_ns]


def _merge_parts(parts: list[Path], locations: Sequence[str], directory: Path) -> None:
    """Joins parts into arrays that can be mapped, and index.json last."""
    headers = [_part_header(part) for part in parts]
    names = sorted({name for header in headers for name in header["columns"]})
    counts = [count for header in headers for count in header["counts"]]
    arrays = {"blocks": "<u4", "sizes": "<u4"} | {f"column-{i}": "<f4" for i in range(len(names))}
    for array, kind in arrays.items():
        about = {"descr": kind, "fortran_order": False, "shape": (sum(counts),)}
        with atomic_path(directory / f"{array}.npy") as temporary, temporary.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, about)
            for part, header in zip(parts, headers, strict=True):  # memory holds one at a time
                file.write(_column(part, header, array, names).astype(kind).data)
    write_json(
        directory / "index.json",
        {
            "version": 1,
            "locations": list(locations),
            "fingerprints": [f for header in headers for f in header["fingerprints"]],
            "counts": counts,
            "columns": names,
            "broken": {k: v for header in headers for k, v in header["broken"].items()},
            "without_image": sum(header["without_image"] for header in headers),
        },
    )


def _column(part: Path, header: dict[str, Any], array: str, names: list[str]) -> np.ndarray:
    with np.load(part) as stored:
        if not array.startswith("column-"):
            return np.asarray(stored[array])
        name = names[int(array.removeprefix("column-"))]
        if name not in header["columns"]:
            return np.full(sum(header["counts"]), np.nan)  # no image of this part has the field
        return np.asarray(stored[f"column_{header['columns'].index(name)}"])
