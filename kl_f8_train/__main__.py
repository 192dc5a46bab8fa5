"""The command line: each verb checks its flags and hands over; heavy imports happen inside it."""

import argparse
import contextlib
import errno
import io
import json
import os
import re
import shlex
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from kl_f8_train import next_command
from kl_f8_train.arguments import build_parser, name_path_select
from kl_f8_train.averages import requested
from kl_f8_train.errors import (
    MissingInputError,
    RunFailedError,
    UsageError,
    UserError,
    check_folder,
)
from kl_f8_train.launch import end_children, is_first_to_say, launched, world_size
from kl_f8_train.lifetime import end_with_launcher
from kl_f8_train.output import progress_bar, say
from kl_f8_train.overrides import parse_sources
from kl_f8_train.run.paths import (
    NETWORK,
    all_of,
    check_file,
    check_images,
    check_paths,
    check_pattern,
)
from kl_f8_train.units import are, counted, written
from kl_f8_train.weights import hub

if TYPE_CHECKING:
    from kl_f8_train.check.findings import Report


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
        hint = "; name all weights before the first flag" if args.verb == "evaluate" else ""
        args.parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    try:
        return VERBS[args.verb](args)
    except UserError as error:
        return _complain(str(error), error.exit_code, args.debug)
    except KeyboardInterrupt:
        return _complain("interrupted", 130, debug=False)
    except BrokenPipeError:  # `... | head` closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # a full, closed or vanished disk, where nothing said it better
        kind = MissingInputError if error.errno == errno.ENAMETOOLONG else UserError
        return _complain(_remedy(error), kind.exit_code, args.debug)
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
    if not where:
        try:
            os.getcwd()
        except FileNotFoundError:
            return "the current directory has been deleted; change to another"
    if error.errno == errno.ENAMETOOLONG:
        return f"{where}{error.strerror}, so that it cannot exist; check the path"
    return (
        f"{where}{error.strerror or error}; check that the path exists, is writable and has space"
        "\n--debug shows where"
    )


def _complain(message: str, exit_code: int, debug: bool) -> int:
    if not is_first_to_say(message):
        return exit_code
    if debug:
        traceback.print_exc()
    say(f"kl-f8-train: {message}", aside=True)
    return exit_code


# --- the verbs ------------------------------------------------------------------------------


def _train(args: argparse.Namespace) -> int:
    from kl_f8_train import config as configs
    from kl_f8_train.files import check_writable
    from kl_f8_train.run.tracking import check_tensorboard
    from kl_f8_train.run_dir import begun

    if args.dry_run:
        return _examine(args, allow_changes=args.allow_changes)
    if args.json:
        raise UsageError("--json: a training prints no JSON; give --dry-run with it")
    end_with_launcher()  # before anything heavy is imported
    config = configs.load(configs.find_recipe(args.config), args.overrides)
    launched(config.compute.num_nodes)
    run_dir = Path(config.run_dir)
    # The first process of the run speaks for it; torch, which would know, is not imported yet.
    first = all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    resumes = first and run_dir.is_dir()
    if resumes:
        check_writable(run_dir)
    # Before torch, whose import may take minutes: `status` would call the run stopped.
    with begun(run_dir) if resumes else contextlib.nullcontext():
        if config.log.tensorboard:
            check_tensorboard()
        check_paths(config)
        if first:
            print(f"{config.name} in {config.run_dir}: loading ...", flush=True)
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
    # With --json, standard output holds that object alone.
    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
        if as_json or in_full:
            say("loading ...")
            from kl_f8_train.check.doctor import examine

            report = examine(path, overrides, say, allow_changes)
        else:
            dry_run = args.verb == "train"
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
    more = ["all settings and figures: the same command with --all"]
    if report.problems:
        number = len(screen)
    else:
        then = next_command.after_doctor(recipe, overrides, allow_changes, dry_run)
        more.append(f"next: {then}")
    print("\n".join([*screen[:number], *more, *screen[number:]]))
    return report


def _inspect(args: argparse.Namespace) -> int:
    hub.check_exists(args.weights)
    from kl_f8_train.weights import weight_file

    select = requested(args.raw, args.ema)
    found = weight_file.report(*weight_file.read_weights(args.weights, select, args.prefix))
    print(json.dumps(found, indent=2) if args.json else weight_file.describe(found))
    return 0


def _export(args: argparse.Namespace) -> int:
    named = [("run ", args.run), *(("--average ", path) for path in args.average)]
    wrong = "no such directory or checkpoint; check the path"
    all_of(
        *(partial(check_file, flag, path, wrong, folders=True) for flag, path in named),
        partial(check_folder, "--images ", args.images),
    )
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
    say(f"next: {next_command.after_export(out)}")
    return 0


def _fp16_safe(args: argparse.Namespace) -> int:
    all_of(
        partial(hub.check_exists, args.weights),
        partial(check_folder, "--images ", args.images),
    )
    from kl_f8_train.publish.export import make_fp16_safe

    make_fp16_safe(args.weights, args.out, args.images, args.family, args.force, say)
    return 0


def _inject(args: argparse.Namespace) -> int:
    wrong = "no such file; expected a full checkpoint, .safetensors or .ckpt"
    all_of(
        partial(hub.check_exists, str(args.vae), "weights "),
        partial(check_file, "", args.into, wrong, folders=True),  # `inject` says what of those
    )
    from kl_f8_train.publish.inject import inject

    for line in inject(args.vae, args.into, args.out, args.force):
        print(line)
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from kl_f8_train.score.protocol import PROTOCOLS, selections

    named = [name_path_select(text) for text in args.weights]
    selections(named, args.compare or ())
    if args.latents is not None:
        return _evaluate_latents(args, named)
    if args.images is None:
        args.parser.error("the following arguments are required: --images, or --latents")
    if args.latents_scaled:
        raise UsageError("--latents-scaled is of saved latents; give --latents with it")
    _check_evaluated(args, [path for _, path, _ in named])
    from kl_f8_train.score.evaluate import evaluate

    sizes = args.size or [256]
    with progress_bar("image") as progress:
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
        _write_reports(args, named, sizes)
    return 0


def _write_reports(
    args: argparse.Namespace, named: list[tuple[str, Path, str]], sizes: list[int]
) -> None:
    from kl_f8_train.score import report

    places = [args.out] if len(sizes) == 1 else [args.out / str(size) for size in sizes]
    for place in places:
        print(f"report: {report.write(place)}")
    scored = {name: (path, select) for name, path, select in named}
    chosen = args.compare[1] if args.compare else named[-1][0]
    if then := next_command.after_scores(places[0], *scored[chosen]):
        print(f"next: {then}")


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
    _check_evaluated(args, [path for _, path, _ in named])
    from kl_f8_train.score import generated
    from kl_f8_train.score.protocol import PROTOCOLS

    with progress_bar("latent") as progress:
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


def _check_evaluated(args: argparse.Namespace, weights: list[Path]) -> None:
    """Raises UsageError or MissingInputError for what the paths alone show."""
    if args.out.exists() and not args.out.is_dir():
        raise UsageError(f"--out {args.out}: is a file; expected a directory: name another place")
    if args.images and args.out.is_dir() and args.out.resolve() == Path(args.images).resolve():
        raise UsageError(
            f"--out {args.out}: is the folder of --images, and its pictures would be scored the "
            f"next time; give another, such as {args.out / 'evaluation'}"
        )
    if world_size() > 1:  # they meet first, or the others would wait for one that misses a file
        return
    vgg = args.vgg if args.perceptual == "lpips_vgg" else None
    all_of(
        *(partial(hub.check_exists, str(path), "weights ") for path in weights),
        partial(check_images, args.images),
        partial(check_file, "--latents ", args.latents, "no such folder or file", folders=True),
        partial(check_file, "--vgg ", vgg, NETWORK.format("VGG16's features")),
        partial(check_file, "--inception ", args.inception, NETWORK.format("Inception's weights")),
    )


def _card(args: argparse.Namespace) -> int:
    from kl_f8_train.run_dir import EXPORT_FILE, export_meant

    if args.license and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", args.license):
        raise UsageError(
            f"--license {args.license}: expected the hub's identifier, in lower case, such as mit "
            "or creativeml-openrail-m; for another license: --license-file FILE"
        )
    if args.base_model and not re.fullmatch(r"[\w.-]+/[\w.-]+", args.base_model):
        raise UsageError(f"--base-model {args.base_model}: expected OWNER/NAME, as on the hub")
    needed = (
        (args.export / EXPORT_FILE, f"give {export_meant(args.export)}"),
        (args.scores, "`kl-f8-train evaluate` writes scores.json"),
        (args.license_file, "give the text of the license"),
    )
    all_of(*(partial(check_file, "", path, f"no such file; {remedy}") for path, remedy in needed))
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
    wrong = "no such folder; expected one of photographs, or .parquet files"
    places = [place for place in args.images if not set("*?[") & set(f"{place}")]
    all_of(*(partial(check_file, "", place, wrong, folders=True) for place in places))
    from kl_f8_train.data.pack import pack

    with progress_bar("image") as progress:
        result = pack(
            args.images,
            args.out,
            per_shard=args.per_shard,
            workers=args.workers,
            reencode=args.reencode,
            progress=progress,
        )
    print(result)
    print(next_command.before_training(args.out, f"data.sources={args.out}"))
    return 0


def _split(args: argparse.Namespace) -> int:
    from kl_f8_train.data.split import HELD_OUT, TRAINING, split

    with progress_bar("image") as progress:
        result = split(args.images, args.out, args.held_out, args.seed, progress)
    print(result)
    settings = [f"data.sources={args.out / TRAINING}", f"log.pictures={args.out / HELD_OUT}"]
    print(next_command.before_training(args.out, *settings))
    return 0


def _index(args: argparse.Namespace) -> int:
    from kl_f8_train.data.index import build_index, expand, index_directories, index_directory
    from kl_f8_train.data.shard_cache import ShardCache
    from kl_f8_train.data.sources import TarSource, parse_filters
    from kl_f8_train.files import cache_dir

    filters = parse_filters(args.filter)
    locations = expand(args.source)
    directory = index_directory(locations, args.index_dir)
    root = Path(args.cache_dir) if args.cache_dir else cache_dir() / "shards"
    cache = ShardCache(root, round(args.cache_gib * 2**30))
    best = index_directories(locations, args.index_dir)[0]
    why = f", as {best.parent} cannot be written" if directory != best else ""
    say(f"indexing {counted(len(locations), 'shard', 's')} into {directory}{why}")
    with progress_bar("shard") as progress:
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
    if not source.counts.sum():
        remedy = "loosen the filters" if filters else "expected images beside their metadata"
        raise MissingInputError(f"{args.source}: no image to train on, as counted above; {remedy}")
    return 0


def _fetch(args: argparse.Namespace) -> int:
    names = args.networks or ["vgg", "inception"]
    unknown = [name for name in names if name not in ("vgg", "inception")]
    if unknown:
        raise UsageError(f"fetch {unknown[0]}: unknown network; expected vgg or inception")
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
    from kl_f8_train.settings import MISSING, SETTINGS, VALUES

    for key in keys:
        if key not in SETTINGS:
            raise UsageError(
                f"config schema: {key}: no such setting or group; `kl-f8-train config schema` "
                "prints all"
            )
    for name, found in VALUES.items():
        if not keys or any(f"{name}.".startswith(f"{key}.") for key in keys):
            stated = "no default, a recipe states it"
            if found.default != MISSING:
                stated = f"default {written(found.default)}"
            print(f"{name}\n    {found.doc}\n    {found.type_name}; {stated}")


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
    recipes = map(configs.find_recipe, names)
    loaded = all_of(*(partial(configs.resolve, recipe, overrides) for recipe in recipes))
    if args.action == "show":
        print(configs.to_yaml(loaded[0]), end="")
    else:
        found = configs.differences(loaded[0], loaded[1], machine=True)
        print("\n".join(found) or "no differences")
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
    shards = [source.shards for source in parse_sources(args.training or ".").values()]
    all_of(
        *(partial(check_pattern, f"--training {pattern}", pattern) for pattern in shards),
        partial(check_folder, "--held-out ", args.held_out),
    )
    say(f"demo in {args.run_dir}: loading, and packing photographs ...")
    from kl_f8_train.demo import demo

    demo(args.run_dir, args.training, args.held_out, args.length, args.overrides)
    return 0


VERBS: dict[str, Callable[[argparse.Namespace], int]] = {
    "train": _train,
    "doctor": _doctor,
    "inspect": _inspect,
    "export": _export,
    "fp16-safe": _fp16_safe,
    "inject": _inject,
    "evaluate": _evaluate,
    "card": _card,
    "push": _push,
    "pack": _pack,
    "split": _split,
    "index": _index,
    "fetch": _fetch,
    "status": _status,
    "config": _config,
    "benchmark": _benchmark,
    "demo": _demo,
}


if __name__ == "__main__":
    sys.exit(main())
