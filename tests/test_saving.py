"""Saves while training goes on: copies, order, faults in the thread, and kills."""

import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import ranks
import runs
import torch

from kl_f8_train.core.hashes import frozen_sha256
from kl_f8_train.core.step import Finetuner
from kl_f8_train.errors import MissingInputError, RunFailedError
from kl_f8_train.run.callback import Course
from kl_f8_train.run.saving import Checkpoints, Signals
from kl_f8_train.run.train import train
from kl_f8_train.run_dir import best_checkpoint, list_checkpoints
from kl_f8_train.weights import checkpoint, weight_file
from kl_f8_train.weights.checkpoint import HostMemory

TENSORS = {
    "plain": torch.arange(12.0).view(3, 4),
    "channels_last": torch.randn(2, 3, 5, 5).to(memory_format=torch.channels_last),
    "transposed": torch.arange(6, dtype=torch.int64).view(2, 3).T,
    "scalar": torch.tensor(2.5),
    "half": torch.randn(7).half(),
    "bool": torch.tensor([True, False, True]),
    "empty": torch.empty(0, 4),
    "parameter": torch.nn.Parameter(torch.randn(5)),
}


# --- copies ---------------------------------------------------------------------------------


def test_copies_equal_and_share_nothing():
    copied = HostMemory().copy(TENSORS).read()
    assert copied.keys() == TENSORS.keys()
    ours = {tensor.untyped_storage().data_ptr() for tensor in TENSORS.values()}
    for name, tensor in TENSORS.items():
        assert torch.equal(copied[name], tensor), name
        assert copied[name].dtype == tensor.dtype
        assert copied[name].is_contiguous(), name
        assert not copied[name].requires_grad
        assert copied[name].untyped_storage().data_ptr() not in ours
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in copied.values() if t.nbytes)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))


def test_memory_is_taken_again():
    memory = HostMemory()
    memory.reserve(10_000, pinned=False)
    place = memory.block.data_ptr()
    memory.copy(TENSORS)
    changed = {**TENSORS, "plain": torch.ones(3, 4)}
    assert torch.equal(memory.copy(changed).read()["plain"], changed["plain"])
    assert memory.block.data_ptr() == place
    memory.copy({"more": torch.ones(10_000)})
    assert memory.block.numel() >= 40_000


def test_what_is_reserved_is_enough(finetuner, batch):
    """Before the first iteration, when Adam has no state yet."""
    tuner = finetuner("ft_ema", "adversarial.start_iteration=0")
    size = checkpoint.snapshot_bytes(tuner, tuner.adams)
    tuner.run_iteration(batch(side=32))
    memory = HostMemory()
    checkpoint.snapshot(tuner, tuner.adams, "", memory)
    assert size - 10_000 < memory.block.numel() <= size


def test_training_on_does_not_change_what_is_written(finetuner, batch, tmp_path):
    tuner = finetuner("ft_ema", "adversarial.start_iteration=0")
    tuner.run_iteration(batch(side=32))
    frozen = frozen_sha256(tuner.autoencoder.state_dict())
    whole = weight_file.read(runs.save(tuner, tuner.adams, tmp_path / "a", frozen))
    state = checkpoint.snapshot(tuner, tuner.adams, frozen, HostMemory())
    tuner.run_iteration(batch(1, side=32))
    tuner.run_state.changes.append("later")
    written = weight_file.read(checkpoint.write(state, tmp_path / "b.safetensors"))
    runs.assert_same_state(written, whole)
    assert written.metadata == whole.metadata


@pytest.mark.gpu
def test_copies_from_a_gpu_do_not_wait_and_come_before_what_is_queued_next():
    tensors = {f"{i}": torch.full((1 << 22,), float(i), device="cuda") for i in range(40)}
    memory = HostMemory()
    memory.reserve(sum(t.nbytes for t in tensors.values()), pinned=True)
    place = memory.block.data_ptr()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        copies = memory.copy(tensors)
        for tensor in tensors.values():
            tensor.fill_(-1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert memory.block.data_ptr() == place
    for name, copied in copies.read().items():
        assert copied.is_pinned()
        assert bool((copied == float(name)).all())


# --- the thread -----------------------------------------------------------------------------


class Alone:
    """One process's saving without a trainer: `turn` is an iteration's end."""

    def __init__(self, tuner: Finetuner, folder: Path) -> None:
        self.tuner = tuner
        settings = replace(tuner.config.checkpoint, every=1, keep_last=2, keep_every=0)
        frozen = frozen_sha256(tuner.autoencoder.state_dict())
        self.course = Course()
        self.signals = Signals(self.course)
        self.saving = Checkpoints(folder, settings, frozen, self.course)
        strategy = SimpleNamespace(broadcast=lambda value: value)
        self.trainer = SimpleNamespace(
            is_global_zero=True,
            world_size=1,
            optimizers=tuner.adams,
            strategy=strategy,
            should_stop=False,
        )
        self.saving.on_train_start(self.trainer, tuner)

    def turn(self) -> None:
        self.tuner.run_state.iteration += 1
        self.signals.on_train_batch_end(self.trainer, self.tuner)
        self.saving.on_train_batch_end(self.trainer, self.tuner)

    def end(self) -> None:
        self.signals.on_train_end(self.trainer, self.tuner)
        self.saving.on_train_end(self.trainer, self.tuner)


@pytest.fixture
def alone(finetuner, tmp_path):
    return Alone(finetuner("ft_mse"), tmp_path)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.fixture
def gate(monkeypatch):
    """Writing waits until it is set."""
    event, write = threading.Event(), checkpoint.write

    def held(*arguments):
        event.wait(60)
        return write(*arguments)

    monkeypatch.setattr(checkpoint, "write", held)
    yield event
    event.set()


def test_training_goes_on_while_a_checkpoint_is_written(alone, tmp_path, gate):
    alone.turn()
    assert not (tmp_path / "checkpoints").exists()
    gate.set()
    alone.end()
    assert names(tmp_path) == ["iteration-000000001.safetensors"]


def test_the_next_save_waits_for_the_one_before(alone, gate):
    alone.turn()
    threading.Timer(0.3, gate.set).start()
    began = time.monotonic()
    alone.turn()
    assert time.monotonic() - began > 0.2
    assert alone.saving.saved == (1, 0)
    alone.end()
    assert alone.saving.saved == (2, 0)


def test_a_disk_that_holds_training_up_is_reported_once(alone, gate, capsys):
    for _ in range(3):
        alone.turn()
        gate.clear()
        threading.Timer(1.1, gate.set).start()
    alone.end()
    assert capsys.readouterr().out.count("s of training, ") == 1


def test_the_best_and_a_regular_checkpoint_share_a_copy(alone, tmp_path, gate):
    alone.turn()
    gate.set()
    alone.saving._look(wait=True)
    gate.clear()
    alone.tuner.run_state.iteration += 1
    alone.saving.save_best(alone.trainer, alone.tuner)  # validation comes first
    alone.saving.on_train_batch_end(alone.trainer, alone.tuner)  # and nothing waits
    assert len(alone.saving.writing) == 2
    gate.set()
    alone.end()
    best = best_checkpoint(tmp_path)
    assert best.name == "best-000000002.safetensors"
    runs.assert_same_state(weight_file.read(best), weight_file.read(list_checkpoints(tmp_path)[0]))
    assert [path.stem[-1] for path in list_checkpoints(tmp_path)] == ["2", "1"]


def failing(monkeypatch, error: Exception, times: int) -> None:
    """The first `times` writes fail."""
    write, left = checkpoint.write, [error] * times

    def broken(*arguments):
        if left:
            raise left.pop()
        return write(*arguments)

    monkeypatch.setattr(checkpoint, "write", broken)


def settle(alone: Alone) -> None:
    """Lets the thread finish, and nothing more."""
    for future in alone.saving.writing:
        future.exception()


def test_one_failure_is_reported_and_tried_again(alone, tmp_path, monkeypatch, capsys):
    failing(monkeypatch, RunFailedError("cannot write it: no room"), 1)
    alone.turn()
    settle(alone)
    assert "no room\n  training goes on; the next checkpoint tries again" in capsys.readouterr().out
    for _ in range(3):
        alone.turn()
    alone.end()
    assert [path.stem[-1] for path in list_checkpoints(tmp_path)] == ["4", "3"]


def test_two_failures_in_a_row_end_the_run(alone, tmp_path, monkeypatch):
    failing(monkeypatch, OSError("no room"), 2)
    alone.turn()
    alone.turn()
    settle(alone)
    alone.turn()  # known
    with pytest.raises(RunFailedError, match="no room"):
        alone.turn()  # agreed on
    assert alone.trainer.should_stop
    assert not (tmp_path / "checkpoints").exists()  # no third attempt
    alone.saving.on_exception(alone.trainer, alone.tuner, RunFailedError("no room"))


@pytest.mark.parametrize("times", [1, 2])
def test_a_failure_at_the_end_is_final(alone, monkeypatch, times):
    alone.turn()
    alone.saving._look(wait=True)
    failing(monkeypatch, OSError("no room"), times)
    alone.turn()
    if times == 1:  # the last save failed, and is tried again
        alone.end()
        assert alone.saving.saved == (2, 0)
    else:
        with pytest.raises(RunFailedError, match="no room"):
            alone.end()


def test_what_nobody_foresaw_ends_the_run_at_the_next_iteration(alone, monkeypatch):
    failing(monkeypatch, KeyError("a fault"), 1)
    alone.turn()
    settle(alone)
    with pytest.raises(KeyError, match="a fault"):
        alone.turn()


def test_another_error_hides_no_fault_of_the_thread(alone, monkeypatch, capsys):
    failing(monkeypatch, KeyError("a fault"), 1)
    alone.turn()
    alone.saving.on_exception(alone.trainer, alone.tuner, RunFailedError("too many bad images"))
    assert "could not be saved: 'a fault'" in capsys.readouterr().out


def test_an_error_elsewhere_waits_for_what_is_being_written(alone, tmp_path, gate):
    alone.turn()
    threading.Timer(0.2, gate.set).start()
    alone.saving.on_exception(alone.trainer, alone.tuner, RunFailedError("too many bad images"))
    assert names(tmp_path) == ["iteration-000000001.safetensors"]


def test_what_was_trained_is_saved_when_the_data_end_a_run(alone, tmp_path, capsys):
    alone.saving.config = replace(alone.saving.config, every=1000)
    alone.turn()
    alone.turn()
    alone.saving.on_exception(alone.trainer, alone.tuner, MissingInputError("a shard is gone"))
    assert names(tmp_path) == ["iteration-000000002.safetensors"]
    assert "saved iteration 2, the last before the error" in capsys.readouterr().out


def test_an_iteration_that_failed_in_its_middle_is_not_saved(alone, tmp_path):
    alone.saving.config = replace(alone.saving.config, every=1000)
    alone.turn()
    alone.saving.on_train_batch_start(alone.trainer, alone.tuner, None, 1)
    alone.saving.on_exception(alone.trainer, alone.tuner, RuntimeError("out of memory"))
    assert not (tmp_path / "checkpoints").exists()


def test_a_frozen_part_that_moved_is_not_written(alone, tmp_path):
    alone.tuner.autoencoder.encoder.conv_in.weight.data[0, 0, 0, 0] += 1
    alone.turn()
    with pytest.raises(RunFailedError, match="the frozen encoder changed during training"):
        alone.end()
    assert not (tmp_path / "checkpoints").exists()


def test_waiting_for_a_slow_disk_is_no_hanging(alone, gate):
    alone.turn()
    seen: list[bool] = []
    threading.Timer(0.2, lambda: (seen.append(alone.course.at_disk), gate.set())).start()
    alone.turn()
    assert seen == [True]
    assert not alone.course.at_disk
    alone.end()


def test_nothing_is_left_running(alone):
    alone.turn()
    alone.end()
    assert not [t for t in threading.enumerate() if t.name.startswith("checkpoint")]
    assert all(isinstance(future, Future) and future.done() for future in alone.saving.writing)


# --- whole runs -----------------------------------------------------------------------------


def broken_disk(after: int) -> None:
    """Every write fails once `after` checkpoints are written; only the first rank writes."""
    write, left = checkpoint.write, list(range(after))

    def broken(*arguments):
        if not left:
            raise RunFailedError("cannot write it: no room")
        left.pop()
        return write(*arguments)

    checkpoint.write = broken


@pytest.mark.slow
def test_all_ranks_end_alike_when_the_first_cannot_save(folder):
    extra = ("stop_iteration=9000", "checkpoint.every=3", "global_batch=4")
    given = {"prepare": broken_disk, "given": (1,)}
    started = ranks.start(folder, "two", *extra, world=2, **given)
    assert [run.end(120) for run in started] == [4, 4], started[0].output
    first, second = (run.output for run in started)
    assert "no room\n  training goes on; the next checkpoint tries again" in first
    assert "kl-f8-train: cannot write it: no room" in first
    assert "kl-f8-train: cannot write it: no room" in second
    assert "lost contact" not in first + second
    assert runs.final_state(folder, "two").iteration == 102


def killed_while(step: str, iteration: int) -> None:
    """SIGKILL in the thread: before, inside and after the write of a checkpoint."""
    write, replace_file, unlink = checkpoint.write, Path.replace, Path.unlink
    name = f"iteration-{iteration:09d}"

    def die(when: str, path: object) -> None:
        if step == when and name in str(path):
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(snapshot, path):
        die("checking", path)
        written = write(snapshot, path)
        die("written", path)
        return written

    def replacing(self, target):
        die("renaming", target)
        return replace_file(self, target)

    def unlinking(self, missing_ok=False):
        die("rotating", name if self.name == f"iteration-{iteration - 2:09d}.safetensors" else "")
        unlink(self, missing_ok=missing_ok)

    checkpoint.write, Path.replace, Path.unlink = watched, replacing, unlinking


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> weight_file.Contents:
    assert train(runs.recipe(folder, "undisturbed", "stop_iteration=108")) == 0
    return runs.final_state(folder, "undisturbed")


def kill_a_loader() -> None:
    """In the middle of iteration 103."""
    run_iteration = Finetuner.run_iteration

    def run(tuner: Finetuner, *arguments):
        if tuner.iteration == 102:
            child = multiprocessing.active_children()[0]
            os.kill(child.pid, signal.SIGKILL)
            time.sleep(0.5)
        return run_iteration(tuner, *arguments)

    Finetuner.run_iteration = run


def test_a_killed_loader_loses_no_iteration(folder, undisturbed):
    extra = ("stop_iteration=108", "data.workers=1")
    (run,) = ranks.start(folder, "no-loader", *extra, prepare=kill_a_loader)
    assert run.end() == RunFailedError.exit_code
    assert "saved iteration 103, the last before the error" in run.output
    assert "killed by signal: Killed" in run.output
    assert "lower data.workers" in run.output
    (run,) = ranks.start(folder, "no-loader", *extra)
    ranks.finish([run])
    assert "resuming iteration-000000103" in run.output
    runs.assert_same_state(runs.final_state(folder, "no-loader"), undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("step", ["checking", "renaming", "written", "rotating"])
def test_kill_9_in_the_thread_that_writes_loses_nothing_before(folder, undisturbed, step):
    extra = ("stop_iteration=108", "checkpoint.every=2", "checkpoint.keep_last=1")
    (run,) = ranks.start(folder, step, *extra, prepare=killed_while, given=(step, 104))
    assert run.end(60) == -signal.SIGKILL
    whole = {"checking": 102, "renaming": 102, "written": 104, "rotating": 104}[step]
    assert runs.final_state(folder, step).iteration == whole
    (run,) = ranks.start(folder, step, *extra)
    (output,) = ranks.finish([run])
    assert f"resuming iteration-{whole:09d}" in output
    runs.assert_same_state(runs.final_state(folder, step), undisturbed)
    assert names(folder / step) == ["iteration-000000108.safetensors"]
