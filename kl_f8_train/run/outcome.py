"""Whether a run made its decoder better: its last validation compared with its first."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from kl_f8_train.averages import label
from kl_f8_train.run_dir import VALIDATION_FILE, Row, read_rows

NOISE_DB, NOISE_SHARE = 0.02, 0.005  # smaller changes are not reported
LOST_DB = 1.0  # healthy small runs lost up to 0.8 dB of raw PSNR, a ruined one 1.5
LOST_SHARE = 0.25  # of perceptual distance, more than a recipe trades for PSNR
# Perceptual distance paid for nothing: in 31 small runs at usable rates the EMA's never rose
# by more than 3 %, and then for 0.8 dB of PSNR, which is ft_mse's trade.
WASTED_SHARE, FLAT_DB = 0.05, 0.1


class Change(NamedTuple):
    """Means over the fixed photographs, at the first and at the last validation."""

    weights: str  # "EMA", "raw", or "EMA 0.9999" of a further decay
    psnr: tuple[float, float]  # in dB
    perceptual: tuple[float, float]

    @property
    def is_worse(self) -> bool:
        """Whether both measures are worse, or one of them by more than any recipe intends.

        Or whether the perceptual distance rose clearly while PSNR stood still.

        The raw weights, which a rate keeps moving, are judged by the large losses alone.
        """
        lost, risen = self.psnr[0] - self.psnr[1], self._risen
        both = self.weights != "raw" and lost > NOISE_DB and risen > NOISE_SHARE
        return both or lost > LOST_DB or risen > LOST_SHARE or self.is_worse_to_the_eye

    @property
    def is_worse_to_the_eye(self) -> bool:
        """Whether an EMA's perceptual distance rose clearly although PSNR did not gain by it."""
        flat = abs(self.psnr[1] - self.psnr[0]) <= FLAT_DB
        return self.weights != "raw" and flat and self._risen > WASTED_SHARE

    @property
    def _risen(self) -> float:
        """The perceptual distance's change, as a share of the first."""
        return self.perceptual[1] / max(self.perceptual[0], 1e-9) - 1

    @property
    def _verdict(self) -> str:
        """Which way the perceptual distance went, as it is better lower; empty within noise."""
        if abs(self._risen) <= NOISE_SHARE:
            return ""
        return " (worse)" if self._risen > 0 else " (better)"

    def __str__(self) -> str:
        (psnr, last_psnr), (distance, last_distance) = self.psnr, self.perceptual
        return (
            f"PSNR {psnr:.2f} -> {last_psnr:.2f} dB, "
            f"perceptual distance {distance:.4g} -> {last_distance:.4g}{self._verdict}"
        )


class Outcome(NamedTuple):
    """How a run changed the scores of its fixed photographs, between two iterations."""

    iterations: tuple[int, int]
    changes: tuple[Change, ...]  # EMA, then raw, then further EMAs

    def lines(self) -> list[str]:
        """The comparison, for people."""
        first, last = self.iterations
        head = f"validation, iteration {first:,} -> {last:,}"
        return [f"{head}: {change.weights} {change}" for change in self.changes]

    def warnings(self) -> list[str]:
        """A line for each of the weights that got worse."""
        lines = []
        for change in [change for change in self.changes if change.is_worse]:
            lower = "Lower"
            if change.is_worse_to_the_eye:
                lower = "PSNR does not show it, pictures do: lower adversarial.weight or"
            lines.append(
                f"the {change.weights} weights got worse since the start: {change}. {lower} "
                "optimizer.learning_rate; an earlier checkpoint, or the start, is better"
            )
        return lines


def compare(rows: Sequence[Row]) -> Outcome | None:
    """The outcome by the rows of validation.csv; None without two validations."""
    if len(rows) < 2:
        return None
    first, last = rows[0], rows[-1]
    changes = []
    further = [key.removeprefix("psnr_") for key in last if key.startswith("psnr_ema_")]
    for name in ("ema", "raw", *further):
        keys = (f"psnr_{name}", f"perceptual_{name}")
        if all(key in row for key in keys for row in (first, last)):
            psnr, perceptual = ((first[key], last[key]) for key in keys)
            changes.append(Change(label(name), psnr, perceptual))
    return Outcome((int(first["iteration"]), int(last["iteration"])), tuple(changes))


def read(run_dir: Path, until: int | None = None) -> Outcome | None:
    """The outcome of a run, up to an iteration; None if it was not validated twice."""
    rows = read_rows(run_dir / VALIDATION_FILE)
    return compare([row for row in rows if until is None or row["iteration"] <= until])


def badness(row: Row) -> float:
    """Perceptual distance times root mean square error of the EMA; smaller is better.

    The unit does not matter, so neither measure needs a weight: a change of 1 % in one counts as
    much as one of 1 % in the other.
    """
    error = 10 ** (-row.get("psnr_ema", 0.0) / 20)  # of images in [0, 1]
    return row.get("perceptual_ema", float("inf")) * error
