import pytest
import torch
from samples import load_discriminator
from torch import nn

from kl_f8_train.core.discriminator import Discriminator, initialize
from kl_f8_train.core.losses import generator_loss

BATCHNORMS = ("main.3", "main.6", "main.9")


@pytest.fixture(params=[16, 64])
def ndf(request):
    return request.param


def test_state_dict_is_the_originals(golden):
    state = Discriminator().state_dict()
    assert {k: list(v.shape) for k, v in state.items()} == golden.facts["discriminator_shapes"]


def test_parameter_count(golden):
    count = sum(p.numel() for p in Discriminator().parameters())
    assert count == golden.facts["discriminator_parameters"] == 2_765_633


def test_one_logit_per_patch():
    with torch.device("meta"):
        assert Discriminator()(torch.zeros(2, 3, 256, 256)).shape == (2, 1, 30, 30)


@torch.no_grad()
def test_logits_and_buffers(golden, ndf):
    network, images = load_discriminator(golden, ndf), golden.tensor("disc/x")
    golden.check(network.eval()(images), f"disc/ndf{ndf}.logits_eval_before")
    golden.check(network.train()(images), f"disc/ndf{ndf}.logits_train")
    state = network.state_dict()
    for layer in BATCHNORMS:
        for buffer in ("running_mean", "running_var"):
            name = f"{layer}.{buffer}"
            golden.check(state[name], f"disc/ndf{ndf}.after_train.{name}")
        assert state[f"{layer}.num_batches_tracked"] == 8  # 7 in the file
    golden.check(network.eval()(images), f"disc/ndf{ndf}.logits_eval_after")


def test_gradients(golden, ndf):
    network = load_discriminator(golden, ndf).train()
    images = golden.tensor("disc/x").requires_grad_()
    generator_loss(network(images)).backward()
    golden.check(network.main[0].weight.grad, f"disc/ndf{ndf}.grad_conv0_weight_of_minus_mean")
    if ndf == 16:  # the references hold the input's gradient for the small one
        golden.check(images.grad, "disc/ndf16.grad_input_of_minus_mean")


@pytest.fixture(scope="module")
def initialized():
    network = Discriminator()
    initialize(network, seed=0)
    return network.state_dict()


def test_initialize_has_the_originals_statistics(golden, initialized):
    for name, reference in golden.facts["discriminator_init"].items():
        values = initialized[name].double()
        spread = reference["std"]
        if name.endswith("main.0.bias"):  # torch's own uniform, 64 draws
            assert values.abs().max() <= 48**-0.5
            assert abs(values.std() - spread) < 0.02
        elif name == "main.11.bias":
            assert values.abs() <= (512 * 16) ** -0.5
        elif spread == 0.0:
            assert torch.all(values == reference["mean"]), name
        else:
            mean = round(reference["mean"])  # 0 for convolutions, 1 for norms
            error = 0.02 / values.numel() ** 0.5
            assert abs(values.mean() - mean) < 5 * error, name
            assert abs(values.std() - 0.02) < 4 * error, name


def test_initialize_draws_normal_values(initialized):
    z = initialized["main.8.weight"].double().flatten() / 0.02  # 2,097,152 draws
    assert abs((z.abs() < 1).double().mean() - 0.6827) < 0.002
    assert abs((z.abs() < 2).double().mean() - 0.9545) < 0.002
    assert z.abs().max() > 4.5


def test_initialize_follows_the_seed(initialized):
    again, other = Discriminator(), Discriminator()
    initialize(again, seed=0)
    initialize(other, seed=1)
    drawn = [k for k, m in again.named_modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    for name in (f"{layer}.weight" for layer in drawn):
        assert torch.equal(again.state_dict()[name], initialized[name])
        assert not torch.equal(other.state_dict()[name], initialized[name])
