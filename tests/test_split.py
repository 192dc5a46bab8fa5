"""Photographs split into training and held-out by content, and doctor's look at the two."""

import importlib.util
import json
import os
import shlex
from pathlib import Path

import numpy as np
import pytest
import runs
import samples
from PIL import Image, ImageEnhance, ImageOps

from kl_f8_train import config, shipped
from kl_f8_train.__main__ import main
from kl_f8_train.check import overlap
from kl_f8_train.data import near
from kl_f8_train.data.pack import pack
from kl_f8_train.data.shard_cache import ShardCache
from kl_f8_train.data.sources import open_source
from kl_f8_train.data.split import RECIPE_SIDE, split
from kl_f8_train.errors import MissingInputError, RunFailedError, UsageError
from kl_f8_train.folders import list_folder

PHOTOGRAPHS = sorted((shipped.HELD_OUT).glob("*.jpg"))


def trimmed(image: Image.Image) -> Image.Image:
    """Without 5 % of its width and height, all around."""
    by = (0.025 * image.width, 0.025 * image.height)
    return image.crop((by[0], by[1], image.width - by[0], image.height - by[1]))


COPIES = {
    "the same bytes": lambda image: image,
    "half as large": lambda image: image.resize((image.width // 2, image.height // 2)),
    "another shape": lambda image: image.resize((128, 96)),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.3),
    "grey": lambda image: image.convert("L"),
    "mirrored": ImageOps.mirror,
    "turned": lambda image: image.rotate(90, expand=True),
    "upside down": lambda image: image.rotate(180),
    "trimmed": trimmed,
}


@pytest.fixture
def photos(tmp_path):
    """Twelve strangers in two folders with equal names, the first also twice more; no images."""
    folder = tmp_path / "photos"
    for number, path in enumerate(PHOTOGRAPHS[:12]):
        target = folder / f"camera {number % 2}" / f"{number // 2}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    first = Image.open(PHOTOGRAPHS[0])
    (folder / "copy.jpg").write_bytes(PHOTOGRAPHS[0].read_bytes())
    first.resize((100, 90)).save(folder / "small.png")
    (folder / "broken.jpg").write_bytes(PHOTOGRAPHS[1].read_bytes()[:300])
    (folder / "film.mov").write_bytes(b"film")
    (folder / ".hidden.jpg").write_bytes(PHOTOGRAPHS[2].read_bytes())
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- near-duplicates ------------------------------------------------------------------------


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_is_recognized(name):
    originals = np.stack([near.look(path.read_bytes()) for path in PHOTOGRAPHS])
    copies = np.stack(
        [
            near.look(samples.encode(COPIES[name](Image.open(path)), "JPEG", quality=60))
            for path in PHOTOGRAPHS
        ]
    )
    pairs = set(near.alike(copies, originals))
    missed = [path.name for n, path in enumerate(PHOTOGRAPHS) if (n, n) not in pairs]
    assert len(missed) <= (1 if name == "trimmed" else 0), missed


def test_strangers_are_not_alike():
    paths = [*PHOTOGRAPHS, *sorted(shipped.TRAINING.glob("*.jpg"))]
    looks = np.stack([near.look(path.read_bytes()) for path in paths])
    assert {(one, other) for one, other in near.alike(looks, looks) if one < other} == set()
    assert len(near.groups(looks, [str(n) for n in range(len(paths))])) == len(paths)


def test_flat_images_are_alike_only_if_they_are_equal():
    flat = [samples.encode(np.full((50, 60, 3), level, np.uint8), "PNG") for level in (10, 11, 10)]
    looks = np.stack([near.look(data) for data in flat])
    assert near.groups(looks, ["a", "b", "a"]) == [[0, 2], [1]]


def test_groups_reach_from_one_to_the_next():
    image = Image.open(PHOTOGRAPHS[0])
    chain = [image, trimmed(image), trimmed(trimmed(image))]
    looks = np.stack([near.look(samples.encode(link)) for link in chain])
    assert near.groups(looks, ["a", "b", "c"]) == [[0, 1, 2]]


# --- the verb -------------------------------------------------------------------------------


def test_every_photograph_lies_on_one_side(photos, tmp_path, capsys):
    before = files(photos)
    assert main(["split", str(photos), str(tmp_path / "out"), "--held-out", "4"]) == 0
    assert files(photos) == before
    training, held_out = (files(tmp_path / "out" / side) for side in ("training", "held_out"))
    usable = {name for name in before if name not in ("broken.jpg", "film.mov", ".hidden.jpg")}
    assert training.keys() | held_out.keys() == usable
    assert not training.keys() & held_out.keys()
    assert len(held_out) == 4
    alike = {"camera 0/0.jpg", "copy.jpg", "small.png"}
    assert alike <= training.keys() or alike <= held_out.keys()
    assert all(before[name] == data for name, data in (training | held_out).items())
    printed = capsys.readouterr().out
    assert "10 photographs to train on" in printed
    assert "4 photographs held out" in printed
    assert "3 photographs in 1 group" in printed
    assert "left out: 1 file that cannot be used" in printed
    assert "broken.jpg: not a readable image" in printed
    assert "1 .mov" in printed
    assert "note: fewer than 10 held out" in printed
    then, own = printed.splitlines()[-2:]
    assert then.startswith("next: kl-f8-train doctor single_gpu init.weights=stabilityai/")
    assert own == "to start from a VAE of your own, give its file as init.weights"
    settings = shlex.split(then)[4:]
    config.load(config.find_recipe("single_gpu"), settings)  # nothing is left to give
    assert f"log.pictures={tmp_path / 'out/held_out'}" in settings
    assert not Path(dict(text.split("=") for text in settings)["run_dir"]).exists()
    listed = json.loads((tmp_path / "out/split.json").read_text())
    assert (set(listed["training"]), set(listed["held_out"])) == (set(training), set(held_out))
    assert [set(group) for group in listed["near_duplicates"]] == [alike]


def test_small_photographs_are_noted(tmp_path, capsys):
    """A photograph of 400 pixels is decoded at less than its size for its look."""
    (tmp_path / "photos").mkdir()
    sides = {"a": (383, 500), "b": (384, 384), "c": (1000, 800), "d": (100, 600)}
    for number, (name, (width, height)) in enumerate(sides.items()):
        image = Image.open(PHOTOGRAPHS[number]).resize((width, height))
        image.save(tmp_path / "photos" / f"{name}.jpg")
    assert config.recipe("single_gpu").data.shorter_side == RECIPE_SIDE
    assert main(["split", str(tmp_path / "photos"), str(tmp_path / "out")]) == 0
    noted = [line for line in capsys.readouterr().out.splitlines() if "384" in line]
    assert noted == [
        "note: 2 photographs under 384 pixels on the shorter side, as a.jpg, would be enlarged: "
        "leave such out, or lower data.shorter_side"
    ]
    assert json.loads((tmp_path / "out/split.json").read_text())["small"] == ["a.jpg", "d.jpg"]
    (tmp_path / "photos/a.jpg").unlink()
    (tmp_path / "photos/d.jpg").unlink()
    assert main(["split", str(tmp_path / "photos"), str(tmp_path / "large")]) == 0
    assert "384" not in capsys.readouterr().out


@pytest.mark.parametrize("there", [True, False])
def test_without_the_hubs_library_its_remedy_is_named(photos, tmp_path, monkeypatch, capsys, there):
    find = importlib.util.find_spec
    hidden = "" if there else "huggingface_hub"
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == hidden else find(n))
    assert main(["split", str(photos), str(tmp_path / "out")]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith("pip install huggingface_hub") != there


def test_the_files_are_links(photos, tmp_path):
    result = split(photos, tmp_path / "out", 3)
    assert result.copied == 0
    name = result.held_out[0]
    assert (tmp_path / "out/held_out" / name).samefile(photos / name)


def test_where_no_links_are_possible_files_are_copied(photos, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    result = split(photos, tmp_path / "out", 3)
    assert result.copied == sum(len(files(photos)[n]) for n in result.training + result.held_out)
    assert "copies, " in str(result)


def test_a_linked_file_is_followed(photos, tmp_path):
    outside = tmp_path / "outside.jpg"
    outside.write_bytes(PHOTOGRAPHS[20].read_bytes())
    (photos / "linked.jpg").symlink_to(outside)
    split(photos, tmp_path / "out", 3)
    (found,) = (tmp_path / "out").rglob("linked.jpg")
    assert not found.is_symlink()
    assert found.read_bytes() == outside.read_bytes()


def test_the_choice_follows_from_seed_and_content(photos, tmp_path):
    first = split(photos, tmp_path / "a", 4)
    assert split(photos, tmp_path / "b", 4).held_out == first.held_out
    seeds = [split(photos, tmp_path / f"seed {seed}", 4, seed).held_out for seed in range(1, 6)]
    assert any(held_out != first.held_out for held_out in seeds)
    chosen = {files(photos)[name] for name in first.held_out}
    (tmp_path / "renamed").mkdir()
    for number, name in enumerate(reversed(first.training + first.held_out)):
        data = files(photos)[name]
        (tmp_path / f"renamed/{number:02d}{Path(name).suffix}").write_bytes(data)
    split(tmp_path / "renamed", tmp_path / "c", 4)
    assert set(files(tmp_path / "c/held_out").values()) == chosen


@pytest.mark.parametrize(
    ("asked", "held_out"),
    [(1, 1), (0.25, 4), (0.5, 7), (13, 13), (None, 4), (0.1, 1), (0.01, 1), (0.99, 13)],
)
def test_how_many(photos, tmp_path, asked, held_out):
    """Of 14, three of which are one group: a group that does not fit is not held out."""
    result = split(photos, tmp_path / "out", asked)
    assert held_out - 2 <= len(result.held_out) <= held_out
    assert len(result.held_out) >= 1
    assert len(result.training) + len(result.held_out) == 14


def test_groups_larger_than_asked(tmp_path):
    for number, path in enumerate(PHOTOGRAPHS[:2]):
        for copy in range(3 + number):
            target = tmp_path / f"photos/{number}{copy}.jpg"
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(path.read_bytes())
    result = split(tmp_path / "photos", tmp_path / "out", 1)
    assert result.held_out == ["00.jpg", "01.jpg", "02.jpg"]


@pytest.mark.parametrize("asked", ["0", "1.5", "-3", "100%", "many", "nan", "0%", ""])
def test_a_wrong_number_is_refused(photos, tmp_path, asked):
    with pytest.raises(SystemExit) as stopped:
        main(["split", str(photos), str(tmp_path / "out"), f"--held-out={asked}"])
    assert stopped.value.code == 2


def test_one_photograph_cannot_be_split(tmp_path, capsys):
    """The error does not name the flag, which was not given."""
    (tmp_path / "one").mkdir()
    data = samples.encode(samples.noise_picture(0), "PNG")
    (tmp_path / "one" / "a.png").write_bytes(data)
    assert main(["split", str(tmp_path / "one"), str(tmp_path / "out")]) == 2
    assert "1 photograph: expected two or more" in capsys.readouterr().err


@pytest.mark.parametrize("asked", ["14", "100"])
def test_a_side_without_photographs_is_refused(photos, tmp_path, asked, capsys):
    assert main(["split", str(photos), str(tmp_path / "out"), "--held-out", asked]) == 2
    assert f"--held-out: {asked} of " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_all_alike_is_refused(tmp_path):
    for number in range(3):
        (tmp_path / "photos").mkdir(exist_ok=True)
        (tmp_path / f"photos/{number}.jpg").write_bytes(PHOTOGRAPHS[0].read_bytes())
    with pytest.raises(UsageError, match="all 3 photographs are near-duplicates"):
        split(tmp_path / "photos", tmp_path / "out")


def test_what_is_there_is_not_touched(photos, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        split(photos, tmp_path / "out")
    with pytest.raises(UsageError, match="is a file"):
        split(photos, tmp_path / "out/mine.txt")
    with pytest.raises(UsageError, match="lies in"):
        split(photos, photos / "out")
    with pytest.raises(UsageError, match="not empty"):
        split(photos, photos)
    assert files(tmp_path / "out") == {"mine.txt": b"mine"}


def test_an_empty_directory_is_taken(photos, tmp_path):
    (tmp_path / "out").mkdir()
    assert len(split(photos, tmp_path / "out", 2).held_out) == 2


def test_missing_photographs(tmp_path):
    with pytest.raises(MissingInputError, match="no such folder"):
        split(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "photos").mkdir()
    with pytest.raises(MissingInputError, match="it is empty"):
        split(tmp_path / "photos", tmp_path / "out")
    (tmp_path / "photos/a.jpg").write_bytes(b"an error page")
    (tmp_path / "photos/b.jpg").write_bytes(b"another")
    with pytest.raises(MissingInputError, match="no photographs in"):
        split(tmp_path / "photos", tmp_path / "out")


def test_the_next_split_removes_what_a_killed_one_left(photos, tmp_path):
    out = tmp_path / "out"
    left = tmp_path / ".out.7-01234567.part"
    (left / "training").mkdir(parents=True)
    (left / "training" / "0.jpg").write_bytes(b"half")
    split(photos, out, 2)
    assert sorted(tmp_path.iterdir()) == [out, photos]


def test_a_failure_leaves_nothing(photos, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(RunFailedError, match="No space left"):
        split(photos, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos"]


def test_names_of_any_bytes(photos, tmp_path):
    name = os.fsdecode(b"caf\xe9.jpg")
    (photos / name).write_bytes(PHOTOGRAPHS[25].read_bytes())
    result = split(photos, tmp_path / "out", 3)
    assert name in result.training + result.held_out
    assert len(list_folder(tmp_path / "out/training").files) == len(result.training)


# --- doctor ---------------------------------------------------------------------------------


def sources_of(folder: Path, cache: Path) -> dict:
    return {"mine": open_source("mine", str(folder), [], ShardCache(cache, 2**20))}


@pytest.mark.parametrize("packed", [False, True])
def test_pictures_that_are_trained_on_are_found(tmp_path, packed):
    folder, held_out = tmp_path / "photos", tmp_path / "held_out"
    folder.mkdir()
    held_out.mkdir()
    for path in PHOTOGRAPHS[:8]:
        (folder / path.name).write_bytes(path.read_bytes())
    (held_out / "equal.jpg").write_bytes(PHOTOGRAPHS[0].read_bytes())
    Image.open(PHOTOGRAPHS[1]).resize((90, 80)).save(held_out / "small.png")
    (held_out / "stranger.jpg").write_bytes(PHOTOGRAPHS[9].read_bytes())
    if packed:
        pack(folder, tmp_path / "shards", per_shard=3, workers=1)
        folder = tmp_path / "shards"
    found = overlap.find(held_out, sources_of(folder, tmp_path / "cache"))
    assert found.common.keys() == {"equal.jpg", "small.png"}
    assert (found.pictures, found.checked) == (3, "8 training images")
    if not packed:
        assert found.common["equal.jpg"] == f"mine/{PHOTOGRAPHS[0].name}"


def test_large_data_are_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr(overlap, "LOOKS", 5)
    (tmp_path / "held_out").mkdir()
    (tmp_path / "held_out/a.jpg").write_bytes(PHOTOGRAPHS[13].read_bytes())
    found = overlap.find(tmp_path / "held_out", sources_of(shipped.HELD_OUT, tmp_path / "cache"))
    assert "equal files; near-duplicates in 5" in found.checked
    assert found.common == {"a.jpg": f"mine/{PHOTOGRAPHS[13].name}"}


def test_doctor_notes_them(folder, tmp_path, capsys):
    for side in ("train", "held"):
        (tmp_path / side).mkdir()
    for number in range(6):
        data = samples.encode(samples.noise_picture(number), "PNG")
        (tmp_path / f"train/{number}.png").write_bytes(data)
    (tmp_path / "held/x.png").write_bytes(data)
    places = (f"data.sources={tmp_path / 'train'}", f"log.pictures={tmp_path / 'held'}")
    extra = ("log.pictures_every=5", *places)
    assert main(["doctor", "demo", *runs.overrides(folder, "new", *extra)]) == 0
    screen = capsys.readouterr().out
    assert "held out 1 picture, 1 of them among the 6 training images" in screen
    assert "WARNING: 1 of 1 validation picture is a training image, as x.png = " in screen
    assert "the validation's scores then say nothing about other photographs" in screen
    for number in (7, 8):  # now less than half are trained on
        data = samples.encode(samples.noise_picture(number), "PNG")
        (tmp_path / f"held/{number}.png").write_bytes(data)
    assert main(["doctor", "demo", *runs.overrides(folder, "new", *extra)]) == 0
    screen = capsys.readouterr().out
    assert "note: 1 of 3 validation pictures is a training image, as x.png = " in screen
    assert "the scores say less about others" in screen
    assert (
        main(["doctor", "demo", *runs.overrides(folder, "new", *extra, "log.pictures=null")]) == 0
    )
    assert "note: validation shows training images" in capsys.readouterr().out
