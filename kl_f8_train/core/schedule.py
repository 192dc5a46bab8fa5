"""The learning rate as a pure function of the iteration: nothing of it is saved."""

import math

from kl_f8_train.config import Optimizer


def learning_rate(settings: Optimizer, done: int) -> float:
    """The rate of the update after `done` of this run: warm-up times decay.

    It rises linearly to the whole rate over `warmup_iterations`, and decays from the run's start
    over `decay_iterations` to `final_learning_rate`, where it stays.
    """
    rate, final = settings.learning_rate, settings.final_learning_rate
    if settings.decay != "constant" and settings.decay_iterations is not None:
        # rate(n) = rate + (final - rate) p, p = n / N, or (1 - cos(pi n / N)) / 2: SGDR's half
        # period (Loshchilov and Hutter 2017), without restarts.
        progress = min(1.0, done / settings.decay_iterations)
        if settings.decay == "cosine":
            progress = 0.5 - 0.5 * math.cos(math.pi * progress)
        rate += (final - rate) * progress
    # done + 1: the first update already moves, by one part in warmup_iterations
    return rate * min(1.0, (done + 1) / max(1, settings.warmup_iterations))


def describe(settings: Optimizer, updates: int) -> str:
    """The rate in words; with a schedule, at the start, the middle and the end of `updates`."""
    if settings.decay == "constant" and not settings.warmup_iterations:
        return f"{settings.learning_rate:g}, absolute"
    at = {"start": 0, "middle": updates // 2, "end": max(0, updates - 1)}
    rates = ", ".join(f"{learning_rate(settings, n):.3g} at the {name}" for name, n in at.items())
    return f"{settings.learning_rate:g}, absolute, by its schedule {rates}"
