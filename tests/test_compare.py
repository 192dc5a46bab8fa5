"""Paired comparisons: the interval covers, the verdict is plain, odd values do not mislead."""

import csv
import json
import time

import numpy as np
import pytest

from kl_f8_train.errors import MissingInputError
from kl_f8_train.score import compare


def rows(**models: dict[str, list[float | str]]) -> list[dict[str, str]]:
    """per_image.csv's rows: rows(a={"psnr": [...]}, b={"psnr": [...]})."""
    return [
        {"model": name, "image": f"{index}.png", **{m: str(v[index]) for m, v in scores.items()}}
        for name, scores in models.items()
        for index in range(len(next(iter(scores.values()))))
    ]


def psnr(a: list[float | str], b: list[float | str]) -> compare.Verdict:
    return compare.verdicts(rows(a={"psnr": a}, b={"psnr": b}), "a", "b")[0]


LEVELS = [20.0 + 0.5 * index for index in range(20)]


@pytest.mark.parametrize("draw", ["normal", "exponential"])
def test_the_interval_covers_the_true_mean(draw):
    random = np.random.default_rng(1)
    samples = (
        random.normal(0.3, 1, (400, 60)) if draw == "normal" else random.exponential(0.3, (400, 60))
    )
    intervals = [
        compare.bootstrap_interval(s, resamples=1000, seed=i) for i, s in enumerate(samples)
    ]
    covered = np.mean([low <= 0.3 <= high for low, high in intervals])
    assert 0.92 <= covered <= 0.98, covered


def test_the_interval_agrees_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(3).exponential(1.0, 80)
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="BCa", rng=np.random.default_rng(0)
    ).confidence_interval
    low, high = compare.bootstrap_interval(values, resamples=20_000)
    assert low == pytest.approx(expected.low, abs=0.01)
    assert high == pytest.approx(expected.high, abs=0.01)


def test_no_difference_is_rarely_called_one():
    random = np.random.default_rng(2)
    samples = random.normal(0, 1, (200, 40))
    intervals = [compare.bootstrap_interval(s, resamples=1000) for s in samples]
    assert np.mean([low > 0 or high < 0 for low, high in intervals]) < 0.1


def test_says_plainly_that_b_is_better():
    better = [value + 0.5 + 0.1 * (-1) ** index for index, value in enumerate(LEVELS)]
    found = psnr(LEVELS, better)
    assert found.verdict == "better"
    assert found.text.startswith("b is better than a in PSNR: +0.50 dB [0.4")
    assert found.text.endswith("wins 20 of 20 images.")
    assert psnr(better, LEVELS).text.startswith("b is worse than a in PSNR: -0.50 dB [-0.5")


def test_lower_is_better_for_distances():
    far = {
        "lpips": [0.3 + 0.001 * i for i in range(12)],
        "psim": [1.0 + 0.01 * i for i in range(12)],
    }
    near = {key: [0.9 * v for v in values] for key, values in far.items()}
    found = compare.verdicts(rows(a=far, b=near), "a", "b")
    assert [(v.metric, v.verdict, v.wins) for v in found] == [
        ("psim", "better", 12),
        ("lpips", "better", 12),
    ]
    assert found[0].difference < 0


def test_sharpness_is_higher_or_lower_and_never_better():
    smooth = {"sharpness": [100.0 + i for i in range(12)]}
    rough = {"sharpness": [200.0 + 2 * i for i in range(12)]}
    found = compare.verdicts(rows(a=rough, b=smooth), "a", "b")[0]
    assert (found.verdict, found.wins, found.losses) == ("lower", 0, 12)
    assert "b is smoother than a by sharpness: -106" in found.text
    assert "higher on 0 of 12" in found.text


def test_noise_is_no_clear_difference():
    shaken = [value + (-1) ** index for index, value in enumerate(LEVELS)]
    found = psnr(LEVELS, shaken)
    assert found.verdict == "unclear"
    assert found.text.startswith("No clear difference between b and a in PSNR: +0.00 dB [-0.")


def test_equal_models_are_alike():
    found = psnr(LEVELS, LEVELS)
    assert (found.verdict, found.low, found.high) == ("unclear", 0.0, 0.0)
    assert found.text.endswith("wins 0 of 20 images, 20 alike.")


def test_a_constant_gain_has_a_point_as_interval():
    found = psnr(LEVELS, [value + 1 for value in LEVELS])
    assert (found.verdict, found.low, found.high) == ("better", 1.0, 1.0)


def test_infinite_values_count_as_wins_and_not_in_the_mean():
    a = [*LEVELS, "inf", "inf", 30.0]
    b = [*[value + 1 for value in LEVELS], "inf", 30.0, "inf"]
    found = psnr(a, b)
    assert (found.images, found.infinite, found.wins, found.losses) == (23, 3, 21, 1)
    assert found.difference == pytest.approx(1.0)
    assert "wins 21 of 23 images, 1 alike, 3 infinite and not in the mean" in found.text
    perfect = psnr(["inf"] * 12, ["inf"] * 12)
    assert (perfect.verdict, perfect.difference) == ("few", None)


def test_few_images_get_no_interval():
    found = psnr(LEVELS[:9], [value + 1 for value in LEVELS[:9]])
    assert (found.verdict, found.low) == ("few", None)
    assert found.text.startswith(
        "Fewer than 10 images: no verdict on b against a in PSNR: +1.00 dB"
    )


def test_what_was_not_measured_is_said_or_left_out():
    found = compare.verdicts(
        rows(a={"psnr": LEVELS, "psim": [""] * 20, "lpips": [0.1] * 20}, b={"psnr": LEVELS}),
        "a",
        "b",
    )
    assert [(v.metric, v.verdict) for v in found] == [("psnr", "unclear"), ("lpips", "unmeasured")]
    assert found[1].text == "LPIPS was not measured for both a and b."


def test_images_are_paired_by_name_and_not_by_order():
    table = rows(a={"psnr": LEVELS}, b={"psnr": [value + 1 for value in LEVELS]})
    found = compare.verdicts(table[:20] + table[:19:-1], "a", "b")[0]
    assert (found.low, found.high) == (1.0, 1.0)


def test_the_same_values_give_the_same_interval():
    values = np.random.default_rng(0).normal(size=50)
    assert compare.bootstrap_interval(values) == compare.bootstrap_interval(values)


def test_five_thousand_images_take_seconds_and_little_memory():
    values = np.random.default_rng(0).normal(0.1, 1.0, 5000)
    began = time.process_time()
    low, high = compare.bootstrap_interval(values)
    assert time.process_time() - began < 5
    expected = 1.96 / np.sqrt(5000)  # the normal interval, which many images approach
    assert high - low == pytest.approx(2 * expected, rel=0.05)


def test_files_are_read_as_csv_and_json_holds_the_text(tmp_path):
    path = tmp_path / "per_image.csv"
    with pytest.raises(MissingInputError, match="no such file"):
        compare.read_image_scores(path)
    path.write_text("x,y\n1,2\n")
    with pytest.raises(MissingInputError, match="expected the columns"):
        compare.read_image_scores(path)
    names = ['a "quoted", b', "ü"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "image", "psnr"])
        writer.writerows(
            [n, f"{i}.png", v + k] for k, n in enumerate(names) for i, v in enumerate(LEVELS)
        )
    found = compare.verdicts(compare.read_image_scores(path), *names)[0]
    assert json.loads(json.dumps(found.as_dict()))["text"] == found.text
    assert 'ü is better than a "quoted", b in PSNR: +1.00 dB' in found.text
