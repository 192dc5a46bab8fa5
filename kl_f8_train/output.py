"""Console output that survives a closed pipe, Markdown tables, and pages from templates."""

import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Say = Callable[[str], None]  # prints a line, or keeps it
Progress = Callable[[int, int], None]  # (done, all)


def say(line: str, aside: bool = False) -> None:
    """Prints a line at once, `aside` to standard error; a closed terminal or pipe ends no run."""
    stream = sys.stderr if aside else sys.stdout
    try:
        print(line, file=stream, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


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
