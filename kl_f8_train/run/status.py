"""Where a run is, from its files alone: while it trains, or after it ended or died.

Nothing heavy is imported, nothing of the run is touched, and what is half written is left out.
"""

import base64
import contextlib
import datetime
import math
import os
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from kl_f8_train.errors import MissingInputError, RunFailedError, UsageError, like_path
from kl_f8_train.files import write_text
from kl_f8_train.run import outcome
from kl_f8_train.run.curves import RECENT, Chart, Points, page
from kl_f8_train.run.outcome import LOST_DB
from kl_f8_train.run_dir import (
    CLAIM,
    CONFIG_FILE,
    FAILURE_FILE,
    METRICS_FILE,
    VALIDATION_FILE,
    Row,
    is_claimed,
    is_run,
    newest_checkpoint,
    read_failure,
    read_rows,
    skipped_images,
)
from kl_f8_train.units import counted, duration, quoted, speed

Default = TypeVar("Default", float, None)
SPEED = "images_per_second"
SHOWN_PICTURES = 3  # validations on the page
ENOUGH_ROWS = 20  # for a judgement on speed and the loss: the start is slow
SILENT_INTERVALS, SILENT_SECONDS = 5, 120.0  # no news for longer than both: silent
STARTING, STARTING_SECONDS = "starting (before its first log line)", 900.0  # silent after these
LOSSES = ("reconstruction_loss", "pixel_loss", "perceptual_loss", "discriminator_loss")
NUMBERS = (  # settings that are read here
    *("stop_iteration", "global_batch", "init.iteration", "log.every", "checkpoint.every"),
    *("adversarial.start_iteration", "data.workers"),
)
CHARTS = (  # title, columns, how the values are shown
    ("Reconstruction loss, per pixel", ("reconstruction_loss",), "linear"),
    ("Its terms, unweighted", ("pixel_loss", "perceptual_loss"), "log"),
    ("Adversarial losses", ("generator_loss", "discriminator_loss"), "linear"),
    ("Logits of the discriminator", ("logits_real", "logits_fake"), "linear"),
    ("Adaptive weight, as used", ("adaptive_weight",), "log"),
    ("Share of clamped weights, %", ("adaptive_weight_clamped",), "percent"),
    ("Gradient norm, decoder", ("decoder_gradient_norm",), "log"),
    ("Gradient norm, discriminator", ("discriminator_gradient_norm",), "log"),
    ("Distance of EMA and raw weights", ("ema_distance",), "log"),
    ("PSNR of fixed photographs, dB (↑ better)", ("psnr_ema", "psnr_raw"), "linear"),
    ("SSIM of fixed photographs (↑ better)", ("ssim_ema", "ssim_raw"), "linear"),
    (
        "Perceptual distance of fixed photographs (↓ better)",
        ("perceptual_ema", "perceptual_raw"),
        "linear",
    ),
    ("Images per second", (SPEED,), "linear"),
    ("Share of time waiting for data, %", ("data_wait_share",), "percent"),
    ("Peak memory, GiB", ("peak_memory_gib",), "linear"),
)


@dataclass
class Status:
    """A run at a moment; None where the files do not show it."""

    run_dir: str
    name: str
    # "ended", "starting ...", "running", "stopped ... ago", "failed ... ago"; where it cannot be
    # known whether its process lives, "seems to be ..." or "silent ..."
    state: str
    failure: str | None  # why the last start failed
    iteration: int | None
    start_iteration: int | None
    stop_iteration: int
    done_share: float | None
    warmup_rows: int
    images_per_second: float | None
    seconds_left: float | None
    end_date: str | None  # if it continues, or were resumed now, at this speed
    last_log_age_seconds: float | None
    checkpoint: str | None
    checkpoint_iteration: int | None
    checkpoint_age_seconds: float | None
    validation: dict[str, Any]  # "iterations", and first and last scores of "ema", "raw", ...
    losses: dict[str, dict[str, float]]  # name -> first, before and recent mean
    warnings: list[str]


# --- reading --------------------------------------------------------------------------------


def read_settings(run: Path) -> dict[str, Any]:
    """The run's config.yaml as plain values; MissingInputError if there is none."""
    file = run / CONFIG_FILE
    if not run.is_dir():
        raise MissingInputError(
            f"run {run}: no such directory; give the run_dir of a training{like_path(run)}"
        )
    if not file.is_file():
        if is_claimed(run):
            raise MissingInputError(
                f"{run} is {STARTING}; ask again once it has written config.yaml"
            )
        if failure := read_failure(run):
            raise MissingInputError(f"{run} did not start: {failure[0]}")
        raise MissingInputError(
            f"{run} is not a run directory yet: it has no config.yaml, which `train` writes once "
            f"weights and data are open{_runs_inside(run)}"
        )
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it has no keys and values")
        for key in NUMBERS:
            _check_number(values, key)
        return {**values, "stop_iteration": int(values["stop_iteration"])}
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError, ValueError) as error:
        raise MissingInputError(
            f"{file} is not a run's configuration, as `train` writes it: "
            f"{type(error).__name__} {error}"
        ) from error


def _runs_inside(directory: Path) -> str:
    """`; did you mean runs/mine?` by the newest run inside it; empty if there is none."""
    found = [file for file in directory.glob(f"*/{CONFIG_FILE}") if is_run(file.parent)]
    found.sort(key=lambda file: file.stat().st_mtime)
    return f"; did you mean {found[-1].parent}?" if found else ""


def _check_number(config: Mapping[str, Any], key: str) -> None:
    """Raises ValueError if a setting is neither a number nor null."""
    group, _, name = key.rpartition(".")
    held = config.get(group) or {} if group else config
    value = held.get(name) if isinstance(held, Mapping) else held
    if value is not None and not (isinstance(value, int | float) and 0 <= value < 2**63):
        raise ValueError(f"{key}: got {quoted(value)}, expected a number")


def _age(paths: Iterable[Path], now: float, absent: Default) -> float | Default:
    """Seconds since the newest of these files was written; `absent` where there is none."""
    times = []
    for path in paths:
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            times.append(path.stat().st_mtime)
    return max(0.0, now - max(times)) if times else absent


# --- judging --------------------------------------------------------------------------------


def read_status(run: Path, now: float) -> Status:
    """State of a run at `now`, seconds since the epoch; MissingInputError if there is no run."""
    config = read_settings(run)
    stop, batch = config["stop_iteration"], config.get("global_batch") or 1
    rows, validated = read_rows(run / METRICS_FILE), read_rows(run / VALIDATION_FILE)
    training = [row for row in rows if "decoder_gradient_norm" in row]
    path, saved = newest_checkpoint(run) or (None, None)
    start = _start(config, rows)
    logged = int(rows[-1]["iteration"]) if rows else None
    iteration = max((i for i in (logged, saved) if i is not None), default=None)
    speed, interval, left, share = _speed_lately(rows), 0.0, None, None
    if speed:
        interval = (_group(config, "log").get("every") or 1) * batch / speed
    if speed and iteration is not None:
        left = max(0, stop - iteration) * batch / speed
    if iteration is not None and start is not None:
        share = min(1.0, (iteration - start) / max(1, stop - start))
    state = "ended" if saved is not None and saved >= stop else _state(run, interval, now)
    failure = read_failure(run)
    return Status(
        run_dir=str(run),
        name=str(config.get("name", run.name)),
        state=state,
        failure=failure[0] if failure and state.startswith("failed") else None,
        iteration=iteration,
        start_iteration=start,
        stop_iteration=stop,
        done_share=share,
        warmup_rows=sum(map(_is_warmup, rows)),
        images_per_second=speed,
        seconds_left=left,
        end_date=_date(now + left) if left else None,
        last_log_age_seconds=_age([run / METRICS_FILE], now, absent=None),
        checkpoint=str(path) if path else None,
        checkpoint_iteration=saved,
        checkpoint_age_seconds=_age([path] if path else [], now, absent=None),
        validation=_validation(validated),
        losses=compare_losses(training),
        warnings=[
            *_discriminator_warnings(_lately(training)),
            *_skipped_warnings(run, rows),
            *_row_warnings(config, rows),
            *_validation_warnings(validated),
            *_checkpoint_warnings(config, iteration, start if saved is None else saved),
        ],
    )


def _speed_lately(rows: Sequence[Row]) -> float | None:
    # A median: one slow row, as after a validation, says nothing about the rest of the run.
    speeds = [row[SPEED] for row in _lately(rows) if SPEED in row]
    return statistics.median_high(speeds) if speeds else None


def _is_warmup(row: Row) -> bool:
    """Of the discriminator alone; a row without either had no finite losses."""
    return "discriminator_loss" in row and "decoder_gradient_norm" not in row


def _group(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A group of settings; empty where it is null or missing."""
    return config.get(name) or {}


def _state(run: Path, log_interval_seconds: float, now: float) -> str:
    """Whether a run that has not ended is running: by its claim, or by whether it still writes."""
    claim, logs = run / CLAIM, run / METRICS_FILE
    claimed = is_claimed(run)  # None where locks do not show it: then only the files' ages do
    began = _age([claim], now, absent=math.inf)
    starts = began < _age([logs], now, absent=math.inf)
    if claimed:
        return STARTING if starts else "running"
    if claimed is None and starts and began < STARTING_SECONDS:
        return f"seems to be {STARTING}"
    if failure := read_failure(run):
        ago = duration(_age([run / FAILURE_FILE], now, absent=0.0))
        then = "goes on" if failure[1] else "fails again until that is fixed"
        return f"failed {ago} ago, by the error below; the same command {then}"
    news = _age((claim, run / CONFIG_FILE, logs, *run.glob("*/iteration-*")), now, absent=0.0)
    if claimed is False:
        then = "resumes it" if newest_checkpoint(run) else "starts it over (no checkpoint yet)"
        return f"stopped {duration(news)} ago; the same command {then}"
    if news > max(SILENT_SECONDS, SILENT_INTERVALS * log_interval_seconds):
        return f"silent for {duration(news)}"
    return "seems to be running" if log_interval_seconds else "seems to be starting"


def _start(config: Mapping[str, Any], rows: Sequence[Row]) -> int | None:
    """The iteration at which the run began: as set, or from the images of the first row."""
    given = _group(config, "init").get("iteration")
    if given is not None:
        return int(given)
    if not rows:
        return None
    images = sum(v for k, v in rows[0].items() if k.startswith("images_") and k != SPEED)
    # Rows count images since the run began, so the first shows how many iterations came before it.
    return round(rows[0]["iteration"] - images / (config.get("global_batch") or 1))


def _lately(rows: Sequence[Row]) -> Sequence[Row]:
    return rows[-max(1, round(RECENT * len(rows))) :] if rows else []


def _mean(rows: Iterable[Row], column: str) -> float | None:
    values = [row[column] for row in rows if column in row]
    # statistics.fmean raises OverflowError where a plain sum of a damaged table is infinite.
    return sum(values) / len(values) if values else None


def compare_losses(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Means of the first tenth of the rows, of the tenth before the last, and of the last."""
    count = len(_lately(rows))
    parts = {"first": rows[:count], "before": rows[-2 * count : -count], "recent": _lately(rows)}
    table = {}
    for loss in LOSSES:
        means = {name: _mean(part, loss) for name, part in parts.items()}
        known = {name: mean for name, mean in means.items() if mean is not None}
        if len(known) == len(parts):
            table[loss] = known
    return table


def _skipped_warnings(run: Path, rows: Sequence[Row]) -> Iterable[str]:
    """Images that cannot be used: as many files, however often each was met."""
    files = len(skipped_images(run.glob("skipped-*.txt")))
    count = files or round(rows[-1].get("skipped_images", 0.0) if rows else 0.0)
    if count:
        yield f"{counted(count, 'image', 's')} could not be used: see skipped-*.txt"


def _row_warnings(config: Mapping[str, Any], rows: Sequence[Row]) -> Iterable[str]:
    """Warnings from the log rows about updates, images, speed and the loss."""
    bad, last = left_out(rows)
    if bad:
        updates = counted(bad, "update", "s")
        yield f"{updates} left out as not finite, the last by iteration {last:,}"
    waited = _mean(_lately(rows), "data_wait_share") or 0.0
    if waited > 0.1 and len(rows) >= ENOUGH_ROWS:
        workers, cores = _group(config, "data").get("workers", 0), os.cpu_count() or 1
        yield f"{100 * waited:.0f} % of the time is spent waiting for data: " + (
            "raise data.workers"
            if workers < cores
            else f"data.workers={workers} is enough for the {cores} cores here; give smaller or "
            "nearer images, or more cores"
        )
    losses = compare_losses(rows).get("reconstruction_loss")
    if losses and len(rows) >= ENOUGH_ROWS and losses["recent"] > 1.5 * losses["first"]:
        yield (
            f"the reconstruction loss rose, from {losses['first']:.4g} to {losses['recent']:.4g}: "
            "the learning rate may be too high"
        )


def _validation(rows: Sequence[Row]) -> dict[str, Any]:
    """First and last scores of the fixed photographs; {} before there are two."""
    found = outcome.compare(rows)
    if found is None:
        return {}
    scores = {
        change.weights.lower(): {"psnr": change.psnr, "perceptual": change.perceptual}
        for change in found.changes
    }
    return {"iterations": found.iterations, **scores}


def _validation_warnings(rows: Sequence[Row]) -> Iterable[str]:
    """Whether the weights got worse; the raw ones show what the EMA may still hide."""
    found = outcome.compare(rows)
    yield from found.warnings() if found else ()
    if found and any(change.weights == "raw" and change.is_worse for change in found.changes):
        return
    first, recent = _mean(rows[:1], "psnr_raw"), _mean(_lately(rows), "psnr_raw")
    if first is not None and recent is not None and recent < first - LOST_DB:
        yield (
            f"the raw weights' PSNR fell from {first:.1f} dB at the start to {recent:.1f}: the "
            "learning rate may be too high"
        )


def left_out(rows: Sequence[Row]) -> tuple[int, int]:
    """Updates left out, and the row of the last; each process of a run counts from 0."""
    total, last, before = 0, 0, 0.0
    for row in rows:
        now = row.get("bad_updates", before)
        # A smaller count than before is a new process, which began at 0.
        new = now - before if now >= before else now
        if new:
            total, last = total + math.ceil(new), int(row["iteration"])
        before = now
    return total, last


def _checkpoint_warnings(
    config: Mapping[str, Any], iteration: int | None, last: int | None
) -> Iterable[str]:
    """Whether saving has fallen behind `last`, the newest checkpoint's iteration or the start."""
    every = _group(config, "checkpoint").get("every", 0)
    if iteration is not None and last is not None and every and iteration - last > 2 * every:
        yield (
            f"no checkpoint for {iteration - last:,} iterations, though checkpoint.every={every:,}"
        )


def _discriminator_warnings(lately: Sequence[Row]) -> Iterable[str]:
    """The hinge loss is 1 at chance and 0 once the discriminator separates real from fake.

    The adaptive weight may also reach its limit beside a good discriminator: the reconstruction
    loss is a sum over pixels, so its gradient grows with the crop.
    """
    loss = _mean(lately, "discriminator_loss")
    real, fake = _mean(lately, "logits_real"), _mean(lately, "logits_fake")
    clamped, factor = _mean(lately, "adaptive_weight_clamped"), _mean(lately, "adversarial_factor")
    if loss is None or real is None or fake is None or not factor:
        return
    if clamped and clamped > 0.01 and loss > 0.5:
        yield (
            f"the adaptive weight was clamped in {100 * clamped:.0f} % of the latest iterations, "
            f"beside a weak discriminator (loss {loss:.3g}; 1 is chance): its gradient has all but "
            "vanished"
        )
    logits = f"logits {real:.3g} real, {fake:.3g} fake, loss {loss:.3g}"
    if loss < 0.05:
        yield f"the discriminator has won and learns nothing more: {logits}"
    elif abs(real - fake) < 0.01:
        yield f"the discriminator does not separate real from fake: {logits}"


# --- screens --------------------------------------------------------------------------------


def facts(status: Status) -> dict[str, str]:
    """Label -> text, what is known of it."""
    goes_on = status.state.startswith(("running", "starting", "seems"))
    iteration, done, logged = status.iteration, status.done_share, status.last_log_age_seconds
    saved, age = status.checkpoint_iteration, status.checkpoint_age_seconds
    newest = "none yet" if saved is None or age is None else f"{saved:,}, {duration(age)} ago"
    shown = {
        "state": status.state,
        "error": status.failure,
        "iteration": None if iteration is None else f"{iteration:,} of {status.stop_iteration:,}",
        **dict(_validation_facts(status.validation)),
        "done": None if done is None else f"{100 * done:.1f} %",
        "speed lately": status.images_per_second and speed(status.images_per_second),
        "time left": status.seconds_left and duration(status.seconds_left),
        "end" if goes_on else "end, if resumed now": status.seconds_left and status.end_date,
        "last log": None if logged is None else f"{duration(logged)} ago",
        "last checkpoint": newest,
        "discriminator warm-up": status.warmup_rows and counted(status.warmup_rows, "log row", "s"),
    }
    return {label: str(text) for label, text in shown.items() if text}


def _validation_facts(validation: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """How the scores of each of the weights changed."""
    for weights, scores in validation.items():
        if weights != "iterations":
            first, last = validation["iterations"]
            change = outcome.Change(weights, **scores)
            label = f"validation, {weights.replace('ema', 'EMA')}"
            yield label, f"{change} (iteration {first:,} -> {last:,})"


def describe(status: Status) -> list[str]:
    """The lines of `kl-f8-train status`."""
    lines = [f"{status.name} in {status.run_dir}"]
    for label, text in facts(status).items():
        lines.append(f"  {label}: " + text.replace("\n", "\n    "))
    for name, means in status.losses.items():
        lines.append(
            f"  {name}: {means['recent']:.4g} lately, {means['before']:.4g} before, "
            f"{means['first']:.4g} at first"
        )
    return [*lines, *(f"  warning: {text}" for text in status.warnings)]


def html(run: Path, status: Status, now: float) -> str:
    """The page: facts, warnings, and a curve for everything that the tables hold."""
    rows = [r for r in read_rows(run / METRICS_FILE) if "decoder_gradient_norm" in r]
    validated = read_rows(run / VALIDATION_FILE)
    held = [key for row in (*rows[-1:], *validated[-1:]) for key in row]
    rows += validated
    charts = []
    for title, columns, scale in CHARTS:
        lines = {name: _points(rows, name, scale) for name in _with_further(columns, held)}
        charts.append(Chart(title, lines, log=scale == "log", percent=scale == "percent"))
    begins = _group(read_settings(run), "adversarial").get("start_iteration")
    first = rows[0]["iteration"] if rows else 0
    marks = {"discriminator starts": float(begins)} if begins and begins >= first else {}
    return page(
        f"{status.name}: {status.run_dir}",
        facts(status),
        status.warnings,
        charts,
        marks,
        f"Written {_date(now)} by kl-f8-train status. A row is a mean over log.every iterations; "
        "curves of more than 500 rows are averaged; numbers are means over the last tenth.",
        _strips(run),
    )


def _with_further(columns: Sequence[str], held: Sequence[str]) -> list[str]:
    """The columns, and those of the same figures for EMAs of other decays: `psnr_ema_0.9999`."""
    beginnings = tuple(f"{column}_" for column in columns if "ema" in column)
    return [*columns, *(name for name in held if name.startswith(beginnings))]


def _strips(run: Path) -> dict[str, str]:
    """The latest validations' strips, newest first: title -> data URI."""
    found = sorted((run / "pictures").glob("iteration-*.jpg"), reverse=True)[:SHOWN_PICTURES]
    pictures = {}
    for path in found:
        with contextlib.suppress(OSError, ValueError):
            iteration = int(path.stem.removeprefix("iteration-"))
            data = base64.b64encode(path.read_bytes()).decode()
            title = f"Iteration {iteration:,}: input, reconstruction by the EMA"
            pictures[title] = f"data:image/jpeg;base64,{data}"
    return pictures


def write_html(run: Path, status: Status, now: float, path: Path) -> None:
    """Writes the page atomically; UsageError or RunFailedError if it cannot be written."""
    if not path.name:
        raise UsageError(f"--html {path}: names no file; expected one to write, as status.html")
    try:
        if not path.parent.is_dir():
            raise RunFailedError(f"{path.parent}: no such directory")
        write_text(path, html(run, status, now))
    except RunFailedError as error:
        raise RunFailedError(
            f"--html {path}: cannot be written: {error}; name a file in a directory that exists"
        ) from error


def _points(rows: Sequence[Row], column: str, scale: str) -> Points:
    factor = 100 if scale == "percent" else 1  # tables hold shares
    return [(row["iteration"], factor * row[column]) for row in rows if column in row]


def _date(seconds: float) -> str:
    try:
        return datetime.datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")
    except (ValueError, OverflowError, OSError):
        return "after the year 9999"
