"""What a run knows of itself beside its networks; checkpoints store it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from kl_f8_train.facts import Facts


@dataclass
class RunState:
    """Counters, and where the run comes from."""

    iteration: int = 0  # decoder updates, of the imported weights included
    warmup_left: int = 0  # iterations of the discriminator alone, before training
    ema_updates: int = 0
    first_iteration: int = -1  # of the imported weights, where schedules begin; -1: `iteration`
    base: dict[str, str] = field(default_factory=dict)  # name and SHA-256 of the imported file
    changes: list[str] = field(default_factory=list)  # of the recipe, on resuming
    identity: dict[str, str] = field(default_factory=dict)  # of data, perceptual network, versions
    facts: Facts = Facts()  # that the imported file stated

    def __post_init__(self) -> None:
        if self.first_iteration < 0:
            self.first_iteration = self.iteration

    def load(self, values: Mapping[str, Any]) -> None:
        """Takes over plain values, as `dataclasses.asdict` makes them."""
        for item in fields(self):
            value = values[item.name]
            setattr(self, item.name, Facts(**value) if item.name == "facts" else value)
