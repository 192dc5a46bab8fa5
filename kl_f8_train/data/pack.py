"""A folder of images, or parquet files -> WebDataset shards in img2dataset's layout.

`00000.tar` holds three files for each image: KEY.jpg (.png, ...), the file as it is; KEY.json, its
metadata; KEY.txt, its name as the caption. KEY is five digits of the shard and four of the image.
`00000_stats.json` counts what was packed, `pack.json` lists the whole folder. The same folder gives
the same bytes with any number of processes, and a pack that was stopped resumes where it was.
"""

import contextlib
import hashlib
import io
import itertools
import json
import math
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from kl_f8_train import images
from kl_f8_train.data import parquet
from kl_f8_train.errors import ImageError, MissingInputError, RunFailedError, UsageError
from kl_f8_train.files import DAMAGED, atomic_path, write_text
from kl_f8_train.folders import SUFFIXES, Listing, list_folder
from kl_f8_train.images import read_file
from kl_f8_train.launch import available_cores
from kl_f8_train.lifetime import process_pool
from kl_f8_train.output import Progress
from kl_f8_train.units import counted, printable, written

MAX_PER_SHARD = 10_000  # four digits
MAX_SHARDS = 100_000  # five digits
MANIFEST = "pack.json"
QUALITY = 95  # of re-encoded JPEGs
SHOWN = 10  # images left out that the command line names
USUAL_SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif", "HEIF": ".heic"}  # else .png, ...
PER_PROCESS = 2_000  # images that are worth the seconds a process takes to start


@dataclass(frozen=True)
class PackResult:
    """The result of `pack` in the directory."""

    shards: list[Path]  # all, in order
    images: int  # in all shards
    skipped: list[str]  # "FILE: why", in order
    written: int  # shards that this call wrote; the others were there
    not_used: str = ""  # what else is in the folder, by kind

    def __str__(self) -> str:
        """For the command line: numbers, and the first images that were left out."""
        lines = [
            f"{counted(self.images, 'image', 's')} in {counted(len(self.shards), 'shard', 's')}, "
            f"{self.written:,} of them written now: {self.shards[0].parent}"
        ]
        lines += [self.not_used] if self.not_used else []
        lines += [f"left out: {line}" for line in self.skipped[:SHOWN]]
        if len(self.skipped) > SHOWN:
            lines.append(f"{len(self.skipped):,} left out; all are named in *_stats.json")
        return "\n".join(lines)


@dataclass(frozen=True)
class Job:
    """One shard to write."""

    number: int
    folder: Path
    files: tuple[str, ...] | parquet.Rows  # relative to the folder
    out: Path
    reencode: bool

    @property
    def tar(self) -> Path:
        return self.out / f"{self.number:05d}.tar"

    @property
    def stats(self) -> Path:
        return self.out / f"{self.number:05d}_stats.json"

    def done(self) -> dict[str, Any] | None:
        """The statistics, which are written last; None if the shard has to be written."""
        with contextlib.suppress(OSError, *DAMAGED):
            found = json.loads(self.stats.read_text())
            if self.tar.is_file():
                counts = {name: int(found[name]) for name in ("count", "successes")}
                return {**counts, "skipped": [*map(str, found["skipped"])]}
        return None


def pack(
    source: Path | Sequence[Path],
    out: Path,
    *,
    per_shard: int = 1000,
    workers: int | None = None,
    reencode: bool = False,
    progress: Progress | None = None,
) -> PackResult:
    """Packs the images of `source` into shards of `per_shard` (1 .. 10,000) in `out`.

    That is a folder of images, searched recursively, or parquet files of the Hugging Face hub: one
    or several of them, of folders that hold them and no images, or of globs.

    Every image is decoded once; one that cannot be is left out, named and counted, and its key
    stays unused. `reencode` stores upright RGB JPEGs of quality 95 without chroma subsampling, in
    place of the files' own bytes. `workers` processes; None: as many as cores, fewer for few
    images. `progress(done, all)` counts images. Files that changed but kept their size are not
    noticed by a pack that goes on. Raises MissingInputError if there are no images, or none that
    can be used, UsageError if `out` holds anything else, RunFailedError if it cannot be written.
    """
    if not 1 <= per_shard <= MAX_PER_SHARD:
        raise UsageError(f"{per_shard} images in each shard: expected 1 to {MAX_PER_SHARD:,}")
    held = _list([source] if isinstance(source, Path) else source)
    if len(held) > per_shard * MAX_SHARDS:
        raise UsageError(f"{len(held):,} images are more than {MAX_SHARDS:,} shards hold")
    _claim(out, {"per_shard": per_shard, "reencode": reencode, "files": held.files})
    dealt: Iterator[tuple[str, ...] | parquet.Rows] = held.dealt(per_shard)
    jobs = [Job(number, held.folder, files, out, reencode) for number, files in enumerate(dealt)]
    stats = {job.number: entry for job in jobs if (entry := job.done()) is not None}
    open_jobs = [job for job in jobs if job.number not in stats]
    done = sum(entry["count"] for entry in stats.values())
    count = _count(workers, open_jobs)
    write = _write_shards if count == 1 else _written  # a generator stays in its process
    with process_pool(count, "spawn") as run:
        for number, entry in itertools.chain.from_iterable(run(write, _chains(open_jobs))):
            stats[number] = entry
            done += entry["count"]
            if progress:
                progress(done, len(held))
    packed = sum(entry["successes"] for entry in stats.values())
    skipped = [line for job in jobs for line in stats[job.number]["skipped"]]
    if not packed:
        (out / MANIFEST).unlink()  # so that the same command packs what is there by then
        for job in jobs:
            job.tar.unlink()
            job.stats.unlink()
        raise MissingInputError(
            f"{held.folder}: none of its {counted(len(held), 'image', 's')} can be used, from "
            f"{skipped[0]}; nothing is left in {out}"
        )
    return PackResult(
        shards=[job.tar for job in jobs],
        images=packed,
        skipped=skipped,
        written=len(open_jobs),
        not_used=held.not_used,
    )


# --- what is packed -------------------------------------------------------------------------


@dataclass(frozen=True)
class Photographs:
    """The images below a folder; parquet files are a `Table`."""

    folder: Path
    files: tuple[tuple[str, int], ...]  # path relative to the folder, size in bytes; sorted
    not_used: str  # what else is there, by kind

    def __len__(self) -> int:
        return len(self.files)

    def dealt(self, size: int) -> Iterator[tuple[str, ...]]:
        """The files in pieces of `size`; the last may be smaller."""
        for start in range(0, len(self.files), size):
            yield tuple(name for name, _ in self.files[start : start + size])


def _list(places: Sequence[Path]) -> Photographs | parquet.Table:
    """Finds the images below a folder, or parquet files. Raises MissingInputError for neither."""
    folder = places[0] if len(places) == 1 and places[0].is_dir() else None
    listing = list_folder(folder) if folder else Listing()
    if folder and listing.files:
        files = []
        for name in listing.files:
            with contextlib.suppress(OSError):  # it went away since the folder was listed
                files.append((name, (folder / name).stat().st_size))
        return Photographs(folder, tuple(files), listing.describe())
    tables: set[Path] = set()
    for place in places:
        found = parquet.find(place)
        if not found and not place.is_dir():
            what = "is another file" if place.exists() else "no such folder, file or match"
            raise MissingInputError(
                f"{place}: {what}; expected a folder of photographs, or {parquet.SUFFIX} files"
            )
        tables.update(found)
    if not tables:
        where = ", ".join(map(str, places))
        several = "give one folder of images at a time" if len(places) > 1 else "it is empty"
        raise MissingInputError(
            f"no images in {where}: expected {', '.join(SUFFIXES)}, or {parquet.SUFFIX} files; "
            f"{listing.describe() or several}"
        )
    return parquet.read_table(sorted(tables), folder)


def _claim(out: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest, or compares it with an existing one."""
    path = out / MANIFEST
    try:
        out.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            _compare(out, json.loads(path.read_text()), manifest)
        elif any(out.glob("*.tar")):
            raise UsageError(
                f"{out} already holds shards of something else; name an empty directory"
            )
        else:
            write_text(path, json.dumps(manifest, indent=0) + "\n")
    except DAMAGED as error:
        text = f"{path} is not the list of a pack; name another directory"
        raise UsageError(text) from error
    except OSError as error:
        raise RunFailedError(
            f"cannot write to {out}: {error.strerror}; make room, or name another directory"
        ) from error


def _compare(out: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raises UsageError that names what differs."""
    before, after = dict(old["files"]), dict(new["files"])
    both = before.keys() & after.keys()
    named = {
        "new": after.keys() - before.keys(),
        "missing": before.keys() - after.keys(),
        "of another size": {name for name in both if before[name] != after[name]},
    }
    differences = []
    for key in ("per_shard", "reencode"):
        if old[key] != new[key]:
            differences.append(f"{key}: {written(old[key])} there, {written(new[key])} asked for")
    for text, names in named.items():
        if names:
            shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            differences.append(f"{counted(len(names), 'file', 's')} {text} ({shown})")
    if differences:
        raise UsageError(
            f"{out} holds shards of something else: {'; '.join(differences)}. "
            "Name another directory (a source can have several), or delete this one"
        )


# --- writing --------------------------------------------------------------------------------


def _chains(jobs: list[Job]) -> list[list[Job]]:
    """The jobs, together those that one process is to write one after another.

    Of parquet these are the shards that begin in the same row group, which is read only once.
    """

    def start(job: Job) -> object:
        return job.files.start if isinstance(job.files, parquet.Rows) else job.number

    return [list(chain) for _, chain in itertools.groupby(jobs, key=start)]


def _count(workers: int | None, jobs: list[Job]) -> int:
    """How many processes write the shards."""
    if workers is None:
        enough = math.ceil(sum(len(job.files) for job in jobs) / PER_PROCESS)
        workers = min(available_cores(), enough)
    return max(1, min(workers, len(jobs)))


def _write_shards(chain: list[Job]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Writes shards one after another; yields the number and the statistics of each."""
    stream = _images(chain)
    for job in chain:
        yield job.number, _write_shard(job, itertools.islice(stream, len(job.files)))


def _written(chain: list[Job]) -> list[tuple[int, dict[str, Any]]]:
    return list(_write_shards(chain))


def _images(chain: list[Job]) -> Iterator[parquet.ImageRow]:
    """The images of all the jobs in order: name, bytes, and the path that gives the suffix."""
    pieces = [job.files for job in chain if isinstance(job.files, parquet.Rows)]
    if pieces:
        yield from parquet.read(chain[0].folder, pieces)
    names = (name for job in chain if isinstance(job.files, tuple) for name in job.files)
    for name in names:
        try:
            yield parquet.ImageRow(name, read_file(chain[0].folder / name), name)
        except ImageError as error:
            yield parquet.ImageRow(name, error, name)


def _write_shard(job: Job, images_of_it: Iterator[parquet.ImageRow]) -> dict[str, Any]:
    """Writes one shard, then its statistics, which it returns.

    Raises RunFailedError if the disk is full or the directory cannot be written.
    """
    bad = _write_tar(job, images_of_it)
    good = len(job.files) - len(bad)
    stats = {
        "count": len(job.files),
        "successes": good,
        "failed_to_download": 0,
        "failed_to_resize": len(bad),
        "status_dict": {"success": good, **Counter(bad.values())},
        "skipped": [f"{printable(name)}: {why}" for name, why in bad.items()],
    }
    write_text(job.stats, json.dumps(stats, indent=4) + "\n")
    return stats


def _write_tar(job: Job, images_of_it: Iterator[parquet.ImageRow]) -> dict[str, str]:
    """Writes the tar; image -> why it is left out."""
    bad: dict[str, str] = {}
    with (
        atomic_path(job.tar, job.tar.with_suffix(".tar.part")) as part,
        tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as archive,
    ):
        for index, image in enumerate(images_of_it):
            try:
                members = _sample(image, f"{job.number:05d}{index:04d}", job.reencode)
            except ImageError as error:
                bad[image.name] = str(error)
                continue
            for member, data in members.items():
                entry = tarfile.TarInfo(member)
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    return bad


def _sample(row: parquet.ImageRow, key: str, reencode: bool) -> dict[str, bytes]:
    """The files of one sample. Raises ImageError if the image cannot be read."""
    name, data, path = row
    if isinstance(data, ImageError):
        raise data
    image, profile = images.picture(data)
    height, width = image.shape[1:]
    extension = Path(path).suffix.lower()
    if reencode:
        extension, data = ".jpg", _to_jpeg(image, bool(profile))
    elif extension not in SUFFIXES:
        extension = _extension(data)
    metadata = {
        "url": name,
        "key": key,
        "status": "success",
        "error_message": None,
        "width": width,
        "height": height,
        "original_width": width,
        "original_height": height,
        "exif": "{}",
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    return {
        f"{key}{extension}": data,
        f"{key}.json": json.dumps(metadata, indent=4).encode(),
        f"{key}.txt": printable(Path(path or name).stem).encode(),
    }


def _extension(data: bytes) -> str:
    """Of an image whose own name has none that indexes know: .jpg, .png, .heic, ..."""
    with Image.open(io.BytesIO(data)) as opened:
        kind = opened.format or "JPEG"
    return USUAL_SUFFIXES.get(kind, f".{kind.lower()}")


def _to_jpeg(image: torch.Tensor, converted: bool) -> bytes:
    """sRGB, which is said in the file where the original said something else."""
    buffer = io.BytesIO()
    named = {"icc_profile": images.srgb_profile()} if converted else {}
    images.to_pil(image).save(buffer, "JPEG", quality=QUALITY, subsampling="4:4:4", **named)
    return buffer.getvalue()
