"""Tests are for CPUs, on a machine with GPUs too, unless `-m gpu` selects those that are not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import runs

ROOT = Path(__file__).parents[1]
SEEN = """
import os
import subprocess
import sys

import pytest
import torch

SHOW = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"


def test_hidden():
    child = subprocess.run([sys.executable, "-c", SHOW], capture_output=True, text=True, check=True)
    assert child.stdout == "\\n"
    assert not torch.cuda.is_available()


@pytest.mark.gpu
def test_never_runs_here():
    assert torch.cuda.is_available()
"""


def run(folder: Path, *options: str) -> str:
    """Output of pytest on that module, as started by a user who sees device 99, which is none."""
    module = folder / "test_seen.py"
    module.write_text(SEEN)
    path = f"{ROOT}:{ROOT / 'tests'}"
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-c", ROOT / "pyproject.toml"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", *options, module],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "99", "PYTHONPATH": path},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_gpus_are_hidden_from_tests_for_cpus_and_their_processes(tmp_path):
    said = run(tmp_path)
    assert "1 passed, 1 skipped" in said
    assert "needs a GPU" in said


@pytest.mark.slow
def test_tests_for_gpus_see_what_the_user_does_and_are_skipped_without_one(tmp_path):
    said = run(tmp_path, "-s", "-m", "gpu and not slow", "-n", "1")
    assert "1 skipped" in said
    assert "passed" not in said


@pytest.mark.parametrize(
    ("expression", "gpus"),
    [
        *(("", False), ("not gpu", False), ("slow", False), ("gpu or slow", False)),
        *(("gpu", True), ("gpu and not slow", True), ("not slow and gpu", True)),
    ],
)
def test_gpus_are_seen_if_all_selected_tests_are_for_them(expression, gpus):
    assert runs.for_gpus_alone(expression) == gpus


def test_here_they_are_hidden():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
