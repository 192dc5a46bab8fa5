"""What the checks on GPUs share: the device, and their lines in the acceptance run's table."""

import os
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
import torch
from checks import PRETENDED, REHEARSING, give_back_memory


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The first GPU; the CPU in a rehearsal."""
    return torch.device("cpu" if REHEARSING else "cuda:0")


@pytest.fixture(scope="session")
def processes() -> int:
    """One for each GPU, as GPUS says, or at most 8; two in a rehearsal."""
    seen = 2 if REHEARSING else min(8, torch.cuda.device_count())
    return int(os.environ.get("GPUS") or seen)


@pytest.fixture
def see(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """see(text) puts a figure into the table."""
    return lambda text: record_property("seen", text)


@pytest.fixture(autouse=True)
def _memory_is_given_back() -> Iterator[None]:
    yield
    give_back_memory()


# --- where values or times mean nothing -------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Leaves the verdict out, passed or failed; any other error is one."""
    report = yield
    means = nothing_it_means(item)
    judged = call.when == "call" and report.passed
    judged |= call.excinfo is not None and call.excinfo.errisinstance(AssertionError)
    if means and judged:
        report.outcome = "skipped"
        report.longrepr = (str(item.path), 0, f"Skipped: ran to its end; {means}")
        report.user_properties.append(("note", means))
    return report


def nothing_it_means(item: pytest.Item) -> str | None:
    """Why a check's verdict would mean nothing here; None if it does not."""
    of_times = item.get_closest_marker("of_times") is not None
    of_values = item.get_closest_marker("of_values") is not None
    if PRETENDED and (of_times or of_values):
        return "no verdict: the GPU is a pretended one"
    return "no verdict: times of a CPU" if REHEARSING and of_times else None


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Ends at once: torch's threads would end with an error where kernels take no time."""
    session = config.pluginmanager.get_plugin("session")
    if PRETENDED and session is not None:
        sys.stdout.flush()
        os._exit(session.exitstatus)


# --- lines of the table -----------------------------------------------------------------------


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Appends a line for each test to the file that ACCEPTANCE_LINES names."""
    path = os.environ.get("ACCEPTANCE_LINES")
    if path is None or (report.when != "call" and report.passed):
        return
    noted = any(name == "note" for name, _ in report.user_properties)
    result = "SKIP" if report.skipped else "PASS" if report.passed else "FAIL"
    result = "NOTE" if noted else result
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
