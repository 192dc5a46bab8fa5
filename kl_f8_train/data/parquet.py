"""Images in parquet files, as data sets of the Hugging Face hub hold them, read as a stream.

Such a file has a column of `image: {bytes, path}`, which is found by its type; other columns, a
caption say, are not read. A row is called FILE#ROW. Memory holds BATCH rows and one data page of
the file, whatever the size of its row groups; pyarrow writes pages of up to 1,024 rows.
"""

import glob
import itertools
import os
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kl_f8_train.errors import ImageError, MissingInputError, UsageError
from kl_f8_train.folders import is_system
from kl_f8_train.units import printable

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

SUFFIX = ".parquet"
BATCH = 8  # rows that are in memory at once
BUFFER = 1 << 20  # bytes read at once of a column


class ImageRow(NamedTuple):
    """An image in a parquet file."""

    name: str  # FILE#ROW
    data: bytes | ImageError  # the encoded image, or why there is none
    path: str  # what the row says of where it came from; may be empty


class Span(NamedTuple):
    """Successive rows of a file."""

    file: str  # relative to the folder
    first: int
    rows: int
    group: int  # the row group in which they begin


@dataclass(frozen=True)
class Rows:
    """Successive rows of one or several files."""

    spans: tuple[Span, ...]

    @property
    def start(self) -> tuple[str, int]:
        """The file and the row group in which they begin."""
        return self.spans[0].file, self.spans[0].group

    def __len__(self) -> int:
        return sum(span.rows for span in self.spans)


@dataclass(frozen=True)
class Table:
    """Rows of the files below a folder, in order."""

    folder: Path
    files: tuple[tuple[str, int], ...]  # path relative to the folder, size in bytes
    groups: tuple[tuple[int, ...], ...]  # rows of each row group of each file
    not_used: str = ""

    def __len__(self) -> int:
        return sum(map(sum, self.groups))

    def dealt(self, size: int) -> Iterator[Rows]:
        """The rows in pieces of `size`; the last may be smaller."""
        spans: list[Span] = []
        room = size
        for (file, _), groups in zip(self.files, self.groups, strict=True):
            ends = list(itertools.accumulate(groups))
            first = 0
            while first < sum(groups):
                rows = min(room, sum(groups) - first)
                spans.append(Span(file, first, rows, bisect_right(ends, first)))
                first, room = first + rows, room - rows
                if not room:
                    yield Rows(tuple(spans))
                    spans, room = [], size
        if spans:
            yield Rows(tuple(spans))


# --- which files ----------------------------------------------------------------------------


def find(place: Path) -> list[Path]:
    """The parquet files that a file, a folder or a glob names, sorted; [] if it names none."""
    if place.is_dir():
        below = place.rglob("*")
        found = [f for f in below if not any(map(is_system, f.relative_to(place).parts))]
    elif place.is_file():
        found = [place]  # whatever signs its name holds
    else:
        found = [Path(match) for match in glob.glob(str(place), recursive=True)]
    return sorted(path for path in found if path.suffix.lower() == SUFFIX and path.is_file())


def read_table(files: Sequence[Path], folder: Path | None = None) -> Table:
    """Reads the ends of the files, which say how many rows there are.

    Rows are named below `folder`; None: the deepest that holds all files. Raises MissingInputError
    for a file that is not one of images, or if there are no rows; UsageError if pyarrow is not
    installed.
    """
    folder = folder or Path(os.path.commonpath([file.absolute().parent for file in files]))
    named, groups = [], []
    for file in files:
        with _opened(file) as (opened, _):
            metadata = opened.metadata
            groups.append(
                tuple(metadata.row_group(n).num_rows for n in range(opened.num_row_groups))
            )
        name = file.absolute().relative_to(folder.absolute()).as_posix()
        named.append((name, file.stat().st_size))
    table = Table(folder, tuple(named), tuple(groups))
    if not len(table):
        raise MissingInputError(f"{files[0]}: no rows in it, nor in the other parquet files")
    return table


@contextmanager
def _opened(path: Path) -> "Iterator[tuple[ParquetFile, str]]":
    """A parquet file and the name of its column of images.

    Raises UsageError or MissingInputError.
    """
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UsageError(
            f"{path}: parquet files need the pyarrow package: pip install 'kl-f8-train[parquet]'"
        ) from error
    try:
        opened = ParquetFile(path, buffer_size=BUFFER, pre_buffer=False)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise MissingInputError(f"{path}: {_unreadable(path, error)}") from error
    with opened:
        yield opened, _image_column(path, opened.schema_arrow)


def _unreadable(path: Path, error: Exception) -> str:
    """What a file is that cannot be opened, and the remedy."""
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except OSError:
        head = b""
    if head == b"version ":
        return "a pointer of git lfs; `git lfs pull` downloads the file"
    if head[:4] != b"PAR1":
        return "not a parquet file; check where it came from"
    return f"broken or cut short ({error}); download it again"


def _image_column(path: Path, schema: Any) -> str:
    """The one column of type {bytes, path}; of several the one called `image`.

    Raises MissingInputError that names the columns.
    """
    from pyarrow import types

    def holds_images(kind: Any) -> bool:
        place = kind.get_field_index("bytes") if types.is_struct(kind) else -1
        tests = (types.is_binary, types.is_large_binary, types.is_binary_view)
        return place >= 0 and any(test(kind.field(place).type) for test in tests)

    found = [field.name for field in schema if holds_images(field.type)]
    if len(found) == 1 or "image" in found:
        return str(found[0] if len(found) == 1 else "image")
    names = ", ".join(printable(f"{field.name}: {field.type}") for field in schema)
    if found:
        raise MissingInputError(
            f"{path}: several columns of images, {', '.join(found)}; expected one, or one of them "
            "called image: rename it, or write the others into another file"
        )
    raise MissingInputError(
        f"{path}: no column of images; expected image: {{bytes, path}}, as data sets of the hub "
        f"hold it, got {names or 'no columns'}"
    )


# --- their rows -----------------------------------------------------------------------------


def read(folder: Path, pieces: Sequence[Rows]) -> Iterator[ImageRow]:
    """The rows of several pieces, which follow one another; each row group is read once.

    A row without an image, or that cannot be read, comes as an ImageError.
    """
    spans = [span for piece in pieces for span in piece.spans]
    for file, of_file in itertools.groupby(spans, key=lambda span: span.file):
        wanted = deque(row for s in of_file for row in range(s.first, s.first + s.rows))
        failure = "it has fewer rows than it had"
        try:
            with _opened(folder / file) as (opened, column):
                for row, value in _values(opened, column, wanted):
                    yield _row(f"{file}#{row}", value)
        except (MissingInputError, OSError) as error:
            failure = f"{error}"
        for row in wanted:  # the file has changed since it was listed
            yield ImageRow(f"{file}#{row}", ImageError(f"cannot be read: {failure}"), "")


def _values(opened: "ParquetFile", column: str, wanted: deque[int]) -> Iterator[tuple[int, Any]]:
    """(row, its image column) of the rows `wanted`, which are taken out as they come."""
    end = 0
    for group in range(opened.num_row_groups):
        start, end = end, end + opened.metadata.row_group(group).num_rows
        if wanted and wanted[0] < end:
            for row, value in enumerate(_values_of_group(opened, column, group), start):
                if row == wanted[0]:
                    yield wanted.popleft(), value
                    if not wanted or wanted[0] >= end:
                        break


def _values_of_group(opened: "ParquetFile", column: str, group: int) -> Iterator[Any]:
    """The image column of a row group; then ImageErrors for the rows that cannot be read."""
    import pyarrow

    failure = "the row group is shorter than the file says"
    try:
        for batch in opened.iter_batches(BATCH, [group], [column], use_threads=False):
            yield from batch.column(0)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        failure = f"{error}"
    yield from itertools.repeat(ImageError(f"cannot be read: {failure}"))


def _row(name: str, value: Any) -> ImageRow:
    if isinstance(value, ImageError):
        return ImageRow(name, value, "")
    try:
        held = value.as_py() or {}
    except ValueError as error:  # a path that is not UTF-8
        return ImageRow(name, ImageError(f"cannot be read: {error}"), "")
    path, data = str(held.get("path") or ""), held.get("bytes")
    if not data:
        return ImageRow(name, ImageError(f"no image: {'only a path' if path else 'empty'}"), path)
    return ImageRow(name, data, path)
