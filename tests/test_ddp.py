"""Several real processes over gloo: what is reduced, that it is right, and guards they share."""

import csv
import hashlib
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ranks
import runs
import torch
from torch import Tensor

from kl_f8_train import config
from kl_f8_train.core.discriminator import Discriminator
from kl_f8_train.core.hashes import tensors_sha256
from kl_f8_train.core.model import AutoencoderKL
from kl_f8_train.core.step import Finetuner
from kl_f8_train.run import saving
from kl_f8_train.run.train import Iterations
from kl_f8_train.run.trainer import DecoderDDP
from kl_f8_train.run.watchdog import FIRST, longest_wait
from kl_f8_train.run_dir import list_checkpoints
from kl_f8_train.weights import weight_file

pytestmark = pytest.mark.slow
BATCH = ("global_batch=12", "checkpoint.keep_last=9", "log.every=1000")
SYNCED = ("adversarial.sync_batchnorm=true",)
# A gradient that is zero but for rounding, such as an attention key's bias, is a whole step to
# Adam; with a larger epsilon rounding stays as small as it is.
STEADY = ("optimizer.eps=1.0",)


def around_iterations(watch: Any) -> None:
    """Makes every iteration of this process run inside `watch(finetuner, batch)`."""
    original = Finetuner.run_iteration

    def run_iteration(self, batch, *arguments):
        with watch(self, batch):
            original(self, batch, *arguments)

    Finetuner.run_iteration = run_iteration


# --- what is reduced ------------------------------------------------------------------------


def record_one_iteration(trace: str) -> None:
    """Profiles from the start of the fourth iteration to the start of the fifth, all included."""
    profiler = torch.profiler.profile(record_shapes=True)

    @contextmanager
    def watch(finetuner, batch):
        if finetuner.iteration == 103:
            profiler.start()
        if finetuner.iteration == 104:
            profiler.stop()
            profiler.export_chrome_trace(f"{trace}-{os.environ['RANK']}.json")
        yield

    around_iterations(watch)


def events(trace: Path, rank: int) -> list[dict[str, Any]]:
    """What torch did, in the order of time."""
    found = json.loads(Path(f"{trace}-{rank}.json").read_text())["traceEvents"]
    return sorted((e for e in found if e.get("ph") == "X"), key=lambda event: event["ts"])


def reduced(events: list[dict[str, Any]]) -> list[tuple[str, int]]:
    """Every collective call, as torch's dispatcher saw it: its name and bytes."""
    calls = []
    for event in events:
        if event["name"].startswith("c10d::"):
            shapes = event["args"]["Input Dims"][0]
            numbers = sum(torch.Size(shape).numel() for shape in shapes)
            calls.append((event["name"], numbers * (8 if numbers == 1 else 4)))  # flags: int64
    return calls


def trained_bytes(ch: int = 32) -> int:
    model = AutoencoderKL(ch=ch, ch_mult=(1, 1), num_res_blocks=1)
    return 4 * sum(
        p.numel() for part in (model.decoder, model.post_quant_conv) for p in part.parameters()
    )


def adversary_bytes() -> int:
    return 4 * sum(p.numel() for p in Discriminator(16, 2).parameters())


LAST_LAYER = 4 * 3 * 32 * 3 * 3
FLAG = ("c10d::allreduce_", 8)  # whether a rank got a signal


@pytest.mark.parametrize("per_gpu_weight", [False, True])
def test_every_gradient_is_reduced_once_and_nothing_else(folder, per_gpu_weight):
    name = f"reduced-{per_gpu_weight}"
    extra = (f"adversarial.per_gpu_weight={str(per_gpu_weight).lower()}", "stop_iteration=105")
    micro = "compute.per_device_batch=3"  # 2 ranks x 3 images x 2 micro-batches
    watch = {"prepare": record_one_iteration, "given": (str(folder / name),)}
    ranks.finish(ranks.start(folder, name, *BATCH, *extra, micro, world=2, **watch))
    weights = [] if per_gpu_weight else [("c10d::allreduce_", 2 * LAST_LAYER)]
    expected = [
        *weights,  # the adaptive weight's, before the backward passes
        ("c10d::allreduce_", trained_bytes()),  # only after the last micro-batch
        ("c10d::allreduce_", adversary_bytes() + 4),  # and the discriminator's loss
        FLAG,
    ]
    for rank in (0, 1):
        assert reduced(events(folder / name, rank)) == expected


def test_reduction_overlaps_the_backward_pass(folder):
    runs.make_weights(folder / "wide.ckpt", ch=64, discriminator=False)
    extra = (*runs.NO_ADVERSARIAL, "model.ch=64", f"init.weights={folder / 'wide.ckpt'}")
    watch = {"prepare": record_one_iteration, "given": (str(folder / "wide"),)}
    micro = ("compute.per_device_batch=1", "global_batch=4", "stop_iteration=105")
    ranks.finish(ranks.start(folder, "wide", *BATCH, *extra, *micro, world=2, **watch))
    for rank in (0, 1):
        found = events(folder / "wide", rank)
        *buckets, flag = reduced(found)
        assert flag == FLAG
        assert len(buckets) > 1
        assert sum(size for _, size in buckets) == trained_bytes(64)
        assert {name for name, _ in buckets} == {"c10d::allreduce_"}
        interesting = [
            e["name"]
            for e in found
            if e["name"] in ("c10d::allreduce_", "aten::convolution_backward")
        ]
        first = interesting.index("c10d::allreduce_")
        assert interesting[:first].count("aten::convolution_backward") > 0
        assert interesting[first:].count("aten::convolution_backward") > 0


# --- right ----------------------------------------------------------------------------------


def note_iterations(path: str) -> None:
    """Writes each iteration's images and noise, by hash and key, and the hash of the weights."""
    rank = os.environ.get("RANK", "0")

    @contextmanager
    def watch(finetuner, batch):
        samples = [
            hashlib.sha256(image.numpy().tobytes() + noise.numpy().tobytes()).hexdigest() + key
            for image, noise, key in zip(
                batch.images, batch.noise.unbind(1), batch.keys, strict=True
            )
        ]
        yield
        state = {name: p for name, p in finetuner.named_parameters()}
        line = {
            "iteration": finetuner.iteration,
            "samples": samples,
            "state": tensors_sha256(state),
        }
        with Path(f"{path}-{rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    around_iterations(watch)


def notes(path: Path, rank: int = 0) -> dict[int, dict[str, Any]]:
    lines = Path(f"{path}-{rank}.jsonl").read_text().splitlines()
    return {row["iteration"]: row for row in map(json.loads, lines)}


def distance(
    a: dict[str, Tensor], b: dict[str, Tensor], start: dict[str, Tensor]
) -> dict[str, float]:
    """|a - b| over |a - start|, for each kind of tensor that moves."""
    found = {}
    for kind in ("autoencoder.decoder.", "ema.", "ema_0_5.", "discriminator."):
        keys = [k for k in a if k.startswith(kind) and a[k].is_floating_point()]
        if keys:
            apart = torch.stack(torch._foreach_norm([a[k] - b[k] for k in keys])).norm()
            moved = torch.stack(torch._foreach_norm([a[k] - start[k] for k in keys])).norm()
            assert moved > 0
            found[kind] = float(apart / moved)
    for kind in (".exp_avg", ".exp_avg_sq"):
        keys = [k for k in a if k.endswith(kind)]
        apart = torch.stack(torch._foreach_norm([a[k] - b[k] for k in keys])).norm()
        found[kind] = float(apart / torch.stack(torch._foreach_norm([a[k] for k in keys])).norm())
    return found


def first_state(folder: Path, run: str) -> dict[str, Tensor]:
    return weight_file.read(list_checkpoints(folder / run)[-1]).tensors


@pytest.mark.parametrize("recipe", ["mse", "adversarial"])
def test_several_processes_give_the_iteration_of_one(folder, recipe):
    extra = (*BATCH, *STEADY, "checkpoint.every=1", "stop_iteration=102")
    extra += (*runs.NO_ADVERSARIAL, "ema.decay=[0.99,0.5]") if recipe == "mse" else SYNCED
    ends = {}
    for world in (1, 2, 4):
        name = f"{recipe}-{world}"
        ranks.finish(ranks.start(folder, name, *extra, world=world))
        ends[world] = runs.final_state(folder, name).tensors
    start = first_state(folder, f"{recipe}-1")
    for world in (2, 4):
        apart = distance(ends[1], ends[world], start)
        print(recipe, world, apart)
        assert max(apart.values()) < 1e-4, apart
    if recipe == "adversarial":  # the default, BatchNorm per process as in the original, is not it
        ranks.finish(ranks.start(folder, "per-gpu", *extra[:-1], world=2))
        apart = distance(ends[1], runs.final_state(folder, "per-gpu").tensors, start)
        print(apart)
        assert apart["discriminator."] > 1e-3, apart


def test_ranks_stay_equal_and_other_numbers_of_processes_go_on(folder):
    extra = (*BATCH, *STEADY, *SYNCED, "checkpoint.every=5", "stop_iteration=150")
    watch = {"prepare": note_iterations}
    ranks.finish(
        ranks.start(folder, "pair", *extra, world=2, **watch, given=(str(folder / "pair"),))
    )
    states = [{i: row["state"] for i, row in notes(folder / "pair", r).items()} for r in (0, 1)]
    assert len(states[0]) == 50
    assert states[0] == states[1]  # bit for bit, after every iteration

    end = runs.final_state(folder, "pair")
    for world in (1, 3, 4):
        name = f"go-on-{world}"
        shutil.copytree(folder / "pair", folder / name)
        for path in list_checkpoints(folder / name):
            if path.name > "iteration-000000145.safetensors":
                path.unlink()
        given = (str(folder / name),)
        outputs = ranks.finish(ranks.start(folder, name, *extra, world=world, **watch, given=given))
        assert "resuming iteration-000000145" in outputs[0]
        for iteration in range(146, 151):
            dealt = [
                [
                    s
                    for rank in range(count)
                    for s in notes(folder / run, rank)[iteration]["samples"]
                ]
                for run, count in (("pair", 2), (name, world))
            ]
            assert dealt[0] == dealt[1]
            assert len(dealt[0]) == 12
        start = weight_file.read(
            folder / "pair/checkpoints/iteration-000000145.safetensors"
        ).tensors
        apart = distance(end.tensors, runs.final_state(folder, name).tensors, start)
        print(world, apart)
        assert max(apart.values()) < 1e-3, apart


# --- updates that are not finite --------------------------------------------------------------


def break_rank_1(path: str, broken: dict[int, str]) -> None:
    """Breaks iterations on rank 1 only, and writes hashes of all state before and after each."""
    rank = int(os.environ["RANK"])

    def parts(finetuner):
        adams = finetuner.adams
        moments = [
            {f"{i}.{k}": v for i, s in enumerate(adam.state.values()) for k, v in s.items()}
            for adam in adams
        ]
        decoder = finetuner.autoencoder.state_dict()
        adversary = finetuner.discriminator.state_dict()
        return [tensors_sha256(s) for s in (decoder, moments[0], adversary, moments[1])]

    @contextmanager
    def watch(finetuner, batch):
        how = broken.get(finetuner.iteration) if rank == 1 else None
        before = parts(finetuner)
        with breaking(finetuner, batch, how):
            yield
        line = {"iteration": finetuner.iteration, "before": before, "after": parts(finetuner)}
        line |= {"samples": batch.keys}
        with Path(f"{path}-{rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    around_iterations(watch)


@contextmanager
def breaking(finetuner: Finetuner, batch: Any, how: str | None) -> Iterator[None]:
    """One iteration in which something is not finite."""
    handle = None
    if how == "noise":
        batch.noise[0, 2] = torch.nan
    elif how == "loss":  # infinite, with a finite gradient
        handle = finetuner.perceptual.register_forward_hook(lambda *a: a[-1] + torch.inf)
    elif how == "discriminator":  # the same, in its own loss alone: real images come second
        calls: list[int] = []

        def hook(module, arguments, logits):
            calls.append(1)
            return logits - torch.inf if len(calls) == 2 else logits

        handle = finetuner.discriminator.register_forward_hook(hook)
    yield
    if handle is not None:
        handle.remove()


def test_all_ranks_leave_out_what_is_not_finite_on_one(folder):
    broken = {102: "noise", 104: "loss", 106: "discriminator"}
    extra = (*BATCH, "stop_iteration=108", "log.every=1")
    given = (str(folder / "guards"), broken)
    first, second = ranks.finish(
        ranks.start(folder, "guards", *extra, world=2, prepare=break_rank_1, given=given)
    )
    assert "left out" not in second  # said once
    seen = [notes(folder / "guards", rank) for rank in (0, 1)]
    for iteration in range(101, 109):
        how = broken.get(iteration - 1)
        moved = {None: [True] * 4, "discriminator": [True, True, False, False]}.get(
            how, [False] * 4
        )
        for rank in (0, 1):
            row = seen[rank][iteration]
            pairs = zip(row["before"], row["after"], strict=True)
            assert [a != b for a, b in pairs] == moved, (iteration, rank)
    keys = seen[1]
    assert f"caused by rank 1: {keys[103]['samples'][2]}\n" in first  # the one image
    assert f"caused by rank 1: {', '.join(keys[105]['samples'][:4])} and 2 more\n" in first
    assert f"caused by rank 1: {', '.join(keys[107]['samples'][:4])} and 2 more\n" in first
    assert "loss or gradient of the discriminator is not finite" in first
    with (folder / "guards" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["bad_updates"]) for row in rows] == [0, 0, 1, 1, 2, 2, 3, 3]
    losses = [float(row["reconstruction_loss"]) for row in rows]  # of what is finite, no zeros
    assert min(losses) > 0.75 * max(losses)


def test_too_many_in_a_row_stop_all_ranks_and_keep_a_good_checkpoint(folder):
    broken = {101: "noise", 103: "noise", 104: "loss", 105: "noise"}
    extra = (*BATCH, "max_bad_updates=3", "stop_iteration=108", "checkpoint.every=1")
    given = (str(folder / "stopped"), broken)
    started = ranks.start(folder, "stopped", *extra, world=2, prepare=break_rank_1, given=given)
    assert [run.end() for run in started] == [4, 4], started[0].output
    assert "3 updates in a row were not finite" in started[0].output
    last = runs.final_state(folder, "stopped")
    assert last.iteration == 105
    assert all(t.isfinite().all() for t in last.tensors.values())
    good = weight_file.read(folder / "stopped/checkpoints/iteration-000000103.safetensors")
    kept = [key for key in good.tensors if not key.startswith("ema.")]
    assert all(torch.equal(last.tensors[key], good.tensors[key]) for key in kept)


def test_a_learned_logvar_is_reduced_beside_ddp(folder):
    extra = (*BATCH, *runs.NO_ADVERSARIAL, "loss.learn_logvar=true", "stop_iteration=103")
    ranks.finish(ranks.start(folder, "logvar", *extra, world=2))
    assert runs.final_state(folder, "logvar").tensors["logvar"] != 0


# --- signals --------------------------------------------------------------------------------


def signal_rank_1_at_start() -> None:
    """SIGTERM to rank 1 alone, while Lightning sets up the data; no handler of its may wait."""
    original = Iterations.train_dataloader

    def train_dataloader(self):
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    Iterations.train_dataloader = train_dataloader


def test_a_signal_to_one_rank_at_its_start_stops_all_saved(folder):
    extra = (*BATCH, "stop_iteration=9000", "compute.devices=1")  # the launcher knows better
    started = ranks.start(folder, "early", *extra, world=2, prepare=signal_rank_1_at_start)
    assert [run.end(60) for run in started] == [143, 143], started[0].output
    assert started[0].output.count("2 processes here, as the launcher started them") == 1
    assert "batch: 2 processes" in started[0].output
    assert runs.final_state(folder, "early").iteration == 102


# --- standing still ---------------------------------------------------------------------------


def stop_rank_1() -> None:
    """Rank 1 stands still from the start of the fourth iteration."""

    @contextmanager
    def watch(finetuner, batch):
        if finetuner.iteration == 103 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGSTOP)
        yield

    around_iterations(watch)


def stop_rank_1_and_hurry(answer: float) -> None:
    """The same, and a signal must be answered soon."""
    stop_rank_1()
    saving.ANSWER = answer


def test_a_rank_that_waits_for_a_dead_one_ends_after_a_signal(folder):
    """In a collective, where no handler of Python's runs; torchrun would wait 120 s."""
    extra = (*BATCH, "stop_iteration=9000", "log.every=1", "checkpoint.every=3")
    given = {"prepare": stop_rank_1_and_hurry, "given": (2.0,)}
    started = ranks.start(folder, "waiting", *extra, world=2, **given)
    try:
        started[0].wait_for("iteration 103 of")
        time.sleep(1)  # it is in the reduction of the next
        started[0].send(signal.SIGTERM)
        assert started[0].end(30) == 143, started[0].output
    finally:
        started[1].send(signal.SIGKILL)
        started[1].end()
    output = started[0].output
    assert re.search(r"signal 15, and no iteration ended for \d+ s: ended unsaved", output), output
    assert "all_reduce" in output  # where it stands
    assert runs.final_state(folder, "waiting").iteration == 102


def test_torch_waits_longer_than_the_watchdog():
    """In each iteration, and in the first, for which the watchdog waits longer."""
    for minutes in (0.1, 10, 10**6):
        assert longest_wait(minutes).total_seconds() > 60 * FIRST * minutes
    settings = config.load(config.find_recipe("demo"), [*runs.TINY, "data.sources=x"])
    assert DecoderDDP(settings)._timeout == longest_wait(10)


def test_a_stopped_rank_is_named(folder):
    extra = (*BATCH, "stop_iteration=9000", "compute.timeout_minutes=0.1", "log.every=1")
    started = ranks.start(folder, "stopped-rank", *extra, world=2, prepare=stop_rank_1)
    try:
        assert started[0].end(60) == 4
    finally:
        started[1].send(signal.SIGKILL)
        started[1].end()
    output = started[0].output
    assert "no iteration ended for 6 s; rank 0 is in iteration 104," in output
    assert "rank 1 did not answer" in output
    assert "all_reduce" in output  # where rank 0 stands
