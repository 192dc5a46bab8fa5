import errno
import os
import socket
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import samples
import torch

from kl_f8_train import folders, images
from kl_f8_train.errors import ImageError, MissingInputError

JPEG = samples.encode(samples.noise_picture(0), "JPEG")
RAW_HEAD = b"II*\0\x10\0\0\0CR\x02\0" + bytes(60)


def make(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return folder


def test_list_folder(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("z.jpg", "b/A.PNG", "b/c.txt", "m.WebP", "folder.jpg/x.tif"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"")
    found = folders.list_folder(tmp_path)
    assert found.left_out == {".txt": 1}
    assert found.files == ["b/A.PNG", "folder.jpg/x.tif", "m.WebP", "z.jpg"]


def test_a_folders_first_images_name_what_is_left_out(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.png", "sub/a.png", "sub/c.png"):
        (tmp_path / name).write_bytes(samples.encode(samples.noise_picture(len(name)), "PNG"))
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "sub" / "d.jpg").write_bytes(b"not looked at")
    said: list[str] = []
    found = folders.load_sizes(tmp_path, [32], 3, said.append)[32]
    assert [tuple(image.shape) for image in found] == 3 * [(3, 32, 32)]
    assert torch.equal(found[0], images.squares((tmp_path / "b.png").read_bytes(), [32])[0])
    assert len(said) == 1
    assert "broken.jpg" in said[0]


def test_several_sizes_read_and_name_each_image_once(tmp_path, monkeypatch):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(samples.encode(samples.noise_picture(len(name)), "PNG"))
    (tmp_path / "_broken.jpg").write_bytes(b"no image")
    read: list[str] = []
    real = images.read_file
    monkeypatch.setattr(
        images, "read_file", lambda path: read.append(Path(path).name) or real(path)
    )
    said: list[str] = []
    found = folders.load_sizes(tmp_path, [16, 24], 8, said.append)
    assert read == ["_broken.jpg", "a.png", "b.png"]
    assert len(said) == 1
    assert {side: len(pictures) for side, pictures in found.items()} == {16: 2, 24: 2}
    assert torch.equal(found[24][1], images.squares((tmp_path / "b.png").read_bytes(), [24])[0])


@pytest.mark.parametrize("name", ["", "absent"])
def test_a_folder_without_images(tmp_path, name):
    with pytest.raises(MissingInputError, match="no images in"):
        folders.load_sizes(tmp_path / name, [32], 3)


@pytest.mark.parametrize(
    "name",
    [
        *("._a.jpg", ".a.jpg", "__MACOSX/._a.jpg", "@eaDir/a.jpg/SYNOPHOTO_THUMB_XL.jpg"),
        *(".thumbnails/a.jpg", ".ipynb_checkpoints/a-checkpoint.jpg", "#recycle/a.jpg"),
        *("b/.git/x/a.png", "$RECYCLE.BIN/a.webp", "Thumbnails/a.jpg"),
    ],
)
def test_what_a_system_keeps_is_left_out_and_counted(tmp_path, name):
    make(tmp_path, {"z.jpg": JPEG, name: JPEG})
    found = folders.list_folder(tmp_path)
    assert found.files == ["z.jpg"]
    assert found.left_out.total() == 1
    assert "1 " in found.describe()
    assert "hidden" in found.describe()


def test_the_content_decides_where_the_suffix_says_nothing(tmp_path):
    make(
        tmp_path,
        {
            **{"a": JPEG, "b.jfif": JPEG, "c.jpe": JPEG, "d.orig": JPEG, "e.HEIC": JPEG},
            **{"f.CR2": RAW_HEAD, "g": RAW_HEAD, "h.mov": b"x", "i": b"x", "j.psd": b"8BPS"},
        },
    )
    found = folders.list_folder(tmp_path)
    assert found.files == ["a", "b.jfif", "c.jpe", "d.orig", "e.HEIC"]
    assert found.left_out == {
        **{".cr2 (raw: develop it first)": 1, ".mov": 1, "without a suffix": 2, ".psd": 1}
    }


def test_formats_that_are_not_installed_name_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "can_read", lambda kind: False)
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
    make(tmp_path, {"a.jpg": JPEG, "b.HEIC": heic, "c.avif": b"\0\0\0\x18ftypavif" + bytes(8)})
    assert folders.list_folder(tmp_path).describe() == (
        "not used: 1 .avif (pip install 'pillow>=11.3'), 1 .heic (pip install pillow-heif)"
    )
    monkeypatch.setattr(images, "can_read", lambda kind: True)
    assert folders.list_folder(tmp_path).files == ["a.jpg", "b.HEIC", "c.avif"]


def test_links_are_followed_once(tmp_path):
    top = make(tmp_path / "top", {"a.jpg": JPEG, "sub/b.jpg": JPEG})
    make(tmp_path / "other", {"c.jpg": JPEG})
    (top / "other").symlink_to(tmp_path / "other")
    (top / "again").symlink_to(tmp_path / "other")
    (top / "sub" / "loop").symlink_to(top)
    (top / "0_sub").symlink_to(top / "sub")
    (top / "gone.jpg").symlink_to(tmp_path / "nowhere")
    found = folders.list_folder(top)
    assert found.files == ["a.jpg", "again/c.jpg", "sub/b.jpg"]
    assert found.left_out == {"broken links": 1}


def test_what_is_no_file_is_not_opened(tmp_path):
    make(tmp_path, {"a.jpg": JPEG})
    os.mkfifo(tmp_path / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s.jpg"))
        found = folders.list_folder(tmp_path)
    assert found.files == ["a.jpg"]
    assert found.left_out == {"pipes, sockets or devices": 2}


def test_unreadable_files_are_image_errors(tmp_path, monkeypatch):
    with pytest.raises(ImageError, match="cannot be read: No such file"):
        images.read_file(tmp_path / "absent.jpg")
    with pytest.raises(ImageError, match="cannot be read: Is a directory"):
        images.read_file(tmp_path)
    make(tmp_path, {"a.jpg": JPEG})
    monkeypatch.setattr(images, "MAX_BYTES", 10)
    with pytest.raises(ImageError, match="too large"):
        images.read_file(tmp_path / "a.jpg")


@pytest.mark.parametrize(("failures", "well"), [(1, True), (3, True), (4, False)])
def test_a_server_that_fails_is_asked_again(tmp_path, monkeypatch, failures, well):
    make(tmp_path, {"a.jpg": JPEG})
    left, pauses, fstat = [errno.ESTALE] * failures, [], os.fstat

    def failing(descriptor: int) -> os.stat_result:
        if left:
            raise OSError(left.pop(), "Stale file handle")
        return fstat(descriptor)

    monkeypatch.setattr(os, "fstat", failing)
    monkeypatch.setattr(time, "sleep", pauses.append)
    with nullcontext() if well else pytest.raises(ImageError, match="cannot be read: Stale"):
        assert images.read_file(tmp_path / "a.jpg") == JPEG
    assert len(pauses) == min(failures, len(images.PAUSES))


def test_a_folder_that_cannot_be_read(tmp_path):
    with pytest.raises(MissingInputError, match="No such file or directory"):
        folders.list_folder(tmp_path / "absent")


@pytest.mark.parametrize(
    ("file", "one", "two"),
    [
        (".{}.jpg", "1 hidden file", "2 hidden files"),
        ("__MACOSX/{}.jpg", "1 in a hidden folder", "2 in hidden folders"),
    ],
)
def test_what_is_left_out_is_counted_in_grammatical_english(tmp_path, file, one, two):
    make(tmp_path, {file.format("a"): JPEG})
    assert folders.list_folder(tmp_path).describe() == f"not used: {one}"
    make(tmp_path, {file.format("b"): JPEG})
    assert folders.list_folder(tmp_path).describe() == f"not used: {two}"


def test_one_broken_link(tmp_path):
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    assert folders.list_folder(tmp_path).describe() == "not used: 1 broken link"
