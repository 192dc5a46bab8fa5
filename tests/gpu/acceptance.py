"""Runs the checks on GPUs one after another within a deadline, and ends with a table.

    python tests/gpu/acceptance.py FOLDER [STEPS.json]

A step is a command with a limit in seconds. It appends lines to the file that ACCEPTANCE_LINES
names, of three fields with tabs between: PASS, FAIL, SKIP or NOTE, what was checked, and what was
seen. Its output is in FOLDER/logs. Another list of steps is a JSON list of [name, seconds,
command]. SIGTERM, SIGINT and SIGHUP end the step that runs, and the table is written as it is.
Imports nothing that could be broken here: no torch, no package.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import NoReturn

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = ("PASS", "FAIL", "SKIP", "NOTE")
WORTH_STARTING = 1 / 3  # of a step's limit must be left: most need no more
MOST_GPUS = 8  # of a machine
ON_CPU = "3"  # times the limits of a GPU, in a rehearsal
DEADLINE, LONGEST = 600, 3600  # seconds, if none is given: on a GPU, and at most on a CPU
TICK = 0.2  # seconds, in which a signal is answered
GRACE_SECONDS = 15  # for a step to end its own processes
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Prints the GPUs as JSON, [name, ...], and then the versions.
ASK_TORCH = """
import json, pytest, torch, kl_f8_train
count = torch.cuda.device_count()
print(json.dumps([torch.cuda.get_device_name(number) for number in range(count)]))
nccl = ".".join(map(str, torch.cuda.nccl.version())) if count else None
print(f"kl_f8_train {kl_f8_train.__version__}, torch {torch.__version__}, "
      f"CUDA {torch.version.cuda}, NCCL {nccl}")
"""
FILES = {  # in the order of their value; seconds: the most that it may take
    "machine": 60,
    "parity": 90,
    "precision": 90,
    "waits": 60,
    "frozen": 60,
    "memory": 90,
    "kills": 180,
    "together": 180,
    "compiled": 240,
    "full_run": 240,
    "speed": 150,
    "against": 120,
}
# Beside the steps before them, where a GPU takes several processes: what comes before `compiled`
# measures no times, and needs little of a GPU.
ASIDE = ("kills", "together")
CORES = 8  # at least, for that


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

    times = float(os.environ["LIMITS"])
    return [Step(name, times * seconds, command(name)) for name, seconds in FILES.items()]


@dataclass
class Course:
    """How far the run has come."""

    lines: list[Line] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # of each step that ran
    signal: str = ""  # the name of the one that stops it

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal; what is running is then ended, which takes some seconds."""
        self.signal = signal.Signals(number).name


def run(step: Step, folder: Path, seconds: float, course: Course) -> list[Line]:
    """Runs a step for at most `seconds`; returns its lines, and one more if it ended badly."""
    lines, log = folder / "logs" / f"{step.name}.tsv", folder / "logs" / f"{step.name}.log"
    lines.touch()
    began = time.monotonic()
    ended = run_command(step.command, {"ACCEPTANCE_LINES": str(lines)}, log, seconds, course)
    took = f"after {time.monotonic() - began:.0f} s"
    found = [parse(step, line) for line in lines.read_text(errors="replace").splitlines()]
    if ended is None and course.signal:
        found.append(Line(step.name, "SKIP", "the rest", f"stopped by {course.signal} {took}"))
    elif ended is None and seconds < step.seconds:
        found.append(Line(step.name, "SKIP", "the rest", f"no time left {took}"))
    elif ended is None:
        why = f"cut off at the step's limit of {seconds:g} s; how far it came: {log}"
        found.append(Line(step.name, "SKIP", "the rest", why))
    elif ended != "exit code 0" and not any(line.result == "FAIL" for line in found):
        found.append(Line(step.name, "FAIL", "the step", f"{ended}; see {log}"))
    elif not found:
        found.append(Line(step.name, "FAIL", "the step", f"no result; see {log}"))
    return found


def run_command(
    command: list[str], variables: dict[str, str], log: Path, seconds: float, course: Course
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
        until = time.monotonic() + seconds
        try:
            while not course.signal and time.monotonic() < until:
                with suppress(subprocess.TimeoutExpired):
                    return f"exit code {process.wait(TICK)}"
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


def run_all(
    steps: list[Step],
    folder: Path,
    deadline: float,
    course: Course,
    aside: Collection[str] = (),
) -> None:
    """Runs all steps, but for those that cannot end before the deadline, in seconds from now.

    Each of those named in `aside` runs beside the others before the last of them.
    """
    until = time.monotonic() + deadline
    named = [number for number, step in enumerate(steps) if step.name in aside]
    together = steps[: named[-1] + 1] if named else []
    in_turn = [step for step in together if step.name not in aside]
    beside = [[step] for step in together if step.name in aside]
    with ThreadPoolExecutor(len(beside) + 1) as threads:
        parts = [in_turn, *beside]
        running = [threads.submit(run_each, part, folder, until, course) for part in parts]
        for each in running:
            each.result()
    run_each(steps[len(together) :], folder, until, course)
    names = [step.name for step in steps]
    course.lines.sort(key=lambda line: names.index(line.step))


def run_each(steps: list[Step], folder: Path, until: float, course: Course) -> None:
    """Runs steps one after another, as far as the time allows."""
    for step in steps:
        now = time.monotonic()
        left = max(0.0, until - now)
        if course.signal:
            found = [Line(step.name, "SKIP", "all of it", f"stopped by {course.signal}")]
        elif left < WORTH_STARTING * step.seconds:
            found = [Line(step.name, "SKIP", "all of it", f"only {left:.0f} s left to DEADLINE")]
        else:
            print(f"--- {step.name}: at most {min(step.seconds, left):.0f} s", flush=True)
            found = run(step, folder, min(step.seconds, left), course)
            course.seconds[step.name] = time.monotonic() - now
        for line in found:
            print(f"{line.result} {line.step}: {line.what}  {line.seen}".rstrip(), flush=True)
        course.lines += found


def takes_several() -> bool:
    """Whether steps can run beside others: each GPU takes several processes, and CPUs are there."""
    modes = output_of(["nvidia-smi", "--query-gpu=compute_mode", "--format=csv,noheader"])
    enough = (os.cpu_count() or 1) >= CORES
    return os.environ["DEVICE"] == "cuda" and set(modes.split()) == {"Default"} and enough


def table(course: Course, machine: list[str]) -> str:
    """The machine, the counts, the steps' times and all results, in Markdown."""
    lines = course.lines
    counts = {result: sum(line.result == result for line in lines) for result in RESULTS}
    rows = [("result", "step", "check", "seen"), ("---",) * 4]
    rows += [(line.result, line.step, line.what, line.seen) for line in lines]
    counted = ", ".join(f"{counts[result]} {result}" for result in RESULTS)
    took = ", ".join(f"{name} {seconds:.0f}" for name, seconds in course.seconds.items())
    return "\n".join(
        [
            *machine,
            f"- seconds: {took}",
            "",
            counted,
            "",
            *("| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows),
            "",
        ]
    )


def describe_machine() -> list[str]:
    """What the table begins with. Ends the program if nothing can be checked here."""
    asked = subprocess.run([sys.executable, "-c", ASK_TORCH], capture_output=True, text=True)
    if asked.returncode != 0:
        cause = (asked.stderr.strip().splitlines() or ["it said nothing"])[-1]
        give_up(f'{sys.executable}: {cause}\ninstall it: pip install -e ".[test]", or give PYTHON')
    seen, versions = asked.stdout.splitlines()[-2:]
    gpus, wanted = json.loads(seen), os.environ.get("GPUS", "")
    if wanted and not (wanted.isdecimal() and int(wanted) > 0):
        give_up(f"GPUS={wanted}: give a number, 1 or more")
    if os.environ["DEVICE"] == "cpu":
        where = f"{os.cpu_count()} CPU cores"
    elif not gpus:
        give_up(f"torch sees no GPU ({versions}). DEVICE=cpu rehearses on a CPU what can be")
    elif int(wanted or 1) > len(gpus):
        give_up(f"GPUS={wanted}, but torch sees {len(gpus)}")
    else:
        used = gpus[: int(wanted or MOST_GPUS)]
        where = ", ".join(f"{used.count(name)} x {name}" for name in dict.fromkeys(used))
        where += f", of {len(gpus)}" * (len(used) < len(gpus))
    commit = output_of(["git", "-C", str(ROOT), "log", "-1", "--format=%h, %as"]).splitlines()
    return [f"- {where}", f"- {versions}", f"- commit {(commit or ['unknown'])[-1]}"]


def give_up(why: str) -> NoReturn:
    """Ends the program before anything is checked."""
    print(f"acceptance: {why}", file=sys.stderr)
    sys.exit(2)


def announce(steps: list[Step], folder: Path, deadline: float, machine: list[str]) -> None:
    """Says what will happen, where, for how long, and where the results will be."""
    until = time.strftime("%H:%M", time.localtime(time.time() + deadline))
    end = f"at most {deadline:g} s, until {until} (DEADLINE)"
    count = "1 step" if len(steps) == 1 else f"{len(steps)} steps"
    print(f"acceptance: {count} on {machine[0].removeprefix('- ')}; {end}")
    print(f"  {', '.join(step.name for step in steps)}")
    print(f"  logs: {folder / 'logs'}; at the end: {folder / 'table.md'}")
    print("  Ctrl-C ends it; the table is then written as it is", flush=True)


def chosen_deadline(steps: list[Step]) -> float:
    """DEADLINE in seconds: as given, else by the device; on a CPU all steps get their time.

    Ends the program if it is no number.
    """
    given = os.environ.get("DEADLINE", "")
    if not given:
        needed = sum(step.seconds for step in steps) if os.environ["DEVICE"] == "cpu" else 0
        return min(LONGEST, max(DEADLINE, needed))
    if not (given.isdecimal() and int(given) > 0):
        give_up(f"DEADLINE={given}: give whole seconds, such as 600")
    return float(given)


def write_details(folder: Path) -> None:
    """The machine in detail, in machine_details.log."""
    commands = [["nvidia-smi"], ["nvidia-smi", "topo", "-m"], ["df", "-h", "/dev/shm"]]
    commands += [["gcc", "--version"], [sys.executable, "-m", "pip", "list"]]
    with (folder / "logs" / "machine_details.log").open("w") as file:
        for command in commands:
            file.write(f"--- {' '.join(command)}\n{output_of(command)}\n")


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
        give_up(f"DEVICE={device}: give cuda or cpu")
    fixed = {"ACCEPTANCE": device, "WANDB_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    fixed["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # torchrun mixes up restarts with it
    os.environ.update(fixed)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
    os.environ.setdefault("OMP_NUM_THREADS", "4" if device == "cuda" else "1")
    os.environ.setdefault("LIMITS", "1" if device == "cuda" else ON_CPU)


def main() -> int:
    """Runs the steps; returns 1 if one failed, 2 if nothing could be checked."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "gpu_acceptance").resolve()
    prepare_environment(folder)
    print("acceptance: asking torch what is here", flush=True)
    machine = describe_machine()
    steps = read_steps(Path(sys.argv[2])) if len(sys.argv) > 2 else our_steps(folder)
    deadline = chosen_deadline(steps)
    for name in ("logs", "runs"):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir(parents=True)
    announce(steps, folder, deadline, machine)
    course = Course()
    for number in SIGNALS:
        signal.signal(number, course.stop)
    run_all(steps, folder, deadline, course, ASIDE if takes_several() else ())
    text = table(course, machine)
    (folder / "table.md").write_text(text)
    print(f"\n{text}\nthis table: {folder / 'table.md'}; beside it the logs", flush=True)
    if course.signal:
        return 128 + signal.Signals[course.signal]
    write_details(folder)
    if any(line.result == "FAIL" for line in course.lines):
        return 1
    return 0 if any(line.result == "PASS" for line in course.lines) else 2


if __name__ == "__main__":
    sys.exit(main())
