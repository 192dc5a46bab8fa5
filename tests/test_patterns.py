import contextlib

import pytest

from kl_f8_train.data.patterns import check_named
from kl_f8_train.errors import MissingInputError
from kl_f8_train.run.paths import check_images, check_pattern


@pytest.mark.parametrize(
    ("pattern", "absent"),
    [
        ("a/00.tar::b/01.tar", ""),
        ("a/{00..01}.tar::b/{00..01}.tar", ""),
        ("{a,b}/{00..01}.tar", ""),
        ("a/*.tar::b/0?.tar", ""),
        ("a::b", ""),
        ("a/00.tar::s3://bucket/{00..09}.tar", ""),
        ("pipe:cat a::c", ""),
        ("${SHARDS}/00.tar", ""),
        ("good.txt", ""),
        ("a/00.tar::c/01.tar", "c/01.tar: no such file or folder"),
        ("c/{00..01}.tar::a/00.tar", "no file is named like c/{00..01}.tar;"),
        ("c/*.tar", "no file is named like c/*.tar;"),
        ("bad.txt", "2 of 3 files are missing (c/00.tar, c/01.tar);"),
        ("a/00.tar::bad.txt", "2 of 3 files are missing"),
        ("none.txt", "none.txt lists no shards"),
        ("a/00.tar.gz", "compressed shards cannot be read in places"),
    ],
)
def test_only_patterns_of_which_nothing_is_there_are_absent(tmp_path, monkeypatch, pattern, absent):
    for shard in ("a/00.tar", "a/01.tar", "b/00.tar", "b/01.tar", "a/00.tar.gz"):
        (tmp_path / shard).parent.mkdir(exist_ok=True)
        (tmp_path / shard).write_bytes(b"")
    (tmp_path / "good.txt").write_text("a/00.tar\n# b/02.tar\nhttps://h/0.tar\n")
    (tmp_path / "bad.txt").write_text("a/00.tar\nc/00.tar\nc/01.tar\n")
    (tmp_path / "none.txt").write_text("\n")
    monkeypatch.chdir(tmp_path)
    refused = pytest.raises(MissingInputError) if absent else contextlib.nullcontext()
    with refused as caught:
        check_named(pattern)
    assert absent in (str(caught.value) if caught else "")


@pytest.mark.parametrize(
    ("pattern", "said"),
    [("no.tar", "no.tar: no such file"), ("a.tar::no.tar", "a.tar::no.tar: no.tar: no such file")],
)
def test_the_part_that_is_missing_is_named(tmp_path, monkeypatch, pattern, said):
    (tmp_path / "a.tar").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingInputError, match=f"^--images {said}"):
        check_pattern(f"--images {pattern}", pattern)


def test_a_list_may_be_called_txt_in_capitals(tmp_path):
    (tmp_path / "LIST.TXT").write_text("https://h/0.tar\n")
    check_images(str(tmp_path / "LIST.TXT"))
