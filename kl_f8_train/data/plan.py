"""Which image is the i-th of iteration t: arithmetic on seed, iteration and counts, nothing else.

The shards of a source, permuted anew in each pass, form one stream with the samples permuted inside
each shard; the stream is cut into L equal lanes, and every iteration takes the next few samples of
each lane. Nothing depends on the number of processes or workers, and nothing needs to be stored to
resume. What does not fill the lanes, fewer than L samples, is left out of a pass, others each time.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np


def random_state(*parts: int | str) -> np.random.RandomState:
    """A generator that depends on its arguments alone; its stream is frozen across releases."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return np.random.RandomState(np.frombuffer(digest, np.uint32))


@lru_cache(maxsize=512)
def permutation(size: int, *parts: int | str) -> np.ndarray:
    """A permutation of 0 .. size - 1 that depends on its arguments alone."""
    return random_state(*parts).permutation(size)


class SourcePlan:
    """Deals the samples of one source: `share` of them in every iteration."""

    def __init__(self, name: str, counts: Sequence[int], share: int, lanes: int, seed: int) -> None:
        self.name, self.share, self.seed = name, share, seed
        self.counts = np.asarray(counts, np.int64)
        total = int(self.counts.sum())
        self.lanes = max(d for d in range(1, min(lanes, share, total) + 1) if share % d == 0)
        self.lane_length = total // self.lanes  # samples of a lane in each pass
        self.per_lane = share // self.lanes  # samples of a lane in each iteration
        self._passes: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def locate(self, iteration: int, index: int) -> tuple[int, int]:
        """(shard, sample) of the index-th sample (0 .. share - 1) of an iteration."""
        lane, offset = divmod(index, self.per_lane)
        number, place = divmod(iteration * self.per_lane + offset, self.lane_length)
        return self._at(number, lane * self.lane_length + place)

    def passes(self, iterations: int) -> float:
        """How many times that many iterations go through the source."""
        return iterations * self.per_lane / self.lane_length

    def _at(self, number: int, place: int) -> tuple[int, int]:
        """The sample at a place of the stream of pass `number`."""
        order, ends = self._order(number)
        row = int(np.searchsorted(ends, place, side="right"))
        shard = int(order[row])
        count = int(self.counts[shard])
        inside = place - int(ends[row] - count)
        samples = permutation(count, self.seed, self.name, "samples", number, shard)
        return shard, int(samples[inside])

    def _order(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards of a pass in their order, and where each ends in the stream."""
        if number not in self._passes:
            if len(self._passes) >= 4:
                del self._passes[min(self._passes)]
            order = random_state(self.seed, self.name, "shards", number).permutation(
                len(self.counts)
            )
            self._passes[number] = order, np.cumsum(self.counts[order])
        return self._passes[number]


class Plan:
    """Deals all sources: position = iteration * batch + slot -> which sample."""

    def __init__(
        self, counts: Mapping[str, Sequence[int]], shares: dict[str, int], lanes: int, seed: int
    ) -> None:
        self.batch = sum(shares.values())
        self.plans = {
            name: SourcePlan(name, counts[name], share, lanes, seed)
            for name, share in shares.items()
        }
        self.slots = mixed_slots(shares)

    def digest(self) -> str:
        """A short hash of the counts; nodes that see other shards have another."""
        counts = [plan.counts.tobytes() for plan in self.plans.values()]
        return hashlib.sha256(b"/".join(counts)).hexdigest()[:12]

    def locate(self, position: int) -> tuple[str, int, int]:
        """(source, shard, sample) at a position; warm-up iterations are negative."""
        iteration, slot = divmod(position, self.batch)
        name, index = self.slots[slot]
        return (name, *self.plans[name].locate(iteration, index))


def mixed_slots(shares: dict[str, int]) -> list[tuple[str, int]]:
    """The slots of a batch, sources evenly mixed: [(source, index within its share), ...]."""
    places = [
        ((index + 0.5) / share, name, index)
        for name, share in shares.items()
        for index in range(share)
    ]
    return [(name, index) for _, name, index in sorted(places)]
