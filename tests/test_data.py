import hashlib
import os
import warnings
from pathlib import Path

import pytest
import samples
import torch

from kl_f8_train import images
from kl_f8_train.core.batch import Batch, random_state
from kl_f8_train.data import loading
from kl_f8_train.errors import MissingInputError
from kl_f8_train.run.log import too_many


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Two sources, 24 JPEGs in 5 shards."""
    root = tmp_path_factory.mktemp("data")
    samples.packed(root / "places", count=14, per_shard=5)
    samples.packed(root / "people", count=10, per_shard=6, first_seed=100)
    return {"places": root / "places", "people": root / "people"}


def dataset_of(folders: dict[str, Path], *overrides: str) -> loading.PositionDataset:
    settings = samples.data_config(folders, *overrides)
    return loading.PositionDataset(*loading.open_data(settings), settings)


def batches(
    dataset: loading.PositionDataset,
    start: int = 0,
    stop: int = 4,
    warmup: int = 0,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
) -> list[Batch]:
    sampler = loading.IterationSampler(start, stop, warmup, 8, rank, world)
    return list(loading.loader(dataset, sampler, workers))


def same(one: Batch, other: Batch) -> bool:
    return (
        one.keys == other.keys
        and torch.equal(one.images, other.images)
        and torch.equal(one.noise, other.noise)
        and one.skipped == other.skipped
    )


def joined(parts: list[Batch]) -> Batch:
    return Batch(
        torch.cat([part.images for part in parts]),
        torch.cat([part.noise for part in parts], dim=1),
        [key for part in parts for key in part.keys],
        [line for part in parts for line in part.skipped],
    )


# --- batches --------------------------------------------------------------------------------


def test_shapes_types_and_mixture(folders):
    found = batches(dataset_of(folders))
    assert len(found) == 4
    for batch in found:
        assert batch.images.shape == (8, 3, 48, 48)
        assert batch.images.dtype == torch.uint8
        assert batch.noise.shape == (1, 8, 4, 6, 6)
        assert batch.noise.dtype == torch.float32
        assert batch.skipped == []
        assert sorted(key.split("/")[0] for key in batch.keys) == ["people"] * 4 + ["places"] * 4
    assert len({key for batch in found[:2] for key in batch.keys}) == 16


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_the_number_of_workers_does_not_matter(folders, workers):
    dataset = dataset_of(folders, "data.shorter_side=52")
    alone = batches(dataset, warmup=2)
    helped = batches(dataset, warmup=2, workers=workers)
    assert len(alone) == len(helped) == 6
    assert all(same(one, other) for one, other in zip(alone, helped, strict=True))


@pytest.mark.parametrize("world", [2, 4])
def test_the_number_of_processes_does_not_matter(folders, world):
    dataset = dataset_of(folders)
    alone = batches(dataset, warmup=1)
    ranks = [batches(dataset, warmup=1, rank=rank, world=world) for rank in range(world)]
    together = [joined(list(parts)) for parts in zip(*ranks, strict=True)]
    assert len(alone) == 5
    assert all(same(one, other) for one, other in zip(alone, together, strict=True))


def test_starting_in_the_middle(folders):
    whole = batches(dataset_of(folders), stop=9, warmup=2)
    assert same(batches(dataset_of(folders), start=6, stop=9)[0], whole[2 + 6])
    resumed = batches(dataset_of(folders), stop=9, warmup=1)
    assert all(same(one, other) for one, other in zip(resumed, whole[1:], strict=True))


def test_passes_differ_in_order_crop_and_noise(folders):
    found = batches(dataset_of(folders), stop=40)
    by_key: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for batch in found:
        for slot, key in enumerate(batch.keys):
            by_key.setdefault(key, []).append((batch.images[slot], batch.noise[0, slot]))
    assert len(by_key) == 24
    for seen in by_key.values():
        assert len(seen) >= 4
        assert any(not torch.equal(seen[0][0], image) for image, _ in seen[1:])
        assert all(not torch.equal(seen[0][1], noise) for _, noise in seen[1:])


def test_seeds_differ(folders):
    one = batches(dataset_of(folders), stop=1)[0]
    other = batches(dataset_of(folders, "seed=1"), stop=1)[0]
    assert one.keys != other.keys
    assert not torch.equal(one.noise, other.noise)


def test_crops_are_cut_from_the_decoded_image(folders):
    dataset = dataset_of(folders)
    sample = dataset[5]
    source, shard, number = dataset.plan.locate(5)
    name, encoded = dataset.sources[source].read(shard, number)
    assert sample.key == f"{source}/{name}"
    whole = images.decode(encoded)
    windows = whole.unfold(1, 48, 1).unfold(2, 48, 1)  # (3, 9, 17, 48, 48)
    hits = (windows == sample.image[:, None, None]).all(dim=-1).all(dim=-1).all(dim=0)
    assert hits.sum() == 1


def test_resizing_comes_before_the_crop(folders):
    dataset = dataset_of(folders, "data.shorter_side=48")
    sample = dataset[5]
    source, shard, number = dataset.plan.locate(5)
    encoded = dataset.sources[source].read(shard, number)[1]
    resized = images.resize_shorter(images.decode(encoded), 48)
    assert resized.shape == (3, 48, 55)
    assert any(torch.equal(resized[:, :, i : i + 48], sample.image) for i in range(8))


def test_a_range_of_sides_leaves_crops_and_noise_alone(folders):
    one = dataset_of(folders, "data.shorter_side=60")
    same = dataset_of(folders, "data.shorter_side=[60,60]")
    ranged = dataset_of(folders, "data.shorter_side=[50,90]")
    sides = {ranged._drawn_side(ranged.sides, position) for position in range(400)}
    assert (min(sides), max(sides)) == (50, 90)
    for position in range(4):
        assert torch.equal(one[position].image, same[position].image)
        assert torch.equal(one[position].noise, ranged[position].noise)
        assert one[position].key == ranged[position].key
        assert torch.equal(ranged[position].image, ranged[position].image)


def test_two_noises_for_the_second_forward(folders):
    batch = batches(dataset_of(folders, "second_forward=true"), stop=1)[0]
    assert batch.noise.shape == (2, 8, 4, 6, 6)
    assert not torch.equal(batch.noise[0], batch.noise[1])


def test_noise_is_standard_normal(folders):
    noise = torch.cat([batch.noise.flatten() for batch in batches(dataset_of(folders), stop=40)])
    assert len(noise) == 40 * 8 * 4 * 6 * 6  # 46,080: the errors below are 0.005, 0.003, 0.01, 0.02
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.015
    assert abs((noise**3).mean()) < 0.06
    assert abs((noise**4).mean() - 3) < 0.2


def test_noise_differs_between_positions(folders):
    dataset = dataset_of(folders)
    noises = [dataset[position].noise.flatten() for position in range(-8, 24)]
    table = torch.corrcoef(torch.stack(noises)) - torch.eye(len(noises))
    assert table.abs().max() < 0.5  # 144 values each


def test_moving_a_batch_keeps_it(folders):
    batch = batches(dataset_of(folders), stop=1)[0]
    assert same(batch.to(torch.device("cpu")), batch)
    assert batch.to(torch.device("meta")).images.device.type == "meta"


# --- bad images -----------------------------------------------------------------------------


def source_with(folder: Path, members: dict[str, bytes]) -> dict[str, Path]:
    samples.write_tar(folder / "photos" / "0.tar", members)
    return {"photos": folder / "photos"}


def good(number: int) -> bytes:
    return samples.encode(samples.noise_picture(number), "JPEG", quality=95)


def small() -> bytes:
    return samples.encode(samples.noise_picture(0, 30, 30), "JPEG")


@pytest.mark.parametrize("bad", [good(1)[:900], b"", b"<html>", small()])
def test_a_bad_image_gives_way_to_its_neighbour(tmp_path, bad):
    folders = source_with(tmp_path, {"0.jpg": good(0), "1.jpg": bad, "2.jpg": good(2)})
    dataset = dataset_of(folders)
    wanted = [dataset.plan.locate(position)[2] for position in range(8)]
    assert 1 in wanted
    for position, number in enumerate(wanted):
        sample = dataset[position]
        if number == 1:
            assert sample.key == "photos/0.tar/2.jpg"
            assert [line.split(":")[0] for line in sample.skipped] == ["photos/0.tar/1.jpg"]
        else:
            assert sample.key == f"photos/0.tar/{number}.jpg"
            assert sample.skipped == []
    batch = batches(dataset, stop=1)[0]
    assert len(batch.skipped) == wanted.count(1)


def test_bad_neighbours_count_once_for_each_of_their_positions(tmp_path):
    """20 of 1,000 side by side: 2 % of the positions, not 21 % of the looks."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(1000):
        bad = 100 <= number < 120
        (folder / f"{number:04}.jpg").write_bytes(b"<html>" if bad else good(0))
    dataset = dataset_of({"photos": folder})
    found = [line for position in range(1000) for line in dataset[position].skipped]
    assert 15 <= len(found) <= 20
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("bad", "seen", "stops"),
    [(189, 400, True), (20, 1000, False), (101, 1000, True), (2, 4, False), (30, 200, False)],
)
def test_when_bad_images_are_too_many(bad, seen, stops):
    assert too_many(bad, seen, 0.1) == stops


@pytest.mark.parametrize("name", ["caf\udce9.jpg", "two\nlines.jpg"])
def test_names_of_any_kind_can_be_printed(tmp_path, name):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / name).write_bytes(b"<html>")
    (folder / "z.jpg").write_bytes(good(0))
    dataset = dataset_of({"photos": folder})
    lines = {line for position in range(8) for line in dataset[position].skipped}
    assert len(lines) == 1
    (line,) = lines
    assert line.encode()
    assert "\n" not in line


def test_a_file_that_vanishes_is_a_bad_image(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.jpg").write_bytes(good(number))
    dataset = dataset_of({"photos": folder})
    (folder / "2.jpg").unlink()
    found = [dataset[position] for position in range(16)]
    assert {line for sample in found for line in sample.skipped} == {
        "photos/2.jpg: cannot be read: No such file or directory"
    }


def test_the_last_bad_image_gives_way_to_the_first(tmp_path):
    dataset = dataset_of(source_with(tmp_path, {"0.jpg": good(0), "1.jpg": b"bad"}))
    keys = {dataset[position].key for position in range(8)}
    assert keys == {"photos/0.tar/0.jpg"}


def test_substitutes_keep_crop_and_noise(tmp_path):
    whole = dataset_of(source_with(tmp_path / "a", {"0.jpg": good(0), "1.jpg": good(0)}))
    broken = dataset_of(source_with(tmp_path / "b", {"0.jpg": good(0), "1.jpg": b"bad"}))
    for position in range(8):
        assert torch.equal(whole[position].noise, broken[position].noise)
        assert torch.equal(whole[position].image, broken[position].image)


@pytest.mark.parametrize(("count", "workers"), [(1, 0), (3, 0), (300, 0), (3, 1)])
def test_only_bad_images_end_the_run(tmp_path, count, workers):
    members = {f"{number}.jpg": b"bad" for number in range(count)}
    dataset = dataset_of(source_with(tmp_path, members))
    with pytest.raises(MissingInputError, match="in a row cannot be used") as caught:
        batches(dataset, stop=1, workers=workers)
    tried = min(count, loading.MAX_NEIGHBOURS)
    assert f"{tried} image{'s' * (tried > 1)} in a row" in str(caught.value)
    assert "0.tar" in str(caught.value)
    assert "Traceback" not in str(caught.value)  # what the command line prints


@pytest.mark.parametrize(
    ("others", "remedy"),
    [
        ([], "; set data.crop to 24 or less, or data.shorter_side=48 (which enlarges them)"),
        ([b"bad"], "0.tar and data.shorter_side=null, data.crop=48"),
        ([samples.encode(samples.noise_picture(0, 9, 7))], "; set data.shorter_side=48 (which"),
    ],
)
def test_images_smaller_than_the_crop_say_what_to_set(tmp_path, others, remedy):
    members = {f"{number}.jpg": member for number, member in enumerate([small(), *others])}
    dataset = dataset_of(source_with(tmp_path, members))
    with pytest.raises(MissingInputError) as caught:
        dataset[0]
    assert remedy in str(caught.value)


def test_a_shard_that_shrinks_later_ends_the_run(tmp_path):
    folders = source_with(tmp_path, {"0.jpg": good(0), "1.jpg": good(1)})
    dataset = dataset_of(folders)
    path = folders["photos"] / "0.tar"
    second = int(dataset.sources["photos"].blocks[1]) * 512
    path.write_bytes(path.read_bytes()[:second])
    with pytest.raises(MissingInputError, match=r"0\.tar has changed since it was indexed"):
        [dataset[position] for position in range(8)]


# --- building -------------------------------------------------------------------------------


def test_plan_follows_the_configuration(folders):
    settings = samples.data_config(folders, "data.sources.people.weight=3", "data.lanes=2")
    plan, _ = loading.open_data(settings)
    assert plan.batch == 8
    assert {name: source.share for name, source in plan.plans.items()} == {
        "places": 2,
        "people": 6,
    }
    assert all(source.lanes <= 2 for source in plan.plans.values())


def test_broken_shards_follow_the_configuration(tmp_path):
    folders = source_with(tmp_path, {"0.jpg": good(0)})
    (folders["photos"] / "1.tar").write_bytes(b"")
    with pytest.raises(MissingInputError, match=r"1\.tar"):
        loading.open_data(samples.data_config(folders))
    warnings: list[str] = []
    settings = samples.data_config(folders, "data.bad_shards=skip")
    _, sources = loading.open_data(settings, warnings.append)
    assert sources["photos"].counts.tolist() == [1, 0]
    assert len(warnings) == 1


def test_collate():
    def sample(value: int) -> loading.Sample:
        image = torch.full((3, 4, 4), value, dtype=torch.uint8)
        noise = torch.stack([torch.full((4, 1, 1), value + draw / 2) for draw in range(2)])
        return loading.Sample(image, noise, f"key{value}", [f"bad{value}"] * value)

    batch = loading.collate([sample(0), sample(1), sample(2)])
    assert batch.images.shape == (3, 3, 4, 4)
    assert batch.noise.shape == (2, 3, 4, 1, 1)
    assert batch.noise[1, 2, 0, 0, 0] == 2.5
    assert batch.keys == ["key0", "key1", "key2"]
    assert batch.skipped == ["bad1", "bad2", "bad2"]


def test_workers_do_not_multiply_threads(folders):
    """Batches must not depend on it, and a node has as many loaders as it has cores."""
    dataset = dataset_of(folders)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = batches(dataset, stop=2)
        torch.set_num_threads(2)
        two = batches(dataset, stop=2)
    finally:
        torch.set_num_threads(before)
    assert all(same(first, second) for first, second in zip(one, two, strict=True))


def test_more_workers_than_cores_are_no_warning(folders):
    cores = os.sched_getaffinity(0)
    dataset = dataset_of(folders)
    try:
        os.sched_setaffinity(0, {min(cores)})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len(batches(dataset, stop=2, workers=2)) == 2
            with pytest.raises(UserWarning, match="another"):
                warnings.warn("another", UserWarning, stacklevel=1)
    finally:
        os.sched_setaffinity(0, cores)


def test_crop_and_noise_are_frozen(folders):
    """A release must not change what a resumed run draws."""
    dataset = dataset_of(folders)
    drawn = dataset[3].noise.flatten()[:3].tolist()
    assert drawn == pytest.approx([-1.4590370837, -1.0051304508, 2.2960601059], abs=1e-6)
    shares = random_state(0, "crop", 3).random_sample(2).tolist()
    assert shares == pytest.approx([0.4563216030, 0.9838827007], abs=1e-9)


def test_half_of_the_images_are_mirrored_on_request(folders):
    plain, mirrored = dataset_of(folders), dataset_of(folders, "data.flip=true")
    kinds = []
    for position in range(64):
        one, other = plain[position].image, mirrored[position].image
        assert torch.equal(one, other) or torch.equal(one.flip(-1), other)
        kinds.append(torch.equal(one, other))
    assert 16 < sum(kinds) < 48


def test_upcoming_shards_are_those_of_the_next_batches(folders):
    settings = samples.data_config(folders)
    plan, sources = loading.open_data(settings)
    for rank, world in ((0, 1), (1, 2)):
        wanted = loading.upcoming(plan, sources, range(3, 6), rank, world)
        dataset = loading.PositionDataset(plan, sources, settings)
        read = {
            key.split("/")[1]
            for batch in batches(dataset, start=3, stop=6, rank=rank, world=world)
            for key in batch.keys
        }
        assert {Path(place).name for place in wanted} == read
        assert len(wanted) == len(set(wanted))


@pytest.mark.slow
def test_hundreds_of_iterations_are_those_of_one_rank_whatever_happens(folders):
    """1, 2, 3 and 4 ranks, 0 to 4 workers, stops at odd places: keys, crops and noise agree."""
    overrides = ("global_batch=12", "data.sources.places.weight=2")
    alone = hashed(dataset_of(folders, *overrides), 0, 200, 1, 0)
    pieces, start = [], 0
    for stop, world, workers in ((37, 2, 1), (38, 4, 2), (111, 3, 0), (150, 1, 4), (200, 3, 3)):
        dataset = dataset_of(folders, *overrides)  # as after a kill: nothing is remembered
        pieces += hashed(dataset, start, stop, world, workers)
        start = stop
    assert pieces == alone


def hashed(
    dataset: loading.PositionDataset, start: int, stop: int, world: int, workers: int
) -> list[str]:
    """A digest of each iteration's keys, pixels and noise over all ranks."""
    ranks = [
        list(
            loading.loader(dataset, loading.IterationSampler(start, stop, 0, 12, r, world), workers)
        )
        for r in range(world)
    ]
    digests = []
    for parts in zip(*ranks, strict=True):
        batch = joined(list(parts))
        pixels, noise = batch.images.numpy().tobytes(), batch.noise.numpy().tobytes()
        digests.append(hashlib.sha256(repr(batch.keys).encode() + pixels + noise).hexdigest())
    return digests


def test_reduced_decoding_is_close_and_off_by_default(tmp_path):
    data = samples.encode(samples.photograph("astronaut"), "JPEG", quality=95)
    folders = source_with(tmp_path, {"0.jpg": data})
    whole = dataset_of(folders, "data.shorter_side=128")[3].image.float()
    draft = dataset_of(folders, "data.shorter_side=128", "data.draft=true")[3].image.float()
    assert 0 < (whole - draft).abs().mean() < 4
