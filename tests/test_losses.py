"""The pure loss functions on the reference reconstruction.

Three reference cases are left out: `.weights` (weights per sample: nothing sets them in training),
`.vanilla` (a loss the recipes do not use) and `.val` (the original's validation pass, whose
adaptive weight is 0 for want of gradients; we evaluate with metrics instead).
"""

import json
from pathlib import Path

import pytest
import torch

from kl_f8_train.core.losses import (
    adaptive_weight,
    adversarial_factor,
    discriminator_loss,
    generator_loss,
    reconstruction_loss,
)

CASES = json.loads((Path(__file__).parent / "golden/facts.json").read_text())["loss_cases"]
DECODER_CASES = [name for name, case in CASES.items() if case["idx"] == 0]
DISCRIMINATOR_CASES = [name for name, case in CASES.items() if case["idx"] == 1]
VARIANTS = ("standin.A.lavinal_sum", "vgg.A.lavinal_sum")


def close(actual, expected):
    return float(actual) == pytest.approx(expected, rel=1e-10)


def started(case):
    """Iteration and start; the original's disc_factor 0 is a start that has not come."""
    return case["gs"], 50_001 if case["disc_factor"] else case["gs"] + 1


@pytest.mark.parametrize("name", DECODER_CASES)
def test_reconstruction_loss(golden, request, name):
    case, values = CASES[name], CASES[name]["values"]
    x, y = golden.tensor("ae/x"), golden.tensor("ae/dec")
    with torch.no_grad():
        distance = request.getfixturevalue(case["perc"])(x, y)
    golden.check(distance.flatten(), f"loss/{name}.p_loss_per_sample")
    logvar = torch.tensor(case["logvar"], dtype=torch.float64, requires_grad=True)
    nll, terms = reconstruction_loss(
        x, y, distance, pixel="l1", perceptual_weight=case["pw"], logvar=logvar
    )
    assert close(nll, values["nll_loss"])
    assert close(terms["nll_loss"], values["nll_loss"])
    assert close(terms["reconstruction_loss"], values["rec_loss"])
    assert close(terms["pixel_loss"], values["l1_mean"])
    assert close(terms["perceptual_loss"], float(distance.mean()))
    nll.backward()
    golden.check(logvar.grad, f"loss/{name}.grad.loss.logvar")


@pytest.mark.parametrize("name", DECODER_CASES)
def test_adversarial_term(golden, discriminator, name):
    case, values = CASES[name], CASES[name]["values"]
    for parameter in discriminator.main[-1].parameters():
        parameter.data *= case["d_last_scale"]
    with torch.no_grad():
        g = generator_loss(discriminator.train()(golden.tensor("ae/dec")))
    check_buffers(golden, discriminator, name)
    assert close(g, values["g_loss"])
    norms = (
        torch.tensor([values[f"{key}_grad_norm"]], dtype=torch.float64) for key in ("nll", "g")
    )
    weight = 0.5 * adaptive_weight(*norms)
    if case["disc_factor"]:  # with disc_factor 0 the original logs 0 without computing it
        assert close(weight, values["d_weight"])
    factor = adversarial_factor(*started(case))
    assert factor == values["disc_factor"]
    total = values["nll_loss"] + weight * factor * g + 1e-6 * values["kl_loss"]
    assert close(total, values["total_loss"])


@pytest.mark.parametrize("name", DISCRIMINATOR_CASES)
def test_discriminator_loss(golden, discriminator, name):
    case, values = CASES[name], CASES[name]["values"]
    real = discriminator.train()(golden.tensor("ae/x"))
    fake = discriminator(golden.tensor("ae/dec"))
    check_buffers(golden, discriminator, name)
    assert close(real.mean(), values["logits_real"])
    assert close(fake.mean(), values["logits_fake"])
    loss = adversarial_factor(*started(case)) * discriminator_loss(real, fake)
    assert close(loss, values["disc_loss"])
    loss.backward()
    parameters = dict(discriminator.named_parameters())
    for key in ("main.0.weight", "main.11.bias"):
        golden.check(parameters[key].grad, f"loss/{name}.grad.loss.discriminator.{key}")


def check_buffers(golden, discriminator, name):
    state = discriminator.state_dict()
    for buffer in ("main.3.running_mean", "main.9.running_var"):
        golden.check(state[buffer], f"loss/{name}.bn_after.{buffer}")
    assert state["main.3.num_batches_tracked"] == CASES[name]["num_batches_tracked_after"]


def test_hinge_and_generator_loss_on_stored_logits(golden):
    real, fake = golden.tensor("disc/gan.logits_real"), golden.tensor("disc/gan.logits_fake")
    assert close(discriminator_loss(real, fake), golden.facts["gan"]["hinge"])
    assert close(generator_loss(fake), golden.facts["gan"]["g_loss(-mean fake)"])


def test_adversarial_factor_is_1_from_the_start_iteration_on(golden):
    for key, factor in golden.facts["adopt_weight"].items():
        iteration, start = (int(part.split("=")[1]) for part in key.split(","))
        assert adversarial_factor(iteration, start) == factor


def test_adaptive_weight_clamps_before_it_is_scaled():
    large, none = torch.full((3, 4), 1e6), torch.zeros(3, 4)
    assert adaptive_weight(large, none) == 1e4
    assert adaptive_weight(large, none, maximum=5.0) == 5.0
    assert adaptive_weight(none, large) == 0.0
    assert CASES["standin.above.opt0.dweight_clamped"]["values"]["d_weight"] == 0.5 * 1e4


def test_adaptive_weight_is_detached():
    nll, g = (torch.ones(3, requires_grad=True) for _ in range(2))
    assert not adaptive_weight(nll, g).requires_grad


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_mse_with_perceptual_weight_01(golden, request, name):
    values = golden.facts["variant_b"][name]
    x, y = golden.tensor("ae/x"), golden.tensor("ae/dec")
    distance = request.getfixturevalue(name.split(".")[0])(x, y)
    logvar = torch.zeros((), dtype=torch.float64)
    nll, terms = reconstruction_loss(
        x, y, distance, pixel="mse", perceptual_weight=0.1, logvar=logvar
    )
    assert close(nll, values["loss/nll"])
    assert close(terms["reconstruction_loss"], values["loss/rec"])
    assert close(terms["perceptual_loss"], values["loss/p"])


@pytest.mark.parametrize("pixel", ["L1", "l2", "", None])
def test_another_pixel_term_is_refused(pixel):
    x = torch.zeros(2, 3, 8, 8)
    options = {"perceptual_weight": 1.0, "logvar": torch.zeros(())}
    with pytest.raises(ValueError, match=f"pixel={pixel!r}: expected l1 or mse"):
        reconstruction_loss(x, x, torch.zeros(2, 1, 1, 1), pixel=pixel, **options)


def test_a_distance_for_each_image_is_not_broadcast_over_columns():
    x, distance = torch.zeros(8, 3, 4, 8), torch.arange(8.0, requires_grad=True)
    options = {"pixel": "l1", "perceptual_weight": 1.0, "logvar": torch.zeros(())}
    nll, _ = reconstruction_loss(x, x, distance, **options)
    column, _ = reconstruction_loss(x, x, distance.view(8, 1, 1, 1), **options)
    assert nll == column == 28 * 3 * 4 * 8 / 8
