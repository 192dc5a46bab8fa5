"""What an examination finds: facts, problems and remarks."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from kl_f8_train.errors import RunFailedError, UserError
from kl_f8_train.output import Say
from kl_f8_train.settings import Config

WARNING = "WARNING: "  # how a grave remark begins


def silent(line: str) -> None:
    """Says nothing."""


@dataclass
class Report:
    """The findings: facts for machines, problems, and remarks, which do not forbid a run."""

    say: Say  # takes every line, in full
    begin: Say = silent  # takes the title of each section
    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[UserError] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    crashes: list[Exception] = field(default_factory=list)  # that no check foresaw

    @contextlib.contextmanager
    def section(self, title: str) -> Iterator[None]:
        """A part of the examination; an error raised in it is recorded as a problem."""
        self.begin(title)
        self.say(f"{title}:")
        with self.guard(title):
            yield

    @contextlib.contextmanager
    def guard(self, title: str) -> Iterator[None]:
        """Records any error, also an unexpected one, as a problem: the verdict always comes."""
        try:
            yield
        except UserError as error:
            self.record(error)
        except Exception as error:
            self.crashes.append(error)
            text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            self.record(RunFailedError(f"{title}: unexpected {text}\n--debug shows where"))

    def record(self, error: UserError) -> None:
        """Adds a problem, unless it is known."""
        if str(error) not in map(str, self.problems):
            self.problems.append(error)
        number = [str(problem) for problem in self.problems].index(str(error)) + 1
        self.say(f"  PROBLEM {number}, below")

    def detail(self, text: str) -> None:
        """A line of the current section."""
        self.say(f"  {text}")

    def remark(self, text: str) -> None:
        """A note, for the end; it may begin with "WARNING: "."""
        self.remarks.append(text)

    def start_iteration(self, config: Config) -> int | None:
        """Where the run would start; None if nothing states it."""
        found: int | None = self.facts.get("start_iteration", config.init.iteration)
        return found

    @property
    def exit_code(self) -> int:
        """0, or the code of the gravest problem: settings first, then inputs, then the rest."""
        return min((problem.exit_code for problem in self.problems), default=0)

    def as_json(self) -> dict[str, Any]:
        """The one object that `--json` prints; what could not be found out is null."""
        return {
            "go": not self.problems,
            "problems": [str(problem) for problem in self.problems],
            "remarks": self.remarks,
            **dict.fromkeys(("gradient_audit", "images_total", "gpu_hours", "end_date")),
            **dict.fromkeys(("checkpoint_bytes", "per_device_batch_that_fits")),
            **{key: _finite(value) for key, value in self.facts.items()},
        }


def _finite(value: Any) -> Any:
    """The same with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
