"""Remote shards -> whole files in a bounded cache of this node.

A file under its final name is always whole: it is fetched to a temporary name and renamed. Of each
cached file the cache keeps, hidden beside it, a lock and a record of its size and SHA-256; records
outlive eviction, so a remote file that changes during a run is noticed when it is fetched again.

http(s):// needs nothing but Python. s3://, gs:// and hf:// run fsspec in a child process, which can
be killed when it falls silent and knows nothing of this process's forks and threads; s3:// falls
back to the `aws` client. gs:// and hf:// share the code of s3:// but were never tried against
their servers. pipe:COMMAND takes what a shell command prints.
"""

import contextlib
import fcntl
import hashlib
import http.client
import importlib.util
import itertools
import json
import os
import queue
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, BinaryIO

from kl_f8_train.errors import MissingInputError, RunFailedError, UsageError, UserError
from kl_f8_train.lifetime import guarded

BLOCK = 1 << 20  # bytes
MAX_PAUSE_SECONDS = 30.0  # between two attempts
LEFTOVER_SECONDS = 3600.0  # a temporary file as old as this belongs to nobody
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub"}  # what fsspec needs
ENTRY = re.compile(r"[0-9a-f]{16}-.*")
PART = re.compile(r"\.([0-9a-f]{16}-.*)\.\d+-\d+\.part")
FINAL = re.compile(  # what clients print when trying again is of no use
    r"NoSuchKey|NoSuchBucket|AccessDenied|FileNotFoundError|PermissionError|NoCredentialsError|"
    r"Unable to locate credentials|\(40[34]\)|error:? 40[34]\b|\b40[34]:? (?:Not Found|Forbidden)"
)


class _PassingError(Exception):
    """A failed attempt; the next one may succeed."""


@dataclass(frozen=True)
class Patience:
    """How long to go on with a source that does not answer."""

    attempts: int = 5
    timeout_seconds: float = 30.0  # of silence, also before the first byte
    stall_bytes: int = 1 << 16  # fewer than this in timeout_seconds is a stall, too
    backoff_seconds: float = 1.0  # before the second attempt; doubles each time, with jitter


PATIENCE = Patience()


@dataclass(frozen=True)
class Record:
    """What a file was when it was first fetched."""

    size: int  # bytes
    sha256: str


def is_remote(location: str) -> bool:
    """Whether a location has to be fetched: any scheme but file://, or pipe:COMMAND."""
    scheme = _scheme(location)
    return scheme not in ("", "file")


def fetch(
    url: str,
    target: Path,
    *,
    attempts: int = PATIENCE.attempts,
    timeout_seconds: float = PATIENCE.timeout_seconds,
    stall_bytes: int = PATIENCE.stall_bytes,
    backoff_seconds: float = PATIENCE.backoff_seconds,
) -> None:
    """Brings a remote file to `target`: to a temporary name beside it, then renamed.

    An attempt fails on `timeout_seconds` of silence, on fewer than `stall_bytes` in that time, on a
    body shorter than announced, on a client's or command's failure; the next starts from the first
    byte. A transfer that moves may take as long as it takes.

    Raises MissingInputError at once if the file is not there or not allowed, or no client for it is
    installed; RunFailedError after the last attempt, or if `target` cannot be written.
    """
    part = _part(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _download(
            url, part, None, Patience(attempts, timeout_seconds, stall_bytes, backoff_seconds)
        )
        part.replace(target)
    except OSError as error:
        raise _disk_failure(target, error) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


# --- the cache ------------------------------------------------------------------------------


class ShardCache:
    """Whole remote files in a directory of this node, shared by all its processes.

    `max_bytes` bounds the directory: least recently used files go first, except those used in the
    last `grace_seconds` or locked, and what is just arriving; that much may lie above the bound.
    `root` belongs to one user, on a file system with flock (any local one).
    """

    def __init__(
        self,
        root: Path,
        max_bytes: int,
        *,
        grace_seconds: float = 60.0,
        queue_size: int = 16,
        patience: Patience = PATIENCE,
    ) -> None:
        """Raises RunFailedError if `root` cannot be written."""
        self.root, self.max_bytes = root, max_bytes
        self.grace_seconds, self.queue_size, self.patience = grace_seconds, queue_size, patience
        self._worker = _Worker(self._fill_ahead, queue_size)
        try:
            root.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(root)
            with _locked(root / ".evict.lock", fcntl.LOCK_EX):
                pass
        except OSError as error:
            raise _disk_failure(root, error) from error

    def __reduce__(self) -> tuple[Callable[..., "ShardCache"], tuple[object, ...]]:
        """Pickles the settings only; the copy has its own background thread."""
        return _rebuild, (
            *(self.root, self.max_bytes, self.grace_seconds, self.queue_size, self.patience),
        )

    def open(self, url: str, size: int | None = None, sha256: str | None = None) -> BinaryIO:
        """The file, open; what is open stays readable, also when it is evicted meanwhile.

        Fetches it, once for all processes, unless it is there with its recorded size and the given
        size (bytes) and sha256. A local path is opened as it is, without checks.

        Raises MissingInputError and RunFailedError like `fetch`, and RunFailedError if the remote
        file is not the given one or, where nothing is given, not the one first fetched.
        """
        if not is_remote(url):
            return _open_local(url)
        try:
            return self._take(url, size, sha256)
        except OSError as error:
            raise _disk_failure(self.root, error) from error

    def path(self, url: str, size: int | None = None, sha256: str | None = None) -> Path:
        """Like `open`, but its path: whoever opens it within `grace_seconds` finds it there."""
        if not is_remote(url):
            return _local(url)
        with self.open(url, size, sha256):
            return _Entry(self.root, url).path

    def prefetch(self, urls: Iterable[str]) -> int:
        """Hands urls to the background thread; returns at once how many it took.

        It stops at the first that does not fit in the queue; those that wait there already count
        as taken. An error is kept and raised when that url is asked for.
        """
        taken = 0
        for url in urls:
            if is_remote(url) and not self._own_worker().offer(url):
                break
            taken += 1
        return taken

    def _take(self, url: str, size: int | None, sha256: str | None) -> BinaryIO:
        entry = _Entry(self.root, url)
        with _locked(entry.lock, fcntl.LOCK_SH):
            if entry.holds(size, sha256):
                self._own_worker().errors.pop(url, None)  # some other process was luckier
                return entry.open()
        with _locked(entry.lock, fcntl.LOCK_EX):
            if not entry.holds(size, sha256):  # no other process fetched it meanwhile
                kept = self._own_worker().errors.pop(url, None)
                if kept is not None:
                    raise kept
                self._fill(entry, size, sha256)
            file = entry.open()
        self._evict()
        return file

    def _fill(self, entry: "_Entry", size: int | None, sha256: str | None) -> None:
        """Fetches a file whose exclusive lock is held."""
        known = entry.record()
        self._evict(size or (known.size if known else 0))
        for abandoned in self.root.glob(f".{entry.path.name}.*.part"):
            abandoned.unlink(missing_ok=True)  # of a killed process: the lock is ours
        part = _part(entry.path)
        try:
            found = _download(entry.url, part, size, self.patience)
            _check(entry, found, size, sha256, known)
            if found != known:  # a file must never lie beside another file's record
                entry.record_path.unlink(missing_ok=True)
            part.replace(entry.path)
            if found != known:
                entry.write_record(found)
        finally:
            with contextlib.suppress(OSError):
                part.unlink()

    def _fill_ahead(self, url: str) -> None:
        """Fetches a file, unless some other process is about to."""
        entry = _Entry(self.root, url)
        with (
            contextlib.suppress(BlockingIOError),
            _locked(entry.lock, fcntl.LOCK_EX | fcntl.LOCK_NB),
        ):
            errors = self._own_worker().errors
            errors.pop(url, None)
            try:
                if not entry.holds(None, None):
                    self._fill(entry, None, None)
                os.utime(entry.path)
            except OSError as error:
                errors[url] = _disk_failure(self.root, error)
            except Exception as error:
                errors[url] = error
        with contextlib.suppress(OSError):
            self._evict()

    def _evict(self, incoming: int = 0) -> None:
        """Unlinks least recently used files until `incoming` more bytes fit."""
        with _locked(self.root / ".evict.lock", fcntl.LOCK_EX):
            total = incoming
            files: list[tuple[float, int, Path]] = []
            for name, used, size in _listing(self.root):
                if ENTRY.fullmatch(name):
                    files.append((used, size, self.root / name))
                    total += size
                elif PART.fullmatch(name):
                    total += size
            for _, size, path in sorted(files):
                if total <= self.max_bytes:
                    break
                if self._unlink(path):
                    total -= size

    def _unlink(self, path: Path) -> bool:
        """Whether a file could go: neither locked nor used within the grace."""
        try:
            with _locked(_hidden(path, "lock"), fcntl.LOCK_EX | fcntl.LOCK_NB):
                if time.time() - path.stat().st_mtime < self.grace_seconds:
                    return False
                path.unlink()
                return True
        except (BlockingIOError, FileNotFoundError):
            return False

    def _own_worker(self) -> "_Worker":
        """The background thread of this process; a fork leaves its parent's behind."""
        if self._worker.pid != os.getpid():
            self._worker = _Worker(self._fill_ahead, self.queue_size)
        return self._worker


def _rebuild(
    root: Path, max_bytes: int, grace_seconds: float, queue_size: int, patience: Patience
) -> ShardCache:
    return ShardCache(
        root, max_bytes, grace_seconds=grace_seconds, queue_size=queue_size, patience=patience
    )


class _Entry:
    """The files that belong to a url. Everything here expects its lock to be held."""

    def __init__(self, root: Path, url: str) -> None:
        self.url = url
        name = url.split("?", 1)[0].rstrip("/").rsplit("/", 1)[-1]
        name = re.sub(r"[^A-Za-z0-9._-]+", "_", name)[-100:]
        self.path = root / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}"
        self.lock = _hidden(self.path, "lock")
        self.record_path = _hidden(self.path, "json")

    def holds(self, size: int | None, sha256: str | None) -> bool:
        """Whether the file is there, as recorded and as wanted."""
        record = self.record()
        if record is None or size not in (None, record.size):
            return False
        if sha256 not in (None, record.sha256):
            return False
        try:
            return self.path.stat().st_size == record.size
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
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def write_record(self, record: Record) -> None:
        """Writes the record, whole or not at all."""
        part = _part(self.path)
        with part.open("w") as file:
            json.dump({"url": _shown(self.url), **asdict(record)}, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.record_path)


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
            except Exception as error:  # the thread goes on; whoever asks for the url learns it
                self.errors[url] = error
            with self._lock:
                self._waiting.discard(url)


def _check(
    entry: _Entry, found: Record, size: int | None, sha256: str | None, known: Record | None
) -> None:
    """Raises RunFailedError if a fetched file is not what was asked for, or what it once was."""
    url = _shown(entry.url)
    if size is not None and found.size != size:
        raise RunFailedError(
            f"{url} has {found.size:,} bytes, expected {size:,}; not kept. The file or the list "
            "that names it has changed: mend it, then run the same command again"
        )
    if sha256 is not None and found.sha256 != sha256:
        raise RunFailedError(
            f"{url} has SHA-256 {found.sha256}, expected {sha256}; not kept. The file or the list "
            "that names it has changed: mend it, then run the same command again"
        )
    if sha256 is None and known is not None and found.sha256 != known.sha256:
        raise RunFailedError(
            f"{url} has changed since it was first fetched: SHA-256 {found.sha256} "
            f"({found.size:,} bytes), was {known.sha256} ({known.size:,} bytes); not kept. Put the "
            f"old file back; or, to go on with the new one, delete {entry.record_path}"
        )


# --- one file -------------------------------------------------------------------------------


def _download(url: str, part: Path, size: int | None, patience: Patience) -> Record:
    """Writes a url's bytes to `part`, in as many attempts as allowed.

    Raises like `fetch`; OSError if `part` cannot be written.
    """
    started = time.monotonic()
    last = _PassingError("never tried")
    for attempt in range(patience.attempts):
        if attempt:
            time.sleep(_pause(attempt, patience))
        try:
            return _attempt(url, part, size, patience)
        except _PassingError as error:
            last = error
    raise RunFailedError(
        f"cannot fetch {_shown(url)}: {last}\n  {patience.attempts} attempts failed in "
        f"{time.monotonic() - started:.1f} s. Check the address and the network, then run the same "
        "command again; files in the cache are kept"
    ) from last


def _attempt(url: str, part: Path, size: int | None, patience: Patience) -> Record:
    digest, total = hashlib.sha256(), 0
    with (
        part.open("wb", buffering=0) as file,  # a fork must not inherit unwritten bytes
        contextlib.closing(_blocks(url, patience.timeout_seconds)) as blocks,
    ):
        for block in _brisk(blocks, patience):
            digest.update(block)
            total += len(block)
            rest = memoryview(block)
            while rest:
                rest = rest[file.write(rest) :]
        if total < (size or 1):
            raise _PassingError(f"cut short: {total:,} bytes, expected {size or 'some'}")
        os.fsync(file.fileno())
    return Record(total, digest.hexdigest())


def _brisk(blocks: Iterator[bytes], patience: Patience) -> Iterator[bytes]:
    """Passes blocks on. Raises _PassingError when they trickle; a slow disk does not count."""
    yield from itertools.islice(blocks, 1)
    asked, waited, recent = time.monotonic(), 0.0, 0
    for block in blocks:
        waited += time.monotonic() - asked
        recent += len(block)
        if waited > patience.timeout_seconds:
            if recent < patience.stall_bytes:
                raise _PassingError(f"stalled: {recent:,} bytes in {waited:.3g} s")
            waited, recent = 0.0, 0
        yield block
        asked = time.monotonic()


def _pause(attempt: int, patience: Patience) -> float:
    """Seconds to wait before attempt 1, 2, ...; the attempts of many processes drift apart."""
    longest = min(MAX_PAUSE_SECONDS, patience.backoff_seconds * 2 ** (attempt - 1))
    return longest * random.SystemRandom().uniform(0.5, 1)  # leaves the global generator alone


def _blocks(url: str, timeout: float) -> Generator[bytes, None, None]:
    """The bytes of a url. Raises _PassingError, or a UserError that no further attempt mends."""
    scheme = _scheme(url)
    if scheme in ("http", "https"):
        return _http_blocks(url, timeout)
    if scheme in ("pipe", *PACKAGES):
        return _command_blocks(_command(url, scheme), url, timeout)
    raise UsageError(
        f"{_shown(url)}: cannot fetch from {scheme or 'a local path'}; expected http://, https://, "
        "s3://, gs://, hf:// or pipe:COMMAND"
    )


def _http_blocks(url: str, timeout: float) -> Generator[bytes, None, None]:
    request = urllib.request.Request(url, headers={"User-Agent": "kl-f8-train"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            announced: int | None = response.length  # None if the server does not say
            total = 0
            while total != announced and (block := response.read1(BLOCK)):
                total += len(block)
                yield block
    except urllib.error.HTTPError as error:
        error.close()
        if 400 <= error.code < 500 and error.code not in (408, 425, 429):
            raise MissingInputError(
                f"{_shown(url)}: the server answers {error.code} {error.reason}; check the address "
                "and the access to it"
            ) from error
        raise _PassingError(f"the server answers {error.code} {error.reason}") from error
    except TimeoutError as error:
        raise _PassingError(f"stalled: nothing for {timeout:g} s") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise _PassingError(f"{type(error).__name__}: {error}") from error
    if announced is not None and total < announced:
        raise _PassingError(f"cut short: {total:,} bytes, expected {announced:,}")


# --- files through other programs -----------------------------------------------------------

# Runs in a process of its own: a url's bytes to the standard output.
_FSSPEC = """
import os, sys
from fsspec.core import url_to_fs
url, block = sys.argv[1], int(sys.argv[2])
endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
try:
    options = {"endpoint_url": endpoint} if endpoint and url.startswith("s3:") else {}
    system, path = url_to_fs(url, **options)
    with system.open(path, "rb", block_size=block, cache_type="none") as source:
        left = source.size
        while data := source.read(block):
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
            left -= len(data)
    if left:
        sys.exit(f"cut short: {left} bytes are missing")
except Exception as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def _command(url: str, scheme: str) -> list[str]:
    """The program that prints a url's bytes. Raises MissingInputError if it is not installed."""
    if scheme == "pipe":
        shell = shutil.which("bash")
        command = url.partition(":")[2]
        return [shell, "-o", "pipefail", "-c", command] if shell else ["sh", "-c", command]
    package = PACKAGES[scheme]
    if all(importlib.util.find_spec(name) for name in ("fsspec", package)):
        return [sys.executable, "-P", "-c", _FSSPEC, url, str(4 * BLOCK)]
    client = shutil.which("aws")
    if scheme == "s3" and client:
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        options = ["--endpoint-url", endpoint] if endpoint else []
        return [client, "s3", "cp", url, "-", "--only-show-errors", *options]
    other = ", or `pip install awscli` for the `aws` client" if scheme == "s3" else ""
    raise MissingInputError(
        f"{_shown(url)}: nothing here reads {scheme}://. `pip install fsspec {package}`{other}; or "
        "name a command with pipe:COMMAND"
    )


def _command_blocks(
    command: Sequence[str], url: str, timeout: float
) -> Generator[bytes, None, None]:
    """What a program prints; it is killed, with its children, when it falls silent."""
    with tempfile.TemporaryFile() as messages:
        try:
            process = subprocess.Popen(
                guarded([*command]),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=messages,
                start_new_session=True,
            )
        except OSError as error:
            raise _PassingError(f"cannot start {command[0]}: {error}") from error
        assert process.stdout is not None
        try:
            yield from _pipe_blocks(process.stdout.fileno(), timeout)
            status = process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise _PassingError(f"{command[0]} does not end") from error
        finally:
            process.stdout.close()
            if process.returncode is None:  # not waited for: its process group is still its own
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if status:
            _refuse(url, status, _tail(messages))


def _pipe_blocks(descriptor: int, timeout: float) -> Iterator[bytes]:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while poll.poll(timeout * 1000):
        block = os.read(descriptor, BLOCK)
        if not block:
            return
        yield block
    raise _PassingError(f"stalled: nothing for {timeout:g} s")


def _refuse(url: str, status: int, messages: str) -> None:
    """Raises MissingInputError if a program's messages say so, else _PassingError."""
    what = f"status {status}: {messages or 'no message'}"
    if FINAL.search(messages):
        raise MissingInputError(f"{_shown(url)}: {what}\n  Check the address and the access to it")
    raise _PassingError(what)


def _tail(messages: IO[bytes]) -> str:
    """The end of what a program printed to its standard error."""
    messages.seek(max(0, messages.seek(0, os.SEEK_END) - 1000))
    return messages.read().decode(errors="replace").strip()


# --- names, locks, local files ---------------------------------------------------------------


def _scheme(location: str) -> str:
    """In lower case, without its colon; empty for a plain path."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://|(pipe):", location)
    return (match[1] or match[2]).lower() if match else ""


def _shown(url: str) -> str:
    """A url as messages and records show it: without passwords and signatures."""
    if url.startswith("pipe:"):
        return url
    return re.sub(r"\?.*", "?...", re.sub(r"//[^/@]*@", "//", url), flags=re.DOTALL)


def _local(location: str) -> Path:
    if _scheme(location) == "file":
        return Path(urllib.parse.unquote(urllib.parse.urlsplit(location).path))
    return Path(location)


def _open_local(location: str) -> BinaryIO:
    try:
        return _local(location).open("rb")
    except OSError as error:
        raise MissingInputError(f"{location}: {error.strerror}") from error


def _hidden(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{suffix}")


def _part(path: Path) -> Path:
    """A temporary name beside `path`, of this thread alone."""
    return _hidden(path, f"{os.getpid()}-{threading.get_native_id()}.part")


def _listing(root: Path) -> Iterator[tuple[str, float, int]]:
    """(name, time of last use, bytes) of the files in a directory that others change."""
    with os.scandir(root) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat()
                yield entry.name, status.st_mtime, status.st_size


def _remove_leftovers(root: Path) -> None:
    """Unlinks old temporary files that no living process writes."""
    for name, written, _ in _listing(root):
        match = PART.fullmatch(name)
        if match and time.time() - written > LEFTOVER_SECONDS:
            lock = _hidden(root / match[1], "lock")
            with (
                contextlib.suppress(BlockingIOError),
                _locked(lock, fcntl.LOCK_EX | fcntl.LOCK_NB),
            ):
                (root / name).unlink(missing_ok=True)


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


def _disk_failure(path: Path, error: OSError) -> UserError:
    free = "unknown"
    with contextlib.suppress(OSError):
        free = f"{shutil.disk_usage(path if path.is_dir() else path.parent).free:,}"
    return RunFailedError(
        f"cannot write {path}: {error}\n  {free} bytes are free there. Make room or name another "
        "directory, then run the same command again"
    )
