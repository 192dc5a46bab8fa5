"""The frozen perceptual networks, and where their weights are found.

LPIPS (Zhang et al. 2018) on VGG16, from the `lpips` package, equals the original's to the last
bit. PSIM, the model card's metric, is half of its unweighted distance (SynSin's PNet).
ST-LPIPS (Ghildyal and Liu 2022) on AlexNet is the stand-in of demo and tests: its weights ship in
the `stlpips-pytorch` wheel. It is never called LPIPS.
"""

import hashlib
import importlib.util
import urllib.error
import urllib.request
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kl_f8_train import checkpoint
from kl_f8_train.errors import MissingInputError, RunFailedError

VGG_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
VGG_SHA256_PREFIX = "397923af"  # torchvision names its files by the start of their SHA-256
VGG_FILE = "vgg16_features.safetensors"
LABELS = {"lpips_vgg": "LPIPS", "st_lpips_alex": "ST-LPIPS (stand-in, not LPIPS)"}


class PerceptualDistance(nn.Module):
    """Weighted distance of unit-length features; frozen, always in eval mode, never in bfloat16."""

    def __init__(self, name: str, scaling: nn.Module, trunk: nn.Module, heads: Sequence[Tensor]):
        super().__init__()
        self.name = name
        self.scaling = scaling
        self.trunk = trunk  # images -> sequence of feature maps
        self.heads = nn.ParameterList(head.detach().clone() for head in heads)  # (1, C, 1, 1)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "PerceptualDistance":
        """Stays in eval mode: dropout in the heads would change the loss."""
        return super().train(False)

    def forward(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        """Both (B, 3, H, W) in [-1, 1] -> (B, 1, 1, 1). Only the second may need a gradient."""
        squared = self._squared_differences(images, reconstructions)
        with torch.autocast(images.device.type, enabled=False):
            layers = [
                F.conv2d(part, head).mean(dim=(2, 3), keepdim=True)
                for part, head in zip(squared, self.heads, strict=True)
            ]
        return torch.stack(layers).sum(dim=0)

    def unweighted(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        """Half the distance without the heads, (B,): PSIM, if the trunk is VGG16."""
        squared = self._squared_differences(images, reconstructions)
        return 0.5 * torch.stack([part.sum(dim=1).mean(dim=(1, 2)) for part in squared]).sum(dim=0)

    def _squared_differences(self, images: Tensor, reconstructions: Tensor) -> list[Tensor]:
        dtype = self.heads[0].dtype
        with torch.autocast(images.device.type, enabled=False):
            with torch.no_grad():
                targets = [unit_length(f) for f in self.trunk(self.scaling(images.to(dtype)))]
            features = self.trunk(self.scaling(reconstructions.to(dtype)))
            return [
                (target - unit_length(feature)).square()
                for target, feature in zip(targets, features, strict=True)
            ]


def unit_length(features: Tensor) -> Tensor:
    """x / (|x| + 1e-10) over channels; zero with zero gradient where |x| = 0."""
    squares = features.square().sum(dim=1, keepdim=True)
    zero = squares == 0
    norm = squares.masked_fill(zero, 1.0).sqrt()
    return (features / (norm + 1e-10)).masked_fill(zero, 0.0)


def build(name: str, weights: str | None = None) -> PerceptualDistance:
    """The network called "lpips_vgg" or "st_lpips_alex", with its weights.

    Raises MissingInputError with the remedy if they are not on this machine.
    """
    return lpips_vgg(find_vgg(weights)) if name == "lpips_vgg" else st_lpips_alex()


# --- LPIPS on VGG16 -------------------------------------------------------------------------


def lpips_vgg(path: Path | None) -> PerceptualDistance:
    """LPIPS 0.1 with the VGG16 features of a file (keys `features.0.weight`, ...).

    Without a file its weights are random: of use for timing only.
    """
    import lpips

    state = _vgg_features(path) if path is not None else {}
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
    return PerceptualDistance("lpips_vgg", package.scaling_layer, Slices(slices), heads)


def find_vgg(explicit: str | None = None) -> Path:
    """The VGG16 file: as given, in our cache, or in torch hub's.

    Raises MissingInputError saying how to get it.
    """
    hub = Path(torch.hub.get_dir()) / "checkpoints" / "vgg16-397923af.pth"
    candidates = [Path(explicit)] if explicit else [checkpoint.cache_dir() / VGG_FILE, hub]
    for path in candidates:
        if path.is_file():
            return path
    looked = "\n  ".join(str(path) for path in candidates)
    raise MissingInputError(
        f"LPIPS needs VGG16's features, and there is no file at\n  {looked}\n"
        "Run `kl-f8-train fetch` once on a machine with network, or name the file with "
        "loss.perceptual_weights=PATH"
    )


def fetch_vgg(url: str = VGG_URL, sha256_prefix: str = VGG_SHA256_PREFIX) -> Path:
    """Downloads torchvision's VGG16 (553 MB), checks it, keeps the features (59 MB).

    Raises RunFailedError if the network or the checksum fails.
    """
    target = checkpoint.cache_dir() / VGG_FILE
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with checkpoint.atomic_path(target.with_name("vgg16.pth")) as temporary:
        digest = _download(url, temporary)
        if not digest.startswith(sha256_prefix):
            raise RunFailedError(
                f"{url}: SHA-256 starts with {digest[:8]}, expected {sha256_prefix}; not kept"
            )
        state = {
            key: value
            for key, value in checkpoint.read(temporary).tensors.items()
            if key.startswith("features.")
        }
        checkpoint.write_safetensors(target, state, {"source": url, "source_sha256": digest})
    target.with_name("vgg16.pth").unlink()
    return target


def _download(url: str, path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with urllib.request.urlopen(url, timeout=20) as response, path.open("wb") as file:
            while block := response.read(1 << 20):
                file.write(block)
                digest.update(block)
    except (urllib.error.URLError, TimeoutError) as error:
        raise RunFailedError(
            f"cannot fetch {url}: {error}\nCopy the file to {checkpoint.cache_dir()} from another "
            "machine, or name it with loss.perceptual_weights=PATH"
        ) from error
    return digest.hexdigest()


def _vgg_features(path: Path) -> dict[str, Tensor]:
    state = checkpoint.read(path).tensors
    shape = tuple(state["features.0.weight"].shape) if "features.0.weight" in state else None
    if shape != (64, 3, 3, 3) or "features.28.weight" not in state:
        raise MissingInputError(
            f"{path} does not hold VGG16's features (features.0 to features.28)"
        )
    return state


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


def st_lpips_alex() -> PerceptualDistance:
    """The shift-tolerant AlexNet variant, with the weights of the stlpips-pytorch wheel."""
    state = checkpoint.read(_st_lpips_file()).tensors
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


def _st_lpips_file() -> Path:
    spec = importlib.util.find_spec("stlpips_pytorch")
    if spec is None or not spec.submodule_search_locations:
        raise MissingInputError(
            "the stand-in ST-LPIPS needs the stlpips-pytorch wheel: pip install 'kl-f8-train[demo]'"
        )
    root = Path(next(iter(spec.submodule_search_locations)))
    return root / "weights" / "vST0.0" / "alex_shift_tolerant.pth"
