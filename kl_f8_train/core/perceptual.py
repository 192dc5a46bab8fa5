"""The frozen perceptual networks.

LPIPS (Zhang et al. 2018) on VGG16, from the `lpips` package, equals the original's to the last
bit. PSIM, the model card's metric, is half of its unweighted distance (SynSin's PNet).
ST-LPIPS (Ghildyal and Liu 2022) on AlexNet is the stand-in of demo and tests: its weights ship in
the `stlpips-pytorch` wheel. It is never called LPIPS.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kl_f8_train.core.hashes import tensors_sha256
from kl_f8_train.core.losses import PerceptualDistance

LABELS = {"lpips_vgg": "LPIPS", "st_lpips_alex": "ST-LPIPS (stand-in, not LPIPS)"}
OTHER_VGG = "on a VGG16 that is not the published one"


# --- LPIPS on VGG16 -------------------------------------------------------------------------


def lpips_vgg(state: Mapping[str, Tensor], published: bool = False) -> PerceptualDistance:
    """LPIPS 0.1 with VGG16's features (keys `features.0.weight` to `features.28.bias`).

    `published`: whether they are the published ones. Without tensors its weights are random: of
    use for timing only.
    """
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision deprecates `pretrained=`
        package = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    slices = [getattr(package.net, f"slice{i}") for i in range(1, 6)]
    for part in slices:
        for index, layer in part.named_children():
            if isinstance(layer, nn.ReLU):
                layer.inplace = False  # inplace would overwrite what the backward pass needs
            elif isinstance(layer, nn.MaxPool2d):
                setattr(part, index, Halving())
            elif isinstance(layer, nn.Conv2d) and state:
                layer.weight.data.copy_(state[f"features.{index}.weight"])
                assert layer.bias is not None
                layer.bias.data.copy_(state[f"features.{index}.bias"])
    heads = [head.model[-1].weight for head in package.lins]
    digest = tensors_sha256(state)
    label = LABELS["lpips_vgg"] if published else f"{LABELS['lpips_vgg']} {OTHER_VGG}"
    trunk = Slices(slices)
    return PerceptualDistance(
        "lpips_vgg", package.scaling_layer, trunk, heads, label, digest, published
    )


class Slices(nn.Module):
    """Runs parts in a row and returns the output of each."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = []
        for part in self.parts:
            x = part(x)
            outputs.append(x)
        return outputs


class Halving(nn.Module):
    """The largest of each 2x2 pixels: (B, C, H, W) -> (B, C, H // 2, W // 2)."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and x.shape[2] % 2 == x.shape[3] % 2 == 0:
            halved: Tensor = _FusedHalving.apply(x)
            return halved
        return F.max_pool2d(x, 2)


class _FusedHalving(torch.autograd.Function):
    """The same, with a gradient that is read where it goes: the compiler's own is scattered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        cells = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(3, 5, 0, 1, 2, 4)
        halved = F.max_pool2d(x, 2)
        # Which of the four is the largest, the first of equal ones: 0 to 3.
        first, second, third, _ = (part == halved for part in cells.flatten(0, 1))
        place = torch.where(third, 2, 3)
        ctx.save_for_backward(torch.where(first, 0, torch.where(second, 1, place)).to(torch.int8))
        return halved

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (place,) = ctx.saved_tensors
        rows, columns = (torch.arange(2 * n, device=place.device) for n in place.shape[2:])
        rows = rows[:, None]
        chosen = place[:, :, rows // 2, columns // 2] == 2 * (rows % 2) + columns % 2
        return torch.where(chosen, gradient[:, :, rows // 2, columns // 2], 0.0)


# --- ST-LPIPS on AlexNet, the stand-in -------------------------------------------------------


def st_lpips_alex(state: Mapping[str, Tensor]) -> PerceptualDistance:
    """The shift-tolerant AlexNet variant, with the tensors of the stlpips-pytorch wheel."""
    blur = iter([value for key, value in state.items() if key.endswith(".filt")])
    slices = [
        nn.Sequential(nn.Conv2d(3, 64, 11, padding=2), Blur(next(blur)), nn.ReLU()),
        nn.Sequential(
            nn.MaxPool2d(3, 1), Blur(next(blur)), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU()
        ),
        nn.Sequential(
            nn.MaxPool2d(3, 1), Blur(next(blur)), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()
        ),
        nn.Sequential(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
    ]
    weights = [key for key in state if key.startswith("net.") and key.endswith(".weight")]
    convolutions = [m for part in slices for m in part if isinstance(m, nn.Conv2d)]
    for layer, key in zip(convolutions, weights, strict=True):
        assert layer.bias is not None
        layer.weight.data.copy_(state[key])
        layer.bias.data.copy_(state[key.replace(".weight", ".bias")])
    heads = [state[f"lin{i}.model.1.weight"] for i in range(5)]
    scaling = Scaling(state["scaling_layer.shift"], state["scaling_layer.scale"])
    name = "st_lpips_alex"
    return PerceptualDistance(name, scaling, Slices(slices), heads, LABELS[name])


class Scaling(nn.Module):
    """(x - shift) / scale: from [-1, 1] to ImageNet's statistics."""

    shift: Tensor
    scale: Tensor

    def __init__(self, shift: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("shift", shift)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.shift) / self.scale


class Blur(nn.Module):
    """Halves the resolution behind a 3x3 binomial filter, with two reflected pixels around."""

    kernel: Tensor

    def __init__(self, kernel: Tensor) -> None:
        super().__init__()
        self.register_buffer("kernel", kernel)

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (2, 2, 2, 2), mode="reflect")
        return F.conv2d(padded, self.kernel, stride=2, groups=x.shape[1])
