"""What happens around the iterations: log lines, pictures, checkpoints, signals."""

import contextlib
import csv
import resource
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Adam
from tqdm import tqdm

from kl_f8_train import checkpoint, config, images, metrics, state
from kl_f8_train.cache import ShardCache, is_remote
from kl_f8_train.config import Config
from kl_f8_train.data import SIGNALS, Batch, upcoming
from kl_f8_train.ema import ema_distance
from kl_f8_train.errors import RunFailedError
from kl_f8_train.finetuner import Finetuner
from kl_f8_train.gradients import average_over_ranks
from kl_f8_train.nonfinite import HostCopy
from kl_f8_train.plan import Plan
from kl_f8_train.processes import tell
from kl_f8_train.shards import Source
from kl_f8_train.tracking import Trackers
from kl_f8_train.units import duration

COLOURS = ("red", "green", "blue", "saturation")


class Checkpoints(Callback):
    """Saves every `checkpoint.every` iterations and at the end, and removes old files.

    A save that fails is tried again at the next turn; two failures in a row end the run.
    """

    def __init__(self, run_dir: Path, settings: config.Checkpoint, frozen_sha256: str) -> None:
        self.run_dir, self.settings, self.frozen = run_dir, settings, frozen_sha256
        self.saved: tuple[int, int] | None = None
        self.failures = 0
        self.mark = 0.0  # end of the last save, or the start
        self.told = False  # that saving takes long

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the first interval."""
        self.mark = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Saves when it is time."""
        done = finetuner_of(pl_module).warmup_done or finetuner_of(pl_module).iteration
        if done % self.settings.every == 0:
            self.save(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the last state; here a failure is final."""
        self.save(trainer, pl_module, final=True)

    def save(self, trainer: Trainer, pl_module: LightningModule, final: bool = False) -> None:
        """Writes a checkpoint of the current iteration, on the first rank."""
        finetuner = finetuner_of(pl_module)
        now = (finetuner.iteration, finetuner.warmup_left)
        if self.saved == now:
            return
        finetuner.guard.judge()
        failure: str | None = None
        began = time.perf_counter()
        if trainer.is_global_zero:
            try:
                optimizers = [o for o in trainer.optimizers if isinstance(o, Adam)]
                path = state.save(finetuner, optimizers, self.run_dir, self.frozen)
            except (RunFailedError, OSError) as error:
                failure = str(error)
            else:
                with tolerated("an old checkpoint could not be removed"):
                    keep = self.settings
                    checkpoint.remove_old_checkpoints(path, keep.keep_last, keep.keep_every)
        failure = trainer.strategy.broadcast(failure)  # all ranks go on, or stop, together
        if failure is None:
            self.saved, self.failures = now, 0
            self._judge_pause(began, trainer.is_global_zero and not final)
            return
        self.failures += 1
        if final or self.failures > 1:
            raise RunFailedError(failure)
        if trainer.is_global_zero:
            tell(f"{failure}\n  training goes on; the next checkpoint tries again")

    def _judge_pause(self, began: float, aloud: bool) -> None:
        """Tells once if saving takes more than a second and 5 % of the time between saves."""
        pause, interval = time.perf_counter() - began, began - self.mark
        self.mark = time.perf_counter()
        if aloud and not self.told and pause > max(1.0, 0.05 * interval):
            self.told = True
            tell(
                f"saving took {pause:.1f} s, {100 * pause / interval:.0f} % of the "
                f"{interval:.0f} s since the last; raise checkpoint.every, or give run_dir a "
                "faster disk"
            )


class Signals(Callback):
    """SIGTERM, SIGINT, SIGUSR1, SIGHUP set a flag; all ranks agree on it after an iteration, stop.

    What they agreed on is read after one iteration more, so that no host waits for its device.
    The last state is then saved by `Checkpoints`. A second SIGINT ends the program at once.
    """

    def __init__(self) -> None:
        self.received = 0
        self._agreed: HostCopy | None = None
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Takes the signals over."""
        for number in SIGNALS:
            self._before[number] = signal.getsignal(number)
            if (number, self._before[number]) != (signal.SIGHUP, signal.SIG_IGN):  # nohup's
                signal.signal(number, self._note)

    def restore(self) -> None:
        """Gives the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        self.received = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Stops all ranks if one of them got a signal."""
        if trainer.world_size > 1:
            flag = torch.full((), self.received, device=pl_module.device)  # filled there
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            before, self._agreed = self._agreed, HostCopy(flag)
            stop = 0 if before is None else int(before.read())
        else:
            stop = self.received
        if stop:
            self.received = stop
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All ranks end with the same code, also if a signal came in the last iteration."""
        if self._agreed is not None:
            self.received = int(self._agreed.read())


class Validation(Callback):
    """Fixed photographs at intervals: a strip from the EMA, and scores of EMA and raw weights.

    Posterior mean, 8-bit reconstructions; a mean over the photographs in each column of
    `validation.csv`. The strips are JPEGs, input beside the EMA's reconstruction.
    """

    def __init__(self, run_dir: Path, every: int, fixed: list[Tensor], run_log: "RunLog") -> None:
        self.folder, self.every, self.fixed = run_dir / "pictures", every, fixed
        self.run_log = run_log
        self.table = MetricsFile(run_dir / "validation.csv", run_log.start - 1)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validates the start."""
        self.validate(trainer, finetuner_of(pl_module))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Validates when it is time."""
        finetuner = finetuner_of(pl_module)
        if self.every and finetuner.iteration % self.every == 0 and not finetuner.warmup_left:
            self.validate(trainer, finetuner)

    def validate(self, trainer: Trainer, finetuner: Finetuner) -> None:
        """Writes a row of `validation.csv` and `pictures/iteration-NNNNNNNNN.jpg`."""
        if not (self.every and self.fixed and trainer.is_global_zero):
            return
        with torch.compiler.set_stance("force_eager"):  # too few images to compile graphs for
            pairs = [reconstruct_fixed(finetuner, image) for image in self.fixed]
            row = validation_scores(finetuner, self.fixed, pairs)
        iteration = finetuner.iteration
        path = self.folder / f"iteration-{iteration:09d}.jpg"
        strip = [
            images.hstack([image, ema]) for image, (ema, _) in zip(self.fixed, pairs, strict=True)
        ]
        with tolerated():
            self.table.write(iteration, row)
            with checkpoint.atomic_path(path) as temporary:
                images.to_pil(images.vstack(strip)).save(temporary, format="JPEG", quality=92)
            self.run_log.validated(iteration, row, path)


@torch.no_grad()
def reconstruct_fixed(finetuner: Finetuner, image: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 (3, H, W) -> two of them, from the posterior mean: by EMA and by raw weights."""
    x = images.to_float(image.to(finetuner.device))[None].to(finetuner.autoencoder.last_layer.dtype)
    latents = finetuner.autoencoder.encode(x).mean
    ema = finetuner.ema["decoder"](finetuner.ema["post_quant_conv"](latents))[0]
    raw = finetuner.autoencoder.decode(latents)[0]
    return images.to_uint8(ema).cpu(), images.to_uint8(raw).cpu()


@torch.no_grad()
def validation_scores(
    finetuner: Finetuner, originals: list[Tensor], pairs: list[tuple[Tensor, Tensor]]
) -> dict[str, float]:
    """PSNR, SSIM and perceptual distance of EMA and raw weights, means over the photographs.

    And the EMA's shift of colour and saturation, reconstruction minus input, in 8-bit levels.
    """
    row: dict[str, float] = {}
    x = torch.stack(originals)
    for name, outputs in zip(("ema", "raw"), zip(*pairs, strict=True), strict=True):
        y = torch.stack(list(outputs))
        x01, y01 = x.double() / 255.0, y.double() / 255.0
        row[f"psnr_{name}"] = float(metrics.psnr(x01, y01).mean())
        row[f"ssim_{name}"] = float(metrics.ssim(x01, y01).mean())
        on_device = [images.to_float(t.to(finetuner.device)) for t in (x, y)]
        row[f"perceptual_{name}"] = float(finetuner.perceptual(*on_device).mean())
        if name == "ema":
            shift = metrics.colour_shift(x01, y01).mean(dim=0)
            row |= {f"{c}_shift_ema": float(v) for c, v in zip(COLOURS, shift, strict=True)}
    return row


class RunLog(Callback):
    """metrics.csv always; a progress bar or plain lines; trackers on request."""

    def __init__(self, run_dir: Path, settings: Config, start: int, plan: Plan) -> None:
        self.run_dir, self.config, self.start, self.plan = run_dir, settings, start, plan
        given = settings.init.iteration
        self.first = start if given is None else given  # iteration at which the run began
        self.table = MetricsFile(run_dir / "metrics.csv", start)
        self.sums: dict[tuple[str, ...], Tensor] = {}  # names -> (names, 2): sum, and how many
        self.count = 0
        self.skipped: Counter[tuple[str, str]] = Counter()  # (source, reason), on this rank
        self.seen = 0  # images, on this rank
        self.trackers: Trackers | None = None  # on the first rank
        self.bar: Any = None
        self.waited = 0.0
        self.mark = self.batch_end = time.perf_counter()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Opens the reports on the first rank."""
        self.mark = self.batch_end = time.perf_counter()
        if not trainer.is_global_zero:
            return
        self.trackers = Trackers(self.config, self.run_dir, self.start, self._say)
        if sys.stdout.isatty():
            total, unit = self.config.stop_iteration, "iteration"
            self.bar = tqdm(total=total, initial=self.start, unit=unit, mininterval=1.0)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Counts the time spent waiting for data."""
        self.waited += time.perf_counter() - self.batch_end

    def await_data(self) -> None:
        """Begins to count: the last callback tells that reports and files are done."""
        self.batch_end = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, *_: Any
    ) -> None:
        """Adds an iteration's figures, and reports every `log.every`."""
        finetuner = finetuner_of(pl_module)
        self._note_skipped(batch, trainer)
        names, values = zip(*finetuner.metrics.items(), strict=True)
        numbers = torch.stack(values).double()
        finite = numbers.isfinite()  # not of every update that was left out
        pairs = torch.stack([torch.where(finite, numbers, 0.0), finite.double()], dim=1)
        self.sums[names] = pairs + self.sums.get(names, 0.0)
        self.count += 1
        if self.bar is not None and not finetuner.warmup_left:
            self.bar.update(finetuner.iteration - self.bar.n)
        if finetuner.iteration % self.config.log.every == 0 or self.count >= self.config.log.every:
            self._report(trainer, finetuner)
        self.batch_end = time.perf_counter()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: Any) -> None:
        """Closes the trackers' runs as failed."""
        if self.trackers is not None:
            self.trackers.finish(failed=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reports the rest."""
        if self.count:
            self._report(trainer, finetuner_of(pl_module))
        if trainer.is_global_zero:
            self._tell_mixture(finetuner_of(pl_module).iteration)
        if self.bar is not None:
            self.bar.close()
        if self.trackers is not None:
            self.trackers.finish()

    def validated(self, iteration: int, row: dict[str, float], path: Path) -> None:
        """Logs the scores of the fixed photographs, and their strip."""
        self._say(
            f"validation at iteration {iteration:,}: PSNR {row['psnr_ema']:.2f} EMA, "
            f"{row['psnr_raw']:.2f} raw; SSIM {row['ssim_ema']:.3f} EMA, {row['ssim_raw']:.3f} raw"
        )
        if self.trackers is not None:
            scores = {f"validation/{key}": value for key, value in row.items()}
            self.trackers.log(iteration, scores, path)

    def _report(self, trainer: Trainer, finetuner: Finetuner) -> None:
        finetuner.guard.judge()
        average_over_ranks(list(self.sums.values()))
        totals: defaultdict[str, float] = defaultdict(float)
        numbers: defaultdict[str, float] = defaultdict(float)
        for names, pairs in self.sums.items():  # one, unless a term has set in since
            for name, (total, number) in zip(names, pairs.tolist(), strict=True):
                totals[name] += total
                numbers[name] += number
        row = {name: totals[name] / number for name, number in numbers.items() if number}
        seconds = time.perf_counter() - self.mark
        row["images_per_second"] = self.count * self.config.global_batch / seconds
        row["data_wait_share"] = self.waited / seconds
        row["skipped_images"] = self._judge_skipped(finetuner)
        row["bad_updates"] = finetuner.guard.in_all
        for name, source in self.plan.plans.items():
            row[f"images_{name}"] = source.share * (finetuner.iteration - self.first)
            row[f"passes_{name}"] = source.passes(finetuner.iteration - self.first)
        row["ema_distance"] = ema_distance(finetuner.ema, finetuner.autoencoder)
        if finetuner.device.type == "cuda":
            row["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        else:
            row["peak_memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        if trainer.is_global_zero:
            with tolerated():
                self.table.write(finetuner.iteration, row)
            if self.trackers is not None:
                self.trackers.log(finetuner.iteration, row)
            self._say(self._line(finetuner, row, seconds / self.count))
        self.sums, self.count, self.waited = {}, 0, 0.0
        self.mark = time.perf_counter()

    def _line(self, finetuner: Finetuner, row: dict[str, float], seconds: float) -> str:
        stop = self.config.stop_iteration
        if finetuner.warmup_left:
            head = f"discriminator warm-up, {finetuner.warmup_left:,} iterations left"
        else:
            head = f"iteration {finetuner.iteration:,} of {stop:,}"
        shown = [
            f"{label} {row[key]:.4g}"
            for label, key in (
                ("rec", "reconstruction_loss"),
                ("g", "generator_loss"),
                ("d", "discriminator_loss"),
                ("d_weight", "adaptive_weight"),
            )
            if key in row
        ]
        rest = duration((stop - finetuner.iteration + finetuner.warmup_left) * seconds)
        return " | ".join(
            [head, *shown, f"{row['images_per_second']:.1f} images/s", f"{rest} left"]
        )

    def _note_skipped(self, batch: Batch, trainer: Trainer) -> None:
        """Counts, names and files bad images."""
        self.seen += len(batch.keys)
        for message in batch.skipped:
            key, _, reason = message.partition(": ")
            self.skipped[key.partition("/")[0], reason.partition(":")[0]] += 1
            if self.skipped.total() <= 20:
                self._say(f"skipped an image: {message}")
            name = f"skipped-{trainer.global_rank}.txt"
            with tolerated(), (self.run_dir / name).open("a") as file:
                file.write(f"{message}\n")

    def _judge_skipped(self, finetuner: Finetuner) -> int:
        """Bad images on all ranks; too many of them end the run, on all ranks together."""
        counts = torch.tensor(
            [self.skipped.total(), self.seen], dtype=torch.float64, device=finetuner.device
        )
        if dist.is_initialized():
            dist.all_reduce(counts)
        bad, seen = (int(number) for number in counts)
        limit = self.config.data.max_bad_share
        if seen >= 1000 and bad > limit * seen:
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

    def _tell_mixture(self, iteration: int) -> None:
        for name, source in self.plan.plans.items():
            done = iteration - self.first
            share = 100 * source.share / self.plan.batch
            replaced = self._reasons(name) or "none"
            self._say(
                f"data: {name}: {source.share * done:,} images ({share:.4g} %), "
                f"{source.passes(done):.2f} passes; replaced on this rank: {replaced}"
            )

    def _say(self, line: str) -> None:
        if self.bar is not None:
            self.bar.write(line)
        else:
            tell(line)


class Prefetch(Callback):
    """Fetches the remote shards of the next iterations ahead of their use, on the GPU's node."""

    AHEAD, EVERY = 200, 50  # iterations

    def __init__(self, plan: Plan, sources: Mapping[str, Source], cache: ShardCache) -> None:
        self.plan, self.sources, self.cache = plan, sources, cache
        self.asked = -self.EVERY

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Asks every few iterations; not earlier, as loaders are forked before the first ends."""
        iteration = finetuner_of(pl_module).iteration
        if iteration >= self.asked + self.EVERY:
            self.asked = iteration
            self._ask(trainer, iteration)

    def _ask(self, trainer: Trainer, iteration: int) -> None:
        ahead = range(iteration, iteration + self.AHEAD)
        wanted = upcoming(self.plan, self.sources, ahead, trainer.global_rank, trainer.world_size)
        self.cache.prefetch([place for place in wanted if is_remote(place)])


@contextlib.contextmanager
def tolerated(what: str = "a report could not be written") -> Iterator[None]:
    """What fails for a full disk, say, but is no checkpoint, is told and does not end the run."""
    try:
        yield
    except (OSError, RunFailedError) as error:
        tell(f"{error}\n  {what}; training goes on")


class MetricsFile:
    """A CSV that grows by rows and, where needed, columns; rows past `start` are dropped."""

    def __init__(self, path: Path, start: int) -> None:
        self.path = path
        self.columns: list[str] = ["iteration"]
        self.rows: list[dict[str, str]] = []
        self.appends = False  # once this process has written the whole file
        if path.is_file():
            with path.open(newline="", encoding="utf-8", errors="replace") as file:
                reader = csv.DictReader(file)
                kept = [row for row in reader if (row.get("iteration") or "").isdigit()]
                self.columns = list(reader.fieldnames or self.columns)
                self.rows = [row for row in kept if int(row["iteration"]) <= start]

    def write(self, iteration: int, values: dict[str, float]) -> None:
        """Adds a row; a new column, or the first row, rewrites the file."""
        row = {
            "iteration": str(iteration),
            **{key: f"{value:.8g}" for key, value in values.items()},
        }
        new = [key for key in row if key not in self.columns]
        first = not self.rows or not self.path.is_file() or bool(new) or not self.appends
        self.columns += new
        self.rows.append(row)
        if first:
            with (
                checkpoint.atomic_path(self.path) as temporary,
                temporary.open("w", newline="") as file,
            ):
                writer = csv.DictWriter(file, self.columns, restval="")
                writer.writeheader()
                writer.writerows(self.rows)
            self.appends = True
        else:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.columns, restval="").writerow(row)


def finetuner_of(module: LightningModule) -> Finetuner:
    """The module, typed."""
    assert isinstance(module, Finetuner)
    return module
