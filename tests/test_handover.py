import os
import resource
import subprocess
import sys

import pytest
import samples
import torch

from kl_f8_train.core.batch import Batch
from kl_f8_train.data import handover, loading
from kl_f8_train.data.loading import IterationSampler, PositionDataset


def make_batch() -> Batch:
    return Batch(torch.arange(12).reshape(1, 3, 2, 2).byte(), torch.ones(1, 1), ["a"], [], ["P3"])


def folder_dataset(folder, count=8):
    folder.mkdir()
    for number in range(count):
        data = samples.encode(samples.noise_picture(number), "PNG")
        (folder / f"{number}.png").write_bytes(data)
    settings = samples.data_config({"photos": folder})
    return PositionDataset(*loading.open_data(settings), settings)


def taken(dataset, workers=2, stop=6):
    sampler = IterationSampler(0, stop, 0, 8, 0, 1)
    return list(loading.loader(dataset, sampler, workers))


def test_a_parcel_arrives_as_the_batch():
    batch = make_batch()
    rebuild, arguments = handover.Parcel(batch, None).__reduce__()
    assert vars(rebuild(*arguments)).keys() == vars(batch).keys()
    assert torch.equal(rebuild(*arguments).images, batch.images)
    assert rebuild(*arguments).profiles == ["P3"]


@pytest.mark.parametrize("failure", ["shared memory", "descriptors"])
def test_batches_go_through_pipes_where_shared_memory_fails(tmp_path, monkeypatch, capfd, failure):
    """As with Docker's 64 MB: the run used to wait forever for the batch that was dropped."""
    dataset = folder_dataset(tmp_path / "photos")
    expected = taken(dataset, workers=0)

    class Pickler:
        @staticmethod
        def dumps(batch):
            if failure == "descriptors":
                raise OSError(24, "Too many open files")
            raise RuntimeError("unable to allocate shared memory(shm): No space left on device")

    monkeypatch.setattr(handover, "ForkingPickler", Pickler)
    found = taken(dataset)
    assert len(found) == len(expected) == 6
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.noise, other.noise)
        assert one.keys == other.keys
    assert "batches go through a pipe" in capfd.readouterr().out


def test_a_temporary_directory_of_a_long_name_does_not_stop_the_loaders(tmp_path):
    """torch's handing over of descriptors needs a socket there, whose name may have 107 bytes."""
    place = tmp_path / ("x" * 120)
    place.mkdir()
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\nimport test_handover\n"
        "dataset = test_handover.folder_dataset(Path(sys.argv[2]))\n"
        "print(len(test_handover.taken(dataset)))"
    )
    here = os.path.dirname(__file__)
    ran = subprocess.run(
        [sys.executable, "-c", code, here, str(tmp_path / "photos")],
        env={**os.environ, "TMPDIR": str(place), "PYTHONPATH": os.path.dirname(here)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.stdout.splitlines()[-1] == "6", ran.stderr[-2000:]


def test_a_small_shared_memory_is_named_with_its_remedy(monkeypatch):
    settings = samples.recipe("ft_mse", "data.workers=4")
    free = os.statvfs("/dev/shm")
    monkeypatch.setattr(os, "statvfs", lambda path: free)
    bytes_of_batch = handover.batch_bytes(settings, 192)
    assert bytes_of_batch == 192 * (3 * 256**2 + 4 * 4 * 32**2)

    class Small:
        f_blocks = f_bfree = f_bavail = 2**14
        f_frsize = 2**12  # 64 MiB

    monkeypatch.setattr(os, "statvfs", lambda path: Small)
    note = handover.shared_memory_note(settings, 192, 1)
    assert "/dev/shm has 64 MiB free" in note
    assert "--shm-size=1g" in note
    assert "data.workers" in note
    assert handover.shared_memory_note(settings, 1, 1) == ""


@pytest.mark.parametrize("extra", [(), ("second_forward=true",), ("latents.noise=0.1",)])
def test_the_bytes_of_a_batch_are_those_that_a_loader_makes(tmp_path, extra):
    dataset = folder_dataset(tmp_path / "photos", 4)
    settings = samples.data_config({"photos": tmp_path / "photos"}, *extra)
    dataset = PositionDataset(dataset.plan, dataset.sources, settings)
    batch = loading.collate([dataset[position] for position in range(2)])
    assert handover.batch_bytes(settings, 2) == batch.images.nbytes + batch.noise.nbytes


def test_the_limit_of_open_files_is_raised():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 200), hard))
        assert handover.raise_open_files() > 200 or hard <= 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "data.workers"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."), "--shm-size"),
        (OSError(24, "Too many open files"), "ulimit -n"),
        (OSError(11, "Resource temporarily unavailable"), "ulimit -u"),
        (OSError(28, "No space left on device"), "TMPDIR"),
        (FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"), "TMPDIR"),
    ],
)
def test_limits_of_the_machine_say_what_helps(error, remedy):
    from kl_f8_train.core.machine import with_remedy
    from kl_f8_train.errors import RunFailedError

    with pytest.raises(RunFailedError, match=remedy), with_remedy():
        raise error
