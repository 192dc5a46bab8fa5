"""float64 on the GPU against the original's own results, and every switch against the CPU."""

import copy

import pytest
import torch
from checks import EAGER, OF_VALUES, SMALL, difference, gradients, recipe
from test_finetuner import BEFORE_START, RUNS, check_step, original_order

pytestmark = OF_VALUES
PLAIN = (
    *("compute.channels_last=false", "compute.subpixel_upsample=false"),
    *("compute.lean_norm=false", "compute.perceptual_parts=1", EAGER),
)
FLOAT64 = ("precision=float32", *SMALL)  # no autocast; the weights are in float64
TOLERANCE = 1e-9  # relative to the norm of a network's gradient


@pytest.mark.parametrize("name", list(RUNS))
def test_five_iterations_are_the_originals(golden, finetuner, batch, standin, device, name):
    given = (*original_order(RUNS[name]), BEFORE_START, f"compute.accelerator={device.type}", EAGER)
    network = copy.deepcopy(standin).to(device)
    tuner = finetuner("ft_ema", *given, perceptual=network).to(device)
    for step in range(5):
        tuner.run_iteration(batch(step).to(device))
    tuner.guard.judge()
    check_step(golden, tuner.cpu(), name, 5)


@pytest.fixture(scope="module")
def on_cpu() -> dict[str, torch.Tensor]:
    """Gradients of the plain path on the CPU."""
    cpu = torch.device("cpu")
    return gradients(recipe("ft_ema", cpu, *FLOAT64, *PLAIN), cpu, torch.float64)


@pytest.mark.parametrize(
    "switch",
    [
        "compute.channels_last=false",  # the plain path
        "compute.channels_last=true",
        "compute.subpixel_upsample=true",
        "compute.lean_norm=true",
        "compute.perceptual_parts=2",
        "compute.checkpoint_levels=4",
    ],
)
def test_gradients_are_the_cpus(on_cpu, device, see, switch):
    found = gradients(recipe("ft_ema", device, *FLOAT64, *PLAIN, switch), device, torch.float64)
    worst = max(difference(on_cpu[network], found[network]) for network in on_cpu)
    see(f"differ by {worst:.1e} of their norm; bound {TOLERANCE:g}")
    assert found.keys() == on_cpu.keys()
    assert worst < TOLERANCE
