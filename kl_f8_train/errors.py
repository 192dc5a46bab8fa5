"""Errors that a user can fix. Each says what, where, got, expected and the remedy.

The command line prints the message without a traceback and ends with the exit code.
"""

import contextlib
import difflib
import os
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

MOST_SIBLINGS = 5000  # names of a directory that are compared with a mistyped one


class UserError(Exception):
    """Anything wrong that a user can put right."""

    exit_code = 4

    def __str__(self) -> str:
        text = super().__str__()
        if text.startswith("Caught "):  # a loader process wraps the message in its traceback
            text = text.rpartition(f"{type(self).__name__}: ")[2].rstrip()
        return text


class UsageError(UserError):
    """A wrong command, key or value."""

    exit_code = 2


class MissingInputError(UserError):
    """A file that is not there, or is not what it should be."""

    exit_code = 3


class RunFailedError(UserError):
    """A run that could not continue."""


class LostContactError(RunFailedError):
    """Another process of the run is gone, or does not answer: a new start may well succeed."""


class ImageError(ValueError):
    """One image that cannot be used, `reason: detail`; the run takes its neighbour instead."""


class SmallImageError(ImageError):
    """An image whose shorter side, `side` pixels, is smaller than the crop."""

    def __init__(self, message: str, side: int) -> None:
        super().__init__(message)
        self.side = side


@contextlib.contextmanager
def about(what: str, remedy: str = "") -> Iterator[None]:
    """Names what an error is about before its message, and perhaps a remedy on a line after it.

    What the message begins with is not said twice where `what` ends with it, as a path does.
    """
    try:
        yield
    except UserError as error:
        begin, _, rest = str(error).partition(": ")
        said = re.search(rf"(?<![^ =]){re.escape(begin)}$", what)
        text = rest if rest and said else str(error)
        raise type(error)(f"{what}: {text}" + (remedy and f"\n{remedy}")) from error


def like(given: str, known: Iterable[str]) -> str:
    """`; did you mean train?` by the known name that is most like it; empty if none is."""
    near = difflib.get_close_matches(given, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def like_path(absent: str | Path, names: Iterable[str] = ()) -> str:
    """What a path that does not exist may have meant, as `; did you mean ...?`.

    By what lies beside it and by further names; or why it does not exist: a broken link, a `~` or a
    variable that no shell has replaced, an address. Of one that does, whether it is a directory.
    """
    path, known = Path(absent), {name: name for name in names}
    if os.path.islink(path):
        return f"; it is a link to {os.readlink(path)}, which does not exist"
    if os.path.exists(absent):
        return f"; it is a {'directory' if os.path.isdir(absent) else 'file'}"
    if meant := unexpanded(str(absent)):
        return meant
    if re.match(r"\w+:/+", str(absent)):
        return "; it is an address: download the file, and give its path"
    with contextlib.suppress(OSError, ValueError):
        beside = islice(os.listdir(path.parent), MOST_SIBLINGS)
        known |= {name: str(path.parent / name) for name in beside if not name.startswith(".")}
    near = difflib.get_close_matches(path.name, known, n=1, cutoff=0.75)
    return f"; did you mean {known[near[0]]}?" if near else ""


def unexpanded(path: str) -> str:
    """`; no shell has replaced its ~: write PATH`, also of variables; empty if there is nothing."""
    written = os.path.expandvars(os.path.expanduser(path))
    mark = "~" if path.startswith("~") else "$"
    return "" if written == path else f"; no shell has replaced its {mark}: write {written}"


def check_folder(before: str, path: str | Path | None) -> None:
    """Raises MissingInputError, `before` first, for a path that is not a folder."""
    if path is not None and not Path(path).is_dir():
        wrong, meant = "no such folder", like_path(path)
        if Path(path).exists():
            wrong, meant = "not a folder", ""
        raise MissingInputError(f"{before}{path}: {wrong}; expected one of photographs{meant}")
