"""VGG16's and Inception's files: found, fetched once, checked; nothing wrong is ever kept."""

import dataclasses
import hashlib
import http.server
import importlib.util
import io
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import ModuleSpec

import pytest
import torch

from kl_f8_train.__main__ import main
from kl_f8_train.errors import MissingInputError, RunFailedError
from kl_f8_train.score.measure import find_networks
from kl_f8_train.weights import pretrained, weight_file
from kl_f8_train.weights.pretrained import INCEPTION, VGG16


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of ours, and an empty one of torch hub's."""
    monkeypatch.setenv("KL_F8_TRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "cache"


@pytest.fixture
def server():
    """Serves `server.files`; `server.cut` paths break off in the middle; counts `server.asked`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked.append(self.path)
            body = self.server.files.get(self.path)
            if body is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if self.path in self.server.cut else body)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.cut, server.asked = {}, set(), []
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


STATE = {"features.0.weight": torch.ones(2, 3), "classifier.0.weight": torch.zeros(4)}


def torch_file() -> bytes:
    buffer = io.BytesIO()
    torch.save(STATE, buffer)
    return buffer.getvalue()


def network(data: bytes) -> pretrained.Network:
    return dataclasses.replace(VGG16, sha256_prefix=hashlib.sha256(data).hexdigest()[:8])


def kept(cache) -> list[str]:
    """What lies in the cache, without its lock."""
    return sorted(path.name for path in cache.iterdir() if not path.name.endswith(".lock"))


def test_fetch_keeps_the_checked_features(cache, server):
    data = torch_file()
    server.files["/vgg.pth"] = data
    path = pretrained.fetch(network(data), f"{server.url}/vgg.pth")
    assert path == cache / VGG16.file == pretrained.find(VGG16)
    contents = weight_file.read(path)
    assert list(contents.tensors) == ["features.0.weight"]
    assert contents.metadata["source_sha256"] == hashlib.sha256(data).hexdigest()
    assert kept(cache) == [VGG16.file]


def test_several_processes_fetch_once(cache, server):
    data = torch_file()
    server.files["/vgg.pth"] = data
    fetch = lambda _: pretrained.fetch(network(data), f"{server.url}/vgg.pth")  # noqa: E731
    with ThreadPoolExecutor(4) as pool:  # each call opens the lock anew, as a process does
        assert len(set(pool.map(fetch, range(4)))) == 1
    assert server.asked == ["/vgg.pth"]


def test_a_wrong_checksum_is_not_kept(cache, server, capsys):
    server.files["/vgg.pth"] = torch_file()
    assert main(["fetch", "vgg", "--url", f"{server.url}/vgg.pth"]) == 4
    assert "expected 397923af" in capsys.readouterr().err
    assert kept(cache) == []


def test_a_cut_download_is_not_kept(cache, server):
    data = torch_file()
    server.files["/vgg.pth"] = data
    server.cut.add("/vgg.pth")
    with pytest.raises(RunFailedError, match=r"vgg\.pth"):
        pretrained.fetch(network(data), f"{server.url}/vgg.pth", attempts=2)
    assert len(server.asked) == 2
    assert kept(cache) == []
    server.cut.clear()
    assert pretrained.fetch(network(data), f"{server.url}/vgg.pth").is_file()


def test_no_such_file_there(cache, server, capsys):
    assert main(["fetch", "inception", "--url", f"{server.url}/absent"]) == 3
    assert "absent" in capsys.readouterr().err
    assert kept(cache) == []


@pytest.mark.parametrize(
    ("network", "name"), [(n, name) for n in (VGG16, INCEPTION) for name in n.hub_files]
)
def test_torch_hub_s_files_are_found(tmp_path, network, name):
    with pytest.raises(MissingInputError, match="kl-f8-train fetch"):
        pretrained.find(network)
    path = tmp_path / "torch" / "hub" / "checkpoints" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    assert pretrained.find(network) == path


def test_a_named_file_is_the_only_place(tmp_path):
    (tmp_path / "mine.pth").write_bytes(b"")
    assert pretrained.find(VGG16, str(tmp_path / "mine.pth")) == tmp_path / "mine.pth"
    with pytest.raises(MissingInputError, match=r"other\.pth"):
        pretrained.find(VGG16, str(tmp_path / "other.pth"))


@pytest.mark.parametrize("installed", [True, False])
def test_a_missing_network_names_the_package_that_it_needs(cache, monkeypatch, installed):
    found = ModuleSpec("torch_fidelity", None) if installed else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    with pytest.raises(MissingInputError) as caught:
        pretrained.find(pretrained.INCEPTION)
    extra = ", and `pip install torch-fidelity` (the extra eval). Looked for"
    assert (extra in str(caught.value)) is not installed
    with pytest.raises(MissingInputError, match=r"fetch` once\. Looked for"):
        pretrained.find(VGG16)


def test_a_missing_network_is_named_as_its_verb_names_it():
    said: list[str] = []
    find_networks("lpips_vgg", None, None, "cpu", said.append)
    vgg, inception = said
    assert vgg.endswith("name it: --vgg FILE")
    assert inception.endswith("name it: --inception FILE")
    with pytest.raises(MissingInputError, match=r"name it: loss\.perceptual_weights=FILE$"):
        pretrained.build("lpips_vgg")  # as train and doctor do


def test_another_network_s_weights_are_refused(tmp_path):
    from kl_f8_train.score.inception import Inception

    (tmp_path / "vgg.pth").write_bytes(torch_file())
    with pytest.raises(MissingInputError, match="does not hold torch-fidelity's Inception"):
        Inception(tmp_path / "vgg.pth")


def test_rfid_without_torch_fidelity_says_so(tmp_path, monkeypatch):
    from kl_f8_train.score.inception import Inception

    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.delitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", raising=False)
    (tmp_path / "inception.pth").write_bytes(torch_file())
    with pytest.raises(MissingInputError, match=r"pip install torch-fidelity"):
        Inception(tmp_path / "inception.pth")


def test_a_hostile_inception_file_runs_nothing(tmp_path):
    import pickle

    from kl_f8_train.score.inception import Inception

    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "made"), "w"))

    (tmp_path / "hostile.pth").write_bytes(pickle.dumps({"fc.weight": Hostile()}))
    with pytest.raises(MissingInputError):
        Inception(tmp_path / "hostile.pth")
    assert not (tmp_path / "made").exists()
