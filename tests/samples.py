"""Small inputs for the tests: recipes, photographs, shards, networks."""

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from kl_f8_train import config
from kl_f8_train.core.discriminator import Discriminator
from kl_f8_train.core.model import AutoencoderKL
from kl_f8_train.data.pack import pack
from kl_f8_train.settings import Config

CONFIGS = Path(__file__).parents[1] / "configs"
YOURS = ("run_dir=runs/x", "init.weights=model.ckpt", "data.sources=/data/photos")
TINY = {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "z_channels": 4, "embed_dim": 4}
FULL = {"ch": 128, "ch_mult": (1, 2, 4, 4), "num_res_blocks": 2, "z_channels": 4, "embed_dim": 4}
TENSORS = {
    "a": torch.arange(3000, dtype=torch.float32).reshape(3, 1000),
    "b.half": torch.linspace(-1, 1, 500).half(),
    "b.bfloat": torch.linspace(-1, 1, 500).bfloat16(),
    "c.count": torch.tensor(7),
    "c.flags": torch.tensor([True, False]),
}


def recipe(name: str = "ft_ema", *overrides: str) -> Config:
    """A shipped recipe with what it leaves to the user filled in."""
    return config.load(CONFIGS / f"{name}.yaml", [*YOURS, *overrides])


def data_config(folders: dict[str, Path], *overrides: str) -> Config:
    """A configuration for small shards: 8 images an iteration, 48 x 48 crops, 6 x 6 latents."""
    sources = ",".join(str(folder) for folder in folders.values())
    fixed = (
        f"data.sources={sources}",
        "data.crop=48",
        "data.shorter_side=null",
        "data.lanes=48",
        "model.ch_mult=1,2,2,2",
        "model.embed_dim=4",
        "global_batch=8",
        "second_forward=false",
        "seed=0",
    )
    settings = config.load(CONFIGS / "demo.yaml", [*fixed, *overrides])
    assert list(settings.data.sources) == list(folders)
    return settings


def noise_picture(seed: int, height: int = 56, width: int = 64) -> np.ndarray:
    """uint8 (height, width, 3): smooth random colours with some grain."""
    random = np.random.RandomState(seed)
    coarse = Image.fromarray(random.randint(0, 256, (6, 7, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float64)
    return (smooth + random.normal(0, 6, smooth.shape)).round().clip(0, 255).astype(np.uint8)


def photograph(name: str) -> np.ndarray:
    """A real photograph that ships with scikit-image, uint8 (height, width, 3)."""
    import skimage

    return np.asarray(Image.open(Path(skimage.__file__).parent / "data" / f"{name}.png"))


def encode(picture: np.ndarray | Image.Image, kind: str = "JPEG", **options) -> bytes:
    """The picture as the bytes of an image file."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    """A tar file with these members, in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def packed(folder: Path, count: int, per_shard: int, first_seed: int = 0) -> list[Path]:
    """`count` JPEGs in WebDataset shards below `folder`, packed as `kl-f8-train pack` does."""
    originals = folder.with_name(f"{folder.name}_originals")
    originals.mkdir(parents=True)
    for number in range(count):
        data = encode(noise_picture(first_seed + number), quality=95)
        (originals / f"{number:04d}.jpg").write_bytes(data)
    pack(originals, folder, per_shard=per_shard, workers=1)
    return sorted(folder.glob("*.tar"))


def tiny_vae(seed: int = 0) -> AutoencoderKL:
    """A random autoencoder of a second's work: 2 x smaller latents."""
    torch.manual_seed(seed)
    return AutoencoderKL(**TINY).eval().requires_grad_(False)


def meta_vae(**shape) -> AutoencoderKL:
    """An autoencoder without memory: names and shapes alone."""
    with torch.device("meta"):
        return AutoencoderKL(**shape)


def peak_growth(job: str, *paths: Path) -> float:
    """MiB by which a process' peak memory grows in `job(*paths)`; `job` is an import (Linux)."""
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        f"{job}\n"
        "status = Path('/proc/self/status')\n"
        "lines = lambda: status.read_text().splitlines()\n"
        "peak = lambda: next(int(x.split()[1]) for x in lines() if x.startswith('VmHWM'))\n"
        "before = peak()\n"
        "job(*map(Path, sys.argv[1:]))\n"
        "print((peak() - before) / 1024)\n"
    )
    command = [sys.executable, "-c", program, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def save_zip(content: object, path: Path) -> Path:
    """torch's format since 1.6."""
    torch.save(content, path)
    return path


def save_legacy(content: object, path: Path) -> Path:
    """torch's format before 1.6."""
    torch.save(content, path, _use_new_zipfile_serialization=False)
    return path


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Same names, types and values."""
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one
    )


def load_discriminator(golden, ndf):
    """The reference discriminator of one width, in float64."""
    model = Discriminator(ndf=ndf).double()
    model.load_state_dict(golden.weights(f"ndf{ndf}"))
    return model
