"""No process outlives its run, whenever and however that ends."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import ranks
import runs

from kl_f8_train import lifetime, transfer
from kl_f8_train.data import loading
from kl_f8_train.errors import RunFailedError
from kl_f8_train.lifetime import end_with_parent

SECONDS = 10.0
LONG = ("stop_iteration=1000000", "log.every=1000000")


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie, which only waits for its parent, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def below(pid: int) -> list[int]:
    """The processes that a process started, and those that they started."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    found = [pid]
    for parent in found:
        found += [child for child, its in parents.items() if its == parent]
    return found[1:]


def wait_until_gone(pids: list[int]) -> None:
    end = time.monotonic() + SECONDS
    while left := [pid for pid in pids if alive(pid)]:
        assert time.monotonic() < end, [Path(f"/proc/{pid}/cmdline").read_text() for pid in left]
        time.sleep(0.05)


def wait_for_children(pid: int, count: int) -> list[int]:
    end = time.monotonic() + 120
    while len(found := below(pid)) < count:
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def hold_loaders(place: str) -> None:
    """Holds every loader at its start until its run has been killed."""
    original = loading.start_worker

    def held(parent: int, worker: int) -> None:
        (Path(place) / str(os.getpid())).touch()
        while os.getppid() == parent:
            time.sleep(0.01)
        original(parent, worker)

    loading.start_worker = held


@pytest.mark.slow
def test_a_loader_that_starts_while_its_run_is_killed_ends(folder):
    place = folder / "held"
    place.mkdir()
    extra = (*LONG, "data.workers=2")
    (run,) = ranks.start(folder, "race", *extra, prepare=hold_loaders, given=(str(place),))
    end = time.monotonic() + 120
    while len(loaders := [int(path.name) for path in place.iterdir()]) < 2:
        assert run.process.is_alive(), run.output
        assert time.monotonic() < end
        time.sleep(0.05)
    run.send(signal.SIGKILL)
    wait_until_gone(loaders)


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage", ["waiting for 2 processes", "batch: 2 processes", "iteration 103"]
)
def test_ranks_that_lightning_started_end_with_the_first(folder, stage):
    extra = (*LONG, "log.every=1", "compute.devices=2", "data.workers=1")
    name = f"first-{stage.split()[0]}-{stage.split()[1]}"
    process = runs.start(folder, name, *extra)
    assert process.stdout is not None
    for line in process.stdout:
        if stage in line:
            break
    wait_for_children(process.pid, 1)
    if stage.startswith("waiting"):
        time.sleep(1.0)  # the other rank is importing
    others = below(process.pid)
    process.kill()
    process.wait()
    wait_until_gone(others)


def test_a_download_ends_with_its_run(tmp_path):
    """A command that has fallen silent does not notice that nobody reads it."""
    program = (
        "import sys, threading\n"
        "from kl_f8_train import transfer\n"
        "url = 'pipe:sleep 1000; sleep 1000'\n"
        "transfer.fetch(url, __import__('pathlib').Path(sys.argv[1]), attempts=1)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "x")])
    children = wait_for_children(process.pid, 3)  # the guard, the shell, and sleep
    process.kill()
    process.wait()
    wait_until_gone(children)


def test_a_guarded_command_says_what_it_would_alone(tmp_path):
    transfer.fetch("pipe:printf abc", tmp_path / "a", attempts=1)
    assert (tmp_path / "a").read_bytes() == b"abc"
    with pytest.raises(Exception, match="status 3: no such bucket"):
        transfer.fetch("pipe:echo no such bucket >&2; exit 3", tmp_path / "b", attempts=1)


@pytest.mark.parametrize("start", [lifetime.start_child, end_with_parent])
def test_workers_whose_parent_is_gone_end_at_once(start):
    pid = os.fork()
    if pid == 0:
        start(1)  # not our parent
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1


def end_itself(number: int) -> int:
    return os.kill(os.getpid(), signal.SIGKILL) or number


@pytest.mark.parametrize("method", [None, "spawn"])
def test_a_process_that_is_killed_ends_the_others_and_names_the_remedy(method):
    with (
        pytest.raises(RunFailedError, match=r"killed.*the same command again resumes"),
        lifetime.process_pool(2, method) as run,
    ):
        list(run(end_itself, range(4)))


@pytest.mark.parametrize("method", [None, "spawn"])
def test_an_interrupt_does_not_wait_for_what_processes_are_at(method):
    began = time.monotonic()
    threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt), lifetime.process_pool(2, method) as run:
        list(run(time.sleep, [300] * 8))
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("count", [0, 1, 2])
def test_results_come_in_their_order(count):
    with lifetime.process_pool(count) as run:
        assert list(run(abs, range(-5, 0))) == [5, 4, 3, 2, 1]
