"""The Dockerfile: what it names exists, and it builds where docker is running."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from kl_f8_train import __version__

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def docker_runs() -> bool:
    """Whether there is a docker client, and a daemon that answers it."""
    if shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "info"], capture_output=True, timeout=30).returncode == 0


def test_the_dockerfile_copies_and_installs_what_exists():
    copied = " ".join(re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE)).split()
    assert {"configs", "kl_f8_train", "pyproject.toml"} <= set(copied)
    assert [name for name in copied if not (ROOT / name).exists()] == []
    kept = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    assert kept == copied
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (extras,) = re.findall(r"\.\[([\w,]+)\]", DOCKERFILE)
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    assert len(DOCKERFILE.splitlines()) == 12


@pytest.mark.slow
@pytest.mark.skipif(not docker_runs(), reason="needs a running docker daemon")
def test_the_image_builds_and_runs():
    subprocess.run(["docker", "build", "--quiet", "--tag", "kl-f8-train-test", ROOT], check=True)
    run = ["docker", "run", "--rm", "kl-f8-train-test", "--version"]
    done = subprocess.run(run, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == __version__
