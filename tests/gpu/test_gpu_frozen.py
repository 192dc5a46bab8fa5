"""The frozen part stays as it is to the bit; everything else moves."""

import torch
from checks import EAGER, OF_VALUES, TINY, ready, recipe

from kl_f8_train.core.hashes import frozen_sha256
from kl_f8_train.core.step import trained_part

pytestmark = OF_VALUES


def test_frozen_part_is_untouched_in_bfloat16(device, see):
    config = recipe("ft_ema", device, *TINY, EAGER, "optimizer.learning_rate=1e-4")
    assert config.precision == "bfloat16"
    with ready(config, device) as made:
        tuner = made.finetuner
        moving = {"": trained_part(tuner.autoencoder), "ema.": tuner.ema}
        moving["discriminator."] = tuner.discriminator
        named = {
            f"{prefix}{name}": parameter
            for prefix, module in moving.items()
            for name, parameter in module.named_parameters()
        }
        before = {name: parameter.detach().clone() for name, parameter in named.items()}
        frozen = frozen_sha256(tuner.autoencoder.state_dict())
        made.iterate(5)
        tuner.guard.judge()
        still = [name for name, value in named.items() if torch.equal(value, before[name])]
        see(f"{len(named) - len(still)} of {len(named)} trained tensors moved")
        assert frozen_sha256(tuner.autoencoder.state_dict()) == frozen
        assert not still
        assert all(parameter.dtype == torch.float32 for parameter in tuner.parameters())
