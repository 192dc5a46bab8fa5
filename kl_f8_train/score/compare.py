"""Is model B better than model A? Paired per-image differences with a bootstrap interval.

Both models saw the same images, so what counts is B - A on each image: the differences between
images, much larger than those between models, cancel. Interval: 95 %, bias-corrected and
accelerated bootstrap (BCa) of the mean difference; Efron and Tibshirani, An Introduction to the
Bootstrap (1993), chapter 14.
"""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from kl_f8_train.core.metrics import METRICS, SCORES
from kl_f8_train.errors import MissingInputError

RESAMPLES = 10_000
LEVEL = 0.95
FEWEST = 10  # images below which no interval is given
Values = NDArray[np.float64]
HEADING = f"Image by image, mean difference and {100 * LEVEL:.0f} % interval:"
VERDICTS = {  # verdict -> how a sentence says it
    "better": "{b} is better than {a} in {label}",
    "worse": "{b} is worse than {a} in {label}",
    "higher": "{b} is sharper than {a} by {label}",
    "lower": "{b} is smoother than {a} by {label}",
    "unclear": "No clear difference between {b} and {a} in {label}",
    "few": f"Fewer than {FEWEST} images: no verdict on {{b}} against {{a}} in {{label}}",
    "unmeasured": "{label} was not measured for both {a} and {b}",
}


@dataclass(frozen=True)
class Verdict:
    """B compared with A in one metric, over the images."""

    metric: str
    a: str
    b: str
    verdict: str  # a key of VERDICTS
    images: int  # that have the metric for both
    infinite: int  # of them, left out of the mean: a perfect reconstruction's PSNR
    difference: float | None  # mean of B - A
    low: float | None  # the interval's ends
    high: float | None
    wins: int  # images on which B is better; higher, where neither is better
    losses: int
    sigma: float = 0.0  # of the noise on the latents

    @property
    def text(self) -> str:
        """One plain sentence."""
        metric = METRICS[self.metric]
        said = VERDICTS[self.verdict].format(a=self.a, b=self.b, label=metric.label)
        said = f"At sigma {self.sigma:g}: {said}" if self.sigma else said
        if self.difference is None:
            return f"{said}." if self.verdict == "unmeasured" else f"{said}: {self._count()}."
        unit = f" {metric.unit}" if metric.unit else ""
        shown = f"{self.difference:+.{metric.digits}f}{unit}"
        if self.low is not None:
            shown += f" [{self.low:.{metric.digits}f}, {self.high:.{metric.digits}f}]"
        return f"{said}: {shown}, {self._count()}."

    def _count(self) -> str:
        verb = "wins" if METRICS[self.metric].better else "higher on"
        text = f"{verb} {self.wins} of {self.images} images"
        ties = self.images - self.wins - self.losses
        text += f", {ties} alike" if ties else ""
        return text + (f", {self.infinite} infinite and not in the mean" if self.infinite else "")

    def as_dict(self) -> dict[str, Any]:
        """For comparison.json."""
        return {**asdict(self), "text": self.text}


def noisy_name(name: str, sigma: float) -> str:
    """The row of a VAE on latents with noise of that sigma."""
    return f"{name}, sigma {sigma:g}" if sigma else name


def not_measured(reasons: Mapping[str, str]) -> list[str]:
    """Metric -> reason as sentences, one for each reason: several metrics may share it."""
    metrics: dict[str, list[str]] = {}
    for metric, reason in reasons.items():
        metrics.setdefault(reason, []).append(SCORES[metric].label)
    return [f"Not measured: {', '.join(names)} ({reason})." for reason, names in metrics.items()]


def read_image_scores(path: Path) -> list[dict[str, str]]:
    """The rows of per_image.csv. Raises MissingInputError if it is not there or not one."""
    if not path.is_file():
        raise MissingInputError(f"{path}: no such file; `kl-f8-train evaluate` writes it")
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"model", "image"} <= rows[0].keys():
        raise MissingInputError(f"{path}: no scores: expected the columns model, image, psnr, ...")
    return rows


def per_image(rows: Sequence[Mapping[str, str]], metric: str) -> dict[str, dict[str, float]]:
    """Model -> image -> value, in the order of the rows; what was not measured is left out."""
    values: dict[str, dict[str, float]] = {}
    for row in rows:
        scores = values.setdefault(row["model"], {})
        number = float(row.get(metric) or "nan")
        if not math.isnan(number):
            scores[row["image"]] = number
    return values


def paired(values: Mapping[str, Mapping[str, float]], a: str, b: str) -> tuple[Values, Values]:
    """The values of two models on the images that have both."""
    both = [image for image in values.get(a, {}) if image in values.get(b, {})]
    return (
        np.array([values[a][image] for image in both], dtype=np.float64),
        np.array([values[b][image] for image in both], dtype=np.float64),
    )


def wins(a: Values, b: Values, metric: str) -> tuple[int, int]:
    """On how many images B is better, and A is; higher, where neither is better."""
    higher, lower = int((b > a).sum()), int((b < a).sum())
    return (lower, higher) if METRICS[metric].better == "lower" else (higher, lower)


def verdicts(
    rows: Sequence[Mapping[str, str]], a: str, b: str, sigma: float = 0.0
) -> list[Verdict]:
    """B against A in every metric that has a direction, and in sharpness.

    `rows` are per_image.csv's; `sigma` picks those with that noise on the latents. A metric that no
    model has is left out.
    """
    found = []
    for metric, description in METRICS.items():
        values = per_image(rows, metric)
        if any(values.values()) and (description.better or metric == "sharpness"):
            pair = paired(values, noisy_name(a, sigma), noisy_name(b, sigma))
            found.append(replace(verdict(metric, a, b, *pair), sigma=sigma))
    return found


def verdict(metric: str, name_a: str, name_b: str, a: Values, b: Values) -> Verdict:
    """B against A in one metric; `a` and `b` are (N,), image by image.

    An image with an infinite value counts as a win or a tie and is left out of the mean.
    """
    finite = np.isfinite(a) & np.isfinite(b)
    differences = b[finite] - a[finite]
    better, worse = wins(a, b, metric)
    mean = float(differences.mean()) if len(differences) else None
    low = high = None
    said = "few" if len(a) else "unmeasured"
    if len(differences) >= FEWEST:
        low, high = bootstrap_interval(differences)
        said = _decide(metric, low, high)
    infinite = int((~finite).sum())
    return Verdict(metric, name_a, name_b, said, len(a), infinite, mean, low, high, better, worse)


def _decide(metric: str, low: float, high: float) -> str:
    """A difference is clear if its interval leaves zero out."""
    if low <= 0.0 <= high:
        return "unclear"
    direction = "higher" if low > 0.0 else "lower"
    better = METRICS[metric].better
    if better is None:
        return direction
    return "better" if direction == better else "worse"


def bootstrap_interval(
    differences: Values, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """BCa interval of the mean of (N,) values at LEVEL; the same for the same values."""
    mean = float(differences.mean())
    squares = float(np.square(differences - mean).sum())
    if squares <= (1e-12 * mean) ** 2:  # all alike
        return mean, mean
    found = stats.bootstrap(
        (differences,),
        np.mean,
        n_resamples=resamples,
        batch=max(1, 2**21 // len(differences)),  # in pieces of 16 MiB
        confidence_level=LEVEL,
        method="BCa",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)
