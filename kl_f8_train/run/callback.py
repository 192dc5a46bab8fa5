"""What the callbacks share; they do not know each other."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from pytorch_lightning import LightningModule

from kl_f8_train.core.step import Finetuner
from kl_f8_train.errors import RunFailedError
from kl_f8_train.output import say


@dataclass
class Course:
    """Where the training loop is; the last callback keeps it, the others read it."""

    done: int = 0  # iterations that have ended, with their reports and files
    since: float = field(default_factory=time.perf_counter)  # when the loop began to wait for data

    def end_iteration(self) -> None:
        """Counts it; from now on the loop waits for data."""
        self.done += 1
        self.since = time.perf_counter()


@contextlib.contextmanager
def tolerated(what: str = "a report could not be written") -> Iterator[None]:
    """Logs failures to write reports (a full disk, say) instead of ending the run."""
    try:
        yield
    except (OSError, RunFailedError) as error:
        say(f"{error}\n  {what}; training goes on")


def finetuner_of(module: LightningModule) -> Finetuner:
    """The module, typed."""
    assert isinstance(module, Finetuner)
    return module
