"""A run looked over before it starts: real tiny networks, shards, weights; wrong ones, too."""

import datetime
import json
import os
import re
import shlex
import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import runs
import samples
import torch

from kl_f8_train.__main__ import main
from kl_f8_train.check import bill, cost, doctor, findings, scaling, screen, trial
from kl_f8_train.core import machine
from kl_f8_train.core.batch import Batch
from kl_f8_train.core.losses import reconstruction_loss
from kl_f8_train.data.loading import PositionDataset, collate, open_data
from kl_f8_train.errors import RunFailedError
from kl_f8_train.files import file_sha256
from kl_f8_train.next_command import after_doctor
from kl_f8_train.run.start import start_or_resume
from kl_f8_train.run.train import train
from kl_f8_train.run_dir import checkpoint_path, list_checkpoints, remove_old_checkpoints
from kl_f8_train.settings import Checkpoint
from kl_f8_train.weights import pretrained, weight_file


def listing(folder: Path) -> dict[str, str]:
    """Every file below a folder, hashed."""
    return {str(p): file_sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def examined(folder, capsys):
    """examined(run, *overrides) -> (exit code, JSON object, what was printed meanwhile)."""

    def examine(run: str, *extra: str):
        capsys.readouterr()
        code = main(["doctor", "demo", *runs.overrides(folder, run, *extra), "--json"])
        output = capsys.readouterr()
        return code, json.loads(output.out), output.err

    return examine


# --- go -------------------------------------------------------------------------------------


def test_go(examined, folder):
    code, found, printed = examined("new", "stop_iteration=350", "checkpoint.every=100")
    assert (code, found["go"], found["problems"]) == (0, True, [])
    assert set(found["gradient_audit"]) == {"pixel", "perceptual", "adversarial"}
    assert all(norm > 0 for norm in found["gradient_audit"].values())
    assert found["images_total"] == 250 * 4
    assert found["gpu_hours"] == pytest.approx(1000 * found["seconds_per_image"] / 3600)
    end = datetime.datetime.fromisoformat(found["end_date"]) - datetime.datetime.now()
    assert end.total_seconds() == pytest.approx(found["gpu_hours"] * 3600, abs=30)
    assert found["batch"] == {"processes": 1, "per_device": 4, "accumulation": 1, "global": 4}
    assert found["data"]["shards"]["images"] == 36
    assert found["weights"]["sha256"] == file_sha256(folder / "model.ckpt")
    assert found["settings"]["data.crop"] == {"value": 32, "origin": "yours"}
    assert found["settings"]["adversarial.weight"]["origin"] == "demo"
    assert "  4 images, at once" in printed
    assert "1 x 4 x 1 x 4.5e-06 = 1.8e-05" in printed
    assert "with discriminator" in printed
    assert not found["cold_iteration"]
    assert "cold" not in printed
    assert "1 loader process can keep it busy" in printed
    if not torch.cuda.is_available():
        assert "  2 of 4 images in " in printed
    assert printed.rstrip().endswith("GO")
    assert not (folder / "new").exists()


def test_the_checkpoints_it_announces_are_those_that_come(examined, folder):
    extra = ("stop_iteration=107", "checkpoint.every=2", "checkpoint.keep_every=4")
    announced = examined("sizes", *extra)[1]
    train(runs.recipe(folder, "sizes", *extra))
    kept = list_checkpoints(folder / "sizes")
    assert len(kept) == announced["checkpoints"] == 3  # 104, 106, 107
    assert announced["checkpoint_bytes"] == pytest.approx(
        sum(path.stat().st_size for path in kept), rel=0.02
    )


@pytest.mark.parametrize("start", [0, 100, 103])
@pytest.mark.parametrize("last", [1, 3])
@pytest.mark.parametrize("milestone", [0, 4, 5, 10, 107])
def test_count_of_kept_checkpoints(tmp_path, start, last, milestone):
    """Against the program's own clearing away, on empty files."""
    settings = Checkpoint(every=2, keep_last=last, keep_every=milestone)
    for iteration in range(start + 1, 108):
        if iteration % 2 == 0 or iteration == 107:
            path = checkpoint_path(tmp_path, iteration)
            path.parent.mkdir(exist_ok=True)
            path.touch()
            remove_old_checkpoints(path, last, milestone)
    left = len(list_checkpoints(tmp_path))
    assert bill.kept_checkpoints(settings, start, 107) == left


def test_a_run_that_would_resume_is_left_as_it_is(examined, folder):
    extra = ("stop_iteration=104", "checkpoint.every=2", *runs.NO_ADVERSARIAL)
    train(runs.recipe(folder, "resumed", *extra))
    before = listing(folder / "resumed")
    code, found, printed = examined(
        "resumed", "stop_iteration=104", "compute.per_device_batch=2", *runs.NO_ADVERSARIAL
    )
    assert code == 0
    assert "holds 2 checkpoints: this run would resume" in printed
    assert "  4 images, in 2 micro-batches of 2" in printed
    assert found["images_total"] == 0
    assert set(found["gradient_audit"]) == {"pixel", "perceptual"}
    assert listing(folder / "resumed") == before

    newest, older = list_checkpoints(folder / "resumed")
    newest.write_bytes(newest.read_bytes()[:-1000])
    code, found, _ = examined("resumed", "stop_iteration=104", *runs.NO_ADVERSARIAL)
    assert code == 0
    assert found["weights"]["file"] == str(older)
    assert "is broken or cut short" in found["remarks"][0]
    assert found["images_total"] == 2 * 4


def test_a_renamed_checkpoint_is_no_go_as_train_refuses_it(examined, folder):
    kept = folder / "renamed" / "checkpoints" / "good.safetensors"
    kept.parent.mkdir(parents=True)
    kept.touch()
    code, found, _ = examined("renamed")
    assert code != 0
    assert any("not named as a checkpoint" in problem for problem in found["problems"])


def test_a_cold_iteration_is_called_one(examined, monkeypatch):
    monkeypatch.setattr(trial, "PATIENCE_SECONDS", 0.0)
    _, found, printed = examined("cold", "stop_iteration=110", *runs.NO_ADVERSARIAL)
    assert found["cold_iteration"]
    assert "s (the first, cold iteration; later ones are quicker) on " in printed
    assert "= 40 images: at most " in printed


def test_an_iteration_that_compiled_is_run_again(examined, monkeypatch):
    """And the gradient audit before it compiles nothing."""
    graphs = []

    def audit(*arguments):
        before, norms = machine.compiled_graphs(), gradient_audit(*arguments)
        graphs.append(machine.compiled_graphs() - before)
        return norms

    gradient_audit = trial.gradient_audit
    monkeypatch.setattr(trial, "gradient_audit", audit)
    monkeypatch.setattr(trial, "PATIENCE_SECONDS", 0.0)
    eager = partial(machine.compile_networks, backend="eager")
    monkeypatch.setattr(machine, "compile_networks", eager)
    switches = "compute.compile=true", "stop_iteration=110", *runs.NO_ADVERSARIAL
    _, found, printed = examined("compiled", *switches)
    assert found["cold_iteration"] is False
    assert "cold iteration" not in printed
    assert graphs == [0]


def test_an_end_beyond_the_calendar_has_no_date():
    assert bill.date_in(1.0) is not None
    assert [bill.date_in(days) for days in (4e6, 1e300)] == [None, None]


def test_dry_run_is_the_same_and_trains_nothing(folder, capsys):
    arguments = runs.overrides(folder, "dry", "stop_iteration=102")
    assert main(["train", "demo", "--dry-run", *arguments]) == 0
    assert capsys.readouterr().out.rstrip().endswith("GO")
    assert not (folder / "dry").exists()


def test_a_warm_up_is_announced_and_paid(examined, folder, tmp_path):
    weights = runs.make_weights(tmp_path / "bare.ckpt", discriminator=False)
    extra = (f"init.weights={weights}", "adversarial.warmup_iterations=50", "stop_iteration=110")
    code, found, printed = examined("warm", *extra)
    assert code == 0
    assert "trains alone for 50 iterations" in printed
    assert found["images_total"] == (10 + 50) * 4
    assert found["gradient_audit"]["adversarial"] > 0


def test_the_one_gpu_recipe_is_fit_to_start(folder, capsys):
    tiny = (
        *runs.TINY,
        "model.ch=32",
        "model.num_res_blocks=1",
        "loss.perceptual=st_lpips_alex",
        "loss.allow_stand_in=true",
        "data.shorter_side=null",
        "compute.per_device_batch=2",
        f"data.sources={folder / 'tiles'}",
        f"init.weights={folder / 'model.ckpt'}",
        f"run_dir={folder / 'mine'}",
    )
    kept = [text for text in tiny if not text.startswith(("adversarial", "init.iteration"))]
    assert main(["doctor", "single_gpu", *kept]) == 0, capsys.readouterr().out
    printed = capsys.readouterr().out
    assert "10,000 iterations x 4 = 40,000 images" in printed
    assert "RTX 4090" not in printed  # figures of the full size say nothing about this network


def test_kinds_of_gpu_are_told_for_the_full_size(folder, capsys):
    extra = (f"run_dir={folder / 'full'}", f"data.sources={folder / 'tiles'}")
    inputs = ("init.weights=absent", "compute.accelerator=cpu", "compute.devices=2")
    assert main(["doctor", "ft_ema", *extra, *inputs, "--json"]) == 3
    output = capsys.readouterr()
    settings = samples.recipe()
    fits = json.loads(output.out)["per_device_batch_that_fits"]
    assert list(fits) == ["this machine", *(kind.name for kind in scaling.GPUS)]
    divisors = [n for n in range(1, 97) if 96 % n == 0]
    for kind in scaling.GPUS:
        needed = {n: cost.peak_bytes(settings, n, 96) + 2 * 2**30 for n in divisors}
        assert fits[kind.name] == max(n for n in divisors if needed[n] <= kind.memory_bytes)
    assert 1 < fits["RTX 4090"] < fits["L40S"] < fits["H200 SXM"]
    assert f"{fits['RTX 4090']} on RTX 4090" in output.err
    assert "predicted, not measured: 2 of each" in output.err


@pytest.mark.parametrize(
    ("share", "batch", "said"),
    [
        (4, 4, "4 (the whole batch) on a, 2 on b, none on c"),
        (4, 8, "4 (a process's whole share) on a, 2 on b, none on c"),
        (16, 16, "4 on a, 2 on b, none on c"),
        (4, 8, "4 (a process's whole share) on a, d and e, 2 on b, none on c"),
    ],
)
def test_a_micro_batch_that_only_the_batch_bounds_is_named_so(share, batch, said):
    alike = {"d": 4, "e": 4} if "d and e" in said else {}
    assert screen.fitting({"a": 4, "b": 2, "c": 0, **alike}, share, batch) == said


def test_the_screen_counts_memory_as_torch_does_and_disk_as_files():
    batch = {"global": 192, "processes": 1, "per_device": 12}
    facts = {
        "batch": batch,
        "computed_memory": {"bytes": 13.7 * 2**30, "networks": "compiled"},
        "per_device_batch_that_fits": {},
        "checkpoints": 9,
        "checkpoint_bytes": 8.64e9,
        "free_bytes": 2e12,
    }
    shown = "\n".join(screen.lines(facts, samples.recipe()))
    assert "memory   13.7 GiB a process" in shown
    assert "disk     8.64 GB for 9 checkpoints; 2 TB free" in shown
    measured = {"seconds_per_image": 1, "cold_iteration": False, "device": "an H100"}
    facts |= {**measured, "memory_bytes": 7.5 * 2**30}
    assert "on an H100, 7.5 GiB" in "\n".join(screen.lines(facts, samples.recipe()))


@pytest.mark.parametrize(
    ("total", "weight", "cold", "passes", "bill"),
    [
        (160_000, 1, False, "; 5,333 passes", "images: 2 h 0 min"),
        (240, 1, True, "; 8 passes", "images: at most 2 h 0 min"),
        (240, 0.75, True, "; 6 passes", "images: at most 2 h 0 min"),
        (0, 1, False, "", "0 images: 2 h 0 min"),
        (None, 1, False, "", ""),
    ],
)
def test_the_screen_counts_passes_and_bounds_a_cold_iteration(total, weight, cold, passes, bill):
    """A source's passes are those of its share; iterations after a cold one are quicker."""
    settings = samples.recipe("single_gpu")
    (name,) = settings.data.sources
    if weight < 1:
        source = replace(settings.data.sources[name], weight=weight)
        both = {name: source, "other": replace(source, weight=1 - weight)}
        settings = replace(settings, data=replace(settings.data, sources=both))
    found = {"images": 30, "unusable": 0, "checked": "30", "about": "30 images"}
    facts = {"data": {name: found}, "images_total": total, "cold_iteration": cold}
    facts |= {"days": 1 / 12, "gpu_hours": 2.0, "end_date": None}
    lines = list(screen.lines(facts, settings))
    assert f"  data     {name}: 30 images; 30 can be used{passes}" in lines
    assert any(bill in line for line in lines)
    assert sum("at most" in line for line in lines) == cold


@pytest.mark.parametrize(
    ("memory", "problem"),
    [
        (8e9, "has 5.45 GiB for it; give compute.per_device_batch=8, or raise compute.checkpoint"),
        (3e9, "has 813 MiB for it; raise compute.checkpoint_levels"),
    ],
)
def test_a_micro_batch_that_does_not_fit_is_refused(memory, problem):
    settings = samples.recipe()
    with pytest.raises(RunFailedError, match=r"batch=12 takes 7\.16 GiB") as caught:
        doctor.check_fits(settings, 12, 96, {"this one": memory - cost.HEADROOM_BYTES})
    assert problem in str(caught.value)
    doctor.check_fits(settings, 12, 96, {"this one": 12e9 - cost.HEADROOM_BYTES})


def test_a_batch_beyond_this_machine_is_no_go(examined):
    huge = ("global_batch=65536", "compute.per_device_batch=65536", "data.crop=256")
    wanted = (*huge, "init.weights=absent", "compute.accelerator=cpu")
    code, found, printed = examined("huge", *wanted)
    assert code == 3  # of the weights; this alone would be 4
    assert "=65536 takes" in found["problems"][0]
    fits = found["per_device_batch_that_fits"]["this machine"]
    assert fits == 0  # not one: what is kept of 65,536 images is more than there is
    assert "raise compute.checkpoint_levels" in found["problems"][0]
    assert "give compute.per_device_batch" not in found["problems"][0]
    assert "  memory that this takes, computed: " in printed


def test_a_login_machine_s_memory_says_nothing_about_the_plan_for_gpus():
    settings = samples.recipe("ft_ema", "compute.devices=8")
    if not torch.cuda.is_available():
        assert doctor._memory_here(settings) == {}
    here = samples.recipe("ft_ema", "compute.devices=8", "compute.accelerator=cpu")
    assert list(doctor._memory_here(here)) == ["this machine"]


# --- the gradient audit ---------------------------------------------------------------------


def audited(folder: Path, *extra: str):
    """The audit of a tiny run's first batch, with its finetuner and the batch."""
    settings = runs.recipe(folder, "audit", *extra)
    finetuner, _ = start_or_resume(settings, folder / "audit", False)
    dataset = PositionDataset(*open_data(settings), settings)
    batch: Batch = collate([dataset[400 + slot] for slot in range(4)])
    return trial.gradient_audit(finetuner, batch), finetuner, batch


def test_the_pixel_norm_is_that_of_the_training_step(folder):
    audit, finetuner, batch = audited(folder, *runs.NO_ADVERSARIAL, "loss.perceptual_weight=0")
    assert set(audit) == {"pixel"}
    finetuner.run_iteration(batch)
    assert audit["pixel"] == pytest.approx(float(finetuner.autoencoder.last_layer.grad.norm()))


def test_the_adversarial_norm_gives_the_adaptive_weight(folder):
    audit, finetuner, batch = audited(folder, "loss.perceptual_weight=0")
    finetuner.run_iteration(batch)
    assert finetuner.config.adversarial is not None
    factor = finetuner.config.adversarial.weight
    weight = factor * audit["pixel"] / (audit["adversarial"] + 1e-4)
    assert float(finetuner.metrics["adaptive_weight"]) == pytest.approx(weight, rel=1e-4)


def test_the_perceptual_norm_is_what_the_whole_has_beside_the_pixels(folder):
    audit, finetuner, batch = audited(folder)
    model = finetuner.autoencoder
    x = batch.images / 127.5 - 1
    with torch.no_grad():
        latents = model.encode(x).sample(batch.noise[0])
    y = model.decode(latents)
    network = pretrained.build("st_lpips_alex")
    grads = []
    for distance in (network(x, y), torch.zeros(4, 1, 1, 1)):
        nll, _ = reconstruction_loss(
            x, y, distance, pixel="l1", perceptual_weight=1.0, logvar=torch.zeros(())
        )
        grads.append(torch.autograd.grad(nll, model.last_layer, retain_graph=True)[0])
    assert audit["perceptual"] == pytest.approx(float((grads[0] - grads[1]).norm()), rel=1e-3)


def test_weights_that_give_no_number_are_refused(examined, folder, tmp_path):
    contents = weight_file.read(folder / "model.ckpt")
    contents.tensors["decoder.conv_in.weight"] *= 1e38  # finite, but what it makes is not
    bad = tmp_path / "nan.ckpt"
    weight_file.write_torch(bad, {"state_dict": contents.tensors, "global_step": 100})
    code, found, _ = examined("nan", f"init.weights={bad}", "stop_iteration=110")
    assert code == 4
    assert "gradient audit: pixel nan" in found["problems"][0]
    assert found["gradient_audit"]["pixel"] is None  # JSON has no NaN


def test_wandb_is_asked(examined, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    try:
        found = examined("wandb", "log.wandb=auto", "init.weights=absent")[1]
    finally:
        server.shutdown()
        server.server_close()
    assert found["wandb"] == "online"
    assert examined("wandb", "log.wandb=offline", "init.weights=absent")[1]["wandb"] == "offline"


# --- no go ----------------------------------------------------------------------------------


def test_a_wrong_key_hides_no_other_problem(examined, folder):
    wrong = ("model.chh=3", "log.everry=2", "data.crop=64", "data.shorter_side=48")
    missing = ("init.weights=absent.ckpt", "data.sources=absent", "log.pictures=absent")
    found = examined("many", *wrong, *missing, "log.pictures_every=5")[1]
    text = "\n".join(found["problems"])
    assert "unknown key 'model.chh'" in text
    assert "unknown key 'log.everry'" in text
    assert "data.shorter_side=48 is smaller than data.crop=64" in text
    assert "init.weights=absent.ckpt: no such file" in text
    assert "absent: no such file or folder" in text
    assert "log.pictures: no images in absent: no such folder" in text


def test_all_problems_are_named_at_once(examined, folder):
    code, found, printed = examined(
        "many",
        "init.weights=absent.ckpt",
        f"data.sources={folder / 'shards'},nowhere/{{0..3}}.tar,nowhere/else",
        "global_batch=6",
        "compute.accelerator=cuda",
        "stop_iteration=110",
    )
    no_gpu = not torch.cuda.is_available()
    assert code == (2 if no_gpu else 3)
    assert not found["go"]
    assert len(found["problems"]) == 3 + no_gpu
    text = "\n".join(found["problems"])
    assert "absent.ckpt: no such file" in text
    assert "data.sources=nowhere/{0..3}.tar: 4 of 4 files are missing" in text
    assert "data.sources=nowhere/else: no such file or folder" in text
    assert ("torch sees no GPU here" in text) == no_gpu
    assert found["data"]["shards"]["images"] == 36
    assert found["images_total"] == 10 * 6
    assert found["end_date"] is None
    assert f"NO GO, {3 + no_gpu} problems" in printed


def test_batch_and_bill_are_told_without_the_inputs(capsys):
    assert main(["doctor", "ft_ema", "compute.devices=8", "data.sources=photos", "--json"]) == 2
    output = capsys.readouterr()
    found, printed = json.loads(output.out), output.err
    (problem,) = found["problems"]
    assert "run_dir=..." in problem
    assert "data.sources" not in problem
    assert "8 processes x 12 images x 2 micro-batches = 192" in printed
    assert found["images_total"] == (560001 - 246803) * 192
    if not torch.cuda.is_available():
        assert re.search(
            r"predicted, not measured: 8 of each(.|\n)*H100 SXM .* images/s, \d+ h", printed
        )


def test_speed_is_predicted_where_the_start_is_not_known(capsys):
    assert main(["doctor", "ft_ema", "init.iteration=null", "--all"]) == 2
    printed = capsys.readouterr().out
    assert "the bill:\n  not known: weights that state their iteration" in printed
    if not torch.cuda.is_available():
        assert re.search(r"H100 SXM +\d+ images/s, data", printed)


def test_another_shape_is_told_beside_a_missing_network(examined, monkeypatch, tmp_path):
    monkeypatch.setenv("KL_F8_TRAIN_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    code, found, _ = examined("shape", "model.ch=64", "loss.perceptual=lpips_vgg")
    assert code == 3
    shape, network = found["problems"]
    assert "is (32, 3, 3, 3), expected (64, 3, 3, 3)" in shape
    assert "set model.* as theirs: model.ch=32 " in shape
    assert "'model.ch_mult=[1,1]'" in shape
    assert "VGG16's features not found" in network


@pytest.mark.parametrize(
    ("override", "text"),
    [("seeed=1", "Did you mean 'seed'"), ("global_batch=0", "expected a number above 0")],
)
def test_wrong_settings_are_one_problem(examined, override, text):
    code, found, printed = examined("wrong", override)
    assert code == 2
    assert text in found["problems"][0]
    assert "NO GO, 1 problem:" in printed


def test_a_disk_that_is_too_small_is_told(examined):
    code, found, _ = examined(
        "disk", "stop_iteration=999999999", "checkpoint.every=1", "checkpoint.keep_every=1"
    )
    assert code == 4
    assert "TB for checkpoints" in found["problems"][0]
    assert found["checkpoint_bytes"] > 1e15


def test_a_changed_recipe_is_told(examined, folder):
    train(runs.recipe(folder, "changed", "stop_iteration=101", *runs.NO_ADVERSARIAL))
    code, found, _ = examined("changed", "stop_iteration=102", "seed=7", *runs.NO_ADVERSARIAL)
    assert code == 2
    assert "seed: 0 -> 7" in found["problems"][0]


def test_unusable_images_and_filters_are_told(examined, folder, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(8):
        (photos / f"{number}.jpg").write_bytes(samples.encode(samples.noise_picture(number)))
    (photos / "3.jpg").write_bytes(b"no image")
    code, found, _ = examined("bad", f"data.sources={photos}", "stop_iteration=110")
    assert code == 0
    assert found["data"]["photos"]["unusable"] > 0
    assert "1 of all 8 images cannot be used, as photos/3.jpg" in (found["remarks"][0])
    strict = ("data.sources.shards.filters=width >= 4000", "stop_iteration=110")
    code, found, _ = examined("filtered", *strict)
    assert code == 3
    assert "no image is left" in found["problems"][0]
    loose = ("data.sources.shards.filters=width >= 40", "stop_iteration=110")
    code, found, printed = examined("filtered", *loose)
    assert code == 0
    assert "width >= 40 dropped 0 (0.0 %)" in printed


def test_no_more_images_are_sampled_than_there_are(examined):
    found = examined("few", "global_batch=10", "init.weights=absent")[1]
    entry = found["data"]["shards"]
    assert (entry["images"], entry["sampled"]) == (36, 30)  # in a pass, of which 6 have a rest


def test_photographs_that_would_be_enlarged_are_told(examined):
    wanted = ("data.shorter_side=64", "init.weights=absent")
    found = examined("enlarged", *wanted)[1]
    assert found["data"]["shards"]["enlarged"] == found["data"]["shards"]["sampled"] == 16
    assert "16 of 16 sampled images are smaller than data.shorter_side=64" in found["remarks"][0]
    assert "filters='width >= 64, height >= 64'" in found["remarks"][0]
    found = examined("enlarged", *wanted, "data.shorter_side=48")[1]  # as the tiles are
    assert (found["data"]["shards"]["enlarged"], found["remarks"]) == (0, [])


def test_a_folder_of_validation_without_photographs_is_told(examined, folder, tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    wanted = (f"log.pictures={tmp_path}", "log.pictures_every=10", "init.weights=absent")
    code, found, _ = examined("pictures", *wanted)
    assert code == 3
    assert f"log.pictures: no images in {tmp_path}" in found["problems"][1]
    assert len(examined("pictures", *wanted, "log.pictures_every=0")[1]["problems"]) == 1
    code, found, printed = examined("pictures", *wanted, f"log.pictures={folder / 'tiles'}")
    assert len(found["problems"]) == 1
    assert f"8 photographs of {folder / 'tiles'}" in printed


def test_doctor_without_a_recipe(capsys):
    assert main(["doctor"]) == 2
    assert "doctor takes a recipe" in capsys.readouterr().err


# --- the screen -----------------------------------------------------------------------------


def test_without_all_it_is_one_screen_with_the_next_command(folder, capsys):
    arguments = runs.overrides(folder, "brief", "stop_iteration=110", *runs.NO_ADVERSARIAL)
    assert main(["doctor", "demo", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 14
    assert lines[0].startswith("loading ... settings ... batch and learning rate ... networks")
    assert [line.split()[0] for line in lines[1:9]] == [
        *("run", "batch", "weights", "loss", "data", "speed", "bill", "disk")
    ]
    assert lines[-3] == "all settings and figures: the same command with --all"
    assert lines[-2] == f"next: {shlex.join(['kl-f8-train', 'train', 'demo', *arguments])}"
    assert lines[-1] == "GO"
    assert main(["doctor", "demo", *arguments, "--all"]) == 0
    printed = capsys.readouterr().out
    assert "gradient norm at decoder.conv_out.weight" in printed
    assert "data.crop=32" in printed


def test_the_next_command_is_printed_where_it_is_short():
    assert (
        after_doctor("demo", ["run_dir=a b"], False, False)
        == "kl-f8-train train demo 'run_dir=a b'"
    )
    assert after_doctor("demo", [], True, True) == "kl-f8-train train demo --allow-changes"
    long = ["x" * 300]
    assert after_doctor("demo", long, False, True) == "the same command without --dry-run"
    assert after_doctor("demo", long, False, False) == f"kl-f8-train train demo {long[0]}"


@pytest.mark.parametrize(
    ("part", "where"),
    [("check.inputs.check_source", "data: shards"), ("check.screen.lines", "screen")],
)
def test_a_crash_in_a_check_is_no_go(folder, capsys, monkeypatch, part, where):
    """Whatever a check does not foresee: the others go on, and the verdict comes."""

    def crash(*_):
        raise ZeroDivisionError("by nought")

    monkeypatch.setattr(f"kl_f8_train.{part}", crash)
    arguments = ["doctor", "demo", *runs.overrides(folder, "crash", *runs.NO_ADVERSARIAL)]
    assert main(arguments) == 4
    printed = capsys.readouterr()
    assert "NO GO, 1 problem:" in printed.out
    assert f"1. {where}: unexpected ZeroDivisionError: by nought" in printed.out
    assert "--debug shows where" in printed.out
    assert main([*arguments, "--debug"]) == 4
    assert "in crash" in capsys.readouterr().err


def test_a_plan_shows_the_disk_that_it_takes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "single_gpu"]) == 2
    assert re.search(r"\n  disk     \S+ GB for \d checkpoints\n", capsys.readouterr().out)
    assert main(["doctor", "single_gpu", f"run_dir={tmp_path / 'run'}"]) == 2
    assert re.search(r"\n  disk     \S+ GB for \d checkpoints; .*free\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        (["init.iteration=null"], None),
        (["log.pictures_every=0"], None),
        (["log.pictures_every=0", "log.pictures=a"], "log.pictures=a is not used, as log.pictures"),
        (["log.pictures_every=0", "log.pictures_size=64"], "log.pictures_size=64 is not used"),
        (["adversarial.start_iteration=999"], "the adversarial term never sets in"),
        (["init.iteration=null", "stop_iteration=80"], "nothing is trained: stop_iteration=80 is"),
    ],
)
def test_settings_that_do_nothing_beside_others_are_noted(folder, settings, note):
    report = findings.Report(lambda line: None, facts={"start_iteration": 100})
    chosen = runs.recipe(folder, "useless", "stop_iteration=200", *settings)
    doctor._note_useless_settings(report, chosen)
    assert [line[: len(note or "")] for line in report.remarks] == ([note] if note else [])


def test_each_problem_is_printed_once(folder, tmp_path, capsys):
    wrong = ("init.weights=absent.ckpt", "data.sources=nowhere/else")
    for flags in ([], ["--all"]):
        assert main(["doctor", "demo", *runs.overrides(tmp_path, "new", *wrong), *flags]) == 3
        printed = capsys.readouterr().out
        assert printed.count("absent.ckpt: no such file") == 1
        assert printed.count("NO GO, 2 problems:") == 1
        assert "next: kl-f8-train train" not in printed


def test_a_wrong_setting_is_no_title_and_each_is_a_problem(tmp_path, capsys):
    wrong = ("data.crop=510", "data.shorter_side=384", "seeed=1", "init.weights=absent.ckpt")
    assert main(["doctor", "demo", *runs.overrides(tmp_path, "new", *wrong)]) == 2
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("loading ... settings ... weights ... perceptual network")
    numbers = [line[:4] for line in lines if re.match(r"  \d", line)]
    assert numbers == [f"  {number}." for number in range(1, len(numbers) + 1)]
    assert lines[0] == f"NO GO, {len(numbers)} problems:"
    assert [line for line in lines if line.startswith("    data.shorter_side=384 is")]
    assert lines[-1] == "all settings and figures: the same command with --all"


def test_settings_without_a_value_and_wrong_ones_are_named_together(capsys):
    assert main(["doctor", "single_gpu", "seeed=1", "data.crop=510", "optimizer.eps=-1"]) == 2
    printed = capsys.readouterr().out
    assert "NO GO, 5 problems:" in printed  # the crop is no multiple, and too large
    for text in ("'seeed'", "init.weights=...", "data.crop=510", "optimizer.eps=-1"):
        assert text in printed


def test_a_wrong_setting_hides_no_missing_input_and_no_other_setting(tmp_path, capsys):
    assert main(["doctor", "single_gpu", "data.crop=512", "data.shorter_side=384"]) == 2
    printed = capsys.readouterr().out
    assert "NO GO, 2 problems:" in printed
    assert "init.weights=..." in printed
    assert "data.shorter_side=384 is smaller than data.crop=512" in printed
    wrong = ("init.weights=absent.ckpt", "data.crop=512", "data.shorter_side=384")
    assert main(["doctor", "demo", *runs.overrides(tmp_path, "new", *wrong)]) == 2
    printed = capsys.readouterr().out
    assert "data.shorter_side=384 is smaller than data.crop=512" in printed
    assert "absent.ckpt: no such file" in printed
    assert f"data.sources={tmp_path / 'shards'}: no such file or folder" in printed


def test_every_image_of_a_small_folder_is_read(examined, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(40):
        (photos / f"{number:02}.jpg").write_bytes(samples.encode(samples.noise_picture(number)))
    for number in (5, 17, 39):
        (photos / f"{number:02}.jpg").write_bytes(b"no image")
    enlarging = ("data.crop=32", "data.shorter_side=64")
    found = examined("all", f"data.sources={photos}", "init.weights=absent", *enlarging)[1]
    entry = found["data"]["photos"]
    assert (entry["sampled"], entry["unusable"], entry["enlarged"]) == (40, 3, 37)
    assert "photos: 3 of all 40 images cannot be used, as photos/05.jpg: " in found["remarks"][0]
    assert found["remarks"][0].endswith(", and 2 more")
    small = "photos: 37 of all 40 images are smaller than data.shorter_side=64"
    assert found["remarks"][1].startswith(small)
    found = examined("all", f"data.sources={photos}", "init.weights=absent", "data.crop=48")[1]
    assert found["data"]["photos"]["unusable"] == 3


def test_names_are_printed_without_what_a_terminal_acts_on(examined, tmp_path):
    photos = os.fsencode(tmp_path / "photos")
    os.mkdir(photos)
    names = [b"a\nb.jpg", b"c\x1b[31m\xff.jpg"]
    for number, name in enumerate(names):
        with open(os.path.join(photos, name), "wb") as file:
            file.write(samples.encode(samples.noise_picture(number)))
    with open(os.path.join(photos, b"d\x1b\xff.jpg"), "wb") as file:
        file.write(b"no image")
    pictures = (f"log.pictures={tmp_path / 'photos'}", "log.pictures_every=10")
    inputs = (f"data.sources={tmp_path / 'photos'}", "init.weights=absent", "data.crop=32")
    _, found, printed = examined("names", *inputs, *pictures)
    for text in (printed, *found["remarks"]):
        assert not set("\x1b\udcff") & set(text)
    assert r"a\nb.jpg" in printed
    assert r"as photos/d\x1b\xff.jpg: " in found["remarks"][0]
    assert r"photos/a\nb.jpg" in found["validation"]["common"].values()


def test_an_image_smaller_than_the_crop_cannot_be_used(examined, tmp_path):
    for number, side in enumerate([48] * 8 + [24]):
        picture = samples.encode(samples.noise_picture(number)[:side, :side])
        (tmp_path / f"{number}.jpg").write_bytes(picture)
    found = examined("crop", f"data.sources={tmp_path}", "init.weights=absent")[1]
    assert found["data"][tmp_path.name]["unusable"] == 1
    assert "8.jpg: 24 x 24 pixels, smaller than the 32 x 32 crop" in found["remarks"][0]


def test_a_warning_is_counted_in_the_verdict(folder, capsys):
    tiles = (f"data.sources={folder / 'tiles'}", f"log.pictures={folder / 'tiles'}")
    given = ("log.pictures_every=5", "log.pictures_size=64", "stop_iteration=110", *tiles)
    assert main(["doctor", "demo", *runs.overrides(folder, "warned", *given)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("WARNING: ") for line in lines) == 1
    assert lines[-1] == "GO, with 1 warning"
