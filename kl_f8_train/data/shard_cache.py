"""Remote shards -> whole files in a bounded cache of this node.

A file under its final name is always whole: it is fetched to a temporary name and renamed. Of each
cached file the cache keeps, hidden beside it, a lock and a record of its size and SHA-256; records
outlive eviction, so a remote file that changes during a run is noticed when it is fetched again.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import BinaryIO

from kl_f8_train.errors import RunFailedError
from kl_f8_train.files import (
    DAMAGED,
    atomic_path,
    disk_failure,
    has_no_locks,
    hidden_beside,
    write_json,
)
from kl_f8_train.transfer import (
    PATIENCE,
    Patience,
    Record,
    download,
    is_remote,
    local_path,
    open_local,
    shown,
)

CACHE_SETTINGS = "data.cache_dir, or KL_F8_TRAIN_CACHE"  # what names the directory
LEFTOVER_SECONDS = 3600.0  # older temporary files are stale
CACHED_NAME = re.compile(r"[0-9a-f]{16}-.*")
PART_NAME = re.compile(r"\.+([0-9a-f]{16}-.*?)(?:\.json)?\.\d+-[0-9a-f]+\.part")


@dataclass(eq=False)
class ShardCache:
    """Whole remote files in a directory of this node, shared by all its processes.

    `max_bytes` bounds the directory: least recently used files go first, except those used in the
    last `grace_seconds` or locked, and what is just arriving; that much may lie above the bound.
    `root` belongs to one user, on a file system with flock (any local one), and is made when the
    first remote file is asked for.
    """

    root: Path
    max_bytes: int
    grace_seconds: float = 60.0
    queue_size: int = 16  # files that wait for the background thread
    patience: Patience = PATIENCE

    def __post_init__(self) -> None:
        self._is_ready = False
        self._worker = _Worker(self._fill_ahead, self.queue_size)

    def _prepare(self) -> None:
        """Makes the directory. Raises RunFailedError if it cannot be written, or has no locks."""
        if self._is_ready:
            return
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(self.root)
            with _locked(self.root / ".evict.lock", fcntl.LOCK_EX):
                pass
        except OSError as error:
            if has_no_locks(error):
                raise RunFailedError(
                    f"{self.root}: its file system has no file locks; give {CACHE_SETTINGS}, a "
                    "directory on a local disk"
                ) from error
            raise disk_failure(self.root, error, CACHE_SETTINGS) from error
        self._is_ready = True

    def __reduce__(self) -> tuple[type["ShardCache"], tuple[object, ...]]:
        """Pickles the settings only; the copy has its own background thread."""
        return ShardCache, tuple(getattr(self, setting.name) for setting in fields(self))

    def open(self, url: str) -> BinaryIO:
        """The file, open; what is open stays readable, also when it is evicted meanwhile.

        Fetches it, once for all processes, unless it is there with its recorded size. A local path
        is opened as it is, without checks.

        Raises MissingInputError and RunFailedError like `fetch`, and RunFailedError if the remote
        file is not the one first fetched.
        """
        if not is_remote(url):
            return open_local(url)
        self._prepare()
        try:
            return self._take(_Entry(self.root, url))
        except OSError as error:
            raise disk_failure(self.root, error, CACHE_SETTINGS) from error

    def path(self, url: str) -> Path:
        """Like `open`, but the path, where the file stays for at least `grace_seconds`."""
        if not is_remote(url):
            return local_path(url)
        with self.open(url):
            return _Entry(self.root, url).path

    def forget(self, url: str) -> None:
        """Removes a remote file that is not what it should be: the next `open` fetches it anew."""
        self._prepare()
        entry = _Entry(self.root, url)
        with _locked(entry.lock, fcntl.LOCK_EX):
            entry.record_path.unlink(missing_ok=True)
            entry.path.unlink(missing_ok=True)

    def prefetch(self, urls: Iterable[str]) -> int:
        """Hands urls to the background thread; returns at once how many it took.

        It stops at the first that does not fit in the queue; those that wait there already count
        as taken. An error is kept and raised when that url is asked for.
        """
        taken = 0
        for url in urls:
            if is_remote(url):
                self._prepare()
                if not self._own_worker().offer(url):
                    break
            taken += 1
        return taken

    def _take(self, entry: "_Entry") -> BinaryIO:
        # Whoever needs the file first locks it and fetches; the others wait, and then find it.
        with _locked(entry.lock, fcntl.LOCK_EX):
            kept = self._own_worker().errors.pop(entry.url, None)
            is_there = entry.is_whole()
            if not is_there:
                if kept is not None:
                    raise kept
                self._fill(entry)
            file = entry.open()
        if not is_there:
            self._evict()
        return file

    def _fill(self, entry: "_Entry") -> None:
        """Fetches a file whose exclusive lock is held. Raises RunFailedError if it has changed."""
        known = entry.record()
        self._evict(known.size if known else 0)  # makes room, as far as the size is known
        with atomic_path(entry.path) as part:
            found = download(entry.url, part, self.patience)
            if known is not None and found != known:
                raise RunFailedError(
                    f"{shown(entry.url)} has changed since it was first fetched: SHA-256 "
                    f"{found.sha256} ({found.size:,} bytes), was {known.sha256} ({known.size:,} "
                    "bytes); not kept. Put the old file back; or, to use the new one, delete "
                    f"{entry.record_path}"
                )
        if known is None:
            entry.write_record(found)

    def _fill_ahead(self, url: str) -> None:
        """Fetches a file, unless some other process is about to."""
        entry = _Entry(self.root, url)
        with (
            contextlib.suppress(BlockingIOError),
            _locked(entry.lock, fcntl.LOCK_EX | fcntl.LOCK_NB),
        ):
            self._own_worker().errors.pop(url, None)
            if not entry.is_whole():
                self._fill(entry)
            os.utime(entry.path)  # used now: it is the last to be evicted
        with contextlib.suppress(OSError):
            self._evict()

    def _evict(self, incoming: int = 0) -> None:
        """Unlinks least recently used files until `incoming` more bytes fit."""
        with _locked(self.root / ".evict.lock", fcntl.LOCK_EX):
            listed = sorted(_listing(self.root))  # the least recently used first
            whole = [(size, name) for _, size, name in listed if CACHED_NAME.fullmatch(name)]
            parts = [size for _, size, name in listed if PART_NAME.fullmatch(name)]
            total = incoming + sum(parts) + sum(size for size, _ in whole)
            for size, name in whole:
                if total <= self.max_bytes:
                    break
                if _unlink(self.root, name, name, self.grace_seconds):
                    total -= size

    def _own_worker(self) -> "_Worker":
        """The background thread of this process; a fork leaves its parent's behind."""
        if self._worker.pid != os.getpid():
            self._worker = _Worker(self._fill_ahead, self.queue_size)
        return self._worker


class _Entry:
    """The files that belong to a url. Everything here expects its lock to be held."""

    def __init__(self, root: Path, url: str) -> None:
        self.url = url
        name = url.split("?", 1)[0].rstrip("/").rsplit("/", 1)[-1]
        name = re.sub(r"[^A-Za-z0-9._-]+", "_", name)[-100:]
        self.path = root / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}"
        self.lock = hidden_beside(self.path, "lock")
        self.record_path = hidden_beside(self.path, "json")

    def is_whole(self) -> bool:
        """Whether the file is there, of the recorded size."""
        record = self.record()
        try:
            return record is not None and self.path.stat().st_size == record.size
        except FileNotFoundError:
            return False

    def open(self) -> BinaryIO:
        """The file, marked as used now."""
        os.utime(self.path)
        return self.path.open("rb")

    def record(self) -> Record | None:
        """What was fetched first; None if nothing was."""
        try:
            values = json.loads(self.record_path.read_text())
            return Record(int(values["size"]), str(values["sha256"]))
        except (FileNotFoundError, *DAMAGED):
            return None

    def write_record(self, record: Record) -> None:
        """Writes the record, whole or not at all."""
        write_json(self.record_path, {"url": shown(self.url), **asdict(record)})


class _Worker:
    """One daemon thread that works through a bounded queue of urls, in one process."""

    def __init__(self, work: Callable[[str], None], size: int) -> None:
        self.pid = os.getpid()
        self.errors: dict[str, Exception] = {}
        self._work = work
        self._queue: queue.Queue[str] = queue.Queue(size)
        self._waiting: set[str] = set()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def offer(self, url: str) -> bool:
        """Whether a url waits in the queue now."""
        with self._lock:
            if url in self._waiting:
                return True
            try:
                self._queue.put_nowait(url)
            except queue.Full:
                return False
            self._waiting.add(url)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="shards", daemon=True)
                self._thread.start()
            return True

    def _run(self) -> None:
        while True:
            url = self._queue.get()
            try:
                self._work(url)
            except Exception as error:  # the thread continues; `open` of that url raises it
                self.errors[url] = error
            with self._lock:
                self._waiting.discard(url)


def _listing(root: Path) -> Iterator[tuple[float, int, str]]:
    """(time of last use, bytes, name) of the files in a directory that others change."""
    with os.scandir(root) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat()
                yield status.st_mtime, status.st_size, entry.name


def _remove_leftovers(root: Path) -> None:
    """Unlinks old temporary files that no living process writes."""
    for _, _, name in _listing(root):
        if match := PART_NAME.fullmatch(name):
            _unlink(root, name, match[1], LEFTOVER_SECONDS)


def _unlink(root: Path, name: str, cached: str, seconds: float) -> bool:
    """Whether a file of a cached one could go: neither locked nor used in the last `seconds`."""
    path, lock = root / name, hidden_beside(root / cached, "lock")
    try:
        with _locked(lock, fcntl.LOCK_EX | fcntl.LOCK_NB):
            if time.time() - path.stat().st_mtime < seconds:
                return False
            path.unlink()
            return True
    except (BlockingIOError, FileNotFoundError):
        return False


@contextlib.contextmanager
def _locked(path: Path, operation: int) -> Iterator[None]:
    """Holds a lock between processes and threads; a killed process lets go of it.

    Lock files are never unlinked: two processes would hold the locks of two files of one name.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, operation)
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough: a fork may hold a copy
        os.close(descriptor)
