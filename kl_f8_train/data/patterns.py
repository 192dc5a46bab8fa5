"""Whether what a source's pattern names is there; without torch, and without opening a shard."""

import glob
import os
import re
from pathlib import Path

from kl_f8_train.errors import MissingInputError, like_path, unexpanded
from kl_f8_train.transfer import is_remote, plain_paths, shown
from kl_f8_train.units import are

EXPECTED_SHARDS = (
    "check the path; expected .tar files by brace pattern, glob, directory or list, or a folder of "
    "images"
)
UNPACK = "compressed shards cannot be read in places; unpack them, as `gunzip x.tar.gz`"
COMPRESSED = re.compile(r"\.(tar\.\w+|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)


def check_named(pattern: str) -> None:
    """Raises MissingInputError for a pattern that names nothing on this machine.

    Of a brace pattern it is enough that one of its files may be there; of several patterns, joined
    by `::`, each has to name something, and of a list file every line. What a folder holds is not
    looked at.
    """
    pattern = plain_paths(pattern)
    if os.path.isdir(pattern) or is_remote(pattern):
        return
    if os.path.isfile(pattern):
        files_of(Path(pattern))
    elif "::" in pattern:
        for part in pattern.split("::"):
            check_named(part)
    elif not set("*?[{") & set(pattern):
        meant = like_path(pattern)
        raise MissingInputError(f"{pattern}: no such file or folder; {EXPECTED_SHARDS}{meant}")
    elif not _may_be_there(pattern):
        wrong = f"no shards: no file is named like {pattern}; {EXPECTED_SHARDS}"
        raise MissingInputError(wrong + unexpanded(pattern))


def _may_be_there(pattern: str) -> bool:
    """Whether a file is named like a pattern, with any text in place of its braces."""
    wider, braces = pattern, 1
    while braces:  # the innermost ones first
        wider, braces = re.subn(r"\{[^{}]*\}", "*", wider)
    # An open brace is another error, and a variable of the environment may be anything.
    return bool({"{", "$"} & set(wider)) or any(glob.iglob(wider, recursive=True))


def files_of(file: Path) -> list[str]:
    """The lines of a list file (.txt) that are neither empty nor comments; else the file itself.

    Raises MissingInputError for a list without any, and as `existing` does.
    """
    if file.suffix.lower() != ".txt":
        return existing([str(file)])
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise MissingInputError(
            f"{file} is not a list of shards: byte {error.start} is not UTF-8; expected text with "
            "a shard on each line"
        ) from error
    found = [plain_paths(line) for line in lines if line and not line.startswith("#")]
    if not found:
        raise MissingInputError(f"{file} lists no shards: expected a shard on each line")
    return existing(found, f"; paths in a list start at the current directory, {os.getcwd()}")


def existing(locations: list[str], remedy: str = "") -> list[str]:
    """The locations, if each of them can be opened as one shard.

    Raises MissingInputError for files that are missing or compressed, and remote globs and folders.
    """
    missing = [place for place in locations if not is_remote(place) and not os.path.isfile(place)]
    if missing:
        files = "file" if len(locations) == 1 else "files"
        raise MissingInputError(
            f"{len(missing)} of {len(locations)} {files} {are(len(missing))} missing "
            f"({', '.join(missing[:3])}{', ...' * (len(missing) > 3)}); {EXPECTED_SHARDS}"
            + (unexpanded(missing[0]) or remedy * (not os.path.isabs(missing[0])))
        )
    if packed := next((place for place in locations if COMPRESSED.search(place)), None):
        raise MissingInputError(f"{packed}: {UNPACK}")
    if unlisted := next(filter(_is_remote_list, locations), None):
        raise MissingInputError(
            f"{shown(unlisted)}: remote shards cannot be listed; name them by a brace pattern, as "
            "'s3://bucket/{000..099}.tar', or in a local .txt file with an address on each line"
        )
    return locations


def _is_remote_list(place: str) -> bool:
    """Whether a remote address is a glob, a folder or a list, and not one shard."""
    address = place.partition("?")[0]  # what follows may be a signature
    lists = "*" in address or address.lower().endswith(("/", ".txt"))
    return lists and is_remote(place) and not place.startswith("pipe:")
