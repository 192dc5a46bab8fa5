"""Decodes latents that no photograph belongs to, such as a sampler's, with every VAE.

Nothing shows what such an image should be, so nothing here is a quality: each VAE's sharpness and
colours, how far two VAEs are apart on the same latents, and pictures of both. Given photographs of
the same kind, also FID against them: the Frechet distance of Inception's features. Latents are
decoded one at a time, as they may have any size.
"""

import itertools
import math
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
from kl_f8_train.facts import Facts
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
    PICTURES,
    bias_caveats,
    mean_std,
    network_caveats,
    score_text,
    slugs,
    warning_lines,
    weights_line,
    write_csv,
)
from kl_f8_train.units import counted

OWN = {  # of a decoded image by itself
    "sharpness": METRICS["sharpness"],
    **{colour: Metric(colour, 1, None, "levels") for colour in metrics.COLOURS},
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
    count: int = 0  # of latents


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
        described = saved_latents.describe(latents, scales)
        say_aloud("\n".join([counts, *described]))
        found = _decode_all(latents, scales, candidates, networks, protocol, out, device, progress)
        conditions = {
            "quantize": protocol.describe()["quantize"],
            "latents_scaled": scaled if saved_latents.UNSAID in scales else None,
            "scale": described,
            **describe_networks(networks),
        }
        reference = None
        if images and networks.inception:
            reference = _photograph_features(images, networks.inception, device)
            conditions |= {"photographs": photographs, "photographs_size": side}
        doubts = _scale_doubts(found.deviations, scales.get(saved_latents.UNSAID, Scale()), vaes)
        result = _summarise(found, candidates, conditions, networks, reference, doubts, where)
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
    for vae in candidates:
        vae.model.to(device)
    names = [candidate.name for candidate in candidates]
    found = Found(
        {name: [] for name in names}, {pair: [] for pair in itertools.combinations(names, 2)}
    )
    if networks.inception is not None:
        found.statistics = {name: FeatureStatistics.empty(FEATURES, device) for name in names}
    for number, (latent, loaded) in enumerate(saved_latents.load_latents(latents)):
        values = loaded.to(device)
        if latent.says == saved_latents.UNSAID:
            found.deviations.append(float(values.std()))
        z = scales[latent.says].undo(values)  # (1, C, h, w), as an encoder makes them
        levels: dict[str, Tensor] = {}  # of each VAE, uint8 (1, 3, H, W)
        for vae in candidates:
            output = _decode(vae, z, latent)
            levels[vae.name] = pixels.to_uint8(output, protocol.quantize)
            found.own[vae.name].append(own_scores(output, levels[vae.name]))
            if networks.inception is not None:
                found.statistics[vae.name].add(networks.inception(levels[vae.name]))
        for (a, b), rows in found.pairs.items():  # shifts are b minus a
            apart = score(levels[a], levels[b], network=networks.perceptual)
            rows.append({key: float(value) for key, value in apart.items() if key != "sharpness"})
        if number < PICTURES:
            found.pictures.append(_write_pictures(out, number, latent.name, levels))
        found.count = number + 1
        if progress is not None:
            progress(found.count, len(latents))
    return found


def _decode(vae: Candidate, z: Tensor, latent: SavedLatent) -> Tensor:
    output = autoencoder(vae).decode(z)
    if not bool(output.isfinite().all()):
        raise RunFailedError(
            f"{vae.name}: decodes {latent.name} to values that are not finite; its weights are "
            "broken, or the latents are of other models"
        )
    return output


def own_scores(output: Tensor, levels: Tensor) -> dict[str, float]:
    """The metrics in OWN: output (1, 3, H, W) of a decoder, about [-1, 1], and its 8-bit image.

    Colours are means of 8-bit levels, saturation that of the largest channel minus the smallest;
    `clipped` is the share of values beyond [-1, 1].
    """
    image = levels.double() / 255.0
    colours = metrics.colour_shift(torch.zeros_like(image), image)[0]
    return {
        "sharpness": float(metrics.sharpness(image)),
        **dict(zip(metrics.COLOURS, colours.tolist(), strict=True)),
        "clipped": 100.0 * float((output.abs() > 1.0).double().mean()),
    }


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


def _summarise(
    found: Found,
    candidates: Sequence[Candidate],
    conditions: Mapping[str, Any],
    networks: Networks,
    reference: FeatureStatistics | None,
    doubts: Sequence[str],
    where: str,
) -> dict[str, Any]:
    """Contents of decoded.json: means and population deviations over the latents, and warnings."""
    models = {name: {**_means(rows), "fid": None} for name, rows in found.own.items()}
    warnings = list(doubts)
    if reference is not None:
        fewest = min(reference.count, *(own.count for own in found.statistics.values()))
        if fewest < 2:
            warnings.append("FID needs two latents and two photographs")
        else:
            for name, own in found.statistics.items():
                models[name]["fid"] = metrics.frechet_distance(reference, own)
            remedy = "compare only VAEs on the same latents and photographs"
            warnings += bias_caveats("FID", fewest, remedy)
    network = networks.perceptual
    stand_in = network is not None and network.name != "lpips_vgg"
    return {
        "models": models,
        "pairs": [{"a": a, "b": b, **_means(rows)} for (a, b), rows in found.pairs.items()],
        "unmeasured": networks.unmeasured,
        "warnings": warnings + network_caveats(stand_in, conditions),
        "protocol": conditions,
        "weights": {candidate.name: candidate.record for candidate in candidates},
        "source": where,
        "pictures": found.pictures,
        "latents": found.count,
    }


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    return {name: mean_std([row[name] for row in rows]) for name in rows[0]}


def _scale_doubts(
    deviations: Sequence[float], scale: Scale, vaes: Sequence[tuple[str, Facts, int]]
) -> list[str]:
    """A warning if the latents that do not say their scale look as if it were another."""
    own = [deviation for deviation in deviations if math.isfinite(deviation)]
    scaled = scale != Scale()
    stated = [facts.scaling_factor for _, facts, _ in vaes if facts.scaling_factor]
    factors = [scale.factor] if scaled else stated
    if not own or not factors:
        return []
    # The median: a few odd latents say nothing about the scale of all.
    doubt = saved_latents.doubt(float(np.median(own)), factors[0], scaled)
    return [doubt] if doubt else []


# --- files ----------------------------------------------------------------------------------


def _write(
    out: Path, result: Mapping[str, Any], latents: Sequence[SavedLatent], found: Found
) -> None:
    files = sorted({latent.path for latent in latents})
    former = report.listed_pictures(out / "decoded.json")
    kept = {**result, "sha256": {path.name: file_sha256(path) for path in files[:1000]}}
    write_json(out / "decoded.json", kept)
    for path in former - report.listed_pictures(out / "decoded.json"):
        (out / path).unlink(missing_ok=True)
    write_text(out / "table.md", summary_text(result) + "\n")
    rows = [["model", "latent", *OWN]]
    for name, scores in found.own.items():
        for latent, row in zip(latents, scores, strict=True):
            rows.append([name, latent.name, *(f"{row[metric]:.6g}" for metric in OWN)])
    write_csv(out / "per_latent.csv", rows)
    _write_strip(out, latents, found.pictures)


def summary_text(result: Mapping[str, Any]) -> str:
    """The tables of VAEs and of pairs, and what they depend on."""
    protocol = result["protocol"]
    size = protocol.get("photographs_size")
    against = f" FID against {protocol['photographs']}, {size} x {size} crops." if size else ""
    blocks = [
        *_tables(result),
        f"{counted(result['latents'], 'latent', 's')} from {result['source']}; "
        f"{'; '.join(protocol['scale'])}. {protocol['quantize']}; colours are mean 8-bit levels."
        f"{against}",
        weights_line(result["weights"]),
        *warning_lines(result["warnings"]),
    ]
    return "\n\n".join(blocks)


def _tables(result: Mapping[str, Any]) -> Iterator[str]:
    """Each VAE, and each pair: how far the second is from the first on the same latents."""
    models, pairs = result["models"], result["pairs"]
    with_fid = any(row["fid"] is not None for row in models.values())
    yield _table("model", models, {"fid": FID, **OWN} if with_fid else OWN)
    if pairs:
        columns = {key: metric for key, metric in METRICS.items() if key in pairs[0]}
        yield _table("difference", {f"{p['b']} to {p['a']}": p for p in pairs}, columns)


def _table(title: str, rows: Mapping[str, Mapping[str, Any]], columns: Mapping[str, Metric]) -> str:
    """In Markdown; a mean is missing where every PSNR of a pair is infinite."""
    lines = []
    for name, row in rows.items():
        cells = [score_text(row[key], metric, "equal") for key, metric in columns.items()]
        lines.append([name, *cells])
    return markdown_table([title, *(metric.label for metric in columns.values())], lines)


# --- pictures -------------------------------------------------------------------------------


def _write_pictures(
    out: Path, number: int, name: str, levels: Mapping[str, Tensor]
) -> dict[str, Any]:
    """PNGs of each VAE's image, and maps of where each differs from the first."""
    names = list(levels)
    base = levels[names[0]][0].cpu()  # (3, H, W)
    models, differences = {}, {}
    for vae, slug in zip(names, slugs(names), strict=True):
        models[vae] = f"pictures/{number:04d}-{slug}.png"
        report.save_png(out / models[vae], levels[vae][0])
        if vae != names[0]:
            differences[vae] = f"errors/{number:04d}-{slug}.png"
            report.save_png(out / differences[vae], report.error_map(base, levels[vae][0].cpu()))
    return {"latent": name, "models": models, "differences": differences}


def _write_strip(
    out: Path, latents: Sequence[SavedLatent], entries: Sequence[Mapping[str, Any]]
) -> None:
    """A row for each latent of the first's size, a column for each VAE and each difference."""
    shapes = [latent.shape for latent in latents]
    fitting = [entry for entry, shape in zip(entries, shapes, strict=False) if shape == shapes[0]]
    base, first = next(iter(fitting[0]["models"].items()))
    height = report.load_picture(out / first).shape[1]
    columns: dict[str, list[Tensor]] = {}
    for entry in fitting[: max(1, min(report.STRIP_ROWS, STRIP_SIDE // height))]:
        maps = {f"|{name} - {base}|": path for name, path in entry["differences"].items()}
        for label, path in {**entry["models"], **maps}.items():
            columns.setdefault(label, []).append(report.load_picture(out / path))
    report.save_png(out / "strip.png", report.strip(list(columns.items())))
