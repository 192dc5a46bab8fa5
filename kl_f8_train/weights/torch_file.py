"""Reads files of `torch.save` without `torch.load`: a pickle is data here, and nothing in it runs.

The interpreter below builds numbers, strings, lists, dicts and descriptions of tensors. Names of
classes and functions stay names: none is ever imported, looked up or called; those that only an
attack needs are refused.
Tensors are read afterwards, only those wanted, once their shapes are known to lie in the file.

Formats: torch's zip (1.6 and newer), its older sequence of pickles, and a zip around either, as
kl-f8.zip is. Opcodes are those of Python's pickle protocols 2 to 5, pickletools.py.
"""

import gc
import io
import math
import mmap
import os
import pickle
import re
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from kl_f8_train import facts
from kl_f8_train.errors import MissingInputError
from kl_f8_train.facts import METADATA_PREFIX, Facts

Wanted = Callable[[Collection[str]], Collection[str]]

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the older format begins with this number, pickled
OPERATIONS = 300_000  # a tensor takes about 40; a whole Stable Diffusion has 2,000
DEPTH = 100  # of nested containers; deeper ones would exhaust Python's stack
PICKLE_BYTES = 64 << 20
DIRECTORY_BYTES = 4 << 20  # of a zip: about 40,000 entries
UNPACKED = 10  # how much larger than a zip the file inside may be
READ_BYTES = 8 << 20  # at a time, when a file inside a zip is unpacked
COUNTERS = ("global_step", "global_steps", "step", "iter")  # in the order of their worth
OPTIMIZER = re.compile(r"optim|lr_sched|scheduler|scaler", re.IGNORECASE)  # keys not searched

STORAGE_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}
UNTYPED = "torch.storage.UntypedStorage"  # of the types that came later; the tensor says which
LATER = {
    f"torch.{name}": getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
}
PLAIN = {
    *("collections.OrderedDict", "torch._tensor._rebuild_from_type_v2"),
    *("torch.nn.parameter.Parameter", "torch._tensor.Tensor", "torch.Tensor", "torch.Size"),
    *(f"torch._utils._rebuild_{name}" for name in ("tensor", "tensor_v2", "tensor_v3")),
    *(f"torch._utils._rebuild_{name}" for name in ("parameter", "parameter_with_state")),
    *("torch.device", UNTYPED, *LATER),
    *(f"torch.{name}" for name in STORAGE_DTYPES),
    *(str(dtype) for dtype in STORAGE_DTYPES.values()),
    *(f"builtins.{name}" for name in ("set", "frozenset", "dict", "list", "tuple", "bytearray")),
    *(f"builtins.{name}" for name in ("int", "float", "str", "bool", "long", "unicode")),
}
# A file that names these wants to run something, and is not a trainer's; other names become stubs.
HOSTILE = re.compile(
    r"(os|posix|nt|sys|subprocess|pty|socket|shutil|ctypes|importlib|runpy|code|codeop|pdb|bdb"
    r"|timeit|webbrowser|multiprocessing|io|_io|pickle|_pickle|marshal|operator|_operator|urllib"
    r"|asyncio|pkgutil|imp|zipimport|tempfile|commands|popen2|dill|cloudpickle|http|httplib"
    r"|smtplib|ftplib|telnetlib|poplib|imaplib|nntplib|xmlrpc|requests|aiohttp|paramiko|ssl"
    r"|cProfile|profile|trace|pydoc|doctest|unittest|pytest|pip|ensurepip|venv|distutils"
    r"|setuptools|idlelib)\..*"
    r"|builtins\.(eval|exec|compile|open|getattr|setattr|delattr|__import__|globals|input"
    r"|breakpoint)"
    r"|torch\.(load|save|serialization\.load|hub\.load)",
    re.DOTALL,
)


@dataclass
class Contents:
    """What a weight file holds; tensors that were not wanted are on the meta device."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)  # of a torch file, its counters
    container: str = "safetensors"
    optimizer: bool = False
    stubbed: list[str] = field(default_factory=list)  # classes and functions that stayed names
    facts: Facts = field(default_factory=Facts)

    @property
    def iteration(self) -> int | None:
        """The iteration the file says it was written at."""
        for key in ("iteration", f"{METADATA_PREFIX}iteration", *COUNTERS):
            if re.fullmatch(r"[0-9]{1,15}", self.metadata.get(key, "")):
                return int(self.metadata[key])
        return None


def read_torch(path: Path, wanted: Wanted) -> Contents:
    """Reads a torch file; `wanted` picks the names to load from all names.

    Raises MissingInputError if it holds something else, and any exception if it is broken.
    """
    with _BoundedFile(path) as file:
        return _read(file, wanted)


def _read(file: "_BoundedFile", wanted: Wanted, inside: bool = False) -> Contents:
    if os.pread(file.fileno(), 2, 0) != b"PK":
        return _read_pickles(file, wanted)
    with _open_zip(file) as archive:
        if _has_torch_records(archive, file.total):
            return _read_zip(file, archive, wanted)
        if inside:
            raise MissingInputError("a zip in a zip, without torch weights")
        return _read_inside(file, archive, wanted)


def views(path: Path) -> dict[str, tuple[str, "View"]]:
    """The record and the layout of every tensor in a torch zip, none of which is read.

    Raises MissingInputError if it holds something else, and any exception if it is broken.
    """
    with _BoundedFile(path) as file, _open_zip(file) as archive:
        if not _has_torch_records(archive, file.total):
            raise MissingInputError("a zip without torch weights")
        root, pickled = _zip_pickle(archive)
        found = _views(_entries(pickled.load()))
    return {key: (f"{root}data/{view.storage.key}", view) for key, view in found.items()}


def is_torch(head: bytes) -> bool:
    """Whether a file that begins with `head` may be a torch file."""
    return head[:2] == b"PK" or head[:1] == b"\x80"


# --- containers -----------------------------------------------------------------------------


class _BoundedFile(io.FileIO):
    """A file that refuses to read more than `most` bytes at once."""

    most = DIRECTORY_BYTES

    def read(self, size: int | None = -1) -> bytes:
        wanted = self.total - self.tell() if size is None or size < 0 else size
        if wanted > self.most:
            raise ValueError(f"{wanted:,} bytes where at most {self.most:,} were expected")
        return super().read(size) or b""

    @property
    def total(self) -> int:
        """Size of the file in bytes."""
        return os.fstat(self.fileno()).st_size


def _open_zip(file: _BoundedFile) -> zipfile.ZipFile:
    """Opens a zip whose directory is of a sane size and names nothing outside itself."""
    archive = zipfile.ZipFile(file)
    file.most = file.total
    for entry in archive.infolist():
        name = entry.filename
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise MissingInputError("a zip of a rare kind; unpack it and give the file inside")
        if name.startswith(("/", "\\")) or ".." in PurePosixPath(name.replace("\\", "/")).parts:
            raise MissingInputError(f"a zip that names {name[:80]}, a path outside itself")
    return archive


def _has_torch_records(archive: zipfile.ZipFile, total: int) -> bool:
    """Whether it is torch's own zip; raises MissingInputError if there is more in it."""
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    if any(name.endswith("constants.pkl") or "/code/" in name for name in names):
        raise MissingInputError("a TorchScript program, expected weights")
    if not any(name.endswith("/data.pkl") for name in names):
        return False
    if sum(entry.file_size for entry in entries) > 1.01 * total + 1_000_000:
        raise MissingInputError("it unpacks to more than its own size; torch writes no such zip")
    return True


def _read_zip(file: _BoundedFile, archive: zipfile.ZipFile, wanted: Wanted) -> Contents:
    root, pickled = _zip_pickle(archive)
    loaded = pickled.load()

    def fetch(key: str) -> bytes:
        return archive.read(f"{root}data/{key}")

    return _collect(file, "torch zip", loaded, pickled.stubbed, fetch, wanted)


def _zip_pickle(archive: zipfile.ZipFile) -> tuple[str, "_Pickle"]:
    """The folder in a torch zip, and its pickle."""
    (record,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
    root = record.removesuffix("data.pkl")
    if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
        raise ValueError("its numbers are big-endian")
    if archive.getinfo(record).file_size > PICKLE_BYTES:
        raise ValueError(f"{record} is larger than {PICKLE_BYTES:,} bytes")
    return root, _Pickle(archive.read(record))


def _read_pickles(file: _BoundedFile, wanted: Wanted) -> Contents:
    """Five pickles (magic number, version, system, contents, storage keys), then the storages."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        pickled = _Pickle(data)
        if pickled.load() != LEGACY_MAGIC:
            raise MissingInputError("a pickle, but none of torch's; expected weights")
        pickled.load()
        system = pickled.load()
        if isinstance(system, dict) and system.get("little_endian") is False:
            raise ValueError("its numbers are big-endian")
        loaded, keys = pickled.load(), pickled.load()
        place, places = pickled.window.tell(), {}
        for key in keys:
            if type(key) is not str:
                raise ValueError("a storage whose key is not a string")
            # Each storage is its number of elements, 64 bits little-endian, and then the elements.
            (count,) = struct.unpack_from("<q", data, place)
            if key not in pickled.storages:
                raise MissingInputError("quantised tensors in torch's old format; save it again")
            end = place + 8 + count * pickled.storages[key].dtype.itemsize
            if count < 0 or end > file.total:
                raise EOFError(f"storage {key} ends behind the file")
            places[key] = slice(place + 8, end)
            place = end

        def fetch(key: str) -> bytes:
            return data[places[key]]

        return _collect(file, "older torch file", loaded, pickled.stubbed, fetch, wanted)


def _read_inside(file: _BoundedFile, archive: zipfile.ZipFile, wanted: Wanted) -> Contents:
    """Unpacks the one weight file in a zip to a temporary file, and reads that."""
    entry = _weights_inside(archive)
    if entry.file_size > UNPACKED * file.total + 1_000_000:
        raise MissingInputError(f"it unpacks to more than {UNPACKED} times its own size")
    with tempfile.TemporaryFile() as unpacked:  # it has no name that a killed process could leave
        try:
            with archive.open(entry) as member:
                shutil.copyfileobj(member, unpacked, READ_BYTES)
            unpacked.flush()
        except OSError as error:
            raise MissingInputError(
                f"unpacking its {entry.filename} takes {entry.file_size:,} bytes in "
                f"{tempfile.gettempdir()}: {error}. Set TMPDIR to a place with room"
            ) from error
        with _BoundedFile(unpacked.fileno(), closefd=False) as inner:
            inner.name = file.name
            result = _read(inner, wanted, inside=True)
    return replace(result, container=f"{result.container}, {entry.filename} in a zip")


def _weights_inside(archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    """The only entry that begins like a torch file."""
    found = []
    for entry in archive.infolist()[:1000]:
        with archive.open(entry) as member:
            if is_torch(member.read(2)):
                found.append(entry)
    if len(found) != 1:
        what = "several weight files" if found else "no torch weights"
        names = [entry.filename for entry in found] or archive.namelist()
        raise MissingInputError(f"a zip with {what}: {', '.join(names[:3])}. Give the file inside")
    return found[0]


# --- tensors --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: torch.dtype
    count: int

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize


@dataclass(frozen=True)
class View:
    """A tensor as a pickle describes it, known to lie within its storage."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def __post_init__(self) -> None:
        if not (
            isinstance(self.storage, _Storage)
            and type(self.size) is type(self.stride) is tuple
            and len(self.size) == len(self.stride) <= 8
            and all(type(n) is int and n >= 0 for n in (self.offset, *self.size, *self.stride))
        ):
            raise ValueError("a tensor without a sane storage, offset, size and stride")
        # Where the last element lies, relative to the first. The count of elements is bounded as
        # well: with strides of 0 a few bytes could claim any size.
        last = sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        if self.numel > max(0, self.storage.count - self.offset) or (
            self.numel and self.offset + last >= self.storage.count
        ):
            raise ValueError(f"a tensor of size {self.size[:8]} outside its storage")

    @property
    def numel(self) -> int:
        return math.prod(self.size)


def _entries(loaded: Any) -> dict[Any, Any]:
    """What a pickle holds, by name; of a pickled module or a list, its parts."""
    if isinstance(loaded, _Stub):
        loaded = loaded.parts
    elif isinstance(loaded, list | tuple) and any(isinstance(p, dict | _Stub) for p in loaded):
        loaded = dict(enumerate(loaded))
    if isinstance(loaded, dict):
        return loaded
    kind = "tensor" if isinstance(loaded, View) else type(loaded).__name__
    raise MissingInputError(f"holds a {kind}, not a state dict")


def _views(loaded: dict[Any, Any]) -> dict[str, View]:
    """The tensors of a state dict, or of all those in a checkpoint; `state_dict.` is left out."""
    found: dict[str, View] = {}
    state = loaded.get("state_dict")
    if isinstance(state, dict):
        _walk_state(state, "", found, set())
    _walk_state(loaded, "", found, {id(state)})
    return found


def _walk_state(value: Any, path: str, found: dict[str, View], seen: set[int]) -> None:
    """Notes the tensors in nested dicts, lists and modules, by their path; each of them once."""
    if isinstance(value, _Stub):
        value = value.parts
    if isinstance(value, View):
        found.setdefault(path, value)
    elif isinstance(value, dict | list | tuple) and id(value) not in seen:
        seen.add(id(value))
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, inner in items:
            if isinstance(inner, View) or not OPTIMIZER.search(str(name)):
                _walk_state(inner, f"{path}.{name}" if path else str(name), found, seen)


def _collect(
    file: _BoundedFile,
    container: str,
    loaded: Any,
    stubbed: set[str],
    fetch: Callable[[str], bytes],
    wanted: Wanted,
) -> Contents:
    """Reads the tensors that are wanted, each storage once."""
    loaded = _entries(loaded)
    views = _views(loaded)
    chosen = {key: views[key] for key in wanted(views)}
    needed = {view.storage for view in chosen.values()}
    size = sum(view.numel * view.storage.dtype.itemsize for view in chosen.values())
    size = max(size, sum(storage.nbytes for storage in needed))
    # Tensors may share a storage (tied weights), hence twice the file; never many times.
    if size > 2 * file.total + 1_000_000:
        raise ValueError(f"its tensors claim {size:,} bytes")
    storages = {storage: _elements(storage, fetch(storage.key)) for storage in needed}
    tensors = {}
    for key, view in views.items():
        if key in chosen:
            tensors[key] = storages[view.storage].as_strided(view.size, view.stride, view.offset)
        else:
            tensors[key] = torch.empty(view.size, dtype=view.storage.dtype, device="meta")
    return Contents(
        Path(file.name),
        tensors,
        _counts(loaded),
        container,
        any(isinstance(key, str) and OPTIMIZER.search(key) and loaded[key] for key in loaded),
        sorted(stubbed),
        facts.from_values(_plain_values(loaded.get(facts.ENTRY))),
    )


def _counts(loaded: dict[Any, Any]) -> dict[str, str]:
    """`global_step` and the like; of Lightning with several optimizers, also `iteration`."""
    names = ("iteration", "epoch", *COUNTERS)
    counts = {name: str(loaded[name]) for name in names if type(loaded.get(name)) is int}
    batches: Any = loaded
    for name in ("loops", "fit_loop", "epoch_loop.batch_progress", "total", "completed"):
        batches = batches.get(name) if isinstance(batches, dict) else None
    optimizers = loaded.get("optimizer_states")
    several = len(optimizers) if isinstance(optimizers, list) else 0
    steps = loaded.get("global_step")
    if type(batches) is type(steps) is int and several > 1 and steps == several * batches:
        counts["iteration"] = str(batches)  # Lightning counts the steps of all optimizers
    return counts


def _plain_values(entry: Any) -> dict[str, Any]:
    """Numbers, strings, and lists of them, below the names in a dict."""
    found = {}
    for name, value in entry.items() if isinstance(entry, dict) else ():
        items = value if isinstance(value, list | tuple) else [value]
        if all(type(item) in (bool, int, float, str) for item in items):
            found[str(name)] = value
    return found


def _elements(storage: _Storage, data: bytes) -> Tensor:
    if len(data) != storage.nbytes:
        raise ValueError(f"storage {storage.key} is not of the size that its tensors say")
    if not data:  # which torch.frombuffer refuses
        return torch.empty(0, dtype=storage.dtype)
    return torch.frombuffer(bytearray(data), dtype=storage.dtype)


# --- pickles --------------------------------------------------------------------------------


_Interpreter: Any = pickle._Unpickler  # its stack, memo and opcodes are untyped


class _Name(str):
    """The name of a class or function; a text, and nothing else."""


class _Stub:
    """Stands where another object stood; of a pickled module it keeps the state dict's entries."""

    def __init__(self) -> None:
        self.parts: dict[Any, Any] = {}

    def build(self, state: Any) -> None:
        """Takes the parameters, buffers and modules out of a module's attributes."""
        kinds = ("_parameters", "_buffers", "_modules")
        if isinstance(state, dict) and all(isinstance(state.get(kind), dict) for kind in kinds):
            self.parts = {name: part for kind in kinds for name, part in state[kind].items()}


class _Counted(dict[int, Any]):
    """The opcodes that are read; counts how many were."""

    left = OPERATIONS

    def __getitem__(self, code: int) -> Any:
        self.left -= 1
        if self.left < 0:
            raise ValueError(f"its pickle takes more than {OPERATIONS:,} operations")
        return super().__getitem__(code)

    def __missing__(self, code: int) -> Any:
        raise ValueError(f"its pickle holds opcode {code}, which torch never wrote")


class _Window(io.BytesIO):
    """A pickle in memory: a read that goes beyond its end raises EOFError."""

    def read(self, count: int | None = -1) -> bytes:
        piece = super().read(count)
        if count and len(piece) < count:
            raise EOFError("its pickle ends too soon, or is too long")
        return piece


class _Pickle(_Interpreter):  # type: ignore[misc]
    """Python's own reader of pickles, in Python, without its calls, names and hashes."""

    def __init__(self, data: bytes | mmap.mmap) -> None:
        self.window = _Window(data[:PICKLE_BYTES])
        super().__init__(self.window, encoding="utf-8", errors="replace")
        self.stubbed: set[str] = set()
        self.storages: dict[str, _Storage] = {}
        self.dispatch = _Counted(
            {code: getattr(type(self), f.__name__) for code, f in READ.items()}
        )

    def load(self) -> Any:
        """Reads one object, without garbage collection.

        Every list and dict stays reachable until the end, so that collections find nothing, and
        hundreds of them over hundreds of thousands of containers take most of the time.
        """
        self.memo: dict[int, Any] = {}
        collects = gc.isenabled()
        gc.disable()
        try:
            return super().load()
        finally:
            if collects:
                gc.enable()

    def load_mark(self) -> None:
        if len(self.metastack) > DEPTH:
            raise ValueError(f"its pickle is nested more than {DEPTH} deep")
        super().load_mark()

    def find_class(self, module: str, name: str) -> Any:
        """A name, and nothing else; MissingInputError for one that only an attack needs."""
        full = f"{module}.{name}".replace("__builtin__.", "builtins.", 1)[:300]
        if HOSTILE.fullmatch(full):
            raise MissingInputError(
                f"the file asks to run {full}, which no weights need; it is refused. Get the "
                "weights as .safetensors, from a place you trust"
            )
        if full not in PLAIN:
            self.stubbed.add(full)
        return _Name(full)

    def load_reduce(self) -> None:
        arguments, name = self.stack.pop(), self.stack.pop()
        if name == "torch._tensor._rebuild_from_type_v2":
            name, _, arguments, *_ = arguments  # with attributes; described as others are
        if not isinstance(name, _Name) or not isinstance(arguments, tuple):
            raise ValueError("its pickle calls something that is not a class")
        self.append(self._made(name, arguments))

    load_newobj = load_reduce

    def _made(self, name: str, arguments: tuple[Any, ...]) -> Any:
        """What a call would have made, if it is a tensor or a dict."""
        if name in ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"):
            return _Stub() if isinstance(arguments[0], _Stub) else View(*arguments[:4])
        if name == "torch._utils._rebuild_tensor_v3":
            return _later_view(arguments)
        if name.startswith("torch._utils._rebuild_parameter"):
            return arguments[0]
        if name == "collections.OrderedDict" and arguments:  # filled where Python 2 wrote it
            self.dispatch.left -= len(arguments[0])
            if any(not isinstance(pair, list | tuple) or len(pair) != 2 for pair in arguments[0]):
                raise ValueError("OrderedDict arguments that are not pairs")
            return {key: value for key, value in arguments[0] if type(key) in (str, int)}
        # Of the kinds that behave as a dict: filled below, if it is.
        return {} if name.endswith(("dict", "Dict")) else _Stub()

    def load_newobj_ex(self) -> None:
        self.stack.pop()
        self.load_reduce()

    def load_build(self) -> None:
        state = self.stack.pop()  # left out, except for a module's
        if self.stack and isinstance(self.stack[-1], _Stub):
            self.stack[-1].build(state)

    def load_setitem(self) -> None:
        self._set([self.stack.pop(-2), self.stack.pop()])

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    def _set(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], dict):
            pairs = zip(items[::2], items[1::2], strict=True)
            self.stack[-1].update({key: value for key, value in pairs if type(key) in (str, int)})

    def load_append(self) -> None:
        self._extend([self.stack.pop()])

    def load_appends(self) -> None:
        self._extend(self.pop_mark())

    def _extend(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)

    load_empty_set, load_additems = pickle._Unpickler.load_empty_list, load_appends  # type: ignore
    load_frozenset = pickle._Unpickler.load_list  # type: ignore[attr-defined]

    def persistent_load(self, described: Any) -> Any:
        if isinstance(described, tuple) and described[:1] == ("module",):
            return described[1]  # the older format stores a module's source beside its class
        if not (isinstance(described, tuple) and described[0] == "storage"):
            raise ValueError("it refers to something that is not a storage")
        _, kind, key, _, count, *views = described
        if not isinstance(kind, _Name) or type(key) is not str or type(count) is not int:
            raise ValueError("a storage without a type, key and length")
        if count < 0 or any(view is not None for view in views):
            raise ValueError(f"storage {key} of a form that torch no longer writes")
        dtype = torch.uint8 if kind == UNTYPED else STORAGE_DTYPES.get(kind.removeprefix("torch."))
        if dtype is None:
            return _Stub()  # of a quantised tensor
        storage = _Storage(key, dtype, count)
        self.storages.setdefault(key, storage)
        return storage


def _later_view(arguments: tuple[Any, ...]) -> View | _Stub:
    """A tensor of a type without a storage of its own; a stub if that is not a float8."""
    storage, dtype = arguments[0], LATER.get(arguments[6])
    if dtype is None or not isinstance(storage, _Storage):
        return _Stub()
    typed = _Storage(storage.key, dtype, storage.count // dtype.itemsize)
    return View(typed, *arguments[1:4])


# Protocols 0 and 1, which torch never wrote: INST, PERSID, OBJ, INT, LONG, FLOAT, STRING, UNICODE,
# GET, PUT. Then EXT1, EXT2, EXT4 (names by a number of the process), LONG4 (numbers of any length),
# NEXT_BUFFER and READONLY_BUFFER (data beside the pickle).
REFUSED_CODES = {*b"iPoILFSVgp", 0x82, 0x83, 0x84, 0x8B, 0x97, 0x98}
READ = {code: f for code, f in _Interpreter.dispatch.items() if code not in REFUSED_CODES}
