"""The package as a library: its names, the example of its page, the finetuner in other trainers."""

import copy
import hashlib
import importlib.util
import json
import pickle
import re
import subprocess
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

import pytest
import pytorch_lightning
import runs
import samples
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from safetensors import safe_open
from torch.utils.data import DataLoader

import kl_f8_train
from kl_f8_train import (
    AutoencoderKL,
    Discriminator,
    Finetuner,
    load_autoencoder,
    perceptual_network,
    recipe,
    save_autoencoder,
)
from kl_f8_train.core.batch import Batch, plain_batch
from kl_f8_train.core.discriminator import initialize
from kl_f8_train.errors import MissingInputError, UsageError
from kl_f8_train.weights.weight_file import read_weights

PAGE = Path(__file__).parents[1] / "docs/library.md"
TINY = (
    *("model.ch_mult=[1,1]", "model.num_res_blocks=1", "data.crop=32", "init.iteration=100"),
    *("adversarial.n_layers=2", "compute.compile=false"),
)
QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "max_epochs": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def module(*overrides: str) -> Finetuner:
    """A tiny adversarial finetuner, always from the same start."""
    settings = recipe("demo", *TINY, *overrides)
    torch.manual_seed(0)
    autoencoder = AutoencoderKL(**asdict(settings.model))
    discriminator = Discriminator(16, 2)
    initialize(discriminator, seed=0)
    return Finetuner(settings, autoencoder, discriminator, perceptual_network("st_lpips_alex"))


def loader(batches: int = 4) -> DataLoader:
    """Images in [-1, 1], four at a time."""
    generator = torch.Generator().manual_seed(1)
    return DataLoader(2 * torch.rand(4 * batches, 3, 32, 32, generator=generator) - 1, batch_size=4)


def trainer(**options) -> pytorch_lightning.Trainer:
    return pytorch_lightning.Trainer(**{**QUIET, **options})


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


# --- names and page -------------------------------------------------------------------------


def test_every_name_is_there_and_none_is_imported_early():
    assert {
        name for name in kl_f8_train.__all__ if getattr(kl_f8_train, name, None) is None
    } == set()
    assert set(kl_f8_train.__all__) <= set(dir(kl_f8_train))
    with pytest.raises(AttributeError, match="no attribute 'Autoencoder'"):
        kl_f8_train.Autoencoder  # noqa: B018
    code = "import sys, kl_f8_train, kl_f8_train.__main__; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"


def test_the_page_names_all_of_them():
    text = PAGE.read_text()
    assert [name for name in kl_f8_train.__all__ if f"`{name}" not in text] == []


@pytest.mark.slow
def test_the_examples_run(tmp_path, monkeypatch):
    """In the order of the page, in one namespace."""
    monkeypatch.chdir(tmp_path)
    example, *more = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert example.count("\n") <= 32
    runs.make_weights(tmp_path / "start.ckpt", (1, 1, 1, 1))
    save_autoencoder(load_autoencoder("start.ckpt"), "vae.safetensors")
    names: dict = {}
    exec(example, names)
    assert names["reconstructions"].shape == (8, 3, 64, 64)
    before, after = (load_autoencoder(f"{name}.safetensors") for name in ("vae", "better"))
    assert same(after, names["better"])
    assert same(before.encoder, after.encoder)
    assert not same(before.decoder, after.decoder)
    (tmp_path / "photos").mkdir()
    data = samples.encode(samples.noise_picture(0, 256, 256), "PNG")
    (tmp_path / "photos" / "one.png").write_bytes(data)
    for block in more:
        exec(block, names)
    assert names["scores"]["models"].keys() == {"base", "better"}
    assert names["finetuner"].iteration == 246805
    assert names["vae"].last_layer.grad.any()


def test_an_autoencoder_is_saved_by_its_suffix(tmp_path):
    model = AutoencoderKL(32, (1, 1), 1, norm_num_groups=8)
    for name in ("a.safetensors", "a.ckpt"):
        save_autoencoder(model, tmp_path / name)
        loaded = load_autoencoder(tmp_path / name)
        assert same(loaded.decoder, model.decoder)
        assert loaded.decoder.norm_out.num_groups == 8
    with pytest.raises(UsageError, match=r"saved as .safetensors or .ckpt"):
        save_autoencoder(model, tmp_path / "a.pt")


def test_what_a_base_states_is_saved_with_its_finetuned_copy(tmp_path):
    tuner = module("adversarial.start_iteration=0")
    save_autoencoder(tuner.autoencoder, tmp_path / "diffusion_pytorch_model.safetensors")
    stated = {"_class_name": "AutoencoderKL", "scaling_factor": 0.13025, "force_upcast": False}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    given = parts() | {"autoencoder": load_autoencoder(tmp_path)}
    tuner, fitting = Finetuner(**given), trainer(max_steps=1)
    fitting.fit(tuner, loader())
    (tmp_path / "out").mkdir()
    fitting.save_checkpoint(tmp_path / "out/last.ckpt")
    for name in ("a.safetensors", "a.ckpt"):
        save_autoencoder(tuner.averaged(), tmp_path / "out" / name)
    for name in ("a.safetensors", "a.ckpt", "last.ckpt"):
        found = load_autoencoder(tmp_path / "out" / name).facts
        assert (found.scaling_factor, found.force_upcast) == (0.13025, False)
        assert found.norm_num_groups == 4


def test_a_compiled_autoencoder_is_saved_by_the_names_of_the_plain_one(tmp_path):
    model = AutoencoderKL(32, (1, 1), 1, norm_num_groups=8)
    save_autoencoder(torch.compile(model), tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert set(file.keys()) == model.state_dict().keys()


def test_a_finetuner_is_no_autoencoder_to_save(tmp_path):
    with pytest.raises(UsageError, match=r"got a Finetuner, expected .* finetuner.averaged\(\)"):
        save_autoencoder(module(), tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", ["lpips", "vgg", "LPIPS_VGG", ""])
def test_another_perceptual_network_is_refused(name):
    with pytest.raises(UsageError, match=f"{name!r}: expected lpips_vgg or st_lpips_alex"):
        perceptual_network(name)


def test_evaluate_takes_names_of_files(tmp_path):
    (tmp_path / "photos").mkdir()
    data = samples.encode(samples.noise_picture(0, 16, 16), "PNG")
    (tmp_path / "photos" / "one.png").write_bytes(data)
    save_autoencoder(AutoencoderKL(32, (1, 1), 1, norm_num_groups=8), tmp_path / "a.safetensors")
    weights = {"a": str(tmp_path / "a.safetensors"), "b": tmp_path / "a.safetensors"}
    for where in (tmp_path / "photos", str(tmp_path / "photos")):
        options = {"size": 16, "perceptual_name": None}
        scores = kl_f8_train.evaluate(weights, where, str(tmp_path / "out"), **options)
        assert scores["models"].keys() == {"a", "b"}
    assert (tmp_path / "out/scores.json").is_file()


@pytest.mark.parametrize(
    ("named", "compared", "message"),
    [
        ({}, (), "got none, expected {name: file}"),
        (["a.ckpt"], (), "got 'a.ckpt', expected {name: file}"),
        ([("a", "a.ckpt")], (), r"got \('a', 'a.ckpt'\), expected"),
        ([("a", "a.ckpt", "ema"), ("a", "a.ckpt", "raw")], (), "the same name"),
        ({"a": "a.ckpt", "b": "b.ckpt"}, ("a", "c"), "c: no such model; named are a, b"),
        ({"a": "a.ckpt", "b": "b.ckpt"}, ("a",), "expected two different models"),
        ({"a": "a.ckpt", "b": "b.ckpt"}, ("a", "a"), "expected two different models"),
    ],
)
def test_evaluate_names_what_is_wrong_with_its_weights(tmp_path, named, compared, message):
    with pytest.raises(UsageError, match=message):
        kl_f8_train.evaluate(named, tmp_path, tmp_path / "out", compared=compared)


# --- plain images ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loaded", "message"),
    [
        (torch.zeros(3, 32, 32), r"got \(3, 32, 32\), expected a tensor \(B, 3, H, W\)"),
        ({"image": 1}, "got a dict, .* collate_fn"),
        (torch.zeros(0, 3, 32, 32), r"got \(0, 3, 32, 32\)"),
        (torch.zeros(1, 3, 30, 32), "30 x 32 pixels: both sides must be multiples of 8"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.int64), "images are torch.int64"),
        (torch.full((1, 3, 32, 32), 255.0), r"images reach 255; .* must be in \[-1, 1\]"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(loaded, message):
    with pytest.raises(ValueError, match=message):
        plain_batch(loaded, 1, 4, 8, (0,))


def test_noise_of_plain_images_depends_on_its_source_alone():
    images = torch.zeros(2, 3, 32, 32)
    first, again, other = (
        plain_batch([images], 2, 4, 8, s).noise for s in ((0, 1), (0, 1), (0, 2))
    )
    assert first.shape == (2, 2, 4, 4, 4)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("shift", [0.0, -0.1])
def test_images_from_0_to_1_are_warned_of(shift):
    images = torch.rand(2, 3, 32, 32).half() * 0.8 + 0.05 + shift
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plain_batch(images, 1, 4, 8, (0,))
    assert len(caught) == (shift == 0)
    assert all("[0, 1]" in str(one.message) for one in caught)


@pytest.mark.parametrize("shape", [(2, 4, 4, 4), (1, 2, 4, 4, 1), (1, 1, 4, 4, 4)])
def test_noise_of_another_shape_is_not_broadcast(shape):
    own = Batch(torch.zeros(2, 3, 8, 8), torch.zeros(shape), ["a", "b"], [])
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        module().run_iteration(own)


# --- its parts ------------------------------------------------------------------------------


def test_a_loop_without_lightning_is_the_same():
    tuner, other = module(), module()
    for images in loader():
        tuner.run_iteration(tuner.batch_of(images))
    trainer().fit(other, loader())
    assert tuner.run_state == other.run_state
    assert same(tuner, other)


@pytest.mark.parametrize(
    ("override", "discriminator", "message"),
    [
        ("seed=0", None, "has an adversarial term: give a Discriminator"),
        ("adversarial=null", Discriminator(16, 2), "no adversarial term: give None"),
        ("seed=0", Discriminator(16, 2).half(), "Discriminator: its parameters are float16"),
    ],
)
def test_networks_that_do_not_belong_to_a_recipe_are_refused(override, discriminator, message):
    network = perceptual_network("st_lpips_alex")
    settings = recipe("demo", *TINY[:3], override)
    with pytest.raises(ValueError, match=message):
        Finetuner(settings, AutoencoderKL(32, (1, 1), 1), discriminator, network)


@pytest.mark.parametrize("name", ["autoencoder", "perceptual"])
@pytest.mark.parametrize("part", [None, "kl_f8_mini", torch.zeros(1).sum])
def test_what_is_no_network_is_refused(name, part):
    with pytest.raises(ValueError, match=f"{name}: got a .*, expected a network"):
        Finetuner(**parts() | {name: part})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_autoencoder_in_half_precision_is_refused(dtype):
    network = perceptual_network("st_lpips_alex")
    settings, halved = recipe("demo", "adversarial=null"), AutoencoderKL(32, (1, 1), 1).to(dtype)
    with pytest.raises(ValueError, match=r"AutoencoderKL: its parameters are b?float16; give"):
        Finetuner(settings, halved, None, network)


# --- other trainers -------------------------------------------------------------------------


def test_steps_are_iterations_and_loggers_get_figures(tmp_path):
    tuner, logger = module(), CSVLogger(tmp_path)
    fitting = trainer(max_steps=3, logger=logger, log_every_n_steps=1)
    fitting.fit(tuner, loader())
    assert (tuner.iteration, fitting.global_step) == (103, 3)
    logged = fitting.logged_metrics.keys()
    assert logged == {*tuner.metrics, "learning_rate"} >= {"reconstruction_loss"}
    assert "adaptive_weight" in (Path(logger.log_dir) / "metrics.csv").read_text()


@pytest.mark.parametrize("warmup", [0, 6])
def test_lightnings_own_checkpoint_restores_everything(tmp_path, warmup):
    def fresh() -> Finetuner:
        tuner = module(f"adversarial.warmup_iterations={warmup}")
        tuner.run_state.warmup_left = warmup
        return tuner

    saving = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1)
    first = fresh()
    fitting = trainer(callbacks=[saving], enable_checkpointing=True)
    fitting.fit(first, loader())
    assert len(list(tmp_path.iterdir())) == (0 if warmup else 2)
    fitting.save_checkpoint(tmp_path / "own.ckpt")
    resumed, straight = fresh(), fresh()
    trainer(max_epochs=2).fit(resumed, loader(), ckpt_path=tmp_path / "own.ckpt")
    trainer(max_epochs=2).fit(straight, loader())
    assert resumed.run_state == straight.run_state
    assert resumed.iteration == 108 - warmup
    assert resumed.ema_updates == 8 - warmup
    assert same(resumed, straight)
    for one, other in zip(resumed.adams, straight.adams, strict=True):
        torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_lightnings_own_checkpoint_is_a_vae_file(tmp_path):
    tuner, path = module(), tmp_path / "own.ckpt"
    tuner.autoencoder.decoder.norm_out.num_groups = 8  # which no tensor shows
    fitting = trainer(max_steps=1)
    fitting.fit(tuner, loader())
    fitting.save_checkpoint(path)
    averaged, raw = load_autoencoder(path), load_autoencoder(path, "raw")
    assert same(averaged, tuner.averaged())
    assert same(raw, tuner.autoencoder)
    assert averaged.encoder.norm_out.num_groups == 8
    assert read_weights(path)[0].iteration == 101


def test_a_checkpoint_of_another_module_is_refused():
    with pytest.raises(MissingInputError, match=r"not the checkpoint of a Finetuner; .* load_auto"):
        module().on_load_checkpoint({"state_dict": {}})


def test_a_precision_of_the_trainers_is_refused():
    with pytest.raises(ValueError, match="leave it at '32-true'"):
        trainer(precision="bf16-mixed").fit(module(), loader())


class Validated(Finetuner):
    """As users add what they need."""

    def __init__(self, *parts: object, name: str = "mine", **named: object) -> None:
        super().__init__(*parts, **named)
        self.name = name

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        self.log("difference", self.averaged().encode(batch.images).mean.abs().mean())


def parts() -> dict[str, object]:
    """What a finetuner is made of, by name."""
    tuner = module()
    names = ("config", "autoencoder", "discriminator", "perceptual")
    return {name: getattr(tuner, name) for name in names}


def test_a_subclass_is_a_module_of_its_own_and_is_loaded_by_lightnings_method(tmp_path):
    tuner = Validated(**parts(), name="given")
    assert isinstance(tuner, Validated)
    assert isinstance(tuner, pytorch_lightning.LightningModule)
    best = ModelCheckpoint(tmp_path, monitor="difference", save_last=True)
    fitting = trainer(callbacks=[best], enable_checkpointing=True)
    fitting.fit(tuner, loader(2), loader(1))
    assert {path.name for path in tmp_path.iterdir()} == {"epoch=0-step=2.ckpt", "last.ckpt"}
    for kind in (Validated, Finetuner):
        loaded = kind.load_from_checkpoint(tmp_path / "last.ckpt", **parts())
        assert isinstance(loaded, kind)
        assert loaded.run_state == tuner.run_state
        assert same(loaded, tuner)


class Failing(Finetuner):
    """Records cuDNN's flags in each iteration, and fails where it has to."""

    fails = False

    def training_step(self, batch: Batch, batch_index: int) -> None:
        """One iteration, or none."""
        self.flags = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
        if self.fails:
            raise ArithmeticError
        super().training_step(batch, batch_index)


def test_a_fit_sets_how_cuda_computes_and_puts_it_back():
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.allow_tf32
    tuner = Failing(**parts())
    trainer(max_steps=1).fit(tuner, loader())
    assert tuner.flags == (True, False) != before
    assert (cudnn.benchmark, cudnn.allow_tf32) == before
    tuner.fails = True
    with pytest.raises(ArithmeticError):
        trainer(max_steps=1).fit(tuner, loader())
    assert copy.deepcopy(tuner.kernels).entered
    tuner.fails = False
    trainer(max_steps=1).fit(tuner, loader())
    assert tuner.flags == (True, False)
    assert (cudnn.benchmark, cudnn.allow_tf32) == before


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_a_finetuner_can_be_copied_and_pickled(copied):
    tuner = Validated(**parts(), name="given")
    again = copied(tuner)
    assert type(again) is type(tuner)
    assert again.name == "given"
    assert same(again, tuner)
    trainer(max_steps=1).fit(again, loader(1))
    assert again.iteration == 101


RANKS = """
import sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
import test_library as t
from torch.utils.data import DataLoader

class Digest(t.pytorch_lightning.Callback):
    def on_train_end(self, trainer, module):
        line = f"rank {{trainer.global_rank}} {{t.digest(module)}}"
        print(line, flush=True)

images = 2 * torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(1)) - 1
fitting = t.trainer(devices=2, strategy={strategy!r}, callbacks=[Digest()])
fitting.fit(t.module(), DataLoader(images, batch_size=4))
"""


def digest(tuner: Finetuner) -> str:
    """Of all parameters; BatchNorm's statistics are each rank's own."""
    tensors = [parameter.detach().numpy().tobytes() for parameter in tuner.parameters()]
    return hashlib.sha256(b"".join(tensors)).hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "ddp_find_unused_parameters_true"])
def test_ddp_of_a_plain_trainer_keeps_ranks_equal(tmp_path, strategy):
    script = tmp_path / "fit.py"
    script.write_text(RANKS.format(tests=str(Path(__file__).parent), strategy=strategy))
    command = [sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    found = dict(re.findall(r"rank (\d) ([0-9a-f]{64})", done.stdout))
    assert found.keys() == {"0", "1"}, done.stdout + done.stderr
    assert found["0"] == found["1"] != digest(module())


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("lightning") is None, reason="the package lightning is not installed"
)
def test_the_lightning_package_trains_it_too():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import lightning.pytorch as pl\n"
        "import test_library as t\n"
        "tuner, fitting = t.module(), pl.Trainer(**{**t.QUIET, 'max_steps': 2})\n"
        "fitting.fit(tuner, t.loader())\n"
        "assert isinstance(tuner, t.Finetuner)\n"
        "print(tuner.iteration, fitting.global_step)\n"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.stdout.endswith("102 2\n"), done.stdout + done.stderr
