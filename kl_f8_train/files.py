"""Files written whole or not at all, their hashes, and where the user's cache is."""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kl_f8_train.errors import RunFailedError


def hidden_beside(path: Path, suffix: str) -> Path:
    """`.NAME.suffix`, in the same directory."""
    return path.with_name(f".{path.name}.{suffix}")


@contextlib.contextmanager
def atomic_path(path: Path, temporary: Path | None = None, sync: bool = True) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renames it on success, removes it on failure.

    `temporary` names it, for a file that one process at a time writes. `sync=False` does not wait
    for the disk: for files that are quickly made again. Raises RunFailedError with the free space
    if it cannot be written.
    """
    temporary = temporary or hidden_beside(path, f"{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if sync:
            _sync(temporary)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # safetensors writes 0600
        temporary.replace(path)
        if sync:
            _sync(path.parent)
    except (OSError, RuntimeError) as error:
        raise disk_failure(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_failure(path: Path, error: Exception) -> RunFailedError:
    """The error of a file that cannot be written, with the free space and the remedy."""
    free = "unknown"
    with contextlib.suppress(OSError):
        free = f"{shutil.disk_usage(path if path.is_dir() else path.parent).free:,}"
    return RunFailedError(
        f"cannot write {path}: {error}\n  {free} bytes are free there; earlier files are "
        "untouched. Make room or name another directory, then run the same command again"
    )


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
