"""Every setting of a run: its type, meaning, bounds and where to start.

A number that defines a recipe has no default here (`MISSING`): the recipe must state it. Machine
settings have defaults, and may change on resume. `SETTINGS` is the table of all of them.
"""

import math
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from kl_f8_train.units import written

MISSING: Any = "???"  # omegaconf's mark of a value that must be given
# Bounds are inclusive, so the floats next to 0 and 1 stand for "above 0" and "below 1".
ABOVE_0, BELOW_1, ANY = math.ulp(0.0), math.nextafter(1.0, 0.0), sys.float_info.max
ITERATIONS = 10**9 - 1  # a checkpoint's name has nine digits
IMAGES, PIXELS, CHANNELS, MOST_LEVELS = 10**6, 2**16, 2048, 8  # beyond any use
Bounds = tuple[float, float]


def setting(
    doc: str,
    default: Any = MISSING,
    *,
    machine: bool = False,
    bounds: Bounds | None = None,
    usual: str | None = None,
) -> Any:
    """A field with its meaning and unit; `machine` marks what may change on resume.

    A group's `machine` is that of all in it. `bounds` are the least and the largest value, in a
    list of each element; `usual` says where to start, for the settings page: at the default unless
    it says otherwise.
    """
    is_group = isinstance(default, type)
    if usual is None:
        usual = "" if is_group or default == MISSING else written(default)
    metadata = {"doc": doc, "machine": machine, "bounds": bounds, "usual": usual}
    if is_group:
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


# --- the settings ---------------------------------------------------------------------------


@dataclass(kw_only=True)
class Init:
    """Where a new run starts (a resumed run does not read it)."""

    weights: str = setting(
        "file, diffusers folder, run directory or hub id of the VAE to start from",
        machine=True,
        usual="a published VAE of your diffusion model",
    )
    iteration: int | None = setting(
        "iteration of these weights; null: as the file says",
        bounds=(0, ITERATIONS),
        usual="what the base's publisher states; 0 for a run of your own",
    )
    family: Literal["sd", "sdxl", "sd3", "flux", "other"] | None = setting(
        "models whose VAE it is, which sets its latents' scale; null: as the file says",
        None,
        machine=True,
        usual="null; what it is of, for a lone file",
    )
    select: Literal["ema", "raw"] = setting(
        "which weights, of a file that holds an EMA beside the raw ones", "ema"
    )
    prefix: str | None = setting(
        "prefix of the autoencoder's names, in a file with several", None, machine=True
    )
    discriminator: Literal["file", "new"] = setting(
        "the file's discriminator, or a new one, which warms up", "file", machine=True
    )


@dataclass(kw_only=True)
class Model:
    """AutoencoderKL's shape, in the original's names."""

    ch: int = setting("channels at full resolution", bounds=(1, CHANNELS), usual="128")
    ch_mult: list[int] = setting(
        "channel multiplier of each level", bounds=(1, 64), usual="1, 2, 4, 4"
    )
    num_res_blocks: int = setting(
        "residual blocks per encoder level (the decoder has one more)", bounds=(1, 64), usual="2"
    )
    z_channels: int = setting(
        "channels of the encoder's output (doubled: mean and log variance)",
        bounds=(1, CHANNELS),
        usual="4; SD3 and FLUX: 16",
    )
    embed_dim: int = setting(
        "channels of the latents", bounds=(1, CHANNELS), usual="4; SD3 and FLUX: 16"
    )
    norm_num_groups: int = setting(
        "groups of every GroupNorm (the original: 32)",
        32,
        bounds=(1, CHANNELS),
        usual="32; 4 or more channels in each group",
    )
    quant_conv: bool = setting(
        "1x1 convolutions around the latents", True, usual="true; SD3 and FLUX: false"
    )

    @property
    def downsampling(self) -> int:
        """Pixels of a latent's side: each level but the last halves an image."""
        return 2 ** (len(self.ch_mult) - 1)


KL_F8 = Model(ch=128, ch_mult=[1, 2, 4, 4], num_res_blocks=2, z_channels=4, embed_dim=4)
KL_F8_16 = replace(KL_F8, z_channels=16, embed_dim=16, quant_conv=False)  # SD3's and FLUX's
KL_F8_SHAPES = {"kl-f8": KL_F8, "16-channel kl-f8": KL_F8_16}  # that are published


@dataclass(kw_only=True)
class Loss:
    """Sum over pixels of (pixel term + perceptual_weight * perceptual), mean over images."""

    pixel: Literal["l1", "mse"] = setting(
        "pixel term: |x - y| or (x - y)^2", usual="l1 with an adversarial term; mse without"
    )
    perceptual: Literal["lpips_vgg", "st_lpips_alex"] = setting(
        "the frozen perceptual network", usual="lpips_vgg"
    )
    perceptual_weight: float = setting(
        "weight of the perceptual term, per pixel and channel",
        bounds=(0, ANY),
        usual="1 with `l1`; 0.1 with `mse`",
    )
    l1_weight: float | None = setting(
        "weight of |x - y|; null: 1 if loss.pixel is l1, else 0",
        None,
        bounds=(0, ANY),
        usual="null; both, to mix the two terms",
    )
    mse_weight: float | None = setting(
        "weight of (x - y)^2; null: 1 if loss.pixel is mse, else 0",
        None,
        bounds=(0, ANY),
        usual="null; both, to mix the two terms",
    )
    gradient_weight: float = setting(
        "weight of |Sobel(x - y)|, rows and columns; 0: none",
        0.0,
        bounds=(0, ANY),
        usual="0; 0.1 to 1 for edges",
    )
    learn_logvar: bool = setting("train the loss's log variance (the original's stays 0)", False)
    perceptual_precision: Literal["float32", "bfloat16"] = setting(
        "of the perceptual network's convolutions in training; its lengths and distances stay "
        "float32, and so does validation",
        "float32",
    )
    perceptual_weights: str | None = setting(
        "VGG16 features file; null: where `kl-f8-train fetch` put it", None, machine=True
    )
    allow_stand_in: bool = setting("accept ST-LPIPS in LPIPS' place (demo and tests)", False)

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each term: l1, mse, gradient, perceptual."""
        l1, mse = (
            float(self.pixel == name) if given is None else given
            for name, given in (("l1", self.l1_weight), ("mse", self.mse_weight))
        )
        of_rest = {"gradient": self.gradient_weight, "perceptual": self.perceptual_weight}
        return {"l1": l1, "mse": mse, **of_rest}

    @property
    def formula(self) -> str:
        """The terms before the perceptual one, such as `l1` or `0.5 l1 + 2 mse`."""
        terms = [(name, w) for name, w in self.weights.items() if w and name != "perceptual"]
        return " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in terms)


@dataclass(kw_only=True)
class Adversarial:
    """The discriminator and its hinge loss."""

    weight: float = setting(
        "factor on the adaptive weight (disc_weight)", bounds=(0, ANY), usual="0.1 to 0.5"
    )
    start_iteration: int = setting(
        "first iteration with the adversarial term (disc_start)",
        bounds=(0, ITERATIONS),
        usual="0, or below `init.iteration`",
    )
    warmup_iterations: int = setting(
        "discriminator-only iterations first, if the file has none",
        bounds=(0, ITERATIONS),
        usual="1,000; 0 if the base holds a discriminator",
    )
    ndf: int = setting(
        "channels of the discriminator's first convolution", bounds=(1, CHANNELS), usual="64"
    )
    n_layers: int = setting("strided convolutions in the discriminator", bounds=(1, 16), usual="3")
    max_weight: float = setting(
        "upper clamp of the adaptive weight", 1e4, bounds=(ABOVE_0, ANY), usual="10,000"
    )
    sync_batchnorm: bool = setting("batch statistics over all GPUs (the original: per GPU)", False)
    per_gpu_weight: bool = setting("adaptive weight per GPU as in the original", False)
    run_before_start: bool = setting("run the discriminator before start, as the original", False)


@dataclass(kw_only=True)
class Optimizer:
    """Adam, one for the decoder and one for the discriminator."""

    learning_rate: float = setting(
        "absolute, per decoder update; nothing scales it",
        bounds=(ABOVE_0, ANY),
        usual="4.5e-6 to 5e-5; first 1e-5",
    )
    betas: list[float] = setting("Adam's two decays", bounds=(0, BELOW_1), usual="0.5, 0.9")
    eps: float = setting("Adam's epsilon", bounds=(ABOVE_0, ANY), usual="1e-8")
    warmup_iterations: int = setting(
        "iterations over which the rate rises to its whole; 0: none",
        0,
        bounds=(0, ITERATIONS),
        usual="0; 100 to 1,000",
    )
    decay: Literal["constant", "linear", "cosine"] = setting(
        "how the rate falls over decay_iterations",
        "constant",
        usual="constant; cosine over the run",
    )
    decay_iterations: int | None = setting(
        "iterations from the run's start to the final rate",
        None,
        bounds=(1, ITERATIONS),
        usual="the run's length",
    )
    final_learning_rate: float = setting(
        "rate after the decay", 0.0, bounds=(0, ANY), usual="0 to a tenth of the rate"
    )
    clip_norm: float | None = setting(
        "largest norm of a network's gradient; null: not clipped",
        None,
        bounds=(ABOVE_0, ANY),
        usual="null; 2 to 5 times the median of metrics.csv",
    )


@dataclass(kw_only=True)
class Latents:
    """What the decoder is given beside latents of the encoder."""

    noise: float = setting(
        "tau: trains on z + u tau std(z) e, u uniform in [0, 1] and e normal, of each image",
        0.0,
        bounds=(0, 10),
        usual="0; 0.1 to 0.4 for latents that a sampler made",
    )


@dataclass(kw_only=True)
class Ema:
    """Moving average of the decoder and post_quant_conv, or several at once."""

    decay: float | list[float] = setting(
        "share kept at each update; of several the first is the run's, the others are kept beside",
        bounds=(0, BELOW_1),
        usual="0.999 to 0.9999: 1 - 10 / iterations",
    )
    warmup: bool = setting(
        "decay grows as (1 + n) / (10 + n); forgets the start",
        False,
        usual="false: the average starts from a trained base",
    )

    def __post_init__(self) -> None:
        match self.decay:
            case [float() as only]:  # the same run, whichever way it is written
                self.decay = only

    @property
    def decays(self) -> list[float]:
        """All decays, the run's own first."""
        return self.decay if isinstance(self.decay, list) else [self.decay]


@dataclass(kw_only=True)
class Source:
    """One set of images."""

    shards: str = setting(
        "shards: brace pattern, glob, directory, .tar, list file, address; or a folder of images",
        usual="a folder on one machine, shards on a cluster",
    )
    weight: float = setting(
        "share in every batch, relative to the other sources",
        1.0,
        bounds=(ABOVE_0, 10**6),
        usual="1",
    )
    filters: list[str] = setting(
        "conditions on an image's metadata, such as 'width >= 256'",
        list,
        usual="none; width and height from `data.shorter_side` on",
    )


@dataclass(kw_only=True)
class Data:
    """What the images are and how they are cut."""

    sources: dict[str, Source] = setting("one entry per source: data.sources.NAME=SHARDS_OR_FOLDER")
    shorter_side: int | list[int] | None = setting(
        "bicubic resize of the shorter side, in pixels, or a range [a, b] to draw it from; "
        "null: none",
        bounds=(1, PIXELS),
        usual="1 to 1.5 x `data.crop`; a range: up to 2.5 x",
    )
    crop: int = setting(
        "random square crop, in pixels; a multiple of 8",
        bounds=(1, PIXELS),
        usual="256; 512 for large images",
    )
    flip: bool = setting(
        "mirror every other image, at random (the original does not)",
        False,
        usual="true for some thousands of images or fewer",
    )
    draft: bool = setting(
        "decode JPEGs at reduced size: faster, slightly other pixels",
        False,
        usual="false; true where loaders are too slow",
    )
    lanes: int = setting("parallel lanes of the plan, at most", 48, bounds=(1, IMAGES))
    max_bad_share: float = setting(
        "share of bad images that stops a run; from 1,000 images on exactly",
        0.1,
        bounds=(ABOVE_0, 1),
        usual="0.01 to 0.1",
    )
    bad_shards: Literal["stop", "skip"] = setting(
        "what a truncated shard does at start",
        "stop",
        usual="stop; skip for downloads of thousands",
    )
    workers: int = setting(
        "loader processes per GPU",
        4,
        machine=True,
        bounds=(0, 256),
        usual="4 to 8; at most cores / GPUs",
    )
    index_dir: str | None = setting(
        "where indexes are kept; null: beside the shards, or in the user's cache",
        None,
        machine=True,
        usual="null; a shared disk for remote shards",
    )
    cache_dir: str | None = setting(
        "node-local directory for remote shards; null: in the user's cache",
        None,
        machine=True,
        usual="null; a local disk of each node",
    )
    cache_gib: float = setting(
        "size of that directory at most, in GiB",
        100.0,
        machine=True,
        bounds=(ABOVE_0, 10**9),
        usual="50 to 1,000, by the disk",
    )


@dataclass(kw_only=True)
class Compute:
    """The machine. May change on resume."""

    accelerator: Literal["auto", "cpu", "cuda"] = setting("device kind", "auto")
    devices: int | None = setting("GPUs per node; null: all", None, bounds=(1, 1000))
    num_nodes: int | None = setting(
        "nodes; null: as torchrun or SLURM says", None, bounds=(1, 10_000)
    )
    per_device_batch: int | None = setting(
        "images per GPU and micro-batch; null: the largest divisor up to 12",
        None,
        bounds=(1, IMAGES),
        usual="4 to 12",
    )
    timeout_minutes: float = setting(
        "a silent rank is an error after this", 10.0, bounds=(ABOVE_0, 10**6), usual="5 to 30"
    )
    channels_last: bool | None = setting(
        "networks and images as NHWC in memory; null: on CUDA, if GroupNorm keeps it", None
    )
    subpixel_upsample: bool = setting(
        "double and convolve in one step: 4/9 of the arithmetic, equal but for rounding", True
    )
    lean_norm: bool = setting(
        "GroupNorm and swish keep their input only for the backward pass; equal but for rounding",
        True,
    )
    perceptual_parts: int = setting(
        "parts of a micro-batch that go through the perceptual network one after another, if it "
        "divides; 1: all at once",
        2,
        bounds=(1, IMAGES),
        usual="2; 4 when memory is short",
    )
    checkpoint_levels: int = setting(
        "decoder levels, from full resolution down, whose activations are computed twice "
        "instead of kept",
        0,
        bounds=(0, MOST_LEVELS),
        usual="0; 1 to 4 when memory is short",
    )
    deterministic: bool = setting(
        "equal bits in every run on one kind of GPU, or an error that names the operation",
        False,
        usual="false; true to compare two runs",
    )
    compile: bool | None = setting(
        "torch.compile the networks; null: on CUDA, with a C compiler and Python.h", None
    )


@dataclass(kw_only=True)
class Log:
    """What a run logs, and where."""

    every: int = setting(
        "iterations between log lines", 50, bounds=(1, ITERATIONS), usual="10 to 100"
    )
    pictures_every: int = setting(
        "iterations between validations on fixed photographs; 0: none",
        1000,
        bounds=(0, ITERATIONS),
        usual="500 to 5,000",
    )
    pictures: str | None = setting(
        "folder of fixed photographs, held out; null: the first of the data",
        None,
        usual="the held-out folder of `split`",
    )
    pictures_size: int | list[int] | None = setting(
        "side of the validation's squares, in pixels, or a list of sides; pictures are of the "
        "first; null: data.crop",
        None,
        bounds=(1, PIXELS),
        usual="null; [256, 512] for a decoder of large images",
    )
    wandb: Literal["off", "auto", "offline"] = setting(
        "auto: online, or offline without a network", "off", usual="auto, where you have an account"
    )
    project: str = setting("wandb project", "kl-f8-train", usual="")
    tensorboard: bool = setting("write TensorBoard event files to run_dir/tensorboard", False)


@dataclass(kw_only=True)
class Checkpoint:
    """When the state is written, and what is kept."""

    every: int = setting(
        "iterations between checkpoints", 1000, bounds=(1, ITERATIONS), usual="500 to 5,000"
    )
    keep_last: int = setting("newest checkpoints kept", 2, bounds=(1, ITERATIONS), usual="2 to 5")
    keep_every: int = setting(
        "checkpoints at its multiples stay; 0: none",
        50000,
        bounds=(0, ITERATIONS),
        usual="5 to 20 in a run",
    )
    keep_best: bool = setting(
        "keep the checkpoint with the best validation beside the others",
        False,
        usual="true with held-out photographs",
    )


@dataclass(kw_only=True)
class Config:
    """The run as a whole."""

    name: str = setting("name of the run and of its exported files")
    run_dir: str = setting("directory of the run", machine=True)
    stop_iteration: int = setting(
        "iteration at which the run ends",
        machine=True,
        bounds=(1, ITERATIONS),
        usual="10,000 to 300,000 after the base",
    )
    global_batch: int = setting(
        "images per iteration, over all GPUs and micro-batches",
        bounds=(1, IMAGES),
        usual="16 on one GPU; 192 as published",
    )
    seed: int = setting("seed of order, crops and noise", 0, bounds=(0, 2**63 - 1), usual="any")
    precision: Literal["float32", "tf32", "bfloat16"] = setting(
        "arithmetic; tf32: float32 rounded to 10 bits in products on a GPU; weights stay float32",
        usual="bfloat16 from RTX 30 on, else float32",
    )
    second_forward: bool = setting(
        "the original's second pass for the discriminator",
        False,
        usual="false: it costs a decoding",
    )
    max_bad_updates: int = setting(
        "non-finite updates in a row before the run stops", 10, bounds=(1, ITERATIONS)
    )
    init: Init = setting("start", Init)
    model: Model = setting("network", Model)
    loss: Loss = setting("reconstruction loss", Loss)
    adversarial: Adversarial | None = setting("adversarial term; null: none")
    optimizer: Optimizer = setting("optimizers", Optimizer)
    latents: Latents = setting("latents", Latents)
    ema: Ema = setting("moving average", Ema)
    data: Data = setting("data", Data)
    compute: Compute = setting("machine", Compute, machine=True)
    log: Log = setting("reports", Log, machine=True)
    checkpoint: Checkpoint = setting("checkpoints", Checkpoint, machine=True)


# --- one table of all settings --------------------------------------------------------------


PLAIN_NAMES = {bool: "true | false", str: "string", int: "int", float: "float"}  # for people


@dataclass(frozen=True)
class Setting:
    """A dotted key, or a group of them; the name of a source in it is NAME."""

    kind: Any  # declared type, without None
    nullable: bool
    default: Any
    doc: str
    machine: bool
    bounds: Bounds | None
    usual: str

    @property
    def is_group(self) -> bool:
        """Whether there are keys below it."""
        return is_dataclass(self.kind) or get_origin(self.kind) is dict

    @property
    def type_name(self) -> str:
        """For people; a group has none."""
        origin, inner = get_origin(self.kind), get_args(self.kind)
        if origin is Literal:
            name = " | ".join(inner)
        elif origin is list:
            name = f"list[{PLAIN_NAMES[inner[0]]}]"
        elif origin is Union:  # a number, or several
            name = f"{PLAIN_NAMES[inner[0]]} | list[{PLAIN_NAMES[inner[0]]}]"
        else:
            name = PLAIN_NAMES[self.kind]
        return f"{name} | null" if self.nullable else name


def _settings(kind: Any, prefix: str = "", machine: bool = False) -> Iterator[tuple[str, Setting]]:
    """(key, setting) of a dataclass and all below it, in the order of the declaration.

    `machine` is that of the group.
    """
    hints = get_type_hints(kind)
    for item in fields(kind):
        declared, nullable = hints[item.name], False
        if get_origin(declared) in (Union, UnionType):
            nullable = NoneType in get_args(declared)
            kinds = tuple(arg for arg in get_args(declared) if arg is not NoneType)
            declared = Union[kinds]  # noqa: UP007, of one is that one
        default = [] if item.default is NO_DEFAULT else item.default  # of a group, unused
        # A group has a row of its own before its settings; of sources also `data.sources.NAME`.
        found = Setting(declared, nullable, default, **item.metadata)
        found = replace(found, machine=machine or found.machine)
        yield f"{prefix}{item.name}", found
        inner = declared
        if get_origin(declared) is dict:
            inner, prefix_below = get_args(declared)[1], f"{prefix}{item.name}.NAME"
            yield prefix_below, replace(found, kind=inner)
        else:
            prefix_below = f"{prefix}{item.name}"
        if is_dataclass(inner):
            yield from _settings(inner, f"{prefix_below}.", found.machine)


SETTINGS = dict(_settings(Config))
VALUES = {key: found for key, found in SETTINGS.items() if not found.is_group}


def setting_of(key: str) -> Setting | None:
    """What is known of a dotted key; None if there is no such key."""
    # Sources are named by the user; all of them have the settings of data.sources.NAME.
    source = re.match(r"data\.sources\.(.+?)(\.\w+)?$", key)
    if source is None:
        return SETTINGS.get(key)
    return SETTINGS.get(f"data.sources.NAME{source[2] or ''}")


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested values, in the order of the declaration."""
    return asdict(config)


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every setting in nested values."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
