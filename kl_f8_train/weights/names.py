"""Names of the same tensors in other people's files: state dict -> state dict, nothing else.

Layouts: CompVis (`encoder.down.0.block.0...`, perhaps with `loss.*`), diffusers
(`encoder.down_blocks.0.resnets.0...`, old and new attention names), each perhaps under
`first_stage_model.` or a wrapper's `module.`; and our training checkpoints (`autoencoder.*`,
`ema.*`, `discriminator.*`).
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from kl_f8_train.errors import MissingInputError
from kl_f8_train.facts import GROUPS, Facts

State = dict[str, Tensor]

SCALING_FACTOR = 0.18215  # Stable Diffusion's latents are ours times this
SDXL_SCALING_FACTOR = 0.13025
ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0", "norm": "group_norm"}
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
AUTOENCODER_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
COUNTERS = ".num_batches_tracked"  # of BatchNorm: the only whole numbers among weights
FIRST_STAGE = "first_stage_model."
FIRST_WEIGHT = "encoder.conv_in.weight"  # so called by CompVis and by diffusers
DISCRIMINATOR = "loss.discriminator."
LOGVAR = "loss.logvar"
EMA_SCALARS = ("model_ema.decay", "model_ema.num_updates")


@dataclass
class Weights:
    """What a file holds, in our names."""

    layout: str
    autoencoder: State
    discriminator: State | None = None
    logvar: Tensor | None = None
    ema_scalars: dict[str, float] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)


def relevant(keys: Collection[str]) -> list[str]:
    """The names in a file that `recognise` needs the values of; most of a full model's are not."""
    if _is_training(keys):
        return [key for key in keys if not key.startswith("optimizer.")]
    prefix = _prefix(keys)
    inner = [key for key in keys if key.startswith(prefix) and _is_used(key.removeprefix(prefix))]
    return inner + [key for key in EMA_SCALARS if prefix and key in keys]


def _is_training(keys: Collection[str]) -> bool:
    marks = ("ema.", "optimizer.", "logvar")
    return all(any(key.startswith(part) for key in keys) for part in ("autoencoder.", marks))


def _prefix(keys: Collection[str]) -> str:
    """What stands before the autoencoder's names; raises MissingInputError if that is not one."""
    if any(key.startswith(FIRST_STAGE) for key in keys):
        return FIRST_STAGE
    found = {key.removesuffix(FIRST_WEIGHT) for key in keys if key.endswith(FIRST_WEIGHT)}
    if len(found) > 1 and "" not in found:
        raise MissingInputError(
            f"several autoencoders in this file, below {', '.join(sorted(found))}; give a file "
            "with one"
        )
    return "" if "" in found else next(iter(found), "")


def _is_used(key: str) -> bool:
    return key.startswith((*AUTOENCODER_PARTS, DISCRIMINATOR)) or key in (*EMA_SCALARS, LOGVAR)


def recognise(state: Mapping[str, Tensor], select: str = "ema") -> Weights:
    """Finds the autoencoder in any of the layouts; `select` is "ema" or "raw".

    Raises MissingInputError if there is none.
    """
    if _is_training(state):
        return _from_training(state, select)
    prefix = _prefix(state)
    inner = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    layout = "CompVis autoencoder"
    if prefix == FIRST_STAGE:
        xl = any(key.startswith("conditioner.") for key in state)
        layout = f"Stable Diffusion {'XL ' if xl else ''}checkpoint"
    scalars = {k: _scalar(inner.get(k, state.get(k))) for k in EMA_SCALARS}
    dropped = [key for key in state if not key.startswith(prefix) and key not in scalars]
    dropped += [key for key in inner if not _is_used(key)]
    autoencoder = {k: v for k, v in inner.items() if k.startswith(AUTOENCODER_PARTS)}
    if any(".down_blocks." in key or ".mid_block." in key for key in autoencoder):
        autoencoder = from_diffusers(autoencoder)
        layout = layout if prefix == FIRST_STAGE else "diffusers autoencoder"
    if not autoencoder:
        some = ", ".join(list(state)[:3]) or "nothing"
        raise MissingInputError(
            f"no autoencoder in this file: it holds {some} ..., expected encoder.* and decoder.*; "
            "give a VAE or a full Stable Diffusion checkpoint"
        )
    return Weights(
        layout=layout,
        autoencoder=autoencoder,
        discriminator=_below(inner, DISCRIMINATOR) or None,
        logvar=_scalar(inner.get(LOGVAR)),
        ema_scalars={k: float(v) for k, v in scalars.items() if v is not None},
        dropped=dropped,
    )


def _scalar(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is not None and tensor.numel() == 1 else None


def _from_training(state: Mapping[str, Tensor], select: str) -> Weights:
    autoencoder = _below(state, "autoencoder.")
    ema = _below(state, "ema.")
    if select == "ema":
        unknown = sorted(ema.keys() - autoencoder.keys())
        if unknown or not ema:
            got = (
                f"of other names: {', '.join(unknown[:3])}" if ema else "that is missing: no ema.*"
            )
            raise MissingInputError(f"training checkpoint with an EMA {got}; use another")
        autoencoder = {**autoencoder, **ema}
    return Weights(
        layout=f"training checkpoint ({'EMA' if select == 'ema' else 'raw'} weights)",
        autoencoder=autoencoder,
        discriminator=_below(state, "discriminator.") or None,
        logvar=_scalar(state.get("logvar")),
    )


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor, by its name."""
    return {key: tuple(value.shape) for key, value in state.items()}


def check_like(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], differ: str, remedy: str
) -> None:
    """`check_shapes` against another state dict; `differ` and `remedy` frame what it says."""
    try:
        check_shapes(state, shapes_of(expected))
    except MissingInputError as error:
        raise MissingInputError(f"{differ}: {error}\n{remedy}") from error


def check_shapes(state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises MissingInputError naming the first differences of names, shapes or kinds."""
    problems = differences(state, expected)
    if problems:
        shown = "\n  ".join(problems[:5])
        more = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise MissingInputError(f"not this architecture:\n  {shown}{more}")


def differences(state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """One line per tensor that is missing, of another shape or kind, or too much, in order."""
    problems = []
    for key, shape in expected.items():
        if key not in state:
            problems.append(f"missing {key}, expected {tuple(shape)}")
        elif tuple(state[key].shape) != tuple(shape):
            problems.append(f"{key} is {tuple(state[key].shape)}, expected {tuple(shape)}")
        elif not key.endswith(COUNTERS) and not state[key].is_floating_point():
            problems.append(f"{key} is {state[key].dtype}, expected floating point")
    return problems + [f"unexpected {key}" for key in state if key not in expected]


def architecture(state: Mapping[str, Tensor], facts: Facts | None = None) -> dict[str, Any]:
    """AutoencoderKL's arguments, read off the shapes of a CompVis state dict.

    The groups of its norms have no shape: they are among them only where `facts` states them.
    Raises MissingInputError if a tensor that shows an argument is missing.
    """
    groups = facts.norm_num_groups if facts else None
    try:
        ch = state["encoder.conv_in.weight"].shape[0]
        levels = 1 + max(
            int(m[1]) for m in (re.match(r"encoder\.down\.(\d{1,3})", k) for k in state) if m
        )
        widths = [state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
        blocks = sum(
            bool(re.match(r"encoder\.down\.0\.block\.\d{1,3}\.conv1\.weight", k)) for k in state
        )
        return {
            "ch": ch,
            "ch_mult": tuple(width // ch for width in widths),
            "num_res_blocks": blocks,
            "z_channels": state["decoder.conv_in.weight"].shape[1],
            "embed_dim": state["post_quant_conv.weight"].shape[1],
            **({"norm_num_groups": groups} if groups else {}),
        }
    except (KeyError, ValueError) as error:
        raise MissingInputError(f"not a whole autoencoder: {error} is missing") from error
    except (IndexError, ZeroDivisionError) as error:
        raise MissingInputError("not an autoencoder of this form: its shapes differ") from error


# --- diffusers ------------------------------------------------------------------------------


def to_diffusers(state: Mapping[str, Tensor]) -> State:
    """CompVis names -> diffusers' (new attention names; attention weights become (C, C))."""
    levels = 1 + max(
        int(m[1]) for m in (re.match(r"encoder\.down\.(\d{1,3})", k) for k in state) if m
    )
    return {
        diffusers_name(key, levels): value.flatten(1) if _is_attention_weight(key) else value
        for key, value in state.items()
    }


def from_diffusers(state: Mapping[str, Tensor]) -> State:
    """diffusers' names, old or new -> CompVis (attention weights become (C, C, 1, 1))."""
    blocks = (re.match(r"encoder\.down_blocks\.(\d{1,3})", key) for key in state)
    levels = 1 + max((int(m[1]) for m in blocks if m), default=0)
    converted: State = {}
    for key, value in state.items():
        name = compvis_name(key, levels)
        if _is_attention_weight(name) and value.ndim == 2:
            value = value[:, :, None, None]
        converted[name] = value
    return converted


def diffusers_name(key: str, levels: int) -> str:
    """The diffusers name of a CompVis key; the decoder's levels count the other way round."""
    key = re.sub(
        r"^decoder\.up\.(\d{1,3})\.", lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}.", key
    )
    key = re.sub(r"^encoder\.down\.(\d{1,3})\.", r"encoder.down_blocks.\1.", key)
    key = re.sub(r"\.block\.(\d{1,3})\.", r".resnets.\1.", key)
    key = re.sub(r"\.downsample\.", ".downsamplers.0.", key)
    key = re.sub(r"\.upsample\.", ".upsamplers.0.", key)
    key = re.sub(r"\.mid\.block_(\d)\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}.", key)
    key = re.sub(
        r"\.mid\.attn_1\.(\w+)\.", lambda m: f".mid_block.attentions.0.{ATTENTION[m[1]]}.", key
    )
    return key.replace(".nin_shortcut.", ".conv_shortcut.").replace(".norm_out.", ".conv_norm_out.")


def compvis_name(key: str, levels: int) -> str:
    """The CompVis name of a diffusers key."""
    back = {new: old for old, new in ATTENTION.items()}
    for old, new in OLD_ATTENTION.items():
        key = key.replace(f".attentions.0.{old}.", f".attentions.0.{new}.")
    key = re.sub(
        r"\.mid_block\.attentions\.0\.(to_out\.0|\w+)\.",
        lambda m: f".mid.attn_1.{back.get(m[1], m[1])}.",
        key,
    )
    key = re.sub(r"\.mid_block\.resnets\.(\d)\.", lambda m: f".mid.block_{int(m[1]) + 1}.", key)
    key = re.sub(
        r"^decoder\.up_blocks\.(\d{1,3})\.", lambda m: f"decoder.up.{levels - 1 - int(m[1])}.", key
    )
    key = re.sub(r"^encoder\.down_blocks\.(\d{1,3})\.", r"encoder.down.\1.", key)
    key = re.sub(r"\.resnets\.(\d{1,3})\.", r".block.\1.", key)
    key = key.replace(".downsamplers.0.", ".downsample.").replace(".upsamplers.0.", ".upsample.")
    return key.replace(".conv_shortcut.", ".nin_shortcut.").replace(".conv_norm_out.", ".norm_out.")


def diffusers_config(
    ch: int, ch_mult: list[int], blocks: int, z: int, size: int, stated: Facts | None = None
) -> dict[str, object]:
    """config.json of diffusers' AutoencoderKL; what `stated` knows takes the defaults' place."""
    levels = len(ch_mult)
    defaults = {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.30.0",
        "act_fn": "silu",
        "block_out_channels": [ch * multiplier for multiplier in ch_mult],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "force_upcast": True,
        "in_channels": 3,
        "latent_channels": z,
        "layers_per_block": blocks,
        "norm_num_groups": GROUPS,
        "out_channels": 3,
        "sample_size": size,
        "scaling_factor": SCALING_FACTOR,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    return defaults | (stated or Facts()).stated()


def _is_attention_weight(key: str) -> bool:
    return bool(re.search(r"\.mid\.attn_1\.(q|k|v|proj_out)\.weight$", key))


def _below(state: Mapping[str, Tensor], prefix: str) -> State:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
