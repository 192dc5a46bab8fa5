"""Pictures and texts for people: labelled strips, and the model card of an export."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import ImageDraw, ImageFont
from torch import Tensor

from kl_f8_train import half_precision, images
from kl_f8_train.config import Config
from kl_f8_train.perceptual import LABELS


def strip(columns: Mapping[str, Sequence[Tensor]], gap: int = 4) -> Tensor:
    """Label -> uint8 (3, H, W) pictures, one column a label, one row an image: a uint8 picture.

    Raises ValueError if the columns differ in length.
    """
    rows = [
        images.hstack(list(row), gap) for row in zip(*(columns[c] for c in columns), strict=True)
    ]
    width = next(iter(columns.values()))[0].shape[2] + gap
    header = images.to_pil(torch.full((3, 20, rows[0].shape[2]), 255, dtype=torch.uint8))
    draw = ImageDraw.Draw(header)
    font = ImageFont.load_default(size=12)
    for index, label in enumerate(columns):
        draw.text((index * width + 2, 3), label, fill="black", font=font)
    pixels = torch.frombuffer(bytearray(header.tobytes()), dtype=torch.uint8)
    label_row = pixels.view(20, header.width, 3).permute(2, 0, 1)
    return images.vstack([label_row, *rows], gap)


def model_card(config: Config, iteration: int, record: Mapping[str, Any]) -> str:
    """README.md of an export: how to use it, how it was made, what was checked."""
    name, loss = config.name, config.loss
    adversarial = (
        "none"
        if config.adversarial is None
        else f"hinge PatchGAN, {config.adversarial.weight:g} x adaptive weight, from iteration "
        f"{config.adversarial.start_iteration:,}"
    )
    checks = "\n".join(f"- {check}: {outcome}" for check, outcome in record["checks"].items())
    files = "\n".join(f"| {file} | `{digest}` |" for file, digest in record["files"].items())
    precision = "\n".join(f"- {line}" for line in half_precision.describe(record["half_precision"]))
    taken = {"raw": "raw weights, not the EMA", "ema": "EMA weights"}
    weights = taken.get(record["weights"], f"mean EMA of {', '.join(record['averaged'])}")
    sources = ", ".join(f"{key} ({s.weight:g})" for key, s in config.data.sources.items())
    return f"""---
library_name: diffusers
pipeline_tag: image-to-image
tags: [stable-diffusion, stable-diffusion-diffusers, vae, autoencoder, kl-f8]
---
# {name}

The decoder of Stable Diffusion's kl-f8 autoencoder, finetuned with kl_f8_train. The encoder is
bit for bit the imported one, so latents stay what they were.

## Use

```python
from diffusers import AutoencoderKL
vae = AutoencoderKL.from_pretrained("diffusers")  # the folder beside this file
```

`{record["stem"]}.safetensors` and `.ckpt` hold the tensors under the original's names, for
ComfyUI (`models/vae`), AUTOMATIC1111 (`models/VAE`) and the original code.

## Training

| setting | value |
|---|---|
| iterations | {record["init_iteration"]} -> {iteration:,} |
| global batch, crop | {config.global_batch}, {config.data.crop} x {config.data.crop} |
| reconstruction loss | {loss.pixel} + {loss.perceptual_weight:g} {LABELS[loss.perceptual]} |
| adversarial loss | {adversarial} |
| learning rate | {config.optimizer.learning_rate:g}, Adam {config.optimizer.betas} |
| EMA decay | {config.ema.decay:g}; these are the {weights} |
| data | {sources} |

## Evaluation

Not measured here. `kl-f8-train evaluate {name}={record["stem"]}.safetensors --images FOLDER`
prints the card's table.

## Half precision

{precision}

## Checks made on these files

{checks}

| file | SHA-256 |
|---|---|
{files}

The license of these weights follows from the imported weights and the training data; state it
here before you publish.
"""
