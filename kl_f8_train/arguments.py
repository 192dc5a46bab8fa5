"""The verbs of the command line, their flags, and how the flags' values are read."""

import argparse
import contextlib
import os
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from kl_f8_train import __version__
from kl_f8_train.averages import selection
from kl_f8_train.errors import UsageError, like
from kl_f8_train.facts import FAMILIES, OTHER
from kl_f8_train.launch import is_first_to_say

PURPOSES = {  # in the order of use, as in README; what --help says of each
    "fetch": "Downloads VGG16's features and Inception, once.",
    "split": "Splits photographs into training and held-out, by content.",
    "pack": "Packs images into WebDataset shards.",
    "index": "Indexes shards once: where the images are, and their metadata.",
    "inspect": "Reports what a VAE file holds, without running any of it.",
    "doctor": "Checks a run before it costs anything: go, or no go.",
    "train": "Starts a run; the same command again resumes it.",
    "status": "Reports the state of a run from its files: running, stopped, failed or ended.",
    "export": "Writes a run's EMA weights as .safetensors, .ckpt and a diffusers folder.",
    "inject": "Writes a VAE into a copy of a Stable Diffusion checkpoint.",
    "fp16-safe": "Rescales a VAE's decoder, exactly, for fp16.",
    "evaluate": "Scores VAEs on the same images, as the model card does.",
    "card": "Writes the model card of an export, with measured numbers only.",
    "push": "Uploads an export to the Hugging Face hub; a dry run first.",
    "config": "Shows, compares or explains recipes.",
    "benchmark": "Measures a recipe's speed and memory on this machine.",
    "demo": "Runs both stages, export and evaluation on a small example; minutes on a CPU.",
}
RECIPE = "recipe: a YAML file, or the name of a shipped one, such as single_gpu"
DOCUMENTATION = "README.md and docs/ (docs/quickstart.md: your own photographs)"


class _Parser(argparse.ArgumentParser):
    """Suggests what a mistyped verb or choice may have meant; takes no abbreviated flag."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{**settings, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        found = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)$", message)
        hint = like(found[1], re.findall(r"[\w-]+", found[2])) if found else ""
        for text in sys.argv[1:]:
            if re.match(r"-\w", text) and os.path.exists(text):
                hint += f"; a file whose name begins with a dash is ./{text}"
        if not is_first_to_say(message):
            sys.exit(UsageError.exit_code)
        super().error(f"{message}{hint}")


def build_parser() -> argparse.ArgumentParser:
    """Every verb and flag."""
    parser = _Parser(
        prog="kl-f8-train",
        description="Finetunes the decoder of Stable Diffusion's kl-f8 autoencoder.",
        epilog=f"Start with: kl-f8-train demo. Documentation: {DOCUMENTATION}",
        formatter_class=partial(argparse.HelpFormatter, max_help_position=16),
    )
    parser.add_argument("--version", action="version", version=__version__)
    shared = _Parser(add_help=False)
    shared.add_argument("--debug", action="store_true", help="show tracebacks")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    subs = {}
    for verb, text in PURPOSES.items():
        sub = verbs.add_parser(verb, help=text, description=text, parents=[shared])
        sub.set_defaults(verb=verb, parser=sub)
        subs[verb] = sub

    train = subs["train"]
    train.add_argument("config", help=f"{RECIPE}; or a run directory, to resume it")
    _add_overrides(train)
    train.add_argument(
        "--allow-changes", action="store_true", help="resume although the recipe differs"
    )
    train.add_argument("--dry-run", action="store_true", help="only check it, as doctor does")
    train.add_argument("--json", action="store_true", help="with --dry-run: print one JSON object")

    doctor = subs["doctor"]
    doctor.add_argument("config", nargs="?", help=f"{RECIPE}; or a run directory")
    _add_overrides(doctor)
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.add_argument("--all", action="store_true", help="every setting and figure")

    inspect = subs["inspect"]
    inspect.add_argument("weights", help="file, diffusers folder, run directory or hub id")
    taken = inspect.add_mutually_exclusive_group()
    taken.add_argument("--raw", action="store_true", help="a run's raw weights, not its EMA")
    taken.add_argument("--ema", type=_decay, metavar="DECAY", help="its EMA of this decay")
    inspect.add_argument(
        "--prefix", metavar="NAME", help="prefix of its names, in a file with several"
    )
    inspect.add_argument("--json", action="store_true", help="print JSON")

    export = subs["export"]
    export.add_argument("run", type=Path, help="run directory, or one of its checkpoints")
    export.add_argument("--out", type=_directory, help="directory to write (RUN/export)")
    taken = export.add_mutually_exclusive_group()
    taken.add_argument("--raw", action="store_true", help="the raw weights in place of the EMA")
    taken.add_argument("--ema", type=_decay, metavar="DECAY", help="the EMA of this decay")
    export.add_argument("--best", action="store_true", help="of the best validation, if it is kept")
    export.add_argument(
        "--average",
        nargs="+",
        action="extend",  # the flag may also be repeated
        type=Path,
        default=[],
        metavar="CKPT",
        help="checkpoints whose EMAs are averaged with RUN's; give RUN first",
    )
    export.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "float16", "bfloat16"],
        help="type of the single files (float32)",
    )
    export.add_argument(
        "--format",
        action="append",
        choices=["safetensors", "ckpt", "diffusers"],
        help="only this layout; may be given several times",
    )
    export.add_argument(
        "--fp16-safe",
        action=argparse.BooleanOptionalAction,
        help="rescale the decoder, exactly, so that fp16 does not overflow (where it would)",
    )

    safe = subs["fp16-safe"]
    safe.add_argument("weights", help="file, diffusers folder, run directory or hub id")
    safe.add_argument("--out", type=_directory, help="directory to write (NAME-fp16-safe)")
    for writing in (export, safe):
        add = writing.add_argument
        add("--images", type=Path, help="photographs that try half precision")
        add("--family", choices=[*FAMILIES, OTHER], help="models whose VAE it is, if not stated")
        add("--force", action="store_true", help="overwrite files")

    inject = subs["inject"]
    inject.add_argument("vae", type=Path, help="any VAE file, or a run directory (its EMA)")
    inject.add_argument("into", type=Path, help="full checkpoint, .safetensors or .ckpt")
    inject.add_argument("--out", type=Path, required=True, help="file to write")
    inject.add_argument("--force", action="store_true", help="overwrite it")

    score = subs["evaluate"]
    score.add_argument(
        "weights",
        nargs="+",
        metavar="[NAME=]WEIGHTS[@raw]",
        help="file or run; @raw: not its EMA; @0.9999: its EMA of this decay",
    )
    inputs = score.add_argument_group("what they are scored on, one of").add_argument
    inputs("--images", help="folder of photographs, or shards; with --latents: for FID")
    inputs("--latents", type=Path, metavar="DIR", help="saved latents, to decode and compare")
    score.add_argument(
        "--out", type=_directory, default=Path("evaluation"), help="directory to write (evaluation)"
    )
    score.add_argument(
        "--protocol",
        default="card",
        choices=["card", "standard"],
        help="as the published model card scores, or as papers do (card)",
    )
    score.add_argument(
        "--size", type=_sizes, help="resize and centre crop, in pixels; several: 256,512 (256)"
    )
    score.add_argument("--limit", type=_positive, help="score only the first LIMIT images")
    score.add_argument(
        "--perceptual",
        default="lpips_vgg",
        choices=["lpips_vgg", "st_lpips_alex"],
        help="network of LPIPS, or the stand-in of the demo (lpips_vgg)",
    )
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
        const=512,  # ComfyUI's; diffusers takes sample_size of its config.json, such as 512
        metavar="PIXELS",
        help="measure the seams of decoding in tiles as diffusers and ComfyUI do (512)",
    )
    score.add_argument(
        "--latents-scaled",
        choices=["no", "yes", *FAMILIES],
        help="whether --latents are a sampler's: by the scale the VAE states, or that of a family",
    )

    card = subs["card"]
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

    push = subs["push"]
    push.add_argument("export", type=Path, help="directory that export wrote")
    push.add_argument("repository", metavar="OWNER/NAME", help="on the hub; made if needed")
    push.add_argument("--upload", action="store_true", help="do it; without, only list the files")
    push.add_argument("--private", action="store_true", help="make a new repository private")
    push.add_argument("--pictures", action="store_true", help="upload strip.png, of photographs")

    pack = subs["pack"]
    pack.add_argument(
        "images",
        type=Path,
        nargs="+",
        help="folder, searched recursively; or parquet files of the Hugging Face hub, or a glob",
    )
    pack.add_argument("out", type=_directory, help="directory of the shards")
    pack.add_argument("--per-shard", type=int, default=1000, help="images in each shard")
    pack.add_argument("--workers", type=_positive, help="processes (all cores)")
    pack.add_argument("--reencode", action="store_true", help="re-encode the images as JPEG")

    split = subs["split"]
    split.add_argument("images", type=Path, help="folder, searched recursively; only read")
    split.add_argument("out", type=_directory, help="new directory: training/ and held_out/ in it")
    split.add_argument(
        "--held-out",
        type=_count_or_share,
        metavar="N|SHARE",
        help="how many, or which share such as 0.05 or 5%% (5%%, but 10 to 500)",
    )
    split.add_argument("--seed", type=int, default=0, help="another seed holds out others (0)")

    index = subs["index"]
    index.add_argument("source", help="brace pattern, glob, directory, list file or address")
    index.add_argument("--filter", action="append", default=[], help="such as 'width >= 256'")
    index.add_argument("--index-dir", help="where to keep it (beside the shards, else the cache)")
    index.add_argument("--workers", type=_positive, default=os.cpu_count() or 1, help="processes")
    index.add_argument("--cache-dir", help="where remote shards are cached")
    index.add_argument("--cache-gib", type=_above_zero, default=100.0, help="its size, at most")

    fetch = subs["fetch"]
    fetch.add_argument(
        "networks", nargs="*", metavar="vgg|inception", help="both, if none is named"
    )
    fetch.add_argument("--url", help="another place of the same file, of one network")

    state = subs["status"]
    state.add_argument("run", type=Path, help="run directory")
    state.add_argument("--json", action="store_true", help="print one JSON object")
    state.add_argument("--html", type=Path, help="write a page with curves to this file")

    config = subs["config"]
    config.add_argument(
        "action",
        choices=["show", "diff", "schema"],
        help="print a recipe in full; how two differ; all settings, or those of a group",
    )
    config.add_argument(
        "arguments",
        nargs="*",
        default=[],
        metavar="CONFIG [key=value ...]",
        help="recipes, and settings to change",
    )
    config.add_argument("--markdown", action="store_true", help="schema: print docs/settings.md")

    speed = subs["benchmark"]
    speed.add_argument("config", help=RECIPE)
    _add_overrides(speed)
    speed.add_argument("--json", action="store_true", help="print one JSON object")
    speed.add_argument("--iterations", type=int, default=10, help="iterations measured")

    demo = subs["demo"]
    _add_overrides(demo)
    demo.add_argument(
        "--run-dir", type=Path, default=Path("runs/demo"), help="directory to write (runs/demo)"
    )
    demo.add_argument("--training", help="shards in place of the package's photographs")
    demo.add_argument("--held-out", type=Path, help="folder of photographs to score on")
    demo.add_argument(
        "--length",
        type=_above_zero,
        default=1.0,
        help="multiplies the iterations, as 0.2 for a quick look (1)",
    )
    return parser


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    # Without a default argparse would name them among the arguments that are required.
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="settings to change"
    )


def name_path_select(text: str) -> tuple[str, Path, str]:
    """[NAME=]WEIGHTS[@raw|@DECAY] -> name, path, and which weights of a training checkpoint."""
    name, equals, path = text.partition("=")
    if not equals or os.sep in name:
        name, path = "", text
    ending, select = "", "ema"
    mark = re.search(r"@(raw|[0-9]*\.?[0-9]+(e-[0-9]+)?)$", path)
    if mark and (mark[1] == "raw" or not Path(path).exists()):  # else a name that ends so
        path, ending = path[: mark.start()], mark[0]
        select = "raw" if mark[1] == "raw" else selection(float(mark[1]))
    place = Path(path)
    if not name:
        suffix = "" if place.is_dir() else r"(\.vae)?\.(safetensors|ckpt|pth?|bin|zip)$"
        name = re.sub(suffix, "", place.absolute().name) + ending
    return name, place, select


def _directory(text: str) -> Path:
    """A directory to write; not a new one with the name of a file."""
    files = r"\.(safetensors|ckpt|pth?|bin|tar|zip|png|jpe?g|html|json|csv|md)"
    if re.fullmatch(files, Path(text).suffix) and not os.path.exists(text):
        raise argparse.ArgumentTypeError(f"got {text}, the name of a file; expected a directory")
    return Path(text)


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
