"""Every setting of a run: typed, documented, checked before anything heavy is imported.

A recipe is one complete YAML file. A number that defines a recipe has no default here
(`MISSING`): the file must state it. Machine settings have defaults, and may change on resume.
"""

import contextlib
import difflib
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import MISSING, DictConfig, Node, OmegaConf
from omegaconf.errors import KeyValidationError, OmegaConfBaseException, ValidationError

from kl_f8_train.errors import MissingInputError, UsageError, like_path
from kl_f8_train.run_dir import CONFIG_FILE
from kl_f8_train.units import quoted, written

SHIPPED = tuple(folder / "configs" for folder in Path(__file__).parents[:2])  # installed, cloned


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
    usual: str = "",
) -> Any:
    """A field with its meaning and unit; `machine` marks what may change on resume.

    `bounds` are the least and the largest value, in a list of each element; `usual` says where to
    start, for the settings page.
    """
    metadata = {"doc": doc, "machine": machine, "bounds": bounds, "usual": usual}
    if isinstance(default, type):
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
        "which weights, of a file that holds an EMA beside the raw ones", "ema", usual="ema"
    )
    prefix: str | None = setting(
        "prefix of the autoencoder's names, in a file with several",
        None,
        machine=True,
        usual="null",
    )
    discriminator: Literal["file", "new"] = setting(
        "the file's discriminator, or a new one, which warms up", "file", machine=True, usual="file"
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


KL_F8 = Model(ch=128, ch_mult=[1, 2, 4, 4], num_res_blocks=2, z_channels=4, embed_dim=4)
KL_F8_16 = replace(KL_F8, z_channels=16, embed_dim=16, quant_conv=False)  # SD3's and FLUX's
PUBLISHED_SHAPES = (KL_F8, KL_F8_16)


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
    learn_logvar: bool = setting(
        "train the loss's log variance (the original's stays 0)", False, usual="false"
    )
    perceptual_precision: Literal["float32", "bfloat16"] = setting(
        "of the perceptual network's convolutions in training; its lengths and distances stay "
        "float32, and so does validation",
        "float32",
        usual="float32",
    )
    perceptual_weights: str | None = setting(
        "VGG16 features file; null: where `kl-f8-train fetch` put it",
        None,
        machine=True,
        usual="null",
    )
    allow_stand_in: bool = setting(
        "accept ST-LPIPS in LPIPS' place (demo and tests)", False, usual="false"
    )

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
    sync_batchnorm: bool = setting(
        "batch statistics over all GPUs (the original: per GPU)", False, usual="false"
    )
    per_gpu_weight: bool = setting(
        "adaptive weight per GPU as in the original", False, usual="false"
    )
    run_before_start: bool = setting(
        "run the discriminator before start, as the original", False, usual="false"
    )


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
    lanes: int = setting("parallel lanes of the plan, at most", 48, bounds=(1, IMAGES), usual="48")
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

    accelerator: Literal["auto", "cpu", "cuda"] = setting(
        "device kind", "auto", machine=True, usual="auto"
    )
    devices: int | None = setting(
        "GPUs per node; null: all", None, machine=True, bounds=(1, 1000), usual="null"
    )
    num_nodes: int | None = setting(
        "nodes; null: as torchrun or SLURM says",
        None,
        machine=True,
        bounds=(1, 10_000),
        usual="null",
    )
    per_device_batch: int | None = setting(
        "images per GPU and micro-batch; null: the largest divisor up to 12",
        None,
        machine=True,
        bounds=(1, IMAGES),
        usual="4 to 12",
    )
    timeout_minutes: float = setting(
        "a silent rank is an error after this",
        10.0,
        machine=True,
        bounds=(ABOVE_0, 10**6),
        usual="5 to 30",
    )
    channels_last: bool | None = setting(
        "networks and images as NHWC in memory; null: on CUDA, if GroupNorm keeps it",
        None,
        machine=True,
        usual="null",
    )
    subpixel_upsample: bool = setting(
        "double and convolve in one step: 4/9 of the arithmetic, equal but for rounding",
        True,
        machine=True,
        usual="true",
    )
    lean_norm: bool = setting(
        "GroupNorm and swish keep their input only for the backward pass; equal but for rounding",
        True,
        machine=True,
        usual="true",
    )
    perceptual_parts: int = setting(
        "parts of a micro-batch that go through the perceptual network one after another, if it "
        "divides; 1: all at once",
        2,
        machine=True,
        bounds=(1, IMAGES),
        usual="2; 4 when memory is short",
    )
    checkpoint_levels: int = setting(
        "decoder levels, from full resolution down, whose activations are computed twice "
        "instead of kept",
        0,
        machine=True,
        bounds=(0, MOST_LEVELS),
        usual="0; 1 to 4 when memory is short",
    )
    deterministic: bool = setting(
        "equal bits in every run on one kind of GPU, or an error that names the operation",
        False,
        machine=True,
        usual="false; true to compare two runs",
    )
    compile: bool | None = setting(
        "torch.compile the networks; null: on CUDA, with a C compiler and Python.h",
        None,
        machine=True,
        usual="null",
    )


@dataclass(kw_only=True)
class Log:
    """What a run logs, and where."""

    every: int = setting(
        "iterations between log lines", 50, machine=True, bounds=(1, ITERATIONS), usual="10 to 100"
    )
    pictures_every: int = setting(
        "iterations between validations on fixed photographs; 0: none",
        1000,
        machine=True,
        bounds=(0, ITERATIONS),
        usual="500 to 5,000",
    )
    pictures: str | None = setting(
        "folder of fixed photographs, held out; null: the first of the data",
        None,
        machine=True,
        usual="the held-out folder of `split`",
    )
    pictures_size: int | list[int] | None = setting(
        "side of the validation's squares, in pixels, or a list of sides; pictures are of the "
        "first; null: data.crop",
        None,
        machine=True,
        bounds=(1, PIXELS),
        usual="null; [256, 512] for a decoder of large images",
    )
    wandb: Literal["off", "auto", "offline"] = setting(
        "auto: online, or offline without a network",
        "off",
        machine=True,
        usual="auto, where you have an account",
    )
    project: str = setting("wandb project", "kl-f8-train", machine=True)
    tensorboard: bool = setting(
        "write TensorBoard event files to run_dir/tensorboard", False, machine=True, usual="false"
    )


@dataclass(kw_only=True)
class Checkpoint:
    """When the state is written, and what is kept."""

    every: int = setting(
        "iterations between checkpoints",
        1000,
        machine=True,
        bounds=(1, ITERATIONS),
        usual="500 to 5,000",
    )
    keep_last: int = setting(
        "newest checkpoints kept", 2, machine=True, bounds=(1, ITERATIONS), usual="2 to 5"
    )
    keep_every: int = setting(
        "checkpoints at its multiples stay; 0: none",
        50000,
        machine=True,
        bounds=(0, ITERATIONS),
        usual="5 to 20 in a run",
    )
    keep_best: bool = setting(
        "keep the checkpoint with the best validation beside the others",
        False,
        machine=True,
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
        "non-finite updates in a row before the run stops", 10, bounds=(1, ITERATIONS), usual="10"
    )
    init: Init = setting("start", Init)
    model: Model = setting("network", Model)
    loss: Loss = setting("reconstruction loss", Loss)
    adversarial: Adversarial | None = setting("adversarial term; null: none")
    optimizer: Optimizer = setting("optimizers", Optimizer)
    latents: Latents = setting("latents", Latents)
    ema: Ema = setting("moving average", Ema)
    data: Data = setting("data", Data)
    compute: Compute = setting("machine", Compute)
    log: Log = setting("reports", Log)
    checkpoint: Checkpoint = setting("checkpoints", Checkpoint)


# --- one table of all settings --------------------------------------------------------------


PLAIN_NAMES = {"bool": "true | false", "str": "string"}  # of types, for people


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
        """For people."""
        if get_origin(self.kind) is Literal:
            name = " | ".join(get_args(self.kind))
        elif get_origin(self.kind) is Union:
            number = get_args(self.kind)[0].__name__
            name = f"{number} | list[{number}]"
        else:
            name = self.kind.__name__ if isinstance(self.kind, type) else str(self.kind)
        if get_origin(self.kind) is list:
            (inner,) = get_args(self.kind)
            name = f"list[{PLAIN_NAMES.get(inner.__name__, inner.__name__)}]"
        name = PLAIN_NAMES.get(name, name)
        return f"{name} | null" if self.nullable else name


def _settings(kind: Any, prefix: str = "") -> Iterator[tuple[str, Setting]]:
    """(key, setting) of a dataclass and all below it, in the order of the declaration."""
    hints = get_type_hints(kind)
    for item in fields(kind):
        declared, nullable = hints[item.name], False
        if get_origin(declared) in (Union, UnionType):
            nullable = NoneType in get_args(declared)
            kinds = tuple(arg for arg in get_args(declared) if arg is not NoneType)
            declared = Union[kinds]  # noqa: UP007, of one is that one
        default = [] if item.default is NO_DEFAULT else item.default  # of a group, unused
        found = Setting(declared, nullable, default, **item.metadata)
        yield f"{prefix}{item.name}", found
        inner = declared
        if get_origin(declared) is dict:
            inner, prefix_below = get_args(declared)[1], f"{prefix}{item.name}.NAME"
            yield prefix_below, replace(found, kind=inner)
        else:
            prefix_below = f"{prefix}{item.name}"
        if is_dataclass(inner):
            yield from _settings(inner, f"{prefix_below}.")


SETTINGS = dict(_settings(Config))
BOUNDS = {key: found.bounds for key, found in SETTINGS.items() if found.bounds}


def setting_of(key: str) -> Setting | None:
    """What is known of a dotted key; None if there is no such key."""
    # Sources are named by the user; all of them have the settings of data.sources.NAME.
    source = re.match(r"data\.sources\.(.+?)(\.\w+)?$", key)
    if source is None:
        return SETTINGS.get(key)
    return SETTINGS.get(f"data.sources.NAME{source[2] or ''}")


def schema() -> list[tuple[str, str, str, str]]:
    """Rows (key, type, default as a recipe has it, meaning) of every setting.

    The default is empty where there is none: every recipe states the value.
    """
    return [
        (key, s.type_name, "" if s.default == MISSING else written(s.default), s.doc)
        for key, s in SETTINGS.items()
        if not s.is_group
    ]


# --- loading --------------------------------------------------------------------------------


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Reads a recipe and applies `key=value` overrides.

    Raises MissingInputError for a missing file and UsageError for anything wrong in it.
    """
    config = parse(path, overrides)
    check(config)
    return config


def parse(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Like `load`, but without `check`: every setting has a value of its type, perhaps unusable."""
    merged = _merge(Path(path), overrides)
    with _in_our_words(str(path)):
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            lines = "\n".join(f"  {key}=...   {_doc(key)}" for key in missing)
            raise UsageError(f"{path}: these settings have no value yet:\n{lines}")
        config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    return config


def load_without_inputs(path: Path, overrides: list[str]) -> Config:
    """`load` for what needs neither weights, data nor a run directory: they may be missing."""
    values = resolve(path, overrides)
    given = {
        "run_dir": values["run_dir"],
        "init.weights": values["init"]["weights"],
        "data.sources": values["data"]["sources"],
    }
    # "???" is omegaconf's mark of a value that must be given; any value passes its check.
    missing = [f"{key}=none" for key, value in given.items() if value == "???"]
    config = load(path, [*missing, *overrides])
    if "data.sources=none" in missing:
        return replace(config, data=replace(config.data, sources={}))
    return config


def resolve(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> dict[str, Any]:
    """Like `load`, as plain values and unchecked; settings without a value stay "???"."""
    values = OmegaConf.to_container(_merge(Path(path), overrides), throw_on_missing=False)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _merge(path: Path, overrides: list[str] | tuple[str, ...]) -> DictConfig:
    raw = _read_yaml(path)
    _expand_source_shorthand(raw, path)
    _refuse_dotted(raw, path)
    for key, value in leaves(raw):
        if _known(key, str(path)).is_group and isinstance(value, bool | int | float | str | list):
            _parse(key, written(value), str(path))
    with _in_our_words(str(path)):
        merged = OmegaConf.merge(OmegaConf.structured(Config), _exactly_typed(raw))
        assert isinstance(merged, DictConfig)
        for text in overrides:
            _override(merged, text)
        return merged


@contextlib.contextmanager
def _in_our_words(where: str) -> Iterator[None]:
    """Raises omegaconf's errors as UsageError: what was got for a key, and what it takes."""
    try:
        yield
    except OverflowError as error:
        raise UsageError(f"{where}: {error}; give a smaller number") from error
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0].rstrip(".")
        key = re.sub(r"\[\d+\]$", "", str(error.full_key or ""))
        found = setting_of(key)
        if found is None:
            text = (
                f"{f'{key}: ' * bool(key)}{reason}; `kl-f8-train config schema` lists the settings"
            )
        else:
            if isinstance(error, ValidationError) and not isinstance(error, KeyValidationError):
                # A value, or omegaconf's node around one.
                value = error.value._value() if isinstance(error.value, Node) else error.value
                if OmegaConf.is_config(error.value):
                    value = OmegaConf.to_container(error.value)
                reason = f"got {quoted(value)}"
            expected = "a group of settings" if found.is_group else found.type_name
            text = f"{key}: {reason}; expected {expected}: {found.doc}"
        raise UsageError(f"{where}: {text}") from error


def find_recipe(name: str) -> Path:
    """A recipe file by its path, a shipped one by its name ("ft_ema"), or that of a run directory.

    `train` keeps the settings of a run in it, so that its directory alone resumes it.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = (folder / f"{name}.yaml" for folder in SHIPPED)
    of_a_run = path / CONFIG_FILE
    return next((file for file in (*shipped, of_a_run) if file.is_file()), path)


def recipe(name: str, *overrides: str) -> Config:
    """A shipped recipe for use without a run; what only a run needs (data, weights) is left out.

    Raises UsageError for overrides (`key=value`) that do not fit.
    """
    unused = ("run_dir=unused", "init.weights=unused", "data.sources=unused")
    return load(find_recipe(name), [*unused, *overrides])


def from_dict(values: Mapping[str, Any]) -> Config:
    """The configuration stored in a checkpoint.

    Raises UsageError if this version does not know a key, or if `name` is not a file name.
    """
    with _in_our_words("stored configuration"):
        typed = _exactly_typed(values)
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), typed))
    assert isinstance(config, Config)
    for problem in _name_problems(config.name):  # it comes from elsewhere, and becomes a path
        raise UsageError(problem)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested values, in the order of the declaration."""
    return asdict(config)


def to_yaml(config: Config | Mapping[str, Any]) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(_plain(config), sort_keys=False)


ABSENT = "(none)"  # how a change names a setting that one side does not have


def differences(
    before: Config | Mapping[str, Any], after: Config | Mapping[str, Any], *, machine: bool = False
) -> list[str]:
    """Lines `key: before -> after` of what differs; machine settings only on request.

    A group that one side does not have is one line. A setting that `before` does not have, as it
    was written by an older version, differs only if it is not at its default.
    """
    lines = []
    for key, old, new in _changes(_plain(before), _plain(after)):
        found = setting_of(key)
        unknown_then = old == ABSENT and found is not None and new == found.default
        if not unknown_then and (machine or not (found and found.machine)):
            lines.append(f"{key}: {written(old)} -> {written(new)}")
    return lines


def _changes(
    old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    for name in dict.fromkeys((*old, *new)):
        key, before, after = f"{prefix}{name}", old.get(name, ABSENT), new.get(name, ABSENT)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _changes(before, after, f"{key}.")
        elif before != after:
            yield key, before, after


# --- checking -------------------------------------------------------------------------------


def check(config: Config) -> None:
    """Raises UsageError naming every value that cannot be used."""
    problems = list(_ranges(config))
    if not any(line.startswith(("global_batch", "compute.", "data.sources")) for line in problems):
        problems += _batch_problems(config)
    if config.loss.perceptual != "lpips_vgg" and not config.loss.allow_stand_in:
        problems.append(
            f"loss.perceptual={config.loss.perceptual} is a stand-in for LPIPS, and the result is "
            "not the published recipe's; loss.allow_stand_in=true accepts that"
        )
    if config.optimizer.decay != "constant" and config.optimizer.decay_iterations is None:
        problems.append(
            f"optimizer.decay={config.optimizer.decay} needs optimizer.decay_iterations, the "
            "iterations from the run's start to optimizer.final_learning_rate"
        )
    if not any(config.loss.weights.values()):
        problems.append("loss: every term has weight 0; give one of them more")
    if config.checkpoint.keep_best and not config.log.pictures_every:
        problems.append(
            "checkpoint.keep_best=true needs validations, and log.pictures_every=0 has none; give "
            "the iterations between them"
        )
    if config.init.iteration is not None and config.init.iteration > config.stop_iteration:
        problems.append(
            f"stop_iteration={config.stop_iteration} lies before "
            f"init.iteration={config.init.iteration}; give a later stop_iteration"
        )
    if problems:
        raise UsageError("wrong settings:\n" + "\n".join(f"  {line}" for line in problems))


def source_shares(config: Config) -> dict[str, int]:
    """Images of each source in every batch: global_batch * weight / sum of weights, exactly.

    Raises UsageError if a share is not a whole number.
    """
    weights = {name: source.weight for name, source in config.data.sources.items()}
    total = sum(weights.values())
    shares = {name: config.global_batch * weight / total for name, weight in weights.items()}
    uneven = [name for name, share in shares.items() if abs(share - round(share)) > 1e-9]
    if uneven or min(shares.values()) < 1:
        text = ", ".join(f"{name} {share:g}" for name, share in shares.items())
        raise UsageError(
            f"global_batch={config.global_batch} does not divide by the weights of data.sources: "
            f"{text} images a batch; change the weights or the batch. The nearest split: "
            + " ".join(f"data.sources.{n}.weight={count}" for n, count in nearest(shares).items())
        )
    return {name: round(share) for name, share in shares.items()}


def nearest(shares: Mapping[str, float]) -> dict[str, int]:
    """Whole numbers of the same sum, at least 1 if there are enough, as near as can be."""
    left = {name: max(1, math.floor(share + 1e-9)) for name, share in shares.items()}
    missing = round(sum(shares.values())) - sum(left.values())
    for name in sorted(shares, key=lambda name: left[name] - shares[name])[: max(0, missing)]:
        left[name] += 1
    largest = max(left, key=lambda name: left[name])
    left[largest] += min(0, missing)
    return left


def side_range(data: Data) -> tuple[int, int] | None:
    """The least and the largest shorter side that images are resized to; None: they are not."""
    side = data.shorter_side
    if side is None:
        return None
    return (side[0], side[-1]) if isinstance(side, list) else (side, side)


def validation_sizes(config: Config) -> list[int]:
    """Sides of the squares that validation scores, the pictures' own first."""
    sizes = config.log.pictures_size
    if sizes is None:
        return [config.data.crop]
    return sizes if isinstance(sizes, list) else [sizes]


def micro_batch(config: Config, world_size: int) -> int:
    """Images per GPU and micro-batch: as given, or the largest divisor up to 12.

    The card's ft-EMA ran 16 GPUs x 12 = 192. Raises UsageError if nothing divides.
    """
    batch = config.global_batch
    if batch % world_size:
        raise UsageError(
            f"global_batch={batch} does not divide over {world_size} processes; "
            f"it divides over {_divisors(batch)}"
        )
    per_rank = batch // world_size
    given = config.compute.per_device_batch
    if given is None:
        return divisor_up_to(per_rank, 12)
    if per_rank % given:
        raise UsageError(
            f"compute.per_device_batch={given} does not divide a process' {per_rank} images "
            f"(global_batch={batch} / {world_size}); {_divisors(per_rank)} do"
        )
    return given


def divisor_up_to(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`."""
    return max(divisor for divisor in _divisors(number) if divisor <= most)


def _divisors(number: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _batch_problems(config: Config) -> Iterator[str]:
    if not config.data.sources:
        yield "data.sources is empty: give at least one, data.sources=SHARDS"
        return
    world = (config.compute.devices or 1) * (config.compute.num_nodes or 1)
    for problem in (lambda: source_shares(config), lambda: micro_batch(config, world)):
        try:
            problem()
        except UsageError as error:
            yield str(error)


def _ranges(config: Config) -> Iterator[str]:
    """What single values, and values beside each other, may not be."""
    values = dict(leaves(to_dict(config)))
    nested = [
        f"{key}={written(value)}: expected a list without lists or groups in it"
        for key, value in values.items()
        if isinstance(value, list) and any(isinstance(item, list | dict) for item in value)
    ]
    if nested:
        yield from nested
        return
    yield from _bounds(values, levels=len(config.model.ch_mult))
    if "per_second" in config.data.sources:
        yield (
            "data.sources.per_second: metrics.csv has a column images_per_second of its own; give "
            "another name, as data.sources.NAME=SHARDS"
        )
    yield from _name_problems(config.name)
    texts = {"run_dir": config.run_dir, "init.weights": config.init.weights}
    for key, text in texts.items():
        if not text.strip():
            yield f"{key} is empty: expected {_doc(key)}"
    decays = config.ema.decays
    if not decays or len(set(decays)) < len(decays):
        yield f"ema.decay={decays}: expected {SEVERAL[float]}, each once"
    if len(config.optimizer.betas) != 2:
        yield f"optimizer.betas={config.optimizer.betas}: expected two numbers in [0, 1)"
    yield from _sizes(config)
    model = config.model
    if not model.quant_conv and model.embed_dim != model.z_channels:
        yield (
            f"model.embed_dim={model.embed_dim}: expected model.z_channels={model.z_channels}, as "
            "model.quant_conv=false"
        )
    if model.ch % model.norm_num_groups:
        yield (
            f"model.ch={model.ch}: expected a multiple of model.norm_num_groups="
            f"{model.norm_num_groups}"
        )


def _bounds(values: Mapping[str, Any], levels: int) -> Iterator[str]:
    """Values outside their settings' bounds, and strings that no file system takes."""
    for key, value in values.items():
        if isinstance(value, str) and "\0" in value:
            yield f"{key}={value!r}: expected a text without a NUL byte"
        if (found := setting_of(key)) and found.bounds and value is not None:
            least, most = found.bounds
            most = levels if key == "compute.checkpoint_levels" else most
            if not all(least <= n <= most for n in (value if isinstance(value, list) else [value])):
                yield f"{key}={written(value)}: expected {_interval(least, most)}"


def _sizes(config: Config) -> Iterator[str]:
    """Sizes of images that do not fit the networks, or each other."""
    levels = len(config.model.ch_mult)
    if not 1 <= levels <= MOST_LEVELS:
        yield f"model.ch_mult={config.model.ch_mult}: expected 1 to {MOST_LEVELS} numbers"
    else:
        multiple = 2 ** (levels - 1)
        if config.data.crop % multiple:
            yield f"data.crop={config.data.crop}: expected a multiple of {multiple}"
        sizes = validation_sizes(config)
        if config.log.pictures_size is not None and (
            not sizes or len(set(sizes)) < len(sizes) or any(size % multiple for size in sizes)
        ):
            yield (
                f"log.pictures_size={config.log.pictures_size}: expected multiples of "
                f"{multiple}, each once"
            )
    sides = config.data.shorter_side
    if isinstance(sides, list) and (len(sides) != 2 or sides[0] > sides[1]):
        yield f"data.shorter_side={sides}: expected a number, or a range [least, most]"
    elif (ends := side_range(config.data)) and ends[0] < config.data.crop:
        yield (
            f"data.shorter_side={config.data.shorter_side} is smaller than "
            f"data.crop={config.data.crop}; give at least that, or null for no resize"
        )


def _interval(least: float, most: float) -> str:
    """What is expected, in words; whole numbers and others begin above 0 or with it."""
    ends = {ANY: "", BELOW_1: ", below 1"}
    return ("a number above 0" if least else "0 or more") + ends.get(most, f", at most {most:,}")


def _name_problems(name: str) -> Iterator[str]:
    """Exported files are called after it, so it must not lead out of their folder."""
    if name.strip() in ("", ".", "..") or not name.isprintable() or re.search(r"^-|[/\\]", name):
        yield (
            f"name={name!r}: expected one part of a file name, such as ft_ema: not empty, not . or "
            "..; without / or \\ or control characters, and no - in front"
        )


# --- YAML, keys and values ------------------------------------------------------------------


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        shipped = sorted({p.stem for folder in SHIPPED for p in folder.glob("*.yaml")})
        raise MissingInputError(
            f"configuration {path}: {'is a directory' if path.is_dir() else 'no such file'}; give "
            f"a YAML file, or a shipped recipe's name: {', '.join(shipped)}"
            f"{'' if path.is_dir() else like_path(path, shipped)}"
        )
    try:
        raw = OmegaConf.to_container(OmegaConf.load(path))
    except UnicodeDecodeError as error:
        raise UsageError(
            f"configuration {path} is not readable YAML: byte {error.start} is not UTF-8; save it "
            "as UTF-8"
        ) from error
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, OSError) as error:
        reason = str(error).partition("\n    full_key:")[0]
        raise UsageError(
            f"configuration {path} is not readable YAML: {reason}\n  Fix the line; indent with "
            "spaces, and quote a value with braces or a colon, as '{00..09}.tar'"
        ) from error
    if not isinstance(raw, dict):
        raise UsageError(
            f"configuration {path}: expected keys and values, as seed: 1, got a "
            f"{type(raw).__name__}; configs/ft_ema.yaml is an example"
        )
    return {str(key): value for key, value in raw.items()}


def _refuse_dotted(raw: Mapping[str, Any], path: Path) -> None:
    """Raises UsageError for a key of the command line in a file: its groups must be nested."""
    for key, value in raw.items():
        group, dot, name = key.partition(".")
        if dot and setting_of(key):
            nested = name.replace(".", ": {") + f": {written(value)}" + "}" * key.count(".")
            raise UsageError(
                f"{path}: {key}: dots are for key=value on the command line; in a file write "
                f"{group}: {{{nested}"
            )


def _expand_source_shorthand(raw: dict[str, Any], path: Path) -> None:
    """`sources: PATTERN` and `sources: [PATTERN, ...]` mean one source for each pattern."""
    data = raw.get("data")
    if not isinstance(data, dict):
        return
    sources = data.get("sources")
    if isinstance(sources, str) and sources != MISSING:
        data["sources"] = parse_sources(sources)
    elif isinstance(sources, list):
        data["sources"] = parse_sources(",".join(str(item) for item in sources))
    elif isinstance(sources, dict):
        for name, source in sources.items():
            if isinstance(source, str):
                sources[name] = {"shards": source}
            elif not isinstance(source, dict):
                raise UsageError(
                    f"{path}: data.sources.{name}: got {written(source)}, expected "
                    f"{_doc('data.sources.NAME.shards')}"
                )


def parse_sources(text: str) -> dict[str, dict[str, str]]:
    """`A,B` -> one source for each pattern, named after the directory that holds its shards."""
    body = text.strip().removesuffix("{}")
    if body.startswith("[") and body.endswith("]"):
        body = body[1:-1]
    patterns = [part.strip() for part in re.split(r",(?![^{]*\})", body) if part.strip()]
    sources: dict[str, dict[str, str]] = {}
    for pattern in patterns:
        path = Path(pattern)
        name = path.name if not path.suffix else path.parent.name
        name = re.sub(r"\W+", "_", name).strip("_") or "images"
        while name in sources:
            name += "_2"
        sources[name] = {"shards": pattern}
    return sources


def source_setting(name: str, pattern: str) -> str:
    """A source as its user named it: `data.sources=PATTERN` where its name follows from that."""
    derived = next(iter(parse_sources(pattern)), "")
    if re.fullmatch(f"{re.escape(derived)}(_2)*", name):
        return f"data.sources={pattern}"
    return f"data.sources.{name}.shards={pattern}"


def _override(merged: DictConfig, text: str) -> None:
    key, equals, value = text.partition("=")
    key = key.strip().lstrip("-")
    if not equals or not key:
        raise UsageError(f"override {text!r}: expected key=value, such as seed=1")
    parsed = _parse(key, value)
    if _known(key).kind is Source:  # data.sources.x=SHARDS leaves x's weight alone
        key, parsed = f"{key}.shards", value
    if key.startswith("data.sources.") and OmegaConf.is_missing(merged.data, "sources"):
        merged.data.sources = {}
    parent = key.rpartition(".")[0]
    if parent and OmegaConf.select(merged, parent, throw_on_missing=False) is None:
        if not parent.startswith("data.sources."):
            raise UsageError(f"{key}: {parent} is null in this recipe; set it in the file")
        OmegaConf.update(merged, parent, Source(), force_add=True)
    OmegaConf.update(merged, key, parsed, force_add=True, merge=False)


def _known(key: str, where: str = "command line") -> Setting:
    """What is known of a key; UsageError with the nearest key if it is unknown."""
    if found := setting_of(key):
        return found
    source = re.match(r"data\.sources\.([^.]+)\.", key)
    known = [name.replace("NAME", source[1] if source else "NAME") for name in SETTINGS]
    nearest = max(known, key=lambda name: _likeness(key, name))
    if _likeness(key, nearest):
        raise UsageError(f"{where}: unknown key {key!r}. Did you mean {nearest!r}?")
    group = key.rpartition(".")[0]
    names = ", ".join(_below(group)) or "no keys below it"
    raise UsageError(f"{where}: unknown key {key!r}; {group or 'the top level'} has {names}")


def _below(group: str) -> list[str]:
    """Names of the settings right below a group."""
    parts = [name.rpartition(".") for name in SETTINGS]
    return [name for parent, _, name in parts if parent == group]


def _likeness(key: str, known: str) -> float:
    """How much two keys look alike, group and last part; 0 where the last part may be another."""
    (group, _, name), (known_group, _, known_name) = key.rpartition("."), known.rpartition(".")
    names = difflib.SequenceMatcher(None, name, known_name).ratio()
    groups = difflib.SequenceMatcher(None, group, known_group).ratio() if group else 1.0
    return names + groups if names == 1 or min(names, groups) > 0.7 else 0.0


def _parse(key: str, text: str, where: str = "") -> Any:
    """Text -> value by the declared type, never by YAML's guess."""
    found, shown = _known(key), f"{where}: {key}" if where else key
    kind, origin = found.kind, get_origin(found.kind)
    if found.nullable and text.strip().lower() in ("null", "none", "~", ""):
        return None
    if text.strip() in ("null", "~") and (origin is dict or kind in (Source, str)):  # as in YAML
        raise UsageError(f"{shown}={text}: cannot be null; expected {found.doc}")
    if origin is dict:
        sources = parse_sources(text)
        return {name: Source(shards=sources[name]["shards"]) for name in sources}
    if kind is Source:
        return Source(shards=text)
    if is_dataclass(kind):
        names = ", ".join(f"{key}.{name}" for name in _below(key))
        raise UsageError(f"{shown}={text}: this is a group of settings; set {names}")
    values = [p.strip() for p in text.strip().strip("[]").split(",") if p.strip()]
    if origin is Union:
        numbers = [_typed(value, get_args(kind)[0]) for value in values]
        if not values or any(isinstance(number, str) for number in numbers):
            raise UsageError(f"{shown}={text}: expected {SEVERAL[get_args(kind)[0]]}")
        return numbers if "[" in text or len(numbers) > 1 else numbers[0]
    inner = get_args(kind)[0] if origin is list else kind
    try:
        return [READERS[inner](v) for v in values] if origin is list else READERS[inner](text)
    except KeyError:
        pass
    except ValueError:
        raise UsageError(f"{shown}={text}: expected {EXPECTED[inner]}") from None
    if origin is Literal and text not in get_args(kind):
        near = difflib.get_close_matches(text, get_args(kind), n=1)
        hint = f". Did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"{shown}={text}: expected one of {', '.join(get_args(kind))}{hint}")
    return values if origin is list else text


def _bool(text: str) -> bool:
    return bool(("false", "true").index(text.lower()))


READERS: dict[Any, Callable[[str], Any]] = {int: int, float: float, bool: _bool}
EXPECTED = {int: "a whole number", float: "a number", bool: "true or false"}
SEVERAL = {  # of a setting that takes one number or several
    int: "a whole number, or several as [384,512]",
    float: "a number, or several as [0.999,0.9999]",
}


def _exactly_typed(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values, where one number or several are taken in exactly the declared type.

    Elsewhere omegaconf converts, as 0 or "1e-3" to a float; of a union it wants the type itself.
    """
    typed = {}
    for name, value in values.items():
        found = setting_of(f"{prefix}{name}")
        if isinstance(value, Mapping):
            value = _exactly_typed(value, f"{prefix}{name}.")
        elif found and get_origin(found.kind) is Union:
            value = _typed(value, get_args(found.kind)[0])
        elif found and found.kind is str and isinstance(value, bool):
            value = written(value)  # name: true
        typed[name] = value
    return typed


def _typed(value: Any, kind: type) -> Any:
    """A number, or a text that reads as one, in a type; anything else unchanged, to be refused."""
    if isinstance(value, list):
        return [_typed(item, kind) for item in value]
    if not isinstance(value, int | str) or isinstance(value, bool):
        return value
    try:
        return READERS[kind](str(value))
    except ValueError:
        return value


def _plain(config: Config | Mapping[str, Any]) -> dict[str, Any]:
    return to_dict(config) if isinstance(config, Config) else dict(config)


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every setting in nested values."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _doc(key: str) -> str:
    found = setting_of(key)
    return found.doc if found else ""
