"""Builds the parts of a run and hands them to Lightning. To resume, run the same command again."""

import atexit
import inspect
import logging
import os
import shlex
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning import LightningDataModule, LightningModule, Trainer
from pytorch_lightning.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities import rank_zero_only
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from kl_f8_train import config as configs
from kl_f8_train import facts, images, output, units
from kl_f8_train.core import machine
from kl_f8_train.core.discriminator import Discriminator, initialize, shape_of
from kl_f8_train.core.hashes import frozen_sha256
from kl_f8_train.core.machine import is_out_of_memory, on_cuda, with_remedy
from kl_f8_train.core.model import AutoencoderKL, kernels
from kl_f8_train.core.run_state import RunState
from kl_f8_train.core.step import Finetuner, bound_to
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
from kl_f8_train.errors import (
    ImageError,
    LostContactError,
    MissingInputError,
    RunFailedError,
    UsageError,
)
from kl_f8_train.files import check_writable, write_text
from kl_f8_train.folders import is_system, load_sizes
from kl_f8_train.launch import SRUN, TORCHRUN, launched
from kl_f8_train.lifetime import announce_to_ranks
from kl_f8_train.overrides import source_setting
from kl_f8_train.rules import micro_batch, validation_sizes
from kl_f8_train.run import outcome
from kl_f8_train.run.callback import Course
from kl_f8_train.run.compiling import Compiling
from kl_f8_train.run.log import RunLog
from kl_f8_train.run.prefetch import Prefetch
from kl_f8_train.run.saving import Checkpoints, Signals
from kl_f8_train.run.tracking import check_tensorboard
from kl_f8_train.run.validation import Validation
from kl_f8_train.run.watchdog import FIRST, Watchdog, longest_wait
from kl_f8_train.run_dir import (
    CONFIG_FILE,
    best_checkpoint,
    claimed,
    failure_kept,
    forget_failure,
    list_checkpoints,
    note_failure,
    remove_leftovers,
)
from kl_f8_train.settings import Config
from kl_f8_train.transfer import is_remote
from kl_f8_train.weights import checkpoint, pretrained, weight_file
from kl_f8_train.weights.names import State, architecture, check_like

say_once = rank_zero_only(output.say)
MOST_TRIED = 64  # images that are tried for the picture strip


def train(config: Config, allow_changes: bool = False) -> int:
    """Starts or resumes a run; returns the exit code (0, or 128 + signal).

    Raises UsageError, MissingInputError or RunFailedError with what to do.
    """
    run_dir = Path(config.run_dir)
    if config.log.tensorboard:
        check_tensorboard()
    check_writable(run_dir)
    machine.check_compile_cache(config.compute)
    first = getattr(rank_zero_only, "rank", 0) == 0  # as the launcher's variables say
    with claimed(run_dir) if first else nullcontext():
        if first:
            forget_failure(run_dir)
        with failure_kept(run_dir):
            return _train(config, run_dir, allow_changes)


@with_remedy()
def _train(config: Config, run_dir: Path, allow_changes: bool) -> int:
    _quiet_lightning()
    course = Course()
    signals = Signals(course)
    signals.install()
    try:
        finetuner, frozen = start_or_resume(config, run_dir, allow_changes)
        if finetuner.iteration >= config.stop_iteration and not finetuner.warmup_left:
            say_once(f"{run_dir} is at iteration {finetuner.iteration:,}, its end; nothing to do")
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
        if any(is_remote(place) for place in _locations(sources)):
            callbacks.append(Prefetch(plan, sources, shard_cache(config)))
        note = partial(note_failure, run_dir, passing=True)
        callbacks.append(Watchdog(config.compute.timeout_minutes, course, note))  # the last
        trainer = _trainer(config, callbacks)
        if trainer.is_global_zero:
            remove_leftovers(run_dir)
            write_text(run_dir / CONFIG_FILE, configs.to_yaml(config))
        with kernels(config.precision, config.compute.deterministic):
            _fit(trainer, Iterations(config, finetuner, plan, sources), course)
    finally:
        signals.restore()
    ended = finetuner.iteration >= config.stop_iteration and not finetuner.warmup_left
    if signals.received and not ended:  # a signal in the last iteration changes nothing
        say_once(
            f"stopped by signal {signals.received} at iteration {finetuner.iteration:,}, saved; "
            f"the same command resumes it, or: kl-f8-train train {shlex.quote(str(run_dir))}"
        )
        return 128 + signals.received
    _say_end(run_dir, finetuner.iteration)
    return 0


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


# --- start or resume ------------------------------------------------------------------------


def start_or_resume(config: Config, run_dir: Path, allow_changes: bool) -> tuple[Finetuner, str]:
    """The finetuner at its newest readable checkpoint, or at the imported weights."""
    found = list_checkpoints(run_dir)
    for path in found:
        try:
            contents = weight_file.read(path)
            checkpoint.check_metadata(contents)
            before = checkpoint.stored_config(contents)
            checkpoint.stored_identity(contents.metadata)
            checkpoint.check_content(contents)
        except MissingInputError as error:
            say_once(f"{error}\n  trying the checkpoint before it")
            continue
        changes = configs.differences(before, config)
        _refuse_changes(path, "by another recipe", changes, allow_changes)
        autoencoder = AutoencoderKL(**asdict(config.model))
        finetuner, program = _build(config, autoencoder, RunState())
        frozen = checkpoint.restore(finetuner, finetuner.adams, contents)
        say_once(f"resuming {path.name}")
        _record_changes(finetuner, changes)
        adopt(finetuner, program, str(path), allow_changes)
        return finetuner, frozen
    if found:
        raise MissingInputError(
            f"{units.counted(len(found), 'checkpoint', 's')} in {run_dir}, none of which can be "
            "read; nothing was changed. Move them away to start over"
        )
    return _import(config)


def adopt(finetuner: Finetuner, inputs: identity.Identity, where: str, allow_changes: bool) -> None:
    """Compares today's inputs with those of the checkpoint, and puts them in their place.

    Raises UsageError if they differ, unless changes are allowed; then they are recorded.
    """
    changes = identity.differences(finetuner.run_state.identity, inputs)
    _refuse_changes(where, "from other inputs", changes, allow_changes)
    _record_changes(finetuner, changes)
    finetuner.run_state.identity |= inputs


def _refuse_changes(where: Path | str, how: str, changes: list[str], allowed: bool) -> None:
    if changes and not allowed:
        raise UsageError(
            f"{where} was made {how}:\n  " + "\n  ".join(changes) + "\n"
            "Give the same again, another run_dir, or --allow-changes"
        )


def _record_changes(finetuner: Finetuner, changes: list[str]) -> None:
    """Says what changes on resuming; the next checkpoints, and the card, keep it."""
    for change in changes:
        line = " ".join(f"from iteration {finetuner.iteration:,}: {change}".split())
        finetuner.run_state.changes.append(line)
        say_once(f"  {line}")


def _import(config: Config) -> tuple[Finetuner, str]:
    """A finetuner with the weights of `init.weights`."""
    say_once(f"reading {config.init.weights} ...")
    contents, weights = weight_file.read_weights(
        config.init.weights, config.init.select, config.init.prefix
    )
    say_once(f"init: {weight_file.describe(weight_file.report(contents, weights))}")
    iteration = config.init.iteration
    if iteration is None:
        iteration = contents.iteration
    elif contents.iteration not in (None, iteration):
        say_once(
            f"  init.iteration={iteration} is taken, although the file says {contents.iteration:,}"
            "; leave it out (null) to start from the file's count"
        )
    if iteration is None:
        raise UsageError(
            f"{contents.path} does not state its iteration; give init.iteration (kl-f8: 246803)"
        )
    check_model(config, contents, weights.autoencoder)
    stated = checkpoint.base_facts(contents, weights, config)
    say_once(f"  family: {facts.described(stated.family, stated)}")
    weight_file.check_finite(contents, weights.autoencoder)
    autoencoder = AutoencoderKL(**asdict(config.model))
    autoencoder.load_state_dict(weights.autoencoder)
    run_state = RunState(
        iteration,
        base=checkpoint.base(contents.path),
        facts=stated,
    )
    finetuner, program = _build(config, autoencoder, run_state)
    if weights.logvar is not None:
        finetuner.logvar.data.copy_(weights.logvar.reshape(()))
    finetuner.run_state.identity = program
    _import_discriminator(config, finetuner, weights.discriminator)
    return finetuner, frozen_sha256(finetuner.autoencoder.state_dict())


def check_model(config: Config, contents: weight_file.Contents, weights: State) -> None:
    """Raises MissingInputError if the network of a file is not the recipe's."""
    with torch.device("meta"):
        expected = AutoencoderKL(**asdict(config.model))
    differ = f"{contents.path} and the recipe's model differ"
    settings, other = _settings_of(contents, weights), "Give other weights"
    remedy = f"{other}, or set model.* as theirs{settings}"
    helps = settings != _settings_of(contents, expected.state_dict())
    check_like(weights, expected.state_dict(), differ, remedy if helps else other)
    try:
        checkpoint.check_groups(contents.facts, config.model)
    except MissingInputError as error:
        raise MissingInputError(f"{differ}: {error}\n{remedy}") from error


def _settings_of(contents: weight_file.Contents, weights: State) -> str:
    """The settings of a file's network, to be copied; empty if it is of another architecture."""
    try:
        found = architecture(weights, contents.facts)
    except MissingInputError:
        return ""
    shown = {name: units.written(value) for name, value in found.items() if name != "ch_mult"}
    shown["ch_mult"] = f"[{','.join(map(str, found['ch_mult']))}]"
    return ": " + shlex.join(f"model.{name}={value}" for name, value in shown.items())


def _import_discriminator(config: Config, finetuner: Finetuner, weights: Any) -> None:
    """Loads the discriminator, or plans its warm-up."""
    if finetuner.discriminator is None or config.adversarial is None:
        if weights:
            say_once("  its discriminator is not used: the recipe has no adversarial term")
        return
    missing = "no discriminator in it"
    if weights and config.init.discriminator == "new":
        weights, missing = None, "its discriminator is left out (init.discriminator=new)"
    shape = shape_of(weights) if weights else None
    if weights and shape is None:
        weights, missing = None, "its discriminator is of another kind and left out"
    if weights and shape:
        differ = f"{config.init.weights}: its discriminator and the recipe's differ"
        remedy = (
            f"Set adversarial.ndf={shape[0]} and adversarial.n_layers={shape[1]} as the file's, or "
            "init.discriminator=new for a new one"
        )
        check_like(weights, finetuner.discriminator.state_dict(), differ, remedy)
        finetuner.discriminator.load_state_dict(weights)
        say_once(
            "  its discriminator is taken over, as trained against that file's decoder; without "
            "a warm-up, and with new moments for Adam"
        )
        return
    finetuner.run_state.warmup_left = config.adversarial.warmup_iterations
    say_once(
        f"  {missing}: a new one trains alone for "
        f"{finetuner.warmup_left:,} iterations (adversarial.warmup_iterations)"
    )


def _build(
    config: Config, autoencoder: AutoencoderKL, run_state: RunState
) -> tuple[Finetuner, identity.Identity]:
    """A finetuner of these weights, with a seeded new discriminator; the program's identity."""
    discriminator = None
    if config.adversarial is not None:
        adversary = config.adversarial
        discriminator = Discriminator(adversary.ndf, adversary.n_layers, adversary.sync_batchnorm)
        initialize(discriminator, config.seed)
    network = pretrained.build(config.loss.perceptual, config.loss.perceptual_weights)
    program = identity.of_program(network)  # before it is compiled, or moved
    ours = bound_to(LightningModule)  # whatever else is imported
    parts = (autoencoder, discriminator, network, run_state)
    return ours(config, *parts, log_metrics=False), program


# --- the trainer ----------------------------------------------------------------------------


def _trainer(config: Config, callbacks: list[Any]) -> Trainer:
    compute = config.compute
    accelerator = compute.accelerator
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    gpus = torch.cuda.device_count()
    launcher, local, nodes = launched(compute.num_nodes)
    per_node = local or compute.devices or (gpus if accelerator == "cuda" else 1)
    nodes = nodes or compute.num_nodes or 1
    if accelerator == "cuda" and not 0 < per_node <= gpus:
        raise UsageError(
            f"{per_node or 'all'} processes with a GPU each, but torch sees {gpus} GPUs here; "
            + (
                "each task must see all of its node's: srun --gpus-per-node, not --gpus-per-task "
                "or --gpu-bind"
                if launcher == SRUN
                else "fix the driver, or start fewer processes (without a launcher: "
                "compute.devices), or give compute.accelerator=cpu"
            )
        )
    if local and compute.devices not in (None, local):
        say_once(
            f"{local} processes here, as the launcher started them; compute.devices="
            f"{compute.devices} is for a start without one"
        )
    if accelerator == "cuda" and gpus > per_node:
        say_once(f"using {per_node} of {gpus} GPUs here: one for each process the launcher started")
    cluster = _cluster(launcher)
    if nodes * per_node > 1:
        announce_to_ranks()
        say_once(
            f"waiting for {nodes * per_node} processes at "
            f"{cluster.main_address}:{cluster.main_port}"
        )
    trainer = Trainer(
        accelerator=accelerator,
        devices=per_node,
        num_nodes=nodes,
        strategy=_DecoderDDP(config) if nodes * per_node > 1 else "auto",
        plugins=[cluster],
        precision="32-true",  # the finetuner autocasts by itself
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=callbacks,
    )
    # Signals are for `Signals` alone: Lightning would end a run on SIGTERM without a checkpoint,
    # and send a flag of its own before each iteration and read it from the device.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    return trainer


# Buffers are never broadcast. torch renamed the argument in 2026, and warns of the old name on
# every rank; the new one still broadcasts buffers once at the start, but DDP here has none.
NEW_NAME = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
NO_BUFFERS: dict[str, Any] = {"forward_sync_buffers" if NEW_NAME else "broadcast_buffers": False}


class _DecoderDDP(DDPStrategy):
    """DDP over the decoder, on the training's own stream."""

    def __init__(self, config: Config) -> None:
        super().__init__(
            timeout=longest_wait(config.compute.timeout_minutes),
            # Gradients lie in DDP's buckets: without it there would be a second copy of them.
            gradient_as_bucket_view=True,
            **NO_BUFFERS,
        )

    def _setup_model(self, model: torch.nn.Module) -> DistributedDataParallel:
        """On the stream of the training: Lightning's own would make it wait in each iteration."""
        return DistributedDataParallel(
            model, device_ids=self.determine_ddp_device_ids(), **self._ddp_kwargs
        )


def _cluster(launcher: str) -> ClusterEnvironment:
    if launcher == TORCHRUN:
        return TorchElasticEnvironment()
    if launcher == SRUN:
        return SLURMEnvironment(auto_requeue=False)
    return LightningEnvironment()  # an installed srun does not mean that this runs under SLURM


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
    adversarial = (
        ""
        if config.adversarial is None
        else f" + {config.adversarial.weight:g} x adaptive x adversarial"
    )
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


def _locations(sources: Mapping[str, ImageSource]) -> list[str]:
    return [source.location(0) for source in sources.values()]


def _quiet_lightning() -> None:
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    logging.getLogger("lightning_fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    warnings.filterwarnings("ignore", module="lightning_fabric")
