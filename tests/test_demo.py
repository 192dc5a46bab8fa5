"""The demo: what a new user sees first."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kl_f8_train import demo, shipped
from kl_f8_train.__main__ import main
from kl_f8_train.run_dir import read_rows
from kl_f8_train.score import compare
from kl_f8_train.weights import weight_file


def test_the_base_is_small_and_says_what_it_is():
    assert shipped.WEIGHTS.stat().st_size <= 8 * 10**6
    contents = weight_file.read(shipped.WEIGHTS)
    assert contents.iteration == demo.base_iteration()
    assert any(key.startswith("loss.discriminator.") for key in contents.tensors)
    assert shipped.WEIGHTS.with_suffix(".md").is_file()


def test_every_photograph_has_its_licence():
    listed = (shipped.FOLDER / "PHOTOGRAPHS.md").read_text(encoding="utf-8")
    files = [*shipped.TRAINING.iterdir(), *shipped.HELD_OUT.iterdir()]
    assert len(files) >= 80
    for file in files:
        (line,) = [row for row in listed.splitlines() if row.startswith(f"| {file.name} |")]
        licence = line.split("|")[2].strip()
        assert licence.startswith(("CC0", "CC-BY", "public-domain")), line


def test_no_photograph_is_both_trained_on_and_held_out():
    def thumbnail(file: Path) -> np.ndarray:
        grey = Image.open(file).convert("L")
        side = min(grey.size)
        left, top = (grey.width - side) // 2, (grey.height - side) // 2
        square = grey.crop((left, top, left + side, top + side))
        small = np.asarray(square.resize((16, 16), Image.Resampling.BOX), np.float64)
        return (small - small.mean()) / small.std()

    trained = [thumbnail(file) for file in shipped.TRAINING.iterdir()]
    for file in shipped.HELD_OUT.iterdir():
        held_out = thumbnail(file)
        assert max(float((held_out * other).mean()) for other in trained) < 0.9, file.name


@pytest.mark.slow
def test_after_the_demo_its_recipe_is_at_its_end(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    shutil.copy(shipped.HELD_OUT / "coffee.jpg", photographs)
    small = ["data.crop=32", "log.pictures_every=0"]
    one = f"stop_iteration={demo.base_iteration() + 1}"
    assert main(["demo", "--length", "0.004", "--held-out", str(photographs), *small]) == 0
    assert main(["train", "demo", *small, one]) == 0
    assert "its end; nothing to do" in capsys.readouterr().out
    below = f"stop_iteration={demo.base_iteration()}"
    assert main(["train", "demo", *small, below, "--allow-changes"]) == 0
    beyond = f"already beyond stop_iteration={demo.base_iteration():,}; nothing to do"
    assert beyond in capsys.readouterr().out
    assert main(["doctor", "demo", *small, one]) == 0
    assert "GO" in capsys.readouterr().out


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A whole demo: the one that KL_F8_TRAIN_DEMO names, or one run here."""
    if "KL_F8_TRAIN_DEMO" in os.environ:
        return Path(os.environ["KL_F8_TRAIN_DEMO"])
    out = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "kl_f8_train", "demo", "--run-dir", str(out)]
    subprocess.run(command, check=True)
    return out


@pytest.mark.slow
def test_the_demo_shows_the_card_s_pattern(finished):
    """PSNR: base < ft-EMA < ft-MSE; ft-EMA is perceptually closer than the base."""
    rows = compare.read_image_scores(finished / "evaluation" / "per_image.csv")

    def verdict(metric: str, a: str, b: str) -> str:
        values = compare.per_image(rows, metric)
        return compare.verdict(metric, a, b, *compare.paired(values, a, b)).verdict

    assert verdict("psnr", "base", "ft-EMA") == "better"
    assert verdict("psnr", "ft-EMA", "ft-MSE") == "better"
    assert verdict("st_lpips", "base", "ft-EMA") == "better"
    assert verdict("psnr", "mean colour", "base") == "better"
    assert verdict("psnr", "8 x 8 means", "ft-MSE") == "better"


@pytest.mark.slow
def test_the_demo_writes_what_it_says(finished):
    table = json.loads((finished / "table.json").read_text(encoding="utf-8"))
    names = ["base", "ft-EMA", "ft-EMA raw weights", "ft-MSE", "ft-MSE raw weights"]
    assert [row["model"] for row in table] == [*names, "mean colour", "8 x 8 means"]
    assert all(row["psnr_mean"] > 10 and row["images"] >= 30 for row in table)
    first = read_rows(finished / "ft_ema" / "validation.csv")[0]  # of held-out photographs, too
    assert abs(first["psnr_ema"] - table[0]["psnr_mean"]) < 2
    comparison = json.loads((finished / "evaluation" / "comparison.json").read_text())
    assert (comparison["a"], comparison["b"]) == ("base", "ft-MSE")
    strip = Image.open(finished / "strip.png")
    assert strip.height > 6 * 256
    assert strip.width > 4 * 256
