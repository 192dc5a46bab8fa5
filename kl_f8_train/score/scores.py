"""The results of an evaluation, as summary, table and files.

A metric's values, one for each image, become mean and deviation, and a set of features a Frechet
distance; all conditions that they depend on are written with them.
"""

import csv
import hashlib
import io
import itertools
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kl_f8_train.core import metrics
from kl_f8_train.core.metrics import METRICS, SCORES, FeatureStatistics, Metric
from kl_f8_train.core.perceptual import OTHER_VGG
from kl_f8_train.errors import MissingInputError
from kl_f8_train.files import write_json, write_text
from kl_f8_train.output import markdown_table
from kl_f8_train.score.compare import not_measured
from kl_f8_train.units import are, counted

BIASED_BELOW = 2048  # images; the width of Inception's features
PICTURES = 24  # images shown, at most
WARNINGS = 20  # below a table, at most
FIRST_FEW = 4  # of them, whatever their scores
LONGEST = 60  # letters of a model in a file name
SHIFT_METRICS = tuple(f"{name}_shift" for name in metrics.COLOURS)


@dataclass
class ImageScores:
    """The scores of one image."""

    index: int
    key: str
    sha256: str
    sharpness: float  # of the image itself
    scores: np.ndarray  # (VAEs, measured metrics), float64
    enlarged: bool = False  # smaller than what it was scored at
    profile: str = ""  # the colour profile it was converted from


@dataclass
class Tally:
    """The measurements of one process."""

    measured: tuple[str, ...]  # the metrics of the rows' scores
    rows: list[ImageScores] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    statistics: list[FeatureStatistics] = field(default_factory=list)  # images, then each VAE


def summarise(
    tally: Tally,
    weights: Mapping[str, Mapping[str, Any]],
    protocol: Mapping[str, Any],
    unmeasured: Mapping[str, str],
    where: str,
) -> dict[str, Any]:
    """The contents of scores.json: means and deviations, and all that they depend on.

    `weights`: name of each VAE -> what is known of its file, in the order of the rows' scores.
    Raises MissingInputError if no image could be used.
    """
    if not tally.rows:
        why = tally.problems[0]
        raise MissingInputError(f"no image of {where} can be used: {why}; give others")
    warnings = list(tally.problems)
    unmeasured = dict(unmeasured)
    models: dict[str, dict[str, Any]] = {}
    of_images = np.stack([row.scores for row in tally.rows])  # (images, VAEs, metrics)
    for number, model in enumerate(weights):
        values = dict(zip(tally.measured, of_images[:, number].T.tolist(), strict=True))
        models[model] = {
            **{name: None for name in METRICS if name != "st_lpips"},
            **{name: mean_std(column) for name, column in values.items()},
            "rfid": None,
        }
        infinite = sum(map(math.isinf, values["psnr"]))
        if infinite:
            warnings.append(f"{model}: {infinite} infinite PSNR left out of the mean")
    perfect = ", ".join(model for model in models if models[model]["psnr"] is None)
    if perfect:
        unmeasured["psnr"] = f"infinite: every reconstruction by {perfect} equals its input"
    if tally.statistics and len(tally.rows) < 2:
        unmeasured["rfid"] = "a covariance needs two images"
    elif tally.statistics:
        for model, own in zip(weights, tally.statistics[1:], strict=True):
            models[model]["rfid"] = metrics.frechet_distance(tally.statistics[0], own)
    return {
        "models": models,
        "unmeasured": unmeasured,
        "warnings": warnings + _caveats(tally, protocol),
        "protocol": dict(protocol),
        "weights": dict(weights),
        "images": len(tally.rows),
        "converted": dict(Counter(row.profile for row in tally.rows if row.profile).most_common()),
        "images_sha256": images_sha256(tally.rows),
        "input": {"sharpness": mean_std([row.sharpness for row in tally.rows])},
        "source": where,
    }


def _caveats(tally: Tally, protocol: Mapping[str, Any]) -> list[str]:
    """Reasons why these scores cannot be compared with others."""
    caveats = []
    enlarged = sum(row.enlarged for row in tally.rows)
    if enlarged:
        caveats.append(
            f"{counted(enlarged, 'image', 's')} of {len(tally.rows):,} had fewer than "
            f"{protocol['size']} pixels and were enlarged: blurred, so easy to reconstruct"
        )
    if tally.statistics and len(tally.rows) >= 2:
        remedy = "compare only with rFID on the same images"
        caveats += bias_caveats("rFID", len(tally.rows), remedy)
    return caveats + network_caveats("st_lpips" in tally.measured, protocol)


def bias_caveats(label: str, count: int, remedy: str) -> list[str]:
    """What keeps a Frechet distance of `count` images from being compared with others."""
    if count >= BIASED_BELOW:
        return []
    return [f"{label} on {count:,} images is biased: fewer than {BIASED_BELOW:,}; {remedy}"]


def network_caveats(stand_in: bool, protocol: Mapping[str, Any]) -> list[str]:
    """What keeps distances of another perceptual network from being compared with others."""
    caveats = ["ST-LPIPS is a stand-in: it is neither LPIPS nor PSIM"] if stand_in else []
    if str(protocol.get("perceptual")).endswith(OTHER_VGG):
        caveats.append(
            "LPIPS and PSIM are measured on a VGG16 that is not the published one, and cannot be "
            "compared with published scores"
        )
    return caveats


def mean_std(values: Sequence[float]) -> dict[str, float] | None:
    """Mean and population deviation of what is finite; None if nothing is.

    The authors left out infinite PSNR as well.
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return None
    mean = math.fsum(finite) / len(finite)
    variance = math.fsum((value - mean) ** 2 for value in finite) / len(finite)
    return {"mean": mean, "std": math.sqrt(variance)}


def images_sha256(rows: Sequence[ImageScores]) -> str:
    """One hash of all names and pixels, whatever their order."""
    lines = sorted(f"{row.key}\0{row.sha256}\n" for row in rows)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


# --- files ----------------------------------------------------------------------------------


def write_scores(out: Path, result: Mapping[str, Any], tally: Tally) -> None:
    """Writes scores.json, table.md and per_image.csv."""
    write_json(out / "scores.json", result)
    write_text(out / "table.md", f"{table(result)}\n\n{footer(result)}\n")
    names = [name for name in METRICS if name != "st_lpips" or name in tally.measured]
    lines = [["model", "image", *names]]
    for number, model in enumerate(result["models"]):
        for row in tally.rows:
            values = dict(zip(tally.measured, row.scores[number].tolist(), strict=True))
            cells = [f"{values[name]:.6g}" if name in values else "" for name in names]
            lines.append([model, row.key, *cells])
    write_csv(out / "per_image.csv", lines)


def write_csv(path: Path, rows: Sequence[Sequence[str]]) -> None:
    """Writes a CSV file atomically."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text(path, text.getvalue())


def screen(result: Mapping[str, Any], said: Collection[str] = ()) -> str:
    """Table and footer for a terminal: no column that no model has a score in.

    Reasons of the metrics in `said`, which were printed before, are left out.
    """
    reasons = {name: why for name, why in result["unmeasured"].items() if name not in said}
    shown = {**result, "unmeasured": reasons}
    return f"{table(shown, measured_only=True)}\n\n{footer(shown)}"


def table(result: Mapping[str, Any], measured_only: bool = False) -> str:
    """The card's table in Markdown, of what scores.json holds, and that of tiled decoding.

    `measured_only`: no column that no model has a score in.
    """
    models: Mapping[str, Mapping[str, Any]] = result["models"]
    columns = [metric for metric in SCORES if metric not in SHIFT_METRICS]
    if not any("st_lpips" in scores for scores in models.values()):
        columns.remove("st_lpips")  # which stands in for psim and lpips
    if measured_only:
        measured = {metric for scores in models.values() for metric in scores if scores[metric]}
        columns = [metric for metric in columns if metric in {"psnr", *measured}]
    with_sigma = any("latent_noise" in weights for weights in result["weights"].values())
    head = ["model", "iteration", *["sigma"] * with_sigma]
    rows = []
    for name, scores in models.items():
        weights = result["weights"][name]
        step = weights["iteration"]
        cells = [weights.get("vae", name), "" if step is None else f"{step:,}"]
        if with_sigma:
            cells.append("" if weights.get("baseline") else f"{weights.get('latent_noise', 0):g}")
        for metric in columns:
            missing = "infinite" if metric == "psnr" else "not measured"
            cells.append(score_text(scores.get(metric), SCORES[metric], missing))
        rows.append(cells)
    text = markdown_table([*head, *(SCORES[name].label for name in columns)], rows)
    return f"{text}\n\n{seam_table(result['tiled'])}" if "tiled" in result else text


def seam_table(summary: Mapping[str, Any]) -> str:
    """Tiled against whole decoding in Markdown, of `tiled.seam_summary`."""
    head = ["tiles against whole", "way", "PSNR", "lowest", "largest difference", "PSNR lost"]
    rows = []
    for name, ways in summary["models"].items():
        for way, row in ways.items():
            apart = row["psnr"] is not None
            psnr, lowest = (f"{row[k]:.2f}" if apart else "equal" for k in ("psnr", "lowest_psnr"))
            levels = f"{row['largest_difference']:.1f} levels"
            rows.append([name, way, psnr, lowest, levels, f"{row['psnr_loss']:+.3f} dB"])
    return (
        f"{markdown_table(head, rows)}\n\nTiles of {summary['tile']} pixels. PSNR in dB: of the "
        "tiled image against the whole one, mean and lowest over the images; lost: of that against "
        "the photograph."
    )


def footer(result: Mapping[str, Any]) -> str:
    """The lines below every table: protocol, images, hashes, what was not measured and why."""
    protocol = result["protocol"]
    posterior = protocol["posterior"]
    seed = f", seed {protocol['seed']}" if protocol["seed"] is not None else ""
    lines = [
        f"{result['images']:,} images, {protocol['size']} x {protocol['size']}, sha256 "
        f"{result['images_sha256'][:12]}. Protocol {protocol['name']}: {protocol['resize']}; "
        f"{protocol['crop']} crop; posterior {posterior}{seed}; {protocol['quantize']}; SSIM "
        f"{protocol['ssim']}; +/- {protocol['std']}."
    ]
    if converted := result.get("converted"):
        named = ", ".join(f"{name} {count:,}" for name, count in converted.items())
        lines.append(f"Converted to sRGB, by colour profile: {named}.")
    if "latent_noise" in protocol:
        lines.append(f"Rows with a sigma: {protocol['latent_noise']}.")
    networks = [f"{n} {protocol[n][:12]}" for n in ("vgg", "inception") if protocol[n]]
    lines.append(weights_line(result["weights"], *networks))
    lines += not_measured(result["unmeasured"])
    return "\n\n".join([*lines, *warning_lines(result["warnings"])])


def weights_line(weights: Mapping[str, Mapping[str, Any]], *others: str) -> str:
    """Each file with its hash, then `others`."""
    hashes = []
    for name, known in weights.items():
        if known["sha256"] and "latent_noise" not in known:
            hashes.append(f"{name} {known['path']} {known['sha256'][:12]}")
    return f"Weights (sha256): {'; '.join([*hashes, *others])}."


def warning_lines(warnings: Sequence[str]) -> list[str]:
    """Sentences below a table, WARNINGS of them, and how many more there are."""
    lines = [f"Warning: {warning}." for warning in warnings[:WARNINGS]]
    more = len(warnings) - WARNINGS
    if more > 0:
        lines.append(f"{counted(more, 'more warning', 's')} {are(more)} in scores.json.")
    return lines


def score_text(
    value: Mapping[str, float] | float | None, metric: Metric, missing: str = "not measured"
) -> str:
    """A score of scores.json as text: a mean with its standard deviation, or a number."""
    if value is None:
        return missing
    if isinstance(value, Mapping):
        return f"{value['mean']:.{metric.digits}f} +/- {value['std']:.{metric.digits}f}"
    return f"{value:.{metric.digits}f}"


# --- pictures -------------------------------------------------------------------------------


def choose_pictures(
    rows: Sequence[ImageScores], names: Sequence[str], measured: Sequence[str]
) -> dict[int, list[str]]:
    """Place in `rows` -> why it is shown: the first few, then worst, best and median of each.

    PICTURES images at most; every reason of a chosen image is kept.
    """
    chosen: dict[int, list[str]] = {place: ["first"] for place in range(min(FIRST_FEW, len(rows)))}
    positions = {"worst": 0, "best": -1, "median": len(rows) // 2}
    judged = [metric for metric in measured if METRICS[metric].better]
    for rank, metric, (number, name) in itertools.product(positions, judged, enumerate(names)):
        column = measured.index(metric)
        sign = 1.0 if METRICS[metric].better == "higher" else -1.0
        values = [(sign * float(row.scores[number, column]), row.index) for row in rows]
        place = sorted(range(len(rows)), key=values.__getitem__)[positions[rank]]
        if place in chosen or len(chosen) < PICTURES:
            chosen.setdefault(place, []).append(f"{rank} {metric} of {name}")
    return dict(sorted(chosen.items()))


def slugs(names: Sequence[str]) -> list[str]:
    """Names as parts of file names, all different."""
    made = ["input"]  # the picture beside them
    for name in names:
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower())[:LONGEST].strip("-") or "model"
        numbered = (f"{slug}-{number}" for number in itertools.count(1))
        made.append(next(s for s in itertools.chain([slug], numbered) if s not in made))
    return made[1:]
