"""Rate schedule, clipping, further loss terms and noise on latents: right, and off by default."""

import math

import pytest
import runs
import torch

from kl_f8_train import config as configs
from kl_f8_train import recipe
from kl_f8_train.core.batch import plain_batch
from kl_f8_train.core.losses import reconstruction_loss, sobel
from kl_f8_train.core.updates import describe_rate, learning_rate
from kl_f8_train.errors import UsageError
from kl_f8_train.weights import checkpoint, weight_file

RATE = "optimizer.learning_rate=1e-3"


def rates(*overrides: str, at: tuple[int, ...]) -> list[float]:
    settings = recipe("ft_mse", RATE, *overrides).optimizer
    return [learning_rate(settings, done) for done in at]


@pytest.mark.parametrize(
    ("decay", "at", "expected"),
    [
        ("constant", (0, 9, 10**6), (1e-3, 1e-3, 1e-3)),
        ("linear", (0, 50, 100, 500), (1e-3, 6e-4, 2e-4, 2e-4)),
        ("cosine", (0, 25, 50, 100, 500), (1e-3, 8.8284271e-4, 6e-4, 2e-4, 2e-4)),
    ],
)
def test_rates_by_a_table(decay, at, expected):
    horizon = ("optimizer.decay_iterations=100", "optimizer.final_learning_rate=2e-4")
    found = rates(f"optimizer.decay={decay}", *horizon, at=at)
    assert found == pytest.approx(expected, rel=1e-7)


def test_warm_up_rises_to_the_whole_rate():
    found = rates("optimizer.warmup_iterations=4", at=(0, 1, 3, 4, 99))
    assert found == pytest.approx([2.5e-4, 5e-4, 1e-3, 1e-3, 1e-3])
    settings = recipe("ft_mse", RATE, "optimizer.warmup_iterations=4").optimizer
    assert "0.00025 at the start, 0.001 at the middle, 0.001 at the end" in describe_rate(
        settings, 100
    )
    assert describe_rate(recipe("ft_mse", RATE).optimizer, 100) == "0.001, absolute"


def test_a_decay_without_its_horizon_is_refused():
    with pytest.raises(
        UsageError, match=r"optimizer.decay=cosine needs optimizer.decay_iterations"
    ):
        recipe("ft_mse", "optimizer.decay=cosine")


def test_both_networks_follow_the_schedule_and_resuming_goes_on(finetuner, batch, tmp_path):
    extra = ("adversarial.start_iteration=0", "init.iteration=7", "optimizer.warmup_iterations=3")
    tuner = finetuner("ft_ema", *extra)
    for done in range(2):
        tuner.run_iteration(batch(done, side=32))
        for adam in tuner.adams:
            assert adam.param_groups[0]["lr"] == pytest.approx(9e-6 * (done + 1) / 3)
    path = runs.save(
        tuner, tuner.adams, tmp_path, checkpoint.frozen_sha256(tuner.autoencoder.state_dict())
    )
    resumed = finetuner("ft_ema", *extra)
    checkpoint.restore(resumed, resumed.adams, weight_file.read(path))
    assert resumed.run_state.first_iteration == 7
    assert resumed.learning_rate == tuner.learning_rate == pytest.approx(9e-6)


def test_clipping_bounds_the_norm_and_says_that_it_acted(finetuner, batch):
    for most, acts in ((1e-3, 1.0), (1e9, 0.0)):
        tuner = finetuner("ft_ema", "adversarial.start_iteration=0", f"optimizer.clip_norm={most}")
        tuner.run_iteration(batch(side=32))
        networks = {"decoder": tuner.autoencoder, "discriminator": tuner.discriminator}
        for name, network in networks.items():
            gradients = [p.grad for p in network.parameters() if p.grad is not None]
            norm = float(torch.stack([g.norm() for g in gradients]).norm())
            assert float(tuner.metrics[f"{name}_clipped"]) == acts
            before = float(tuner.metrics[f"{name}_gradient_norm"])
            assert norm == pytest.approx(min(before, most), rel=1e-9)


def test_loss_terms_add_up_by_their_weights():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 2, 3, 8, 8, generator=generator, dtype=torch.float64)
    zero = torch.zeros((), dtype=torch.float64)

    def nll(**weights: float) -> float:
        given = {"l1_weight": 0.0, "mse_weight": 0.0} | weights
        return float(
            reconstruction_loss(
                x, y, zero, pixel="l1", perceptual_weight=0.0, logvar=zero, **given
            )[0]
        )

    parts = {"l1_weight": 0.5, "mse_weight": 2.0, "gradient_weight": 3.0}
    alone = [nll(**{name: weight}) for name, weight in parts.items()]
    assert alone[0] == pytest.approx(0.5 * float((x - y).abs().sum()) / 2)
    assert alone[1] == pytest.approx(2.0 * float((x - y).square().sum()) / 2)
    assert alone[2] == pytest.approx(3.0 * float(sobel(x - y).sum()) / 2)
    assert nll(**parts) == pytest.approx(sum(alone))
    assert all(value > 0 for value in alone)


def test_sobel_of_a_ramp_is_its_slope():
    ramp = (2.0 * torch.arange(6.0)).expand(1, 3, 5, 6)
    edges = sobel(ramp)
    assert edges.shape == ramp.shape
    assert torch.equal(edges[..., 1:-1, 1:-1], torch.full((1, 3, 3, 4), 2.0))
    assert edges[..., 0, :].abs().max() == 0


def test_terms_are_logged_and_described(finetuner, batch):
    extra = ("loss.l1_weight=0.5", "loss.mse_weight=1", "loss.gradient_weight=2")
    tuner = finetuner("ft_mse", *extra)
    tuner.run_iteration(batch(side=32))
    assert {"l1_loss", "mse_loss", "gradient_loss", "gradient_nll"} <= tuner.metrics.keys()
    assert tuner.config.loss.formula == "0.5 l1 + mse + 2 gradient"
    assert recipe("ft_mse").loss.formula == "mse"
    with pytest.raises(UsageError, match="every term has weight 0"):
        recipe("ft_mse", "loss.mse_weight=0", "loss.perceptual_weight=0")


def test_noise_reaches_the_decoder_alone(finetuner, batch):
    one = batch(side=32)
    plain, perturbed = finetuner("ft_mse"), finetuner("ft_mse", "latents.noise=0.4")
    clean, kl = plain.encode(plain.images(one), one, draw=0)
    noisy, same_kl = perturbed.encode(perturbed.images(one), one, draw=0)
    expected = 0.4 * clean.std(dim=(1, 2, 3), keepdim=True) * one.noise[-1]
    torch.testing.assert_close(noisy - clean, expected)
    assert torch.equal(kl, same_kl)


def test_its_draw_is_the_last_and_leaves_the_others():
    made = plain_batch(torch.zeros(2, 3, 32, 32), 1, 4, 8, (0, 1))
    more = made.with_perturbation((0, 1))
    assert more.noise.shape == (2, 2, 4, 4, 4)
    assert torch.equal(more.noise[:1], made.noise)
    deviations = more.noise[1].std(dim=(1, 2, 3))
    assert 0 < float(deviations.min()) < float(deviations.max()) < 1.3
    assert math.isfinite(float(deviations.sum()))
    assert configs.recipe("ft_mse").latents.noise == 0
