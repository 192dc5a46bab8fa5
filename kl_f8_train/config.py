"""Recipes: YAML and `key=value` to a checked `Config`, back to YAML, and what differs.

A recipe is one complete YAML file. All that is wrong in it is reported before anything heavy is
imported.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

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
from kl_f8_train.rules import check, name_problems
from kl_f8_train.run_dir import CONFIG_FILE, is_run
from kl_f8_train.settings import MISSING, SETTINGS, Config, Source, leaves, setting_of, to_dict
from kl_f8_train.units import quoted, written

INPUTS = ("run_dir", "init.weights", "data.sources")  # what only a run needs
SHIPPED = tuple(folder / "configs" for folder in Path(__file__).parents[:2])  # installed, cloned


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Reads a recipe and applies `key=value` overrides.

    Raises MissingInputError for a missing file and UsageError for anything wrong in it.
    """
    config = parse(path, overrides)
    check(config)
    return config


def parse(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Like `load`, but without `check`: every setting has a value of its type, perhaps unusable."""
    merged = _merge(Path(path), overrides)
    with _in_our_words(str(path)):
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            lines = "\n".join(f"  {key}=...   {known_setting(key).doc}" for key in missing)
            raise UsageError(f"{path}: these settings have no value yet:\n{lines}")
        config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    return config


def load_without_inputs(path: Path, overrides: list[str]) -> Config:
    """`load` for what needs neither weights, data nor a run directory: they may be missing."""
    values = dict(leaves(resolve(path, overrides)))
    missing = [f"{key}=none" for key in INPUTS if values.get(key) == MISSING]  # any value passes
    config = load(path, [*missing, *overrides])
    if "data.sources=none" in missing:
        return replace(config, data=replace(config.data, sources={}))
    return config


def resolve(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> dict[str, Any]:
    """Like `load`, as plain values and unchecked; settings without a value stay "???"."""
    values = OmegaConf.to_container(_merge(Path(path), overrides), throw_on_missing=False)
    return cast(dict[str, Any], values)


def _merge(path: Path, overrides: list[str] | tuple[str, ...]) -> DictConfig:
    """The declared settings, over them the recipe's, and over those the overrides."""
    raw = _read_yaml(path)
    if path.name == CONFIG_FILE and is_run(path.parent):
        raw["run_dir"] = str(path.parent)  # a run may be moved, or named from another directory
    _expand_source_shorthand(raw, path)
    _refuse_dotted(raw, path)
    # One value for a whole group: said here which settings it has, as omegaconf names a class.
    for key, value in leaves(raw):
        if known_setting(key, str(path)).is_group and isinstance(
            value, bool | int | float | str | list
        ):
            read_value(key, written(value), str(path))
    with _in_our_words(str(path)):
        merged = OmegaConf.merge(OmegaConf.structured(Config), exactly_typed(raw))
        assert isinstance(merged, DictConfig)
        for text in overrides:
            _override(merged, text)
        return merged


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        shipped = sorted({p.stem for folder in SHIPPED for p in folder.glob("*.yaml")})
        raise MissingInputError(
            f"configuration {path}: {'is a directory' if path.is_dir() else 'no such file'}; give "
            f"a YAML file, or a shipped recipe's name: {', '.join(shipped)}"
            f"{'' if path.is_dir() else like_path(path, shipped)}"
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
    shipped = (folder / f"{name}.yaml" for folder in SHIPPED)
    of_a_run = path / CONFIG_FILE
    return next((file for file in (*shipped, of_a_run) if file.is_file()), path)


def recipe(name: str, *overrides: str) -> Config:
    """A shipped recipe for use without a run; what only a run needs (data, weights) is left out.

    Raises UsageError for overrides (`key=value`) that do not fit.
    """
    return load(find_recipe(name), [*(f"{key}=unused" for key in INPUTS), *overrides])


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
