"""The command that comes next, which a verb prints at its end."""

import contextlib
import importlib.util
import itertools
import shlex
from pathlib import Path

from kl_f8_train.errors import MissingInputError
from kl_f8_train.run_dir import CONFIG_FILE, EXPORT_FILE, is_run
from kl_f8_train.weights import hub

LONGEST_NEXT = 200  # letters of a command that is printed although a flag less would do
USUAL_BASE = "stabilityai/sd-vae-ft-mse"  # on the hub, for those who have named none


def after_doctor(recipe: str, overrides: list[str], allow_changes: bool, dry_run: bool) -> str:
    """The command that trains; from a long one with --dry-run, how to get it."""
    command = _command("train", recipe, *overrides, *["--allow-changes"] * allow_changes)
    if dry_run and len(command) > LONGEST_NEXT:
        return "the same command without --dry-run"
    return command


def after_export(out: Path) -> str:
    """The card of an export with its scores; before there are any, the evaluation that makes them.

    Of an export without held-out photographs, or whose base is not here, the card without scores.
    """
    import yaml

    from kl_f8_train.publish import card

    scores = Path("evaluation") / "scores.json"
    if card.are_scores_of(scores, out):
        return _command("card", out, "--scores", scores)
    config = yaml.safe_load((out / CONFIG_FILE).read_text(encoding="utf-8"))
    base, pictures = config["init"]["weights"], config["log"]["pictures"]
    files = sorted([*out.glob("*.safetensors"), *out.glob("*.ckpt"), *out.glob("diffusers")])
    with contextlib.suppress(MissingInputError):
        hub.check_exists(base)
        if files and pictures and Path(pictures).is_dir():
            models = [f"base={base}", f"mine={files[-1]}"]
            network = config["loss"]["perceptual"]
            other = ["--perceptual", network] * (network != "lpips_vgg")
            images = ["--images", pictures, "--compare", "base", "mine"]
            return _command("evaluate", *models, *images, *other)
    return _command("card", out)


def _command(*words: str | Path) -> str:
    return shlex.join(["kl-f8-train", *map(str, words)])


def after_scores(out: Path, path: Path, select: str) -> str:
    """What comes next for scored weights: export, the card of their export, or nothing."""
    if (path.parent / EXPORT_FILE).is_file():
        return _command("card", path.parent, "--scores", out / "scores.json")
    if is_run(path) or is_run(path.parent.parent):
        decay = ["--ema", select.removeprefix("ema-")]
        taken = {"ema": [], "raw": ["--raw"]}.get(select, decay)
        return _command("export", path, *taken)
    return ""


def before_training(out: Path, *settings: str) -> str:
    """How to look at a training on images that were just made ready, in a new run directory."""
    name, numbers = out.resolve().name, itertools.count(2)
    run = Path("runs", name)
    while run.exists():
        run = Path("runs", f"{name}-{next(numbers)}")
    given = [f"init.weights={USUAL_BASE}", "init.family=sd", *settings, f"run_dir={run}"]
    lines = [
        f"next: {_command('doctor', 'single_gpu', *given)}",
        "to start from a VAE of your own, give its file as init.weights",
    ]
    if importlib.util.find_spec("huggingface_hub") is None:
        lines.append("to download that one, first: pip install huggingface_hub")
    return "\n".join(lines)
