"""What the variables of torchrun and srun say, and what is said of wrong ones."""

import pytest

from kl_f8_train.__main__ import main
from kl_f8_train.errors import UsageError
from kl_f8_train.launch import launched, world_size

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
