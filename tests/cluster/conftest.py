"""What the launched runs share: shards, weights, and a run without a break."""

from pathlib import Path

import pytest
import runs
from launched import FEW, Running

from kl_f8_train.weights import weight_file


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards and weights."""
    folder = tmp_path_factory.mktemp("cluster")
    runs.make_shards(folder)
    runs.make_weights(folder / "model.ckpt")
    return folder


@pytest.fixture(scope="session")
def undisturbed(folder: Path) -> weight_file.Contents:
    """40 iterations of two processes without a break."""
    command = ["bash", "launch/torchrun.sh", *runs.overrides(folder, "undisturbed", *FEW)]
    running = Running(command, folder / "undisturbed.log", GPUS_PER_NODE=2)
    assert running.wait() == 0, running.log.read_text()
    return runs.final_state(folder, "undisturbed")
