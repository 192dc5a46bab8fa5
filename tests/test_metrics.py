import math

import numpy as np
import pytest
import samples
import torch
from scipy import ndimage
from torch import Tensor

from kl_f8_train import evaluate, images, metrics
from kl_f8_train.errors import MissingInputError


def pair(name: str = "astronaut", noise: float = 12.0) -> tuple[Tensor, Tensor]:
    """A photograph and a blurred, noisy copy, (1, 3, 128, 128) float64 in [0, 1]."""
    picture = samples.photograph(name)[80:208, 100:228].astype(np.float64)
    grain = np.random.RandomState(0).normal(0, noise, picture.shape)
    copy = (ndimage.gaussian_filter(picture, (1, 1, 0)) + grain).round().clip(0, 255)
    return tuple(torch.from_numpy(p / 255.0).permute(2, 0, 1)[None] for p in (picture, copy))


def ssim_map(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """SSIM of two (H, W) arrays restated: 11 x 11 window by an explicit sum, zero padding."""
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()

    def mean(values: np.ndarray) -> np.ndarray:
        padded = np.pad(values, 5)
        height, width = values.shape
        return sum(
            window[i, j] * padded[i : i + height, j : j + width]
            for i in range(11)
            for j in range(11)
        )

    c1, c2 = 0.01**2, 0.03**2
    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    return ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    )


# --- psnr, ssim, sharpness ------------------------------------------------------------------


@pytest.mark.parametrize("levels", [1, 10, 255])
def test_psnr_of_a_constant_difference(levels):
    x = torch.zeros(2, 3, 8, 8, dtype=torch.float64)
    y = x + levels / 255
    expected = 20 * math.log10(255 / levels)
    assert metrics.psnr(x, y).tolist() == pytest.approx([expected, expected], abs=1e-9)


def test_psnr_takes_the_mean_over_channels_before_the_logarithm():
    x = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    y = x.clone()
    y[:, 0] = 0.3
    assert metrics.psnr(x, y).item() == pytest.approx(-10 * math.log10(0.09 / 3), abs=1e-9)


def test_psnr_is_skimage_s():
    from skimage.metrics import peak_signal_noise_ratio

    x, y = pair()
    expected = peak_signal_noise_ratio(x.numpy(), y.numpy(), data_range=1)
    assert metrics.psnr(x, y).item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", ["astronaut", "chelsea"])
def test_ssim_is_the_formula(name):
    x, y = pair(name)
    maps = [ssim_map(x[0, c].numpy(), y[0, c].numpy()) for c in range(3)]
    assert metrics.ssim(x, y).item() == pytest.approx(np.mean(maps), abs=1e-9)
    assert metrics.ssim(x.float(), y.float()).item() == pytest.approx(np.mean(maps), abs=1e-4)


@pytest.mark.parametrize("name", ["astronaut", "chelsea"])
def test_the_formula_is_skimage_s_where_no_padding_reaches(name):
    """The restated map equals scikit-image's inside; at the border, paddings differ."""
    from skimage.metrics import structural_similarity

    x, y = (image[0].numpy() for image in pair(name))
    _, theirs = structural_similarity(
        x,
        y,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=1,
        channel_axis=0,
        full=True,
    )
    ours = np.stack([ssim_map(x[c], y[c]) for c in range(3)])
    inside = (slice(None), slice(5, -5), slice(5, -5))
    assert np.abs(ours[inside] - theirs[inside]).max() < 1e-6


def test_equal_images():
    x, _ = pair()
    assert metrics.psnr(x, x).tolist() == [math.inf]
    assert metrics.ssim(x, x).item() == pytest.approx(1.0, abs=1e-12)


def test_each_image_has_its_own_number():
    (x, y), (v, w) = pair("astronaut"), pair("chelsea")
    for measure in (metrics.psnr, metrics.ssim):
        both = measure(torch.cat([x, v]), torch.cat([y, w]))
        assert both.shape == (2,)
        single = [measure(x, y).item(), measure(v, w).item()]
        assert both.tolist() == pytest.approx(single, abs=1e-12)


def test_more_noise_is_worse():
    values = [
        (metrics.psnr(*pair(noise=noise)).item(), metrics.ssim(*pair(noise=noise)).item())
        for noise in (2, 10, 40)
    ]
    assert values == sorted(values, reverse=True)
    assert values[0][1] > values[1][1] > values[2][1]


def test_sharpness_is_the_variance_of_the_laplacian():
    x, _ = pair()
    luma = 255 * np.tensordot([0.299, 0.587, 0.114], x[0].numpy(), axes=1)
    expected = ndimage.laplace(luma)[1:-1, 1:-1].var()
    assert metrics.sharpness(x).item() == pytest.approx(expected, rel=1e-9)


def test_blur_is_less_sharp():
    picture = samples.photograph("chelsea").transpose(2, 0, 1) / 255.0
    blurred = [ndimage.gaussian_filter(picture, (0, sigma, sigma)) for sigma in (0.5, 1, 2)]
    values = metrics.sharpness(torch.from_numpy(np.stack([picture, *blurred]))).tolist()
    assert values == sorted(values, reverse=True)
    assert values[0] > 2 * values[2] > 0


def test_a_flat_image_is_not_sharp():
    flat = torch.full((1, 3, 9, 9), 0.5, dtype=torch.float64)
    assert metrics.sharpness(flat).item() == pytest.approx(0, abs=1e-20)


# --- evaluate -------------------------------------------------------------------------------


def test_summary_has_the_population_deviation():
    scores = evaluate.Scores({"psnr": [20.0, 22.0, 27.0], "ssim": [0.5]})
    summary = scores.summary()
    assert summary["psnr"]["mean"] == pytest.approx(23.0)
    assert summary["psnr"]["std"] == pytest.approx(np.std([20, 22, 27], ddof=0))
    assert summary["ssim"] == {"mean": 0.5, "std": 0.0}


def test_summary_leaves_infinite_values_out():
    summary = evaluate.Scores({"psnr": [20.0, math.inf, 22.0]}).summary()
    assert summary["psnr"] == {"mean": 21.0, "std": 1.0}
    only = evaluate.Scores({"psnr": [math.inf]}).summary()
    assert only["psnr"] is None
    assert "infinite" in evaluate.table({"perfect": {"iteration": 1, **only}}, None)


def test_table():
    rows = {
        "ft-EMA": {"iteration": 560001, "psnr": {"mean": 23.812, "std": 3.9}},
        "other": {"iteration": None, "psnr": {"mean": 1.0, "std": 0.0}},
    }
    lines = evaluate.table(rows, "lpips_vgg").splitlines()
    assert lines[0] == "| model | iteration | PSNR | SSIM | PSIM | LPIPS | sharpness |"
    assert lines[1].count("---") == lines[0].count("|") - 1 == 7
    assert lines[2].startswith("| ft-EMA | 560,001 | 23.81 +/- 3.90 | not measured |")
    assert lines[2].count("not measured") == 4
    assert lines[3].startswith("| other |  | 1.00 +/- 0.00 |")


def test_table_does_not_call_the_stand_in_lpips():
    header = evaluate.table({}, "st_lpips_alex").splitlines()[0]
    assert "stand-in" in header
    assert "| LPIPS |" not in header


def test_load_images_names_what_it_leaves_out(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.png").write_bytes(samples.encode(samples.noise_picture(1), "PNG"))
    (tmp_path / "sub" / "a.jpg").write_bytes(samples.encode(samples.noise_picture(2), "JPEG"))
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "notes.txt").write_text("text")
    said: list[str] = []
    loaded = evaluate.load_images(tmp_path, 32, said.append)
    assert list(loaded) == ["b.png", "sub/a.jpg"]
    assert {tuple(image.shape) for image in loaded.values()} == {(3, 32, 32)}
    assert len(said) == 1
    assert "broken.jpg" in said[0]
    assert "left out" in said[0]


def test_load_images_resizes_and_cuts_the_centre(tmp_path):
    picture = samples.photograph("chelsea")
    (tmp_path / "a.png").write_bytes(samples.encode(picture, "PNG"))
    loaded = evaluate.load_images(tmp_path, 64)["a.png"]
    resized = images.resize_shorter(torch.from_numpy(picture.copy()).permute(2, 0, 1), 64)
    assert resized.shape == (3, 64, 96)
    assert torch.equal(loaded, resized[:, :, 16:80])


@pytest.mark.parametrize("name", ["", "absent"])
def test_load_images_of_nothing(tmp_path, name):
    with pytest.raises(MissingInputError, match="no images in"):
        evaluate.load_images(tmp_path / name, 32)


def photographs(count: int) -> list[Tensor]:
    return [
        torch.from_numpy(samples.noise_picture(n, 32, 32)).permute(2, 0, 1) for n in range(count)
    ]


@pytest.mark.parametrize("sample", [True, False])
def test_reconstructions_do_not_depend_on_the_batch_size(sample):
    """Convolutions may round differently: at most one level, in at most 1 % of the values."""
    model, originals = samples.tiny_vae(), photographs(3)
    one, two, three = (
        torch.stack(evaluate.reconstruct(model, originals, sample=sample, batch_size=size)).int()
        for size in (1, 2, 3)
    )
    assert one.shape == (3, 3, 32, 32)
    for other in (two, three):
        assert (one - other).abs().max() <= 1
        assert (one != other).float().mean() < 0.01


def test_reconstructions_follow_the_seed():
    model, originals = samples.tiny_vae(), photographs(2)
    one = evaluate.reconstruct(model, originals, seed=0)
    same = evaluate.reconstruct(model, originals, seed=0)
    other = evaluate.reconstruct(model, originals, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_equal_images_get_different_noise():
    image = photographs(1)[0]
    one, other = evaluate.reconstruct(samples.tiny_vae(), [image, image])
    assert not torch.equal(one, other)
    one, other = evaluate.reconstruct(samples.tiny_vae(), [image, image], sample=False)
    assert torch.equal(one, other)


def test_floor_is_never_above_round():
    model, originals = samples.tiny_vae(), photographs(2)
    floored = torch.stack(evaluate.reconstruct(model, originals, quantize="floor")).int()
    rounded = torch.stack(evaluate.reconstruct(model, originals, quantize="round")).int()
    difference = rounded - floored
    assert set(difference.unique().tolist()) == {0, 1}


def test_scores_without_a_perceptual_network():
    originals = photographs(3)
    copies = [originals[0], originals[1].flip(2), (originals[2] // 2)]
    scores = evaluate.score(originals, copies, None, batch_size=2)
    assert set(scores.per_image) == {"psnr", "ssim", "sharpness"}
    assert scores.per_image["psnr"][0] == math.inf
    x, y = (image.double()[None] / 255 for image in (originals[1], copies[1]))
    assert scores.per_image["psnr"][1] == pytest.approx(metrics.psnr(x, y).item())
    assert scores.per_image["ssim"][1] == pytest.approx(metrics.ssim(x, y).item())
    assert scores.per_image["sharpness"][1] == pytest.approx(metrics.sharpness(y).item())
    assert len(scores.per_image["ssim"]) == 3
