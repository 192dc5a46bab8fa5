"""What an iteration does on a GPU, counted on a pretended one (pretended.py): limits that hold.

Kernels, memory and host waits are the GPU path's own. No times, no values.
"""

import csv
import os
import re
import subprocess
import sys

import pretended
import pytest
import runs
import torch
from step_counts import count_apart
from torch.torch_version import TorchVersion

pytestmark = pytest.mark.slow
GIB = 2**30
TRIED = "2.14"  # older releases call other functions of CUDA
TINY = (
    *("model.ch=32", "model.ch_mult=[1,1]", "model.num_res_blocks=1", "data.crop=64"),
    *("adversarial.ndf=16", "adversarial.n_layers=2", "compute.per_device_batch=2"),
    *("loss.perceptual=st_lpips_alex", "loss.allow_stand_in=true"),
)


@pytest.fixture(scope="module")
def gpu(tmp_path_factory):
    """A folder with the library."""
    if lacking := pretended.missing():
        pytest.skip(lacking)
    if TorchVersion(torch.__version__) < TRIED:
        pytest.skip(f"torch {torch.__version__}: written for {TRIED} and newer")
    folder = tmp_path_factory.mktemp("gpu")
    pretended.build(folder)
    return folder


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        (["--help"], 0, "python tests/gpu/pretended.py COMMAND"),
        ([], 2, "python tests/gpu/pretended.py COMMAND"),
        (["no-such-command"], 1, "no-such-command: no such command|is a build for CPUs|installed"),
    ],
)
def test_a_use_that_is_wrong_is_explained(given, code, said):
    command = [sys.executable, pretended.__file__, *given]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code
    assert re.search(said, done.stdout + done.stderr)
    assert "Traceback" not in done.stderr


# Kernels: 2,424 and 2,165 were counted.
@pytest.mark.parametrize(("recipe", "kernels"), [("ft_ema", 2450), ("ft_mse", 2190)])
def test_uncompiled_iteration(gpu, recipe, kernels):
    """12 images of 256 px, as by default."""
    found = count_apart(gpu, recipe, "compute.compile=false")
    assert found["kernels"] <= kernels
    assert 0.9 < found["peak bytes"] / found["computed bytes"] < 1.1
    assert found["peak bytes"] < 9 * GIB
    assert found["host waits"] == 0
    assert found["waits"] == 1  # for the verdict on the iteration before


def test_compiled_iteration(gpu):
    """By inductor and Triton for this GPU, with the options that only CUDA has. A tiny network."""
    plain, compiled = (
        count_apart(gpu, "ft_ema", *TINY, f"compute.compile={switch}")
        for switch in ("false", "true")
    )
    assert plain["graphs"] == 0
    assert compiled["graphs"] >= 8  # encoder, two levels, middle, discriminator, perceptual
    assert (compiled["graph breaks"], compiled["recompiles"]) == (0, 0)
    assert (compiled["host waits"], compiled["waits"]) == (0, 1)
    assert compiled["triton"] > 100
    assert compiled["kernels"] < 0.34 * plain["kernels"]  # 495 and 1,517 were counted
    assert 0 < compiled["triton gigabytes"] <= 0.11  # 0.11 was counted
    assert compiled["peak bytes"] < plain["peak bytes"]


@pytest.mark.parametrize("compiled", ["false", "true"])
def test_train_goes_to_its_end(gpu, folder, compiled):
    """As a program of its own: loaders, fused Adam, saving from pinned memory."""
    settings = (
        *("compute.accelerator=cuda", f"compute.compile={compiled}", "stop_iteration=103"),
        *pretended.SETTINGS,
    )
    name = f"run_{compiled}"
    command = [sys.executable, "-m", "kl_f8_train", "train", "demo"]
    ended = subprocess.run(
        [*command, *runs.overrides(folder, name, *settings)],
        env=os.environ | pretended.environment(gpu) | pretended.NEW_MEMORY,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "done: iteration 103" in ended.stdout
    assert ("compiled" in ended.stdout.split("networks: ")[1].split()[0]) == (compiled == "true")
    rows = list(csv.DictReader((folder / name / "metrics.csv").open()))
    assert [int(row["iteration"]) for row in rows] == [101, 102, 103]
    state = runs.final_state(folder, name)
    assert state.metadata["iteration"] == "103"


def test_deterministic_kernels_exist(gpu):
    """For every operation of ft_ema's iteration, or torch would name the one that has none."""
    switches = "compute.deterministic=true", "compute.compile=false"
    small = "data.crop=64", "compute.per_device_batch=2", "model.ch=32"
    assert count_apart(gpu, "ft_ema", *small, *switches)["kernels"] > 1000
