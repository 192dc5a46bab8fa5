"""The frozen perceptual networks.

LPIPS (Zhang et al. 2018) on VGG16, from the `lpips` package, equals the original's to the last
bit. PSIM, the model card's metric, is half of its unweighted distance (SynSin's PNet).
ST-LPIPS (Ghildyal and Liu 2022) on AlexNet is the stand-in of demo and tests: its weights ship in
the `stlpips-pytorch` wheel. It is never called LPIPS.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kl_f8_train.core.hashes import tensors_sha256
from kl_f8_train.core.machine import autocast

LABELS = {"lpips_vgg": "LPIPS", "st_lpips_alex": "ST-LPIPS (stand-in, not LPIPS)"}
Distance = Callable[[Tensor, Tensor], Tensor]  # images, reconstructions -> (B, 1, 1, 1)
OTHER_VGG = "on a VGG16 that is not the published one"


class PerceptualDistance(nn.Module):
    """Weighted distance of unit-length features; frozen, always in eval mode."""

    def __init__(
        self,
        name: str,
        scaling: nn.Module,
        trunk: nn.Module,
        heads: Sequence[Tensor],
        sha256: str | None = None,
        published: bool = True,
    ) -> None:
        super().__init__()
        self.name = name
        self.sha256 = sha256  # of the trunk's tensors, whatever file they came in
        self.published = published  # whether these are the tensors that its authors published
        self.scaling = scaling
        self.trunk = trunk  # images -> sequence of feature maps
        self.heads = nn.ParameterList(head.detach().clone() for head in heads)  # (1, C, 1, 1)
        self.requires_grad_(False).eval()

    @property
    def label(self) -> str:
        """Its name for people; a network with other weights than the published ones says so."""
        if self.published:
            return LABELS[self.name]
        return f"{LABELS[self.name]} {OTHER_VGG}"

    def train(self, mode: bool = True) -> "PerceptualDistance":
        """Stays in eval mode: dropout in the heads would change the loss."""
        return super().train(False)

    def forward(
        self, images: Tensor, reconstructions: Tensor, precision: str = "float32"
    ) -> Tensor:
        """Both (B, 3, H, W) in [-1, 1] -> (B, 1, 1, 1). Only the second may need a gradient."""
        with torch.no_grad():
            targets = self.features(images, precision)
        features = self.features(reconstructions, precision)
        return self.weighted(squared_differences(targets, features))

    def features(self, images: Tensor, precision: str = "float32") -> list[Tensor]:
        """(B, 3, H, W) in [-1, 1] -> the layers' features, of unit length over channels.

        With "bfloat16" the convolutions run in it; lengths and distances never do.
        """
        exact = self.heads[0].dtype
        with autocast(precision, images.device):
            layers = self.trunk(self.scaling(images.to(exact)))
        with autocast("float32", images.device):
            return [unit_length(layer.to(exact)) for layer in layers]

    def weighted(self, squared: Sequence[Tensor]) -> Tensor:
        """Squared differences of features -> the distance, (B, 1, 1, 1)."""
        with autocast("float32", squared[0].device):
            layers = [
                weighted_sum(part, head).mean(dim=(2, 3), keepdim=True)
                for part, head in zip(squared, self.heads, strict=True)
            ]
        return torch.stack(layers).sum(dim=0)


def weighted_sum(squared: Tensor, head: Tensor) -> Tensor:
    """(B, C, H, W) and weights (1, C, 1, 1) -> (B, 1, H, W).

    Compiled, a plain sum, which never writes the squares to memory.
    """
    if torch.compiler.is_compiling():
        return (squared * head).sum(dim=1, keepdim=True)
    return F.conv2d(squared, head)


def distance_in_parts(network: Distance, x: Tensor, y: Tensor, parts: int) -> Tensor:
    """The distance of images and reconstructions, (B, 1, 1, 1), a part of the batch at a time.

    The gradient at the reconstructions is computed with it: what the network keeps for it is freed
    before the next part. A batch that does not divide into `parts` goes in one.
    """
    whole = parts == 1 or len(x) % parts
    distance: Tensor = network(x, y) if whole else _DistanceInParts.apply(network, x, y, parts)
    return distance


class _DistanceInParts(torch.autograd.Function):
    """Each image's distance depends on its own reconstruction alone, so the gradients separate."""

    @staticmethod
    def forward(ctx: Any, network: Distance, x: Tensor, y: Tensor, parts: int) -> Tensor:
        distances: list[Tensor] = []
        gradients: list[Tensor] = []
        for images, reconstructions in zip(x.chunk(parts), y.chunk(parts), strict=True):
            leaf = reconstructions.detach().requires_grad_()
            with torch.enable_grad():
                distance = network(images, leaf)
                gradients += torch.autograd.grad(distance, leaf, torch.ones_like(distance))
            distances.append(distance.detach())
        ctx.save_for_backward(torch.cat(gradients))  # (B, 3, H, W)
        return torch.cat(distances)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (of_y,) = ctx.saved_tensors
        return None, None, gradient * of_y, None


def squared_differences(targets: Sequence[Tensor], features: Sequence[Tensor]) -> list[Tensor]:
    """(target - feature)^2, a layer at a time."""
    return [(a - b).square() for a, b in zip(targets, features, strict=True)]


def unweighted(squared: Sequence[Tensor]) -> Tensor:
    """Half the distance without heads, (B,): the sum over layers of 1 - mean cosine similarity.

    PSIM, if the features are VGG16's.
    """
    return 0.5 * torch.stack([part.sum(dim=1).mean(dim=(1, 2)) for part in squared]).sum(dim=0)


def unit_length(features: Tensor) -> Tensor:
    """x / (|x| + 1e-10) over channels; zero with zero gradient where |x| = 0."""
    squares = features.square().sum(dim=1, keepdim=True)
    zero = squares == 0
    norm = squares.masked_fill(zero, 1.0).sqrt()
    return (features / (norm + 1e-10)).masked_fill(zero, 0.0)


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
            elif isinstance(layer, nn.Conv2d) and state:
                layer.weight.data.copy_(state[f"features.{index}.weight"])
                assert layer.bias is not None
                layer.bias.data.copy_(state[f"features.{index}.bias"])
    heads = [head.model[-1].weight for head in package.lins]
    digest = tensors_sha256(state)
    trunk = Slices(slices)
    return PerceptualDistance("lpips_vgg", package.scaling_layer, trunk, heads, digest, published)


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
    return PerceptualDistance("st_lpips_alex", scaling, Slices(slices), heads)


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
