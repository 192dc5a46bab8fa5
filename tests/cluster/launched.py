"""Commands of the launch scripts as real processes, and waiting for what they say."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
FEW = ("stop_iteration=140", "checkpoint.every=10", "data.workers=1")
SECONDS = 180.0  # for anything to happen, on a loaded machine


def environment(**variables: str | int) -> dict[str, str]:
    """This Python first, the demo's recipe, and nothing of an outer launcher."""
    outer = ("SLURM", "TORCHELASTIC", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(outer)}
    path = f"{Path(sys.executable).parent}:{kept['PATH']}:/usr/sbin:/sbin"
    fixed = {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RECIPE": "demo"}
    return {**kept, **fixed, **{key: str(value) for key, value in variables.items()}}


def wait_until(true: Callable[[], object], log: Path, seconds: float = SECONDS) -> float:
    """Polls; returns the seconds it took, or fails with the log."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < seconds, f"never came:\n{log.read_text()[-5000:]}"
        time.sleep(0.1)
    return time.monotonic() - began


def wait_for(log: Path, text: str, seconds: float = SECONDS) -> float:
    """Polls a log until it holds `text`."""
    return wait_until(
        lambda: log.is_file() and text in log.read_text(errors="replace"), log, seconds
    )


class Running:
    """A command with its output in a file; the whole session is killed in the end."""

    def __init__(self, command: list[str], log: Path, **variables: str | int) -> None:
        self.log = log
        with log.open("a") as file:
            self.process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=environment(**variables),
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # as a terminal's
            )

    def wait(self, seconds: float = SECONDS) -> int:
        """Its exit code."""
        wait_until(lambda: self.process.poll() is not None, self.log, seconds)
        return self.process.returncode

    def kill(self) -> None:
        """Whatever is left of it."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
