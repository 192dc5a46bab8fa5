"""Compilation, DDP, checkpointing and accumulation at once, against one plain process."""

import pytest
import runs
from checks import REHEARSED
from launches import SECONDS, Launch, worst_difference

pytestmark = REHEARSED
TOLERANCE = 1e-4  # of a tensor's norm after 4 iterations in float32
IMAGES = 12  # for each process: as many as the discriminator sees at once, in two micro-batches


@pytest.fixture(scope="module")
def final(folder, device, processes):
    """final(run, number of processes, *settings) -> the state after 4 iterations."""

    def final(run, count, *settings):
        given = (
            *("stop_iteration=104", "precision=float32", "data.workers=1"),
            *(f"compute.per_device_batch={IMAGES // 2}", f"global_batch={IMAGES * processes}"),
            # What is zero but for rounding would be a whole step to Adam.
            *("optimizer.eps=1.0", f"compute.accelerator={device.type}"),
        )
        launched = Launch(folder, run, count, *given, *settings)
        try:
            launched.finish(1.4 * SECONDS)  # compiling is in it
        finally:
            launched.kill()
        return runs.final_state(folder, run)

    return final


@pytest.fixture(scope="module")
def plain(final):
    """One process, nothing compiled or computed twice."""
    return final("plain", 1, "compute.compile=false")


def test_processes_and_accumulation(plain, final, processes, see):
    worst = worst_difference(plain, final("several", processes, "compute.compile=false"))
    see(f"{processes} processes x 2 micro-batches: {worst:.1e}, bound {TOLERANCE:g}")
    assert worst < TOLERANCE


def test_all_at_once(plain, final, device, processes, see):
    """On CPUs uncompiled: inductor would take minutes there."""
    compiled = "true" if device.type == "cuda" else "false"
    switches = f"compute.compile={compiled}", "compute.checkpoint_levels=2"
    worst = worst_difference(plain, final("all", processes, *switches))
    see(f"compiled: {compiled}, {processes} processes: {worst:.1e}, bound {TOLERANCE:g}")
    assert worst < TOLERANCE
