"""Near-duplicates of photographs: copies that were resized, recompressed, turned or retouched.

A look is the image's grey, averaged over 9 x 9 fields. Two looks are alike if the differences of
their neighbouring fields, as vectors of length 1, have a product of at least ALIKE. That is the
difference hash (dHash) of image search with the differences themselves in place of their signs.
N: images; every look is (9, 9) float32 in 0..255.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch.nn.functional as F
from scipy.cluster.hierarchy import DisjointSet
from torch import Tensor

from kl_f8_train import images

SIDE = 9  # fields in a row of a look
DRAFT = 256  # pixels of the shorter side that a look is made from, at least
# Of 476 photographs, strangers (sunsets over water) come to 0.83, and these copies to 0.85 and
# more: any size, JPEG of quality 10, brighter by 30 %, grey, 5 % cut off all around.
ALIKE = 0.85
FAINT = 1.0  # levels; differences below it are noise and do not count
BLOCK = 2048  # looks that are compared at once


def look(data: bytes) -> np.ndarray:
    """Encoded image -> its look. Raises ImageError if it cannot be decoded."""
    pixels = images.decode(data, draft_side=DRAFT)
    step = max(1, min(pixels.shape[1:]) // DRAFT)
    grey = pixels[:, ::step, ::step].float().mean(dim=0, keepdim=True)  # (1, H, W)
    fields: Tensor = F.adaptive_avg_pool2d(grey, SIDE)[0]
    return fields.numpy()


def alike(looks: np.ndarray, others: np.ndarray) -> Iterator[tuple[int, int]]:
    """(row of `looks`, row of `others`) of each pair that is alike; both (N, 9, 9).

    An image also matches its mirror image, and itself turned by quarters. Compares every look
    with every other: 20,000 of each take about 10 s.
    """
    for first in range(0, len(looks), BLOCK):
        mine = _directions(looks[first : first + BLOCK])
        for start in range(0, len(others), BLOCK):
            theirs = others[start : start + BLOCK]
            products = np.max([mine @ _directions(turned).T for turned in _turns(theirs)], axis=0)
            for row, column in np.argwhere(products >= ALIKE):
                yield first + int(row), start + int(column)


def groups(looks: np.ndarray, digests: Sequence[str]) -> list[list[int]]:
    """Groups of indices of images that are equal or alike, directly or through others; in order."""
    found = DisjointSet(range(len(digests)))
    first_of: dict[str, int] = {}
    equal = ((number, first_of.setdefault(sha, number)) for number, sha in enumerate(digests))
    for one, other in itertools.chain(equal, alike(looks, looks)):
        found.merge(one, other)
    return sorted(map(sorted, found.subsets()))


def _directions(looks: np.ndarray) -> np.ndarray:
    """(N, 9, 9) -> (N, 144): differences of neighbouring fields, down and right, of length 1.

    Shorter for a faint image, with differences below FAINT: it is alike to no other.
    """
    down = np.diff(looks, axis=1).reshape(len(looks), -1)  # (N, 72)
    right = np.diff(looks, axis=2).reshape(len(looks), -1)  # (N, 72)
    both = np.concatenate([down, right], axis=1)
    # As if each difference had noise of FAINT in it: sqrt(|d|^2 + 144 FAINT^2), (N, 1).
    lengths = np.sqrt((both**2).sum(axis=1, keepdims=True) + FAINT**2 * both.shape[1])
    directions: np.ndarray = both / lengths
    return directions


def _turns(looks: np.ndarray) -> Iterator[np.ndarray]:
    """The looks of the image and its mirror image, each turned by quarters."""
    for version in (looks, looks[:, :, ::-1]):
        yield from (np.rot90(version, quarters, axes=(1, 2)) for quarters in range(4))
