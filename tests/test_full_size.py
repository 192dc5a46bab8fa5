"""The full-size network through the whole job, at a small crop: train, kill, resume, export."""

import os
import shutil
from pathlib import Path

import pytest
import runs
import torch
from diffusers import AutoencoderKL as DiffusersAutoencoderKL

from kl_f8_train.core.model import AutoencoderKL
from kl_f8_train.publish.export import export
from kl_f8_train.run_dir import list_checkpoints
from kl_f8_train.weights import names, weight_file

FULL = (
    "model.ch=128",
    "model.ch_mult=[1,2,4,4]",
    "model.num_res_blocks=2",
    "adversarial.ndf=64",
    "adversarial.n_layers=3",
    "data.crop=64",
    "global_batch=2",
    "compute.per_device_batch=1",
    "init.iteration=246803",
    "stop_iteration=246806",
    "checkpoint.every=1",
    "checkpoint.keep_last=1",
    "name=full",
)


@pytest.mark.slow
def test_full_size_network_is_trained_killed_resumed_and_exported(tmp_path: Path) -> None:
    runs.make_shards(tmp_path, size=72)
    photographs = os.environ.get("KL_F8_TRAIN_SHARDS", str(tmp_path / "shards"))
    runs.make_weights(
        tmp_path / "model.ckpt", (1, 2, 4, 4), ch=128, num_res_blocks=2, z_channels=4, embed_dim=4
    )
    extra = (*FULL, f"data.sources={photographs}")

    process = runs.start(tmp_path, "run", *extra)
    assert process.stdout is not None
    for line in process.stdout:
        if "iteration 246,804 of" in line:
            break
    process.kill()
    process.wait()
    reached = list_checkpoints(tmp_path / "run")
    process = runs.start(tmp_path, "run", *extra)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert not reached or f"resuming {reached[0].name}" in output

    out = export(tmp_path / "run")
    before = weight_file.read(tmp_path / "model.ckpt").tensors
    state = names.recognise(runs.final_state(tmp_path, "run").tensors, "ema").autoencoder
    assert len(state) == 248
    frozen = [key for key in state if key.startswith(("encoder.", "quant_conv."))]
    assert len(frozen) == 108
    assert all(torch.equal(state[key], before[key]) for key in frozen)
    ema = AutoencoderKL()
    ema.load_state_dict(state)
    vae = DiffusersAutoencoderKL.from_pretrained(out / "diffusers")
    latents = torch.linspace(-3, 3, 4 * 8 * 8).view(1, 4, 8, 8)
    with torch.no_grad():
        difference = (vae.decode(latents).sample - ema.decode(latents)).abs().max()
    assert difference < 1e-5
    shutil.rmtree(tmp_path)
