"""A run that stands still: says where, which rank and which image, and ends with exit code 4."""

import datetime
import faulthandler
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from pytorch_lightning import Callback, LightningModule, Trainer

from kl_f8_train.core.step import Finetuner
from kl_f8_train.data.loading import IDLE, PositionDataset
from kl_f8_train.errors import RunFailedError
from kl_f8_train.output import Say, say
from kl_f8_train.run.callback import Course

GRACE = 5.0  # seconds that the ranks give each other to say where they are
SLOW = 30.0  # seconds of a first iteration after which a run says where it is
FIRST = 3  # the first iteration may take so many times as long: it compiles


def longest_wait(timeout_minutes: float) -> datetime.timedelta:
    """How long a process group may wait: half a minute longer than the watchdog ever does.

    The watchdog names the rank that is waited for; torch's own timeout does not.
    """
    return datetime.timedelta(minutes=FIRST * timeout_minutes + 0.5)


def end_process(code: int, report: Callable[[], None]) -> None:
    """Reports in a thread, for a bounded time, and ends the process whatever its threads wait for.

    Loaders end with it.
    """
    reporter = threading.Thread(target=report, daemon=True)  # a full pipe may hold it up
    reporter.start()
    reporter.join(4 * GRACE)
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


def show_stacks() -> None:
    """Prints every thread's stack to standard error."""
    if sys.__stderr__ is not None:
        faulthandler.dump_traceback(sys.__stderr__, all_threads=True)


class Watchdog(Callback):
    """Ends the process if no iteration, with its reports and files, ends within the time.

    A thread counts its own ticks, so that time in which the whole process slept does not count.
    """

    def __init__(self, timeout_minutes: float, course: Course, note: Say) -> None:
        self.seconds, self.note = 60 * timeout_minutes, note  # `note` keeps why a run ends
        self.course = course  # kept here, by the last callback
        self.waiting = True  # for data
        self.stopped = threading.Event()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts watching."""
        self.course.since = time.perf_counter()
        threading.Thread(target=self._watch, args=(trainer, pl_module), daemon=True).start()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """The data is here."""
        self.waiting = False

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Iteration, reports and files are done."""
        self.waiting = True
        self.course.end_iteration()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops watching."""
        self.stopped.set()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: Any) -> None:
        """Stops watching."""
        self.stopped.set()

    def _watch(self, trainer: Trainer, finetuner: Finetuner) -> None:
        tick = min(1.0, self.seconds / 20)  # short limits, of tests, have short ticks
        silent, before, said = 0.0, 0, not trainer.is_global_zero
        while silent < (self.seconds if self.course.done else FIRST * self.seconds):
            if self.stopped.wait(tick):
                return
            silent = silent + tick if self.course.done == before else 0.0
            before = self.course.done
            if silent >= SLOW and not before and not said:  # nothing else says that it goes on
                said = True
                phase = self._phase(trainer, finetuner.iteration + 1)
                say(f"{silent:.0f} s after the start the run {phase}")
        end_process(
            RunFailedError.exit_code, lambda: self._report(trainer, finetuner.iteration + 1, silent)
        )

    def _report(self, trainer: Trainer, iteration: int, silent: float) -> None:
        mine = f"rank {trainer.global_rank} {self._phase(trainer, iteration)}"
        what = f"no iteration ended for {silent:.0f} s; {mine}"
        self.note(what)
        say(f"kl-f8-train: {what}", aside=True)
        show_stacks()
        if trainer.world_size > 1:  # in a thread: the store itself may not answer
            reporter = threading.Thread(target=_report_silent, args=(trainer, mine), daemon=True)
            reporter.start()
            reporter.join(3 * GRACE)
            if reporter.is_alive():
                host = "rank 0, or torchrun on the first node"
                say(f"the ranks' meeting point ({host}) did not answer", aside=True)
        say("the same command resumes from the newest checkpoint", aside=True)

    def _phase(self, trainer: Trainer, iteration: int) -> str:
        if not self.waiting:
            return f"is in iteration {iteration:,}, or in its reports and checkpoint"
        dataset = getattr(trainer.train_dataloader, "dataset", None)
        reading = reading_now(dataset) if isinstance(dataset, PositionDataset) else []
        return "; ".join([f"waits for the data of iteration {iteration:,}", *reading])


def reading_now(dataset: PositionDataset) -> list[str]:
    """What each loader is reading: its worker number, source, shard or folder, and image."""
    lines = []
    for worker, position in enumerate(dataset.reading):
        if position != IDLE:
            name, shard, number = dataset.plan.locate(position)
            place = dataset.sources[name].location(shard)
            lines.append(f"loader {worker} reads {name}: {place}, image {number}")
    return lines


def _report_silent(trainer: Trainer, mine: str) -> None:
    """Each rank leaves its line and names those that left none."""
    # Over the store that the ranks met at: collectives may be what hangs.
    store = dist.distributed_c10d._get_default_store()
    keys = [f"watchdog/{rank}" for rank in range(trainer.world_size)]
    store.set(keys[trainer.global_rank], mine)
    try:
        store.wait(keys, datetime.timedelta(seconds=GRACE))
    except RuntimeError:
        silent = [rank for rank, key in enumerate(keys) if not store.check([key])]
        ranks = ", ".join(map(str, silent))
        why = "stopped, swapped out, or its node or network is gone"
        say(f"rank {ranks} did not answer: {why}", aside=True)
