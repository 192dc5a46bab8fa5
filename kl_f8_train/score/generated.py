"""Decodes latents that no photograph belongs to, such as a sampler's, with every VAE.

Nothing shows what such an image should be, so nothing here is a quality: each VAE's sharpness and
colours, how far two VAEs are apart on the same latents, and pictures of both. Given photographs of
the same kind, also FID against them: the Frechet distance of Inception's features. Latents are
decoded one at a time, as they may have any size.
"""

import csv
import io
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kl_f8_train import images as pixels
from kl_f8_train.core import metrics
from kl_f8_train.core.metrics import METRICS, FeatureStatistics, Metric
from kl_f8_train.errors import RunFailedError, UsageError
from kl_f8_train.files import check_writable, file_sha256, write_json, write_text
from kl_f8_train.launch import world_size
from kl_f8_train.output import Progress, markdown_table
from kl_f8_train.output import say as say_aloud
from kl_f8_train.score import report, saved_latents
from kl_f8_train.score.candidates import Candidate, autoencoder, load_candidates
from kl_f8_train.score.image_set import ImageSet
from kl_f8_train.score.inception import FEATURES, Inception
from kl_f8_train.score.measure import (
    Networks,
    describe_networks,
    exact_float32,
    find_networks,
    own_device,
    score,
)
from kl_f8_train.score.protocol import CARD, Protocol
from kl_f8_train.score.saved_latents import SavedLatent, Scale
from kl_f8_train.score.scores import (
    BIASED_BELOW,
    PICTURES,
    mean_std,
    network_caveats,
    slugs,
    weights_line,
)
from kl_f8_train.units import counted

OWN = {  # of a decoded image by itself
    "sharpness": METRICS["sharpness"],
    "red": Metric("red", 1, None, "levels"),
    "green": Metric("green", 1, None, "levels"),
    "blue": Metric("blue", 1, None, "levels"),
    "saturation": Metric("saturation", 1, None, "levels"),
    "clipped": Metric("clipped %", 2, None),
}
FID = Metric("FID", 2, "lower")
STRIP_SIDE = 3072  # pixels of strip.png, about, either way


@dataclass
class Found:
    """Results over the latents: scores of each VAE's images, and of each pair of VAEs."""

    own: dict[str, list[dict[str, float]]]
    pairs: dict[tuple[str, str], list[dict[str, float]]]
    statistics: dict[str, FeatureStatistics] = field(default_factory=dict)
    deviations: list[float] = field(default_factory=list)  # of each file's values
    pictures: list[dict[str, Any]] = field(default_factory=list)


def evaluate_latents(
    named: Sequence[tuple[str, Path, str]],
    where: str,
    out: Path,
    *,
    scaled: str | None = None,
    photographs: str | None = None,
    size: int | None = None,
    limit: int | None = None,
    protocol: Protocol = CARD,
    perceptual_name: str = "lpips_vgg",
    vgg: str | None = None,
    inception: str | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Decodes the latents saved in a folder or file with weights (name, file, "ema" or "raw").

    `scaled` is "no", "yes" or a family, for files that do not say; `photographs` a folder or
    shards for FID, cut to squares of `size` pixels (None: the shorter side of the first decoded
    image). Writes decoded.json, per_latent.csv, table.md, strip.png and pictures to `out`, prints
    the table, and returns what decoded.json holds. Raises MissingInputError for files that are not
    there or hold something else, UsageError if their scale is not known or they do not fit a VAE.
    """
    if world_size() > 1:
        raise UsageError("--latents takes one process; start it without torchrun")
    latents = saved_latents.survey(Path(where), limit)
    candidates = load_candidates(named, "cpu")
    vaes = [(c.name, c.facts, autoencoder(c).embed_dim) for c in candidates]
    for vae in candidates:
        model = autoencoder(vae)
        saved_latents.check_fit(latents, vae.name, model.embed_dim, model.downsampling)
    scales = saved_latents.scales(latents, scaled, vaes)
    side = size or min(latents[0].shape[1:]) * autoencoder(candidates[0]).downsampling
    images = ImageSet(photographs, side, warn=say_aloud, out=out) if photographs else None
    check_writable(out)
    with exact_float32():
        device = own_device(device)
        name = perceptual_name if len(vaes) > 1 else None
        networks = find_networks(name, vgg, inception, device, say_aloud, bool(photographs))
        counts = f"{counted(len(vaes), 'model', 's')}, {counted(len(latents), 'latent', 's')}"
        for line in (counts, *saved_latents.describe(latents, scales)):
            say_aloud(line)
        for vae in candidates:
            vae.model.to(device)
        found = _decode_all(latents, scales, candidates, networks, protocol, out, device, progress)
        conditions = {
            **_conditions(latents, scales, scaled, protocol),
            **describe_networks(networks),
        }
        reference = None
        if images and networks.inception:
            reference = _photograph_features(images, networks.inception, device)
            conditions |= {"photographs": photographs, "photographs_size": side}
        result = _summarise(found, candidates, conditions, networks, reference, where)
        warnings = _scale_doubts(latents, scales, found, vaes)
        result["warnings"] = [*warnings, *result["warnings"]]
        result["latents"] = len(latents)
    _write(out, result, latents, found)
    say_aloud(summary_text(result))
    return result


# --- decoding -------------------------------------------------------------------------------


@torch.no_grad()
def _decode_all(
    latents: Sequence[SavedLatent],
    scales: Mapping[str, Scale],
    candidates: Sequence[Candidate],
    networks: Networks,
    protocol: Protocol,
    out: Path,
    device: str,
    progress: Progress | None,
) -> Found:
    """Decodes each latent with each VAE; writes the pictures of the first few."""
    names = [candidate.name for candidate in candidates]
    found = Found(
        {name: [] for name in names}, {pair: [] for pair in itertools.combinations(names, 2)}
    )
    if networks.inception is not None:
        found.statistics = {name: FeatureStatistics.empty(FEATURES, device) for name in names}
    former = _former_pictures(out)
    for number, (latent, loaded) in enumerate(saved_latents.load_latents(latents)):
        values = loaded.to(device)
        found.deviations.append(float(values.std()))
        z = scales[latent.says].undo(values)  # (1, C, h, w), as an encoder makes them
        levels = dict(_decoded(candidates, z, latent, protocol, found))
        for name, image in levels.items():
            if networks.inception is not None:
                found.statistics[name].add(networks.inception(image))
        for (a, b), scores in found.pairs.items():
            scores.append(pair_scores(levels[a], levels[b], networks))
        if number < PICTURES:
            found.pictures.append(_write_pictures(out, number, latent.name, levels))
        if progress is not None:
            progress(number + 1, len(latents))
    # Pictures of an earlier evaluation in this folder.
    for path in former - _paths(found.pictures):
        (out / path).unlink(missing_ok=True)
    return found


def _decoded(
    candidates: Sequence[Candidate],
    z: Tensor,
    latent: SavedLatent,
    protocol: Protocol,
    found: Found,
) -> Iterator[tuple[str, Tensor]]:
    """(name of the VAE, uint8 (1, 3, H, W)); notes the scores of the images by themselves."""
    for candidate in candidates:
        output = autoencoder(candidate).decode(z)
        if not bool(output.isfinite().all()):
            raise RunFailedError(
                f"{candidate.name}: decodes {latent.name} to values that are not finite; its "
                "weights are broken, or the latents are of other models"
            )
        levels = pixels.to_uint8(output, protocol.quantize)
        found.own[candidate.name].append(own_scores(output, levels))
        yield candidate.name, levels


def own_scores(output: Tensor, levels: Tensor) -> dict[str, float]:
    """The metrics in OWN: output (1, 3, H, W) of a decoder, about [-1, 1], and its 8-bit image.

    Colours are means of 8-bit levels, saturation that of the largest channel minus the smallest;
    `clipped` is the share of values beyond [-1, 1].
    """
    image = levels.double() / 255.0
    red, green, blue, saturation = metrics.colour_shift(torch.zeros_like(image), image)[0].tolist()
    return {
        "sharpness": float(metrics.sharpness(image)),
        "red": red,
        "green": green,
        "blue": blue,
        "saturation": saturation,
        "clipped": 100.0 * float((output.abs() > 1.0).double().mean()),
    }


def pair_scores(a: Tensor, b: Tensor, networks: Networks) -> dict[str, float]:
    """How far two uint8 (1, 3, H, W) decodes of one latent are apart; shifts are b minus a."""
    scores = score(a, b, network=networks.perceptual)
    return {name: float(value) for name, value in scores.items() if name != "sharpness"}


@torch.no_grad()
def _photograph_features(images: ImageSet, inception: Inception, device: str) -> FeatureStatistics:
    """Inception's statistics of photographs; unreadable ones are left out and reported."""
    statistics = FeatureStatistics.empty(FEATURES, device)
    for sample in images.stream(range(images.count), threads=2):
        if sample.image is None:
            say_aloud(sample.problem)
        else:
            statistics.add(inception(sample.image[None].to(device)))
    return statistics


# --- what was found -------------------------------------------------------------------------


def _conditions(
    latents: Sequence[SavedLatent],
    scales: Mapping[str, Scale],
    scaled: str | None,
    protocol: Protocol,
) -> dict[str, Any]:
    return {
        "quantize": f"clamped, {protocol.quantize} to 8 bit",
        "latents_scaled": scaled if saved_latents.UNSAID in scales else None,
        "scale": saved_latents.describe(latents, dict(scales)),
    }


def _summarise(
    found: Found,
    candidates: Sequence[Candidate],
    conditions: Mapping[str, Any],
    networks: Networks,
    reference: FeatureStatistics | None,
    where: str,
) -> dict[str, Any]:
    """The contents of decoded.json: means and population deviations over the latents."""
    warnings = []
    models: dict[str, dict[str, Any]] = {}
    for name, rows in found.own.items():
        models[name] = _means(rows) | {"fid": None}
        if reference is not None and min(reference.count, len(rows)) >= 2:
            own = found.statistics[name]
            models[name]["fid"] = metrics.frechet_distance(reference, own)
    if reference is not None:
        fewest = min(reference.count, *(len(rows) for rows in found.own.values()))
        if fewest < 2:
            warnings.append("FID needs two latents and two photographs")
        elif fewest < BIASED_BELOW:
            warnings.append(
                f"FID on {fewest:,} images is biased: fewer than {BIASED_BELOW:,}; compare only "
                "VAEs on the same latents and photographs"
            )
    network = networks.perceptual
    stand_in = network is not None and network.name != "lpips_vgg"
    warnings += network_caveats(stand_in, conditions)
    return {
        "models": models,
        "pairs": [{"a": a, "b": b, **_means(rows)} for (a, b), rows in found.pairs.items()],
        "unmeasured": dict(networks.unmeasured),
        "warnings": warnings,
        "protocol": dict(conditions),
        "weights": {candidate.name: dict(candidate.record) for candidate in candidates},
        "source": where,
        "pictures": found.pictures,
    }


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    return {name: mean_std([row[name] for row in rows]) for name in rows[0]}


def _scale_doubts(
    latents: Sequence[SavedLatent],
    scales: Mapping[str, Scale],
    found: Found,
    vaes: Sequence[tuple[str, Any, int]],
) -> list[str]:
    """A warning if the latents that do not say their scale look as if it were another."""
    own = [
        deviation
        for latent, deviation in zip(latents, found.deviations, strict=True)
        if latent.says == saved_latents.UNSAID and math.isfinite(deviation)
    ]
    factors = [facts.scaling_factor for _, facts, _ in vaes if facts.scaling_factor]
    scale = scales.get(saved_latents.UNSAID)
    if not own or scale is None or not (factors or scale.factor != 1.0):
        return []
    # The median: a few odd latents say nothing about the scale of all.
    scaled = scale != Scale()
    factor = scale.factor if scaled else factors[0]
    doubt = saved_latents.doubt(float(np.median(own)), factor, scaled)
    return [doubt] if doubt else []


# --- files ----------------------------------------------------------------------------------


def _write(
    out: Path, result: Mapping[str, Any], latents: Sequence[SavedLatent], found: Found
) -> None:
    files = sorted({latent.path for latent in latents})
    kept = {**result, "sha256": {path.name: file_sha256(path) for path in files[:1000]}}
    write_json(out / "decoded.json", kept)
    write_text(out / "table.md", summary_text(result) + "\n")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "latent", *OWN])
    for name, rows in found.own.items():
        for latent, row in zip(latents, rows, strict=True):
            writer.writerow([name, latent.name, *(f"{row[metric]:.6g}" for metric in OWN)])
    write_text(out / "per_latent.csv", text.getvalue())
    _write_strip(out, found.pictures)


def summary_text(result: Mapping[str, Any]) -> str:
    """The tables of VAEs and of pairs, and what they depend on."""
    blocks = [_own_table(result), *([_pair_table(result)] if result["pairs"] else [])]
    protocol = result["protocol"]
    size = protocol.get("photographs_size")
    against = f" FID against {protocol['photographs']}, {size} x {size} crops." if size else ""
    blocks.append(
        f"{counted(result['latents'], 'latent', 's')} from {result['source']}; "
        f"{'; '.join(protocol['scale'])}. {protocol['quantize']}; colours are mean 8-bit levels."
        f"{against}"
    )
    blocks.append(weights_line(result["weights"]))
    blocks += [f"Warning: {warning}." for warning in result["warnings"]]
    return "\n\n".join(blocks)


def _own_table(result: Mapping[str, Any]) -> str:
    with_fid = any(row["fid"] is not None for row in result["models"].values())
    rows = [
        [
            name,
            *([f"{row['fid']:.{FID.digits}f}"] if with_fid else []),
            *(_cell(row[key], metric) for key, metric in OWN.items()),
        ]
        for name, row in result["models"].items()
    ]
    head = ["model", *([FID.label] if with_fid else []), *(m.label for m in OWN.values())]
    return markdown_table(head, rows)


def _pair_table(result: Mapping[str, Any]) -> str:
    """How far two VAEs are apart on the same latents; shifts are the second minus the first."""
    keys = [key for key in METRICS if any(key in pair for pair in result["pairs"])]
    rows = [
        [f"{pair['b']} to {pair['a']}", *(_cell(pair[key], METRICS[key]) for key in keys)]
        for pair in result["pairs"]
    ]
    return markdown_table(["difference", *(METRICS[key].label for key in keys)], rows)


def _cell(value: Mapping[str, float] | None, metric: Metric) -> str:
    if value is None:
        return "equal"  # every PSNR of a pair is infinite
    return f"{value['mean']:.{metric.digits}f} +/- {value['std']:.{metric.digits}f}"


# --- pictures -------------------------------------------------------------------------------


def _write_pictures(
    out: Path, number: int, name: str, levels: Mapping[str, Tensor]
) -> dict[str, Any]:
    """PNGs of each VAE's image, and maps of where each differs from the first."""
    names = list(levels)
    models, differences = {}, {}
    for vae, slug in zip(names, slugs(names), strict=True):
        models[vae] = f"pictures/{number:04d}-{slug}.png"
        report.save_png(out / models[vae], levels[vae][0])
        if vae != names[0]:
            differences[vae] = f"errors/{number:04d}-{slug}.png"
            report.save_png(
                out / differences[vae],
                report.error_map(levels[names[0]][0].cpu(), levels[vae][0].cpu()),
            )
    return {"latent": name, "models": models, "differences": differences}


def _write_strip(out: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """A row for each latent of the first's size, a column for each VAE and each difference."""
    rows = [(_load(out, entry["models"]), entry["differences"]) for entry in entries]
    base, first = next(iter(rows[0][0].items()))
    fitting = [row for row in rows if row[0][base].shape == first.shape]
    columns: dict[str, list[Tensor]] = {}
    for shown, differences in fitting[
        : max(1, min(report.STRIP_ROWS, STRIP_SIDE // first.shape[1]))
    ]:
        shown |= {f"|{n} - {base}|": p for n, p in _load(out, differences).items()}
        for name, picture in shown.items():
            columns.setdefault(name, []).append(picture)
    report.save_png(out / "strip.png", report.strip(list(columns.items())))


def _paths(entries: Sequence[Mapping[str, Any]]) -> set[str]:
    return {
        p for entry in entries for kind in ("models", "differences") for p in entry[kind].values()
    }


def _former_pictures(out: Path) -> set[str]:
    """Pictures that an earlier call has written to `out`."""
    listed = out / "decoded.json"
    text = listed.read_text(encoding="utf-8", errors="replace") if listed.is_file() else ""
    return set(re.findall(r'"((?:pictures|errors)/\d{4}-[a-z0-9-]+\.png)"', text))


def _load(out: Path, paths: Mapping[str, str]) -> dict[str, Tensor]:
    return {name: pixels.decode((out / path).read_bytes()) for name, path in paths.items()}
