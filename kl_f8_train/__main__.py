"""The command line: verbs and their flags; heavy imports happen inside each verb."""

import argparse
import contextlib
import errno
import io
import itertools
import json
import os
import re
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tarfile import is_tarfile
from typing import TYPE_CHECKING, NoReturn

from kl_f8_train import __version__, shipped
from kl_f8_train.errors import (
    MissingInputError,
    RunFailedError,
    UsageError,
    UserError,
    like,
    like_path,
)
from kl_f8_train.launch import end_children, launched
from kl_f8_train.lifetime import end_with_launcher
from kl_f8_train.output import say
from kl_f8_train.units import are, counted, duration, shortest

if TYPE_CHECKING:
    from kl_f8_train.check.doctor import Report


LONGEST_NEXT = 200  # letters of a command that is printed although a flag less would do
USUAL_BASE = "stabilityai/sd-vae-ft-mse"  # on the hub, for those who have named none


def main(arguments: list[str] | None = None) -> int:
    """Runs a verb; returns its exit code: 0, 2 usage, 3 missing input, 4 failed run."""
    for stream in (sys.stdout, sys.stderr):  # names may hold what the terminal cannot show
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    parser = build_parser()
    if not (sys.argv[1:] if arguments is None else arguments):
        parser.print_help()
        return UsageError.exit_code
    args, rest = parser.parse_known_args(arguments)
    if hasattr(args, "overrides") and all("=" in text for text in rest):
        args.overrides += rest  # key=value behind a flag, or written --key=value
    elif rest:
        hint = "; name all weights before the first flag" if args.verb is _evaluate else ""
        args.parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    verb: Callable[[argparse.Namespace], int] = args.verb
    try:
        return verb(args)
    except UserError as error:
        return _complain(str(error), error.exit_code, args.debug)
    except KeyboardInterrupt:
        say("kl-f8-train: interrupted", aside=True)
        return 130
    except BrokenPipeError:  # `... | head` closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # a full, closed or vanished disk, where nothing said it better
        return _complain(_remedy(error), UserError.exit_code, args.debug)
    except Exception as error:
        text = f"unexpected {type(error).__name__}: {error}\n--debug shows where"
        return _complain(text, UserError.exit_code, args.debug)
    finally:
        end_children()  # loaders, after a failure; torch would wait five seconds for them


def _remedy(error: OSError) -> str:
    """What failed, and what to do about it."""
    if "temporary directory" in str(error):
        return f"{error.strerror or error}; set TMPDIR to a directory that can be written"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"{error.strerror}; raise the limit of open files: `ulimit -n 4096`"
    if error.errno in (errno.ENOMEM, errno.EAGAIN):
        return f"{error.strerror}; raise the limits of memory and processes (`ulimit -v`, `-u`)"
    where = f"{error.filename}: " if error.filename else ""
    return (
        f"{where}{error.strerror or error}; check that the path exists, is writable and has space"
        "\n--debug shows where"
    )


def _complain(message: str, exit_code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    say(f"kl-f8-train: {message}", aside=True)
    return exit_code


class _Parser(argparse.ArgumentParser):
    """Suggests what a mistyped verb or choice may have meant."""

    def error(self, message: str) -> NoReturn:
        found = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)$", message)
        hint = like(found[1], re.findall(r"[\w-]+", found[2])) if found else ""
        super().error(f"{message}{hint}")


def build_parser() -> argparse.ArgumentParser:
    """Every verb and flag."""
    parser = _Parser(
        prog="kl-f8-train",
        description="Finetunes the decoder of Stable Diffusion's kl-f8 autoencoder.",
        formatter_class=partial(argparse.HelpFormatter, max_help_position=16),
    )
    parser.add_argument("--version", action="version", version=__version__)
    shared = _Parser(add_help=False)
    shared.add_argument("--debug", action="store_true", help="show tracebacks")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    def add(name: str, verb: Callable[[argparse.Namespace], int], text: str):  # type: ignore[no-untyped-def]
        sub = verbs.add_parser(name, help=text, description=text, parents=[shared])
        sub.set_defaults(verb=verb, parser=sub)
        return sub

    train = add("train", _train_verb, "Starts a run; the same command again resumes it.")
    train.add_argument("config", help="recipe: a YAML file, or the name of a shipped one")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    train.add_argument("--allow-changes", action="store_true", help="resume with another recipe")
    train.add_argument("--dry-run", action="store_true", help="only check it, as doctor does")
    train.add_argument("--json", action="store_true", help="with --dry-run: print one JSON object")

    doctor = add("doctor", _doctor, "Checks a run before it costs anything: go, or no go.")
    doctor.add_argument("config", nargs="?", help="recipe: a YAML file, or a shipped one's name")
    doctor.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.add_argument("--all", action="store_true", help="every setting and figure")

    inspect = add("inspect", _inspect, "Reports what a VAE file holds, without running any of it.")
    inspect.add_argument("weights", help="file, diffusers folder, run directory or hub id")
    taken = inspect.add_mutually_exclusive_group()
    taken.add_argument("--raw", action="store_true", help="a run's raw weights, not its EMA")
    taken.add_argument("--ema", type=_decay, metavar="DECAY", help="its EMA of this decay")
    inspect.add_argument("--json", action="store_true", help="print JSON")

    export = add("export", _export, "Writes a run's EMA weights for every consumer.")
    export.add_argument("run", type=Path, help="run directory, or one of its checkpoints")
    export.add_argument("--out", type=Path, help="directory to write (RUN/export)")
    taken = export.add_mutually_exclusive_group()
    taken.add_argument("--raw", action="store_true", help="the raw weights in place of the EMA")
    taken.add_argument("--ema", type=_decay, metavar="DECAY", help="the EMA of this decay")
    export.add_argument("--best", action="store_true", help="of the best validation, if it is kept")
    export.add_argument(
        "--average", nargs="+", type=Path, default=[], metavar="CKPT", help="mean EMA; after RUN"
    )
    export.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "float16", "bfloat16"],
        help="type of the single files (float32)",
    )
    export.add_argument(
        "--format", action="append", choices=["safetensors", "ckpt", "diffusers"], help="only this"
    )
    export.add_argument("--images", type=Path, help="photographs that try half precision")
    export.add_argument(
        "--family",
        choices=["sd", "sdxl", "sd3", "flux", "other"],
        help="models whose VAE it is, if the checkpoint does not know",
    )
    export.add_argument(
        "--fp16-safe",
        action=argparse.BooleanOptionalAction,
        help="rescale the decoder, exactly, so that fp16 does not overflow (where it would)",
    )
    export.add_argument("--force", action="store_true", help="overwrite files")

    safe = add("fp16-safe", _fp16_safe, "Rescales a VAE's decoder, exactly, for fp16.")
    safe.add_argument("weights", help="file, diffusers folder, run directory or hub id")
    safe.add_argument("--out", type=Path, help="directory to write (NAME-fp16-safe)")
    safe.add_argument("--images", type=Path, help="photographs that try half precision")
    safe.add_argument(
        "--family",
        choices=["sd", "sdxl", "sd3", "flux", "other"],
        help="models whose VAE it is, if the file does not show it",
    )
    safe.add_argument("--force", action="store_true", help="overwrite files")

    inject = add("inject", _inject, "Writes a VAE into a copy of a Stable Diffusion checkpoint.")
    inject.add_argument("vae", type=Path, help="any VAE file, or a run directory (its EMA)")
    inject.add_argument("into", type=Path, help="full checkpoint, .safetensors or .ckpt")
    inject.add_argument("--out", type=Path, required=True, help="file to write")
    inject.add_argument("--force", action="store_true", help="overwrite it")

    score = add("evaluate", _evaluate, "Scores VAEs on the same images, as the model card does.")
    score.add_argument(
        "weights",
        nargs="+",
        metavar="[NAME=]WEIGHTS[@raw]",
        help="file or run; @raw: not its EMA; @0.9999: its EMA of this decay",
    )
    inputs = score.add_argument_group("what they are scored on, one of").add_argument
    inputs("--images", help="folder of photographs, or shards; with --latents: for FID")
    inputs("--latents", type=Path, metavar="DIR", help="saved latents, to decode and compare")
    score.add_argument("--out", type=Path, default=Path("evaluation"), help="directory to write")
    score.add_argument("--protocol", default="card", choices=["card", "standard"])
    score.add_argument(
        "--size", type=_sizes, help="resize and centre crop, in pixels; several: 256,512 (256)"
    )
    score.add_argument("--limit", type=_positive, help="only the first images")
    score.add_argument("--perceptual", default="lpips_vgg", choices=["lpips_vgg", "st_lpips_alex"])
    score.add_argument("--vgg", help="VGG16 features file")
    score.add_argument("--inception", help="Inception file, for rFID")
    score.add_argument("--device", type=_device, help="cpu or cuda")
    score.add_argument(
        "--batch-size",
        type=_positive,
        default=16,
        help="on a GPU, at 256 pixels; fewer at larger sizes; a CPU takes 1",
    )
    score.add_argument("--compare", nargs=2, metavar=("A", "B"), help="is B better than A?")
    score.add_argument(
        "--baselines", action="store_true", help="add the rows mean colour and 8 x 8 means"
    )
    score.add_argument(
        "--latent-noise",
        type=_sigmas,
        default=[],
        metavar="SIGMA,...",
        help="add rows decoded from z + sigma std(z) e, such as 0.1,0.2,0.4",
    )
    score.add_argument(
        "--tiled",
        type=_positive,
        nargs="?",
        const=512,
        metavar="PIXELS",
        help="measure the seams of decoding in tiles as diffusers and ComfyUI do (512)",
    )
    score.add_argument(
        "--latents-scaled",
        choices=["no", "yes", "sd", "sdxl", "sd3", "flux"],
        help="whether --latents are a sampler's: by the scale the VAE states, or that of a family",
    )

    card = add("card", _card, "Writes the model card of an export, with measured numbers only.")
    card.add_argument("export", type=Path, help="directory that export wrote")
    card.add_argument("--scores", type=Path, help="scores.json that evaluate wrote")
    licenses = card.add_mutually_exclusive_group()
    licenses.add_argument("--license", help="identifier on the hub, such as mit; never guessed")
    licenses.add_argument("--license-file", type=Path, help="text of a license of your own")
    card.add_argument("--base-model", metavar="OWNER/NAME", help="on the hub; never guessed")
    card.add_argument("--published", action="store_true", help="quote the published scores too")
    card.add_argument(
        "--no-pictures",
        action="store_true",
        help="leave out strip.png, photographs of the evaluation, which is copied otherwise",
    )

    push = add("push", _push, "Uploads an export to the Hugging Face hub; a dry run first.")
    push.add_argument("export", type=Path, help="directory that export wrote")
    push.add_argument("repository", metavar="OWNER/NAME", help="on the hub; made if needed")
    push.add_argument("--upload", action="store_true", help="do it; without, only list the files")
    push.add_argument("--private", action="store_true", help="make a new repository private")
    push.add_argument("--pictures", action="store_true", help="upload strip.png, of photographs")

    pack = add("pack", _pack, "Packs images into WebDataset shards.")
    pack.add_argument(
        "images",
        type=Path,
        nargs="+",
        help="folder, searched recursively; or parquet files of the Hugging Face hub, or a glob",
    )
    pack.add_argument("out", type=Path, help="directory of the shards")
    pack.add_argument("--per-shard", type=int, default=1000, help="images in each shard")
    pack.add_argument("--workers", type=_positive, help="processes (all cores)")
    pack.add_argument("--reencode", action="store_true", help="re-encode the images as JPEG")

    split = add("split", _split, "Splits photographs into training and held-out, by content.")
    split.add_argument("images", type=Path, help="folder, searched recursively; only read")
    split.add_argument("out", type=Path, help="new directory: training/ and held_out/ in it")
    split.add_argument(
        "--held-out",
        type=_count_or_share,
        metavar="N|SHARE",
        help="how many, or which share such as 0.05 or 5%% (5%%, but 10 to 500)",
    )
    split.add_argument("--seed", type=int, default=0, help="another seed, another choice (0)")

    index = add(
        "index", _index_verb, "Indexes shards once: where the images are, and their metadata."
    )
    index.add_argument("source", help="brace pattern, glob, directory, list file or address")
    index.add_argument("--filter", action="append", default=[], help="such as 'width >= 256'")
    index.add_argument("--index-dir", help="where to keep it (beside the shards)")
    index.add_argument("--workers", type=_positive, default=os.cpu_count() or 1, help="processes")
    index.add_argument("--cache-dir", help="where remote shards are cached")
    index.add_argument("--cache-gib", type=_above_zero, default=100.0, help="its size, at most")

    fetch = add("fetch", _fetch, "Downloads VGG16's features and Inception, once.")
    fetch.add_argument(
        "networks", nargs="*", metavar="vgg|inception", help="both, if none is named"
    )
    fetch.add_argument("--url", help="another place of the same file, of one network")

    state = add(
        "status", _status, "Reports the state of a run from its files: running, ended or dead."
    )
    state.add_argument("run", type=Path, help="run directory")
    state.add_argument("--json", action="store_true", help="print one JSON object")
    state.add_argument("--html", type=Path, help="write a page with curves to this file")

    config = add("config", _config, "Shows, compares or explains recipes.")
    config.add_argument("action", choices=["show", "diff", "schema"])
    config.add_argument("arguments", nargs="*", metavar="CONFIG [key=value ...]")
    config.add_argument("--markdown", action="store_true", help="schema: print docs/settings.md")

    speed = add("benchmark", _benchmark, "Measures a recipe's speed and memory on this machine.")
    speed.add_argument("config", help="recipe: a YAML file, or the name of a shipped one")
    speed.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    speed.add_argument("--json", action="store_true", help="print one JSON object")
    speed.add_argument("--iterations", type=int, default=10, help="iterations measured")

    demo = add("demo", _demo, "Runs the whole chain in minutes on a CPU.")
    demo.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    demo.add_argument("--run-dir", type=Path, default=Path("runs/demo"))
    demo.add_argument("--training", help="shards in place of the package's photographs")
    demo.add_argument("--held-out", type=Path, help="folder of photographs to score on")
    demo.add_argument("--length", type=_above_zero, default=1.0, help="multiplies the iterations")
    return parser


# --- the verbs ------------------------------------------------------------------------------


def _train_verb(args: argparse.Namespace) -> int:
    from kl_f8_train import config as configs
    from kl_f8_train.files import check_writable
    from kl_f8_train.run_dir import claimed

    if args.dry_run:
        return _examine(args, allow_changes=args.allow_changes)
    if args.json:
        raise UsageError("--json: a training prints no JSON; give --dry-run with it")
    end_with_launcher()  # before anything heavy is imported
    config = configs.load(configs.find_recipe(args.config), args.overrides)
    launched(config.compute.num_nodes)
    run_dir = Path(config.run_dir)
    if not run_dir.is_dir():
        _must_be_there(config.init.weights, "init.weights=")
    first = all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    if first:
        print(f"{config.name} in {config.run_dir}: loading ...", flush=True)
    resumes = first and run_dir.is_dir()
    if resumes:
        check_writable(run_dir)
    # Before torch, whose import may take minutes: `status` would call the run stopped.
    with claimed(run_dir) if resumes else contextlib.nullcontext():
        from kl_f8_train.run.train import train

        return train(config, args.allow_changes)


def _doctor(args: argparse.Namespace) -> int:
    if args.config is None:
        raise UsageError("doctor takes a recipe: kl-f8-train doctor CONFIG [key=value ...]")
    return _examine(args, in_full=args.all)


def _examine(args: argparse.Namespace, allow_changes: bool = False, in_full: bool = False) -> int:
    """Runs doctor: with `as_json` or `in_full` every line, otherwise one screen."""
    from kl_f8_train import config as configs

    recipe, overrides, as_json = args.config, args.overrides, args.json
    path = configs.find_recipe(recipe)
    launched()
    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
        if as_json or in_full:
            say("loading ...")
            from kl_f8_train.check.doctor import examine

            report = examine(path, overrides, say, allow_changes)
        else:
            dry_run = args.verb is _train_verb
            report = _examine_briefly(recipe, path, overrides, allow_changes, dry_run)
    if as_json:
        print(json.dumps(report.as_json()))
    for error in report.crashes if args.debug else ():
        traceback.print_exception(error)
    return report.exit_code


def _examine_briefly(
    recipe: str, path: Path, overrides: list[str], allow_changes: bool, dry_run: bool
) -> "Report":
    """One line that grows while doctor works, then its screen, then the command that comes next."""
    print("loading", end=" ", flush=True)
    from kl_f8_train.check.doctor import examine

    screen: list[str] = []

    def begin(title: str) -> None:
        print(f"... {title}", end=" ", flush=True)

    report = examine(path, overrides, say, allow_changes, brief=screen.append, begin=begin)
    print()
    number = next(i for i, line in enumerate(screen) if line.startswith(("GO", "NO GO")))
    lines = [*screen[:number], "all settings and figures: the same command with --all"]
    if not report.problems:
        lines.append(f"next: {_after_doctor(recipe, overrides, allow_changes, dry_run)}")
    print("\n".join([*lines, *screen[number:]]))
    return report


def _after_doctor(recipe: str, overrides: list[str], allow_changes: bool, dry_run: bool) -> str:
    """The command that trains; from a long one with --dry-run, how to get it."""
    allowed = ["--allow-changes"] * allow_changes
    command = shlex.join(["kl-f8-train", "train", recipe, *overrides, *allowed])
    if dry_run and len(command) > LONGEST_NEXT:
        return "the same command without --dry-run"
    return command


def _must_be_there(weights: str, key: str = "") -> None:
    from kl_f8_train.weights import hub

    here = weights == shipped.BASE_NAME or Path(weights).exists()
    if not here and not hub.is_id(weights):
        raise MissingInputError(
            f"{key}{weights}: no such file; expected a weight file, a diffusers folder, a run "
            f"directory or a hub id OWNER/NAME{like_path(weights, [shipped.BASE_NAME])}"
        )


def _inspect(args: argparse.Namespace) -> int:
    _must_be_there(args.weights)
    from kl_f8_train.weights import weight_file

    select = "raw" if args.raw else "ema" if args.ema is None else _selection(args.ema)
    found = weight_file.report(*weight_file.read_weights(args.weights, select))
    print(json.dumps(found, indent=2) if args.json else weight_file.describe(found))
    return 0


def _export(args: argparse.Namespace) -> int:
    if not args.run.exists():
        raise MissingInputError(
            f"run {args.run}: no such directory or checkpoint; check the path{like_path(args.run)}"
        )
    if args.images and not args.images.is_dir():
        raise MissingInputError(f"--images {args.images}: no such folder; give photographs")
    from kl_f8_train.publish.export import LAYOUTS, export

    out = export(
        args.run,
        args.out,
        raw=args.raw,
        ema=args.ema,
        best=args.best,
        dtype=args.dtype,
        layouts=args.format or LAYOUTS,
        average=args.average,
        pictures=args.images,
        family=args.family,
        fp16_safe=args.fp16_safe,
        force=args.force,
        say=say,
    )
    say(f"next: {_after_export(out)}")
    return 0


def _after_export(out: Path) -> str:
    """The card of an export with its scores; before there are any, the evaluation that makes them.

    Of an export without held-out photographs, or whose base is not here, the card without scores.
    """
    import yaml

    from kl_f8_train.publish import card

    scores = Path("evaluation") / "scores.json"
    if card.are_scores_of(scores, out):
        return _card_command(out, str(scores))
    config = yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))
    base, pictures = config["init"]["weights"], config["log"]["pictures"]
    files = sorted([*out.glob("*.safetensors"), *out.glob("*.ckpt"), *out.glob("diffusers")])
    with contextlib.suppress(MissingInputError):
        _must_be_there(base)
        if files and pictures and Path(pictures).is_dir():
            command = ["kl-f8-train", "evaluate", f"base={base}", f"mine={files[-1]}"]
            command += ["--images", pictures, "--compare", "base", "mine"]
            network = config["loss"]["perceptual"]
            return shlex.join([*command, *["--perceptual", network] * (network != "lpips_vgg")])
    return shlex.join(["kl-f8-train", "card", str(out)])


def _card_command(export: Path, scores: str) -> str:
    """How the card of an export gets its scores."""
    return shlex.join(["kl-f8-train", "card", str(export), "--scores", scores])


def _fp16_safe(args: argparse.Namespace) -> int:
    _must_be_there(args.weights)
    if args.images and not args.images.is_dir():
        raise MissingInputError(f"--images {args.images}: no such folder; give photographs")
    from kl_f8_train.publish.export import make_fp16_safe

    make_fp16_safe(args.weights, args.out, args.images, args.family, args.force, say)
    return 0


def _inject(args: argparse.Namespace) -> int:
    from kl_f8_train.publish.inject import inject

    for line in inject(args.vae, args.into, args.out, args.force):
        print(line)
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    named = [_name_path_select(text) for text in args.weights]
    if len({name for name, *_ in named}) < len(named):
        raise UsageError("two weights have the same name; give NAME=WEIGHTS")
    _check_compared(args.compare, [name for name, *_ in named])
    if args.latents is not None:
        return _evaluate_latents(args, named)
    if args.images is None:
        args.parser.error("the following arguments are required: --images, or --latents")
    if args.latents_scaled:
        raise UsageError("--latents-scaled is of saved latents; give --latents with it")
    _check_places(args.images, args.out)
    from kl_f8_train.score import report
    from kl_f8_train.score.evaluate import PROTOCOLS, evaluate

    sizes = args.size or [256]
    with _bar("image") as progress:
        result = evaluate(
            named,
            args.images,
            args.out,
            protocol=PROTOCOLS[args.protocol],
            size=sizes[0] if len(sizes) == 1 else sizes,
            limit=args.limit,
            perceptual_name=args.perceptual,
            vgg=args.vgg,
            inception=args.inception,
            device=args.device,
            batch_size=args.batch_size,
            progress=progress,
            with_baselines=args.baselines,
            compared=args.compare or (),
            latent_noise=args.latent_noise,
            tile=args.tiled,
        )
    if result is not None:  # on the first rank: the files are there once
        places = [args.out] if len(sizes) == 1 else [args.out / str(size) for size in sizes]
        for place in places:
            print(f"report: {report.write(place)}")
        chosen = args.compare[1] if args.compare else named[-1][0]
        if then := _after_scores(places[0], *next(n for n in named if n[0] == chosen)):
            print(f"next: {then}")
    return 0


def _evaluate_latents(args: argparse.Namespace, named: list[tuple[str, Path, str]]) -> int:
    """evaluate --latents: no photographs, so nothing that is measured against them."""
    given = {
        "--compare": args.compare,
        "--baselines": args.baselines,
        "--latent-noise": args.latent_noise,
        "--tiled": args.tiled,
    }
    for flag, value in given.items():
        if value:
            raise UsageError(f"{flag} needs photographs to measure against; leave out --latents")
    if len(args.size or ()) > 1:
        raise UsageError("--size: latents have their own; one size of --images, for FID")
    if not args.latents.exists():
        raise MissingInputError(f"--latents {args.latents}: no such folder or file; check the path")
    _check_out(args.out)
    if args.images:
        _check_places(args.images, args.out)
    from kl_f8_train.score import generated
    from kl_f8_train.score.evaluate import PROTOCOLS

    with _bar("latent") as progress:
        generated.evaluate_latents(
            named,
            str(args.latents),
            args.out,
            scaled=args.latents_scaled,
            photographs=args.images,
            size=args.size[0] if args.size else None,
            limit=args.limit,
            protocol=PROTOCOLS[args.protocol],
            perceptual_name=args.perceptual,
            vgg=args.vgg,
            inception=args.inception,
            device=args.device,
            progress=progress,
        )
    print(f"pictures: {args.out / 'strip.png'}, {args.out / 'pictures'}")
    return 0


def _after_scores(out: Path, name: str, path: Path, select: str) -> str:
    """What comes next for scored weights: export, the card of their export, or nothing."""
    from kl_f8_train.run_dir import is_run

    if (path.parent / "export.json").is_file():
        return _card_command(path.parent, str(out / "scores.json"))
    if is_run(path) or is_run(path.parent.parent):
        taken = ["--raw"] if select == "raw" else ["--ema", select[4:]] * (select != "ema")
        return shlex.join(["kl-f8-train", "export", str(path), *taken])
    return ""


def _check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: is a file; expected a directory: name another place")


def _check_places(images: str, out: Path) -> None:
    """Raises UsageError or MissingInputError for what the two paths alone show."""
    source = Path(images)
    _check_out(out)
    if not any(sign in images for sign in "{*?[:") and not source.exists():
        raise MissingInputError(
            f"--images {images}: no such folder, shard or list of shards; check the path"
            f"{like_path(images)}"
        )
    if source.is_file() and source.suffix not in (".tar", ".txt") and not is_tarfile(source):
        raise MissingInputError(
            f"--images {images}: expected a folder of images, .tar shards or a .txt list of them, "
            "got another file; name its folder"
        )
    if source.is_dir() and source.resolve() == out.resolve():
        raise UsageError(
            f"--out {out}: is the folder of --images, and its pictures would be scored the next "
            f"time; give another, such as {out / 'evaluation'}"
        )


def _check_compared(compared: list[str] | None, names: list[str]) -> None:
    unknown = [name for name in compared or () if name not in names]
    if unknown:
        raise UsageError(f"--compare {unknown[0]}: no such model; named are {', '.join(names)}")
    if compared and compared[0] == compared[1]:
        raise UsageError(f"--compare {compared[0]} {compared[1]}: expected two different models")


def _card(args: argparse.Namespace) -> int:
    from kl_f8_train.run_dir import export_meant

    if args.license and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", args.license):
        raise UsageError(
            f"--license {args.license}: expected the hub's identifier, in lower case, such as mit "
            "or creativeml-openrail-m; for another license: --license-file FILE"
        )
    if args.base_model and not re.fullmatch(r"[\w.-]+/[\w.-]+", args.base_model):
        raise UsageError(f"--base-model {args.base_model}: expected OWNER/NAME, as on the hub")
    needed = (
        (args.export / "export.json", f"; give {export_meant(args.export)}"),
        (args.scores, "; `kl-f8-train evaluate` writes scores.json"),
        (args.license_file, "; give the text of the license"),
    )
    for path, remedy in needed:
        if path is not None and not path.is_file():
            raise MissingInputError(f"{path}: no such file{remedy}")
    from kl_f8_train.publish import card

    details = card.Details(
        card.license_fields(args.license, args.license_file), args.base_model, args.published
    )
    readme = card.write(
        args.export, args.scores, details, args.license_file, pictures=not args.no_pictures, say=say
    )
    print(readme)
    print(f"next: kl-f8-train push {shlex.quote(str(args.export))} OWNER/NAME")
    return 0


def _push(args: argparse.Namespace) -> int:
    from kl_f8_train.publish import push

    upload = push.plan_upload(args.export, args.repository, args.pictures)
    print("\n".join(upload.lines()))
    if args.upload:
        print(push.push(upload, args.private, print))
    else:
        print("a dry run: nothing was uploaded; add --upload to do it")
    return 0


def _pack(args: argparse.Namespace) -> int:
    absent = [
        place for place in args.images if not (place.exists() or set("*?[") & set(f"{place}"))
    ]
    if absent:
        raise MissingInputError(
            f"{absent[0]}: no such folder; expected one of photographs, or .parquet files"
        )
    from kl_f8_train.data.pack import pack

    with _bar("image") as progress:
        result = pack(
            args.images,
            args.out,
            per_shard=args.per_shard,
            workers=args.workers,
            reencode=args.reencode,
            progress=progress,
        )
    print(result)
    print(_before_training(args.out, f"data.sources={args.out}"))
    return 0


def _split(args: argparse.Namespace) -> int:
    from kl_f8_train.data.split import HELD_OUT, TRAINING, split

    with _bar("image") as progress:
        result = split(args.images, args.out, args.held_out, args.seed, progress)
    print(result)
    settings = [f"data.sources={args.out / TRAINING}", f"log.pictures={args.out / HELD_OUT}"]
    print(_before_training(args.out, *settings))
    return 0


def _before_training(out: Path, *settings: str) -> str:
    """How to look at a training on images that were just made ready, in a new run directory."""
    name = out.resolve().name
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    run = next(place for place in (Path("runs", name) for name in names) if not place.exists())
    given = [f"init.weights={USUAL_BASE}", "init.family=sd", *settings, f"run_dir={run}"]
    return (
        "to start from a VAE of your own, give its file as init.weights\n"
        f"next: {shlex.join(['kl-f8-train', 'doctor', 'single_gpu', *given])}"
    )


def _index_verb(args: argparse.Namespace) -> int:
    from kl_f8_train.data.index import build_index, expand, index_directory
    from kl_f8_train.data.shard_cache import ShardCache
    from kl_f8_train.data.sources import TarSource, parse_filters
    from kl_f8_train.files import cache_dir

    filters = parse_filters(args.filter)
    locations = expand(args.source)
    directory = index_directory(locations, args.index_dir)
    root = Path(args.cache_dir) if args.cache_dir else cache_dir() / "shards"
    cache = ShardCache(root, round(args.cache_gib * 2**30))
    with _bar("shard") as progress:
        build_index(locations, directory, cache, args.workers, progress)
    source = TarSource(directory, filters, cache)
    print("\n".join([*source.describe(), f"fields: {', '.join(source.columns) or 'none'}"]))
    print(f"index: {directory}")
    for message in source.broken.values():
        print(message)
    if source.unfetched():
        raise RunFailedError("some shards could not be fetched, as said above; run this again")
    if source.broken:
        raise MissingInputError(
            f"{len(source.broken):,} of {counted(len(locations), 'shard', 's')} "
            f"{are(len(source.broken))} broken, as said above; download "
            "them again, then rerun this command, or train with data.bad_shards=skip"
        )
    return 0


@contextlib.contextmanager
def _bar(unit: str) -> Iterator[Callable[[int, int], None]]:
    """Progress as a function (done, total): a bar on a terminal, elsewhere a line now and then."""
    from tqdm import tqdm

    if not sys.stderr.isatty():
        yield partial(_progress_line, unit, time.monotonic(), [0.0])
        return
    with tqdm(unit=unit, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


def _progress_line(unit: str, began: float, due: list[float], done: int, total: int) -> None:
    """A line to standard error at the start, after 5, 10, 20, ... seconds, and at the end."""
    passed = time.monotonic() - began
    if passed < due[0] and done < total:
        return
    due[0] = max(5.0, min(2 * passed, passed + 300))
    fair = total <= 20 * done < 20 * total  # the first items take longer than the others
    left = f", {duration(passed / done * (total - done))} left" if fair else ""
    say(f"{done:,} of {counted(total, unit, 's')}, {duration(passed)}{left}", aside=True)


def _fetch(args: argparse.Namespace) -> int:
    names = args.networks or ["vgg", "inception"]
    unknown = [name for name in names if name not in ("vgg", "inception")]
    if unknown:
        raise UsageError(f"fetch {unknown[0]}: there are vgg and inception")
    if args.url and len(names) > 1:
        raise UsageError("--url is the place of one network: fetch vgg --url ...")
    from kl_f8_train.weights.pretrained import NETWORKS, fetch

    for name in names:
        print(f"{NETWORKS[name].title}: {fetch(NETWORKS[name], args.url)}", flush=True)
    return 0


def _status(args: argparse.Namespace) -> int:
    from kl_f8_train.run import status

    now = time.time()
    found = status.read_status(args.run, now)
    if args.html:
        status.write_html(args.run, found, now, args.html)
    print(json.dumps(asdict(found)) if args.json else "\n".join(status.describe(found)))
    if args.html:
        say(f"page: {args.html}", aside=args.json)
    return 0


def _print_schema(keys: list[str]) -> None:
    """Every setting, or those of the keys and groups that are named."""
    from kl_f8_train import config as configs

    settings = configs.schema()
    for key in keys:
        if not any(name == key or name.startswith(f"{key}.") for name, *_ in settings):
            raise UsageError(
                f"config schema: {key}: no such setting or group; `kl-f8-train config schema` "
                "prints all"
            )
    beginnings = tuple(f"{key}." for key in keys)
    for name, kind, default, doc in settings:
        if not keys or name in keys or name.startswith(beginnings):
            stated = f"default {default}" if default else "no default, a recipe states it"
            print(f"{name}\n    {doc}\n    {kind}; {stated}")


def _config(args: argparse.Namespace) -> int:
    from kl_f8_train import config as configs

    if args.markdown:
        if args.action != "schema":
            raise UsageError(
                f"--markdown: config {args.action} has no such page; config schema has"
            )
        from kl_f8_train import reference

        print(reference.settings_page(), end="")
        return 0
    if args.action == "schema":
        _print_schema(args.arguments)
        return 0
    count = 2 if args.action == "diff" else 1
    if len(args.arguments) < count:
        raise UsageError(
            f"config {args.action}: expected {count} recipe{'s' * (count > 1)}, got "
            f"{len(args.arguments)}; give a YAML file or a shipped name such as ft_ema for each"
        )
    overrides = args.arguments[count:]
    names = args.arguments[:count]
    loaded = [configs.resolve(configs.find_recipe(name), overrides) for name in names]
    if args.action == "show":
        print(configs.to_yaml(loaded[0]), end="")
    else:
        print("\n".join(configs.differences(loaded[0], loaded[1], machine=True)))
    return 0


def _benchmark(args: argparse.Namespace) -> int:
    from kl_f8_train import config as configs

    if args.iterations < 1:
        raise UsageError(f"--iterations {args.iterations}: expected 1 or more")
    config = configs.load_without_inputs(configs.find_recipe(args.config), args.overrides)
    from kl_f8_train.check.benchmark import benchmark, describe

    result = benchmark(config, args.iterations, partial(say, aside=True))
    print(json.dumps(result, indent=1) if args.json else describe(result))
    return 0


def _demo(args: argparse.Namespace) -> int:
    say(f"demo in {args.run_dir}: loading, and packing photographs ...")
    from kl_f8_train.demo import demo

    demo(args.run_dir, args.training, args.held_out, args.length, args.overrides)
    return 0


def _name_path_select(text: str) -> tuple[str, Path, str]:
    """[NAME=]WEIGHTS[@raw|@DECAY] -> name, path, and which weights of a training checkpoint."""
    name, equals, path = text.partition("=")
    if not equals or os.sep in name:
        name, path = "", text
    mark = re.search(r"@(raw|[0-9]*\.?[0-9]+(e-[0-9]+)?)$", path)
    if mark and mark[1] != "raw" and Path(path).exists():
        mark = None  # a name that ends so
    place = Path(path[: mark.start()] if mark else path)
    if not name:
        ending = "" if place.is_dir() else r"(\.vae)?\.(safetensors|ckpt|pth?|bin|zip)$"
        name = re.sub(ending, "", place.absolute().name) + (mark[0] if mark else "")
    if mark is None or mark[1] == "raw":
        return name, place, mark[1] if mark else "ema"
    return name, place, _selection(float(mark[1]))


def _selection(decay: float) -> str:
    return f"ema-{shortest(decay)}"


def _decay(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"got {text}, expected a decay from 0, below 1, as 0.9999")


def _above_zero(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"got {text}, expected a number above 0")


def _count_or_share(text: str) -> float:
    """50 -> 50, 0.05 and 5% -> 0.05."""
    with contextlib.suppress(ValueError):
        found = float(text[:-1]) / 100 if text.endswith("%") else float(text)
        if 0 < found < 1 or (found.is_integer() and found >= 1 and not text.endswith("%")):
            return found
    raise argparse.ArgumentTypeError(
        f"got {text}, expected a whole number, or a share above 0 and below 1 such as 0.05 or 5%"
    )


def _device(text: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"got {text}, expected cpu, cuda or cuda:NUMBER")
    return text


def _sizes(text: str) -> list[int]:
    """256,512 -> those sizes, each once."""
    return list(dict.fromkeys(_positive(part.strip()) for part in text.split(",")))


def _sigmas(text: str) -> list[float]:
    """0,0.1,0.4 -> those sigmas, each once; 0 is always measured."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [-1.0]
    if not all(0 <= sigma <= 10 for sigma in found):
        raise argparse.ArgumentTypeError(f"got {text}, expected numbers from 0 to 10: 0.1,0.2,0.4")
    return list(dict.fromkeys(found))


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"got {text}, expected a whole number above 0")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
