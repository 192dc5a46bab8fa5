"""One remote file to a local one.

http(s):// needs nothing but Python. s3://, gs:// and hf:// run fsspec in a child process, which can
be killed when it falls silent and knows nothing of this process's forks and threads; s3:// falls
back to the `aws` client. gs:// and hf:// share the code of s3:// but were never tried against
their servers. pipe:COMMAND takes what a shell command prints.
"""

import base64
import contextlib
import hashlib
import http.client
import importlib.util
import itertools
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from kl_f8_train.errors import MissingInputError, RunFailedError, UsageError
from kl_f8_train.files import atomic_path
from kl_f8_train.lifetime import guarded

BLOCK_BYTES = 1 << 20  # bytes
MAX_PAUSE_SECONDS = 30.0  # between two attempts
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub"}  # what fsspec needs
FINAL = re.compile(  # messages of clients for errors that a retry cannot fix
    r"NoSuchKey|NoSuchBucket|AccessDenied|FileNotFoundError|PermissionError|NoCredentialsError|"
    r"Unable to locate credentials|\(40[34]\)|error:? 40[34]\b|\b40[34]:? (?:Not Found|Forbidden)"
)


class _PassingError(Exception):
    """A failed attempt; the next one may succeed."""


@dataclass(frozen=True)
class Patience:
    """How long to wait for a source that does not answer, and how often to try."""

    attempts: int = 5
    timeout_seconds: float = 30.0  # of silence, also before the first byte
    stall_bytes: int = 1 << 16  # fewer than this in timeout_seconds is also a stall
    backoff_seconds: float = 1.0  # before the second attempt; doubles each time, with jitter


PATIENCE = Patience()


@dataclass(frozen=True)
class Record:
    """What a file was when it was first fetched."""

    size: int  # bytes
    sha256: str


def is_remote(location: str) -> bool:
    """Whether a location has to be fetched: any scheme but file://, or pipe:COMMAND."""
    return _scheme(location) not in ("", "file")


def fetch(url: str, target: Path, **patience: Any) -> None:
    """Fetches a remote file to `target`: to a temporary name beside it, then renamed.

    An attempt fails on `timeout_seconds` of silence, on fewer than `stall_bytes` in that time, on a
    body shorter than announced, on a client's or command's failure; the next starts from the first
    byte. A transfer that moves may take as long as it takes. `patience` has fields of `Patience`.

    Raises MissingInputError at once if the file is not there or not allowed, or no client for it is
    installed; RunFailedError after the last attempt, or if `target` cannot be written.
    """
    with atomic_path(target) as part:
        download(url, part, Patience(**patience))


def download(url: str, part: Path, patience: Patience) -> Record:
    """Writes a url's bytes to `part`, in as many attempts as allowed.

    Raises like `fetch`; OSError if `part` cannot be written.
    """
    started = time.monotonic()
    last = _PassingError("never tried")
    for attempt in range(patience.attempts):
        if attempt:
            time.sleep(_pause(attempt, patience))
        try:
            return _attempt(url, part, patience)
        except _PassingError as error:
            last = error
    raise RunFailedError(
        f"cannot fetch {shown(url)}: {last}\n  {patience.attempts} attempts failed in "
        f"{time.monotonic() - started:.1f} s. Check the address and the network, then run the same "
        "command again; files in the cache are kept"
    ) from last


def _attempt(url: str, part: Path, patience: Patience) -> Record:
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
        if not total:
            raise _PassingError("cut short: 0 bytes, expected some")
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
    """The bytes of a url. Raises _PassingError, or a UserError that a retry cannot fix."""
    scheme = _scheme(url)
    if scheme in ("http", "https"):
        return _http_blocks(url, timeout)
    if scheme in ("pipe", *PACKAGES):
        return _command_blocks(_command(url, scheme), url, timeout)
    raise UsageError(
        f"{shown(url)}: cannot fetch from {scheme or 'a local path'}; expected http://, https://, "
        "s3://, gs://, hf:// or pipe:COMMAND"
    )


def _request(url: str) -> urllib.request.Request:
    """A request with what urllib leaves to its callers: signs that are not ASCII, a password."""
    parts = urllib.parse.urlsplit(url)
    user, _, host = parts.netloc.rpartition("@")
    path = urllib.parse.quote(parts.path, safe="/%:@!$&'()*+,;=~[]")
    query = urllib.parse.quote(parts.query, safe="/%:@!$&'()*+,;=~[]?")
    plain = urllib.parse.urlunsplit((parts.scheme, host, path, query, ""))
    request = urllib.request.Request(plain, headers={"User-Agent": "kl-f8-train"})
    if user:  # RFC 7617; not sent on to where the server redirects
        token = base64.b64encode(urllib.parse.unquote_to_bytes(user)).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    return request


def _http_blocks(url: str, timeout: float) -> Generator[bytes, None, None]:
    request = _request(url)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            announced: int | None = response.length  # None if the server does not say
            total = 0
            while total != announced and (block := response.read1(BLOCK_BYTES)):
                total += len(block)
                yield block
    except urllib.error.HTTPError as error:
        error.close()
        if 400 <= error.code < 500 and error.code not in (408, 425, 429):
            raise MissingInputError(
                f"{shown(url)}: the server answers {error.code} {error.reason}; check the address "
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
import sys
from fsspec.core import url_to_fs
url, block, *endpoint = sys.argv[1], int(sys.argv[2]), *sys.argv[3:]
try:
    options = {"endpoint_url": endpoint[0]} if endpoint else {}
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
    package, endpoint = PACKAGES[scheme], []
    if scheme == "s3":
        given = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        endpoint = [given] if given else []
    if all(importlib.util.find_spec(name) for name in ("fsspec", package)):
        return [sys.executable, "-P", "-c", _FSSPEC, url, str(4 * BLOCK_BYTES), *endpoint]
    client = shutil.which("aws")
    if scheme == "s3" and client:
        options = ["--endpoint-url", *endpoint] if endpoint else []
        return [client, "s3", "cp", url, "-", "--only-show-errors", *options]
    other = ", or `pip install awscli` for the `aws` client" if scheme == "s3" else ""
    raise MissingInputError(
        f"{shown(url)}: nothing here reads {scheme}://. `pip install fsspec {package}`{other}; or "
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
            messages.seek(max(0, messages.seek(0, os.SEEK_END) - 1000))
            printed = messages.read().decode(errors="replace").strip()  # the end of it
            what = f"status {status}: {printed or 'no message'}"
            if FINAL.search(printed):
                raise MissingInputError(
                    f"{shown(url)}: {what}\n  Check the address and the access to it"
                )
            raise _PassingError(what)


def _pipe_blocks(descriptor: int, timeout: float) -> Iterator[bytes]:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while poll.poll(timeout * 1000):
        block = os.read(descriptor, BLOCK_BYTES)
        if not block:
            return
        yield block
    raise _PassingError(f"stalled: nothing for {timeout:g} s")


# --- names and local files ------------------------------------------------------------------


def _scheme(location: str) -> str:
    """In lower case, without its colon; empty for a plain path."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://|(pipe|file):", location)
    return (match[1] or match[2]).lower() if match else ""


def shown(url: str) -> str:
    """A url as messages and records show it: without passwords and signatures."""
    if url.startswith("pipe:"):
        return url
    return re.sub(r"\?.*", "?...", re.sub(r"//[^/@]*@", "//", url), flags=re.DOTALL)


def local_path(location: str) -> Path:
    """The path of a local location, also of one with file://, which may be a pattern."""
    if _scheme(location) == "file":  # urlsplit would cut it at a `?` or `#`
        return Path(urllib.parse.unquote(re.sub(r"^\w+:(//[^/]*)?", "", location)))
    return Path(location)


def plain_paths(pattern: str) -> str:
    """A pattern with paths in place of its file:// addresses, of which `::` joins several."""
    parts = pattern.split("::")
    return "::".join(str(local_path(p)) if _scheme(p) == "file" else p for p in parts)


def open_local(location: str) -> BinaryIO:
    """Opens a local location; MissingInputError if it cannot be opened."""
    try:
        return local_path(location).open("rb")
    except OSError as error:
        raise MissingInputError(f"{location}: {error.strerror}") from error
