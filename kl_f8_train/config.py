"""Recipes: YAML and `key=value` to a checked `Config`, back to YAML, and what differs.

A recipe is one complete YAML file. All that is wrong in it is reported before anything heavy is
imported.
"""

import contextlib
import copy
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import DictConfig, Node, OmegaConf
from omegaconf.errors import KeyValidationError, OmegaConfBaseException, ValidationError

from kl_f8_train.errors import MissingInputError, UsageError, like_path
from kl_f8_train.overrides import (
    exactly_typed,
    known_setting,
    name_sources,
    parse_sources,
    read_value,
)
from kl_f8_train.rules import contradictions, name_problems
from kl_f8_train.run_dir import CONFIG_FILE, is_run
from kl_f8_train.settings import MISSING, SETTINGS, Config, Source, leaves, setting_of, to_dict
from kl_f8_train.units import quoted, written

SHIPPED = tuple(folder / "configs" for folder in Path(__file__).parents[:2])  # installed, cloned
INPUTS = ("run_dir", "init.weights", "data.sources")  # which a recipe leaves to its user
PLACEHOLDER = "absent"  # in the place of a setting without a value, in a plan
WRONG = "wrong settings:"  # above several lines


class Examined(NamedTuple):
    """What is wrong with settings, and what they are without that."""

    problems: list[UsageError]
    absent: list[str]  # settings without a value
    config: Config | None  # an absent value is PLACEHOLDER; None if numbers are absent


def load(path: str | Path, overrides: Sequence[str] = (), optional: Sequence[str] = ()) -> Config:
    """Reads a recipe and applies `key=value` overrides; `optional` settings may have no value.

    Raises MissingInputError for a missing file and UsageError with all that is wrong in it.
    """
    found = examine_settings(path, overrides, optional)
    _refuse(found.problems)
    assert found.config is not None
    return found.config


def _refuse(problems: Sequence[UsageError]) -> None:
    """Raises UsageError with all problems, if there are any."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        messages = (str(problem).removeprefix(f"{WRONG}\n") for problem in problems)
        lines = (line if line[:1] == " " else textwrap.indent(line, "  ") for line in messages)
        raise UsageError("\n".join([WRONG, *lines]))


def examine_settings(
    path: str | Path, overrides: Sequence[str] = (), optional: Sequence[str] = ()
) -> Examined:
    """Finds all that is wrong in a recipe and its overrides, and takes the rest.

    Raises MissingInputError for a missing file and UsageError for one that is not a recipe.
    """
    merged, wrong = _merged(Path(path), overrides)
    problems, absent = list(wrong.values()), list[str]()
    try:
        with _in_our_words(str(path)):
            missing = sorted(OmegaConf.missing_keys(merged))
            absent = [key for key in missing if not _holds_one_of(key, wrong)]
            if needed := [key for key in absent if key not in optional]:
                lines = "\n".join(f"  {key}=...   {known_setting(key).doc}" for key in needed)
                problems.append(UsageError(f"{path}: these settings have no value yet:\n{lines}"))
            complete = _fill_in(merged, missing)
            config = OmegaConf.to_object(merged)
    except UsageError as error:  # of a reference to a setting that is not there
        return Examined([*problems, error], absent, None)
    assert isinstance(config, Config)
    unknown = [f"{key}=" for key in (*wrong, *missing) if setting_of(key)]
    for line in contradictions(config):
        if not any(key in line for key in unknown):
            problems.append(UsageError(f"{WRONG}\n  {line}"))
    return Examined(problems, absent, config if complete else None)


def _holds_one_of(group: str, keys: Iterable[str]) -> bool:
    return any(f"{key}.".startswith(f"{group}.") for key in keys)


def _fill_in(merged: DictConfig, missing: Sequence[str]) -> bool:
    """Gives the settings that have no value one; whether PLACEHOLDER was enough.

    For numbers those of ft_ema, beside which it is found what the other settings contradict.
    """
    named = [key for key in missing if known_setting(key).kind is str or key == "data.sources"]
    for key in named:
        _override(merged, f"{key}={PLACEHOLDER}")
    if named == missing:
        return True
    published, _ = _merged(next(_shipped("ft_ema")), ())  # whatever is called so here
    for key in {*missing} - {*named}:
        OmegaConf.update(merged, key, OmegaConf.select(published, key))
    return False


def load_without_inputs(path: Path, overrides: list[str]) -> Config:
    """`load` for what needs neither weights, data nor a run directory: they may be missing."""
    config = load(path, overrides, INPUTS)
    if config.data.sources == name_sources([PLACEHOLDER]):
        return replace(config, data=replace(config.data, sources={}))
    return config


def resolve(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Like `load`, as plain values and unchecked; settings without a value stay "???"."""
    merged, wrong = _merged(Path(path), overrides)
    _refuse([*wrong.values()])
    values = OmegaConf.to_container(merged, throw_on_missing=False)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _merged(path: Path, overrides: Sequence[str]) -> tuple[DictConfig, dict[str, UsageError]]:
    """The declared settings, over them the recipe's, and over those the overrides.

    Without the settings that cannot be read; key -> what is wrong with each of those.
    """
    merged, raw = OmegaConf.structured(Config), _recipe_values(path)
    assert isinstance(merged, DictConfig)
    with contextlib.suppress(UsageError), _in_our_words(str(path)):
        _fill(merged, raw, path)
        for text in overrides:
            _override(merged, text)
        return merged, {}
    return _merged_one_by_one(path, raw, overrides)


def _merged_one_by_one(
    path: Path, raw: Mapping[str, Any], overrides: Sequence[str]
) -> tuple[DictConfig, dict[str, UsageError]]:
    """`_merged`, more slowly: a setting that cannot be read leaves the others alone."""
    merged, wrong = OmegaConf.structured(Config), dict[str, UsageError]()
    changes: list[tuple[str, Callable[[DictConfig], None]]] = [
        (key, partial(_fill, values=values, path=path)) for key, values in _one_by_one(raw)
    ]
    changes += [
        (text.partition("=")[0].strip().lstrip("-"), partial(_override, text=text))
        for text in overrides
    ]
    for key, change in changes:
        changed = copy.deepcopy(merged)
        try:
            with _in_our_words(str(path)):
                change(changed)
            merged = changed
        except UsageError as error:
            wrong[key] = error
    return merged, wrong


def _one_by_one(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, nested values with nothing else in them) of every setting in nested values."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            for key, inner in _one_by_one(value, f"{prefix}{name}."):
                yield key, {name: inner}
        else:
            yield f"{prefix}{name}", {name: value}


def _recipe_values(path: Path) -> dict[str, Any]:
    """The values of a recipe file, its sources in their long form."""
    raw = _read_yaml(path)
    if path.name == CONFIG_FILE and is_run(path.parent):
        raw["run_dir"] = str(path.parent)  # a run may be moved, or named from another directory
    _expand_source_shorthand(raw, path)
    _refuse_dotted(raw, path)
    return raw


def _fill(merged: DictConfig, values: Mapping[str, Any], path: Path) -> None:
    """Sets values of a recipe file."""
    # One value for a whole group: said here which settings it has, as omegaconf names a class.
    for key, value in leaves(values):
        if known_setting(key, str(path)).is_group and isinstance(
            value, bool | int | float | str | list
        ):
            read_value(key, written(value), str(path))
    merged.merge_with(exactly_typed(values))


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        shipped = sorted({p.stem for folder in SHIPPED for p in folder.glob("*.yaml")})
        raise MissingInputError(
            f"configuration {path}: {'is a directory' if path.is_dir() else 'no such file'}; give "
            f"a YAML file, or a shipped recipe's name: {', '.join(shipped)}"
            f"{'' if path.is_dir() else like_path(path, shipped)}"
        )
    if path.suffix in (".safetensors", ".ckpt", ".pt", ".pth", ".bin"):
        raise UsageError(
            f"configuration {path}: it is a weight file, expected a recipe; give a run's directory "
            f"to resume it, or a recipe and init.weights={path} to start from it"
        )
    try:
        raw = OmegaConf.to_container(OmegaConf.load(path))
    except UnicodeDecodeError as error:
        raise UsageError(
            f"configuration {path} is not readable YAML: byte {error.start} is not UTF-8; save it "
            "as UTF-8"
        ) from error
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, OSError) as error:
        reason = str(error).partition("\n    full_key:")[0]
        raise UsageError(
            f"configuration {path} is not readable YAML: {reason}\n  Fix the line; indent with "
            "spaces, and quote a value with braces or a colon, as '{00..09}.tar'"
        ) from error
    if not isinstance(raw, dict):
        raise UsageError(
            f"configuration {path}: expected keys and values, as seed: 1, got a "
            f"{type(raw).__name__}; configs/ft_ema.yaml is an example"
        )
    return {str(key): value for key, value in raw.items()}


def _refuse_dotted(raw: Mapping[str, Any], path: Path) -> None:
    """Raises UsageError for a key of the command line in a file: its groups must be nested."""
    for key, value in raw.items():
        group, dot, name = key.partition(".")
        if dot and setting_of(key):
            nested = name.replace(".", ": {") + f": {written(value)}" + "}" * key.count(".")
            raise UsageError(
                f"{path}: {key}: dots are for key=value on the command line; in a file write "
                f"{group}: {{{nested}"
            )


def _expand_source_shorthand(raw: dict[str, Any], path: Path) -> None:
    """`sources: PATTERN` and `sources: [PATTERN, ...]` mean one source for each pattern."""
    data = raw.get("data")
    if not isinstance(data, dict):
        return
    sources = data.get("sources")
    if isinstance(sources, str) and sources != MISSING:
        data["sources"] = parse_sources(sources)
    elif isinstance(sources, list):
        data["sources"] = name_sources(map(str, sources))
    elif isinstance(sources, dict):
        for name, source in sources.items():
            if isinstance(source, str):
                sources[name] = {"shards": source}
            elif not isinstance(source, dict):
                raise UsageError(
                    f"{path}: data.sources.{name}: got {written(source)}, expected "
                    f"{SETTINGS['data.sources.NAME.shards'].doc}"
                )


def _override(merged: DictConfig, text: str) -> None:
    key, equals, value = text.partition("=")
    key = key.strip().lstrip("-")
    if not equals or not key:
        raise UsageError(
            f"override {text!r}: expected key=value, such as seed=1, with no spaces around ="
        )
    parsed = read_value(key, value)
    if known_setting(key).kind is Source:  # data.sources.x=SHARDS leaves x's weight alone
        key, parsed = f"{key}.shards", value
    if key.startswith("data.sources.") and OmegaConf.is_missing(merged.data, "sources"):
        merged.data.sources = {}
    parent = key.rpartition(".")[0]
    if parent and OmegaConf.select(merged, parent, throw_on_missing=False) is None:
        if not parent.startswith("data.sources."):
            raise UsageError(f"{key}: {parent} is null in this recipe; set it in the file")
        OmegaConf.update(merged, parent, Source(), force_add=True)
    # Without `merge`, which would add the sources of an override to the recipe's.
    OmegaConf.update(merged, key, parsed, force_add=True, merge=False)


@contextlib.contextmanager
def _in_our_words(where: str) -> Iterator[None]:
    """Raises omegaconf's errors as UsageError: what was got for a key, and what it takes."""
    try:
        yield
    except OverflowError as error:
        raise UsageError(f"{where}: {error}; give a smaller number") from error
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0].rstrip(".")
        key = re.sub(r"\[\d+\]$", "", str(error.full_key or ""))  # without an element's number
        found = setting_of(key)
        if found is None:
            text = (
                f"{f'{key}: ' * bool(key)}{reason}; `kl-f8-train config schema` lists the settings"
            )
        else:
            if isinstance(error, ValidationError) and not isinstance(error, KeyValidationError):
                # A value, or omegaconf's node around one.
                value = error.value._value() if isinstance(error.value, Node) else error.value
                if OmegaConf.is_config(error.value):
                    value = OmegaConf.to_container(error.value)
                reason = f"got {quoted(value)}"
            expected = "a group of settings" if found.is_group else found.type_name
            text = f"{key}: {reason}; expected {expected}: {found.doc}"
        raise UsageError(f"{where}: {text}") from error


def find_recipe(name: str) -> Path:
    """A recipe file by its path, a shipped one by its name ("ft_ema"), or that of a run directory.

    `train` keeps the settings of a run in it, so that its directory alone resumes it.
    """
    path = Path(name)
    if path.is_file():
        return path
    of_a_run = path / CONFIG_FILE
    return next(_shipped(name), of_a_run if of_a_run.is_file() else path)


def _shipped(name: str) -> Iterator[Path]:
    """The recipe that ships under a name, if one does."""
    return (file for folder in SHIPPED if (file := folder / f"{name}.yaml").is_file())


def recipe(name: str, *overrides: str) -> Config:
    """A shipped recipe, or a YAML file, without what only a run needs (data, weights).

    Overrides are `key=value`, as on the command line (docs/settings.md). Raises MissingInputError
    for another name, UsageError for overrides that do not fit.
    """
    unused = ("run_dir=unused", "init.weights=unused", "data.sources=unused")
    return load(find_recipe(name), [*unused, *overrides])


def from_dict(values: Mapping[str, Any]) -> Config:
    """The configuration stored in a checkpoint.

    Raises UsageError if this version does not know a key, or if `name` is not a file name.
    """
    with _in_our_words("stored configuration"):
        typed = exactly_typed(values)
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), typed))
    assert isinstance(config, Config)
    for problem in name_problems(config.name):  # it comes from elsewhere, and becomes a path
        raise UsageError(problem)
    return config


def to_yaml(config: Config | Mapping[str, Any]) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(_plain(config), sort_keys=False)


ABSENT = "(none)"  # how a change names a setting that one side does not have


def differences(
    before: Config | Mapping[str, Any], after: Config | Mapping[str, Any], *, machine: bool = False
) -> list[str]:
    """Lines `key: before -> after` of what differs; machine settings only on request.

    A group that one side does not have is one line. A setting that `before` does not have, as it
    was written by an older version, differs only if it is not at its default.
    """
    lines = []
    for key, old, new in _changes(_plain(before), _plain(after)):
        found = setting_of(key)
        unknown_then = old == ABSENT and found is not None and new == found.default
        if not unknown_then and (machine or not (found and found.machine)):
            lines.append(f"{key}: {written(old)} -> {written(new)}")
    return lines


def _changes(
    old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    for name in dict.fromkeys((*old, *new)):
        key, before, after = f"{prefix}{name}", old.get(name, ABSENT), new.get(name, ABSENT)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _changes(before, after, f"{key}.")
        elif before != after:
            yield key, before, after


def _plain(config: Config | Mapping[str, Any]) -> dict[str, Any]:
    return to_dict(config) if isinstance(config, Config) else dict(config)
