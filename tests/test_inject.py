"""A VAE inside a full checkpoint: only its tensors change, streamed, in the file's own types."""

import struct
import zipfile
from pathlib import Path

import pytest
import samples
import torch
from safetensors.torch import save_file
from test_checkpoint import no_room
from test_unpickle import Attack

from kl_f8_train.__main__ import main
from kl_f8_train.errors import MissingInputError, RunFailedError, UsageError
from kl_f8_train.publish.inject import inject
from kl_f8_train.weights import weight_file


def full_checkpoint(seed: int = 0, dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    """The tensors of a Stable Diffusion checkpoint, small."""
    vae = samples.tiny_vae(seed).state_dict()
    return {
        "model.diffusion_model.out.weight": torch.randn(50, 7),
        **{f"first_stage_model.{key}": value.to(dtype) for key, value in vae.items()},
        "cond_stage_model.positions": torch.arange(77)[None],
        "model_ema.num_updates": torch.tensor(3, dtype=torch.int32),
    }


def finetuned(path: Path, *, other_encoder: bool = False) -> Path:
    """A VAE file with another decoder than `full_checkpoint`'s."""
    state, other = (dict(samples.tiny_vae(seed).state_dict()) for seed in (0, 1))
    state |= {k: v for k, v in other.items() if other_encoder or k.startswith(("decoder", "post"))}
    weight_file.write_safetensors(path, state, {})
    return path


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    return finetuned(tmp_path / "vae.safetensors")


def expected(vae: Path, before: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    new = weight_file.read(vae).tensors
    return {
        key: new[key.removeprefix("first_stage_model.")].to(value.dtype)
        if key.startswith("first_stage_model.")
        else value
        for key, value in before.items()
    }


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for key in one:
        assert one[key].dtype == other[key].dtype
        assert torch.equal(one[key], other[key]), key


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_safetensors_keep_header_types_and_every_other_byte(tmp_path, vae, dtype):
    before = full_checkpoint(dtype=dtype)
    save_file(before, tmp_path / "sd.safetensors", {"modelspec.title": "x"})
    lines = inject(vae, tmp_path / "sd.safetensors", tmp_path / "new.safetensors")
    after = weight_file.read(tmp_path / "new.safetensors")
    assert_equal(after.tensors, expected(vae, before))
    assert after.metadata == {"modelspec.title": "x"}
    assert "latents stay" in lines[0]
    old, new = (Path(tmp_path / f"{n}.safetensors").read_bytes() for n in ("sd", "new"))
    header = 8 + struct.unpack("<Q", old[:8])[0]
    assert old[:header] == new[:header]
    assert len(old) == len(new)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("theirs", [torch.save, weight_file.write_torch])
def test_torch_zips_keep_every_other_record(tmp_path, vae, nested, theirs):
    before = full_checkpoint()
    content = {"state_dict": before, "global_step": 470000} if nested else before
    old, new = tmp_path / "sd.ckpt", tmp_path / "new.ckpt"
    theirs(content, old) if theirs is torch.save else theirs(old, content)
    inject(vae, old, new)
    loaded = torch.load(new, weights_only=True, mmap=True)
    assert_equal(loaded["state_dict"] if nested else loaded, expected(vae, before))
    with zipfile.ZipFile(old) as one, zipfile.ZipFile(new) as other:
        assert one.namelist() == other.namelist()
        assert other.testzip() is None
        changed = [name for name in one.namelist() if one.read(name) != other.read(name)]
    count = sum(name.startswith(("decoder", "post")) for name in weight_file.read(vae).tensors)
    assert 0.5 * count < len(changed) <= count  # zeros stay zeros, ones stay ones
    assert all("/data/" in name for name in changed)


def test_tensors_that_share_a_record_or_lie_otherwise(tmp_path, vae):
    """torch stores storages, not tensors: views of one, and channels_last, are written in place."""
    before = full_checkpoint(dtype=torch.float32)
    key = "first_stage_model.decoder.conv_in.weight"
    before[key] = before[key].contiguous(memory_format=torch.channels_last)
    pair = torch.zeros(1000)
    bias = "first_stage_model.decoder.conv_in.bias"
    size = before[bias].numel()
    before[bias] = pair[100 : 100 + size]
    before["beside"] = pair[:100]
    torch.save(before, tmp_path / "sd.ckpt")
    inject(vae, tmp_path / "sd.ckpt", tmp_path / "new.ckpt")
    loaded = torch.load(tmp_path / "new.ckpt", weights_only=True)
    assert_equal(loaded, expected(vae, before))
    assert not loaded[key].is_contiguous()


def test_another_encoder_is_told(tmp_path):
    vae = finetuned(tmp_path / "vae.safetensors", other_encoder=True)
    for name in ("sd.safetensors", "sd.ckpt"):
        into = tmp_path / name
        if name.endswith("ckpt"):
            weight_file.write_torch(into, full_checkpoint())
        else:
            save_file(full_checkpoint(), into)
        lines = inject(vae, into, tmp_path / f"new-{name}")
        assert lines[0].startswith("WARNING: the encoder differs")
        assert "latents change" in lines[0]


def test_what_does_not_fit_is_refused_and_nothing_written(tmp_path, vae):
    out = tmp_path / "out" / "new.safetensors"

    def refused(tensors: dict[str, torch.Tensor], match: str) -> None:
        save_file(tensors, tmp_path / "sd.safetensors")
        weight_file.write_torch(tmp_path / "sd.ckpt", tensors)
        for name in ("sd.safetensors", "sd.ckpt"):
            with pytest.raises(MissingInputError, match=match):
                inject(vae, tmp_path / name, out)

    wide = full_checkpoint()
    wide["first_stage_model.decoder.conv_in.weight"] = torch.zeros(64, 16, 3, 3)
    refused(wide, r"decoder\.conv_in\.weight is \(64, 4, 3, 3\), expected \(64, 16, 3, 3\)")
    short = full_checkpoint()
    del short["first_stage_model.quant_conv.bias"]
    refused(short, r"unexpected quant_conv\.bias")
    refused({"model.x": torch.zeros(2)}, "holds no first_stage_model")
    torch.save(full_checkpoint(), tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    with pytest.raises(MissingInputError, match=r"neither \.safetensors nor a torch zip"):
        inject(vae, tmp_path / "old.ckpt", out)
    with pytest.raises(MissingInputError, match="no such file"):
        inject(vae, tmp_path / "absent.ckpt", out)
    with pytest.raises(UsageError, match="copy the files of export/diffusers"):
        inject(vae, tmp_path, out)
    assert not out.parent.exists()


def test_a_hostile_checkpoint_is_refused_by_name(tmp_path, vae):
    marker = tmp_path / "marker"
    torch.save({**full_checkpoint(), "x": Attack(open, str(marker), "w")}, tmp_path / "sd.ckpt")
    with pytest.raises(MissingInputError, match=r"asks to run .*open"):
        inject(vae, tmp_path / "sd.ckpt", tmp_path / "new.ckpt")
    assert not marker.exists()


def test_the_command_overwrites_only_with_force(tmp_path, vae, capsys):
    save_file(full_checkpoint(), tmp_path / "sd.safetensors")
    out = tmp_path / "new.safetensors"
    command = ["inject", str(vae), str(tmp_path / "sd.safetensors"), "--out", str(out)]
    assert main(command) == 0
    assert "read back equal" in capsys.readouterr().out
    first = out.stat().st_mtime_ns
    assert main(command) == 2
    assert f"{out} exists" in capsys.readouterr().err
    assert out.stat().st_mtime_ns == first
    assert main([*command, "--force"]) == 0
    assert out.stat().st_mtime_ns > first


@pytest.mark.parametrize("how", ["file size limit", "full disk"])
@pytest.mark.parametrize("name", ["sd.safetensors", "sd.ckpt"])
def test_no_room_leaves_the_previous_file(tmp_path, vae, name, how):
    tensors = {**full_checkpoint(), "big": torch.zeros(1_000_000)}
    if name.endswith("ckpt"):
        weight_file.write_torch(tmp_path / name, tensors)
    else:
        save_file(tensors, tmp_path / name)
    folder = tmp_path / "out"
    folder.mkdir()
    with no_room(folder, how):
        (folder / name).write_text("before")
        with pytest.raises(RunFailedError, match="Make room"):
            inject(vae, tmp_path / name, folder / name, force=True)
        assert [path.name for path in folder.iterdir()] == [name]
        assert (folder / name).read_text() == "before"


@pytest.mark.parametrize("name", ["sd.safetensors", "sd.ckpt"])
def test_memory_stays_about_the_vae(tmp_path, vae, name):
    """A checkpoint of 96 MB around a VAE of 1 MB; only the VAE may be held."""
    tensors = {**full_checkpoint(), **{f"model.{i}": torch.ones(4_000_000) for i in range(6)}}
    if name.endswith("ckpt"):
        weight_file.write_torch(tmp_path / name, tensors)
    else:
        save_file(tensors, tmp_path / name)
    arguments = [vae, tmp_path / name, tmp_path / f"new-{name}"]
    grown = samples.peak_growth("from kl_f8_train.publish.inject import inject as job", *arguments)
    assert grown < 45  # MiB; a held copy would be 92
    for path in arguments[1:]:
        path.unlink()


def test_modes_follow_the_umask(tmp_path, vae):
    save_file(full_checkpoint(), tmp_path / "sd.safetensors")
    (tmp_path / "sd.safetensors").chmod(0o600)
    inject(vae, tmp_path / "sd.safetensors", tmp_path / "new.safetensors")
    assert (tmp_path / "new.safetensors").stat().st_mode & 0o777 == 0o644


def test_an_all_in_one_file_keeps_its_vae_elsewhere(tmp_path, vae):
    """Below vae., as such files for FLUX do."""
    before = {k.replace("first_stage_model.", "vae."): v for k, v in full_checkpoint().items()}
    save_file(before, tmp_path / "flux.safetensors")
    inject(vae, tmp_path / "flux.safetensors", tmp_path / "new.safetensors")
    after = weight_file.read(tmp_path / "new.safetensors").tensors
    wanted = weight_file.load_autoencoder(vae).state_dict()
    key = "decoder.conv_in.weight"
    assert torch.equal(after[f"vae.{key}"], wanted[key].to(after[f"vae.{key}"].dtype))


def test_a_vae_that_is_not_finite_is_refused_because_of_that(tmp_path):
    state = {k: v.clone() for k, v in samples.tiny_vae().state_dict().items()}
    state["decoder.conv_in.weight"][0] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    save_file(full_checkpoint(), tmp_path / "sd.safetensors")
    with pytest.raises(MissingInputError, match="not finite"):
        inject(tmp_path / "nan.safetensors", tmp_path / "sd.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_values_that_the_checkpoints_type_cannot_hold_are_refused(tmp_path, vae):
    """They would be written as infinity, and read back equal to it."""
    state = dict(weight_file.read(vae).tensors)
    state["decoder.conv_in.weight"] = state["decoder.conv_in.weight"].clone().fill_(1e6)
    save_file(state, tmp_path / "large.safetensors")
    for dtype, fits in ((torch.float16, False), (torch.bfloat16, True)):
        save_file(full_checkpoint(dtype=dtype), tmp_path / "sd.safetensors")
        out = tmp_path / f"out-{fits}.safetensors"
        if fits:
            inject(tmp_path / "large.safetensors", tmp_path / "sd.safetensors", out)
            continue
        with pytest.raises(MissingInputError, match=r"conv_in\.weight holds 1e\+06, more than fl"):
            inject(tmp_path / "large.safetensors", tmp_path / "sd.safetensors", out)
        assert not out.exists()


@pytest.mark.parametrize("save", [save_file, torch.save])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_checkpoints_of_types_that_ruin_a_vae_are_refused(tmp_path, vae, save, dtype):
    save(full_checkpoint(dtype=dtype), tmp_path / "sd")
    with pytest.raises(
        MissingInputError, match=rf"{dtype}, which is too coarse for a VAE".split(".")[1]
    ):
        inject(vae, tmp_path / "sd", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("data", "what"), [(b"", "an empty file"), (b"version https://git-lfs", "git lfs pull")]
)
def test_what_came_in_place_of_a_checkpoint_is_named(tmp_path, vae, data, what):
    (tmp_path / "sd.safetensors").write_bytes(data)
    with pytest.raises(MissingInputError, match=what):
        inject(vae, tmp_path / "sd.safetensors", tmp_path / "out")
