"""Networks that others published: where their weights are on this machine, or how they get there.

VGG16 (torchvision) is in LPIPS and PSIM, Inception (TensorFlow's of 2015-12-05, converted by
torch-fidelity) in rFID. A file is kept in `files.cache_dir()`, as safetensors.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kl_f8_train import transfer
from kl_f8_train.core.hashes import tensors_sha256
from kl_f8_train.core.losses import PerceptualDistance
from kl_f8_train.core.perceptual import LABELS, lpips_vgg, st_lpips_alex
from kl_f8_train.errors import MissingInputError, RunFailedError, UsageError
from kl_f8_train.files import cache_dir, check_writable, file_sha256, hidden_beside, one_at_a_time
from kl_f8_train.weights import weight_file


@dataclass(frozen=True)
class Network:
    """One file of weights, and what is kept of it."""

    title: str
    url: str
    sha256_prefix: str  # publishers name their files by the start of their SHA-256
    file: str  # in our cache
    hub_files: tuple[str, ...]  # in torch hub's
    keys: str  # the start of the keys that are kept
    flag: str  # how `evaluate` names the file instead
    package: str = ""  # without which the file is of no use


VGG16 = Network(
    title="VGG16's features",
    url="https://download.pytorch.org/models/vgg16-397923af.pth",
    sha256_prefix="397923af",
    file="vgg16_features.safetensors",
    hub_files=("vgg16-397923af.pth",),
    keys="features.",
    flag="--vgg FILE",
)
INCEPTION = Network(
    title="Inception of 2015-12-05",
    url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth",
    sha256_prefix="6726825d",
    file="inception-2015-12-05.safetensors",
    hub_files=(
        "weights-inception-2015-12-05-6726825d.pth",
        "pt_inception-2015-12-05-6726825d.pth",  # the same file, as pytorch-fid names it
    ),
    keys="",
    flag="--inception FILE",
    package="torch-fidelity",
)
SETTING = "loss.perceptual_weights=FILE"  # how a recipe names VGG16's file
NETWORKS = {"vgg": VGG16, "inception": INCEPTION}


def find(network: Network, explicit: str | None = None, flag: str | None = None) -> Path:
    """The file of a network: as given (by `flag`), in our cache, or in torch hub's.

    Raises MissingInputError saying where it looked and how to get it.
    """
    hub = Path(torch.hub.get_dir()) / "checkpoints"
    places = [cache_dir() / network.file, *(hub / name for name in network.hub_files)]
    candidates = [Path(explicit)] if explicit else places
    for path in candidates:
        if path.is_file():
            return path
    absent = network.package and not importlib.util.find_spec(network.package.replace("-", "_"))
    install = f", and `pip install {network.package}` (the extra eval)" if absent else ""
    looked = "\n  ".join(str(path) for path in candidates)
    raise MissingInputError(
        f"{network.title} not found; run `kl-f8-train fetch` once{install}. "
        f"Looked for:\n  {looked}\n"
        "Without a network, fetch on another machine and copy the file, or name it: "
        f"{flag or network.flag}"
    )


def fetch(network: Network, url: str | None = None, **patience: Any) -> Path:
    """Downloads a network once, checks its SHA-256 and keeps it in our cache.

    Of several processes on a node one downloads; the others wait and find the file. `patience` is
    that of `transfer.fetch`. Raises MissingInputError if the address has no such file,
    RunFailedError if the network, the checksum or the disk fails; then nothing is kept.
    """
    url = url or network.url
    target = cache_dir() / network.file
    check_writable(target.parent)
    with one_at_a_time(target.parent):
        if not target.is_file():
            download = hidden_beside(target, "download")
            try:
                transfer.fetch(url, download, **patience)
                _keep(network, url, download, target)
            finally:
                download.unlink(missing_ok=True)
    return target


def _keep(network: Network, url: str, download: Path, target: Path) -> None:
    digest = file_sha256(download)
    if not digest.startswith(network.sha256_prefix):
        raise RunFailedError(
            f"{url}: SHA-256 starts with {digest[:8]}, expected {network.sha256_prefix} "
            f"({download.stat().st_size:,} bytes came); not kept. Try again, or another address "
            "with --url"
        )
    tensors = weight_file.read(download).tensors
    kept: dict[str, Tensor] = {k: v for k, v in tensors.items() if k.startswith(network.keys)}
    note = {"source": url, "source_sha256": digest, "tensors_sha256": tensors_sha256(kept)}
    weight_file.write_safetensors(target, kept, note)


def is_published(network: Network, contents: weight_file.Contents) -> bool:
    """Whether a file holds a network's published tensors.

    A torch file is the download itself, known by its SHA-256. A safetensors file is known by what
    `fetch` wrote into it: the download's SHA-256, and that of the tensors it kept.
    """
    if contents.container != "safetensors":
        return file_sha256(contents.path).startswith(network.sha256_prefix)
    note = contents.metadata
    if not note.get("source_sha256", "").startswith(network.sha256_prefix):
        return False
    kept = note.get("tensors_sha256")  # files of earlier versions do not have it
    return kept is None or kept == tensors_sha256(contents.tensors)


# --- the perceptual networks ----------------------------------------------------------------


def build(name: str, weights: str | None = None, flag: str = SETTING) -> PerceptualDistance:
    """The network called "lpips_vgg" or "st_lpips_alex": frozen, float32, on the CPU.

    It takes images and reconstructions, both (B, 3, H, W) in [-1, 1], to distances (B, 1, 1, 1).
    `weights` is a file of VGG16; None looks where `kl-f8-train fetch` and torch.hub keep theirs.
    Raises UsageError for another name, MissingInputError with the remedy, `flag` among them, if
    the weights are not on this machine.
    """
    if name == "lpips_vgg":
        return lpips_vgg(*vgg_features(find(VGG16, weights, flag)))
    if name not in LABELS:
        raise UsageError(f"perceptual network {name!r}: expected {' or '.join(LABELS)}")
    return st_lpips_alex(weight_file.read(_st_lpips_file()).tensors)


def vgg_features(path: Path) -> tuple[dict[str, Tensor], bool]:
    """The tensors of VGG16's convolutions, and whether they are the published ones."""
    contents = weight_file.read(path)
    state = {key: value for key, value in contents.tensors.items() if key.startswith("features.")}
    shape = tuple(state["features.0.weight"].shape) if "features.0.weight" in state else None
    if shape != (64, 3, 3, 3) or "features.28.weight" not in state:
        raise MissingInputError(
            f"{path} does not hold VGG16's features (features.0 to features.28); "
            "`kl-f8-train fetch vgg` gets them"
        )
    return state, is_published(VGG16, contents)


def _st_lpips_file() -> Path:
    spec = importlib.util.find_spec("stlpips_pytorch")
    if spec is None or not spec.submodule_search_locations:
        raise MissingInputError(
            "the stand-in ST-LPIPS needs the stlpips-pytorch package: pip install stlpips-pytorch"
        )
    root = Path(next(iter(spec.submodule_search_locations)))
    return root / "weights" / "vST0.0" / "alex_shift_tolerant.pth"
