"""What a base states of itself reaches the run, its checkpoints and every exported file."""

import json
from pathlib import Path

import pytest
import runs
import samples
import torch
from diffusers import AutoencoderKL as DiffusersAutoencoderKL
from safetensors.torch import save_file

from kl_f8_train import facts
from kl_f8_train.__main__ import main
from kl_f8_train.core.model import AutoencoderKL
from kl_f8_train.errors import MissingInputError
from kl_f8_train.facts import Facts
from kl_f8_train.publish.export import export
from kl_f8_train.run.train import train
from kl_f8_train.weights import weight_file
from kl_f8_train.weights.names import diffusers_config, to_diffusers

# A small base whose norms have four groups: 16 channels do not divide by 32.
SMALL = {"ch": 16, "ch_mult": (1, 2), "num_res_blocks": 1, "norm_num_groups": 4}
GROUPS_4 = ("model.ch=16", "model.ch_mult=[1,2]", "model.norm_num_groups=4", "adversarial=null")
PROBE = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)


def small_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(**SMALL).eval()


def write_base(folder: Path, kind: str, stated: dict) -> Path:
    """The small base in one of the forms that can state facts."""
    state = small_vae().state_dict()
    if kind == "safetensors":
        texts = {name: json.dumps(value) for name, value in stated.items()}
        save_file(state, folder / "base.safetensors", {"iteration": "100", **texts})
        return folder / "base.safetensors"
    if kind == "ckpt":
        content = {"state_dict": state, "global_step": 100, "architecture": stated}
        return samples.save_zip(content, folder / "base.ckpt")
    place = folder / "vae"
    place.mkdir()
    config = diffusers_config(16, [1, 2], 1, 4, 32) | stated
    (place / "config.json").write_text(json.dumps(config))
    save_file(to_diffusers(state), place / "diffusion_pytorch_model.safetensors")
    return place


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return runs.make_shards(tmp_path_factory.mktemp("facts"))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["safetensors", "ckpt", "diffusers"])
def test_norm_groups_reach_every_export(tmp_path, shards, kind):
    base = write_base(tmp_path, kind, {"norm_num_groups": 4})
    assert torch.equal(
        weight_file.load_autoencoder(base).encode(PROBE).mean, small_vae().encode(PROBE).mean
    )
    extra = (f"init.weights={base}", f"data.sources={shards}", "stop_iteration=102", *GROUPS_4)
    assert train(runs.recipe(tmp_path, "run", *extra)) == 0
    assert train(runs.recipe(tmp_path, "run", *extra, "stop_iteration=103")) == 0  # resumed
    trained = weight_file.load_autoencoder(tmp_path / "run")
    out = export(tmp_path / "run")
    z = trained.encode(PROBE).mean
    files = [*out.glob("*.safetensors"), *out.glob("*.ckpt"), out / "diffusers"]
    assert len(files) == 3
    for file in files:
        assert weight_file.read(file).facts.norm_num_groups == 4
        assert torch.equal(weight_file.load_autoencoder(file).decode(z), trained.decode(z))
    vae = DiffusersAutoencoderKL.from_pretrained(out / "diffusers")
    torch.testing.assert_close(vae.decode(z).sample, trained.decode(z), atol=1e-5, rtol=0)


def test_other_norm_groups_than_the_recipes_are_refused(tmp_path, shards):
    base = write_base(tmp_path, "ckpt", {"norm_num_groups": 8})
    extra = (f"init.weights={base}", f"data.sources={shards}", "stop_iteration=102", *GROUPS_4)
    with pytest.raises(MissingInputError, match="norm_num_groups=8, expected 4"):
        train(runs.recipe(tmp_path, "run", *extra))


def test_a_checkpoint_keeps_its_norm_groups(tmp_path, shards):
    """Tensors do not show them, so that their shapes cannot refuse another number."""
    base = write_base(tmp_path, "ckpt", {"norm_num_groups": 4})
    extra = (f"init.weights={base}", f"data.sources={shards}", "stop_iteration=102", *GROUPS_4)
    train(runs.recipe(tmp_path, "run", *extra))
    with pytest.raises(MissingInputError, match="norm_num_groups=4, expected 8"):
        train(
            runs.recipe(tmp_path, "run", *extra, "model.norm_num_groups=8", "stop_iteration=103"),
            allow_changes=True,
        )


@pytest.mark.parametrize("kind", ["safetensors", "ckpt", "diffusers"])
def test_inspect_shows_what_a_file_states(tmp_path, kind, capsys):
    stated = {"norm_num_groups": 4, "scaling_factor": 0.5, "force_upcast": False}
    assert main(["inspect", str(write_base(tmp_path, kind, stated))]) == 0
    shown = capsys.readouterr().out
    for part in ("norm_num_groups 4", "scaling_factor 0.5", "force_upcast false"):
        assert part in shown


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("norm_num_groups", 0),
        ("norm_num_groups", "four"),
        ("norm_num_groups", True),
        ("scaling_factor", -1.0),
        ("scaling_factor", "0.13025"),
        ("force_upcast", 1),
        ("latents_mean", [0.0, "x"]),
        ("sample_size", 2.5),
    ],
)
@pytest.mark.parametrize("kind", ["safetensors", "ckpt", "diffusers"])
def test_a_fact_of_another_type_is_refused_by_name(tmp_path, kind, name, value):
    base = write_base(tmp_path, kind, {name: value})
    with pytest.raises(MissingInputError, match=f"{base.name}.*states {name}="):
        weight_file.read(base)


def test_a_file_without_facts_states_none(tmp_path):
    save_file(small_vae().state_dict(), tmp_path / "w.safetensors", {"note": "x"})
    assert weight_file.read(tmp_path / "w.safetensors").facts == Facts()


def test_metadata_there_and_back():
    stated = Facts(norm_num_groups=4, latents_mean=(0.5, -1.0), force_upcast=False)
    assert facts.from_metadata(stated.metadata()) == stated
    assert facts.from_values(stated.stated()) == stated
