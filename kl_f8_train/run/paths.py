"""The paths that settings name: whether something is there, before torch is imported."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from kl_f8_train.errors import MissingInputError, like_path, no_folder
from kl_f8_train.overrides import absent_source, source_setting
from kl_f8_train.run_dir import check_checkpoint_names, list_checkpoints
from kl_f8_train.settings import Config
from kl_f8_train.weights import hub


def check_paths(config: Config) -> None:
    """Raises MissingInputError with every path that a run needs and that is not there."""
    problems = []
    for check in _checks(config):
        try:
            check()
        except MissingInputError as error:
            problems.append(str(error))
    if len(problems) > 1:
        problems.insert(0, f"{len(problems)} inputs are missing:")
    if problems:
        raise MissingInputError("\n  ".join(problems))


def _checks(config: Config) -> Iterator[Callable[[], None]]:
    if not list_checkpoints(Path(config.run_dir)):  # only the start of a run reads them
        yield partial(check_checkpoint_names, Path(config.run_dir))
        yield partial(check_init_weights, config)
    for name, source in config.data.sources.items():
        yield partial(_check_source, name, source.shards)
    yield partial(check_perceptual_weights, config)
    if config.log.pictures_every and config.log.pictures is not None:
        yield partial(_check_pictures, config.log.pictures)


def check_init_weights(config: Config) -> None:
    """Raises MissingInputError for `init.weights` that are neither here nor named as on the hub."""
    hub.check_exists(config.init.weights, "init.weights=")


def check_perceptual_weights(config: Config) -> None:
    """Raises MissingInputError if the file of `loss.perceptual_weights` is needed and not there."""
    given = config.loss.perceptual_weights
    if given and config.loss.perceptual == "lpips_vgg" and not Path(given).is_file():
        raise MissingInputError(
            f"loss.perceptual_weights={given}: no such file; expected VGG16's features, or null "
            f"for what `kl-f8-train fetch` downloaded{like_path(given)}"
        )


def _check_source(name: str, pattern: str) -> None:
    if why := absent_source(pattern):
        where = source_setting(name, pattern)
        raise MissingInputError(f"{where}: {why.removeprefix(f'{pattern}: ')}")


def _check_pictures(folder: str) -> None:
    if not Path(folder).is_dir():
        raise MissingInputError(f"log.pictures: no images in {no_folder(Path(folder))}")
