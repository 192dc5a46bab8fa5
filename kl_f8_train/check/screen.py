"""What `doctor` shows of its findings: a line for each question, the details behind --all."""

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kl_f8_train import units
from kl_f8_train.core.machine import on_cuda
from kl_f8_train.core.perceptual import LABELS
from kl_f8_train.rules import source_shares
from kl_f8_train.settings import Config
from kl_f8_train.units import counted, duration, listed, memory, size

# With the keys that doctor's sections have set; a failed one sets none.
Findings = Mapping[str, Any]
Lines = Iterator[tuple[str, str]]  # label and text


def lines(facts: Findings, config: Config) -> Iterator[str]:
    """The run, its inputs, its speed and its bill; what was not found out is left out."""
    parts = (_run(facts, config), _inputs(facts, config), _speed(facts), _bill(facts, config))
    for label, text in itertools.chain(*parts):
        yield f"  {label:<9}{text}"


def _run(facts: Findings, config: Config) -> Lines:
    start = facts.get("start_iteration", config.init.iteration)
    begin = "?" if start is None else f"{start:,}"
    yield "run", f"{config.name}, iteration {begin} -> {config.stop_iteration:,}"
    if batch := facts.get("batch"):
        dealt = units.batch(batch["global"], batch["processes"], batch["per_device"])
        yield "batch", f"{dealt}; learning rate {config.optimizer.learning_rate:g}, absolute"


def _inputs(facts: Findings, config: Config) -> Lines:
    if weights := facts.get("weights"):
        critic = "with" if weights["discriminator"] else "no"
        known, other = weights["shape"], weights["not_kl_f8"]
        shape = f"{known}'s shape" if known else other.partition(":")[0]
        name = Path(weights["file"]).name
        yield "weights", f"{name}: {weights['layout']}, {shape}, {critic} discriminator"
    loss = config.loss
    against = " + adversarial" if config.adversarial else ""
    yield "loss", f"{loss.pixel} + {loss.perceptual_weight:g} {LABELS[loss.perceptual]}{against}"
    for name, found in facts.get("data", {}).items():
        bad, checked = found["unusable"], found["checked"]
        some = f"{bad} of {checked.removeprefix('all ')}"
        unusable = f"{some} cannot be used" if bad else f"{checked} can be used"
        yield "data", f"{name}: {found['about']}; {unusable}{_passes(facts, config, name)}"
    if held_out := facts.get("validation"):
        known = len(held_out["common"]) or "none"
        pictures = counted(held_out["pictures"], "picture", "s")
        yield "held out", f"{pictures}, {known} of them among the {held_out['checked']}"


def _speed(facts: Findings) -> Lines:
    """As measured, else the memory as computed."""
    if seconds := facts.get("seconds_per_image"):
        cold = ", measured on a first, cold iteration" if facts["cold_iteration"] else ""
        most = memory(facts["memory_bytes"])
        yield "speed", f"{units.speed(1 / seconds)} on {facts['device']}, {most}{cold}"
    elif computed := facts.get("computed_memory"):
        needed, networks = memory(computed["bytes"]), computed["networks"]
        yield "memory", f"{needed} a process, computed for {networks} networks"
        if fits := facts["per_device_batch_that_fits"]:
            dealt = facts["batch"]
            largest = fitting(fits, dealt["global"] // dealt["processes"], dealt["global"])
            yield "", f"the largest compute.per_device_batch that fits: {largest}"


def _bill(facts: Findings, config: Config) -> Lines:
    if facts.get("images_total") is not None:
        yield "bill", bill(facts, config)
    if predicted := facts.get("predicted"):
        times = ", ".join(f"{name} {duration(days * 86400)}" for name, days in predicted.items())
        yield "", f"predicted for {facts['batch']['processes']} of each: {times}"
    if kept := facts.get("checkpoints"):
        free = f"; {size(facts['free_bytes'])} free" if "free_bytes" in facts else ""
        needed = size(facts["checkpoint_bytes"])
        yield "disk", f"{needed} for {counted(kept, 'checkpoint', 's')}{free}"


def fitting(fits: Mapping[str, int], share: int, batch: int) -> str:
    """`4 (the whole batch) on this machine, 2 on A and B`: the largest micro-batch by device.

    `share` is a process's part of the global batch: if it fits, memory is not what limits it.
    """
    whole = "the whole batch" if share == batch else "a process's whole share"
    named = {0: "none", share: f"{share} ({whole})"}
    devices: dict[int, list[str]] = {}
    for name, count in fits.items():
        devices.setdefault(count, []).append(name)
    return ", ".join(
        f"{named.get(count, count)} on {listed(names)}" for count, names in devices.items()
    )


def _passes(facts: Findings, config: Config, name: str) -> str:
    """How often the run goes through a source's images, where its length is known."""
    images = facts["data"][name]["images"]
    if not (images and facts.get("images_total")):
        return ""
    share = source_shares(config)[name] / config.global_batch
    return f"; {units.figure(share * facts['images_total'] / images)} passes"


def bill(facts: Findings, config: Config) -> str:
    """Iterations and images, and if a speed was measured, at that speed the hours and the end."""
    images, warmup = facts["images_total"], facts.get("warmup", 0)
    done = counted(images // config.global_batch, "iteration", "s")
    first = f" ({warmup:,} of warm-up)" if warmup else ""
    text = f"{done}{first} x {config.global_batch} = {counted(images, 'image', 's')}"
    if facts.get("days") is None:
        return text
    end = str(facts["end_date"] or "after the year 9999").replace("T", " ")[:16]
    most = "at most " if facts["cold_iteration"] else ""
    took = f"{most}{duration(facts['days'] * 86400)}, until {end} if started now"
    hours = f"{facts['gpu_hours']:,.3g} GPU-hours, " if on_cuda(config.compute) else ""
    return f"{text}: {hours}{took}"
