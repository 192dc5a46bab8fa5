"""Reads and writes weight files: safely, atomically, nothing else.

Reading never makes foreign objects. Writing goes to a temporary name in the target directory,
is flushed to disk and then renamed, so a file under its final name is always whole.

A training checkpoint is a safetensors file: tensors named `autoencoder.*`, `ema.*`,
`discriminator.*`, `optimizer.*`, and texts (iteration, configuration, hashes) in its metadata.
"""

import contextlib
import hashlib
import io
import json
import os
import pickle
import re
import secrets
import struct
import tempfile
import types
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kl_f8_train.errors import MissingInputError, RunFailedError
from kl_f8_train.formats import Weights, architecture, check_shapes, recognise
from kl_f8_train.model import AutoencoderKL

State = dict[str, Tensor]
NAME = re.compile(r"iteration-(\d{9})\.safetensors$")


@dataclass
class Contents:
    """Tensors and texts of one file."""

    path: Path
    tensors: State
    metadata: dict[str, str] = field(default_factory=dict)
    stubbed: list[str] = field(default_factory=list)

    @property
    def iteration(self) -> int | None:
        """The iteration the file says it was written at."""
        for key in ("iteration", "kl_f8_train.iteration", "global_step"):
            if key in self.metadata:
                return int(self.metadata[key])
        return None


# --- reading --------------------------------------------------------------------------------


def read(path: str | Path, prefixes: tuple[str, ...] = ("",)) -> Contents:
    """Reads a weight file, diffusers folder or run directory, recognised by its content.

    Of a safetensors file only the tensors whose names start with one of `prefixes`.

    Raises MissingInputError if it is missing, broken, or holds objects other than tensors.
    """
    path = find(Path(path))
    kind = _kind(path)
    try:
        if kind == "safetensors":
            return _read_safetensors(path, prefixes)
        if kind == "torch":
            return _read_torch(path)
    except MissingInputError:
        raise
    except Exception as error:  # whatever a broken file makes its parser raise
        raise MissingInputError(
            f"{path} ({path.stat().st_size:,} bytes) is broken or cut short: {error}"
        ) from error
    raise MissingInputError(
        f"{path} is not a weight file: expected .safetensors, or a torch .ckpt, .pt or .bin"
    )


def read_weights(path: str | Path, select: str = "ema") -> tuple[Contents, Weights]:
    """Reads any VAE file and finds the autoencoder in it; `select` is "ema" or "raw".

    Raises MissingInputError if the file holds none.
    """
    contents = read(path)
    try:
        return contents, recognise(contents.tensors, select)
    except MissingInputError as error:
        raise MissingInputError(f"{contents.path}: {error}") from error


def load_autoencoder(path: str | Path, select: str = "ema") -> AutoencoderKL:
    """The autoencoder of any VAE file, float32, in eval mode, its shape read off the tensors.

    Raises MissingInputError if the file holds none, or not all of one.
    """
    contents, weights = read_weights(path, select)
    try:
        model = AutoencoderKL(**architecture(weights.autoencoder))
        check_shapes(
            weights.autoencoder, {k: tuple(v.shape) for k, v in model.state_dict().items()}
        )
    except (MissingInputError, KeyError) as error:
        raise MissingInputError(f"{contents.path}: {error}") from error
    model.load_state_dict(weights.autoencoder)
    return model.eval().requires_grad_(False)


def find(path: Path) -> Path:
    """The file meant by a path: itself, a diffusers folder's, or a run's newest checkpoint."""
    if path.is_dir():
        newest = list_checkpoints(path)
        if newest:
            return newest[0]
        for name in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"):
            if (path / name).is_file():
                return path / name
        raise MissingInputError(
            f"{path}: neither a run directory with checkpoints nor a diffusers folder"
        )
    if not path.exists():
        raise MissingInputError(f"weights {path}: no such file")
    return path


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Training checkpoints of a run, newest first."""
    return sorted((run_dir / "checkpoints").glob("iteration-*.safetensors"), reverse=True)


def checkpoint_path(run_dir: Path, iteration: int, warmup: int = 0) -> Path:
    """`run_dir/checkpoints/iteration-000246803.safetensors`; `warmup` counts unfinished warm-up."""
    suffix = f"-warmup-{warmup:06d}" if warmup else ""
    return run_dir / "checkpoints" / f"iteration-{iteration:09d}{suffix}.safetensors"


def _kind(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(9)
    if head[8:9] == b"{":  # first: the header's length before it may look like anything
        return "safetensors"
    if head[:2] == b"PK" or head[:1] == b"\x80":
        return "torch"
    return "unknown"


def _read_safetensors(path: Path, prefixes: tuple[str, ...]) -> Contents:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
    if length > min(100_000_000, path.stat().st_size):
        raise MissingInputError(f"{path}: its header claims {length:,} bytes; the file is broken")
    with safe_open(path, framework="pt", device="cpu") as file:
        names = [key for key in file.keys() if key.startswith(prefixes)]  # noqa: SIM118
        tensors = {key: file.get_tensor(key) for key in names}
        return Contents(path, tensors, dict(file.metadata() or {}))


def _read_torch(path: Path) -> Contents:
    _refuse_odd_zip(path)
    stubbed: set[str] = set()
    with path.open("rb") as file:  # not the path: torch would go by its suffix
        loaded = torch.load(
            file, map_location="cpu", pickle_module=_restricted_pickle(stubbed), weights_only=False
        )
    if not isinstance(loaded, dict):
        raise MissingInputError(f"{path} holds a {type(loaded).__name__}, expected a state dict")
    state = loaded.get("state_dict", loaded)
    tensors = {
        str(key): value.detach() for key, value in state.items() if isinstance(value, Tensor)
    }
    metadata = {
        key: str(loaded[key]) for key in ("global_step", "epoch") if type(loaded.get(key)) is int
    }
    return Contents(path, tensors, metadata, sorted(stubbed))


def _refuse_odd_zip(path: Path) -> None:
    """torch's zips hold plain, uncompressed records; anything else is not ours to open."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    names = [entry.filename for entry in entries]
    if any(name.endswith("constants.pkl") or "/code/" in name for name in names):
        raise MissingInputError(f"{path} is a TorchScript program, expected weights")
    if not any(name.endswith("data.pkl") for name in names):
        raise MissingInputError(f"{path} is a zip without torch weights: {', '.join(names[:3])}")
    if sum(entry.file_size for entry in entries) > 1.01 * path.stat().st_size + 1_000_000:
        raise MissingInputError(
            f"{path} unpacks to more than its own size; torch writes no such zip"
        )


# --- the restricted unpickler ---------------------------------------------------------------


class _Inert(dict):  # type: ignore[type-arg]
    """Stands where a foreign object stood; keeps and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Inert":
        return dict.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)

    def append(self, item: Any) -> None:
        """Ignores a list item."""

    def extend(self, items: Any) -> None:
        """Ignores list items."""


_ALLOWED: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
    "torch._utils._rebuild_tensor": torch._utils._rebuild_tensor,
    "torch._utils._rebuild_parameter": torch._utils._rebuild_parameter,
    "torch.Size": torch.Size,
    "builtins.set": set,
    "builtins.dict": dict,
    "builtins.list": list,
    "builtins.tuple": tuple,
    "builtins.int": int,
    "builtins.long": int,  # protocol 2, torch's, writes Python 2's names
    "builtins.unicode": str,
    "builtins.float": float,
    "builtins.str": str,
    "builtins.bool": bool,
}
_STUBBED_MODULES = ("pytorch_lightning", "lightning", "numpy", "omegaconf", "typing", "pathlib")
_STUBBED_NAMES = (
    "_codecs.encode",
    "copyreg._reconstructor",
    "copy_reg._reconstructor",
    "builtins.object",
    "__builtin__.object",
    "builtins.type",
    "collections.defaultdict",
    "argparse.Namespace",
)


def _restricted_pickle(stubbed: set[str]) -> types.ModuleType:
    """A pickle module whose unpickler knows tensors, stubs known classes and refuses the rest."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            full = f"{module}.{name}".replace("__builtin__.", "builtins.", 1)
            if full in _ALLOWED:
                return _ALLOWED[full]
            if module.split(".")[0] in _STUBBED_MODULES or full in _STUBBED_NAMES:
                stubbed.add(full)
                return type(name.rsplit(".", 1)[-1], (_Inert,), {})
            raise MissingInputError(
                f"the file asks to run {full}, which is neither a tensor nor a known training "
                "object; it is refused. Get the weights as .safetensors"
            )

    def load(file: Any, **kwargs: Any) -> Any:
        return Unpickler(file, **kwargs).load()

    module = types.ModuleType("restricted_pickle")
    module.Unpickler = Unpickler  # type: ignore[attr-defined]
    module.load = load  # type: ignore[attr-defined]
    return module


# --- writing --------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renames it on success, removes it on failure.

    Raises RunFailedError with the remedy if the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # safetensors writes 0600
        temporary.replace(path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except (OSError, SafetensorError, RuntimeError) as error:
        free = _free_bytes(path.parent)
        raise RunFailedError(
            f"writing {path} failed: {error}\n  {free:,} bytes are free there; earlier "
            "files are untouched. Make room, then run the same command again"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Writes tensors, each with memory of its own, and texts atomically."""
    plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    seen: set[int] = set()
    for key, value in plain.items():
        if value.untyped_storage().data_ptr() in seen:
            plain[key] = value.clone()  # safetensors refuses tensors that share memory
        seen.add(value.untyped_storage().data_ptr())
    with atomic_path(path) as temporary:
        save_file(plain, temporary, metadata={"format": "pt", **metadata})


def write_torch(path: Path, contents: Mapping[str, Any]) -> None:
    """Writes a torch zip with only the records of torch 1.6, which strict loaders demand.

    Tensors go to the file one by one; each is stored whole, also a view of another.
    """
    pickled = io.BytesIO()
    pickler = _TensorPickler(pickled, protocol=2)
    pickler.dump(dict(contents))
    with (
        atomic_path(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as target,
    ):
        _write_aligned(target, "archive/data.pkl", pickled.getvalue())
        for number, tensor in enumerate(pickler.tensors):
            _write_aligned(target, f"archive/data/{number}", tensor_bytes(tensor))
        _write_aligned(target, "archive/version", b"3\n")


class _Stored(NamedTuple):
    """What torch's pickles hold in a tensor's place: the record of its numbers."""

    kind: type
    record: str
    numbers: int


class _TensorPickler(pickle.Pickler):
    """Pickles as torch.save does, and keeps the tensors, whose bytes belong in other records."""

    def __init__(self, file: io.BytesIO, protocol: int) -> None:
        super().__init__(file, protocol)
        self.tensors: list[Tensor] = []

    def reducer_override(self, value: Any) -> Any:
        """A tensor as a call of torch's rebuilding function; anything else as usual."""
        if not isinstance(value, Tensor):
            return NotImplemented
        stored = _Stored(STORAGES[value.dtype], str(len(self.tensors)), value.numel())
        self.tensors.append(value.detach())
        shape = tuple(value.shape)
        strides = torch.empty(shape, device="meta").stride()  # contiguous
        hooks: dict[str, Any] = OrderedDict()
        return torch._utils._rebuild_tensor_v2, (stored, 0, shape, strides, False, hooks)

    def persistent_id(self, value: Any) -> Any:
        """torch's words for a record."""
        if isinstance(value, _Stored):
            return ("storage", value.kind, value.record, "cpu", value.numbers)
        return None


STORAGES: dict[torch.dtype, type] = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}


def tensor_bytes(tensor: Tensor) -> Any:
    """The numbers of a tensor in order, as bytes; copied only if they do not lie so."""
    plain = tensor.detach().cpu().contiguous()
    return plain.flatten().view(torch.uint8).numpy()


def _write_aligned(target: zipfile.ZipFile, name: str, data: Any) -> None:
    """Stores a record with its data at a multiple of 64 bytes, so that torch can map it."""
    target.writestr(aligned(target, name), data)


def aligned(target: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """The next record of a zip, padded so that its data begin at a multiple of 64 bytes."""
    info = zipfile.ZipInfo(name)
    assert target.fp is not None
    padding = -(target.fp.tell() + 30 + len(name) + 4) % 64
    info.extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding
    return info


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, values: Any) -> None:
    """Writes JSON atomically."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def remove_old_checkpoints(saved: Path, keep_last: int, keep_every: int) -> None:
    """Keeps `saved`, the newest before it, `keep_last` in all, and every multiple of `keep_every`.

    Files newer than `saved` are of a try that was given up, and do not count.
    """
    older = [path for path in list_checkpoints(saved.parents[1]) if path <= saved]
    for path in older[keep_last:]:
        match = NAME.search(path.name)
        if not (match and keep_every and int(match[1]) % keep_every == 0):
            path.unlink(missing_ok=True)


def remove_leftovers(run_dir: Path) -> None:
    """Deletes temporary files that a killed run left beside its checkpoints."""
    for path in (run_dir / "checkpoints").glob(".*.part"):
        path.unlink(missing_ok=True)


def check_writable(directory: Path) -> None:
    """Raises RunFailedError if files cannot be made in `directory`."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"0")
    except OSError as error:
        raise RunFailedError(f"cannot write in {directory}: {error}") from error


def cache_dir() -> Path:
    """$KL_F8_TRAIN_CACHE, or kl_f8_train in the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get("KL_F8_TRAIN_CACHE") or Path(base) / "kl_f8_train")


# --- hashes ---------------------------------------------------------------------------------


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, types and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def data_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a safetensors file behind its header, if all tensors have one type."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensor_bytes(tensors[name]))
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _free_bytes(directory: Path) -> int:
    stats = os.statvfs(directory)
    return stats.f_bavail * stats.f_frsize
