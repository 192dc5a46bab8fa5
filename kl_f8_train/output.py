"""Console output that survives a closed pipe, progress, Markdown tables, pages from templates."""

import contextlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from kl_f8_train.units import counted, duration

Say = Callable[[str], None]  # prints a line, or keeps it
Progress = Callable[[int, int], None]  # (done, all)


def say(line: str, aside: bool = False) -> None:
    """Prints a line at once, `aside` to standard error; a closed terminal or pipe ends no run."""
    stream = sys.stderr if aside else sys.stdout
    try:
        print(line, file=stream, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextlib.contextmanager
def progress_bar(unit: str) -> Iterator[Progress]:
    """Progress as a function (done, total): a bar on a terminal, elsewhere a line now and then."""
    from tqdm import tqdm

    if not sys.stderr.isatty():
        yield partial(_progress_line, unit, time.monotonic(), [0.0])
        return
    with tqdm(unit=unit, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


def _progress_line(unit: str, began: float, due: list[float], done: int, total: int) -> None:
    """A line to standard error at the start, after 5, 10, 20, ... seconds, and at the end."""
    passed = time.monotonic() - began
    if passed < due[0] and done < total:
        return
    due[0] = max(5.0, min(2 * passed, passed + 300))
    fair = total <= 20 * done < 20 * total  # the first items take longer than the others
    left = f", {duration(passed / done * (total - done))} left" if fair else ""
    say(f"{done:,} of {counted(total, unit, 's')}, {duration(passed)}{left}", aside=True)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; a `|` in a cell is escaped."""
    lines = []
    for row in (head, ["---"] * len(head), *rows):
        cells = [re.sub(r"(?<!\\)\|", r"\|", cell) for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def rendered(template: Path, values: Mapping[str, Any]) -> str:
    """A jinja2 template, filled in; HTML in values is escaped, a missing value raises."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=template.suffix == ".html",
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.from_string(template.read_text(encoding="utf-8")).render(values)
