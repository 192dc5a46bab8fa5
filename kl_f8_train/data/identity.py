"""The inputs of a run besides its recipe: the data, the perceptual network, the versions.

An identity maps a name to a short string: `perceptual`, `torch`, `cuda`, `kl_f8_train`, and
`data.NAME` for each source. Every checkpoint holds one. On resume it is compared with today's
inputs, and at the start of a run between the ranks.
"""

import hashlib
from collections.abc import Mapping

import torch

from kl_f8_train import __version__, units
from kl_f8_train.core.hashes import tensors_sha256
from kl_f8_train.core.losses import PerceptualDistance
from kl_f8_train.data.sources import ImageSource
from kl_f8_train.units import counted

Identity = dict[str, str]


def of_program(network: PerceptualDistance) -> Identity:
    """The perceptual network, hashed over all its tensors, and the versions in use."""
    digest = tensors_sha256(network.state_dict())
    return {
        "perceptual": f"{network.label}, SHA-256 {digest[:16]}",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "kl_f8_train": __version__,
    }


def network_label(identity: Mapping[str, str]) -> str:
    """The perceptual network's name for people, without its hash."""
    return identity.get("perceptual", "").partition(", SHA-256")[0]


def of_data(sources: Mapping[str, ImageSource]) -> Identity:
    """One entry for each source, of the names, sizes and numbers of images of all its files.

    Neither where they lie nor when they were written: a copy elsewhere is the same data.
    """
    return {f"data.{name}": _of_source(source) for name, source in sources.items()}


def _of_source(source: ImageSource) -> str:
    digest, files, total = hashlib.sha256(), 0, 0
    for name, size, count in source.files_held():
        # Sizes in place of contents: hashing terabytes at every start would take hours.
        digest.update(f"{name}\0{size}\0{count}\n".encode(errors="surrogateescape"))
        files, total = files + 1, total + size
    return (
        f"{int(source.counts.sum()):,} images in {counted(files, 'file', 's')} of "
        f"{units.size(total)}, SHA-256 {digest.hexdigest()[:16]}"
    )


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Lines `name: before -> now`; what an older checkpoint does not hold is not compared."""
    lines = []
    for name, value in now.items():
        if before.get(name, value) != value:
            lines.append(f"{name}: {before[name]} -> {value}")
    # A source that was renamed: the plan draws by its name, so the same images come in another
    # order.
    former = {value: name for name, value in before.items() if name not in now}
    for name, value in now.items():
        if name.startswith("data.") and name not in before and value in former:
            lines.append(
                f"{former[value]} -> {name}: the same images under another name of the source, by "
                "which their order is drawn: it changes"
            )
    return lines
