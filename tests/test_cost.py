"""The computed cost against what a real iteration takes, and the published sizes."""

import csv
import gc
from dataclasses import replace
from pathlib import Path

import counted_memory
import pytest
import torch

from kl_f8_train import config
from kl_f8_train.check import benchmark, cost

FULL = ("model.ch=128", "data.crop=256")
BFLOAT16, COMPILED = "precision=bfloat16", ("false", "true")
PATHS = ("run_dir=none", "init.weights=none", "data.sources=none")
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


def run_for_real(settings, images, micro_batch=None):
    """Operations of an iteration, and bytes of its tensors alive at its peak."""
    micro = replace(settings.compute, per_device_batch=micro_batch or images)
    settings, counter = replace(settings, compute=micro), cost.CostCounter()
    with counter:
        run = benchmark.iteration_of(benchmark.build_finetuner(settings, []), torch.device("cpu"))
        batch = next(benchmark._random_batches(settings, images))
        run(batch)  # Adam's state is there from its end
        gc.collect()
        counter.reset()
        run(batch)
        counter("all")
    return sum(counter.phases["all"].flops.values()), counter.phases["all"].peak


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
        counted = max(tally.peak for tally in cost.counts(settings, batch).phases.values())
        assert cost.peak_bytes(settings, batch) == pytest.approx(counted, rel=0.01)


def test_the_largest_batch_fits_and_one_more_does_not():
    settings = demo()
    largest = cost.batch_that_fits(settings, 1e8)
    assert cost.peak_bytes(settings, largest) <= 1e8 < cost.peak_bytes(settings, largest + 1)
    assert cost.largest_divisor(settings, 7 * largest, 1e8) == largest
    assert cost.batch_that_fits(settings, 1e6) == cost.largest_divisor(settings, 12, 1e6) == 0


@pytest.mark.parametrize("extra", [(), ("adversarial=null",)])
def test_several_micro_batches_decode_twice_for_the_adaptive_weight(extra):
    settings = demo(*extra)
    flops, memory = run_for_real(settings, 12, micro_batch=4)
    assert flops == 12 * cost.flops_per_image(settings, accumulating=True)
    assert memory == pytest.approx(cost.peak_bytes(settings, 4, 12), rel=0.02)
    more = cost.flops_per_image(settings, accumulating=True) - cost.flops_per_image(settings)
    assert more == (
        0 if extra else pytest.approx(cost.flops_by_phase(settings)["decode"], rel=0.02)
    )


def test_memory_targets(tiny):
    """Batch 12 at 256: under 9 GiB, compiled 7.5, and all of an iteration on a 12 GB card."""
    eager, compiled = (tiny("ft_ema", *FULL, BFLOAT16, f"compute.compile={c}") for c in COMPILED)
    assert cost.peak_bytes(eager, 12) <= 9 * cost.GIB
    assert cost.peak_bytes(compiled, 12) <= 7.5 * cost.GIB
    for settings in (eager, compiled):
        assert cost.peak_bytes(settings, 12, 192) <= 12e9 - cost.HEADROOM_BYTES


def test_the_single_gpu_recipe_fits_a_card_of_12_gb():
    settings = config.load(config.find_recipe("single_gpu"), [*PATHS, "compute.compile=false"])
    needed = cost.peak_bytes(settings, settings.compute.per_device_batch, settings.global_batch)
    assert needed <= 12e9 - cost.HEADROOM_BYTES


COUNTED = list(csv.DictReader((Path(__file__).parent / "counted_memory.csv").open()))


@pytest.mark.parametrize("row", COUNTED, ids=lambda row: "-".join(list(row.values())[:5]))
def test_memory_is_what_a_pretended_gpu_counted(row):
    """tests/benchmarks/counted_memory.py counts it, and says how."""
    micro, images = int(row["micro_batch"]), int(row["images"])
    compiled, levels = bool(int(row["compiled"])), int(row["levels"])
    settings = counted_memory.settings(row["recipe"], compiled, levels, micro, images)
    computed = cost.peak_bytes(settings, micro, images)
    assert computed == pytest.approx(int(row["bytes"]), rel=0.1)


def test_compiled_traffic_is_what_inductor_counted(tiny):
    """44.5 GB of Triton kernels and 31 GB of convolutions in an iteration of 12 images."""
    work = cost.work(tiny("ft_ema", *FULL, BFLOAT16, "compute.compile=true"))
    assert 12 * work.product_bytes == pytest.approx(31e9, rel=0.1)
    assert 12 * work.other_bytes == pytest.approx(44.5e9, rel=0.1)
