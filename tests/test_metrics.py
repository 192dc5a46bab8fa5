import math

import numpy as np
import pytest
import samples
import torch
from scipy import ndimage
from torch import Tensor

from kl_f8_train.core import metrics
from kl_f8_train.core.metrics import FeatureStatistics


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


@pytest.mark.parametrize("name", ["astronaut", "chelsea"])
def test_ssim_without_border_is_skimage_s(name):
    from skimage.metrics import structural_similarity

    x, y = pair(name)
    expected = structural_similarity(
        x[0].numpy(),
        y[0].numpy(),
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=1,
        channel_axis=0,
    )
    assert metrics.ssim(x, y, "valid").item() == pytest.approx(expected, abs=1e-6)
    assert metrics.ssim(x, y).item() != pytest.approx(expected, abs=1e-4)


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


def test_colour_shift_is_in_levels():
    x, _ = pair()
    x = 0.2 + 0.5 * x
    y = x.clone()
    y[:, 0] += 10 / 255
    red, green, blue, saturation = metrics.colour_shift(x, y)[0].tolist()
    assert [red, green, blue] == pytest.approx([10, 0, 0], abs=1e-9)
    levels = 255 * np.stack([x[0].numpy(), y[0].numpy()])
    spread = (levels.max(axis=1) - levels.min(axis=1)).mean(axis=(1, 2))
    assert saturation == pytest.approx(spread[1] - spread[0], abs=1e-9)
    grey = x.mean(dim=1, keepdim=True).expand_as(x)
    assert metrics.colour_shift(x, grey)[0, 3].item() < -10


# --- Frechet distance -----------------------------------------------------------------------


def features(seed: int, count: int, width: int = 64) -> Tensor:
    """Correlated, shifted, float32."""
    random = np.random.RandomState(seed)
    mixing = random.normal(size=(width, width)) / width**0.5
    values = random.normal(size=(count, width)) @ mixing + random.normal(size=width)
    return torch.from_numpy(values.astype(np.float32))


def statistics(values: Tensor, batch: int) -> FeatureStatistics:
    gathered = FeatureStatistics.empty(values.shape[1])
    for part in values.split(batch):
        gathered.add(part)
    return gathered


@pytest.mark.parametrize("count", [300, 20])  # 20 vectors have no full rank in 64 dimensions
def test_frechet_distance_is_torch_fidelity_s(count):
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    a, b = features(0, count), features(1, count)
    theirs = [fid_features_to_statistics(values.double()) for values in (a, b)]
    expected = fid_statistics_to_metric(*theirs, False)["frechet_inception_distance"]
    ours = metrics.frechet_distance(statistics(a, 7), statistics(b, count))
    assert ours == pytest.approx(expected, rel=1e-6)
    assert metrics.frechet_distance(statistics(a, 7), statistics(a, 5)) == pytest.approx(
        0, abs=1e-5
    )


def test_frechet_distance_of_shifted_features_is_the_shift():
    a = features(0, 200)
    shift = torch.linspace(-1, 1, 64)
    distance = metrics.frechet_distance(statistics(a, 50), statistics(a + shift, 50))
    assert distance == pytest.approx(float(shift.square().sum()), rel=1e-5)


def test_statistics_are_float64():
    values = 1000.0 + 1e-3 * features(0, 100, 8)
    gathered = statistics(values, 9)
    expected = np.cov(values.double().numpy(), rowvar=False)
    np.testing.assert_allclose(gathered.covariance().numpy(), expected, rtol=0, atol=1e-8)
