"""Writes a VAE into a copy of a full Stable Diffusion checkpoint, record by record.

The copy keeps the file's types, its metadata and everything that is not the VAE, byte for byte.
"""

import json
import math
import shutil
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kl_f8_train.core.hashes import frozen_sha256, tensor_bytes
from kl_f8_train.core.model import FROZEN
from kl_f8_train.errors import MissingInputError, RunFailedError, UsageError, about
from kl_f8_train.files import atomic_path, beginning, file_sha256
from kl_f8_train.weights import names, torch_file, weight_file

COPIED_BYTES = 1 << 24  # at a time, so that a checkpoint of any size takes no memory
PREFIXES = (names.FIRST_STAGE, "vae.")  # Stable Diffusion's; of all-in-one files for FLUX
SAFETENSORS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,  # these are refused by name
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
}


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: its record (a zip's) or byte (a safetensors file's), and its layout."""

    record: str
    start: int  # in bytes, for safetensors in the file, for zips in the record
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def inject(vae: Path, into: Path, out: Path, force: bool = False) -> list[str]:
    """Writes `out`: `into` with the VAE of `vae`; returns what there is to say about it.

    Holds one VAE in memory, not the checkpoint. Raises UsageError if `out` exists and not `force`,
    or `into` is a folder; MissingInputError if there is no VAE in it, or one of other shapes.
    """
    if into.is_dir():
        raise UsageError(
            f"{into} is a folder. For a diffusers pipeline, copy the files of export/diffusers "
            f"over those in {into / 'vae'}; inject writes into single .safetensors and .ckpt files"
        )
    if out.exists() and not force:
        raise UsageError(f"{out} exists; nothing was written. Give --force, or another --out")
    source, weights = weight_file.read_weights(vae)
    weight_file.check_finite(source, weights.autoencoder)
    is_zip = into.is_file() and zipfile.is_zipfile(into)
    places = _vae_places(into, _zip_places(into) if is_zip else _safetensors_places(into))
    with about(f"{source.path} does not fit {into}"):
        names.check_shapes(weights.autoencoder, {key: p.shape for key, p in places.items()})
    tensors = _stored(source, into, weights.autoencoder, places)

    lines = [_compare_encoders(into, places, tensors)]
    with atomic_path(out) as temporary:
        if is_zip:
            _write_zip(into, temporary, places, tensors)
        else:
            _write_safetensors(into, temporary, places, tensors)
        for key, tensor in _read(temporary, places):
            if not torch.equal(tensor, tensors[key]):
                raise RunFailedError(f"{key} does not read back as written")
    types = sorted({str(place.dtype).removeprefix("torch.") for place in places.values()})
    return [
        *weight_file.quality(source, weights),
        *lines,
        f"{len(tensors)} tensors of {source.path} written as {', '.join(types)}, read back equal; "
        "everything else is copied as it was",
        f"{out}  {out.stat().st_size:,} bytes  sha256 {file_sha256(out)[:12]}",
    ]


def _vae_places(into: Path, places: Mapping[str, Place]) -> dict[str, Place]:
    """Those of the VAE, under CompVis' names; MissingInputError if there are none."""
    for prefix in PREFIXES:
        if any(key.startswith(prefix) for key in places):
            break
    parts = tuple(f"{prefix}{part}" for part in names.AUTOENCODER_PARTS)
    found = {k.removeprefix(prefix): place for k, place in places.items() if k.startswith(parts)}
    if not found:
        raise MissingInputError(
            f"{into} holds no {names.FIRST_STAGE}*, nor vae.*, so it is not a full checkpoint; "
            "give one of Stable Diffusion or FLUX"
        )
    return found


def _stored(
    source: weight_file.Contents,
    into: Path,
    state: Mapping[str, Tensor],
    places: Mapping[str, Place],
) -> dict[str, Tensor]:
    """The VAE in the types of a checkpoint.

    Raises MissingInputError for types that ruin any VAE, and for values that one cannot hold.
    """
    stored = {}
    for key, place in places.items():
        name = str(place.dtype).removeprefix("torch.")
        if not place.dtype.is_floating_point or place.dtype.itemsize == 1:
            raise MissingInputError(
                f"{into} stores {key} as {name}, which is too coarse for a VAE; give the "
                "checkpoint of float16, bfloat16 or float32"
            )
        stored[key] = state[key].to(place.dtype)
        if not stored[key].isfinite().all():
            raise MissingInputError(
                f"{source.path}: {key} holds {float(state[key].abs().max()):.3g}, more than "
                f"{name} can, which {into} stores; give the checkpoint of float32 or bfloat16"
            )
    return stored


def _compare_encoders(
    into: Path, places: Mapping[str, Place], tensors: Mapping[str, Tensor]
) -> str:
    """Whether latents stay what they were for this checkpoint."""
    parts = tuple(f"{name}." for name in FROZEN)
    frozen = {key: place for key, place in places.items() if key.startswith(parts)}
    before = frozen_sha256(dict(_read(into, frozen)))
    after = frozen_sha256({key: tensors[key] for key in frozen})
    if before == after:
        return f"the encoder is the checkpoint's own (SHA-256 {before[:12]}): latents stay"
    return (
        f"WARNING: the encoder differs from the checkpoint's own (SHA-256 {after[:12]}, was "
        f"{before[:12]}): latents change, and the checkpoint's diffusion model was trained on "
        "the old ones"
    )


def _read(path: Path, places: Mapping[str, Place]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file one by one, contiguous, with their names."""
    is_zip = any(place.record for place in places.values())
    with zipfile.ZipFile(path) if is_zip else path.open("rb") as file:
        for key, place in places.items():
            if isinstance(file, zipfile.ZipFile):
                yield key, _view(bytearray(file.read(place.record)), place).contiguous()
                continue
            file.seek(place.start)
            data = bytearray(file.read(place.dtype.itemsize * math.prod(place.shape)))
            yield key, torch.frombuffer(data, dtype=place.dtype).view(place.shape)


def _view(record: bytearray, place: Place) -> Tensor:
    """A tensor that lies in a record, as a view of its bytes."""
    numbers = torch.frombuffer(record, dtype=place.dtype)
    return numbers.as_strided(place.shape, place.strides, place.start // place.dtype.itemsize)


# --- safetensors ----------------------------------------------------------------------------


def _safetensors_places(path: Path) -> dict[str, Place]:
    """Where the tensors of a safetensors file lie; raises MissingInputError for another file."""
    with weight_file.find(path).open("rb") as file:
        head = file.read(64)
        if head[8:9] != b"{":
            what = beginning(head) or (
                "a .ckpt of before torch 1.6 becomes one by torch.save(torch.load(FILE, "
                "weights_only=True), NEW)"
            )
            raise MissingInputError(f"{path} is neither .safetensors nor a torch zip: {what}")
        weight_file.read(path, lambda names: ())  # validates the header
        file.seek(8)
        header = json.loads(file.read(struct.unpack("<Q", head[:8])[0]))
        start = file.tell()
    found = {}
    for key, entry in header.items():
        if key.startswith(PREFIXES) and entry["dtype"] in SAFETENSORS:
            first, dtype = start + entry["data_offsets"][0], SAFETENSORS[entry["dtype"]]
            found[key] = Place("", first, dtype, tuple(entry["shape"]), ())
    return found


def _write_safetensors(
    into: Path, temporary: Path, places: Mapping[str, Place], tensors: Mapping[str, Tensor]
) -> None:
    """Copies the file and overwrites the tensors where they lie."""
    # Offsets and types stay those of the file, so its header stays as it is.
    shutil.copyfile(into, temporary)
    with temporary.open("r+b") as file:
        for key, tensor in tensors.items():
            file.seek(places[key].start)
            file.write(tensor_bytes(tensor))


# --- torch's zips ---------------------------------------------------------------------------


def _zip_places(path: Path) -> dict[str, Place]:
    """Where the tensors of a torch zip lie; raises MissingInputError if there is more in it."""
    weight_file.read(path, lambda names: ())  # raises if it is broken, or asks to run something
    found = {}
    for key, (record, view) in torch_file.views(path).items():
        dtype = view.storage.dtype
        found[key] = Place(record, view.offset * dtype.itemsize, dtype, view.size, view.stride)
    return found


def _write_zip(
    into: Path, temporary: Path, places: Mapping[str, Place], tensors: Mapping[str, Tensor]
) -> None:
    """Copies the zip record by record; in those that hold VAE tensors, these are replaced."""
    changed: dict[str, list[str]] = {}
    for key, place in places.items():
        changed.setdefault(place.record, []).append(key)
    with zipfile.ZipFile(into) as source, zipfile.ZipFile(temporary, "w") as target:
        for entry in source.infolist():
            info = weight_file.aligned(target, entry.filename)
            if entry.filename in changed:
                data = bytearray(source.read(entry))
                for key in changed[entry.filename]:
                    _view(data, places[key]).copy_(tensors[key])
                target.writestr(info, data)
                continue
            info.file_size = entry.file_size  # lets zipfile decide whether it needs 64-bit sizes
            with source.open(entry) as old, target.open(info, "w") as new:
                shutil.copyfileobj(old, new, COPIED_BYTES)
