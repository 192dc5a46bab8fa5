"""ft_ema at full size as users run it: torchrun, loaders, compiled, on all GPUs; tiny on CPUs."""

import csv

import numpy as np
import pytest
import runs
from checks import EAGER, OF_TIMES, PRETENDED, REHEARSING
from launches import SECONDS, Launch
from PIL import Image

from kl_f8_train.data.pack import pack

pytestmark = OF_TIMES
FULL = (
    *("model.ch=128", "model.ch_mult=[1,2,4,4]", "model.num_res_blocks=2"),
    *("adversarial.ndf=64", "adversarial.n_layers=3", "loss.perceptual=lpips_vgg"),
    *("data.crop=256", "data.workers=4", "compute.per_device_batch=12", "precision=bfloat16"),
    *("init.iteration=246803", "stop_iteration=246843", "log.every=10", "checkpoint.every=1000"),
    *((EAGER,) if PRETENDED else ()),  # compiled elsewhere; Triton would take minutes
)
SMALL = ("data.workers=1", "compute.per_device_batch=12", "stop_iteration=140", "log.every=10")
LEFT_OUT = 2  # lines of the log: compiling, and cuDNN's trials
MOST_WAIT = 0.05  # of the time may be spent waiting for images


@pytest.fixture(scope="module")
def settings(folder, request, device):
    """The run's, with its images and weights; tiny in a rehearsal."""
    if REHEARSING:
        return (*SMALL, "compute.accelerator=cpu")
    vgg = request.getfixturevalue("vgg_file")
    inputs = (f"data.sources={make_photographs(folder)}", f"init.weights={make_weights(folder)}")
    return (*FULL, *inputs, f"loss.perceptual_weights={vgg}", "compute.accelerator=cuda")


def make_photographs(folder):
    """192 JPEGs of 384 x 320 px, of 100 kB each, in shards."""
    draw = np.random.RandomState(0)
    (folder / "large").mkdir()
    for number in range(192):
        small = draw.randint(0, 256, (80, 96, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((384, 320), Image.Resampling.BICUBIC)
        image.save(folder / "large" / f"{number:04d}.jpg", quality=92)
    pack(folder / "large", folder / "large_shards", per_shard=48, workers=1)
    return folder / "large_shards"


def make_weights(folder):
    """Random ones of kl-f8's size."""
    shape = {"ch": 128, "num_res_blocks": 2, "z_channels": 4, "embed_dim": 4}
    return runs.make_weights(folder / "full.ckpt", (1, 2, 4, 4), **shape)


def test_training_keeps_the_gpus_busy(folder, settings, processes, see):
    run = Launch(folder, "full", processes, *settings, f"global_batch={12 * processes}")
    try:
        run.finish(2.2 * SECONDS)  # compiling is in it
    finally:
        run.kill()
    with (folder / "full" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))[LEFT_OUT:]
    rate = max(float(row["images_per_second"]) for row in rows)
    waited = min(float(row["data_wait_share"]) for row in rows)
    memory = max(float(row["peak_memory_gib"]) for row in rows)
    see(
        f"{rate:.1f} images/s, {rate / processes:.1f} by each process; waits for images "
        f"{waited:.1%} of the time, peak {memory:.2f} GiB"
    )
    assert waited < MOST_WAIT
