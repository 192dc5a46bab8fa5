import argparse
import collections
import contextlib
import json
import os
import pathlib
import pickle
import resource
import struct
import subprocess
import sys
import time
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import samples
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from kl_f8_train import checkpoint
from kl_f8_train.errors import MissingInputError, RunFailedError
from kl_f8_train.formats import to_diffusers

TENSORS = {
    "a": torch.arange(3000, dtype=torch.float32).reshape(3, 1000),
    "b.half": torch.linspace(-1, 1, 500).half(),
    "b.bfloat": torch.linspace(-1, 1, 500).bfloat16(),
    "c.count": torch.tensor(7),
    "c.flags": torch.tensor([True, False]),
}


def save_zip(content, path: Path) -> Path:
    torch.save(content, path)
    return path


def save_legacy(content, path: Path) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=False)
    return path


def save_pickle(content, path: Path) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=2))
    return path


def equal(one: checkpoint.State, other: checkpoint.State) -> bool:
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one
    )


# --- reading --------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [save_zip, save_legacy])
@pytest.mark.parametrize("name", ["w.ckpt", "w.safetensors", "w"])
def test_torch_files_are_recognised_by_content(tmp_path, save, name):
    contents = checkpoint.read(save(TENSORS, tmp_path / name))
    assert equal(contents.tensors, TENSORS)
    assert contents.stubbed == []
    assert contents.iteration is None


@pytest.mark.parametrize("save", [save_zip, save_legacy])
def test_views_parameters_and_shared_storage(tmp_path, save):
    base = torch.arange(12.0).reshape(3, 4)
    content = {
        "base": base,
        "turned": base.T,
        "row": base[1],
        "parameter": torch.nn.Parameter(base * 2),
    }
    contents = checkpoint.read(save(collections.OrderedDict(content), tmp_path / "w.pt"))
    assert equal(contents.tensors, {key: value.detach() for key, value in content.items()})
    assert not contents.tensors["parameter"].requires_grad


def test_safetensors(tmp_path):
    save_file(TENSORS, tmp_path / "w.bin", metadata={"iteration": "246803", "note": "x"})
    contents = checkpoint.read(str(tmp_path / "w.bin"))
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
    contents = checkpoint.read(path)
    assert equal(contents.tensors, TENSORS)
    assert contents.metadata == {"note": "x" * padding}


def test_safetensors_without_metadata(tmp_path):
    save_file(TENSORS, tmp_path / "w.safetensors")
    assert checkpoint.read(tmp_path / "w.safetensors").metadata == {}


def lightning_file(monkeypatch) -> dict:
    """What PyTorch Lightning 1.x wrote: callbacks by class, numpy, OmegaConf and more."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)

    class CheckpointOfOldTimes:
        def __init__(self) -> None:
            self.best = np.float64(3.5)

    CheckpointOfOldTimes.__module__ = name
    CheckpointOfOldTimes.__qualname__ = "CheckpointOfOldTimes"
    module.CheckpointOfOldTimes = CheckpointOfOldTimes
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
    counts = collections.defaultdict(list)
    counts["x"].append(1)
    return {
        "epoch": 12,
        "global_step": 246803,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": collections.OrderedDict(TENSORS),
        "callbacks": {CheckpointOfOldTimes: {"best_model_score": torch.tensor(1.0)}},
        "more": [CheckpointOfOldTimes(), np.float64(0.5), np.arange(4), np.dtype("float32")],
        "hyper_parameters": OmegaConf.create({"lr": 4.5e-6, "list": [1, {"x": None}]}),
        "arguments": argparse.Namespace(path=pathlib.PurePosixPath("/x/y")),
        "counts": counts,
        "plain": {"set": {1, 2}, "tuple": (1, 2.5, "x", None, True), "size": torch.Size([1])},
    }


@pytest.mark.parametrize("save", [save_zip, save_legacy])
def test_lightning_files_load_and_make_no_foreign_object(tmp_path, monkeypatch, save):
    with monkeypatch.context() as while_writing:
        path = save(lightning_file(while_writing), tmp_path / "model.ckpt")
    contents = checkpoint.read(path)
    assert equal(contents.tensors, TENSORS)
    assert contents.iteration == 246803
    assert contents.metadata == {"global_step": "246803", "epoch": "12"}
    stubbed = "\n".join(contents.stubbed)
    assert contents.stubbed == sorted(set(contents.stubbed))
    assert "pytorch_lightning.callbacks.model_checkpoint.CheckpointOfOldTimes" in stubbed
    for part in ("multiarray.scalar", "omegaconf.", "argparse.Namespace", "pathlib", "defaultdict"):
        assert part in stubbed


@pytest.mark.slow
def test_reading_a_lightning_file_imports_nothing(tmp_path, monkeypatch):
    with monkeypatch.context() as while_writing:
        path = save_zip(lightning_file(while_writing), tmp_path / "model.ckpt")
    code = (
        "import sys\n"
        "from kl_f8_train import checkpoint\n"
        "before = set(sys.modules)\n"
        f"print(len(checkpoint.read({str(path)!r}).tensors))\n"
        "names = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(names & {'pytorch_lightning', 'omegaconf', 'argparse', 'lightning'}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=samples.CONFIGS.parent,
    )
    assert done.stdout.split("\n")[:2] == ["5", "[]"]


@pytest.mark.parametrize("content", [[1, 2], "text", 3, torch.ones(2)])
def test_a_torch_file_without_a_state_dict(tmp_path, content):
    with pytest.raises(MissingInputError, match=r"w\.ckpt"):
        checkpoint.read(save_zip(content, tmp_path / "w.ckpt"))


# --- files that attack ----------------------------------------------------------------------


class Attack:
    """Pickles as a call, as a hostile file would."""

    def __init__(self, function, *arguments) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def attacks(marker: Path) -> dict[str, Attack]:
    script = f"open({str(marker)!r}, 'w').close()"
    return {
        "system": Attack(os.system, f"touch {marker}"),
        "eval": Attack(eval, script),
        "exec": Attack(exec, script),
        "getattr": Attack(getattr, marker, "touch"),
        "Popen": Attack(subprocess.Popen, ["touch", str(marker)]),
        "mkdir": Attack(os.mkdir, str(marker)),
        "open": Attack(open, str(marker), "w"),
        "__import__": Attack(__import__, "antigravity"),
        "loads": Attack(pickle.loads, pickle.dumps(Attack(os.mkdir, str(marker)))),
        "load": Attack(torch.load, str(marker)),
        "partial": Attack(__import__("functools").partial, os.mkdir, str(marker)),
        "attrgetter": Attack(__import__("operator").attrgetter, "touch"),
    }


@pytest.mark.parametrize("save", [save_zip, save_legacy, save_pickle])
@pytest.mark.parametrize("name", attacks(Path("x")))
def test_attacks_are_refused_by_name(tmp_path, save, name):
    marker = tmp_path / "marker"
    content = {"state_dict": {"a": torch.ones(2)}, "extra": attacks(marker)[name]}
    if save is save_pickle:
        content = {"extra": attacks(marker)[name]}
    path = save(content, tmp_path / "model.ckpt")
    with pytest.raises(MissingInputError, match=rf"asks to run .*\.{name}\b.*refused") as caught:
        checkpoint.read(path)
    assert caught.value.exit_code == 3
    assert not marker.exists()


def test_the_attacks_would_work(tmp_path):
    """Otherwise the test above shows nothing."""
    for name in ("system", "eval", "exec", "mkdir", "open", "loads"):
        marker = tmp_path / name
        path = save_zip({"extra": attacks(marker)[name]}, tmp_path / "model.ckpt")
        torch.load(path, weights_only=False)
        assert marker.exists()


@pytest.mark.parametrize("save", [save_zip, save_legacy])
def test_functions_of_known_modules_do_not_run_either(tmp_path, save):
    marker = tmp_path / "marker.npy"
    content = {"a": torch.ones(2), "extra": Attack(np.save, str(marker), [1])}
    contents = checkpoint.read(save(content, tmp_path / "model.ckpt"))
    assert equal(contents.tensors, {"a": torch.ones(2)})
    assert contents.stubbed == ["numpy.save"]
    assert not marker.exists()


def test_attribute_paths_do_not_reach_functions(tmp_path):
    """Protocol 4 names `module` + `a.b`: pathlib + Path.touch must not be Path.touch."""
    marker = tmp_path / "marker"
    name = b"Path.touch"
    body = b"\x80\x04\x8c\x07pathlib\x8c" + bytes([len(name)]) + name + b"\x93\x8c"
    body += bytes([len(str(marker))]) + str(marker).encode() + b"\x85R."
    path = tmp_path / "w.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", body)
        archive.writestr("archive/version", "3\n")
    assert checkpoint.read(path).tensors == {}
    assert not marker.exists()


# --- files that are broken ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors", "ours"])
def test_cut_short_at_any_length(tmp_path, kind):
    whole = tmp_path / "whole"
    if kind == "safetensors":
        save_file(TENSORS, whole)
    elif kind == "ours":
        checkpoint.write_torch(whole, {"state_dict": TENSORS})
    else:
        {"zip": save_zip, "legacy": save_legacy}[kind]({"state_dict": TENSORS}, whole)
    data = whole.read_bytes()
    assert equal(checkpoint.read(whole).tensors, TENSORS)
    cut = tmp_path / "cut"
    lengths = {len(data) * percent // 100 for percent in range(0, 100, 2)} | {1, 8, len(data) - 1}
    for length in sorted(lengths):
        cut.write_bytes(data[:length])
        with pytest.raises(MissingInputError, match="cut"):
            checkpoint.read(cut)


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
        checkpoint.read(path)


@pytest.mark.parametrize(
    "data", [b"", b"x", b"hello, this is no weight file\n" * 50, bytes(5000), b"PK", b"\x80", b"{}"]
)
def test_other_files(tmp_path, data):
    path = tmp_path / "w.ckpt"
    path.write_bytes(data)
    with pytest.raises(MissingInputError, match=r"w\.ckpt") as caught:
        checkpoint.read(path)
    assert caught.value.exit_code == 3


def test_torchscript(tmp_path):
    path = tmp_path / "w.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("data.pkl", "code/__torch__.py", "constants.pkl", "version"):
            archive.writestr(f"w/{name}", b"}.")
    with pytest.raises(MissingInputError, match="TorchScript"):
        checkpoint.read(path)


def test_another_zip(tmp_path):
    path = tmp_path / "w.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("letter.txt", "dear all")
    with pytest.raises(MissingInputError, match=r"letter\.txt"):
        checkpoint.read(path)


def test_zip_bomb(tmp_path):
    path = tmp_path / "w.pt"
    source = save_zip({"a": torch.zeros(10_000_000)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(source) as plain,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert path.stat().st_size < 100_000
    start = time.monotonic()
    with pytest.raises(MissingInputError, match="unpacks to more than its own size"):
        checkpoint.read(path)
    assert time.monotonic() - start < 2


def test_missing_file(tmp_path):
    with pytest.raises(MissingInputError, match="no such file") as caught:
        checkpoint.read(tmp_path / "absent.ckpt")
    assert caught.value.exit_code == 3


def test_a_file_that_is_not_a_file(tmp_path):
    with pytest.raises(MissingInputError, match="neither a run directory"):
        checkpoint.read(tmp_path)


# --- autoencoders ---------------------------------------------------------------------------


def same_network(path: Path) -> bool:
    loaded = checkpoint.load_autoencoder(path)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    return equal(dict(loaded.state_dict()), dict(samples.tiny_vae().state_dict()))


def test_diffusers_folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file(
        to_diffusers(samples.tiny_vae().state_dict()),
        tmp_path / "diffusion_pytorch_model.safetensors",
    )
    contents, weights = checkpoint.read_weights(tmp_path)
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
    loaded = checkpoint.load_autoencoder(save_zip(state, tmp_path / "model.ckpt"))
    assert {value.dtype for value in loaded.state_dict().values()} == {torch.float32}


def test_part_of_an_autoencoder(tmp_path):
    state = dict(samples.tiny_vae().state_dict())
    del state["decoder.mid.attn_1.q.weight"]
    path = save_zip(state, tmp_path / "model.ckpt")
    with pytest.raises(MissingInputError, match=r"model\.ckpt.*") as caught:
        checkpoint.load_autoencoder(path)
    assert "missing decoder.mid.attn_1.q.weight" in str(caught.value)


def test_no_autoencoder(tmp_path):
    path = save_zip({"x": torch.ones(1)}, tmp_path / "model.ckpt")
    with pytest.raises(MissingInputError, match=r"model\.ckpt: no autoencoder"):
        checkpoint.read_weights(path)


# --- writing --------------------------------------------------------------------------------


def test_write_torch_holds_only_the_old_records(tmp_path):
    path = tmp_path / "w.ckpt"
    checkpoint.write_torch(path, {"state_dict": TENSORS, "global_step": 5})
    with zipfile.ZipFile(path) as archive:
        names = {name.split("/", 1)[1] for name in archive.namelist()}
        assert {name.split("/")[0] for name in archive.namelist()} == {"archive"}
        assert all(item.compress_type == zipfile.ZIP_STORED for item in archive.infolist())
        assert archive.testzip() is None
    assert names == {"data.pkl", "version", *(f"data/{number}" for number in range(len(TENSORS)))}


@pytest.mark.parametrize("mapped", [False, True])
def test_write_torch_loads_strictly(tmp_path, mapped):
    path = tmp_path / "w.ckpt"
    checkpoint.write_torch(path, {"state_dict": TENSORS, "global_step": 5})
    loaded = torch.load(path, weights_only=True, mmap=mapped)
    assert loaded["global_step"] == 5
    assert equal(loaded["state_dict"], TENSORS)
    assert checkpoint.read(path).iteration == 5


def test_write_torch_aligns_its_records(tmp_path):
    path = tmp_path / "w.ckpt"
    checkpoint.write_torch(path, TENSORS)
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        for item in archive.infolist():
            name, extra = struct.unpack_from("<HH", data, item.header_offset + 26)
            assert (item.header_offset + 30 + name + extra) % 64 == 0


def test_write_safetensors(tmp_path):
    path = tmp_path / "new" / "w.safetensors"
    tensors = TENSORS | {"turned": torch.arange(6.0).reshape(2, 3).T.requires_grad_()}
    checkpoint.write_safetensors(path, tensors, {"iteration": "3"})
    assert equal(load_file(path), tensors)
    assert checkpoint.read(path).metadata == {"format": "pt", "iteration": "3"}
    assert os.listdir(path.parent) == ["w.safetensors"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        checkpoint.write_safetensors(tmp_path / "w.safetensors", TENSORS, {})
        checkpoint.write_torch(tmp_path / "w.ckpt", TENSORS)
        checkpoint.write_json(tmp_path / "w.json", {"a": 1})
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
        (checkpoint.write_safetensors, ({"a": torch.zeros(1_250_000)}, {})),
        (checkpoint.write_torch, ({"a": torch.zeros(1_250_000)},)),
        (checkpoint.write_text, ("x" * 5_000_000,)),
    ],
)
def test_no_room_leaves_the_previous_file(tmp_path, how, write, content):
    folder = tmp_path / "run"
    folder.mkdir()
    path = folder / "w"
    with no_room(folder, how):
        checkpoint.write_safetensors(path, {"a": torch.ones(3)}, {})
        with pytest.raises(RunFailedError, match="Make room") as caught:
            write(path, *content)
        assert "bytes are free" in str(caught.value)
        assert caught.value.exit_code == 4
        assert os.listdir(folder) == ["w"]
        assert torch.equal(checkpoint.read(path).tensors["a"], torch.ones(3))


def test_an_interrupted_write_leaves_the_previous_file(tmp_path):
    path = tmp_path / "w.txt"
    checkpoint.write_text(path, "before")

    def interrupted() -> None:
        with checkpoint.atomic_path(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["w.txt"]


def test_check_writable(tmp_path):
    checkpoint.check_writable(tmp_path / "new" / "run")
    assert os.listdir(tmp_path / "new" / "run") == []
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFailedError, match="cannot write in"):
        checkpoint.check_writable(tmp_path / "file" / "run")


# --- runs -----------------------------------------------------------------------------------


def make_checkpoints(run: Path, *iterations: tuple[int, int]) -> None:
    for iteration, warmup in iterations:
        path = checkpoint.checkpoint_path(run, iteration, warmup)
        checkpoint.write_safetensors(path, {"a": torch.tensor(iteration)}, {})


def names(run: Path) -> list[str]:
    return [path.stem.removeprefix("iteration-") for path in checkpoint.list_checkpoints(run)]


def test_newest_first(tmp_path):
    make_checkpoints(tmp_path, (9, 0), (10, 0), (246803, 0), (1000, 0))
    assert names(tmp_path) == ["000246803", "000001000", "000000010", "000000009"]
    assert checkpoint.find(tmp_path).stem == "iteration-000246803"
    assert checkpoint.read(tmp_path).tensors["a"] == 246803


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
    leftover = tmp_path / "checkpoints" / ".iteration-000000009.safetensors.77.part"
    leftover.write_text("half")
    assert names(tmp_path) == ["000000005"]
    checkpoint.remove_leftovers(tmp_path)
    assert not leftover.exists()
    assert names(tmp_path) == ["000000005"]


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
    saved = checkpoint.checkpoint_path(tmp_path, 500)
    checkpoint.remove_old_checkpoints(saved, keep_last, keep_every)
    assert names(tmp_path) == kept


def test_newer_checkpoints_of_an_abandoned_try_do_not_count(tmp_path):
    make_checkpoints(tmp_path, (2000, 0), (2500, 0), (3000, 0))
    checkpoint.remove_old_checkpoints(checkpoint.checkpoint_path(tmp_path, 2500), 1, 0)
    assert names(tmp_path) == ["000003000", "000002500"]


def test_warm_up_checkpoints_are_not_kept_for_good(tmp_path):
    make_checkpoints(tmp_path, (200, 10), (200, 20), (200, 0), (300, 0))
    checkpoint.remove_old_checkpoints(checkpoint.checkpoint_path(tmp_path, 300), 1, 100)
    assert names(tmp_path) == ["000000300", "000000200"]


def test_no_run_yet(tmp_path):
    assert checkpoint.list_checkpoints(tmp_path / "absent") == []


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
    assert checkpoint.tensors_sha256(TENSORS | change) != checkpoint.tensors_sha256(TENSORS)


def test_hash_sees_names_and_the_sign_of_zero():
    zero = checkpoint.tensors_sha256({"a": torch.tensor([0.0])})
    assert checkpoint.tensors_sha256({"b": torch.tensor([0.0])}) != zero
    assert checkpoint.tensors_sha256({"a": torch.tensor([-0.0])}) != zero
    assert checkpoint.tensors_sha256({}) != zero


def test_hash_ignores_order_and_memory_layout():
    backwards = dict(reversed(TENSORS.items()))
    strided = TENSORS | {"a": TENSORS["a"].T.contiguous().T}
    expected = checkpoint.tensors_sha256(TENSORS)
    assert checkpoint.tensors_sha256(backwards) == expected
    assert checkpoint.tensors_sha256(strided) == expected


def test_hash_is_frozen():
    assert checkpoint.tensors_sha256({"a": torch.arange(3.0)}) == (
        "7c52f1966afff500bf59f4cec6a664fb557895a2be9290b9eff977454819c60b"
    )


def test_file_hash(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    digest = checkpoint.file_sha256(tmp_path / "x")
    assert digest == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
