import pytest
import torch
from torch import nn

from kl_f8_train.averages import label, module_name, module_names, selection
from kl_f8_train.core.updates import ema_decay, ema_distance, move, paired


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (1, 2 / 11),
        (2, 3 / 12),
        (5, 6 / 15),
        (90, 91 / 100),
        (9_990, 9_991 / 10_000),
        (89_989, 89_990 / 89_999),
        (89_990, 0.9999),  # warm-up ends
        (89_991, 0.9999),
        (10_000_000, 0.9999),
    ],
)
def test_decay_with_warmup_is_litemas(number, expected):
    assert ema_decay(number, 0.9999, warmup=True) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("number", [1, 2, 1_000_000])
def test_decay_without_warmup_is_constant(number):
    assert ema_decay(number, 0.999, warmup=False) == 0.999


def modules():
    torch.manual_seed(0)
    return [nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 2)).double() for _ in range(2)]


def test_update_is_the_weighted_mean():
    averaged, module = modules()
    before = [p.detach().clone() for p in averaged.parameters()]
    source = [p.detach().clone() for p in module.parameters()]
    move(*paired(averaged, module), 0.9)
    after = list(averaged.parameters())
    for old, new, now in zip(before, source, after, strict=True):
        torch.testing.assert_close(now, 0.9 * old + 0.1 * new, rtol=0, atol=1e-15)
    assert all(map(torch.equal, source, module.parameters()))


def test_update_with_decay_1_keeps_and_0_copies():
    averaged, module = modules()
    before = [p.detach().clone() for p in averaged.parameters()]
    move(*paired(averaged, module), 1.0)
    assert all(map(torch.equal, before, averaged.parameters()))
    move(*paired(averaged, module), 0.0)
    assert all(map(torch.equal, module.parameters(), averaged.parameters()))


def test_update_in_float32_adds_small_steps():
    averaged, module = (m.float() for m in modules())
    nn.init.ones_(averaged[1].weight)
    nn.init.constant_(module[1].weight, 1.01)
    for _ in range(1000):
        move(*paired(averaged, module), 0.9999)
    expected = 1.01 - 0.01 * 0.9999**1000
    torch.testing.assert_close(averaged[1].weight, torch.full((2, 4), expected), rtol=0, atol=3e-5)


def test_update_refuses_other_parameters():
    averaged, _ = modules()
    with pytest.raises(ValueError, match="parameters differ"):
        move(*paired(averaged, nn.Sequential(nn.Conv2d(3, 4, 3))), 0.9)


def test_distance_is_relative_to_the_weights():
    whole = nn.ModuleDict({"decoder": nn.Linear(3, 2), "encoder": nn.Linear(3, 2)}).double()
    averaged = nn.ModuleDict({"decoder": nn.Linear(3, 2)}).double()
    theirs, ours = (
        torch.cat([p.detach().flatten() for p in m["decoder"].parameters()])
        for m in (whole, averaged)
    )

    class Owner(nn.Module):
        decoder = whole["decoder"]

    expected = float((ours - theirs).norm() / theirs.norm())
    assert ema_distance(averaged, Owner()) == pytest.approx(expected, rel=1e-12)
    averaged["decoder"].load_state_dict(whole["decoder"].state_dict())
    assert ema_distance(averaged, Owner()) == 0.0


def test_a_decay_is_found_again_in_every_name():
    decays = [0.9999, 0.0, 1e-5, 0.5, 0.1 + 0.2]
    assert [float(selection(d).removeprefix("ema-")) for d in decays] == decays
    names = module_names(decays)
    assert list(names.values())[:3] == ["ema", "ema_0", "ema_1e-05"]
    assert all("." not in name for name in names.values())  # a module's name has none
    assert module_name("ema") == "ema"
    assert [label(s) for s in ("ema", "raw", "ema-0.9999")] == ["EMA", "raw", "EMA 0.9999"]
