"""What a VAE file states beside its tensors, and which families of models share a VAE.

A consumer needs these facts, and tensors do not show them. The names are those of diffusers'
`config.json`. They are read from that file, from a safetensors file's metadata (`NAME` or
`kl_f8_train.NAME`, each value as JSON), and from the plain dict `architecture` beside the
`state_dict` of a torch file; a run keeps them in its checkpoints and writes them to its exports.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from kl_f8_train.errors import MissingInputError

PREFIX = "kl_f8_train."  # of our keys in a safetensors file's metadata
ENTRY = "architecture"  # of a torch file, beside its state_dict
GROUPS = 32  # of every GroupNorm, in every published autoencoder of this form
CHANNELS = 2048  # the most that a list may have, and the most groups


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a file states; None where it does not. Latents of consumers: (z - shift) * scale."""

    norm_num_groups: int | None = None
    scaling_factor: float | None = None
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None  # one for each channel
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool | None = None  # whether fp16 pipelines decode in fp32
    sample_size: int | None = None  # pixels of the images it was trained on

    def stated(self) -> dict[str, Any]:
        """The facts that are known, as plain values."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def metadata(self) -> dict[str, str]:
        """`stated` as metadata of a safetensors file."""
        return {f"{PREFIX}{name}": json.dumps(value) for name, value in self.stated().items()}


NAMES = tuple(field.name for field in fields(Facts))


def from_values(values: Mapping[str, Any]) -> Facts:
    """The facts among plain values; null is not stated.

    Raises MissingInputError if one has another type or is out of bounds.
    """
    found: dict[str, Any] = {}
    for name in NAMES:
        value = values.get(name)
        if value is None:
            continue
        accepts, expected = EXPECTED[name]
        if not accepts(value):
            raise MissingInputError(f"it states {name}={str(value)[:80]}; expected {expected}")
        found[name] = tuple(value) if isinstance(value, list | tuple) else value
    return Facts(**found)


def from_metadata(metadata: Mapping[str, str]) -> Facts:
    """The facts in the metadata of a safetensors file; ours come before plain names.

    Raises MissingInputError if one is not what it should be.
    """
    texts = {name: metadata.get(f"{PREFIX}{name}", metadata.get(name)) for name in NAMES}
    return from_values({name: _parsed(text) for name, text in texts.items() if text is not None})


def combined(first: Facts, then: Facts) -> Facts:
    """`first`, and of what it does not state, `then`."""
    return replace(then, **first.stated())


def _parsed(text: str) -> Any:
    try:
        return json.loads(text[:100_000])
    except (ValueError, RecursionError):
        return text  # from_values refuses it by name


def _is_whole(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _are_numbers(value: Any) -> bool:
    return (
        isinstance(value, list | tuple) and len(value) <= CHANNELS and all(map(_is_number, value))
    )


EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "norm_num_groups": (
        lambda value: _is_whole(value) and value <= CHANNELS,
        f"a whole number, 1 to {CHANNELS}",
    ),
    "scaling_factor": (lambda value: _is_number(value) and value > 0, "a number above 0"),
    "shift_factor": (_is_number, "a number"),
    "latents_mean": (_are_numbers, "a list of numbers"),
    "latents_std": (_are_numbers, "a list of numbers"),
    "force_upcast": (lambda value: type(value) is bool, "true or false"),
    "sample_size": (_is_whole, "a whole number, in pixels"),
}
