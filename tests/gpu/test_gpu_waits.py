"""The host never waits for the GPU inside an iteration."""

import warnings

import pytest
import torch
from checks import COUNTED, EAGER, SMALL, ready, recipe

pytestmark = COUNTED


@pytest.mark.parametrize("name", ["ft_ema", "ft_mse"])
@pytest.mark.parametrize("parts", [1, 2])
def test_no_wait_in_an_iteration(device, see, name, parts):
    """But for the iteration before, whose verdict is read by an event, without torch's knowing."""
    with ready(recipe(name, device, *SMALL, EAGER), device, images=2 * parts) as made:
        made.iterate(2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
        try:
            made.iterate(2)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    see(f"{parts} micro-batches of 2 images")
