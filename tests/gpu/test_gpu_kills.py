"""Runs on all GPUs that are stopped and killed, and go on: as the one that was left alone?"""

import time

import pytest
import runs
from checks import REHEARSED
from launches import Launch, different, kill_rank, worst_difference

pytestmark = REHEARSED
TOLERANCE = 1e-5  # of a tensor's norm, where the bits are not equal
END = "stop_iteration=140"


@pytest.fixture(scope="module")
def start(folder, vgg_file, device, processes):
    """start(run) -> a tiny run in bfloat16, adversarial, with deterministic kernels."""
    launched = []
    # ST-LPIPS pads by reflection, for which CUDA has no deterministic gradient.
    vgg = ("loss.perceptual=lpips_vgg", f"loss.perceptual_weights={vgg_file}")

    def start(run):
        settings = (
            *(END, "checkpoint.every=10", "checkpoint.keep_last=9", "precision=bfloat16"),
            *("compute.deterministic=true", "compute.compile=false", "data.workers=1"),
            *("compute.per_device_batch=2", f"global_batch={2 * processes}"),
            *(vgg if device.type == "cuda" else ()),
            f"compute.accelerator={device.type}",
        )
        launched.append(Launch(folder, run, processes, *settings))
        return launched[-1]

    yield start
    for one in launched:
        one.kill()


@pytest.fixture(scope="module")
def undisturbed(folder, start):
    """40 iterations without a break."""
    run = start("undisturbed")
    run.finish()
    return runs.final_state(folder, "undisturbed")


def check_state(folder, run, undisturbed, see):
    state = runs.final_state(folder, run)
    unequal, worst = different(undisturbed, state), worst_difference(undisturbed, state)
    see(f"differs by {worst:.1e}, bound {TOLERANCE:g}" if unequal else "equal to the bit")
    assert worst < TOLERANCE


def test_two_runs_are_equal(folder, start, undisturbed, see):
    run = start("again")
    run.finish()
    check_state(folder, "again", undisturbed, see)


def test_stopped_by_sigterm_and_started_again(folder, start, undisturbed, see):
    run = start("stopped")
    run.wait_for("iteration 110 of")
    began = time.monotonic()
    run.terminate()
    assert run.end() != 0
    see(f"stopped after {time.monotonic() - began:.1f} s")
    assert "stopped by signal" in run.output
    run = start("stopped")
    run.finish()
    assert "resuming iteration" in run.output
    check_state(folder, "stopped", undisturbed, see)


def test_one_process_killed_and_all_started_again_by_torchrun(folder, start, undisturbed, see):
    run = start("killed")
    run.wait_for("iteration 120 of")
    began = time.monotonic()
    kill_rank(run.ranks()[-1])
    run.wait_for("resuming iteration")
    see(f"resumed after {time.monotonic() - began:.1f} s")
    run.finish()
    check_state(folder, "killed", undisturbed, see)


def test_all_killed_and_started_again(folder, start, undisturbed, see):
    """As after a loss of power."""
    run = start("dark")
    run.wait_for("iteration 115 of")
    run.kill()
    run = start("dark")
    run.finish()
    assert "resuming iteration" in run.output
    check_state(folder, "dark", undisturbed, see)
