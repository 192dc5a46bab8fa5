"""The command line answers at once, without torch, with the right exit codes."""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kl_f8_train import __main__
from kl_f8_train.arguments import build_parser
from kl_f8_train.run_dir import read_failure

ROOT = Path(__file__).parents[1]


def run(*arguments: str, cwd: Path = ROOT) -> tuple[int, str, float]:
    """Exit code, output and seconds of a command."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "kl_f8_train", *arguments],
        cwd=cwd,
        text=True,
        capture_output=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr, time.perf_counter() - began


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--help"], 0, "evaluate"),
        (["train", "--help"], 0, "key=value"),
        ([], 2, "Starts a run; the same command again resumes it."),
        ([], 2, "Start with: kl-f8-train demo. Documentation: README.md"),
        (["demo", "--help"], 0, "directory to write (runs/demo)"),
        (["train", "demo", "--allow-change"], 2, "unrecognized arguments: --allow-change"),
        (["export", "nowhere", "--for"], 2, "unrecognized arguments: --for"),
        (["train", "demo", "seed", "=", "1"], 2, "no spaces around ="),
        (["train"], 2, "the following arguments are required: config\n"),
        (["config"], 2, "the following arguments are required: action\n"),
        (["trian"], 2, "invalid choice"),
        (["train", "configs/ft_ema.yml"], 3, "no such file"),
        (["train", "configs/ft_ema.yaml"], 2, "init.weights=..."),
        (["train", "ft_ema", "adversarial.strat_iteration=1"], 2, "Did you mean"),
        (["train", "demo", "global_batch=abc"], 2, "a whole number"),
        (["train", "demo", "global_batch=10", "compute.per_device_batch=3"], 2, "[1, 2, 5, 10]"),
        (["train", "demo", "run_dir=nowhere", "init.weights=no.ckpt"], 3, "no.ckpt"),
        (["inspect", "no.ckpt"], 3, "no.ckpt: no such file"),
        (["train", "demo", "--allow-changes", "global_batch=abc"], 2, "a whole number"),
        (["train", "demo", "--global_batch=abc"], 2, "a whole number"),
        (["train", "demo", "--no-such-flag"], 2, "unrecognized arguments: --no-such-flag"),
        (["train", "demo", "--no-such-flag"], 2, "usage: kl-f8-train train "),
        (["train", "demo", "--json"], 2, "give --dry-run with it"),
        (["export", "runs/x", "a=b"], 2, "unrecognized arguments: a=b"),
        (
            ["evaluate", "a=W", "--images", "X", "b=W"],
            2,
            "b=W; name all weights before the first flag",
        ),
        (["config", "show", "ft_mse"], 0, "pixel: mse"),
        (["config", "diff", "ft_ema", "ft_mse"], 0, "loss.pixel: l1 -> mse"),
        (["config", "diff", "ft_ema", "ft_ema"], 0, "no differences\n"),
        (["config", "schema"], 0, "optimizer.learning_rate"),
        (["evaluate", "a=x.ckpt", "--images", "nowhere"], 3, "no such file or folder"),
        (["evaluate", "x.ckpt", "a/x.ckpt", "--images", "."], 2, "the same name"),
        (["evaluate", "x.ckpt", "--images", ".", "--limit", "0"], 2, "above 0"),
        (["evaluate", "x.ckpt", "--images", ".", "--protocol", "own"], 2, "standard"),
        (["evaluate", "x.ckpt", "--images", ".", "--out", "."], 2, "is the folder of --images"),
        (
            ["evaluate", "x.ckpt", "--images", "docs", "--out", "README.md"],
            2,
            "README.md: is a file",
        ),
        (["evaluate", "x.ckpt", "--images", "README.md"], 3, "expected a folder of images"),
        (["fetch", "clip"], 2, "unknown network; expected vgg or inception"),
        (["fetch", "--url", "http://x"], 2, "fetch vgg --url"),
        (["doctor"], 2, "doctor takes a recipe"),
        (["status", "nowhere"], 3, "no such directory"),
        (["status", "configs"], 3, "no config.yaml"),
        (["pack", "nowhere", "out"], 3, "no such folder"),
        (["evaluate", "a=x", "--images", ".", "--compare", "a", "b"], 2, "named are a"),
        (["evaluate", "a=x", "--images", ".", "--compare", "a", "a"], 2, "two different"),
        (["card", "nowhere"], 3, "export.json: no such file"),
        (["card", "nowhere", "--license", "The MIT License"], 2, "--license-file FILE"),
        (["card", "nowhere", "--license", "mit", "--license-file", "x"], 2, "not allowed with"),
        (["card", "nowhere", "--base-model", "x"], 2, "OWNER/NAME"),
        (["benchmark", "ft_ema", "--iterations", "0"], 2, "expected 1 or more"),
        (["benchmark", "ft_ema", "compute.checkpoint_levels=-1"], 2, "expected 0 or more"),
    ],
)
def test_answers_at_once(arguments, code, text):
    returned, output, seconds = run(*arguments)
    assert returned == code, output
    assert text in output
    assert "Traceback" not in output
    assert seconds < 3.0  # about 0.3 s on an idle machine


def without_torch(arguments: list[str], code: int, folder: Path) -> str:
    """What a command prints in a folder, if it ends with that code before torch is imported."""
    program = (
        "import sys\n"
        "from kl_f8_train.__main__ import main\n"
        f"assert main({arguments}) == {code}\n"
        "assert 'torch' not in sys.modules\n"
    )
    command = [sys.executable, "-c", program]
    return subprocess.run(command, check=True, capture_output=True, cwd=folder, text=True).stderr


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["lerning_rate=1"], 2),
        (["run_dir=x", "data.sources=no/{0..9}.tar", "init.weights=kl_f8_mini"], 3),
        (["run_dir=.", "data.sources=no", "init.weights=no"], 3),
    ],
)
def test_wrong_settings_and_missing_inputs_do_not_import_torch(arguments, code, tmp_path):
    without_torch(["train", "ft_ema", *arguments], code, tmp_path)
    if "run_dir=." in arguments:  # where a directory is, `status` says why
        assert "data.sources=no" in read_failure(tmp_path)[0]


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        ("evaluate a.ckpt b.ckpt --images no --vgg v.pth --inception i.pth", 5),
        ("evaluate kl_f8_mini --images list.txt --vgg v.pth", 2),
        ("evaluate kl_f8_mini b.ckpt --latents no --images no/*.tar", 3),
        ("evaluate a.ckpt b.ckpt --images . --vgg= --inception=", 2),
        ("evaluate a.ckpt b.ckpt --images . --perceptual st_lpips_alex --vgg unused.pth", 2),
        ("export no --average a b --images c", 4),
        ("fp16-safe a.ckpt --images no", 2),
        ("inject a.ckpt b.ckpt --out c.ckpt", 2),
        ("card no --scores no.json --license-file no.txt", 3),
        ("pack a b out", 2),
        ("config diff a b", 2),
        ("demo --training no --held-out no", 2),
        ("demo --training .,no,[a-b]* --held-out no", 3),
    ],
)
def test_all_missing_inputs_are_reported_together(tmp_path, command, missing):
    (tmp_path / "list.txt").write_text("a.tar\nb.tar\n")
    printed = without_torch(command.split(), 3, tmp_path)
    assert f"{missing} inputs are missing:" in printed
    assert len(printed.splitlines()) == 1 + missing


def test_average_may_be_repeated():
    args = build_parser().parse_args(["export", "run", "--average", "a", "b", "--average", "c"])
    assert args.average == [Path("a"), Path("b"), Path("c")]


def flags_and_arguments() -> list[tuple[str, argparse.Action]]:
    """Those of every verb."""
    (verbs,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return [(verb, action) for verb, sub in verbs.choices.items() for action in sub._actions]


def test_every_flag_and_argument_is_explained():
    assert [f"{verb} {a.dest}" for verb, a in flags_and_arguments() if not a.help] == []


def test_a_current_directory_that_was_deleted_is_named(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    said = __main__._remedy(FileNotFoundError(2, "No such file or directory"))
    assert said == "the current directory has been deleted; change to another"
