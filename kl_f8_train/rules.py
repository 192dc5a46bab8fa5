"""Rules between settings: what follows from several of them, and what contradicts."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from kl_f8_train.divisors import divisor_up_to, divisors
from kl_f8_train.errors import UsageError, unexpanded
from kl_f8_train.overrides import SEVERAL
from kl_f8_train.settings import (
    ANY,
    BELOW_1,
    MOST_LEVELS,
    SETTINGS,
    Config,
    Data,
    Model,
    leaves,
    setting_of,
    to_dict,
)
from kl_f8_train.units import written

MADE = ("run_dir", "data.index_dir", "data.cache_dir")  # directories that are made if need be


def contradictions(config: Config) -> list[str]:
    """A line for every value that cannot be used, by itself or beside the others."""
    problems = list(_ranges(config))
    # Shares and micro-batches are computed from these: reported only where they can be.
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
    return problems


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
    # The largest-remainder method: all shares rounded down, and what is missing to the largest
    # remainders. 1e-9 for a whole number that division made a little smaller.
    left = {name: max(1, math.floor(share + 1e-9)) for name, share in shares.items()}
    missing = round(sum(shares.values())) - sum(left.values())
    for name in sorted(shares, key=lambda name: left[name] - shares[name])[: max(0, missing)]:
        left[name] += 1
    largest = max(left, key=lambda name: left[name])
    left[largest] += min(0, missing)  # where the 1s came to too many
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
            f"it divides over {divisors(batch)}"
        )
    per_rank = batch // world_size
    given = config.compute.per_device_batch
    if given is None:
        return divisor_up_to(per_rank, 12)
    if per_rank % given:
        raise UsageError(
            f"compute.per_device_batch={given} does not divide a process' {per_rank} images "
            f"(global_batch={batch} / {world_size}); {divisors(per_rank)} do"
        )
    return given


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
    nested = list(_nested_lists(values))
    if nested:  # what follows compares numbers
        yield from nested
        return
    yield from _bounds(values, levels=len(config.model.ch_mult))
    yield from _names(config)
    decays = config.ema.decays
    if not decays or len(set(decays)) < len(decays):
        yield f"ema.decay={decays}: expected {SEVERAL[float]}, each once"
    if len(config.optimizer.betas) != 2:
        yield f"optimizer.betas={config.optimizer.betas}: expected two numbers in [0, 1)"
    yield from _sizes(config)
    yield from _widths(config.model)


def _nested_lists(values: Mapping[str, Any]) -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, list) and any(isinstance(item, list | dict) for item in value):
            yield f"{key}={written(value)}: expected a list without lists or groups in it"


def _names(config: Config) -> Iterator[str]:
    """Names and paths that cannot be used."""
    if "per_second" in config.data.sources:
        yield (
            "data.sources.per_second: metrics.csv has a column images_per_second of its own; give "
            "another name, as data.sources.NAME=SHARDS"
        )
    yield from name_problems(config.name)
    for key, text in (("run_dir", config.run_dir), ("init.weights", config.init.weights)):
        if not text.strip():
            yield f"{key} is empty: expected {SETTINGS[key].doc}"


def _widths(model: Model) -> Iterator[str]:
    """Channels of the networks that do not fit each other."""
    if not model.quant_conv and model.embed_dim != model.z_channels:
        yield (
            f"model.embed_dim={model.embed_dim}: expected model.z_channels={model.z_channels}, as "
            "model.quant_conv=false"
        )
    if model.norm_num_groups > 0 and model.ch % model.norm_num_groups:
        yield (
            f"model.ch={model.ch}: expected a multiple of model.norm_num_groups="
            f"{model.norm_num_groups}"
        )


def _bounds(values: Mapping[str, Any], levels: int) -> Iterator[str]:
    """Values outside their settings' bounds, and strings that no file system takes."""
    for key, value in values.items():
        if isinstance(value, str) and "\0" in value:
            yield f"{key}={value!r}: expected a text without a NUL byte"
        if key in MADE and value and (meant := unexpanded(value)):
            yield f"{key}={value}: {meant.removeprefix('; ')}"
        found = setting_of(key)
        if not found or not found.bounds or value is None:
            continue
        least, most = found.bounds
        if key == "compute.checkpoint_levels":
            most = levels
        several = value if isinstance(value, list) else [value]
        if not all(least <= number <= most for number in several):
            yield f"{key}={written(value)}: expected {_interval(least, most)}"


def _sizes(config: Config) -> Iterator[str]:
    """Sizes of images that do not fit the networks, or each other."""
    if 1 <= len(config.model.ch_mult) <= MOST_LEVELS:
        multiple, given = config.model.downsampling, config.log.pictures_size
        if config.data.crop % multiple:
            yield f"data.crop={config.data.crop}: expected a multiple of {multiple}"
        sizes = validation_sizes(config)
        once = len(set(sizes)) == len(sizes) > 0
        if given is not None and not (once and all(size % multiple == 0 for size in sizes)):
            yield f"log.pictures_size={given}: expected multiples of {multiple}, each once"
    else:
        yield f"model.ch_mult={config.model.ch_mult}: expected 1 to {MOST_LEVELS} numbers"
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


def name_problems(name: str) -> Iterator[str]:
    """Exported files are called after it, so it must not lead out of their folder."""
    if name.strip() in ("", ".", "..") or not name.isprintable() or re.search(r"^-|[/\\]", name):
        yield (
            f"name={name!r}: expected one part of a file name, such as ft_ema: not empty, not . or "
            "..; without / or \\ or control characters, and no - in front"
        )
