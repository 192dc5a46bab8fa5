import hashlib
import io
import json
import os
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import samples
import webdataset
from PIL import Image

from kl_f8_train import config, images
from kl_f8_train.__main__ import main
from kl_f8_train.data import pack
from kl_f8_train.errors import MissingInputError, RunFailedError, UsageError
from kl_f8_train.folders import SUFFIXES, list_folder


def make_folder(root: Path, count: int = 7) -> Path:
    """Photographs of several kinds in two levels of folders; the third is broken."""
    folder = root / "photos"
    (folder / "b").mkdir(parents=True)
    kinds = [("JPEG", "jpg"), ("PNG", "PNG"), ("JPEG", "jpg"), ("WEBP", "webp"), ("JPEG", "jpeg")]
    for number in range(count):
        kind, suffix = kinds[number % len(kinds)]
        data = samples.encode(samples.noise_picture(number, 40 + number, 64), kind)
        if number == 2:
            data = data[: len(data) // 2]
        (folder / ("b" if number > 3 else ".") / f"photo {number}.{suffix}").write_bytes(data)
    (folder / "notes.txt").write_text("no image")
    return folder


def good_files(folder: Path) -> list[Path]:
    files = [folder / file for file in list_folder(folder).files]
    return [file for file in files if file.name != "photo 2.jpg"]


def contents(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(out.iterdir())}


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        return {entry.name: archive.extractfile(entry).read() for entry in archive}


# --- layout ---------------------------------------------------------------------------------


def test_layout(tmp_path):
    """The order is that of the names; the broken file's key stays unused."""
    folder = make_folder(tmp_path)
    result = pack.pack(folder, tmp_path / "out", per_shard=4)
    assert sorted(contents(tmp_path / "out")) == [
        *("00000.tar", "00000_stats.json", "00001.tar", "00001_stats.json", "pack.json")
    ]
    assert [path.name for path in result.shards] == ["00000.tar", "00001.tar"]
    assert (result.images, result.written) == (6, 2)
    held = [list(members(path)) for path in result.shards]
    expected = [("000000000", "jpeg"), ("000000001", "jpg"), ("000000002", "png")]
    expected += [("000000003", "jpg"), ("000010000", "png"), ("000010002", "webp")]
    names = [f"{key}.{part}" for key, kind in expected for part in (kind, "json", "txt")]
    assert held == [names[:12], names[12:]]


def test_files_are_kept_as_they_are(tmp_path):
    folder = make_folder(tmp_path)
    result = pack.pack(folder, tmp_path / "out", per_shard=4)
    packed = {}
    for path in result.shards:
        held = members(path)
        for name in (name for name in held if name.endswith(".json")):
            meta = json.loads(held[name])
            assert name == f"{meta['key']}.json"
            data = held[f"{meta['key']}{Path(meta['url']).suffix.lower()}"]
            assert meta["sha256"] == hashlib.sha256(data).hexdigest()
            assert meta["status"] == "success"
            assert json.loads(meta["exif"]) == {}
            width, height = Image.open(io.BytesIO(data)).size
            assert (meta["width"], meta["height"]) == (width, height)
            assert (meta["original_width"], meta["original_height"]) == (width, height)
            assert held[f"{meta['key']}.txt"].decode() == Path(meta["url"]).stem
            packed[meta["url"]] = data
    originals = {str(f.relative_to(folder)): f.read_bytes() for f in good_files(folder)}
    assert packed == originals


def test_sizes_are_those_after_turning(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "photos").mkdir()
    data = samples.encode(samples.noise_picture(0, 40, 64), "JPEG", exif=exif)
    (tmp_path / "photos" / "a.jpg").write_bytes(data)
    result = pack.pack(tmp_path / "photos", tmp_path / "out")
    meta = json.loads(members(result.shards[0])["000000000.json"])
    assert (meta["width"], meta["height"]) == (40, 64)


def test_unreadable_images_are_named_and_counted(tmp_path):
    folder = make_folder(tmp_path)
    (folder / "photo 9.png").write_bytes(b"<html>")
    (folder / "photo 8.png").write_bytes(b"<html>")
    result = pack.pack(folder, tmp_path / "out")
    assert [line.split(":")[0] for line in result.skipped] == [
        *("photo 2.jpg", "photo 8.png", "photo 9.png")
    ]
    assert "runcated" in result.skipped[0]
    stats = json.loads((tmp_path / "out" / "00000_stats.json").read_text())
    assert stats["count"] == 9
    assert stats["successes"] == 6
    assert stats["failed_to_download"] == 0
    assert stats["failed_to_resize"] == 3
    assert sum(stats["status_dict"].values()) == 9
    assert stats["status_dict"]["not a readable image: a web page; download the file itself"] == 2
    assert stats["skipped"] == result.skipped


def test_nothing_usable_leaves_nothing(tmp_path):
    """As where git lfs left its pointers; after `git lfs pull` the same command works."""
    folder, out = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(MissingInputError, match=r"none of its 3 images can be used.*git lfs pull"):
        pack.pack(folder, out, per_shard=2)
    assert list(out.iterdir()) == []
    (folder / "0.jpg").write_bytes(samples.encode(samples.noise_picture(0)))
    assert pack.pack(folder, out, per_shard=2).images == 1


def test_what_the_command_line_says(tmp_path, monkeypatch):
    folder = make_folder(tmp_path)
    (folder / "x.png").write_bytes(b"<html>")
    result = pack.pack(folder, tmp_path / "out", per_shard=4)
    first, *others = str(result).splitlines()
    assert first == f"6 images in 2 shards, 2 of them written now: {tmp_path / 'out'}"
    assert others == ["not used: 1 .txt", *(f"left out: {line}" for line in result.skipped)]
    monkeypatch.setattr(pack, "SHOWN", 1)
    assert str(result).splitlines()[-1] == "2 left out; all are named in *_stats.json"
    assert len(str(result).splitlines()) == 4


def test_names_that_are_no_text(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    picture = samples.encode(samples.noise_picture(0), "PNG")
    Path(os.fsdecode(bytes(folder) + b"/\xff\xfe.png")).write_bytes(picture)
    (folder / "фото ☃.png").write_bytes(picture)
    result = pack.pack(folder, tmp_path / "out")
    held = members(result.shards[0])
    texts = [held[f"00000000{n}.txt"].decode() for n in range(2)]
    assert texts == ["фото ☃", r"\xff\xfe"]
    assert pack.pack(folder, tmp_path / "out").written == 0


def test_reencoding(tmp_path):
    folder = make_folder(tmp_path)
    result = pack.pack(folder, tmp_path / "out", reencode=True)
    held = members(result.shards[0])
    names = [name for name in held if name.endswith(".jpg")]
    assert len(names) == result.images == 6
    for name, file in zip(names, good_files(folder), strict=True):
        stored = Image.open(io.BytesIO(held[name]))
        assert stored.format == "JPEG"
        assert stored.layer[0][1:3] == (1, 1)  # sampling of the luma: 4:4:4
        original = images.to_pil(images.decode(file.read_bytes()))
        assert held[name] == samples.encode(original, quality=95, subsampling="4:4:4")
        meta = json.loads(held[name.replace(".jpg", ".json")])
        assert meta["sha256"] == hashlib.sha256(held[name]).hexdigest()


# --- other programs read it -----------------------------------------------------------------


def test_tar_reads_it(tmp_path):
    folder = make_folder(tmp_path)
    result = pack.pack(folder, tmp_path / "out", per_shard=4)
    (tmp_path / "x").mkdir()
    for path in result.shards:
        subprocess.run(["tar", "xf", path, "-C", tmp_path / "x"], check=True)
    extracted = {
        file.read_bytes() for file in (tmp_path / "x").iterdir() if file.suffix in SUFFIXES
    }
    assert extracted == {file.read_bytes() for file in good_files(folder)}
    listing = subprocess.run(["tar", "tvf", path], check=True, capture_output=True, text=True)
    assert "1970-01-01" in listing.stdout
    assert "-rw-r--r-- 0/0" in listing.stdout


def test_webdataset_reads_it(tmp_path):
    folder = make_folder(tmp_path)
    result = pack.pack(folder, tmp_path / "out", per_shard=4)
    urls = [str(path) for path in result.shards]
    found = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
    assert [sample["__key__"] for sample in found] == [sample["json"]["key"] for sample in found]
    assert len(found) == 6
    for sample, file in zip(found, good_files(folder), strict=True):
        image = sample[file.suffix.lower().lstrip(".")]
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(file).convert("RGB")))
        assert sample["txt"] == file.stem
        assert sample["json"]["url"] == str(file.relative_to(folder))


# --- the same bytes, and going on -----------------------------------------------------------


@pytest.mark.slow
def test_processes_do_not_matter(tmp_path):
    folder = make_folder(tmp_path, count=12)
    seen = []
    one = pack.pack(folder, tmp_path / "one", per_shard=2, workers=1)
    two = pack.pack(
        folder, tmp_path / "two", per_shard=2, workers=2, progress=lambda *n: seen.append(n)
    )
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert one.skipped == two.skipped
    assert one.images == two.images == 11
    assert seen == [(done, 12) for done in (2, 4, 6, 8, 10, 12)]


def test_dates_and_owners_do_not_matter(tmp_path):
    folder = make_folder(tmp_path)
    pack.pack(folder, tmp_path / "one")
    os.utime(folder / "photo 0.jpg", (1, 1))
    (folder / "photo 0.jpg").chmod(0o600)
    pack.pack(folder, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_whole_pack_is_left_alone(tmp_path):
    folder = make_folder(tmp_path)
    first = pack.pack(folder, tmp_path / "out", per_shard=4)
    dates = {path: path.stat().st_mtime_ns for path in first.shards}
    again = pack.pack(folder, tmp_path / "out", per_shard=4)
    assert {path: path.stat().st_mtime_ns for path in again.shards} == dates
    assert again.written == 0
    assert (again.shards, again.images, again.skipped) == (
        *(first.shards, first.images, first.skipped),
    )


@pytest.mark.parametrize("lost", ["00001.tar", "00001_stats.json"])
def test_a_pack_goes_on(tmp_path, lost):
    folder = make_folder(tmp_path, count=9)
    pack.pack(folder, tmp_path / "out", per_shard=3)
    whole = contents(tmp_path / "out")
    (tmp_path / "out" / lost).unlink()
    (tmp_path / "out" / "00001.tar.part").write_bytes(b"half of it")
    seen = []
    result = pack.pack(folder, tmp_path / "out", per_shard=3, progress=lambda *n: seen.append(n))
    assert contents(tmp_path / "out") == whole
    assert result.written == 1
    assert seen == [(9, 9)]


def test_statistics_cut_short_are_made_again(tmp_path):
    folder = make_folder(tmp_path)
    pack.pack(folder, tmp_path / "out")
    whole = contents(tmp_path / "out")
    (tmp_path / "out" / "00000_stats.json").write_text("")
    assert pack.pack(folder, tmp_path / "out").written == 1
    assert contents(tmp_path / "out") == whole


def test_killed_at_any_moment(tmp_path):
    """A process that dies leaves no shard that is not whole; the next one goes on."""
    folder = make_folder(tmp_path, count=8)
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom kl_f8_train import images\n"
        "from kl_f8_train.data import pack\n"
        "picture, left = images.picture, [int(sys.argv[3])]\n"
        "def dies(data):\n"
        "    left[0] -= 1\n"
        "    return picture(data) if left[0] else os._exit(9)\n"
        "images.picture = dies\n"
        "pack.pack(Path(sys.argv[1]), Path(sys.argv[2]), per_shard=3, workers=1)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    out = tmp_path / "out"
    command = [sys.executable, "-c", code, folder, out, "6"]
    assert subprocess.run(command, env=environment, check=False).returncode == 9
    assert sorted(contents(out)) == [
        *("00000.tar", "00000_stats.json", "00001.tar.part", "pack.json")
    ]
    assert pack.pack(folder, out, per_shard=3).written == 2
    pack.pack(folder, tmp_path / "straight", per_shard=3)
    assert contents(out) == contents(tmp_path / "straight")


# --- refusals -------------------------------------------------------------------------------


def change_shard_size(folder: Path) -> dict[str, int]:
    return {"per_shard": 5}


def change_reencoding(folder: Path) -> dict[str, bool]:
    return {"reencode": True}


def add_a_file(folder: Path) -> dict[str, int]:
    (folder / "new.png").write_bytes(samples.encode(samples.noise_picture(1), "PNG"))
    return {}


def remove_a_file(folder: Path) -> dict[str, int]:
    (folder / "photo 0.jpg").unlink()
    return {}


def change_a_file(folder: Path) -> dict[str, int]:
    (folder / "photo 0.jpg").write_bytes(samples.encode(samples.noise_picture(77), "JPEG"))
    return {}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (change_shard_size, "per_shard: 4 there, 5 asked for"),
        (change_reencoding, "reencode: false there, true asked for"),
        (add_a_file, r"1 file new \(new.png\)"),
        (remove_a_file, r"1 file missing \(photo 0.jpg\)"),
        (change_a_file, r"1 file of another size \(photo 0.jpg\)"),
    ],
)
def test_shards_of_something_else_are_not_overwritten(tmp_path, change, named):
    folder = make_folder(tmp_path)
    pack.pack(folder, tmp_path / "out", per_shard=4)
    before = contents(tmp_path / "out")
    options = {"per_shard": 4, **change(folder)}
    with pytest.raises(UsageError, match=named):
        pack.pack(folder, tmp_path / "out", **options)
    assert contents(tmp_path / "out") == before


def test_other_shards_are_not_overwritten(tmp_path):
    samples.write_tar(tmp_path / "out" / "00000.tar", {"a.jpg": b"precious"})
    with pytest.raises(UsageError, match="already holds shards"):
        pack.pack(make_folder(tmp_path), tmp_path / "out")
    assert list(contents(tmp_path / "out")) == ["00000.tar"]


@pytest.mark.parametrize("text", ["3", "{}", '{"count": 5, "successes": 5}', "[" * 100_000])
def test_a_shard_whose_statistics_are_damaged_is_written_again(tmp_path, text):
    folder, out = make_folder(tmp_path), tmp_path / "out"
    first = pack.pack(folder, out, per_shard=4, workers=1)
    before = contents(out)
    (out / "00000_stats.json").write_text(text)
    again = pack.pack(folder, out, per_shard=4, workers=1)
    assert (again.images, again.skipped, again.written) == (first.images, first.skipped, 1)
    assert contents(out) == before


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": 3}', "[" * 100_000])
def test_a_manifest_of_something_else(tmp_path, text):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "pack.json").write_text(text)
    with pytest.raises(UsageError, match=r"pack\.json is not the list of a pack"):
        pack.pack(make_folder(tmp_path), tmp_path / "out")


@pytest.mark.parametrize("per_shard", [0, -1, 10_001])
def test_shards_of_impossible_size(tmp_path, per_shard):
    with pytest.raises(UsageError, match="expected 1 to 10,000"):
        pack.pack(make_folder(tmp_path), tmp_path / "out", per_shard=per_shard)


def test_more_shards_than_digits(tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "MAX_SHARDS", 6)
    with pytest.raises(UsageError, match="more than 6 shards"):
        pack.pack(make_folder(tmp_path), tmp_path / "out", per_shard=1)


def test_nothing_to_pack(tmp_path):
    with pytest.raises(MissingInputError, match="no such folder"):
        pack.pack(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingInputError, match="no images in"):
        pack.pack(tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk(tmp_path, monkeypatch):
    folder = make_folder(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with pytest.raises(RunFailedError, match="No space left on device"):
        pack.pack(folder, tmp_path / "out")
    monkeypatch.undo()
    assert pack.pack(folder, tmp_path / "out").written == 1


def test_a_directory_that_cannot_be(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(RunFailedError, match="cannot write"):
        pack.pack(make_folder(tmp_path), tmp_path / "out")


def test_a_file_that_goes_away_is_skipped(tmp_path, monkeypatch):
    folder = make_folder(tmp_path)
    read = pack.read_file

    def gone(path):
        if path.name == "photo 0.jpg":
            path.unlink()
        return read(path)

    monkeypatch.setattr(pack, "read_file", gone)
    result = pack.pack(folder, tmp_path / "out")
    assert result.images == 5
    assert "photo 0.jpg: cannot be read: No such file or directory" in result.skipped


@pytest.mark.parametrize(
    ("workers", "files", "cores", "expected"),
    [(None, 100, 8, 1), (None, 9000, 8, 5), (None, 10**5, 8, 8), (3, 100, 8, 3), (0, 9, 8, 1)],
)
def test_number_of_processes(monkeypatch, workers, files, cores, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    jobs = [pack.Job(n, Path(), ("x",) * (files // 9), Path(), False) for n in range(9)]
    assert pack._count(workers, jobs) == expected


def test_the_verb_ends_with_the_next_command(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    picture = samples.encode(samples.noise_picture(0, 32, 32), "PNG")
    (tmp_path / "photos" / "a.png").write_bytes(picture)
    out = tmp_path / "my shards"
    assert main(["pack", str(tmp_path / "photos"), str(out), "--workers", "1"]) == 0
    then, own = capsys.readouterr().out.splitlines()[-2:]
    assert own.startswith("to start from a VAE of your own")
    assert then.startswith("next: kl-f8-train doctor single_gpu init.weights=")
    found = config.load(config.find_recipe("single_gpu"), shlex.split(then)[4:])
    assert [source.shards for source in found.data.sources.values()] == [str(out)]
    assert found.run_dir == "runs/my shards"
