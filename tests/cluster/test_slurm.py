"""A real SLURM with two virtual nodes runs the project's own launch/slurm.sbatch."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import runs
from launched import FEW, ROOT, environment, wait_for, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.cluster]
HERE = Path(__file__).parent


class Slurm:
    """The commands, and the project's script with what a machine without GPUs needs."""

    def __init__(self, directory: Path) -> None:
        # virtual nodes have no names that resolve
        self.variables = {"SLURM_CONF": f"{directory}/slurm.conf", "MASTER_ADDR": "127.0.0.1"}
        self.logs = directory

    def __call__(self, *command: str, **variables: str | int) -> str:
        done = subprocess.run(
            command,
            env=environment(**self.variables, **variables),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, *settings: str, time: str = "60", signal: str = "USR1@30", **variables) -> str:
        """Two nodes with a task each; returns the job's number."""
        small = ("--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1")
        limits = (f"--time={time}", f"--signal={signal}", f"--output={self.logs}/%j.out")
        script = ("launch/slurm.sbatch", *settings)
        return self("sbatch", "--parsable", *small, *limits, *script, **variables)

    def log(self, job: str) -> Path:
        return self.logs / f"{job}.out"

    def show(self, job: str, field: str) -> str:
        found = re.search(rf"\b{field}=(\S+)", self("scontrol", "show", "job", job))
        assert found
        return found[1]

    def wait(self, job: str) -> str:
        """Its state at the end."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT")
        wait_until(lambda: self.show(job, "JobState") in over, self.log(job), 300)
        return self.show(job, "JobState")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Up for this file, and down again with all its daemons."""
    if os.geteuid() != 0 or not sys.platform.startswith("linux"):
        pytest.skip("a private SLURM needs Linux and root")
    directory = tmp_path_factory.mktemp("slurm")
    up = ["bash", str(HERE / "slurm_up.sh"), str(directory)]
    with (directory / "up.log").open("w") as log:  # a pipe would stay open in the daemons
        started = subprocess.run(
            up, env=environment(), stdout=log, stderr=subprocess.STDOUT, timeout=600, check=False
        )
    try:
        if started.returncode:
            pytest.skip(f"no SLURM here:\n{(directory / 'up.log').read_text()[-1000:]}")
        yield Slurm(directory)
    finally:
        down = ["bash", str(HERE / "slurm_down.sh"), str(directory)]
        subprocess.run(down, env=environment(), timeout=120, check=False)


@pytest.fixture
def slurm(cluster: Slurm) -> Iterator[Slurm]:
    """The cluster, without jobs of a test that failed."""
    yield cluster
    cluster("scancel", "--user=root")


def tasks(run: str) -> list[int]:
    """The training processes of a run, without their loaders (children of another)."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            arguments = (entry / "cmdline").read_bytes().decode().split("\0")
            parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
        except (OSError, UnicodeDecodeError):
            continue
        if "python" in Path(arguments[0]).name and f"run_dir={run}" in arguments:
            found[int(entry.name)] = int(parent)
    return [pid for pid, parent in found.items() if parent not in found]


def test_requeued_at_time_limit_preemption_and_crash_it_ends_as_undisturbed(
    folder, undisturbed, slurm
):
    run = folder / "slurm"
    settings = runs.overrides(folder, "slurm", *FEW, "log.wandb=offline")
    job = slurm.submit(*settings, RUN_DIR=run)
    wait_for(slurm.log(job), "iteration 104 of")
    slurm("scancel", "--signal=USR1", job)  # what --signal=USR1@180 sends before the limit
    wait_for(slurm.log(job), "iteration 114 of")
    slurm("scontrol", "requeue", job)  # what a preemption does
    wait_for(slurm.log(job), "iteration 126 of")
    os.kill(tasks(str(run))[-1], signal.SIGKILL)
    assert slurm.wait(job) == "COMPLETED", slurm.log(job).read_text()
    assert slurm.show(job, "Restarts") == "3"
    log = slurm.log(job).read_text()
    assert re.search(r"stopped by signal 10 at iteration 1\d\d, saved", log)
    assert re.search(r"stopped by signal 15 at iteration 1\d\d, saved", log)
    assert "time limit (SIGUSR1), with a new checkpoint; requeued (restart" in log
    assert "with a new checkpoint; requeued (restart 3)" in log
    assert log.count("batch: 2 processes x 2 images x 1 micro-batch = 4") == 4
    assert log.count("resuming iteration-") == 3
    runs.assert_same_state(runs.final_state(folder, "slurm"), undisturbed)
    offline = list((run / "wandb").glob("offline-run-*"))
    assert len(offline) == 4
    assert {path.name.rpartition("-")[2] for path in offline} == {
        (run / "wandb_id.txt").read_text().strip()
    }


def test_the_real_time_limit_requeues_and_scancel_does_not(folder, slurm):
    settings = runs.overrides(folder, "limit", *FEW, "stop_iteration=1000000")
    job = slurm.submit(*settings, time="2", signal="USR1@60", RUN_DIR=folder / "limit")
    wait_for(slurm.log(job), "resuming iteration-")
    log = slurm.log(job).read_text()
    saved = re.search(r"stopped by signal 10 at iteration ([\d,]+), saved", log)
    assert saved, log
    assert "time limit (SIGUSR1), with a new checkpoint; requeued (restart" in log
    number = int(saved[1].replace(",", ""))
    assert f"resuming iteration-{number:09d}" in log
    wait_for(slurm.log(job), f"iteration {number + 2:,} of")
    slurm("scancel", job)
    assert slurm.wait(job) == "CANCELLED"
    wait_for(slurm.log(job), "stopped by signal 15 at iteration")
    last = runs.final_state(folder, "limit").iteration
    assert last is not None
    assert last >= number + 2


def test_a_crash_without_progress_is_requeued_up_to_the_cap(folder, tmp_path, slurm):
    crashing = tmp_path / "bin"
    crashing.mkdir()
    (crashing / "python").write_text("#!/bin/sh\nkill -SEGV $$\n")
    (crashing / "python").chmod(0o755)
    path = f"{crashing}:{environment()['PATH']}"
    job = slurm.submit(MAX_RESTARTS=1, PATH=path, RUN_DIR=tmp_path / "run")
    assert slurm.wait(job) == "FAILED"
    assert slurm.show(job, "Restarts") == "1"
    assert slurm.show(job, "ExitCode") == "139:0"
    assert (
        "exit code 139, without a new checkpoint; 1 restarts, so no more"
        in slurm.log(job).read_text()
    )


def test_what_a_user_must_mend_is_not_requeued(folder, slurm):
    job = slurm.submit(*runs.overrides(folder, "wrong"), "no.such.key=1")
    assert slurm.wait(job) == "FAILED"
    assert slurm.show(job, "ExitCode") == "2:0"
    assert slurm.show(job, "Restarts") == "0"
    assert "unknown key 'no.such.key'" in slurm.log(job).read_text()
