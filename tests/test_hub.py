"""Hub ids: huggingface_hub itself against a server of this machine, and every way to fail."""

import hashlib
import json
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import samples

from kl_f8_train.errors import MissingInputError
from kl_f8_train.weights import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "diffusion_pytorch_model.bin": b"old",
    "diffusion_pytorch_model.safetensors": b"weights",
    "config.json": b'{"scaling_factor": 0.18215}',
}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as one download needs."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        if self.path.startswith("/api/models/someone/vae"):
            siblings = [{"rfilename": name} for name in FILES]
            body = {"id": "someone/vae", "sha": COMMIT, "siblings": siblings}
            self._answer(200, json.dumps(body).encode())
        elif self.path.startswith("/someone/vae/resolve/") and name in FILES:
            self._answer(200, FILES[name])
        else:
            self._answer(404, b"{}")

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args) -> None:
        pass


def fetch(repo: str, endpoint: str, cache: Path) -> tuple[str, float]:
    """What hub.fetch returns or raises in a process of its own, and its seconds."""
    program = (
        "import sys, time\n"
        "from kl_f8_train.weights import hub\n"
        "from kl_f8_train.errors import MissingInputError\n"
        "import huggingface_hub\n"
        "began = time.monotonic()\n"
        "try:\n"
        "    print(hub.fetch(sys.argv[1]))\n"
        "except MissingInputError as error:\n"
        "    print('refused:', str(error).replace('\\n', ' '))\n"
        "print(time.monotonic() - began)\n"
    )
    environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", program, repo],
        capture_output=True,
        text=True,
        check=True,
        env={**environment, "NO_PROXY": "127.0.0.1", "PYTHONPATH": str(samples.CONFIGS.parent)},
    )
    answer, seconds = done.stdout.strip().split("\n")
    return answer, float(seconds)


@pytest.fixture
def server():
    """The address of a hub on this machine."""
    running = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()


def test_download_then_cache(tmp_path, server):
    answer, _ = fetch("someone/vae", server, tmp_path)
    assert Path(answer).read_bytes() == b"weights"
    assert Path(answer).with_name("config.json").read_bytes() == FILES["config.json"]
    again, seconds = fetch("someone/vae", "http://127.0.0.1:9", tmp_path)  # no server there
    assert again == answer
    assert seconds < 8


def test_a_repository_that_is_not_there(tmp_path, server):
    answer, _ = fetch("someone/else", server, tmp_path)
    assert answer.startswith("refused: someone/else: no such file or folder here, and as a hub id")


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://no-such-host.invalid"])
def test_no_network_is_told_at_once(tmp_path, endpoint):
    answer, seconds = fetch("someone/vae", endpoint, tmp_path)
    assert "there is no answer" in answer
    assert "Download its diffusion_pytorch_model.safetensors yourself" in answer
    assert seconds < 20


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    began = time.monotonic()
    with pytest.raises(MissingInputError, match=r"pip install huggingface_hub"):
        hub.fetch("someone/vae")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("stabilityai/sd-vae-ft-mse", True),
        ("runwayml/stable-diffusion-v1-5", True),
        ("models/vae.ckpt", False),
        ("models/vae.safetensors", False),
        ("model.ckpt", False),
        ("/data/vae", False),
        ("./data/vae", False),
        ("../vae", False),
        ("a/b/c", False),
        ("~/vae", False),
    ],
)
def test_ids(text, expected):
    assert hub.is_id(text) is expected
