"""What the machine must have before anything is checked."""

import os
import shutil

import pytest
import torch
from checks import REHEARSED

from kl_f8_train.core import machine
from kl_f8_train.settings import Compute

pytestmark = REHEARSED


def test_shared_memory_holds_the_loaders_batches(see):
    """192 images of 256 px in 8 bit, prefetched: 0.35 GB."""
    free = shutil.disk_usage("/dev/shm").free
    see(f"{free / 1e9:.1f} GB free in /dev/shm; Docker: --ipc=host")
    assert free > 1e9


def test_compiling_is_possible(see, device):
    """By default, then: the recipe compiles on CUDA where Triton finds a C compiler."""
    if device.type == "cpu":
        pytest.skip("only CUDA compiles by default")
    on, why = machine.compilation(Compute())
    see(why)
    assert on


def test_gpus_of_one_kind(see, device, processes):
    if device.type == "cpu":
        see(f"{os.cpu_count()} CPU cores")
        return
    names = [torch.cuda.get_device_name(number) for number in range(processes)]
    memory = torch.cuda.get_device_properties(0).total_memory
    see(f"{processes} x {names[0]}, {memory / 2**30:.0f} GiB")
    assert len(set(names)) == 1
