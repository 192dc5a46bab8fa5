"""A setting as it is written: its key, and its value as a string, read by the declared type."""

import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from kl_f8_train.errors import UsageError
from kl_f8_train.settings import SETTINGS, Setting, Source, setting_of
from kl_f8_train.units import written

MEANT = {  # what other trainers call a value whose name is nearer to another of ours
    **dict.fromkeys(("fp32", "32", "32-true"), "float32"),
    **dict.fromkeys(("bf16", "bf16-mixed", "bf16-true"), "bfloat16"),
    **{"gpu": "cuda", "online": "auto", "true": "auto", "l2": "mse", "vgg": "lpips_vgg"},
}


def parse_sources(text: str) -> dict[str, Source]:
    """`A,B` -> one source for each pattern; a path that exists is one, whatever its commas."""
    body = text.strip().removesuffix("{}")
    if os.path.exists(body):
        return name_sources([body])
    quotes = ""
    if body.startswith("[") and body.endswith("]"):
        body, quotes = body[1:-1], "'\""
    parts = re.split(r",(?![^{]*\})", body)  # not at those of `{a,b}`
    return name_sources(part.strip().strip(quotes) for part in parts)


def name_sources(patterns: Iterable[str]) -> dict[str, Source]:
    """One source for each pattern, named after the directory that holds its shards."""
    sources: dict[str, Source] = {}
    for pattern in filter(None, map(str.strip, patterns)):
        path = Path(pattern)
        name = path.name if not path.suffix else path.parent.name
        name = re.sub(r"\W+", "_", name).strip("_") or "images"
        while name in sources:
            name += "_2"
        sources[name] = Source(shards=pattern)
    return sources


def source_setting(name: str, pattern: str) -> str:
    """A source as its user named it: `data.sources=PATTERN` where its name follows from that."""
    derived = next(iter(name_sources([pattern])), "")
    if re.fullmatch(f"{re.escape(derived)}(_2)*", name):
        return f"data.sources={pattern}"
    return f"data.sources.{name}.shards={pattern}"


def known_setting(key: str, where: str = "command line") -> Setting:
    """What is known of a key; UsageError with the nearest key if it is unknown."""
    if found := setting_of(key):
        return found
    source = re.match(r"data\.sources\.([^.]+)\.", key)
    known = [name.replace("NAME", source[1] if source else "NAME") for name in SETTINGS]
    nearest = max(known, key=lambda name: _likeness(key, name))
    if _likeness(key, nearest):
        raise UsageError(f"{where}: unknown key {key!r}. Did you mean {nearest!r}?")
    group = key.rpartition(".")[0]
    names = ", ".join(_below(group)) or "no keys below it"
    raise UsageError(f"{where}: unknown key {key!r}; {group or 'the top level'} has {names}")


def _below(group: str) -> list[str]:
    """Names of the settings right below a group."""
    parts = [name.rpartition(".") for name in SETTINGS]
    return [name for parent, _, name in parts if parent == group]


def _likeness(key: str, known: str) -> float:
    """How much two keys look alike, group and last part; 0 where the last part may be another."""
    (group, _, name), (known_group, _, known_name) = key.rpartition("."), known.rpartition(".")
    names = difflib.SequenceMatcher(None, name, known_name).ratio()
    groups = difflib.SequenceMatcher(None, group, known_group).ratio() if group else 1.0
    return names + groups if names == 1 or min(names, groups) > 0.7 else 0.0


def read_value(key: str, text: str, where: str = "") -> Any:
    """Text -> value by the declared type, never by YAML's guess."""
    found = known_setting(key)
    if found.nullable and text.strip().lower() in ("null", "none", "~", ""):
        return None
    try:
        return _read_typed(key, found, text)
    except ValueError as error:
        shown = f"{where}: {key}" if where else key
        raise UsageError(f"{shown}={text}: {error}") from None


def _read_typed(key: str, found: Setting, text: str) -> Any:
    """A value that is not null; ValueError that says what is expected."""
    kind, origin, inner = found.kind, get_origin(found.kind), get_args(found.kind)
    if text.strip() in ("null", "~") and (origin is dict or kind in (Source, str)):  # as in YAML
        raise ValueError(f"cannot be null; expected {found.doc}")
    if origin is dict:
        return parse_sources(text)
    if kind is Source:
        return Source(shards=text)
    if is_dataclass(kind):
        names = ", ".join(f"{key}.{name}" for name in _below(key))
        none = f", or {key}=null for none" if found.nullable else ""
        raise ValueError(f"this is a group of settings; set {names}{none}")
    if origin is Literal:
        if text in inner:
            return text
        meant = MEANT.get(text.lower(), text.lower())
        near = difflib.get_close_matches(meant, inner, n=1)
        hint = f". Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"expected one of {', '.join(inner)}{hint}")
    item = inner[0] if inner else kind
    try:
        return _read_items(text, item, origin) if inner else READERS[item](text)
    except ValueError:
        expected = SEVERAL if origin is Union else EXPECTED
        raise ValueError(f"expected {expected[item]}") from None


def _read_items(text: str, kind: Any, origin: Any) -> Any:
    """A list as `1,2` or `[1,2]`; where one number will do (a union), `1` is that number."""
    items = (item.strip().strip("'\"") for item in text.strip().strip("[]").split(","))
    values = [READERS[kind](item) for item in items if item]
    if origin is list:
        return values
    if not values:
        raise ValueError("no number")
    return values if "[" in text or len(values) > 1 else values[0]


def _bool(text: str) -> bool:
    return bool(("false", "true").index(text.lower()))


READERS: dict[Any, Callable[[str], Any]] = {int: int, float: float, bool: _bool, str: str}
EXPECTED = {int: "a whole number", float: "a number", bool: "true or false"}
SEVERAL = {  # of a setting that takes one number or several
    int: "a whole number, or several as [384,512]",
    float: "a number, or several as [0.999,0.9999]",
}


def exactly_typed(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values, where one number or several are taken in exactly the declared type.

    Elsewhere omegaconf converts, as 0 or "1e-3" to a float; of a union it wants the type itself.
    """
    typed = {}
    for name, value in values.items():
        found = setting_of(f"{prefix}{name}")
        if isinstance(value, Mapping):
            value = exactly_typed(value, f"{prefix}{name}.")
        elif found and get_origin(found.kind) is Union:
            value = _typed(value, get_args(found.kind)[0])
        elif found and found.kind is str and isinstance(value, bool):
            value = written(value)  # name: true
        typed[name] = value
    return typed


def _typed(value: Any, kind: type) -> Any:
    """A number, or a text that reads as one, in a type; anything else unchanged, to be refused."""
    if isinstance(value, list):
        return [_typed(item, kind) for item in value]
    if not isinstance(value, int | str) or isinstance(value, bool):
        return value
    try:
        return READERS[kind](str(value))
    except ValueError:
        return value
