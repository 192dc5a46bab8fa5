"""The computed cost against what a real iteration takes, and the published sizes."""

import gc

import pytest
import torch

from kl_f8_train import config
from kl_f8_train.check import benchmark, cost

FULL = ("model.ch=128", "data.crop=256")
FLOORS = {"ft_ema": 2022e9, "ft_mse": 1971e9}  # of the formulas: every pass once, no border


def test_published_sizes(tiny):
    config = tiny("ft_ema", *FULL)
    assert cost.parameters(config)["decoder"] == 49_490_199
    assert cost.reduced_bytes(config) == 4 * (49_490_199 + 2_765_633)
    assert cost.state_bytes(config) / 2**30 == pytest.approx(1.15, abs=0.02)


@pytest.mark.parametrize("recipe", FLOORS)
def test_a_full_size_image_takes_the_floor(tiny, recipe):
    """2437 and 2260 GFLOP were counted with a plain upsampling, and losses' gradients twice."""
    counted = cost.flops_per_image(tiny(recipe, *FULL))
    assert FLOORS[recipe] < counted < 1.01 * FLOORS[recipe]
    assert sum(cost.flops_by_phase(tiny(recipe, *FULL)).values()) == counted


def test_plain_upsampling_takes_what_was_counted_first(tiny):
    plain = tiny("ft_mse", *FULL, "compute.subpixel_upsample=false")
    assert cost.flops_per_image(plain) / 1e9 == pytest.approx(2260, rel=1e-3)


def demo(*extra):
    return config.load(config.find_recipe("demo"), [*extra, "compute.compile=false"])


def run_for_real(settings, images):
    """Operations of an iteration, and bytes of its tensors alive at its peak."""
    counter = cost.Counter()
    with counter:
        run = benchmark.iteration_of(benchmark.build_finetuner(settings, []), torch.device("cpu"))
        batch = next(benchmark._random_batches(settings, images))
        run(batch)  # Adam's state is there from its end
        gc.collect()
        counter.reset()
        run(batch)
        counter("all")
    return counter.flops["all"], counter.peaks["all"]


SMALL = ("data.crop=32", "model.ch_mult=[1,1]", "adversarial.n_layers=2")


@pytest.mark.parametrize("levels", range(5))
def test_counted_operations_and_bytes_are_those_of_a_real_iteration(levels):
    """With ST-LPIPS, whose maps are not powers of two."""
    settings = demo(f"compute.checkpoint_levels={levels}")
    flops, memory = run_for_real(settings, 1)
    assert flops == cost.flops_per_image(settings)
    assert memory == pytest.approx(cost.peak_bytes(settings, 1), rel=0.02)


@pytest.mark.parametrize(
    "extra",
    [
        SMALL,
        ("compute.subpixel_upsample=false", "compute.lean_norm=false"),
        ("precision=bfloat16", "compute.perceptual_parts=1"),
        ("precision=bfloat16", "compute.checkpoint_levels=2"),
        ("second_forward=true",),
    ],
)
def test_switches_count_as_they_run(extra):
    settings = demo(*extra)
    flops, memory = run_for_real(settings, 2)
    assert flops == 2 * cost.flops_per_image(settings)
    assert memory == pytest.approx(cost.peak_bytes(settings, 2), rel=0.02)


def test_memory_is_a_line_over_the_batch():
    settings = demo()
    for batch in (1, 3, 4, 16):
        counted = max(cost.counts(settings, batch).peaks.values())
        assert cost.peak_bytes(settings, batch) == pytest.approx(counted, rel=0.01)


def test_the_largest_batch_fits_and_one_more_does_not():
    settings = demo()
    largest = cost.batch_that_fits(settings, 1e8)
    assert cost.peak_bytes(settings, largest) <= 1e8 < cost.peak_bytes(settings, largest + 1)
    assert cost.largest_divisor(settings, 7 * largest, 1e8) == largest
    assert cost.batch_that_fits(settings, 1e6) == cost.largest_divisor(settings, 12, 1e6) == 0


def test_memory_targets(tiny):
    """Batch 12 at 256: under 9 GiB uncompiled, and under 12 GB of a card that holds it."""
    config = tiny("ft_ema", *FULL, "precision=bfloat16")
    assert cost.peak_bytes(config, 12) <= 9 * cost.GIB
    assert cost.batch_that_fits(config, 12e9 - cost.HEADROOM_BYTES) >= 12
