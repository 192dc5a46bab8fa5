"""How fast an iteration is, and what each switch of `compute.*` is worth, uncompiled, in one run.

One after another, as all at once would not fit into a small card; the recipe's own iteration is
timed first and last, so the table shows whether the machine kept its pace.
"""

import statistics

import pytest
import torch
from checks import EAGER, OF_TIMES, REHEARSING, SIZE, ready, recipe, skip_if_too_large

from kl_f8_train.check import benchmark, cost

pytestmark = OF_TIMES
ITERATIONS = 2 if REHEARSING else 12
NOISE = 1.02  # a default may be so much slower than its opposite and still be as fast
# What is there for speed, and must be worth it; the others save memory or give exactness.
FOR_SPEED = ["compute.channels_last=false", "compute.subpixel_upsample=false", "precision=tf32"]
OTHERS = [
    *("compute.lean_norm=false", "compute.perceptual_parts=1", "compute.checkpoint_levels=2"),
    *("precision=float32", "compute.deterministic=true"),
]


def seconds(device: torch.device, *switches: str) -> float:
    """Median of an iteration of ft_ema's micro-batch; skips if it does not fit."""
    config = recipe("ft_ema", device, EAGER, *SIZE, *switches)
    skip_if_too_large(config, benchmark.batch_size(config, device))
    with ready(config, device) as made:
        made.iterate(benchmark.WARM_UP)
        times = [benchmark.timed(made.run, made.batch, device) for _ in range(ITERATIONS)]
    return statistics.median(times)


@pytest.fixture(scope="module")
def ours(device):
    """Seconds of the recipe's own iteration, uncompiled."""
    return seconds(device)


def test_iteration_of_the_recipe(device, see, ours):
    config = recipe("ft_ema", device, EAGER, *SIZE)
    size = benchmark.batch_size(config, device)
    rate = benchmark.matmul_rate(device, torch.bfloat16)
    done = cost.flops_per_image(config) * size / ours
    see(
        f"{size / ours:.1f} images/s, {1e3 * ours:.1f} ms for {size}; {done / 1e12:.0f} TFLOP/s, "
        f"{done / rate:.0%} of the matmul rate of {rate / 1e12:.0f}"
    )
    assert done < rate


@pytest.mark.parametrize("switch", FOR_SPEED)
def test_default_is_at_least_as_fast_as(device, see, ours, switch):
    other = seconds(device, switch)
    see(f"{1e3 * other:.1f} ms, {other / ours:.2f} x our time")
    assert ours < NOISE * other


@pytest.mark.parametrize("switch", OTHERS)
def test_time_of(device, see, ours, switch):
    other = seconds(device, switch)
    see(f"{1e3 * other:.1f} ms, {other / ours:.2f} x our time")


def test_pace_was_kept(device, see, ours):
    again = seconds(device)
    see(f"the recipe's own iteration again: {again / ours:.3f} x its first time")
    assert 0.9 < again / ours < 1.1
