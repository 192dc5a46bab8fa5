"""Reads files of `torch.save` without `torch.load`: a pickle is data here, and nothing in it runs.

The interpreter below builds numbers, texts, lists, dicts and descriptions of tensors. Names of
classes and functions are only compared with a list: none is ever imported, looked up or called.
Tensors are read afterwards, only those wanted, once their shapes are known to lie in the file.

Formats: torch's zip (1.6 and newer), its older sequence of pickles, and a zip around either, as
kl-f8.zip is. Opcodes are those of Python's pickle protocols 2 to 5, pickletools.py.
"""

import io
import math
import mmap
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from kl_f8_train.errors import MissingInputError

Wanted = Callable[[Collection[str]], Collection[str]]

MAGIC = 0x1950A86A20F9469CFC6C  # the older format begins with this number, pickled
OPERATIONS = 300_000  # a tensor takes about 40; a whole Stable Diffusion has 2,000
DEPTH = 100
PICKLE_BYTES = 64 << 20
DIRECTORY_BYTES = 4 << 20  # of a zip: about 40,000 entries
UNPACKED = 10  # how much larger than a zip the file inside may be
CHUNK = 8 << 20

DTYPES = {
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
}
PLAIN = {
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "torch.Size",
    "torch.device",
    *(f"torch.{name}" for name in DTYPES),
    *(str(dtype) for dtype in DTYPES.values()),
    *(f"builtins.{name}" for name in ("set", "frozenset", "dict", "list", "tuple", "bytearray")),
    *(f"builtins.{name}" for name in ("int", "float", "str", "bool", "long", "unicode")),
}
STUBBED_PACKAGES = ("pytorch_lightning", "lightning", "numpy", "omegaconf", "typing", "pathlib")
STUBBED = {
    "_codecs.encode",
    "copyreg._reconstructor",
    "copy_reg._reconstructor",
    "builtins.object",
    "builtins.type",
    "collections.defaultdict",
    "argparse.Namespace",
}


@dataclass
class TorchFile:
    """What a torch file holds: every name, the tensors wanted, the rest on the meta device."""

    container: str
    tensors: dict[str, Tensor]
    counts: dict[str, int]  # `global_step` and `epoch`, where it tells them
    optimizer: bool
    stubbed: list[str]


def read(path: Path, wanted: Wanted, inside: bool = False) -> TorchFile:
    """Reads a torch file; `wanted` picks the names to load from all names.

    Raises MissingInputError if it holds something else, and any exception if it is broken.
    """
    with _BoundedFile(path) as file:
        if file.peek(2) != b"PK":
            return _read_pickles(file, wanted)
        with _open_zip(file) as archive:
            if _has_torch_records(archive, file.total()):
                return _read_zip(file, archive, wanted)
            if inside:
                raise MissingInputError("a zip in a zip, without torch weights")
            return _read_inside(archive, file.total(), wanted)


def views(path: Path) -> dict[str, tuple[str, "View"]]:
    """The record and the layout of every tensor in a torch zip, none of which is read.

    Raises MissingInputError if it holds something else, and any exception if it is broken.
    """
    with _BoundedFile(path) as file, _open_zip(file) as archive:
        if not _has_torch_records(archive, file.total()):
            raise MissingInputError("a zip without torch weights")
        root, pickled = _zip_pickle(archive)
        found = _views(pickled.load())
    return {key: (f"{root}data/{view.storage.key}", view) for key, view in found.items()}


def is_torch(head: bytes) -> bool:
    """Whether a file that begins with `head` may be a torch file."""
    return head[:2] == b"PK" or head[:1] == b"\x80"


# --- containers -----------------------------------------------------------------------------


class _BoundedFile(io.FileIO):
    """A file that refuses to read more than `most` bytes at once."""

    most = DIRECTORY_BYTES

    def read(self, size: int | None = -1) -> bytes:
        wanted = self.total() - self.tell() if size is None or size < 0 else size
        if wanted > self.most:
            raise ValueError(f"{wanted:,} bytes where at most {self.most:,} were expected")
        return super().read(size) or b""

    def total(self) -> int:
        """Size of the file in bytes."""
        before = self.tell()
        end = self.seek(0, io.SEEK_END)
        self.seek(before)
        return end

    def peek(self, size: int) -> bytes:
        """The first bytes of the file."""
        self.seek(0)
        head = super().read(size) or b""
        self.seek(0)
        return head


def _open_zip(file: _BoundedFile) -> zipfile.ZipFile:
    """Opens a zip whose directory is of a sane size and names nothing outside itself."""
    archive = zipfile.ZipFile(file)
    file.most = file.total()
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


def _read_zip(file: _BoundedFile, archive: zipfile.ZipFile, wanted: Wanted) -> TorchFile:
    root, pickled = _zip_pickle(archive)
    loaded = pickled.load()

    def fetch(storage: "_Storage") -> bytes:
        name = f"{root}data/{storage.key}"
        if archive.getinfo(name).file_size != storage.nbytes:
            raise ValueError(f"{name} is not of the size that its tensors say")
        return archive.read(name)

    return _collect("torch zip", loaded, pickled.stubbed, fetch, file.total(), wanted)


def _zip_pickle(archive: zipfile.ZipFile) -> tuple[str, "_Pickle"]:
    """The folder in a torch zip, and its pickle."""
    (record,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
    root = record.removesuffix("data.pkl")
    if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
        raise ValueError("its numbers are big-endian")
    if archive.getinfo(record).file_size > PICKLE_BYTES:
        raise ValueError(f"{record} is larger than {PICKLE_BYTES:,} bytes")
    return root, _Pickle(archive.read(record))


def _read_pickles(file: _BoundedFile, wanted: Wanted) -> TorchFile:
    """Five pickles (magic number, version, system, contents, storage keys), then the storages."""
    total = file.total()
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        pickled = _Pickle(data)
        if pickled.load() != MAGIC:
            raise MissingInputError("a pickle, but none of torch's; expected weights")
        pickled.load()
        system = pickled.load()
        if isinstance(system, dict) and system.get("little_endian") is False:
            raise ValueError("its numbers are big-endian")
        loaded, keys = pickled.load(), pickled.load()
        place, places = pickled.position, {}
        for key in keys:
            if type(key) is not str:
                raise ValueError("a storage whose key is no text")
            (count,) = struct.unpack_from("<q", data, place)
            size = count * pickled.storages[key].dtype.itemsize
            if count < 0 or place + 8 + size > total:
                raise EOFError(f"storage {key} ends behind the file")
            places[key] = (place + 8, size)
            place += 8 + size

        def fetch(storage: "_Storage") -> bytes:
            start, size = places[storage.key]
            if size != storage.nbytes:
                raise ValueError(f"storage {storage.key} is not of the size that its tensors say")
            return data[start : start + size]

        return _collect("older torch file", loaded, pickled.stubbed, fetch, total, wanted)


def _read_inside(archive: zipfile.ZipFile, total: int, wanted: Wanted) -> TorchFile:
    """Unpacks the one weight file in a zip to a temporary file, and reads that."""
    entry = _weights_inside(archive)
    if entry.file_size > UNPACKED * total + 1_000_000:
        raise MissingInputError(f"it unpacks to more than {UNPACKED} times its own size")
    with tempfile.NamedTemporaryFile(prefix="kl_f8_train-") as unpacked:
        try:
            with archive.open(entry) as member:
                shutil.copyfileobj(member, unpacked, CHUNK)
            unpacked.flush()
        except OSError as error:
            raise MissingInputError(
                f"unpacking its {entry.filename} takes {entry.file_size:,} bytes in "
                f"{tempfile.gettempdir()}: {error}. Set TMPDIR to a place with room"
            ) from error
        result = read(Path(unpacked.name), wanted, inside=True)
    result.container = f"{result.container}, {entry.filename} in a zip"
    return result


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
        last = sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        if self.numel > max(0, self.storage.count - self.offset) or (
            self.numel and self.offset + last >= self.storage.count
        ):
            raise ValueError(f"a tensor of size {self.size[:8]} outside its storage")

    @property
    def numel(self) -> int:
        return math.prod(self.size)


def _views(loaded: Any) -> dict[str, View]:
    """The tensors of a state dict, or of the one in a checkpoint."""
    if not isinstance(loaded, dict):
        raise MissingInputError(f"holds a {type(loaded).__name__.strip('_')}, not a state dict")
    state = loaded.get("state_dict", loaded)
    if not isinstance(state, dict):
        raise MissingInputError("its state_dict is none")
    return {key: v for key, v in state.items() if isinstance(key, str) and isinstance(v, View)}


def _collect(
    container: str,
    loaded: Any,
    stubbed: set[str],
    fetch: Callable[[_Storage], bytes],
    total: int,
    wanted: Wanted,
) -> TorchFile:
    """Reads the tensors that are wanted, each storage once."""
    views = _views(loaded)
    chosen = {key: views[key] for key in wanted(views)}
    needed = {view.storage for view in chosen.values()}
    size = sum(view.numel * view.storage.dtype.itemsize for view in chosen.values())
    size = max(size, sum(storage.nbytes for storage in needed))
    if size > 2 * total + 1_000_000:
        raise ValueError(f"its tensors claim {size:,} bytes")
    storages = {storage: _flat(fetch(storage), storage.dtype) for storage in needed}
    return TorchFile(
        container,
        {
            key: storages[view.storage].as_strided(view.size, view.stride, view.offset)
            if key in chosen
            else torch.empty(view.size, dtype=view.storage.dtype, device="meta")
            for key, view in views.items()
        },
        {key: loaded[key] for key in ("global_step", "epoch") if type(loaded.get(key)) is int},
        bool(loaded.get("optimizer_states") or loaded.get("optimizer")),
        sorted(stubbed),
    )


def _flat(data: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


# --- pickles --------------------------------------------------------------------------------


class _Name(str):
    """The name of a class or function; a text, and nothing else."""


class _Stub:
    """Stands where another object stood."""


class _Pickle:
    """Interprets pickles as data, one after the other; counts what they cost."""

    def __init__(self, data: bytes | mmap.mmap) -> None:
        self.data, self.position, self.left = data, 0, OPERATIONS
        self.stubbed: set[str] = set()
        self.storages: dict[str, _Storage] = {}

    def load(self) -> Any:
        """The next object; raises MissingInputError at a foreign name, ValueError if broken."""
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        while (code := self._take(1)) != b".":
            self._spend(1)
            if code not in _ACTIONS:
                raise ValueError(f"pickle opcode {code!r} at byte {self.position:,}")
            _ACTIONS[code](self)
        return self.stack.pop()

    def _spend(self, operations: int) -> None:
        self.left -= operations
        if self.left < 0:
            raise ValueError(f"its pickle takes more than {OPERATIONS:,} operations")

    def _take(self, count: int) -> bytes:
        end = self.position + count
        if count < 0 or end > len(self.data):
            raise EOFError("its pickle ends too soon")
        if end > PICKLE_BYTES:
            raise ValueError(f"its pickle is longer than {PICKLE_BYTES:,} bytes")
        piece = self.data[self.position : end]
        self.position = end
        return piece

    def _number(self, kind: str) -> Any:
        return struct.unpack(kind, self._take(struct.calcsize(kind)))[0]

    def _line(self) -> str:
        end = self.data.find(b"\n", self.position, self.position + 1000)
        if end < 0:
            raise ValueError("a name without an end")
        return self._take(end + 1 - self.position)[:-1].decode()

    def _replace(self, count: int, make: Callable[..., Any]) -> None:
        """Takes `count` objects from the stack and puts back what `make` makes of them."""
        if len(self.stack) < count:
            raise ValueError("its pickle takes what is not there")
        objects = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        self.stack.append(make(*objects))

    def _mark(self) -> None:
        if len(self.marked) > DEPTH:
            raise ValueError(f"its pickle is nested more than {DEPTH} deep")
        self.marked.append(self.stack)
        self.stack = []

    def _to_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.marked.pop()
        return items

    def _name(self, module: Any, name: Any) -> _Name:
        """A name on the list; another raises MissingInputError."""
        if type(module) is not str or type(name) is not str:
            raise ValueError("a class whose name is no text")
        full = f"{module}.{name}".replace("__builtin__.", "builtins.", 1)[:300]
        if full in PLAIN:
            return _Name(full)
        if full in STUBBED or full.split(".")[0] in STUBBED_PACKAGES:
            self.stubbed.add(full)
            return _Name(full)
        raise MissingInputError(
            f"the file asks to run {full}, which is neither a tensor nor a known training "
            "object; it is refused. Get the weights as .safetensors"
        )

    def _make(self, name: Any, arguments: Any, *_: Any) -> Any:
        """What a call of `name` would have made, if it is a tensor or a dict."""
        if not isinstance(name, _Name) or not isinstance(arguments, tuple):
            raise ValueError("its pickle calls what is no class")
        if name in ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"):
            return View(*arguments[:4])
        if name == "torch._utils._rebuild_parameter":
            return arguments[0]
        if name == "collections.OrderedDict":
            pairs = arguments[0] if arguments else []  # filled where Python 2 wrote it
            self._spend(len(pairs))
            if any(not isinstance(pair, list | tuple) or len(pair) != 2 for pair in pairs):
                raise ValueError("a dict of what are no pairs")
            return {key: value for key, value in pairs if type(key) in (str, int)}
        return _Stub()

    def _storage(self, described: Any) -> _Storage:
        if not (isinstance(described, tuple) and described[0] == "storage"):
            raise ValueError("it refers to something that is no storage")
        _, kind, key, _, count, *views = described
        if not isinstance(kind, _Name) or type(key) is not str or type(count) is not int:
            raise ValueError("a storage without a type, key and length")
        if count < 0 or any(view is not None for view in views):
            raise ValueError(f"storage {key} of a form that torch no longer writes")
        storage = _Storage(key, DTYPES[kind.removeprefix("torch.")], count)
        self.storages.setdefault(key, storage)
        return storage

    def _extend(self) -> None:
        items = self._to_mark()
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)

    def _append(self, target: Any, item: Any) -> Any:
        if isinstance(target, list):
            target.append(item)
        return target

    def _set_items(self, target: Any, *items: Any) -> Any:
        if isinstance(target, dict):
            pairs = zip(items[::2], items[1::2], strict=True)
            target.update({key: value for key, value in pairs if type(key) in (str, int)})
        return target

    def _set_marked(self) -> None:
        items = self._to_mark()
        self.stack[-1] = self._set_items(self.stack[-1], *items)


Action = Callable[[_Pickle], object]


def _push(value: Callable[[_Pickle], Any]) -> Action:
    return lambda p: p.stack.append(value(p))


def _counted(kind: str) -> Callable[[_Pickle], bytes]:
    return lambda p: p._take(p._number(kind))


def _text(kind: str) -> Action:
    return lambda p: p.stack.append(p._take(p._number(kind)).decode(errors="replace"))


def _put(kind: str) -> Action:
    return lambda p: p.memo.update({p._number(kind): p.stack[-1]})


def _from_mark(make: Callable[[list[Any]], Any]) -> Action:
    def act(pickle: _Pickle) -> None:
        items = pickle._to_mark()
        pickle.stack.append(make(items))

    return act


def _from_stack(count: int, make: str) -> Action:
    return lambda p: p._replace(count, getattr(p, make))


def _tuple(count: int) -> Action:
    return lambda p: p._replace(count, lambda *items: items)


_ACTIONS: dict[bytes, Action] = {
    b"\x80": lambda p: p._take(1),  # PROTO
    b"\x95": lambda p: p._take(8),  # FRAME
    b"(": _Pickle._mark,
    b"0": lambda p: p.stack.pop() if p.stack else p._to_mark(),
    b"1": _Pickle._to_mark,
    b"2": _push(lambda p: p.stack[-1]),
    b"N": _push(lambda p: None),
    b"\x88": _push(lambda p: True),
    b"\x89": _push(lambda p: False),
    b"K": _push(lambda p: p._number("<B")),
    b"M": _push(lambda p: p._number("<H")),
    b"J": _push(lambda p: p._number("<i")),
    b"G": _push(lambda p: p._number(">d")),
    b"\x8a": _push(lambda p: int.from_bytes(_counted("<B")(p), "little", signed=True)),
    b"C": _push(_counted("<B")),
    b"B": _push(_counted("<I")),
    b"\x8e": _push(_counted("<Q")),
    b"\x96": _push(_counted("<Q")),  # BYTEARRAY8
    b"\x8c": _text("<B"),
    b"X": _text("<I"),
    b"\x8d": _text("<Q"),
    b"U": _text("<B"),  # Python 2's str
    b"T": _text("<i"),
    b"q": _put("<B"),
    b"r": _put("<I"),
    b"\x94": lambda p: p.memo.update({len(p.memo): p.stack[-1]}),  # MEMOIZE
    b"h": _push(lambda p: p.memo[p._number("<B")]),
    b"j": _push(lambda p: p.memo[p._number("<I")]),
    b")": _push(lambda p: ()),
    b"t": _from_mark(tuple),
    b"\x85": _tuple(1),
    b"\x86": _tuple(2),
    b"\x87": _tuple(3),
    b"]": _push(lambda p: []),
    b"a": _from_stack(2, "_append"),
    b"e": _Pickle._extend,
    b"\x8f": _push(lambda p: []),  # EMPTY_SET: a list, so that nothing is hashed
    b"\x90": _Pickle._extend,  # ADDITEMS
    b"\x91": _from_mark(list),  # FROZENSET
    b"}": _push(lambda p: {}),
    b"s": _from_stack(3, "_set_items"),
    b"u": _Pickle._set_marked,
    b"c": _push(lambda p: p._name(p._line(), p._line())),
    b"\x93": _from_stack(2, "_name"),
    b"R": _from_stack(2, "_make"),
    b"\x81": _from_stack(2, "_make"),  # NEWOBJ
    b"\x92": _from_stack(3, "_make"),  # NEWOBJ_EX
    b"b": lambda p: p._replace(2, lambda target, state: target),  # BUILD: the state is left out
    b"Q": _from_stack(1, "_storage"),  # BINPERSID
}
