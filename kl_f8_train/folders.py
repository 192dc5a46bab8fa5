"""Which files below a folder are photographs, and their bytes.

A file is a photograph by its suffix or, where the suffix says nothing, by its first bytes. What
systems keep for themselves (hidden files, thumbnails, bins) is left out; whatever is left out is
counted by its kind.
"""

import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from kl_f8_train import images
from kl_f8_train.errors import ImageError, MissingInputError, check_folder
from kl_f8_train.units import printable

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".png", ".apng", ".webp", ".bmp", ".dib"),
    *(".tif", ".tiff", ".gif"),
)
OTHER_SUFFIXES = {
    ".avif": "AVIF",
    ".avifs": "AVIF",
    ".heic": "HEIF",
    ".heif": "HEIF",
    ".hif": "HEIF",
}
RAW = (
    *(".dng", ".nef", ".nrw", ".cr2", ".cr3", ".crw", ".arw", ".sr2", ".srf", ".orf", ".rw2"),
    *(".raf", ".pef", ".srw", ".3fr", ".fff", ".iiq", ".rwl", ".x3f", ".erf", ".kdc", ".dcr"),
    *(".mrw", ".mef", ".mos", ".raw"),
)
NO_IMAGES = (  # not worth a look inside
    *(".txt", ".json", ".jsonl", ".csv", ".tsv", ".xml", ".xmp", ".html", ".md", ".yaml", ".yml"),
    *(".caption", ".npz", ".npy", ".pt", ".safetensors", ".parquet", ".tar", ".gz", ".tgz", ".zip"),
    *(".mov", ".mp4", ".m4v", ".avi", ".mkv", ".webm", ".mpg", ".mts", ".aae", ".db", ".ini"),
    *(".part", ".tmp", ".crdownload"),
)
CONTAINERS = {  # of images, and what to do with them
    ".parquet": "if it holds images: kl-f8-train pack FILE OUT",
    **dict.fromkeys((".zip", ".tgz", ".gz", ".rar", ".7z"), "unpack it"),
}
SYSTEM = {  # folders, in lower case
    *("__macosx", "@eadir", "#recycle", "@recycle", "@recently-snapshot", "$recycle.bin"),
    *("system volume information", "lost+found", "thumbnails", "thumbs", "_thumbs"),
}
MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|BM....\0\0\0\0|II\*\0(?!....CR)|MM\0\*",
    re.DOTALL,
)
ONE = {  # kind of files that are left out -> what a single one is
    "hidden files": "hidden file",
    "broken links": "broken link",
    "pipes, sockets or devices": "pipe, socket or device",
    "folders that cannot be read": "folder that cannot be read",
    "in hidden folders": "in a hidden folder",
}
Item = TypeVar("Item")
Loaded = TypeVar("Loaded")
FIRST_BYTES = 64  # bytes that say what a file is


@dataclass
class Listing:
    """The photographs below a folder, and what else is there."""

    files: list[str] = field(default_factory=list)  # paths relative to the folder, sorted
    left_out: Counter[str] = field(default_factory=Counter)  # kind -> files

    def describe(self) -> str:
        """What is not used: `not used: 3 .heic (pip install pillow-heif), 1 .mov`; else empty."""
        parts = [
            f"{count:,} {ONE.get(kind, kind) if count == 1 else kind}"
            for kind, count in sorted(self.left_out.items())
        ]
        return f"not used: {', '.join(parts)}" if parts else ""


def is_system(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or the system's own."""
    return name.startswith(".") or name.lower() in SYSTEM


def looks_like_image(head: bytes) -> bool:
    """Whether a file that begins so is an image that can be read here."""
    kind = images.brand(head)
    return images.can_read(kind) if kind else bool(MAGIC.match(head))


def list_folder(folder: Path) -> Listing:
    """The photographs below a folder; linked folders are followed, each folder is visited once.

    Raises MissingInputError if the folder itself cannot be read.
    """
    found = Listing()
    waiting = deque([""])  # linked folders come after those that are really there
    visited: set[tuple[int, int]] = set()
    while waiting:
        here = waiting.popleft()
        try:
            status = os.stat(folder / here)
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            with os.scandir(folder / here) as entries:
                inside = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            if not here:
                raise MissingInputError(f"{folder}: {error.strerror}; give a folder") from error
            found.left_out["folders that cannot be read"] += 1
            continue
        for entry in inside:
            name = f"{here}/{entry.name}" if here else entry.name
            if not _holds(entry.is_dir):
                _sort_in(found, name, entry)
            elif is_system(entry.name):
                found.left_out["in hidden folders"] += _images_below(entry.path)
            elif entry.is_symlink():
                waiting.append(name)
            else:
                waiting.appendleft(name)
    found.files.sort(key=lambda file: file.split("/"))
    found.left_out = +found.left_out  # without zeros
    return found


def _holds(test: Callable[[], bool]) -> bool:
    """What an entry of a folder says of where it leads; a link in a circle leads nowhere."""
    try:
        return test()
    except OSError:
        return False


def _images_below(folder: str) -> int:
    """Files in a folder of the system's that look like images, by their suffix."""
    names = (name for _, _, files in os.walk(folder) for name in files)
    return sum(_suffix(name) in (*SUFFIXES, *OTHER_SUFFIXES) for name in names)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _sort_in(found: Listing, name: str, entry: os.DirEntry[str]) -> None:
    suffix = _suffix(entry.name)
    if not _holds(entry.is_file):
        kind = "broken links" if entry.is_symlink() else "pipes, sockets or devices"
        found.left_out[kind] += suffix in (*SUFFIXES, *OTHER_SUFFIXES, ".tar")
    elif is_system(entry.name):
        found.left_out["hidden files"] += suffix in (*SUFFIXES, *OTHER_SUFFIXES)
    elif suffix in SUFFIXES or _is_image(entry.path, suffix):
        found.files.append(name)
    else:
        found.left_out[_kind(suffix)] += 1


def _is_image(path: str, suffix: str) -> bool:
    """By the first bytes of a file whose suffix does not say."""
    if suffix in NO_IMAGES or suffix in RAW:
        return False
    try:
        with open(path, "rb") as file:
            head = file.read(FIRST_BYTES)
    except OSError:
        return False
    return looks_like_image(head)


def _kind(suffix: str) -> str:
    """How a file that is left out is counted."""
    kind = OTHER_SUFFIXES.get(suffix)
    if kind and not images.can_read(kind):
        return f"{suffix} ({images.REMEDY[kind]})"
    if suffix in RAW:
        return f"{suffix} (raw: develop it first)"
    if suffix in CONTAINERS:
        return f"{suffix} ({CONTAINERS[suffix]})"
    return printable(suffix) or "without a suffix"


def ahead(
    load: Callable[[Item], Loaded], items: Iterable[Item], threads: int
) -> Iterator[Future[Loaded]]:
    """The results of `load` for each item, in order, computed ahead of their use."""
    waiting: deque[Future[Loaded]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(load, item))
            if len(waiting) > 4 * threads:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()


def load_sizes(
    folder: Path, sides: Sequence[int], count: int, report: Callable[[str], None] = print
) -> dict[int, list[Tensor]]:
    """The first `count` images below a folder as uint8 (3, side, side) centre squares, by side.

    An unreadable image is named once and left out. Raises MissingInputError if none is left.
    """
    check_folder("no images in ", folder)
    loaded: dict[int, list[Tensor]] = {side: [] for side in sides}
    listing = list_folder(folder)
    found = 0
    for file in listing.files:
        if found == count:
            break
        try:
            squares = images.squares(images.read_file(folder / file), sides)
        except ImageError as error:
            report(f"{printable(str(folder / file))}: {error}; left out")
            continue
        found += 1
        for side, square in zip(sides, squares, strict=True):
            loaded[side].append(square)
    if not found:
        more = f"; {listing.describe()}" if listing.left_out else ""
        raise MissingInputError(
            f"no images in {folder}: expected a folder of .jpg, .png or .webp{more}"
        )
    return loaded
