"""Experiment trackers, wandb and TensorBoard: the same values under the same names in both.

metrics.csv and validation.csv are always written; a tracker is an addition, and one that fails
never stops training.
"""

import contextlib
import http.client
import importlib.util
import os
import secrets
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from kl_f8_train.errors import UsageError
from kl_f8_train.files import write_text
from kl_f8_train.output import Say
from kl_f8_train.settings import Config, to_dict

FINISH_SECONDS = 120.0  # for wandb's last upload; what is not uploaded stays in run_dir/wandb
MODE = "WANDB_MODE"  # wandb's own switch, which its init(mode=...) would override
SERVER_VARIABLES = ("WANDB_BASE_URL", "WANDB_API_KEY")  # offline logging needs neither


class Tracker(Protocol):
    """One destination of a run's metrics and pictures."""

    name: str

    def log(self, iteration: int, values: Mapping[str, float], picture: Path | None) -> None:
        """Logs scalars by name, and an image file as `pictures`."""

    def finish(self, failed: bool) -> None:
        """Writes what is pending and closes the run."""


class Trackers:
    """The trackers that a recipe asks for; one that raises is closed and dropped."""

    def __init__(self, config: Config, run_dir: Path, start: int, say: Say) -> None:
        self.say = say
        self.trackers: list[Tracker] = []
        if config.log.tensorboard:
            with self._may_fail("TensorBoard"):
                self.trackers.append(TensorBoardTracker(run_dir, start))
        if config.log.wandb != "off" and os.environ.get(MODE) == "disabled":
            say(f"wandb: {MODE}=disabled; nothing is logged there")
        elif config.log.wandb != "off":
            with self._may_fail("wandb"):
                self.trackers.append(WandbTracker(config, run_dir, say))

    def log(self, iteration: int, values: Mapping[str, float], picture: Path | None = None) -> None:
        """Logs to every tracker."""
        for tracker in list(self.trackers):
            with self._may_fail(tracker.name):
                tracker.log(iteration, values, picture)

    def finish(self, failed: bool = False) -> None:
        """Closes every tracker."""
        for tracker in list(self.trackers):
            with self._may_fail(tracker.name):
                tracker.finish(failed)
        self.trackers = []

    @contextlib.contextmanager
    def _may_fail(self, name: str) -> Iterator[None]:
        """Drops a tracker that fails, whatever it raises.

        SLURM signals every process of a job, so wandb's service may end before the run does.
        """
        try:
            yield
        except (Exception, SystemExit) as error:
            self.say(f"{name}: {type(error).__name__}: {error}; continuing without it")
            self.trackers = [tracker for tracker in self.trackers if tracker.name != name]
            if name == WandbTracker.name:
                _tear_down_wandb()


# --- TensorBoard ------------------------------------------------------------------------------


def check_tensorboard() -> None:
    """Raises UsageError if log.tensorboard is on but the package is not installed."""
    try:
        found = importlib.util.find_spec("tensorboard")
    except ValueError:  # hidden
        found = None
    if found is None:
        raise UsageError(
            "log.tensorboard=true needs the tensorboard package: pip install "
            "'kl-f8-train[tensorboard]', or give log.tensorboard=false"
        )


class TensorBoardTracker:
    """Event files in run_dir/tensorboard; after a resume, steps past the checkpoint are hidden."""

    name = "TensorBoard"

    def __init__(self, run_dir: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start + 1)

    def log(self, iteration: int, values: Mapping[str, float], picture: Path | None) -> None:
        """Logs scalars and an image, and flushes, so that a killed run loses nothing."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, iteration)
        if picture is not None:
            import numpy as np
            from PIL import Image

            with Image.open(picture) as image:
                pixels = np.asarray(image.convert("RGB"))  # (H, W, 3) uint8
            self.writer.add_image("pictures", pixels, iteration, dataformats="HWC")
        self.writer.flush()

    def finish(self, failed: bool) -> None:
        """Closes the event file."""
        self.writer.close()


# --- wandb ------------------------------------------------------------------------------------


class WandbTracker:
    """A wandb run that keeps its id over resumes; offline where going online fails."""

    name = "wandb"

    def __init__(self, config: Config, run_dir: Path, say: Say) -> None:
        self.config, self.run_dir, self.say = config, run_dir, say
        try:
            Path.home()
        except RuntimeError:  # a container's user without a home, which wandb refuses
            os.environ["HOME"] = str(run_dir.resolve())
        wanted = config.log.wandb == "auto" and os.environ.get(MODE) not in ("offline", "dryrun")
        self.online = wanted and wandb_reachable()
        self.run = self._start_online() if self.online else self._start_offline()

    def log(self, iteration: int, values: Mapping[str, float], picture: Path | None) -> None:
        """Logs; a failure online moves the rest of the run offline, once."""
        try:
            self._send(iteration, values, picture)
        except Exception as error:
            if not self.online:
                raise
            self.run = self._fall_back(error)
            self._send(iteration, values, picture)

    def _send(self, iteration: int, values: Mapping[str, float], picture: Path | None) -> None:
        import wandb

        image = {} if picture is None else {"pictures": wandb.Image(str(picture), file_type="jpg")}
        self.run.log({**values, **image, "iteration": iteration})

    def finish(self, failed: bool) -> None:
        """Uploads what is pending, within a time limit."""
        self.run.finish(exit_code=int(failed))

    def _start_online(self, again: bool = False) -> Any:
        """A run on the server; with a new id if the one of earlier starts was deleted there."""
        try:
            return self._init("online")
        except (Exception, SystemExit) as error:
            if "deleted" not in str(error) or again:
                return self._fall_back(error)
        self.say("wandb: the run was deleted on the server; starting a new one there")
        _tear_down_wandb()
        self._new_id()
        return self._start_online(again=True)

    def _fall_back(self, error: BaseException) -> Any:
        reason = " ".join(str(error).split()) or type(error).__name__
        self.say(f"wandb: {reason}; continuing offline")
        _tear_down_wandb()  # the failed attempt still holds the id
        return self._start_offline()

    def _start_offline(self) -> Any:
        self.online = False
        with _without(SERVER_VARIABLES):  # wandb would check them even so
            run = self._init("offline")
        self.say(
            f"wandb is offline; to upload later: wandb sync {self.run_dir}/wandb/offline-run-*"
        )
        return run

    def _init(self, mode: str) -> Any:
        import wandb

        options: dict[str, Any] = {"init_timeout": 15, "silent": True}
        if "finish_timeout" in wandb.Settings.model_fields:  # new in 2026
            options["finish_timeout"] = FINISH_SECONDS
        with _without((MODE,)):  # whatever else it holds would be refused
            return wandb.init(
                mode=mode,  # type: ignore[arg-type]
                settings=wandb.Settings(**options),
                project=self.config.log.project,
                name=self.config.name,
                id=self._id(),
                resume="allow",
                dir=str(self.run_dir),
                config=to_dict(self.config),
            )

    def _id(self) -> str:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if found := (self.run_dir / "wandb_id.txt").read_text(encoding="utf-8").strip():
                return found
        return self._new_id()

    def _new_id(self) -> str:
        made = secrets.token_hex(4)
        write_text(self.run_dir / "wandb_id.txt", f"{made}\n")
        return made


def wandb_reachable(timeout_seconds: float = 5.0) -> bool:
    """Whether wandb's server answers within the time, name look-up included."""
    answered = threading.Event()

    def ask() -> None:
        try:
            import wandb

            address = os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url
            with urllib.request.urlopen(address, timeout=timeout_seconds):
                answered.set()
        except urllib.error.HTTPError:
            answered.set()
        except (OSError, ValueError, http.client.HTTPException):
            return

    threading.Thread(target=ask, daemon=True).start()
    return answered.wait(timeout_seconds)


def _tear_down_wandb() -> None:
    """Ends wandb's service process now, not in a traceback when Python exits."""
    with contextlib.suppress(Exception, SystemExit):
        import wandb

        wandb.teardown()


@contextlib.contextmanager
def _without(names: tuple[str, ...]) -> Iterator[None]:
    """Hides environment variables."""
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)
