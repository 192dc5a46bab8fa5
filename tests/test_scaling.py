"""The predictions: by hand, against the data sheets' limits, and as the documentation says them."""

from dataclasses import replace
from pathlib import Path

import pytest
import scaling_tables
import torch

from kl_f8_train.check import cost, scaling

DOCS = (Path(__file__).parents[1] / "docs" / "performance.md").read_text()
IMAGE = cost.Work({torch.bfloat16: 2e12, torch.float32: 1e11}, 2e9, 4e9, 8e9)
WORK = scaling.Workload(
    *(1000, 192, 12, "bfloat16", IMAGE, replace(IMAGE, other_bytes=8e9)),
    *(200e6, 10e6, 1e9, 1000),
)
GPU = scaling.Gpu(
    "g", "Gee", 400e12, 200e12, 50e12, 80e9, 2e12, 100e9, 20e9, "made up"
)  # rates of bfloat16, TF32, float32; memory and its rate; links
SAVING = 1e9 / scaling.COPY_RATE / 1000  # seconds an iteration


def test_the_documentation_holds_what_the_program_prints():
    assert scaling_tables.table() in DOCS
    shares = scaling.PRODUCT_SHARE, scaling.MEMORY_SHARE, scaling.HOST_SECONDS
    for value in shares:
        assert f"**{value:g}" in DOCS


def test_an_image_s_seconds_by_hand():
    products = (2e12 / 400e12 + 1e11 / 200e12) / scaling.PRODUCT_SHARE
    others, once = (number / (2e12 * scaling.MEMORY_SHARE) for number in (4e9, 8e9))
    found = scaling.seconds_per_image(WORK, GPU, gpus=16)
    assert found == pytest.approx(products + others + once / 12)
    several = scaling.seconds_per_image(WORK, GPU, gpus=1)  # 16 micro-batches
    assert several == pytest.approx(products + 2 * others + once / 192)


def test_a_slow_memory_slow_products_and_a_slow_host_each_limit():
    fast = replace(GPU, flops=1e18, tf32=1e18)
    others, once = (number / (2e12 * scaling.MEMORY_SHARE) for number in (4e9, 8e9))
    found = scaling.seconds_per_image(WORK, fast, gpus=16)
    assert found == pytest.approx(2e9 / 2e12 + others + once / 12, rel=1e-3)
    found = scaling.seconds_per_image(WORK, replace(fast, memory_rate=1e18), gpus=16)
    assert found == pytest.approx(scaling.HOST_SECONDS / 12, rel=1e-3)


def test_float32_leaves_the_tensor_cores_out():
    exact = replace(WORK, precision="float32", one=replace(IMAGE, flops={torch.float32: 1e12}))
    found = scaling.seconds_per_image(exact, replace(GPU, memory_rate=1e18), gpus=16)
    assert found == pytest.approx(1e12 / (50e12 * scaling.PRODUCT_SHARE), rel=1e-3)


def test_a_prediction_by_hand():
    one = scaling.predict(WORK, 0.02, 1, GPU)
    assert one.reduction_seconds == 0
    assert one.images_per_second == pytest.approx(192 / (192 * 0.02 + SAVING))
    assert one.days == pytest.approx(1000 * (192 * 0.02 + SAVING) / 86400)
    many = scaling.predict(WORK, 0.02, 16, GPU)
    hidden = 2 * 15 / 16 * (scaling.BUCKET_BYTES + 10e6) / 20e9  # all but the last bucket is
    assert many.reduction_seconds == pytest.approx(hidden)
    assert many.images_per_second == pytest.approx(192 / (0.24 + hidden + SAVING))


def test_saves_that_take_longer_than_what_is_between_them_are_waited_for():
    often = replace(WORK, save_every=1)
    found = scaling.predict(often, 0.02, 16, None).images_per_second
    assert found == pytest.approx(192 / (1e9 / scaling.COPY_RATE + 1e9 / scaling.WRITE_RATE))


def test_a_reduction_longer_than_the_backward_pass_is_waited_for():
    slow = replace(GPU, network=1e9)
    found = scaling.predict(WORK, 0.02, 16, slow).reduction_seconds
    assert found == pytest.approx(2 * 15 / 16 * 210e6 / 1e9 - scaling.BACKWARD * 12 * 0.02)


def test_the_link_is_the_slower_one_only_across_nodes():
    within = scaling.predict(WORK, 0.02, 8, GPU)
    exposed = 2 * 7 / 8 * (scaling.BUCKET_BYTES + 10e6) / 100e9
    assert within.reduction_seconds == pytest.approx(exposed)
    assert scaling.predict(WORK, 0.02, 8, None).reduction_seconds == 0


@pytest.mark.parametrize("gpu", scaling.GPUS, ids=lambda gpu: gpu.name)
def test_more_gpus_never_scale_better_than_their_number(gpu):
    config = scaling_tables.load_published("ft_ema")
    work = scaling_tables.published_workload(config)
    image_seconds = scaling.seconds_per_image(work, gpu, 16)  # the same for all numbers
    speeds = [
        scaling.predict(work, image_seconds, n, gpu).images_per_second for n in (1, 8, 16, 64)
    ]
    assert speeds == sorted(speeds)
    efficiencies = [speed / n / speeds[0] for speed, n in zip(speeds, (1, 8, 16, 64), strict=True)]
    assert efficiencies == sorted(efficiencies, reverse=True)
    assert 0.4 < efficiencies[-1] < 1


def test_the_published_stages():
    ema, mse = (scaling_tables.load_published(name) for name in ("ft_ema", "ft_mse"))
    works = [scaling_tables.published_workload(stage) for stage in (ema, mse)]
    assert [work.iterations for work in works] == [313_198, 280_000]
    assert [work.global_batch for work in works] == [192, 192]
    difference = scaling.checkpoint_bytes(ema) - scaling.checkpoint_bytes(mse)
    assert difference == 4 * 3 * cost.parameters(ema)["discriminator"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA A100-SXM4-80GB", "A100 SXM 80 GB"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("Some Card", None),
    ],
)
def test_gpus_are_known_by_torchs_names(name, expected):
    found = scaling.find_gpu(name)
    assert (found.name if found else None) == expected
