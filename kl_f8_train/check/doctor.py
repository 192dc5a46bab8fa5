"""Pre-flight check: settings, weights, data, disk, one iteration, and the estimated cost.

Every section is gone through, whatever was found before it, as far as it can be; nothing is
written but the indexes of shards, which `train` would write as well.
"""

import contextlib
import io
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kl_f8_train import config as configs
from kl_f8_train import units
from kl_f8_train.check import benchmark, bill, cost, inputs, origins, scaling, screen, trial
from kl_f8_train.check.findings import WARNING, Report, silent
from kl_f8_train.core import machine, perceptual
from kl_f8_train.core.updates import describe_rate
from kl_f8_train.data.handover import FEW_FILES, raise_open_files, shared_memory_note
from kl_f8_train.data.loading import shard_cache
from kl_f8_train.data.sources import open_source
from kl_f8_train.errors import RunFailedError, UsageError
from kl_f8_train.output import Say
from kl_f8_train.rules import micro_batch
from kl_f8_train.run.paths import check_perceptual_weights
from kl_f8_train.run.start import start_or_resume
from kl_f8_train.run.tracking import check_tensorboard
from kl_f8_train.run.train import fixed_photographs
from kl_f8_train.settings import Config, leaves, to_dict
from kl_f8_train.units import counted, memory
from kl_f8_train.weights import pretrained

BASE_RATE = 4.5e-6  # the original's base learning rate
THIS_MACHINE = "this machine"  # where a run on its CPU gets its memory


def examine(
    path: Path,
    overrides: list[str],
    say: Say,
    allow_changes: bool = False,
    brief: Say | None = None,
    begin: Say = silent,
) -> Report:
    """Goes through a run's settings and inputs, and tries one iteration.

    `say` gets every line; with `brief`, a screen of about a dozen lines goes there instead.
    `begin` gets the title of each section as it begins.
    """
    report = Report(silent if brief else say, begin)
    examined = configs.Examined([], [], None)
    with report.section("settings"):
        examined = configs.examine_settings(path, overrides)
        if examined.config and not examined.problems:
            _list_settings(report, examined.config, path, overrides)
    for problem in examined.problems:
        report.record(problem)
    config, right = examined.config, not examined.problems
    # All settings without a value are one problem; if it is the only one, the rest is planned.
    is_plan = len(examined.problems) == 1 and bool(examined.absent)
    if config is not None:
        with report.guard("examination"):
            if right:
                _examine_run(report, config, allow_changes)
            elif is_plan:
                _examine_plan(report, config)
            elif not examined.absent:
                _examine_inputs(report, config)
        with report.guard("screen"):
            if brief and (right or is_plan):
                for line in screen.lines(report.facts, config):
                    brief(line)
    _verdict(report, brief or say)
    return report


def _examine_plan(report: Report, config: Config) -> None:
    """What needs none of the inputs: batch, memory, disk and bill."""
    world = planned_processes(config)
    with report.section("batch and learning rate"):
        _check_batch(report, config, world)
    _note_useless_settings(report, config)
    with report.section("disk"):
        bill.check_disk(report, config)
    bill.report_bill(report, config, world)


def _note_useless_settings(report: Report, config: Config) -> None:
    """Settings that were given, but cannot do anything beside the others."""
    start, stop = report.start_iteration(config), config.stop_iteration
    if start is not None and start >= stop:
        report.remark(
            f"nothing is trained: stop_iteration={stop} is not above the iteration at the start, "
            f"{start:,}; raise it, or check init.iteration"
        )
    adversarial = config.adversarial
    if adversarial is not None and adversarial.start_iteration >= stop:
        report.remark(
            f"the adversarial term never sets in: adversarial.start_iteration="
            f"{adversarial.start_iteration} is not below stop_iteration={stop}"
        )
    if not config.log.pictures_every:
        given = {"pictures": config.log.pictures, "pictures_size": config.log.pictures_size}
        for name in (name for name, value in given.items() if value is not None):
            report.remark(
                f"log.{name}={units.written(given[name])} is not used, as log.pictures_every=0 "
                "switches validation off"
            )


def _examine_inputs(report: Report, config: Config) -> None:
    """Looks at weights, data and networks although a setting is wrong: all problems in one go."""
    with contextlib.suppress(Exception):  # whatever a wrong setting does here
        _check_networks(report, config)
        cache = shard_cache(config)
        for name, source in config.data.sources.items():
            with report.section(f"data: {name}"):
                open_source(name, source.shards, source.filters, cache, warn=report.detail)
        if config.log.pictures_every and config.log.pictures is not None:
            with report.section("photographs of validation"):
                fixed_photographs(config, report.detail)


def _check_networks(report: Report, config: Config) -> None:
    """The weights to start from, and the perceptual network's."""
    with report.section("weights"):
        inputs.check_weights(report, config)
    with report.section(f"perceptual network: {perceptual.LABELS[config.loss.perceptual]}"):
        check_perceptual_weights(config)
        network = pretrained.build(config.loss.perceptual, config.loss.perceptual_weights)
        if network.published:
            report.detail("found")
        else:
            report.remark(f"the loss is {network.label}: the result is not the published recipe's")


def _examine_run(report: Report, config: Config, allow_changes: bool) -> None:
    world = planned_processes(config)
    with report.section("batch and learning rate"):
        _check_batch(report, config, world)
    with report.section("networks"):
        report.detail(machine.describe(config.compute))
        if machine.compiles(config.compute):
            report.detail(machine.compile_cache())
            machine.check_compile_cache(config.compute)
    _check_networks(report, config)
    for name in config.data.sources:
        with report.section(f"data: {name}"):
            inputs.check_source(report, config, name)
    if config.log.pictures_every and config.log.pictures is not None:
        with report.section("photographs of validation"):
            found = fixed_photographs(config, report.detail)
            count = len(next(iter(found.values())))  # of each size as many
            report.detail(f"{counted(count, 'photograph', 's')} of {config.log.pictures}")
            inputs.check_overlap(report, config, Path(config.log.pictures))
    elif config.log.pictures_every:
        report.remark(
            "validation shows training images, so its scores say nothing about others: set "
            "log.pictures to a folder of held-out photographs (`kl-f8-train split` makes one)"
        )
    with report.section("wandb"):
        inputs.check_wandb(report, config)
    if config.log.tensorboard:
        with report.section("TensorBoard"):
            check_tensorboard()
            report.detail("installed")
    if report.problems:
        report.say("one iteration: not tried until these are fixed")
    else:
        with report.section("one iteration"):
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                finetuner, _ = start_or_resume(config, Path(config.run_dir), allow_changes)
            for line in printed.getvalue().splitlines():
                report.detail(line.strip())
            trial.try_iteration(report, config, finetuner, world, allow_changes)
    with report.section("disk"):
        bill.check_disk(report, config)
    _note_useless_settings(report, config)
    bill.report_bill(report, config, world)


# --- settings -------------------------------------------------------------------------------


def _list_settings(report: Report, config: Config, path: Path, overrides: list[str]) -> None:
    values = dict(leaves(to_dict(config)))
    where = origins.origins(path, overrides, values)
    report.facts["settings"] = {
        key: {"value": value, "origin": where[key]} for key, value in values.items()
    }
    for origin in dict.fromkeys(where.values()):
        texts = [
            f"{key}={units.written(value)}" for key, value in values.items() if where[key] == origin
        ]
        report.say(textwrap.fill(", ".join(texts), 100, **_hanging(f"  {origin:<9}")))


def _hanging(head: str) -> dict[str, Any]:
    return {
        "initial_indent": head,
        "subsequent_indent": " " * len(head),
        "break_long_words": False,
        "break_on_hyphens": False,
    }


def planned_processes(config: Config) -> int:
    """Processes of the run: as set, else the GPUs seen here, on the nodes set or one."""
    gpus = 0 if config.compute.accelerator == "cpu" else torch.cuda.device_count()
    return (config.compute.devices or gpus or 1) * (config.compute.num_nodes or 1)


def _check_batch(report: Report, config: Config, world: int) -> None:
    micro = micro_batch(config, world)
    batch, rate = config.global_batch, config.optimizer.learning_rate
    parts = batch // world // micro
    updates = config.stop_iteration - (config.init.iteration or 0)
    report.facts["batch"] = {
        "processes": world, "per_device": micro, "accumulation": parts, "global": batch
    }  # fmt: skip
    report.detail(units.batch(batch, world, micro))
    processes = world // (config.compute.num_nodes or 1)
    if note := shared_memory_note(config, batch // world, processes):
        report.remark(note)
    if (files := raise_open_files()) < FEW_FILES:
        report.remark(f"only {files} files may be open; raise it (`ulimit -n 4096`)")
    here = _memory_here(config)
    _report_memory(report, config, micro, batch // world, here)
    report.detail(
        f"learning rate {describe_rate(config.optimizer, updates)}: nothing scales it. The "
        "original's rule would give "
        f"{parts} x {micro} x {world} x {BASE_RATE:g} = {batch * BASE_RATE:g}; this is "
        f"{rate / BASE_RATE:.3g} x its base rate"
    )
    benchmark.find_device(config)  # raises for a GPU that is asked for and not there
    gpus = torch.cuda.device_count()
    if gpus and (config.compute.devices or 1) > gpus:
        raise UsageError(
            f"compute.devices={config.compute.devices}, but torch sees {gpus} GPUs here; give "
            f"compute.devices={gpus} or run this where the others are"
        )
    if not machine.on_cuda(config.compute):  # a GPU is tried with a whole micro-batch
        check_fits(config, micro, batch // world, here)


def _report_memory(
    report: Report, config: Config, micro: int, share: int, here: Mapping[str, float]
) -> None:
    """Memory of micro-batches of `micro`, and the largest that would fit here or on known GPUs."""
    needed = cost.peak_bytes(config, micro, share)
    compiled = "compiled" if cost.run_compiles(config) else "uncompiled"
    report.facts["computed_memory"] = {"bytes": needed, "networks": compiled}
    report.detail(
        f"{'GPU memory' if cost.on_gpu(config) else 'memory'} that this takes, computed: "
        f"{memory(needed)}, {compiled}"
    )
    fits = {name: cost.largest_divisor(config, share, here[name]) for name in here}
    if cost.is_full_size(config) and not machine.on_cuda(config.compute):
        fits |= {
            kind.name: cost.largest_divisor(scaling.for_gpus(config), share, kind.room_bytes)
            for kind in scaling.GPUS
        }
    report.facts["per_device_batch_that_fits"] = fits
    if fits:
        named = screen.fitting(fits, share, config.global_batch)
        gpus = fits.keys() != {THIS_MACHINE}
        left = f", with {memory(cost.HEADROOM_BYTES)} for CUDA and its allocator" if gpus else ""
        report.detail(f"the largest compute.per_device_batch that fits, computed{left}: {named}")


def _memory_here(config: Config) -> dict[str, float]:
    """Room in bytes, by name, for each process here; {} where a GPU elsewhere is meant."""
    if machine.on_cuda(config.compute):
        gpu = torch.device("cuda", 0)
        return {benchmark.device_name(gpu): benchmark.room_bytes(gpu)}
    if cost.on_gpu(config):
        return {}
    copy = scaling.checkpoint_bytes(config)  # of the first process, while a checkpoint is written
    left = benchmark.room_bytes(torch.device("cpu")) - copy
    return {THIS_MACHINE: left / (config.compute.devices or 1)}


def check_fits(config: Config, micro: int, share: int, rooms: Mapping[str, float]) -> None:
    """Raises RunFailedError if a micro-batch of `micro` images needs more than there is room."""
    for name, room in rooms.items():
        largest = cost.largest_divisor(config, share, room)
        if micro > largest:
            smaller = f"give compute.per_device_batch={largest}, or " if largest else ""
            raise RunFailedError(
                f"compute.per_device_batch={micro} takes "
                f"{memory(cost.peak_bytes(config, micro, share))}, computed, but {name} has "
                f"{memory(room)} for it; {smaller}"
                "raise compute.checkpoint_levels, or lower data.crop"
            )


def _verdict(report: Report, say: Say) -> None:
    for remark in report.remarks:
        say(remark if remark.startswith(WARNING) else f"note: {remark}")
    if not report.problems:
        warnings = sum(remark.startswith(WARNING) for remark in report.remarks)
        say(f"GO, with {counted(warnings, 'warning', 's')}" if warnings else "GO")
        return
    say(f"NO GO, {counted(len(report.problems), 'problem', 's')}:")
    for number, problem in enumerate(report.problems, 1):
        say(textwrap.indent(f"{number}. {problem}", "  "))
