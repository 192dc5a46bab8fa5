"""What the callbacks share."""

import contextlib
from collections.abc import Iterator

from pytorch_lightning import LightningModule

from kl_f8_train.core.step import Finetuner
from kl_f8_train.errors import RunFailedError
from kl_f8_train.output import say


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
