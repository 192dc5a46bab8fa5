import copy
from functools import partial

import lpips
import pytest
import torch
from torch import nn

from kl_f8_train.core.losses import (
    PerceptualDistance,
    squared_differences,
    unit_length,
    unweighted,
)
from kl_f8_train.core.perceptual import Halving, Slices, lpips_vgg
from kl_f8_train.weights import pretrained

PAIRS = ("sq", "rect", "flat", "small")  # 64x64, 80x112, constant images, 32x32


@pytest.mark.parametrize("pair", PAIRS)
@torch.no_grad()
def test_lpips_is_the_originals(golden, vgg, pair):
    distance = vgg(golden.tensor(f"lpips/{pair}.x"), golden.tensor(f"lpips/{pair}.y"))
    golden.check(distance, f"lpips/{pair}.lpips_taming")


@pytest.mark.parametrize("pair", PAIRS)
@torch.no_grad()
def test_psim_is_pnet(golden, vgg, pair):
    x, y = (vgg.features(golden.tensor(f"lpips/{pair}.{name}")) for name in "xy")
    psim = unweighted(squared_differences(x, y))
    torch.testing.assert_close(psim, golden.tensor(f"lpips/{pair}.pnet"), rtol=0, atol=1e-6)


def test_lpips_gradient(golden, vgg):
    y = golden.tensor("lpips/small.y").requires_grad_()
    vgg(golden.tensor("lpips/small.x"), y).sum().backward()
    golden.check(y.grad, "lpips/small.grad_y_of_sum_lpips")


def test_train_changes_nothing(golden, vgg):
    assert vgg.train() is vgg
    assert not any(module.training for module in vgg.modules())
    with torch.no_grad():
        distance = vgg(golden.tensor("lpips/small.x"), golden.tensor("lpips/small.y"))
    golden.check(distance, "lpips/small.lpips_taming")


def test_nothing_is_trainable(vgg):
    parameters = dict(vgg.named_parameters())
    assert len(parameters) == 26 + 5  # VGG16's features and the heads
    assert not any(p.requires_grad for p in parameters.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unit_length_is_lpipss_where_there_are_features(dtype):
    torch.manual_seed(0)
    ours = torch.randn(2, 8, 4, 4, dtype=dtype, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    for features, function in ((ours, unit_length), (theirs, lpips.normalize_tensor)):
        function(features).pow(3).sum().backward()
    assert torch.equal(unit_length(ours), lpips.normalize_tensor(theirs))
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_unit_length_has_zero_gradient_at_zero():
    torch.manual_seed(0)
    features = torch.randn(1, 8, 2, 2)
    features[:, :, 0, 0] = 0.0
    features.requires_grad_()
    unit = unit_length(features)
    unit.sum().backward()
    assert torch.all(unit[:, :, 0, 0] == 0)
    assert torch.all(features.grad[:, :, 0, 0] == 0)
    assert torch.isfinite(features.grad).all()
    assert features.grad[:, :, 1, 1].abs().sum() > 0


def test_dead_features_leave_a_finite_gradient():
    torch.manual_seed(0)
    alive, dead = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
    nn.init.constant_(dead.bias, -100.0)
    trunk = Slices([nn.Sequential(alive, nn.ReLU()), nn.Sequential(dead, nn.ReLU())])
    network = PerceptualDistance("test", nn.Identity(), trunk, [torch.ones(1, 4, 1, 1)] * 2)
    images, y = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8, requires_grad=True)
    network(images, y).sum().backward()
    assert torch.isfinite(y.grad).all()
    assert y.grad.abs().sum() > 0


def test_only_the_reconstruction_gets_a_gradient(golden, vgg):
    x, y = (golden.tensor(f"lpips/small.{name}").requires_grad_() for name in "xy")
    vgg(x, y).sum().backward()
    assert x.grad is None
    assert y.grad.abs().sum() > 0


def gradient_of(network, x, y, **options):
    y = y.clone().requires_grad_()
    distance = network(x, y, **options)
    assert distance.dtype == torch.float32
    return distance.detach(), torch.autograd.grad(distance.sum(), y)[0]


def test_bfloat16_is_in_the_convolutions_alone(golden, monkeypatch):
    """Off unless asked for; its gradient then points the same way, but for rounding."""
    network = pretrained.build("st_lpips_alex")
    x, y = (golden.tensor(f"lpips/sq.{name}").float() for name in "xy")
    exact, exact_gradient = gradient_of(network, x, y)
    same, same_gradient = gradient_of(network, x, y, precision="float32")
    assert torch.equal(same, exact)
    assert torch.equal(same_gradient, exact_gradient)
    types = []
    for part in network.trunk.parts:
        part.register_forward_hook(lambda module, inputs, output: types.append(output.dtype))
    rough, gradient = gradient_of(network, x, y, precision="bfloat16")
    assert set(types) == {torch.bfloat16}
    torch.testing.assert_close(rough, exact, rtol=0.02, atol=0)
    assert 0 < 1 - torch.cosine_similarity(gradient.flatten(), exact_gradient.flatten(), 0) < 0.05
    assert {part.dtype for part in network.layers(x, "bfloat16")} == {torch.float32}


@pytest.mark.parametrize("name", ["vgg", "st_lpips_alex"])
@pytest.mark.parametrize("pair", PAIRS)
def test_what_is_compiled_is_the_same(golden, monkeypatch, vgg, name, pair):
    """A sum over channels for a convolution, lengths computed twice, a halving that gathers."""
    network = vgg if name == "vgg" else pretrained.build(name)
    network = copy.deepcopy(network).double()
    x, y = (golden.tensor(f"lpips/{pair}.{name}").double().requires_grad_() for name in "xy")
    plain = network(x, y)
    (gradient,) = torch.autograd.grad(plain.sum(), y)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    compiled = network(x, y)
    torch.testing.assert_close(compiled, plain, rtol=1e-12, atol=1e-15)
    (found,) = torch.autograd.grad(compiled.sum(), y)
    assert (found - gradient).norm() <= 1e-12 * gradient.norm()


@pytest.mark.parametrize("shape", [(2, 3, 8, 6), (1, 2, 7, 6), (1, 2, 6, 7), (2, 1, 2, 2)])
def test_halving_is_the_largest_of_four_and_the_first_of_equal_ones(monkeypatch, shape):
    torch.manual_seed(0)
    x = torch.randint(0, 3, shape).double().requires_grad_()
    plain = torch.nn.functional.max_pool2d(x, 2)
    seed = torch.randn_like(plain)
    (gradient,) = torch.autograd.grad(plain, x, seed)
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", partial(bool, compiling))
        halved = Halving()(x)
        assert torch.equal(halved, plain)
        assert torch.equal(torch.autograd.grad(halved, x, seed)[0], gradient)


@torch.no_grad()
def test_autocast_is_switched_off_inside(golden, vgg_file):
    network = lpips_vgg(*pretrained.vgg_features(vgg_file))
    x, y = (golden.tensor(f"lpips/small.{name}").float() for name in "xy")
    plain = network(x, y)
    squared = squared_differences(network.features(x), network.features(y))  # as scores are taken
    apart = network.weighted(squared)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network(x, y), plain)
        assert torch.equal(network.weighted(squared), apart)
