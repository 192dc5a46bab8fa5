"""The settings page of the documentation, generated from the declarations in `settings`."""

import inspect
from collections.abc import Iterator
from itertools import groupby
from typing import Any, Literal, Union, get_args, get_origin

from kl_f8_train.output import markdown_table
from kl_f8_train.settings import ABOVE_0, ANY, BELOW_1, MISSING, SETTINGS, VALUES, Config, Setting
from kl_f8_train.units import written

HEAD = ("setting", "value", "default", "usual", "resume", "meaning")
INTRODUCTION = """\
# Settings

[Documentation](README.md) / reference

<!-- printed by `kl-f8-train config schema --markdown`: edit the declarations, not this page -->

Every setting of a recipe. A recipe is a YAML file that contains them; `key=value` after it on the
command line changes one. `kl-f8-train config show RECIPE` prints a recipe in full, and
`kl-f8-train config diff A B` compares two. Where a recipe's numbers come from:
[recipes.md](recipes.md).

- **value**: type and permitted range; a list has the range in each element.
- **default**: a dash means that there is none, and the recipe must state the value.
- **usual**: where to start, from the shipped recipes and our runs. It is advice, not a limit.
- **resume**: `yes` if the setting may change when a run is resumed. Any other change needs
  `--allow-changes`, and is recorded in the checkpoints.
"""


def settings_page() -> str:
    """The page in Markdown: one table for the top level, and one for each group of settings."""
    parts = [INTRODUCTION]
    for prefix, found in groupby(_leaves(), key=lambda item: item[0].rpartition(".")[0]):
        title = f"`{prefix}`" if prefix else "The run"
        parts.append(f"## {title}\n\n{_preface(prefix)}\n")
        parts.append(markdown_table(HEAD, (_row(key, setting) for key, setting in found)) + "\n")
    return "\n".join(parts)


def _leaves() -> Iterator[tuple[str, Setting]]:
    """(key, setting) of everything that takes a value, the keys of a group together."""
    groups = list(dict.fromkeys(key.rpartition(".")[0] for key in VALUES))
    yield from sorted(VALUES.items(), key=lambda item: groups.index(item[0].rpartition(".")[0]))


def _preface(prefix: str) -> str:
    """First paragraph of the docstring of a group's dataclass."""
    kind = SETTINGS[prefix].kind if prefix else Config
    return inspect.cleandoc(kind.__doc__ or "").partition("\n\n")[0]


def _row(key: str, setting: Setting) -> tuple[str, ...]:
    return (
        f"`{key}`",
        _value(setting),
        "-" if setting.default == MISSING else f"`{written(setting.default)}`",
        setting.usual,
        "yes" if setting.machine else "",
        setting.doc,
    )


def _value(setting: Setting) -> str:
    """Type and range, such as "number above 0" or "`l1` or `mse`"."""
    kind, inner = get_origin(setting.kind), get_args(setting.kind)
    name, bounds = KINDS.get(inner[0] if inner else setting.kind), _range(setting)
    if kind is Literal:
        *others, last = (f"`{value}`" for value in inner)
        text = f"{', '.join(others)} or {last}"
    elif kind is list:
        text = f"list of {name}s{bounds}"
    elif kind is Union:  # a number, or several
        text = f"{name}{bounds}, or a list of them"
    else:
        text = f"{name}{bounds}"
    return f"{text}, or `null`" if setting.nullable else text


KINDS: dict[Any, str] = {int: "integer", float: "number", bool: "`true` or `false`", str: "string"}


def _range(setting: Setting) -> str:
    if setting.bounds is None:
        return ""
    least, most = setting.bounds
    start = "above 0" if least == ABOVE_0 else f"from {least:,}"
    end = {ANY: "", BELOW_1: ", below 1"}.get(most, f" to {most:,}")
    return f" {start}{end}"
