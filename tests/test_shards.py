import collections
import itertools
import json
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import samples
from PIL import Image

from kl_f8_train import shards
from kl_f8_train.data import IterationSampler
from kl_f8_train.errors import MissingInputError, UsageError


def plan_of(counts: dict[str, list[int]], shares: dict[str, int], lanes: int = 4, seed: int = 0):
    sources = {name: samples.empty_shards(sizes) for name, sizes in counts.items()}
    return shards.Plan(sources, shares, lanes, seed)


def located(plan: shards.Plan, positions) -> list[tuple[str, str, int]]:
    found = (plan.locate(position) for position in positions)
    return [(name, shard.path.name, number) for name, shard, number in found]


# --- indexing -------------------------------------------------------------------------------


def test_index_of_packed_shards(tmp_path):
    paths = samples.packed(tmp_path / "photos", count=7, per_shard=3)
    indexed = [shards.index_shard(path) for path in paths]
    assert [path.name for path in paths] == ["00000.tar", "00001.tar", "00002.tar"]
    assert [len(shard) for shard in indexed] == [3, 3, 1]
    keys = [key for shard in indexed for key in shard.keys]
    assert keys == [f"{number:09d}" for number in range(7)]
    originals = sorted((tmp_path / "photos_originals").iterdir())
    read = [shard.read(number) for shard in indexed for number in range(len(shard))]
    assert read == [file.read_bytes() for file in originals]


def test_packing_again_gives_the_same_bytes(tmp_path):
    one = samples.packed(tmp_path / "one", count=3, per_shard=3)
    other = samples.packed(tmp_path / "other", count=3, per_shard=3)
    assert one[0].read_bytes() == other[0].read_bytes()


def test_packing_keeps_the_file_names(tmp_path):
    path = samples.packed(tmp_path / "photos", count=1, per_shard=3)[0]
    with tarfile.open(path) as archive:
        text = archive.extractfile("000000000.json").read()
    assert json.loads(text) == {"file_name": "0000.jpg"}


def test_packing_does_not_mix_with_older_shards(tmp_path):
    samples.packed(tmp_path / "photos", count=1, per_shard=3)
    files = sorted((tmp_path / "photos_originals").iterdir())
    with pytest.raises(UsageError, match="already holds shards"):
        shards.pack(files, tmp_path / "photos")


def test_what_counts_as_an_image(tmp_path):
    members = {
        "a/1.jpg": b"one",
        "a/1.txt": b"text",
        "2.JPEG": b"two",
        "3.seg.png": b"another field of sample 3",
        "3.webp": b"three",
        "4.mp4": b"film",
    }
    shard = shards.index_shard(samples.write_tar(tmp_path / "x.tar", members))
    assert shard.keys == ("1", "2", "3")
    assert [shard.read(number) for number in range(3)] == [b"one", b"two", b"three"]


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_tar_dialects(tmp_path, kind):
    long_name = "n" * 90 + "/" + "k" * 90
    source = tmp_path / "source.jpg"
    source.write_bytes(b"bytes")
    with tarfile.open(tmp_path / "x.tar", "w", format=kind) as archive:
        archive.add(source, f"{long_name}.jpg")
        archive.add(source, "b.jpg")
    shard = shards.index_shard(tmp_path / "x.tar")
    assert shard.keys == ("k" * 90, "b")
    assert [shard.read(0), shard.read(1)] == [b"bytes", b"bytes"]


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
            shards.index_shard(cut)
    cut.write_bytes(data[: end + 1024])
    assert len(shards.index_shard(cut)) == 6


@pytest.mark.parametrize("picture", [b"\xff" * 2011, black_bmp()], ids=["odd", "zeros"])
def test_broken_header_in_the_middle(tmp_path, picture):
    members = {f"{number}.bmp": picture for number in range(4)}
    path = samples.write_tar(tmp_path / "x.tar", members)
    data = bytearray(path.read_bytes())
    second = 512 + -(-len(picture) // 512) * 512
    data[second : second + 100] = b"\xab" * 100
    path.write_bytes(data)
    with pytest.raises(MissingInputError, match=r"x\.tar"):
        shards.index_shard(path)


@pytest.mark.parametrize("data", [b"", b"x" * 300, b"<html>404</html>" * 100, b"\x1f\x8b" * 600])
def test_no_tar(tmp_path, data):
    path = tmp_path / "x.tar"
    path.write_bytes(data)
    with pytest.raises(MissingInputError, match=r"x\.tar") as caught:
        shards.index_shard(path)
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
    assert [path.stem[-1] for path in shards.expand(pattern)] == list(expected)
    if pattern != "list.txt":
        absolute = shards.expand(str(folder / pattern) if "{s" not in pattern else pattern)
        assert [path.stem[-1] for path in absolute] == list(expected)


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
    ],
)
def test_expand_names_what_is_missing(folder, pattern, named):
    with pytest.raises(MissingInputError) as caught:
        shards.expand(pattern)
    assert named in str(caught.value)


def test_folder_without_shards(tmp_path):
    with pytest.raises(MissingInputError, match=r"holds no \.tar files"):
        shards.expand(str(tmp_path))


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
        shards.index_source("photos", str(damaged))
    message = str(caught.value)
    assert "00001.tar" in message
    assert "00002.tar" in message
    assert "2 of 4 shards of photos are broken" in message
    assert "data.bad_shards=skip" in message


def test_broken_shards_are_named_and_left_out(damaged):
    warnings: list[str] = []
    found = shards.index_source("photos", str(damaged), "skip", warnings.append)
    assert [shard.path.name for shard in found] == ["00000.tar", "00003.tar"]
    assert len(warnings) == 2
    assert "00001.tar" in warnings[0]
    assert "left out" in warnings[0]


def test_all_shards_broken(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"")
    with pytest.raises(MissingInputError, match="no image in 1 shards"):
        shards.index_source("photos", str(tmp_path), "skip", lambda line: None)


def test_shards_without_images(tmp_path):
    samples.write_tar(tmp_path / "x.tar", {"1.txt": b"text", "2.json": b"{}"})
    with pytest.raises(MissingInputError, match=r"data\.sources\.photos\.shards.*no image"):
        shards.index_source("photos", str(tmp_path))


def test_missing_source_names_its_key():
    with pytest.raises(MissingInputError, match=r"data\.sources\.photos\.shards=/no/such"):
        shards.index_source("photos", "/no/such")


# --- the plan -------------------------------------------------------------------------------

COUNTS = {
    "one shard": [11],
    "fewer shards than lanes": [10, 10],
    "even": [5] * 8,
    "uneven": [1, 30, 2, 7, 7, 1],
    "one image": [1],
    "fewer images than lanes": [1, 1, 1],
}


@pytest.mark.parametrize("lanes", [1, 3, 48])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_a_pass_sees_each_sample_at_most_once(counts, lanes):
    source = shards.SourcePlan("photos", counts, share=6, lanes=lanes, seed=0)
    total = sum(counts)
    assert 6 % source.lanes == 0
    assert source.lanes <= min(lanes, 6, total)
    for number in (-2, -1, 0, 1, 5):
        first = number * source.lane_length  # the lanes go through a pass together
        steps = range(first, first + source.lane_length)
        seen = [
            source.locate(step // source.per_lane, lane * source.per_lane + step % source.per_lane)
            for step in steps
            for lane in range(source.lanes)
        ]
        assert len(seen) == len(set(seen))
        assert all(0 <= sample < counts[shard] for shard, sample in seen)
        assert total - len(seen) < source.lanes


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_over_many_passes_all_samples_come_equally_often(counts):
    source = shards.SourcePlan("photos", counts, share=6, lanes=48, seed=0)
    passes = 40
    iterations = -(-passes * source.lane_length // source.per_lane)
    seen = collections.Counter(
        source.locate(iteration, index) for iteration in range(iterations) for index in range(6)
    )
    everything = {(shard, i) for shard, count in enumerate(counts) for i in range(count)}
    assert set(seen) == everything
    mean = 6 * iterations / sum(counts)
    started = -(-iterations * source.per_lane // source.lane_length)
    assert max(seen.values()) <= started
    assert min(seen.values()) > 0.6 * mean


@pytest.mark.parametrize("shares", [{"a": 4, "b": 4}, {"a": 8, "b": 4}, {"a": 1, "b": 2, "c": 9}])
def test_every_batch_has_the_exact_mixture(shares):
    plan = plan_of({name: [5, 9, 2] for name in shares}, shares)
    assert plan.batch == sum(shares.values())
    for iteration in (-3, 0, 1, 17, 840_000):
        first = iteration * plan.batch
        names = [name for name, *_ in located(plan, range(first, first + plan.batch))]
        assert collections.Counter(names) == shares


def test_sources_are_mixed_inside_a_batch():
    slots = shards.interleave({"a": 4, "b": 4})
    assert [name for name, _ in slots] == ["a", "b"] * 4
    assert [index for name, index in slots if name == "b"] == [0, 1, 2, 3]
    halves = [name for name, _ in shards.interleave({"a": 8, "b": 4})[:6]]
    assert collections.Counter(halves) == {"a": 4, "b": 2}


@pytest.mark.parametrize("world", [1, 2, 4])
def test_positions_do_not_depend_on_the_number_of_processes(world):
    ranks = [list(IterationSampler(3, 6, 2, 8, rank, world)) for rank in range(world)]
    assert {len(sampler) for sampler in ranks} == {5}
    together = [[at for rank in ranks for at in rank[step]] for step in range(5)]
    assert together == [list(range(i * 8, i * 8 + 8)) for i in (-2, -1, 3, 4, 5)]
    assert len(IterationSampler(3, 6, 2, 8, 0, world)) == 5


def test_locating_late_in_a_large_set_is_quick():
    plan = plan_of({"a": [1000] * 5000}, {"a": 192}, lanes=48)
    start = time.monotonic()
    found = located(plan, range(840_001 * 192, 840_002 * 192))
    assert time.monotonic() - start < 1
    assert len(set(found)) == 192


def test_warm_up_iterations_come_before_the_first():
    plan = plan_of({"a": [50, 60]}, {"a": 8})
    warm_up = located(plan, range(-16, 0))
    first = located(plan, range(16))
    assert len(set(warm_up)) == 16
    assert warm_up != first
    assert all(0 <= number < 60 for _, _, number in warm_up)


def test_the_plan_is_arithmetic():
    """The same whatever was asked before."""
    positions = list(range(-30, 300, 7))
    expected = located(plan_of({"a": [9, 5, 30]}, {"a": 6}), positions)
    shards.permutation.cache_clear()
    other = plan_of({"a": [9, 5, 30]}, {"a": 6})
    assert list(reversed(located(other, reversed(positions)))) == expected


def test_seeds_and_sources_and_passes_have_their_own_order():
    def order(name: str = "a", seed: int = 0, first: int = 0) -> list[tuple[str, int]]:
        plan = plan_of({name: [40, 40, 40]}, {name: 4}, lanes=1, seed=seed)
        return [item[1:] for item in located(plan, range(first, first + 120))]

    assert order() == order()
    orders = [order(), order(seed=1), order(name="b"), order(first=120)]
    assert all(set(one) == set(orders[0]) for one in orders)
    assert len({tuple(one) for one in orders}) == 4


def test_the_order_is_shuffled_within_and_between_shards():
    plan = plan_of({"a": [100] * 20}, {"a": 4}, lanes=1)
    found = located(plan, range(2000))
    first_shard = [number for _, shard, number in found if shard == found[0][1]]
    assert first_shard != sorted(first_shard)
    shard_order = list(dict.fromkeys(shard for _, shard, _ in found))
    assert shard_order != sorted(shard_order)
    assert len(shard_order) == 20


def test_lanes_draw_from_different_shards():
    plan = plan_of({"a": [1000] * 20}, {"a": 16}, lanes=16)
    shards_of_a_batch = {shard for _, shard, _ in located(plan, range(16))}
    assert len(shards_of_a_batch) >= 10


def test_the_order_is_frozen():
    """A release must not reshuffle a run that resumes."""
    assert shards.permutation(8, 0, "a", "shards", 0).tolist() == [3, 0, 1, 4, 6, 2, 7, 5]
    assert shards.random_state(7, "crop", -5).random_sample() == 0.7785396448038734
    plan = plan_of({"a": [5, 7, 3], "b": [4]}, {"a": 4, "b": 2}, lanes=2, seed=3)
    assert located(plan, range(600, 606)) == [
        ("a", "00000.tar", 0),
        ("b", "00000.tar", 3),
        ("a", "00002.tar", 2),
        ("a", "00001.tar", 3),
        ("b", "00000.tar", 2),
        ("a", "00001.tar", 5),
    ]


def test_a_shard_reads_only_its_sample(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(b"0123456789")
    shard = shards.Shard(path, ("a", "b"), np.array([2, 5]), np.array([3, 4]))
    assert (shard.read(0), shard.read(1)) == (b"234", b"5678")
