"""Console output that survives a closed pipe."""

import os
import sys


def say(line: str) -> None:
    """Prints a line at once; a terminal or pipe that is gone does not end a run."""
    try:
        print(line, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
