"""What the parts of a run share; callbacks do not know each other."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from pytorch_lightning import LightningModule
from pytorch_lightning.utilities import rank_zero_only

from kl_f8_train.core.step import Finetuner
from kl_f8_train.errors import RunFailedError
from kl_f8_train.output import say

say_once = rank_zero_only(say)


@dataclass
class Course:
    """Where the training loop is; the last callback counts, the others read."""

    done: int = 0  # iterations that have ended, with their reports and files
    since: float = field(default_factory=time.perf_counter)  # when the loop began to wait for data
    seconds: float = 0.0  # that the last iteration took
    at_disk: bool = False  # the loop waits for the disk
    cannot_save: bool = False  # this rank
    ends_unsaved: bool = False  # a rank cannot save, and all have agreed to end

    def end_iteration(self) -> None:
        """Counts it; from now on the loop waits for data."""
        now = time.perf_counter()
        self.done, self.seconds, self.since = self.done + 1, now - self.since, now


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
