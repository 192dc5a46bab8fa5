"""Reference results of the original code, the tiny networks they belong to, and a tiny recipe.

Parity is checked in float64: in float32 one sign flip of a LeakyReLU moves a gradient by 1 %.

Tests are for CPUs: GPUs are hidden from them and from the processes they start. Tests marked `gpu`
are for GPUs; `pytest -m gpu` runs them alone, and skips them where there is none.
"""

import os

# One thread a process: equal sums in every run that is compared, and several runs at once do not
# wait for each other's threads. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hashlib
import io
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from safetensors.torch import save_file
from samples import load_discriminator
from torch import Tensor, nn

from kl_f8_train import config
from kl_f8_train.core import perceptual
from kl_f8_train.core.batch import Batch
from kl_f8_train.core.model import AutoencoderKL
from kl_f8_train.core.step import Finetuner
from kl_f8_train.settings import Config
from kl_f8_train.weights import pretrained

# What nohup and a shell's & ignore is inherited, and the runs of the tests are sent these.
for _ignored in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(_ignored) == signal.SIG_IGN:
        signal.signal(_ignored, signal.SIG_DFL)

GOLDEN = Path(__file__).parent / "golden"
RECIPES = Path(__file__).parents[1] / "configs"
TINY = [
    *("run_dir=run", "init.weights=tiny.safetensors", "init.iteration=0", "data.sources=a.tar"),
    *("model.ch=32", "data.crop=64", "data.shorter_side=null"),
    *("global_batch=2", "precision=float32", "optimizer.learning_rate=9e-6"),
]


def pytest_configure(config: pytest.Config) -> None:
    """Hides the GPUs unless `-m` selects tests for them alone; CUDA has not been started yet."""
    if not runs.for_gpus_alone(config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips a test for GPUs where none can be seen."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU, and `pytest -m gpu`")


class Golden:
    """Tensors (`tensor`), their tolerances (`check`) and plain facts (`facts`)."""

    def __init__(self) -> None:
        self.facts = json.loads((GOLDEN / "facts.json").read_text())
        self._tensors = np.load(GOLDEN / "tensors.npz")
        weights = np.load(GOLDEN / "weights.npz")
        self._weights = {key: torch.from_numpy(weights[key]) for key in weights.files}

    def tensor(self, name: str) -> Tensor:
        """In float64."""
        return torch.from_numpy(self._tensors[name]).double()

    def check(self, actual: Tensor, name: str) -> None:
        """Asserts that `actual` is within the tolerance stored with `name`."""
        assert actual.dtype == torch.float64
        atol = self.facts["tolerances"][name]
        torch.testing.assert_close(actual, self.tensor(name), rtol=0, atol=atol, msg=_named(name))

    def weights(self, part: str) -> dict[str, Tensor]:
        """State dict of `autoencoder`, `ndf64` or `ndf16`, in float64."""
        prefix = f"{part}/"
        return {
            key.removeprefix(prefix): value.double() if value.is_floating_point() else value
            for key, value in self._weights.items()
            if key.startswith(prefix)
        }


def _named(name):
    return lambda text: f"{name}: {text}"


@pytest.fixture(scope="session")
def golden():
    return Golden()


@pytest.fixture
def autoencoder(golden):
    """A fresh tiny AutoencoderKL (ch 32) with the reference weights, in float64."""
    model = AutoencoderKL(ch=32).double()
    model.load_state_dict(golden.weights("autoencoder"))
    return model


@pytest.fixture
def discriminator(golden):
    """A fresh Discriminator (ndf 64) with the reference weights, in float64."""
    return load_discriminator(golden, 64)


class StandInDistance(nn.Module):
    """The references' perceptual network: squared differences of three tanh layers."""

    def __init__(self, golden: Golden) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for index, (inputs, outputs) in enumerate([(3, 8), (8, 16), (16, 16)]):
            layer = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1).double()
            layer.weight.data = golden.tensor(f"loss/standin.{index}.weight")
            layer.bias.data = golden.tensor(f"loss/standin.{index}.bias")
            self.layers.append(layer)
        self.requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        total = 0.0
        for layer in self.layers:
            x, y = layer(x).tanh(), layer(y).tanh()
            total = total + 0.125 * (x - y).square().mean(dim=(1, 2, 3), keepdim=True)
        return total  # (B, 1, 1, 1)


@pytest.fixture(scope="session")
def standin(golden):
    return StandInDistance(golden)


@pytest.fixture(scope="session")
def vgg_file(golden, tmp_path_factory):
    """VGG16's features by formula: 14.7 million weights that nobody has to store."""
    state, digest = {}, hashlib.sha256()
    for key, shape in sorted(golden.facts["vgg_shapes"].items()):
        scale = np.sqrt(6 / (shape[1] * 9)) if key.endswith("weight") else 0.05
        values = scale * _unit(f"golden/vgg16/{key}", shape)
        values = values.astype(np.float32).astype(np.float16).astype(np.float32)
        state[key] = torch.from_numpy(values)
        digest.update(f"{key}{values.shape}".encode() + values.tobytes())
    assert digest.hexdigest() == golden.facts["vgg_sha256"]
    path = tmp_path_factory.mktemp("vgg") / "vgg16_features.safetensors"
    save_file(state, path)
    return path


def _unit(name, shape):
    """Multiples of 2**-23 in [-1, 1): splitmix64, counting up from the name's SHA-256."""
    base = np.uint64(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))
    z = base + np.arange(1, np.prod(shape) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return ((z >> np.uint64(40)).astype(np.float64) / 2**23 - 1).reshape(shape)


@pytest.fixture(scope="session")
def vgg(vgg_file):
    """LPIPS on that VGG16, in float64."""
    return perceptual.lpips_vgg(*pretrained.vgg_features(vgg_file)).double()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shards and weights that the tiny runs of a file share, and a place for them."""
    folder = tmp_path_factory.mktemp("runs")
    runs.make_shards(folder)
    runs.make_weights(folder / "model.ckpt")
    return folder


@pytest.fixture
def tiny():
    """tiny(recipe, *overrides) -> Config: a shipped recipe for the tiny network, batch 2."""

    def build(recipe: str = "ft_ema", *overrides: str) -> Config:
        return config.load(RECIPES / f"{recipe}.yaml", [*TINY, *overrides])

    return build


@pytest.fixture
def finetuner(autoencoder, discriminator, standin, tiny):
    """finetuner(recipe, *overrides, perceptual=...) -> Finetuner in float64, one per test."""

    def build(
        recipe: str = "ft_ema", *overrides: str, perceptual: nn.Module = standin
    ) -> Finetuner:
        settings = tiny(recipe, *overrides)
        adversary = discriminator if settings.adversarial else None
        return Finetuner(settings, autoencoder, adversary, perceptual).double()

    return build


@pytest.fixture
def batch(golden):
    """batch(step) -> Batch of the reference runs; draws 0 and 1 of the noise for two passes.

    With side=32 only the upper left quarter: quick, for tests that compare with no reference.
    """

    def build(step: int = 0, side: int = 64) -> Batch:
        draws = torch.stack([golden.tensor(f"train/noise_{draw}")[step] for draw in "ab"])
        images = golden.tensor("train/batches")[step]
        part = side // 8
        return Batch(images[..., :side, :side], draws[..., :part, :part], ["a", "b"], [])

    return build


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """torch-fidelity's Inception with seeded random weights of the right shapes."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Unloaded(FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            """Keeps the initial weights: the published ones are not at hand."""

    torch.manual_seed(0)
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    network = Unloaded("inception", ["2048"], feature_extractor_weights_path=empty)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path
