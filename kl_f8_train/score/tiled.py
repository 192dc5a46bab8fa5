"""Tiled decoding as user interfaces do it, and how far its result is from decoding at once.

In a tile the attention and every GroupNorm see the tile alone, so that neighbours differ in colour
and contrast; both programs blend the difference over an overlap. Restated here, for any decoder:

- diffusers, `enable_tiling` (AutoencoderKL.tiled_decode): tiles begin every 3/4 of their side; the
  last quarter of each fades linearly into the next.
- ComfyUI, node "VAE Decode (Tiled)" (comfy/sd.py, comfy/utils.py): the mean of three passes, of
  square, tall and wide tiles; in each pass every tile is weighted by ramps over the overlap.

Shapes: latents (B, C, h, w), images (B, 3, H, W) with H = f h, f the decoder's downsampling.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kl_f8_train.core import metrics
from kl_f8_train.output import Progress
from kl_f8_train.score.candidates import Candidate, autoencoder, latents
from kl_f8_train.score.image_set import EvaluatedImage
from kl_f8_train.score.protocol import Protocol

OVERLAP = 64  # pixels, ComfyUI's; a quarter of tiles smaller than four of them
Decode = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Seams:
    """How far a tiled decode is from the whole one, and from the photograph."""

    psnr: float  # dB, tiled against whole; infinite where nothing was tiled
    largest: float  # difference of a value, in 8-bit levels
    loss: float  # dB of PSNR against the photograph that tiling costs


def decode_as_diffusers(decode: Decode, z: Tensor, tile: int, factor: int) -> Tensor:
    """(B, C, h, w) -> (B, 3, H, W); `tile` in latents, a multiple of 4."""
    # Tiles begin every `step` latents; of each, `kept` pixels are its own, and over the first
    # `fade` of them it is blended with the tile before.
    step, fade, kept = tile * 3 // 4, tile * factor // 4, tile * factor * 3 // 4
    if max(z.shape[2:]) <= tile:
        return decode(z)
    rows: list[Tensor] = []
    above: list[Tensor] = []
    # `above` is the row of tiles before, with their last quarters, which the next row fades from.
    for top in range(0, z.shape[2], step):
        row: list[Tensor] = []
        for column, left in enumerate(range(0, z.shape[3], step)):
            part = decode(z[:, :, top : top + tile, left : left + tile])
            if above:
                _fade(above[column], part, fade, axis=2)
            if row:
                _fade(row[-1], part, fade, axis=3)
            row.append(part)
        rows.append(torch.cat([part[:, :, :kept, :kept] for part in row], dim=3))  # (B, 3, kept, W)
        above = row
    return torch.cat(rows, dim=2)


def _fade(before: Tensor, after: Tensor, reach: int, axis: int) -> None:
    """Blends the end of `before` into the beginning of `after`, in place, linearly."""
    reach = min(reach, before.shape[axis], after.shape[axis])
    shape = [1] * axis + [reach] + [1] * (3 - axis)
    share = torch.arange(reach, dtype=after.dtype, device=after.device).view(shape) / reach
    start = after.narrow(axis, 0, reach)
    start.mul_(share).add_(before.narrow(axis, before.shape[axis] - reach, reach) * (1 - share))


def decode_as_comfyui(decode: Decode, z: Tensor, tile: int, factor: int) -> Tensor:
    """(B, C, h, w) -> (B, 3, H, W); `tile` in latents."""
    overlap = min(OVERLAP // factor, tile // 4)
    shapes = ((tile * 2, tile // 2), (tile // 2, tile * 2), (tile, tile))
    passes = [_weighted_pass(decode, z, shape, overlap, factor) for shape in shapes]
    return torch.stack(passes).mean(dim=0)


def _weighted_pass(
    decode: Decode, z: Tensor, tile: tuple[int, int], overlap: int, factor: int
) -> Tensor:
    """One pass with tiles of (height, width) latents; the weighted mean where they overlap."""
    height, width = z.shape[2:]
    if height <= tile[0] and width <= tile[1]:
        return decode(z)
    total = z.new_zeros(z.shape[0], 3, height * factor, width * factor)
    weight = z.new_zeros(1, 1, *total.shape[2:])
    for top in _starts(height, tile[0], overlap):
        for left in _starts(width, tile[1], overlap):
            part = decode(z[:, :, top : top + tile[0], left : left + tile[1]])
            down, across = (_ramps(side, overlap * factor, z) for side in part.shape[2:])
            mask = down[:, None] * across  # (height, width) of the part
            place = (
                slice(None),
                slice(None),
                slice(top * factor, top * factor + part.shape[2]),
                slice(left * factor, left * factor + part.shape[3]),
            )
            total[place] += part * mask
            weight[place] += mask
    return total / weight  # every pixel lies in a tile, and no ramp reaches 0


def _starts(length: int, tile: int, overlap: int) -> Iterator[int]:
    """Where tiles begin along one axis."""
    if length <= tile:
        yield 0
        return
    start = 0
    for start in range(0, length - overlap, tile - overlap):
        yield start
    if start + tile < length:
        yield length - tile


def _ramps(length: int, reach: int, like: Tensor) -> Tensor:
    """(length,): rises to 1 over `reach` pixels, and falls at the end; 1 if that does not fit."""
    if not 0 < reach < length:
        return like.new_ones(length)
    rise = (torch.arange(1, length + 1, dtype=like.dtype, device=like.device) / reach).clamp(max=1)
    return rise * rise.flip(0)


WAYS: dict[str, Callable[[Decode, Tensor, int, int], Tensor]] = {
    "diffusers": decode_as_diffusers,
    "ComfyUI": decode_as_comfyui,
}


@torch.no_grad()
def tiled_decodes(decode: Decode, z: Tensor, tile: int, factor: int) -> dict[str, Tensor]:
    """Way -> image, with "whole" first; clamped to [0, 1], float64. `tile` in pixels."""
    decoded = {name: way(decode, z, tile // factor, factor) for name, way in WAYS.items()}
    images = {"whole": decode(z), **decoded}
    return {name: (image.double() / 2 + 0.5).clamp(0, 1) for name, image in images.items()}


def seams(image: Tensor, decodes: dict[str, Tensor]) -> dict[str, Seams]:
    """Way -> its distance from "whole"; image (1, 3, H, W) in [0, 1], as `tiled_decodes` gives."""
    whole = decodes["whole"]
    before = metrics.psnr(image, whole)
    return {
        name: Seams(
            psnr=float(metrics.psnr(whole, tiled)),
            largest=float(255 * (whole - tiled).abs().max()),
            loss=0.0 if torch.equal(whole, tiled) else float(before - metrics.psnr(image, tiled)),
        )
        for name, tiled in decodes.items()
        if name != "whole"
    }


# --- over a set of images -------------------------------------------------------------------


Measured = list[tuple[str, str, dict[str, Seams]]]  # image, VAE, way -> seams


def measure(
    candidates: Sequence[Candidate],
    protocol: Protocol,
    samples: Iterable[EvaluatedImage],
    tile: int,
    *,
    device: str,
    progress: Progress | None,
    total: int,
) -> Measured:
    """Decodes at once and in tiles of `tile` pixels, one image and VAE after the other."""
    found: Measured = []
    for done, sample in enumerate(samples, start=1):
        if sample.image is not None:
            image = sample.image[None].to(device)  # uint8 (1, 3, H, W)
            for vae in candidates:
                model = autoencoder(vae)
                z = latents(model, image, [sample.key], protocol)
                decodes = tiled_decodes(model.decode, z, tile, model.downsampling)
                found.append((sample.key, vae.name, seams(image.double() / 255.0, decodes)))
        if progress is not None:
            progress(done, total)
    return found


def seam_summary(found: Measured, tile: int) -> dict[str, Any]:
    """For scores.json: of each VAE and way the mean PSNR, the lowest, the largest difference."""
    models: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(name for _, name, _ in found):
        own = [(key, ways) for key, vae, ways in found if vae == name]
        models[name] = {way: _summary([(key, ways[way]) for key, ways in own]) for way in WAYS}
    return {"tile": tile, "models": models}


def _summary(rows: Sequence[tuple[str, Seams]]) -> dict[str, Any]:
    finite = [seam.psnr for _, seam in rows if math.isfinite(seam.psnr)]
    worst, lowest = min(rows, key=lambda row: row[1].psnr)
    return {
        "psnr": math.fsum(finite) / len(finite) if finite else None,  # None: nothing was tiled
        "lowest_psnr": lowest.psnr if finite else None,
        "worst_image": worst if finite else None,
        "largest_difference": max(seam.largest for _, seam in rows),
        "psnr_loss": math.fsum(seam.loss for _, seam in rows) / len(rows),
    }
