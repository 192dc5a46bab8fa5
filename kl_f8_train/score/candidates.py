"""The VAEs of an evaluation, baselines beside them, and their reconstructions.

The posterior's noise follows from (seed, name of the image), so that no order and no number of
processes moves it.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kl_f8_train import images as pixels
from kl_f8_train.core.batch import random_state
from kl_f8_train.core.hashes import frozen_sha256
from kl_f8_train.core.model import AutoencoderKL
from kl_f8_train.errors import UsageError
from kl_f8_train.facts import Facts
from kl_f8_train.score.compare import noisy_name
from kl_f8_train.score.protocol import CARD, SEED, Protocol, Selected
from kl_f8_train.weights import weight_file


class Means(nn.Module):
    """A yardstick beside the VAEs: the mean colour of every block of an image.

    `block` is its side in pixels; None takes the whole image as one block.
    """

    def __init__(self, block: int | None) -> None:
        super().__init__()
        self.block = block
        self.downsampling = block or 1

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> the same shape, constant in each block."""
        if self.block is None:
            return x.mean((2, 3), keepdim=True).expand_as(x)
        means = F.avg_pool2d(x, self.block)  # (B, 3, H / block, W / block)
        return F.interpolate(means, scale_factor=float(self.block), mode="nearest")


BASELINES = {"mean colour": None, "8 x 8 means": 8}  # name -> block


@dataclass
class Candidate:
    """A VAE (or a baseline) with its name in the table, and where it came from."""

    name: str
    model: AutoencoderKL | Means
    record: dict[str, Any]
    facts: Facts = field(default_factory=Facts)  # what its file states
    sigma: float = 0.0  # of the noise on its latents, in standard deviations of them


def baselines() -> list[Candidate]:
    """Rows of the table that any useful VAE is far above."""
    absent = ("iteration", "frozen_sha256", "layout", "select")
    record = {"path": "", "sha256": "", "base": False, "baseline": True, **dict.fromkeys(absent)}
    return [Candidate(name, Means(block), dict(record)) for name, block in BASELINES.items()]


def autoencoder(candidate: Candidate) -> AutoencoderKL:
    """The network of a candidate that is a VAE, as all are that `load_candidates` loads."""
    assert isinstance(candidate.model, AutoencoderKL)
    return candidate.model


def load_candidates(named: Sequence[Selected], device: str) -> list[Candidate]:
    """(name, weights, "ema", "ema-0.9999" or "raw") -> VAEs; equal encoders are one module."""
    candidates: list[Candidate] = []
    shared: dict[str, AutoencoderKL] = {}
    for name, path, select in named:
        contents, weights = weight_file.read_weights(path, select)
        model = weight_file.build_autoencoder(contents, weights).to(device)
        digest = frozen_sha256(model.state_dict())
        # One module for equal encoders: the others' tensors are freed.
        first = shared.setdefault(digest, model)
        model.encoder, model.quant_conv = first.encoder, first.quant_conv
        record = {
            "path": contents.path.name,
            "sha256": weight_file.sha256(contents.path),
            "iteration": contents.iteration,
            "frozen_sha256": digest,
            "layout": weights.layout,
            "select": select,
            "base": not candidates,
        }
        candidates.append(Candidate(name, model, record, weight_file.facts_of(contents, weights)))
    return candidates


def perturbed(candidates: Sequence[Candidate], sigmas: Sequence[float]) -> list[Candidate]:
    """The VAEs once more at each sigma but 0: rows of their own, on latents with that much noise.

    Raises UsageError if one of their names is taken.
    """
    rows = []
    for sigma, vae in itertools.product(filter(None, sigmas), candidates):
        record = {**vae.record, "base": False, "vae": vae.name, "latent_noise": sigma}
        rows.append(replace(vae, name=noisy_name(vae.name, sigma), record=record, sigma=sigma))
    taken = {vae.name for vae in candidates} & {row.name for row in rows}
    if taken:
        raise UsageError(f"{min(taken)} is the name of a row of --latent-noise; give another NAME=")
    return rows


def reconstruct(
    candidates: Sequence[Candidate],
    images: Tensor,
    keys: Sequence[str],
    protocol: Protocol = CARD,
) -> Iterator[Tensor]:
    """uint8 (B, 3, H, W) -> each VAE's reconstructions, the same; one encoding per encoder."""
    for output in outputs(candidates, images, keys, protocol):
        yield pixels.to_uint8(output, protocol.quantize)


@torch.no_grad()
def outputs(
    candidates: Sequence[Candidate], images: Tensor, keys: Sequence[str], protocol: Protocol
) -> Iterator[Tensor]:
    """The output of each decoder, float, about [-1, 1], not clamped."""
    encoded: dict[str, Tensor] = {}
    for candidate in candidates:
        if isinstance(candidate.model, Means):
            yield candidate.model(pixels.to_float(images))
            continue
        encoder = candidate.record["frozen_sha256"]
        if encoder not in encoded:
            encoded[encoder] = latents(candidate.model, images, keys, protocol)
        yield candidate.model.decode(with_noise(encoded[encoder], keys, candidate.sigma))


@torch.no_grad()
def latents(
    model: AutoencoderKL, images: Tensor, keys: Sequence[str], protocol: Protocol
) -> Tensor:
    """uint8 (B, 3, H, W) -> (B, C, h, w), sampled or the mode as the protocol says."""
    posterior = model.encode(pixels.to_float(images))
    if not protocol.sampled:
        return posterior.mean
    return posterior.sample(posterior_noise(keys, posterior.mean))


def with_noise(z: Tensor, keys: Sequence[str], sigma: float) -> Tensor:
    """z + sigma std(z) e, std of each image's own latents: (B, C, h, w) -> the same.

    As `latents.noise` trains, with u tau = sigma. e is standard normal by (seed 0, sigma, name of
    the image), so VAEs whose latents have one shape are compared on the same draw.
    """
    if not sigma:
        return z
    deviation = z.std(dim=(1, 2, 3), keepdim=True)  # (B, 1, 1, 1)
    return z + sigma * deviation * _normal(keys, z, SEED, "latent-noise", f"{sigma:g}")


def posterior_noise(keys: Sequence[str], like: Tensor, seed: int = SEED) -> Tensor:
    """Standard normal noise that depends on seed and image name alone, shaped as `like`."""
    return _normal(keys, like, seed, "evaluate")


def _normal(keys: Sequence[str], like: Tensor, seed: int, *stream: str) -> Tensor:
    shape = tuple(like.shape[1:])  # (C, h, w)
    draws = [random_state(seed, *stream, key).standard_normal(shape) for key in keys]
    return torch.from_numpy(np.stack(draws)).to(like)
