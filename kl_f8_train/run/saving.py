"""Checkpoints at intervals, and the signals that end a run."""

import contextlib
import os
import signal
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Adam

from kl_f8_train.core.step import Finetuner
from kl_f8_train.core.updates import HostCopy, to_host
from kl_f8_train.errors import RunFailedError
from kl_f8_train.launch import RANKS, SIGNALS
from kl_f8_train.output import say
from kl_f8_train.run.callback import Course, finetuner_of, tolerated
from kl_f8_train.run.watchdog import end_process, show_stacks
from kl_f8_train.run_dir import best_checkpoint, best_path, checkpoint_path, remove_old_checkpoints
from kl_f8_train.settings import Checkpoint
from kl_f8_train.weights import checkpoint

ANSWER = 60.0  # seconds for an iteration to end after a signal; launchers wait 120 (torchrun)
TICK = 0.5  # seconds
FAILED = 255  # agreed on as signals are, and before any of them: saving has failed
HEARD = b"\nCtrl-C: finishes this iteration, saves and stops; a second one ends at once, unsaved\n"


class Checkpoints(Callback):
    """Saves every `checkpoint.every` iterations and at the end, and removes old files.

    Training waits while the state is copied to host memory; a thread of the first rank checks and
    writes it. The next save waits for that, since it takes the same memory, and so does the end.
    A save that fails is tried again at the next turn; two failures in a row end the run.
    """

    def __init__(
        self, run_dir: Path, config: Checkpoint, frozen_sha256: str, course: Course
    ) -> None:
        self.run_dir, self.config, self.frozen = run_dir, config, frozen_sha256
        self.course = course
        self.memory = checkpoint.HostMemory()
        self.snapshot: checkpoint.Snapshot | None = None  # the last one
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.writing: list[Future[None]] = []  # in the thread, in this order
        self.saved: tuple[int, int] | None = None  # counters of what is on the disk
        self.failures = 0  # in a row
        self.failure = ""  # the last one
        self.waiting = False  # for data, after a whole iteration
        self.child_ended = False  # in an iteration
        self.judge_loaders: Any = None  # torch's handler of SIGCHLD, which raises if one was killed
        self.mark = 0.0  # end of the last save, or the start
        self.warned = False  # that saving takes long

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the first interval."""
        self.mark = time.perf_counter()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Gets the memory for copies, once loaders have been forked: they would share its pages."""
        self.waiting = False
        if batch_idx == 0 and trainer.is_global_zero:
            self.judge_loaders = signal.signal(signal.SIGCHLD, self._note_child)
            size = checkpoint.snapshot_bytes(finetuner_of(pl_module), _adams(trainer))
            pinned = pl_module.device.type == "cuda"
            self.writing.append(self.thread.submit(self.memory.reserve, size, pinned))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Saves when it is time; ends the run when saving has failed twice, on all ranks."""
        if self.course.ends_unsaved:
            raise RunFailedError(trainer.strategy.broadcast(self.failure))
        self._look(wait=False)
        done = finetuner_of(pl_module).warmup_done or finetuner_of(pl_module).iteration
        if done % self.config.every == 0:
            finetuner_of(pl_module).guard.judge()
            if trainer.is_global_zero:
                began = time.perf_counter()
                self._save(trainer, finetuner_of(pl_module))
                self._judge_pause(began)
        self.waiting = True
        if self.child_ended:
            self.child_ended = False
            self._note_child(signal.SIGCHLD, None)

    def _note_child(self, number: int, frame: Any) -> None:
        """Lets a killed loader fail the wait for data, not the iteration, which can be saved."""
        if not self.waiting:
            self.child_ended = True
        elif callable(self.judge_loaders):
            self.judge_loaders(number, frame)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the last state, if it is not; here a failure is final."""
        self.waiting = False
        finetuner = finetuner_of(pl_module)
        finetuner.guard.judge()
        failure = None
        if trainer.is_global_zero:
            self._look(wait=True)
            if self.saved != counters(finetuner):
                self._save(trainer, finetuner)
                self._look(wait=True)
            if self.saved != counters(finetuner):
                failure = self.failure
        self._stop()
        failure = trainer.strategy.broadcast(failure)  # all ranks end alike
        if failure is not None:
            raise RunFailedError(failure)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: Any) -> None:
        """Lets the thread finish what it is writing; where data are missing, saves first."""
        between, self.waiting = self.waiting, False
        if between and trainer.is_global_zero:
            self._save_whole(trainer, finetuner_of(pl_module))
        self._stop()
        for fault in [*self._faults(), *[self.failure] * (self.failures > 1)]:
            if str(fault) != str(exception):
                say(f"and a checkpoint could not be saved: {fault}")

    def _stop(self) -> None:
        self.thread.shutdown()
        if self.judge_loaders is not None:
            signal.signal(signal.SIGCHLD, self.judge_loaders)

    def save_best(self, trainer: Trainer, finetuner: Finetuner) -> None:
        """Writes the best checkpoint so far, and then removes the one before; first rank only.

        A failure, of a full disk say, is logged: the regular checkpoints matter more.
        """
        snapshot = self._copy(trainer, finetuner)
        path = best_path(self.run_dir, finetuner.iteration)
        self.writing.append(self.thread.submit(self._write_best, snapshot, path))

    def _save(self, trainer: Trainer, finetuner: Finetuner) -> None:
        snapshot = self._copy(trainer, finetuner)
        path = checkpoint_path(self.run_dir, finetuner.iteration, finetuner.warmup_done)
        if not self.course.cannot_save:
            self.writing.append(self.thread.submit(self._write, snapshot, path))

    def _save_whole(self, trainer: Trainer, finetuner: Finetuner) -> None:
        """Saves the last iteration, which ended well, unless that is done or cannot be."""
        if self._faults() or self.failures or self.saved == counters(finetuner):
            return
        with contextlib.suppress(RunFailedError):  # what ends the run is another error
            finetuner.guard.judge()
            self._save(trainer, finetuner)
            if not self._faults() and self.saved == counters(finetuner):
                say(f"saved iteration {finetuner.iteration:,}, the last before the error")

    def _faults(self) -> list[BaseException]:
        """What went wrong in the thread unforeseen, once all is written."""
        faults = [future.exception() for future in self.writing]
        return [fault for fault in faults if fault is not None]

    def _copy(self, trainer: Trainer, finetuner: Finetuner) -> checkpoint.Snapshot:
        """The state as it is; what was copied before is written first."""
        if self.snapshot is None or self.snapshot.counters != counters(finetuner):
            self._look(wait=True)
            adams = _adams(trainer)
            self.snapshot = checkpoint.snapshot(finetuner, adams, self.frozen, self.memory)
        return self.snapshot

    def _look(self, wait: bool) -> None:
        """Raises what went wrong in the thread unforeseen; with `wait`, once all is written."""
        self.course.at_disk = wait
        try:
            while self.writing and (wait or self.writing[0].done()):
                self.writing.pop(0).result()
        finally:
            self.course.at_disk = False
        self.course.cannot_save = self.failures > 1

    def _write(self, snapshot: checkpoint.Snapshot, path: Path) -> None:
        """In the thread."""
        try:
            checkpoint.write(snapshot, path)
        except (RunFailedError, OSError) as error:
            self.failures, self.failure = self.failures + 1, str(error)
            if self.failures == 1:
                say(f"{error}\n  training goes on; the next checkpoint tries again")
            return
        self.saved, self.failures = snapshot.counters, 0
        with tolerated("an old checkpoint could not be removed"):
            remove_old_checkpoints(path, self.config.keep_last, self.config.keep_every)

    def _write_best(self, snapshot: checkpoint.Snapshot, path: Path) -> None:
        """In the thread."""
        with tolerated("the best checkpoint could not be written"):
            before = best_checkpoint(self.run_dir)
            checkpoint.write(snapshot, path)
            if before not in (None, path):
                before.unlink(missing_ok=True)
            iteration = snapshot.counters[0]
            say(f"best validation so far, at iteration {iteration:,}: kept as {path.name}")

    def _judge_pause(self, began: float) -> None:
        """Warns once if training waits more than a second and 5 % of the time between saves."""
        pause, interval = time.perf_counter() - began, began - self.mark
        self.mark = time.perf_counter()
        if not self.warned and pause > max(1.0, 0.05 * interval):
            self.warned = True
            say(
                f"saving took {pause:.1f} s of training, {100 * pause / interval:.0f} % of the "
                f"{interval:.0f} s since the last, most of them for that to be written; raise "
                "checkpoint.every, or give run_dir a faster disk"
            )


def counters(finetuner: Finetuner) -> tuple[int, int]:
    """The counters that identify a state of a run: iteration, and warm-up left."""
    return finetuner.iteration, finetuner.warmup_left


def _adams(trainer: Trainer) -> list[Adam]:
    return [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, Adam)]


class Signals(Callback):
    """Ends a run after an iteration, on all ranks together, when one of them gets a signal.

    SIGTERM, SIGINT, SIGUSR1 and SIGHUP set a flag, and so does a first rank that cannot save. The
    ranks exchange their flags after each iteration and read the outcome one iteration later, so
    that no host waits for its device. Then `Checkpoints` saves the last state. A second SIGINT ends
    the program at once.

    Python's handlers run between instructions of the main thread. One that hangs in C (in a
    collective whose other rank is dead, say) never runs them, so a thread watches for signals as
    well, and ends the process if no iteration ends in time.
    """

    def __init__(self, course: Course) -> None:
        self.course = course
        self.received = 0
        self.stopping = False  # the loop has answered
        self._agreed: HostCopy[Tensor] | None = None
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Takes the signals over."""
        # Python writes each signal's number into the pipe from C, even while the main thread hangs;
        # a handler of Python's would wait for that thread.
        self._heard, self._heard_by = os.pipe()
        os.set_blocking(self._heard_by, False)
        self._wakeup_before = signal.set_wakeup_fd(self._heard_by, warn_on_full_buffer=False)
        for number in SIGNALS:
            self._before[number] = signal.getsignal(number)
            if (number, self._before[number]) != (signal.SIGHUP, signal.SIG_IGN):  # nohup's
                signal.signal(number, self._note)
        self._restored = threading.Event()
        self._listener = threading.Thread(target=self._await_answer, daemon=True)
        self._listener.start()

    def restore(self) -> None:
        """Gives the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        self._restored.set()
        with contextlib.suppress(BlockingIOError):  # full: the listener is past reading
            os.write(self._heard_by, b"\0")
        self._listener.join()
        os.close(self._heard_by)
        os.close(self._heard)

    def _await_answer(self) -> None:
        """In a thread: ends the process if a signal is not answered in time."""
        while (number := os.read(self._heard, 1)[0]) not in SIGNALS:  # of other handlers
            if self._restored.is_set():
                return
        course, waited, before = self.course, 0.0, self.course.done
        while waited < max(ANSWER, 3 * course.seconds):  # for slow iterations
            if self._restored.wait(TICK) or self.stopping:
                return
            waited = waited + TICK if course.done == before and not course.at_disk else 0.0
            before = course.done

        def report() -> None:
            say(
                f"kl-f8-train: signal {number}, and no iteration ended for {waited:.0f} s: ended "
                "unsaved; the same command resumes from the newest checkpoint",
                aside=True,
            )
            show_stacks()

        end_process(128 + number, report)

    def _note(self, number: int, frame: Any) -> None:
        self.received = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if all(os.environ.get(name, "0") == "0" for name in RANKS):
                with contextlib.suppress(OSError):  # print would not do: it may be interrupted
                    os.write(2, HEARD)  # standard error

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Stops all ranks if one of them got a signal."""
        mine = FAILED if self.course.cannot_save else self.received
        if trainer.world_size > 1:
            # The largest wins: a failed save (255) over a signal, and a signal over none (0).
            flag = torch.full((), mine, device=pl_module.device)  # filled there
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            before, self._agreed = self._agreed, to_host(flag)
            stop = 0 if before is None else int(before.read())
        else:
            stop = mine
        if stop:
            trainer.should_stop = self.stopping = True
            self._take(stop)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All ranks end with the same code, also if a signal came in the last iteration."""
        self.stopping = True
        if self._agreed is not None:
            self._take(int(self._agreed.read()))

    def _take(self, agreed: int) -> None:
        if agreed == FAILED:
            self.course.ends_unsaved = True
        else:
            self.received = agreed
