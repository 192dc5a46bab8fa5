"""Files written whole or not at all, their hashes, and where the user's cache is."""

import contextlib
import errno
import fcntl
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
    """$KL_F8_TRAIN_CACHE, or kl_f8_train in the user's cache directory; nothing is made there."""
    if given := os.environ.get("KL_F8_TRAIN_CACHE"):
        return Path(given)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "kl_f8_train"
    try:
        return Path.home() / ".cache" / "kl_f8_train"
    except RuntimeError:  # a container's user without a home
        return temporary_dir()


def temporary_dir() -> Path:
    """A directory of this user's own among the temporary files; nothing is made there."""
    return Path(tempfile.gettempdir()) / f"kl_f8_train-{os.getuid()}"


def is_writable(directory: Path) -> bool:
    """Whether files can be made in `directory`, which is made if it is not there."""
    try:
        check_writable(directory)
    except RunFailedError:
        return False
    return True


def has_no_locks(error: OSError) -> bool:
    """Whether a lock failed because the file system has none (Lustre without -o flock, say)."""
    return error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK)


@contextlib.contextmanager
def one_at_a_time(directory: Path) -> Iterator[None]:
    """One process at a time works in `directory`; without locks there, all do, and all the same."""
    with (directory / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            if not has_no_locks(error):
                raise
        yield


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _free_bytes(directory: Path) -> int:
    stats = os.statvfs(directory)
    return stats.f_bavail * stats.f_frsize
