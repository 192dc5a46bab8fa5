import diffusers
import pytest
import torch

from kl_f8_train.core.model import AutoencoderKL, Posterior
from kl_f8_train.weights import names


def test_state_dict_of_the_full_network_is_the_originals(golden):
    with torch.device("meta"):
        state = AutoencoderKL().state_dict()
    assert len(state) == 248
    assert {k: list(v.shape) for k, v in state.items()} == golden.facts["autoencoder_shapes"]


@pytest.mark.parametrize(
    ("part", "count"),
    [
        ("encoder", 34_163_592),
        ("quant_conv", 72),
        ("decoder", 49_490_179),
        ("post_quant_conv", 20),
    ],
)
def test_parameter_counts(golden, part, count):
    with torch.device("meta"):
        module = getattr(AutoencoderKL(), part)
    assert sum(p.numel() for p in module.parameters()) == count
    assert golden.facts["parameters"][part] == count


@torch.no_grad()
def test_encoder(golden, autoencoder):
    hidden = autoencoder.encoder(golden.tensor("ae/x"))
    golden.check(hidden, "ae/encoder_out")
    golden.check(autoencoder.quant_conv(hidden), "ae/moments")


@torch.no_grad()
def test_posterior(golden, autoencoder):
    posterior = autoencoder.encode(golden.tensor("ae/x"))
    golden.check(posterior.mean, "ae/mean")
    golden.check(posterior.logvar, "ae/logvar")
    golden.check(posterior.sample(golden.tensor("ae/eps")), "ae/z")
    golden.check(posterior.kl(), "ae/kl")


def test_posterior_clamps_the_log_variance(golden):
    moments = golden.tensor("ae/posterior_edge.params")
    assert moments.min() < -30
    assert moments.max() > 20
    posterior = Posterior.from_moments(moments)
    std = posterior.sample(torch.ones_like(posterior.mean)) - posterior.mean
    for name, value in {"mean": posterior.mean, "logvar": posterior.logvar, "std": std}.items():
        expected = golden.tensor(f"ae/posterior_edge.{name}")
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-15, msg=name)
    expected = golden.tensor("ae/posterior_edge.kl")
    torch.testing.assert_close(posterior.kl(), expected, rtol=1e-12, atol=0)


@torch.no_grad()
def test_decoder(golden, autoencoder):
    latents = golden.tensor("ae/z")
    golden.check(autoencoder.post_quant_conv(latents), "ae/post_quant")
    golden.check(autoencoder.decode(latents), "ae/dec")
    golden.check(autoencoder.decode(golden.tensor("ae/mean")), "ae/dec_mode")


def test_last_layer(autoencoder):
    assert autoencoder.last_layer is dict(autoencoder.named_parameters())["decoder.conv_out.weight"]


def test_frozen_parts_stay_in_eval(autoencoder):
    autoencoder.freeze_encoder().train()
    training = {name: m.training for name, m in autoencoder.named_modules() if name}
    frozen = {n for n in training if n.split(".")[0] in ("encoder", "quant_conv")}
    assert not any(training[name] for name in frozen)
    assert all(training[name] for name in training.keys() - frozen)


@torch.no_grad()
def test_diffusers_autoencoder_agrees(golden, autoencoder):
    autoencoder.float()
    theirs = diffusers.AutoencoderKL(
        block_out_channels=[32, 64, 128, 128],
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2,
        latent_channels=4,
    ).eval()
    theirs.load_state_dict(names.to_diffusers(autoencoder.state_dict()))
    images, latents = golden.tensor("ae/x").float(), golden.tensor("ae/z").float()
    ours, posterior = autoencoder.encode(images), theirs.encode(images).latent_dist
    torch.testing.assert_close(ours.mean, posterior.mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.logvar, posterior.logvar, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        autoencoder.decode(latents), theirs.decode(latents).sample, rtol=0, atol=1e-5
    )
