"""Exported files drop into their consumers, decode as the EMA and keep the encoder."""

import json
import zipfile
from pathlib import Path

import pytest
import runs
import torch
from diffusers import AutoencoderKL as DiffusersAutoencoderKL

from kl_f8_train import checkpoint, formats
from kl_f8_train.errors import MissingInputError
from kl_f8_train.export import export
from kl_f8_train.model import AutoencoderKL
from kl_f8_train.train import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run and its export."""
    folder = tmp_path_factory.mktemp("export")
    runs.make_shards(folder)
    runs.make_weights(folder / "model.ckpt")
    train(runs.recipe(folder, "run", "stop_iteration=103", "name=tiny"))
    export(folder / "run")
    return folder


@pytest.fixture(scope="module")
def ema(folder: Path) -> AutoencoderKL:
    """The autoencoder with the EMA decoder, straight from the training checkpoint."""
    tensors = runs.final_state(folder, "run").tensors
    state = formats.recognise(tensors, "ema").autoencoder
    model = AutoencoderKL(**formats.architecture(state))
    model.load_state_dict(state)
    return model.eval()


LATENTS = torch.linspace(-3, 3, 4 * 8 * 8).view(1, 4, 8, 8)


@torch.no_grad()
def test_diffusers_loads_the_folder_and_decodes_as_the_ema(folder, ema):
    vae = DiffusersAutoencoderKL.from_pretrained(folder / "run" / "export" / "diffusers")
    torch.testing.assert_close(vae.decode(LATENTS).sample, ema.decode(LATENTS), atol=1e-5, rtol=0)
    assert vae.config.scaling_factor == 0.18215


@torch.no_grad()
@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_diffusers_loads_the_single_files(folder, ema, suffix):
    out = folder / "run" / "export"
    vae = DiffusersAutoencoderKL.from_single_file(
        str(out / f"tiny-ema-pruned.{suffix}"), config=str(out / "diffusers")
    )
    torch.testing.assert_close(vae.decode(LATENTS).sample, ema.decode(LATENTS), atol=1e-5, rtol=0)


def test_the_encoder_is_the_imported_one(folder):
    before = checkpoint.read(folder / "model.ckpt").tensors
    after = checkpoint.read(folder / "run" / "export" / "tiny-ema-pruned.safetensors").tensors
    for key in after:
        if key.startswith(("encoder.", "quant_conv.")):
            assert torch.equal(before[key], after[key])


def test_the_ema_is_exported_and_not_the_raw_weights(folder):
    exported = checkpoint.read(folder / "run" / "export" / "tiny-ema-pruned.safetensors").tensors
    state = runs.final_state(folder, "run").tensors
    key = "decoder.conv_in.weight"
    assert torch.equal(exported[key], state[f"ema.{key}"])
    assert not torch.equal(exported[key], state[f"autoencoder.{key}"])


def test_the_ckpt_satisfies_strict_loaders(folder, ema):
    path = folder / "run" / "export" / "tiny-ema-pruned.ckpt"
    names = {name.split("/", 1)[1] for name in zipfile.ZipFile(path).namelist()}
    assert all(n in ("data.pkl", "version") or n.startswith("data/") for n in names)
    loaded = torch.load(path, weights_only=True)
    assert loaded["global_step"] == 103
    AutoencoderKL(**formats.architecture(loaded["state_dict"])).load_state_dict(
        loaded["state_dict"], strict=True
    )


def test_records_tell_what_was_made(folder):
    out = folder / "run" / "export"
    record = json.loads((out / "export.json").read_text())
    for file, digest in record["files"].items():
        assert checkpoint.file_sha256(out / file) == digest
    metadata = checkpoint.read(out / "tiny-ema-pruned.safetensors").metadata
    assert metadata["kl_f8_train.iteration"] == "103"
    assert metadata["modelspec.sai_model_spec"] == "1.0.1"
    assert "100 -> 103" in (out / "README.md").read_text()


def test_only_training_checkpoints_are_exported(folder):
    with pytest.raises(MissingInputError, match="not a training checkpoint"):
        export(folder / "model.ckpt")


def test_a_next_stage_starts_from_the_run_or_its_export(folder):
    exported = folder / "run" / "export" / "tiny-ema-pruned.safetensors"
    finals = []
    for name, weights in (("from-run", folder / "run"), ("from-export", exported)):
        extra = (f"init.weights={weights}", "init.iteration=null", "stop_iteration=105")
        train(runs.recipe(folder, name, *runs.NO_ADVERSARIAL, *extra))
        finals.append(runs.final_state(folder, name))
    runs.assert_same_state(*finals)
    assert finals[0].metadata["ema_updates"] == "2"
