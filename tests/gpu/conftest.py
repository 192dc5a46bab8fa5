"""What the checks on GPUs share: the device, and their lines in the acceptance run's table."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pretended
import pytest
import torch
from checks import REHEARSING, give_back_memory


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The first GPU; the CPU in a rehearsal."""
    return torch.device("cpu" if REHEARSING else "cuda:0")


@pytest.fixture(scope="session")
def processes() -> int:
    """One for each GPU, as GPUS says, or at most 8; two in a rehearsal."""
    seen = 2 if REHEARSING else min(8, torch.cuda.device_count())
    return int(os.environ.get("GPUS") or seen)


@pytest.fixture(scope="session")
def computing() -> None:
    """Skips what needs values or times where kernels compute nothing; before all other fixtures."""
    if pretended.is_here():
        pytest.skip("the GPU is a pretended one")


@pytest.fixture
def see(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """see(text) puts a figure into the table."""
    return lambda text: record_property("seen", text)


@pytest.fixture(autouse=True)
def _memory_is_given_back() -> Iterator[None]:
    yield
    give_back_memory()


# --- on a pretended GPU -----------------------------------------------------------------------


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Ends at once: torch's threads would end with an error where kernels take no time."""
    session = config.pluginmanager.get_plugin("session")
    if pretended.is_here() and session is not None:
        sys.stdout.flush()
        os._exit(session.exitstatus)


# --- lines of the table -----------------------------------------------------------------------


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Appends a line for each test to the file that ACCEPTANCE_LINES names."""
    path = os.environ.get("ACCEPTANCE_LINES")
    if path is None or (report.when != "call" and report.passed):
        return
    result = "SKIP" if report.skipped else "PASS" if report.passed else "FAIL"
    seen = [str(value) for name, value in report.user_properties if name == "seen"]
    if not report.passed:
        seen.append(reason(report))
    name = report.nodeid.split("::")[-1].removeprefix("test_").replace("_", " ")
    with Path(path).open("a") as file:
        file.write(f"{result}\t{name}\t{'; '.join(seen)}\n")


def reason(report: pytest.TestReport) -> str:
    """Why it failed or was skipped, in one line."""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else str(report.longrepr)
    return " ".join(text.split())[:200]
