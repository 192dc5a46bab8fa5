"""Says when the networks compile, as an iteration of seconds then takes minutes."""

import time
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from kl_f8_train.core import machine
from kl_f8_train.core.step import Finetuner
from kl_f8_train.output import say
from kl_f8_train.run.callback import finetuner_of


class Compiling(Callback):
    """Announces iterations that compile, and says how long each took, on the first rank.

    A kind of iteration compiles when it runs first: warm-up, without and with the adversarial term.
    """

    def __init__(self) -> None:
        self.compiled: set[tuple[bool, bool]] = set()  # kinds of iterations
        self.kind = (False, False)
        self.graphs = 0
        self.began = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Announces the first iteration of a kind."""
        self.kind = kind_of(finetuner_of(pl_module))
        self.graphs, self.began = machine.compiled_graphs(), time.perf_counter()
        if trainer.is_global_zero and self.kind not in self.compiled:
            say(
                "compiling the networks: 1 to 3 minutes, or seconds with what an earlier run "
                f"compiled; {machine.compile_cache()}"
            )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Says how many graphs were compiled, also where none was expected."""
        graphs = machine.compiled_graphs() - self.graphs
        if trainer.is_global_zero and (graphs or self.kind not in self.compiled):
            seconds = time.perf_counter() - self.began
            again = "" if self.kind not in self.compiled else " once more"
            say(f"compiled {graphs} graphs{again}; the iteration took {seconds:.0f} s")
        self.compiled.add(self.kind)


def kind_of(finetuner: Finetuner) -> tuple[bool, bool]:
    """Whether the next iteration is one of the warm-up, and has the adversarial term."""
    warm_up = finetuner.warmup_left > 0
    return warm_up, warm_up or finetuner.adversary.runs(finetuner.iteration)
