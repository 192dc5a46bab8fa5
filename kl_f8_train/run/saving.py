"""Checkpoints at intervals, and the signals that end a run."""

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning import Callback, LightningModule, Trainer
from torch.optim import Adam

from kl_f8_train import config as configs
from kl_f8_train.core.step import Finetuner
from kl_f8_train.core.updates import HostCopy
from kl_f8_train.errors import RunFailedError
from kl_f8_train.launch import SIGNALS
from kl_f8_train.output import say
from kl_f8_train.run.callback import finetuner_of, tolerated
from kl_f8_train.run.watchdog import end_process, show_stacks
from kl_f8_train.run_dir import best_checkpoint, best_path, remove_old_checkpoints
from kl_f8_train.weights import checkpoint

ANSWER = 60.0  # seconds for an iteration to end after a signal; launchers wait 120 (torchrun)
TICK = 0.5  # seconds


class Checkpoints(Callback):
    """Saves every `checkpoint.every` iterations and at the end, and removes old files.

    A save that fails is tried again at the next turn; two failures in a row end the run.
    """

    def __init__(self, run_dir: Path, config: configs.Checkpoint, frozen_sha256: str) -> None:
        self.run_dir, self.config, self.frozen = run_dir, config, frozen_sha256
        self.saved: tuple[int, int] | None = None
        self.failures = 0
        self.mark = 0.0  # end of the last save, or the start
        self.warned = False  # that saving takes long

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the first interval."""
        self.mark = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Saves when it is time."""
        done = finetuner_of(pl_module).warmup_done or finetuner_of(pl_module).iteration
        if done % self.config.every == 0:
            self.save(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the last state; here a failure is final."""
        self.save(trainer, pl_module, final=True)

    def save(self, trainer: Trainer, pl_module: LightningModule, final: bool = False) -> None:
        """Writes a checkpoint of the current iteration, on the first rank."""
        finetuner = finetuner_of(pl_module)
        now = (finetuner.iteration, finetuner.warmup_left)
        if self.saved == now:
            return
        finetuner.guard.judge()
        failure: str | None = None
        began = time.perf_counter()
        if trainer.is_global_zero:
            try:
                optimizers = [o for o in trainer.optimizers if isinstance(o, Adam)]
                path = checkpoint.save(finetuner, optimizers, self.run_dir, self.frozen)
            except (RunFailedError, OSError) as error:
                failure = str(error)
            else:
                with tolerated("an old checkpoint could not be removed"):
                    keep = self.config
                    remove_old_checkpoints(path, keep.keep_last, keep.keep_every)
        failure = trainer.strategy.broadcast(failure)  # all ranks go on, or stop, together
        if failure is None:
            self.saved, self.failures = now, 0
            self._judge_pause(began, trainer.is_global_zero and not final)
            return
        self.failures += 1
        if final or self.failures > 1:
            raise RunFailedError(failure)
        if trainer.is_global_zero:
            say(f"{failure}\n  training goes on; the next checkpoint tries again")

    def save_best(self, trainer: Trainer, finetuner: Finetuner) -> None:
        """Writes the best checkpoint so far, and then removes the one before; first rank only.

        A failure, of a full disk say, is logged: the regular checkpoints matter more.
        """
        with tolerated("the best checkpoint could not be written"):
            before = best_checkpoint(self.run_dir)
            optimizers = [o for o in trainer.optimizers if isinstance(o, Adam)]
            path = best_path(self.run_dir, finetuner.iteration)
            checkpoint.save(finetuner, optimizers, self.run_dir, self.frozen, path)
            if before not in (None, path):
                before.unlink(missing_ok=True)
            say(
                f"best validation so far, at iteration {finetuner.iteration:,}: kept as {path.name}"
            )

    def _judge_pause(self, began: float, aloud: bool) -> None:
        """Warns once if saving takes more than a second and 5 % of the time between saves."""
        pause, interval = time.perf_counter() - began, began - self.mark
        self.mark = time.perf_counter()
        if aloud and not self.warned and pause > max(1.0, 0.05 * interval):
            self.warned = True
            say(
                f"saving took {pause:.1f} s, {100 * pause / interval:.0f} % of the "
                f"{interval:.0f} s since the last; raise checkpoint.every, or give run_dir a "
                "faster disk"
            )


class Signals(Callback):
    """SIGTERM, SIGINT, SIGUSR1, SIGHUP set a flag; all ranks agree on it after an iteration, stop.

    What they agreed on is read after one iteration more, so that no host waits for its device.
    The last state is then saved by `Checkpoints`. A second SIGINT ends the program at once.

    Python's handlers run between instructions of the main thread. One that hangs in C (in a
    collective whose other rank is dead, say) never runs them, so a thread also hears of signals,
    and ends the process if no iteration ends in time.
    """

    def __init__(self) -> None:
        self.received = 0
        self.done = 0  # iterations
        self.seconds = 0.0  # that the last iteration took, with its reports
        self.mark = 0.0  # its end, or the start
        self.stopping = False  # the loop has answered
        self._agreed: HostCopy | None = None
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Takes the signals over."""
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
        while (number := os.read(self._heard, 1)[0]) not in SIGNALS:  # others have handlers, too
            if self._restored.is_set():
                return
        waited, before = 0.0, self.done
        while waited < max(ANSWER, 3 * self.seconds):  # for slow iterations
            if self._restored.wait(TICK) or self.stopping:
                return
            waited = waited + TICK if self.done == before else 0.0
            before = self.done

        def report() -> None:
            say(
                f"kl-f8-train: signal {number}, and no iteration ended for {waited:.0f} s: ended "
                "unsaved; the same command goes on from the newest checkpoint",
                aside=True,
            )
            show_stacks()

        end_process(128 + number, report)

    def _note(self, number: int, frame: Any) -> None:
        self.received = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The first iteration begins."""
        self.mark = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Stops all ranks if one of them got a signal."""
        now = time.perf_counter()
        self.done, self.seconds, self.mark = self.done + 1, now - self.mark, now
        if trainer.world_size > 1:
            flag = torch.full((), self.received, device=pl_module.device)  # filled there
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            before, self._agreed = self._agreed, HostCopy(flag)
            stop = 0 if before is None else int(before.read())
        else:
            stop = self.received
        if stop:
            self.received, self.stopping = stop, True
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All ranks end with the same code, also if a signal came in the last iteration."""
        if self._agreed is not None:
            self.received = int(self._agreed.read())
