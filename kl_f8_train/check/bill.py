"""The part of `doctor` that estimates: disk, hours, the end, and other machines."""

import datetime
import math
import shutil
from pathlib import Path

import torch

from kl_f8_train.check import cost, scaling, screen
from kl_f8_train.check.findings import Report
from kl_f8_train.config import PLACEHOLDER
from kl_f8_train.core import machine
from kl_f8_train.errors import RunFailedError
from kl_f8_train.files import check_writable
from kl_f8_train.run_dir import check_places, list_checkpoints
from kl_f8_train.settings import Checkpoint, Config
from kl_f8_train.units import counted, duration, size
from kl_f8_train.units import speed as rate


def kept_checkpoints(config: Checkpoint, start: int, stop: int) -> int:
    """How many checkpoints are there in the end: the newest, and the milestones before them."""
    # Saved at the multiples of `every` after the start, and at the end.
    saved = range(start - start % config.every + config.every, stop, config.every)
    newest = [*saved[max(0, len(saved) - config.keep_last + 1) :], stop]
    if not config.keep_every:
        return len(newest)
    # A milestone is a multiple of `keep_every` at which there is a save.
    step = math.lcm(config.every, config.keep_every)
    milestones = range(start - start % step + step, stop, step)
    return len(milestones) + sum(iteration not in milestones for iteration in newest)


def existing_parent(path: Path) -> Path:
    """The path itself, or the nearest directory above it that exists."""
    return next(part for part in (path.absolute(), *path.absolute().parents) if part.exists())


def check_disk(report: Report, config: Config) -> None:
    """Raises RunFailedError if the directory is closed, or too small for what will be kept."""
    run_dir = Path(config.run_dir)
    parent = existing_parent(run_dir / "checkpoints")
    planned = config.run_dir == PLACEHOLDER  # nowhere yet
    if not planned:
        if run_dir.exists():
            check_places(run_dir)
        else:
            check_writable(parent)
    start = report.start_iteration(config)
    if start is None:
        writable = "" if planned else f"{run_dir} can be written; "
        report.detail(f"{writable}how much is not known without the first iteration")
        return
    one = scaling.checkpoint_bytes(config)
    kept = kept_checkpoints(config.checkpoint, start, config.stop_iteration)
    kept += config.checkpoint.keep_best
    there = sum(path.stat().st_size for path in list_checkpoints(run_dir))
    # One more: a new file is whole before the oldest goes. Those of an earlier start count as kept.
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


def report_bill(report: Report, config: Config, world: int) -> None:
    """Images, hours and the end, here and on other machines."""
    report.say("the bill:")
    _bill(report, config, world)
    _report_scaling(report, config, world)


def _bill(report: Report, config: Config, world: int) -> None:
    start, seconds = report.start_iteration(config), report.facts.get("seconds_per_image")
    if start is None:
        report.detail(
            "not known: weights that state their iteration, or init.iteration, are missing"
        )
        return
    warmup = report.facts.get("warmup", 0)
    iterations = max(0, config.stop_iteration - start) + warmup
    total = iterations * config.global_batch
    report.facts["images_total"] = total
    if seconds is not None:
        hours = total * seconds / 3600
        days = hours / world / 24
        end = date_in(days)
        report.facts |= {
            "gpu_hours": hours,
            "days": days,
            "end_date": end and end.isoformat(timespec="seconds"),
        }
    report.detail(screen.bill(report.facts, config))


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
    seconds, start = report.facts.get("seconds_per_image"), report.start_iteration(config)
    iterations = 0 if start is None else max(0, config.stop_iteration - start)
    work = scaling.workload(config, iterations)
    cuda = machine.on_cuda(config.compute)
    gpu = scaling.find_gpu(torch.cuda.get_device_name()) if cuda else None
    if seconds is not None:
        report.say(f"scaling, by docs/performance.md, from the speed of {report.facts['device']}:")
        if gpu is not None:
            computed = 1 / scaling.seconds_per_image(work, gpu)
            report.detail(f"computed for {gpu.name}, not measured: {rate(computed)}")
        for count in scaling.GPU_COUNTS:
            if config.global_batch % count == 0:
                found = scaling.predict(work, seconds, count, gpu)
                report.detail(f"{count:>2}: {_predicted(found, work)}")
    if not cuda and cost.is_full_size(config):
        work = scaling.workload(scaling.for_gpus(config), iterations)
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
