"""The conventions of an evaluation: what moves its numbers, and how its VAEs are named."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kl_f8_train.errors import UsageError

SEED = 0
Selected = tuple[str, str | Path, str]  # name, weights, "ema", "ema-0.9999" or "raw"


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The conventions that move the numbers."""

    name: str
    sampled: bool  # the posterior; otherwise its mode
    quantize: str  # "floor" or "round", to 8 bit
    border: str  # of SSIM: "zero" or "valid"

    def describe(self) -> dict[str, Any]:
        """For scores.json."""
        border = "zero padding, whole map" if self.border == "zero" else "where the window fits"
        return {
            "name": self.name,
            "resize": "shorter side to size, bicubic with antialiasing, on 8-bit values",
            "crop": "centre",
            "posterior": "sampled" if self.sampled else "mode",
            "seed": SEED if self.sampled else None,
            "quantize": f"clamped, {self.quantize} to 8 bit",
            "ssim": "11 x 11 Gaussian, sigma 1.5, C1 = 0.01^2, C2 = 0.03^2, data range 1, "
            f"{border}",
            "psnr": "10 log10(1 / mse) an image; infinite ones are left out of the mean",
            "std": "population (ddof 0) over images",
        }


CARD = Protocol(name="card", sampled=True, quantize="floor", border="zero")
STANDARD = Protocol(name="standard", sampled=False, quantize="round", border="valid")
PROTOCOLS = {protocol.name: protocol for protocol in (CARD, STANDARD)}


def selections(
    named: Mapping[str, str | Path] | Sequence[Selected], compared: Sequence[str] = ()
) -> list[Selected]:
    """The VAEs of an evaluation; of a mapping, name -> weights, the EMAs.

    Raises UsageError for none or two of one name, or if `compared` are not two of them.
    """
    if isinstance(named, Mapping):
        named = [(name, path, "ema") for name, path in named.items()]
    wrong = [one for one in named if isinstance(one, str) or len(one) != 3]
    if wrong or not named:
        got = repr(wrong[0]) if wrong else "none"
        raise UsageError(f"weights: got {got}, expected {{name: file}} or (name, file, selection)")
    names = [name for name, *_ in named]
    if len(set(names)) < len(names):
        raise UsageError("two weights have the same name; give NAME=WEIGHTS")
    unknown = [name for name in compared if name not in names]
    if unknown:
        raise UsageError(f"--compare {unknown[0]}: no such model; named are {', '.join(names)}")
    if compared and len(set(compared)) != 2:
        raise UsageError(f"--compare {' '.join(compared)}: expected two different models")
    return list(named)
