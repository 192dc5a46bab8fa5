"""What decides a run's result besides its recipe: the data, the perceptual network, the versions.

An identity maps a name to a short string: `perceptual`, `torch`, `cuda`, `kl_f8_train`, and
`data.NAME` for each source. Every checkpoint holds one. On resume it is compared with today's
inputs, and at the start of a run between the ranks.
"""

import hashlib
from collections.abc import Mapping

import numpy as np
import torch

from kl_f8_train import __version__
from kl_f8_train.core.hashes import tensors_sha256
from kl_f8_train.core.perceptual import PerceptualDistance
from kl_f8_train.data.plan import Plan

Identity = dict[str, str]


def of_program(network: PerceptualDistance) -> Identity:
    """The perceptual network, hashed over all its tensors, and the versions in use."""
    digest = tensors_sha256(network.state_dict())
    return {
        "perceptual": f"{network.label}, SHA-256 {digest[:16]}",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "kl_f8_train": __version__,
    }


def network_label(identity: Mapping[str, str]) -> str:
    """The perceptual network's name for people, without its hash."""
    return identity.get("perceptual", "").partition(", SHA-256")[0]


def of_data(plan: Plan) -> Identity:
    """One entry for each source: its images, in which shards or folders they lie."""
    return {f"data.{name}": _of_counts(source.counts) for name, source in plan.plans.items()}


def _of_counts(counts: np.ndarray) -> str:
    digest = hashlib.sha256(counts.tobytes()).hexdigest()
    return f"{int(counts.sum()):,} images in {len(counts):,} parts, SHA-256 {digest[:16]}"


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Lines `name: before -> now`; what an older checkpoint does not hold is not compared."""
    return [
        f"{name}: {before[name]} -> {value}"
        for name, value in now.items()
        if before.get(name, value) != value
    ]
