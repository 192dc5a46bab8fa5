"""Our iteration beside the original's order and diffusers' modules, in turns."""

import pytest
from against import compare
from checks import OF_TIMES, SIZE, recipe

pytestmark = OF_TIMES
TURNS = 5
LEAST = 0.98  # of our time: within the noise


@pytest.mark.parametrize("name", ["ft_ema"])
def test_nothing_is_faster_than_ours(device, see, name):
    found = compare(recipe(name, device, *SIZE), TURNS, say=print)
    ours, *others = found["variants"]
    see(f"{ours['images_per_second']:.1f} images/s")
    for other in others:
        see(f"{other['name']}: {other['ratio']:.2f} x our time")
    assert all(other["ratio"] > LEAST for other in others)
