"""Small real runs for the tests: photographs as shards, a tiny kl-f8 look-alike, a recipe."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import skimage.data
import torch
from torch.optim import Adam

from kl_f8_train import config, images
from kl_f8_train.core.discriminator import Discriminator, initialize
from kl_f8_train.core.model import AutoencoderKL
from kl_f8_train.core.step import Finetuner
from kl_f8_train.data.pack import pack
from kl_f8_train.run_dir import checkpoint_path
from kl_f8_train.settings import Config
from kl_f8_train.weights import checkpoint, weight_file

TINY = (
    "model.ch=32",
    "model.ch_mult=[1,1]",
    "model.norm_num_groups=32",
    "adversarial.ndf=16",
    "data.shorter_side=null",
    "optimizer.learning_rate=2e-4",
    "data.crop=32",
    "data.workers=0",
    "compute.devices=null",
    "global_batch=4",
    "adversarial.n_layers=2",
    "init.iteration=100",
    "log.every=1",
    "log.pictures_every=0",
)
NO_ADVERSARIAL = ("adversarial=null", "loss.pixel=mse", "loss.perceptual_weight=0.1")


def make_shards(folder: Path, size: int = 48) -> Path:
    """Tiles of two photographs that scikit-image ships, in shards of 20."""
    tiles = folder / "tiles"
    tiles.mkdir(parents=True)
    root = Path(skimage.data.__file__).parent
    for name in ("astronaut.png", "chelsea.png"):
        picture = images.decode((root / name).read_bytes())
        for top in range(0, 144, size):
            for left in range(0, 288, size):
                tile = picture[:, top : top + size, left : left + size]
                images.to_pil(tile).save(tiles / f"{name[:4]}-{top:03d}-{left:03d}.png")
    pack(tiles, folder / "shards", per_shard=20, workers=1)
    return folder / "shards"


def for_gpus_alone(expression: str) -> bool:
    """Whether a mark expression selects only tests marked `gpu`, by its words."""
    return " or " not in expression and "gpu" in expression.split(" and ")


def make_weights(
    path: Path, ch_mult: tuple[int, ...] = (1, 1), *, discriminator: bool = True, **shape: Any
) -> Path:
    """Seeded random weights in the original's checkpoint layout."""
    torch.manual_seed(0)
    model = AutoencoderKL(**{"ch": 32, "num_res_blocks": 1, **shape}, ch_mult=ch_mult)
    state = {**model.state_dict(), "loss.logvar": torch.zeros(())}
    if discriminator:
        critic = Discriminator(16, 2) if shape.get("ch", 32) == 32 else Discriminator()
        initialize(critic, seed=1)
        state |= {f"loss.discriminator.{k}": v for k, v in critic.state_dict().items()}
    weight_file.write_torch(path, {"state_dict": state, "global_step": 100})
    return path


def save(
    finetuner: Finetuner, adams: list[Adam], run_dir: Path, frozen: str, path: Path | None = None
) -> Path:
    """Writes a checkpoint of the state as it is, as a run does, to its regular place or `path`."""
    path = path or checkpoint_path(run_dir, finetuner.iteration, finetuner.warmup_done)
    state = checkpoint.snapshot(finetuner, adams, frozen, checkpoint.HostMemory())
    return checkpoint.write(state, path)


def overrides(folder: Path, run: str, *extra: str) -> list[str]:
    """The settings of a tiny run named `run` below `folder`."""
    return [
        *TINY,
        f"data.sources={folder / 'shards'}",
        f"init.weights={folder / 'model.ckpt'}",
        f"run_dir={folder / run}",
        *extra,
    ]


def recipe(folder: Path, run: str, *extra: str) -> Config:
    """The configuration of a tiny run."""
    return config.load(config.find_recipe("demo"), overrides(folder, run, *extra))


def start(
    folder: Path, run: str, *extra: str, launcher: tuple[str, ...] = ()
) -> subprocess.Popen[str]:
    """`kl-f8-train train demo ...` as a real process."""
    launch = launcher or (sys.executable,)
    command = [*launch, "-m", "kl_f8_train", "train", "demo", *overrides(folder, run, *extra)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        bufsize=1,
        start_new_session=True,
    )


def final_state(folder: Path, run: str) -> weight_file.Contents:
    """The newest checkpoint of a run."""
    return weight_file.read(folder / run)


def assert_same_state(a: weight_file.Contents, b: weight_file.Contents) -> None:
    """Bit for bit: weights, EMA, discriminator with buffers, both optimizers, iteration."""
    assert a.tensors.keys() == b.tensors.keys()
    different = [key for key in a.tensors if not torch.equal(a.tensors[key], b.tensors[key])]
    assert not different
    for key in ("iteration", "ema_updates", "frozen_sha256"):
        assert a.metadata[key] == b.metadata[key]
