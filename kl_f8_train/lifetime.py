"""Child processes that end with their parent, even if that is killed."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from kl_f8_train.errors import RunFailedError

PR_SET_PDEATHSIG = 1  # linux/prctl.h
PARENT = "KL_F8_TRAIN_PARENT"  # pid of the process that starts the other ranks of its node

# Runs a command, and kills it with all its children once the process given first has ended. For
# `python -c`, with the pid and the command as arguments, in a session of its own.
GUARD = """
import ctypes, os, signal, subprocess, sys

def end(*_):
    os.killpg(0, signal.SIGKILL)

signal.signal(signal.SIGTERM, end)
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):
    end()
command = subprocess.Popen(sys.argv[2:])
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the output ends when the command closes it
status = command.wait()
sys.exit(status if status >= 0 else 128 - status)
"""


def end_with_parent(parent: int) -> None:
    """Makes this process end when the one with pid `parent` does.

    Linux then sends SIGKILL. A parent that ended before this call is recognised by getppid.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


@contextlib.contextmanager
def process_pool(count: int, method: str | None = None) -> Iterator[Callable[..., Iterator[Any]]]:
    """A `map` in `count` processes, started by `method`, that end with this one.

    Of a single process it is Python's own. Several end at once with an interrupt; RunFailedError is
    raised if one of them is killed.
    """
    if count <= 1:
        yield map
        return
    context, given = multiprocessing.get_context(method), (os.getpid(), signal.SIGINT)
    others = {*multiprocessing.active_children()}
    with ProcessPoolExecutor(count, context, initializer=start_child, initargs=given) as pool:
        try:
            yield pool.map
        except BrokenProcessPool as error:
            raise RunFailedError(
                "one of the processes was killed (out of memory?); the same command again resumes"
            ) from error
        except KeyboardInterrupt:  # what they are at may take an hour, and is made anew
            for process in {*multiprocessing.active_children()} - others:
                process.kill()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def start_child(parent: int, *ignored: signal.Signals) -> None:
    """Prepares a child process: with one thread, it ends with `parent`, who answers signals."""
    import torch

    end_with_parent(parent)
    torch.set_num_threads(1)
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


def announce_to_ranks() -> None:
    """Makes the ranks that Lightning starts from here end with this process."""
    os.environ[PARENT] = str(os.getpid())


def end_with_launcher() -> None:
    """Makes a rank end with the process that started it: torchrun, or Lightning's first rank."""
    parent = os.environ.pop(PARENT, "")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(os.getppid())
    elif parent.isdecimal() and os.environ.get("LOCAL_RANK", "0") != "0":
        end_with_parent(int(parent))


def guarded(command: list[str]) -> list[str]:
    """A command that ends, with its children, when this process does."""
    return [sys.executable, "-I", "-c", GUARD, str(os.getpid()), *command]
