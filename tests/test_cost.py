"""The computed cost against what torch counts, keeps and allocates."""

import pytest
import torch
from torch import nn

from kl_f8_train import config
from kl_f8_train.check import benchmark, cost
from kl_f8_train.core import perceptual
from kl_f8_train.core.discriminator import Discriminator
from kl_f8_train.core.model import AutoencoderKL
from kl_f8_train.weights import pretrained

FULL = ("model.ch=128", "data.crop=256")


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("ch", [32, 128])
def test_parameters_are_the_networks(tiny, ch):
    with torch.device("meta"):
        autoencoder, discriminator = AutoencoderKL(ch), Discriminator()
    counted = cost.parameters(tiny("ft_ema", f"model.ch={ch}"))
    assert counted["encoder"] == count(autoencoder.encoder) + count(autoencoder.quant_conv)
    assert counted["decoder"] == count(autoencoder.decoder) + count(autoencoder.post_quant_conv)
    assert counted["discriminator"] == count(discriminator)


def test_perceptual_parameters(vgg):
    for network in (vgg, pretrained.build("st_lpips_alex")):
        assert cost.PERCEPTUAL_PARAMETERS[network.name] == count(network)


def test_published_sizes(tiny):
    config = tiny("ft_ema", *FULL)
    assert cost.parameters(config)["decoder"] == 49_490_199
    assert cost.reduced_bytes(config) == 4 * (49_490_199 + 2_765_633)
    assert cost.state_bytes(config) / 2**30 == pytest.approx(1.15, abs=0.02)


def test_floor_lies_below_the_plain_arithmetic(tiny):
    """2437 and 2260 GFLOP were counted with a plain upsampling, and losses' gradients twice."""
    adversarial, mse = (tiny(recipe, *FULL) for recipe in ("ft_ema", "ft_mse"))
    assert cost.flops_per_image(adversarial) / 1e9 == pytest.approx(2022, abs=1)
    assert cost.flops_per_image(mse) / 1e9 == pytest.approx(1971, abs=1)
    plain = tiny("ft_mse", *FULL, "compute.subpixel_upsample=false")
    assert cost.flops_per_image(plain) / 1e9 == pytest.approx(2260, rel=1e-3)


@pytest.mark.parametrize(
    "extra", [(), ("data.crop=32", "model.ch_mult=[1,1]", "adversarial.n_layers=2")]
)
def test_the_demos_floor_is_what_its_iteration_takes(extra):
    """With ST-LPIPS, whose maps are not powers of two."""
    settings = config.load(config.find_recipe("demo"), [*extra, "compute.compile=false"])
    run = benchmark.iteration_of(benchmark.build_finetuner(settings, []), torch.device("cpu"))
    counted = benchmark.count_flops(run, next(benchmark._random_batches(settings, 1)))
    assert counted == pytest.approx(cost.flops_per_image(settings), rel=0.01)


class Kept:
    """Bytes of the tensors that torch keeps for a backward pass, networks' own left out."""

    def __init__(self, module: nn.Module) -> None:
        self.own = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self.storages: dict[int, int] = {}

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    def of(self, function, *arguments):
        with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor):
            self.result = function(*arguments)
        return sum(self.storages.values())


@pytest.mark.parametrize(
    ("levels", "subpixel"), [(0, "true"), (1, "true"), (4, "true"), (0, "false")]
)
def test_activations_are_what_torch_keeps(tiny, levels, subpixel):
    config = tiny(
        *("ft_ema", "model.ch=32", "data.crop=128"),
        f"compute.checkpoint_levels={levels}",
        f"compute.subpixel_upsample={subpixel}",
    )
    model = AutoencoderKL(ch=32)
    for level, part in enumerate(model.decoder.up):
        part.recompute = level < levels
        if level:
            part.upsample.subpixel = subpixel == "true"
    kept = Kept(model).of(model.decode, torch.zeros(1, 4, 16, 16))
    kernels = 4 * 16 * (128**2 * 2 + 64**2) if subpixel == "true" else 0
    computed = cost.activation_bytes(config, 1)
    assert kept - kernels == pytest.approx(computed, rel=0.02)


@pytest.mark.parametrize("name", ["lpips_vgg", "st_lpips_alex"])
def test_perceptual_activations_are_what_torch_keeps(name):
    network = perceptual.lpips_vgg({}) if name == "lpips_vgg" else pretrained.build("st_lpips_alex")
    network.float()
    images = torch.zeros(1, 3, 64, 64)
    kept = Kept(network).of(network, images, images.clone().requires_grad_())
    assert kept / 64**2 == pytest.approx(cost.PERCEPTUAL_BYTES[name], rel=0.1)


def test_memory_targets(tiny):
    """Batch 12 at 256: under 24 GB without and under 12 GB with checkpointing; computed."""
    for levels, limit in ((0, 24e9), (2, 12e9)):
        config = tiny("ft_ema", *FULL, "precision=bfloat16", f"compute.checkpoint_levels={levels}")
        assert cost.peak_bytes(config, 12) < limit
        assert cost.largest_batch(config, limit) >= 12
