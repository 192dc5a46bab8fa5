"""A ruined run does not end like a good one, and its best checkpoint is kept on request."""

import json
import shutil
from dataclasses import asdict

import pytest
import runs

from kl_f8_train.__main__ import main
from kl_f8_train.errors import MissingInputError, UsageError
from kl_f8_train.publish.export import export
from kl_f8_train.run import outcome, status
from kl_f8_train.run.train import train
from kl_f8_train.run_dir import best_checkpoint, read_rows
from kl_f8_train.weights import weight_file

RUINING = ("optimizer.learning_rate=0.05", "ema.decay=0.1", "log.pictures_every=2")
EXACT = {"psnr_raw": 20.0, "perceptual_raw": 0.3}


def rows(*scores: tuple[float, float]) -> list[dict[str, float]]:
    """(PSNR, perceptual) of the EMA at iterations 0, 100, ..."""
    return [
        {"iteration": 100.0 * i, "psnr_ema": psnr, "perceptual_ema": distance, **EXACT}
        for i, (psnr, distance) in enumerate(scores)
    ]


@pytest.mark.parametrize(
    ("last", "worse"),
    [
        ((21.0, 0.29), False),
        ((19.6, 0.28), False),  # an adversarial term trades PSNR for it
        ((20.0, 0.3), False),
        ((19.9, 0.302), True),
        ((18.9, 0.28), True),
        ((21.0, 0.38), True),
        ((20.05, 0.316), True),  # PSNR stands still, and it looks worse
        ((20.0, 0.314), False),
        ((20.8, 0.316), False),  # ft_mse trades some of it for PSNR
        ((20.05, 0.27), False),
    ],
)
def test_what_counts_as_worse(last, worse):
    found = outcome.compare(rows((20.0, 0.3), (5.0, 9.0), last))
    assert [change.is_worse for change in found.changes] == [worse, False]
    assert len(found.warnings()) == worse


def test_what_psnr_does_not_show_is_said_so_and_of_averages_alone():
    (line,) = outcome.compare(rows((20.0, 0.3), (20.05, 0.33))).warnings()
    assert (
        "PSNR 20.00 -> 20.05 dB, perceptual distance 0.3 -> 0.33 (worse). PSNR does not show it"
        in line
    )
    (line,) = outcome.compare(rows((20.0, 0.3), (19.8, 0.33))).warnings()
    assert "does not show it" not in line
    assert not outcome.Change("raw", (20.0, 20.05), (0.3, 0.33)).is_worse  # restless by nature


@pytest.mark.parametrize(
    ("last", "ending"),
    [(0.33, "0.3 -> 0.33 (worse)"), (0.29, "0.3 -> 0.29 (better)"), (0.301, "0.3 -> 0.301")],
)
def test_which_way_the_distance_went_is_said(last, ending):
    change = outcome.Change("raw", (20.0, 21.0), (0.3, last))
    assert str(change) == f"PSNR 20.00 -> 21.00 dB, perceptual distance {ending}"


def test_one_validation_compares_with_nothing():
    assert outcome.compare(rows((20.0, 0.3))) is None


@pytest.fixture(scope="module")
def ruined(folder):
    """A run at a rate that destroys the decoder, of a length that no validation divides."""
    train(runs.recipe(folder, "ruined", *runs.NO_ADVERSARIAL, *RUINING, "stop_iteration=105"))
    return folder / "ruined"


def test_a_ruined_run_says_so_at_its_end_in_status_and_at_export(folder, ruined, capsys):
    shutil.rmtree(ruined)
    train(runs.recipe(folder, "ruined", *runs.NO_ADVERSARIAL, *RUINING, "stop_iteration=105"))
    said = capsys.readouterr().out
    assert [row["iteration"] for row in read_rows(ruined / "validation.csv")] == [
        *(100, 102, 104, 105)  # the end, too
    ]
    *_, compared, raw, warning, _, last = said.splitlines()
    assert compared.startswith("validation, iteration 100 -> 105: EMA PSNR ")
    assert raw.startswith("validation, iteration 100 -> 105: raw PSNR ")
    assert warning.startswith("WARNING: the EMA weights got worse since the start: PSNR ")
    assert last == (
        f"done: iteration 105; before you export it: kl-f8-train status {ruined} --html status.html"
    )
    assert main(["status", str(ruined)]) == 0
    said = capsys.readouterr().out
    assert "warning: the EMA weights got worse since the start" in said
    assert "validation, EMA: PSNR " in said
    assert main(["export", str(ruined), "--format", "safetensors"]) == 0
    assert "WARNING: on the run's fixed photographs these weights are worse" in (
        capsys.readouterr().out
    )


def test_status_as_json_has_the_scores(ruined):
    found = json.loads(json.dumps(asdict(status.read_status(ruined, 0.0))))["validation"]
    assert found["iterations"] == [100, 105]
    assert len(found["ema"]["psnr"]) == len(found["raw"]["perceptual"]) == 2


def test_a_good_run_is_not_warned_of(folder, capsys):
    gentle = ("optimizer.learning_rate=1e-5", "log.pictures_every=2", "stop_iteration=104")
    train(runs.recipe(folder, "good", *runs.NO_ADVERSARIAL, *gentle))
    said = capsys.readouterr().out
    assert "WARNING" not in said
    assert f"done: iteration 104; next: kl-f8-train export {folder / 'good'}" in said


def test_the_best_validation_is_kept_and_exported(folder, capsys):
    every = ("log.pictures_every=1", "checkpoint.keep_best=true", "checkpoint.every=100")
    settings = (*runs.NO_ADVERSARIAL, "optimizer.learning_rate=2e-3", "ema.decay=0.5", *every)
    for stop in (104, 108):  # resumed, it goes on from the best of before
        train(runs.recipe(folder, "best", *settings, f"stop_iteration={stop}"))
    found = read_rows(folder / "best" / "validation.csv")
    best = min(found, key=outcome.badness)["iteration"]
    path = best_checkpoint(folder / "best")
    assert path is not None
    assert path.name == f"best-{best:09.0f}.safetensors"
    assert len(list(path.parent.glob("best-*"))) == 1
    assert weight_file.read(path).iteration == best
    assert weight_file.find(folder / "best").name == "iteration-000000108.safetensors"
    assert main(["export", str(folder / "best"), "--best", "--format", "safetensors"]) == 0
    assert (folder / "best" / "export-best" / "demo_ft_ema-ema-pruned-best.safetensors").is_file()
    record = json.loads((folder / "best" / "export-best" / "export.json").read_text())
    assert record["iteration"] == best
    assert "kept as best-" in capsys.readouterr().out


def test_export_best_without_one_is_refused(ruined):
    with pytest.raises(
        MissingInputError, match=r"--best: .* keeps no best checkpoint\. A training"
    ):
        export(ruined, best=True)


def test_keep_best_needs_validations(folder):
    with pytest.raises(UsageError, match=r"keep_best=true needs validations, and log\.pictures_"):
        runs.recipe(folder, "none", "checkpoint.keep_best=true")
