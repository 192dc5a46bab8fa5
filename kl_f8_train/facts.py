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
from pathlib import Path
from typing import Any

from kl_f8_train.errors import MissingInputError, UsageError
from kl_f8_train.units import written

METADATA_PREFIX = "kl_f8_train."  # of our keys in a safetensors file's metadata
ENTRY = "architecture"  # of a torch file, beside its state_dict
GROUPS = 32  # of every GroupNorm, in every published autoencoder of this form
MOST_CHANNELS = 2048  # the most that a list may have, and the most groups


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a file states; None where it does not. Latents of consumers: (z - shift) * scale."""

    family: str | None = None  # one of FAMILIES, or OTHER
    norm_num_groups: int | None = None
    use_quant_conv: bool | None = None  # 1x1 convolutions around the latents
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
        """`stated` as metadata of a safetensors file, which are strings."""
        return {
            f"{METADATA_PREFIX}{name}": json.dumps(value) for name, value in self.stated().items()
        }


@dataclass(frozen=True)
class Family:
    """Models that share a VAE's architecture and the scale of its latents."""

    title: str
    channels: int  # of the latents
    modelspec: str  # its name in the metadata of single files
    facts: Facts
    tags: tuple[str, ...]  # on the hub, as the models' authors set them


# Scale and shift as in the config.json that the models' authors publish.
FAMILIES = {
    "sd": Family(
        "Stable Diffusion 1.x and 2.x",
        4,
        "stable-diffusion-v1",
        Facts(scaling_factor=0.18215, force_upcast=True),
        ("stable-diffusion",),
    ),
    "sdxl": Family(
        "Stable Diffusion XL",
        4,
        "stable-diffusion-xl-v1-base",
        Facts(scaling_factor=0.13025, force_upcast=True, sample_size=1024),
        ("stable-diffusion", "stable-diffusion-xl"),
    ),
    "sd3": Family(
        "Stable Diffusion 3 and 3.5",
        16,
        "stable-diffusion-3",
        Facts(scaling_factor=1.5305, shift_factor=0.0609, force_upcast=True, sample_size=1024),
        ("stable-diffusion", "stable-diffusion-3"),
    ),
    "flux": Family(
        "FLUX.1",
        16,
        "flux-1",
        Facts(scaling_factor=0.3611, shift_factor=0.1159, force_upcast=True, sample_size=1024),
        ("flux",),
    ),
}
OTHER = "other"  # none of them: what the file states is taken, and nothing else
FACT_NAMES = tuple(field.name for field in fields(Facts))


def from_values(values: Mapping[str, Any]) -> Facts:
    """The facts among plain values; null is not stated.

    Raises MissingInputError if one has another type or is out of bounds.
    """
    found: dict[str, Any] = {}
    for name in FACT_NAMES:
        value = values.get(name)
        if value is None:
            continue
        accepts, expected = ACCEPTED[name]
        if not accepts(value):
            raise MissingInputError(f"it states {name}={written(value)[:80]}; expected {expected}")
        if name == "sample_size" and isinstance(value, list | tuple):
            value = value[0]  # of height and width diffusers takes the first
        found[name] = tuple(value) if isinstance(value, list | tuple) else value
    return Facts(**found)


def from_metadata(metadata: Mapping[str, str]) -> Facts:
    """The facts in the metadata of a safetensors file; ours come before plain names.

    Raises MissingInputError if one is not what it should be.
    """
    texts = {
        name: metadata.get(f"{METADATA_PREFIX}{name}", metadata.get(name)) for name in FACT_NAMES
    }
    texts["family"] = metadata.get(f"{METADATA_PREFIX}family")  # a plain "family" may mean anything
    return from_values({name: _parsed(text) for name, text in texts.items() if text is not None})


def combined(first: Facts, then: Facts) -> Facts:
    """`first`, and of what it does not state, `then`."""
    return replace(then, **first.stated())


def family_of(stated: Facts, channels: int) -> str | None:
    """The family that a file names or whose scale it states; None if it does neither."""
    if stated.family or stated.scaling_factor is None:
        return stated.family
    scale = (stated.scaling_factor, stated.shift_factor or None)
    for name, family in FAMILIES.items():
        known = (family.facts.scaling_factor, family.facts.shift_factor)
        if scale == known and channels == family.channels and stated.latents_mean is None:
            return name
    return OTHER


def settled(
    path: Path,
    stated: Facts,
    channels: int,
    given: str | None,
    published_shape: bool,
    option: str = "init.family=",
) -> Facts:
    """What a file states, with the rest of its family's facts; `given` is what `option` says.

    Raises UsageError if the file does not show its family although it has the shape of several
    (`published_shape`), or if it is not of the family that was given; MissingInputError if it
    states means or deviations of another number of channels.
    """
    _check_statistics(path, stated, channels)
    found = family_of(stated, channels)
    fitting = [name for name, family in FAMILIES.items() if family.channels == channels]
    if found and given not in (None, OTHER, found):
        raise UsageError(
            f"{path}: {option}{given}, but the file is of another: {described(found, stated)}; "
            f"give {option}{found}, or null for what the file states"
        )
    if given and given not in (OTHER, *fitting):
        raise UsageError(
            f"{path}: {option}{given}: its latents have {FAMILIES[given].channels} channels, these "
            f"have {channels}"
        )
    if found is None and given is None and published_shape and fitting:
        choices = ", ".join(f"{option}{name} ({FAMILIES[name].title})" for name in fitting)
        raise UsageError(
            f"{path}: this file does not show which models it belongs to, and their latents have "
            f"different scales; give {choices}, or {option}{OTHER} to state none"
        )
    family = found or given
    known = FAMILIES[family].facts if family in FAMILIES else Facts()
    return combined(replace(stated, family=family), known)


def _check_statistics(path: Path, stated: Facts, channels: int) -> None:
    for name in ("latents_mean", "latents_std"):
        values = getattr(stated, name)
        if values is not None and len(values) != channels:
            raise MissingInputError(
                f"{path}: it states {name} of {len(values)} channels; its latents have {channels}. "
                "Correct its config.json"
            )


def described(family: str | None, stated: Facts) -> str:
    """A family's title, with the scale of its latents."""
    known = FAMILIES.get(family or "")
    title = known.title if known else "none of the published models"
    scale = f"scaling_factor {stated.scaling_factor:g}" if stated.scaling_factor else ""
    shift = f"shift_factor {stated.shift_factor:g}" if stated.shift_factor else ""
    return ", ".join(part for part in (title, scale, shift) if part)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text[:100_000])
    except (ValueError, RecursionError):
        return text  # from_values refuses it by name


def _is_whole(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_size(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_whole, value))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _are_numbers(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) <= MOST_CHANNELS
        and all(map(_is_number, value))
    )


ACCEPTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "family": (
        lambda value: value in (*FAMILIES, OTHER),
        f"one of {', '.join((*FAMILIES, OTHER))}",
    ),
    "use_quant_conv": (lambda value: type(value) is bool, "true or false"),
    "norm_num_groups": (
        lambda value: _is_whole(value) and value <= MOST_CHANNELS,
        f"a whole number, 1 to {MOST_CHANNELS}",
    ),
    "scaling_factor": (lambda value: _is_number(value) and value > 0, "a number above 0"),
    "shift_factor": (_is_number, "a number"),
    "latents_mean": (_are_numbers, "a list of numbers"),
    "latents_std": (_are_numbers, "a list of numbers"),
    "force_upcast": (lambda value: type(value) is bool, "true or false"),
    "sample_size": (
        lambda value: _is_whole(value) or _is_size(value),
        "a whole number, or two, in pixels",
    ),
}
