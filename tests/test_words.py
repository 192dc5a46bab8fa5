"""What stands outside the code: the version in one place, the changelog."""

import re
from pathlib import Path

import yaml

from kl_f8_train import __version__

ROOT = Path(__file__).parents[1]


def test_the_version_is_the_same_everywhere():
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert newest[1] == citation["version"] == __version__
