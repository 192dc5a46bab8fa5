"""Every value's origin, from the recipes' own comments."""

import pytest
import samples

from kl_f8_train import config
from kl_f8_train.check import origins
from kl_f8_train.settings import leaves, to_dict


def found(name: str, *overrides: str) -> dict[str, str]:
    """Origin of every setting of a shipped recipe."""
    given = [*samples.YOURS, *overrides]
    path = samples.CONFIGS / f"{name}.yaml"
    keys = dict(leaves(to_dict(config.load(path, given))))
    return origins.origins(path, given, keys)


@pytest.mark.parametrize("name", ["ft_ema", "ft_mse", "single_gpu"])
def test_every_number_that_the_file_states_has_an_origin(name):
    assert [key for key, origin in found(name).items() if origin == "recipe"] == ["name"]


@pytest.mark.parametrize(
    ("key", "origin"),
    [
        ("stop_iteration", "card"),
        ("model.ch_mult", "original"),  # on the line of its group
        ("optimizer.learning_rate", "open"),
        ("ema.decay", "inferred"),
        ("compute.devices", "default"),
        ("init.weights", "yours"),
        ("data.sources.photos.shards", "yours"),
        ("global_batch", "yours"),
    ],
)
def test_origins_of_ft_ema(key, origin):
    assert found("ft_ema", "--global_batch=96")[key] == origin


def test_a_comment_above_counts_and_the_files_opening_does_not(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "# card: all of it\nname: x\n# Open: nobody knows\n# why\nseed: 1\nrun: '# card'\n"
    )
    keys = ("name", "seed", "run", "absent")
    assert origins.origins(file, [], keys) == {
        "name": "recipe", "seed": "open", "run": "recipe", "absent": "default"
    }  # fmt: skip
