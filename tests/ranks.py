"""Real processes that start in a moment: forked from a server that has imported everything.

A run is `kl-f8-train train demo ...` in such a process, with its output in a file; `prepare`, a
function of a module, runs before it, to watch the run or to break something.
"""

import contextlib
import multiprocessing
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import runs

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["kl_f8_train.run.train", "kl_f8_train.__main__", "runs", "ranks"])


class Run:
    """One process of a run."""

    def __init__(
        self,
        arguments: list[str],
        log: Path,
        environment: dict[str, str] | None = None,
        prepare: Callable[..., None] | None = None,
        given: tuple[Any, ...] = (),
    ) -> None:
        self.log = log
        target = (arguments, str(log), environment or {}, prepare, given)
        self.process: ForkServerProcess = FORKS.Process(target=_train, args=target)
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait_for(self, text: str, times: int = 1, seconds: float = 120.0) -> None:
        """Waits until the output has `text` so many times."""
        pause = threading.Event()
        for _ in range(round(seconds / 0.02)):
            alive = self.process.is_alive()
            if self.output.count(text) >= times:
                return
            assert alive, self.output
            pause.wait(0.02)
        raise AssertionError(f"{text!r} never came:\n{self.output}")

    def send(self, number: int) -> None:
        """Sends a signal, if there is still a process to get it."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def end(self, seconds: float = 120.0) -> int:
        """Waits for the end; returns the exit code, negative for a signal."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.send(signal.SIGKILL)
            raise AssertionError(f"still running after {seconds:g} s:\n{self.output}")
        assert self.process.exitcode is not None
        return self.process.exitcode


def start(
    folder: Path,
    run: str,
    *extra: str,
    world: int = 1,
    prepare: Callable[..., None] | None = None,
    given: tuple[Any, ...] = (),
) -> list[Run]:
    """A tiny run as `world` processes over gloo, as torchrun would start them."""
    arguments = ["train", "demo", *runs.overrides(folder, run, *extra)]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    started = []
    for rank in range(world):
        names = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0}
        names |= {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
        environment = {name: str(value) for name, value in names.items()}
        environment |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": run}
        log = folder / f"{run}-{rank}.log"
        log.unlink(missing_ok=True)
        started.append(Run(arguments, log, environment if world > 1 else {}, prepare, given))
    return started


def finish(started: list[Run], seconds: float = 180.0) -> list[str]:
    """Waits until all have ended well; returns their outputs."""
    codes = [run.end(seconds) for run in started]
    assert set(codes) == {0}, (codes, *(run.output for run in started))
    warned = [run.output for run in started if "Warning:" in run.output]
    assert not warned, warned  # of torch, say, on every rank
    return [run.output for run in started]


def _train(
    arguments: list[str],
    log: str,
    environment: dict[str, str],
    prepare: Callable[..., None] | None,
    given: tuple[Any, ...],
) -> None:
    import torch
    from pytorch_lightning.utilities import rank_zero_only

    from kl_f8_train.__main__ import main

    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ |= environment
    rank_zero_only.rank = int(environment.get("RANK", "0"))  # read when the server imported it
    multiprocessing.set_start_method("fork", force=True)  # for loaders; not this server's own
    torch.set_num_threads(1)
    if prepare is not None:
        prepare(*given)
    sys.exit(main(arguments))


def answer(
    here: Path,
    arguments: list[str],
    log: Path,
    seconds: Path,
    hidden: list[str],
    file_bytes: int | None,
) -> None:
    """Runs a command in `here`; writes its output and its CPU seconds.

    The packages `hidden` are not installed there, and no file grows beyond `file_bytes`.
    """
    import torch

    from kl_f8_train.__main__ import main

    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(here)
    os.environ |= {"XDG_CACHE_HOME": str(here / "cache"), "HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(1)
    sys.modules.update(dict.fromkeys(hidden))  # importing one raises ImportError
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    began = time.process_time()
    try:
        sys.exit(main(arguments))
    finally:
        seconds.write_text(str(time.process_time() - began))
