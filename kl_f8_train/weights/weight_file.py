"""Reads and writes weight files: safely, atomically, nothing else.

Reading never makes foreign objects. Writing goes to a temporary name in the target directory,
is flushed to disk and then renamed, so a file under its final name is always whole.

A training checkpoint is a safetensors file: tensors named `autoencoder.*`, `ema.*`, perhaps
`ema_0_9999.*`, `discriminator.*`, `optimizer.*`, and strings (iteration, configuration, hashes) in
its metadata.
"""

import contextlib
import hashlib
import json
import re
import struct
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from kl_f8_train import facts, shipped
from kl_f8_train.averages import selection
from kl_f8_train.core.hashes import frozen_sha256
from kl_f8_train.core.model import AutoencoderKL
from kl_f8_train.errors import MOST_SIBLINGS, MissingInputError, UsageError, like_path
from kl_f8_train.facts import Facts
from kl_f8_train.files import DAMAGED, atomic_path, beginning, file_sha256
from kl_f8_train.run_dir import list_checkpoints
from kl_f8_train.settings import KL_F8_SHAPES
from kl_f8_train.units import are, counted, shortest
from kl_f8_train.weights import hub, torch_file
from kl_f8_train.weights.names import (
    QUANTISED,
    SCALES,
    State,
    Weights,
    architecture,
    check_shapes,
    differences,
    names_autoencoder,
    recognise,
    refused_config,
    relevant,
    shapes_of,
)
from kl_f8_train.weights.torch_file import Contents

INDEX = re.compile(r"\.index(\.\w+)?\.json$")  # of weights that lie in several files
PART = re.compile(r"-\d{5}-of-(?!00001)\d{5}\.\w+$")  # one of them
HEADER_BYTES = 16 << 20  # of a safetensors file; a whole Stable Diffusion's takes 0.2 MB


# --- reading --------------------------------------------------------------------------------


def read(path: str | Path, wanted: torch_file.Wanted = lambda names: names) -> Contents:
    """Reads a weight file, folder or run directory, recognised by its content.

    `wanted` picks the names to load from all names in the file. Raises MissingInputError if it is
    missing, broken, or holds objects other than tensors.
    """
    path = find(Path(path))
    try:
        if INDEX.search(path.name):
            return _with_config(_read_sharded(path, wanted))
        with path.open("rb") as file:
            head = file.read(64)
        if head[8:9] == b"{":  # first: the header's length before it may look like anything
            return _with_config(_read_safetensors(path, wanted))
        if torch_file.is_torch(head):
            return _with_config(torch_file.read_torch(path, wanted))
    except MissingInputError as error:
        raise MissingInputError(f"{path}: {error}") from error
    except PermissionError as error:
        raise MissingInputError(f"{path}: may not be read; change its permissions") from error
    except Exception as error:  # whatever a broken file makes its parser raise
        raise MissingInputError(
            f"{path} ({path.stat().st_size:,} bytes) is broken or cut short: "
            f"{error or type(error).__name__}; copy or download it again"
        ) from error
    raise MissingInputError(
        f"{path} is not a weight file: expected .safetensors, or a torch .ckpt, .pt or .bin, got "
        + (beginning(head) or f"a file that begins with {head[:9]!r}; check where it came from")
    )


def read_weights(
    path: str | Path, select: str = "ema", prefix: str | None = None
) -> tuple[Contents, Weights]:
    """Reads any VAE file and finds the autoencoder in it; `select` is "ema" or "raw".

    Of a training checkpoint also "ema-0.9999", if it keeps an EMA of that decay. `prefix` is what
    stands before its names, in a file with several. Raises MissingInputError if the file holds
    none, or is of an architecture that is not trained here.
    """
    contents = read(path, lambda names: relevant(names, prefix, select))
    if PART.search(contents.path.name):
        raise MissingInputError(
            f"{contents.path} is one of several files; give their folder, or the index beside them"
        )
    select = kept_selection(contents, select)
    try:
        if refused := refused_config(_config_beside(contents.path)[0]):
            raise MissingInputError(refused)
        return contents, recognise(contents.tensors, select, prefix)
    except MissingInputError as error:
        objects = "" if contents.tensors else _first(contents.stubbed)
        named = objects and f"; of other objects it holds {objects}, none of which is loaded"
        raise MissingInputError(f"{contents.path}: {error}{named}") from error


def stored_decays(metadata: Mapping[str, str]) -> list[float]:
    """The decays whose EMAs a training checkpoint keeps, the run's own first; [] of other files."""
    try:
        decay = json.loads(metadata["config"])["ema"]["decay"]
        return [float(value) for value in (decay if isinstance(decay, list) else [decay])]
    except DAMAGED:
        return []


def kept_selection(contents: Contents, select: str) -> str:
    """`select` as the checkpoint calls it: the run's own EMA is "ema", whatever its decay.

    Raises MissingInputError if it keeps no EMA of the decay that is asked for.
    """
    if select in ("ema", "raw"):
        return select
    kept = [selection(decay) for decay in stored_decays(contents.metadata)]
    if select not in kept:
        named = ", ".join(name.removeprefix("ema-") for name in kept)
        there = f"it keeps {named}" if kept else "it is not a training checkpoint of a run"
        decay = select.removeprefix("ema-")
        raise MissingInputError(f"{contents.path}: no EMA of decay {decay} in it: {there}")
    return "ema" if select == kept[0] else select


def load_autoencoder(path: str | Path, select: str = "ema") -> AutoencoderKL:
    """The autoencoder of any VAE file, float32, in eval mode, its shape read off the tensors.

    `path` is a .safetensors or torch file, a diffusers folder, a run, a hub's id or "kl_f8_mini".
    `select` is "ema" or "raw", where a file has both, or as "ema-0.9999" one EMA of several. No
    parameter requires a gradient. Raises MissingInputError if the file holds no autoencoder, or
    not all of one.
    """
    return build_autoencoder(*read_weights(path, select))


def build_autoencoder(contents: Contents, weights: Weights) -> AutoencoderKL:
    """`load_autoencoder` for what was read already."""
    try:
        return autoencoder_of(weights.autoencoder, facts_of(contents, weights))
    except (MissingInputError, ValueError) as error:
        raise MissingInputError(f"{contents.path}: {error}") from error


def autoencoder_of(state: State, stated: Facts) -> AutoencoderKL:
    """`load_autoencoder` for tensors; those of float32 become the parameters, without a copy.

    Raises MissingInputError naming the first tensor that is missing, or of another shape.
    """
    with torch.device("meta"):  # whatever size the file claims
        model = AutoencoderKL(**architecture(state, stated))
    check_shapes(state, shapes_of(model.state_dict()))
    tensors = {key: value.float().contiguous() for key, value in state.items()}
    model.load_state_dict(tensors, assign=True)
    model.facts = stated
    return model.eval().requires_grad_(False)


def report(contents: Contents, weights: Weights) -> dict[str, Any]:
    """What a file holds, as plain values; `describe` writes them as text."""
    stated, shape = facts_of(contents, weights), published_shape(weights)
    groups = Counter(
        ".".join(key.split(".")[: 1 + key.startswith("loss.")]) for key in weights.dropped
    )
    return {
        "file": str(contents.path),
        "container": contents.container,
        "layout": weights.layout,
        "tensors": len(weights.autoencoder),
        "dtypes": sorted({str(v.dtype).split(".")[1] for v in weights.autoencoder.values()}),
        "shape": shape,
        "not_kl_f8": None if shape else _other_shape(weights.autoencoder),
        "family": facts.family_of(stated, latent_channels(weights)),
        "states": stated.stated(),
        "iteration": contents.iteration,
        "discriminator": weights.discriminator is not None,
        "optimizer": contents.optimizer,
        "ema": weights.ema_scalars,
        "ema_decays": stored_decays(contents.metadata),
        "logvar": None if weights.logvar is None else float(weights.logvar),
        "notes": [*weights.notes, *quality(contents, weights)],
        "dropped": dict(groups),
        "stubbed": contents.stubbed,
        "frozen_sha256": frozen_sha256(
            {key: value.float() for key, value in weights.autoencoder.items()}
        ),
    }


def _other_shape(state: State) -> str:
    """How the network of a file differs from kl-f8: only in size, or in its architecture."""
    with contextlib.suppress(MissingInputError, ValueError):
        size = architecture(state) | {"norm_num_groups": 1}  # which has no shape
        check_shapes(state, _shapes(size))
        kind = "different"
        if size["ch"] != 128:
            kind = "narrow" if size["ch"] < 128 else "wide"
        return (
            f"a {kind} network of kl-f8's architecture ({counted(size['ch'], 'channel', 's')}, "
            f"kl-f8 has 128): ch_mult {list(size['ch_mult'])}, "
            f"{counted(size['num_res_blocks'], 'residual block', 's')} a level, "
            f"{counted(size['z_channels'], 'latent channel', 's')}"
        )
    return f"not kl-f8's shape: {differences(state, _shapes({}))[0]}"


def _shapes(arguments: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of an autoencoder's tensors, of kl-f8's without arguments."""
    with torch.device("meta"):
        return shapes_of(AutoencoderKL(**arguments).state_dict())


def check_finite(contents: Contents, state: Mapping[str, Tensor]) -> None:
    """Raises MissingInputError if a tensor of a file holds NaN or infinity."""
    if fault := _not_finite(state):
        raise MissingInputError(f"{contents.path}: {fault}")


def _not_finite(state: Mapping[str, Tensor]) -> str:
    bad = [key for key, value in state.items() if not bool(value.float().isfinite().all())]
    if not bad:
        return ""
    return (
        f"{counted(len(bad), 'tensor', 's')} {are(len(bad))} not finite, {bad[0]} first: NaN or "
        "infinity, as a failed merge or conversion leaves it; get another copy"
    )


def quality(contents: Contents, weights: Weights) -> list[str]:
    """Faults of a file's values, and what they mean."""
    faults = [f"WARNING: {fault}" for fault in _faults(weights.autoencoder)]
    if fault := _config_beside(contents.path)[1]:
        faults.insert(0, fault)
    return faults or list(_rounded(contents, weights))


def _faults(state: State) -> Iterator[str]:
    """What makes weights useless."""
    if fault := _not_finite(state):
        yield fault
    whole = [key for key, value in state.items() if not value.is_floating_point()]
    if whole:
        yield (
            f"{counted(len(whole), 'tensor', 's')} {are(len(whole))} of whole numbers, "
            f"{whole[0]} first: {QUANTISED}"
        )
    elif scale := next(filter(SCALES.search, state), None):
        yield f"{scale} is a scale: {QUANTISED}"
    zeros = [k for k, v in state.items() if v.ndim > 1 and not v.float().count_nonzero()]
    if zeros:
        yield (
            f"{counted(len(zeros), 'weight', 's')} {are(len(zeros))} all zeros, {zeros[0]} first, "
            "as an unfinished download leaves them; copy or download it again"
        )


def _rounded(contents: Contents, weights: Weights) -> Iterator[str]:
    """How far the coarsest type among the weights, if not float32, moves their latents."""
    types = {value.dtype for value in weights.autoencoder.values()}
    coarsest = max(types, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)
    if torch.finfo(coarsest).eps > 1e-6:
        with contextlib.suppress(MissingInputError):
            share = _latents_moved(build_autoencoder(contents, weights), coarsest)
            mark = "WARNING: " if coarsest.itemsize == 1 else ""
            ships = contents.path.resolve() == shipped.WEIGHTS.resolve()  # in no other type
            advice = "" if ships else "; take the float32 file, if there is one"
            yield (
                f"{mark}rounded to {str(coarsest).removeprefix('torch.')}, which moves its latents "
                f"by about {100 * share:.2g} % of their spread{advice}"
            )


@torch.no_grad()
def _latents_moved(model: AutoencoderKL, dtype: torch.dtype) -> float:
    """How far rounding of this size moves latents, as a share of their standard deviation.

    Estimated: the weights are rounded already, so they are moved once more, by as much, at random.
    """
    # Waves of three frequencies, (3, 64, 64) in [-1, 1]: any image that is not flat will do.
    waves = torch.arange(64.0)
    image = torch.stack([torch.sin(0.1 * (c + 1) * (waves + 2 * waves[:, None])) for c in range(3)])
    before = model.encode(image[None]).mean
    generator = torch.Generator().manual_seed(0)
    for parameter in model.encoder.parameters():
        noise = torch.rand(parameter.shape, generator=generator) - 0.5
        # Rounding moves a value by up to eps / 2 where its mantissa is 1, and eps / 4 where it is
        # 2: by up to 3/8 eps on average, here of either sign.
        parameter.data = parameter.data * (1 + 0.75 * torch.finfo(dtype).eps * noise)
    return float((model.encode(image[None]).mean - before).square().mean().sqrt() / before.std())


def published_shape(weights: Weights) -> str | None:
    """The name of a file's shape, if it is a published one."""
    found = shapes_of(weights.autoencoder)
    return next((name for name, of in KL_F8_SHAPES.items() if _shapes(asdict(of)) == found), None)


def describe(found: dict[str, Any]) -> str:
    """A report as lines."""
    dropped = ", ".join(f"{count} {group}" for group, count in found["dropped"].items())
    ema = ", ".join(f"{key} {value:g}" for key, value in found["ema"].items())
    decays = ", ".join(map(shortest, found["ema_decays"]))
    held = [f"{'with' if found[part] else 'no'} {part}" for part in ("discriminator", "optimizer")]
    stated = ", ".join(f"{name} {json.dumps(value)}" for name, value in found["states"].items())
    iteration = "not stated" if found["iteration"] is None else f"{found['iteration']:,}"
    lines = [
        f"{found['file']}: {found['layout']} ({found['container']})",
        f"{found['tensors']} autoencoder tensors, {'/'.join(found['dtypes'])}; "
        f"{'; '.join(held)}; iteration {iteration}",
        f"{found['shape']}'s shape" if found["shape"] else found["not_kl_f8"],
        _family_line(found["family"]),
        stated and f"it states: {stated}",
        ema and f"EMA scalars: {ema}",
        "," in decays and f"EMAs of decay {decays}; the first is the run's",
        found["logvar"] and f"loss.logvar is {found['logvar']:g}; the original's is 0",
        *found["notes"],
        dropped and f"left out: {dropped}",
        found["stubbed"] and f"objects that were not loaded: {_first(found['stubbed'])}",
        f"encoder and quant_conv: sha256 {found['frozen_sha256']}",
    ]
    return "\n  ".join(line for line in lines if line)


def _first(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if names[6:] else "")


def _family_line(family: str | None) -> str:
    if family is None:
        return "of which models: not stated (init.family says it, where a run starts from this)"
    known = facts.FAMILIES.get(family)
    if known is None:
        return "its latents have a scale of their own, not that of Stable Diffusion, XL, 3 or FLUX"
    return f"of {facts.described(family, known.facts)}"


def facts_of(contents: Contents, weights: Weights) -> Facts:
    """What a file states, and what the names in a full model or modelspec's fields show."""
    shown = weights.family or _modelspec_family(contents.metadata)
    stated = contents.facts
    if stated.family or stated.scaling_factor is not None or shown is None:
        return stated
    return replace(stated, family=shown)


def _modelspec_family(metadata: Mapping[str, str]) -> str | None:
    """The family in modelspec's fields; exports of ours before facts were kept always said sd."""
    if "kl_f8_train.version" in metadata:
        return None
    named = metadata.get("modelspec.architecture", "")
    spellings = {
        "stable-diffusion-xl": "sdxl",
        "stable-diffusion-v1": "sd",
        "stable-diffusion-v2": "sd",
        "stable-diffusion-v3": "sd3",
        "stable-diffusion-3": "sd3",
        "flux-1": "flux",
    }
    return next((name for start, name in spellings.items() if named.startswith(start)), None)


def latent_channels(weights: Weights) -> int:
    """Channels of the latents of an autoencoder; 0 if its first decoder weight is missing."""
    weight = weights.autoencoder.get("decoder.conv_in.weight")
    return weight.shape[1] if weight is not None and weight.ndim == 4 else 0


def find(path: Path) -> Path:
    """The file meant by a path: itself, a folder's weights, a run's newest checkpoint, a hub's.

    "kl_f8_mini" is the small base that ships with the package.
    """
    if str(path) == shipped.BASE_NAME:
        return shipped.WEIGHTS
    if path.is_dir():
        newest = list_checkpoints(path)
        if newest:
            return newest[0]
        for name in hub.FILES:
            if (path / name).is_file():
                return path / name
        raise MissingInputError(
            f"{path}: neither a run directory with checkpoints nor a diffusers folder; give one, "
            f"or the weight file itself{_held(path)}"
        )
    if path.is_file():
        return path
    if path.exists():
        raise MissingInputError(f"weights {path}: a pipe or device; give a file")
    if hub.is_id(str(path)):
        return hub.fetch(str(path))
    meant = like_path(path, [shipped.BASE_NAME])
    raise MissingInputError(f"weights {path}: no such file; check the path{meant}")


def _held(folder: Path) -> str:
    """What in a folder may be meant: weight files, also in folders below, or a hub's snapshots."""
    within = sorted(islice(chain(folder.iterdir(), folder.glob("*/*")), MOST_SIBLINGS))
    if part := next((path for path in within if path.suffix == ".distcp"), None):
        return f"; {part.parent} is a distributed checkpoint: torch's dcp_to_torch_save joins it"
    files = [path for path in within if path.suffix.lower() in hub.WEIGHT_SUFFIXES]
    files = files or sorted(folder.glob("snapshots/*"))
    return f": {', '.join(map(str, files[:3]))}{', ...' * (len(files) > 3)}" if files else ""


def _read_safetensors(path: Path, wanted: torch_file.Wanted) -> Contents:
    with path.open("rb") as raw:
        (length,) = struct.unpack("<Q", raw.read(8))
        if length > min(HEADER_BYTES, path.stat().st_size):
            raise MissingInputError(
                f"its header claims {length:,} bytes; the file is broken; copy it again"
            )
    with _named_in_utf8(path) as name, safe_open(name, framework="pt", device="cpu") as file:
        names = list(file.keys())
        chosen = set(wanted(names))
        tensors = {}
        for name in names:
            if name in chosen:
                tensors[name] = file.get_tensor(name).clone()  # else it would change with the file
            else:
                tensors[name] = torch.empty(file.get_slice(name).get_shape(), device="meta")
        metadata = dict(file.metadata() or {})
    optimizer = any(name.startswith("optimizer.") for name in names)
    stated = facts.from_metadata(metadata)
    return Contents(path, tensors, metadata, optimizer=optimizer, facts=stated)


@contextlib.contextmanager
def _named_in_utf8(path: Path) -> Iterator[str]:
    """The path, or that of a link to it where its own is not UTF-8."""
    if _is_utf8(path):
        yield str(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder, "link")
        link.symlink_to(path.absolute())
        yield str(link)


def _is_utf8(path: Path) -> bool:
    """Whether a name is UTF-8; safetensors takes no others."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_sharded(path: Path, wanted: torch_file.Wanted) -> Contents:
    """All files that an index names, as save_pretrained writes them with `max_shard_size`."""
    places = _weight_map(path)
    chosen = set(wanted(places))
    whole = Contents(path, {}, container="several files with an index")
    files = list(dict.fromkeys(places.values()))
    absent = [name for name in files if not path.with_name(name).is_file()]
    if absent:
        raise MissingInputError(
            f"{len(absent)} of the {counted(len(files), 'file', 's')} that it names "
            f"{are(len(absent))} not there, {absent[0]} first; copy or download it too"
        )
    for name in files:
        part = read(path.with_name(name), lambda names: [n for n in names if n in chosen])
        whole.tensors |= {k: v for k, v in part.tensors.items() if places.get(k) == name}
        whole.stubbed += part.stubbed
    missing = [name for name in places if name not in whole.tensors]
    if missing:
        raise MissingInputError(
            f"its files lack {missing[0]}, which the index names; copy them again"
        )
    return whole


def sha256(path: Path) -> str:
    """SHA-256 of a weight file's bytes; of an index, over the hashes of the files that it names."""
    if not INDEX.search(path.name):
        return file_sha256(path)
    parts = sorted(set(_weight_map(path).values()))
    hashes = "".join(file_sha256(path.with_name(name)) for name in parts)
    return hashlib.sha256(hashes.encode()).hexdigest()


def _weight_map(path: Path) -> dict[str, str]:
    """Tensor -> name of the file beside the index that holds it."""
    with path.open("rb") as file:
        values = json.loads(file.read(HEADER_BYTES))
    found = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise MissingInputError("not an index: expected weight_map, the file of each tensor")
    if any(Path(name).name != name or INDEX.search(name) for name in found.values()):
        raise MissingInputError("it names files outside its folder")
    return {str(key): name for key, name in found.items()}


def _with_config(contents: Contents) -> Contents:
    """The same with the facts of a diffusers folder's config.json, which come first."""
    values, _ = _config_beside(contents.path)
    if values.get("_class_name") == "AutoencoderKL":  # diffusers' own default, if it states none
        values = {"scaling_factor": 0.18215, **values}
    contents.facts = facts.combined(facts.from_values(values), contents.facts)
    return contents


def _config_beside(weights: Path) -> tuple[dict[str, Any], str]:
    """The config.json beside a weight file, if it is an autoencoder's.

    And why it cannot be read, where these are weights as diffusers names them.
    """
    path = weights.with_name("config.json")
    try:
        with path.open("rb") as file:
            values = json.loads(file.read(1_000_000))
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__}")
    except FileNotFoundError:
        return {}, ""
    except (OSError, ValueError, RecursionError) as error:
        fault = (
            f"WARNING: {path} cannot be read ({error}): what it states "
            "of latents and norms is not known; copy or download it again"
        )
        return {}, fault if weights.name.startswith("diffusion_pytorch_model") else ""
    return (values if names_autoencoder(str(values.get("_class_name", "Autoencoder"))) else {}), ""


# --- writing --------------------------------------------------------------------------------


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Writes tensors, each with memory of its own, and metadata, atomically."""
    write_plain(path, _own(tensors, set()), metadata)


def _own(value: Any, taken: set[int]) -> Any:
    """A value, or those of a mapping, with tensors that share no memory, on the host.

    safetensors refuses those that do, and torch.save stores a view's whole storage.
    """
    if isinstance(value, Mapping):
        return {key: _own(inner, taken) for key, inner in value.items()}
    if not isinstance(value, Tensor):
        return value
    value = value.detach().cpu().contiguous()
    storage = value.untyped_storage()
    if storage.nbytes() != value.nbytes or storage.data_ptr() in taken:
        value = value.clone()
    taken.add(value.untyped_storage().data_ptr())
    return value


def write_plain(path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes contiguous tensors on the host that do not overlap, and metadata, atomically."""
    with atomic_path(path) as temporary:
        about = {"format": "pt", **metadata}
        try:
            if _is_utf8(temporary):
                save_file(tensors, temporary, metadata=about)
            else:  # costs memory for a second copy
                temporary.write_bytes(save(tensors, metadata=about))
        except SafetensorError as error:
            raise OSError(str(error)) from error


def save_autoencoder(model: AutoencoderKL, path: str | Path) -> None:
    """Writes an autoencoder with CompVis' names: .safetensors, or .ckpt for older loaders.

    Its precision is kept, and what the file it was loaded from states, as scaling_factor. Raises
    UsageError for another suffix, or for what is not an AutoencoderKL.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper has names of its own
    if not isinstance(model, AutoencoderKL):
        raise UsageError(
            f"{path}: got a {type(model).__name__}, expected an AutoencoderKL; that of a Finetuner "
            "is finetuner.averaged()"
        )
    path, state = Path(path), model.state_dict()
    stated = replace(model.facts, norm_num_groups=model.decoder.norm_out.num_groups)
    if path.suffix == ".safetensors":
        write_safetensors(path, state, stated.metadata())
    elif path.suffix == ".ckpt":
        write_torch(path, {"state_dict": state, facts.ENTRY: stated.stated()})
    else:
        raise UsageError(f"{path}: an autoencoder is saved as .safetensors or .ckpt")


def write_torch(path: Path, contents: Mapping[str, Any]) -> None:
    """Writes a torch zip with only the records of torch 1.6, which strict loaders demand."""
    with atomic_path(path) as temporary, tempfile.TemporaryFile(dir=path.parent) as whole:
        torch.save(_own(contents, set()), whole)
        with zipfile.ZipFile(whole) as source, zipfile.ZipFile(temporary, "w") as target:
            for entry in source.infolist():
                if TORCH_1_6.fullmatch(entry.filename):
                    target.writestr(aligned(target, entry.filename), source.read(entry))


TORCH_1_6 = re.compile(r"[^/]+/(data/\d+|data\.pkl|version)")


def aligned(target: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """The next record of a zip, padded so that its data begin at a multiple of 64 bytes."""
    info = zipfile.ZipInfo(name)
    assert target.fp is not None
    padding = -(target.fp.tell() + 30 + len(name) + 4) % 64
    info.extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding
    return info
