"""Compiled by inductor for this GPU: no breaks, no waits, memory as computed, faster, and exact."""

import statistics
import time
from collections.abc import Iterator

import pytest
import torch
from checks import (
    COUNTED,
    EAGER,
    SMALL,
    Ready,
    difference,
    gradients,
    ready,
    recipe,
    skip_if_too_large,
)
from torch._dynamo.utils import counters

from kl_f8_train.check import benchmark, cost
from kl_f8_train.core import machine

pytestmark = COUNTED
COMPILED = "compute.compile=true"
FLOAT64 = ("precision=float32", *SMALL)
TOLERANCE = 1e-9  # relative to the norm of a network's gradient
ITERATIONS = 12


@pytest.fixture(scope="module")
def compiled(device: torch.device) -> Iterator[tuple[Ready, float]]:
    """ft_ema at full size after its first two iterations, and their seconds."""
    torch._dynamo.reset()
    counters.clear()
    config = recipe("ft_ema", device, COMPILED)
    skip_if_too_large(config, benchmark.batch_size(config, device))
    with ready(config, device) as made:
        began = time.perf_counter()
        made.iterate(2)
        torch.cuda.synchronize()
        yield made, time.perf_counter() - began
    torch._dynamo.reset()


def test_no_breaks_no_recompiles_no_waits(device, see, compiled):
    made, seconds = compiled
    graphs = machine.compiled_graphs()
    made.iterate(3)
    waits = benchmark.synchronizations(made.run, made.batch, device)
    see(f"{graphs} graphs in {seconds:.0f} s")
    assert (benchmark.graph_breaks(), machine.compiled_graphs() - graphs, waits) == (0, 0, 0)


def test_memory_is_at_most_what_was_computed(device, see, compiled):
    made, _ = compiled
    benchmark.reset_peak(device)
    made.iterate(2)
    torch.cuda.synchronize()
    measured = benchmark.peak_memory(device)
    computed = cost.peak_bytes(made.finetuner.config, made.size)
    see(f"{measured / cost.GIB:.2f} GiB, computed {computed / cost.GIB:.2f}")
    assert measured < 1.1 * computed


@pytest.mark.of_times
def test_faster_than_uncompiled(device, see, compiled):
    made, _ = compiled
    times = {}
    with ready(recipe("ft_ema", device, EAGER), device) as plain:
        plain.iterate(benchmark.WARM_UP)
        for name, one in (("compiled", made), ("uncompiled", plain)):
            each = [benchmark.timed(one.run, one.batch, device) for _ in range(ITERATIONS)]
            times[name] = statistics.median(each)
    rate = benchmark.matmul_rate(device, torch.bfloat16)
    done = cost.flops_per_image(made.finetuner.config) * made.size / times["compiled"]
    see(
        f"{made.size / times['compiled']:.1f} images/s, {done / rate:.0%} of the matmul rate; "
        f"uncompiled {times['uncompiled'] / times['compiled']:.2f} x its time"
    )
    assert times["compiled"] < times["uncompiled"]


@pytest.mark.of_values
def test_gradients_are_the_uncompiled_ones_in_float64(device, see):
    torch._dynamo.reset()
    plain, fast = (
        gradients(recipe("ft_ema", device, *FLOAT64, switch), device, torch.float64)
        for switch in (EAGER, COMPILED)
    )
    worst = max(difference(plain[network], fast[network]) for network in plain)
    see(f"differ by {worst:.1e} of their norm; bound {TOLERANCE:g}")
    assert worst < TOLERANCE
