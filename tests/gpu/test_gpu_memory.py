"""Memory that an iteration takes, against what `doctor` computes for it."""

import pytest
import torch
from checks import COUNTED, EAGER, ready, recipe, skip_if_too_large

from kl_f8_train.check import benchmark, cost
from kl_f8_train.core import machine

pytestmark = COUNTED
MOST = 1.1  # of what was computed: above it `doctor` promises what does not fit
LEAST = 0.8  # below it `doctor` refuses what would fit


@pytest.mark.parametrize("name", ["ft_ema", "ft_mse"])
@pytest.mark.parametrize(("images", "levels"), [(4, 0), (12, 0), (12, 4), (24, 0)])
def test_memory_is_as_computed(device, see, name, images, levels):
    size = f"compute.per_device_batch={images}"
    config = recipe(name, device, EAGER, f"compute.checkpoint_levels={levels}", size)
    skip_if_too_large(config, images)
    computed = cost.peak_bytes(config, images)
    before = benchmark.memory_in_use(device)
    with ready(config, device) as made:
        made.iterate()
        benchmark.reset_peak(device)
        made.iterate(2)
        torch.cuda.synchronize()
        measured = benchmark.peak_memory(device) - before
        reserved = torch.cuda.max_memory_reserved()
    see(
        f"{measured / cost.GIB:.2f} GiB, computed {computed / cost.GIB:.2f}, "
        f"reserved {reserved / cost.GIB:.2f}"
    )
    assert LEAST * computed < measured < MOST * computed


def test_channels_last_is_kept(device, see):
    """By the GroupNorm and the convolutions of this torch, from image to image."""
    config = recipe("ft_ema", device, EAGER, "compute.per_device_batch=1")
    with ready(config, device) as made:
        seen: list[torch.Tensor] = []
        parts = made.finetuner.autoencoder.decoder.up
        hooks = [part.register_forward_hook(lambda m, i, out: seen.append(out)) for part in parts]
        made.iterate()
        for hook in hooks:
            hook.remove()
    assert machine.channels_last(config.compute)
    kept = [out.is_contiguous(memory_format=torch.channels_last) for out in seen]
    see(f"{sum(kept)} of {len(kept)} outputs of the decoder's levels")
    assert all(kept)
