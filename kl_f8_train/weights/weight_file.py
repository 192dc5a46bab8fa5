"""Reads and writes weight files: safely, atomically, nothing else.

Reading never makes foreign objects. Writing goes to a temporary name in the target directory,
is flushed to disk and then renamed, so a file under its final name is always whole.

A training checkpoint is a safetensors file: tensors named `autoencoder.*`, `ema.*`,
`discriminator.*`, `optimizer.*`, and texts (iteration, configuration, hashes) in its metadata.
"""

import json
import re
import struct
import tempfile
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kl_f8_train import facts
from kl_f8_train.core.hashes import frozen_sha256
from kl_f8_train.core.model import AutoencoderKL
from kl_f8_train.errors import MissingInputError
from kl_f8_train.facts import Facts
from kl_f8_train.files import atomic_path
from kl_f8_train.run_dir import list_checkpoints
from kl_f8_train.weights import hub, torch_file
from kl_f8_train.weights.names import (
    SDXL_SCALING_FACTOR,
    State,
    Weights,
    architecture,
    check_shapes,
    differences,
    recognise,
    relevant,
    shapes_of,
)

HEADER_BYTES = 16 << 20  # of a safetensors file; a whole Stable Diffusion's takes 0.2 MB


@dataclass
class Contents:
    """Tensors and texts of one file; tensors that were not wanted are on the meta device."""

    path: Path
    tensors: State
    metadata: dict[str, str] = field(default_factory=dict)
    container: str = "safetensors"
    optimizer: bool = False
    stubbed: list[str] = field(default_factory=list)
    facts: Facts = field(default_factory=Facts)

    @property
    def iteration(self) -> int | None:
        """The iteration the file says it was written at."""
        for key in ("iteration", "kl_f8_train.iteration", "global_step"):
            if re.fullmatch(r"[0-9]{1,15}", self.metadata.get(key, "")):
                return int(self.metadata[key])
        return None


# --- reading --------------------------------------------------------------------------------


def read(path: str | Path, wanted: torch_file.Wanted = lambda names: names) -> Contents:
    """Reads a weight file, folder or run directory, recognised by its content.

    `wanted` picks the names to load from all names in the file. Raises MissingInputError if it is
    missing, broken, or holds objects other than tensors.
    """
    path = find(Path(path))
    try:
        with path.open("rb") as file:
            head = file.read(9)
        if head[8:9] == b"{":  # first: the header's length before it may look like anything
            return _with_config(_read_safetensors(path, wanted))
        if torch_file.is_torch(head):
            return _with_config(_read_torch(path, wanted))
    except MissingInputError as error:
        raise MissingInputError(f"{path}: {error}") from error
    except Exception as error:  # whatever a broken file makes its parser raise
        raise MissingInputError(
            f"{path} ({path.stat().st_size:,} bytes) is broken or cut short: "
            f"{error or type(error).__name__}; copy or download it again"
        ) from error
    raise MissingInputError(
        f"{path} is not a weight file: expected .safetensors, or a torch .ckpt, .pt or .bin, got "
        f"{_beginning(head)}"
    )


def _beginning(head: bytes) -> str:
    """What a file is by its first bytes, and how to get the one that was meant."""
    if not head:
        return "an empty file; copy or download it again"
    if head.startswith(b"version "):
        return "a pointer of git lfs; `git lfs pull` brings the file"
    if head.lstrip().startswith(b"<"):
        return "a web page; download the file itself"
    return f"a file that begins with {head!r}; check where it came from"


def read_weights(path: str | Path, select: str = "ema") -> tuple[Contents, Weights]:
    """Reads any VAE file and finds the autoencoder in it; `select` is "ema" or "raw".

    Raises MissingInputError if the file holds none.
    """
    contents = read(path, relevant)
    try:
        return contents, recognise(contents.tensors, select)
    except MissingInputError as error:
        raise MissingInputError(f"{contents.path}: {error}") from error


def load_autoencoder(path: str | Path, select: str = "ema") -> AutoencoderKL:
    """The autoencoder of any VAE file, float32, in eval mode, its shape read off the tensors.

    Raises MissingInputError if the file holds none, or not all of one.
    """
    return build_autoencoder(*read_weights(path, select))


def build_autoencoder(contents: Contents, weights: Weights) -> AutoencoderKL:
    """`load_autoencoder` for what was read already."""
    try:
        with torch.device("meta"):  # whatever size the file claims
            model = AutoencoderKL(**architecture(weights.autoencoder, contents.facts))
        check_shapes(weights.autoencoder, shapes_of(model.state_dict()))
    except (MissingInputError, ValueError) as error:
        raise MissingInputError(f"{contents.path}: {error}") from error
    tensors = {key: value.float().contiguous() for key, value in weights.autoencoder.items()}
    model.load_state_dict(tensors, assign=True)
    return model.eval().requires_grad_(False)


def report(contents: Contents, weights: Weights) -> dict[str, Any]:
    """What a file holds, as plain values; `describe` writes them as text."""
    with torch.device("meta"):
        differing = differences(weights.autoencoder, shapes_of(AutoencoderKL().state_dict()))
    groups = Counter(
        ".".join(key.split(".")[: 1 + key.startswith("loss.")]) for key in weights.dropped
    )
    return {
        "file": str(contents.path),
        "container": contents.container,
        "layout": weights.layout,
        "tensors": len(weights.autoencoder),
        "dtypes": sorted({str(v.dtype).split(".")[1] for v in weights.autoencoder.values()}),
        "not_kl_f8": differing[0] if differing else None,
        "sdxl": "XL" in weights.layout or contents.facts.scaling_factor == SDXL_SCALING_FACTOR,
        "states": contents.facts.stated(),
        "iteration": contents.iteration,
        "discriminator": weights.discriminator is not None,
        "optimizer": contents.optimizer,
        "ema": weights.ema_scalars,
        "logvar": None if weights.logvar is None else float(weights.logvar),
        "dropped": dict(groups),
        "stubbed": contents.stubbed,
        "frozen_sha256": frozen_sha256(
            {key: value.float() for key, value in weights.autoencoder.items()}
        ),
    }


def describe(found: dict[str, Any]) -> str:
    """A report as lines."""
    dropped = ", ".join(f"{count} {group}" for group, count in found["dropped"].items())
    ema = ", ".join(f"{key} {value:g}" for key, value in found["ema"].items())
    held = [f"{'with' if found[part] else 'no'} {part}" for part in ("discriminator", "optimizer")]
    stated = ", ".join(f"{name} {json.dumps(value)}" for name, value in found["states"].items())
    iteration = "not told" if found["iteration"] is None else f"{found['iteration']:,}"
    lines = [
        f"{found['file']}: {found['layout']} ({found['container']})",
        f"{found['tensors']} autoencoder tensors, {'/'.join(found['dtypes'])}; "
        f"{'; '.join(held)}; iteration {iteration}",
        f"not kl-f8's shape: {found['not_kl_f8']}" if found["not_kl_f8"] else "kl-f8's shape",
        found["sdxl"] and "SDXL's weights: kl-f8's shape, but latents of another scale (0.13025)",
        stated and f"it states: {stated}",
        ema and f"EMA scalars: {ema}",
        found["logvar"] and f"loss.logvar is {found['logvar']:g}; the original's is 0",
        dropped and f"left out: {dropped}",
        found["stubbed"] and f"objects that were not loaded: {', '.join(found['stubbed'])}",
        f"encoder and quant_conv: sha256 {found['frozen_sha256']}",
    ]
    return "\n  ".join(line for line in lines if line)


def find(path: Path) -> Path:
    """The file meant by a path: itself, a folder's weights, a run's newest checkpoint, a hub's."""
    if path.is_dir():
        newest = list_checkpoints(path)
        if newest:
            return newest[0]
        for name in hub.FILES:
            if (path / name).is_file():
                return path / name
        raise MissingInputError(
            f"{path}: neither a run directory with checkpoints nor a diffusers folder; give one, "
            "or the weight file itself"
        )
    if path.is_file():
        return path
    if path.exists():
        raise MissingInputError(f"weights {path}: a pipe or device; give a file")
    if hub.is_id(str(path)):
        return hub.fetch(str(path))
    raise MissingInputError(f"weights {path}: no such file; check the path")


def _read_safetensors(path: Path, wanted: torch_file.Wanted) -> Contents:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
    if length > min(HEADER_BYTES, path.stat().st_size):
        raise MissingInputError(
            f"its header claims {length:,} bytes; the file is broken; copy it again"
        )
    with safe_open(path, framework="pt", device="cpu") as file:
        names = list(file.keys())
        chosen = set(wanted(names))
        tensors = {
            name: file.get_tensor(name).clone()  # else it would change with the file
            if name in chosen
            else torch.empty(file.get_slice(name).get_shape(), device="meta")
            for name in names
        }
        optimizer = any(name.startswith("optimizer.") for name in names)
        metadata = dict(file.metadata() or {})
    contents = Contents(path, tensors, metadata, optimizer=optimizer)
    contents.facts = facts.from_metadata(metadata)
    return contents


def _read_torch(path: Path, wanted: torch_file.Wanted) -> Contents:
    found = torch_file.read(path, wanted)
    counts = {key: str(value) for key, value in found.counts.items()}
    contents = Contents(
        path, found.tensors, counts, found.container, found.optimizer, found.stubbed
    )
    contents.facts = facts.from_values(found.stated)
    return contents


def _with_config(contents: Contents) -> Contents:
    """The same with the facts of a diffusers folder's config.json, which come first."""
    stated = facts.from_values(_diffusers_config(contents.path))
    contents.facts = facts.combined(stated, contents.facts)
    return contents


def _diffusers_config(weights: Path) -> dict[str, Any]:
    """The config.json beside a weight file, if it is an autoencoder's."""
    try:
        with weights.with_name("config.json").open("rb") as file:
            values = json.loads(file.read(1_000_000))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(values, dict):
        return {}
    return values if "Autoencoder" in str(values.get("_class_name", "Autoencoder")) else {}


# --- writing --------------------------------------------------------------------------------


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
        try:
            save_file(plain, temporary, metadata={"format": "pt", **metadata})
        except SafetensorError as error:
            raise OSError(str(error)) from error


def write_torch(path: Path, contents: Mapping[str, Any]) -> None:
    """Writes a torch zip with only the records of torch 1.6, which strict loaders demand."""
    with atomic_path(path) as temporary, tempfile.TemporaryFile(dir=path.parent) as whole:
        torch.save(_plain(contents), whole)
        with zipfile.ZipFile(whole) as source, zipfile.ZipFile(temporary, "w") as target:
            for entry in source.infolist():
                if TORCH_1_6.fullmatch(entry.filename):
                    target.writestr(aligned(target, entry.filename), source.read(entry))


def _plain(value: Any) -> Any:
    """Tensors with memory of their own: torch.save stores a view's whole storage."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if not isinstance(value, Tensor):
        return value
    value = value.detach().cpu().contiguous()
    whole = value.untyped_storage().nbytes() == value.nbytes
    return value if whole else value.clone()


TORCH_1_6 = re.compile(r"[^/]+/(data/\d+|data\.pkl|version)")


def aligned(target: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """The next record of a zip, padded so that its data begin at a multiple of 64 bytes."""
    info = zipfile.ZipInfo(name)
    assert target.fp is not None
    padding = -(target.fp.tell() + 30 + len(name) + 4) % 64
    info.extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding
    return info
