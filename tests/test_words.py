"""Words around the code: version, changelog, settings page."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from kl_f8_train import __version__
from kl_f8_train.__main__ import main
from kl_f8_train.settings import VALUES

ROOT = Path(__file__).parents[1]
# The project's old dialect, and what to write: "logged", "reports", "strings", "ignores", "X not
# found", "is not a X", "fix", "also".
DIALECT = re.compile(
    r"\b(told|tells?|telling|texts|deaf|luckier|nobody|no file of|brings?|bringing|brought)\b"
    r"|\b(mend(s|ed|ing)?|shall)\b|, too\b"
    r"|(?<!here )\b(is|are|was|were) (no|none)\b(?! (longer|more)\b)",
    re.IGNORECASE,
)
PAPERS = [
    path
    for pattern in ("*.md", "docs/*.md", "configs/*.yaml", "launch/*", "kl_f8_train/**/*.md")
    for path in sorted(ROOT.glob(pattern))
]


def test_the_version_is_the_same_everywhere():
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert newest[1] == citation["version"] == __version__


def test_the_settings_page_is_what_the_command_prints(capsys):
    """Anew: kl-f8-train config schema --markdown > docs/settings.md."""
    assert main(["config", "schema", "--markdown"]) == 0
    printed = capsys.readouterr().out
    assert (ROOT / "docs/settings.md").read_text() == printed
    listed = set(re.findall(r"^\| `([\w.]+)` \|", printed, re.MULTILINE))
    assert listed == VALUES.keys()
    without = {key for key, found in VALUES.items() if not found.usual}
    assert without == {"name", "run_dir", "log.project"}  # which are the user's alone


def test_the_settings_page_is_one_page(capsys):
    assert main(["config", "show", "ft_ema", "--markdown"]) == 2
    assert "config show has no such page" in capsys.readouterr().err


def prose(path: Path) -> Iterator[str]:
    """Comments, docstrings and messages of a module."""
    source = path.read_text(encoding="utf-8")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.value


@pytest.mark.parametrize(
    "path",
    sorted((ROOT / "kl_f8_train").rglob("*.py")),
    ids=lambda path: f"{path.parent.stem}.{path.stem}",
)
def test_messages_and_docstrings_are_plain_english(path):
    found = [" ".join(text.split()) for text in prose(path) if DIALECT.search(text)]
    assert found == []


def defined(path: Path) -> Iterator[str]:
    """Names that a module gives to functions, classes, parameters and variables."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name):
                yield name
            case ast.Name(id=name, ctx=ast.Store()):
                yield name


def test_identifiers_are_plain_english():
    """The old words for saying something; `file.tell()` is Python's."""
    old = re.compile(r"(^|_)(tells?|told|teller|telling)(_|$)")
    names = {name for path in (ROOT / "kl_f8_train").rglob("*.py") for name in defined(path)}
    assert {"settings_page", "AutoencoderKL"} < names
    assert sorted(filter(old.search, names)) == []


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.name)
def test_documents_recipes_and_scripts_are_plain_english(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [f"{number}: {line}" for number, line in enumerate(lines, 1) if DIALECT.search(line)]
    assert found == []


@pytest.mark.parametrize(
    "text", ["what was told", "a dict of what are no pairs", "its texts", "mend it", "loaders, too"]
)
def test_the_dialect_is_recognized(text):
    assert DIALECT.search(text)


@pytest.mark.parametrize(
    "text", ["there are no images", "it is no longer there", "untold", "too large", "recommended"]
)
def test_plain_english_passes(text):
    assert not DIALECT.search(text)
