"""Where each value of a recipe comes from, read off the comments beside it in the YAML.

The recipes state their origins once, as comments for people (`# card: 16 A100 x 12`). The first
origin word counts: on the setting's own line, else in the comment block right above it, else on
the line of the group that it is in.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import yaml

ORIGINS = ("card", "original", "inferred", "open", "yours", "ours", "demo")
UNMARKED, DEFAULT, OVERRIDE = "recipe", "default", "yours"


def origins(path: Path, overrides: Sequence[str], keys: Iterable[str]) -> dict[str, str]:
    """Dotted key -> a word of ORIGINS, "recipe" (in it without a word) or "default" (not in it).

    What an override names is "yours".
    """
    text = path.read_text(encoding="utf-8")
    stated = dict(_stated(yaml.compose(text), _comments(text), "", UNMARKED))
    yours = [override.partition("=")[0].strip().lstrip("-") for override in overrides]

    def origin(key: str) -> str:
        if any(key == name or key.startswith(f"{name}.") for name in yours):
            return OVERRIDE
        parts = key.split(".")  # `sources: PATTERN` is stated for all keys below it
        above = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
        return next((stated[name] for name in above if name in stated), DEFAULT)

    return {key: origin(key) for key in keys}


def _stated(
    node: yaml.Node | None, comments: list[str], prefix: str, inherited: str
) -> Iterator[tuple[str, str]]:
    """(dotted key, origin) of every leaf below a mapping."""
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        line = key.start_mark.line
        own = _origin(comments[line]) or _origin(_block_above(comments, line)) or inherited
        name = f"{prefix}{key.value}"
        if isinstance(value, yaml.MappingNode):
            yield from _stated(value, comments, f"{name}.", own)
        else:
            yield name, own


def _comments(text: str) -> list[str]:
    """The comment of each line; a line that is nothing else keeps its `#`."""
    found = []
    for line in text.splitlines():
        match = re.search(r"(?:^|\s)#.*", line)
        comment = match[0].strip() if match else ""
        found.append(comment if comment == line.strip() else comment.lstrip("# "))
    return found


def _block_above(comments: list[str], line: int) -> str:
    """The comment lines right above a line, unless they open the file."""
    first = line
    while first > 0 and comments[first - 1].startswith("#"):
        first -= 1
    return " ".join(comments[first:line]) if first else ""


def _origin(comment: str) -> str | None:
    words = re.findall(r"\w+", comment.lower())
    return next((word for word in words if word in ORIGINS), None)
