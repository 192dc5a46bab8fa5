"""What bfloat16 does to latents: python tests/benchmarks/bfloat16_latents.py VAE [IMAGES].

Moments and a sample of them under autocast against float32, and the pictures that a float32 decoder
makes of both samples. `before` rounds moments and latents as convolutions under autocast would.
"""

import sys
from pathlib import Path

import skimage.data
import torch
from torch import Tensor, nn

from kl_f8_train import images, load_autoencoder
from kl_f8_train.core.model import ExactConv2d


def rounded(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.bfloat16()


@torch.no_grad()
def main(vae: str, folder: str | None = None) -> None:
    model = load_autoencoder(vae)
    root = Path(folder) if folder else Path(skimage.data.__file__).parent
    names = sorted(root.iterdir()) if folder else [root / f"{n}.png" for n in ("coffee", "chelsea")]
    x = torch.stack(
        [images.to_float(images.squares(path.read_bytes(), [256])[0]) for path in names]
    )
    noise = torch.randn(model.encode(x[:1]).mean.shape, generator=torch.Generator().manual_seed(0))
    exact = model.encode(x)
    z = exact.sample(noise)
    for when in ("before", "after"):
        hooks = [
            module.register_forward_hook(rounded)
            for module in (model.encoder.conv_out, model.quant_conv)
            if when == "before" and isinstance(module, ExactConv2d)
        ]
        with torch.autocast("cpu", torch.bfloat16):
            posterior = model.encode(x)
        rough = posterior.sample(noise)
        entering = rough.bfloat16().float() if when == "before" else rough.float()
        deviation = (0.5 * exact.logvar).exp()
        share = (((entering - z) / deviation).square().mean()).sqrt()
        own = posterior.mean.float() + (0.5 * posterior.logvar.float()).exp() * noise
        only_rounding = (((entering - own) / deviation).square().mean()).sqrt()
        error = (model.decode(entering) - model.decode(z)).square().mean() / 4
        print(
            f"{when}: moments {posterior.mean.dtype}; latents off by {share:.1%} of the "
            f"posterior's deviation, {only_rounding:.1%} by their own rounding; pictures at "
            f"{-10 * torch.log10(error):.1f} dB from float32's"
        )
        for hook in hooks:
            hook.remove()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
