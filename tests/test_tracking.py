"""wandb against small servers of our own, and TensorBoard's files as TensorBoard reads them."""

import http.server
import json
import os
import pwd
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import runs
import wandb
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kl_f8_train.__main__ import main
from kl_f8_train.run.tracking import TensorBoardTracker, Trackers, WandbTracker

VIEWER = {
    "viewer": {"id": "a", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}},
    "serverInfo": {"cliVersionInfo": {}},
}


class Server(http.server.ThreadingHTTPServer):
    """Answers who we are, and refuses every run."""

    status, message = 409, "run me/p/x was previously created and deleted; try a new run name"
    tried: set[str]


class Refusing(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_):
        """Quiet."""

    def answer(self, code: int, values: object) -> None:
        body = json.dumps(values).encode()
        self.send_response(code)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.answer(200, {})

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if b"viewer" in body and b"upsert" not in body:
            self.answer(200, {"data": VIEWER})
            return
        if b"RunResumeStatus" in body:
            self.server.tried.add(json.loads(body)["variables"]["name"])
        self.answer(self.server.status, {"errors": [{"message": self.server.message}]})


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Refusing) as server:
        server.tried = set()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_address[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        yield server
        wandb.teardown()
        server.shutdown()


@pytest.fixture
def settings(tmp_path):
    def build(*extra: str):
        (tmp_path / "run").mkdir(exist_ok=True)
        return runs.recipe(tmp_path, "run", *extra)

    return build


def logged_offline(run: Path) -> list[str]:
    """The ids of offline runs that hold a file."""
    return [path.stem.removeprefix("run-") for path in run.glob("wandb/offline-run-*/*.wandb")]


def track(settings, said: list[str]) -> None:
    trackers = Trackers(settings, Path(settings.run_dir), 100, said.append)
    trackers.log(101, {"reconstruction_loss": 0.5})
    trackers.finish()


def test_a_run_deleted_on_the_server_gets_a_new_id_and_is_logged_offline(server, settings):
    recipe, said = settings("log.wandb=auto"), []
    run = Path(recipe.run_dir)
    (run / "wandb_id.txt").write_text("0123abcd\n")
    track(recipe, said)
    new = (run / "wandb_id.txt").read_text().strip()
    assert server.tried == {"0123abcd", new}
    assert logged_offline(run) == [new]
    assert [line for line in said if "deleted on the server; starting a new one" in line]
    assert [line for line in said if "continuing offline" in line]
    assert not [line for line in said if "without it" in line]


@pytest.mark.parametrize(
    ("status", "message", "key"),
    [(403, "permission denied", "a" * 40), (400, "project is full", "a" * 40), (409, "", "short")],
)
def test_whatever_fails_online_is_logged_offline(
    server, settings, monkeypatch, status, message, key
):
    server.status, server.message = status, message
    monkeypatch.setenv("WANDB_API_KEY", key)
    recipe, said = settings("log.wandb=auto"), []
    run = Path(recipe.run_dir)
    for _ in range(2):  # the next start, too
        track(recipe, said)
    assert logged_offline(run) == [(run / "wandb_id.txt").read_text().strip()] * 2
    assert not [line for line in said if "without it" in line]


@pytest.mark.parametrize("mode", ["disabled", "offline", "dryrun", "nonsense"])
def test_the_mode_in_the_environment_holds(settings, monkeypatch, mode):
    """A launcher's or cluster's WANDB_MODE is not overridden by log.wandb=auto."""
    monkeypatch.setenv("WANDB_MODE", mode)
    asked = []
    monkeypatch.setattr("kl_f8_train.run.tracking.wandb_reachable", lambda: asked.append(mode))
    recipe, said = settings("log.wandb=auto"), []
    track(recipe, said)
    assert len(logged_offline(Path(recipe.run_dir))) == (mode != "disabled")
    assert asked == ["nonsense"] * (mode == "nonsense")
    assert ("nothing is logged there" in said[0]) is (mode == "disabled")
    assert not [line for line in said if "without it" in line]


def test_a_user_without_a_home_logs_offline(settings, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", "")
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)  # as in a container, for user 54321
    recipe, said = settings("log.wandb=auto"), []
    monkeypatch.delenv("HOME")
    track(recipe, said)
    assert len(logged_offline(Path(recipe.run_dir))) == 1
    assert os.environ["HOME"] == str(Path(recipe.run_dir).resolve())


def test_a_failure_in_the_middle_moves_the_run_offline(settings, monkeypatch):
    class Broken:
        def log(self, values):
            raise BrokenPipeError

    recipe, said = settings("log.wandb=auto"), []
    monkeypatch.setattr("kl_f8_train.run.tracking.wandb_reachable", lambda: True)
    monkeypatch.setattr(WandbTracker, "_start_online", lambda self: Broken())
    track(recipe, said)
    assert len(logged_offline(Path(recipe.run_dir))) == 1
    assert said[0] == "wandb: BrokenPipeError; continuing offline"


def test_a_tracker_that_fails_is_dropped_and_the_other_goes_on(settings, monkeypatch):
    def fail(*_):
        raise OSError("no space")

    recipe, said = settings("log.wandb=offline", "log.tensorboard=true"), []
    monkeypatch.setattr(TensorBoardTracker, "log", fail)
    trackers = Trackers(recipe, Path(recipe.run_dir), 100, said.append)
    for iteration in (101, 102):
        trackers.log(iteration, {"reconstruction_loss": 0.5})
    assert [tracker.name for tracker in trackers.trackers] == ["wandb"]
    trackers.finish()
    assert said[1:] == ["TensorBoard: OSError: no space; continuing without it"]
    assert len(logged_offline(Path(recipe.run_dir))) == 1


def read_tensorboard(run: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(run / "tensorboard"))
    accumulator.Reload()
    return accumulator


def test_tensorboard_gets_the_names_that_wandb_gets(settings, tmp_path, monkeypatch):
    sent: dict[str, object] = {}
    monkeypatch.setattr(WandbTracker, "_send", lambda self, i, values, picture: sent.update(values))
    recipe = settings("log.wandb=offline", "log.tensorboard=true")
    strip = tmp_path / "strip.jpg"
    Image.new("RGB", (8, 4), "red").save(strip)
    trackers = Trackers(recipe, tmp_path / "run", 100, print)
    trackers.log(101, {"reconstruction_loss": 0.5, "images_per_second": 2.0})
    trackers.log(101, {"validation/psnr_ema": 20.0}, strip)
    trackers.finish()
    found = read_tensorboard(tmp_path / "run")
    assert set(found.Tags()["scalars"]) == set(sent)
    assert found.Tags()["images"] == ["pictures"]
    assert [(e.step, e.value) for e in found.Scalars("validation/psnr_ema")] == [(101, 20.0)]


def test_steps_that_a_resume_repeats_are_shown_once(settings, tmp_path):
    for start, stop in ((100, 105), (102, 106)):  # killed after 105; its last checkpoint was 102
        tracker = TensorBoardTracker(tmp_path, start)
        for iteration in range(start + 1, stop + 1):
            tracker.log(iteration, {"loss": float(start)}, None)
        tracker.finish(False)
    shown = [(e.step, e.value) for e in read_tensorboard(tmp_path).Scalars("loss")]
    assert shown == [(101, 100), (102, 100), (103, 102), (104, 102), (105, 102), (106, 102)]


@pytest.mark.parametrize("verb", ["train", "doctor"])
def test_tensorboard_that_is_not_installed_is_named_at_the_start(
    tmp_path, monkeypatch, capsys, verb
):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    extra = ("log.tensorboard=true", f"init.weights={__file__}")
    assert main([verb, "demo", *runs.overrides(tmp_path, "run", *extra)]) in (2, 3)
    output = "".join(capsys.readouterr())
    assert "log.tensorboard=true needs the tensorboard package: pip install" in output
