"""Builds the parts of a run and hands them to Lightning. To resume, run the same command again."""

import atexit
import os
import shlex
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from pytorch_lightning import LightningDataModule, Trainer
from pytorch_lightning.utilities import rank_zero_only
from torch.utils.data import DataLoader

from kl_f8_train import config as configs
from kl_f8_train import images, units
from kl_f8_train.core import machine
from kl_f8_train.core.machine import is_out_of_memory, on_cuda, with_remedy
from kl_f8_train.core.step import Finetuner
from kl_f8_train.core.updates import describe_rate
from kl_f8_train.data import identity
from kl_f8_train.data.handover import shared_memory_note
from kl_f8_train.data.loading import (
    IterationSampler,
    Plan,
    PositionDataset,
    Sample,
    loader,
    open_data,
    shard_cache,
)
from kl_f8_train.data.sources import FolderSource, ImageSource, TarSource
from kl_f8_train.errors import ImageError, LostContactError, MissingInputError, RunFailedError
from kl_f8_train.files import write_text
from kl_f8_train.folders import is_system, load_sizes
from kl_f8_train.overrides import source_setting
from kl_f8_train.rules import micro_batch, validation_sizes
from kl_f8_train.run import outcome
from kl_f8_train.run.callback import Course, say_once
from kl_f8_train.run.compiling import Compiling
from kl_f8_train.run.log import RunLog
from kl_f8_train.run.prefetch import Prefetch
from kl_f8_train.run.saving import Checkpoints, Signals
from kl_f8_train.run.start import adopt, start_or_resume
from kl_f8_train.run.tracking import check_tensorboard
from kl_f8_train.run.trainer import build_trainer, quiet_lightning
from kl_f8_train.run.validation import Validation
from kl_f8_train.run.watchdog import FIRST, Watchdog
from kl_f8_train.run_dir import (
    CONFIG_FILE,
    begun,
    best_checkpoint,
    check_places,
    failure_kept,
    list_checkpoints,
    note_failure,
    remove_leftovers,
)
from kl_f8_train.settings import Config
from kl_f8_train.transfer import is_remote

MOST_TRIED = 64  # images that are tried for the picture strip


def train(config: Config, allow_changes: bool = False) -> int:
    """Starts or resumes a run; returns the exit code (0, or 128 + signal).

    Raises UsageError, MissingInputError or RunFailedError with what to do.
    """
    run_dir = Path(config.run_dir)
    if config.log.tensorboard:
        check_tensorboard()
    check_places(run_dir)
    machine.check_compile_cache(config.compute)
    first = getattr(rank_zero_only, "rank", 0) == 0  # as the launcher's variables say
    with begun(run_dir) if first else failure_kept(run_dir):
        return _train(config, run_dir, allow_changes)


@with_remedy()
def _train(config: Config, run_dir: Path, allow_changes: bool) -> int:
    quiet_lightning()
    course = Course()
    signals = Signals(course)
    signals.install()
    try:
        finetuner, frozen = start_or_resume(config, run_dir, allow_changes)
        if _is_over(finetuner, config):
            say_once(f"{run_dir} is {_end_reached(finetuner.iteration, config)}; nothing to do")
            return 0
        plan, sources = open_data(config, say_once)
        adopt(finetuner, identity.of_data(sources), f"{run_dir}", allow_changes)
        _describe(config, finetuner, plan, sources)
        start = finetuner.iteration
        run_log = RunLog(run_dir, config, start, plan, course)
        saving = Checkpoints(run_dir, config.checkpoint, frozen, course)
        validation = Validation(
            run_dir,
            config,
            start,
            _fixed_images(config, plan, sources),
            run_log.validated,
            saving.save_best if config.checkpoint.keep_best else None,
            run_log.say,
        )
        # In this order: the best checkpoint is the state that was validated, and saving acts on
        # what the ranks have agreed on.
        callbacks = [run_log, validation, signals, saving]
        if machine.compiles(config.compute):
            callbacks.insert(0, Compiling())  # it announces an iteration before others report it
        if any(is_remote(source.location(0)) for source in sources.values()):
            callbacks.append(Prefetch(plan, sources, shard_cache(config)))
        note = partial(note_failure, run_dir, passing=True)
        callbacks.append(Watchdog(config.compute.timeout_minutes, course, note))  # the last
        trainer = build_trainer(config, callbacks)
        if trainer.is_global_zero:
            remove_leftovers(run_dir)
            write_text(run_dir / CONFIG_FILE, configs.to_yaml(config))
        _fit(trainer, Iterations(config, finetuner, plan, sources), course)
    finally:
        signals.restore()
    # A signal in the last iteration changes nothing.
    if signals.received and not _is_over(finetuner, config):
        say_once(
            f"stopped by signal {signals.received} at iteration {finetuner.iteration:,}, saved; "
            f"the same command resumes it, or: kl-f8-train train {shlex.quote(str(run_dir))}"
        )
        return 128 + signals.received
    _say_end(run_dir, finetuner.iteration)
    return 0


def _is_over(finetuner: Finetuner, config: Config) -> bool:
    return finetuner.iteration >= config.stop_iteration and not finetuner.warmup_left


def _end_reached(iteration: int, config: Config) -> str:
    """Where a run is that has no iteration left: at its end, or beyond the one that is set now."""
    if iteration == config.stop_iteration:
        return f"at iteration {iteration:,}, its end"
    return f"at iteration {iteration:,}, already beyond stop_iteration={config.stop_iteration:,}"


def _say_end(run_dir: Path, iteration: int) -> None:
    """The last lines of a run: what it has done to the fixed photographs, and what comes next."""
    there, found = shlex.quote(str(run_dir)), outcome.read(run_dir)
    for line in found.lines() if found else ():
        say_once(line)
    warnings = found.warnings() if found else []
    for warning in warnings:
        say_once(f"WARNING: {warning}")
    if not warnings:
        then = f"next: kl-f8-train export {there}"
    elif best_checkpoint(run_dir):
        then = f"in place of its end: kl-f8-train export {there} --best"
    else:
        then = f"before you export it: kl-f8-train status {there} --html status.html"
    say_once(f"done: iteration {iteration:,}; {then}")


def _fit(trainer: Trainer, iterations: "Iterations", course: Course) -> None:
    """Trains; when another rank fell silent, says so, with torch.distributed's words below."""
    try:
        trainer.fit(iterations.finetuner, datamodule=iterations)
    except BaseException as error:
        _leave_without_the_others(error)
        if not isinstance(error, RuntimeError) or not _is_lost_contact(error):
            raise
        who = f"rank {trainer.global_rank} of {trainer.world_size}"
        silent = time.perf_counter() - course.since
        what = (
            f"{who} lost contact with the others {silent:.0f} s after iteration "
            f"{iterations.finetuner.iteration:,}: a process or node died, or the network was cut "
            "(see earlier messages of other ranks)."
            if course.done
            else f"{who} did not get through to the others: a process died at its start, two share "
            "a GPU, or the network between the nodes is not open (NCCL_SOCKET_IFNAME names it)."
        )
        found = list_checkpoints(Path(iterations.config.run_dir))
        last = f"resumes from {found[0].name}" if found else "starts over (no checkpoint yet)"
        minutes = iterations.config.compute.timeout_minutes
        raise LostContactError(
            f"{what} The same command {last}; compute.timeout_minutes={minutes:g} bounds the wait, "
            f"{FIRST} times that until the first iteration has ended\n  torch: {error}"
        ) from error


def _leave_without_the_others(error: BaseException) -> None:
    """Exits a failed rank with os._exit: NCCL's shutdown would wait for ranks that still train."""
    if dist.is_initialized():
        atexit.register(os._exit, getattr(error, "exit_code", RunFailedError.exit_code))


def _is_lost_contact(error: RuntimeError) -> bool:
    """NCCL and the store raise a DistError, gloo a RuntimeError that names its source file."""
    lost = isinstance(error, dist.DistError) or "gloo/" in str(error)
    return lost and not is_out_of_memory(error)


class Iterations(LightningDataModule):
    """The iterations that are left, dealt to this rank."""

    def __init__(
        self, config: Config, finetuner: Finetuner, plan: Plan, sources: Mapping[str, ImageSource]
    ) -> None:
        super().__init__()
        self.config, self.finetuner = config, finetuner
        self.plan, self.sources = plan, sources

    def train_dataloader(self) -> DataLoader[Sample]:
        """Called once the ranks are known; raises UsageError if the batch does not divide."""
        assert self.trainer is not None
        rank, world = self.trainer.global_rank, self.trainer.world_size
        size = micro_batch(self.config, world)
        say_once(f"batch: {units.batch(self.config.global_batch, world, size)}")
        sampler = IterationSampler(
            self.finetuner.iteration,
            self.config.stop_iteration,
            self.finetuner.warmup_left,
            self.config.global_batch,
            rank,
            world,
        )
        share = self.config.global_batch // world
        if note := shared_memory_note(self.config, share, self.trainer.num_devices):
            say_once(f"note: {note}")
        dataset = PositionDataset(self.plan, self.sources, self.config)
        return loader(dataset, sampler, self.config.data.workers, on_cuda(self.config.compute))


def fixed_photographs(
    config: Config, report: Callable[[str], None]
) -> dict[int, list[torch.Tensor]]:
    """Up to eight photographs of `log.pictures`, uint8 (3, side, side), by side.

    Raises MissingInputError if there is none.
    """
    assert config.log.pictures is not None
    folder = Path(config.log.pictures)
    try:
        return load_sizes(folder, validation_sizes(config), 8, report)
    except MissingInputError as error:
        raise MissingInputError(f"log.pictures: {error}") from error


def _fixed_images(
    config: Config, plan: Plan, sources: Mapping[str, ImageSource]
) -> dict[int, list[torch.Tensor]]:
    """Those of `log.pictures`, or the first four of the data that can be used, centre-cropped."""
    sizes = validation_sizes(config)
    chosen: dict[int, list[torch.Tensor]] = {size: [] for size in sizes}
    if not config.log.pictures_every:
        return chosen
    if config.log.pictures is not None:
        return fixed_photographs(config, say_once)
    for position in range(min(MOST_TRIED, plan.batch)):
        if len(chosen[sizes[0]]) == 4:
            break
        name, shard, number = plan.locate(position)
        try:
            squares = images.squares(sources[name].read(shard, number)[1], sizes)
        except ImageError as error:
            say_once(
                f"picture strip: {name}/{sources[name].name(shard, number)}: {error}; left out"
            )
            continue
        for size, square in zip(sizes, squares, strict=True):
            chosen[size].append(square)
    return chosen


def _describe(
    config: Config,
    finetuner: Finetuner,
    plan: Plan,
    sources: Mapping[str, TarSource | FolderSource],
) -> None:
    for name, source in sources.items():
        say_once(f"data: {name}: {'; '.join(source.describe())}; {plan.plans[name].share} a batch")
    if trained_on := _source_of_pictures(config, sources):
        say_once(
            f"WARNING: the photographs of log.pictures={config.log.pictures} are trained on "
            f"({trained_on}): the validation's scores then say nothing about other photographs; "
            "`kl-f8-train split` separates them"
        )
    loss = config.loss
    updates = config.stop_iteration - finetuner.run_state.first_iteration
    label = identity.network_label(finetuner.run_state.identity)
    adversarial = ""
    if config.adversarial is not None:
        adversarial = f" + {config.adversarial.weight:g} x adaptive x adversarial"
    say_once(f"loss: {loss.formula} + {loss.perceptual_weight:g} {label}{adversarial}")
    first, *further = map(units.shortest, config.ema.decays)
    decays = first + f" (beside it {', '.join(further)})" * bool(further)
    say_once(
        f"iterations: {finetuner.iteration:,} -> {config.stop_iteration:,}; learning rate "
        f"{describe_rate(config.optimizer, updates)}; EMA decay {decays}; "
        f"{config.precision}"
    )
    say_once(f"networks: {machine.describe(config.compute)}")


def _source_of_pictures(config: Config, sources: Mapping[str, ImageSource]) -> str | None:
    """The setting of a folder that holds the folder of `log.pictures`, by their paths alone."""
    if config.log.pictures is None or not config.log.pictures_every:
        return None
    pictures = Path(config.log.pictures).resolve()
    for name, source in sources.items():
        if isinstance(source, FolderSource) and pictures.is_relative_to(source.folder.resolve()):
            inside = pictures.relative_to(source.folder.resolve()).parts
            if not any(map(is_system, inside)):  # such folders are not trained on
                return source_setting(name, config.data.sources[name].shards)
    return None
