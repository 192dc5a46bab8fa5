"""What a base states of itself reaches the run, its checkpoints and every exported file."""

import json
from pathlib import Path
from typing import get_args

import pytest
import runs
import samples
import torch
from diffusers import AutoencoderKL as DiffusersAutoencoderKL
from safetensors.torch import save_file

from kl_f8_train import facts
from kl_f8_train.__main__ import main
from kl_f8_train.core.model import AutoencoderKL
from kl_f8_train.errors import MissingInputError, UsageError
from kl_f8_train.facts import Facts
from kl_f8_train.publish.export import export
from kl_f8_train.run.train import train
from kl_f8_train.settings import SETTINGS
from kl_f8_train.weights import weight_file
from kl_f8_train.weights.names import Weights, diffusers_config, to_diffusers

# A small base whose norms have four groups: 16 channels do not divide by 32.
SMALL = {"ch": 16, "ch_mult": (1, 2), "num_res_blocks": 1, "norm_num_groups": 4}
GROUPS_4 = ("model.ch=16", "model.ch_mult=[1,2]", "model.norm_num_groups=4", "adversarial=null")
PROBE = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
LONE = Path("vae.safetensors")


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
        ("sample_size", [512, 2.5]),
    ],
)
@pytest.mark.parametrize("kind", ["safetensors", "ckpt", "diffusers"])
def test_a_fact_of_another_type_is_refused_by_name(tmp_path, kind, name, value):
    base = write_base(tmp_path, kind, {name: value})
    with pytest.raises(MissingInputError, match=f"{base.name}.*states {name}="):
        weight_file.read(base)


def test_a_sample_size_of_height_and_width(tmp_path):
    """diffusers takes the first of the two."""
    base = write_base(tmp_path, "diffusers", {"sample_size": [512, 768]})
    assert weight_file.read(base).facts.sample_size == 512


def test_facts_of_another_number_of_channels_are_refused():
    for name in ("latents_mean", "latents_std"):
        with pytest.raises(MissingInputError, match=f"states {name} of 2 channels.*have 4"):
            facts.settled(LONE, Facts(scaling_factor=0.5, **{name: (0.0, 1.0)}), 4, None, True)


def test_a_config_that_denies_the_quant_convs_of_its_file_is_refused(tmp_path, shards):
    """Written to config.json, it would make diffusers decode without them."""
    base = write_base(tmp_path, "diffusers", {"norm_num_groups": 4, "use_quant_conv": False})
    extra = (f"init.weights={base}", f"data.sources={shards}", *GROUPS_4)
    with pytest.raises(MissingInputError, match="use_quant_conv=false, against what its tensors"):
        train(runs.recipe(tmp_path, "run", *extra))


def test_a_file_without_facts_states_none(tmp_path):
    save_file(small_vae().state_dict(), tmp_path / "w.safetensors", {"note": "x"})
    assert weight_file.read(tmp_path / "w.safetensors").facts == Facts()


def test_metadata_there_and_back():
    stated = Facts(norm_num_groups=4, latents_mean=(0.5, -1.0), force_upcast=False)
    assert facts.from_metadata(stated.metadata()) == stated
    assert facts.from_values(stated.stated()) == stated


# --- families -------------------------------------------------------------------------------


def test_the_setting_knows_every_family():
    names = SETTINGS["init.family"].kind
    assert set(get_args(names)) == {*facts.FAMILIES, facts.OTHER}


@pytest.mark.parametrize(
    ("stated", "channels", "family"),
    [
        (Facts(scaling_factor=0.18215), 4, "sd"),
        (Facts(scaling_factor=0.13025), 4, "sdxl"),
        (Facts(scaling_factor=1.5305, shift_factor=0.0609), 16, "sd3"),
        (Facts(scaling_factor=0.3611, shift_factor=0.1159), 16, "flux"),
        (Facts(scaling_factor=0.3611), 16, "other"),
        (Facts(scaling_factor=0.08333), 4, "other"),
        (Facts(scaling_factor=0.18215), 16, "other"),
        (Facts(), 4, None),
    ],
)
def test_the_scale_shows_the_family(stated, channels, family):
    assert facts.family_of(stated, channels) == family


def test_a_lone_file_of_a_shared_shape_must_be_given_a_family():
    with pytest.raises(UsageError, match=r"init.family=sd \(.*init.family=sdxl \("):
        facts.settled(LONE, Facts(), 4, None, True)
    with pytest.raises(UsageError, match=r"init.family=sd3 \(.*init.family=flux \("):
        facts.settled(LONE, Facts(), 16, None, True)
    assert facts.settled(LONE, Facts(), 4, "sdxl", True).scaling_factor == 0.13025
    assert facts.settled(LONE, Facts(), 4, "other", True).scaling_factor is None
    assert (
        facts.settled(LONE, Facts(), 4, None, False).scaling_factor is None
    )  # a shape of no family
    with pytest.raises(UsageError, match="have 16 channels, these have 4"):
        facts.settled(LONE, Facts(), 4, "flux", True)


def test_a_family_against_what_the_file_states_is_refused():
    with pytest.raises(UsageError, match=r"Stable Diffusion XL.*0\.13025.*init.family=sdxl"):
        facts.settled(LONE, Facts(scaling_factor=0.13025), 4, "sd", True)
    assert facts.settled(LONE, Facts(scaling_factor=0.13025), 4, "other", True).family == "sdxl"


@pytest.mark.parametrize(
    ("stated", "family", "modelspec"),
    [
        ({"scaling_factor": 0.13025, "force_upcast": False}, "sdxl", "stable-diffusion-xl-v1"),
        ({"scaling_factor": 0.08333}, "other", "autoencoder-kl"),
        (
            {"latents_mean": [0.5, 0, 0, 0], "latents_std": [2.0, 1, 1, 1], "scaling_factor": 0.5},
            "other",
            "autoencoder-kl",
        ),
    ],
)
def test_a_folders_scale_reaches_every_export(tmp_path, shards, stated, family, modelspec):
    stated = {"norm_num_groups": 4, **stated}
    base = write_base(tmp_path, "diffusers", stated)
    extra = (f"init.weights={base}", f"data.sources={shards}", "stop_iteration=102", *GROUPS_4)
    train(runs.recipe(tmp_path, "run", *extra, "init.family=null"))
    out = export(tmp_path / "run", force=True)
    config = json.loads((out / "diffusers" / "config.json").read_text())
    single = weight_file.read(next(out.glob("*.safetensors")))
    torch_file = weight_file.read(next(out.glob("*.ckpt")))
    for name, value in stated.items():
        assert config[name] == value
        for facts_of_file in (single.facts, torch_file.facts):
            assert json.loads(json.dumps(facts_of_file.stated()[name])) == value
    assert single.facts.family == torch_file.facts.family == family
    assert single.metadata["modelspec.architecture"].startswith(modelspec)


@pytest.mark.parametrize(
    ("other_name", "family"),
    [
        ("conditioner.embedders.0.x", "sdxl"),
        ("cond_stage_model.transformer.x", "sd"),
        ("model.diffusion_model.joint_blocks.0.x", "sd3"),
        ("model.diffusion_model.double_blocks.0.x", "flux"),
    ],
)
def test_a_full_checkpoint_shows_its_family(tmp_path, other_name, family):
    state = {f"first_stage_model.{k}": v for k, v in small_vae().state_dict().items()}
    save_file({**state, other_name: torch.ones(1)}, tmp_path / "w.safetensors")
    found = weight_file.facts_of(*weight_file.read_weights(tmp_path / "w.safetensors"))
    assert found.family == family


# --- 16 channels ----------------------------------------------------------------------------

SIXTEEN = {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "z_channels": 16, "embed_dim": 16}


def test_sixteen_channels_without_quant_convs_agree_with_diffusers():
    """Forward and gradients, in float64, with random weights."""
    torch.manual_seed(0)
    ours = AutoencoderKL(**SIXTEEN, quant_conv=False).double()
    config = diffusers_config(32, [1, 2], 1, 16, 32, Facts(use_quant_conv=False))
    theirs = DiffusersAutoencoderKL.from_config(config).double()
    theirs.load_state_dict(to_diffusers(ours.state_dict()), strict=True)
    x = PROBE.double().repeat(2, 1, 2, 2)
    posterior = ours.encode(x)
    moments = theirs.encode(x).latent_dist
    torch.testing.assert_close(posterior.mean, moments.mean, atol=1e-10, rtol=0)
    torch.testing.assert_close(posterior.logvar, moments.logvar, atol=1e-10, rtol=0)
    y, expected = ours.decode(posterior.mean), theirs.decode(moments.mean).sample
    torch.testing.assert_close(y, expected, atol=1e-10, rtol=0)
    y.square().sum().backward()
    expected.square().sum().backward()
    gradients = {key: parameter.grad for key, parameter in ours.named_parameters()}
    for key, parameter in to_diffusers(gradients).items():
        reference = theirs.get_parameter(key).grad
        torch.testing.assert_close(parameter, reference, atol=1e-8, rtol=1e-9)


@pytest.mark.parametrize("kind", ["bfl", "diffusers"])
def test_sixteen_channels_are_trained_and_exported(tmp_path, shards, kind):
    torch.manual_seed(0)
    model = AutoencoderKL(**SIXTEEN, quant_conv=False)
    base, family = tmp_path / "ae.safetensors", "init.family=flux"
    if kind == "diffusers":
        base, family = tmp_path / "vae", "init.family=null"
        base.mkdir()
        stated = facts.FAMILIES["flux"].facts
        config = diffusers_config(
            32, [1, 2], 1, 16, 32, facts.combined(stated, Facts(use_quant_conv=False))
        )
        (base / "config.json").write_text(json.dumps(config))
        save_file(to_diffusers(model.state_dict()), base / "diffusion_pytorch_model.safetensors")
    else:
        save_file(model.state_dict(), base)
    extra = ("model.ch=32", "model.ch_mult=[1,2]", "model.z_channels=16", "model.embed_dim=16")
    extra += ("model.quant_conv=false", "adversarial=null", "stop_iteration=102", family)
    extra += (f"init.weights={base}", f"data.sources={shards}")
    assert train(runs.recipe(tmp_path, "run", *extra)) == 0
    out = export(tmp_path / "run")
    vae = DiffusersAutoencoderKL.from_pretrained(out / "diffusers")
    assert (vae.config.scaling_factor, vae.config.shift_factor) == (0.3611, 0.1159)
    assert vae.quant_conv is None
    trained = weight_file.load_autoencoder(tmp_path / "run")
    z = torch.linspace(-1, 1, 16 * 4 * 4).view(1, 16, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(vae.decode(z).sample, trained.decode(z), atol=1e-5, rtol=0)
    single = weight_file.read(next(out.glob("*.safetensors")))
    assert single.facts.use_quant_conv is False
    assert single.metadata["modelspec.architecture"] == "flux-1/vae"


def test_the_16_channel_shape_is_known_by_name(tmp_path, capsys):
    state = samples.meta_vae(z_channels=16, embed_dim=16, quant_conv=False).state_dict()
    assert len(state) == 244
    weights = Weights("CompVis autoencoder", dict(state))
    assert weight_file.published_shape(weights) == "16-channel kl-f8"
