"""ft_ema at full size as users run it: torchrun, loaders, compiled, on all GPUs."""

import csv

import numpy as np
import pytest
import runs
from checks import ON_GPU
from launches import Launch
from PIL import Image

from kl_f8_train.data.pack import pack

pytestmark = ON_GPU
FULL = (
    *("model.ch=128", "model.ch_mult=[1,2,4,4]", "model.num_res_blocks=2"),
    *("adversarial.ndf=64", "adversarial.n_layers=3", "loss.perceptual=lpips_vgg"),
    *("data.crop=256", "data.workers=4", "compute.per_device_batch=12", "precision=bfloat16"),
    *("init.iteration=246803", "stop_iteration=246843", "log.every=10", "checkpoint.every=1000"),
)
LEFT_OUT = 2  # lines of the log: compiling, and cuDNN's trials
MOST_WAIT = 0.05  # of the time may be spent waiting for images


@pytest.fixture(scope="module")
def photographs(folder):
    """192 JPEGs of 384 x 320 px, of 100 kB each, in shards; and full-size weights."""
    draw = np.random.RandomState(0)
    (folder / "large").mkdir()
    for number in range(192):
        small = draw.randint(0, 256, (80, 96, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((384, 320), Image.Resampling.BICUBIC)
        image.save(folder / "large" / f"{number:04d}.jpg", quality=92)
    pack(folder / "large", folder / "large_shards", per_shard=48, workers=1)
    shape = {"ch": 128, "num_res_blocks": 2, "z_channels": 4, "embed_dim": 4}
    runs.make_weights(folder / "full.ckpt", (1, 2, 4, 4), **shape)
    return folder / "large_shards"


def test_training_keeps_the_gpus_busy(folder, photographs, vgg_file, processes, see):
    inputs = (f"data.sources={photographs}", f"init.weights={folder / 'full.ckpt'}")
    inputs += (f"loss.perceptual_weights={vgg_file}", f"global_batch={12 * processes}")
    run = Launch(folder, "full", processes, *FULL, *inputs)
    try:
        assert run.end(400) == 0, run.output[-1500:]
    finally:
        run.kill()
    with (folder / "full" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))[LEFT_OUT:]
    rate = max(float(row["images_per_second"]) for row in rows)
    waited = min(float(row["data_wait_share"]) for row in rows)
    memory = max(float(row["peak_memory_gib"]) for row in rows)
    see(
        f"{rate:.1f} images/s on {processes} GPUs, {rate / processes:.1f} each; waits for images "
        f"{waited:.1%} of the time, peak {memory:.2f} GiB"
    )
    assert waited < MOST_WAIT
