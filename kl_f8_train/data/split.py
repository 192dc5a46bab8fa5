"""A folder of photographs -> two folders, to train on and to score on.

OUT/training and OUT/held_out hold hard links to the photographs, under the same names (copies where
the file system allows no links), and OUT/split.json says which file lies where. Photographs with
equal content and near-duplicates stay together. The choice follows from the seed and the contents,
not from names or order.
"""

import contextlib
import errno
import hashlib
import io
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from kl_f8_train.data import near
from kl_f8_train.errors import ImageError, MissingInputError, UsageError, check_folder
from kl_f8_train.files import disk_failure, hidden_part, in_use, remove_abandoned, write_json
from kl_f8_train.folders import ahead, list_folder
from kl_f8_train.images import read_file
from kl_f8_train.output import Progress
from kl_f8_train.units import counted, printable, size

TRAINING, HELD_OUT = "training", "held_out"
SPLIT_FILE = "split.json"
USUAL_SHARE = 0.05  # held out if nothing is asked, but MIN_HELD_OUT to MAX_HELD_OUT
MIN_HELD_OUT, MAX_HELD_OUT = 10, 500  # fewer give no verdict, more take long to score
RECIPE_SIDE = 384  # data.shorter_side of the shipped recipe for photographs of one's own
LINES_SHOWN = 5  # groups, and files that cannot be used, that the command line names
# What makes linking impossible, but not copying.
NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS)


@dataclass(frozen=True)
class Photograph:
    """A file that can be used."""

    name: str  # relative to the folder
    sha256: str  # of its bytes
    look: np.ndarray  # (9, 9)
    side: int  # pixels of the shorter side


@dataclass(frozen=True)
class SplitResult:
    """The result of `split`; names are relative to the folder, in its order."""

    out: Path
    training: list[str]
    held_out: list[str]
    groups: list[list[str]]  # equal or near-duplicates, two or more
    unusable: list[str]  # "FILE: why"
    small: list[str]  # shorter side under RECIPE_SIDE
    not_used: str  # what else is in the folder, by kind
    copied: int  # bytes; 0: all are links

    def __str__(self) -> str:
        """For the command line."""
        how = f"copies, {size(self.copied)}" if self.copied else "hard links, which take no space"
        lines = [
            f"{counted(len(self.training), 'photograph', 's')} to train on: {self.out / TRAINING}",
            f"{counted(len(self.held_out), 'photograph', 's')} held out: {self.out / HELD_OUT}",
            f"  {how}; the originals are untouched; {self.out / SPLIT_FILE} lists all",
        ]
        if self.groups:
            members = sum(map(len, self.groups))
            lines.append(
                f"near-duplicates: {counted(members, 'photograph', 's')} in "
                f"{counted(len(self.groups), 'group', 's')}, each group on one side"
            )
            lines += _some([" = ".join(map(printable, group[:4])) for group in self.groups])
        if self.unusable:
            count = counted(len(self.unusable), "file", "s")
            lines.append(f"left out: {count} that cannot be used")
            lines += _some(self.unusable)
        lines += [self.not_used] if self.not_used else []
        if self.small:
            lines.append(
                f"note: {counted(len(self.small), 'photograph', 's')} under {RECIPE_SIDE} pixels "
                f"on the shorter side, as {printable(self.small[0])}, would be enlarged: leave "
                "such out, or lower data.shorter_side"
            )
        if len(self.held_out) < MIN_HELD_OUT:
            lines.append(
                f"note: fewer than {MIN_HELD_OUT} held out give no verdict in evaluate --compare"
            )
        return "\n".join(lines)


def _some(lines: Sequence[str]) -> list[str]:
    more = [f"  and {len(lines) - LINES_SHOWN:,} more"] if len(lines) > LINES_SHOWN else []
    return [f"  {line}" for line in lines[:LINES_SHOWN]] + more


def split(
    folder: Path,
    out: Path,
    held_out: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> SplitResult:
    """Splits the photographs below `folder` into OUT/training and OUT/held_out.

    `held_out` is a count (1 or more) or a share (below 1); None: 5 %, but 10 to 500, and at most a
    third. A group of near-duplicates that would exceed it is not held out, so that it may be missed
    by a few. Nothing is written before all files were read. `progress(done, all)` counts files.
    Raises UsageError if `out` holds anything or lies in `folder`, or if there are not enough
    photographs, MissingInputError if there are none, RunFailedError if `out` cannot be written.
    """
    _check_places(folder, out)
    listing = list_folder(folder)
    if listing.files:
        _count(held_out, len(listing.files))  # before reading takes minutes
    photographs, unusable = _read_all(folder, listing.files, progress)
    if not photographs:
        raise MissingInputError(
            f"no photographs in {folder}: "
            + "; ".join([*unusable[:1], *filter(None, [listing.describe()])] or ["it is empty"])
        )
    looks = np.stack([photograph.look for photograph in photographs])
    groups = near.groups(looks, [photograph.sha256 for photograph in photographs])
    chosen = _choose(photographs, groups, _count(held_out, len(photographs)), seed)
    sides = {
        TRAINING: [p.name for n, p in enumerate(photographs) if n not in chosen],
        HELD_OUT: [p.name for n, p in enumerate(photographs) if n in chosen],
    }
    together = [[photographs[n].name for n in group] for group in groups if len(group) > 1]
    small = [photograph.name for photograph in photographs if photograph.side < RECIPE_SIDE]
    listed = {
        "folder": str(folder.absolute()),
        "seed": seed,
        **sides,
        "near_duplicates": together,
        "small": small,
        "unusable": unusable,
    }
    copied = _write(folder, out, sides, listed)
    return SplitResult(
        out,
        **sides,
        groups=together,
        unusable=unusable,
        small=small,
        not_used=listing.describe(),
        copied=copied,
    )


def _check_places(folder: Path, out: Path) -> None:
    check_folder("", folder)
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; expected a new or empty directory")
    if out.is_dir() and any(out.iterdir()):
        raise UsageError(f"{out} is not empty; name a new directory, or delete it first")
    if folder.resolve() in out.resolve().parents:
        raise UsageError(
            f"{out} lies in {folder}, whose photographs would be found twice; name a directory "
            f"beside it, such as {folder.resolve().with_name(f'{folder.resolve().name}-split')}"
        )


# --- reading --------------------------------------------------------------------------------


def _read_all(
    folder: Path, names: Sequence[str], progress: Progress | None
) -> tuple[list[Photograph], list[str]]:
    """The files that can be used, in order, and "FILE: why" of the others."""
    photographs: list[Photograph] = []
    unusable: list[str] = []
    read = ahead(partial(_read, folder), names, os.cpu_count() or 1)
    for done, (name, found) in enumerate(zip(names, read, strict=True), 1):
        try:
            photographs.append(found.result())
        except ImageError as error:
            unusable.append(f"{printable(name)}: {error}")
        if progress:
            progress(done, len(names))
    return photographs, unusable


def _read(folder: Path, name: str) -> Photograph:
    data = read_file(folder / name)
    look = near.look(data)
    with Image.open(io.BytesIO(data)) as opened:  # `look` may have decoded it at half its size
        side = min(opened.size)
    return Photograph(name, hashlib.sha256(data).hexdigest(), look, side)


# --- choosing -------------------------------------------------------------------------------


def _count(asked: float | None, available: int) -> int:
    """How many photographs to hold out. Raises UsageError if none would be left on a side."""
    if asked is None:
        usual = round(min(max(USUAL_SHARE * available, MIN_HELD_OUT), MAX_HELD_OUT))
        asked = max(1, min(usual, available // 3))
    if available < 2:
        raise UsageError(
            f"{counted(available, 'photograph', 's')}: expected two or more, one for each side; "
            "give more"
        )
    share = max(1, min(round(asked * available), available - 1))
    count = share if asked < 1 else round(asked)
    if not 0 < count < available:
        raise UsageError(
            f"--held-out: {count} of {counted(available, 'photograph', 's')}; expected at least "
            "one on each side: give another number, or more photographs"
        )
    return count


def _choose(
    photographs: Sequence[Photograph], groups: list[list[int]], count: int, seed: int
) -> set[int]:
    """Numbers of the photographs to hold out: whole groups, at random, `count` or a few less.

    Raises UsageError if all photographs are one group.
    """

    def draw(group: list[int]) -> str:  # of the content alone
        digest = min(photographs[number].sha256 for number in group)
        return hashlib.sha256(f"{seed} {digest}".encode()).hexdigest()

    order = sorted(groups, key=draw)
    chosen: set[int] = set()
    for group in order:
        if len(chosen) + len(group) <= count:
            chosen.update(group)
    if not chosen and len(groups) > 1:  # even the smallest group is larger than `count`
        smallest = min(order, key=len)
        chosen.update(smallest)
    if not chosen:
        raise UsageError(
            f"all {len(photographs)} photographs are near-duplicates of each other, which belong "
            "on one side; add others"
        )
    return chosen


# --- writing --------------------------------------------------------------------------------


def _write(folder: Path, out: Path, sides: dict[str, list[str]], listed: object) -> int:
    """Fills a directory beside `out`, then gives it that name; returns the bytes copied."""
    out = out.absolute()
    part = hidden_part(out)
    copied = 0
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(out)
        part.mkdir()
        with in_use(part):
            for side, names in sides.items():
                for name in names:
                    target = part / side / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    copied += _link(folder / name, target)
            write_json(part / SPLIT_FILE, listed)
            with contextlib.suppress(FileNotFoundError):
                out.rmdir()
            part.rename(out)
    except OSError as error:
        raise disk_failure(out, error) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return copied


def _link(source: Path, target: Path) -> int:
    """A hard link to a file, or a copy of it; returns the bytes copied."""
    source = source.resolve()  # a link to a symbolic link would break when that is moved
    try:
        os.link(source, target)
        return 0
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
    shutil.copy2(source, target)
    return target.stat().st_size
