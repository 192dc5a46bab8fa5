"""Saved latents are decoded by every VAE as their maker's program would decode them."""

import csv
import json

import numpy as np
import pytest
import samples
import torch
from safetensors.torch import save_file

from kl_f8_train import images
from kl_f8_train.__main__ import main
from kl_f8_train.core import metrics
from kl_f8_train.errors import MissingInputError, RunFailedError, UsageError
from kl_f8_train.score import generated
from kl_f8_train.weights import weight_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two VAEs of one scale, and latents of three formats and two shapes."""
    folder = tmp_path_factory.mktemp("generated")
    for seed, name in enumerate("ab"):
        weight_file.write_safetensors(
            folder / f"{name}.safetensors",
            samples.tiny_vae(seed).state_dict(),
            {"kl_f8_train.scaling_factor": "0.5"},
        )
    (folder / "latents" / "deep").mkdir(parents=True)
    random = torch.Generator().manual_seed(1)
    z = [torch.randn(1, 4, 16, 16, generator=random) for _ in range(3)]
    z[2] = torch.randn(1, 4, 16, 20, generator=random)
    marker = {"latent_format_version_0": torch.tensor([])}
    save_file({"latent_tensor": z[0], **marker}, folder / "latents" / "0.latent")
    np.save(folder / "latents" / "deep" / "1.npy", (z[1] * 0.5).numpy())
    save_file({"latent_tensor": z[2] * 0.18215}, folder / "latents" / "2.latent")
    return folder, dict(zip(("0.latent", "deep/1.npy", "2.latent"), z, strict=True))


def run(folder, out: str, **options):
    named = [(name, folder / f"{name}.safetensors", "ema") for name in "ab"]
    options = {"scaled": "yes", "perceptual_name": "st_lpips_alex", **options}
    return generated.evaluate_latents(named, str(folder / "latents"), folder / out, **options)


@pytest.fixture(scope="module")
def found(folder):
    return run(folder[0], "out")


def test_pictures_are_what_the_decoder_makes_of_the_unscaled_latents(folder, found):
    place, z = folder
    entries = json.loads((place / "out" / "decoded.json").read_text())["pictures"]
    assert [entry["latent"] for entry in entries] == list(dict(sorted(z.items())))
    for entry in entries:
        for name in "ab":
            model = weight_file.load_autoencoder(place / f"{name}.safetensors")
            with torch.no_grad():
                expected = images.to_uint8(model.decode(z[entry["latent"]]), "floor")[0]
            shown = images.decode((place / "out" / entry["models"][name]).read_bytes())
            assert (shown.int() - expected.int()).abs().max() <= 1  # 0.18215 z / 0.18215 rounds
            assert (shown != expected).double().mean() < 0.01
        assert list(entry["differences"]) == ["b"]
    assert (place / "out" / "strip.png").is_file()


def test_scores_are_those_of_the_pictures(folder, found):
    place, _ = folder
    with (place / "out" / "per_latent.csv").open(newline="") as file:
        rows = {(row["model"], row["latent"]): row for row in csv.DictReader(file)}
    assert len(rows) == 6
    pairs = []
    for entry in found["pictures"]:
        shown = {
            name: images.decode((place / "out" / path).read_bytes())[None].double() / 255
            for name, path in entry["models"].items()
        }
        pairs.append(float(metrics.psnr(shown["a"], shown["b"])))
        for name, image in shown.items():
            row = rows[name, entry["latent"]]
            assert float(row["sharpness"]) == pytest.approx(
                float(metrics.sharpness(image)), rel=1e-4
            )
            assert float(row["red"]) == pytest.approx(255 * float(image[:, 0].mean()), rel=1e-4)
            spread = image.amax(1) - image.amin(1)
            assert float(row["saturation"]) == pytest.approx(255 * float(spread.mean()), rel=1e-4)
    (pair,) = found["pairs"]
    assert (pair["a"], pair["b"]) == ("a", "b")
    assert pair["psnr"]["mean"] == pytest.approx(np.mean(pairs), rel=1e-6)
    assert pair["st_lpips"]["mean"] > 0
    red = [np.mean([float(r["red"]) for (m, _), r in rows.items() if m == name]) for name in "ab"]
    assert pair["red_shift"]["mean"] == pytest.approx(red[1] - red[0], abs=1e-3)


def test_the_screen_says_how_they_were_scaled(folder, capsys):
    run(folder[0], "said")
    output = capsys.readouterr().out
    assert "1 latent of ComfyUI, in the decoder's scale: values unchanged" in output
    assert "1 latent of ComfyUI without latent_format_version_0" in output
    assert "1 latent with the scale of --latents-scaled: values / 0.5" in output
    assert "| b to a |" in output
    assert "rFID" not in output  # nobody asked
    assert (folder[0] / "said" / "table.md").read_text().strip() in output


def test_pictures_of_an_earlier_call_go(folder):
    run(folder[0], "twice")
    (folder[0] / "twice" / "pictures" / "mine.png").touch()
    run(folder[0], "twice", limit=1)
    left = {path.name for path in (folder[0] / "twice" / "pictures").iterdir()}
    assert left == {"0000-a.png", "0000-b.png", "mine.png"}


def test_fid_is_against_the_photographs(folder, inception_file, tmp_path):
    place, _ = folder
    for number in range(3):
        data = samples.encode(samples.noise_picture(number), "PNG")
        (tmp_path / f"{number}.png").write_bytes(data)
    found = run(place, "fid", photographs=str(tmp_path), inception=str(inception_file))
    assert found["protocol"]["photographs_size"] == 32  # of the first decoded image
    assert all(row["fid"] > 0 for row in found["models"].values())
    assert any("FID on 3 images is biased" in warning for warning in found["warnings"])
    assert (place / "fid" / "table.md").read_text().startswith("| model | FID |")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"photographs": "nothing"}, "no images"), ({"inception": "absent"}, "absent")],
)
def test_what_is_missing_is_said_before_anything_is_decoded(
    folder, tmp_path, capsys, monkeypatch, wrong, said
):
    (tmp_path / "nothing").mkdir()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(samples.encode(samples.noise_picture(0), "PNG"))
    monkeypatch.setenv("KL_F8_TRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    options = {"photographs": "photos", "perceptual_name": "lpips_vgg", **wrong}
    with pytest.raises(MissingInputError, match=said):
        run(folder[0], "alone", **options)
    assert capsys.readouterr().out == ""
    assert not (folder[0] / "alone" / "pictures").exists()


def test_broken_weights_and_many_processes_are_refused(folder, monkeypatch):
    place, _ = folder
    broken = samples.tiny_vae(0)
    broken.decoder.conv_out.bias.data[0] = torch.nan
    weight_file.write_safetensors(place / "broken.safetensors", broken.state_dict(), {})
    named = [("broken", place / "broken.safetensors", "ema")]
    with pytest.raises(RunFailedError, match=r"broken: decodes 0\.latent to values that are not"):
        generated.evaluate_latents(named, str(place / "latents"), place / "bad", scaled="no")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(UsageError, match="takes one process"):
        run(place, "two")


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--latents", "latents"], 2, "1.npy does not show whether its latents are scaled"),
        (["--latents", "absent"], 3, "--latents absent: no such folder"),
        (["--latents", "latents", "--compare", "a", "b"], 2, "--compare needs photographs"),
        (["--latents", "latents", "--latent-noise", "0.1"], 2, "--latent-noise needs photographs"),
        (["--latents", "latents", "--tiled"], 2, "--tiled needs photographs"),
        (["--latents", "latents", "--latents-scaled", "flux"], 2, "flux is values / 0.3611"),
        (["--images", "latents", "--latents-scaled", "no"], 2, "give --latents with it"),
        (["--latents", "latents", "--out", "a.safetensors"], 2, "is a file"),
        (["--latents", "latents/0.latent", "--size", "32,64"], 2, "latents have their own"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(folder, monkeypatch, capsys, flags, code, said):
    monkeypatch.chdir(folder[0])
    assert main(["evaluate", "a.safetensors", "b.safetensors", *flags]) == code
    assert said in capsys.readouterr().err


def test_the_command_decodes_one_file(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder[0])
    arguments = ["a.safetensors", "--latents", "latents/0.latent", "--out", "one"]
    assert main(["evaluate", *arguments]) == 0
    output = capsys.readouterr().out
    assert "1 model, 1 latent" in output
    assert "pictures: one/strip.png" in output
    assert "difference" not in output
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", "a.safetensors"])
    assert "--images, or --latents" in capsys.readouterr().err
