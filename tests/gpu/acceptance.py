"""Runs the checks on GPUs one after another within a deadline, and ends with a table.

    python tests/gpu/acceptance.py FOLDER [STEPS.json]

A step is a command with a limit in seconds. It appends lines to the file that ACCEPTANCE_LINES
names, of three fields with tabs between: PASS, FAIL, SKIP or NOTE, what was checked, and what was
seen. Its output is in FOLDER/logs. Another list of steps is a JSON list of [name, seconds,
command]. Imports nothing that could be broken here: no torch, no package.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = ("PASS", "FAIL", "SKIP", "NOTE")
WORTH_STARTING = 1 / 3  # of a step's limit must be left: most need no more
ON_CPU = 3  # times the limits of a GPU, in a rehearsal
GRACE_SECONDS = 15  # for a step to end its own processes
FILES = {  # in the order of their value; seconds: the most that it may take
    "machine": 60,
    "parity": 90,
    "precision": 90,
    "waits": 60,
    "frozen": 60,
    "memory": 90,
    "kills": 180,
    "speed": 150,
    "together": 150,
    "compiled": 240,
    "full_run": 240,
    "against": 120,
}


@dataclass(frozen=True)
class Step:
    """A command that takes at most so many seconds."""

    name: str
    seconds: float
    command: list[str]


@dataclass(frozen=True)
class Line:
    """One result."""

    step: str
    result: str
    what: str
    seen: str


def our_steps(folder: Path) -> list[Step]:
    """A file of tests each; what it writes stays in the folder, with the logs of its runs."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    pytest += ["--override-ini=addopts=--strict-markers -ra", "--rootdir", str(ROOT)]
    pytest += ["-m", "gpu"] if os.environ["DEVICE"] == "cuda" else []  # else no test sees a GPU

    def command(name: str) -> list[str]:
        temporary = str(folder / "runs" / name)
        return [*pytest, "--basetemp", temporary, str(HERE / f"test_gpu_{name}.py")]

    slower = 1 if os.environ["DEVICE"] == "cuda" else ON_CPU
    return [Step(name, slower * seconds, command(name)) for name, seconds in FILES.items()]


def run(step: Step, folder: Path, seconds: float) -> list[Line]:
    """Runs a step for at most `seconds`; returns its lines, and one more if it ended badly."""
    lines, log = folder / "logs" / f"{step.name}.tsv", folder / "logs" / f"{step.name}.log"
    lines.touch()
    began = time.monotonic()
    ended = run_command(step.command, {"ACCEPTANCE_LINES": str(lines)}, log, seconds)
    took = f"{time.monotonic() - began:.0f} s"
    found = [parse(step, line) for line in lines.read_text(errors="replace").splitlines()]
    if ended is None and seconds < step.seconds:
        found.append(Line(step.name, "SKIP", "the rest", f"no time left after {took}"))
    elif ended is None:
        found.append(Line(step.name, "FAIL", "the rest", f"not done after {took}; see {log}"))
    elif ended != "exit code 0" and not any(line.result == "FAIL" for line in found):
        found.append(Line(step.name, "FAIL", "the step", f"{ended}; see {log}"))
    elif not found:
        found.append(Line(step.name, "FAIL", "the step", f"no result; see {log}"))
    return found


def run_command(
    command: list[str], variables: dict[str, str], log: Path, seconds: float
) -> str | None:
    """Runs a command for at most `seconds`; how it ended, or None if it had to be ended."""
    with log.open("w") as output:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=os.environ | variables,
                start_new_session=True,
            )
        except OSError as error:
            return str(error)
        try:
            return f"exit code {process.wait(seconds)}"
        except subprocess.TimeoutExpired:
            return None
        finally:
            end(process)


def end(process: "subprocess.Popen[bytes]") -> None:
    """Ends what is left of a step: politely, so that it ends its own processes, then for sure."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)  # pytest takes down its fixtures
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def parse(step: Step, line: str) -> Line:
    """A line that the step wrote; one that is none is a failure of the step."""
    result, what, seen = ([*line.split("\t"), "", ""])[:3]
    if result not in RESULTS:
        return Line(step.name, "FAIL", "a line of the step", line)
    return Line(step.name, result, what, seen)


def run_all(steps: list[Step], folder: Path, deadline: float) -> list[Line]:
    """Runs all steps, but for those that cannot end before the deadline, in seconds from now."""
    began, lines = time.monotonic(), []
    for step in steps:
        left = deadline - (time.monotonic() - began)
        if left < WORTH_STARTING * step.seconds:
            found = [Line(step.name, "SKIP", "all of it", f"no time left of {deadline:g} s")]
        else:
            found = run(step, folder, min(step.seconds, left))
        for line in found:
            print(f"{line.result} {line.step}: {line.what}  {line.seen}".rstrip(), flush=True)
        lines += found
    return lines


def table(lines: list[Line], machine: list[str]) -> str:
    """The machine, the counts and all results, in Markdown."""
    counts = {result: sum(line.result == result for line in lines) for result in RESULTS}
    rows = [("result", "step", "check", "seen"), ("---",) * 4]
    rows += [(line.result, line.step, line.what, line.seen) for line in lines]
    counted = ", ".join(f"{counts[result]} {result}" for result in RESULTS)
    return "\n".join(
        [
            *machine,
            "",
            counted,
            "",
            *("| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows),
            "",
        ]
    )


def describe_machine(folder: Path) -> list[str]:
    """A few lines for the table; the details go to machine.log."""
    versions = (
        "import torch, kl_f8_train as k; n = torch.cuda.device_count(); "
        "names = sorted({torch.cuda.get_device_name(i) for i in range(n)}); "
        "print(f'- {n} x {names or None}\\n- kl_f8_train {k.__version__}, torch "
        "{torch.__version__}, CUDA {torch.version.cuda}, NCCL {torch.cuda.nccl.version() if n "
        "else None}')"
    )
    commands = {
        "versions": [sys.executable, "-c", versions],
        "commit": ["git", "-C", str(ROOT), "log", "-1", "--format=- commit %h, %as"],
        "gpus": ["nvidia-smi"],
        "links": ["nvidia-smi", "topo", "-m"],
        "shared memory": ["df", "-h", "/dev/shm"],
        "compiler": ["gcc", "--version"],
    }
    if os.environ["DEVICE"] == "cuda":
        commands["torch"] = [sys.executable, "-m", "torch.utils.collect_env"]
    said: dict[str, str] = {}
    with (folder / "logs" / "machine_details.log").open("w") as file:
        for name, command in commands.items():
            said[name] = output_of(command)
            file.write(f"--- {' '.join(command[:4])}\n{said[name]}\n")
    return [*said["versions"].splitlines()[-2:], *said["commit"].splitlines()[-1:]]


def output_of(command: list[str]) -> str:
    """What a command says, errors included; a program that is not here says so."""
    try:
        ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return ended.stdout + ended.stderr


def read_steps(path: Path) -> list[Step]:
    """Steps from a JSON list of [name, seconds, command]."""
    given = json.loads(path.read_text())
    return [Step(name, float(seconds), command) for name, seconds, command in given]


def prepare_environment(folder: Path) -> None:
    """What all steps share; compiled kernels stay for the next run."""
    device = os.environ.setdefault("DEVICE", "cuda")
    if device not in ("cuda", "cpu"):
        sys.exit(f"acceptance: DEVICE={device}: give cuda or cpu")
    fixed = {"ACCEPTANCE": device, "WANDB_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    fixed["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # torchrun mixes up restarts with it
    os.environ.update(fixed)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
    os.environ.setdefault("OMP_NUM_THREADS", "4" if device == "cuda" else "1")


def main() -> int:
    """Runs the steps; returns 1 if one failed, 2 if nothing could be checked."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "gpu_acceptance").resolve()
    prepare_environment(folder)
    steps = read_steps(Path(sys.argv[2])) if len(sys.argv) > 2 else our_steps(folder)
    deadline = float(os.environ.get("DEADLINE", "600"))
    for name in ("logs", "runs"):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir(parents=True)
    machine = describe_machine(folder)
    lines = run_all(steps, folder, deadline)
    text = table(lines, machine)
    (folder / "table.md").write_text(text)
    print(f"\n{text}\nthis table: {folder / 'table.md'}; beside it the logs")
    if any(line.result == "FAIL" for line in lines):
        return 1
    return 0 if any(line.result == "PASS" for line in lines) else 2


if __name__ == "__main__":
    sys.exit(main())
