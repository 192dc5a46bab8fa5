"""A training checkpoint is taken only whole: cut anywhere, or changed by a bit, it is refused."""

import json
import struct
from pathlib import Path

import pytest
import runs
import torch

from kl_f8_train.core.hashes import frozen_sha256
from kl_f8_train.errors import MissingInputError, RunFailedError
from kl_f8_train.weights import checkpoint, weight_file


@pytest.fixture
def saved(finetuner, batch, tmp_path):
    """(finetuner, optimizers, path): a checkpoint after one iteration."""
    tuner = finetuner("ft_ema", "adversarial.start_iteration=0")
    tuner.run_iteration(batch(side=32))
    frozen = frozen_sha256(tuner.autoencoder.state_dict())
    return tuner, tuner.adams, runs.save(tuner, tuner.adams, tmp_path, frozen)


def take(path: Path) -> weight_file.Contents:
    """Reads a checkpoint as a resuming run does."""
    contents = weight_file.read(path)
    checkpoint.check_metadata(contents)
    checkpoint.stored_config(contents)
    checkpoint.check_content(contents)
    return contents


def test_a_file_cut_or_changed_anywhere_is_refused(saved):
    _, _, path = saved
    whole = path.read_bytes()
    assert take(path).iteration == 1
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    header.pop("__metadata__")
    starts = sorted(8 + length + entry["data_offsets"][0] for entry in header.values())
    middle = starts[len(starts) // 2]
    cuts = [0, 4, 8, 9, 8 + length // 2, 8 + length, *starts[1:4], middle, len(whole) - 1]
    for cut in cuts:  # at every kind of border, and inside
        path.write_bytes(whole[:cut])
        with pytest.raises(MissingInputError):
            take(path)
    path.write_bytes(whole[:middle] + bytes(512) + whole[middle + 512 :])  # a lost sector
    with pytest.raises(MissingInputError, match="does not match its own SHA-256"):
        take(path)
    path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])  # one bit
    with pytest.raises(MissingInputError, match="does not match its own SHA-256"):
        take(path)
    path.write_bytes(whole)
    assert take(path).iteration == 1


@pytest.mark.parametrize(
    "text", [b'"iteration":"1', b'"ema_updates":"1', b'"first_iteration":"', b'_left":"', b"seed"]
)
def test_a_counter_or_a_setting_that_the_disk_changed_is_refused(saved, text):
    _, _, path = saved
    whole = path.read_bytes()
    last = whole.index(text) + len(text) - 1
    for place in (last, last - 3):  # in the value, mostly, and in the key
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(MissingInputError):
            take(path)


def test_a_checkpoint_without_hashes_of_its_metadata_is_taken(saved):
    _, _, path = saved
    contents = weight_file.read(path)
    del contents.metadata["metadata_sha256"]
    weight_file.write_safetensors(path, contents.tensors, contents.metadata)
    assert take(path).iteration == 1


@pytest.mark.parametrize(
    ("key", "wrong"),
    [
        ("iteration", None),
        ("ema_updates", "x"),
        ("warmup_left", "-1"),
        ("first_iteration", ""),
        ("frozen_sha256", None),
        ("config", "null"),
        ("config", "[]"),
    ],
)
def test_metadata_of_another_form_is_refused_by_name(saved, key, wrong):
    _, _, path = saved
    contents = weight_file.read(path)
    del contents.metadata["metadata_sha256"]
    contents.metadata[key] = wrong
    if wrong is None:
        del contents.metadata[key]
    with pytest.raises(MissingInputError, match=f"its {key}"):
        checkpoint.stored_config(contents)


@pytest.mark.parametrize("where", ["weight", "ema", "moment"])
def test_a_checkpoint_that_is_not_finite_is_never_written(saved, tmp_path, where):
    tuner, optimizers, path = saved
    tensor = {
        "weight": tuner.autoencoder.last_layer,
        "ema": tuner.ema["decoder"].conv_out.weight,
        "moment": optimizers[1].state[tuner.discriminator.main[0].weight]["exp_avg"],
    }[where]
    tensor.data.view(-1)[-1] = torch.nan if where == "weight" else torch.inf
    frozen = frozen_sha256(tuner.autoencoder.state_dict())
    before = path.read_bytes()
    tuner.run_state.iteration += 1
    with pytest.raises(RunFailedError, match="1 tensor is not finite"):
        runs.save(tuner, optimizers, tmp_path, frozen)
    assert list(path.parent.iterdir()) == [path]
    assert path.read_bytes() == before
