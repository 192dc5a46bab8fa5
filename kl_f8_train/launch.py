"""Launcher variables and signals, errors that all ranks have, cores, and the end of loaders."""

import contextlib
import hashlib
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

from kl_f8_train.errors import UsageError
from kl_f8_train.files import temporary_dir

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)  # loaders ignore them
TORCHRUN, SRUN = "torchrun", "srun"
RANKS = ("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "SLURM_PROCID")
TORCHELASTIC, RESTARTS = "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"  # of torchrun alone
# By these a launcher is recognised; a message names those to unset.
SIGNS = ("LOCAL_WORLD_SIZE", "WORLD_SIZE", *RANKS, "MASTER_PORT", "SLURM_STEP_ID")


class Launch(NamedTuple):
    """Who started the processes, how many of them on this node, and on how many nodes."""

    launcher: str = ""
    local: int = 0
    nodes: int = 0


def launched(nodes: int | None = None) -> Launch:
    """The processes, as torchrun (also inside a SLURM job) or srun describes them.

    `nodes` is the number for a start without either. Raises UsageError for a variable that is
    missing, or is not as a launcher sets it.
    """
    _check_present()
    # torchrun first: inside a SLURM job its processes have srun's variables as well.
    if "LOCAL_WORLD_SIZE" in os.environ:
        local = _number("LOCAL_WORLD_SIZE", TORCHRUN, 1)
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
            _number(name, TORCHRUN)
        return _launch(TORCHRUN, world_size(), local, world_size() // local)
    if _under_srun():
        tasks = _number("SLURM_NTASKS", SRUN, 1)
        count = _number("SLURM_NNODES", SRUN, 1) if "SLURM_NNODES" in os.environ else 1
        for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"):
            _number(name, SRUN)
        if tasks > 1:
            _number("SLURM_NTASKS_PER_NODE", "srun --ntasks-per-node", 1)
        return _launch(SRUN, tasks, tasks // count, count)
    needed = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK")
    absent = [name for name in needed if not os.environ.get(name)]
    if (nodes or 1) > 1 and absent:
        raise UsageError(
            f"compute.num_nodes={nodes}, but neither torchrun nor srun started this, and "
            f"{', '.join(absent)} {'is' if len(absent) == 1 else 'are'} not set: the nodes cannot "
            "meet; use launch/torchrun.sh or srun, or set these on each node"
        )
    return Launch()


def left_over() -> str:
    """That variables of another start are passed over, if they say of several processes."""
    world = os.environ.get("WORLD_SIZE", "1")
    if world == "1" or "RANK" not in os.environ or launched().launcher:
        return ""
    return (
        f"WORLD_SIZE={world} and RANK are set, but not by torchrun (there is no LOCAL_WORLD_SIZE): "
        "passed over; start several processes by torchrun or srun"
    )


def world_size() -> int:
    """Processes that torchrun's variables say of; 1 without them.

    Raises UsageError for variables that are not numbers, or with which the processes cannot meet.
    """
    _check_present()
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if "WORLD_SIZE" not in os.environ and _under_srun() and tasks != "1":
        raise UsageError("several tasks of srun, which do not meet here; start them with torchrun")
    world = _number("WORLD_SIZE", TORCHRUN, 1) if "WORLD_SIZE" in os.environ else 1
    if world > 1:
        _number("RANK", TORCHRUN, 0, world - 1)
        _number("MASTER_PORT", TORCHRUN, 1, 65_535)
        if not os.environ.get("MASTER_ADDR"):
            raise UsageError(
                f"MASTER_ADDR is not set: expected the first node's name{_remedy(TORCHRUN)}"
            )
    return world


def meeting() -> str:
    """Address and port at which processes of a launcher meet."""
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def _check_present() -> None:
    """Raises UsageError for a variable that Lightning reads, with and without a launcher."""
    for name in RANKS:
        if name in os.environ:
            _number(name, "a launcher")
    if "MASTER_PORT" in os.environ:
        _number("MASTER_PORT", "a launcher", 1, 65_535)


def _launch(launcher: str, world: int, local: int, nodes: int) -> Launch:
    if local * nodes != world:
        raise UsageError(
            f"{world} processes, as {launcher} says, are not as many on each node; start the same "
            "number on every node"
        )
    return Launch(launcher, local, nodes)


def _under_srun() -> bool:
    """A task of srun; neither a batch script's own shell nor an interactive one."""
    return "SLURM_STEP_ID" in os.environ and os.environ.get("SLURM_JOB_NAME") not in (
        "bash",
        "interactive",
    )


def _number(name: str, launcher: str, least: int = 0, most: int = 99_999) -> int:
    """The whole number that a launcher's variable holds."""
    text = os.environ.get(name)
    if text is not None and re.fullmatch(r"[0-9]{1,5}", text) and least <= int(text) <= most:
        return int(text)
    got = "is not set" if text is None else f"is {text!r}"
    raise UsageError(
        f"{name} {got}: expected a whole number from {least} to {most:,}{_remedy(launcher)}"
    )


def _remedy(launcher: str) -> str:
    there = ", ".join(name for name in SIGNS if name in os.environ)
    return f", as {launcher} sets it; start the processes with it, or unset {there}"


def available_cores() -> int:
    """Cores that this process may run on; on macOS all of them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_first_to_say(message: str) -> bool:
    """Whether no other process of this launch has written `message` to this very stderr.

    The processes of a node that share a stream, as torchrun's do, claim a message by creating a
    file; each with a log of its own writes there. True also where that cannot be found out: a
    message twice is better than none.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    try:
        folder = temporary_dir()
        stream = os.fstat(sys.stderr.fileno())
        launch = (_starter(), os.environ.get("MASTER_PORT"), os.environ.get(RESTARTS))
        said = repr((*launch, stream.st_dev, stream.st_ino, message))
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        if folder.lstat().st_uid != os.getuid():
            return True
        _remove_old(folder)
    except (OSError, ValueError):  # no temporary directory, or no stream
        return True
    try:
        (folder / hashlib.sha256(said.encode(errors="replace")).hexdigest()).touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def _starter() -> str:
    """The process that started the ranks of this node, and when: torchrun, or the first rank."""
    is_first = TORCHELASTIC not in os.environ and os.environ.get("LOCAL_RANK", "0") == "0"
    pid = os.getpid() if is_first else os.getppid()
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return f"{pid} {fields[19]}"  # since the machine's start
    except (OSError, IndexError):
        return str(pid)


def _remove_old(folder: Path) -> None:
    """Removes what launches of more than an hour ago have claimed."""
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < time.time() - 3600:
                path.unlink()


def end_children() -> None:
    """Kills and reaps the daemonic children that are left; loaders ignore SIGTERM.

    torch watches its loaders by SIGCHLD and would raise an error for each of them.
    """
    children = [child for child in multiprocessing.active_children() if child.daemon]
    if not children:
        return
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if main else None
    for child in children:
        child.kill()
    for child in children:
        child.join()
    if before is not None:
        signal.signal(signal.SIGCHLD, before)
