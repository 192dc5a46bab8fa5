"""Real runs on all GPUs, as torchrun starts them, with their output in a file."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pretended
import runs
import torch
from checks import PRETENDED

from kl_f8_train.weights import weight_file

# For anything to happen: less than a step's limit, which is as many times longer (acceptance.py).
SECONDS = 100.0 * float(os.environ.get("LIMITS", "1"))
MEMORY = pretended.NEW_MEMORY if PRETENDED else {}
SETTINGS = pretended.SETTINGS if PRETENDED else ()
BUFFER = re.compile(r"\.(running_mean|running_var|num_batches_tracked)$")
WEIGHTS = ("autoencoder.", "ema.", "discriminator.")


class Launch:
    """`kl-f8-train train demo ...`, tiny, in so many processes; killed with them in the end."""

    def __init__(self, folder: Path, run: str, processes: int, *settings: str) -> None:
        self.log = folder / f"{run}.log"
        arguments = ["train", "demo", *runs.overrides(folder, run, *settings, *SETTINGS)]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launcher += [f"--nproc-per-node={processes}", "--max-restarts=1"]
        with self.log.open("a") as output:
            self.process = subprocess.Popen(
                [*launcher, "-m", "kl_f8_train", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | MEMORY,
            )

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, text: str, seconds: float = SECONDS) -> None:
        """Waits until the output has the text."""
        self._wait(lambda: text in self.output, f"{text!r} never came", seconds)

    def end(self, seconds: float = SECONDS) -> int:
        """Waits for the end; returns torchrun's exit code."""
        self._wait(lambda: self.process.poll() is not None, "still running", seconds)
        return self.process.returncode

    def finish(self, seconds: float = SECONDS) -> None:
        """Waits for the end; raises RuntimeError if the run failed."""
        code = self.end(seconds)
        if code != 0:
            raise RuntimeError(f"exit code {code}: {self.output[-1500:]}")

    def _wait(self, true: Callable[[], bool], otherwise: str, seconds: float) -> None:
        began = time.monotonic()
        while True:
            ended = self.process.poll() is not None  # before the last look at its output
            if true():
                return
            late = time.monotonic() - began > seconds
            if ended or late:
                when = "when it ended" if ended else f"in {seconds:g} s"
                raise RuntimeError(f"{otherwise} {when}: {self.output[-1500:]}")
            time.sleep(0.02)

    def ranks(self) -> list[int]:
        """Pids of torchrun's children."""
        pid = self.process.pid
        return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def kill(self) -> None:
        """Kills torchrun; its ranks end with it."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def terminate(self) -> None:
        """SIGTERM to torchrun, which hands it on."""
        self.process.send_signal(signal.SIGTERM)


def kill_rank(pid: int) -> None:
    """As the kernel does when memory is short."""
    os.kill(pid, signal.SIGKILL)


def different(a: weight_file.Contents, b: weight_file.Contents) -> list[str]:
    """Tensors of two checkpoints of one iteration that are not equal to the bit."""
    assert a.tensors.keys() == b.tensors.keys()
    assert a.metadata["iteration"] == b.metadata["iteration"]
    return [key for key in a.tensors if not torch.equal(a.tensors[key], b.tensors[key])]


def worst_difference(a: weight_file.Contents, b: weight_file.Contents) -> float:
    """Largest difference of a weight or its average, relative to its norm.

    Left out are Adam's moments, as those of a bias in front of a norm are nothing but rounding, and
    BatchNorm's running statistics, which are those of the first process's images.
    """
    keys = [key for key in different(a, b) if key.startswith(WEIGHTS) and not BUFFER.search(key)]
    pairs = [(a.tensors[key].double(), b.tensors[key].double()) for key in keys]
    return max((float((x - y).norm() / x.norm().clamp_min(1e-12)) for x, y in pairs), default=0.0)
