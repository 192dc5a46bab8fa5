"""The model card of an export: README.md with the hub's front matter.

Its metadata hold only scores measured on these very files. License and base model are never
guessed: the fields are absent unless they are given.
"""

import json
import math
import re
import shlex
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from kl_f8_train import config as configs
from kl_f8_train.core.metrics import SCORES
from kl_f8_train.core.perceptual import LABELS, OTHER_VGG
from kl_f8_train.errors import MissingInputError, UsageError
from kl_f8_train.facts import FAMILIES, Family
from kl_f8_train.files import DAMAGED, atomic_path, file_sha256, write_json, write_text
from kl_f8_train.output import Say, markdown_table, rendered
from kl_f8_train.publish import half_precision
from kl_f8_train.run_dir import EXPORT_FILE, export_meant
from kl_f8_train.score.compare import not_measured
from kl_f8_train.score.scores import BIASED_BELOW, score_text
from kl_f8_train.settings import KL_F8, KL_F8_SHAPES, Config
from kl_f8_train.units import shortest

README, STRIP, LICENSE = "README.md", "strip.png", "LICENSE"  # written here, and may be edited
DIFFUSERS = "diffusers/diffusion_pytorch_model.safetensors"
# metric -> its type in the hub's model-index, in the order of the card's columns
HUB_TYPES = {"rfid": "fid", "psnr": "psnr", "ssim": "ssim", "psim": "psim", "lpips": "lpips"}
NEEDED: dict[str, Any] = {  # entry of export.json -> its type
    **dict.fromkeys(("name", "stem", "weights", "dtype"), str),
    **dict.fromkeys(("config", "half_precision", "checks", "files"), dict),
    **{"iteration": int, "init_iteration": int | None, "averaged": list},
}
FURTHER = {"facts": dict, "changes": list, "card": dict}  # that it may hold
TEMPLATE = Path(__file__).with_name("card.md")


@dataclass(frozen=True)
class Evaluated:
    """What a card takes of scores.json, and which of its models the exported weights are."""

    scores: Mapping[str, Any]
    name: str
    strip: bool = False  # strip.png lies beside the card


@dataclass(frozen=True)
class Details:
    """Fields of a card that are never guessed, under the hub's names."""

    license: Mapping[str, str] = field(default_factory=dict)
    base_model: str | None = None
    published: bool = False  # quote the published scores of kl-f8 and its finetunes


def write(
    export_dir: Path,
    scores_file: Path | None = None,
    details: Details | None = None,
    license_file: Path | None = None,
    *,
    pictures: bool = True,
    say: Say = lambda line: None,
) -> Path:
    """Writes README.md, the evaluation's strip.png and LICENSE into an export directory.

    Without `pictures` strip.png, which shows photographs, is not copied, and the copy of an earlier
    call is removed. Details of an earlier call are kept in export.json and used where this call
    gives none.
    Raises MissingInputError if the directory is not an export, if its files are not those that
    export.json names, or if the scores are damaged or belong to other weights.
    """
    record = _record(export_dir)
    try:
        # export.json keeps what a card was given, so that a later call need not give it again.
        config = _stored_settings(export_dir, record)
        kept = record.get("card", {})
        given = asdict(details or Details())
        details = Details(**{name: value or kept.get(name, value) for name, value in given.items()})
        found = _evaluated(scores_file, record) if scores_file else None
        evaluated = found or _kept_scores(export_dir, record)
        record["card"] = asdict(details)
        if evaluated:
            evaluated = replace(evaluated, strip=evaluated.strip and pictures)
            record["card"] |= {"scores": evaluated.scores, "model": evaluated.name}
        # Files beside the card. A strip in the export's own folder is the scores', not a copy.
        if scores_file and evaluated and evaluated.strip:
            _copy(scores_file.with_name(STRIP), export_dir / STRIP)
            say(f"copied {STRIP}, photographs of the evaluation (--no-pictures leaves it out)")
        beside = scores_file is not None and scores_file.parent.samefile(export_dir)
        if not pictures and not beside and _has_strip(export_dir, record):
            (export_dir / STRIP).unlink()
        if license_file is not None:
            _copy(license_file, export_dir / LICENSE)
        parts = {STRIP: evaluated and evaluated.strip, LICENSE: "license_link" in details.license}
        files = record["files"]
        for file, used in parts.items():
            files.pop(file, None)
            if used:
                files[file] = _sha256(export_dir / file)
        # The card lists all other files with their hashes, and the record has the card's: last.
        readme = export_dir / README
        write_text(readme, model_card(config, record, details, evaluated))
        files[README] = file_sha256(readme)
        write_json(export_dir / EXPORT_FILE, record)
        return readme
    except DAMAGED as error:  # its inner entries
        raise _other_json(export_dir / EXPORT_FILE, "export") from error


def _kept_scores(export_dir: Path, record: Mapping[str, Any]) -> Evaluated | None:
    """The scores that an earlier call was given; their strip, if it is still the same."""
    kept = record.get("card", {})
    if "scores" not in kept:
        return None
    return Evaluated(kept["scores"], kept["model"], _has_strip(export_dir, record))


def _has_strip(export_dir: Path, record: Mapping[str, Any]) -> bool:
    """Whether the strip that an earlier call copied is there, and not another file."""
    strip = export_dir / STRIP
    return strip.is_file() and file_sha256(strip) == record["files"].get(STRIP)


def _copy(file: Path, target: Path) -> None:
    """Copies a file, unless it is there already."""
    if not (target.exists() and file.samefile(target)):
        with atomic_path(target) as temporary:
            shutil.copyfile(file, temporary)


def license_fields(identifier: str | None, file: Path | None) -> dict[str, str]:
    """The front matter's license fields: an identifier of the hub's, or a text of one's own."""
    if file is not None:
        # As the hub's documentation asks for a license that has no identifier there.
        return {"license": "other", "license_name": file.stem.lower(), "license_link": "LICENSE"}
    return {} if identifier is None else {"license": identifier}


def model_card(
    config: Config,
    record: Mapping[str, Any],
    details: Details | None = None,
    evaluated: Evaluated | None = None,
) -> str:
    """README.md of an export: how to use it, how it was made, what was measured and checked."""
    details = details or Details()
    family = family_served(config, record.get("facts", {}))
    front = _front_matter(config, record, details, evaluated)
    factor, files = config.model.downsampling, record["files"]
    decays = config.ema.decays
    values = {
        "front": yaml.safe_dump(front, sort_keys=False, allow_unicode=True),
        "name": _cell(config.name),
        "fits": config.model in KL_F8_SHAPES.values(),
        "family": family,
        "scale": _scale(record.get("facts", {})),
        "diffusers": DIFFUSERS in files,
        "config": config,
        "record": record,
        "cell": _cell,
        "perceptual": record.get("perceptual") or LABELS[config.loss.perceptual],
        "decay": shortest(record.get("ema_decay", decays[0])),
        "decays": [shortest(decay) for decay in decays],
        "details": details,
        "latent": f"{config.model.z_channels} numbers for each {factor} x {factor} pixels",
        "precision": half_precision.describe(record["half_precision"]),
        "checks": record["checks"],
        "files": markdown_table(
            ("file", "SHA-256"),
            [(f"`{file}`", f"`{sha}`") for file, sha in files.items() if file != README],
        ),
        "evaluated": evaluated,
        **(_evaluation(evaluated) if evaluated else {"named_file": _named_file(record)}),
    }
    return rendered(TEMPLATE, values)


def _record(export_dir: Path) -> dict[str, Any]:
    """export.json, its hashes compared with the files."""
    record = read_record(export_dir, NEEDED)
    check_files(export_dir, record, edited=(README, STRIP, LICENSE))
    return record


def check_files(export_dir: Path, record: Mapping[str, Any], edited: Collection[str] = ()) -> None:
    """Raises MissingInputError with all files that are not as exported, but for `edited` ones."""
    wrong = []
    for name, digest in record["files"].items():
        path = export_dir / name
        if name not in edited and not (path.is_file() and file_sha256(path) == digest):
            state = "was changed after" if path.is_file() else "is missing since"
            wrong.append(f"{path} {state} the export")
    if wrong:
        raise MissingInputError(
            "\n  ".join(wrong) + "; run `kl-f8-train export --force` and `card` again"
        )


def read_record(export_dir: Path, needed: Collection[str] = ("files",)) -> dict[str, Any]:
    """export.json, which may be somebody else's: the files that it names lie inside the export.

    Raises MissingInputError if it is missing or damaged, lacks what is `needed`, or names other
    files.
    """
    path = export_dir / EXPORT_FILE
    if not path.is_file():
        raise MissingInputError(
            f"{export_dir} is not an export: no usable {EXPORT_FILE}; give "
            f"{export_meant(export_dir)}"
        )
    record = _json(path, "export")
    if not record.keys() >= set(needed):
        raise MissingInputError(f"{path} is of an older version. Run `kl-f8-train export` again")
    kinds = {**NEEDED, **FURTHER}
    typed = all(isinstance(record[key], kinds[key]) for key in kinds.keys() & record.keys())
    if not typed or not _are_inside(record["files"]):
        raise _other_json(path, "export")
    return record


def _are_inside(files: Mapping[str, Any]) -> bool:
    """Whether there are files, all with a hash, and none outside the export."""
    for name, digest in files.items():
        path = Path(name)
        if not isinstance(digest, str) or path.is_absolute() or ".." in path.parts:
            return False
    return bool(files)


def _sha256(path: Path) -> str:
    if not path.is_file():
        raise MissingInputError(f"{path}: no such file, but export.json names it")
    return file_sha256(path)


def _stored_settings(export_dir: Path, record: Mapping[str, Any]) -> Config:
    try:
        return configs.from_dict(record["config"])
    except UsageError as error:
        raise MissingInputError(f"{export_dir / EXPORT_FILE}: its config: {error}") from error


def _json(path: Path, verb: str) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, *DAMAGED) as error:
        raise MissingInputError(
            f"{path} is not JSON: {error}; expected what `kl-f8-train {verb}` writes: run it again"
        ) from error
    if not isinstance(values, dict):
        raise _other_json(path, verb)
    return values


def _other_json(path: Path, verb: str) -> MissingInputError:
    return MissingInputError(f"{path} is not what `kl-f8-train {verb}` writes: run it again")


def are_scores_of(scores_file: Path, export_dir: Path) -> bool:
    """Whether a scores.json is there and holds scores of the exported weights."""
    try:
        _evaluated(scores_file, _record(export_dir))
    except MissingInputError:
        return False
    return True


def _evaluated(scores_file: Path, record: Mapping[str, Any]) -> Evaluated:
    """Finds the exported weights among the evaluated ones, by their hash or their checkpoint's."""
    if not scores_file.is_file():
        raise MissingInputError(f"--scores {scores_file}: no such file")
    scores = _json(scores_file, "evaluate")
    for problem in _problems(scores):
        raise MissingInputError(
            f"{scores_file}: {problem}. Give scores.json as `kl-f8-train evaluate` writes it, or "
            "run that again"
        )
    for name, entry in scores["weights"].items():
        if entry["sha256"] in record["files"].values() or _is_source(entry, record):
            return Evaluated(_taken(scores), name, scores_file.with_name(STRIP).is_file())
    listed = "\n".join(
        f"  {name}: {entry['sha256']} ({entry.get('select', 'ema')})"
        for name, entry in scores["weights"].items()
    )
    raise MissingInputError(
        f"{scores_file} has no scores of these weights. It scored\n{listed or '  nothing'}\n"
        f"and this export is\n  {record['name']}: {next(iter(record['files'].values()))}\n"
        f"Run `kl-f8-train evaluate` on the exported file"
    )


def _problems(scores: Mapping[str, Any]) -> Iterator[str]:
    """Which parts of scores.json are missing or malformed: it may be of any version, or edited."""
    if "weights" not in scores:
        yield (
            'it holds no hashes of weights ("weights"), so it is unknown whether its scores '
            "belong to this export"
        )
    for key in ("weights", "models"):
        group = scores.get(key)
        if not (isinstance(group, dict) and all(isinstance(v, dict) for v in group.values())):
            yield f'"{key}" is not an entry for each model'
            return
    for name, entry in scores["weights"].items():
        if name not in scores["models"]:
            yield f'"models" has no scores of {name}'
        if not isinstance(entry.get("sha256"), str):
            yield f'"weights" has no sha256 of {name}'
        if not isinstance(entry.get("iteration"), int | None):
            yield f'"weights" has no whole number as iteration of {name}'
    protocol = scores.get("protocol")
    if not (isinstance(protocol, dict) and "name" in protocol):
        yield '"protocol" does not name one'
    if not isinstance(scores.get("images"), int):
        yield '"images" is not their number'
    if not isinstance(scores.get("unmeasured", {}), dict):
        yield '"unmeasured" is not a reason for each metric'
    if not isinstance(scores.get("warnings", []), list):
        yield '"warnings" is not a list'


def _is_source(entry: Mapping[str, Any], record: Mapping[str, Any]) -> bool:
    """Whether the scored weights are those of the checkpoint that were exported, in float32."""
    # A checkpoint holds several selections of weights. Half precision decodes slightly differently,
    # so scores of the checkpoint are those of an exported file only if one is float32.
    return (
        entry["sha256"] == record.get("source_sha256")
        and entry.get("select") == record["weights"]
        and (record["dtype"] == "float32" or DIFFUSERS in record["files"])
    )


def _taken(scores: Mapping[str, Any]) -> dict[str, Any]:
    """What a card keeps of scores.json: no path of one machine, and finite numbers only."""
    return {
        "models": {name: _finite_scores(row) for name, row in scores["models"].items()},
        **{key: scores[key] for key in ("weights", "protocol", "images")},
        "images_sha256": scores.get("images_sha256"),
        "unmeasured": {k: str(v) for k, v in scores.get("unmeasured", {}).items() if k in SCORES},
        "warnings": scores.get("warnings", []),
        "source": Path(str(scores.get("source") or "images")).name,
    }


def _finite_scores(row: Mapping[str, Any]) -> dict[str, Any]:
    """rFID, and other metrics' mean and deviation; None if that is missing or not finite."""
    found = {}
    for metric, value in row.items():
        numbers = [value]
        if metric != "rfid":
            numbers = [value.get("mean"), value.get("std")] if isinstance(value, dict) else [None]
        known = all(isinstance(number, int | float) and math.isfinite(number) for number in numbers)
        found[metric] = value if known else None
    return found


def family_served(config: Config, stated: Mapping[str, Any]) -> Family | None:
    """The family whose models can use this VAE; None if its shape or its latents are of no one."""
    fits = config.model in KL_F8_SHAPES.values()
    return FAMILIES.get(stated.get("family") or "") if fits else None


def _tags(config: Config, record: Mapping[str, Any]) -> list[str]:
    """The hub's tags: those of the family that the VAE serves, and its kind."""
    family = family_served(config, record.get("facts", {}))
    served = list(family.tags) if family else []
    if served and DIFFUSERS in record["files"]:
        served.append(f"{served[0]}-diffusers")
    kind = ["kl-f8"] if config.model == KL_F8 else []
    return [*served, "vae", "autoencoder", *kind]


def _front_matter(
    config: Config, record: Mapping[str, Any], details: Details, evaluated: Evaluated | None
) -> dict[str, Any]:
    """The hub's fields; what is not known is absent."""
    front: dict[str, Any] = {
        **details.license,
        **({"library_name": "diffusers"} if DIFFUSERS in record["files"] else {}),
        "pipeline_tag": "image-to-image",
        "tags": _tags(config, record),
    }
    if details.base_model:
        front["base_model"] = details.base_model
    if evaluated and (metrics := _measured(evaluated)):
        task = {"type": "image-to-image", "name": "Image reconstruction"}
        result = {"task": task, "dataset": _dataset(evaluated.scores), "metrics": metrics}
        front["model-index"] = [{"name": record["name"], "results": [result]}]
    return front


def _dataset(scores: Mapping[str, Any]) -> dict[str, str]:
    name = scores["source"]
    kind = re.sub(r"\W+", "-", name).strip("-").lower() or "images"
    protocol = scores["protocol"]["name"]
    return {"type": kind, "name": f"{name}, {scores['images']:,} images, protocol {protocol}"}


def _measured(evaluated: Evaluated) -> list[dict[str, Any]]:
    """Metrics for model-index, which the hub lists beside those of other models.

    So without the stand-in, distances of another VGG16, and rFID on few images, which is biased.
    """
    row = evaluated.scores["models"][evaluated.name]
    other = str(evaluated.scores["protocol"].get("perceptual")).endswith(OTHER_VGG)
    found = []
    for metric, kind in HUB_TYPES.items():
        biased = metric == "rfid" and evaluated.scores["images"] < BIASED_BELOW
        if other and metric in ("psim", "lpips"):
            continue
        if row.get(metric) is not None and not biased:
            value = row[metric] if metric == "rfid" else row[metric]["mean"]
            shown = round(value, SCORES[metric].digits)
            found.append({"type": kind, "name": SCORES[metric].label, "value": shown})
    return found


def _scale(stated: Mapping[str, Any]) -> str:
    """How a pipeline scales these latents, as their base states."""
    names = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast")
    return ", ".join(f"`{n}` {json.dumps(stated[n])}" for n in names if n in stated)


def _named_file(record: Mapping[str, Any]) -> str:
    """The export as `evaluate` takes it."""
    file = next(name for name in record["files"] if not name.endswith((".yaml", ".json")))
    return shlex.quote(f"{record['name']}={file}")


def _evaluation(evaluated: Evaluated) -> dict[str, Any]:
    """Table, notes, the strip's description and protocol."""
    scores = evaluated.scores
    protocol = {
        **scores["protocol"],
        "images": f"{scores['images']:,}",
        "image list SHA-256": scores["images_sha256"],
    }
    facts = [(_cell(key), _cell(value)) for key, value in protocol.items() if value is not None]
    notes = not_measured(scores["unmeasured"]) + scores["warnings"]
    return {
        "dataset": _cell(_dataset(scores)["name"]),
        "scores": _table(evaluated),
        "notes": [_cell(note) for note in notes],
        "strip_text": _strip_text(scores),
        "protocol": markdown_table(("protocol", ""), facts),
    }


def _strip_text(scores: Mapping[str, Any]) -> str:
    names = ", ".join(_cell(name) for name in scores["models"])
    return re.sub(r"([\[\]])", r"\\\1", f"From left to right: input, {names}")


def _table(evaluated: Evaluated) -> str:
    rows = evaluated.scores["models"]
    columns, lines = [*HUB_TYPES], []
    if any(row.get("st_lpips") for row in rows.values()):
        columns.append("st_lpips")
    for name, row in rows.items():
        iteration = evaluated.scores.get("weights", {}).get(name, {}).get("iteration")
        step = "" if iteration is None else f"{iteration:,}"
        title = f"**{_cell(name)}**" if name == evaluated.name else _cell(name)
        lines.append([title, step, *(score_text(row.get(c), SCORES[c]) for c in columns)])
    return markdown_table(["model", "iteration", *(SCORES[c].label for c in columns)], lines)


def _cell(value: Any) -> str:
    """A string that neither ends a table's cell nor becomes markup; a mapping in one line."""
    if isinstance(value, Mapping):
        value = ", ".join(f"{key} {entry}" for key, entry in value.items())
    text = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([|`*])", r"\\\1", text)
