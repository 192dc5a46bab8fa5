"""Named phases of an iteration: spans for torch's profiler, and marks for a benchmark's clock.

Functions of the training step carry their phase as a decorator, so that formulas stay without one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch.profiler import record_function

_clocks: list[Callable[[str], None]] = []


@contextmanager
def phase(name: str) -> Iterator[None]:
    """A phase; its end is reported to the clock, if one runs."""
    with record_function(name):
        yield
    for clock in _clocks:
        clock(name)


@contextmanager
def timed_by(clock: Callable[[str], None]) -> Iterator[None]:
    """Calls `clock(name)` at the end of every phase."""
    _clocks.append(clock)
    try:
        yield
    finally:
        _clocks.remove(clock)
