import contextlib
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import samples
import torch
from safetensors.torch import load_file, save_file
from samples import TENSORS, equal, save_legacy, save_zip

from kl_f8_train.__main__ import main
from kl_f8_train.core.hashes import frozen_sha256, tensors_sha256
from kl_f8_train.core.model import AutoencoderKL
from kl_f8_train.errors import MissingInputError, RunFailedError
from kl_f8_train.files import (
    atomic_path,
    check_writable,
    disk_failure,
    file_sha256,
    write_json,
    write_text,
)
from kl_f8_train.run_dir import (
    best_path,
    check_checkpoint_names,
    check_places,
    checkpoint_path,
    list_checkpoints,
    remove_leftovers,
    remove_old_checkpoints,
)
from kl_f8_train.weights import weight_file
from kl_f8_train.weights.names import Weights, to_diffusers

# --- reading --------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [save_zip, save_legacy])
@pytest.mark.parametrize("name", ["w.ckpt", "w.safetensors", "w"])
def test_torch_files_are_recognised_by_content(tmp_path, save, name):
    contents = weight_file.read(save(TENSORS, tmp_path / name))
    assert equal(contents.tensors, TENSORS)
    assert contents.stubbed == []
    assert contents.iteration is None


def test_safetensors(tmp_path):
    save_file(TENSORS, tmp_path / "w.bin", metadata={"iteration": "246803", "note": "x"})
    contents = weight_file.read(str(tmp_path / "w.bin"))
    assert equal(contents.tensors, TENSORS)
    assert contents.metadata == {"iteration": "246803", "note": "x"}
    assert contents.iteration == 246803


@pytest.mark.parametrize("start", [b"\x80", b"PK"])
def test_safetensors_whose_header_length_looks_like_a_torch_file(tmp_path, start):
    """Such a file begins with its header's length, and any bytes can be a length."""
    wanted = int.from_bytes(start, "little")
    path = tmp_path / "w.safetensors"
    save_file(TENSORS, path, metadata={"note": ""})
    shortest = int.from_bytes(path.read_bytes()[:8], "little")
    padding = (wanted - shortest) % 256 ** len(start)  # the header's length is a multiple of 8
    save_file(TENSORS, path, metadata={"note": "x" * padding})
    assert path.read_bytes().startswith(start)
    contents = weight_file.read(path)
    assert equal(contents.tensors, TENSORS)
    assert contents.metadata == {"note": "x" * padding}


@pytest.mark.parametrize("save", [save_zip, save_legacy, save_file])
def test_tensors_do_not_change_with_their_file(tmp_path, save):
    path = tmp_path / "w"
    save(TENSORS, path)
    contents = weight_file.read(path)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert equal(contents.tensors, TENSORS)


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_names_that_are_not_utf8(tmp_path, suffix):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/mod\xe8les"))
    path = folder / os.fsdecode(b"v\xe9ritable." + suffix.encode())
    model = samples.tiny_vae()
    weight_file.save_autoencoder(model, path)
    assert samples.equal(weight_file.load_autoencoder(path).state_dict(), model.state_dict())
    assert [file.suffix for file in folder.iterdir()] == [f".{suffix}"]


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    save_file(dict(samples.tiny_vae().state_dict()), tmp_path / "w.safetensors")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # root may read every file
    with pytest.raises(MissingInputError, match="may not be read; change its permissions"):
        weight_file.read(tmp_path / "w.safetensors")


def test_safetensors_without_metadata(tmp_path):
    save_file(TENSORS, tmp_path / "w.safetensors")
    assert weight_file.read(tmp_path / "w.safetensors").metadata == {}


# --- files that are broken ------------------------------------------------------------------


def lying_safetensors(header: dict | bytes, length: int | None = None, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "data",
    [
        lying_safetensors({"a": entry([4], 0, 16)}, length=2**60),
        lying_safetensors({"a": entry([4], 0, 16)}, length=10, data=bytes(16)),
        lying_safetensors({"a": entry([4], 0, 16)}, length=2**63 + 5),
        lying_safetensors({"a": entry([4], 0, 16)}, data=bytes(8)),
        lying_safetensors({"a": entry([4], 0, 16)}, data=bytes(32)),
        lying_safetensors({"a": entry([5], 0, 16)}, data=bytes(16)),
        lying_safetensors({"a": entry([2**40, 2**40], 0, 16)}, data=bytes(16)),
        lying_safetensors({"a": entry([4], 16, 0)}, data=bytes(16)),
        lying_safetensors({"a": entry([4], 0, 16), "b": entry([4], 0, 16)}, data=bytes(16)),
        lying_safetensors({"a": entry([4], 0, 16, "F99")}, data=bytes(16)),
        lying_safetensors({"a": 3}, data=bytes(16)),
        lying_safetensors(b"{" + b"\xff" * 40),
        lying_safetensors(b"{" * 4000),
    ],
)
def test_safetensors_headers_that_lie(tmp_path, data):
    path = tmp_path / "w.safetensors"
    path.write_bytes(data)
    with pytest.raises(MissingInputError, match=r"w\.safetensors"):
        weight_file.read(path)


@pytest.mark.parametrize(
    "data", [b"", b"x", b"hello, this is no weight file\n" * 50, bytes(5000), b"PK", b"\x80", b"{}"]
)
def test_other_files(tmp_path, data):
    path = tmp_path / "w.ckpt"
    path.write_bytes(data)
    with pytest.raises(MissingInputError, match=r"w\.ckpt") as caught:
        weight_file.read(path)
    assert caught.value.exit_code == 3


def test_missing_file(tmp_path):
    with pytest.raises(MissingInputError, match="no such file") as caught:
        weight_file.read(tmp_path / "absent.ckpt")
    assert caught.value.exit_code == 3


def test_a_file_that_is_not_a_file(tmp_path):
    with pytest.raises(MissingInputError, match="neither a run directory"):
        weight_file.read(tmp_path)


# --- autoencoders ---------------------------------------------------------------------------


def same_network(path: Path) -> bool:
    loaded = weight_file.load_autoencoder(path)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    return equal(dict(loaded.state_dict()), dict(samples.tiny_vae().state_dict()))


def test_diffusers_folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file(
        to_diffusers(samples.tiny_vae().state_dict()),
        tmp_path / "diffusion_pytorch_model.safetensors",
    )
    contents, weights = weight_file.read_weights(tmp_path)
    assert contents.path.name == "diffusion_pytorch_model.safetensors"
    assert weights.layout == "diffusers autoencoder"
    assert same_network(tmp_path)


def test_diffusers_folder_with_an_old_file(tmp_path):
    state = to_diffusers(samples.tiny_vae().state_dict())
    save_legacy(state, tmp_path / "diffusion_pytorch_model.bin")
    assert same_network(tmp_path)


def test_compvis_file(tmp_path):
    state = {"state_dict": samples.tiny_vae().state_dict(), "global_step": 5}
    assert same_network(save_zip(state, tmp_path / "model.ckpt"))


def test_half_precision_becomes_float32(tmp_path):
    state = {key: value.half() for key, value in samples.tiny_vae().state_dict().items()}
    loaded = weight_file.load_autoencoder(save_zip(state, tmp_path / "model.ckpt"))
    assert {value.dtype for value in loaded.state_dict().values()} == {torch.float32}


def test_part_of_an_autoencoder(tmp_path):
    state = dict(samples.tiny_vae().state_dict())
    del state["decoder.mid.attn_1.q.weight"]
    path = save_zip(state, tmp_path / "model.ckpt")
    with pytest.raises(MissingInputError, match=r"model\.ckpt.*") as caught:
        weight_file.load_autoencoder(path)
    assert "missing decoder.mid.attn_1.q.weight" in str(caught.value)


def test_no_autoencoder(tmp_path):
    path = save_zip({"x": torch.ones(1)}, tmp_path / "model.ckpt")
    with pytest.raises(MissingInputError, match=r"model\.ckpt: no autoencoder"):
        weight_file.read_weights(path)


@pytest.mark.parametrize("folder", ["", "vae", "diffusers"])
@pytest.mark.parametrize("variant", ["", "fp16."])
def test_pipeline_folder(tmp_path, folder, variant):
    (tmp_path / folder).mkdir(exist_ok=True)
    state = to_diffusers(samples.tiny_vae().state_dict())
    save_file(state, tmp_path / folder / f"diffusion_pytorch_model.{variant}safetensors")
    (tmp_path / "unet").mkdir()
    assert same_network(tmp_path)


@pytest.mark.parametrize("name", ["w.ckpt", "w.safetensors", "w.vae.pt", "w"])
def test_a_full_checkpoint_is_read_in_part(tmp_path, name):
    state = {f"first_stage_model.{k}": v for k, v in samples.tiny_vae().state_dict().items()}
    state["model.diffusion_model.out.weight"] = torch.ones(100)
    for save in (save_zip, save_legacy, lambda content, path: save_file(content, path)):
        save(state, tmp_path / name)
        contents, weights = weight_file.read_weights(tmp_path / name)
        assert contents.tensors["model.diffusion_model.out.weight"].is_meta
        assert weights.dropped == ["model.diffusion_model.out.weight"]
        assert same_network(tmp_path / name)


def test_a_claimed_size_is_checked_before_it_is_built(tmp_path):
    state = dict(samples.tiny_vae().state_dict())
    state["encoder.conv_in.weight"] = torch.ones(320_000, 1, 1, 1)
    path = save_zip(state, tmp_path / "w.ckpt")
    with pytest.raises(MissingInputError, match="not this architecture"):
        weight_file.load_autoencoder(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder.conv_in.weight": torch.ones(32, 3, 3, 3, 3)},
         r"encoder.conv_in.weight is \(32, 3, 3, 3, 3\), expected \(32, 3, 3, 3\)"),
        ({"encoder.conv_in.weight": torch.ones(33, 3, 3, 3)}, "must be divisible by"),
        ({"quant_conv.weight": None}, r"missing quant_conv.weight, expected \(8, 8, 1, 1\)"),
        ({"post_quant_conv.weight": None}, "'post_quant_conv.weight' is missing"),
        ({"encoder.conv_in.weight": torch.ones(())}, "its shapes differ"),
        ({"encoder.conv_in.weight": torch.ones(0, 3, 3, 3)}, "its shapes differ"),
        ({"decoder.conv_in.weight": torch.ones(64, 16, 3, 3)},
         r"encoder.conv_out.weight is \(8, 64, 3, 3\), expected \(32, 64, 3, 3\)"),
    ],
)  # fmt: skip
def test_other_architectures_are_told(tmp_path, change, message):
    state = samples.tiny_vae().state_dict() | change
    path = save_zip({k: v for k, v in state.items() if v is not None}, tmp_path / "w.ckpt")
    with pytest.raises(MissingInputError, match=message):
        weight_file.load_autoencoder(path)


# --- the report -----------------------------------------------------------------------------


def found(path: Path, select: str = "ema") -> dict:
    return weight_file.report(*weight_file.read_weights(path, select))


def test_report_of_the_originals_file(tmp_path):
    vae = samples.tiny_vae()
    state = dict(vae.state_dict()) | {
        "loss.logvar": torch.tensor(0.25),
        "loss.discriminator.main.0.weight": torch.ones(2),
        "loss.perceptual_loss.lin0.weight": torch.ones(3),
        "model_ema.decay": torch.tensor(0.5),
        "model_ema.num_updates": torch.tensor(250, dtype=torch.int32),
    }
    content = {"state_dict": state, "global_step": 246803, "optimizer_states": [{"state": {}}]}
    result = found(save_zip(content, tmp_path / "model.ckpt"))
    assert {key: result[key] for key in result if key not in ("file", "not_kl_f8")} == {
        "container": "torch zip",
        "layout": "CompVis autoencoder",
        "tensors": len(vae.state_dict()),
        "dtypes": ["float32"],
        "shape": None,
        "family": None,
        "states": {},
        "iteration": 246803,
        "discriminator": True,
        "optimizer": True,
        "ema": {"model_ema.decay": 0.5, "model_ema.num_updates": 250.0},
        "ema_decays": [],
        "logvar": 0.25,
        "notes": [],
        "dropped": {"loss.perceptual_loss": 1},
        "stubbed": [],
        "frozen_sha256": frozen_sha256(vae.state_dict()),
    }
    assert json.loads(json.dumps(result)) == result
    shown = weight_file.describe(result)
    for part in (
        "model.ckpt: CompVis autoencoder (torch zip)",
        "with discriminator; with optimizer; iteration 246,803",
        "a narrow network of kl-f8's architecture (32 channels, kl-f8 has 128): ch_mult [",
        "EMA scalars: model_ema.decay 0.5, model_ema.num_updates 250",
        "loss.logvar is 0.25",
        "left out: 1 loss.perceptual_loss",
        f"sha256 {result['frozen_sha256']}",
    ):
        assert part in shown, part


def test_report_of_a_pruned_half_precision_file(tmp_path):
    """The hash is of what training starts from, float32."""
    state = {key: value.half() for key, value in samples.tiny_vae().state_dict().items()}
    save_file(state, tmp_path / "w")
    result = found(tmp_path / "w")
    assert (result["discriminator"], result["optimizer"], result["iteration"]) == (0, 0, None)
    assert result["dtypes"] == ["float16"]
    loaded = weight_file.load_autoencoder(tmp_path / "w").state_dict()
    assert result["frozen_sha256"] == frozen_sha256(loaded)
    shown = weight_file.describe(result)
    assert "no discriminator; no optimizer; iteration not stated" in shown
    for absent in ("EMA scalars", "logvar", "left out", "not loaded", "SDXL"):
        assert absent not in shown


@pytest.mark.parametrize(("scale", "family"), [(0.13025, "sdxl"), (0.18215, "sd"), (0.5, "other")])
def test_the_family_is_shown_by_the_folder(tmp_path, scale, family):
    (tmp_path / "config.json").write_text(json.dumps({"scaling_factor": scale}))
    state = to_diffusers(samples.tiny_vae().state_dict())
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    result = found(tmp_path)
    assert result["family"] == family
    assert ("Stable Diffusion XL" in weight_file.describe(result)) is (family == "sdxl")


@pytest.mark.parametrize("text", ["", "[]", "{", "3", "[" * 100_000])
def test_a_config_that_is_none(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    state = to_diffusers(samples.tiny_vae().state_dict())
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    assert found(tmp_path)["family"] is None
    assert "config.json cannot be read" in found(tmp_path)["notes"][0]
    save_file(state, tmp_path / "w.safetensors")  # whose configuration it need not be
    assert not found(tmp_path / "w.safetensors")["notes"]


def test_an_iteration_that_is_none(tmp_path):
    save_file(dict(samples.tiny_vae().state_dict()), tmp_path / "w", {"iteration": "many"})
    assert found(tmp_path / "w")["iteration"] is None


def test_inspect(tmp_path, capsys):
    path = save_zip({"state_dict": samples.tiny_vae().state_dict()}, tmp_path / "w")
    assert main(["inspect", str(path)]) == 0
    assert capsys.readouterr().out == weight_file.describe(found(path)) + "\n"
    assert main(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found(path)


def test_inspect_says_which_weights_of_a_run(tmp_path, capsys):
    state = samples.tiny_vae().state_dict()
    tensors = {f"autoencoder.{key}": value for key, value in state.items()}
    tensors |= {
        f"ema.{key}": value.clone() for key, value in state.items() if key.startswith("decoder.")
    }
    tensors |= {"optimizer.decoder.x.step": torch.ones(())}
    path = checkpoint_path(tmp_path, 7)
    weight_file.write_safetensors(path, tensors, {"iteration": "7"})
    for flags, name in ((["--raw"], "raw"), ([], "EMA")):
        assert main(["inspect", str(tmp_path), *flags]) == 0
        shown = capsys.readouterr().out
        assert f"training checkpoint ({name} weights)" in shown
        assert "no discriminator; with optimizer; iteration 7" in shown


def test_kl_f8s_shape_is_told():
    weights = Weights("CompVis autoencoder", dict(AutoencoderKL().state_dict()))
    result = weight_file.report(weight_file.Contents(Path("x"), {}), weights)
    assert result["not_kl_f8"] is None
    assert "\n  kl-f8's shape\n" in weight_file.describe(result)


def test_the_shipped_base_is_described_without_alarm():
    """It is narrow on purpose, and there is no float32 file of it to advise."""
    shown = weight_file.describe(weight_file.report(*weight_file.read_weights("kl_f8_mini")))
    assert "a narrow network of kl-f8's architecture (16 channels, kl-f8 has 128)" in shown
    assert "its latents have a scale of their own" in shown
    assert "float32" not in shown
    assert "not kl-f8's shape" not in shown
    assert "expected" not in shown


def test_a_float32_file_is_advised_where_there_may_be_one(tmp_path):
    state = {key: value.half() for key, value in samples.tiny_vae().state_dict().items()}
    assert "take the float32 file, if there is one" in quality(tmp_path, state)


def test_another_architecture_is_not_called_narrow():
    state = dict(samples.tiny_vae().state_dict())
    state["decoder.conv_in.weight"] = state["decoder.conv_in.weight"][:, :, :1, :1]
    weights = Weights("CompVis autoencoder", state)
    result = weight_file.report(weight_file.Contents(Path("x"), {}), weights)
    assert "not kl-f8's shape: encoder.conv_in.weight is (32," in weight_file.describe(result)


# --- writing --------------------------------------------------------------------------------


def test_write_torch_holds_only_the_old_records(tmp_path):
    path = tmp_path / "w.ckpt"
    weight_file.write_torch(path, {"state_dict": TENSORS, "global_step": 5})
    with zipfile.ZipFile(path) as archive:
        names = {name.split("/", 1)[1] for name in archive.namelist()}
        assert {name.split("/")[0] for name in archive.namelist()} == {"archive"}
        assert all(item.compress_type == zipfile.ZIP_STORED for item in archive.infolist())
        assert archive.testzip() is None
    assert names == {"data.pkl", "version", *(f"data/{number}" for number in range(len(TENSORS)))}


@pytest.mark.parametrize("mapped", [False, True])
def test_write_torch_loads_strictly(tmp_path, mapped):
    path = tmp_path / "w.ckpt"
    weight_file.write_torch(path, {"state_dict": TENSORS, "global_step": 5})
    loaded = torch.load(path, weights_only=True, mmap=mapped)
    assert loaded["global_step"] == 5
    assert equal(loaded["state_dict"], TENSORS)
    assert weight_file.read(path).iteration == 5


def test_write_torch_aligns_its_records(tmp_path):
    path = tmp_path / "w.ckpt"
    weight_file.write_torch(path, TENSORS)
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        for item in archive.infolist():
            name, extra = struct.unpack_from("<HH", data, item.header_offset + 26)
            assert (item.header_offset + 30 + name + extra) % 64 == 0


def test_write_safetensors(tmp_path):
    path = tmp_path / "new" / "w.safetensors"
    tensors = TENSORS | {"turned": torch.arange(6.0).reshape(2, 3).T.requires_grad_()}
    weight_file.write_safetensors(path, tensors, {"iteration": "3"})
    assert equal(load_file(path), tensors)
    assert weight_file.read(path).metadata == {"format": "pt", "iteration": "3"}
    assert os.listdir(path.parent) == ["w.safetensors"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        weight_file.write_safetensors(tmp_path / "w.safetensors", TENSORS, {})
        weight_file.write_torch(tmp_path / "w.ckpt", TENSORS)
        write_json(tmp_path / "w.json", {"a": 1})
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    for path in tmp_path.iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask, path.name


@contextlib.contextmanager
def no_room(folder: Path, how: str):
    """Inside, files in `folder` cannot grow beyond 2 MB."""
    if how == "file size limit":
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        return
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a full disk needs a small tmpfs, which only root may mount")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("how", ["file size limit", "full disk"])
@pytest.mark.parametrize(
    ("write", "content"),
    [
        (weight_file.write_safetensors, ({"a": torch.zeros(1_250_000)}, {})),
        (weight_file.write_torch, ({"a": torch.zeros(1_250_000)},)),
        (write_text, ("x" * 5_000_000,)),
    ],
)
def test_no_room_leaves_the_previous_file(tmp_path, how, write, content):
    folder = tmp_path / "run"
    folder.mkdir()
    path = folder / "w"
    with no_room(folder, how):
        weight_file.write_safetensors(path, {"a": torch.ones(3)}, {})
        with pytest.raises(RunFailedError, match="Make room") as caught:
            write(path, *content)
        assert "bytes are free" in str(caught.value)
        assert caught.value.exit_code == 4
        assert os.listdir(folder) == ["w"]
        assert torch.equal(weight_file.read(path).tensors["a"], torch.ones(3))


def test_an_interrupted_write_leaves_the_previous_file(tmp_path):
    path = tmp_path / "w.txt"
    write_text(path, "before")

    def interrupted() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["w.txt"]


def test_check_writable(tmp_path):
    check_writable(tmp_path / "new" / "run")
    assert os.listdir(tmp_path / "new" / "run") == []
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFailedError, match="cannot write in"):
        check_writable(tmp_path / "file" / "run")


def test_a_disk_without_inodes_is_not_called_empty(tmp_path, monkeypatch):
    values = list(os.statvfs(tmp_path))
    values[5:8] = (100, 0, 0)  # files, free files, those for users
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(values))
    said = str(disk_failure(tmp_path / "x", OSError("No space left on device")))
    assert "no files (inodes) and " in said


def test_what_a_folder_of_another_trainer_holds_is_named(tmp_path):
    made = tmp_path / "checkpoint-500" / "autoencoderkl_ema" / "diffusion_pytorch_model.safetensors"
    made.parent.mkdir(parents=True)
    made.touch()
    with pytest.raises(MissingInputError, match=rf"the weight file itself: {made}"):
        weight_file.find(tmp_path / "checkpoint-500")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "__0_0.distcp").touch()
    with pytest.raises(MissingInputError, match="parts is a distributed checkpoint: torch's dcp"):
        weight_file.find(tmp_path / "parts")


# --- runs -----------------------------------------------------------------------------------


def make_checkpoints(run: Path, *iterations: tuple[int, int]) -> None:
    for iteration, warmup in iterations:
        path = checkpoint_path(run, iteration, warmup)
        weight_file.write_safetensors(path, {"a": torch.tensor(iteration)}, {})


def names(run: Path) -> list[str]:
    return [path.stem.removeprefix("iteration-") for path in list_checkpoints(run)]


def test_newest_first(tmp_path):
    make_checkpoints(tmp_path, (9, 0), (10, 0), (246803, 0), (1000, 0))
    assert names(tmp_path) == ["000246803", "000001000", "000000010", "000000009"]
    assert weight_file.find(tmp_path).stem == "iteration-000246803"
    assert weight_file.read(tmp_path).tensors["a"] == 246803


def test_warm_up_is_older_than_its_end(tmp_path):
    make_checkpoints(tmp_path, (5, 200), (5, 1000), (5, 0), (5, 30), (6, 0), (4, 0))
    assert names(tmp_path) == [
        "000000006",
        "000000005",
        "000000005-warmup-001000",
        "000000005-warmup-000200",
        "000000005-warmup-000030",
        "000000004",
    ]


def test_leftovers_are_no_checkpoints(tmp_path):
    make_checkpoints(tmp_path, (5, 0))
    hidden = (".config.yaml.7.part", "pictures/.iteration-000000009.jpg.7.part")
    leftovers = [tmp_path / name for name in hidden]
    leftovers += [tmp_path / "checkpoints" / ".iteration-000000009.safetensors.77.part"]
    for leftover in leftovers:
        leftover.parent.mkdir(exist_ok=True)
        leftover.write_text("half")
    assert names(tmp_path) == ["000000005"]
    remove_leftovers(tmp_path)
    assert not any(leftover.exists() for leftover in leftovers)
    assert names(tmp_path) == ["000000005"]


STOP_IN_THE_MIDDLE = """
import pathlib, sys, time
from kl_f8_train.files import atomic_path
with atomic_path(pathlib.Path(sys.argv[1])) as part:
    part.write_text("half")
    print("half", flush=True)
    time.sleep(600)
"""


def test_the_next_write_removes_what_killed_ones_left_and_nothing_else(tmp_path):
    path = tmp_path / "x.safetensors"
    other = tmp_path / ".y.safetensors.7-01234567.part"
    other.touch()
    command = [sys.executable, "-c", STOP_IN_THE_MIDDLE, str(path)]
    writers = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    for writer in writers:
        assert writer.stdout.readline() == b"half\n"
    writers[0].kill()
    writers[0].wait()
    write_text(path, "whole")
    (left,) = tmp_path.glob(".x.*")
    assert f".{writers[1].pid}-" in left.name
    writers[1].kill()
    writers[1].wait()
    write_text(path, "whole")
    assert sorted(tmp_path.iterdir()) == [other, path]


WRITE = """
import sys, pathlib, torch
from kl_f8_train.weights.weight_file import write_safetensors
while True:
    write_safetensors(pathlib.Path(sys.argv[1]), {"a": torch.ones(50_000_000)}, {})
"""


def hidden_bytes(folder: Path) -> int:
    """Of files that are being written; one may be renamed meanwhile."""
    with contextlib.suppress(FileNotFoundError):
        return sum(file.stat().st_size for file in folder.glob(".*"))
    return 0


def test_a_write_that_is_killed_leaves_nothing_the_next_start_does_not_remove(tmp_path):
    path = checkpoint_path(tmp_path, 9)
    with subprocess.Popen([sys.executable, "-c", WRITE, str(path)]) as writer:
        while not hidden_bytes(path.parent):
            assert writer.poll() is None
            time.sleep(0.001)
        writer.kill()
    assert list(path.parent.glob(".*"))
    remove_leftovers(tmp_path)
    assert not list(path.parent.glob(".*"))


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [
        (1, 0, ["000000500"]),
        (2, 0, ["000000500", "000000400"]),
        (1, 200, ["000000500", "000000400", "000000200"]),
        (9, 0, ["000000500", "000000400", "000000300", "000000200", "000000100"]),
    ],
)
def test_old_checkpoints_are_removed(tmp_path, keep_last, keep_every, kept):
    make_checkpoints(tmp_path, *((number * 100, 0) for number in range(1, 6)))
    saved = checkpoint_path(tmp_path, 500)
    remove_old_checkpoints(saved, keep_last, keep_every)
    assert names(tmp_path) == kept


def test_newer_checkpoints_of_an_abandoned_try_do_not_count(tmp_path):
    make_checkpoints(tmp_path, (2000, 0), (2500, 0), (3000, 0))
    remove_old_checkpoints(checkpoint_path(tmp_path, 2500), 1, 0)
    assert names(tmp_path) == ["000003000", "000002500"]


def test_warm_up_checkpoints_are_not_kept_for_good(tmp_path):
    make_checkpoints(tmp_path, (200, 10), (200, 20), (200, 0), (300, 0))
    remove_old_checkpoints(checkpoint_path(tmp_path, 300), 1, 100)
    assert names(tmp_path) == ["000000300", "000000200"]


def test_copies_under_other_names_are_neither_resumed_from_nor_removed(tmp_path):
    make_checkpoints(tmp_path, (1, 0), (2, 0))
    copies = [tmp_path / "checkpoints" / f"iteration-000000001{x}" for x in ("-good", "_old")]
    for copy in copies:
        shutil.copy(checkpoint_path(tmp_path, 1), f"{copy}.safetensors")
    assert names(tmp_path) == ["000000002", "000000001"]
    check_checkpoint_names(tmp_path)
    remove_old_checkpoints(checkpoint_path(tmp_path, 2), 1, 0)
    assert names(tmp_path) == ["000000002"]
    assert all(Path(f"{copy}.safetensors").is_file() for copy in copies)
    checkpoint_path(tmp_path, 2).unlink()
    with pytest.raises(MissingInputError, match=r"1_old\.safetensors is not named as a checkpoint"):
        check_checkpoint_names(tmp_path)


def test_a_run_that_kept_its_best_before_any_checkpoint_starts_anew(tmp_path):
    make_checkpoints(tmp_path, (1, 0))
    checkpoint_path(tmp_path, 1).rename(best_path(tmp_path, 1))
    check_checkpoint_names(tmp_path)


@pytest.mark.parametrize("kind", ["file", "link"])
def test_checkpoints_that_could_not_be_written_are_noticed_at_the_start(tmp_path, kind):
    check_places(tmp_path)
    assert not (tmp_path / "checkpoints").exists()
    if kind == "file":
        (tmp_path / "checkpoints").touch()
    else:
        (tmp_path / "checkpoints").symlink_to("/gone/checkpoints")
    with pytest.raises(RunFailedError, match=f"checkpoints: it is a {kind}"):
        check_places(tmp_path)


def test_no_run_yet(tmp_path):
    check_checkpoint_names(tmp_path)
    assert list_checkpoints(tmp_path / "absent") == []


# --- hashes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"a": TENSORS["a"] + 1e-3},
        {"a": TENSORS["a"].reshape(1000, 3)},
        {"a": TENSORS["a"].double()},
        {"a": -TENSORS["a"]},
        {"c.count": torch.tensor(8)},
        {"c.count": torch.tensor([7])},
        {"c.flags": torch.tensor([True, True])},
        {"new": torch.zeros(0)},
    ],
)
def test_hash_sees_every_change(change):
    assert tensors_sha256(TENSORS | change) != tensors_sha256(TENSORS)


def test_hash_sees_names_and_the_sign_of_zero():
    zero = tensors_sha256({"a": torch.tensor([0.0])})
    assert tensors_sha256({"b": torch.tensor([0.0])}) != zero
    assert tensors_sha256({"a": torch.tensor([-0.0])}) != zero
    assert tensors_sha256({}) != zero


def test_hash_ignores_order_and_memory_layout():
    backwards = dict(reversed(TENSORS.items()))
    strided = TENSORS | {"a": TENSORS["a"].T.contiguous().T}
    expected = tensors_sha256(TENSORS)
    assert tensors_sha256(backwards) == expected
    assert tensors_sha256(strided) == expected


def test_hash_is_frozen():
    assert tensors_sha256({"a": torch.arange(3.0)}) == (
        "7c52f1966afff500bf59f4cec6a664fb557895a2be9290b9eff977454819c60b"
    )


def test_file_hash(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    digest = file_sha256(tmp_path / "x")
    assert digest == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# --- the quality of the numbers -------------------------------------------------------------


def quality(tmp_path: Path, state: dict) -> str:
    save_file(state, tmp_path / "w.safetensors")
    assert main(["inspect", str(tmp_path / "w.safetensors")]) == 0
    return weight_file.describe(found(tmp_path / "w.safetensors"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_values_that_are_not_finite_are_named(tmp_path, value, dtype):
    state = {k: v.to(dtype) for k, v in samples.tiny_vae().state_dict().items()}
    state["decoder.conv_in.weight"][0] = value
    assert "1 tensor is not finite, decoder.conv_in.weight first" in quality(tmp_path, state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_rounding_is_told_by_what_it_does_to_latents(tmp_path, dtype):
    exact = samples.tiny_vae()
    state = {k: v.to(dtype) for k, v in exact.state_dict().items()}
    shown = quality(tmp_path, state)
    (line,) = [line for line in shown.splitlines() if "rounded to" in line]
    assert ("WARNING" in line) is (dtype.itemsize == 1)
    share = float(line.split("about ")[1].split(" %")[0]) / 100
    rounded = weight_file.load_autoencoder(tmp_path / "w.safetensors")
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        before, after = exact.encode(x).mean, rounded.encode(x).mean
    true = float((after - before).square().mean().sqrt() / before.std())
    assert 0.1 < share / true < 10


@pytest.mark.parametrize(
    "scale",
    [
        "decoder.conv_in.scale_weight",
        "decoder.mid.attn_1.q.weight_scale",
        "decoder.mid.attn_1.q.weight.quant_state.bitsandbytes__nf4",
        "decoder.mid.attn_1.q.SCB",
    ],
)
def test_scales_beside_weights_show_that_they_are_quantised(tmp_path, scale):
    """Without its scale a float8 weight is another number."""
    state = {k: v.to(torch.float8_e4m3fn) for k, v in samples.tiny_vae().state_dict().items()}
    state[scale] = torch.ones(1)
    assert f"WARNING: {scale} is a scale: quantised weights" in quality(tmp_path, state)
    with pytest.raises(MissingInputError, match=f"{scale} is a scale: quantised.*from before"):
        weight_file.load_autoencoder(tmp_path / "w.safetensors")


def test_weights_of_zeros_are_named(tmp_path):
    """Downloaders make a file of the final size first; what did not come is zeros."""
    state = {k: v.clone() for k, v in samples.tiny_vae().state_dict().items()}
    assert "all zeros" not in quality(tmp_path, state)
    for key in ("decoder.conv_in.weight", "decoder.conv_out.weight"):
        state[key].zero_()
    assert "WARNING: 2 weights are all zeros, decoder.conv_in.weight" in quality(tmp_path, state)


def test_quantised_weights_are_refused_and_named(tmp_path):
    state = dict(samples.tiny_vae().state_dict())
    state["decoder.conv_in.weight"] = state["decoder.conv_in.weight"].to(torch.int8)
    assert "1 tensor is of whole numbers, decoder.conv_in.weight first" in quality(tmp_path, state)
    with pytest.raises(MissingInputError, match="quantised weights cannot be trained"):
        weight_file.load_autoencoder(tmp_path / "w.safetensors")


def test_float8_in_a_torch_file(tmp_path):
    state = {k: v.to(torch.float8_e4m3fn) for k, v in samples.tiny_vae().state_dict().items()}
    path = save_zip({"state_dict": state}, tmp_path / "w.ckpt")
    assert found(path)["dtypes"] == ["float8_e4m3fn"]
    loaded = weight_file.load_autoencoder(path).state_dict()
    assert all(torch.equal(loaded[key], value.float()) for key, value in state.items())


def test_nothing_is_read_by_the_name_of_a_descriptor():
    """Which a container without /proc does not have, and macOS shares its place in the file."""
    package = Path(weight_file.__file__).parents[1]
    assert not [file for file in package.rglob("*.py") if "/dev/fd" in file.read_text()]
