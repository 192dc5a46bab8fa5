"""The conventions of an evaluation: what moves its numbers."""

from dataclasses import dataclass
from typing import Any

SEED = 0


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
