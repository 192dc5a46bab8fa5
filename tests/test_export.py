"""Exported files drop into their consumers, decode as the EMA and keep the encoder."""

import datetime
import hashlib
import json
import os
import pickle
import platform
import re
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
import runs
import samples
import torch
import yaml
from diffusers import AutoencoderKL as DiffusersAutoencoderKL
from safetensors.torch import load_file
from test_checkpoint import no_room

from kl_f8_train import config, images
from kl_f8_train.__main__ import main
from kl_f8_train.core.hashes import data_sha256
from kl_f8_train.core.model import AutoencoderKL
from kl_f8_train.errors import MissingInputError, RunFailedError, UsageError
from kl_f8_train.files import file_sha256
from kl_f8_train.next_command import after_export
from kl_f8_train.publish import card, half_precision
from kl_f8_train.publish.export import export
from kl_f8_train.run.train import train
from kl_f8_train.run_dir import list_checkpoints
from kl_f8_train.weights import checkpoint, names, weight_file


@pytest.fixture(scope="module")
def folder(folder: Path) -> Path:
    """A short run and its export."""
    train(runs.recipe(folder, "run", "stop_iteration=103", "name=tiny"))
    export(folder / "run")
    return folder


@pytest.fixture(scope="module")
def ema(folder: Path) -> AutoencoderKL:
    """The autoencoder with the EMA decoder, straight from the training checkpoint."""
    tensors = runs.final_state(folder, "run").tensors
    state = names.recognise(tensors, "ema").autoencoder
    model = AutoencoderKL(**names.architecture(state))
    model.load_state_dict(state)
    return model.eval()


LATENTS = torch.linspace(-3, 3, 4 * 8 * 8).view(1, 4, 8, 8)


@torch.no_grad()
def test_diffusers_loads_the_folder_and_decodes_as_the_ema(folder, ema):
    vae = DiffusersAutoencoderKL.from_pretrained(folder / "run" / "export" / "diffusers")
    torch.testing.assert_close(vae.decode(LATENTS).sample, ema.decode(LATENTS), atol=1e-5, rtol=0)
    assert vae.config.scaling_factor == 0.18215


@torch.no_grad()
@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_diffusers_loads_the_single_files(folder, ema, suffix):
    out = folder / "run" / "export"
    vae = DiffusersAutoencoderKL.from_single_file(
        str(out / f"tiny-ema-pruned.{suffix}"), config=str(out / "diffusers")
    )
    torch.testing.assert_close(vae.decode(LATENTS).sample, ema.decode(LATENTS), atol=1e-5, rtol=0)


def test_a_run_whose_directory_is_not_utf8_is_exported(folder, tmp_path):
    run = Path(os.fsdecode(os.fsencode(tmp_path) + b"/mod\xe8le"))
    shutil.copytree(folder / "run", run, ignore=shutil.ignore_patterns("export"))
    assert len(list(export(run).glob("tiny-ema-pruned.*"))) == 2


def test_the_encoder_is_the_imported_one(folder):
    before = weight_file.read(folder / "model.ckpt").tensors
    after = weight_file.read(folder / "run" / "export" / "tiny-ema-pruned.safetensors").tensors
    for key in after:
        if key.startswith(("encoder.", "quant_conv.")):
            assert torch.equal(before[key], after[key])


def test_the_ema_is_exported_and_not_the_raw_weights(folder):
    exported = weight_file.read(folder / "run" / "export" / "tiny-ema-pruned.safetensors").tensors
    state = runs.final_state(folder, "run").tensors
    key = "decoder.conv_in.weight"
    assert torch.equal(exported[key], state[f"ema.{key}"])
    assert not torch.equal(exported[key], state[f"autoencoder.{key}"])


def test_the_ckpt_satisfies_strict_loaders(folder, ema):
    path = folder / "run" / "export" / "tiny-ema-pruned.ckpt"
    records = {name.split("/", 1)[1] for name in zipfile.ZipFile(path).namelist()}
    assert all(n in ("data.pkl", "version") or n.startswith("data/") for n in records)
    loaded = torch.load(path, weights_only=True)
    assert loaded["global_step"] == 103
    AutoencoderKL(**names.architecture(loaded["state_dict"])).load_state_dict(
        loaded["state_dict"], strict=True
    )


def test_records_tell_what_was_made(folder):
    out = folder / "run" / "export"
    record = json.loads((out / "export.json").read_text())
    for file, digest in record["files"].items():
        assert file_sha256(out / file) == digest
    metadata = weight_file.read(out / "tiny-ema-pruned.safetensors").metadata
    assert metadata["kl_f8_train.iteration"] == "103"
    assert metadata["modelspec.sai_model_spec"] == "1.0.1"
    assert "100 -> 103" in (out / "README.md").read_text()


def test_only_training_checkpoints_are_exported(folder):
    with pytest.raises(MissingInputError, match="not a training checkpoint"):
        export(folder / "model.ckpt")


def test_a_next_stage_starts_from_the_run_or_its_export(folder, capsys):
    exported = folder / "run" / "export" / "tiny-ema-pruned.safetensors"
    finals = []
    for name, weights in (("from run", folder / "run"), ("from-export", exported)):
        extra = (f"init.weights={weights}", "init.iteration=null", "stop_iteration=105")
        train(runs.recipe(folder, name, *runs.NO_ADVERSARIAL, *extra))
        finals.append(runs.final_state(folder, name))
    runs.assert_same_state(*finals)
    assert finals[0].metadata["ema_updates"] == "2"
    assert f"next: kl-f8-train export '{folder / 'from run'}'\n" in capsys.readouterr().out


# --- what consumers need --------------------------------------------------------------------


@pytest.fixture(scope="module")
def imported(folder: Path) -> AutoencoderKL:
    """The file that the run started from."""
    return weight_file.load_autoencoder(folder / "model.ckpt")


WEIGHT_FILES = (
    "tiny-ema-pruned.safetensors",
    "tiny-ema-pruned.ckpt",
    "diffusers/diffusion_pytorch_model.safetensors",
    "diffusers/diffusion_pytorch_model.fp16.safetensors",
)


@torch.no_grad()
@pytest.mark.parametrize("file", WEIGHT_FILES)
def test_every_file_encodes_as_the_imported_one(folder, imported, file):
    """Bit for bit; in fp16 up to the rounding of the encoder's weights."""
    before = imported.state_dict()
    after = names.recognise(weight_file.read(folder / "run/export" / file).tensors).autoencoder
    dtype = torch.float16 if "fp16" in file else torch.float32
    frozen = [key for key in before if key.startswith(("encoder.", "quant_conv."))]
    assert all(torch.equal(after[key], before[key].to(dtype)) for key in frozen)
    pixels = torch.from_numpy(samples.photograph("astronaut")[:64, :64])
    photograph = images.to_float(pixels.permute(2, 0, 1)[None])
    latents = weight_file.load_autoencoder(folder / "run/export" / file).encode(photograph).mean
    error = (latents - imported.encode(photograph).mean).abs().max()
    assert error == 0 if dtype == torch.float32 else 0 < error < 1e-2


@torch.no_grad()
def test_diffusers_encodes_to_the_same_latents(folder, imported):
    vae = DiffusersAutoencoderKL.from_pretrained(folder / "run/export/diffusers")
    probe = images.to_float(half_precision.pattern(64)[None])
    latents = vae.encode(probe).latent_dist.mean
    torch.testing.assert_close(latents, imported.encode(probe).mean, atol=1e-5, rtol=0)


def test_diffusers_loads_the_fp16_variant(folder, ema):
    place = folder / "run/export/diffusers"
    vae = DiffusersAutoencoderKL.from_pretrained(place, variant="fp16", torch_dtype=torch.float16)
    expected = names.to_diffusers(ema.state_dict())
    assert vae.state_dict().keys() == expected.keys()
    for key, value in vae.state_dict().items():
        assert value.dtype == torch.float16
        assert torch.equal(value, expected[key].half())


def test_diffusers_finds_every_setting_in_our_config(folder):
    ours = json.loads((folder / "run/export/diffusers/config.json").read_text())
    theirs = DiffusersAutoencoderKL.from_pretrained(folder / "run/export/diffusers").config
    for key in ours.keys() - {"_class_name", "_diffusers_version"}:
        assert json.loads(json.dumps(theirs[key])) == ours[key], key


class StrictUnpickler(pickle.Unpickler):
    """As AUTOMATIC1111's safe loader: tensors, storages, ordered dicts, and nothing else."""

    def find_class(self, module, name):
        allowed = ("_rebuild_tensor_v2", "FloatStorage", "OrderedDict")
        assert module in ("torch._utils", "torch", "collections")
        assert name in allowed
        return super().find_class(module, name)

    def persistent_load(self, words):
        assert words[0] == "storage"
        return torch.empty(words[4], dtype=torch.float32).storage()


def test_the_ckpt_passes_automatic1111s_rules(folder, ema):
    """Names in the zip, classes in the pickle, and a strict load of what the rules leave over."""
    with zipfile.ZipFile(folder / "run/export/tiny-ema-pruned.ckpt") as archive:
        for name in archive.namelist():
            assert re.fullmatch(r"[^/]+/(data/\d+|version|data\.pkl)", name)
        loaded = StrictUnpickler(archive.open("archive/data.pkl")).load()
    state = {k: v for k, v in loaded["state_dict"].items() if not k.startswith("loss")}
    AutoencoderKL(**names.architecture(state)).load_state_dict(state, strict=True)
    assert state.keys() == ema.state_dict().keys()


TORCH_113 = (
    "torch==1.13.1",
    "typing_extensions",
    "nvidia-cublas-cu11==11.10.3.66",  # torch's own libraries do not load without them
    "nvidia-cudnn-cu11==8.5.0.96",
    "nvidia-cuda-runtime-cu11==11.7.99",
    "nvidia-cuda-nvrtc-cu11==11.7.99",
)
LOAD_IN_113 = """
import ctypes, hashlib, sys, torch
loaded = torch.load(sys.argv[1], map_location="cpu")
assert set(loaded) == {"state_dict", "global_step", "architecture"}
digest = hashlib.sha256()
for key in sorted(loaded["state_dict"]):
    value = loaded["state_dict"][key].contiguous()
    digest.update(ctypes.string_at(value.data_ptr(), 4 * value.numel()))
print(torch.__version__, len(loaded["state_dict"]), loaded["global_step"], digest.hexdigest())
"""


@pytest.mark.slow
@pytest.mark.torch113
def test_torch_1_13_loads_the_ckpt(folder, ema):
    """In an environment of its own, thrown away after: 1.8 GB to fetch, 3.2 GB on disk."""
    python = shutil.which("python3.11") or shutil.which("python3.10")
    if python is None or sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("torch 1.13.1 has wheels for Python up to 3.11 on Linux x86-64; found none")
    with tempfile.TemporaryDirectory() as place:
        pip = [python, "-m", "pip", "install", "--quiet", "--no-cache-dir", "--no-compile"]
        pip += ["--no-deps", "--only-binary", ":all:", "--target", place, *TORCH_113]
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"pip cannot fetch torch 1.13.1: {done.stderr.strip().splitlines()[-1]}")
        path = folder / "run/export/tiny-ema-pruned.ckpt"
        answer = subprocess.run(
            [python, "-S", "-c", LOAD_IN_113, str(path)],
            env={"PYTHONPATH": place, "PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
    state = ema.state_dict()
    assert answer == ["1.13.1+cu117", str(len(state)), "103", data_sha256(state)]


# --- records --------------------------------------------------------------------------------


def test_the_metadata_tell_where_the_weights_come_from(folder):
    out = folder / "run/export"
    file = out / "tiny-ema-pruned.safetensors"
    metadata = weight_file.read(file).metadata
    stored = runs.final_state(folder, "run").metadata
    ours = {k.removeprefix("kl_f8_train."): v for k, v in metadata.items() if "kl_f8_train." in k}
    assert ours["base_name"] == "model.ckpt"
    assert ours["base_sha256"] == file_sha256(folder / "model.ckpt")
    assert ours["recipe"] == "tiny"
    assert ours["config_sha256"] == hashlib.sha256(stored["config"].encode()).hexdigest()
    assert ours["frozen_sha256"] == stored["frozen_sha256"]
    assert float(ours["ema_decay"]) == config.from_dict(json.loads(ours["config"])).ema.decay
    data = file.read_bytes()
    data = data[8 + int.from_bytes(data[:8], "little") :]
    assert metadata["modelspec.hash_sha256"] == f"0x{hashlib.sha256(data).hexdigest()}"
    datetime.datetime.fromisoformat(metadata["modelspec.date"])
    record = json.loads((out / "export.json").read_text())
    assert set(record["files"]) >= {*WEIGHT_FILES, "diffusers/config.json", "README.md"}
    assert set(record["checks"]) == {*WEIGHT_FILES, "strict loader"}
    halves = [check for file, check in record["checks"].items() if "fp16" in file]
    assert halves
    assert all("a test pattern's latents within 0.0" in check for check in halves)
    assert record["half_precision"]["images"].startswith("3 photographs of the package")


def test_a_resumed_run_still_knows_its_base_and_what_was_changed(folder):
    for stop in (101, 102):
        extra = (*runs.NO_ADVERSARIAL, f"stop_iteration={stop}", f"ema.decay=0.{stop}")
        train(runs.recipe(folder, "resumed", *extra), allow_changes=True)
    metadata = runs.final_state(folder, "resumed").metadata
    assert metadata["iteration"] == "102"
    assert metadata["base_sha256"] == file_sha256(folder / "model.ckpt")
    out = export(folder / "resumed", layouts=["safetensors"])
    change = "from iteration 101: ema.decay: 0.101 -> 0.102"
    assert json.loads((out / "export.json").read_text())["changes"] == [change]
    assert f"| changed on the way | {change} |" in (out / "README.md").read_text()
    exported = weight_file.read(next(out.glob("*.safetensors"))).metadata
    assert exported["kl_f8_train.changes"] == change


def test_what_a_killed_export_left_is_removed(folder):
    out = export(folder / "run", layouts=["safetensors"], force=True)
    (out / "diffusers").mkdir(exist_ok=True)
    left = [out / ".tmpAbCdEf", out / "diffusers" / ".tmp012345"]
    left += [out / ".tiny-ema-pruned.safetensors.7-01234567.part"]
    for file in left:
        file.write_bytes(b"half")
    export(folder / "run", layouts=["safetensors"], force=True)
    assert not any(file.exists() for file in left)


def changed_checkpoint(folder: Path, path: Path, change=None, **metadata: str) -> Path:
    """A copy of the run's newest checkpoint with other tensors or texts."""
    contents = runs.final_state(folder, "run")
    tensors = change(contents.tensors) if change else contents.tensors
    texts = {**contents.metadata, **checkpoint.content_sha256(tensors), **metadata}
    weight_file.write_safetensors(path, tensors, texts)
    return path


def test_old_checkpoints_do_not_know_their_base(folder, tmp_path):
    contents = runs.final_state(folder, "run")
    texts = {k: v for k, v in contents.metadata.items() if not k.startswith("base_")}
    weight_file.write_safetensors(tmp_path / "a" / "old.safetensors", contents.tensors, texts)
    out = export(tmp_path / "a" / "old.safetensors", layouts=["safetensors"])
    metadata = weight_file.read(out / "tiny-ema-pruned.safetensors").metadata
    assert metadata["kl_f8_train.base_sha256"] == "unknown"


# --- flags ----------------------------------------------------------------------------------


def test_raw_weights(folder):
    out = export(folder / "run", raw=True)
    assert out.name == "export-raw"
    state = runs.final_state(folder, "run").tensors
    for file in ("tiny-raw-pruned.safetensors", "tiny-raw-pruned.ckpt"):
        exported = weight_file.read(out / file).tensors
        assert all(torch.equal(v, state[f"autoencoder.{k}"]) for k, v in exported.items())
    assert "raw weights, not the EMA" in (out / "README.md").read_text()


@pytest.mark.parametrize(("dtype", "short"), [("float16", "fp16"), ("bfloat16", "bf16")])
def test_half_precision_files(folder, ema, tmp_path, dtype, short, capsys):
    assert main(["export", str(folder / "run"), "--out", str(tmp_path), "--dtype", dtype]) == 0
    for suffix in ("safetensors", "ckpt"):
        exported = weight_file.read(tmp_path / f"tiny-ema-pruned-{short}.{suffix}").tensors
        for key, value in ema.state_dict().items():
            assert torch.equal(exported[key], value.to(getattr(torch, dtype)))
    variant = tmp_path / f"diffusers/diffusion_pytorch_model.{short}.safetensors"
    assert weight_file.read(variant).tensors["decoder.conv_in.bias"].dtype == getattr(torch, dtype)
    checks = json.loads((tmp_path / "export.json").read_text())["checks"]
    stated = checks[f"tiny-ema-pruned-{short}.ckpt"]
    assert re.search(rf"rounded to {short}; .* within \S+, its image within \S+ of 255", stated)
    printed = capsys.readouterr().out
    assert stated in printed
    assert ("WARNING: bfloat16 costs" in printed) == (dtype == "bfloat16")
    assert printed.splitlines()[-1] == f"next: kl-f8-train card {tmp_path}"


def test_what_follows_an_export(folder, tmp_path, monkeypatch):
    """Scores on the held-out photographs of the run, and once they are there the card."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "held_out").mkdir()
    out = export(folder / "run", tmp_path / "out")
    exported = (out / "config.yaml").read_text()
    values = yaml.safe_load(exported)
    values["log"]["pictures"] = "held_out"
    (out / "config.yaml").write_text(yaml.safe_dump(values))
    scored = "evaluate base=base.ckpt mine=out/tiny-ema-pruned.safetensors --images held_out"
    for base, command in (
        ("base.ckpt", f"kl-f8-train {scored} --compare base mine"),
        ("absent.ckpt", "kl-f8-train card out"),
    ):
        (tmp_path / "base.ckpt").touch()
        values["init"]["weights"] = base
        (out / "config.yaml").write_text(yaml.safe_dump(values))
        assert after_export(Path("out")).removesuffix(" --perceptual st_lpips_alex") == command
    (out / "config.yaml").write_text(exported)
    (tmp_path / "evaluation").mkdir()
    digest = file_sha256(out / "tiny-ema-pruned.safetensors")
    scores = {"models": {"a": {}}, "weights": {"a": {"sha256": digest}}}
    (tmp_path / "evaluation" / "scores.json").write_text(json.dumps(scores))
    monkeypatch.setattr(card, "_problems", lambda scores: [])
    monkeypatch.setattr(card, "_taken", lambda scores: {})
    expected = "kl-f8-train card out --scores evaluation/scores.json"
    assert after_export(Path("out")) == expected


@pytest.mark.parametrize(
    ("layout", "files"),
    [
        ("safetensors", {"tiny-ema-pruned.safetensors"}),
        ("ckpt", {"tiny-ema-pruned.ckpt"}),
        ("diffusers", {"diffusers"}),
    ],
)
def test_one_format(folder, tmp_path, layout, files):
    export(folder / "run", tmp_path, layouts=[layout])
    written = {path.name for path in tmp_path.iterdir()}
    assert written == files | {"README.md", "export.json", "config.yaml"}


def test_existing_files_are_overwritten_only_by_force(folder, tmp_path, capsys):
    command = ["export", str(folder / "run"), "--out", str(tmp_path)]
    (tmp_path / "tiny-ema-pruned.ckpt").write_text("mine")
    assert main(command) == 2
    assert f"{tmp_path}/tiny-ema-pruned.ckpt exists" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-ema-pruned.ckpt"]
    assert main([*command, "--force"]) == 0
    first = (tmp_path / "tiny-ema-pruned.ckpt").read_bytes()
    assert main([*command, "--force"]) == 0
    assert (tmp_path / "tiny-ema-pruned.ckpt").read_bytes() == first


def test_no_other_runs_config_is_overwritten(folder, tmp_path, capsys):
    command = ["export", str(folder / "run"), "--format", "ckpt", "--out"]
    (tmp_path / "config.yaml").write_text("mine")
    assert main([*command, str(tmp_path)]) == 2
    assert f"{tmp_path}/config.yaml exists" in capsys.readouterr().err
    before = sorted((folder / "run").iterdir())
    assert main([*command, str(folder / "run"), "--force"]) == 2
    assert "is a run directory" in capsys.readouterr().err
    assert sorted((folder / "run").iterdir()) == before
    assert (tmp_path / "config.yaml").read_text() == "mine"


def test_the_directory_of_a_checkpoint_wherever_it_lies(folder, tmp_path, monkeypatch):
    """In the run; of one that was moved, beside it, with its own configuration."""
    run = shutil.copytree(folder / "run", tmp_path / "run")
    shutil.rmtree(run / "export")
    (path,) = list_checkpoints(run)
    monkeypatch.chdir(path.parent)
    assert export(Path(path.name), layouts=["ckpt"]) == run / "export"
    moved = tmp_path / "elsewhere/here" / path.name
    moved.parent.mkdir(parents=True)
    path.rename(moved)
    (tmp_path / "elsewhere/config.yaml").write_text("seed: 7")
    out = export(moved, layouts=["ckpt"])
    assert out == tmp_path / "elsewhere/here/export"
    assert (out / "config.yaml").read_text() == (run / "config.yaml").read_text()


@pytest.mark.parametrize("name", ["../../x", "a/b", "/tmp/here"])
def test_a_checkpoints_name_does_not_lead_out_of_the_directory(folder, tmp_path, capsys, name):
    stored = json.loads(runs.final_state(folder, "run").metadata["config"])
    foreign = json.dumps(stored | {"name": name})
    path = changed_checkpoint(folder, tmp_path / "in/a.safetensors", config=foreign)
    assert main(["export", str(path), "--out", str(tmp_path / "deep/out")]) == 3
    assert f"name={name!r}: expected one part of a file name" in capsys.readouterr().err
    assert [file.name for file in tmp_path.rglob("*")] == ["in", "a.safetensors"]


def test_an_export_with_fewer_formats_leaves_no_older_weights(folder, tmp_path):
    export(folder / "run", tmp_path)
    (tmp_path / "mine.ckpt").write_text("mine")
    (tmp_path / "diffusers/config.json").write_text("{}")  # changed by hand: it stays
    for own in ("diffusers/own", "own.ckpt"):
        (tmp_path / own).mkdir()
    (tmp_path / "own.safetensors").symlink_to("nowhere")
    said: list[str] = []
    export(folder / "run", tmp_path, layouts=["ckpt"], force=True, say=said.append)
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    files = json.loads((tmp_path / "export.json").read_text())["files"]
    assert files.keys() == {"tiny-ema-pruned.ckpt", "config.yaml", "README.md"}
    assert left == {*files, "export.json", "mine.ckpt", "diffusers/config.json"}
    assert f"{tmp_path / WEIGHT_FILES[0]} of the earlier export was removed" in said


def test_an_average_counts_no_checkpoint_twice(folder, tmp_path):
    (path,) = list_checkpoints(folder / "run")
    with pytest.raises(UsageError, match="is given twice"):
        export(folder / "run", tmp_path / "out", average=[path])


def test_the_average_of_three(folder, tmp_path):
    def scaled(factor):
        return lambda tensors: {
            k: v * factor if k.startswith("ema.") else v for k, v in tensors.items()
        }

    others = [
        changed_checkpoint(folder, tmp_path / f"{factor}.safetensors", scaled(factor))
        for factor in (1.1, 0.7)
    ]
    out = export(folder / "run", tmp_path / "out", average=others)
    exported = weight_file.read(out / "tiny-ema-average-pruned.safetensors")
    key = "decoder.conv_in.weight"
    tensors = [weight_file.read(p).tensors for p in (folder / "run", *others)]
    mean = torch.stack([t[f"ema.{key}"].double() for t in tensors]).mean(0).float()
    assert torch.equal(exported.tensors[key], mean)
    averaged = exported.metadata["kl_f8_train.averaged"]
    assert averaged == "iteration-000000103.safetensors, 1.1.safetensors, 0.7.safetensors"
    encoder = "encoder.conv_in.weight"
    assert torch.equal(exported.tensors[encoder], tensors[0][f"autoencoder.{encoder}"])


def test_averages_of_what_does_not_belong_together(folder, tmp_path):
    def wider(tensors):
        return tensors | {"ema.decoder.conv_in.bias": torch.zeros(5)}

    another = changed_checkpoint(folder, tmp_path / "a.safetensors", frozen_sha256="0" * 64)
    shape = changed_checkpoint(folder, tmp_path / "b.safetensors", wider)
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="has another encoder"):
        export(folder / "run", out, average=[another])
    with pytest.raises(UsageError, match=r"decoder\.conv_in\.bias is \(5,\)"):
        export(folder / "run", out, average=[shape])
    with pytest.raises(UsageError, match="leave out one of them"):
        export(folder / "run", out, raw=True, average=[folder / "run"])
    assert not list(out.rglob("*"))


def test_a_changed_encoder_is_not_exported(folder, tmp_path):
    def moved(tensors):
        key = "autoencoder.encoder.conv_in.bias"
        return tensors | {key: tensors[key] + 1e-6}

    path = changed_checkpoint(folder, tmp_path / "a.safetensors", moved)
    with pytest.raises(MissingInputError, match="its encoder does not match"):
        export(path, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*"))


@pytest.mark.parametrize("how", ["file size limit", "full disk"])
def test_no_room_leaves_what_was_there(folder, tmp_path, how):
    out = tmp_path / "out"
    out.mkdir()
    with no_room(out, how):
        if how == "full disk":
            (out / "filler").write_bytes(bytes(1_900_000))
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        (out / "tiny-ema-pruned.safetensors").write_text("before")
        with pytest.raises(RunFailedError, match="Make room"):
            export(folder / "run", out, force=True)
        assert (out / "tiny-ema-pruned.safetensors").read_text() == "before"
        assert {p.name for p in out.iterdir()} <= {"tiny-ema-pruned.safetensors", "filler"}


# --- writing --------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_tensors_that_share_memory_or_lie_otherwise(tmp_path, suffix):
    base = torch.arange(24.0).view(1, 2, 3, 4)
    tensors = {
        "base": base,
        "again": base,
        "part": base[:, 1],
        "turned": base.transpose(2, 3),
        "last": base.contiguous(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(base * 2),
        "nothing": torch.zeros(0, 3),
    }
    path = tmp_path / f"w.{suffix}"
    if suffix == "ckpt":
        weight_file.write_torch(path, tensors)
        loaded = torch.load(path, weights_only=True)
        assert path.stat().st_size < 5000
    else:
        weight_file.write_safetensors(path, tensors, {})
        loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for key, value in loaded.items():
        assert torch.equal(value, tensors[key])
        assert value.is_contiguous()


def test_write_torch_holds_no_second_copy(tmp_path):
    job = (
        "import torch\n"
        "from kl_f8_train.weights.weight_file import write_torch\n"
        "tensors = {str(i): torch.ones(4_000_000) for i in range(10)}\n"
        "job = lambda path: write_torch(path, {'state_dict': tensors})"
    )
    assert samples.peak_growth(job, tmp_path / "w.ckpt") < 40  # MiB, of 160
    (tmp_path / "w.ckpt").unlink()


@pytest.mark.parametrize("raw", [False, True])
def test_weights_that_the_disk_changed_are_not_exported(folder, tmp_path, raw):
    path = tmp_path / "run" / "checkpoints" / list_checkpoints(folder / "run")[0].name
    path.parent.mkdir(parents=True)
    whole = bytearray(list_checkpoints(folder / "run")[0].read_bytes())
    (length,) = struct.unpack("<Q", whole[:8])
    entry = json.loads(whole[8 : 8 + length])[
        f"{'autoencoder' if raw else 'ema'}.decoder.conv_out.weight"
    ]
    whole[8 + length + entry["data_offsets"][0]] ^= 1
    path.write_bytes(whole)
    with pytest.raises(MissingInputError, match="does not match its own SHA-256"):
        export(tmp_path / "run", raw=raw)
    assert not list((tmp_path / "run").glob("export*/*"))
