"""Pictures and pages for people: labelled strips, zooms, error maps, and report.html.

`write` reads only the files of an evaluation directory: scores.json, per_image.csv, pictures.json
with its PNGs, and comparison.json if there is one. The page is report.html beside this module,
filled in; it refers to its PNGs by relative links and needs no network.
"""

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ImageDraw, ImageFont
from torch import Tensor

from kl_f8_train import __version__, images
from kl_f8_train.core import metrics
from kl_f8_train.core.metrics import METRICS, SCORES
from kl_f8_train.errors import MissingInputError
from kl_f8_train.files import atomic_path, file_sha256, write_json, write_text
from kl_f8_train.output import rendered
from kl_f8_train.score import compare
from kl_f8_train.units import counted

REPORT_PAGE = Path(__file__).with_suffix(".html")
ERROR_SCALE = 48.0  # levels of 255 at the top of every error map
RAMP = ((8, 8, 20), (72, 20, 104), (190, 50, 84), (248, 140, 40), (252, 250, 190))
STRIP_ROWS = 6
ZOOM = 4
ALWAYS = ("psnr", "ssim", "psim", "lpips")  # columns of the card, measured or not
SHIFTS = {
    "red_shift": "#d9534f",
    "green_shift": "#3f9d57",
    "blue_shift": "#4a7fe0",
    "saturation_shift": "#9a6bd1",
}
ScoresByModel = dict[str, dict[str, dict[str, float]]]  # metric -> model -> image -> value


@dataclass
class Evaluation:
    """The files of an evaluation directory."""

    scores: dict[str, Any]
    values: ScoresByModel
    pictures: list[dict[str, Any]]
    comparison: dict[str, Any] | None
    weights: dict[str, dict[str, Any]]  # row -> what is known of its file

    @property
    def models(self) -> list[str]:
        """Names of the VAEs, in the order given; baselines stand in the table only."""
        return [name for name in self.scores["models"] if not self.weights[name].get("baseline")]

    @property
    def measured(self) -> list[str]:
        """Metrics that an image has a score in."""
        return [metric for metric in METRICS if any(self.values[metric].values())]

    def is_clean(self, name: str) -> bool:
        """Whether a row is that of a VAE, and not of one with noise on its latents."""
        return "latent_noise" not in self.weights[name]

    @property
    def base(self) -> str:
        """The model that the others are seen against: the one marked so, or else the first."""
        marked = [name for name in self.models if self.weights[name].get("base")]
        return (marked or self.models)[0]


def read_evaluation(directory: Path) -> Evaluation:
    """Reads an evaluation. Raises MissingInputError if scores.json or per_image.csv is missing."""
    rows = compare.read_image_scores(directory / "per_image.csv")
    scores = _read_json(directory / "scores.json")
    if scores is None:
        raise MissingInputError(f"{directory}: no scores.json; `kl-f8-train evaluate` writes it")
    comparison = _read_json(directory / "comparison.json")
    if comparison and comparison["per_image_sha256"] != _rows_sha256(directory):
        comparison = None  # of an earlier evaluation
    weights = scores.get("weights", {})  # absent in scores of an older version
    return Evaluation(
        scores,
        {metric: compare.per_image(rows, metric) for metric in METRICS},
        _read_json(directory / "pictures.json") or [],
        comparison,
        {name: weights.get(name, {}) for name in scores["models"]},
    )


def write(directory: Path) -> Path:
    """Writes report.html, strip.png, zooms/ and errors/ into an evaluation directory.

    Returns the page's path. Raises MissingInputError if a file of the evaluation is missing.
    """
    evaluation = read_evaluation(directory)
    pictures = _write_zooms(directory, evaluation)
    page = directory / "report.html"
    write_text(page, _page(evaluation, pictures))
    return page


def write_comparison(
    directory: Path, a: str, b: str, sigmas: Sequence[float] = ()
) -> list[compare.Verdict]:
    """Compares two models of an evaluation directory; writes comparison.json beside the scores.

    At each of `sigmas` also their rows with that noise on the latents, on the same draws.
    """
    rows = compare.read_image_scores(directory / "per_image.csv")
    found = compare.verdicts(rows, a, b)
    noisy = [verdict for sigma in sigmas for verdict in compare.verdicts(rows, a, b, sigma)]
    values: dict[str, Any] = {
        "a": a,
        "b": b,
        "interval": f"{100 * compare.LEVEL:.0f} % interval (BCa bootstrap) of the mean of {b} "
        f"minus {a}, image by image, {compare.RESAMPLES:,} resamples, seed 0",
        "per_image_sha256": _rows_sha256(directory),
        "verdicts": [verdict.as_dict() for verdict in found],
    }
    if noisy:
        values["latent_noise"] = [verdict.as_dict() for verdict in noisy]
    write_json(directory / "comparison.json", values)
    return found + noisy


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _rows_sha256(directory: Path) -> str:
    return file_sha256(directory / "per_image.csv")


# --- pictures -------------------------------------------------------------------------------


def strip(columns: Sequence[tuple[str, Sequence[Tensor]]], gap: int = 4) -> Tensor:
    """(label, uint8 (3, H, W) pictures), a column each, one row an image -> a uint8 picture.

    A label wider than its column is cut. Raises ValueError if the columns differ in length.
    """
    by_column = [pictures for _, pictures in columns]
    rows = [images.hstack(list(row), gap) for row in zip(*by_column, strict=True)]
    width = columns[0][1][0].shape[2] + gap
    header = images.to_pil(torch.full((3, 20, rows[0].shape[2]), 255, dtype=torch.uint8))
    draw = ImageDraw.Draw(header)
    font = ImageFont.load_default(size=12)
    for index, (label, _) in enumerate(columns):
        text = label
        while len(text) > 1 and draw.textlength(text, font) > width - gap - 2:
            text = text.removesuffix("...")[:-1] + "..." if len(text) > 4 else text[:-1]
        draw.text((index * width + 2, 3), text, fill="black", font=font)
    labels = torch.from_numpy(np.array(header)).permute(2, 0, 1)  # (3, 20, W)
    return images.vstack([labels, *rows], gap)


def error_map(picture: Tensor, reconstruction: Tensor) -> Tensor:
    """Mean over the channels of |difference|, 0..ERROR_SCALE levels, in colours; all uint8.

    (3, H, W) each. One scale everywhere, so that two maps can be compared.
    """
    error = (picture.float() - reconstruction.float()).abs().mean(dim=0) / ERROR_SCALE  # (H, W)
    stops = np.linspace(0.0, 1.0, len(RAMP))
    channels = [np.interp(error.numpy(), stops, levels) for levels in zip(*RAMP, strict=True)]
    return torch.from_numpy(np.stack(channels).round().astype(np.uint8))


def most_different(pictures: Sequence[Tensor], share: int = 4) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the region, H / share x W / share, where pictures differ most.

    Difference: largest minus smallest of the pictures, mean over channels and region.
    """
    stack = torch.stack(list(pictures)).float()  # (N, 3, H, W)
    spread = (stack.amax(dim=0) - stack.amin(dim=0)).mean(dim=0)  # (H, W)
    height, width = (max(1, side // share) for side in spread.shape)
    step = max(1, min(height, width) // 16)
    means = F.avg_pool2d(spread[None, None], (height, width), step)[0, 0]
    row, column = divmod(int(means.argmax()), means.shape[1])
    return row * step, column * step, height, width


def zoom(picture: Tensor, box: tuple[int, int, int, int]) -> Tensor:
    """A region, every pixel repeated ZOOM times each way: nothing is smoothed."""
    top, left, height, width = box
    region = picture[:, top : top + height, left : left + width]
    return region.repeat_interleave(ZOOM, dim=1).repeat_interleave(ZOOM, dim=2)


def _write_zooms(directory: Path, evaluation: Evaluation) -> list[dict[str, Any]]:
    """Writes strip.png, zooms and error maps; returns what the page shows of each image."""
    shown: list[dict[str, Any]] = []
    columns: list[tuple[str, list[Tensor]]] = [(name, []) for name in ("input", *evaluation.models)]
    for item in evaluation.pictures:
        paths = [item["input"], *(item["models"][name] for name in evaluation.models)]
        pictures = [load_picture(directory / path) for path in paths]
        # Of several models the region where they differ; of one, where it differs from the input.
        others = pictures[1:] if len(pictures) > 2 else pictures
        box = most_different(others)
        height, width = pictures[0].shape[1:]
        sides = []
        for index, path in enumerate(paths):
            name, column = columns[index]
            file = Path(path).name
            save_png(directory / "zooms" / file, zoom(pictures[index], box))
            side = {"name": name, "picture": path, "zoom": f"zooms/{file}"}
            if index:
                save_png(directory / "errors" / file, error_map(pictures[0], pictures[index]))
                side |= {"error": f"errors/{file}"}
            column.append(pictures[index])
            sides.append({**side, "sharpness": _sharpness(pictures[index])})
        frame = (box[0] / height, box[1] / width, box[2] / height, box[3] / width)
        shown.append({"image": item["image"], "why": item["why"], "box": frame, "sides": sides})
    if shown:
        first = [(name, column[:STRIP_ROWS]) for name, column in columns]
        save_png(directory / "strip.png", strip(first))
    return shown


def load_picture(path: Path) -> Tensor:
    """A picture of an evaluation, uint8 (3, H, W); MissingInputError if it is not there."""
    if not path.is_file():
        raise MissingInputError(f"{path}: no such file, but pictures.json names it")
    return images.decode(path.read_bytes())


def save_png(path: Path, picture: Tensor, sync: bool = False) -> None:
    """Writes a PNG atomically, without fsync: of what is quickly made again there are hundreds."""
    with atomic_path(path, sync=sync) as temporary:
        images.to_pil(picture).save(temporary, format="PNG")


def listed_pictures(file: Path) -> set[str]:
    """Paths of the pictures that an evaluation lists in a JSON file, relative to it."""
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    return set(re.findall(r'"((?:pictures|errors)/\d{4}-[a-z0-9-]+\.png)"', text))


def _sharpness(picture: Tensor) -> float:
    return float(metrics.sharpness(picture[None].double() / 255.0))


# --- the page -------------------------------------------------------------------------------


def _page(evaluation: Evaluation, pictures: list[dict[str, Any]]) -> str:
    """The template, filled in."""
    scores, models = evaluation.scores, evaluation.models
    rows = scores["models"]
    measured = {name for row in rows.values() for name in row if row[name] is not None}
    # What is not measured stands below the table, once.
    columns = [name for name in ("rfid", *ALWAYS, "st_lpips") if name in {"psnr", *measured}]
    weights = {name: evaluation.weights[name] for name in models}
    encoders = {record.get("frozen_sha256") for record in weights.values()}
    pairs = []
    for a, b in itertools.combinations(models, 2):
        if weights[a].get("latent_noise") == weights[b].get("latent_noise"):
            pairs.append(_pair(evaluation, a, b))
    return rendered(
        REPORT_PAGE,
        {
            "title": f"{counted(sum(map(evaluation.is_clean, models)), 'VAE', 's')} on "
            f"{counted(scores['images'], 'image', 's')}",
            "subtitle": _subtitle(evaluation),
            "base": evaluation.base,
            "ramp": f"linear-gradient(90deg, {', '.join(f'rgb{colour}' for colour in RAMP)})",
            "warnings": scores.get("warnings", []),
            "columns": [SCORES[column] for column in columns],
            "scores": _scores(evaluation, columns),
            "unmeasured": compare.not_measured(scores.get("unmeasured", {})),
            "comparison": evaluation.comparison,
            "pictures": pictures,
            "pairs": [pair for pair in pairs if pair["bars"]],
            "shifts": _shifts(evaluation, pictures),
            "protocol": _facts(
                {
                    **scores["protocol"],
                    "images": scores["images"],
                    "image list SHA-256": scores.get("images_sha256"),
                    "images from": scores.get("source"),
                }
            ),
            "weights": {name: _facts({**w, "base": None}) for name, w in weights.items() if w},
            "one_encoder": len(models) > 1 and len(encoders) == 1 and None not in encoders,
            "version": __version__,
            "data": _data(evaluation, pictures),
        },
    )


def _subtitle(evaluation: Evaluation) -> str:
    scores = evaluation.scores
    source = [f"images from {scores['source']}"] if scores.get("source") else []
    protocol = f"Protocol {scores['protocol']['name']}"
    return " \u00b7 ".join([protocol, *source, f"compared with {evaluation.base}"])


def _scores(evaluation: Evaluation, columns: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each model: name, iteration, and a cell for each column."""
    rows = evaluation.scores["models"]
    best = {column: _best_models(column, rows) for column in columns}
    found = []
    for name in rows:
        iteration = evaluation.weights[name].get("iteration")
        cells = [_score_cell(evaluation, name, c, name in best[c]) for c in columns]
        found.append({"name": name, "iteration": iteration, "cells": cells})
    return found


def _mean_of(value: Any) -> float | None:
    return value["mean"] if isinstance(value, Mapping) else value


def _best_models(metric: str, rows: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Models with the best mean, as printed; none if there is nothing to choose from."""
    digits = SCORES[metric].digits
    means = {name: _mean_of(row.get(metric)) for name, row in rows.items()}
    # As printed: of two equal figures neither is the better one.
    known = {name: round(mean, digits) for name, mean in means.items() if mean is not None}
    if len(known) < 2:
        return set()
    top = (min if SCORES[metric].better == "lower" else max)(known.values())
    return {name for name, mean in known.items() if mean == top}


def _score_cell(evaluation: Evaluation, name: str, metric: str, best: bool) -> dict[str, Any]:
    """Label, mean and spread as text; without a mean, what is shown instead and why."""
    value = evaluation.scores["models"][name].get(metric)
    digits, cell = SCORES[metric].digits, {"label": SCORES[metric].label}
    if value is None:
        infinite = bool(evaluation.values.get(metric, {}).get(name))
        reason = evaluation.scores.get("unmeasured", {}).get(metric, "")
        return cell | {"missing": "infinite" if infinite else "not measured", "reason": reason}
    spread = f"{value['std']:.{digits}f}" if isinstance(value, Mapping) else ""
    return cell | {"mean": f"{_mean_of(value):.{digits}f}", "spread": spread, "best": best}


def _pair(evaluation: Evaluation, a: str, b: str) -> dict[str, Any]:
    """For each metric the share of images, in percent, on which a and b are better."""
    bars = []
    for metric, description in METRICS.items():
        left, right = compare.paired(evaluation.values[metric], a, b)
        if description.better and len(left):
            of_b, of_a = (100.0 * wins / len(left) for wins in compare.wins(left, right, metric))
            bars.append({"label": description.label, "a": of_a, "b": of_b})
    return {"a": a, "b": b, "bars": bars}


def _shifts(evaluation: Evaluation, pictures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Colour and saturation against the input and the base, and sharpness; {} if not measured."""
    measured = [metric for metric in SHIFTS if metric in evaluation.measured]
    sharp = "sharpness" in evaluation.measured
    if not measured and not sharp:
        return {}
    rows = evaluation.scores["models"]
    means = [abs(_mean_of(row.get(m)) or 0.0) for row in rows.values() for m in measured]
    limit = max([1.0, *means])
    models = []
    for name in evaluation.models:
        cells = [_shift_cell(evaluation, name, metric, limit) for metric in measured]
        cells += [_sharpness_cell(evaluation, name, pictures)] * sharp
        models.append({"name": name, "cells": cells})
    titles = [METRICS[m].label.removesuffix(" shift") for m in measured] + ["sharpness"] * sharp
    return {"titles": titles, "models": models}


def _shift_cell(evaluation: Evaluation, name: str, metric: str, limit: float) -> dict[str, Any]:
    cell = {"label": METRICS[metric].label.removesuffix(" shift")}
    score = evaluation.scores["models"][name].get(metric)
    if score is None:
        return cell
    share = 50.0 * score["mean"] / limit
    notes = []
    if name != evaluation.base:
        base, own = compare.paired(evaluation.values[metric], evaluation.base, name)
        notes = [f"{_signed(float((own - base).mean()))} to base"] * bool(len(base))
    return cell | {
        "text": _signed(score["mean"]),
        "spread": f"{score['std']:.2f}",
        "colour": SHIFTS[metric],
        "left": min(50.0, 50.0 + share),
        "width": abs(share),
        "notes": notes,
    }


def _signed(value: float) -> str:
    return f"{round(value, 2) + 0.0:+.2f}"  # + 0.0: no "-0.00"


def _sharpness_cell(
    evaluation: Evaluation, name: str, pictures: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    score = evaluation.scores["models"][name].get("sharpness")
    if score is None:
        return {"label": "sharpness"}
    notes = []
    base = _mean_of(evaluation.scores["models"][evaluation.base].get("sharpness"))
    if name != evaluation.base and base:
        notes.append(f"{score['mean'] / base:.0%} of the base")
    column = evaluation.models.index(name) + 1
    own = math.fsum(item["sides"][column]["sharpness"] for item in pictures)
    inputs = math.fsum(item["sides"][0]["sharpness"] for item in pictures)
    if inputs:
        notes.append(f"{own / inputs:.0%} of the input ({len(pictures)} pictured)")
    text, spread = (f"{score[key]:,.0f}" for key in ("mean", "std"))
    return {"label": "sharpness", "text": text, "spread": spread, "colour": None, "notes": notes}


def _facts(values: Mapping[str, Any]) -> dict[str, str]:
    """Names and values as text; what is not known is left out."""
    facts = {}
    for key, value in values.items():
        if value is not None and value != "":
            whole = isinstance(value, int) and not isinstance(value, bool)
            if isinstance(value, Mapping):  # versions and the like, in one line
                value = ", ".join(f"{name} {entry}" for name, entry in value.items())
            facts[key.replace("_", " ")] = f"{value:,}" if whole else str(value)
    return facts


# --- what the page's script reads --------------------------------------------------------------


def _data(evaluation: Evaluation, pictures: Sequence[Mapping[str, Any]]) -> str:
    """JSON for the script; "<" is escaped, so that no text can end the element."""
    index: dict[str, int] = {}  # image -> its position
    for by_model in evaluation.values.values():
        for image in itertools.chain(*by_model.values()):
            index.setdefault(image, len(index))
    values = {}  # metric -> a row for each image, a number for each model
    for metric in evaluation.measured:
        columns = [evaluation.values[metric].get(model, {}) for model in evaluation.models]
        values[metric] = [[_json_number(own.get(image)) for own in columns] for image in index]
    metrics_shown = []
    for metric, described in METRICS.items():
        if metric in values or metric in ALWAYS:
            judged = described.better and metric in values
            metrics_shown.append(
                {
                    "key": metric,
                    "label": described.label,
                    "digits": described.digits,
                    "better": described.better,
                    "measured": metric in values,
                    "extremes": _extremes(evaluation, metric, index) if judged else None,
                }
            )
    data = {
        "models": evaluation.models,
        "compared": _compared(evaluation),
        "opened": _opened(evaluation),
        "images": list(index),
        "values": values,
        "metrics": metrics_shown,
        "pictures": [_shown_picture(evaluation, item, index) for item in pictures],
    }
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _compared(evaluation: Evaluation) -> list[int] | None:
    """Positions of the two compared models: the page opens on them."""
    if not evaluation.comparison:
        return None
    return [evaluation.models.index(evaluation.comparison[side]) for side in ("a", "b")]


def _opened(evaluation: Evaluation) -> int:
    """Position of the model that the page opens on: the compared one, else the last VAE given."""
    if compared := _compared(evaluation):
        return compared[1]
    return [place for place, name in enumerate(evaluation.models) if evaluation.is_clean(name)][-1]


def _json_number(value: float | None) -> float | str | None:
    """A score as JSON can hold it."""
    return value if value is None or math.isfinite(value) else str(value)


def _shown_picture(
    evaluation: Evaluation, item: Mapping[str, Any], index: Mapping[str, int]
) -> dict[str, Any]:
    sides = []
    for number, side in enumerate(item["sides"], -1):  # the input, then the models
        files = {key: quote(side[key]) for key in ("picture", "zoom", "error") if key in side}
        sides.append({"name": side["name"], "model": number, **files})
    why = [_labelled(reason) for reason in item["why"]]
    return {**item, "image": index[item["image"]], "why": why, "sides": sides}


def _labelled(reason: str) -> str:
    """`worst psnr of a` of pictures.json as `worst PSNR of a`: metrics as in the table."""
    rank, *rest = reason.split(" ", 2)
    if len(rest) == 2 and rest[0] in METRICS:
        return " ".join([rank, METRICS[rest[0]].label, rest[1]])
    return reason


def _extremes(evaluation: Evaluation, metric: str, index: Mapping[str, int]) -> list[list[int]]:
    """For each model, the indices of the worst, median and best image."""
    named = {reason: item["image"] for item in evaluation.pictures for reason in item["why"]}
    worst_first = METRICS[metric].better == "lower"
    found = []
    for model in evaluation.models:
        scores = evaluation.values[metric].get(model, {})
        order = sorted(scores, key=scores.__getitem__, reverse=worst_first)
        ranks = {"worst": 0, "median": (len(order) - 1) // 2, "best": -1} if order else {}
        chosen = [named.get(f"{k} {metric} of {model}", order[rank]) for k, rank in ranks.items()]
        found.append([index[image] for image in chosen])
    return found
