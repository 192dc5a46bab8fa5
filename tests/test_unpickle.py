"""Torch files as data: honest ones are read, hostile and broken ones do nothing."""

import argparse
import collections
import contextlib
import gc
import importlib
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

import lpips
import numpy as np
import pytest
import samples
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from samples import TENSORS, equal, save_legacy, save_zip

from kl_f8_train.errors import MissingInputError
from kl_f8_train.weights import weight_file


def save_pickle(content, path: Path) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=2))
    return path


# --- honest files ---------------------------------------------------------------------------


@pytest.mark.parametrize("save", [save_zip, save_legacy])
def test_views_parameters_and_shared_storage(tmp_path, save):
    base = torch.arange(12.0).reshape(3, 4)
    content = {
        "base": base,
        "turned": base.T,
        "row": base[1],
        "parameter": torch.nn.Parameter(base * 2),
    }
    contents = weight_file.read(save(collections.OrderedDict(content), tmp_path / "w.pt"))
    assert equal(contents.tensors, {key: value.detach() for key, value in content.items()})
    assert not contents.tensors["parameter"].requires_grad


@pytest.mark.parametrize("save", [save_zip, save_legacy])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_a_tensor_with_attributes_is_read_as_others(tmp_path, save, dtype):
    tensor = torch.ones(3).to(dtype)
    tensor.note = "attributes are pickled around the tensor, whatever its type"
    contents = weight_file.read(save({"a": tensor}, tmp_path / "w.pt"))
    assert contents.tensors["a"].dtype == dtype
    assert torch.equal(contents.tensors["a"].float(), torch.ones(3))


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
    contents = weight_file.read(path)
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
        "from kl_f8_train.weights import weight_file\n"
        "before = set(sys.modules)\n"
        f"print(len(weight_file.read({str(path)!r}).tensors))\n"
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
        weight_file.read(save_zip(content, tmp_path / "w.ckpt"))


def network() -> torch.nn.Module:
    """A module with parameters, a buffer, a container and one of no parameters."""
    blocks = torch.nn.ModuleList([torch.nn.BatchNorm2d(4), torch.nn.Dropout(0.1)])
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), blocks)


@pytest.mark.parametrize("save", [save_zip, save_legacy])
@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [
        (lambda module: module, ""),
        (lambda module: {"epoch": 3, "vae": module}, "vae."),
        (lambda module: (module, 3), "0."),
        (lambda module: (module.state_dict(), 3), "0."),
    ],
)
def test_a_pickled_module_is_read_as_its_state_dict(tmp_path, save, wrap, prefix):
    module = network()
    contents = weight_file.read(save(wrap(module), tmp_path / "w.pt"))
    assert equal(contents.tensors, {prefix + k: v for k, v in module.state_dict().items()})


@pytest.mark.parametrize("save", [save_zip, save_legacy])
def test_a_module_that_holds_itself_is_read_once(tmp_path, save):
    module = network()
    module._modules["self"] = module
    contents = weight_file.read(save(module, tmp_path / "w.pt"))
    assert len(contents.tensors) == 7


def test_what_stands_in_the_weights_place_is_named(tmp_path):
    arrays = {key: tensor.numpy() for key, tensor in network().state_dict().items()}
    path = save_zip({"state_dict": arrays}, tmp_path / "w.pt")
    with pytest.raises(MissingInputError, match=r"no tensors.*numpy.*none of which is loaded"):
        weight_file.read_weights(path)


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_tensor_beside_the_weights_is_left_out(tmp_path):
    quantised = torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8)
    contents = weight_file.read(save_zip({"q": quantised, **TENSORS}, tmp_path / "w.pt"))
    assert equal(contents.tensors, TENSORS)
    assert any("qtensor" in name for name in contents.stubbed)
    with pytest.raises(MissingInputError, match="quantised tensors in torch's old format"):
        weight_file.read(save_legacy({"q": quantised, **TENSORS}, tmp_path / "w.pt"))


def test_published_files_read_as_torch_reads_them():
    """LPIPS' own weights, in the format of 2018."""
    files = sorted((Path(lpips.__file__).parent / "weights").rglob("*.pth"))
    assert len(files) >= 6
    for file in files:
        expected = torch.load(file, map_location="cpu", weights_only=True)
        contents = weight_file.read(file)
        assert equal(contents.tensors, dict(expected))
        assert contents.container == "older torch file"


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol(tmp_path, protocol):
    content = {"state_dict": collections.OrderedDict(TENSORS), "x": [b"\x00", {1}, frozenset("a")]}
    for new in (True, False):
        torch.save(
            content,
            tmp_path / "w.pt",
            pickle_protocol=protocol,
            _use_new_zipfile_serialization=new,
        )
        assert equal(weight_file.read(tmp_path / "w.pt").tensors, TENSORS)


@pytest.mark.parametrize("save", [save_zip, save_legacy])
def test_only_what_is_wanted_is_read(tmp_path, save):
    path = save({"state_dict": TENSORS}, tmp_path / "w.ckpt")
    contents = weight_file.read(path, lambda names: [name for name in names if name[0] == "b"])
    assert {k for k, v in contents.tensors.items() if not v.is_meta} == {"b.half", "b.bfloat"}
    assert {k: v.shape for k, v in contents.tensors.items()} == {
        k: v.shape for k, v in TENSORS.items()
    }
    assert torch.equal(contents.tensors["b.half"], TENSORS["b.half"])


def inside_zip(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])
@pytest.mark.parametrize("save", [save_zip, save_legacy])
@pytest.mark.parametrize("name", ["model.ckpt", "kl-f8/weights"])
def test_kl_f8_zip_as_downloaded(tmp_path, method, save, name):
    content = {"state_dict": TENSORS, "global_step": 7, "optimizer_states": [{"state": {}}]}
    members = {
        "kl-f8/config.yaml": b"model: {}\n",
        name: save(content, tmp_path / "inner").read_bytes(),
        "__MACOSX/._model.ckpt": b"\x00\x05\x16\x07",
    }
    contents = weight_file.read(inside_zip(tmp_path / "kl-f8.zip", members, method))
    assert equal(contents.tensors, TENSORS)
    assert contents.iteration == 7
    assert contents.optimizer
    assert contents.container.endswith(f"{name} in a zip")


def test_several_weight_files_in_a_zip(tmp_path):
    inner = save_zip(TENSORS, tmp_path / "inner").read_bytes()
    path = inside_zip(tmp_path / "w.zip", {"a.ckpt": inner, "b.ckpt": inner})
    with pytest.raises(MissingInputError, match=r"several weight files: a\.ckpt, b\.ckpt"):
        weight_file.read(path)


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
    named = "mkdir" if name == "partial" else name  # partial is harmless, what it holds is not
    with pytest.raises(MissingInputError, match=rf"asks to run .*\.{named}\b.*refused") as caught:
        weight_file.read(path)
    assert caught.value.exit_code == 3
    assert not marker.exists()


def test_the_attacks_would_work(tmp_path):
    """Otherwise the test above shows nothing."""
    for name in ("system", "eval", "exec", "mkdir", "open", "loads"):
        marker = tmp_path / name
        path = save_zip({"extra": attacks(marker)[name]}, tmp_path / "model.ckpt")
        torch.load(path, weights_only=False)
        assert marker.exists()


@pytest.mark.parametrize("name", ["http.client.HTTPConnection", "smtplib.SMTP", "cProfile.run"])
def test_modules_of_networks_and_profilers_are_refused_by_name(tmp_path, name):
    module, _, function = name.rpartition(".")
    reference = getattr(importlib.import_module(module), function)
    path = save_zip({"state_dict": {}, "x": reference}, tmp_path / "x.ckpt")
    package = module.partition(".")[0]  # by Python 2's names: http.client is httplib
    with pytest.raises(MissingInputError, match=f"asks to run {package}"):
        weight_file.read(path)


def test_an_opcode_that_torch_never_wrote_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.ckpt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": 1}, 0))
    with pytest.raises(MissingInputError, match="opcode 112, which torch never wrote"):
        weight_file.read(tmp_path / "x.ckpt")


@pytest.mark.parametrize("save", [save_zip, save_legacy])
def test_functions_of_known_modules_do_not_run_either(tmp_path, save):
    marker = tmp_path / "marker.npy"
    content = {"a": torch.ones(2), "extra": Attack(np.save, str(marker), [1])}
    contents = weight_file.read(save(content, tmp_path / "model.ckpt"))
    assert equal(contents.tensors, {"a": torch.ones(2)})
    assert contents.stubbed == ["numpy.save"]
    assert not marker.exists()


# --- files that are broken ------------------------------------------------------------------


def whole_file(kind: str, folder: Path) -> Path:
    """A complete file of each kind, with the same tensors."""
    path, content = folder / "whole", {"state_dict": TENSORS, "global_step": 1}
    if kind == "safetensors":
        save_file(TENSORS, path)
    elif kind == "ours":
        weight_file.write_torch(path, content)
    elif kind == "kl-f8.zip":
        inside_zip(path, {"model.ckpt": save_zip(content, folder / "inner").read_bytes()})
    else:
        {"zip": save_zip, "legacy": save_legacy}[kind](content, path)
    return path


KINDS = ["zip", "legacy", "safetensors", "ours", "kl-f8.zip"]


@pytest.mark.parametrize("kind", KINDS)
def test_cut_short_at_every_percent(tmp_path, kind):
    whole = whole_file(kind, tmp_path)
    data = whole.read_bytes()
    assert equal(weight_file.read(whole).tensors, TENSORS)
    cut = tmp_path / "cut"
    lengths = {len(data) * percent // 100 for percent in range(100)} | {1, 8, 9, len(data) - 1}
    for length in sorted(lengths):
        cut.write_bytes(data[:length])
        start = time.process_time()
        with pytest.raises(MissingInputError, match="cut"):
            weight_file.read(cut)
        assert time.process_time() - start < 1


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_bytes_raise_nothing_else(tmp_path, kind):
    data = whole_file(kind, tmp_path).read_bytes()
    random = np.random.RandomState(0)
    path = tmp_path / "damaged"
    for _ in range(150):
        damaged = bytearray(data)
        for place in random.randint(0, len(data), random.randint(1, 20)):
            damaged[place] = random.randint(256)
        path.write_bytes(damaged)
        with contextlib.suppress(MissingInputError):
            weight_file.read(path)


def test_torchscript(tmp_path):
    path = tmp_path / "w.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("data.pkl", "code/__torch__.py", "constants.pkl", "version"):
            archive.writestr(f"w/{name}", b"}.")
    with pytest.raises(MissingInputError, match="TorchScript"):
        weight_file.read(path)


def test_another_zip(tmp_path):
    path = tmp_path / "w.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("letter.txt", "dear all")
    with pytest.raises(MissingInputError, match=r"letter\.txt"):
        weight_file.read(path)


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
    start = time.process_time()
    with pytest.raises(MissingInputError, match="unpacks to more than its own size"):
        weight_file.read(path)
    assert time.process_time() - start < 2


# --- hostile files, by hand -----------------------------------------------------------------

FLOAT = b"ctorch\nFloatStorage\n"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def number(value: int) -> bytes:
    data = value.to_bytes(20, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def storage(count: int = 4, key: str = "0", kind: bytes = FLOAT) -> bytes:
    parts = text("storage") + kind + text(key) + text("cpu") + number(count)
    return b"(" + parts + b"tQ"


def tensor(size=(4,), stride=(1,), offset=0, held: bytes | None = None) -> bytes:
    """The pickle of one tensor, in a storage of four floats."""
    sizes, strides = (b"(" + b"".join(map(number, n)) + b"t" for n in (size, stride))
    arguments = (storage() if held is None else held) + number(offset) + sizes + strides
    return REBUILD + b"(" + arguments + b"\x89N" + b"tR"


def named(value: bytes, key: str = "encoder.x") -> bytes:
    """A pickle of {key: value}."""
    return b"\x80\x02}" + text(key) + value + b"s."


def stack_global(module: str, name: str) -> bytes:
    return b"\x80\x04" + text(module) + text(name) + b"\x93)R."


def nested(count: int) -> bytes:
    """A tuple of two of a tuple of two of ...: 2 ** count leaves."""
    return b")" + b"2\x86" * count


PAIRS = b"](" + b"".join(b"(" + text(f"{n}") + b"Nt" for n in range(3000)) + b"eq\x00"
COPIES = b"(" + b"ccollections\nOrderedDict\nh\x00\x85R" * 3000 + b"t"
LONG = b"](" + b"N" * 90_000 + b"eq\x000"
LONG_SIZES = (
    b"(" + b"K\x01" * 90_000 + b"tq\x000" + storage() + b"q\x010("
    + (REBUILD + b"(h\x01K\x00h\x00h\x00\x89NtR") * 9000 + b"t"
)  # fmt: skip
PICKLES = {
    "memo index": b"\x80\x02]r\xff\xff\xff\xff.",
    "long bytes": b"\x80\x03B\xff\xff\xff\xff.",
    "longer bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b".",
    "long text": b"\x80\x04\x8d" + struct.pack("<Q", 2**63 - 1) + b".",
    "negative text": b"\x80\x02T\xff\xff\xff\xff.",
    "long integer": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "frame": b"\x80\x04\x95" + b"\xff" * 8 + b".",
    "tuple as key": b"\x80\x02}" + nested(300) + b"Ns.",
    "tuple in a set": b"\x80\x04\x8f(" + nested(300) + b"\x90.",
    "deep lists": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
    "deep marks": b"\x80\x02" + b"(" * 200_000 + b"t" * 200_000 + b".",
    "many operations": b"\x80\x02" + b"}" * 2_000_000 + b".",
    "copies of a dict": b"\x80\x02" + PAIRS + COPIES + b".",
    "endless name": b"\x80\x02c" + b"a" * 100_000,
    "empty stack": b"\x80\x02R.",
    "no mark": b"\x80\x02t.",
    "inst": b"\x80\x02(ios\nsystem\n.",
    "obj": b"\x80\x02(cos\nsystem\no.",
    "extension": b"\x80\x02\x82\x01)R.",
    "text reference": b"\x80\x02P0\n.",
    "range": b"\x80\x02c__builtin__\nrange\nJ\xff\xff\xff\x7f\x85R.",
    "bytes of a length": b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
    "getattr": b"\x80\x02c__builtin__\ngetattr\n(ctorch\nSize\n" + text("mro") + b"tR.",
    "method": stack_global("collections", "OrderedDict.__init__"),
    "globals": stack_global("torch._utils", "_rebuild_tensor_v2.__globals__"),
    "file": stack_global("torch", "FloatStorage.from_file"),
    "torch.load": stack_global("torch", "load"),
    "wrapper": stack_global("torch._utils", "_rebuild_wrapper_subclass"),
    "call of a stub": b"\x80\x02cnumpy\nx\n)R)R.",
    "call of a tensor": named(tensor() + b")R"),
    "call of a list": b"\x80\x02])R.",
    "build": b"\x80\x02ccollections\nOrderedDict\n)R}" + text("__class__") + b"cos\nsystem\nsb.",
    "module": b"\x80\x02(" + text("module") + b"ctorch\nSize\n" + text("a") + text("b") + b"tQ.",
    "reference": b"\x80\x02" + text("/etc/passwd") + b"Q.",
    "no reference": b"\x80\x02)Q.",
    "storage of no type": named(tensor(held=storage(kind=text("torch.FloatStorage")))),
    "storage of a size": named(tensor(held=storage(kind=b"ctorch\nSize\n"))),
    "storage elsewhere": named(tensor(held=storage(key="../../../etc/passwd"))),
    "storage too long": named(tensor(held=storage(count=10**12))),
    "storage a little too long": named(tensor(size=(5,), held=storage(count=5))),
    "storage of less than nothing": named(tensor(size=(), stride=(), held=storage(count=-1))),
    "no storage": named(tensor(held=text("0"))),
    "size beyond": named(tensor(size=(5,))),
    "stride beyond": named(tensor(size=(2, 2), stride=(4, 1))),
    "offset beyond": named(tensor(size=(2,), offset=3)),
    "offset before": named(tensor(size=(2,), offset=-1)),
    "stride backwards": named(tensor(size=(2,), stride=(-1,))),
    "size before": named(tensor(size=(-2, -2), stride=(1, 1))),
    "expanded": named(tensor(size=(10**6, 10**6), stride=(0, 0))),
    "immense": named(tensor(size=(2**62, 2**62), stride=(1, 1))),
    "many dimensions": named(tensor(size=(1,) * 3000, stride=(1,) * 3000)),
    "ranks differ": named(tensor(size=(2, 2), stride=(1,))),
    "few arguments": named(REBUILD + b")R"),
    "parameter of nothing": named(b"ctorch._utils\n_rebuild_parameter\n)R"),
    "name of tuples": b"\x80\x04" + nested(300) + text("x") + b"\x93)R.",
    "reference of tuples": b"\x80\x02" + nested(300) + b"Q.",
    "storage key of tuples": named(tensor(held=storage().replace(text("0"), nested(300)))),
    "pairs of long lists": b"\x80\x02" + LONG + b"](" + b"h\x00" * 9000 + b"e\x85q\x010"
    b"ccollections\nOrderedDict\nh\x01R.",
    "sizes of long lists": b"\x80\x02" + LONG_SIZES + b".",
    "state dict of another kind": named(text("x"), "state_dict"),
}


def as_zip(pickled: bytes, path: Path) -> Path:
    records = {"w/data.pkl": pickled, "w/version": b"3\n", "w/data/0": bytes(16)}
    return inside_zip(path, records, zipfile.ZIP_STORED)


def as_legacy(pickled: bytes, path: Path) -> Path:
    head = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {})]
    path.write_bytes(
        b"".join(head) + pickled + pickle.dumps(["0"], 2) + struct.pack("<q", 4) + bytes(16)
    )
    return path


def test_the_files_by_hand_are_well_formed(tmp_path):
    """Otherwise the tests below show nothing."""
    for save in (as_zip, as_legacy):
        contents = weight_file.read(save(named(tensor()), tmp_path / "w.ckpt"))
        assert torch.equal(contents.tensors["encoder.x"], torch.zeros(4))


def test_storage_keys_of_tuples(tmp_path):
    path = as_legacy(named(tensor()), tmp_path / "model.ckpt")
    keys = b"\x80\x02]" + nested(300) + b"a."
    path.write_bytes(path.read_bytes().replace(pickle.dumps(["0"], 2), keys))
    with pytest.raises(MissingInputError, match="whose key is not a string"):
        weight_file.read(path)


@pytest.mark.parametrize("save", [as_zip, as_legacy])
@pytest.mark.parametrize("name", PICKLES)
def test_hostile_pickles(tmp_path, save, name):
    path = save(PICKLES[name], tmp_path / "model.ckpt")
    start = time.process_time()
    with pytest.raises(MissingInputError, match=r"model\.ckpt"):
        weight_file.read_weights(path)
    assert time.process_time() - start < 1


def test_deep_lists_cost_operations_not_garbage_collections(tmp_path):
    """286 collections took 60 % of the time, and more in a process with many objects."""
    path = as_zip(PICKLES["deep lists"], tmp_path / "model.ckpt")
    ran = []
    note = lambda phase, info: ran.append(info)  # noqa: E731
    gc.callbacks.append(note)
    try:
        with pytest.raises(MissingInputError, match="takes more than 300,000 operations"):
            weight_file.read_weights(path)
    finally:
        gc.callbacks.remove(note)
    assert len(ran) < 40
    assert gc.isenabled()


def test_tensors_that_share_a_storage_many_times(tmp_path):
    views = b"".join(text(f"encoder.{n}") + b"h\x01" for n in range(20_000))
    pickled = (
        b"\x80\x02" + tensor(size=(250_000,), held=storage(250_000)) + b"q\x010}(" + views + b"u."
    )
    records = {"w/data.pkl": pickled, "w/data/0": bytes(1_000_000)}
    path = inside_zip(tmp_path / "w.ckpt", records, zipfile.ZIP_STORED)
    with pytest.raises(MissingInputError, match="its tensors claim 20,000,000,000 bytes"):
        weight_file.read_weights(path)


def test_storages_of_the_same_bytes_many_times(tmp_path):
    """Each tensor says another type or length of the one storage."""
    items = b"".join(
        text(f"encoder.{n}") + tensor(size=(1,), held=storage(250_000 - n)) for n in range(3000)
    )
    records = {"w/data.pkl": b"\x80\x02}(" + items + b"u.", "w/data/0": bytes(1_000_000)}
    path = inside_zip(tmp_path / "w.ckpt", records, zipfile.ZIP_STORED)
    with pytest.raises(MissingInputError, match="its tensors claim 2,9"):
        weight_file.read_weights(path)


# --- hostile zips ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../escaped.ckpt", "/tmp/escaped.ckpt", "a/../../escaped.ckpt"])
def test_a_zip_that_names_paths_outside_itself(tmp_path, name):
    inner = save_zip(TENSORS, tmp_path / "inner").read_bytes()
    folder = tmp_path / "folder"
    folder.mkdir()
    path = inside_zip(folder / "kl-f8.zip", {name: inner})
    with pytest.raises(MissingInputError, match="a path outside itself"):
        weight_file.read(path)
    assert not list(tmp_path.rglob("escaped*"))
    assert not Path("/tmp/escaped.ckpt").exists()


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_zips_of_a_rare_kind(tmp_path, method):
    path = inside_zip(tmp_path / "kl-f8.zip", {"model.ckpt": b"\x80\x02}."}, method)
    with pytest.raises(MissingInputError, match="rare kind"):
        weight_file.read(path)


def test_zip_bomb_inside(tmp_path):
    path = inside_zip(tmp_path / "kl-f8.zip", {"model.ckpt": b"\x80\x02" + bytes(30_000_000)})
    assert path.stat().st_size < 100_000
    start = time.process_time()
    with pytest.raises(MissingInputError, match="more than 10 times its own size"):
        weight_file.read(path)
    assert time.process_time() - start < 1


def test_a_zip_whose_entry_is_longer_than_it_says(tmp_path):
    path = inside_zip(tmp_path / "kl-f8.zip", {"model.ckpt": b"\x80\x02" + bytes(50_000_000)})
    data = path.read_bytes().replace(struct.pack("<I", 50_000_002), struct.pack("<I", 1000))
    path.write_bytes(data)
    with pytest.raises(MissingInputError, match="broken or cut short"):
        weight_file.read(path)


def test_zips_in_zips(tmp_path):
    data = b"hello"
    for depth in range(4):
        data = inside_zip(tmp_path / "w.zip", {f"{depth}.zip": data}).read_bytes()
    with pytest.raises(MissingInputError, match="zip in a zip"):
        weight_file.read(tmp_path / "w.zip")


def test_a_zip_of_overlapping_entries(tmp_path):
    """A thousand names for the same ten megabytes."""
    path = tmp_path / "w.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w/data.pkl", named(tensor()))
        archive.writestr("w/data/0", bytes(10_000_000))
        archive.filelist.extend([archive.getinfo("w/data/0")] * 1000)
    with pytest.raises(MissingInputError, match="unpacks to more than its own size"):
        weight_file.read(path)


def test_a_zip_with_an_immense_directory(tmp_path):
    path = tmp_path / "w.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w/data.pkl", b"}.")
        archive.filelist.extend([archive.getinfo("w/data.pkl")] * 100_000)
    with pytest.raises(MissingInputError, match="at most 4,194,304 were expected"):
        weight_file.read(path)


def test_an_encrypted_zip(tmp_path):
    path = inside_zip(tmp_path / "w.zip", {"model.ckpt": b"\x80\x02}."})
    data = bytearray(path.read_bytes())
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(MissingInputError, match="encrypted"):
        weight_file.read(path)


def test_no_room_to_unpack(tmp_path, monkeypatch):
    inner = save_zip({"a": torch.rand(1_000_000)}, tmp_path / "inner").read_bytes()
    path = inside_zip(tmp_path / "kl-f8.zip", {"model.ckpt": inner})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, limits[1]))
    try:
        with pytest.raises(MissingInputError, match="Set TMPDIR"):
            weight_file.read(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_nothing_is_left_in_the_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "t"))
    (tmp_path / "t").mkdir()
    for inner in (save_zip(TENSORS, tmp_path / "inner").read_bytes(), PICKLES["method"]):
        path = inside_zip(tmp_path / "kl-f8.zip", {"model.ckpt": inner})
        with contextlib.suppress(MissingInputError):
            weight_file.read(path)
    assert os.listdir(tmp_path / "t") == []


@pytest.mark.slow
def test_hostile_files_take_no_memory(tmp_path):
    """All of them in one process: its largest size grows by less than 300 MB."""
    for name, pickled in PICKLES.items():
        as_zip(pickled, tmp_path / f"{name}.zip")
        as_legacy(pickled, tmp_path / f"{name}.legacy")
    inside_zip(tmp_path / "bomb", {"model.ckpt": b"\x80\x02" + bytes(100_000_000)})
    program = (
        "import re, sys\n"
        "from pathlib import Path\n"
        "from kl_f8_train.weights import weight_file\n"
        "from kl_f8_train.errors import MissingInputError\n"
        "def peak():  # in MB; getrusage's would be the parent's\n"
        "    text = Path('/proc/self/status').read_text()\n"
        "    return int(re.search(r'VmHWM:\\s+(\\d+)', text)[1]) / 1024\n"
        "before = peak()\n"
        "for path in sorted(Path(sys.argv[1]).iterdir()):\n"
        "    try:\n"
        "        weight_file.read_weights(path)\n"
        "        raise SystemExit(f'{path} was read')\n"
        "    except MissingInputError as error:\n"
        "        assert 'MemoryError' not in str(error)\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=samples.CONFIGS.parent,
    )
    assert float(done.stdout) < 300
