"""What decides a result besides the recipe is kept, compared on resume and between ranks."""

import dataclasses
import hashlib
import json
import shutil

import pytest
import runs
import samples
import torch
from safetensors.torch import load_file, save_file

from kl_f8_train.__main__ import main
from kl_f8_train.core import step
from kl_f8_train.core.hashes import tensors_sha256
from kl_f8_train.data import identity, sources
from kl_f8_train.data.shard_cache import ShardCache
from kl_f8_train.errors import UsageError
from kl_f8_train.publish.export import export
from kl_f8_train.run.train import train
from kl_f8_train.weights import pretrained, weight_file
from kl_f8_train.weights.pretrained import VGG16

ONE = (*runs.NO_ADVERSARIAL, "stop_iteration=101")


def stored(folder, run: str) -> dict[str, str]:
    return json.loads(runs.final_state(folder, run).metadata["identity"])


def changes(folder, run: str) -> list[str]:
    return runs.final_state(folder, run).metadata["changes"].splitlines()


def test_a_checkpoint_holds_data_network_and_versions(folder):
    train(runs.recipe(folder, "kept", *ONE))
    found = stored(folder, "kept")
    assert set(found) == {"perceptual", "torch", "cuda", "kl_f8_train", "data.shards"}
    assert found["torch"] == torch.__version__
    assert found["perceptual"].startswith("ST-LPIPS (stand-in, not LPIPS), SHA-256 ")


def test_another_version_is_refused_or_recorded(folder, monkeypatch, capsys):
    train(runs.recipe(folder, "version", *ONE))
    monkeypatch.setattr(identity, "__version__", "9.9")
    later = runs.recipe(folder, "version", *ONE[:-1], "stop_iteration=102")
    with pytest.raises(
        UsageError, match=r"from other inputs:\n  kl_f8_train: .* -> 9\.9\n.*--allow"
    ):
        train(later)
    assert stored(folder, "version")["kl_f8_train"] != "9.9"
    train(later, allow_changes=True)
    (change,) = changes(folder, "version")
    assert change.startswith("from iteration 101: kl_f8_train: ")
    assert f"  {change}" in capsys.readouterr().out
    assert stored(folder, "version")["kl_f8_train"] == "9.9"


def test_other_data_is_refused_or_recorded(folder, tmp_path):
    shutil.copytree(folder / "tiles", tmp_path / "photos")
    settings = (f"data.sources.photos={tmp_path / 'photos'}", *ONE)
    train(runs.recipe(folder, "data", *settings))
    shutil.copy(next((tmp_path / "photos").iterdir()), tmp_path / "photos" / "zzz.png")
    later = runs.recipe(folder, "data", *settings[:-1], "stop_iteration=102")
    with pytest.raises(UsageError, match=r"data\.photos: .* -> "):
        train(later)
    train(later, allow_changes=True)
    assert [line for line in changes(folder, "data") if "data.photos: " in line]


def test_the_identity_of_data_is_of_names_sizes_and_counts(folder, tmp_path):
    shutil.copytree(folder / "tiles", tmp_path / "a")
    shutil.copytree(folder / "tiles", tmp_path / "b")

    def of(place):
        return identity.of_data({"x": sources.FolderSource(place)})["data.x"]

    assert of(tmp_path / "a") == of(tmp_path / "b")  # a copy elsewhere is the same data
    first, *_, last = sorted((tmp_path / "b").iterdir())
    last.write_bytes(last.read_bytes() + b"0")
    longer = of(tmp_path / "b")
    last.write_bytes(last.read_bytes()[:-1])
    first.rename(first.with_name("zzz.png"))
    assert len({of(tmp_path / "a"), longer, of(tmp_path / "b")}) == 3


def test_a_changed_shard_is_other_data(tmp_path):
    cache = ShardCache(tmp_path / "cache", 2**30)

    def of(*bodies):
        members = {f"{number}.jpg": body for number, body in enumerate(bodies)}
        samples.write_tar(tmp_path / "shards" / "0.tar", members)
        source = sources.open_source("x", str(tmp_path / "shards"), [], cache)
        return identity.of_data({"x": source})["data.x"]

    assert of(b"one", b"two") == of(b"one", b"two")
    assert of(b"one", b"two") != of(b"one", b"three")


def test_another_name_of_a_source_changes_the_order(tmp_path):
    (line,) = identity.differences({"data.a": "12 images"}, {"data.b": "12 images"})
    assert line.startswith("data.a -> data.b: the same images under another name")
    assert identity.differences({"torch": "1"}, {"data.b": "12 images"}) == []


def test_a_checkpoint_without_an_identity_resumes(folder):
    train(runs.recipe(folder, "older", *ONE))
    path = weight_file.find(folder / "older")
    contents = weight_file.read(path)
    del contents.metadata["identity"]
    weight_file.write_safetensors(path, contents.tensors, contents.metadata)
    assert train(runs.recipe(folder, "older", *ONE[:-1], "stop_iteration=102")) == 0
    assert changes(folder, "older") == []


def test_ranks_that_differ_are_named_with_what_differs():
    same = {"iteration": 5, "torch": "2.15", "data.photos": "a"}
    assert step.disagreements([same, dict(same)]) == []
    other = {**same, "torch": "2.14"}
    assert step.disagreements([same, other]) == [
        "  rank 0: torch 2.15",
        "  rank 1: torch 2.14",
    ]


@pytest.mark.slow
def test_another_vgg16_is_named_everywhere(folder, vgg_file, tmp_path, capsys):
    state = load_file(vgg_file)
    state["features.0.bias"][0] += 1
    save_file(state, tmp_path / "other.safetensors")
    lpips = (*ONE[:-1], "loss.perceptual=lpips_vgg", "log.pictures_every=0")
    first = (*lpips, f"loss.perceptual_weights={vgg_file}", "stop_iteration=101")
    train(runs.recipe(folder, "vgg", *first))
    words = "LPIPS on a VGG16 that is not the published one"
    assert f"loss: mse + 0.1 {words}" in capsys.readouterr().out
    assert stored(folder, "vgg")["perceptual"].startswith(words)
    other = (f"loss.perceptual_weights={tmp_path / 'other.safetensors'}", "stop_iteration=102")
    with pytest.raises(UsageError, match="perceptual: LPIPS on"):  # the path is a machine setting
        train(runs.recipe(folder, "vgg", *lpips, *other))
    capsys.readouterr()
    main(["doctor", "demo", *runs.overrides(folder, "new", *first)])
    assert f"the loss is {words}" in capsys.readouterr().out
    readme = export(folder / "vgg", layouts=["safetensors"]) / "README.md"
    assert words in readme.read_text()


def test_the_published_vgg16_is_known_by_its_hashes(tmp_path):
    state = {"features.0.weight": torch.ones(2, 3)}
    torch.save(state, tmp_path / "vgg.pth")
    digest = hashlib.sha256((tmp_path / "vgg.pth").read_bytes()).hexdigest()
    network = dataclasses.replace(VGG16, sha256_prefix=digest[:8])
    assert pretrained.is_published(network, weight_file.read(tmp_path / "vgg.pth"))
    assert not pretrained.is_published(VGG16, weight_file.read(tmp_path / "vgg.pth"))
    kept = {"source_sha256": digest, "tensors_sha256": tensors_sha256(state)}
    for name, tensors, note, expected in (
        ("kept", state, kept, True),
        ("older", state, {"source_sha256": digest}, True),
        ("changed", {"features.0.weight": torch.zeros(2, 3)}, kept, False),
        ("converted", state, {}, False),
    ):
        weight_file.write_safetensors(tmp_path / f"{name}.safetensors", tensors, note)
        contents = weight_file.read(tmp_path / f"{name}.safetensors")
        assert pretrained.is_published(network, contents) == expected, name


def test_contradictions_of_the_imported_file_are_said(folder, capsys):
    train(runs.recipe(folder, "said", "init.iteration=90", "stop_iteration=91"))
    printed = capsys.readouterr().out
    assert "init.iteration=90 is taken, although the file says 100" in printed
    assert "its discriminator is taken over" in printed
    train(runs.recipe(folder, "silent", *ONE))
    printed = capsys.readouterr().out
    assert "although the file says" not in printed
    assert "its discriminator is not used: the recipe has no adversarial term" in printed
