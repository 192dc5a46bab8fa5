"""A run's networks and state: from its newest readable checkpoint, or from imported weights."""

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule

from kl_f8_train import config as configs
from kl_f8_train import facts, units
from kl_f8_train.core.discriminator import Discriminator, initialize, shape_of
from kl_f8_train.core.hashes import frozen_sha256
from kl_f8_train.core.model import AutoencoderKL
from kl_f8_train.core.run_state import RunState
from kl_f8_train.core.step import Finetuner, bound_to
from kl_f8_train.data import identity
from kl_f8_train.errors import MissingInputError, UsageError, about
from kl_f8_train.run.callback import say_once
from kl_f8_train.run_dir import list_checkpoints
from kl_f8_train.settings import Config
from kl_f8_train.weights import checkpoint, pretrained, weight_file
from kl_f8_train.weights.names import State, architecture, check_shapes, shapes_of


def start_or_resume(config: Config, run_dir: Path, allow_changes: bool) -> tuple[Finetuner, str]:
    """The finetuner at its newest readable checkpoint, or at the imported weights."""
    found = list_checkpoints(run_dir)
    for path in found:  # newest first; one that is broken, or that the disk changed, is skipped
        try:
            contents = weight_file.read(path)
            before = checkpoint.stored_config(contents)
            checkpoint.check_metadata(contents)
            checkpoint.stored_identity(contents.metadata)
            checkpoint.check_content(contents)
        except MissingInputError as error:
            say_once(f"{error}\n  trying the checkpoint before it")
            continue
        changes = configs.differences(before, config)
        # Before any network is built, so that a refusal takes seconds.
        _refuse_changes(path, "by another recipe", changes, allow_changes)
        autoencoder = AutoencoderKL(**asdict(config.model))
        finetuner, program = _build(config, autoencoder, RunState())
        frozen = checkpoint.restore(finetuner, finetuner.adams, contents)
        say_once(f"resuming {path.name}")
        if before.init.weights != config.init.weights:
            say_once(
                "  note: only the start of a run reads init.weights, and another run_dir would: "
                f"{before.init.weights} -> {config.init.weights}"
            )
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
    for part in ("autoencoder", "ema", "discriminator"):
        checkpoint.check_content(contents, part)  # of a checkpoint of another run
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
    # All that the file may be wrong in, before networks are built from it.
    check_model(config, contents, weights.autoencoder)
    stated = checkpoint.base_facts(contents, weights, config)
    say_once(f"  family: {facts.described(stated.family, stated)}")
    weight_file.check_finite(contents, weights.autoencoder)
    autoencoder = AutoencoderKL(**asdict(config.model))
    autoencoder.load_state_dict(weights.autoencoder)
    run_state = RunState(iteration, base=checkpoint.base(contents.path), facts=stated)
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
    with about(differ, remedy if helps else other):
        check_shapes(weights, shapes_of(expected.state_dict()))
    with about(differ, remedy):
        checkpoint.check_groups(contents.facts, config.model)


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
    if not weights:
        missing = "no discriminator in it"
    elif config.init.discriminator == "new":
        missing = "its discriminator is left out (init.discriminator=new)"
    elif (shape := shape_of(weights)) is None:
        missing = "its discriminator is of another kind and left out"
    else:
        _take_discriminator(config.init.weights, finetuner.discriminator, weights, shape)
        return
    finetuner.run_state.warmup_left = config.adversarial.warmup_iterations
    say_once(
        f"  {missing}: a new one trains alone for "
        f"{finetuner.warmup_left:,} iterations (adversarial.warmup_iterations)"
    )


def _take_discriminator(
    file: str, discriminator: Discriminator, weights: Any, shape: tuple[int, int]
) -> None:
    differ = f"{file}: its discriminator and the recipe's differ"
    remedy = (
        f"Set adversarial.ndf={shape[0]} and adversarial.n_layers={shape[1]} as the file's, or "
        "init.discriminator=new for a new one"
    )
    with about(differ, remedy):
        check_shapes(weights, shapes_of(discriminator.state_dict()))
    bad = [key for key, value in weights.items() if not value.float().isfinite().all()]
    if bad:
        raise MissingInputError(
            f"{file}: its discriminator is not finite, {bad[0]} first: NaN or infinity; give other "
            "weights, or init.discriminator=new for a new one"
        )
    discriminator.load_state_dict(weights)
    say_once(
        "  its discriminator is taken over, as trained against that file's decoder; without a "
        "warm-up, and with new moments for Adam"
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
