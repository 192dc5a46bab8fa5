"""The acceptance run's runner: limits, deadline, table, exit codes; its steps are shell scripts."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import acceptance
import pytest
from acceptance import Course, Line, Step

HERE = Path(__file__).parent


def step(name, script, seconds=60.0):
    return Step(name, seconds, ["sh", "-c", script])


def said(result, what="a check", seen="1 ms"):
    """A shell's command that writes a line."""
    return rf"printf '{result}\t{what}\t{seen}\n' >> $ACCEPTANCE_LINES"


@pytest.fixture
def run(tmp_path):
    """run(*steps, deadline=...) -> their lines."""
    (tmp_path / "logs").mkdir()

    def run(*steps, deadline=100.0, aside=()):
        course = Course()
        acceptance.run_all(list(steps), tmp_path, deadline, course, aside)
        return course.lines

    return run


def test_lines_of_a_step_are_taken_over_and_its_output_is_kept(run, tmp_path):
    lines = run(step("one", f"echo out; echo err >&2; {said('PASS')}; {said('NOTE', 'more')}"))
    assert lines == [Line("one", "PASS", "a check", "1 ms"), Line("one", "NOTE", "more", "1 ms")]
    assert (tmp_path / "logs/one.log").read_text() == "out\nerr\n"


def test_a_bad_step_does_not_stop_the_others(run):
    steps = (
        step("missing", "no-such-program"),
        step("silent", "true"),
        step("odd", "echo what >> $ACCEPTANCE_LINES"),
        step("killed", f"{said('PASS')}; kill -9 $$"),
        step("known", f"{said('FAIL')}; exit 1"),
        step("good", said("PASS")),
    )
    lines = run(*steps)
    assert [(line.step, line.result) for line in lines] == [
        ("missing", "FAIL"),
        ("silent", "FAIL"),
        ("odd", "FAIL"),
        ("killed", "PASS"),
        ("killed", "FAIL"),
        ("known", "FAIL"),  # once: the exit code says the same
        ("good", "PASS"),
    ]
    assert "exit code 127" in lines[0].seen
    assert "no result" in lines[1].seen


def test_a_program_that_cannot_be_started_is_a_failure(run):
    lines = run(Step("none", 10.0, ["/no/such/program"]), step("good", said("PASS")))
    assert [line.result for line in lines] == ["FAIL", "PASS"]


def test_a_step_beyond_its_limit_is_ended_with_its_children(run, tmp_path):
    script = f"{said('PASS')}; sleep 300 & echo $! > {tmp_path}/pid; wait"
    began = time.monotonic()
    lines = run(step("slow", script, seconds=1.0), step("next", said("PASS")))
    assert time.monotonic() - began < 60
    assert [(line.step, line.result) for line in lines] == [
        ("slow", "PASS"),
        ("slow", "SKIP"),
        ("next", "PASS"),
    ]
    assert "cut off at the step's limit of 1 s" in lines[1].seen
    assert has_ended(int((tmp_path / "pid").read_text()))


def has_ended(pid):
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().split()[2] == "Z"


def test_a_step_is_skipped_past_the_deadline_and_cut_off_at_it(run):
    lines = run(
        step("cut", f"{said('PASS')}; exec sleep 300", seconds=4.0),
        step("late", said("PASS"), seconds=60.0),
        deadline=2.0,
    )
    assert [(line.step, line.result) for line in lines] == [
        ("cut", "PASS"),
        ("cut", "SKIP"),
        ("late", "SKIP"),
    ]
    assert "no time left" in lines[1].seen
    assert lines[2].seen == "only 0 s left to DEADLINE"


def test_steps_that_measure_no_times_run_beside_others(run, tmp_path):
    """`first` and `beside` wait for each other; `timed` begins when both have ended."""
    met, ended = f"{tmp_path}/met", f"{tmp_path}/ended"
    wait = f"while [ ! -e {met} ]; do sleep 0.05; done"
    lines = run(
        step("first", f"{wait}; {said('PASS')}"),
        step("beside", f"touch {met}; sleep 0.5; touch {ended}; {said('PASS')}"),
        step("timed", f"test -e {ended} && {said('PASS')}"),
        aside=["beside"],
    )
    expected = ["first", "beside", "timed"]
    assert [(line.step, line.result) for line in lines] == [(name, "PASS") for name in expected]


@pytest.mark.parametrize(
    ("device", "modes", "cores", "several"),
    [
        ("cuda", "Default\nDefault\n", 16, True),
        ("cuda", "Default\nDefault\n", 4, False),
        ("cuda", "Default\nExclusive_Process\n", 16, False),
        ("cuda", "no such program: nvidia-smi", 16, False),
        ("cpu", "Default\n", 16, False),
    ],
)
def test_steps_share_gpus_only_where_they_can(monkeypatch, device, modes, cores, several):
    monkeypatch.setattr(acceptance, "output_of", lambda command: modes)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(os, "environ", {"DEVICE": device})
    assert acceptance.takes_several() is several


def test_table_counts_and_lists():
    lines = [Line("one", "PASS", "a|b", "1 ms"), Line("two", "SKIP", "all of it", "no GPU")]
    text = acceptance.table(Course(lines, {"one": 3.2, "two": 0.0}), ["- 8 x H100"])
    assert text.startswith(
        "- 8 x H100\n- seconds: one 3, two 0\n\n1 PASS, 0 FAIL, 1 SKIP, 0 NOTE\n"
    )
    assert "| PASS | one | a/b | 1 ms |" in text
    assert len({row.count("|") for row in text.splitlines() if row.startswith("|")}) == 1


@pytest.mark.parametrize(
    ("scripts", "code"),
    [(["PASS", "SKIP"], 0), (["PASS", "FAIL"], 1), (["SKIP"], 2), (["NOTE"], 2)],
)
def test_exit_code(tmp_path, monkeypatch, scripts, code):
    steps = [step(f"step {n}", said(result)) for n, result in enumerate(scripts)]
    monkeypatch.setattr(sys, "argv", ["acceptance.py", str(tmp_path / "out")])
    monkeypatch.setattr(os, "environ", dict(os.environ, DEVICE="cpu"))
    monkeypatch.setattr(acceptance, "describe_machine", lambda: ["- here"])
    monkeypatch.setattr(acceptance, "write_details", lambda folder: None)
    monkeypatch.setattr(acceptance, "our_steps", lambda folder: steps)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    assert acceptance.main() == code
    assert f"{scripts.count('PASS')} PASS" in (tmp_path / "out/table.md").read_text()


# Stands in for `acceptance.main()` without asking torch, which takes seconds.
QUICK = """
import sys
sys.path.insert(0, {here!r})
import acceptance
acceptance.describe_machine = lambda: ["- a machine"]
acceptance.write_details = lambda folder: None
sys.exit(acceptance.main())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_with_its_children_and_the_table_is_written(tmp_path, number):
    script = f"{said('PASS')}; sleep 300 & echo $! > {tmp_path}/pid; wait"
    steps = [["slow", 60, ["sh", "-c", script]], ["next", 60, ["sh", "-c", said("PASS")]]]
    (tmp_path / "steps.json").write_text(json.dumps(steps))
    out = tmp_path / "out"
    command = [sys.executable, "-c", QUICK.format(here=str(HERE))]
    command += [str(out), str(tmp_path / "steps.json")]
    process = subprocess.Popen(
        command, env={**os.environ, "DEVICE": "cpu"}, stdout=subprocess.PIPE, text=True
    )
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.05)
    process.send_signal(number)
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "acceptance: 2 steps on a machine; at most 600 s, until " in shown
    assert f"logs: {out / 'logs'}; at the end: {out / 'table.md'}" in shown
    table = (out / "table.md").read_text()
    assert "| PASS | slow | a check | 1 ms |" in table
    assert f"| SKIP | slow | the rest | stopped by {number.name} after " in table
    assert f"| SKIP | next | all of it | stopped by {number.name} |" in table
    assert has_ended(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize(
    ("seen", "given", "why"),
    [
        ("[]", {}, "torch sees no GPU (torch 9).* DEVICE=cpu"),
        ('["A"]', {"GPUS": "2"}, "GPUS=2, but torch sees 1"),
        ('["A"]', {"GPUS": "all"}, "GPUS=all: give a number"),
    ],
)
def test_nothing_is_started_where_nothing_can_be_checked(monkeypatch, capsys, seen, given, why):
    asked = subprocess.CompletedProcess([], 0, f"{seen}\ntorch 9\n", "")
    monkeypatch.setattr(subprocess, "run", lambda *given, **options: asked)
    monkeypatch.setattr(os, "environ", {"DEVICE": "cuda", **given})
    with pytest.raises(SystemExit) as ended:
        acceptance.describe_machine()
    assert ended.value.code == 2
    assert re.search(re.escape(why).replace(r"\.\*", ".*"), capsys.readouterr().err)


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        ({"DEVICE": "cuda"}, 600.0),
        ({"DEVICE": "cpu"}, 3600.0),
        ({"DEVICE": "cpu", "DEADLINE": ""}, 3600.0),
        ({"DEVICE": "cpu", "DEADLINE": "90"}, 90.0),
    ],
)
def test_a_rehearsal_on_a_cpu_has_more_time(monkeypatch, tmp_path, given, seconds):
    monkeypatch.setattr(os, "environ", given)
    monkeypatch.setenv("LIMITS", acceptance.ON_CPU)
    assert acceptance.chosen_deadline(acceptance.our_steps(tmp_path)) == seconds
    short = acceptance.Step("short", 60, [])
    assert acceptance.chosen_deadline([short]) == min(seconds, 600)


@pytest.mark.parametrize("given", ["0", "ten", "-5", "1e3"])
def test_a_deadline_that_is_none_is_refused(monkeypatch, capsys, given):
    monkeypatch.setattr(os, "environ", {"DEVICE": "cuda", "DEADLINE": given})
    with pytest.raises(SystemExit):
        acceptance.chosen_deadline([])
    assert f"DEADLINE={given}: give whole seconds" in capsys.readouterr().err


def test_the_machine_is_described_by_what_is_used(monkeypatch):
    asked = subprocess.CompletedProcess([], 0, '["A", "A", "B"]\nversions\n', "")
    monkeypatch.setattr(subprocess, "run", lambda *given, **options: asked)
    monkeypatch.setattr(os, "environ", {"DEVICE": "cuda", "GPUS": "2"})
    assert acceptance.describe_machine()[:2] == ["- 2 x A, of 3", "- versions"]


def test_every_file_of_checks_is_a_step():
    assert set(acceptance.ASIDE) < acceptance.FILES.keys()
    files = {path.stem.removeprefix("test_gpu_") for path in HERE.glob("test_gpu_*.py")}
    assert files == set(acceptance.FILES)


@pytest.mark.slow
def test_rehearsal_of_one_step_from_the_shell(tmp_path):
    """As a user runs it, on the CPU: what needs a GPU is skipped, what needs its times noted."""
    steps = tmp_path / "steps.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    names = ("test_gpu_machine.py", "test_gpu_waits.py")
    both = [*command, *(str(HERE / name) for name in names)]
    times = [*command, "-k", "pace", str(HERE / "test_gpu_speed.py")]
    steps.write_text(json.dumps([["both", 300, both], ["times", 300, times]]))
    outside = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    ended = subprocess.run(
        ["bash", str(HERE / "acceptance.sh"), str(tmp_path / "out"), str(steps)],
        env={**outside, "DEVICE": "cpu", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    table = (tmp_path / "out/table.md").read_text()
    assert "| PASS | both | shared memory holds the loaders batches |" in table
    assert "| SKIP | both | no wait in an iteration[1-ft ema] | needs a GPU" in table
    assert re.search(
        r"\| NOTE \| times \| pace was kept \| .* no verdict: times of a CPU \|", table
    )
