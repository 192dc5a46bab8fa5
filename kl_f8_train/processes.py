"""This process's output, which may lose its reader, and its helper processes, which must end."""

import multiprocessing
import os
import signal
import sys
import threading


def tell(line: str) -> None:
    """Prints a line at once; a terminal or pipe that is gone does not end a run."""
    try:
        print(line, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def end_children() -> None:
    """Kills and reaps the daemonic children that are left; loaders are deaf to SIGTERM.

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
