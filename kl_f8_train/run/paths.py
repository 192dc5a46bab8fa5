"""The paths that settings and verbs name: whether something is there, before torch is imported."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tarfile import is_tarfile
from typing import TypeVar

from kl_f8_train.data.patterns import check_named
from kl_f8_train.errors import MissingInputError, about, check_folder, like_path
from kl_f8_train.overrides import source_setting
from kl_f8_train.run_dir import check_checkpoint_names, list_checkpoints
from kl_f8_train.settings import Config
from kl_f8_train.weights import hub

NETWORK = "no such file; expected {}, or leave it out for what `kl-f8-train fetch` downloaded"
Result = TypeVar("Result")


def all_of(*checks: Callable[[], Result]) -> list[Result]:
    """The results of all checks; raises MissingInputError with everything that they miss."""
    results, problems = list[Result](), list[str]()
    for check in checks:
        try:
            results.append(check())
        except MissingInputError as error:
            problems.append(str(error))
    if len(problems) > 1:
        problems.insert(0, f"{len(problems)} inputs are missing:")
    if problems:
        raise MissingInputError("\n  ".join(problems))
    return results


def check_paths(config: Config) -> None:
    """Raises MissingInputError with every path that a run needs and that is not there."""
    all_of(*_checks(config))


def start_checks(config: Config) -> Iterator[Callable[[], None]]:
    """What only the start of a run needs: its weights, and no checkpoint that it would replace."""
    yield partial(check_checkpoint_names, Path(config.run_dir))
    yield partial(hub.check_exists, config.init.weights, "init.weights=")


def _checks(config: Config) -> Iterator[Callable[[], None]]:
    if not list_checkpoints(Path(config.run_dir)):
        yield from start_checks(config)
    for name, source in config.data.sources.items():
        yield partial(check_pattern, source_setting(name, source.shards), source.shards)
    yield partial(check_perceptual_weights, config)
    if config.log.pictures_every and config.log.pictures is not None:
        yield partial(check_folder, "log.pictures: no images in ", config.log.pictures)


def check_perceptual_weights(config: Config) -> None:
    """Raises MissingInputError if the file of `loss.perceptual_weights` is needed and not there."""
    if config.loss.perceptual == "lpips_vgg":
        given = config.loss.perceptual_weights
        check_file("loss.perceptual_weights=", given, NETWORK.format("VGG16's features"))


def check_file(setting: str, given: str | Path | None, wrong: str, folders: bool = False) -> None:
    """Raises MissingInputError if a path is given that is neither a file nor one of `folders`."""
    if given and not (Path(given).exists() if folders else Path(given).is_file()):
        raise MissingInputError(f"{setting}{given}: {wrong}{like_path(given)}")


def check_pattern(setting: str, pattern: str) -> None:
    """Raises MissingInputError for a pattern that names nothing; `setting` ends with it."""
    with about(setting):
        check_named(pattern)


def check_images(images: str | None) -> None:
    """Raises MissingInputError for --images of `evaluate` that are not there, or another file."""
    if images is None:
        return
    check_pattern(f"--images {images}", images)
    source, known = Path(images), (".tar", ".txt")
    if source.is_file() and source.suffix.lower() not in known and not is_tarfile(source):
        raise MissingInputError(
            f"--images {images}: expected a folder of images, .tar shards or a .txt list of them, "
            "got another file; name its folder"
        )
