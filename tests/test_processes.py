"""What the variables of torchrun and srun say, and what is said of wrong ones."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from kl_f8_train import launch
from kl_f8_train.__main__ import main
from kl_f8_train.errors import UsageError
from kl_f8_train.launch import launched, left_over, world_size

TORCHRUN = {
    **{"WORLD_SIZE": "4", "RANK": "1", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"},
    **{"MASTER_ADDR": "node1", "MASTER_PORT": "29500"},
}
SRUN = {
    **{"SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_NNODES": "2"},
    **{"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"},
    "SLURM_NTASKS_PER_NODE": "2",
}


@pytest.fixture(autouse=True)
def nobody(monkeypatch):
    """No launcher's variables but a test's own."""
    for name in (*TORCHRUN, *SRUN, "GROUP_RANK", "NODE_RANK", "SLURM_JOB_NAME"):
        monkeypatch.delenv(name, raising=False)


def given(monkeypatch, variables: dict[str, str | None]) -> None:
    for name, value in variables.items():
        if value is not None:
            monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({}, ("", 0, 0)),
        (TORCHRUN, ("torchrun", 2, 2)),
        (SRUN, ("srun", 2, 2)),
        ({**SRUN, **TORCHRUN}, ("torchrun", 2, 2)),
        ({**SRUN, "SLURM_JOB_NAME": "bash"}, ("", 0, 0)),
        # Lightning's own second process on this machine
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "1", "NODE_RANK": "0"}, ("", 0, 0)),
    ],
)
def test_who_started_the_processes(monkeypatch, variables, found):
    given(monkeypatch, variables)
    assert launched() == found


def test_variables_of_another_start_are_passed_over_aloud(monkeypatch):
    given(monkeypatch, {"WORLD_SIZE": "8", "RANK": "3", "MASTER_ADDR": "node17"})
    assert "WORLD_SIZE=8 and RANK are set, but not by torchrun" in left_over()


@pytest.mark.parametrize("variables", [{}, TORCHRUN, SRUN, {"WORLD_SIZE": "1", "RANK": "0"}])
def test_variables_of_this_start_are_not_left_over(monkeypatch, variables):
    given(monkeypatch, variables)
    assert left_over() == ""


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"LOCAL_WORLD_SIZE": "abc"}, "LOCAL_WORLD_SIZE is 'abc': expected a whole number from 1"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE is '0': expected a whole number from 1"),
        ({"LOCAL_WORLD_SIZE": "1"}, "WORLD_SIZE is not set: expected a whole number"),
        ({**TORCHRUN, "WORLD_SIZE": "3"}, "3 processes, as torchrun says, are not as many on each"),
        ({**TORCHRUN, "RANK": "4"}, "RANK is '4': expected a whole number from 0 to 3"),
        ({**TORCHRUN, "MASTER_ADDR": None}, "MASTER_ADDR is not set: expected the first node's"),
        ({**TORCHRUN, "MASTER_PORT": None}, "MASTER_PORT is not set"),
        ({**SRUN, "SLURM_NTASKS": None}, "SLURM_NTASKS is not set: expected a whole number from 1"),
        ({**SRUN, "SLURM_NTASKS": "abc"}, "SLURM_NTASKS is 'abc'"),
        ({**SRUN, "SLURM_NODEID": None}, "SLURM_NODEID is not set"),
        ({**SRUN, "SLURM_NTASKS_PER_NODE": None}, "as srun --ntasks-per-node sets it"),
        ({"MASTER_PORT": "abc"}, "MASTER_PORT is 'abc': expected a whole number from 1 to 65,535"),
        ({"RANK": "abc"}, "RANK is 'abc'"),
    ],
)
def test_a_wrong_variable_is_named(monkeypatch, capsys, variables, said):
    given(monkeypatch, variables)
    with pytest.raises(UsageError, match=said) as caught:
        launched()
    assert "unset " in str(caught.value) or "every node" in str(caught.value)
    assert main(["train", "demo"]) == 2  # before anything heavy is imported
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE is 'abc'"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_PORT is not set"),
        ({**TORCHRUN, "MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({"LOCAL_RANK": "first"}, "LOCAL_RANK is 'first'"),
    ],
)
def test_evaluate_names_a_wrong_variable(monkeypatch, variables, said):
    given(monkeypatch, variables)
    with pytest.raises(UsageError, match=said):
        world_size()


def test_tasks_of_srun_do_not_evaluate_each_for_itself(monkeypatch):
    given(monkeypatch, SRUN)
    with pytest.raises(UsageError, match="several tasks of srun"):
        world_size()
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert world_size() == 1


def test_nodes_started_by_hand_need_a_place_to_meet(monkeypatch, capsys):
    assert main(["train", "demo", "compute.num_nodes=2"]) == 2
    assert "MASTER_ADDR, MASTER_PORT, NODE_RANK are not set" in capsys.readouterr().err
    given(monkeypatch, {"MASTER_ADDR": "node1", "MASTER_PORT": "29500", "NODE_RANK": "1"})
    assert launched(2) == ("", 0, 0)


# --- errors of all ranks ---------------------------------------------------------------------

# A rank that has failed stays until the others have: torchrun ends all when the first one ends.
PROGRAM = """
import os, sys, time
from kl_f8_train.__main__ import main

def run(arguments):
    try:
        return main(arguments)
    except SystemExit as end:
        return end.code

commands = {commands}
given = commands.get(os.environ["RANK"], commands["others"])
code = run(given) if given else 0
time.sleep(4)
sys.exit(code)
"""


def torchrun(folder: Path, world: int, **commands: list[str]) -> str:
    """The output of `world` real processes, each with its command, or that of the others."""
    program = folder / "program.py"
    program.write_text(PROGRAM.format(commands=commands))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, f"--nproc-per-node={world}", str(program)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode != 0
    return done.stdout


def command(folder: Path, weights: str) -> list[str]:
    given = [f"init.weights={weights}", f"run_dir={folder / 'run'}", "data.sources=none"]
    return ["train", "demo", *given]


def test_an_error_of_all_ranks_is_printed_once_and_that_of_one_is_seen(tmp_path):
    others, odd = (command(tmp_path, name) for name in ("absent.ckpt", "odd.ckpt"))
    output = torchrun(tmp_path, 4, others=others, **{"2": odd})
    assert output.count("init.weights=absent.ckpt: no such file") == 1, output
    assert output.count("init.weights=odd.ckpt: no such file") == 1, output


def test_an_error_of_the_last_rank_alone_is_seen(tmp_path):
    output = torchrun(tmp_path, 2, others=[], **{"1": command(tmp_path, "odd.ckpt")})
    assert output.count("init.weights=odd.ckpt: no such file") == 1, output


def test_a_wrong_command_is_explained_once(tmp_path):
    output = torchrun(tmp_path, 3, others=["train", "demo", "--no-such-flag"])
    assert output.count("unrecognized arguments: --no-such-flag") == 1, output
    assert output.count("usage: ") == 1, output


def claims(monkeypatch, tmp_path, capfd, **variables: str) -> list[bool]:
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    given(monkeypatch, {"WORLD_SIZE": "2", "LOCAL_RANK": "0", **variables})
    with capfd.disabled():  # a real stream
        return [launch.is_first_to_say("the same"), launch.is_first_to_say("the same")]


def test_a_message_is_claimed_once_a_launch(monkeypatch, tmp_path, capfd):
    assert claims(monkeypatch, tmp_path, capfd) == [True, False]
    assert claims(monkeypatch, tmp_path, capfd, TORCHELASTIC_RESTART_COUNT="1") == [True, False]
    assert claims(monkeypatch, tmp_path, capfd, WORLD_SIZE="1") == [True, True]


def test_a_message_is_printed_where_nothing_can_be_claimed(monkeypatch, tmp_path, capfd):
    (tmp_path / f"kl_f8_train-{os.getuid()}").write_text("a file in the directory's place")
    assert claims(monkeypatch, tmp_path, capfd) == [True, True]


def test_old_claims_are_removed(monkeypatch, tmp_path, capfd):
    assert claims(monkeypatch, tmp_path, capfd) == [True, False]
    (claim,) = (tmp_path / f"kl_f8_train-{os.getuid()}").iterdir()
    os.utime(claim, (0, 0))
    assert claims(monkeypatch, tmp_path, capfd) == [True, False]
