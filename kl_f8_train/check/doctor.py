"""Pre-flight check: settings, weights, data, disk, one iteration, and the estimated cost.

Every section is gone through, whatever was found before it, as far as it can be; nothing is
written but the indexes of shards, which `train` would write as well.
"""

import contextlib
import datetime
import io
import math
import resource
import shutil
import textwrap
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kl_f8_train import config as configs
from kl_f8_train import facts, images, units
from kl_f8_train.check import benchmark, cost, origins, overlap, scaling, screen
from kl_f8_train.core import machine, perceptual
from kl_f8_train.core.batch import Batch
from kl_f8_train.core.losses import generator_loss, reconstruction_loss
from kl_f8_train.core.model import FROZEN
from kl_f8_train.core.step import Finetuner
from kl_f8_train.core.updates import describe_rate
from kl_f8_train.data import identity
from kl_f8_train.data.handover import FEW_FILES, raise_open_files, shared_memory_note
from kl_f8_train.data.loading import PositionDataset, collate, open_data, shard_cache
from kl_f8_train.data.sources import FolderSource, ImageSource, open_source
from kl_f8_train.errors import ImageError, MissingInputError, RunFailedError, UsageError, UserError
from kl_f8_train.files import check_writable
from kl_f8_train.output import Say
from kl_f8_train.rules import micro_batch, side_range
from kl_f8_train.run.tracking import check_tensorboard, wandb_reachable
from kl_f8_train.run.train import adopt, check_model, fixed_photographs, start_or_resume
from kl_f8_train.run_dir import list_checkpoints
from kl_f8_train.settings import Checkpoint, Config, leaves, to_dict
from kl_f8_train.transfer import is_remote
from kl_f8_train.units import counted, duration, memory, size
from kl_f8_train.units import speed as rate
from kl_f8_train.weights import checkpoint, pretrained, weight_file
from kl_f8_train.weights.names import Weights

BASE_RATE = 4.5e-6  # the original's base learning rate
SMALL_FOLDER = 500  # photographs; all of them are decoded
SAMPLE = 32  # images of each local source that are decoded; of a remote one, REMOTE_SAMPLE
REMOTE_SAMPLE = 2
ABSENT = "absent"  # in the place of a setting without a value, in a plan
THIS_MACHINE = "this machine"  # where a run on its CPU gets its memory
WARNING = "WARNING: "  # how a grave remark begins
FEW_IMAGES = 2  # of the gradient audit, and of the trial iteration without a GPU
PATIENCE_SECONDS = 8.0  # a trial iteration that took longer is not run a second time


def _ignored(line: str) -> None:
    """Says nothing."""


@dataclass
class Report:
    """The findings: facts for machines, problems, and remarks, which do not forbid a run."""

    say: Say  # takes every line, in full
    begin: Say = _ignored  # takes the title of each section
    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[UserError] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    crashes: list[Exception] = field(default_factory=list)  # that no check foresaw

    @contextlib.contextmanager
    def section(self, title: str) -> Iterator[None]:
        """A part of the examination; an error raised in it is recorded as a problem."""
        self.begin(title)
        self.say(f"{title}:")
        with self.guard(title):
            yield

    @contextlib.contextmanager
    def guard(self, title: str) -> Iterator[None]:
        """Records any error, also an unexpected one, as a problem: the verdict always comes."""
        try:
            yield
        except UserError as error:
            self._record(error)
        except Exception as error:
            self.crashes.append(error)
            text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            self._record(RunFailedError(f"{title}: unexpected {text}\n--debug shows where"))

    def _record(self, error: UserError) -> None:
        if str(error) not in map(str, self.problems):
            self.problems.append(error)
        number = [str(problem) for problem in self.problems].index(str(error)) + 1
        self.say(f"  PROBLEM {number}, below")

    def detail(self, text: str) -> None:
        """A line of the current section."""
        self.say(f"  {text}")

    def remark(self, text: str) -> None:
        """A note, for the end; it may begin with "WARNING: "."""
        self.remarks.append(text)

    @property
    def exit_code(self) -> int:
        """0, or the code of the gravest problem: settings first, then inputs, then the rest."""
        return min((problem.exit_code for problem in self.problems), default=0)

    def as_json(self) -> dict[str, Any]:
        """The one object that `--json` prints; what could not be found out is null."""
        return {
            "go": not self.problems,
            "problems": [str(problem) for problem in self.problems],
            "remarks": self.remarks,
            **dict.fromkeys(("gradient_audit", "images_total", "gpu_hours", "end_date")),
            **dict.fromkeys(("checkpoint_bytes", "per_device_batch_that_fits")),
            **{key: _finite(value) for key, value in self.facts.items()},
        }


def _finite(value: Any) -> Any:
    """The same with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def examine(
    path: Path,
    overrides: list[str],
    say: Say,
    allow_changes: bool = False,
    brief: Say | None = None,
    begin: Say = _ignored,
) -> Report:
    """Goes through a run's settings and inputs, and tries one iteration.

    `say` gets every line; with `brief`, a screen of about a dozen lines goes there instead.
    `begin` gets the title of each section as it begins.
    """
    report = Report(_ignored if brief else say, begin)
    config = None
    with report.section("settings"):
        config = configs.load(path, overrides)
        _list_settings(report, config, path, overrides)
    with report.guard("examination"):
        if config is not None:
            _examine_run(report, config, allow_changes)
        elif (plan := _plan_without_inputs(report, path, overrides)) is not None:
            config = plan
            _examine_plan(report, plan)
        else:
            _examine_inputs(report, path, _usable_settings(report, path, overrides))
    with report.guard("screen"):
        if brief and config is not None:
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
        _check_disk(report, config)
    _report_bill(report, config, world)


def _note_useless_settings(report: Report, config: Config) -> None:
    """Settings that were given, but cannot do anything beside the others."""
    start, stop = _start_iteration(report, config), config.stop_iteration
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


def _plan_without_inputs(report: Report, path: Path, overrides: list[str]) -> Config | None:
    """The settings with a name in the place of each without a value; None if more is wrong.

    Whatever else is wrong also becomes a problem: a missing value would hide it.
    """
    with contextlib.suppress(UserError):  # already reported
        values = dict(leaves(configs.resolve(path, overrides)))
        absent = [f"{key}={ABSENT}" for key, value in values.items() if value == "???"]
        if absent:
            with report.section("the other settings"):
                return configs.load(path, [*overrides, *absent])
    return None


def _usable_settings(report: Report, path: Path, overrides: list[str]) -> list[str]:
    """The settings of the command line that can be read; each of the others becomes a problem.

    So does whatever is wrong with the values of the rest.
    """
    usable: list[str] = []
    with contextlib.suppress(UserError):  # of the recipe itself, already reported
        configs.resolve(path)
        for text in overrides:
            with report.section(text.partition("=")[0]):
                configs.resolve(path, [*usable, text])
                usable.append(text)
        if len(usable) < len(overrides):
            with report.section("the other settings"):
                configs.load(path, usable)
        return usable
    return overrides


def _examine_inputs(report: Report, path: Path, overrides: list[str]) -> None:
    """Looks at weights, data and networks although a setting is wrong: all problems in one go."""
    with contextlib.suppress(Exception):  # whatever a wrong setting does here
        config = configs.parse(path, overrides)
        with report.section("weights"):
            _check_weights(report, config)
        cache = shard_cache(config)
        for name, source in config.data.sources.items():
            with report.section(f"data: {name}"):
                open_source(name, source.shards, source.filters, cache, warn=report.detail)
        with report.section("perceptual network"):
            pretrained.build(config.loss.perceptual, config.loss.perceptual_weights)
        if config.log.pictures_every and config.log.pictures is not None:
            with report.section("photographs of validation"):
                fixed_photographs(config, report.detail)


def _examine_run(report: Report, config: Config, allow_changes: bool) -> None:
    world = planned_processes(config)
    with report.section("batch and learning rate"):
        _check_batch(report, config, world)
    with report.section("networks"):
        report.detail(machine.describe(config.compute))
        if machine.compiles(config.compute):
            report.detail(machine.compile_cache())
            machine.check_compile_cache(config.compute)
    with report.section("weights"):
        _check_weights(report, config)
    with report.section(f"perceptual network: {perceptual.LABELS[config.loss.perceptual]}"):
        network = pretrained.build(config.loss.perceptual, config.loss.perceptual_weights)
        if network.published:
            report.detail("found")
        else:
            report.remark(f"the loss is {network.label}: the result is not the published recipe's")
    for name in config.data.sources:
        with report.section(f"data: {name}"):
            _check_source(report, config, name)
    if config.log.pictures_every and config.log.pictures is not None:
        with report.section("photographs of validation"):
            found = fixed_photographs(config, report.detail)
            count = len(found[config.data.crop])
            report.detail(f"{counted(count, 'photograph', 's')} of {config.log.pictures}")
            _check_overlap(report, config, Path(config.log.pictures))
    elif config.log.pictures_every:
        report.remark(
            "validation shows training images, so its scores say nothing about others: set "
            "log.pictures to a folder of held-out photographs (`kl-f8-train split` makes one)"
        )
    with report.section("wandb"):
        _check_wandb(report, config)
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
            _try_iteration(report, config, finetuner, world, allow_changes)
    with report.section("disk"):
        _check_disk(report, config)
    _note_useless_settings(report, config)
    _report_bill(report, config, world)


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
    if config.compute.accelerator == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "compute.accelerator=cuda, but torch sees no GPU here; fix the driver, or give "
            "compute.accelerator=cpu"
        )
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
            kind.name: cost.largest_divisor(_for_gpus(config), share, kind.room_bytes)
            for kind in scaling.GPUS
        }
    report.facts["per_device_batch_that_fits"] = fits
    if fits:
        named = screen.fitting(fits, share, config.global_batch)
        gpus = fits.keys() != {THIS_MACHINE}
        left = f", with {memory(cost.HEADROOM_BYTES)} for CUDA and its allocator" if gpus else ""
        report.detail(f"the largest compute.per_device_batch that fits, computed{left}: {named}")


def _for_gpus(config: Config) -> Config:
    """The same run on GPUs, of another machine."""
    return replace(config, compute=replace(config.compute, accelerator="cuda"))


def _memory_here(config: Config) -> dict[str, float]:
    """Room in bytes, by name, for each process here; {} where a GPU elsewhere is meant."""
    if machine.on_cuda(config.compute):
        found = torch.cuda.get_device_properties(0)
        return {found.name: found.total_memory - cost.HEADROOM_BYTES}
    if cost.on_gpu(config):
        return {}
    copy = scaling.checkpoint_bytes(config)  # of the first process, while a checkpoint is written
    return {THIS_MACHINE: (machine.available_memory() - copy) / (config.compute.devices or 1)}


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


# --- inputs ---------------------------------------------------------------------------------


def _check_weights(report: Report, config: Config) -> None:
    found = list_checkpoints(Path(config.run_dir))
    if found:
        held = counted(len(found), "checkpoint", "s")
        report.detail(f"{config.run_dir} holds {held}: this run would resume")
    paths = found or [Path(config.init.weights)]
    contents, weights = _first_readable(report, paths, config.init.select, config.init.prefix)
    start = contents.iteration
    if not found and config.init.iteration is not None:
        start = config.init.iteration
    report.facts["start_iteration"] = start
    digest = weight_file.sha256(contents.path)
    shown = weight_file.report(contents, weights)
    report.facts["weights"] = {"sha256": digest, **shown}
    report.detail(weight_file.describe(shown))
    report.detail(f"{size(contents.path.stat().st_size)}, SHA-256 {digest}")
    if not found and contents.iteration not in (None, start):
        report.remark(
            f"init.iteration={start} is taken, although {contents.path.name} says "
            f"{contents.iteration:,}"
        )
    if not found:
        check_model(config, contents, weights.autoencoder)
        stated = checkpoint.base_facts(contents, weights, config)
        report.facts["weights"]["facts"] = stated.stated()
        report.detail(f"family: {facts.described(stated.family, stated)}")


def _first_readable(
    report: Report, paths: list[Path], select: str, prefix: str | None
) -> tuple[weight_file.Contents, Weights]:
    """The weights of the first file that can be read, as `train` would take it."""
    for path in paths[:-1]:
        try:
            return weight_file.read_weights(path, select, prefix)
        except MissingInputError as error:
            report.remark(f"{error}; the checkpoint before it would be taken")
    return weight_file.read_weights(paths[-1], select, prefix)


def _check_source(report: Report, config: Config, name: str) -> None:
    """Opens one source, reads its first shard, and decodes a sample as training would."""
    alone = replace(config.data, sources={name: config.data.sources[name]})
    plan, sources = open_data(replace(config, data=alone), report.detail)
    source = sources[name]
    for line in source.describe():
        report.detail(line)
    # The first shard, unless filters leave nothing of it.
    first = int(source.counts.argmax() if source.counts[0] == 0 else 0)
    place = source.location(first)
    report.detail(f"first shard {place}: {_describe_image(source, first, 0)}")
    dealt = plan.plans[name].lanes * plan.plans[name].lane_length  # in a pass, none twice
    count = min(plan.batch * 4, dealt, REMOTE_SAMPLE if is_remote(place) else SAMPLE)
    dataset = PositionDataset(plan, sources, config)
    began = time.perf_counter()
    samples = [dataset[position] for position in range(count)]
    speed = count / (time.perf_counter() - began)
    bad = sum(len(sample.skipped) for sample in samples)
    profiles = Counter(sample.profile for sample in samples if sample.profile)
    sides = side_range(config.data)
    side = sides[1] if sides else None
    small = 0 if side is None else _count_smaller(side, dataset, range(count))
    report.facts.setdefault("data", {})[name] = {
        "images": int(source.counts.sum()),
        "shards": len(source.counts),
        "sampled": count,
        "unusable": bad,
        "enlarged": small,
        "colour_profiles": dict(profiles),
        "images_per_second_per_worker": speed,
    }
    lines = [line for sample in samples for line in sample.skipped]
    of = counted(count, "sampled image", "s")
    if isinstance(source, FolderSource) and len(source.files) <= SMALL_FOLDER:
        lines = _unusable(name, source)
        of, bad = f"all {counted(len(source.files), 'image', 's')}", len(lines)
        report.facts["data"][name] |= {"sampled": len(source.files), "unusable": bad}
    report.facts["data"][name] |= {"checked": of, "about": "; ".join(source.describe())}
    report.detail(f"{bad} of {of} cannot be used; {rate(speed)} in one process")
    if lines:
        more = f", and {len(lines) - 1} more" if len(lines) > 1 else ""
        report.remark(f"{name}: {bad} of {of} cannot be used, as {lines[0]}{more}")
    if profiles:
        named = ", ".join(f"{number} {profile}" for profile, number in profiles.most_common(3))
        report.detail(f"{profiles.total()} of {count} are converted to sRGB from: {named}")
    if small:
        report.remark(
            f"{name}: {small} of {count} sampled images are smaller than data.shorter_side={side}, "
            f"and would be enlarged; leave such out (in shards: data.sources.{name}.filters="
            f"'width >= {side}, height >= {side}'), or lower data.shorter_side"
        )


def _unusable(name: str, source: FolderSource) -> list[str]:
    """A line for each image of a folder that cannot be decoded."""
    found = []
    for number in range(len(source.files)):
        try:
            images.decode(source.read(0, number)[1])
        except ImageError as error:
            found.append(f"{name}/{source.name(0, number)}: {error}")
    return found


def _describe_image(source: ImageSource, shard: int, sample: int) -> str:
    """Name and size of an image, or why it cannot be used."""
    try:
        key, data = source.read(shard, sample)
        found = images.picture(data)
    except ImageError as error:
        return f"{source.name(shard, sample)} cannot be used: {error}"
    height, width = found.pixels.shape[1:]
    profile = f", {found.profile}" if found.profile else ""
    return f"{key}, {width} x {height} pixels, {size(len(data))}{profile}"


def _count_smaller(side: int, dataset: PositionDataset, positions: range) -> int:
    """How many readable images at these positions have a side shorter than `side` pixels."""
    smaller = 0
    for position in positions:
        name, shard, number = dataset.plan.locate(position)
        with contextlib.suppress(ImageError):
            image = images.decode(dataset.sources[name].read(shard, number)[1])
            smaller += min(image.shape[1:]) < side
    return smaller


def _check_overlap(report: Report, config: Config, pictures: Path) -> None:
    """Notes validation pictures that are also trained on, as they are or nearly so."""
    found = overlap.find(pictures, open_data(config, _ignored)[1])
    report.facts["validation"] = asdict(found)
    report.detail(str(found))
    if found.common:
        one, other = next(iter(found.common.items()))
        verb = "is a training image" if len(found.common) == 1 else "are training images"
        most = 2 * len(found.common) > found.pictures
        loss = (
            "the validation's scores then say nothing about other photographs"
            if most
            else "the scores say less about others"
        )
        report.remark(
            f"{WARNING * most}{len(found.common)} of "
            f"{counted(found.pictures, 'validation picture', 's')} {verb}, as {one} = {other}: "
            f"{loss}; `kl-f8-train split` separates them, near-duplicates included"
        )


def _check_wandb(report: Report, config: Config) -> None:
    outcome: str = config.log.wandb
    if outcome == "auto":
        outcome = "online" if wandb_reachable() else "offline: its server does not answer"
    report.facts["wandb"] = outcome
    report.detail(outcome)


def existing_parent(path: Path) -> Path:
    """The path itself, or the nearest directory above it that exists."""
    return next(part for part in (path.absolute(), *path.absolute().parents) if part.exists())


# --- one iteration --------------------------------------------------------------------------


def _try_iteration(
    report: Report, config: Config, finetuner: Finetuner, world: int, allow_changes: bool
) -> None:
    """Audits the gradients of a real batch, then runs and times an iteration on it."""
    report.facts |= {"start_iteration": finetuner.iteration, "warmup": finetuner.warmup_left}
    cuda = machine.on_cuda(config.compute)
    device = torch.device("cuda" if cuda else "cpu")
    micro = micro_batch(config, world)
    count = micro if cuda else min(micro, FEW_IMAGES)
    plan, sources = open_data(config, report.detail)
    adopt(finetuner, identity.of_data(sources), config.run_dir, allow_changes)
    dataset = PositionDataset(plan, sources, config)
    first = finetuner.iteration * config.global_batch
    batch = collate([dataset[first + slot] for slot in range(count)]).to(device)
    finetuner.to(device)
    finetuner.perceptual.to(device)
    # As later in the run: the discriminator takes part, whatever comes first.
    finetuner.run_state.warmup_left = 0
    if config.adversarial is not None:  # with everything that it will cost
        start = config.adversarial.start_iteration
        finetuner.run_state.iteration = max(finetuner.iteration, start)
    try:
        with torch.compiler.set_stance("force_eager"):  # each term's backward pass keeps the graph
            audit = gradient_audit(finetuner, batch.first(FEW_IMAGES))
        report.facts["gradient_audit"] = audit
        for name, norm in audit.items():
            report.detail(f"gradient norm at decoder.conv_out.weight: {name} {norm:.4g}")
        seconds, cold = _timed_iteration(finetuner, batch)
    except RuntimeError as error:
        if not (cuda and machine.is_out_of_memory(error)):
            raise
        raise RunFailedError(
            f"out of GPU memory with {counted(count, 'image', 's')}: {error}\n"
            "Halve compute.per_device_batch (the global batch stays, by accumulation)"
        ) from error
    most = (
        torch.cuda.max_memory_allocated()
        if cuda
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    report.facts |= {
        "device": _device_name(cuda),
        "seconds_per_image": seconds / count,
        "cold_iteration": cold,
        "memory_bytes": most,
    }
    note = " (the first, cold iteration; later ones are quicker)" if cold else ""
    tried = f"{count} of {micro} images" if count < micro else counted(count, "image", "s")
    report.detail(
        f"{tried} in {seconds:.2f} s{note} on {_device_name(cuda)}: "
        f"{rate(count / seconds)}; memory at most {memory(most)}"
    )
    if not cuda:
        report.remark("time and memory were measured on this machine's CPU, not on a GPU")
    _check_gradients(finetuner, audit)
    _check_workers(report, config, count / seconds)


def gradient_audit(finetuner: Finetuner, batch: Batch) -> dict[str, float]:
    """Norm of each loss term's gradient at the decoder's last layer.

    The perceptual term with its weight, the adversarial one before its adaptive weight.
    """
    config, model = finetuner.config, finetuner.autoencoder
    dtype = model.last_layer.dtype
    x = images.to_float(batch.images).to(dtype)
    autocast = torch.autocast(x.device.type, torch.bfloat16, config.precision == "bfloat16")
    with torch.no_grad(), autocast:
        latents = model.encode(x).sample(batch.noise[0].to(dtype))
    with autocast:
        y = model.decode(latents).to(dtype)
        logits = None if finetuner.discriminator is None else finetuner.discriminator(y)

    def nll(name: str, weight: float) -> Tensor:
        # nll is linear in its weights: with all others 0 it is this term alone.
        alone = {f"{key}_weight": weight * (key == name) for key in config.loss.weights}
        distance = finetuner.perceptual(x, y) if name == "perceptual" else y.new_zeros(1)
        logvar = finetuner.logvar.detach()
        return reconstruction_loss(x, y, distance.to(dtype), pixel="l1", logvar=logvar, **alone)[0]

    weights = {name: weight for name, weight in config.loss.weights.items() if weight}
    both = {"l1", "mse"} <= weights.keys()
    terms = {
        "pixel" if name in ("l1", "mse") and not both else name: nll(name, weight)
        for name, weight in weights.items()
    }
    if logits is not None:
        terms["adversarial"] = generator_loss(logits.to(dtype))
    return {
        name: float(torch.autograd.grad(term, model.last_layer, retain_graph=True)[0].norm())
        for name, term in terms.items()
    }


def _timed_iteration(finetuner: Finetuner, batch: Batch) -> tuple[float, bool]:
    """Seconds of the second iteration; of the first, and True, if that took too long for two.

    A first iteration that compiles says nothing about the others.
    """
    device = batch.images.device
    run = benchmark.iteration_of(finetuner, device)
    seconds: list[float] = []
    for _ in range(2):
        benchmark.reset_peak(device)  # neither the audit's memory nor the compiler's
        seconds.append(benchmark.timed(run, batch, device))
        if seconds[-1] > PATIENCE_SECONDS and not machine.compiles(finetuner.config.compute):
            break
    return seconds[-1], len(seconds) == 1


def _check_gradients(finetuner: Finetuner, audit: Mapping[str, float]) -> None:
    """Raises RunFailedError for a term without a gradient, and for a frozen part with one."""
    wrong = [f"{name} {norm:g}" for name, norm in audit.items() if not 0 < norm < math.inf]
    model = finetuner.autoencoder
    wrong += [
        f"{part}.{name} has a gradient, though frozen"
        for part in FROZEN
        for name, parameter in getattr(model, part).named_parameters()
        if parameter.grad is not None
    ]
    if wrong:
        raise RunFailedError(
            f"gradient audit: {'; '.join(wrong[:5])}; expected every term above 0 and finite, and "
            "none in encoder and quant_conv. Check init.weights, the images, and precision=float32"
        )


def _check_workers(report: Report, config: Config, wanted: float) -> None:
    """Compares one loader process with what the device takes."""
    slowest = min(entry["images_per_second_per_worker"] for entry in report.facts["data"].values())
    workers = math.ceil(wanted / slowest)
    report.detail(
        f"data: {counted(workers, 'loader process', 'es')} can keep it busy; "
        f"data.workers={config.data.workers}"
    )
    if workers > max(1, config.data.workers):
        report.remark(f"data.workers={config.data.workers} is too few; {workers} would do")


def _device_name(cuda: bool) -> str:
    return (
        torch.cuda.get_device_name()
        if cuda
        else f"this CPU, {counted(torch.get_num_threads(), 'thread', 's')}"
    )


# --- the bill -------------------------------------------------------------------------------


def kept_checkpoints(config: Checkpoint, start: int, stop: int) -> int:
    """How many checkpoints are there in the end: the newest, and the milestones before them."""
    saved = range(start - start % config.every + config.every, stop, config.every)
    newest = [*saved[max(0, len(saved) - config.keep_last + 1) :], stop]
    if not config.keep_every:
        return len(newest)
    step = math.lcm(config.every, config.keep_every)
    milestones = range(start - start % step + step, stop, step)
    return len(milestones) + sum(iteration not in milestones for iteration in newest)


def _start_iteration(report: Report, config: Config) -> int | None:
    found: int | None = report.facts.get("start_iteration", config.init.iteration)
    return found


def _check_disk(report: Report, config: Config) -> None:
    """Raises RunFailedError if the directory is closed, or too small for what will be kept."""
    run_dir = Path(config.run_dir)
    parent = existing_parent(run_dir)
    planned = config.run_dir == ABSENT  # nowhere yet
    if not planned:
        check_writable(parent)
    start = _start_iteration(report, config)
    if start is None:
        writable = "" if planned else f"{run_dir} can be written; "
        report.detail(f"{writable}how much is not known without the first iteration")
        return
    one = scaling.checkpoint_bytes(config)
    kept = kept_checkpoints(config.checkpoint, start, config.stop_iteration)
    kept += config.checkpoint.keep_best
    there = sum(path.stat().st_size for path in list_checkpoints(run_dir))
    needed, free = (kept + 1) * one - there, shutil.disk_usage(parent).free
    report.facts |= {"checkpoint_bytes": kept * one, "checkpoints": kept}
    if planned:
        report.detail(f"{counted(kept, 'checkpoint', 's')} of {size(one)}: {size(kept * one)}")
        return
    report.facts["free_bytes"] = free
    report.detail(
        f"{counted(kept, 'checkpoint', 's')} of {size(one)} will be kept: {size(kept * one)}, and "
        f"one more while it is written; {size(free)} are free"
    )
    if needed > free:
        raise RunFailedError(
            f"{run_dir} needs {size(needed)} for checkpoints, but {size(free)} are free; make "
            "room, or raise checkpoint.keep_every (0: no milestones)"
        )


def _report_bill(report: Report, config: Config, world: int) -> None:
    report.say("the bill:")
    _bill(report, config, world)
    _report_scaling(report, config, world)


def _bill(report: Report, config: Config, world: int) -> None:
    start, seconds = _start_iteration(report, config), report.facts.get("seconds_per_image")
    if start is None:
        report.detail(
            "not known: weights that state their iteration, or init.iteration, are missing"
        )
        return
    warmup = report.facts.get("warmup", 0)
    iterations = max(0, config.stop_iteration - start) + warmup
    total = iterations * config.global_batch
    report.facts["images_total"] = total
    extra = f", {warmup:,} of them the discriminator's warm-up" if warmup else ""
    report.detail(
        f"{counted(iterations, 'iteration', 's')}{extra} x {config.global_batch} = "
        f"{counted(total, 'image', 's')}"
    )
    if seconds is None:
        return
    hours = total * seconds / 3600
    days = hours / world / 24
    end = date_in(days)
    report.facts |= {
        "gpu_hours": hours,
        "days": days,
        "end_date": end and end.isoformat(timespec="seconds"),
    }
    until = f"{end:%Y-%m-%d %H:%M}" if end else "after the year 9999"
    measured = "of the one, cold iteration" if report.facts["cold_iteration"] else "measured"
    took = duration(days * 86400)
    if machine.on_cuda(config.compute):
        took = f"{hours:,.3g} GPU-hours; with {counted(world, 'GPU', 's')} {took}"
    report.detail(f"at the speed {measured} here: {took}, until {until} if it starts now")


def date_in(days: float) -> datetime.datetime | None:
    """The time in so many days, to the second; None after the year 9999."""
    try:
        return datetime.datetime.now().replace(microsecond=0) + datetime.timedelta(days=days)
    except OverflowError:
        return None


def _report_scaling(report: Report, config: Config, world: int) -> None:
    """More devices like this one from its measured speed; without a GPU, also the known kinds.

    The known kinds for kl-f8's shape alone.
    """
    seconds, start = report.facts.get("seconds_per_image"), _start_iteration(report, config)
    iterations = 0 if start is None else max(0, config.stop_iteration - start)
    work = scaling.workload(config, iterations)
    cuda = machine.on_cuda(config.compute)
    gpu = scaling.find_gpu(torch.cuda.get_device_name()) if cuda else None
    if seconds is not None:
        report.say(f"scaling, by docs/performance.md, from the speed of {_device_name(cuda)}:")
        if gpu is not None:
            computed = 1 / scaling.seconds_per_image(work, gpu)
            report.detail(f"computed for {gpu.name}, not measured: {rate(computed)}")
        for count in scaling.GPU_COUNTS:
            if config.global_batch % count == 0:
                found = scaling.predict(work, seconds, count, gpu)
                report.detail(f"{count:>2}: {_predicted(found, work)}")
    if not cuda and cost.is_full_size(config):
        work = scaling.workload(_for_gpus(config), iterations)
        report.say(f"predicted, not measured: {world} of each of these, by a roofline:")
        for kind in scaling.GPUS:
            seconds = scaling.seconds_per_image(work, kind, world)
            found = scaling.predict(work, seconds, world, kind)
            report.detail(f"{kind.name:<14} {_predicted(found, work)}")
            if found.days:
                report.facts.setdefault("predicted", {})[kind.name] = found.days


def _predicted(found: scaling.Prediction, work: scaling.Workload) -> str:
    parts = [
        rate(found.images_per_second),
        *([duration(found.days * 86400)] if found.days else []),
        f"data {size(found.images_per_second * scaling.IMAGE_BYTES)}/s",
    ]
    if found.reduction_seconds:
        reduced = f"{1e3 * found.reduction_seconds:.1f} ms"
        parts.append(f"{reduced} an iteration wait for {size(work.reduced_bytes)} to be reduced")
    return ", ".join(parts)


def _verdict(report: Report, say: Say) -> None:
    for remark in report.remarks:
        say(remark if remark.startswith(WARNING) else f"note: {remark}")
    if not report.problems:
        say("GO")
        return
    say(f"NO GO, {counted(len(report.problems), 'problem', 's')}:")
    for number, problem in enumerate(report.problems, 1):
        say(textwrap.indent(f"{number}. {problem}", "  "))
