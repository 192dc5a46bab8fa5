"""Latents are read as their makers saved them, and in a scale that is known, not guessed."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from kl_f8_train.errors import MissingInputError, UsageError
from kl_f8_train.facts import Facts
from kl_f8_train.score import saved_latents
from kl_f8_train.score.saved_latents import LEGACY, OURS, UNSAID, SavedLatent, Scale

MARKER = {"latent_format_version_0": torch.tensor([])}


@pytest.fixture
def z() -> Tensor:
    return torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(0))


def write(path, z: Tensor, **more: Tensor):
    save_file({"latent_tensor": z.contiguous(), **more}, path)
    return path


def test_comfyui_s_files_are_undone_as_its_loader_does(tmp_path, z):
    """Its loader multiplies by 1 / 0.18215 what has no marker, and decodes the rest unchanged."""
    new = write(tmp_path / "new.latent", z, **MARKER)
    old = write(tmp_path / "old.latent", z * 0.18215)
    for path, says in ((new, OURS), (old, LEGACY)):
        values, said = saved_latents.read(path)
        assert said == says
        (latent, _) = saved_latents.survey(path)
        scales = saved_latents.scales([latent], None, [("a", Facts(), 4)])
        torch.testing.assert_close(scales[says].undo(values), z)
    named = write(tmp_path / "new.safetensors", z, **MARKER)  # by content, not by suffix
    assert saved_latents.read(named)[1] == OURS


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_all_formats_and_types(tmp_path, monkeypatch, z, dtype):
    values = z.to(dtype)
    save_file({"latents": values}, tmp_path / "a.safetensors")
    torch.save({"samples": values}, tmp_path / "c.pt")
    torch.save({"z": values[0]}, tmp_path / "d.pt", _use_new_zipfile_serialization=False)
    if dtype != torch.bfloat16:
        np.save(tmp_path / "e.npy", values.numpy())
        np.save(
            tmp_path / "f.NPY", np.asfortranarray(values[1].numpy()).astype(f">f{dtype.itemsize}")
        )
        (tmp_path / "f.NPY.npy").rename(tmp_path / "f.NPY")
    found = saved_latents.survey(tmp_path)
    assert len(found) == (5 if dtype == torch.bfloat16 else 8)
    reads: Counter[Path] = Counter()
    read = saved_latents.read

    def counted(path):
        reads[path] += 1
        return read(path)

    monkeypatch.setattr(saved_latents, "read", counted)
    loaded_latents = list(saved_latents.load_latents(found))
    assert [latent for latent, _ in loaded_latents] == found
    assert set(reads.values()) == {1}  # a file of several latents, too
    for latent, loaded in loaded_latents:
        single = {"d.pt": 0, "f.NPY": 1}.get(latent.name, latent.index)
        assert loaded.shape == (1, 4, 6, 5)
        assert torch.equal(loaded[0], values[single].float())
        assert (latent.shape, latent.says) == ((4, 6, 5), UNSAID)
    assert [latent.name for latent in found[:2]] == ["a.safetensors[0]", "a.safetensors[1]"]
    assert len(saved_latents.survey(tmp_path, limit=3)) == 3


class Trap:
    """A pickle that would write a file."""

    def __reduce__(self):
        return (open, ("trap", "w"))


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("a.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    torch.save({"latents": Trap()}, "b.pt")
    for name in ("a.npy", "b.pt"):
        with pytest.raises(MissingInputError, match=name):
            saved_latents.read(tmp_path / name)
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: np.save(p / "x.npy", np.zeros((4, 5, 5), int)), "holds int64 of shape"),
        (lambda p: np.save(p / "x.npy", np.zeros((5, 5))), r"shape \(5, 5\); expected latents"),
        (lambda p: np.save(p / "x.npy", np.zeros((1, 4, 0, 5))), "shape"),
        (lambda p: np.save(p / "x.npy", np.full((4, 5, 5), np.nan)), "NaN or infinity"),
        (lambda p: np.save(p / "x.npy", np.array(["a"])), "no array that can be read"),
        (lambda p: (p / "x.npy").write_bytes(b"not numpy"), "no array that can be read"),
        (lambda p: (p / "x.npy").write_bytes(b""), "no array that can be read"),
        (lambda p: (p / "x.latent").write_bytes(b"short"), "x.latent"),
        (lambda p: write(p / "x.latent", torch.zeros(1, 4, 2, 5, 5)), "of an image"),
        (
            lambda p: save_file(
                {"one": torch.zeros(4, 5, 5), "two": torch.zeros(4, 5, 5)}, p / "x.safetensors"
            ),
            r"not clear which.*one \(4, 5, 5\), two",
        ),
        (
            lambda p: save_file(
                {f"layer.{i}": torch.zeros(4, 4, 1, 1) for i in range(17)}, p / "x.safetensors"
            ),
            "17 tensors, as a model does",
        ),
        (
            lambda p: torch.save(torch.zeros(4, 5, 5), p / "x.pt"),
            "holds a tensor, not a state dict; save latents as .safetensors or .npy",
        ),
        (lambda p: (p / "x.txt").write_text("z"), "holds no latents; expected .latent, "),
    ],
)
def test_what_is_not_a_latent_is_named(tmp_path, make, said):
    make(tmp_path)
    with pytest.raises(MissingInputError, match=said):
        saved_latents.survey(tmp_path)


def test_a_named_tensor_is_chosen_among_several(tmp_path, z):
    save_file({"latents": z, "noise": z * 2}, tmp_path / "x.safetensors")
    assert torch.equal(saved_latents.read(tmp_path / "x.safetensors")[0], z)


# --- scale ----------------------------------------------------------------------------------

HERE = [SavedLatent(None, 0, "x.npy", (4, 5, 5), UNSAID)]  # type: ignore[arg-type]
WIDE = [SavedLatent(None, 0, "x.npy", (16, 5, 5), UNSAID)]  # type: ignore[arg-type]
SDXL = Facts(scaling_factor=0.13025)


def test_a_scale_that_is_not_known_is_not_guessed():
    with pytest.raises(UsageError, match=r"Give --latents-scaled no .* or --latents-scaled yes"):
        saved_latents.scales(HERE, None, [("a", SDXL, 4)])
    with pytest.raises(UsageError, match=r"a does not state .* --latents-scaled sd or .*sdxl"):
        saved_latents.scales(HERE, "yes", [("a", Facts(), 4)])
    with pytest.raises(UsageError, match="different scales"):
        saved_latents.scales(HERE, "yes", [("a", SDXL, 4), ("b", Facts(family="sd"), 4)])
    with pytest.raises(
        UsageError, match=r"sd is values / 0\.18215, but a states values / 0\.13025"
    ):
        saved_latents.scales(HERE, "sd", [("a", SDXL, 4)])


@pytest.mark.parametrize(
    ("scaled", "stated", "expected"),
    [
        ("no", SDXL, Scale()),
        ("yes", SDXL, Scale(0.13025)),
        ("yes", Facts(family="sdxl"), Scale(0.13025)),
        ("sd", Facts(), Scale(0.18215)),
        ("flux", Facts(), Scale(0.3611, (0.1159,))),
        ("yes", Facts(scaling_factor=1.5305, shift_factor=0.0609), Scale(1.5305, (0.0609,))),
    ],
)
def test_the_scale_of_a_vae_or_a_family(scaled, stated, expected):
    latents = WIDE if scaled == "flux" or stated.shift_factor else HERE
    vaes = [("a", stated, latents[0].shape[0]), ("silent", Facts(), latents[0].shape[0])]
    assert saved_latents.scales(latents, scaled, vaes) == {UNSAID: expected}


def test_scale_is_undone_as_diffusers_pipelines_do():
    """latents / scaling_factor + shift_factor; with mean and std of each channel those."""
    values = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(Scale(0.3611, (0.1159,)).undo(values), values / 0.3611 + 0.1159)
    stated = Facts(scaling_factor=0.5, latents_mean=(1.0, 2, 3, 4), latents_std=(5.0, 6, 7, 8))
    (scale,) = saved_latents.scales(HERE, "yes", [("a", stated, 4)]).values()
    mean, std = (torch.tensor(v).view(1, 4, 1, 1) for v in ([1.0, 2, 3, 4], [5.0, 6, 7, 8]))
    torch.testing.assert_close(scale.undo(values), values * std / 0.5 + mean)
    assert str(scale) == "values x std / 0.5 + mean"


def test_channels_that_do_not_fit_are_named():
    with pytest.raises(UsageError, match=r"16 channels .* those of a have 4"):
        saved_latents.check_fit(WIDE, "a", 4, 8)
    last = [SavedLatent(None, 0, "x", (64, 48, 4), UNSAID)]  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="the channels come first"):
        saved_latents.check_fit(last, "a", 4, 8)
    small = [SavedLatent(None, 0, "x", (4, 3, 90), UNSAID)]  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="decode to 720 x 24 pixels"):
        saved_latents.check_fit(small, "a", 4, 8)


@pytest.mark.parametrize(
    ("deviation", "factor", "scaled", "doubted"),
    [
        (0.9, 0.18215, True, False),
        (5.2, 0.18215, True, True),
        (5.2, 0.18215, False, False),
        (0.9, 0.18215, False, True),
        (0.7, 1.5305, False, False),  # SD3's factor is too close to 1 to tell
        (0.0, 0.18215, True, False),
    ],
)
def test_a_scale_that_does_not_fit_the_values_is_doubted(deviation, factor, scaled, doubted):
    found = saved_latents.doubt(deviation, factor, scaled)
    assert bool(found) == doubted
    assert math.isfinite(deviation)
