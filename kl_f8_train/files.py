"""Files written whole or not at all, their hashes, and where the user's cache is."""

import contextlib
import hashlib
import json
import os
import secrets
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kl_f8_train.errors import RunFailedError


def hidden_beside(path: Path, suffix: str) -> Path:
    """`.NAME.suffix`, in the same directory."""
    return path.with_name(f".{path.name}.{suffix}")


def part_beside(path: Path) -> Path:
    """A temporary name beside `path`, of this thread alone."""
    return hidden_beside(path, f"{os.getpid()}-{threading.get_native_id()}.part")


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renames it on success, removes it on failure.

    Raises RunFailedError with the remedy if the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # safetensors writes 0600
        temporary.replace(path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except (OSError, RuntimeError) as error:
        free = _free_bytes(path.parent)
        raise RunFailedError(
            f"writing {path} failed: {error}\n  {free:,} bytes are free there; earlier "
            "files are untouched. Make room, then run the same command again"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, values: Any) -> None:
    """Writes JSON atomically."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def check_writable(directory: Path) -> None:
    """Raises RunFailedError if files cannot be made in `directory`."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"0")
    except OSError as error:
        reason = "it is a file;" if directory.is_file() else f"{error.strerror}; make room, or"
        raise RunFailedError(
            f"cannot write in {directory}: {reason} name another directory"
        ) from error


def cache_dir() -> Path:
    """$KL_F8_TRAIN_CACHE, or kl_f8_train in the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get("KL_F8_TRAIN_CACHE") or Path(base) / "kl_f8_train")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _free_bytes(directory: Path) -> int:
    stats = os.statvfs(directory)
    return stats.f_bavail * stats.f_frsize
