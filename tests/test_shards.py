import errno
import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow
import pytest
import samples
from PIL import Image
from pyarrow import parquet

from kl_f8_train import files, transfer
from kl_f8_train.__main__ import main
from kl_f8_train.data import index, sources
from kl_f8_train.data.shard_cache import ShardCache
from kl_f8_train.errors import MissingInputError, RunFailedError, UsageError

# --- indexing -------------------------------------------------------------------------------


def read_all(source) -> list[bytes]:
    return [
        source.read(shard, sample)[1]
        for shard, count in enumerate(source.counts)
        for sample in range(count)
    ]


def open_source(pattern, filters=(), **options):
    cache = ShardCache(Path(pattern).parent / "cache", 2**30)
    return sources.open_source("photos", str(pattern), list(filters), cache, **options)


def test_a_source_of_packed_shards(tmp_path):
    paths = samples.packed(tmp_path / "photos", count=7, per_shard=3)
    source = open_source(tmp_path / "photos")
    assert [path.name for path in paths] == ["00000.tar", "00001.tar", "00002.tar"]
    assert source.counts.tolist() == [3, 3, 1]
    originals = sorted((tmp_path / "photos_originals").iterdir())
    assert read_all(source) == [file.read_bytes() for file in originals]
    assert source.read(1, 2)[0] == "00001.tar/000010002.jpg"
    assert source.columns[:2] == ["height", "original_height"]


def test_what_counts_as_an_image(tmp_path):
    members = {
        "a/1.jpg": b"one",
        "a/1.txt": b"text",
        "2.JPEG": b"two",
        "3.seg.png": b"another field of sample 3",
        "3.webp": b"three",
        "4.mp4": b"film",
    }
    samples.write_tar(tmp_path / "x.tar", members)
    source = open_source(tmp_path / "x.tar")
    assert read_all(source) == [b"one", b"two", b"three"]
    assert source.without_image == 1
    assert "1 sample without an image" in source.describe()


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_tar_dialects(tmp_path, kind):
    long_name = "n" * 90 + "/" + "k" * 90
    source = tmp_path / "source.jpg"
    source.write_bytes(b"bytes")
    with tarfile.open(tmp_path / "x.tar", "w", format=kind) as archive:
        archive.add(source, f"{long_name}.jpg")
        archive.add(source, "b.jpg")
    assert read_all(open_source(tmp_path / "x.tar")) == [b"bytes", b"bytes"]


def black_bmp() -> bytes:
    """A file that ends in more than 512 zero bytes."""
    return samples.encode(Image.new("RGB", (64, 64)), "BMP")


@pytest.mark.parametrize(
    "picture", [b"\xff" * 2011, b"\xff" * 2048, black_bmp()], ids=["odd", "even", "zeros"]
)
def test_cut_short_anywhere(tmp_path, picture):
    """In the data, in a header, between two members: every cut before the end mark is seen."""
    members = {f"{number}.{kind}": picture for number in range(3) for kind in ("bmp", "jpg")}
    data = samples.write_tar(tmp_path / "x.tar", members).read_bytes()
    end = 6 * (512 + -(-len(picture) // 512) * 512)
    assert data[end:].strip(b"\0") == b""
    cut = tmp_path / "cut.tar"
    for length in itertools.chain(range(0, end + 1, 512), range(100, end, 512)):
        cut.write_bytes(data[:length])
        with pytest.raises(MissingInputError, match=r"cut\.tar"):
            index.index_tar(cut)
    cut.write_bytes(data[: end + 1024])
    assert len(index.index_tar(cut).images) == 3  # a sample has one image, its first


@pytest.mark.parametrize("name", ["0.jpg", "0.json", "0.dat"])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize("size", [-1, -512, 1 << 33, 1 << 44, 1 << 62, 1 << 63, 1 << 70])
def test_a_header_may_claim_any_size(tmp_path, name, kind, size):
    entry = tarfile.TarInfo(name)
    entry.type, entry.size = kind, abs(size)
    header = bytearray(entry.tobuf(tarfile.GNU_FORMAT))
    if size < 0:  # tarfile writes none
        header[124:136] = b"\xff" + (size % 2**88).to_bytes(11, "big")
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "a.tar").write_bytes(header + b"\0" * 2048)
    with pytest.raises(MissingInputError, match=r"a\.tar is broken: .+ after 0 images"):
        index.index_tar(tmp_path / "a.tar")


@pytest.mark.parametrize("picture", [b"\xff" * 2011, black_bmp()], ids=["odd", "zeros"])
def test_broken_header_in_the_middle(tmp_path, picture):
    members = {f"{number}.bmp": picture for number in range(4)}
    path = samples.write_tar(tmp_path / "x.tar", members)
    data = bytearray(path.read_bytes())
    second = 512 + -(-len(picture) // 512) * 512
    data[second : second + 100] = b"\xab" * 100
    path.write_bytes(data)
    with pytest.raises(MissingInputError, match=r"x\.tar"):
        index.index_tar(path)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "an empty file"),
        (b"x" * 300, "begins with b'xxxxxxxxx'; expected shards, or a folder of images"),
        (b"<html>404</html>" * 100, "a web page"),
        (b"\x1f\x8b" * 600, "compressed by gzip; unpack it"),
        (b"PK\3\4" + bytes(600), "a zip archive; unpack it"),
        (b"version https://git-lfs.github.com/spec/v1\n", "`git lfs pull`"),
        (samples.encode(samples.noise_picture(0)), "an image; name the folder"),
    ],
)
def test_no_tar(tmp_path, data, what):
    path = tmp_path / "x.tar"
    path.write_bytes(data)
    with pytest.raises(MissingInputError, match=f"x.tar is not a tar but.*{what}") as caught:
        index.index_tar(path)
    assert caught.value.exit_code == 3


# --- finding --------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working directory with shards/{000..003}.tar."""
    monkeypatch.chdir(tmp_path)
    for number in range(4):
        samples.write_tar(tmp_path / "shards" / f"{number:03d}.tar", {"1.jpg": b"x"})
    (tmp_path / "shards" / "readme.md").write_text("")
    (tmp_path / "list.txt").write_text("shards/002.tar\n\n  shards/000.tar  \n")
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("shards", "0123"),
        ("shards/{000..002}.tar", "012"),
        ("shards/{000,003}.tar", "03"),
        ("shards/00{1..2}.tar", "12"),
        ("shards/*.tar", "0123"),
        ("shards/00[23].tar", "23"),
        ("shards/00?.tar", "0123"),
        ("{shards,shards}/00[01].tar", "0101"),
        ("shards/001.tar", "1"),
        ("list.txt", "20"),
    ],
)
def test_expand(folder, pattern, expected):
    assert [Path(place).stem[-1] for place in index.expand(pattern)] == list(expected)
    if pattern != "list.txt":
        absolute = index.expand(str(folder / pattern) if "{s" not in pattern else pattern)
        assert [Path(place).stem[-1] for place in absolute] == list(expected)


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("shards/{000..005}.tar", "2 of 6 files are missing (shards/004.tar, shards/005.tar)"),
        ("shards/x*.tar", "shards/x*.tar"),
        ("elsewhere", "elsewhere"),
        ("shards/009.tar", "shards/009.tar"),
        ("missing.txt", "missing.txt"),
        ("shards/{000..", "shards/{000.."),
        ("shards/**.tar/{0", "shards/**.tar/{0"),
        ("x/{000000000..999999999}.tar", "1,000,000,000 shards, expected 1,000,000 at most"),
        ("x/{0..999..3}{a..c}.tar", "1002 of 1002 files are missing"),
        ("x/{{0..999},b}{0..99999}.tar", "200,000,000 shards, expected 1,000,000 at most"),
        ("x/" + 30 * "{a,b}", "1,073,741,824 shards"),
        ("binary.txt", "binary.txt is not a list of shards: byte 3 is not UTF-8"),
        ("empty.txt", "empty.txt lists no shards: expected a shard on each line"),
    ],
)
def test_expand_names_what_is_missing(folder, pattern, named):
    (folder / "binary.txt").write_bytes(b"abc\xff\xfe")
    (folder / "empty.txt").write_text("# none\n\n")
    with pytest.raises(MissingInputError) as caught:
        index.expand(pattern)
    assert named in str(caught.value)


def test_missing_shards_are_not_called_none(folder):
    with pytest.raises(MissingInputError, match=r"^8 of 12 files .*/006.tar, \.\.\.\); check"):
        index.expand("shards/{000..011}.tar")
    with pytest.raises(MissingInputError, match="no shards: no file is named like shards/x"):
        index.expand("shards/x*.tar")


@pytest.mark.parametrize(
    "pattern",
    ["s3://b/*.tar", "s3://b/{a,b}/", "https://me:secret@h/list.txt", "hf://datasets/o/n/*.tar?x"],
)
def test_remote_shards_are_named_and_not_listed(folder, pattern):
    (folder / "remote.txt").write_text("https://h/0.tar\nhttps://h/*.tar\n")
    for given in (pattern, "remote.txt"):
        with pytest.raises(MissingInputError, match="remote shards cannot be listed") as caught:
            index.expand(given)
        assert "secret" not in str(caught.value)
    for given in ("pipe:cat /data/*.tar", "https://h/0.tar?sign=*/", "s3://b/{0..3}.tar"):
        assert index.expand(given)


def test_a_list_may_begin_with_a_byte_order_mark(folder):
    (folder / "list.txt").write_bytes(b"\xef\xbb\xbfshards/002.tar\r\nshards/000.tar\r\n")
    assert index.expand("list.txt") == ["shards/002.tar", "shards/000.tar"]


def test_a_shard_that_is_there_is_not_taken_for_a_pattern(folder):
    name = "shards/a [x] {b} *.tar"
    (folder / "shards/000.tar").rename(folder / name)
    assert index.expand(name) == [name]


def test_upper_case_shards(folder):
    (folder / "shards/000.tar").rename(folder / "shards/000.TAR")
    assert index.expand("shards")[0] == "shards/000.TAR"


@pytest.mark.parametrize(
    ("make", "named"),
    [
        ("photos/a/0.tar", "in its folders a: name them, as '"),
        ("photos/0.tar.gz", "photos, but 0.tar.gz: compressed shards cannot be read in places"),
        ("photos/0.tgz", "unpack them, as `gunzip x.tar.gz`"),
    ],
)
def test_shards_elsewhere_or_compressed_are_explained(folder, make, named):
    (folder / make).parent.mkdir(parents=True)
    (folder / make).write_bytes((folder / "shards/000.tar").read_bytes())
    with pytest.raises(MissingInputError) as caught:
        open_source(folder / "photos")
    assert named in str(caught.value)
    (folder / "x.tar.gz").write_bytes(b"packed")
    with pytest.raises(MissingInputError, match="compressed shards"):
        index.expand(str(folder / "x.tar.gz"))


def test_a_link_in_a_circle_is_neither_shard_nor_photograph(folder):
    shards, before = folder / "shards", index.expand(str(folder / "shards"))
    for name in ("loop.tar", "loop.jpg", "loop"):
        (shards / name).symlink_to(shards / name)
    assert index.expand(str(shards)) == before
    photographs = folder / "photographs"
    photographs.mkdir()
    (photographs / "loop.jpg").symlink_to(photographs / "loop.jpg")
    (photographs / "a.jpg").write_bytes(samples.encode(samples.noise_picture(0)))
    source = open_source(photographs)
    assert source.describe() == ["1 image in a folder; not used: 1 broken link"]


def test_a_stray_tar_does_not_make_photographs_shards(tmp_path):
    samples.write_tar(tmp_path / "photos" / "backup.tar", {"1.jpg": b"x"})
    for name in "abc":
        (tmp_path / "photos" / f"{name}.jpg").write_bytes(b"x")
    source = open_source(tmp_path / "photos")
    assert source.files == ["a.jpg", "b.jpg", "c.jpg"]
    assert source.describe() == ["3 images in a folder; not used: 1 .tar"]
    samples.write_tar(tmp_path / "shards" / "0.tar", {"1.jpg": b"x"})
    (tmp_path / "shards" / "preview.jpg").write_bytes(b"x")
    assert open_source(tmp_path / "shards").describe() == ["1 image in 1 shard"]


JPEG = samples.encode(samples.noise_picture(0), "JPEG")


@pytest.mark.parametrize(
    ("members", "found"),
    [
        ({"IMG.1.jpg": b"1", "IMG.2.jpg": b"2", "IMG.2.json": b"{}"}, [b"1", b"2"]),
        (
            {"0.seg.png": b"s", "0.image.png": b"0", "1.seg.png": b"s", "1.image.png": b"1"},
            [b"0", b"1"],
        ),
        ({"0.pixels": JPEG, "0.json": b"{}", "1.pixels": JPEG}, [JPEG, JPEG]),
        ({"0": JPEG, "1": b"text"}, [JPEG]),
        ({"0.jpg": b"0", "._0.jpg": b"apple", "__MACOSX/0.jpg": b"apple"}, [b"0"]),
        ({"./0.jpg": b"0", "./1.jpg": b"1"}, [b"0", b"1"]),
        ({"0.jfif": b"0", "1.JPE": b"1"}, [b"0", b"1"]),
        ({"0.image.png": b"0", "0.seg.png": b"s"}, [b"0"]),  # one sample, and so no field twice
    ],
)
def test_fields_and_dotted_names(tmp_path, members, found):
    samples.write_tar(tmp_path / "x.tar", members)
    assert read_all(open_source(tmp_path / "x.tar")) == found


def test_a_key_that_comes_again_begins_another_sample(tmp_path):
    pairs = [("a.jpg", b"0"), ("a.json", b'{"n": 1}'), ("a.jpg", b"1"), ("a.json", b'{"n": 2}')]
    for name, data in pairs:
        (tmp_path / name).write_bytes(data)
        with tarfile.open(tmp_path / "x.tar", "a") as archive:
            archive.add(tmp_path / name, name)
    found = index.index_tar(tmp_path / "x.tar")
    assert [image.numbers for _, image in found.images] == [{"n": 1.0}, {"n": 2.0}]
    assert read_all(open_source(tmp_path / "x.tar")) == [b"0", b"1"]


def test_tars_joined_by_cat_are_refused(tmp_path):
    parts = [samples.write_tar(tmp_path / f"{n}.tar", {f"{n}.jpg": b"x"}) for n in range(2)]
    joined = tmp_path / "joined.tar"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    with pytest.raises(MissingInputError, match="another tar behind its end mark, after 1 image"):
        index.index_tar(joined)
    joined.write_bytes(parts[0].read_bytes() + bytes(20_000))
    assert len(index.index_tar(joined).images) == 1


def test_an_image_whose_path_the_header_cuts_has_a_name(tmp_path):
    (tmp_path / "0.jpg").write_bytes(b"x")
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.add(tmp_path / "0.jpg", "d/" * 60 + "0.jpg")
    assert open_source(tmp_path / "x.tar").read(0, 0) == ("x.tar/image 0", b"x")


def test_addresses_of_local_files_are_paths(tmp_path):
    for name in ("0.tar", "1.tar"):
        samples.write_tar(tmp_path / "shards" / name, {"0.jpg": b"x"})
    place = f"file://{tmp_path}/shards"
    assert len(read_all(open_source(f"{place}/{{0..1}}.tar", index_dir=tmp_path))) == 2
    assert len(read_all(open_source(f"{place}/0.tar::{place}/1.tar", index_dir=tmp_path))) == 2
    assert len(read_all(open_source(place, index_dir=tmp_path))) == 2
    assert len(read_all(open_source(f"file:{tmp_path}/shards/0.tar", index_dir=tmp_path))) == 1
    assert len(read_all(open_source(f"{place}/0?tar", index_dir=tmp_path))) == 1
    assert len(read_all(open_source(f"{tmp_path}/**/*.tar"))) == 2
    (tmp_path / "list.txt").write_text(f"{place}/0.tar\nfile:{tmp_path}/shards/1.tar\n")
    assert len(read_all(open_source(tmp_path / "list.txt", index_dir=tmp_path))) == 2


def test_a_link_to_a_shard_that_is_gone_is_not_passed_over(tmp_path):
    samples.write_tar(tmp_path / "photos" / "0.tar", {"0.jpg": b"x"})
    (tmp_path / "photos" / "1.tar").symlink_to("/gone/1.tar")
    with pytest.raises(MissingInputError, match=r"it is a link to /gone/1\.tar"):
        open_source(tmp_path / "photos")


def test_what_a_missing_shard_may_mean(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA", str(tmp_path))
    for pattern in ("$DATA/{0..1}.tar", "$DATA/*.tar"):
        with pytest.raises(MissingInputError, match=f"has replaced its \\$: write {tmp_path}"):
            index.expand(pattern)
    samples.write_tar(tmp_path / "0.tar", {"0.jpg": b"x"})
    (tmp_path / "list.txt").write_text("0.tar\n")
    with pytest.raises(MissingInputError, match=f"start at the current directory, {Path.cwd()}"):
        index.expand(str(tmp_path / "list.txt"))


@pytest.mark.parametrize(
    "numbers", [b'{"a": 1' + b"0" * 400 + b"}", b'{"a": ' + b"[" * 20_000, b'{"a": 1e999}', b"[1]"]
)
def test_metadata_that_are_no_numbers_do_not_matter(tmp_path, numbers):
    good = b'{"a": 5}'
    members = {"0.jpg": b"x", "0.json": numbers, "1.jpg": b"x", "1.json": good}
    found = index.index_tar(samples.write_tar(tmp_path / "x.tar", members))
    assert [image.numbers for _, image in found.images] == [{}, {"a": 5.0}]


def test_several_conditions_in_one_filter():
    assert [str(f) for f in sources.parse_filters(["a >= 1, b < 2", "c == 3"])] == [
        *("a >= 1", "b < 2", "c == 3")
    ]


def test_what_could_not_be_fetched_is_tried_again(tmp_path, monkeypatch):
    """Neither credentials, 403, 404 nor a silent server are properties of the data."""
    samples.write_tar(tmp_path / "0.tar", {"1.jpg": b"x"})
    cache, place = ShardCache(tmp_path / "cache", 2**30), "https://example.org/0.tar"
    answers = [MissingInputError("answers 403"), RunFailedError("stalled"), tmp_path / "0.tar"]

    def path(url):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(cache, "path", path)
    messages = []
    for _ in range(3):
        index.build_index([place], tmp_path / "index", cache)
        source = sources.TarSource(tmp_path / "index", [], cache)
        messages.append(list(source.broken.values()))
    assert messages == [["answers 403"], ["stalled"], []]
    assert source.counts.tolist() == [1]
    assert source.changed() == []
    assert answers == []


@pytest.mark.parametrize("first", [b"<html>log in</html>", None])
def test_a_remote_shard_that_came_broken_is_fetched_again(tmp_path, monkeypatch, first):
    """Servers answer with a page of a login, or cut a body whose length they did not announce."""
    whole = samples.write_tar(tmp_path / "0.tar", {"1.jpg": b"x" * 2000}).read_bytes()
    bodies, url = [first or whole[:1500], whole], "https://example.org/0.tar"
    monkeypatch.setattr(transfer, "_http_blocks", lambda *_: (body for body in [bodies.pop(0)]))
    cache = ShardCache(tmp_path / "cache", 2**30)
    index.build_index([url], tmp_path / "index", cache)
    (message,) = sources.TarSource(tmp_path / "index", [], cache).broken.values()
    assert message.startswith(f"shard {url} is")
    index.build_index([url], tmp_path / "index", cache)
    source = sources.TarSource(tmp_path / "index", [], cache)
    assert not source.broken
    assert source.read(0, 0)[1] == b"x" * 2000


@pytest.mark.parametrize(
    ("answer", "code", "said"),
    [
        (RunFailedError("cannot fetch it: stalled"), 4, "could not be fetched"),
        (RunFailedError("no room for it in the cache"), 4, "could not be fetched"),
        (MissingInputError("cannot fetch it: 404"), 3, "1 of 1 shard is broken"),
        (None, 3, "1 of 1 shard is broken"),  # it is there, and cut short
    ],
)
def test_a_failed_fetch_is_not_a_broken_shard(tmp_path, monkeypatch, capsys, answer, code, said):
    """By what the index holds, whatever the words of the message."""
    (tmp_path / "0.tar").write_bytes(b"cannot fetch")

    def path(cache, url):
        if answer is not None:
            raise answer
        return tmp_path / "0.tar"

    monkeypatch.setattr(ShardCache, "path", path)
    there = ["--index-dir", str(tmp_path / "index"), "--cache-dir", str(tmp_path / "cache")]
    assert main(["index", "https://example.org/0.tar", *there]) == code
    assert said in capsys.readouterr().err


def test_local_shards_touch_no_cache(tmp_path, monkeypatch):
    samples.packed(tmp_path / "photos", count=1, per_shard=1)
    cache = ShardCache(tmp_path / "cache", 2**30)
    source = sources.open_source("photos", str(tmp_path / "photos"), [], cache)
    source.read(0, 0)
    assert not (tmp_path / "cache").exists()


def test_without_locks_the_index_is_built_all_the_same(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(files.fcntl, "flock", none)
    samples.packed(tmp_path / "photos", count=1, per_shard=1)
    assert open_source(tmp_path / "photos").counts.tolist() == [1]
    cache = ShardCache(tmp_path / "cache", 2**30)
    with pytest.raises(RunFailedError, match=r"no file locks; give data\.cache_dir"):
        cache.open("https://example.org/0.tar")


def test_an_index_that_can_be_written_nowhere_names_the_setting(tmp_path, monkeypatch):
    samples.packed(tmp_path / "photos", count=1, per_shard=1)
    monkeypatch.setattr(index, "is_writable", lambda place: False)
    with pytest.raises(RunFailedError, match=r"give data\.index_dir"):
        open_source(tmp_path / "photos")


def test_folder_without_shards(tmp_path):
    with pytest.raises(MissingInputError, match=r"no shards and no images.*; it is empty"):
        index.expand(str(tmp_path))
    (tmp_path / "a.mov").write_bytes(b"film")
    with pytest.raises(MissingInputError, match=r"no shards and no images.*; not used: 1 \.mov"):
        open_source(tmp_path)


def test_a_folder_that_cannot_be_read_is_a_missing_input(tmp_path, capsys, monkeypatch):
    def refusing(real):
        def listed(path="."):
            if Path(os.fsdecode(path)) == tmp_path:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return real(path)

        return listed

    for name in ("scandir", "listdir"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))
    assert main(["index", str(tmp_path)]) == 3
    assert f"{tmp_path}: Permission denied; give a folder" in capsys.readouterr().err


def test_photographs_need_no_index(tmp_path, capsys):
    (tmp_path / "a.jpg").write_bytes(b"x")
    assert main(["index", str(tmp_path)]) == 3
    said = f"no shards in {tmp_path}, but 1 photograph: a folder of photographs needs no index"
    assert said in capsys.readouterr().err


# --- sources --------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path) -> Path:
    """Four shards of two images; the second is cut short and the third is empty."""
    paths = samples.packed(tmp_path / "photos", count=8, per_shard=2)
    for path in paths:
        path.chmod(0o644)
    paths[1].write_bytes(paths[1].read_bytes()[:3000])
    paths[2].write_bytes(b"")
    return tmp_path / "photos"


def test_broken_shards_stop_the_run(damaged):
    with pytest.raises(MissingInputError) as caught:
        open_source(damaged)
    message = str(caught.value)
    assert "00001.tar" in message
    assert "00002.tar" in message
    assert "2 of 4 shards of photos are broken" in message
    assert "data.bad_shards=skip" in message


def test_broken_shards_are_named_and_left_out(damaged):
    warnings: list[str] = []
    source = open_source(damaged, bad_shards="skip", warn=warnings.append)
    assert source.counts.tolist() == [2, 0, 0, 2]
    assert len(warnings) == 2
    assert "00001.tar" in warnings[0]
    assert "left out" in warnings[0]


def test_an_index_without_an_image_is_missing_input(tmp_path, capsys):
    shard = samples.write_tar(tmp_path / "0.tar", {"1.txt": b"a caption"})
    assert main(["index", str(shard)]) == MissingInputError.exit_code
    assert "no image to train on" in capsys.readouterr().err
    shard = samples.write_tar(tmp_path / "1.tar", {"1.jpg": b"x", "1.json": b'{"width": 3}'})
    assert main(["index", str(shard)]) == 0
    assert main(["index", str(shard), "--filter", "width > 3"]) == MissingInputError.exit_code
    assert "loosen the filters" in capsys.readouterr().err


def test_all_shards_broken(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"")
    with pytest.raises(MissingInputError, match="no image is left"):
        open_source(tmp_path, bad_shards="skip", warn=lambda line: None)


def test_shards_without_images(tmp_path):
    samples.write_tar(tmp_path / "x.tar", {"1.txt": b"text", "2.json": b"{}"})
    with pytest.raises(MissingInputError, match=r"data\.sources\.photos\.shards.*no image"):
        open_source(tmp_path)


def test_missing_source_names_its_key():
    with pytest.raises(MissingInputError, match=r"data\.sources\.photos\.shards=/no/such"):
        open_source("/no/such")


# --- filters and the index ------------------------------------------------------------------


def with_metadata(folder: Path, rows: list[dict | None]) -> Path:
    """One shard; sample i has image b"i" and the JSON of row i, or none."""
    members = {}
    for number, row in enumerate(rows):
        members[f"{number}.jpg"] = str(number).encode()
        if row is not None:
            members[f"{number}.json"] = json.dumps(row).encode()
    samples.write_tar(folder / "00000.tar", members)
    return folder


ROWS = [
    {"width": 300, "aesthetic": 6.0, "name": "text"},
    {"width": 200, "aesthetic": 7.0},
    {"width": 400},
    None,
    {"width": 500, "aesthetic": 4.0, "punsafe": 0.9},
    {"width": 256, "aesthetic": 5.0, "punsafe": None},
]


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ([], "012345"),
        (["width >= 256"], "0245"),
        (["width>=256", "aesthetic >= 5"], "05"),
        (["aesthetic < 5"], "4"),
        (["width != 256"], "0124"),
        (["width == 256"], "5"),
        (["punsafe <= 1e0"], "4"),
    ],
)
def test_filters_keep_what_passes_and_has_the_field(tmp_path, filters, kept):
    source = open_source(with_metadata(tmp_path / "m", ROWS), filters)
    assert b"".join(read_all(source)).decode() == kept
    assert int(source.counts.sum()) == len(kept)


def test_dropped_shares_are_told_before_training(tmp_path):
    source = open_source(with_metadata(tmp_path / "m", ROWS), ["width >= 256", "aesthetic >= 5"])
    text = "; ".join(source.describe())
    assert "2 images in 1 shard;" in text
    assert "width >= 256 dropped 2 (33.3 %)" in text
    assert "aesthetic >= 5 dropped 2 (33.3 %)" in text


def test_unusable_filters(tmp_path):
    folder = with_metadata(tmp_path / "m", ROWS)
    with pytest.raises(UsageError, match="expected FIELD OPERATOR NUMBER"):
        open_source(folder, ["width ~ 3"])
    with pytest.raises(UsageError, match=r"no image has a field 'hight'.*width"):
        open_source(folder, ["hight > 3"])
    with pytest.raises(MissingInputError, match="no image is left"):
        open_source(folder, ["width > 9000"])


def test_the_index_is_kept_beside_the_shards_and_used_again(tmp_path, monkeypatch):
    samples.packed(tmp_path / "photos", count=4, per_shard=2)
    one = open_source(tmp_path / "photos")
    assert one.directory.parent == tmp_path / "photos" / ".kl_f8_index"
    monkeypatch.setattr(index, "index_tar", None)  # it would fail if it were called
    assert read_all(open_source(tmp_path / "photos")) == read_all(one)


@pytest.mark.parametrize("cut", ["index.json", "blocks.npy", "sizes.npy", "column-0.npy", "part"])
def test_an_index_that_cannot_be_read_is_made_anew(tmp_path, cut):
    samples.packed(tmp_path / "photos", count=4, per_shard=2)
    before = open_source(tmp_path / "photos")
    whole = read_all(before)
    for left in (0, 100, -4):
        names = ["part-000000.npz", "index.json"] if cut == "part" else [cut]
        for file in (before.directory / name for name in names):
            file.write_bytes(file.read_bytes()[:left])
        source = open_source(tmp_path / "photos", ["height >= 1"])
        assert read_all(source) == whole
        assert source.columns == before.columns


@pytest.mark.parametrize(
    ("entry", "wrong"),
    [("broken", None), ("counts", float("inf")), ("columns", {"a": None}), ("locations", 3)],
)
def test_an_index_of_another_form_is_made_anew(tmp_path, entry, wrong):
    samples.packed(tmp_path / "photos", count=4, per_shard=2)
    before = open_source(tmp_path / "photos")
    file = before.directory / "index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), entry: wrong}))
    assert read_all(open_source(tmp_path / "photos", ["height >= 1"])) == read_all(before)
    file.write_text("[" * 100_000)
    assert open_source(tmp_path / "photos").columns == before.columns


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda shard: shard.unlink(), "cannot be opened any more: No such file"),
        (
            lambda shard: shard.write_bytes(shard.read_bytes()[:1100]),
            "has changed since it was indexed",
        ),
        (lambda shard: shard.write_bytes(b"<html>" * 500), "has changed since it was indexed"),
        (lambda shard: repacked(shard), "has changed since it was indexed"),
    ],
)
def test_a_shard_that_goes_or_changes_while_it_is_used_is_named(tmp_path, change, said):
    shard = samples.write_tar(tmp_path / "0.tar", {"0.jpg": b"one", "1.jpg": b"second"})
    source = open_source(shard)
    source.read(0, 1)
    change(shard)
    with pytest.raises(MissingInputError, match=f"shard {shard} {said}"):
        source.read(0, 1)


def repacked(shard: Path) -> None:
    """Other images, in a shard of the same name."""
    samples.write_tar(shard, {"0.jpg": b"other", "1.jpg": b"other"})


def test_a_copy_of_a_shard_is_the_same_shard(tmp_path):
    shard = samples.write_tar(tmp_path / "0.tar", {"0.jpg": b"one", "1.jpg": b"second"})
    source = open_source(shard)
    before = source.read(0, 1)
    shutil.copy(shard, tmp_path / "copy")
    (tmp_path / "copy").replace(shard)
    assert source.read(0, 1) == before


def test_a_changed_shard_is_indexed_anew(tmp_path):
    paths = samples.packed(tmp_path / "photos", count=4, per_shard=2)
    open_source(tmp_path / "photos")
    samples.write_tar(paths[1], {"x.jpg": b"new"})
    (tmp_path / "photos" / "00001_stats.json").unlink()
    source = open_source(tmp_path / "photos")
    assert source.counts.tolist() == [2, 1]
    assert source.read(1, 0) == ("00001.tar/x.jpg", b"new")
    paths[0].write_bytes(paths[0].read_bytes()[:3000])
    with pytest.raises(MissingInputError, match=r"00000\.tar"):
        open_source(tmp_path / "photos")


def test_indexing_resumes_at_the_part_that_is_missing(tmp_path, monkeypatch):
    paths = samples.packed(tmp_path / "photos", count=5, per_shard=1)
    monkeypatch.setattr(index, "PART_SHARDS", 2)
    locations = [str(path) for path in paths]
    cache = ShardCache(tmp_path / "cache", 2**30)
    index.build_index(locations, tmp_path / "index", cache)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "index").glob("part-*")}
    assert len(before) == 3
    (tmp_path / "index" / "part-000001.npz").unlink()
    reported: list[tuple[int, int]] = []
    index.build_index(locations, tmp_path / "index", cache, 2, lambda *n: reported.append(n))
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "index").glob("part-*")}
    assert {name for name in before if before[name] != after[name]} == {"part-000001.npz"}
    assert reported[-1] == (5, 5)


def test_a_read_only_source_is_indexed_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("KL_F8_TRAIN_CACHE", str(tmp_path / "cache"))
    writable = index.is_writable  # root may write anywhere
    monkeypatch.setattr(index, "is_writable", lambda p: "photos" not in p.parts and writable(p))
    samples.packed(tmp_path / "photos", count=1, per_shard=1)
    source = open_source(tmp_path / "photos")
    assert source.directory.is_relative_to(tmp_path / "cache" / "index")


@pytest.mark.parametrize("read_only", [False, True])
def test_the_verb_says_where_it_writes_before_it_does(tmp_path, monkeypatch, capsys, read_only):
    monkeypatch.setenv("KL_F8_TRAIN_CACHE", str(tmp_path / "cache"))
    writable = index.is_writable  # root may write anywhere
    beside = tmp_path / "photos" / ".kl_f8_index"
    if read_only:
        monkeypatch.setattr(index, "is_writable", lambda p: "photos" not in p.parts and writable(p))
    samples.packed(tmp_path / "photos", count=2, per_shard=1)
    build, seen = index.build_index, []

    def watched(*arguments, **options):
        seen.append(capsys.readouterr().out)
        return build(*arguments, **options)

    monkeypatch.setattr(index, "build_index", watched)
    assert main(["index", str(tmp_path / "photos")]) == 0
    ((said,),) = (text.splitlines() for text in seen)
    folder = tmp_path / "cache" / "index" if read_only else beside
    assert said.startswith(f"indexing 2 shards into {folder}")
    assert said.endswith(f", as {beside} cannot be written") == read_only
    assert beside.exists() == (not read_only)
    assert (folder / f"{Path(capsys.readouterr().out.split('index: ')[1].strip()).name}").is_dir()


def test_sources_travel_to_loader_processes(tmp_path):
    samples.packed(tmp_path / "photos", count=3, per_shard=2)
    source = open_source(tmp_path / "photos", ["width >= 1"])
    again = pickle.loads(pickle.dumps(source))
    assert read_all(again) == read_all(source)


def test_statistics_beside_a_shard_notice_missing_images(tmp_path):
    with_metadata(tmp_path / "m", ROWS)
    (tmp_path / "m" / "00000_stats.json").write_text('{"count": 9, "successes": 6}')
    assert open_source(tmp_path / "m").counts.tolist() == [6]
    (tmp_path / "n").mkdir()
    shutil.copy(tmp_path / "m" / "00000.tar", tmp_path / "n")
    (tmp_path / "n" / "00000_stats.json").write_text('{"count": 9, "successes": 7}')
    with pytest.raises(MissingInputError, match=r"holds 6 images, 00000_stats\.json says 7"):
        open_source(tmp_path / "n")


def test_a_parquet_beside_a_shard_tells_what_its_json_does_not(tmp_path):
    with_metadata(tmp_path / "m", [None, None, {"width": 1}])
    rows = [{"key": "1", "width": 300}, {"key": "0", "width": 100}, {"key": "2", "width": 900}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "m" / "00000.parquet")
    source = open_source(tmp_path / "m", ["width >= 200"])
    assert read_all(source) == [b"1"]


# --- plain folders --------------------------------------------------------------------------


def test_a_folder_of_images_is_a_source(tmp_path):
    (tmp_path / "holiday" / "beach").mkdir(parents=True)
    for name in ("b.JPG", "a.png", "beach/c.webp", "notes.txt"):
        (tmp_path / "holiday" / name).write_bytes(name.encode())
    source = open_source(tmp_path / "holiday")
    assert read_all(source) == [b"a.png", b"b.JPG", b"beach/c.webp"]
    assert source.read(0, 2)[0] == "beach/c.webp"
    with pytest.raises(UsageError, match="plain folder"):
        open_source(tmp_path / "holiday", ["width > 1"])


# --- scale ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_index_of_100_million_images_opens_quickly_and_small(tmp_path):
    """100,000 shards of 1,000 images, one column: under 10 s and 2 GB, in a process of its own."""
    write = f"""
import json
from pathlib import Path
import numpy as np
root, shards, images = Path({str(tmp_path)!r}), 100_000, 1_000
for name, kind in (("blocks", np.uint32), ("sizes", np.uint32), ("column-0", np.float32)):
    array = np.lib.format.open_memmap(root / f"{{name}}.npy", "w+", kind, (shards * images,))
    for start in range(0, len(array), 10**7):
        array[start : start + 10**7] = np.arange(start, start + 10**7) % 1000
(root / "index.json").write_text(json.dumps({{
    "locations": [f"/data/{{i:06d}}.tar" for i in range(shards)],
    "fingerprints": [[1, 1]] * shards, "counts": [images] * shards, "columns": ["width"],
    "broken": {{}}, "without_image": 0}}))
"""
    read = f"""
import json, time
from pathlib import Path
from kl_f8_train.data.shard_cache import ShardCache
from kl_f8_train.data.sources import Filter, TarSource
root = Path({str(tmp_path)!r})
began = time.perf_counter()
source = TarSource(root, [], ShardCache(root / "cache", 2**30))
opened = time.perf_counter() - began
began = time.perf_counter()
filtered = TarSource(root, [Filter.parse("width >= 100")], ShardCache(root / "cache", 2**30))
filtering = time.perf_counter() - began
status = Path("/proc/self/status").read_text()
peak = int(status.split("VmHWM:")[1].split()[0])  # KiB; unlike ru_maxrss, of this program alone
print(json.dumps([opened, filtering, int(source.counts.sum()),
    int(filtered.counts.sum()), peak / 2**20]))
"""
    subprocess.run([sys.executable, "-c", write], check=True)
    done = subprocess.run([sys.executable, "-c", read], capture_output=True, text=True, check=True)
    opened, filtered, total, kept, gib = json.loads(done.stdout)
    print(f"opened in {opened:.1f} s, filtered in {filtered:.1f} s, peak {gib:.2f} GiB")
    assert (total, kept) == (100_000_000, 90_000_000)
    assert opened < 10
    assert filtered < 20
    assert gib < 2
