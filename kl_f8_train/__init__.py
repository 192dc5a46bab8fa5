"""Finetunes the decoder of Stable Diffusion's kl-f8 autoencoder.

As a library it offers the names below (docs/library.md). Each is imported when it is first used, so
that the command line answers without importing torch.
"""

import importlib
from typing import Any

__version__ = "0.2.0"
_HOMES = {  # name -> module, and what it is called there
    "AutoencoderKL": "core.model.AutoencoderKL",
    "Batch": "core.batch.Batch",
    "Discriminator": "core.discriminator.Discriminator",
    "Finetuner": "core.step.Finetuner",
    "adaptive_weight": "core.losses.adaptive_weight",
    "discriminator_loss": "core.losses.discriminator_loss",
    "evaluate": "score.evaluate.evaluate",
    "generator_loss": "core.losses.generator_loss",
    "initialize_discriminator": "core.discriminator.initialize",
    "load_autoencoder": "weights.weight_file.load_autoencoder",
    "perceptual_network": "weights.pretrained.build",
    "recipe": "config.recipe",
    "reconstruction_loss": "core.losses.reconstruction_loss",
    "save_autoencoder": "weights.weight_file.save_autoencoder",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """A name of the library, from its module."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, there = _HOMES[name].rpartition(".")
    return getattr(importlib.import_module(f"{__name__}.{module}"), there)


def __dir__() -> list[str]:
    """With the names that are not imported yet."""
    return sorted([*globals(), *_HOMES])
