"""Console output that survives a closed pipe."""

import os
import sys


def say(line: str, aside: bool = False) -> None:
    """Prints a line at once, `aside` to standard error; a closed terminal or pipe ends no run."""
    stream = sys.stderr if aside else sys.stdout
    try:
        print(line, file=stream, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
