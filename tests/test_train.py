"""Whole runs as real processes: resume, kill, signals, several ranks, broken input."""

import csv
import ctypes
import errno
import functools
import os
import pty
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import ranks
import runs
import samples
import torch
from PIL import Image

from kl_f8_train.__main__ import main
from kl_f8_train.core.step import Finetuner
from kl_f8_train.data.loading import open_data
from kl_f8_train.errors import LostContactError, MissingInputError, RunFailedError, UsageError
from kl_f8_train.run import outcome, saving, status
from kl_f8_train.run.train import _source_of_pictures, train
from kl_f8_train.run.validation import Validation
from kl_f8_train.run_dir import MetricsFile, failure_kept, list_checkpoints, read_failure
from kl_f8_train.weights import checkpoint, weight_file


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> weight_file.Contents:
    """Eight iterations without a break."""
    assert train(runs.recipe(folder, "undisturbed", "stop_iteration=108")) == 0
    return runs.final_state(folder, "undisturbed")


def wait_for(process: "subprocess.Popen[str]", text: str) -> str:
    """Reads output up to a line with `text`."""
    seen = ""
    assert process.stdout is not None
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"{text!r} never came:\n{seen}")


def test_iterations_count_on_from_the_imported_number(undisturbed):
    assert undisturbed.iteration == 108
    assert undisturbed.metadata["ema_updates"] == "8"


def test_every_trained_tensor_moved_and_no_frozen_one(folder, undisturbed):
    before = weight_file.read(folder / "model.ckpt").tensors
    for key, value in before.items():
        if key.startswith("loss."):
            continue
        same = torch.equal(value, undisturbed.tensors[f"autoencoder.{key}"])
        assert same == key.startswith(("encoder.", "quant_conv.")), key


def test_stopping_and_resuming_equals_not_stopping(folder, undisturbed):
    train(runs.recipe(folder, "twice", "stop_iteration=103"))
    assert train(runs.recipe(folder, "twice", "stop_iteration=108")) == 0
    runs.assert_same_state(runs.final_state(folder, "twice"), undisturbed)


def test_a_signal_in_the_last_iteration_changes_nothing(folder, monkeypatch, capsys):
    original = checkpoint.write

    def write(snapshot, path):
        if snapshot.counters == (102, 0):
            os.kill(os.getpid(), signal.SIGTERM)
        return original(snapshot, path)

    monkeypatch.setattr(checkpoint, "write", write)
    assert train(runs.recipe(folder, "last", "stop_iteration=102")) == 0
    said = capsys.readouterr().out
    assert "done: iteration 102; next: kl-f8-train export" in said
    assert "stopped by signal" not in said


def test_another_recipe_is_refused_or_remembered(folder, capsys):
    train(runs.recipe(folder, "changed", *runs.NO_ADVERSARIAL, "stop_iteration=101"))
    extra = (*runs.NO_ADVERSARIAL, "optimizer.learning_rate=1e-5")
    settings = runs.recipe(folder, "changed", *extra, "stop_iteration=102")
    change = "optimizer.learning_rate: 0.0002 -> 1e-05"
    with pytest.raises(UsageError, match=change):
        train(settings)
    train(settings, allow_changes=True)
    assert f"from iteration 101: {change}\n" in capsys.readouterr().out
    train(runs.recipe(folder, "changed", *extra, "stop_iteration=103", "data.flip=true"), True)
    assert checkpoint.stored_changes(runs.final_state(folder, "changed").metadata) == [
        f"from iteration 101: {change}",
        "from iteration 102: data.flip: false -> true",
    ]


def test_other_networks_than_the_checkpoints_are_refused(folder, undisturbed):
    shutil.copytree(folder / "undisturbed", folder / "other")
    for extra, said in (
        (("model.ch_mult=[1,2]",), "conv1.weight is (32, 32, 3, 3), expected (64, 32, 3, 3)"),
        (runs.NO_ADVERSARIAL, "unexpected discriminator."),
    ):
        settings = runs.recipe(folder, "other", *extra, "stop_iteration=110")
        with pytest.raises(MissingInputError) as caught:
            train(settings, allow_changes=True)
        assert said in str(caught.value)
        assert "start a new run_dir, with init.weights=" in str(caught.value)


def test_a_damaged_line_of_the_metrics_does_not_stop_a_run(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_bytes(b"iteration,rec\n101,0.5\n102,\xff\xfe\n\x00\xff\n103,0.25\n")
    table = MetricsFile(path, start=102)
    table.write(103, {"rec": 0.125})
    assert [line.split(",")[0] for line in path.read_text().splitlines()[1:]] == [
        "101",
        "102",
        "103",
    ]


def test_lines_that_a_full_disk_cut_or_joined_do_not_stop_a_run(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("iteration,rec\n101,0.5\n102,0.102,0.25\n103,0.125\n10")
    table = MetricsFile(path, start=103)
    table.write(104, {"rec": 0.0625})
    rows = path.read_text().splitlines()
    assert rows == ["iteration,rec", "101,0.5", "102,0.102", "103,0.125", "104,0.0625"]


def test_a_row_that_a_full_disk_cut_is_written_again_whole(tmp_path, monkeypatch):
    table = MetricsFile(tmp_path / "metrics.csv", start=100)
    table.write(101, {"rec": 0.5})

    def cut(writer: object, row: dict[str, str]) -> None:
        with table.path.open("a") as file:
            file.write("102,0.")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(csv.DictWriter, "writerow", cut)
        with pytest.raises(OSError, match="No space"):
            table.write(102, {"rec": 0.25})
    table.write(103, {"rec": 0.125})
    rows = table.path.read_text().splitlines()
    assert rows == ["iteration,rec", "101,0.5", "102,0.25", "103,0.125"]


@pytest.mark.slow
def test_a_terminal_that_closes_ends_no_run_unsaved(folder, undisturbed):
    for ignored in (False, True):  # a dropped connection; one that `disown` was for
        name = f"closed-{ignored}"
        ours, theirs = pty.openpty()
        arguments = runs.overrides(folder, name, "stop_iteration=108")
        prefix = ["env", "--ignore-signal=HUP"] * ignored
        process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "kl_f8_train", "train", "demo", *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        shown = b""
        while b"iteration 102 of" not in shown:
            shown += os.read(ours, 4096)
        os.close(ours)
        if not ignored:
            os.killpg(process.pid, signal.SIGHUP)
        assert process.wait(60) == (0 if ignored else 128 + signal.SIGHUP)
        assert list_checkpoints(folder / name)
        assert train(runs.recipe(folder, name, "stop_iteration=108")) == 0
        runs.assert_same_state(runs.final_state(folder, name), undisturbed)


@pytest.mark.slow
def test_without_a_terminal_or_a_reader_a_run_goes_on(folder, undisturbed):
    process = runs.start(folder, "alone", "stop_iteration=108", launcher=("nohup", sys.executable))
    wait_for(process, "iteration 102 of")
    assert process.stdout is not None
    process.stdout.close()
    os.killpg(process.pid, signal.SIGHUP)  # the shell is gone, too
    assert process.wait(60) == 0
    runs.assert_same_state(runs.final_state(folder, "alone"), undisturbed)


@pytest.mark.slow
def test_kill_9_and_the_same_command_again_equal_an_undisturbed_run(folder, undisturbed):
    extra = ("stop_iteration=108", "checkpoint.every=2", "data.workers=1")
    process = runs.start(folder, "killed", *extra)
    wait_for(process, "iteration 105 of")
    time.sleep(0.03)  # somewhere inside iteration 106
    process.kill()
    process.wait()
    reached = runs.final_state(folder, "killed").iteration
    assert reached is not None
    assert 104 <= reached < 108
    process = runs.start(folder, "killed", *extra)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert f"resuming iteration-{reached:09d}" in output
    runs.assert_same_state(runs.final_state(folder, "killed"), undisturbed)
    rows = (folder / "killed" / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == [str(i) for i in range(101, 109)]


@pytest.mark.slow
def test_status_says_that_a_run_failed_by_what_and_whether_again(folder, monkeypatch, capsys):
    def broken(self, *_):
        raise RunFailedError("the data are gone\n  mend them")

    first = runs.recipe(folder, "failing", "stop_iteration=101")
    longer = runs.recipe(folder, "failing", "stop_iteration=103")
    run = folder / "failing"
    assert train(first) == 0
    with monkeypatch.context() as context:
        context.setattr(Finetuner, "training_step", broken)
        with pytest.raises(RunFailedError):
            train(longer)
    found = status.read_status(run, time.time())
    assert found.state.startswith("failed ")
    assert found.state.endswith("; the same command fails again until that is fixed")
    assert found.failure == "the data are gone\n  mend them"
    main(["status", str(run), "--html", str(folder / "failed.html")])
    assert "  error: the data are gone\n      mend them\n" in capsys.readouterr().out
    assert "the data are gone" in (folder / "failed.html").read_text()
    capsys.readouterr()
    assert main(["train", str(run)]) == 0  # its config.yaml is the same command
    assert "done: iteration 103" in capsys.readouterr().out
    assert status.read_status(run, time.time()).failure is None


def test_a_start_that_fails_is_reported_where_no_run_is_yet(folder):
    with pytest.raises(MissingInputError):
        train(runs.recipe(folder, "not-started", "init.weights=absent.ckpt"))
    with pytest.raises(MissingInputError, match=r"did not start: .*absent\.ckpt"):
        status.read_status(folder / "not-started", time.time())


@pytest.mark.parametrize("error", [LostContactError("rank 1 is gone"), KeyError("x")])
def test_only_what_passes_by_itself_goes_on(tmp_path, error):
    with pytest.raises(type(error)), failure_kept(tmp_path):
        raise error
    with pytest.raises(RunFailedError), failure_kept(tmp_path):
        raise RunFailedError("what another process met because of it")
    message, passing = read_failure(tmp_path)
    assert passing is isinstance(error, LostContactError)
    assert message == ("rank 1 is gone" if passing else "unexpected KeyError: 'x'")


def test_one_run_directory_is_for_one_run_at_a_time(folder):
    process = runs.start(folder, "claimed", "stop_iteration=9000")
    wait_for(process, "iteration 101 of")
    with pytest.raises(RunFailedError, match=f"process {process.pid} on .* is training in"):
        train(runs.recipe(folder, "claimed", "stop_iteration=9000"))
    process.kill()  # the claim ends with it
    process.communicate()
    assert train(runs.recipe(folder, "claimed", "stop_iteration=103")) == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_finishes_the_iteration_saves_and_tells_its_number(folder, undisturbed, number):
    name = f"signal-{number}"
    process = runs.start(folder, name, "stop_iteration=108", "data.workers=1")
    wait_for(process, "iteration 101 of")
    os.killpg(process.pid, number)  # as torchrun, SLURM and Ctrl-C do: loaders get it, too
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number, output
    assert output.count("Ctrl-C: finishes this iteration") == (number == signal.SIGINT)
    assert f"the same command resumes it, or: kl-f8-train train {folder / name}" in output
    stopped = runs.final_state(folder, name).iteration
    assert stopped is not None
    assert 101 <= stopped < 108, output
    assert train(runs.recipe(folder, name, "stop_iteration=108")) == 0
    runs.assert_same_state(runs.final_state(folder, name), undisturbed)


def test_a_broken_newest_checkpoint_gives_way_to_the_one_before(folder, undisturbed, capsys):
    extra = ("stop_iteration=108", "checkpoint.every=2", "checkpoint.keep_last=5")
    train(runs.recipe(folder, "broken", *extra))
    newest, second = list_checkpoints(folder / "broken")[:2]
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    assert train(runs.recipe(folder, "broken", *extra)) == 0
    output = capsys.readouterr().out
    assert "broken or cut short" in output
    assert f"resuming {second.name}" in output
    runs.assert_same_state(runs.final_state(folder, "broken"), undisturbed)


def test_a_run_directory_that_was_moved_is_resumed_where_it_lies(folder, undisturbed, monkeypatch):
    monkeypatch.chdir(folder)  # and a relative path means another place elsewhere
    train(runs.recipe(folder, "before", "run_dir=before", "stop_iteration=104"))
    (folder / "before").rename(folder / "after")
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert main(["train", str(folder / "after"), "stop_iteration=108"]) == 0
    assert not list(elsewhere.iterdir())
    runs.assert_same_state(runs.final_state(folder, "after"), undisturbed)


def test_a_resuming_run_says_that_it_does_not_begin_from_other_weights(folder, capsys):
    train(runs.recipe(folder, "from", "stop_iteration=101"))
    capsys.readouterr()
    train(runs.recipe(folder, "from", "stop_iteration=102", "init.weights=kl_f8_mini"))
    said = capsys.readouterr().out
    assert "note: only the start of a run reads init.weights" in said
    assert f": {folder / 'model.ckpt'} -> kl_f8_mini" in said
    train(runs.recipe(folder, "from", "stop_iteration=102", "init.weights=kl_f8_mini"))
    assert "note: only the start" not in capsys.readouterr().out


def test_a_run_does_not_start_from_a_damaged_checkpoint_of_another(folder):
    train(runs.recipe(folder, "source", "stop_iteration=101"))
    (path,) = list_checkpoints(folder / "source")
    whole = path.read_bytes()
    place = whole.index(b'"ema.decoder.conv_out.weight"')
    (offset,) = re.findall(rb"\[(\d+),", whole[place : place + 200])[-1:]
    place = 8 + int.from_bytes(whole[:8], "little") + int(offset)
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    settings = runs.recipe(folder, "next", f"init.weights={folder / 'source'}", "init.iteration=0")
    with pytest.raises(MissingInputError, match="its ema does not match its own SHA-256"):
        train(settings)


def test_only_broken_checkpoints_stop_and_change_nothing(folder):
    train(runs.recipe(folder, "all-broken", "stop_iteration=101"))
    for path in list_checkpoints(folder / "all-broken"):
        path.write_bytes(b"nonsense")
    before = sorted((folder / "all-broken" / "checkpoints").iterdir())
    with pytest.raises(MissingInputError, match=r"1 checkpoint in .*, none of which can be read"):
        train(runs.recipe(folder, "all-broken", "stop_iteration=101"))
    assert sorted((folder / "all-broken" / "checkpoints").iterdir()) == before


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_validation_and_config_are_written(folder):
    train(runs.recipe(folder, "pictures", "stop_iteration=102", "log.pictures_every=2"))
    run = folder / "pictures"
    assert {p.name for p in (run / "pictures").iterdir()} == {
        "iteration-000000100.jpg",
        "iteration-000000102.jpg",
    }
    assert "stop_iteration: 102" in (run / "config.yaml").read_text()
    start, end = read_table(run / "validation.csv")
    assert (start["iteration"], end["iteration"]) == ("100", "102")
    for key in ("psnr", "ssim", "perceptual"):
        assert start[f"{key}_ema"] == start[f"{key}_raw"]  # the EMA starts as a copy
        assert end[f"{key}_ema"] != end[f"{key}_raw"]
    assert float(end["psnr_raw"]) > float(start["psnr_raw"])
    assert {"red_shift_ema", "green_shift_ema", "blue_shift_ema"} < end.keys()
    rows = read_table(run / "metrics.csv")
    assert 0 < float(rows[0]["ema_distance"]) < float(rows[1]["ema_distance"]) < 0.1
    for row in rows:
        as_used = float(row["pixel_nll"]) + float(row["perceptual_nll"])
        assert as_used == pytest.approx(float(row["nll_loss"]), rel=1e-5)
        used = float(row["adaptive_weight"]) * float(row["generator_loss"])
        assert float(row["adversarial_loss"]) == pytest.approx(used, rel=1e-4)


@pytest.mark.parametrize(
    ("source", "pictures", "warned"),
    [
        ("photos", "photos", True),
        ("photos", "photos/../photos/some", True),
        ("photos", "photos/.held_out", False),  # hidden, so not trained on
        ("photos", "photos2", False),
        ("photos/some", "photos", False),
    ],
)
def test_validation_on_a_folder_that_is_trained_on_is_warned_of(
    folder, tmp_path, capsys, source, pictures, warned
):
    for place in ("photos/some", "photos/.held_out", "photos2"):
        shutil.copytree(folder / "tiles", tmp_path / place)
    settings = (f"data.sources={tmp_path / source}", f"log.pictures={tmp_path / pictures}")
    chosen = runs.recipe(folder, "unused", *settings, "log.pictures_every=5")
    found = _source_of_pictures(chosen, open_data(chosen)[1])
    assert found == (f"data.sources={tmp_path / source}" if warned else None)
    if pictures == source:
        train(replace(chosen, run_dir=str(tmp_path / "run"), stop_iteration=101))
        assert f"are trained on ({found}): the validation's" in capsys.readouterr().out
        off = replace(chosen, log=replace(chosen.log, pictures_every=0))
        assert _source_of_pictures(off, open_data(off)[1]) is None


def test_validation_scores_each_of_several_sizes(folder):
    """A strip of the first; columns of the others end in their side."""
    several = "stop_iteration=101", "log.pictures_every=1", "log.pictures_size=[32,64]"
    train(runs.recipe(folder, "sizes", *several))
    train(runs.recipe(folder, "one-size", *several[:2], "log.pictures_size=64"))
    end = read_table(folder / "sizes" / "validation.csv")[-1]
    alone = read_table(folder / "one-size" / "validation.csv")[-1]
    assert {f"{key}_64px": value for key, value in alone.items() if key != "iteration"} == {
        key: value for key, value in end.items() if key.endswith("_64px")
    }
    assert end["psnr_ema"] != end["psnr_ema_64px"]
    strip = Image.open(folder / "sizes" / "pictures" / "iteration-000000101.jpg")
    assert strip.width < 2 * 64
    labels = [change.weights for change in outcome.read(folder / "sizes").changes]
    assert labels == ["EMA", "raw", "EMA 64px"]


def test_time_left_is_that_of_iterations_and_no_pause_is_silent(folder, monkeypatch, capsys):
    """Neither the start, nor the validation before it, enters the estimate."""
    validate = Validation.validate

    def slow(self, *arguments):
        time.sleep(8.0)
        return validate(self, *arguments)

    monkeypatch.setattr(Validation, "validate", slow)
    monkeypatch.setattr(runs, "TINY", (*runs.TINY, "log.every=2"))
    extra = "stop_iteration=106", "log.pictures_every=4", *runs.NO_ADVERSARIAL
    assert train(runs.recipe(folder, "slow-start", *extra)) == 0
    said = capsys.readouterr().out
    order = [
        "reading ",
        "validating 4 photographs, 32 x 32 pixels ...",
        "validation at iteration 100",
        "training: a line after 2 iterations (log.every), the first after 30 s at most; ",
        "iteration 102 of 106",
    ]
    places = [said.index(part) for part in order]
    assert places == sorted(places)
    (left,) = re.findall(r"iteration 102 of 106 .* (\d+) s left", said)
    assert int(left) < 8 / 2 * 4  # what it would be with the validation in it
    rows = read_table(folder / "slow-start" / "metrics.csv")
    assert min(float(row["images_per_second"]) for row in rows) > 4 / 4


@pytest.mark.parametrize("seconds", [0.2, 1.0])  # of an iteration
def test_a_slow_run_says_early_how_it_goes(folder, monkeypatch, capsys, seconds):
    """One line before log.every, and none of it in metrics.csv; where it is, if that is late."""
    step = Finetuner.training_step

    def slow(self, *arguments):
        time.sleep(seconds)
        return step(self, *arguments)

    monkeypatch.setattr(Finetuner, "training_step", slow)
    monkeypatch.setattr("kl_f8_train.run.log.FIRST_LINE", 0.3)
    monkeypatch.setattr("kl_f8_train.run.watchdog.SLOW", 0.3)
    monkeypatch.setattr(runs, "TINY", (*runs.TINY, "log.every=5", "compute.timeout_minutes=0.2"))
    assert train(runs.recipe(folder, f"slow-{seconds}", "stop_iteration=105")) == 0
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if line.startswith("iteration 10")]
    assert len(lines) == 2
    assert re.match(r"iteration 10[1-3] of 105 \| rec .* images/s", lines[0])
    assert lines[1].startswith("iteration 105 of 105")
    assert [row["iteration"] for row in read_table(folder / f"slow-{seconds}" / "metrics.csv")] == [
        "105"
    ]
    if seconds == 1.0:
        assert "s after the start the run is in iteration 101" in said


def test_a_single_iteration_makes_no_estimate(folder, capsys):
    extra = "stop_iteration=103", "log.every=1", *runs.NO_ADVERSARIAL
    assert train(runs.recipe(folder, "estimate", *extra)) == 0
    first, second, _ = re.findall(r"iteration 10\d of 103 .*", capsys.readouterr().out)
    assert "left" not in first
    assert "left" in second


def test_saving_is_no_waiting_for_data(folder, monkeypatch):
    write = checkpoint.write

    def slow(*arguments):
        time.sleep(0.5)
        return write(*arguments)

    monkeypatch.setattr(checkpoint, "write", slow)
    extra = "checkpoint.every=1", "log.pictures_every=1", *runs.NO_ADVERSARIAL
    assert train(runs.recipe(folder, "slow-save", "stop_iteration=104", *extra)) == 0
    rows = read_table(folder / "slow-save" / "metrics.csv")
    assert max(float(row["data_wait_share"]) for row in rows) < 0.4


def test_validation_rows_of_a_resumed_run_are_not_doubled(folder):
    for stop in (102, 103):
        settings = runs.recipe(folder, "valid", f"stop_iteration={stop}", "log.pictures_every=1")
        train(settings, allow_changes=True)
    iterations = [row["iteration"] for row in read_table(folder / "valid" / "validation.csv")]
    assert iterations == ["100", "101", "102", "103"]


def without_discriminator(folder: Path) -> str:
    """The setting of a base that has none."""
    runs.make_weights(folder / "pruned.ckpt", discriminator=False)
    return f"init.weights={folder / 'pruned.ckpt'}"


def test_a_missing_discriminator_warms_up_alone(folder):
    extra = (
        without_discriminator(folder),
        "adversarial.warmup_iterations=3",
        "stop_iteration=101",
    )
    train(runs.recipe(folder, "warmup", *extra))
    state = runs.final_state(folder, "warmup")
    assert state.iteration == 101
    assert float(state.tensors["optimizer.discriminator.discriminator.main.0.weight.step"]) == 4
    assert float(state.tensors["optimizer.decoder.autoencoder.decoder.conv_in.weight.step"]) == 1


def test_a_warmup_logs_and_validates_no_more_often_than_asked(folder, capsys):
    """Its iterations all have the number of the first decoder update, here one of every period."""
    extra = (
        without_discriminator(folder),
        "adversarial.warmup_iterations=7",
        "stop_iteration=102",
        "log.every=5",
        "log.pictures_every=2",
    )
    train(runs.recipe(folder, "warm-log", *extra))
    lines = capsys.readouterr().out.splitlines()
    assert sum("discriminator warm-up" in line for line in lines) == 1
    rows = read_table(folder / "warm-log" / "validation.csv")
    assert [row["iteration"] for row in rows] == ["100", "102"]


def test_warmup_resumes_where_it_stopped(folder):
    extra = (
        without_discriminator(folder),
        "adversarial.warmup_iterations=4",
        "stop_iteration=102",
        "checkpoint.every=2",
        "checkpoint.keep_last=9",
    )
    train(runs.recipe(folder, "warm-a", *extra))
    shutil.copytree(folder / "warm-a", folder / "warm-b")
    newer = list_checkpoints(folder / "warm-b")
    half = [path for path in newer if path.name.endswith("warmup-000002.safetensors")]
    assert half, newer
    for path in newer:
        if path not in half:
            path.unlink()
    train(runs.recipe(folder, "warm-b", *extra))
    a, b = runs.final_state(folder, "warm-a"), runs.final_state(folder, "warm-b")
    runs.assert_same_state(a, b)


def test_a_bad_image_is_skipped_counted_and_named(folder, capsys):
    tiles = [path.read_bytes() for path in sorted((folder / "tiles").iterdir())[:6]]
    tiles[2] = b"no image"
    shards = samples.write_tar(
        folder / "one-bad" / "00000.tar", {f"{i}.png": data for i, data in enumerate(tiles)}
    )
    settings = runs.recipe(folder, "bad", f"data.sources={shards.parent}", "stop_iteration=104")
    train(settings)
    output = capsys.readouterr().out
    assert "skipped an image: one_bad/00000.tar/2.png: not a readable image" in output
    assert "replaced: not a readable image" in output
    assert " % of every batch), " in output
    with (folder / "bad" / "metrics.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    assert float(last["skipped_images"]) >= 1
    assert last["images_one_bad"] == "16"
    assert float(last["passes_one_bad"]) == 4  # of 4 lanes of one image: 2 of 6 rest each time
    assert "2.png" in (folder / "bad" / "skipped-0.txt").read_text()


def test_too_many_bad_images_stop_the_run(folder):
    tiles = [path.read_bytes() for path in sorted((folder / "tiles").iterdir())[:6]]
    tiles[2] = b"no image"
    members = {f"{i}.png": data for i, data in enumerate(tiles)}
    shards = samples.write_tar(folder / "many-bad" / "00000.tar", members).parent
    extra = (
        f"data.sources={shards}",
        "stop_iteration=200",
        "global_batch=50",
        "compute.per_device_batch=10",
    )
    with pytest.raises(RunFailedError, match=r"of [\d,]+ images cannot be used.*max_bad_share=0.1"):
        train(runs.recipe(folder, "many-bad-run", *extra))


def test_a_plain_folder_of_images_needs_no_packing(folder):
    extra = (f"data.sources={folder / 'tiles'}", "stop_iteration=102")
    assert train(runs.recipe(folder, "plain", *extra)) == 0


def test_remote_shards_give_the_run_of_local_ones(folder, undisturbed, capsys):
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(folder / "shards"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/{{00000..00001}}.tar"
        places = (str(folder / "remote-index"), str(folder / "remote-cache"))
        extra = (
            f"data.sources.shards={address}",
            f"data.index_dir={places[0]}",
            f"data.cache_dir={places[1]}",
            "stop_iteration=108",
        )
        settings = runs.recipe(folder, "remote", *extra)
        with pytest.raises(MissingInputError, match="not indexed yet") as refused:
            train(settings)
        command = shlex.split(str(refused.value).rpartition(": ")[2])
        assert command[:2] == ["kl-f8-train", "index"]
        assert main(command[1:]) == 0
        assert "36 images in 2 shards" in capsys.readouterr().out
        shutil.rmtree(places[1])
        assert train(settings) == 0
        server.shutdown()
    cached = [path for path in Path(places[1]).iterdir() if path.suffix == ".tar"]
    assert len(cached) == 2
    runs.assert_same_state(runs.final_state(folder, "remote"), undisturbed)


@pytest.mark.slow
def test_only_bad_images_stop_the_run(folder):
    members = {f"{number}.jpg": b"no image" for number in range(5)}
    samples.write_tar(folder / "only-bad" / "00000.tar", members)
    extra = (f"data.sources={folder / 'only-bad'}", "stop_iteration=104", "data.workers=1")
    process = runs.start(folder, "only-bad-run", *extra)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 3, output
    assert "5 images in a row cannot be used" in output
    assert "Traceback" not in output


@pytest.mark.parametrize("what", ["missing", "text", "truncated", "foreign"])
def test_unusable_weights_are_refused_with_their_name(folder, what):
    path = folder / f"{what}.ckpt"
    if what == "text":
        path.write_text("these are no weights")
    elif what == "truncated":
        path.write_bytes((folder / "model.ckpt").read_bytes()[:-2000])
    elif what == "foreign":
        torch.save({"state_dict": {}, "hook": os.system}, path)
    settings = runs.recipe(folder, f"unusable-{what}", f"init.weights={path}", "stop_iteration=102")
    with pytest.raises(MissingInputError, match=path.name if what != "foreign" else r"system"):
        train(settings)
    assert not list_checkpoints(folder / f"unusable-{what}")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            ("model.ch=64",),
            r"differ.*\n +encoder.conv_in.weight is \(32, 3, 3, 3\), expected \(64",
        ),
        (("model.z_channels=16",), r"\n +encoder.conv_out.weight is \(8, .*expected \(32, 32, 3"),
        (("adversarial.ndf=32",), "expected"),
        (("init.iteration=null", "init.weights={}/bare.safetensors"), "init.iteration"),
    ],
)
def test_weights_of_another_shape_or_without_iteration(folder, extra, message):
    if not (folder / "bare.safetensors").exists():
        tensors = weight_file.read(folder / "model.ckpt").tensors
        weight_file.write_safetensors(folder / "bare.safetensors", tensors, {})
    filled = [text.format(folder) for text in extra]
    with pytest.raises((MissingInputError, UsageError), match=message):
        train(runs.recipe(folder, "shape", "stop_iteration=102", *filled))


def test_a_full_disk_keeps_the_last_checkpoint(folder, undisturbed):
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    run = folder / "full"
    run.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(run)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this machine does not allow mounting a small file system")
    try:
        extra = ("stop_iteration=108", "checkpoint.every=2", "checkpoint.keep_last=2")
        with pytest.raises(RunFailedError, match=r"No space left|failed"):
            train(runs.recipe(folder, "full", *extra))  # one checkpoint of 3 MB fits, two do not
        kept = list_checkpoints(run)
        assert [path.name for path in kept] == ["iteration-000000102.safetensors"]
        assert weight_file.read(kept[0]).iteration == 102
        assert not list(run.rglob("*.part"))
        subprocess.run(["mount", "-o", "remount,size=50m", str(run)], check=True)
        assert train(runs.recipe(folder, "full", *extra)) == 0
        runs.assert_same_state(runs.final_state(folder, "full"), undisturbed)
    finally:
        subprocess.run(["umount", str(run)], check=False)


@pytest.mark.slow
def test_two_ranks_give_the_gradients_of_one(folder):
    extra = (*runs.NO_ADVERSARIAL, "stop_iteration=101", "compute.accelerator=cpu")
    train(runs.recipe(folder, "one-rank", *extra))
    one = runs.final_state(folder, "one-rank").tensors
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    for run, launcher, more in (
        ("torchrun", torchrun, ()),
        ("accumulating", (), ("compute.devices=2", "compute.per_device_batch=1")),
    ):
        process = runs.start(folder, run, *extra, *more, launcher=launcher)
        output = process.communicate(timeout=120)[0]
        assert process.returncode == 0, output
        assert "2 processes" in output
        two = runs.final_state(folder, run).tensors
        moments = [key for key in one if key.endswith(".exp_avg")]
        assert moments
        for key in moments:  # Adam's first moment after one step is half the gradient
            torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_ranks_that_start_from_different_states_are_refused(folder, undisturbed):
    shutil.copytree(folder / "undisturbed", folder / "node-0")  # rank 1 finds no checkpoint
    settings = runs.overrides(folder, "node-$RANK", "stop_iteration=110")
    command = " ".join([sys.executable, "-m kl_f8_train train demo --allow-changes", *settings])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, "--no-python", "bash", "-c", command],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert "the ranks start from different states" in done.stderr
    assert "rank 0: iteration 108, " in done.stderr
    assert "rank 1: iteration 100, " in done.stderr


@pytest.fixture(params=["refused", "stalled"])
def unreachable(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a wandb server that refuses connections, or takes them and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if request.param == "refused":
            server.close()
        yield f"http://127.0.0.1:{port}"


def no_address_for_wandb() -> None:
    os.environ["WANDB_BASE_URL"] = "nonsense"


@pytest.mark.slow
def test_wandb_that_cannot_start_does_not_end_a_run(folder):
    extra = ("stop_iteration=101", "log.wandb=auto")
    (run,) = ranks.start(folder, "odd", *extra, prepare=no_address_for_wandb)
    (output,) = ranks.finish([run])
    assert "wandb is offline" in output
    assert list((folder / "odd").glob("wandb/offline-run-*"))
    assert "Traceback" not in output


@pytest.mark.slow
def test_wandb_without_a_network_goes_on_offline(folder, monkeypatch, unreachable):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", unreachable)
    name = f"wandb-{unreachable.rpartition(':')[2]}"
    process = runs.start(
        folder, name, "stop_iteration=102", "log.wandb=auto", "log.pictures_every=1"
    )
    wait_for(process, "batch: ")
    began = time.perf_counter()
    wait_for(process, "wandb sync")
    assert time.perf_counter() - began < 20
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert list((folder / name).rglob("*.wandb"))
    assert (folder / name / "wandb_id.txt").read_text().strip()


# --- memory, disks and loaders that fail ------------------------------------------------------


def limit_memory(bytes_left: int) -> None:
    """Lets this process take so much more memory and no more."""
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + bytes_left,) * 2)


def test_out_of_memory_says_what_to_change(folder):
    extra = ("global_batch=480", "compute.per_device_batch=480", "stop_iteration=101")
    (run,) = ranks.start(folder, "memory", *extra, prepare=limit_memory, given=(400_000_000,))
    assert run.end() == 4
    assert "out of memory:" in run.output
    assert "halve compute.per_device_batch" in run.output
    assert "Traceback" not in run.output


def signal_at_start() -> None:
    """SIGTERM after Lightning has set itself up, before the first iteration."""
    original = Validation.on_train_start

    def on_train_start(self, trainer, pl_module):
        os.kill(os.getpid(), signal.SIGTERM)
        original(self, trainer, pl_module)

    Validation.on_train_start = on_train_start


@pytest.mark.slow
def test_a_signal_before_the_first_iteration_is_not_lost(folder):
    (run,) = ranks.start(folder, "early", "stop_iteration=108", prepare=signal_at_start)
    assert run.end(60) == 143, run.output
    assert "stopped by signal 15 at iteration 101, saved" in run.output
    assert runs.final_state(folder, "early").iteration == 101


def hang_in_c(at: int, answer: float) -> None:
    """An iteration hangs in a C function, as in a collective whose other ranks are dead."""
    original = Finetuner.run_iteration

    def run_iteration(self, *arguments):
        if self.iteration == at:
            print("now in C", flush=True)
            mutex = (ctypes.c_byte * 64)()  # as big as any pthread_mutex_t
            for _ in range(2):  # no signal ends the second wait
                ctypes.CDLL(None).pthread_mutex_lock(mutex)
        original(self, *arguments)

    Finetuner.run_iteration = run_iteration
    saving.ANSWER = answer


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_process_that_hangs_in_c_ends_after_a_signal(folder, number):
    extra = ("stop_iteration=9000", "checkpoint.every=2", "data.workers=1")
    name = f"hangs-{number}"
    (run,) = ranks.start(folder, name, *extra, prepare=hang_in_c, given=(103, 2.0))
    run.wait_for("now in C")
    run.send(number)
    began = time.monotonic()
    assert run.end(60) == 128 + number, run.output
    assert time.monotonic() - began > 1.5
    said = rf"signal {number}, and no iteration ended for \d+ s: ended unsaved"
    assert re.search(said, run.output), run.output
    assert "in run_iteration" in run.output  # where it hung
    assert runs.final_state(folder, name).iteration == 102


@pytest.mark.slow
def test_a_signal_is_given_the_time_of_slow_iterations(folder):
    """A second each, more than is allowed for quick ones; they end, and the last is saved."""
    extra = ("stop_iteration=9000", "checkpoint.every=100")
    (run,) = ranks.start(folder, "slow", *extra, prepare=slow_iterations, given=(1.0, 0.1))
    run.wait_for("iteration 102 of")
    run.send(signal.SIGTERM)
    assert run.end(30) == 143, run.output
    assert "stopped by signal 15 at iteration 103, saved" in run.output


def slow_iterations(seconds: float, answer: float) -> None:
    """Each takes so long."""
    original = Finetuner.run_iteration

    def run_iteration(self, *arguments):
        for _ in range(10):
            time.sleep(seconds / 10)
        original(self, *arguments)

    Finetuner.run_iteration = run_iteration
    saving.ANSWER = answer


def slow_disk(seconds: float) -> None:
    """Makes flushing a file to the disk take so long."""
    original = os.fsync

    def fsync(descriptor: int) -> None:
        time.sleep(seconds / 10)  # in turns, so that a signal's handler runs meanwhile
        for _ in range(9):
            time.sleep(seconds / 10)
        original(descriptor)

    os.fsync = fsync


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_during_a_slow_save_is_not_lost(folder, undisturbed, number):
    name = f"slow-disk-{number}"
    extra = ("stop_iteration=108", "checkpoint.every=2", "checkpoint.keep_last=9")
    (run,) = ranks.start(folder, name, *extra, prepare=slow_disk, given=(1.5,))
    run.wait_for("iteration 104 of")  # and is being saved
    while not list((folder / name / "checkpoints").glob(".iteration-000000104*.part")):
        time.sleep(0.01)
    run.send(number)
    assert run.end(30) == (128 + number if number == signal.SIGTERM else -number)
    kept = [path.name for path in list_checkpoints(folder / name)]
    if number == signal.SIGTERM:  # the save ends, the iteration that runs, and then another
        assert kept[0] > kept[1] == "iteration-000000104.safetensors"
    else:  # half a file is no checkpoint
        assert kept == ["iteration-000000102.safetensors"]
        assert list((folder / name / "checkpoints").glob("*.part"))
    (run,) = ranks.start(folder, name, *extra)
    (output,) = ranks.finish([run])
    assert f"resuming {kept[0]}" in output
    assert not list((folder / name / "checkpoints").glob(".*.part"))
    runs.assert_same_state(runs.final_state(folder, name), undisturbed)


def test_a_disk_that_becomes_read_only_ends_the_run_and_keeps_the_last_checkpoint(folder):
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    run_dir = folder / "read-only"
    place = run_dir / "checkpoints"
    place.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "tmpfs", str(place)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this machine does not allow mounting a small file system")
    try:
        extra = ("stop_iteration=9000", "checkpoint.every=2", f"run_dir={run_dir}")
        (run,) = ranks.start(folder, "read-only-run", *extra)
        while len(list_checkpoints(run_dir)) < 2:
            assert run.process.is_alive(), run.output
            time.sleep(0.02)
        remount = ["mount", "-o", "remount,ro", str(place)]
        while subprocess.run(remount, check=False, capture_output=True).returncode:
            time.sleep(0.005)  # busy: a file is being written
        assert run.end(60) == 4
        assert "training goes on; the next checkpoint tries again" in run.output
        assert "Read-only file system" in run.output
        kept = list_checkpoints(run_dir)
        assert weight_file.read(kept[0]).iteration
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False)


@pytest.mark.slow
def test_a_loader_that_is_stuck_is_named_with_its_image(folder):
    tiles = folder / "stuck-tiles"
    shutil.copytree(folder / "tiles", tiles)
    extra = (f"data.sources={tiles}", "data.workers=2", "compute.timeout_minutes=0.1")
    (run,) = ranks.start(folder, "stuck", *extra, "stop_iteration=9000")
    run.wait_for("iteration 102 of")
    for path in list(tiles.iterdir()):  # pipes that no one writes to: reading never ends
        fifo = tiles / "fifo"
        os.mkfifo(fifo)
        fifo.replace(path)
    assert run.end(60) == 4
    assert "no iteration ended for 6 s; rank 0 waits for the data of iteration" in run.output
    for worker in (0, 1):
        assert f"loader {worker} reads stuck_tiles: {tiles}, image " in run.output
    assert list_checkpoints(folder / "stuck") == []
