"""Real servers, processes and locks; every wait is a fraction of a second."""

import fcntl
import hashlib
import http.server
import importlib.util
import json
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import socket
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from kl_f8_train import transfer
from kl_f8_train.data import shard_cache
from kl_f8_train.data.shard_cache import ShardCache
from kl_f8_train.errors import MissingInputError, RunFailedError, UsageError
from kl_f8_train.files import hidden_beside
from kl_f8_train.transfer import Patience, fetch, is_remote

FORK = multiprocessing.get_context("fork")
BODY = random.Random(0).randbytes(300_000)
QUICK = {"timeout_seconds": 0.4, "stall_bytes": 1000, "backoff_seconds": 0.01}  # where it stalls
CALM = {**QUICK, "timeout_seconds": 10.0}  # where it should not, however busy the machine
PATIENCE = Patience(attempts=3, **CALM)


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`; `faults[path]` holds what goes wrong in its next answers."""

    daemon_threads = True
    request_queue_size = 32

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list] = {}
        self.gets: Counter[str] = Counter()
        self.released = threading.Event()  # lets stalled answers end

    def add(self, path: str, body: bytes = BODY, *faults) -> str:
        self.files[path], self.faults[path] = body, list(faults)
        return f"http://127.0.0.1:{self.server_port}/{path}"

    def handle_error(self, request, client_address) -> None:
        """Clients that hang up are part of the tests."""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server = self.server
        path = self.path.partition("?")[0].lstrip("/")
        server.gets[path] += 1
        fault = server.faults[path].pop(0) if server.faults.get(path) else None
        if fault == "silent":
            server.released.wait(10)
            self.close_connection = True
            return
        if isinstance(fault, int) or path not in server.files:
            self.send_error(fault or 404)
            return
        body = server.files[path]
        self.send_response(200)
        if fault == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
            body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
        elif fault == "cut chunks":
            self.send_header("Transfer-Encoding", "chunked")
            body = b"%x\r\n%s" % (len(body), body[: len(body) // 2])
            self.close_connection = True
        elif fault == "unannounced":
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.send(body, fault)

    def send(self, body: bytes, fault) -> None:
        half = len(body) // 2
        if fault == "stall":
            self.wfile.write(body[:half])
            self.server.released.wait(10)
            self.close_connection = True
        elif fault == "trickle":
            for start in range(len(body)):
                self.wfile.write(body[start : start + 1])
                if self.server.released.wait(0.05):
                    break
        elif fault == "truncated":
            self.wfile.write(body[:half])
            self.close_connection = True
        elif fault == "slow":
            for start in range(0, len(body), 100_000):
                time.sleep(0.1)
                self.wfile.write(body[start : start + 100_000])
        else:
            self.wfile.write(body)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def server():
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield running
        running.released.set()
        running.shutdown()
        thread.join()


@pytest.fixture
def shards(tmp_path):
    """shards(max_bytes, ...) -> ShardCache on one directory."""

    def build(max_bytes: int = 10**9, **settings) -> ShardCache:
        settings = {"grace_seconds": 0.0, "patience": PATIENCE, **settings}
        return ShardCache(tmp_path / "cache", max_bytes, **settings)

    return build


def in_processes(*works) -> None:
    """Runs functions in a forked process each; all have to end well."""
    processes = [FORK.Process(target=work) for work in works]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [0] * len(works)


def soon(condition, seconds: float = 5.0) -> None:
    """Waits until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "took too long"
        time.sleep(0.005)


def kept(root: Path) -> list[Path]:
    """The files under their final names."""
    return sorted(path for path in root.iterdir() if not path.name.startswith("."))


def parts(root: Path) -> list[Path]:
    return sorted(root.glob(".*.part"))


def sha(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


# --- locations ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "location",
    ["http://a/b.tar", "HTTPS://a/b.tar", "s3://a/b.tar", "gs://a/b.tar", "hf://datasets/a/b.tar"],
)
def test_schemes_are_remote(location):
    assert is_remote(location)


def test_commands_are_remote():
    assert is_remote("pipe:cat a.tar")
    assert is_remote("abfs://a/b.tar")


@pytest.mark.parametrize("location", ["a.tar", "/a/b.tar", "a:b.tar", "file:///a.tar", "", "../a"])
def test_paths_are_not_remote(location):
    assert not is_remote(location)


# --- fetching over http ---------------------------------------------------------------------


@pytest.mark.parametrize("fault", [None, "slow", "chunked", "unannounced"])
def test_fetch(server, tmp_path, fault):
    url = server.add("a.tar", BODY, fault)
    fetch(url, tmp_path / "new" / "a.tar", **CALM)
    assert (tmp_path / "new" / "a.tar").read_bytes() == BODY
    assert os.listdir(tmp_path / "new") == ["a.tar"]
    assert server.gets["a.tar"] == 1


@pytest.mark.parametrize(
    "fault", [500, 503, 429, 408, "stall", "silent", "truncated", "cut chunks"]
)
def test_a_passing_fault_costs_another_attempt(server, tmp_path, fault):
    url = server.add("a.tar", BODY, fault, fault)
    started = time.monotonic()
    fetch(url, tmp_path / "a.tar", **(QUICK if fault in ("stall", "silent") else CALM))
    assert time.monotonic() - started < 20
    assert (tmp_path / "a.tar").read_bytes() == BODY
    assert server.gets["a.tar"] == 3


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (500, "answers 500 Internal Server Error"),
        ("stall", r"stalled: nothing for 0\.4 s"),
        ("silent", r"stalled: nothing for 0\.4 s"),
        ("trickle", r"stalled: \d+ bytes in 0\.4"),
        ("truncated", "cut short: 150,000 bytes, expected 300,000"),
        ("cut chunks", "IncompleteRead"),
    ],
)
def test_a_lasting_fault_ends_after_the_attempts(server, tmp_path, fault, message):
    url = server.add("a.tar", BODY, *[fault] * 9)
    with pytest.raises(RunFailedError, match=message) as caught:
        fetch(url, tmp_path / "a.tar", attempts=2, **QUICK)
    assert url in str(caught.value)
    assert re.search(r"2 attempts failed in \d+\.\d s", str(caught.value))
    assert "run the same command again" in str(caught.value)
    assert server.gets["a.tar"] == 2
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_some_answers_are_final(server, tmp_path, status):
    url = server.add("a.tar", BODY, status, status)
    with pytest.raises(MissingInputError, match=f"{url}.*answers {status}"):
        fetch(url, tmp_path / "a.tar", **CALM)
    assert server.gets["a.tar"] == 1
    assert os.listdir(tmp_path) == []


def test_nobody_listening(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: refuses
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/a.tar"
        with pytest.raises(RunFailedError, match="refused"):
            fetch(url, tmp_path / "a.tar", attempts=2, **CALM)


def test_a_failure_leaves_the_older_file(server, tmp_path):
    (tmp_path / "a.tar").write_text("older")
    url = server.add("a.tar", BODY, *["truncated"] * 2)
    with pytest.raises(RunFailedError):
        fetch(url, tmp_path / "a.tar", attempts=2, **CALM)
    assert (tmp_path / "a.tar").read_text() == "older"


def test_an_empty_answer_is_no_shard(server, tmp_path):
    with pytest.raises(RunFailedError, match="cut short: 0 bytes"):
        fetch(server.add("a.tar", b""), tmp_path / "a.tar", attempts=2, **CALM)


def test_messages_hide_signatures_and_passwords(server, tmp_path):
    url = server.add("a.tar", BODY, 403) + "?X-Amz-Signature=secret"
    with pytest.raises(MissingInputError, match=r"a\.tar\?\.\.\.: the server") as caught:
        fetch(url, tmp_path / "a.tar", **CALM)
    assert "secret" not in str(caught.value)
    assert transfer.shown("https://me:secret@host/a.tar") == "https://host/a.tar"


def test_addresses_with_a_password_or_signs_that_are_not_ascii(server, tmp_path):
    url = server.add("caf%C3%A9%20a.tar", BODY)
    address = url.replace("caf%C3%A9%20a", "café a").replace("//", "//me:se%40cret@")
    fetch(f"{address}?name=b c&x=%20#part", tmp_path / "a.tar", **CALM)
    assert (tmp_path / "a.tar").read_bytes() == BODY
    request = transfer._request(address)
    assert request.unredirected_hdrs["Authorization"] == "Basic bWU6c2VAY3JldA=="
    assert "secret" not in request.full_url


def test_a_disk_failure_is_not_tried_again(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFailedError, match=r"cannot write .*(?s:.)*bytes are free there"):
        fetch(server.add("a.tar"), tmp_path / "file" / "a.tar", **QUICK)
    assert server.gets["a.tar"] == 0


def test_a_full_disk_is_not_tried_again(server, tmp_path):
    with pytest.raises(RunFailedError, match=r"cannot write .*File too large"):
        fetch_limited(server.add("a.tar"), tmp_path / "a.tar")
    assert server.gets["a.tar"] == 1
    assert os.listdir(tmp_path) == []


def fetch_limited(url: str, target: Path) -> None:
    """Fetches where no file may be larger than 100,000 bytes."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        fetch(url, target, **CALM)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.parametrize("url", ["ftp://host/a.tar", "abfs://a/b.tar", "a.tar"])
def test_unknown_schemes(tmp_path, url):
    with pytest.raises(UsageError, match="expected http://"):
        fetch(url, tmp_path / "a.tar")


def test_pauses_double_up_to_a_limit():
    pauses = [transfer._pause(attempt, Patience(backoff_seconds=1.0)) for attempt in range(1, 20)]
    for attempt, pause in enumerate(pauses):
        assert 0.5 * min(30, 2**attempt) <= pause <= min(30, 2**attempt)


def test_a_slow_consumer_is_no_stall():
    blocks = transfer._brisk(iter([b"a", b"b", b"c"]), Patience(timeout_seconds=0.05))
    for _ in blocks:
        time.sleep(0.1)


# --- fetching from commands -----------------------------------------------------------------


def test_pipe(tmp_path):
    (tmp_path / "source").write_bytes(BODY)
    fetch(f"pipe:cat {tmp_path}/source | cat", tmp_path / "a.tar", **CALM)
    assert (tmp_path / "a.tar").read_bytes() == BODY


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("echo some; echo no luck >&2; exit 7", "status 7: no luck"),
        ("(echo some; exit 7) | cat", "status 7: no message"),
        ("no-such-program", "status 127: .*not found"),
        ("true", "cut short: 0 bytes"),
        ("exec >&-; sleep 60", "does not end"),
    ],
)
def test_failing_command(tmp_path, command, message):
    settings = QUICK if "sleep" in command else CALM
    with pytest.raises(RunFailedError, match=message) as caught:
        fetch(f"pipe:{command}", tmp_path / "a.tar", attempts=2, **settings)
    assert "2 attempts" in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_silent_command_is_killed_with_its_children(tmp_path):
    started = time.monotonic()
    command = f"echo some; (sleep 60 & echo $! > {tmp_path}/pid; wait)"
    with pytest.raises(RunFailedError, match=r"stalled: nothing for 0\.4 s"):
        fetch(f"pipe:{command}", tmp_path / "a.tar", attempts=1, **QUICK)
    assert time.monotonic() - started < 20
    child = Path("/proc") / (tmp_path / "pid").read_text().strip()
    soon(lambda: not child.exists() or "\nState:\tZ" in (child / "status").read_text())


def test_a_command_that_recovers(tmp_path):
    command = f"if [ -e {tmp_path}/tried ]; then echo fine; else touch {tmp_path}/tried; exit 1; fi"
    fetch(f"pipe:{command}", tmp_path / "a.tar", **CALM)
    assert (tmp_path / "a.tar").read_text() == "fine\n"


def test_a_command_that_says_404_is_not_repeated(tmp_path):
    command = f"echo >> {tmp_path}/tries; echo 'curl: (22) returned error: 404' >&2; exit 22"
    with pytest.raises(MissingInputError, match="error: 404"):
        fetch(f"pipe:{command}", tmp_path / "a.tar", **CALM)
    assert (tmp_path / "tries").read_text() == "\n"


# --- the cache ------------------------------------------------------------------------------


def test_a_file_is_fetched_once(server, shards):
    url = server.add("a.tar")
    path = shards().path(url)
    assert path == shards().root / f"{sha(url.encode())[:16]}-a.tar"
    assert path.read_bytes() == BODY
    assert shards().path(url) == path
    with shards().open(url) as file:
        assert file.read() == BODY
    assert server.gets["a.tar"] == 1
    assert parts(shards().root) == []


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("s3://bucket/train/00.tar", "00.tar"),
        ("http://host/a%20b c.tar?sig=/x/y", "a_20b_c.tar"),
        ("pipe:curl -s http://host/a.tar | cat", "a.tar_cat"),
        ("http://host/", "host"),
        ("http://host/" + "x" * 300 + ".tar", "x" * 96 + ".tar"),
    ],
)
def test_names(tmp_path, url, name):
    assert shard_cache._Entry(tmp_path, url).path.name[17:] == name


def test_processes_fetch_each_file_once(server, shards):
    urls = [server.add(f"{number}.tar", BODY, "slow") for number in range(2)]
    barrier = FORK.Barrier(4)

    def work():
        barrier.wait()
        for url in urls:
            assert shards().path(url).read_bytes() == BODY

    in_processes(*[work] * 4)
    assert server.gets == {"0.tar": 1, "1.tar": 1}


def test_threads_fetch_each_file_once(server, shards):
    url = server.add("a.tar", BODY, "slow")
    one = shards()
    threads = [threading.Thread(target=one.path, args=(url,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.gets["a.tar"] == 1


def test_a_file_never_lies_beside_another_files_record(server, shards, monkeypatch):
    url = server.add("a.tar", b"old")
    with monkeypatch.context() as patch:
        patch.setattr(shard_cache._Entry, "write_record", interrupted)
        with pytest.raises(KeyboardInterrupt):
            shards().path(url)
    server.files["a.tar"] = b"new"
    assert shards().path(url).read_bytes() == b"new"


def interrupted(*args):
    raise KeyboardInterrupt


def test_changed_remote_is_noticed(server, shards):
    url = server.add("a.tar", b"old one")
    record = shards().path(url)
    record.unlink()  # as if evicted
    server.files["a.tar"] = b"new"
    with pytest.raises(RunFailedError, match="has changed since it was first fetched") as caught:
        shards().path(url)
    assert server.gets["a.tar"] == 2
    assert sha(b"old one") in str(caught.value)
    assert sha(b"new") in str(caught.value)
    assert kept(shards().root) == parts(shards().root) == []
    (named,) = re.findall(r"delete (/\S+)", str(caught.value))
    Path(named).unlink()
    assert shards().path(url).read_bytes() == b"new"


def test_unchanged_remote_is_fetched_again(server, shards):
    url = server.add("a.tar")
    shards().path(url).unlink()
    assert shards().path(url).read_bytes() == BODY
    assert server.gets["a.tar"] == 2


@pytest.mark.parametrize("damage", [BODY[:-1], BODY + b"0", b""])
def test_a_file_of_another_size_is_fetched_again(server, shards, damage):
    url = server.add("a.tar")
    shards().path(url).write_bytes(damage)
    assert shards().path(url).read_bytes() == BODY
    assert server.gets["a.tar"] == 2


@pytest.mark.parametrize("text", ["", "[]", "{", '{"size": null, "sha256": ""}', None])
def test_a_file_without_its_record_is_fetched_again(server, shards, text):
    url = server.add("a.tar")
    record = shard_cache._Entry(shards().root, url).record_path
    shards().path(url)
    assert json.loads(record.read_text()) == {"url": url, "size": 300_000, "sha256": sha(BODY)}
    record.unlink() if text is None else record.write_text(text)
    shards().path(url)
    assert json.loads(record.read_text())["sha256"] == sha(BODY)
    assert server.gets["a.tar"] == 2


def test_the_cache_is_pickled_without_its_thread(server, shards):
    url = server.add("a.tar")
    one = shards(max_bytes=123, grace_seconds=4.5, queue_size=6)
    assert one.prefetch([url]) == 1
    other = pickle.loads(pickle.dumps(one))
    for name in ("root", "max_bytes", "grace_seconds", "queue_size", "patience"):
        assert getattr(other, name) == getattr(one, name)
    assert other.path(url).read_bytes() == BODY


def test_unwritable_root(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFailedError, match="cannot write"):
        ShardCache(tmp_path / "file" / "cache", 1).open("https://example.org/0.tar")


def test_a_wiped_cache(server, shards):
    url = server.add("a.tar")
    one = shards()
    one.path(url)
    shutil.rmtree(one.root)
    with pytest.raises(RunFailedError, match="cannot write"):
        one.path(url)
    one.root.mkdir()
    assert one.path(url).read_bytes() == BODY


# --- local files ----------------------------------------------------------------------------


def test_local_files_pass_through(tmp_path, shards):
    file = tmp_path / "a b.tar"
    file.write_bytes(BODY)
    for location in (str(file), f"file://{file}", f"file://{file}".replace(" ", "%20")):
        assert shards().path(location) == file
        with shards().open(location) as opened:
            assert opened.read() == BODY
        assert shards().prefetch([location]) == 1
    assert not shards().root.exists()


def test_missing_local_file(tmp_path, shards):
    assert shards().path("relative/a.tar") == Path("relative/a.tar")
    with pytest.raises(MissingInputError, match=r"a\.tar: No such file"):
        shards().open(f"file://{tmp_path}/a.tar")


# --- eviction -------------------------------------------------------------------------------


def used(path: Path, seconds_ago: float) -> None:
    os.utime(path, (time.time() - seconds_ago,) * 2)


def test_the_least_recently_used_goes_first(server, shards):
    urls = [server.add(f"{number}.tar", BODY) for number in range(4)]
    one = shards(max_bytes=3 * len(BODY))
    paths = [one.path(url) for url in urls[:3]]
    for path, age in zip(paths, (100, 300, 200), strict=True):
        used(path, age)
    one.path(urls[1])  # the oldest is used again
    paths.append(one.path(urls[3]))
    assert [path.exists() for path in paths] == [True, True, False, True]


def test_files_in_their_grace_stay(server, shards):
    urls = [server.add(f"{number}.tar", BODY) for number in range(3)]
    one = shards(max_bytes=len(BODY), grace_seconds=60.0)
    paths = [one.path(url) for url in urls]
    assert all(path.exists() for path in paths)
    used(paths[0], 61)
    one.path(server.add("3.tar", b"little"))
    assert [path.exists() for path in paths] == [False, True, True]


def test_locked_files_stay(server, shards):
    urls = [server.add(f"{number}.tar", BODY) for number in range(2)]
    one = shards(max_bytes=len(BODY), grace_seconds=60.0)
    first = one.path(urls[0])
    used(first, 100)
    with shard_cache._locked(hidden_beside(first, "lock"), fcntl.LOCK_SH):
        one.path(urls[1])
        assert first.exists()
    one._evict()
    assert not first.exists()


def test_a_reader_waits_for_whoever_evicts(server, shards):
    url = server.add("a.tar")
    one = shards()
    first, found = one.path(url), []
    reader = threading.Thread(target=lambda: found.append(one.path(url).read_bytes()))
    with shard_cache._locked(hidden_beside(first, "lock"), fcntl.LOCK_EX):
        reader.start()
        reader.join(0.1)
        assert reader.is_alive()
        first.unlink()
    reader.join(10)
    assert found == [BODY]


def test_what_is_open_stays_readable(server, shards):
    one = shards(max_bytes=len(BODY))
    with one.open(server.add("0.tar", BODY)) as file:
        one.path(server.add("1.tar", BODY))
        assert len(kept(one.root)) == 1
        assert file.read() == BODY


def test_room_is_made_before_a_file_of_known_size_arrives(server, shards):
    one = shards(max_bytes=len(BODY), patience=Patience(attempts=1, **QUICK))
    url = server.add("1.tar", BODY)
    one.path(url).unlink()  # as if evicted; its size is recorded
    first = one.path(server.add("0.tar", BODY))
    server.faults["1.tar"] = ["stall"] * 9
    with pytest.raises(RunFailedError):
        one.path(url)
    assert not first.exists()


def test_foreign_files_are_not_evicted(server, shards):
    one = shards(max_bytes=1)
    names = ("notes.txt", "0123-a.tar", ".0123456789abcdef-a.tar.json")
    one.root.mkdir(parents=True, exist_ok=True)
    for name in names:
        (one.root / name).write_text("text")
        used(one.root / name, 10**6)
    one.path(server.add("0.tar", BODY))
    one.path(server.add("1.tar", BODY))
    assert all((one.root / name).exists() for name in names)


def test_open_files_are_read_to_their_end_under_eviction(server, shards):
    bodies = [BODY[number:] for number in range(5)]
    urls = [server.add(f"{number}.tar", body) for number, body in enumerate(bodies)]
    barrier = FORK.Barrier(4)

    def work(number: int):
        draw = random.Random(number)
        one = shards(max_bytes=2 * len(BODY))
        barrier.wait()
        for _ in range(25):
            index = draw.randrange(len(urls))
            with one.open(urls[index]) as file:
                assert file.read(1000) == bodies[index][:1000]
                one.prefetch([urls[draw.randrange(len(urls))]])
                assert file.read() == bodies[index][1000:]

    in_processes(*(lambda n=n: work(n) for n in range(4)))
    assert sum(server.gets.values()) > len(urls)  # something was evicted
    shards(max_bytes=2 * len(BODY))._evict()
    assert sum(path.stat().st_size for path in kept(shards().root)) <= 2 * len(BODY)


def test_a_path_is_there_for_its_grace_under_eviction(server, shards):
    bodies = [BODY[number:] for number in range(5)]
    urls = [server.add(f"{number}.tar", body) for number, body in enumerate(bodies)]
    barrier = FORK.Barrier(4)

    def work(number: int):
        one = shards(max_bytes=len(BODY), grace_seconds=60.0)
        order = random.Random(number).sample(range(5), 5)
        barrier.wait()
        for index in order:
            assert one.path(urls[index]).read_bytes() == bodies[index]
            one._evict()  # whatever no process has used yet

    for _ in range(4):
        for url in urls:
            used(shards().path(url), 100)
        in_processes(*(lambda n=n: work(n) for n in range(4)))
    assert sum(server.gets.values()) > len(urls)


# --- killed processes -----------------------------------------------------------------------


def test_a_killed_fetcher_leaves_nothing_under_the_final_name(server, shards):
    url = server.add("a.tar", BODY, "stall")
    one = shards(patience=Patience(timeout_seconds=30.0))
    process = FORK.Process(target=one.path, args=(url,))
    process.start()
    soon(lambda: any(path.stat().st_size for path in parts(one.root)))
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert kept(one.root) == []
    assert len(parts(one.root)) == 1
    assert one.path(url).read_bytes() == BODY
    assert parts(one.root) == []


def test_leftovers_are_removed_if_old_and_unlocked(server, shards):
    root = shards().root
    root.mkdir(parents=True, exist_ok=True)
    entries = [shard_cache._Entry(root, f"http://host/{number}.tar") for number in range(3)]
    leftovers = [hidden_beside(entry.path, "1-2.part") for entry in entries]
    foreign = root / ".somebody.part"
    for path in (*leftovers, foreign):
        path.write_bytes(BODY)
        used(path, 3700)
    used(leftovers[1], 3500)
    with shard_cache._locked(entries[2].lock, fcntl.LOCK_EX):
        shards()._prepare()
    assert [path.exists() for path in leftovers] == [False, True, True]
    shards()._prepare()
    assert [path.exists() for path in leftovers] == [False, True, False]
    assert foreign.exists()


# --- prefetch -------------------------------------------------------------------------------


def test_prefetch(server, shards):
    urls = [server.add(f"{number}.tar") for number in range(3)]
    one = shards()
    assert one.prefetch(urls) == 3
    assert one.prefetch(urls) == 3
    soon(lambda: len(kept(one.root)) == 3)
    assert all(one.path(url).read_bytes() == BODY for url in urls)
    assert sum(server.gets.values()) == 3
    assert sum(thread is one._worker._thread for thread in threading.enumerate()) == 1
    assert one._worker._thread.daemon


def test_a_file_that_is_just_arriving_is_waited_for(server, shards):
    url = server.add("a.tar", BODY, "slow")
    one = shards()
    one.prefetch([url])
    soon(lambda: server.gets["a.tar"] == 1)
    assert one.path(url).read_bytes() == BODY
    assert server.gets["a.tar"] == 1


def test_a_fork_waits_for_its_parents_thread(server, shards):
    url = server.add("a.tar", BODY, "slow")
    other = server.add("b.tar", BODY)
    one = shards()
    one.prefetch([url])
    soon(lambda: server.gets["a.tar"] == 1)

    def work():
        assert one.prefetch([other]) == 1  # with a thread of its own
        assert one.path(url).read_bytes() == BODY
        soon(lambda: len(kept(one.root)) == 2)

    in_processes(work, work)
    assert server.gets == {"a.tar": 1, "b.tar": 1}


def test_the_queue_is_bounded(server, shards):
    urls = [server.add(f"{number}.tar", BODY, "stall") for number in range(9)]
    one = shards(queue_size=2, patience=Patience(1, 30.0))
    assert one.prefetch(urls[:1]) == 1
    soon(lambda: server.gets["0.tar"] == 1)  # the thread is busy
    started = time.monotonic()
    assert one.prefetch(urls) == 3
    assert one.prefetch(urls[5:]) == 0
    assert time.monotonic() - started < 10  # a stalled download lasts 30 s
    server.released.set()


def test_errors_are_kept_for_whoever_asks(server, shards):
    bad, good = server.add("bad.tar", BODY, 404), server.add("good.tar")
    one = shards()
    one.prefetch([bad, good])
    soon(lambda: len(kept(one.root)) == 1)  # the thread goes on
    with pytest.raises(MissingInputError, match="answers 404"):
        one.path(bad)
    assert server.gets["bad.tar"] == 1
    assert one.path(bad).read_bytes() == BODY  # and then tries again


def test_a_kept_error_is_forgotten_once_the_file_is_there(server, shards):
    url = server.add("a.tar", BODY, 404)
    one = shards()
    one.prefetch([url])
    soon(lambda: one._worker.errors)
    shards().path(url)
    assert one.path(url).read_bytes() == BODY
    assert one._worker.errors == {}


def test_a_disk_failure_ahead_is_kept_too(server, shards):
    url = server.add("a.tar")
    one = shards()
    one._prepare()
    shutil.rmtree(one.root)
    one.prefetch([url])
    soon(lambda: one._worker.errors)
    with pytest.raises(RunFailedError, match="cannot write"):
        one.path(url)


# --- object stores --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bucket():
    """A bucket of a real S3 server on this machine."""
    moto = pytest.importorskip("moto.server", reason="needs moto[server] (test extra)")
    boto3 = pytest.importorskip("boto3", reason="needs boto3 (test extra)")
    running = moto.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    running.start()
    endpoint = "http://{}:{}".format(*running.get_host_and_port())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        client = boto3.client("s3", endpoint_url=endpoint)
        client.create_bucket(Bucket="shards")
        client.put_object(Bucket="shards", Key="train/a.tar", Body=BODY * 20)
        yield "s3://shards"
    running.stop()


@pytest.fixture(params=["fsspec", "aws"])
def s3(request, bucket, monkeypatch):
    """The bucket, by each of the two ways to read it."""
    if request.param == "fsspec":
        if importlib.util.find_spec("s3fs") is None:
            pytest.skip("needs s3fs (test extra)")
        monkeypatch.setenv("PATH", "")  # no client to fall back to
        return bucket
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    if shutil.which("aws", path=path) is None:
        pytest.skip("needs the aws client (awscli, test extra)")
    monkeypatch.setenv("PATH", path)
    monkeypatch.setitem(transfer.PACKAGES, "s3", "no_such_package")
    return bucket


PATIENT = Patience(attempts=2, timeout_seconds=10.0, backoff_seconds=0.01)


def test_s3(s3, shards):
    one = shards(patience=PATIENT)
    path = one.path(f"{s3}/train/a.tar")
    assert path.name.endswith("-a.tar")
    assert path.read_bytes() == 20 * BODY


@pytest.mark.parametrize("name", ["shards/no.tar", "no-such-bucket/a.tar"])
def test_missing_key(s3, shards, name):
    started = time.monotonic()
    with pytest.raises(MissingInputError, match=rf"s3://{name}: status 1: "):
        shards(patience=Patience(attempts=9, backoff_seconds=9.0)).path(f"s3://{name}")
    assert time.monotonic() - started < 9  # one attempt: the next comes 9 s later


def test_silent_object_store(s3, server, tmp_path, monkeypatch):
    server.add("shards/a.tar", BODY, *["silent"] * 9)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(Handler, "do_HEAD", Handler.do_GET, raising=False)
    started = time.monotonic()
    with pytest.raises(RunFailedError, match="stalled: nothing for 1 s"):
        fetch("s3://shards/a.tar", tmp_path / "a.tar", attempts=1, timeout_seconds=1.0)
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("url", "remedy"),
    [
        ("s3://b/a.tar", r"`pip install fsspec s3fs`, or `pip install awscli`"),
        ("gs://b/a.tar", r"`pip install fsspec gcsfs`; or name a command with pipe:"),
        ("hf://datasets/o/b/a.tar", r"`pip install fsspec huggingface_hub`; or name"),
    ],
)
def test_no_client(tmp_path, monkeypatch, url, remedy):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingInputError, match=remedy):
        fetch(url, tmp_path / "a.tar", **QUICK)
