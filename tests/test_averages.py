"""Several EMAs at once: trained, saved, resumed, validated, exported and evaluated by decay."""

import copy
import csv
import json
from pathlib import Path

import pytest
import runs
import torch

from kl_f8_train.__main__ import main
from kl_f8_train.arguments import name_path_select
from kl_f8_train.check import cost, scaling
from kl_f8_train.core.hashes import frozen_sha256
from kl_f8_train.core.step import Finetuner, trained_part
from kl_f8_train.core.updates import move, paired
from kl_f8_train.errors import MissingInputError, UsageError
from kl_f8_train.publish.export import export
from kl_f8_train.run import status
from kl_f8_train.run.train import train
from kl_f8_train.score.candidates import load_candidates
from kl_f8_train.weights import checkpoint, weight_file

DECAYS = (0.9, 0.5, 0.99)  # the first is the run's
SEVERAL = f"ema.decay=[{','.join(map(str, DECAYS))}]"
PLACES = dict(zip(DECAYS, ("ema.", "ema_0_5.", "ema_0_99."), strict=True))


@pytest.fixture(scope="module")
def folder(folder: Path) -> Path:
    """A run with three averages, validated twice."""
    extra = ("stop_iteration=104", "log.pictures_every=4", "name=tiny", SEVERAL)
    assert train(runs.recipe(folder, "run", *extra)) == 0
    return folder


def below(tensors, place):
    """The tensors below a place, by their names there; an average's names are its decoder's."""
    return {k.removeprefix(place): v for k, v in tensors.items() if k.startswith(place)}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def fresh(autoencoder, discriminator, standin, tiny):
    """fresh(recipe, *overrides) -> Finetuner in float64, with networks of its own."""

    def build(recipe: str, *overrides: str) -> Finetuner:
        settings = tiny(recipe, *overrides)
        adversary = copy.deepcopy(discriminator) if settings.adversarial else None
        return Finetuner(settings, copy.deepcopy(autoencoder), adversary, standin).double()

    return build


# --- training -------------------------------------------------------------------------------


def test_each_average_is_that_of_its_own_decay(finetuner, batch):
    tuner = finetuner("ft_mse", SEVERAL)
    by_hand = {decay: tuner.averaged() for decay in DECAYS}
    for _ in range(3):
        tuner.run_iteration(batch(side=32))
        for decay, model in by_hand.items():
            move(*paired(trained_part(model), trained_part(tuner.autoencoder)), decay)
    for decay, model in by_hand.items():
        assert same(tuner.averaged(decay).state_dict(), model.state_dict()), decay
    assert same(tuner.averaged().state_dict(), tuner.averaged(0.9).state_dict())
    layers = {float(part["decoder"].conv_out.weight.sum()) for part in tuner.averages.values()}
    assert len(layers) == 3
    with pytest.raises(KeyError):
        tuner.averaged(0.123)


def test_further_averages_change_nothing_of_a_run(fresh, batch, tmp_path):
    """Neither its weights and first average nor, where there is one decay, its checkpoint."""
    files = []
    for number, decay in enumerate(("0.9", SEVERAL.partition("=")[2], "[0.9]")):
        tuner = fresh("ft_ema", "adversarial.start_iteration=0", f"ema.decay={decay}")
        tuner.run_iteration(batch(side=32))
        frozen = frozen_sha256(tuner.autoencoder.state_dict())
        place = tmp_path / f"{number}.safetensors"
        runs.save(tuner, tuner.adams, tmp_path, frozen, place)
        files.append(weight_file.read(place))
    one, three, listed = files
    further = {key for key in three.tensors if key.startswith(("ema_0_5.", "ema_0_99."))}
    assert len(further) == 2 * len(below(one.tensors, "ema."))
    assert same(one.tensors, {k: v for k, v in three.tensors.items() if k not in further})
    assert same(one.tensors, listed.tensors)
    assert one.metadata == listed.metadata
    assert json.loads(one.metadata["config"])["ema"]["decay"] == 0.9
    parts = {key for key in one.metadata if key.startswith("sha256.")}
    expected = ("autoencoder", "discriminator", "ema", "logvar", "optimizer")
    assert parts == {f"sha256.{part}" for part in expected}


def test_accumulation_averages_once_an_iteration(fresh, batch):
    averages = []
    for size in (1, 2):
        tuner = fresh("ft_mse", SEVERAL, f"compute.per_device_batch={size}")
        tuner.run_iteration(batch(side=32))
        averages.append(tuner.averages)
    for decay in DECAYS:
        parts = [dict(found[decay].state_dict()) for found in averages]
        torch.testing.assert_close(*parts, rtol=0, atol=1e-9)


# --- stopping and going on --------------------------------------------------------------------


def test_stopping_and_resuming_equals_not_stopping(folder):
    train(runs.recipe(folder, "twice", "stop_iteration=102", SEVERAL))
    train(runs.recipe(folder, "twice", "stop_iteration=104", SEVERAL))
    ends = [runs.final_state(folder, run) for run in ("twice", "run")]
    runs.assert_same_state(*ends)
    assert {f"sha256.{place[:-1]}" for place in PLACES.values()} < ends[0].metadata.keys()


@pytest.mark.slow
def test_kill_9_and_the_same_command_again(folder):
    extra = ("stop_iteration=104", "checkpoint.every=1", SEVERAL)
    process = runs.start(folder, "killed", *extra)
    assert process.stdout is not None
    assert any("iteration 102 of" in line for line in process.stdout)
    process.kill()
    process.wait()
    process = runs.start(folder, "killed", *extra)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    runs.assert_same_state(*(runs.final_state(folder, run) for run in ("killed", "run")))


def test_other_decays_are_refused_or_found_by_their_value(folder):
    """Kept decays keep their averages, wherever they stand; new ones copy the run's own."""
    others = (0.5, 0.7, 0.9)
    changed = f"ema.decay=[{','.join(map(str, others))}]"
    with pytest.raises(UsageError, match=r"ema\.decay: \[0\.9, 0\.5, 0\.99\] -> \[0\.5, 0\.7"):
        train(runs.recipe(folder, "run", "stop_iteration=105", changed))
    before = runs.final_state(folder, "run")
    old = {decay: below(before.tensors, place) for decay, place in PLACES.items()}
    taken = checkpoint._averages_of(before.tensors, list(DECAYS), list(others))
    assert same(below(taken, "ema."), old[0.5])
    assert same(below(taken, "ema_0_7."), old[0.9])
    assert same(below(taken, "ema_0_9."), old[0.9])
    assert not below(taken, "ema_0_99.")
    assert same(below(taken, "autoencoder."), below(before.tensors, "autoencoder."))


@pytest.mark.parametrize("decays", [("0.9", "[0.9,0.5]"), ("[0.9,0.5]", "0.9"), ("0.9", "0.5")])
def test_a_run_goes_on_with_other_decays(folder, decays):
    run = "-".join(decays).replace(",", "_")
    for stop, decay in zip((101, 102), decays, strict=True):
        extra = (f"stop_iteration={stop}", f"ema.decay={decay}", *runs.NO_ADVERSARIAL)
        assert train(runs.recipe(folder, run, *extra), allow_changes=True) == 0
    end = runs.final_state(folder, run)
    assert ("ema_0_5.decoder.conv_out.weight" in end.tensors) == ("[" in decays[1])
    assert "ema.decay" in checkpoint.stored_changes(end.metadata)[0]


# --- what is shown ----------------------------------------------------------------------------


def test_validation_and_status_show_every_average(folder, capsys):
    run = folder / "run"
    with (run / "validation.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for score in ("psnr", "ssim", "perceptual"):
        scores = [rows[-1][f"{score}_{name}"] for name in ("ema", "raw", "ema_0.5", "ema_0.99")]
        assert len(set(scores)) == 4, score
    with (run / "metrics.csv").open(newline="") as file:
        last = list(csv.DictReader(file))[-1]
    near, middle, far = (float(last[f"ema_distance{of}"]) for of in ("_0.5", "", "_0.99"))
    assert near < middle < far  # from the raw weights
    assert main(["status", str(run)]) == 0
    shown = capsys.readouterr().out
    for name in ("EMA", "raw", "EMA 0.5", "EMA 0.99"):
        assert f"  validation, {name}: PSNR " in shown
    page = status.html(run, status.read_status(run, 0.0), 0.0)
    assert '<i class="c2"></i>psnr_ema_0.5 <b>' in page


def test_inspect_names_the_averages(folder, capsys):
    assert main(["inspect", str(folder / "run")]) == 0
    shown = capsys.readouterr().out
    assert "training checkpoint (EMA weights)" in shown
    assert "EMAs of decay 0.9, 0.5, 0.99; the first is the run's" in shown
    assert main(["inspect", str(folder / "run"), "--ema", "0.5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layout"] == "training checkpoint (EMA 0.5 weights)"
    assert found["ema_decays"] == list(DECAYS)


def test_memory_and_disk_count_every_average(tiny):
    one, three = tiny("ft_mse", "ema.decay=0.9"), tiny("ft_mse", SEVERAL)
    more = 2 * 4 * cost.parameters(one)["decoder"]
    assert cost.state_bytes(three) - cost.state_bytes(one) == more
    assert scaling.checkpoint_bytes(three) - scaling.checkpoint_bytes(one) == more
    counted = cost.peak_bytes(three, 1) - cost.peak_bytes(one, 1)
    assert more <= counted < 1.1 * more


# --- choosing one -----------------------------------------------------------------------------


@pytest.mark.parametrize("decay", DECAYS)
def test_an_average_is_exported_by_its_decay(folder, decay, capsys):
    assert main(["export", str(folder / "run"), "--ema", str(decay)]) == 0
    out = folder / "run" / f"export-ema-{decay}"
    files = [out / f"tiny-ema-{decay}-pruned.{kind}" for kind in ("safetensors", "ckpt")]
    average = below(runs.final_state(folder, "run").tensors, PLACES[decay])
    for file in files:
        tensors = weight_file.read(file).tensors
        assert all(torch.equal(tensors[key], value) for key, value in average.items())
    metadata = weight_file.read(files[0]).metadata
    assert metadata["kl_f8_train.ema_decay"] == str(decay)
    assert metadata["kl_f8_train.weights"] == f"ema-{decay}"
    assert metadata["modelspec.title"] == f"tiny (ema-{decay}, pruned)"
    card = (out / "README.md").read_text()
    assert f"| EMA decay | {decay}, of 0.9, 0.5, 0.99 kept; these are the EMA weights |" in card


def test_the_first_is_exported_by_default(folder, tmp_path):
    out = export(folder / "run", tmp_path / "out")
    exported = weight_file.read(out / "tiny-ema-pruned.safetensors")
    average = below(runs.final_state(folder, "run").tensors, "ema.")
    assert all(torch.equal(exported.tensors[key], value) for key, value in average.items())
    assert exported.metadata["kl_f8_train.ema_decay"] == "0.9"


def test_averages_over_checkpoints_are_of_one_decay(folder, tmp_path):
    """An older checkpoint counts, if its one average has that decay."""
    extra = (*runs.NO_ADVERSARIAL, "stop_iteration=101")
    train(runs.recipe(folder, "older", *extra, "ema.decay=0.5"))
    train(runs.recipe(folder, "other", *extra, "ema.decay=0.8"))
    out = export(folder / "run", tmp_path / "out", ema=0.5, average=[folder / "older"])
    exported = weight_file.read(out / "tiny-ema-0.5-average-pruned.safetensors")
    key = "decoder.conv_out.weight"
    parts = [
        runs.final_state(folder, "run").tensors[f"ema_0_5.{key}"],
        runs.final_state(folder, "older").tensors[f"ema.{key}"],
    ]
    assert torch.equal(exported.tensors[key], torch.stack(parts).double().mean(0).float())
    with pytest.raises(MissingInputError, match=r"no EMA of decay 0\.5 in it: it keeps 0\.8"):
        export(folder / "run", tmp_path / "no", ema=0.5, average=[folder / "other"])
    assert not list((tmp_path / "no").glob("*"))


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--ema", "0.7"], 3, "no EMA of decay 0.7 in it: it keeps 0.9, 0.5, 0.99"),
        (["--ema", "1"], 2, "expected a decay from 0, below 1"),
        (["--ema", "x"], 2, "expected a decay from 0, below 1"),
        (["--ema", "0.5", "--raw"], 2, "not allowed with argument"),
    ],
)
def test_what_cannot_be_exported(folder, capsys, flags, code, said):
    try:
        got = main(["export", str(folder / "run"), "--out", str(folder / "none"), *flags])
    except SystemExit as error:
        got = error.code
    assert got == code
    assert said in capsys.readouterr().err
    assert not (folder / "none").exists()


def test_an_average_that_the_disk_changed_is_not_exported(folder, tmp_path):
    contents = runs.final_state(folder, "run")
    tensors = {k: v.clone() for k, v in contents.tensors.items()}
    tensors["ema_0_5.decoder.conv_out.weight"].view(-1)[0] += 1
    path = tmp_path / "changed.safetensors"
    weight_file.write_safetensors(path, tensors, contents.metadata)
    with pytest.raises(MissingInputError, match="its ema_0_5 does not match its own SHA-256"):
        export(path, tmp_path / "out", ema=0.5)
    export(path, tmp_path / "out", ema=0.99)


def test_evaluate_takes_averages_by_their_decay(folder):
    texts = [f"{folder / 'run'}{mark}" for mark in ("", "@0.9", "@.50", "@0.99", "@raw")]
    named = [name_path_select(text) for text in texts]
    assert [name for name, *_ in named] == ["run", "run@0.9", "run@.50", "run@0.99", "run@raw"]
    found = load_candidates(named, "cpu")
    tensors = runs.final_state(folder, "run").tensors
    places = ("ema.", "ema.", "ema_0_5.", "ema_0_99.", "autoencoder.")
    for candidate, place in zip(found, places, strict=True):
        expected = tensors[f"{place}decoder.conv_out.weight"]
        assert torch.equal(candidate.model.last_layer, expected)
    selected = [candidate.record["select"] for candidate in found]
    assert selected == ["ema", "ema-0.9", "ema-0.5", "ema-0.99", "raw"]
    with pytest.raises(MissingInputError, match=r"no EMA of decay 0\.7 in it: it keeps 0\.9, 0\.5"):
        load_candidates([name_path_select(f"{folder / 'run'}@0.7")], "cpu")
    with pytest.raises(MissingInputError, match="it is not a training checkpoint of a run"):
        load_candidates([name_path_select(f"{folder / 'model.ckpt'}@0.9")], "cpu")


def test_a_path_that_ends_like_a_decay_is_a_path(tmp_path):
    place = tmp_path / "run@0.9"
    assert name_path_select(str(place)) == ("run@0.9", tmp_path / "run", "ema-0.9")
    place.mkdir()
    assert name_path_select(str(place)) == ("run@0.9", place, "ema")
