"""Scores are right, and depend on images and weights alone: not on order, batches or processes."""

import csv
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import samples
import torch
from PIL import Image
from test_images import wide_gamut
from torch import Tensor

from kl_f8_train import images
from kl_f8_train.__main__ import main
from kl_f8_train.arguments import name_path_select
from kl_f8_train.core import perceptual
from kl_f8_train.core.model import TRAINED
from kl_f8_train.data.pack import pack
from kl_f8_train.errors import MissingInputError, RunFailedError, UsageError
from kl_f8_train.files import file_sha256
from kl_f8_train.run_dir import checkpoint_path
from kl_f8_train.score import evaluate, measure, report, scores, tiled
from kl_f8_train.score.candidates import (
    Candidate,
    load_candidates,
    perturbed,
    posterior_noise,
    reconstruct,
    with_noise,
)
from kl_f8_train.score.image_set import EvaluatedImage, ImageSet
from kl_f8_train.score.inception import FEATURES, Inception
from kl_f8_train.score.measure import Networks
from kl_f8_train.score.protocol import CARD, STANDARD
from kl_f8_train.score.scores import SHIFT_METRICS, ImageScores, Tally
from kl_f8_train.weights import pretrained, weight_file

SIZE = 32
CONDITIONS = {**CARD.describe(), "size": SIZE, "vgg": None, "inception": None}
FILES = ("scores.json", "per_image.csv", "table.md", "pictures.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three VAEs, a and b with one encoder, and 13 photographs, one with an awkward name."""
    folder = tmp_path_factory.mktemp("evaluate")
    a, b, c = (samples.tiny_vae(seed) for seed in (0, 1, 2))
    b.encoder, b.quant_conv = a.encoder, a.quant_conv
    for name, model in zip("abc", (a, b, c), strict=True):
        weight_file.write_safetensors(
            folder / f"{name}.safetensors", model.state_dict(), {"iteration": "7"}
        )
    names = ['an "odd", name', *(f"{number:02d}" for number in range(12))]
    write_photographs(folder / "photos", names)
    write_photographs(folder / "seven", names[1:8])
    (folder / "photos" / "broken.png").write_bytes(b"no image")
    return folder


def write_photographs(folder: Path, names: list[str]) -> None:
    folder.mkdir()
    for seed, name in enumerate(names):
        data = samples.encode(samples.noise_picture(seed, 40, 52), "PNG")
        (folder / f"{name}.png").write_bytes(data)


def run(folder: Path, out: str, *, names="ab", where="photos", **options):
    """evaluate() with the stand-in; what it returned."""
    named = [(name, folder / f"{name}.safetensors", "ema") for name in names]
    options = {"size": SIZE, "perceptual_name": "st_lpips_alex", **options}
    return evaluate.evaluate(named, str(folder / where), folder / out, **options)


@pytest.fixture(scope="module")
def single(folder):
    """The reference: one process, card protocol."""
    return run(folder, "single")


def table_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def loaded(folder: Path, where="photos") -> list[EvaluatedImage]:
    image_set = ImageSet(str(folder / where), SIZE)
    return [image_set.load(index) for index in range(image_set.count)]


def candidates(folder: Path, names="abc") -> list[Candidate]:
    named = [(name, folder / f"{name}.safetensors", "ema") for name in names]
    return load_candidates(named, "cpu")


def stack(some: list[EvaluatedImage]) -> Tensor:
    return torch.stack([sample.image for sample in some])


# --- files ----------------------------------------------------------------------------------


def test_a_broken_shard_is_named_once_for_all_sizes(folder, tmp_path, capsys):
    shards = tmp_path / "shards"
    pack(folder / "photos", shards, per_shard=7, workers=1)
    whole = sorted(shards.glob("*.tar"))[-1]
    (shards / "99999.tar").write_bytes(whole.read_bytes()[:700])
    run(folder, str(tmp_path / "out"), names="a", where=str(shards), size=[SIZE, 2 * SIZE], limit=1)
    assert capsys.readouterr().out.count("99999.tar") == 1


def test_images_of_other_colour_spaces_are_counted(folder, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(3):
        profile = wide_gamut() if number else None
        data = samples.encode(samples.noise_picture(number, 64, 64), "PNG", icc_profile=profile)
        (photos / f"{number}.png").write_bytes(data)
    result = run(folder, str(tmp_path / "out"), names="a", where=str(photos))
    (count,) = result["converted"].values()
    assert count == 2
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["converted"]
    assert "Converted to sRGB, by colour profile: " in scores.footer(result)
    assert run(folder, "none-converted", names="a", limit=1)["converted"] == {}


def test_scores_stand_beside_what_they_depend_on(folder, single):
    result = json.loads((folder / "single" / "scores.json").read_text())
    assert result == single
    assert result["images"] == 13
    assert set(result["models"]) == {"a", "b"}
    for model in result["models"].values():
        assert model["psim"] is model["lpips"] is model["rfid"] is None
        for metric in ("psnr", "ssim", "st_lpips", "sharpness", *SHIFT_METRICS):
            assert set(model[metric]) == {"mean", "std"}
    assert set(result["unmeasured"]) == {"psim", "lpips", "rfid"}
    assert any("broken.png" in warning for warning in result["warnings"])
    assert any("stand-in" in warning for warning in result["warnings"])
    protocol = result["protocol"]
    assert (protocol["name"], protocol["size"], protocol["seed"]) == ("card", SIZE, 0)
    assert protocol["vgg"] is protocol["inception"] is None
    assert torch.__version__.startswith(protocol["versions"]["torch"])
    a, b = (result["weights"][name] for name in "ab")
    assert a["sha256"] == file_sha256(folder / "a.safetensors") != b["sha256"]
    assert a["frozen_sha256"] == b["frozen_sha256"]
    assert (a["path"], a["iteration"], a["base"], b["base"]) == ("a.safetensors", 7, True, False)


def test_means_and_deviations_are_those_of_the_rows(folder, single):
    rows = table_rows(folder / "single" / "per_image.csv")
    assert len(rows) == 2 * 13
    assert [row["image"] for row in rows[:13]] == sorted(row["image"] for row in rows[:13])
    assert 'an "odd", name.png' in {row["image"] for row in rows}
    assert {row["psim"] for row in rows} == {row["lpips"] for row in rows} == {""}
    for name in "ab":
        for metric in ("psnr", "ssim", "st_lpips", "sharpness", "red_shift"):
            values = [float(row[metric]) for row in rows if row["model"] == name]
            summary = single["models"][name][metric]
            assert summary["mean"] == pytest.approx(np.mean(values), rel=1e-5, abs=1e-4)
            assert summary["std"] == pytest.approx(np.std(values, ddof=0), rel=1e-4)


def test_table_has_the_protocol_and_hashes_below(folder, single):
    text = (folder / "single" / "table.md").read_text()
    lines = text.splitlines()
    assert lines[0].startswith("| model | iteration | rFID | PSNR | SSIM | PSIM | LPIPS | ST-LPIPS")
    assert "stand-in" in lines[0]
    assert lines[1].count("---") == lines[0].count("|") - 1
    mean, std = single["models"]["a"]["psnr"].values()
    assert lines[2].startswith(f"| a | 7 | not measured | {mean:.2f} +/- {std:.2f} |")
    for part in ("Protocol card", "posterior sampled, seed 0", "Not measured: PSIM, LPIPS (the st"):
        assert part in text
    for digest in (single["images_sha256"], *(w["sha256"] for w in single["weights"].values())):
        assert digest[:12] in text


def test_pictures_are_exactly_what_was_scored(folder, single):
    rows = {
        (row["model"], row["image"]): row for row in table_rows(folder / "single/per_image.csv")
    }
    entries = json.loads((folder / "single" / "pictures.json").read_text())
    assert [entry["why"][0] for entry in entries[:4]] == ["first"] * 4
    assert any("worst psnr of a" in entry["why"] for entry in entries)
    for entry in entries:
        x = images.decode((folder / "single" / entry["input"]).read_bytes())
        for name, file in entry["models"].items():
            y = images.decode((folder / "single" / file).read_bytes())
            again = measure.score(x[None], y[None])
            for metric in ("psnr", "ssim", "sharpness", "blue_shift"):
                expected = float(rows[name, entry["image"]][metric])
                assert again[metric].item() == pytest.approx(expected, rel=1e-5, abs=1e-4)


def test_pictures_of_an_earlier_evaluation_go(folder):
    run(folder, "twice")
    before = set((folder / "twice" / "pictures").iterdir())
    run(folder, "twice", names="a", limit=2)
    after = set((folder / "twice" / "pictures").iterdir())
    assert {path.name for path in after} == {
        f"000{number}-{what}.png" for number in (0, 1) for what in ("input", "a")
    }
    assert after < before


def test_pieces_of_an_earlier_report_go_and_nothing_else(folder):
    out = folder / "pieces"
    run(folder, "pieces")
    report.write_comparison(out, "a", "b")
    report.write(out)
    foreign = [out / part / "2024-holiday.png" for part in ("pictures", "zooms", "errors")]
    for path in foreign:
        path.touch()
    run(folder, "pieces", names="a", limit=2)
    report.write(out)
    assert not (out / "comparison.json").exists()
    assert all(path.is_file() for path in foreign)
    for part, models in (("pictures", "ia"), ("zooms", "ia"), ("errors", "a")):
        found = [path.name for path in (out / part).iterdir() if path not in foreign]
        assert sorted(name[5] for name in found) == sorted(models * 2)


def row(index: int, *scores: float) -> ImageScores:
    return ImageScores(index, f"{index:02d}.png", "", 0.0, np.array([scores]))


def test_worst_median_and_best_are_chosen():
    rows = [row(index, value, -value) for index, value in enumerate([5, 6, 7, 8, 1, math.inf, 3])]
    chosen = scores.choose_pictures(rows, ["m"], ["psnr", "lpips"])
    assert {place for place, why in chosen.items() if "worst psnr of m" in why} == {4}
    assert {place for place, why in chosen.items() if "best psnr of m" in why} == {5}
    assert {place for place, why in chosen.items() if "median psnr of m" in why} == {1}
    assert {place for place, why in chosen.items() if "best lpips of m" in why} == {5}
    assert [place for place, why in chosen.items() if "first" in why] == [0, 1, 2, 3]


def test_pictures_are_few():
    random = np.random.RandomState(0)
    names = [f"model {number}" for number in range(10)]
    rows = [ImageScores(i, str(i), "", 0.0, random.normal(size=(10, 2))) for i in range(500)]
    chosen = scores.choose_pictures(rows, names, ["psnr", "ssim"])
    assert len(chosen) == scores.PICTURES
    assert list(chosen) == sorted(chosen)


def test_pictures_of_two_models_have_two_names():
    made = scores.slugs(["ft EMA", "ft-EMA", "input", "|", "a-1", "a", "A", "Input"])
    expected = ["ft-ema", "ft-ema-1", "input-1", "model", "a-1", "a", "a-2", "input-2"]
    assert made == expected
    long = scores.slugs(["x" * 300, "x" * 301])
    assert len(set(long)) == 2
    assert max(map(len, long)) < 80


def test_infinite_psnr_is_left_out_of_the_mean_and_written_as_inf(folder):
    rows = [row(0, 20.0, 0.5), row(1, math.inf, 1.0), row(2, 22.0, 0.5)]
    for item in rows:
        item.scores = np.pad(item.scores, ((0, 0), (0, 5)))
    tally = Tally(Networks().measured, rows)
    weights = {"a": {"iteration": None, "path": "a", "sha256": "0"}}
    result = scores.summarise(tally, weights, CONDITIONS, {}, "x")
    assert result["models"]["a"]["psnr"] == {"mean": 21.0, "std": 1.0}
    assert any("1 infinite PSNR" in warning for warning in result["warnings"])
    scores.write_scores(folder / "infinite", result, tally)
    written = table_rows(folder / "infinite" / "per_image.csv")
    assert [line["psnr"] for line in written] == ["20", "inf", "22"]
    assert scores.mean_std([math.inf]) is None
    only = scores.summarise(Tally(tally.measured, rows[1:2]), weights, CONDITIONS, {}, "x")
    assert only["models"]["a"]["psnr"] is None
    assert only["unmeasured"]["psnr"] == "infinite: every reconstruction by a equals its input"
    assert "psnr" not in result["unmeasured"]


# --- right ----------------------------------------------------------------------------------


def photograph(name: str) -> Tensor:
    return torch.from_numpy(samples.photograph(name)[64:192, 96:224].copy()).permute(2, 0, 1)


def pair() -> tuple[Tensor, Tensor]:
    """uint8 (1, 3, 128, 128): a photograph and a coarse copy."""
    x = photograph("astronaut")[None]
    return x, (x // 24 * 24 + 5).clamp(max=255)


def test_standard_scores_are_skimage_s():
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    x, y = pair()
    ours = measure.score(x, y, STANDARD.border)
    x01, y01 = (image[0].permute(1, 2, 0).numpy() / 255.0 for image in (x, y))
    expected = structural_similarity(
        x01,
        y01,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=1,
        channel_axis=2,
    )
    assert ours["ssim"].item() == pytest.approx(expected, abs=1e-6)
    expected = peak_signal_noise_ratio(x01, y01, data_range=1)
    assert ours["psnr"].item() == pytest.approx(expected, abs=1e-6)


@torch.no_grad()
def test_psim_restated_in_float64(vgg, vgg_file):
    """The sum over five layers of 1 - the mean cosine between the features at each place."""
    x, y = pair()
    ours = measure.score(x, y, network=perceptual.lpips_vgg(*pretrained.vgg_features(vgg_file)))
    layers = [vgg.trunk(vgg.scaling(image.double() / 127.5 - 1)) for image in (x, y)]
    expected = 0.0
    for a, b in zip(*layers, strict=True):
        cosine = (a * b).sum(1) / (a.square().sum(1).sqrt() * b.square().sum(1).sqrt() + 1e-30)
        both_zero = (a == 0).all(1) & (b == 0).all(1)
        expected += 1 - torch.where(both_zero, 1.0, cosine).mean().item()
    assert expected > 0.01
    assert ours["psim"].item() == pytest.approx(expected, abs=1e-6)


def test_protocols_differ_where_they_say(folder):
    group, some = candidates(folder, "a"), loaded(folder)[:2]
    batch, keys = stack(some), [sample.key for sample in some]
    model = group[0].model
    with torch.no_grad():
        posterior = model.encode(images.to_float(batch))
        mode = (model.decode(posterior.mean).clamp(-1, 1) + 1) / 2 * 255
        noise = posterior_noise(keys, posterior.mean)
        sampled = (model.decode(posterior.sample(noise)).clamp(-1, 1) + 1) / 2 * 255
    (standard,) = reconstruct(group, batch, keys, STANDARD)
    (card,) = reconstruct(group, batch, keys, CARD)
    assert (standard.double() - mode.double().round()).abs().max() <= 1  # at .5, by float32
    assert (standard != mode.round().byte()).float().mean() < 1e-3
    assert (card != sampled.floor().byte()).float().mean() < 1e-3
    assert CARD.describe()["posterior"] == "sampled"
    assert STANDARD.describe()["seed"] is None


def test_noise_follows_from_seed_and_name_alone():
    like = torch.zeros(3, 4, 2, 2)
    noise = posterior_noise(["a", "b", "c"], like)
    assert torch.equal(noise.flip(0), posterior_noise(["c", "b", "a"], like))
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(noise, posterior_noise(["a", "b", "c"], like, seed=1))


def test_frechet_is_that_of_torch_fidelity(folder, inception_file, tmp_path):
    """On the same features; see the slow test for the whole way."""
    network = Inception(inception_file)
    features = network(stack(loaded(folder)[1:3]))
    assert features.shape == (2, FEATURES)
    theirs = network.network(stack(loaded(folder)[1:3]))[0]
    assert torch.equal(features, theirs)
    assert features.std() > 0


@pytest.mark.slow
def test_rfid_is_torch_fidelity_s(folder, inception_file):
    """The PNG folders of an evaluation, by torch-fidelity's own command, with the same weights."""
    from torch_fidelity import calculate_metrics

    result = run(folder, "rfid", names="a", where="seven", inception=str(inception_file))
    assert "rfid" not in result["unmeasured"]
    assert any("biased" in warning for warning in result["warnings"])
    assert result["protocol"]["inception"]
    entries = json.loads((folder / "rfid" / "pictures.json").read_text())
    some = loaded(folder, "seven")
    group = candidates(folder, "a")
    for sample in some:
        (output,) = reconstruct(group, sample.image[None], [sample.key])
        for kind, image in (("x", sample.image), ("y", output[0])):
            path = folder / "rfid" / kind / sample.key
            path.parent.mkdir(exist_ok=True)
            images.to_pil(image).save(path)
    assert len(entries) <= len(some) == 7
    theirs = calculate_metrics(
        input1=str(folder / "rfid" / "y"),
        input2=str(folder / "rfid" / "x"),
        fid=True,
        cuda=False,
        batch_size=3,
        verbose=False,
        feature_extractor_weights_path=str(inception_file),
    )["frechet_inception_distance"]
    assert result["models"]["a"]["rfid"] == pytest.approx(theirs, rel=1e-3)


# --- order, batches, processes --------------------------------------------------------------


def measured(group, some: list[EvaluatedImage], batch_size: int) -> Tally:
    networks = Networks(pretrained.build("st_lpips_alex"))
    return measure.measure(group, networks, CARD, some, device="cpu", batch_size=batch_size)


def test_batches_do_not_change_a_printed_digit(folder):
    """evaluate() takes one image at a time on a CPU; a GPU's batches are tried here on a CPU."""
    group, some = candidates(folder, "ab"), [s for s in loaded(folder) if s.image is not None]
    tables = []
    for size, ordered in ((1, some), (3, some), (8, some[::-1])):
        tally = measured(group, ordered, size)
        assert [r.key for r in tally.rows] == [s.key for s in ordered]
        weights = {candidate.name: candidate.record for candidate in group}
        result = scores.summarise(tally, weights, CONDITIONS, {}, "x")
        tables.append(scores.table(result))
    assert tables[0] == tables[1] == tables[2]
    assert tables[0].count("not measured") == 6


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_no_black_image(folder, value):
    group, some = candidates(folder, "ab"), loaded(folder, "seven")[:3]
    decoder = group[1].model.decoder
    original = decoder.forward
    seen: list[Tensor] = []

    def broken(latents: Tensor) -> Tensor:
        """The second image has one bad value."""
        seen.append(latents)
        output = original(latents)
        output[0, 1, 5, 5] = value if len(seen) == 2 else 0.0
        return output

    decoder.forward = broken
    with pytest.raises(RunFailedError, match=f"^b: decodes {some[1].key} to values that are not"):
        measured(group, some, 1)
    assert len(seen) == 2


def test_order_does_not_change_a_bit(folder):
    group, some = candidates(folder, "ac"), [s for s in loaded(folder) if s.image is not None]
    forward = {r.key: r for r in measured(group, some, 1).rows}
    backward = {r.key: r for r in measured(group, some[::-1], 1).rows}
    assert forward.keys() == backward.keys()
    assert len(forward) == 13
    for key in forward:
        assert np.array_equal(forward[key].scores, backward[key].scores)
    assert scores.images_sha256(list(forward.values())) == scores.images_sha256(
        list(backward.values())
    )


def test_batch_size_means_nothing_on_a_cpu(folder, single):
    run(folder, "batches", batch_size=5)
    for file in FILES:
        assert (folder / "batches" / file).read_bytes() == (folder / "single" / file).read_bytes()


def start(folder: Path, out: str, *arguments: str, launcher=(), more=(), **environment: str):
    """`kl-f8-train evaluate` as a real process."""
    return subprocess.Popen(
        [
            *(launcher or (sys.executable,)),
            *("-m", "kl_f8_train", "evaluate", *arguments, "--out", str(folder / out)),
            *("--size", str(SIZE), "--perceptual", "st_lpips_alex", *more),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


@pytest.mark.slow
@pytest.mark.parametrize(("where", "count"), [("seven", 7), ("photos", 13)])
def test_two_processes_write_the_files_of_one(folder, where, count):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun's processes have; more of them round differently
    run(folder, f"one-{where}", where=where)
    torch.set_num_threads(threads)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    weights = [f"{name}={folder / name}.safetensors" for name in "ab"]
    process = start(
        folder, f"two-{where}", *weights, "--images", str(folder / where), launcher=torchrun
    )
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 0, output
    names = [entry["image"] for entry in table_rows(folder / f"two-{where}" / "per_image.csv")]
    assert len(names) == 2 * count
    assert len(set(names)) == count
    pictures = sorted(
        path.relative_to(folder / f"one-{where}")
        for path in (folder / f"one-{where}").rglob("*.png")
    )
    for file in (*FILES, *pictures):
        one, two = (folder / f"{kind}-{where}" / file for kind in ("one", "two"))
        assert one.read_bytes() == two.read_bytes(), file


@pytest.mark.slow
@pytest.mark.parametrize(
    ("other", "said"),
    [("absent", "no such file"), ("b", "the processes see different weights")],
)
def test_a_rank_that_fails_ends_all(folder, free_port, other, said):
    began = time.monotonic()
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port), "WORLD_SIZE": "2"}
    running = [
        start(
            folder,
            "failed",
            f"a={folder / name}.safetensors",
            "--images",
            str(folder / "photos"),
            **place,
            RANK=str(rank),
        )
        for rank, name in enumerate(("a", other))
    ]
    outputs = [process.communicate(timeout=120)[0] for process in running]
    assert all(process.returncode != 0 for process in running), outputs
    assert said in outputs[1]
    assert time.monotonic() - began < 100
    assert not list((folder / "failed").glob("*"))


@pytest.fixture
def free_port():
    import socket

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


# --- work is done once ----------------------------------------------------------------------


def test_equal_encoders_encode_once(folder):
    group = candidates(folder)
    a, b, c = (candidate.model for candidate in group)
    assert a.encoder is b.encoder is not c.encoder
    calls = {"encoder": 0, "decoder": 0}
    modules = [(a.encoder, "encoder"), (c.encoder, "encoder")]
    modules += [(model.decoder, "decoder") for model in (a, b, c)]
    for module, kind in modules:
        module.register_forward_hook(lambda *_, kind=kind: calls.update({kind: calls[kind] + 1}))
    some = loaded(folder)[:3]
    outputs = list(reconstruct(group, stack(some), [s.key for s in some]))
    assert calls == {"encoder": 2, "decoder": 3}
    alone = list(reconstruct(candidates(folder, "b"), stack(some), [s.key for s in some]))
    assert torch.equal(outputs[1], alone[0])


def test_an_image_is_decoded_once_and_its_features_computed_once(folder, monkeypatch):
    decoded: list[int] = []
    picture = images.picture
    monkeypatch.setattr(images, "picture", lambda data: decoded.append(1) or picture(data))
    group, network = candidates(folder), pretrained.build("st_lpips_alex")
    seen: list[int] = []
    network.trunk.register_forward_hook(lambda *_: seen.append(1))
    image_set = ImageSet(str(folder / "seven"), SIZE)
    samples_ = image_set.stream(range(7), threads=2)
    measure.measure(group, Networks(network), CARD, samples_, device="cpu", batch_size=1)
    assert len(decoded) == 7
    assert len(seen) == 7 * (1 + 3)


def test_images_are_decoded_only_a_little_ahead(folder, monkeypatch):
    asked: list[int] = []
    image_set = ImageSet(str(folder / "seven"), SIZE)
    load = image_set.load
    monkeypatch.setattr(image_set, "load", lambda index: asked.append(index) or load(index % 7))
    stream = image_set.stream(range(1000), threads=2)
    for _ in range(3):
        next(stream)
    assert len(asked) <= 3 + 4 * 2
    stream.close()


# --- what there is to evaluate --------------------------------------------------------------


def test_shards_give_the_scores_of_their_images(folder):
    shards = samples.packed(folder / "shards", 6, per_shard=3)
    result = run(folder, "from-shards", where="shards", names="a")
    assert result["images"] == 6
    keys = [entry["image"] for entry in table_rows(folder / "from-shards" / "per_image.csv")]
    assert [key.split("/")[0] for key in keys] == ["00000.tar"] * 3 + ["00001.tar"] * 3
    listed = folder / "backwards.txt"
    listed.write_text("".join(f"{path}\n" for path in reversed(shards)))
    backwards = run(folder, "backwards", where=listed.name, names="a")
    assert backwards["images_sha256"] == result["images_sha256"]
    assert scores.table(backwards) == scores.table(result)


def test_pictures_of_a_former_evaluation_are_no_images(folder, tmp_path, capsys):
    photos = shutil.copytree(folder / "photos", tmp_path / "photos")
    count = ImageSet(str(photos), SIZE).count
    shutil.copytree(folder / "photos", photos / "deep" / "out")
    (tmp_path / "link").symlink_to(photos)
    for out in (photos / "deep" / "out", tmp_path / "link" / "deep"):
        assert ImageSet(str(photos), SIZE, out=out).count == count
    assert ImageSet(str(photos), SIZE, out=tmp_path).count == 2 * count
    with pytest.raises(MissingInputError, match="no images but those of --out"):
        ImageSet(str(photos / "deep"), SIZE, out=photos / "deep" / "out")
    given = ["--images", str(photos), "--out", str(tmp_path / "link")]
    assert main(["evaluate", "kl_f8_mini", *given]) == 2
    assert "is the folder of --images" in capsys.readouterr().err


def test_equal_names_in_two_sources_stay_apart(folder):
    for source, seed in (("one", 0), ("other", 1)):
        data = samples.encode(samples.noise_picture(seed), "PNG")
        samples.write_tar(folder / "same" / source / "00000.tar", {"000.png": data})
    pattern = "same/{one,other}/00000.tar"
    run(folder, "same-names", where=pattern, names="a")
    rows = table_rows(folder / "same-names" / "per_image.csv")
    assert [entry["image"] for entry in rows] == ["00000.tar/000.png", "00000.tar/000.png (2)"]
    assert rows[0]["psnr"] != rows[1]["psnr"]


def test_images_are_resized_and_cut_in_the_centre(tmp_path):
    picture = samples.photograph("chelsea")
    (tmp_path / "a.png").write_bytes(samples.encode(picture, "PNG"))
    sample = ImageSet(str(tmp_path), 64).load(0)
    resized = images.resize_shorter(torch.from_numpy(picture.copy()).permute(2, 0, 1), 64)
    assert resized.shape == (3, 64, 96)
    assert torch.equal(sample.image, resized[:, :, 16:80])


def test_nothing_usable_is_missing_input(folder, tmp_path):
    (tmp_path / "x.png").write_bytes(b"no image")
    with pytest.raises(MissingInputError, match=r"no image of .* can be used: x.png"):
        evaluate.evaluate(
            [("a", folder / "a.safetensors", "ema")], str(tmp_path), tmp_path / "out", size=SIZE
        )
    with pytest.raises(UsageError, match="multiple of 2"):
        run(folder, "odd", size=33)


def test_without_networks_the_rest_is_measured(folder, capsys, monkeypatch):
    monkeypatch.setenv("KL_F8_TRAIN_CACHE", str(folder / "empty"))
    monkeypatch.setenv("TORCH_HOME", str(folder / "empty"))
    result = run(folder, "without", perceptual_name="lpips_vgg", limit=2)
    assert result["models"]["a"]["lpips"] is result["models"]["a"]["psim"] is None
    assert result["models"]["a"]["psnr"]["mean"] > 0
    vgg, inception = "VGG16's features not found", "Inception of 2015-12-05 not found"
    assert result["unmeasured"] == {"psim": vgg, "lpips": vgg, "rfid": inception}
    assert "st_lpips" not in result["models"]["a"]
    output = capsys.readouterr().out
    assert f"not measured: PSIM, LPIPS: {vgg}; run `kl-f8-train fetch` once" in output
    assert f"not measured: rFID: {inception}; run `kl-f8-train fetch` once" in output
    assert output.count("kl-f8-train fetch") == 2  # the table below has the reasons alone
    assert output.lower().count("not measured") == 2  # once a network, and no empty columns
    assert "| model | iteration | PSNR | SSIM | sharpness |" in output
    assert f"Not measured: PSIM, LPIPS ({vgg}).\n" in (folder / "without/table.md").read_text()
    assert str(folder / "empty") in output


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"vgg": "absent"}, "absent"),
        ({"inception": "absent"}, "absent"),
        ({"where": "nothing"}, "no images"),
        ({"where": "nothing", "size": [SIZE, 2 * SIZE]}, "no images"),
    ],
)
def test_what_is_missing_is_said_before_what_is_not_measured(
    folder, capsys, monkeypatch, wrong, said
):
    monkeypatch.setenv("KL_F8_TRAIN_CACHE", str(folder / "empty"))
    monkeypatch.setenv("TORCH_HOME", str(folder / "empty"))
    (folder / "nothing").mkdir(exist_ok=True)
    with pytest.raises(MissingInputError, match=said):
        run(folder, "alone", perceptual_name="lpips_vgg", **wrong)
    assert capsys.readouterr().out == ""


def test_a_place_that_cannot_be_written_is_said_before_what_is_not_measured(folder, capsys):
    with pytest.raises(RunFailedError, match="cannot write in"):
        run(folder, "a.safetensors/out")
    assert capsys.readouterr().out == ""


def test_vgg_gives_lpips_and_psim(folder, vgg_file):
    result = run(folder, "vgg", perceptual_name="lpips_vgg", vgg=str(vgg_file), limit=2)
    model = result["models"]["a"]
    assert model["lpips"]["mean"] > 0 < model["psim"]["mean"]
    assert "st_lpips" not in model
    assert len(result["protocol"]["vgg"]) == 64
    assert result["protocol"]["perceptual"] == "LPIPS on a VGG16 that is not the published one"
    assert [w for w in result["warnings"] if "cannot be compared with published scores" in w]
    with Image.open(folder / "vgg" / "pictures" / "0000-a.png") as picture:
        assert picture.size == (SIZE, SIZE)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("runs/ft_ema", ("ft_ema", "runs/ft_ema", "ema")),
        ("runs/ft_ema@raw", ("ft_ema@raw", "runs/ft_ema", "raw")),
        ("ft-EMA=a=b.ckpt", ("ft-EMA", "a=b.ckpt", "ema")),
        ("x, raw=runs/x@raw", ("x, raw", "runs/x", "raw")),
        ("/tmp/a=b/x.pt", ("x", "/tmp/a=b/x.pt", "ema")),
        ("org/sd-v1.5", ("sd-v1.5", "org/sd-v1.5", "ema")),
        (
            "vae-ft-mse-840000-ema-pruned.vae.pt@raw",
            ("vae-ft-mse-840000-ema-pruned@raw", "vae-ft-mse-840000-ema-pruned.vae.pt", "raw"),
        ),
    ],
)
def test_how_weights_are_named(text, expected):
    name, path, select = name_path_select(text)
    assert (name, str(path), select) == expected


def test_a_directory_keeps_its_whole_name(tmp_path, monkeypatch):
    (tmp_path / "r 1.5").mkdir()
    (tmp_path / "r.pt").mkdir()
    (tmp_path / "r.ckpt").touch()
    names = [name_path_select(str(tmp_path / name))[0] for name in ("r 1.5", "r.pt", "r.ckpt")]
    assert names == ["r 1.5", "r.pt", "r"]
    monkeypatch.chdir(tmp_path / "r 1.5")
    assert name_path_select(".")[0] == "r 1.5"


def test_a_run_has_ema_and_raw_weights(folder):
    averaged, raw = samples.tiny_vae(0), samples.tiny_vae(1)
    raw.encoder, raw.quant_conv = averaged.encoder, averaged.quant_conv
    state = {f"autoencoder.{k}": v for k, v in raw.state_dict().items()}
    state |= {f"ema.{k}": v for k, v in averaged.state_dict().items() if k.split(".")[0] in TRAINED}
    path = checkpoint_path(folder / "run", 9)
    weight_file.write_safetensors(path, state, {"iteration": "9"})
    named = [("ema", folder / "run", "ema"), ("raw", folder / "run", "raw")]
    ema, other = load_candidates(named, "cpu")
    for candidate, model in ((ema, averaged), (other, raw)):
        assert candidate.record["iteration"] == 9
        assert torch.equal(candidate.model.last_layer, model.last_layer)
    assert (ema.record["select"], other.record["select"]) == ("ema", "raw")
    assert ema.record["frozen_sha256"] == other.record["frozen_sha256"]


# --- noise on the latents -------------------------------------------------------------------


def test_noise_follows_from_image_and_sigma_and_is_shared_by_all_vaes():
    z = torch.randn(3, 4, 5, 7, generator=torch.Generator().manual_seed(0))
    scales = torch.tensor([1.0, 3.0, 0.2]).view(3, 1, 1, 1)
    keys = ["a", "b", "c"]

    def draw(latents: Tensor, names: list[str], sigma: float) -> Tensor:
        noisy = with_noise(latents, names, sigma)
        return (noisy - latents) / (sigma * latents.std(dim=(1, 2, 3), keepdim=True))

    first = draw(z, keys, 0.4)
    assert torch.equal(with_noise(z, keys, 0.0), z)
    torch.testing.assert_close(draw(2 * z * scales + 5, keys, 0.4), first, atol=1e-4, rtol=0)
    torch.testing.assert_close(draw(z.flip(0), keys[::-1], 0.4).flip(0), first, atol=1e-5, rtol=0)
    assert (draw(z, keys, 0.2) - first).abs().max() > 1  # another draw, not a part of this one
    assert (first[0] - first[1]).abs().max() > 1
    assert abs(first.mean().item()) < 0.2
    assert abs(first.std().item() - 1) < 0.15


def test_a_row_for_each_vae_and_sigma(folder, single, capsys):
    result = run(folder, "noisy", latent_noise=(0, 0.1, 0.4), compared=("a", "b"))
    assert "\nImage by image, mean difference and 95 % interval:\n" in capsys.readouterr().out
    noisy = [f"{name}, sigma {sigma}" for sigma in ("0.1", "0.4") for name in "ab"]
    assert list(result["models"]) == ["a", "b", *noisy]
    for name in "ab":
        assert result["models"][name] == single["models"][name]
        assert result["weights"][name] == single["weights"][name]
        means = [result["models"][n]["psnr"]["mean"] for n in result["models"] if n[0] == name]
        assert means[0] != means[1] != means[2]
    record = result["weights"]["b, sigma 0.4"]
    assert (record["vae"], record["latent_noise"], record["base"]) == ("b", 0.4, False)
    assert record["sha256"] == result["weights"]["b"]["sha256"]
    table = (folder / "noisy" / "table.md").read_text()
    assert table.startswith("| model | iteration | sigma | rFID |")
    assert "\n| b | 7 | 0.4 | not measured |" in table
    assert "sigma std(z) e" in table
    assert table.count("b.safetensors") == 1


def test_what_is_scored_at_a_sigma_is_what_it_decodes(folder):
    run(folder, "noisy-mode", latent_noise=(0.3,), protocol=STANDARD, where="seven")
    sample = loaded(folder, "seven")[2]
    model = candidates(folder, "b")[0].model
    with torch.no_grad():
        z = model.encode(images.to_float(sample.image[None])).mean
        noisy = with_noise(z, [sample.key], 0.3)
        again = measure.score(
            sample.image[None], images.to_uint8(model.decode(noisy)), STANDARD.border
        )
    rows = table_rows(folder / "noisy-mode" / "per_image.csv")
    (row,) = [r for r in rows if (r["model"], r["image"]) == ("b, sigma 0.3", sample.key)]
    assert float(row["psnr"]) == pytest.approx(again["psnr"].item(), abs=1e-3)
    entries = json.loads((folder / "noisy-mode" / "pictures.json").read_text())
    assert not any("sigma" in why for entry in entries for why in entry["why"])
    assert {"b, sigma 0.3"} < set(entries[0]["models"])
    assert report.write(folder / "noisy-mode").is_file()


def test_verdicts_are_paired_at_the_same_sigma(folder, capsys):
    run(folder, "noisy-compared", latent_noise=(0.4,), compared=("a", "b"))
    found = json.loads((folder / "noisy-compared" / "comparison.json").read_text())
    assert {v["sigma"] for v in found["verdicts"]} == {0.0}
    assert {v["sigma"] for v in found["latent_noise"]} == {0.4}
    rows = table_rows(folder / "noisy-compared" / "per_image.csv")
    values = {
        name: np.array([float(r["psnr"]) for r in rows if r["model"] == name])
        for name in ("a, sigma 0.4", "b, sigma 0.4")
    }
    (psnr,) = [v for v in found["latent_noise"] if v["metric"] == "psnr"]
    expected = (values["b, sigma 0.4"] - values["a, sigma 0.4"]).mean()
    assert psnr["difference"] == pytest.approx(expected, abs=1e-4)
    assert psnr["text"] in capsys.readouterr().out
    assert psnr["text"].startswith("At sigma 0.4: ")


def test_a_name_that_a_sigma_takes_is_refused(folder):
    named = [
        ("a", folder / "a.safetensors", "ema"),
        ("a, sigma 1", folder / "b.safetensors", "ema"),
    ]
    loaded_ = load_candidates(named, "cpu")
    with pytest.raises(UsageError, match="a, sigma 1 is the name of a row of --latent-noise"):
        perturbed(loaded_, [1.0])


# --- sizes ----------------------------------------------------------------------------------


def test_each_size_is_an_evaluation_of_its_own(folder, single):
    results = run(folder, "sizes", size=[SIZE, 64])
    assert results[str(SIZE)] == single
    for file in FILES:
        assert (folder / f"sizes/{SIZE}" / file).read_bytes() == (
            folder / "single" / file
        ).read_bytes()
    assert results["64"]["protocol"]["size"] == 64
    assert results["64"]["images_sha256"] != single["images_sha256"]
    with Image.open(folder / "sizes/64/pictures/0000-a.png") as picture:
        assert picture.size == (64, 64)
    said = "13 images of 13 had fewer than 64 pixels and were enlarged"
    assert any(said in warning for warning in results["64"]["warnings"])
    assert not any("enlarged" in warning for warning in single["warnings"])


def test_a_size_that_does_not_divide_is_refused_before_any_is_scored(folder):
    with pytest.raises(UsageError, match="--size 33"):
        run(folder, "odd-sizes", size=[SIZE, 33])
    assert not (folder / "odd-sizes").exists()


@pytest.mark.parametrize(
    ("size", "batch"), [(64, 16), (256, 16), (512, 4), (768, 1), (1024, 1), (2048, 1)]
)
def test_larger_images_come_fewer_at_a_time(size, batch):
    assert evaluate.batch_of(16, size) == batch


def test_tall_and_wide_pictures_are_cut_to_squares(folder):
    (folder / "shapes").mkdir()
    for number, (height, width) in enumerate([(16, 900), (900, 16), (70, 200), (200, 70)]):
        data = samples.encode(samples.noise_picture(number, height, width), "PNG")
        (folder / "shapes" / f"{number}.png").write_bytes(data)
    results = run(folder, "of-shapes", where="shapes", size=[SIZE, 64], latent_noise=(0.2,))
    for size, enlarged in ((str(SIZE), 2), ("64", 2)):
        assert results[size]["images"] == 4
        (warning,) = [w for w in results[size]["warnings"] if "enlarged" in w]
        assert warning.startswith(f"{enlarged} images of 4")


# --- tiles ----------------------------------------------------------------------------------


def test_tiled_decoding_is_measured_beside_the_scores(folder):
    result = run(folder, "tiled", where="seven", tile=16, with_baselines=True, latent_noise=(0.2,))
    assert result["tiled"]["tile"] == 16
    assert set(result["tiled"]["models"]) == {"a", "b"}
    model, some = candidates(folder, "b")[0].model, loaded(folder, "seven")
    values = []
    for sample in some:
        with torch.no_grad():
            posterior = model.encode(images.to_float(sample.image[None]))
            z = posterior.sample(posterior_noise([sample.key], posterior.mean))
        decodes = tiled.tiled_decodes(model.decode, z, 16, 2)
        values.append(tiled.seams(sample.image[None].double() / 255, decodes)["diffusers"])
    found = result["tiled"]["models"]["b"]["diffusers"]
    assert found["psnr"] == pytest.approx(np.mean([v.psnr for v in values]), abs=1e-3)
    assert found["lowest_psnr"] == pytest.approx(min(v.psnr for v in values), abs=1e-3)
    assert found["largest_difference"] == pytest.approx(max(v.largest for v in values), abs=1e-2)
    assert found["worst_image"] == some[int(np.argmin([v.psnr for v in values]))].key
    text = (folder / "tiled" / "table.md").read_text()
    assert f"| b | diffusers | {found['psnr']:.2f} | {found['lowest_psnr']:.2f} |" in text
    assert json.loads((folder / "tiled" / "scores.json").read_text()) == result


@pytest.mark.parametrize(
    ("tile", "said"), [(12, "multiple of 8 pixels"), (4, "multiple of 8"), (64, "fit in one tile")]
)
def test_tiles_that_make_no_sense_are_refused(folder, tile, said):
    with pytest.raises(UsageError, match=f"--tiled {tile}: .*{said}"):
        run(folder, "no-tiles", tile=tile)


@pytest.mark.slow
def test_two_processes_measure_noise_sizes_and_tiles_as_one(folder):
    arguments = ["--latent-noise", "0.2", "--tiled", "16", "--size", f"{SIZE},64"]
    weights = [f"{name}={folder / name}.safetensors" for name in "ab"]
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    images_ = ["--images", str(folder / "seven")]
    for out, launcher in (("one-more", ()), ("two-more", torchrun)):
        process = start(folder, out, *weights, *images_, launcher=launcher, more=arguments)
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output
    for size in (str(SIZE), "64"):
        for file in FILES:
            one, two = (folder / out / size / file for out in ("one-more", "two-more"))
            assert one.read_bytes() == two.read_bytes(), file
