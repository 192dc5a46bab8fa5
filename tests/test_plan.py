import collections
import time

import numpy as np
import pytest

from kl_f8_train.data import loading as plans
from kl_f8_train.data.loading import IterationSampler


def plan_of(counts: dict[str, list[int]], shares: dict[str, int], lanes: int = 4, seed: int = 0):
    return plans.Plan(counts, shares, lanes, seed)


def located(plan: plans.Plan, positions) -> list[tuple[str, int, int]]:
    return [plan.locate(position) for position in positions]


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
    source = plans.SourcePlan("photos", counts, share=6, lanes=lanes, seed=0)
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
    source = plans.SourcePlan("photos", counts, share=6, lanes=48, seed=0)
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
    slots = plans.mixed_slots({"a": 4, "b": 4})
    assert [name for name, _ in slots] == ["a", "b"] * 4
    assert [index for name, index in slots if name == "b"] == [0, 1, 2, 3]
    halves = [name for name, _ in plans.mixed_slots({"a": 8, "b": 4})[:6]]
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
    start = time.process_time()
    found = located(plan, range(840_001 * 192, 840_002 * 192))
    assert time.process_time() - start < 1
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
    plans.permutation.cache_clear()
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
    assert plans.permutation(8, 0, "a", "shards", 0).tolist() == [3, 0, 1, 4, 6, 2, 7, 5]
    assert plans.random_state(7, "crop", -5).random_sample() == 0.7785396448038734
    plan = plan_of({"a": [5, 7, 3], "b": [4]}, {"a": 4, "b": 2}, lanes=2, seed=3)
    assert located(plan, range(600, 606)) == [
        ("a", 0, 0),
        ("b", 0, 3),
        ("a", 2, 2),
        ("a", 1, 3),
        ("b", 0, 2),
        ("a", 1, 5),
    ]


def test_a_shard_without_images_is_never_dealt():
    source = plans.SourcePlan("photos", [0, 5, 0, 4, 0], share=3, lanes=3, seed=0)
    seen = {source.locate(iteration, index) for iteration in range(60) for index in range(3)}
    assert {shard for shard, _ in seen} == {1, 3}
    assert len(seen) == 9


def test_a_change_of_ranks_in_the_middle_changes_nothing():
    """Hundreds of iterations on 1 rank, then 2, 3 and 4: the positions of one run."""
    batch = 12
    pieces, start = [], 0
    for world, stop in ((1, 100), (2, 230), (3, 300), (4, 420)):
        ranks = [list(IterationSampler(start, stop, 0, batch, r, world)) for r in range(world)]
        pieces += [sorted(at for rank in ranks for at in rank[i]) for i in range(stop - start)]
        start = stop
    assert pieces == [list(range(i * batch, (i + 1) * batch)) for i in range(420)]


def test_passes():
    source = plans.SourcePlan("photos", [10], share=2, lanes=2, seed=0)
    assert [source.passes(iterations) for iterations in (0, 4, 5, 10)] == [0, 0.8, 1, 2]


def test_a_plan_of_100_000_shards_is_quick():
    plan = plan_of({"a": np.full(100_000, 1000)}, {"a": 192}, lanes=48)
    began = time.process_time()
    assert len(set(located(plan, range(840_001 * 192, 840_101 * 192)))) == 100 * 192
    assert time.process_time() - began < 2
