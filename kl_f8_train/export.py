"""Training checkpoint -> pruned EMA weights in every layout, each file read back and compared."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kl_f8_train import __version__, card, checkpoint, formats, state
from kl_f8_train.config import Config
from kl_f8_train.errors import RunFailedError
from kl_f8_train.model import AutoencoderKL


def export(source: Path, out: Path | None = None) -> Path:
    """Writes NAME-ema-pruned.safetensors and .ckpt, diffusers/, README.md and export.json.

    `source` is a run directory or one of its checkpoints. Raises MissingInputError if there is no
    training checkpoint, RunFailedError if a written file does not read back as the EMA.
    """
    contents = checkpoint.read(source)
    settings = state.stored_config(contents)
    weights = formats.recognise(contents.tensors, "ema").autoencoder
    weights = {key: value.float().contiguous() for key, value in weights.items()}
    out = out or (source if source.is_dir() else contents.path.parents[1]) / "export"
    iteration = int(contents.metadata["iteration"])
    base = f"{settings.name}-ema-pruned"
    metadata = _metadata(settings, contents.metadata, weights)

    checkpoint.write_safetensors(out / f"{base}.safetensors", weights, metadata)
    checkpoint.write_torch(out / f"{base}.ckpt", {"state_dict": weights, "global_step": iteration})
    _write_diffusers(out / "diffusers", settings, weights)
    _copy_config(out, settings)

    record = {
        "name": settings.name,
        "iteration": iteration,
        "init_iteration": settings.init.iteration,
        "source": contents.path.name,
        "frozen_sha256": contents.metadata["frozen_sha256"],
        "checks": _verify(out, base, weights, contents.metadata["frozen_sha256"]),
        "files": {
            str(path.relative_to(out)): checkpoint.file_sha256(path)
            for path in (
                out / f"{base}.safetensors",
                out / f"{base}.ckpt",
                out / "diffusers" / "config.json",
                out / "diffusers" / "diffusion_pytorch_model.safetensors",
            )
        },
    }
    checkpoint.write_json(out / "export.json", record)
    checkpoint.write_text(out / "README.md", card.model_card(settings, iteration, record))
    return out


def _metadata(
    settings: Config, stored: dict[str, str], weights: dict[str, Tensor]
) -> dict[str, str]:
    """Texts of the safetensors file: modelspec's fields and our provenance."""
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/vae",
        "modelspec.implementation": "kl_f8_train",
        "modelspec.title": f"{settings.name} (EMA, pruned)",
        "modelspec.resolution": f"{settings.data.crop}x{settings.data.crop}",
        "modelspec.hash_sha256": checkpoint.tensors_sha256(weights),
        "kl_f8_train.version": __version__,
        "kl_f8_train.iteration": stored["iteration"],
        "kl_f8_train.ema_decay": str(settings.ema.decay),
        "kl_f8_train.frozen_sha256": stored["frozen_sha256"],
        "kl_f8_train.config": stored["config"],
    }


def _write_diffusers(folder: Path, settings: Config, weights: dict[str, Tensor]) -> None:
    shape = settings.model
    values = formats.diffusers_config(
        shape.ch, shape.ch_mult, shape.num_res_blocks, shape.z_channels, settings.data.crop
    )
    checkpoint.write_json(folder / "config.json", values)
    checkpoint.write_safetensors(
        folder / "diffusion_pytorch_model.safetensors", formats.to_diffusers(weights), {}
    )


def _copy_config(out: Path, settings: Config) -> None:
    recipe = Path(settings.run_dir) / "config.yaml"
    if recipe.is_file():
        shutil.copyfile(recipe, out / "config.yaml")


def _verify(out: Path, base: str, weights: dict[str, Tensor], frozen: str) -> dict[str, str]:
    """Reads every file back: same tensors, same encoder, same decoded image.

    Raises RunFailedError if one differs.
    """
    files = {
        f"{base}.safetensors": out / f"{base}.safetensors",
        f"{base}.ckpt": out / f"{base}.ckpt",
        "diffusers": out / "diffusers",
    }
    latents = torch.linspace(-2.0, 2.0, steps=4 * 8 * 8).view(1, 4, 8, 8)
    latents = latents[:, : weights["post_quant_conv.weight"].shape[1]]
    expected = _decode(weights, latents)
    checks: dict[str, str] = {}
    for name, path in files.items():
        read = checkpoint.load_autoencoder(path)
        tensors = read.state_dict()
        problems = [key for key in weights if not torch.equal(tensors[key], weights[key])]
        if state.frozen_sha256(tensors) != frozen:
            problems.append("encoder and quant_conv are not the imported ones")
        if not torch.equal(read.decode(latents), expected):
            problems.append("a probe decodes differently")
        if problems:
            raise RunFailedError(f"{path} does not read back as written: {', '.join(problems[:3])}")
        checks[name] = f"{len(tensors)} tensors read back bit-equal, encoder as imported"
    strict = torch.load(out / f"{base}.ckpt", map_location="cpu", weights_only=True)
    if set(strict["state_dict"]) != set(weights):
        raise RunFailedError(f"{base}.ckpt holds other keys than the {len(weights)} of the VAE")
    checks["strict keys"] = f"{len(weights)}, no more and no less"
    return checks


@torch.no_grad()
def _decode(weights: dict[str, Tensor], latents: Tensor) -> Tensor:
    model = AutoencoderKL(**formats.architecture(weights))
    model.load_state_dict(weights)
    return model.eval().decode(latents)


def summary(out: Path) -> dict[str, Any]:
    """export.json of an export."""
    values: dict[str, Any] = json.loads((out / "export.json").read_text(encoding="utf-8"))
    return values
