"""`pack` from parquet files, as data sets of the Hugging Face hub hold images."""

import json
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
import samples
from pyarrow import parquet as pq

from kl_f8_train.__main__ import main
from kl_f8_train.data import pack, parquet
from kl_f8_train.errors import ImageError, MissingInputError, UsageError

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def picture(number: int, kind: str = "JPEG") -> bytes:
    return samples.encode(samples.noise_picture(number, 40, 64), kind)


def write(path: Path, images, kind: pa.DataType = IMAGE, column: str = "image", group: int = 3):
    """A file with a caption before its images, in row groups of `group`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    captions = pa.array([f"caption {n}" for n in range(len(images))])
    table = pa.table({"text": captions, column: pa.array(images, kind)})
    pq.write_table(table, path, row_group_size=group)
    return path


def rows(count: int, first: int = 0):
    return [{"bytes": picture(n), "path": f"{n}.jpg"} for n in range(first, first + count)]


def packed(result) -> list[bytes]:
    """The images of all shards, in order."""
    found = []
    for path in result.shards:
        with tarfile.open(path) as archive:
            names = [name for name in archive.getnames() if not name.endswith((".json", ".txt"))]
            found += [archive.extractfile(name).read() for name in names]
    return found


def contents(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(out.iterdir())}


@pytest.fixture
def data_set(tmp_path):
    """Two files with 7 and 4 photographs, in a folder with what a hub's repository holds."""
    folder = tmp_path / "set"
    write(folder / "data" / "train-00000-of-00002.parquet", rows(7))
    write(folder / "data" / "train-00001-of-00002.parquet", rows(4, 7))
    (folder / "README.md").write_text("a data set")
    write(folder / ".cache" / "other.parquet", rows(1, 99))
    return folder


# --- what is read ---------------------------------------------------------------------------


def test_a_folder_is_packed_in_order_and_in_whole_shards(data_set, tmp_path):
    result = pack.pack(data_set, tmp_path / "out", per_shard=5)
    assert packed(result) == [picture(n) for n in range(11)]
    assert [
        json.loads(p.read_text())["count"] for p in sorted(tmp_path.glob("out/*_stats.json"))
    ] == [*(5, 5, 1)]
    with tarfile.open(result.shards[1]) as archive:
        names = archive.getnames()
        assert names[:3] == ["000010000.jpg", "000010000.json", "000010000.txt"]
        about = json.loads(archive.extractfile("000010002.json").read())
        assert archive.extractfile("000010002.txt").read() == b"7"
    assert about["url"] == "data/train-00001-of-00002.parquet#0"
    assert (about["width"], about["height"]) == (64, 40)


def test_files_globs_and_folders_name_the_same(data_set, tmp_path, capsys):
    files = sorted(data_set.glob("data/*.parquet"))
    given = {
        "files": [str(file) for file in reversed(files)],
        "glob": [str(data_set / "data" / "*.parquet")],
        "folder": [str(data_set / "data")],
        "twice": [str(data_set / "data"), str(files[0])],
    }
    whole = {}
    for name, places in given.items():
        assert main(["pack", *places, str(tmp_path / name), "--per-shard", "4"]) == 0
        whole[name] = contents(tmp_path / name)
    assert all(found == whole["files"] for found in whole.values())
    assert "11 images in 3 shards" in capsys.readouterr().out
    one = pack.pack(files[1], tmp_path / "one")
    assert packed(one) == [picture(n) for n in range(7, 11)]


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        ("image", IMAGE),
        ("jpg", pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string())])),
        ("photo", pa.struct([("path", pa.string()), ("bytes", pa.binary())])),
        ("im", pa.struct([("bytes", pa.binary())])),
    ],
)
def test_the_column_is_found_by_its_type(tmp_path, column, kind):
    names = [kind.field(n).name for n in range(kind.num_fields)]
    images = [{key: row[key] for key in names} for row in rows(4)]
    file = write(tmp_path / "a.parquet", images, kind, column)
    assert packed(pack.pack(file, tmp_path / "out")) == [picture(n) for n in range(4)]


def test_of_two_columns_the_one_called_image(tmp_path):
    columns = {
        "conditioning": pa.array(rows(2, 50), IMAGE),
        "image": pa.array(rows(2), IMAGE),
        "thumbnail": pa.array(rows(2, 70), IMAGE),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    result = pack.pack(tmp_path / "a.parquet", tmp_path / "out")
    assert packed(result) == [picture(0), picture(1)]
    pq.write_table(pa.table(columns).drop(["image"]), tmp_path / "b.parquet")
    with pytest.raises(MissingInputError, match="several columns of images, conditioning, thumb"):
        pack.pack(tmp_path / "b.parquet", tmp_path / "none")


def test_a_row_without_a_path_gets_the_suffix_of_its_bytes(tmp_path):
    kinds = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "GIF": "gif", "TIFF": "tif", "BMP": "bmp"}
    images = [{"bytes": picture(0, kind), "path": None} for kind in kinds]
    file = write(tmp_path / "a.parquet", images)
    result = pack.pack(file, tmp_path / "out")
    with tarfile.open(result.shards[0]) as archive:
        names = [name for name in archive.getnames() if not name.endswith((".json", ".txt"))]
        assert archive.extractfile("000000001.txt").read() == b"a"
    assert names == [f"00000000{n}.{suffix}" for n, suffix in enumerate(kinds.values())]


def test_broken_rows_are_named_and_counted(tmp_path):
    images = rows(8)
    images[1] = {"bytes": picture(1)[:300], "path": "1.jpg"}
    images[2] = {"bytes": b"<html>", "path": "2.jpg"}
    images[3] = {"bytes": None, "path": "3.jpg"}
    images[4] = None
    images[5] = {"bytes": b"", "path": None}
    result = pack.pack(write(tmp_path / "a.parquet", images), tmp_path / "out")
    assert packed(result) == [picture(n) for n in (0, 6, 7)]
    said = dict(line.split(": ", 1) for line in result.skipped)
    assert list(said) == [f"a.parquet#{n}" for n in range(1, 6)]
    assert said["a.parquet#3"] == "no image: only a path"
    assert said["a.parquet#4"] == said["a.parquet#5"] == "no image: empty"
    stats = json.loads((tmp_path / "out" / "00000_stats.json").read_text())
    assert (stats["count"], stats["successes"], stats["failed_to_resize"]) == (8, 3, 5)


def test_a_path_that_is_not_utf_8_costs_its_row(tmp_path):
    """It counted as packed, and no image was there."""
    images = pa.array(
        [{"bytes": picture(n), "path": p} for n, p in enumerate([b"a", b"\xff", b"c"])]
    )
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.binary())])
    raw = images.cast(kind)
    paths = pa.StringArray.from_buffers(3, *raw.field("path").buffers()[1:])
    image = pa.StructArray.from_arrays([raw.field("bytes"), paths], ["bytes", "path"])
    pq.write_table(pa.table({"image": image}), tmp_path / "a.parquet")
    result = pack.pack(tmp_path / "a.parquet", tmp_path / "out")
    assert packed(result) == [picture(0), picture(2)]
    assert result.images == 2
    (said,) = result.skipped
    assert said.startswith("a.parquet#1: cannot be read: ")


def test_a_damaged_row_group_costs_its_rows_and_no_others(tmp_path):
    file = write(tmp_path / "a.parquet", rows(9))
    place = pq.ParquetFile(file).metadata.row_group(1).column(1)
    whole = bytearray(file.read_bytes())
    at = place.data_page_offset
    whole[at : at + 40] = bytes(255 - byte for byte in whole[at : at + 40])  # a page's header
    file.write_bytes(whole)
    result = pack.pack(file, tmp_path / "out", per_shard=4)
    assert packed(result) == [picture(n) for n in (0, 1, 2, 6, 7, 8)]
    assert [line.split(": ")[0] for line in result.skipped] == [f"a.parquet#{n}" for n in (3, 4, 5)]
    assert all("cannot be read" in line for line in result.skipped)


# --- streaming ------------------------------------------------------------------------------


def test_memory_is_bounded_whatever_the_size_of_a_row_group(tmp_path):
    data = picture(0) + bytes(250_000)  # noise behind a JPEG's end is not read
    images = [{"bytes": data + bytes([n]), "path": "a.jpg"} for n in range(240)]  # 60 MB
    table = pa.table({"image": pa.array(images, IMAGE)})
    del images
    file = tmp_path / "a.parquet"
    pages = {"write_batch_size": 4, "use_dictionary": False}  # of 1 MB; else of 1,024 rows
    pq.write_table(table, file, row_group_size=1000, compression="none", **pages)
    del table
    found = parquet.read_table([file])
    base = pa.total_allocated_bytes()
    most, count = 0, 0
    for row in parquet.read(found.folder, list(found.dealt(100))):
        most, count = max(most, pa.total_allocated_bytes() - base), count + len(row.data)
    assert count > 60_000_000
    assert most < 10_000_000


def test_each_row_group_is_read_once(data_set, tmp_path, monkeypatch):
    """Also when several shards begin in it, or some of them are there."""
    groups = []
    read = parquet._values_of_group

    def noted(opened, column, group, *rest):
        groups.append(group)
        return read(opened, column, group, *rest)

    monkeypatch.setattr(parquet, "_values_of_group", noted)
    file = write(tmp_path / "a.parquet", rows(9), group=9)
    pack.pack(file, tmp_path / "out", per_shard=2)
    assert groups == [0]
    whole = contents(tmp_path / "out")
    for name in ("00001.tar", "00004.tar"):
        (tmp_path / "out" / name).unlink()
    assert pack.pack(file, tmp_path / "out", per_shard=2).written == 2
    assert groups == [0, 0]
    assert contents(tmp_path / "out") == whole


def test_shards_that_begin_in_one_row_group_are_one_process_s(data_set):
    held = pack._list([data_set])
    jobs = [pack.Job(n, held.folder, part, Path(), False) for n, part in enumerate(held.dealt(2))]
    chains = [[job.number for job in chain] for chain in pack._chains(jobs)]
    # row groups of 3, 3, 1 | 3, 1; shards begin at 0, 2 | 4 | 6 | 8 = 1 and 10 = 3 of the second
    assert chains == [[0, 1], [2], [3], [4], [5]]
    assert [len(part) for part in held.dealt(2)] == [2, 2, 2, 2, 2, 1]


@pytest.mark.slow
def test_progress_is_said_after_each_shard_of_a_large_row_group(tmp_path):
    write(tmp_path / "a.parquet", rows(6), group=6)
    said = []
    pack.pack(
        tmp_path / "a.parquet", tmp_path / "out", per_shard=2, progress=lambda *n: said.append(n)
    )
    assert said == [(2, 6), (4, 6), (6, 6)]


def test_processes_do_not_matter(data_set, tmp_path):
    one = pack.pack(data_set, tmp_path / "one", per_shard=2, workers=1)
    two = pack.pack(data_set, tmp_path / "two", per_shard=2, workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert one.images == two.images == 11


def test_a_changed_data_set_is_refused(data_set, tmp_path):
    pack.pack(data_set, tmp_path / "out")
    write(data_set / "data" / "more.parquet", rows(1))
    with pytest.raises(UsageError, match=r"1 file new \(data/more\.parquet\)"):
        pack.pack(data_set, tmp_path / "out")


# --- refusals -------------------------------------------------------------------------------


def test_a_folder_with_images_is_packed_as_one(tmp_path):
    write(tmp_path / "set" / "metadata.parquet", rows(1))
    (tmp_path / "set" / "a.jpg").write_bytes(picture(5))
    result = pack.pack(tmp_path / "set", tmp_path / "out")
    assert packed(result) == [picture(5)]
    assert result.not_used == "not used: 1 .parquet (if it holds images: kl-f8-train pack FILE OUT)"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"version https://git-lfs\noid sha256:0", "a pointer of git lfs"),
        (b"<html>", "not a parquet file"),
        (b"", "not a parquet file"),
        (None, "broken or cut short"),
    ],
)
def test_files_that_are_not_parquet(tmp_path, capsys, data, said):
    file = write(tmp_path / "a.parquet", rows(2))
    file.write_bytes(file.read_bytes()[:-20] if data is None else data)
    assert main(["pack", str(file), str(tmp_path / "out")]) == 3
    message = capsys.readouterr().err
    assert f"{file}: {said}" in message
    assert "Traceback" not in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [pa.string(), pa.struct([("a", pa.binary())])])
def test_a_file_without_images_names_its_columns(tmp_path, kind):
    images = ["x"] if kind == pa.string() else [{"a": b"x"}]
    file = write(tmp_path / "a.parquet", images, kind, "url")
    with pytest.raises(
        MissingInputError, match=r"no column of images; .*, got text: string, url: "
    ):
        pack.pack(file, tmp_path / "out")


def test_nothing_to_pack(tmp_path, capsys):
    empty = write(tmp_path / "empty" / "a.parquet", [])
    with pytest.raises(MissingInputError, match="no rows in it"):
        pack.pack(empty, tmp_path / "out")
    (tmp_path / "none").mkdir()
    for places, said in (
        ([tmp_path / "*.parquet"], "no such folder, file or match"),
        ([tmp_path / "away"], "no such folder"),
        ([tmp_path / "none"], "no images in"),
        ([tmp_path / "none", tmp_path / "none"], "one folder of images at a time"),
    ):
        assert main(["pack", *map(str, places), str(tmp_path / "out")]) == 3
        assert said in capsys.readouterr().err
    (tmp_path / "a.jpg").write_bytes(picture(0))
    assert main(["pack", str(tmp_path / "a.jpg"), str(tmp_path / "out")]) == 3
    assert "is another file; expected a folder of photographs" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch, capsys):
    file = write(tmp_path / "a.parquet", rows(1))
    for name in [name for name in sys.modules if name.split(".")[0] == "pyarrow"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert main(["pack", str(file), str(tmp_path / "out")]) == 2
    assert "pip install 'kl-f8-train[parquet]'" in capsys.readouterr().err


@pytest.mark.parametrize("left", [0, 2])
def test_a_file_that_changes_costs_its_rows_and_moves_no_others(data_set, left):
    held = pack._list([data_set])
    file = data_set / held.files[0][0]
    file.unlink()
    if left:
        write(file, rows(left))
    found = list(parquet.read(held.folder, list(held.dealt(4))))
    good = [row.name for row in found if not isinstance(row.data, ImageError)]
    assert len(found) == 11
    names = [name for name, _ in held.files]
    assert good == [
        *(f"{names[0]}#{n}" for n in range(left)),
        *(f"{names[1]}#{n}" for n in range(4)),
    ]
