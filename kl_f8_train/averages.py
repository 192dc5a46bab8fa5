"""What a run's weights are called: the moving averages of the decoder, and the raw ones.

A run has one moving average, `ema`, and perhaps further ones of other decays beside it. A selection
of weights is called `ema`, `ema-0.9999` or `raw`; the averages lie in checkpoints below `ema.`,
`ema_0_9999.`
"""

import re
from collections.abc import Sequence

from kl_f8_train.units import shortest


def selection(decay: float) -> str:
    """The name of the weights averaged with a decay: `ema-0.9999`."""
    return f"ema-{shortest(decay)}"


def requested(raw: bool, decay: float | None) -> str:
    """The name of the weights that --raw, --ema DECAY or neither asks for."""
    if raw:
        return "raw"
    return "ema" if decay is None else selection(decay)


def label(selected: str) -> str:
    """A selection, or a column's ending (`ema_0.9999`), for people: `EMA`, `EMA 0.9999`, `raw`."""
    return re.sub("[-_]", " ", selected.replace("ema", "EMA"), count=1)


def module_name(selected: str) -> str:
    """`ema-0.9999` -> `ema_0_9999`: a further average's part of a finetuner and its checkpoints."""
    return selected.replace("-", "_", 1).replace(".", "_")


def module_names(decays: Sequence[float]) -> dict[float, str]:
    """Each decay's average in a finetuner and its checkpoints; the first is the run's, `ema`."""
    further = {decay: module_name(selection(decay)) for decay in decays[1:]}
    return {decays[0]: "ema", **further}
