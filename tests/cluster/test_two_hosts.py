"""Two hosts with their own addresses: network namespaces, joined by a cable that can be cut."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import runs
from launched import FEW, SECONDS, Running, wait_for, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.cluster]
LOST = "lost contact with the others"


@dataclass
class Host:
    """A namespace of network, host name and hosts file."""

    name: str
    namespace: str
    cable: str
    names: Path  # its /etc/hosts

    def torchrun(self, folder: Path, run: str, *extra: str, **variables: str | int) -> Running:
        """One worker of launch/torchrun.sh; the first host holds the rendezvous."""
        inside = (
            f"hostname {self.name} && mount --bind {self.names} /etc/hosts && "
            f'export GLOO_SOCKET_IFNAME={self.cable} && exec "$@"'
        )
        unshared = ["unshare", "-um", "--propagation", "private", "sh", "-c", inside, "sh"]
        script = ["bash", "launch/torchrun.sh", *runs.overrides(folder, run, *FEW, *extra)]
        fixed = {"NNODES": 2, "RDZV_ENDPOINT": "host-a:29400", "GPUS_PER_NODE": 1}
        return Running(
            ["ip", "netns", "exec", self.namespace, *unshared, *script],
            folder / f"{run}-{self.name}.log",
            **{**fixed, **variables},
        )

    def processes(self) -> list[int]:
        """Everything that runs on it."""
        return [int(pid) for pid in output("ip", "netns", "pids", self.namespace).split()]

    def worker(self) -> int:
        """The training process."""
        return next(pid for pid in self.processes() if is_worker(pid))

    def cut(self) -> None:
        """Pulls the cable."""
        output("ip", "-n", self.namespace, "link", "set", self.cable, "down")

    def mend(self) -> None:
        """Puts the cable back."""
        output("ip", "-n", self.namespace, "link", "set", self.cable, "up")

    def kill(self) -> None:
        """Ends every process on it, as a power cut does."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def is_worker(pid: int) -> bool:
    """Whether torchrun started it (and it is no loader, whose parent is such a process, too)."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes()
        parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
        return b"LOCAL_RANK=" in variables and not is_worker(int(parent))
    except OSError:
        return False


@pytest.fixture(scope="module")
def cable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Host, Host]]:
    """host-a and host-b, 10.77.0.1 and 10.77.0.2."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    if not shutil.which("ip", path=f"{os.environ['PATH']}:/usr/sbin:/sbin"):
        install = ["apt-get", "-o", "DPkg::Lock::Timeout=300", "install", "-y", "iproute2"]
        if not shutil.which("apt-get") or subprocess.run(install, check=False).returncode:
            pytest.skip("no ip command, and apt cannot install iproute2")
    names = tmp_path_factory.mktemp("hosts") / "hosts"
    names.write_text("127.0.0.1 localhost\n10.77.0.1 host-a\n10.77.0.2 host-b\n")
    hosts = [
        Host(f"host-{letter}", f"kl-{os.getpid()}-{letter}", f"cable-{letter}", names)
        for letter in "ab"
    ]
    try:
        for host in hosts:
            output("ip", "netns", "add", host.namespace)
            output("ip", "-n", host.namespace, "link", "set", "lo", "up")
        a, b = hosts
        ends = ("name", a.cable, "netns", a.namespace, "type", "veth", "peer")
        output("ip", "link", "add", *ends, "name", b.cable, "netns", b.namespace)
        for number, host in enumerate(hosts, 1):
            address = f"10.77.0.{number}/24"
            output("ip", "-n", host.namespace, "addr", "add", address, "dev", host.cable)
            host.mend()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this machine gives no network namespaces: {error.stderr}")
    else:
        yield a, b
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host.namespace], capture_output=True, check=False)


@pytest.fixture
def hosts(cable: tuple[Host, Host]) -> Iterator[tuple[Host, Host]]:
    """The two, with nothing left running on them."""
    yield cable
    for host in cable:
        host.kill()


def start(hosts, folder, run, *extra, **variables) -> list[Running]:
    """The same command on both, and on to the sixth iteration."""
    both = [host.torchrun(folder, run, *extra, **variables) for host in hosts]
    wait_for(both[0].log, "iteration 113 of")
    return both


def test_a_killed_worker_is_restarted_and_the_run_ends_as_undisturbed(folder, undisturbed, hosts):
    both = start(hosts, folder, "killed")
    os.kill(hosts[1].worker(), signal.SIGKILL)
    assert [running.wait() for running in both] == [0, 0], both[0].log.read_text()
    log = both[0].log.read_text()
    assert f"rank 0 of 2 {LOST}" in log
    assert "resuming iteration-000000110" in log
    runs.assert_same_state(runs.final_state(folder, "killed"), undisturbed)


def test_a_cut_network_stops_both_in_time_and_the_run_goes_on(folder, undisturbed, hosts):
    extra = ("compute.timeout_minutes=0.25",)
    both = start(hosts, folder, "cut", *extra, JOIN_TIMEOUT=30)
    hosts[1].cut()
    began = time.monotonic()
    for rank, running in enumerate(both):
        wait_for(running.log, f"no iteration ended for 15 s; rank {rank} is in iteration", 60)
    assert time.monotonic() - began < 15 + 20  # the timeout, and a loaded machine
    wait_for(both[0].log, "rank 1 did not answer: stopped, swapped out, or its node or network", 60)
    wait_for(both[1].log, "the ranks' meeting point (rank 0, or torchrun on the first node)", 60)
    for running in both:
        wait_for(running.log, "the same command resumes from the newest checkpoint", 60)
    hosts[1].mend()
    if any([running.wait() for running in both]):  # the agents lost each other, too
        both = [host.torchrun(folder, "cut", *extra) for host in hosts]
        assert [running.wait() for running in both] == [0, 0], both[0].log.read_text()
    runs.assert_same_state(runs.final_state(folder, "cut"), undisturbed)


def test_when_a_host_dies_the_other_ends_within_the_join_timeout(folder, hosts):
    both = start(hosts, folder, "dead", JOIN_TIMEOUT=10)
    hosts[1].kill()
    began = time.monotonic()
    assert both[0].wait(SECONDS) != 0
    assert time.monotonic() - began < 10 + 40  # and finding out, and stopping the worker
    text = both[0].log.read_text()
    assert LOST in text
    assert "RendezvousTimeoutError" in text
    assert runs.final_state(folder, "dead").iteration == 110


def test_with_a_range_of_nodes_the_other_goes_on_alone_with_the_same_batch(folder, hosts):
    both = start(hosts, folder, "elastic", NNODES="1:2")
    assert "batch: 2 processes x 2 images x 1 micro-batch = 4" in both[0].log.read_text()
    hosts[1].kill()
    assert both[0].wait() == 0, both[0].log.read_text()
    assert "batch: 4 images, at once" in both[0].log.read_text()
    assert runs.final_state(folder, "elastic").iteration == 140


def test_a_batch_that_does_not_divide_over_the_nodes_is_refused(folder, hosts):
    both = [
        host.torchrun(folder, "uneven", "global_batch=5", MAX_RESTARTS=0, JOIN_TIMEOUT=30)
        for host in hosts
    ]
    wait_until(lambda: all(r.process.poll() is not None for r in both), both[0].log)
    assert all(running.process.returncode for running in both)
    assert "global_batch=5 does not divide over 2 processes" in both[0].log.read_text()
