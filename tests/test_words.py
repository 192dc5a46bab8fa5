"""Words around the code: version, changelog, settings page."""

import re
from pathlib import Path

import yaml

from kl_f8_train import __version__, config
from kl_f8_train.__main__ import main

ROOT = Path(__file__).parents[1]


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
    assert listed == {key for key, found in config.SETTINGS.items() if not found.is_group}


def test_the_settings_page_is_one_page(capsys):
    assert main(["config", "show", "ft_ema", "--markdown"]) == 2
    assert "config show has no such page" in capsys.readouterr().err
