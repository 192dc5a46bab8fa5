"""Iterations against the original's: gradients, five steps, and who may move when.

The references of the original's own order (`i.*`: a second forward pass for the discriminator,
which also runs before its start) and of the default shared pass (`ii.*`) are both reproduced; the
one in which the encoder trains too is not.
"""

import contextlib
import copy
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from lightning_fabric.utilities.optimizer import _optimizer_to_device

from kl_f8_train.core.batch import Batch
from kl_f8_train.core.discriminator import Discriminator
from kl_f8_train.core.losses import generator_loss
from kl_f8_train.core.model import AutoencoderKL
from kl_f8_train.core.step import Finetuner, trained_part
from kl_f8_train.errors import RunFailedError

FACTS = json.loads((Path(__file__).parent / "golden/facts.json").read_text())
CASES, RUNS = FACTS["loss_cases"], FACTS["train"]
DECODER_GRADIENTS = ("decoder.conv_out.weight", "decoder.conv_in.weight", "post_quant_conv.weight")
BEFORE_START = "adversarial.run_before_start=true"
SWITCHES = (  # each off where the recipe has it on, and the other way round
    "compute.channels_last=true",
    "compute.subpixel_upsample=false",
    "compute.lean_norm=false",
    "compute.perceptual_parts=1",
    "compute.checkpoint_levels=4",
    "compute.per_device_batch=1",
)
AS_COMPILED = "as compiled"  # the formulas that only the compiler sees, in plain torch
NAMES = {  # ours -> the original's
    "nll_loss": "nll_loss",
    "reconstruction_loss": "rec_loss",
    "generator_loss": "g_loss",
    "adaptive_weight": "d_weight",  # both include the factor 0.5
    "adversarial_factor": "disc_factor",
    "discriminator_loss": "disc_loss",
    "logits_real": "logits_real",
    "logits_fake": "logits_fake",
    "kl_loss": "kl_loss",
}


@pytest.fixture
def overrides_of(monkeypatch):
    """overrides_of(switch): a switch as overrides, or switched on here."""

    def build(switch):
        if switch == AS_COMPILED:  # but for Adam, which is not compiled, and in torch 2.6 asks
            monkeypatch.setattr(torch.compiler, "is_compiling", lambda: not called_by_torch())
        return [] if switch in (None, AS_COMPILED) else [switch]

    return build


def called_by_torch():
    return sys._getframe(2).f_globals["__name__"].startswith("torch.")


def iterate(finetuner, *batches):
    """Runs an iteration on each batch; the last one's gradients stay in place."""
    for one in batches:
        finetuner.run_iteration(one)
    return finetuner


def snapshot(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def unchanged(module, before):
    return all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def gradients(module):
    return {k: p.grad.clone() for k, p in module.named_parameters() if p.grad is not None}


@pytest.fixture
def reference_batch(golden):
    """The images and noise of the loss references."""
    return Batch(golden.tensor("ae/x"), golden.tensor("ae/eps")[None], ["a", "b"], [])


# --- gradients of one iteration ---------------------------------------------------------------


FIRST = [name for name, case in CASES.items() if case["idx"] == 0]
ACTIVE = next(name for name in FIRST if CASES[name]["disc_factor"])


@pytest.mark.parametrize(
    ("name", "switch"),
    [*((name, None) for name in FIRST), *((ACTIVE, switch) for switch in (*SWITCHES, AS_COMPILED))],
)
def test_gradients_of_the_adversarial_recipe(
    golden, finetuner, reference_batch, request, overrides_of, name, switch
):
    case, values = CASES[name], CASES[name]["values"]
    start = case["gs"] + 1 if case["disc_factor"] == 0 else 50_001
    tuner = finetuner(
        "ft_ema",
        f"init.iteration={case['gs']}",
        f"adversarial.start_iteration={start}",
        f"loss.perceptual_weight={case['pw']}",
        *(BEFORE_START, "loss.learn_logvar=true", *overrides_of(switch)),
        perceptual=request.getfixturevalue(case["perc"]),
    )
    tuner.logvar.data.fill_(case["logvar"])
    for parameter in tuner.discriminator.main[-1].parameters():
        parameter.data *= case["d_last_scale"]
    iterate(tuner, reference_batch)

    parameters = dict(tuner.autoencoder.named_parameters())
    for key in DECODER_GRADIENTS:
        golden.check(parameters[key].grad, f"loss/{name}.grad.{key}")
    golden.check(tuner.logvar.grad, f"loss/{name}.grad.loss.logvar")
    both = dict(values)
    if case["disc_factor"] == 0:
        del both["d_weight"]  # the original logs 0 without computing it
    partner = name.replace("opt0", "opt1")  # the discriminator's half of the same case
    if partner in CASES:
        both |= CASES[partner]["values"]
        discriminator = dict(tuner.discriminator.named_parameters())
        for key in ("main.0.weight", "main.11.bias"):
            reference = f"loss/{partner}.grad.loss.discriminator.{key}"
            golden.check(discriminator[key].grad, reference)
    for ours, theirs in NAMES.items():
        if theirs in both:
            assert float(tuner.metrics[ours]) == pytest.approx(both[theirs], rel=1e-9), ours
    clamped = float(tuner.metrics["adaptive_weight_clamped"])
    assert clamped == float(name.endswith("dweight_clamped"))


@pytest.mark.parametrize(
    ("net", "switch"),
    [*((net, None) for net in ("standin", "vgg")), *(("vgg", s) for s in (*SWITCHES, AS_COMPILED))],
)
def test_gradients_of_the_mse_recipe(
    golden, finetuner, reference_batch, request, overrides_of, net, switch
):
    network = request.getfixturevalue(net)
    tuner = finetuner("ft_mse", *overrides_of(switch), perceptual=network)
    iterate(tuner, reference_batch)
    name = f"{net}.A.lavinal_sum"
    values = golden.facts["variant_b"][name]
    assert float(tuner.metrics["nll_loss"]) == pytest.approx(values["loss/nll"], rel=1e-10)
    parameters = dict(tuner.autoencoder.named_parameters())
    for key in ("decoder.conv_out.weight", "post_quant_conv.weight"):
        golden.check(parameters[key].grad, f"variant_b/{name}.grad.{key}")


# --- five steps -------------------------------------------------------------------------------


def check_step(golden, tuner, run, step):
    """Compares parameters, EMA, buffers and figures after `step` steps of `run`."""
    prefix = f"train/{run}.step{step}"
    states = {
        f"{prefix}.param.": tuner.autoencoder.state_dict(),
        f"{prefix}.param.loss.discriminator.": tuner.discriminator.state_dict(),
        f"{prefix}.ema.": tuner.ema.state_dict(),
        f"{prefix}.bn.": tuner.discriminator.state_dict(),
    }
    references = {
        f"{start}{key}": value
        for start, state in states.items()
        for key, value in state.items()
        if f"{start}{key}" in golden.facts["tolerances"]
    }
    assert len(references) == (14 if step == 5 else 13)
    for name, value in references.items():
        golden.check(value, name)
    logged = RUNS[run]["steps"][step - 1]
    for ours, theirs in NAMES.items():
        actual = float(tuner.metrics[ours])
        assert actual == pytest.approx(logged[theirs], rel=1e-9, abs=1e-12), ours
    count = tuner.discriminator.main[3].num_batches_tracked
    assert int(count) == logged["num_batches_tracked"]


def original_order(run):
    """Overrides for a reference run."""
    return [
        f"init.iteration={run['start']}",
        f"adversarial.start_iteration={run['disc_start']}",
        f"optimizer.learning_rate={run['learning_rate']}",
        f"second_forward={str(run['variant'] == 'i').lower()}",
        "ema.warmup=true",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "switch"),
    [
        *((name, None) for name in RUNS),
        *(("ii.active", switch) for switch in (*SWITCHES, AS_COMPILED)),
    ],
)
def test_five_steps_are_the_originals(golden, finetuner, batch, overrides_of, name, switch):
    switches = overrides_of(switch)
    tuner = finetuner("ft_ema", *original_order(RUNS[name]), BEFORE_START, *switches)
    for step in range(5):
        tuner.run_iteration(batch(step))
        check_step(golden, tuner, name, step + 1)
    assert tuner.iteration == RUNS[name]["start"] + 5
    assert tuner.ema_updates == 5


@pytest.mark.slow
def test_skipping_the_discriminator_before_its_start_is_told_apart(golden, finetuner, batch):
    """Adam's step count and the buffers differ after the start; the decoder's first steps do not.

    That is the default: cheaper, and not the original's.
    """
    name = "ii.cross"
    tuner = finetuner("ft_ema", *original_order(RUNS[name]))
    for step in range(3):
        tuner.run_iteration(batch(step))
        assert ("generator_loss" in tuner.metrics) == (step == 2)
        weight = tuner.autoencoder.last_layer
        golden.check(weight, f"train/{name}.step{step + 1}.param.decoder.conv_out.weight")
    assert int(tuner.discriminator.main[3].num_batches_tracked) == 7 + 3
    key = f"train/{name}.step3.param.loss.discriminator.main.0.weight"
    distance = (tuner.discriminator.main[0].weight - golden.tensor(key)).abs().max()
    assert distance > 1e-7  # tolerance of the reference: 1e-9


# --- each term alone --------------------------------------------------------------------------


def plain_gradient(autoencoder, batch, term):
    """d term(y) / d (last layer) by one plain backward pass; draw 0 of the noise."""
    posterior = autoencoder.encode(batch.images)
    y = autoencoder.decode(posterior.sample(batch.noise[0]))
    (gradient,) = torch.autograd.grad(term(y), autoencoder.last_layer)
    return gradient


def check_share(with_term, without_term, expected):
    """The term's share of the gradient is as expected, and not zero."""
    scale = float(expected.abs().max())
    assert scale > 0
    torch.testing.assert_close(with_term - without_term, expected, rtol=0, atol=1e-9 * scale)


def last_layer_gradient(build, batch, autoencoder, discriminator, *overrides):
    """The last layer's gradient in one iteration from the same start, and the figures."""
    states = snapshot(autoencoder), snapshot(discriminator)
    tuner = iterate(build("ft_ema", *overrides), batch)
    gradient = autoencoder.last_layer.grad.clone()
    assert not torch.equal(autoencoder.last_layer, states[0]["decoder.conv_out.weight"])
    autoencoder.load_state_dict(states[0])
    discriminator.load_state_dict(states[1])
    return gradient, tuner.metrics


@pytest.mark.parametrize("pixel", ["l1", "mse"])
def test_pixel_term_moves_the_decoder(autoencoder, discriminator, finetuner, batch, pixel):
    x = batch(side=32).images

    def term(y):  # sum over pixels, mean over the two images
        return ((x - y).abs() if pixel == "l1" else (x - y).square()).sum() / 2

    expected = plain_gradient(autoencoder, batch(side=32), term)
    overrides = (f"loss.pixel={pixel}", "loss.perceptual_weight=0", "adversarial=null")
    alone, _ = last_layer_gradient(
        finetuner, batch(side=32), autoencoder, discriminator, *overrides
    )
    check_share(alone, 0.0, expected)


def test_perceptual_term_moves_the_decoder(autoencoder, discriminator, finetuner, batch, standin):
    def term(y):  # once per pixel and channel, mean over the two images
        return 3 * 32 * 32 * standin(batch(side=32).images, y).sum() / 2

    expected = plain_gradient(autoencoder, batch(side=32), term)
    parts = autoencoder, discriminator, "adversarial=null"
    full, _ = last_layer_gradient(finetuner, batch(side=32), *parts, "loss.perceptual_weight=1")
    without, _ = last_layer_gradient(finetuner, batch(side=32), *parts, "loss.perceptual_weight=0")
    check_share(full, without, expected)


def test_adversarial_term_moves_the_decoder(autoencoder, discriminator, finetuner, batch):
    expected = plain_gradient(
        autoencoder, batch(side=32), lambda y: generator_loss(discriminator(y))
    )
    discriminator.zero_grad()
    parts = autoencoder, discriminator
    full, metrics = last_layer_gradient(
        finetuner, batch(side=32), *parts, "adversarial.start_iteration=0"
    )
    without, _ = last_layer_gradient(
        finetuner, batch(side=32), *parts, "adversarial.start_iteration=1"
    )
    assert metrics["adaptive_weight"] > 0
    check_share(full, without, metrics["adaptive_weight"] * expected)


# --- who moves, and who does not --------------------------------------------------------------


def test_decoder_pass_leaves_no_gradient_elsewhere(finetuner, batch):
    tuner = finetuner("ft_ema", "adversarial.start_iteration=0")
    update, seen = tuner.adversary.update, []

    def record(*arguments):
        seen.append(gradients(tuner.discriminator))
        return update(*arguments)

    tuner.adversary.update = record
    iterate(tuner, batch(side=32))
    assert seen == [{}]
    assert gradients(tuner.ema) == {}
    moved = {key.split(".")[0] for key in gradients(tuner.autoencoder)}
    assert moved == {"decoder", "post_quant_conv"}
    assert tuner.logvar.grad is None


@pytest.mark.parametrize("second_forward", ["true", "false"])
def test_discriminator_pass_leaves_no_gradient_in_the_decoder(finetuner, batch, second_forward):
    tuner = finetuner("ft_ema", "adversarial.start_iteration=0", f"second_forward={second_forward}")
    tuner.run_state.warmup_left = 1
    tuner.run_warm_up(batch(side=32))
    assert gradients(tuner.autoencoder) == {}
    assert len(gradients(tuner.discriminator)) == len(list(tuner.discriminator.parameters()))


def test_frozen_parts_never_move(finetuner, batch):
    tuner = finetuner("ft_ema", "optimizer.learning_rate=0.1", "adversarial.start_iteration=0")
    frozen = {"encoder": tuner.autoencoder.encoder, "quant_conv": tuner.autoencoder.quant_conv}
    before = {name: snapshot(part) for name, part in frozen.items()}
    trained = snapshot(tuner.autoencoder.decoder)
    iterate(tuner, batch(0, side=32), batch(1, side=32))
    assert not unchanged(tuner.autoencoder.decoder, trained)
    for name, part in frozen.items():
        assert unchanged(part, before[name])
        assert gradients(part) == {}
    tuner.train()
    assert not any(m.training for part in frozen.values() for m in part.modules())
    assert all(m.training for m in tuner.autoencoder.decoder.modules())


def test_optimizers_own_the_trained_parts_only(finetuner):
    tuner = finetuner()
    decoder, adversary = (o.param_groups[0] for o in tuner.adams)
    assert sum(p.numel() for p in decoder["params"]) == sum(
        p.numel()
        for name in ("decoder", "post_quant_conv")
        for p in getattr(tuner.autoencoder, name).parameters()
    )
    assert sum(p.numel() for p in adversary["params"]) == 2_765_633
    for group in (decoder, adversary):
        settings = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
        assert settings == {"lr": 9e-6, "betas": (0.5, 0.9), "eps": 1e-8, "weight_decay": 0}


def test_learned_logvar_moves_and_the_originals_does_not(finetuner, batch):
    fixed = iterate(finetuner("ft_mse"), batch(side=32))
    assert float(fixed.logvar.detach()) == 0.0
    learned = iterate(finetuner("ft_mse", "loss.learn_logvar=true"), batch(side=32))
    assert abs(float(learned.logvar.detach())) == pytest.approx(9e-6, rel=1e-3)  # Adam's first step


@pytest.mark.parametrize("recipe", ["ft_mse", "ft_ema"])
def test_two_micro_batches_equal_the_whole_batch(
    autoencoder, discriminator, finetuner, batch, recipe
):
    starts = [(network, snapshot(network)) for network in (autoencoder, discriminator)]
    results = []
    for micro_batch in (2, 1):
        for network, start in starts:
            network.load_state_dict(start)
        extra = ["adversarial.start_iteration=0"] if recipe == "ft_ema" else []
        tuner = finetuner(recipe, f"compute.per_device_batch={micro_batch}", *extra)
        iterate(tuner, batch(side=32))
        moved = gradients(autoencoder) | {f"d.{k}": g for k, g in gradients(discriminator).items()}
        results.append((moved, snapshot(tuner.ema), dict(tuner.metrics)))
    (whole, ema, figures), (parts, ema_of_parts, figures_of_parts) = results
    assert whole.keys() == parts.keys()
    for key, value in whole.items():
        atol = 1e-10 * max(1.0, float(value.abs().max()))
        torch.testing.assert_close(parts[key], value, rtol=0, atol=atol, msg=key)
    for key, value in ema.items():
        torch.testing.assert_close(ema_of_parts[key], value, rtol=0, atol=1e-10, msg=key)
    for key, value in figures.items():
        assert float(figures_of_parts[key]) == pytest.approx(float(value), rel=1e-10), key


def test_warm_up_trains_the_discriminator_alone(finetuner, batch):
    tuner = finetuner("ft_ema", "adversarial.warmup_iterations=3", "init.iteration=60000")
    tuner.run_state.warmup_left = 3
    kept = {"autoencoder": tuner.autoencoder, "ema": tuner.ema}
    before = {name: snapshot(module) for name, module in kept.items()}
    optimizers = tuner.adams
    for left in (2, 1, 0):
        adversary = tuner.discriminator.main[0].weight.detach().clone()
        tuner.run_warm_up(batch(left, side=32))
        assert tuner.warmup_left == left
        assert not torch.equal(tuner.discriminator.main[0].weight, adversary)
        assert all(unchanged(module, before[name]) for name, module in kept.items())
        assert (tuner.iteration, tuner.ema_updates) == (60_000, 0)
        assert optimizers[0].state == {}
    tuner.run_iteration(batch(0, side=32))
    assert (tuner.iteration, tuner.ema_updates) == (60_001, 1)
    assert not unchanged(tuner.autoencoder.decoder, trained_before(before["autoencoder"]))


def trained_before(state):
    return {k.removeprefix("decoder."): v for k, v in state.items() if k.startswith("decoder.")}


def test_warm_up_trains_before_the_start_iteration_too(finetuner, batch):
    tuner = finetuner("ft_ema", "adversarial.start_iteration=50001")
    tuner.run_state.warmup_left = 1
    before = tuner.discriminator.main[0].weight.detach().clone()
    tuner.run_warm_up(batch(side=32))
    assert not torch.equal(tuner.discriminator.main[0].weight, before)


def test_ema_starts_at_the_imported_weights_and_keeps_them(finetuner, batch):
    tuner = finetuner("ft_mse", "ema.decay=0.75")
    start = tuner.autoencoder.last_layer.detach().clone()
    assert torch.equal(tuner.ema["decoder"].conv_out.weight, start)
    iterate(tuner, batch(side=32))
    expected = 0.75 * start + 0.25 * tuner.autoencoder.last_layer.detach()
    torch.testing.assert_close(tuner.ema["decoder"].conv_out.weight, expected, rtol=0, atol=1e-14)
    assert not torch.equal(tuner.ema["decoder"].conv_out.weight, start)


# --- updates that are not finite ----------------------------------------------------------------


def with_nan(batch):
    batch.images[0, 0, 0, 0] = float("nan")
    return batch


def test_update_that_is_not_finite_is_left_out(finetuner, batch):
    tuner = finetuner("ft_ema", "adversarial.start_iteration=0", "ema.decay=0.5")
    modules = (tuner.autoencoder, tuner.discriminator)
    optimizers = tuner.adams
    tuner.run_iteration(batch(0, side=32))
    before = [snapshot(module) for module in modules]
    adams = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]
    average = snapshot(tuner.ema)
    tuner.run_iteration(with_nan(batch(1, side=32)))
    tuner.guard.judge()
    assert (tuner.iteration, tuner.guard.in_a_row, tuner.ema_updates) == (2, 1, 2)
    for module, state in zip(modules, before, strict=True):  # BatchNorm's buffers too
        assert unchanged(module, state)
    for optimizer, state in zip(optimizers, adams, strict=True):  # with its count of steps
        torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)
    decoder = trained_part(tuner.autoencoder).state_dict()
    expected = {key: 0.5 * (average[key] + decoder[key]) for key in average}  # as in any iteration
    torch.testing.assert_close(dict(tuner.ema.state_dict()), expected, rtol=0, atol=1e-14)
    tuner.run_iteration(batch(2, side=32))
    tuner.guard.judge()
    assert (tuner.iteration, tuner.guard.in_a_row, tuner.ema_updates) == (3, 0, 3)
    modules = (*modules, tuner.ema)
    assert all(torch.isfinite(v).all() for m in modules for v in m.state_dict().values())


def test_left_out_from_the_start_the_next_update_is_the_first(finetuner, batch, autoencoder):
    start = snapshot(autoencoder)
    ends = []
    for batches in ([batch(1, side=32)], [with_nan(batch(0, side=32)), batch(1, side=32)]):
        autoencoder.load_state_dict(start)
        tuner = finetuner("ft_mse")
        for one in batches:
            tuner.run_iteration(one)
        ends.append(snapshot(autoencoder))
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in start)
    assert not unchanged(autoencoder, start)


@pytest.mark.parametrize("warmup", [0, 1])
def test_the_host_reads_nothing_inside_an_iteration(tiny, standin, monkeypatch, warmup):
    """On tensors without contents each reading is an error; so the host never waits for a device.

    torch's fused Adam knows no meta device; what it reads on CUDA is torch's own affair.
    """
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: None)
    settings = tiny("ft_ema", "adversarial.start_iteration=0", "global_batch=4")
    settings = dataclasses.replace(
        settings, compute=dataclasses.replace(settings.compute, per_device_batch=2)
    )
    network = copy.deepcopy(standin).float()
    tuner = Finetuner(settings, AutoencoderKL(ch=32), Discriminator(ndf=16), network).to("meta")
    network.to("meta")
    tuner.run_state.warmup_left = warmup
    images, noise = torch.zeros(4, 3, 32, 32), torch.zeros(2, 4, 4, 4, 4)
    batch = Batch(images, noise, list("abcd"), []).to(torch.device("meta"))
    (tuner.run_warm_up if warmup else tuner.run_iteration)(batch)
    assert tuner.iteration == 1 - warmup
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        tuner.guard.judge()  # it reads


def test_restored_steps_lie_where_the_fused_adam_reads_them(finetuner):
    """Lightning moves an optimizer's state to the device, but not its steps."""
    tuner = finetuner("ft_mse")
    parameter = torch.nn.Parameter(torch.empty(2, device="meta"))
    optimizer = torch.optim.Adam([parameter], fused=False)
    optimizer.state[parameter] = {"step": torch.ones(()), "exp_avg": torch.zeros(2)}
    _optimizer_to_device(optimizer, torch.device("meta"))
    assert optimizer.state[parameter]["step"].device.type == "cpu"
    tuner.decoder_adam = optimizer
    tuner.on_fit_start()
    assert {value.device.type for value in optimizer.state[parameter].values()} == {"meta"}


def test_the_image_behind_it_is_named(finetuner, batch, capsys):
    tuner = finetuner("ft_mse")
    iterate(tuner, with_nan(batch(side=32)))
    assert capsys.readouterr().out == ""
    tuner.guard.judge()
    tuner.guard.judge()  # tells it once
    assert capsys.readouterr().out == (
        "iteration 0: update left out on all ranks (1 in a row, 1 in all): loss or gradient of the "
        "decoder is not finite; caused by rank 0: a\n"
    )


@pytest.mark.parametrize("part", ["perceptual", "generator", "discriminator"])
def test_infinite_loss_with_a_finite_gradient_is_left_out(finetuner, batch, standin, part):
    tuner = finetuner("ft_ema", "adversarial.start_iteration=0", perceptual=copy.deepcopy(standin))
    module = tuner.perceptual if part == "perceptual" else tuner.discriminator
    calls = []

    def shift(module, arguments, out):
        calls.append(1)
        broken = len(calls) == {"perceptual": 1, "generator": 1, "discriminator": 2}[part]
        return out - torch.inf if broken else out

    module.register_forward_hook(shift)
    decoder, adversary = snapshot(tuner.autoencoder), snapshot(tuner.discriminator)
    iterate(tuner, batch(side=32))
    tuner.guard.judge()
    assert tuner.guard.in_a_row == 1
    assert unchanged(tuner.autoencoder, decoder) == (part != "discriminator")
    assert unchanged(tuner.discriminator, adversary)
    tuner.run_iteration(batch(1, side=32))
    tuner.guard.judge()
    assert tuner.guard.in_a_row == 0
    assert not unchanged(tuner.discriminator, adversary)


def test_too_many_bad_updates_in_a_row_end_the_run(finetuner, batch):
    tuner = finetuner("ft_mse", "max_bad_updates=2")
    bad, good = with_nan(batch(0, side=32)), batch(1, side=32)
    for one in (bad, good, bad):  # never two in a row
        tuner.run_iteration(one)
    tuner.run_iteration(bad)
    with pytest.raises(RunFailedError, match="2 updates in a row were not finite"):
        tuner.guard.judge()


# --- precision and images -----------------------------------------------------------------------


def test_bfloat16_autocast_keeps_float32_weights(finetuner, batch, standin):
    perceptual = copy.deepcopy(standin).float()
    tuner = finetuner(
        "ft_ema", "precision=bfloat16", "adversarial.start_iteration=0", perceptual=perceptual
    ).float()
    computed = {}
    for name, module in (("y", tuner.autoencoder.decoder), ("logits", tuner.discriminator)):
        module.register_forward_hook(lambda m, i, out, name=name: computed.update({name: out}))
    exact = []  # moments, and what the decoder makes of the latents first
    for module in (tuner.autoencoder.quant_conv, tuner.autoencoder.post_quant_conv):
        module.register_forward_hook(lambda m, i, out: exact.extend([i[0].dtype, out.dtype]))
    tuner.autoencoder.decoder.conv_in.register_forward_hook(
        lambda m, i, o: exact.append(i[0].dtype)
    )
    before = tuner.autoencoder.last_layer.detach().clone()
    iterate(tuner, batch(side=32))
    assert set(exact) == {torch.float32}
    assert {out.dtype for out in computed.values()} == {torch.bfloat16}
    modules = (tuner.autoencoder, tuner.discriminator, tuner.ema)
    states = [v for m in modules for v in m.state_dict().values() if v.is_floating_point()]
    assert {value.dtype for value in states} == {torch.float32}
    assert all(torch.isfinite(value).all() for value in states)
    assert not torch.equal(tuner.autoencoder.last_layer, before)
    tuner.guard.judge()
    assert tuner.guard.in_all == 0


def test_bfloat16_gradient_is_close_to_float64(autoencoder, finetuner, batch, standin):
    start = snapshot(autoencoder)
    iterate(finetuner("ft_mse"), batch(side=32))
    exact = autoencoder.last_layer.grad.clone()
    autoencoder.load_state_dict(start)
    perceptual = copy.deepcopy(standin).float()
    tuner = finetuner("ft_mse", "precision=bfloat16", perceptual=perceptual).float()
    iterate(tuner, batch(side=32))
    rough = tuner.autoencoder.last_layer.grad.double()
    assert 1e-6 < (rough - exact).norm() / exact.norm() < 0.05


def test_bytes_become_images_between_minus_1_and_1(finetuner, batch):
    integers = torch.arange(2 * 3 * 32 * 32).reshape(2, 3, 32, 32).mul(7).remainder(256)
    figures = []
    for images in (integers.to(torch.uint8), integers.double() / 127.5 - 1.0):
        one = Batch(images, batch(side=32).noise, ["a", "b"], [])
        tuner = finetuner("ft_mse", "optimizer.learning_rate=1e-30")
        figures.append(float(iterate(tuner, one).metrics["nll_loss"]))
    assert figures[0] == pytest.approx(figures[1], rel=1e-6)  # the bytes pass through float32
