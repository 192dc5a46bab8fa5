"""Names of the same tensors in other people's files: state dict -> state dict, nothing else.

Layouts: CompVis (`encoder.down.0.block.0...`, perhaps with `loss.*`), diffusers
(`encoder.down_blocks.0.resnets.0...`, old and new attention names), each perhaps under
`first_stage_model.` or a wrapper's `module.`; and our training checkpoints (`autoencoder.*`,
`ema.*`, perhaps `ema_0_9999.*` of further decays, `discriminator.*`).
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from kl_f8_train.averages import label, module_name
from kl_f8_train.errors import MissingInputError
from kl_f8_train.facts import GROUPS, Facts

State = dict[str, Tensor]

ATTENTION = {  # CompVis -> diffusers; of several spellings the first is today's
    "q": ("to_q", "query"),
    "k": ("to_k", "key"),
    "v": ("to_v", "value"),
    "proj_out": ("to_out.0", "to_out", "proj_attn"),
    "norm": ("group_norm",),
}
SPELLINGS = (  # parts of names, in CompVis' files and in diffusers', in the order of replacement
    (".mid.block_1.", ".mid_block.resnets.0."),
    (".mid.block_2.", ".mid_block.resnets.1."),
    *(
        (f".mid.attn_1.{ours}.", f".mid_block.attentions.0.{theirs}.")
        for ours, spellings in ATTENTION.items()
        for theirs in spellings
    ),
    (".mid.attn_1.", ".mid_block.attentions.0."),
    ("encoder.down.", "encoder.down_blocks."),
    (".block.", ".resnets."),
    (".downsample.", ".downsamplers.0."),
    (".upsample.", ".upsamplers.0."),
    (".nin_shortcut.", ".conv_shortcut."),
    (".norm_out.", ".conv_norm_out."),
)
AUTOENCODER_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
BATCH_COUNTS = ".num_batches_tracked"  # of BatchNorm: the only whole numbers among weights
FIRST_STAGE = "first_stage_model."
# So called by CompVis and by diffusers; and in the original's EMA, which has no dots.
ANCHORS = ("encoder.conv_in.weight", "decoder.conv_in.weight", "decoderconv_inweight")
CURRENT = "current_model_state."  # raw weights in a checkpoint of Lightning's WeightAveraging
ONLINE = "online_model."  # a copy of the raw weights beside ema-pytorch's average
WRAPPERS = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module"
    r"|_forward_module)\."
)
EMA_MARK = re.compile(r"(?:^|[._-])(?:ema\d*|emas|averaged?|shadow|swa)(?:[._-]|$)", re.IGNORECASE)
LISTED = re.compile(r"(.*shadow_params)\.(\d{1,6})")  # an EMA as a list (the torch-ema package)
DOTLESS = re.compile(
    r"(?:(encoder|decoder)(?:(mid)(block_[12]|attn_1)|(down|up)(\d)(?:(block)(\d)|(downsample|upsample)))?"
    r"(conv_in|conv_out|conv1|conv2|conv|norm_out|norm1|norm2|norm|nin_shortcut|q|k|v|proj_out)"
    r"|((?:post_)?quant_conv))(weight|bias)"
)
DISCRIMINATOR = "loss.discriminator."
LOGVAR = "loss.logvar"
EMA_SCALARS = ("model_ema.decay", "model_ema.num_updates")


@dataclass
class Weights:
    """The contents of a file, under our names."""

    layout: str
    autoencoder: State
    discriminator: State | None = None
    logvar: Tensor | None = None
    ema_scalars: dict[str, float] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    family: str | None = None  # as the names of a full model's other parts show
    notes: list[str] = field(default_factory=list)  # which weights were taken, of several


# Names in full models, and the family that they show.
MARKS = (
    (r"(^|\.)double_blocks\.", "flux"),
    (r"(^|\.)joint_blocks\.", "sd3"),
    (r"^conditioner\.", "sdxl"),
    (r"^cond_stage_model\.", "sd"),
)


def relevant(keys: Collection[str], prefix: str | None = None, select: str = "ema") -> list[str]:
    """The names in a file that `recognise` needs the values of; most of a full model's are not."""
    if _is_training(keys):
        others = ("optimizer.", "ema_")
        mine = f"{module_name(select)}."
        return [key for key in keys if not key.startswith(others) or key.startswith(mine)]
    places = _places(keys, prefix)
    return [key for name, key in places.names.items() if _part(name, places)]


def _is_training(keys: Collection[str]) -> bool:
    others = ("ema.", "optimizer.", "logvar")
    named = any(key.startswith("autoencoder.") for key in keys)
    return named and any(key.startswith(others) for key in keys)


@dataclass(frozen=True)
class _Places:
    """Where in a file an autoencoder lies: what stands before its names, in both kinds."""

    names: dict[str, str]  # without wrappers' parts -> as in the file
    raw: str | None
    ema: str | None
    listed: str | None = None  # an EMA without names, in the order of the parameters
    partial: str = ""  # an EMA that does not cover the decoder


def _places(keys: Collection[str], prefix: str | None = None) -> _Places:
    """Finds raw weights and their EMA.

    Raises MissingInputError if there are several of a kind, and `prefix` names none of them.
    """
    names = _unwrapped(keys)
    found = dict.fromkeys(
        name.removesuffix(anchor) for name in names for anchor in ANCHORS if name.endswith(anchor)
    )
    if CURRENT in found:  # Lightning's WeightAveraging keeps the average in the state_dict
        return _Places(names, CURRENT, "")
    if prefix is not None:
        chosen = prefix.rstrip(".") + "." * bool(prefix)
        if chosen not in found:
            there = ", ".join(sorted(found)) or "none"
            raise MissingInputError(f"init.prefix={prefix}: no autoencoder below it, but: {there}")
        return _Places(names, chosen, None)
    copies = [one for one in found if one.endswith(ONLINE)]
    averages = [one for one in found if one not in copies and EMA_MARK.search(one)]
    others = [one for one in found if one not in (*copies, *averages)]
    raw = _only(others or copies, "autoencoders")
    if raw is None and not averages:
        raw = ""  # parts of an autoencoder have no prefix
    listed = None
    if raw not in (None, FIRST_STAGE):  # in a full model it would be of the other parts
        lists = {item[1] for item in map(LISTED.fullmatch, names) if item}
        listed = _only(list(lists), "EMAs")
    ema, partial = _only(averages, "EMAs"), ""
    if raw is not None and ema is not None and (missing := _missing(names, raw, ema)):
        partial = f"its EMA below {ema} is left out: it lacks {missing} and perhaps more"
        ema = None
    return _Places(names, raw, ema, listed, partial)


def _missing(names: Collection[str], raw: str, ema: str) -> str | None:
    """The first tensor of the raw decoder that an EMA does not have."""
    inner = (name.removeprefix(ema) for name in names if name.startswith(ema))
    averaged = {_dotted(name) or name for name in inner}
    decoder = (n.removeprefix(raw) for n in names if n.startswith(f"{raw}decoder."))
    return next((name for name in decoder if name not in averaged), None)


def _only(prefixes: list[str], what: str) -> str | None:
    """The one prefix of a kind; a full model's first stage and a bare name go before others."""
    for preferred in (FIRST_STAGE, ""):
        if preferred in prefixes:
            return preferred
    if len(prefixes) > 1:
        raise MissingInputError(
            f"several {what} in this file, below {', '.join(sorted(prefixes))}; init.prefix=NAME "
            "(inspect --prefix NAME) chooses one, or give a file with one"
        )
    return prefixes[0] if prefixes else None


def _unwrapped(keys: Collection[str]) -> dict[str, str]:
    """Names without what torch.compile, DDP, FSDP and the like put into them -> the file's."""
    names: dict[str, str] = {}
    taken = set(keys)
    for key in keys:
        name = WRAPPERS.sub("", key)
        names[key if name != key and name in taken else name] = key
        taken.add(name)
    return names


def _part(name: str, places: _Places) -> tuple[str, str] | None:
    """The part, raw or ema, of an unwrapped name, and its name there; None if it is not used."""
    item = LISTED.fullmatch(name)
    if item and item[1] == places.listed:
        return "listed", item[2]
    averaged, raw = _below(name, places.ema), _below(name, places.raw)
    averaged = _dotted(averaged) or averaged
    if averaged.startswith(AUTOENCODER_PARTS):
        return "ema", averaged
    if raw.startswith((*AUTOENCODER_PARTS, DISCRIMINATOR)) or raw in (*EMA_SCALARS, LOGVAR):
        return "raw", raw
    return ("scalar", name) if name in EMA_SCALARS else None


def _below(name: str, prefix: str | None) -> str:
    """What follows a prefix in a name; empty if it does not begin so."""
    return "" if prefix is None or not name.startswith(prefix) else name.removeprefix(prefix)


def _dotted(name: str) -> str | None:
    """The name of a tensor in the original's EMA, which takes the dots out of names."""
    pieces = DOTLESS.fullmatch(name)
    return ".".join(piece for piece in pieces.groups() if piece) if pieces else None


def recognise(
    state: Mapping[str, Tensor], select: str = "ema", prefix: str | None = None
) -> Weights:
    """Finds the autoencoder in any of the layouts; `select` is "ema" or "raw".

    Of a training checkpoint also a further average, "ema-0.9999". `prefix` is what stands before
    its names, where a file has several. Raises MissingInputError if there is none.
    """
    if _is_training(state):
        return _from_training(state, select)
    places = _places(state, prefix)
    parts: dict[str, State] = {"raw": {}, "ema": {}, "listed": {}, "scalar": {}, "dropped": {}}
    for name, key in places.names.items():
        part, inner_name = _part(name, places) or ("dropped", key)
        parts[part][inner_name] = state[key]
    inner, dropped = parts["raw"], list(parts["dropped"])
    own = {k: v for k, v in inner.items() if k.startswith(AUTOENCODER_PARTS)}
    averaged = parts["ema"]
    if parts["listed"] and select == "ema":
        averaged = _named_by_order(parts["listed"], own)
    raw, ema = _standard(own), _standard(averaged)
    autoencoder, notes = _selected(raw, ema, select, places)
    _refuse_other_architectures(places, state)
    if not autoencoder:
        some = ", ".join(list(state)[:3]) + " ..." if state else "no tensors"
        raise MissingInputError(
            f"no autoencoder in this file: it holds {some}, expected encoder.* and decoder.*; "
            "give a VAE or a full Stable Diffusion checkpoint"
        )
    family = _marked(dropped)
    scalars = {k: _scalar((parts["scalar"] | inner).get(k)) for k in EMA_SCALARS}
    return Weights(
        layout=_layout_name(family, places, raw or ema, inner or parts["ema"]),
        autoencoder=autoencoder,
        discriminator=_stripped(inner, DISCRIMINATOR) or None,
        logvar=_scalar(inner.get(LOGVAR)),
        ema_scalars={k: float(v) for k, v in scalars.items() if v is not None},
        dropped=dropped,
        family=family,
        notes=notes,
    )


def _standard(state: State) -> State:
    """CompVis names and shapes of an autoencoder in CompVis' or diffusers' naming."""
    if any(".down_blocks." in key or ".mid_block." in key or ".up_blocks." in key for key in state):
        return from_diffusers(state)
    return _attention(state)


def _selected(raw: State, ema: State, select: str, places: _Places) -> tuple[State, list[str]]:
    """The weights that were asked for, and what to say about them."""
    where = f"below {places.listed or places.ema or 'state_dict'}"
    if not ema:
        unread = places.listed and f"the raw weights are taken; its EMA {where} is not"
        return raw, [note for note in (unread, places.partial) if note]
    if select == "raw":
        if not raw:
            raise MissingInputError(
                f"it holds an EMA ({where}) without the raw weights; give init.select=ema"
            )
        return raw, [f"the raw weights are taken; its EMA {where} is not"]
    choice = "; init.select=raw takes the raw weights" if raw else ", there is nothing else"
    return {**raw, **ema}, [f"the EMA {where} is taken{choice}"]


def _named_by_order(listed: State, raw: State) -> State:
    """An EMA that is a list, in the order of all parameters, or of the decoder's.

    Raises MissingInputError if neither fits.
    """
    values = [listed[key] for key in sorted(listed, key=int)]
    decoder = {k: v for k, v in raw.items() if k.startswith(("decoder.", "post_quant_conv."))}
    # EMA packages keep a list in the order of module.parameters(), which is that of the state dict:
    # the networks have no buffers. Shapes show which module it was.
    for names in (raw, decoder):
        if [v.shape for v in names.values()] == [v.shape for v in values]:
            return dict(zip(names, values, strict=True))
    raise MissingInputError(
        f"it holds an EMA as a list of {len(values)} tensors without names, which are not the "
        "autoencoder's in order; init.select=raw takes the raw weights"
    )


def _layout_name(family: str | None, places: _Places, found: State, inner: Collection[str]) -> str:
    """For people."""
    if places.raw == FIRST_STAGE:
        return f"Stable Diffusion {'XL ' if family == 'sdxl' else ''}checkpoint"
    return f"{'CompVis' if set(found) <= set(inner) else 'diffusers'} autoencoder"


def _marked(names: Collection[str]) -> str | None:
    """The family that the other parts of a full model show."""
    for mark, shown in MARKS:
        if any(re.search(mark, name) for name in names):
            return shown
    return None


def _scalar(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is not None and tensor.numel() == 1 else None


def _from_training(state: Mapping[str, Tensor], select: str) -> Weights:
    autoencoder = _stripped(state, "autoencoder.")
    if select != "raw":
        place = module_name(select)
        ema = _stripped(state, f"{place}.")
        unknown = sorted(ema.keys() - autoencoder.keys())
        if unknown or not ema:
            got = f"that is missing: no {place}.*"
            if ema:
                got = f"of other names: {', '.join(unknown[:3])}"
            raise MissingInputError(f"training checkpoint with an EMA {got}; use another")
        autoencoder = {**autoencoder, **ema}
    return Weights(
        layout=f"training checkpoint ({label(select)} weights)",
        autoencoder=autoencoder,
        discriminator=_stripped(state, "discriminator.") or None,
        logvar=_scalar(state.get("logvar")),
    )


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor, by its name."""
    return {key: tuple(value.shape) for key, value in state.items()}


# Names that stand beside quantised weights: ComfyUI's and torchao's scales, bitsandbytes' states.
SCALES = re.compile(
    r"\.(scale_weight|weight_scale(_inv)?|scale_input|input_scale|comfy_quant|weight_zero_point"
    r"|(weight\.)?(SCB|absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*))$"
)
QUANTISED = "quantised weights cannot be trained or written; give the file from before"


def check_shapes(state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises MissingInputError naming the first differences of names, shapes or kinds."""
    problems = differences(state, expected)
    if problems:
        shown = "\n  ".join(problems[:5])
        more = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
        if scale := next(filter(SCALES.search, state), None):
            more += f"\n{scale} is a scale: {QUANTISED}"
        raise MissingInputError(f"not this architecture:\n  {shown}{more}")


def differences(state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """One line per tensor that is missing, unexpected, or of another shape or kind, in order."""
    problems = []
    for key, shape in expected.items():
        if key not in state:
            problems.append(f"missing {key}, expected {tuple(shape)}")
        elif tuple(state[key].shape) != tuple(shape):
            problems.append(f"{key} is {tuple(state[key].shape)}, expected {tuple(shape)}")
        elif not key.endswith(BATCH_COUNTS) and not state[key].is_floating_point():
            problems.append(f"{key} is {state[key].dtype}, expected floating point ({QUANTISED})")
    return problems + [f"unexpected {key}" for key in state if key not in expected]


def architecture(state: Mapping[str, Tensor], facts: Facts | None = None) -> dict[str, Any]:
    """AutoencoderKL's arguments, read off the shapes of a CompVis state dict.

    The groups of its norms have no shape: they are among them only where `facts` states them.
    Raises MissingInputError if a tensor that shows an argument is missing.
    """
    groups = facts.norm_num_groups if facts else None
    plain = not any(key.startswith(("quant_conv.", "post_quant_conv.")) for key in state)
    try:
        z_channels = state["decoder.conv_in.weight"].shape[1]  # (top, z, 3, 3)
        ch = state["encoder.conv_in.weight"].shape[0]  # (ch, 3, 3, 3)
        levels = range(_levels(state, "down"))
        widths = [state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in levels]
        block = re.compile(r"encoder\.down\.0\.block\.\d{1,3}\.conv1\.weight")
        found = {
            "ch": ch,
            "ch_mult": tuple(width // ch for width in widths),
            "num_res_blocks": len(list(filter(block.match, state))),
            "z_channels": z_channels,
            # (z, embed, 1, 1)
            "embed_dim": z_channels if plain else state["post_quant_conv.weight"].shape[1],
        }
        if plain:
            found["quant_conv"] = False
        if groups:
            found["norm_num_groups"] = groups
        return found
    except (KeyError, ValueError) as error:
        raise MissingInputError(f"not a whole autoencoder: {error} is missing") from error
    except (IndexError, ZeroDivisionError) as error:
        raise MissingInputError("not an autoencoder of this form: its shapes differ") from error


# --- diffusers ------------------------------------------------------------------------------


def to_diffusers(state: Mapping[str, Tensor]) -> State:
    """CompVis names -> diffusers' (new attention names; attention weights become (C, C))."""
    levels = _levels(state, "down")
    return {
        diffusers_name(key, levels): value.flatten(1) if _is_attention_weight(key) else value
        for key, value in state.items()
    }


def from_diffusers(state: Mapping[str, Tensor]) -> State:
    """diffusers' names, old or new -> CompVis (attention weights become (C, C, 1, 1))."""
    levels = _levels(state, "down_blocks")
    return _attention({compvis_name(key, levels): value for key, value in state.items()})


def _levels(state: Collection[str], blocks: str) -> int:
    """How many levels an encoder has by its names; 1 where these show none."""
    found = (re.match(rf"encoder\.{blocks}\.(\d{{1,3}})", key) for key in state)
    return 1 + max((int(m[1]) for m in found if m), default=0)


def _attention(state: Mapping[str, Tensor]) -> State:
    """Attention weights as (C, C, 1, 1), whatever rank they have; joined q, k and v are split."""
    found: State = {}
    for key, value in state.items():
        joined = re.fullmatch(r"(.*\.mid\.attn_1\.)(?:to_)?qkv\.(weight|bias)", key)
        parts = {key: value}
        if joined and value.ndim and value.shape[0] % 3 == 0:
            pieces = zip("qkv", value.chunk(3), strict=True)
            parts = {f"{joined[1]}{name}.{joined[2]}": piece for name, piece in pieces}
        for name, part in parts.items():
            # CompVis computes attention by 1x1 convolutions, diffusers by linear layers: the same
            # sums.
            flat = _is_attention_weight(name) and part.ndim >= 2 and set(part.shape[2:]) <= {1}
            found[name] = part.reshape(*part.shape[:2], 1, 1) if flat else part
    return found


def diffusers_name(key: str, levels: int) -> str:
    """The diffusers name of a CompVis key; the decoder's levels count the other way round."""
    if level := re.match(r"decoder\.up\.(\d{1,3})\.", key):
        key = f"decoder.up_blocks.{levels - 1 - int(level[1])}.{key[level.end() :]}"
    for ours, theirs in SPELLINGS:
        key = key.replace(ours, theirs)
    return key


def compvis_name(key: str, levels: int) -> str:
    """The CompVis name of a diffusers key."""
    if level := re.match(r"decoder\.up_blocks\.(\d{1,3})\.", key):
        key = f"decoder.up.{levels - 1 - int(level[1])}.{key[level.end() :]}"
    for ours, theirs in SPELLINGS:
        key = key.replace(theirs, ours)
    return key


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
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    known = (stated or Facts()).stated()
    known.pop("family", None)
    if "use_quant_conv" in known:
        known["use_post_quant_conv"] = known["use_quant_conv"]
    return defaults | known


# Architectures that are often taken for this one: a name that only they have, and what they are.
OTHERS = (
    (r"bn\.running_(mean|var)", "FLUX.2's autoencoder (32 channels, normalised in patches)"),
    (r"(encoder|decoder)\.(stages|project_in)\.", "a DC-AE (deep compression)"),
    (r"(encoder|decoder)\.(down|up)_blocks\.\d+\.\d+\.", "a DC-AE (deep compression)"),
    (r"(encoder|decoder)\.(downsamples|upsamples|middle|head)\.\d+\.", "Wan's or Qwen-Image's"),
    (r"(encoder|decoder)\..*\.(gamma|time_conv\.weight)", "Wan's or Qwen-Image's"),
    (r"decoder\..*(time_stack|time_mixer|temporal_res_block)", "Stable Video Diffusion's decoder"),
    (r"decoder\.condition_encoder\.", "an asymmetric autoencoder, for inpainting"),
    (r"quantize\.embedding\.weight", "a VQ autoencoder"),
)
TINY = re.compile(r"(encoder|decoder)\.(layers\.)?\d+\.(conv\.\d+\.)?weight")
CLASSES = {
    "AutoencoderKLWan": "Wan's autoencoder",
    "AutoencoderKLQwenImage": "Qwen-Image's autoencoder",
    "AutoencoderKLFlux2": "FLUX.2's autoencoder",
    "AutoencoderDC": "a DC-AE (deep compression)",
    "AutoencoderTiny": "a TAESD (tiny autoencoder)",
    "AutoencoderKLTemporalDecoder": "Stable Video Diffusion's autoencoder",
    "AsymmetricAutoencoderKL": "an asymmetric autoencoder, for inpainting",
    "VQModel": "a VQ autoencoder",
    "ConsistencyDecoderVAE": "a consistency decoder",
}
REFUSED = (
    "{what}, another architecture: this program trains the decoders of kl-f8 (Stable Diffusion "
    "1.x, 2.x and XL) and of its form with 16 channels (SD3, FLUX.1)"
)


def names_autoencoder(class_name: str) -> bool:
    """Whether a class of diffusers' is an autoencoder, of whatever kind."""
    return bool(re.search("Autoencoder|VAE|VQ", class_name))


def refused_config(values: Mapping[str, Any]) -> str | None:
    """Why a folder whose config.json holds these values is refused, if it is."""
    name, activation = str(values.get("_class_name", "")), values.get("act_fn", "silu")
    if name != "AutoencoderKL" and names_autoencoder(name):
        return REFUSED.format(what=f"{CLASSES.get(name, 'an autoencoder')} ({name})")
    if activation not in ("silu", "swish"):  # which no tensor shows
        return REFUSED.format(what=f"its config.json states act_fn={activation}")
    return None


def _refuse_other_architectures(places: _Places, state: Mapping[str, Tensor]) -> None:
    """Raises MissingInputError if names or ranks are those of a known other architecture."""
    prefix = places.raw or places.ema or ""
    inner = {n.removeprefix(prefix): k for n, k in places.names.items() if n.startswith(prefix)}
    signs = [(list(filter(re.compile(sign).match, inner)), what) for sign, what in OTHERS]
    small = [n for n in filter(TINY.fullmatch, inner) if state[inner[n]].ndim == 4]
    video = [n for n, k in inner.items() if n.startswith("decoder.") and state[k].ndim == 5]
    signs += [(small, "a TAESD (tiny autoencoder)"), (video[2:], "a video autoencoder")]
    for names, what in signs:
        if names:
            raise MissingInputError(REFUSED.format(what=f"{names[0]} shows {what}"))


def _is_attention_weight(key: str) -> bool:
    return bool(re.search(r"\.mid\.attn_1\.(q|k|v|proj_out)\.weight$", key))


def _stripped(state: Mapping[str, Tensor], prefix: str) -> State:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
