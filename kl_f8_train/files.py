"""Files written whole or not at all, their hashes, and where the user's cache is."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kl_f8_train.errors import RunFailedError

# What is raised where JSON, or a value in it, is not what was expected.
DAMAGED = (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError)


def hidden_beside(path: Path, suffix: str) -> Path:
    """`.NAME.suffix`, in the same directory."""
    return path.with_name(f".{path.name}.{suffix}")


@contextlib.contextmanager
def atomic_path(path: Path, temporary: Path | None = None, sync: bool = True) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renames it on success, removes it on failure.

    `temporary` names it, for a file that one process at a time writes. `sync=False` does not wait
    for the disk: for files that are quickly made again. Raises RunFailedError with the free space
    if it cannot be written. What killed processes left of the same file is removed first.
    """
    own = temporary is None
    temporary = temporary or hidden_part(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if own and sync:
            remove_abandoned(path)
        temporary.touch()
        mode = temporary.stat().st_mode  # by the umask, which cannot be read without changing it
        with in_use(temporary):
            yield temporary
        with in_use(temporary):  # safetensors puts another file in its place
            if sync:
                _sync(temporary)
            temporary.chmod(stat.S_IMODE(mode))  # safetensors writes 0600
            temporary.replace(path)
        if sync:  # the rename changes the directory, which a power failure could undo
            _sync(path.parent)
    except (OSError, RuntimeError) as error:
        raise disk_failure(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def hidden_part(path: Path) -> Path:
    """Where this process makes a file or directory that will be `path`."""
    return hidden_beside(path, f"{os.getpid()}-{secrets.token_hex(4)}.part")


@contextlib.contextmanager
def in_use(part: Path) -> Iterator[None]:
    """Holds a lock on a file or directory, by which others see that its process is alive."""
    descriptor = os.open(part, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def remove_abandoned(path: Path) -> None:
    """Deletes what `hidden_part` named for `path` and no process has in use.

    It stays where the file system has no locks.
    """
    ours = re.compile(rf"\.{re.escape(path.name)}\.\d+-[0-9a-f]{{8}}\.part")
    for name in filter(ours.fullmatch, os.listdir(path.parent)):
        part = path.parent / name
        with contextlib.suppress(OSError):
            descriptor = os.open(part, os.O_RDONLY if part.is_dir() else os.O_RDWR)  # for NFS
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(part) if part.is_dir() else part.unlink()
            finally:
                os.close(descriptor)


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class DiskError(RunFailedError):
    """A local file that cannot be written; a retry, or another server, would not help."""


def disk_failure(path: Path, error: Exception, setting: str = "") -> RunFailedError:
    """The error of a file that cannot be written; `setting` names its directory, if one does."""
    free = "unknown"
    with contextlib.suppress(OSError):
        disk = os.statvfs(path if path.is_dir() else path.parent)
        free = f"{disk.f_bavail * disk.f_frsize:,}"
        if disk.f_files and not disk.f_favail:
            free = f"no files (inodes) and {free}"
    remedy = f" ({setting})" if setting else ""
    return DiskError(
        f"cannot write {path}: {error}\n  {free} bytes are free there; earlier files are "
        f"untouched. Make room or name another directory{remedy}, then run the same command again"
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
        reason = f"{error.strerror}; make room, or"
        if isinstance(error, FileExistsError):
            reason = f"it is a {'file' if directory.exists() else 'link to what is not there'};"
        raise RunFailedError(
            f"cannot write in {directory}: {reason} name another directory"
        ) from error


BEGINNINGS = (  # of files that arrive in place of another
    (b"version https://git-lfs", "a pointer of git lfs; `git lfs pull` downloads the file"),
    (b"<", "a web page; download the file itself"),
    (b"{", "JSON, perhaps a server's answer; download the file itself"),
    (b"\x1f\x8b", "compressed by gzip; unpack it"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd; unpack it"),
    (b"BZh", "compressed by bzip2; unpack it"),
    (b"\xfd7zXZ", "compressed by xz; unpack it"),
    (b"PK\3\4", "a zip archive; unpack it"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it"),
    (b"Rar!", "a rar archive; unpack it"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL image; convert it to PNG or JPEG"),
    (b"\xff\x0a", "a JPEG XL image; convert it to PNG or JPEG"),
    (b"\0\0\0\x0cjP  ", "a JPEG 2000 image; convert it to PNG or JPEG"),
    (b"%PDF", "a PDF document"),
    (b"GGUF", "a GGUF file, whose weights are quantised; give the file from before"),
)


def beginning(head: bytes) -> str:
    """What a file is by its first bytes, and what to do; empty if it may be what was expected."""
    if not head:
        return "an empty file; copy or download it again"
    if not head.strip(b"\0"):
        return "zeros, as an unfinished download leaves them; download it again"
    known = (text for start, text in BEGINNINGS if head.lstrip().startswith(start))
    return next(known, "")


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
