"""The run directory: its files' names, its claim, its tables; without torch."""

import contextlib
import csv
import fcntl
import json
import math
import os
import re
import socket
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kl_f8_train.errors import LostContactError, MissingInputError, RunFailedError, UserError
from kl_f8_train.files import DAMAGED, atomic_path, check_writable, write_json

CONFIG_FILE, METRICS_FILE, VALIDATION_FILE = "config.yaml", "metrics.csv", "validation.csv"
EXPORT_FILE = "export.json"  # of an export: what was written, from what, with which hashes
NAME = re.compile(r"iteration-(\d{9})(-warmup-\d{6})?\.safetensors")
FAILURE_FILE = "failure.json"  # why the last start failed; the next one removes it
CLAIM = ".claim"  # of the process that trains in a run directory

Row = dict[str, float]


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Training checkpoints of a run, newest first; copies under other names are not among them."""
    named = (run_dir / "checkpoints").glob("iteration-*.safetensors")
    return sorted((path for path in named if NAME.fullmatch(path.name)), reverse=True)


def check_places(run_dir: Path) -> None:
    """Raises RunFailedError if a run's directory, or that of its checkpoints, cannot be written."""
    check_writable(run_dir)
    if os.path.lexists(kept := run_dir / "checkpoints"):  # perhaps a link to another disk
        check_writable(kept)


def check_checkpoint_names(run_dir: Path) -> None:
    """Raises MissingInputError if there is a checkpoint, but none of a name that is resumed from.

    Without any, a run begins anew, and would replace what such a file holds of another. That of
    the best validation does not count: it may be written before the first to resume from.
    """
    named = (run_dir / "checkpoints").glob("*.safetensors")
    files = sorted(path for path in named if not path.name.startswith("best-"))
    if files and not list_checkpoints(run_dir):
        raise MissingInputError(
            f"{files[-1]} is not named as a checkpoint that a run resumes from; name it as "
            "iteration-000246803.safetensors to resume, or move it away to start over"
        )


def is_run(directory: Path) -> bool:
    """Whether a run was started there."""
    return (directory / CLAIM).exists() or bool(list_checkpoints(directory))


def export_meant(directory: Path) -> str:
    """What to give in place of a directory that is not an export, such as a run's own."""
    inside = directory / "export"
    if (inside / EXPORT_FILE).is_file():
        return f"its export, {inside}"
    return "a directory that `kl-f8-train export` wrote"


def checkpoint_path(run_dir: Path, iteration: int, warmup: int = 0) -> Path:
    """`run_dir/checkpoints/iteration-000246803.safetensors`; `warmup` counts unfinished warm-up."""
    suffix = f"-warmup-{warmup:06d}" if warmup else ""
    return run_dir / "checkpoints" / f"iteration-{iteration:09d}{suffix}.safetensors"


def best_path(run_dir: Path, iteration: int) -> Path:
    """Where the checkpoint with the best validation so far is kept; no resume looks at it."""
    return run_dir / "checkpoints" / f"best-{iteration:09d}.safetensors"


def best_checkpoint(run_dir: Path) -> Path | None:
    """The checkpoint with the best validation, if one is kept.

    A run that was resumed before it may hold one of an abandoned attempt until the next is
    better; replaying the same iterations writes the same file.
    """
    return max((run_dir / "checkpoints").glob("best-*.safetensors"), default=None)


def remove_old_checkpoints(saved: Path, keep_last: int, keep_every: int) -> None:
    """Keeps `saved`, the newest before it, `keep_last` in all, and every multiple of `keep_every`.

    Checkpoints newer than `saved` belong to an abandoned attempt and are ignored.
    """
    older = [path for path in list_checkpoints(saved.parents[1]) if path <= saved]
    for path in older[keep_last:]:
        match = NAME.fullmatch(path.name)
        milestone = match and not match[2] and keep_every and int(match[1]) % keep_every == 0
        if not milestone:
            path.unlink(missing_ok=True)


def skipped_images(files: Iterable[Path]) -> dict[str, str]:
    """Image -> why it cannot be used, of a run's `skipped-RANK.txt`; what is absent names none."""
    lines: list[str] = []
    for file in files:
        with contextlib.suppress(FileNotFoundError):
            lines += file.read_text(encoding="utf-8", errors="replace").splitlines()
    parts = (line.partition(": ") for line in lines)
    return {name: reason for name, _, reason in parts if reason}


def remove_leftovers(run_dir: Path) -> None:
    """Deletes temporary files that a killed run left beside its own.

    Some are ours, others safetensors', which writes to `.tmpXXXXXX` beside the name it is given.
    """
    for pattern in (".*.part", "pictures/.*.part", "checkpoints/.*.part", "checkpoints/.tmp*"):
        for path in run_dir.glob(pattern):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def claimed(run_dir: Path) -> Iterator[None]:
    """Keeps other processes from training in `run_dir`; the claim ends with the process.

    It names the process, and is empty after an orderly end. Raises RunFailedError if another has
    it. Where the file system has no locks, nothing is kept.
    """
    with (run_dir / CLAIM).open("a+", encoding="utf-8") as file:
        try:
            # Held by the process: a forked loader does not inherit it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise RunFailedError(
                f"{owner} is training in run_dir={run_dir}; two would overwrite each other's "
                "checkpoints. Stop it first, or give another run_dir"
            ) from error
        except OSError:
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()}{_here()}")
        file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                file.truncate(0)


def _here() -> str:
    """The end of a claim that a process of this host has made."""
    return f" on {socket.gethostname()}\n"


@contextlib.contextmanager
def begun(run_dir: Path) -> Iterator[None]:
    """A start by the first process: `claimed`, and if it fails, why is written down anew."""
    with claimed(run_dir):
        with contextlib.suppress(OSError):
            (run_dir / FAILURE_FILE).unlink(missing_ok=True)
        with failure_kept(run_dir):
            yield


@contextlib.contextmanager
def failure_kept(run_dir: Path) -> Iterator[None]:
    """Writes down why a start fails, for `status`."""
    try:
        yield
    except Exception as error:
        known = isinstance(error, UserError)
        message = str(error) if known else f"unexpected {type(error).__name__}: {error}"
        note_failure(run_dir, message, passing=isinstance(error, LostContactError))
        raise


def note_failure(run_dir: Path, message: str, passing: bool) -> None:
    """Keeps the first failure of a start: what other processes meet then follows from it.

    `passing`: the same command may go on without any change.
    """
    file = run_dir / FAILURE_FILE
    with contextlib.suppress(OSError, RunFailedError):  # a full disk may be what failed
        if not file.exists():
            write_json(file, {"message": message, "passing": passing})


def read_failure(run_dir: Path) -> tuple[str, bool] | None:
    """Why the last start failed, and whether the same command may go on; None if it did not."""
    try:
        found = json.loads((run_dir / FAILURE_FILE).read_text(encoding="utf-8", errors="replace"))
        return str(found["message"]), bool(found["passing"])
    except (OSError, *DAMAGED):
        return None


class MetricsFile:
    """A CSV that grows by rows and, where needed, columns; rows past `start` are dropped."""

    def __init__(self, path: Path, start: int) -> None:
        self.path = path
        self.columns: list[str] = ["iteration"]
        self.rows: list[dict[str, str]] = []
        self.appends = False  # once this process has written the whole file
        if path.is_file():
            reader = csv.DictReader(_whole_lines(path))
            self.columns = list(reader.fieldnames or self.columns)
            for row in reader:
                iteration = row.get("iteration") or ""
                if iteration.isdecimal() and int(iteration) <= start:
                    self.rows.append({key: row[key] for key in self.columns})

    def write(self, iteration: int, values: dict[str, float]) -> None:
        """Adds a row; a new column, or the first row, rewrites the file."""
        row = {
            "iteration": str(iteration),
            **{key: f"{value:.8g}" for key, value in values.items()},
        }
        new = [key for key in row if key not in self.columns]
        whole = not self.rows or not self.path.is_file() or bool(new) or not self.appends
        self.columns += new
        self.rows.append(row)
        self.appends = False  # a row that fails may be there in part, or be missing
        if whole:
            with atomic_path(self.path) as temporary, temporary.open("w", newline="") as file:
                writer = csv.DictWriter(file, self.columns, restval="")
                writer.writeheader()
                writer.writerows(self.rows)
        else:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.columns, restval="").writerow(row)
        self.appends = True


def read_rows(path: Path) -> list[Row]:
    """The whole lines of a CSV, numbers only; [] without a file."""
    try:
        lines = _whole_lines(path)
    except FileNotFoundError:
        return []
    rows = (_parsed_row(row) for row in csv.DictReader(lines))
    return [row for row in rows if "iteration" in row]


def _whole_lines(path: Path) -> list[str]:
    """The lines of a text file without a last one that is half written, and without NULs."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return text[: text.rfind("\n") + 1].replace("\0", "").splitlines()


def _parsed_row(row: Mapping[str | Any, str | Any]) -> Row:
    found: Row = {}
    for key, value in row.items():
        try:
            number = float(value)
        except (TypeError, ValueError):
            continue  # an empty cell, or more cells than columns
        if key and math.isfinite(number):
            found[key] = number
    return found


def newest_checkpoint(run: Path) -> tuple[Path, int] | None:
    """The newest whole checkpoint, and its iteration; warm-up ones count as their start."""
    for path in list_checkpoints(run):
        if match := NAME.search(path.name):
            return path, int(match[1])
    return None


def is_claimed(run: Path) -> bool | None:
    """Whether a process has a run directory's claim; None where that cannot be known."""
    try:
        file = (run / CLAIM).open("r+", encoding="utf-8", errors="replace")
    except OSError:
        return None
    with file:
        locks = True
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return True
        except OSError:  # a file system without locks
            locks = False
        owner = file.read()
    # Not every file system shows its locks to other hosts.
    return False if not owner or (locks and owner.endswith(_here())) else None
