"""Latents that other programs saved: found, checked, and put into the decoder's own scale.

A decoder takes z as its encoder makes it. Diffusion models work on (z - shift) * scale, and which
of the two a file holds depends on the program that wrote it:

- ComfyUI's `.latent`, a safetensors file with `latent_tensor` and the marker
  `latent_format_version_0`, holds z: its samplers end with `process_latent_out`, which undoes the
  scale. Without the marker, as its first versions wrote it, it holds 0.18215 z; its loader divides.
- diffusers' `output_type="latent"` gives the model's own (z - shift) * scale; whether that or z was
  saved, a plain .safetensors, .npy or .pt file does not show, and the user has to say.

Nothing is unpickled: .npy without objects, .pt by `weights.torch_file`.
"""

import itertools
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kl_f8_train import facts
from kl_f8_train.errors import MissingInputError, UsageError
from kl_f8_train.facts import FAMILIES, Facts
from kl_f8_train.units import counted
from kl_f8_train.weights import weight_file

ENDINGS = (".latent", ".safetensors", ".npy", ".pt")
COMFYUI, MARKER = "latent_tensor", "latent_format_version_0"
LEGACY_FACTOR = 0.18215  # of ComfyUI's files without the marker, whatever model they are of
NAMES = ("latents", "latent", "samples", "z")  # which tensor is meant, where a file has several
SMALLEST = 32  # pixels of a decoded image that every metric can take
MOST_TENSORS = 16  # of a file of latents; a model has hundreds
OURS, LEGACY, UNSAID = "z", "legacy", "unsaid"  # what a file says of its scale


@dataclass(frozen=True)
class SavedLatent:
    """One latent of a file that may hold several."""

    path: Path
    index: int
    name: str
    shape: tuple[int, ...]  # (C, h, w)
    says: str  # OURS, LEGACY or UNSAID


@dataclass(frozen=True)
class Scale:
    """From a file's values to the decoder's: values * std / factor + mean (the shift)."""

    factor: float = 1.0
    mean: tuple[float, ...] = (0.0,)  # for all channels, or one for each
    std: tuple[float, ...] = (1.0,)

    def undo(self, values: Tensor) -> Tensor:
        """(B, C, h, w) in the file's scale -> in the decoder's."""
        mean, std = (values.new_tensor(part).view(1, -1, 1, 1) for part in (self.mean, self.std))
        return values * std / self.factor + mean  # of (z - mean) / std x factor

    def __str__(self) -> str:
        if self == Scale():
            return "values unchanged"
        std = "" if self.std == (1.0,) else " x std"
        mean = f"{self.mean[0]:g}" if len(self.mean) == 1 else "mean"
        return f"values{std} / {self.factor:g}" + f" + {mean}" * (mean != "0")


def find(where: Path) -> list[Path]:
    """The files of latents in a folder, searched recursively, or the file itself."""
    if where.is_file():
        return [where]
    if not where.is_dir():
        raise MissingInputError(f"--latents {where}: no such folder or file; check the path")
    found = sorted(p for p in where.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file())
    if not found:
        raise MissingInputError(
            f"--latents {where}: holds no latents; expected {', '.join(ENDINGS)} files"
        )
    return found


def survey(where: Path, limit: int | None = None) -> list[SavedLatent]:
    """Every latent below `where`, the first `limit` of them, each of which can be read.

    Raises MissingInputError for the first file that cannot, with what is wrong with it.
    """
    latents: list[SavedLatent] = []
    for path in find(where):
        values, says = read(path)
        name = path.relative_to(where).as_posix() if where.is_dir() else path.name
        for index in range(len(values)):
            own = f"{name}[{index}]" if len(values) > 1 else name
            latents.append(SavedLatent(path, index, own, tuple(values.shape[1:]), says))
            if len(latents) == limit:
                return latents
    return latents


def load_latents(latents: Iterable[SavedLatent]) -> Iterator[tuple[SavedLatent, Tensor]]:
    """Each with its values, (1, C, h, w) float32 in the file's scale; reads a file of many once."""
    for path, group in itertools.groupby(latents, key=lambda latent: latent.path):
        values, _ = read(path)
        for latent in group:
            yield latent, values[latent.index : latent.index + 1]


def read(path: Path) -> tuple[Tensor, str]:
    """(B, C, h, w), float32, in the file's scale, and what the file says of it.

    Raises MissingInputError if it is broken or holds something else.
    """
    values, says = _read_npy(path) if path.suffix.lower() == ".npy" else _read_tensors(path)
    if values.ndim == 3:
        values = values[None]
    if not values.is_floating_point() or values.ndim != 4 or not values.numel():
        kind = str(values.dtype).removeprefix("torch.")
        raise MissingInputError(
            f"{path}: holds {kind} of shape {tuple(values.shape)}; expected latents of an image, "
            "floating-point (C, h, w) or (B, C, h, w)"
        )
    values = values.float()
    if not bool(values.isfinite().all()):
        raise MissingInputError(
            f"{path}: its latents hold NaN or infinity, as a failed sampling leaves them; make "
            "them again"
        )
    return values, says


def _read_npy(path: Path) -> tuple[Tensor, str]:
    try:
        values = np.load(path, allow_pickle=False)
        if not isinstance(values, np.ndarray):
            raise ValueError("it is an archive (.npz); save one array with numpy.save")
        native = values.astype(values.dtype.newbyteorder("="), copy=False)
        return torch.from_numpy(native.copy()), UNSAID
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise MissingInputError(
            f"{path}: no array that can be read: {error}. Pickled objects are never loaded; save "
            "it again with numpy.save, as a plain array of floats"
        ) from error


def _read_tensors(path: Path) -> tuple[Tensor, str]:
    def few(names: Collection[str]) -> Collection[str]:
        if len(names) > MOST_TENSORS:
            raise MissingInputError(
                f"holds {len(names)} tensors, as a model does, not latents; give a folder of "
                "latents alone"
            )
        return names

    try:
        tensors = weight_file.read(path, few).tensors
    except MissingInputError as error:
        if path.suffix.lower() != ".pt":
            raise
        text = f"{error}; save latents as .safetensors or .npy, or in a dict of tensors"
        raise MissingInputError(text) from error
    if COMFYUI in tensors:
        return tensors[COMFYUI], OURS if MARKER in tensors else LEGACY
    fitting = {name: t for name, t in tensors.items() if t.is_floating_point() and t.ndim in (3, 4)}
    named = list(fitting)
    if len(fitting) > 1:
        named = [name for name in NAMES if name in fitting]
    if len(named) != 1:
        held = ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items()) or "nothing"
        raise MissingInputError(
            f"{path}: it is not clear which of its tensors are latents; it holds {held}; expected "
            f"one of shape (C, h, w) or (B, C, h, w), or one named {' or '.join(NAMES)}"
        )
    return fitting[named[0]], UNSAID


# --- scale ----------------------------------------------------------------------------------


def check_fit(latents: Sequence[SavedLatent], name: str, channels: int, downsampling: int) -> None:
    """Raises UsageError for the first latent that the VAE called `name` cannot decode."""
    for latent in latents:
        own, height, width = latent.shape
        if own != channels:
            remedy = "give latents and VAEs of the same models"
            if width == channels:
                remedy = "the channels come first: save them as (B, C, h, w)"
            raise UsageError(
                f"{latent.path}: its latents have {own} channels (shape {latent.shape}), those of "
                f"{name} have {channels}; {remedy}"
            )
        if min(height, width) * downsampling < SMALLEST:
            raise UsageError(
                f"{latent.path}: its latents decode to {width * downsampling} x "
                f"{height * downsampling} pixels; expected at least {SMALLEST} either way"
            )


def scales(
    latents: Sequence[SavedLatent], scaled: str | None, vaes: Sequence[tuple[str, Facts, int]]
) -> dict[str, Scale]:
    """What a file says of its scale -> how to undo it, for what these latents say.

    `scaled` is "no", "yes" or a family, for the files that say nothing; `vaes` are name, facts and
    channels of the latents. Raises UsageError if it is needed and not given, or if no VAE states a
    scale.
    """
    found = {OURS: Scale(), LEGACY: Scale(LEGACY_FACTOR)}
    says = {latent.says for latent in latents}
    if UNSAID in says:
        if scaled is None:
            example = next(latent for latent in latents if latent.says == UNSAID)
            raise UsageError(
                f"{example.path} does not show whether its latents are scaled for a diffusion "
                "model. Give --latents-scaled no for latents as an encoder makes them, or "
                "--latents-scaled yes for those of a sampler, as diffusers' output_type='latent' "
                "gives them"
            )
        found[UNSAID] = Scale() if scaled == "no" else _model_scale(scaled, vaes)
    return {kind: scale for kind, scale in found.items() if kind in says}


def _model_scale(scaled: str, vaes: Sequence[tuple[str, Facts, int]]) -> Scale:
    """The scale of the models: of a family, or as the VAEs state it, all the same."""
    stated = {name: _scale(own, channels) for name, own, channels in vaes}
    if scaled in FAMILIES:
        given = _scale(FAMILIES[scaled].facts, FAMILIES[scaled].channels)
        for name, own_scale in stated.items():
            if own_scale not in (None, given):
                raise UsageError(
                    f"--latents-scaled {scaled} is {given}, but {name} states {own_scale}; give "
                    "latents of its models, with --latents-scaled yes"
                )
        assert given is not None  # every family has one
        return given
    known = {name: scale for name, scale in stated.items() if scale is not None}
    if not known:
        families = [n for n, f in FAMILIES.items() if f.channels == vaes[0][2]]
        choices = " or ".join(f"--latents-scaled {name}" for name in families)
        raise UsageError(
            f"--latents-scaled yes: {vaes[0][0]} does not state the scale of its models; "
            f"{f'give {choices}' if choices else 'undo it, and give --latents-scaled no'}"
        )
    only, *others = set(known.values())
    if others:
        listed = ", ".join(f"{name} {scale}" for name, scale in known.items())
        raise UsageError(
            f"--latents-scaled yes: the VAEs state different scales ({listed}), so they are of "
            "different models, and no latents are of both"
        )
    return only


def _scale(stated: Facts, channels: int) -> Scale | None:
    """As a file states it, or as its family has it if it states the family only."""
    family = facts.family_of(stated, channels)
    if family in FAMILIES:
        stated = facts.combined(stated, FAMILIES[family].facts)
    if stated.scaling_factor is None:
        return None
    mean = stated.latents_mean or (stated.shift_factor or 0.0,)
    return Scale(stated.scaling_factor, mean, stated.latents_std or (1.0,))


def describe(latents: Sequence[SavedLatent], found: dict[str, Scale]) -> list[str]:
    """For the screen: which latents, in which scale."""
    title = {
        OURS: "of ComfyUI, in the decoder's scale",
        LEGACY: f"of ComfyUI without {MARKER}, scaled by {LEGACY_FACTOR:g}",
        UNSAID: "with the scale of --latents-scaled",
    }
    counts = Counter(latent.says for latent in latents)
    return [
        f"{counted(counts[kind], 'latent', 's')} {title[kind]}: {scale}"
        for kind, scale in found.items()
    ]


def doubt(deviation: float, factor: float, scaled: bool) -> str:
    """A warning if latents look as if the user said the wrong thing of their scale; else empty.

    `deviation` is that of the file's values: about 1 in a model's scale, 1 / factor in a decoder's,
    since models choose the factor so. Too close factors, as SD3's, show nothing.
    """
    own, other = (1.0, 1 / factor) if scaled else (1 / factor, 1.0)
    if deviation <= 0 or abs(math.log(factor)) < math.log(2):
        return ""
    # Ratios, since a scale is one: is the deviation nearer to what was said than to the other?
    if abs(math.log(deviation / own)) <= abs(math.log(deviation / other)):
        return ""
    return (
        f"the latents' standard deviation is {deviation:.2g}, where about {own:.2g} was expected: "
        f"--latents-scaled {'no' if scaled else 'yes'} may be right"
    )
