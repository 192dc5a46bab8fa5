"""The predictions: by hand, against the data sheets' limits, and as the documentation says them."""

from pathlib import Path

import pytest
import scaling_tables

from kl_f8_train.check import cost, scaling

DOCS = (Path(__file__).parents[1] / "docs" / "performance.md").read_text()
WORK = scaling.Workload("w", 1000, 192, 2e12, 200e6, 1e9)
GPU = scaling.Gpu("g", "Gee", 400e12, 80e9, 100e9, 20e9, "made up")


def test_the_documentation_holds_what_the_program_prints():
    assert scaling_tables.table() in DOCS
    assert f"**share = {scaling.SHARE:g}**" in DOCS


def test_a_prediction_by_hand():
    seconds = scaling.seconds_per_image(WORK, GPU, share=0.25)
    assert seconds == 0.02  # 2e12 / (0.25 x 400e12)
    one = scaling.predict(WORK, seconds, 1, GPU)
    assert (one.images_per_second, one.reduction_seconds) == (50, 0)
    assert one.days == pytest.approx(1000 * 192 * 0.02 / 86400)
    many = scaling.predict(WORK, seconds, 16, GPU)
    assert many.images_per_gpu == 12
    assert many.compute_seconds == pytest.approx(0.24)
    assert many.reduction_seconds == pytest.approx(2 * 15 / 16 * 200e6 / 20e9)
    assert many.images_per_second == pytest.approx(192 / (0.24 + 0.01875))


def test_the_link_is_the_slower_one_only_across_nodes():
    within = scaling.predict(WORK, 0.02, 8, GPU)
    assert within.reduction_seconds == pytest.approx(2 * 7 / 8 * 200e6 / 100e9)
    assert scaling.predict(WORK, 0.02, 8, None).reduction_seconds == 0


@pytest.mark.parametrize("gpu", scaling.GPUS, ids=lambda gpu: gpu.name)
def test_more_gpus_never_scale_better_than_their_number(gpu):
    config = scaling_tables.load_published("ft_ema")
    work = scaling_tables.published_workload(config)
    seconds = scaling.seconds_per_image(work, gpu)
    speeds = [scaling.predict(work, seconds, n, gpu).images_per_second for n in (1, 8, 16, 64)]
    assert speeds == sorted(speeds)
    efficiencies = [speed / n / speeds[0] for speed, n in zip(speeds, (1, 8, 16, 64), strict=True)]
    assert efficiencies == sorted(efficiencies, reverse=True)
    assert 0.6 < efficiencies[-1] < 1


def test_the_published_stages():
    ema, mse = (scaling_tables.load_published(name) for name in ("ft_ema", "ft_mse"))
    assert scaling_tables.published_workload(ema).images == 313_198 * 192
    assert scaling_tables.published_workload(mse).images == 280_000 * 192
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
