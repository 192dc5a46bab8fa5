"""The log of a run: metrics.csv, the progress bar or plain lines, skipped images."""

import math
import resource
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor
from tqdm import tqdm

from kl_f8_train.averages import label
from kl_f8_train.core.batch import Batch
from kl_f8_train.core.step import Finetuner
from kl_f8_train.core.updates import average_over_ranks, ema_distance
from kl_f8_train.data.loading import Plan
from kl_f8_train.errors import RunFailedError
from kl_f8_train.output import say
from kl_f8_train.run.callback import Course, finetuner_of, tolerated
from kl_f8_train.run.tracking import Trackers
from kl_f8_train.run_dir import METRICS_FILE, MetricsFile, skipped_images
from kl_f8_train.settings import Config
from kl_f8_train.units import counted, duration, figure, shortest, speed

FIRST_LINE = 30.0  # seconds after which a run says how it goes, whatever log.every is
SHOWN_SKIPPED = 20  # images named in the log; all are in the run's skipped-RANK.txt


SHORT = {  # columns, as lines call them
    "reconstruction_loss": "rec",
    "generator_loss": "g",
    "discriminator_loss": "d",
    "adaptive_weight": "d_weight",
}


class RunLog(Callback):
    """metrics.csv always; a progress bar or plain lines; trackers on request."""

    def __init__(
        self, run_dir: Path, config: Config, start: int, plan: Plan, course: Course
    ) -> None:
        self.run_dir, self.config, self.start, self.plan = run_dir, config, start, plan
        self.course = course
        given = config.init.iteration
        self.first = start if given is None else given  # iteration at which the run began
        self.table = MetricsFile(run_dir / METRICS_FILE, start)
        self.sums: dict[tuple[str, ...], Tensor] = {}  # names -> (names, 2): sum, and how many
        self.count = 0
        self.skipped: Counter[tuple[str, str]] = Counter()  # (source, reason), on this rank
        self.named: set[str] = set()  # bad images that are in skipped-RANK.txt
        self.converted: Counter[str] = Counter()  # images of other colour profiles, on this rank
        self.seen = 0  # images, on this rank
        self.trackers: Trackers | None = None  # on the first rank
        self.bar: Any = None
        self.waited = 0.0
        self.seconds = 0.0  # of the iterations of a row, without validation and checkpoints
        self.timed = 0  # of them; the first after a start also starts loaders, or compiles
        self.mark = time.perf_counter()  # end of the last row, or the start
        self.first_line = math.inf  # when one is due, on the first rank, until there is any

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Opens the reports on the first rank."""
        self.mark = time.perf_counter()
        self.named = set(skipped_images([self._skipped_file(trainer)]))
        if not trainer.is_global_zero:
            return
        self.trackers = Trackers(self.config, self.run_dir, self.start, self.say)
        if sys.stdout.isatty():
            total, unit = self.config.stop_iteration, "iteration"
            self.bar = tqdm(
                total=total, initial=self.start, unit=unit, mininterval=1.0, file=sys.stdout
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Counts the time spent waiting for data."""
        if not self.course.done and trainer.is_global_zero:
            often = counted(self.config.log.every, "iteration", "s")
            self.say(
                f"training: a line after {often} (log.every), the first after {FIRST_LINE:.0f} s "
                "at most; Ctrl-C saves and stops"
            )
            self.first_line = time.perf_counter() + FIRST_LINE
        self.waited += time.perf_counter() - self.course.since

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, *_: Any
    ) -> None:
        """Adds an iteration's figures, and reports every `log.every`."""
        finetuner = finetuner_of(pl_module)
        self._note_skipped(batch, trainer)
        names, values = zip(*finetuner.metrics.items(), strict=True)
        numbers = torch.stack(values).double()
        finite = numbers.isfinite()  # not those of an update that was left out
        pairs = torch.stack([torch.where(finite, numbers, 0.0), finite.double()], dim=1)
        self.sums[names] = pairs + self.sums.get(names, 0.0)
        self.count += 1
        if self.course.done:
            self.seconds += time.perf_counter() - self.course.since
            self.timed += 1
        if self.bar is not None and not finetuner.warmup_left:
            self.bar.update(finetuner.iteration - self.bar.n)
        done = finetuner.warmup_done or finetuner.iteration  # which stands still in a warm-up
        if done % self.config.log.every == 0 or self.count >= self.config.log.every:
            self._report(trainer, finetuner)
        elif 2 * time.perf_counter() - self.course.since > self.first_line:
            self._say_first(finetuner)  # the next iteration would end too late

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: Any) -> None:
        """Closes the trackers' runs as failed."""
        if self.trackers is not None:
            self.trackers.finish(failed=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reports the rest."""
        if self.count:
            self._report(trainer, finetuner_of(pl_module))
        if trainer.is_global_zero:
            self._log_mixture(finetuner_of(pl_module).iteration)
        if self.bar is not None:
            self.bar.close()
        if self.trackers is not None:
            self.trackers.finish()

    def validated(self, iteration: int, row: dict[str, float], path: Path) -> None:
        """Logs the scores of the fixed photographs, and their strip."""
        names = [key.removeprefix("psnr_") for key in row if key.startswith("psnr_")]
        psnr = ", ".join(f"{row[f'psnr_{name}']:.2f} {label(name)}" for name in names)
        ssim = ", ".join(f"{row[f'ssim_{name}']:.3f} {label(name)}" for name in names)
        self.say(f"validation at iteration {iteration:,}: PSNR {psnr}; SSIM {ssim}")
        if self.bar is not None:
            self.bar.unpause()  # its estimate is of iterations alone
        if self.trackers is not None:
            scores = {f"validation/{key}": value for key, value in row.items()}
            self.trackers.log(iteration, scores, path)

    def _report(self, trainer: Trainer, finetuner: Finetuner) -> None:
        began = time.perf_counter()
        finetuner.guard.judge()
        # Sums and counts are averaged alike, so their ratio is the mean over all ranks' finite
        # values.
        average_over_ranks(list(self.sums.values()))
        row = _means(self.sums)
        now = time.perf_counter()
        if self.timed:  # with the time that the device still took
            seconds = (self.seconds + now - began) / self.timed
        else:
            seconds = (now - self.mark) / self.count
        row["images_per_second"] = self.config.global_batch / seconds
        row["data_wait_share"] = self.waited / (now - self.mark)
        row["skipped_images"] = self._judge_skipped(finetuner)
        row["learning_rate"] = finetuner.learning_rate
        row["bad_updates"] = finetuner.guard.in_all
        for name, source in self.plan.plans.items():
            row[f"images_{name}"] = source.share * (finetuner.iteration - self.first)
            row[f"passes_{name}"] = source.passes(finetuner.iteration - self.first)
        row |= self._ema_distances(finetuner)
        if finetuner.device.type == "cuda":
            row["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        else:
            row["peak_memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        if trainer.is_global_zero:
            with tolerated():
                self.table.write(finetuner.iteration, row)
            if self.trackers is not None:
                self.trackers.log(finetuner.iteration, row)
            self.say(self._line(finetuner, row, seconds if self.timed else None))
        self.first_line = math.inf
        self.sums, self.count, self.waited = {}, 0, 0.0
        self.seconds, self.timed = 0.0, 0
        self.mark = time.perf_counter()

    def _say_first(self, finetuner: Finetuner) -> None:
        """A line before log.every, of this rank's means; metrics.csv gets none."""
        self.first_line = math.inf
        seconds = self.seconds / self.timed if self.timed else None
        took = seconds or time.perf_counter() - self.course.since
        row = _means(self.sums) | {"images_per_second": self.config.global_batch / took}
        self.say(self._line(finetuner, row, seconds))

    def _ema_distances(self, finetuner: Finetuner) -> dict[str, float]:
        """`ema_distance`, and `ema_distance_0.9999` of further decays."""
        first, *further = finetuner.averages.items()
        averages = {"ema_distance": first[1]}
        averages |= {f"ema_distance_{shortest(decay)}": part for decay, part in further}
        return {name: ema_distance(part, finetuner.autoencoder) for name, part in averages.items()}

    def _line(self, finetuner: Finetuner, row: dict[str, float], seconds: float | None) -> str:
        stop = self.config.stop_iteration
        if finetuner.warmup_left:
            head = f"discriminator warm-up, {finetuner.warmup_left:,} iterations left"
        else:
            head = f"iteration {finetuner.iteration:,} of {stop:,}"
        shown = [f"{short} {figure(row[key])}" for key, short in SHORT.items() if key in row]
        rest = stop - finetuner.iteration + finetuner.warmup_left
        left = [] if seconds is None else [f"{duration(rest * seconds)} left"]
        return " | ".join([head, *shown, speed(row["images_per_second"]), *left])

    def _note_skipped(self, batch: Batch, trainer: Trainer) -> None:
        """Counts bad images at each of their positions; names and files each of them once."""
        self.seen += len(batch.keys)
        self.converted.update(batch.profiles)
        for message in batch.skipped:
            name, _, reason = message.partition(": ")
            self.skipped[name.partition("/")[0], reason.partition(":")[0]] += 1
            if name in self.named:
                continue
            self.named.add(name)
            if len(self.named) <= SHOWN_SKIPPED:
                self.say(f"skipped an image: {message}")
            elif len(self.named) == SHOWN_SKIPPED + 1:
                rest = self._skipped_file(trainer)
                self.say(f"skipped more images: from here on they are only written to {rest}")
            with tolerated(), self._skipped_file(trainer).open("a", encoding="utf-8") as file:
                file.write(f"{message}\n")

    def _skipped_file(self, trainer: Trainer) -> Path:
        return self.run_dir / f"skipped-{trainer.global_rank}.txt"

    def _judge_skipped(self, finetuner: Finetuner) -> int:
        """Bad positions on all ranks; too many of them end the run, on all ranks together."""
        counts = torch.tensor(
            [self.skipped.total(), self.seen], dtype=torch.float64, device=finetuner.device
        )
        if dist.is_initialized():
            dist.all_reduce(counts)
        bad, seen = (int(number) for number in counts)
        limit = self.config.data.max_bad_share
        if too_many(bad, seen, limit):
            raise RunFailedError(
                f"{bad:,} of {seen:,} images cannot be used, more than data.max_bad_share="
                f"{limit:g}: {self._reasons()}; they are named in {self.run_dir}/skipped-*.txt"
            )
        return bad

    def _reasons(self, source: str | None = None) -> str:
        counts: Counter[str] = Counter()
        for (name, reason), number in self.skipped.items():
            if source in (None, name):
                counts[reason] += number
        return ", ".join(f"{reason} {number:,}" for reason, number in counts.most_common())

    def _log_mixture(self, iteration: int) -> None:
        for name, source in self.plan.plans.items():
            done = iteration - self.first
            share = 100 * source.share / self.plan.batch
            replaced = self._reasons(name) or "none"
            self.say(
                f"data: {name}: {source.share * done:,} images ({share:.4g} % of every batch), "
                f"{source.passes(done):.2f} passes; replaced{self._here}: {replaced}"
            )
        if self.converted:
            named = ", ".join(f"{name} {count:,}" for name, count in self.converted.most_common(5))
            self.say(f"data: converted to sRGB{self._here}, by colour profile: {named}")

    @property
    def _here(self) -> str:
        """Says that counts are of one rank, where there are several."""
        return " on this rank" if dist.is_initialized() and dist.get_world_size() > 1 else ""

    def say(self, line: str) -> None:
        """Prints a line, above the bar if there is one."""
        # tqdm's own `write` would end the run when the terminal is closed.
        with nullcontext() if self.bar is None else self.bar.external_write_mode():
            say(line)


def _means(sums: Mapping[tuple[str, ...], Tensor]) -> dict[str, float]:
    """Means by name of sums and counts; a name without a finite value is left out."""
    totals: defaultdict[str, float] = defaultdict(float)
    numbers: defaultdict[str, float] = defaultdict(float)
    for names, pairs in sums.items():  # one, unless a term has set in since
        for name, (total, number) in zip(names, pairs.tolist(), strict=True):
            totals[name] += total
            numbers[name] += number
    return {name: totals[name] / number for name, number in numbers.items() if number}


def too_many(bad: int, seen: int, limit: float) -> bool:
    """Whether more than a share `limit` of the images is bad, beyond chance.

    Before 1,000 images, three standard deviations of the binomial distribution and three images
    are allowed on top, so that a few bad ones at the start do not end a run.
    """
    margin = 0.0 if seen >= 1000 else 3.0 + 3.0 * math.sqrt(seen * limit * (1.0 - limit))
    return bad > limit * seen + margin
