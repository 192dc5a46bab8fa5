"""push: what it would upload, and huggingface_hub itself against a small hub of this machine."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from kl_f8_train.__main__ import main
from kl_f8_train.files import file_sha256
from kl_f8_train.publish import push

CARD = "# name\n\n![From left to right: input, a](strip.png)\n\n| protocol | |\n"


@pytest.fixture
def exported(tmp_path) -> Path:
    """A directory as export and card leave it."""
    folder = tmp_path / "export"
    (folder / "diffusers").mkdir(parents=True)
    contents = {
        "name-ema-pruned.safetensors": b"weights",
        "diffusers/config.json": b"{}",
        "strip.png": b"a photograph",
        "README.md": CARD.encode(),
    }
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    files = {name: file_sha256(folder / name) for name in contents}
    record = {"files": files, "card": {"license": {"license": "mit"}}}
    (folder / "export.json").write_text(json.dumps(record))
    (folder / "IMG_0001.jpg").write_bytes(b"another photograph")
    return folder


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as one commit of small files needs."""

    def do_GET(self) -> None:
        self._answer(404, {})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append(self.path)
        if self.path == "/api/validate-yaml":  # the card's front matter
            self._answer(200, {"errors": [], "warnings": []})
        elif self.headers.get("Authorization") != "Bearer hf_good":
            self._answer(401, {"error": "Invalid username or password."})
        elif self.path == "/api/repos/create":
            self.server.made.append(json.loads(body))
            self._answer(200, {"url": f"{self.server.url}/me/vae"})
        elif self.path == "/api/models/me/vae/preupload/main":
            files = json.loads(body)["files"]
            modes = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files
            ]
            self._answer(200, {"files": modes})
        elif self.path == "/api/models/me/vae/commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    self.server.got[value["path"]] = base64.b64decode(value["content"])
            url = f"{self.server.url}/me/vae/commit/0123456789abcdef0123456789abcdef01234567"
            self._answer(200, {"commitOid": url.rpartition("/")[2], "commitUrl": url})
        else:
            self._answer(404, {})

    def _answer(self, status: int, values: object) -> None:
        body = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def hub():
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.made, server.got, server.asked = [], {}, []
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def run(hub, *arguments: str, token: str = "hf_good") -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: huggingface_hub reads its endpoint when imported."""
    settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1"}
    settings |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-m", "kl_f8_train", "push", *arguments]
    return subprocess.run(
        command,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_dry_run_names_everything_and_asks_nobody(exported, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert main(["push", str(exported), "me/vae"]) == 0
    said = capsys.readouterr().out
    assert "to https://huggingface.co/me/vae, " in said
    assert "not uploaded: strip.png (made of photographs; --pictures uploads it)" in said
    assert "not uploaded: IMG_0001.jpg (not written by export or card)" in said
    assert said.endswith("a dry run: nothing was uploaded; add --upload to do it\n")
    assert "WARNING" not in said
    assert main(["push", str(exported), "me/vae", "--upload"]) == 3
    assert "pip install 'kl-f8-train[hub]'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_hub_gets_the_files_and_no_photograph(hub, exported):
    done = run(hub, str(exported), "me/vae", "--upload", "--private")
    assert done.returncode == 0, done.stderr
    assert hub.made[0]["name"] == "vae"
    assert set(hub.got) == {"README.md", "diffusers/config.json", "name-ema-pruned.safetensors"}
    assert hub.got["name-ema-pruned.safetensors"] == b"weights"
    assert b"strip.png" not in hub.got["README.md"]  # the card does not link what is not there
    assert done.stdout.splitlines()[-1].startswith(f"{hub.url}/me/vae/commit/")


@pytest.mark.slow
def test_pictures_go_on_request(hub, exported):
    assert run(hub, str(exported), "me/vae", "--upload", "--pictures").returncode == 0
    assert hub.got["strip.png"] == b"a photograph"
    assert hub.got["README.md"].decode() == CARD
    assert "IMG_0001.jpg" not in hub.got


@pytest.mark.slow
def test_a_token_that_may_not_write_is_explained(hub, exported):
    done = run(hub, str(exported), "me/vae", "--upload", token="hf_bad")
    assert done.returncode == 4
    assert "the hub did not take it: " in done.stderr
    assert "hf auth login" in done.stderr
    assert "Traceback" not in done.stderr
    assert hub.got == {}


def test_what_is_no_export_or_was_changed_is_refused(exported, tmp_path, capsys):
    assert main(["push", str(tmp_path), "me/vae"]) == 3
    assert "is not an export: no usable export.json" in capsys.readouterr().err
    assert main(["push", str(exported), "vae"]) == 2
    assert "expected OWNER/NAME" in capsys.readouterr().err
    (exported / "name-ema-pruned.safetensors").write_bytes(b"other")
    assert main(["push", str(exported), "me/vae"]) == 3
    assert "was changed after the export" in capsys.readouterr().err
    record = json.loads((exported / "export.json").read_text())
    record["files"] = {"../secret": "0"}
    (exported / "export.json").write_text(json.dumps(record))
    assert main(["push", str(exported), "me/vae"]) == 3


def test_a_card_without_a_license_is_warned_of(exported):
    record = json.loads((exported / "export.json").read_text())
    record.pop("card")
    (exported / "export.json").write_text(json.dumps(record))
    (warning,) = push.plan_upload(exported, "me/vae").warnings
    assert warning.startswith("the card states no license: kl-f8-train card ")
