"""Training checkpoint -> pruned weights in every layout, each file read back and compared."""

import contextlib
import datetime
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kl_f8_train import __version__, images, units
from kl_f8_train import config as configs
from kl_f8_train.averages import label, module_name, requested
from kl_f8_train.core.hashes import data_sha256, frozen_sha256
from kl_f8_train.core.model import FROZEN, TRAINED, AutoencoderKL
from kl_f8_train.errors import MissingInputError, RunFailedError, UsageError
from kl_f8_train.facts import ENTRY, FAMILIES, METADATA_PREFIX, Facts, combined, settled
from kl_f8_train.files import check_writable, file_sha256, write_json, write_text
from kl_f8_train.publish import card, half_precision, rescale
from kl_f8_train.run import outcome
from kl_f8_train.run_dir import CONFIG_FILE, EXPORT_FILE, best_checkpoint, is_run
from kl_f8_train.settings import KL_F8_SHAPES, Config, to_dict
from kl_f8_train.units import counted
from kl_f8_train.weights import checkpoint, names, weight_file
from kl_f8_train.weights.names import State

LAYOUTS = ("safetensors", "ckpt", "diffusers")
DTYPES = {"float32": "", "float16": "fp16", "bfloat16": "bf16"}  # and their short names
TRIED_SIDE = 128  # pixels, of the images that try half precision


class WeightFile(NamedTuple):
    """A file of weights to write."""

    path: Path
    layout: str  # one of LAYOUTS
    dtype: torch.dtype


def export(
    source: Path,
    out: Path | None = None,
    *,
    raw: bool = False,
    ema: float | None = None,
    best: bool = False,
    dtype: str = "float32",
    layouts: Sequence[str] = LAYOUTS,
    average: Sequence[Path] = (),
    pictures: Path | None = None,
    family: str | None = None,
    fp16_safe: bool | None = None,
    force: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Path:
    """Writes the weight files, diffusers/, the configuration and the card; returns their folder.

    `source` is a run directory or one of its checkpoints; with `best` the one with the run's best
    validation. Its EMA, or with `ema` the one of that decay, is averaged with those of `average`;
    with `raw` its raw weights are taken. `dtype` is that of the single files; diffusers/ always
    holds float32 and the fp16 variant. `family` says whose VAE it is where an older checkpoint does
    not. With `fp16_safe` the decoder is rescaled so that it does not overflow in half precision;
    None: where it would. `force` removes weight files of an earlier export that this one does not
    have. Raises UsageError if a file exists and not `force`, or `out` is a run directory;
    MissingInputError without such a checkpoint or EMA; RunFailedError if a file reads back changed.
    """
    source = _best(source) if best else source
    _check_choice(source, average, raw, ema)
    header = weight_file.read(source, lambda names: ())
    config = checkpoint.stored_config(header)
    select = requested(raw, ema)
    kept = weight_file.kept_selection(header, select)  # before a folder is made for it
    kind = f"{select}-average" if average else select
    marks = ["best"] * best + [kind] * (kind != "ema") + [DTYPES[dtype]] * (dtype != "float32")
    out = out or _own_place(source, marks)
    stem = "-".join([config.name, kind, "pruned", *(m for m in marks if m != kind)])
    files = _weight_files(out, stem, layouts, dtype)
    written = [*_paths(files), out / CONFIG_FILE]
    _refuse_to_overwrite(out, [*written, out / card.README, out / EXPORT_FILE], force)
    before = _earlier_files(out)

    named, tried = half_precision.choose_images(pictures, min(TRIED_SIDE, config.data.crop))
    weights = _stored_weights(header.path, select)
    record: dict[str, Any] = {"name": config.name, "stem": stem, "weights": kind, "dtype": dtype}
    record |= _provenance(header, config, ema)
    record["averaged"] = _average(weights, header, average, select)
    stated = _stated_facts(header, config, family)
    model = weight_file.autoencoder_of(weights, stated)
    model, stated, measured = _fp16_safe(model, stated, tried, fp16_safe, say)
    record |= {"facts": stated.stated(), "half_precision": {"images": named, **measured}}

    about = {**_metadata(config, header, record), **stated.metadata()}
    _write_weights(files, model, stated, about, config.data.crop, record["iteration"])
    record["checks"] = _verify(out, files, model, stated)
    _describe(out, written, record, config)
    warnings = _ruined(_home(source), record, kept)
    for line in (*_summary(out, record), *_remove_old(out, before, record["files"]), *warnings):
        say(line)
    return out


def _earlier_files(out: Path) -> dict[str, str]:
    """The files of an export that is there already."""
    with contextlib.suppress(MissingInputError):
        found: dict[str, str] = card.read_record(out)["files"]
        return found
    return {}


def _provenance(header: weight_file.Contents, config: Config, ema: float | None) -> dict[str, Any]:
    """What a training checkpoint says of where its weights come from."""
    begun = header.metadata.get("first_iteration", config.init.iteration)
    return {
        "iteration": int(header.metadata["iteration"]),
        "init_iteration": None if begun is None else int(begun),
        "source": header.path.name,
        "source_sha256": file_sha256(header.path),
        **checkpoint.stored_base(header.metadata),
        "changes": checkpoint.stored_changes(header.metadata),
        "perceptual": checkpoint.stored_identity(header.metadata).get("perceptual"),
        "ema_decay": config.ema.decays[0] if ema is None else ema,
        "config_sha256": hashlib.sha256(header.metadata["config"].encode()).hexdigest(),
        "frozen_sha256": header.metadata["frozen_sha256"],
        "config": to_dict(config),
    }


def _write_weights(
    files: Sequence[WeightFile],
    model: AutoencoderKL,
    stated: Facts,
    metadata: Mapping[str, str],
    size: int,
    iteration: int = 0,
) -> None:
    """Writes the weight files, each in its layout, and diffusers' configuration beside its own.

    `metadata` goes into the .safetensors file; with modelspec's fields also a hash of its tensors.
    """
    weights, spec = model.state_dict(), "modelspec.title" in metadata
    for path, layout, stored in files:
        tensors = {key: value.to(stored) for key, value in weights.items()}
        if layout == "ckpt":
            state = {"state_dict": tensors, "global_step": iteration, ENTRY: stated.stated()}
            weight_file.write_torch(path, state)
        elif layout == "safetensors":
            hashed = {"modelspec.hash_sha256": f"0x{data_sha256(tensors)}"} if spec else {}
            weight_file.write_safetensors(path, tensors, {**metadata, **hashed})
        else:
            weight_file.write_safetensors(path, names.to_diffusers(tensors), {})
            write_json(path.with_name("config.json"), _diffusers_config(weights, stated, size))
        del tensors  # before the next copy is made


def _diffusers_config(weights: State, stated: Facts, size: int) -> dict[str, object]:
    shape = names.architecture(weights, stated)
    widths, blocks = list(shape["ch_mult"]), shape["num_res_blocks"]
    return names.diffusers_config(shape["ch"], widths, blocks, shape["z_channels"], size, stated)


def _describe(out: Path, written: Sequence[Path], record: dict[str, Any], config: Config) -> None:
    """Writes the configuration, the card and the summary, which has all other files' hashes."""
    write_text(out / CONFIG_FILE, configs.to_yaml(config))
    record["files"] = {str(path.relative_to(out)): file_sha256(path) for path in written}
    write_text(out / card.README, card.model_card(config, record))
    record["files"][card.README] = file_sha256(out / card.README)
    write_json(out / EXPORT_FILE, record)


def _fp16_safe(
    model: AutoencoderKL,
    stated: Facts,
    tried: list[Tensor],
    wanted: bool | None,
    say: Callable[[str], None],
) -> tuple[AutoencoderKL, Facts, dict[str, Any]]:
    """The model, what it states and half precision's measurement, rescaled if that is wanted.

    `force_upcast` follows from the measurement: false where --fp16-safe found or made both halves
    safe, true where the decoder overflows.
    """
    before = half_precision.measure(model, tried)
    overflows = half_precision.overflows(before)
    if wanted is False or (wanted is None and not overflows):
        return model, replace(stated, force_upcast=True) if overflows else stated, before
    with half_precision.largest_outputs(model, FROZEN) as encoder:
        latents = [model.encode(images.to_float(picture[None])).mean for picture in tried]
    probes = rescale.probes(latents)
    rescaling = rescale.plan_rescaling(model, probes)
    measured = before
    if rescaling.changes:
        try:
            safe = weight_file.autoencoder_of(rescaling.apply(model.state_dict()), stated)
            rescale.prove(rescaling, model, safe, probes)
        except RunFailedError as error:
            if wanted:
                raise
            say(f"WARNING: not rescaled: {error}")
            return model, replace(stated, force_upcast=True), before
        model, measured = safe, half_precision.measure(safe, tried)
        measured["rescaled"] = {**rescaling.proof, "before": before}
        say(_rescaled(rescaling, before, measured))
    else:
        say(
            f"fp16-safe: nothing to rescale: on {len(probes)} latents the decoder's residual "
            f"stream and its blocks stay below 1/{rescale.HEADROOM} of fp16's limit; what is "
            "written has the same weights, bit for bit"
        )
    upcast, why = _upcast(measured, max(encoder.values()))
    was = stated.force_upcast is not False  # diffusers takes what is not stated as true
    changed = "stays" if was == upcast else "becomes"
    say(f"fp16-safe: diffusers' force_upcast {changed} {json.dumps(upcast)}: {why}")
    return model, replace(stated, force_upcast=upcast), measured


def _rescaled(
    rescaling: rescale.Rescaling, before: Mapping[str, Any], after: Mapping[str, Any]
) -> str:
    """What was rescaled, and what that does."""
    proof = rescaling.proof
    inner = f", {counted(len(rescaling.inner), 'block', 's')} inside" * bool(rescaling.inner)
    same = "bit for bit the same"
    if not proof["float32_bit_equal"]:
        same = f"within {proof['float32_largest_difference_in_levels']:.1g} of 255 levels"
    return (
        f"fp16-safe: the decoder's residual stream x {proof['stream']}{inner}; largest "
        f"activation {before['largest_activation']:,.4g} -> {after['largest_activation']:,.4g}; in "
        f"float32 {proof['probes']} latents decode {same}; the encoder is untouched"
    )


def _upcast(measured: Mapping[str, Any], encoder: float) -> tuple[bool, str]:
    """diffusers' force_upcast, and why; `encoder` is the encoder's largest activation.

    Pipelines that heed it (SDXL's) move encoder and decoder to float32 together.
    """
    if half_precision.overflows(measured):
        return True, "the decoder overflows in fp16, inside attention or at its end"
    if encoder * rescale.HEADROOM >= half_precision.LIMIT:
        return True, (
            f"the encoder, which is not rescaled, reaches {encoder:,.4g}, above "
            f"1/{rescale.HEADROOM} of fp16's limit"
        )
    return False, "encoder and decoder are safe in fp16, so pipelines need not turn to float32"


def _summary(out: Path, record: dict[str, Any]) -> list[str]:
    """Lines for people: the checks, half precision, the files."""
    lines = [f"{check}: {result}" for check, result in record["checks"].items()]
    lines += half_precision.describe(record["half_precision"])
    if record["dtype"] == "bfloat16" and record["half_precision"]["bfloat16"]["mean"]:
        mean = record["half_precision"]["bfloat16"]["mean"]
        lines.append(f"WARNING: bfloat16 costs {mean:.2g} levels of 255; publish float32")
    for file, digest in record["files"].items():
        size = (out / file).stat().st_size
        lines.append(f"{out / file}  {size:,} bytes  sha256 {digest[:12]}")
    return lines


def _stated_facts(header: weight_file.Contents, config: Config, family: str | None) -> Facts:
    """What the run's base stated; UsageError if a family must be given, or another is."""
    published = config.model in KL_F8_SHAPES.values()
    stated = checkpoint.stored_facts(header, config)
    channels, given = config.model.embed_dim, family or config.init.family
    return settled(header.path, stated, channels, given, published, "--family ")


def _best(source: Path) -> Path:
    """The checkpoint with a run's best validation; MissingInputError if it keeps none."""
    found = best_checkpoint(source)
    if found is None:
        raise MissingInputError(
            f"--best: {source} keeps no best checkpoint. A training with checkpoint.keep_best=true "
            "does, once a validation is better than all before it; or name a checkpoint"
        )
    return found


def _ruined(run: Path, record: Mapping[str, Any], select: str) -> list[str]:
    """A warning if the exported weights were validated as worse than those of the start."""
    if record["averaged"]:  # also of other iterations: not validated
        return []
    found = outcome.read(run, record["iteration"])
    for change in found.changes if found else ():
        if change.weights == label(select) and change.is_worse:
            return [
                f"WARNING: on the run's fixed photographs these weights are worse than those it "
                f"started from: {change}; evaluate them before you use them"
            ]
    return []


def make_fp16_safe(
    source: str,
    out: Path | None,
    pictures: Path | None,
    family: str | None,
    force: bool,
    say: Callable[[str], None],
) -> Path:
    """Writes any VAE file's autoencoder with a rescaled decoder, and the proof, to `out`.

    Raises MissingInputError if there is no autoencoder in it, or one that is not finite;
    RunFailedError if rescaling is not exact, or a file does not read back.
    """
    contents, found = weight_file.read_weights(source)
    weight_file.check_finite(contents, found.autoencoder)
    model = weight_file.build_autoencoder(contents, found)
    given = weight_file.facts_of(contents, found)
    shape = names.architecture(found.autoencoder, given)
    published = weight_file.published_shape(found) is not None
    channels = shape["embed_dim"]
    stated = settled(contents.path, given, channels, family, published, "--family ")
    stated = replace(stated, use_quant_conv=shape.get("quant_conv", True))
    stem = f"{_stem(contents.path)}-fp16-safe"
    out = out or Path(stem)
    files = _weight_files(out, stem, ("safetensors", "diffusers"), "float32")
    written = _paths(files)
    _refuse_to_overwrite(out, [*written, out / EXPORT_FILE], force)

    named, tried = half_precision.choose_images(pictures, TRIED_SIDE)
    frozen = frozen_sha256(model.state_dict())
    model, stated, measured = _fp16_safe(model, stated, tried, True, say)
    record: dict[str, Any] = {
        "source": contents.path.name,
        "source_sha256": weight_file.sha256(contents.path),
        "facts": stated.stated(),
        "frozen_sha256": frozen,
        "half_precision": {"images": named, **measured},
    }
    about = {"kl_f8_train.source_sha256": record["source_sha256"], **stated.metadata()}
    _write_weights(files, model, stated, about, stated.sample_size or 256)
    record["checks"] = _verify(out, files, model, stated)
    # A rescaling that reached the encoder would change latents.
    if frozen_sha256(model.state_dict()) != frozen:
        raise RunFailedError(
            f"{source}: its encoder changed; the files in {out} are not to be used"
        )
    record["files"] = {str(path.relative_to(out)): file_sha256(path) for path in written}
    write_json(out / EXPORT_FILE, record)
    for line in _summary(out, {"dtype": "float32", **record}):
        say(line)
    return out


def _stem(path: Path) -> str:
    """The name of a file, or of the folder it lies in where its own says nothing."""
    if path.name.startswith("diffusion_pytorch_model"):
        folder = path.resolve().parent
        return folder.parent.name if folder.name in ("vae", "diffusers") else folder.name
    return re.sub(r"(\.vae)?\.[a-z]\w*(\.index\.json)?$", "", path.name)


def _home(source: Path) -> Path:
    """The run directory; of a checkpoint that lies elsewhere, its own folder."""
    if source.is_dir():
        return source
    folder = source.parent.resolve()
    return folder.parent if folder.name == "checkpoints" else folder


def _own_place(source: Path, marks: Sequence[str]) -> Path:
    """RUN/export-..., without what safetensors was writing there when an export was killed."""
    out = _home(source) / "-".join(["export", *marks])
    for left in (*out.glob(".tmp*"), *out.glob("diffusers/.tmp*")):
        left.unlink()
    return out


def _weight_files(out: Path, stem: str, layouts: Sequence[str], dtype: str) -> list[WeightFile]:
    """The weight files to write."""
    files = []
    for layout in LAYOUTS[:2]:
        if layout in layouts:
            files.append(WeightFile(out / f"{stem}.{layout}", layout, getattr(torch, dtype)))
    if "diffusers" in layouts:
        # from_pretrained takes the plain file, or the one that `variant` names: fp16, bf16.
        for name in dict.fromkeys(["float32", "float16", dtype]):
            variant = f".{DTYPES[name]}" if DTYPES[name] else ""
            path = out / "diffusers" / f"diffusion_pytorch_model{variant}.safetensors"
            files.append(WeightFile(path, "diffusers", getattr(torch, name)))
    return files


def _paths(files: Sequence[WeightFile]) -> list[Path]:
    """The weight files, and the configuration that diffusers expects beside its own."""
    beside = [file.path.with_name("config.json") for file in files if file.layout == "diffusers"]
    return [*(file.path for file in files), *beside[:1]]


def _check_choice(source: Path, average: Sequence[Path], raw: bool, ema: float | None) -> None:
    """Raises UsageError for EMAs and raw weights together, and for a checkpoint given twice."""
    if raw and ema is not None:
        raise UsageError("--ema takes an EMA, --raw none; leave out one of them")
    if raw and average:
        raise UsageError(
            "--average takes the EMAs of checkpoints, --raw no EMA; leave out one of them"
        )
    paths = [weight_file.find(one).resolve() for one in (source, *average)]
    for path in paths:
        if paths.count(path) > 1:
            raise UsageError(f"--average: {path} is given twice; give each checkpoint once")


def _refuse_to_overwrite(out: Path, files: list[Path], force: bool) -> None:
    """Raises UsageError for files that exist, RunFailedError if none can be written."""
    if is_run(out):
        raise UsageError(
            f"--out {out} is a run directory, and its config.yaml would be replaced; nothing was "
            f"written. Give a folder of its own, such as {out / 'export'}"
        )
    existing = [path for path in files if path.exists()]
    if existing and not force:
        raise UsageError(
            f"{existing[0]} exists; nothing was written. Give --force, or another --out"
        )
    check_writable(out)


def _remove_old(out: Path, before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Removes what an earlier export wrote, unchanged since, and this one did not; says so."""
    lines = []
    for pattern in ("*.safetensors", "*.ckpt", "diffusers/*"):
        for path in sorted(out.glob(pattern)):
            file = str(path.relative_to(out))
            if file in before and file not in now and file_sha256(path) == before[file]:
                path.unlink()
                lines.append(f"{path} of the earlier export was removed")
    return lines


def _stored_weights(path: Path, select: str) -> State:
    """The raw weights of a training checkpoint, or an EMA of it, and nothing else.

    Raises MissingInputError if there is no such EMA, if the disk has changed the weights, or if the
    encoder is not the stated one.
    """
    contents, found = weight_file.read_weights(path, select)
    kept = weight_file.kept_selection(contents, select)
    checkpoint.check_content(contents, "autoencoder" if kept == "raw" else module_name(kept))
    # An average covers the trained part; encoder and quant_conv lie beside the raw weights alone.
    if frozen_sha256(found.autoencoder) != contents.metadata["frozen_sha256"]:
        raise MissingInputError(f"{path}: its encoder does not match its own hash")
    return found.autoencoder


def _average(
    weights: State, first: weight_file.Contents, others: Sequence[Path], select: str
) -> list[str]:
    """Makes the trained part of `weights` the mean, in float64, over it and other checkpoints.

    Returns their names. Raises UsageError if another has other shapes or another encoder.
    """
    if not others:
        return []
    total = {key: weights[key].double() for key in weights if key.startswith(TRAINED)}
    averaged = [first.path.name]
    for path in others:
        header = weight_file.read(path, lambda names: ())
        checkpoint.stored_config(header)
        theirs, ours = (one.metadata["frozen_sha256"] for one in (header, first))
        if theirs != ours:
            raise UsageError(
                f"--average {header.path} has another encoder (SHA-256 {theirs[:12]}, "
                f"{first.path.name} has {ours[:12]}); average checkpoints of one base"
            )
        other = _stored_weights(header.path, select)
        try:
            names.check_shapes(other, names.shapes_of(weights))
        except MissingInputError as error:
            raise UsageError(f"--average {header.path}: {error}") from error
        for key in total:
            total[key] += other[key]
        averaged.append(header.path.name)
    for key in list(total):
        weights[key] = (total.pop(key) / len(averaged)).float()
    return averaged


def _metadata(
    config: Config, header: weight_file.Contents, record: Mapping[str, Any]
) -> dict[str, str]:
    """Metadata of the safetensors file: modelspec's fields and our provenance.

    The date is the checkpoint's: when the weights were made, not when they were exported.
    """
    known = FAMILIES.get(record["facts"].get("family") or "")
    written = datetime.datetime.fromtimestamp(header.path.stat().st_mtime, datetime.UTC)
    kept = ("iteration", "base_name", "base_sha256", "ema_decay", "config_sha256", "frozen_sha256")
    ours = {
        "version": __version__,
        "recipe": config.name,
        "weights": record["weights"],
        **{name: str(record[name]) for name in kept},
        "averaged": ", ".join(record["averaged"]),
        "changes": "; ".join(record["changes"]),
        "config": header.metadata["config"],
    }
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{known.modelspec}/vae" if known else "autoencoder-kl",
        "modelspec.implementation": "kl_f8_train",
        "modelspec.title": f"{config.name} ({record['weights']}, pruned)",
        "modelspec.date": written.isoformat(timespec="seconds"),
        "modelspec.resolution": f"{config.data.crop}x{config.data.crop}",
        **{f"{METADATA_PREFIX}{name}": value for name, value in ours.items() if value},
    }


# --- the proof ------------------------------------------------------------------------------


@torch.no_grad()
def _verify(
    out: Path, files: Sequence[WeightFile], model: AutoencoderKL, stated: Facts
) -> dict[str, str]:
    """Reads every file back: same tensors and facts, same latents and image of a test pattern.

    Returns the outcome by file. Raises RunFailedError if one differs.
    """
    weights = model.state_dict()
    pattern = images.to_float(half_precision.pattern(8 * model.downsampling)[None])
    latents = model.encode(pattern).mean  # (1, C, 8, 8)
    decoded = model.decode(latents)
    checks: dict[str, str] = {}
    for path, layout, stored in files:
        frozen, facts = _read_back(path, FROZEN, weights, stored)
        written = replace(stated, family=None) if layout == "diffusers" else stated
        if combined(written, facts) != facts:
            raise RunFailedError(
                f"{path} does not state what its base did: {units.written(facts.stated())}"
            )
        again = weight_file.autoencoder_of({**weights, **frozen}, facts)
        latents_error = float((again.encode(pattern).mean - latents).abs().max())
        del frozen, again  # half of the file at a time: memory
        trained, _ = _read_back(path, TRAINED, weights, stored)
        again = weight_file.autoencoder_of({**weights, **trained}, facts)
        mean, most = half_precision.levels(again.decode(latents), decoded)
        del trained, again
        if stored == torch.float32 and (latents_error or most):
            raise RunFailedError(
                f"{path} reads back, but encodes or decodes a test pattern differently"
            )
        read = "bit for bit; encoder and quant_conv as imported"
        if stored != torch.float32:
            read = f"all rounded to {DTYPES[str(stored)[6:]]}"
        near = f"within {latents_error:.2g}" if latents_error else "as before"
        shift = "a test pattern is encoded and decoded as before"
        if latents_error or most:
            shift = (
                f"a test pattern's latents {near}, its image within {most:.2g} of 255 levels "
                f"(mean {mean:.2g})"
            )
        checks[str(path.relative_to(out))] = f"{len(weights)} tensors read back, {read}; {shift}"
        if layout == "ckpt":
            _check_strictly(path, len(weights))
            checks["strict loader"] = (
                f"torch.load finds {len(weights)} keys in the .ckpt's state_dict, neither more "
                "nor fewer"
            )
    return checks


def _read_back(
    path: Path, parts: Sequence[str], weights: State, stored: torch.dtype
) -> tuple[State, Facts]:
    """Encoder or decoder of a written file, in float32, and what the file states.

    Raises RunFailedError unless the file has the names of `weights`, and these parts their values.
    """
    prefixes = tuple(f"{part}." for part in parts)
    read = weight_file.read(path, lambda names: [n for n in names if n.startswith(prefixes)])
    tensors = names.recognise(read.tensors).autoencoder
    problems = sorted(weights.keys() ^ tensors.keys())
    part = {key: value for key, value in tensors.items() if key.startswith(prefixes)}
    if not problems:
        problems = [k for k, v in part.items() if not torch.equal(v, weights[k].to(stored))]
    if problems:
        raise RunFailedError(f"{path} does not read back as written: {', '.join(problems[:3])}")
    return {key: value.float() for key, value in part.items()}, read.facts


def _check_strictly(path: Path, count: int) -> None:
    """What torch's own safe loader sees of a .ckpt; raises RunFailedError if it is too much."""
    with path.open("rb") as file:  # "meta": names and shapes without values, to save memory
        loaded = torch.load(file, map_location="meta", weights_only=True)
    names = {"state_dict", "global_step", ENTRY}
    if set(loaded) != names or len(loaded["state_dict"]) != count:
        raise RunFailedError(f"{path} holds other things than {', '.join(sorted(names))}")
