"""Checkpoints of other trainers: weights below any key, an EMA beside them, foreign objects."""

import collections
import datetime
import functools
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import runs
import samples
import torch
from safetensors.torch import save_file
from samples import recipe, save_legacy, save_zip
from torch.optim.swa_utils import AveragedModel

from kl_f8_train.__main__ import main
from kl_f8_train.core.hashes import frozen_sha256
from kl_f8_train.errors import MissingInputError
from kl_f8_train.run.start import check_model
from kl_f8_train.run.train import train
from kl_f8_train.weights import names, weight_file
from kl_f8_train.weights.names import State, to_diffusers


def raw() -> State:
    return dict(samples.tiny_vae().state_dict())


def ema() -> State:
    """What an average would have made of `raw`."""
    return {key: value + 1 for key, value in raw().items()}


def dotless(state: State) -> State:
    """The original's EMA: names without dots, below model_ema."""
    return {f"model_ema.{key.replace('.', '')}": value for key, value in state.items()}


def read(path: Path, select: str = "ema", prefix: str | None = None) -> names.Weights:
    return weight_file.read_weights(path, select, prefix)[1]


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# --- below any key --------------------------------------------------------------------------


@pytest.mark.parametrize("save", [save_zip, save_legacy])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model": state, "epoch": 3},
        lambda state: {"vae": state, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
        lambda state: {"module": state, "global_steps": 3},
        lambda state: {"state": {"model": {f"model.{k}": v for k, v in state.items()}}},
        lambda state: {"state_dict": {f"vae.{k}": v for k, v in state.items()}},
        lambda state: {"trainer": [{"nets": {"ae": state}}]},
        lambda state: {"state_dict": {"model": state}, "model": state},
        lambda state: {"state_dict": None, "net": collections.OrderedDict(state)},
    ],
)
def test_weights_below_any_key(tmp_path, save, wrap):
    assert same(read(save(wrap(raw()), tmp_path / "x.pt")).autoencoder, raw())


@pytest.mark.parametrize(
    "wrapper",
    ["_orig_mod.", "module.", "module._orig_mod.", "_fsdp_wrapped_module.", "_forward_module."],
)
@pytest.mark.parametrize("place", ["", "encoder.", "decoder.up.0.block."])
def test_wrappers_stand_anywhere_in_a_name(tmp_path, wrapper, place):
    state = {k.replace(place, place + wrapper, 1): v for k, v in raw().items()}
    if not place:
        state = {wrapper + key: value for key, value in raw().items()}
    for name, content in (("diffusers", state), ("lightning", {"state_dict": state})):
        assert same(read(save_zip(content, tmp_path / name)).autoencoder, raw())


def test_of_several_autoencoders_one_is_chosen(tmp_path):
    path = save_zip({"student": raw(), "teacher": ema()}, tmp_path / "x.pt")
    with pytest.raises(MissingInputError, match=r"below student\., teacher\.; init\.prefix=NAME"):
        read(path)
    assert same(read(path, prefix="teacher").autoencoder, ema())
    assert same(read(path, prefix="student.").autoencoder, raw())
    with pytest.raises(MissingInputError, match=r"init\.prefix=pupil: no autoencoder below it"):
        read(path, prefix="pupil")


def test_inspect_chooses_as_a_run_does(tmp_path, capsys):
    path = save_zip({"student": raw(), "teacher": ema()}, tmp_path / "x.pt")
    assert main(["inspect", str(path)]) == MissingInputError.exit_code
    assert "inspect --prefix NAME" in capsys.readouterr().err
    assert main(["inspect", str(path), "--prefix", "teacher"]) == 0
    assert frozen_sha256(ema()) in capsys.readouterr().out


@pytest.mark.parametrize("beside", [{"vae": raw()}, {}])
def test_ema_pytorch_keeps_a_copy_of_the_raw_weights(tmp_path, beside):
    """It is a second autoencoder below an EMA's name, and not a second EMA."""
    kept = {f"online_model.{k}": v for k, v in raw().items()}
    kept |= {f"ema_model.{k}": v for k, v in ema().items()} | {"step": torch.tensor(3)}
    path = save_zip({**beside, "ema": kept}, tmp_path / "x.pt")
    assert same(read(path).autoencoder, ema())
    assert same(read(path, select="raw").autoencoder, raw())


def test_settings_that_cannot_help_are_not_advised(tmp_path):
    """The file has another tensor, but the sizes of the recipe's network."""
    contents = weight_file.Contents(tmp_path / "x.ckpt", {})
    with pytest.raises(MissingInputError, match=r"or set model.* as theirs"):
        check_model(recipe("demo"), contents, raw())
    config = recipe("demo")
    config = replace(config, model=replace(config.model, **samples.TINY, norm_num_groups=32))
    with pytest.raises(MissingInputError) as caught:
        check_model(config, contents, {**raw(), "decoder.extra.weight": torch.ones(1)})
    assert str(caught.value).endswith("Give other weights")


def test_names_of_what_is_there(tmp_path):
    path = save_zip({"net": {"conv.weight": torch.ones(1)}}, tmp_path / "x.pt")
    with pytest.raises(MissingInputError, match=r"it holds net\.conv\.weight"):
        read(path)


# --- an EMA beside the raw weights ----------------------------------------------------------

BOTH = {
    "the original's": lambda: {"state_dict": raw() | dotless(ema())},
    "timm": lambda: {"state_dict": raw(), "state_dict_ema": ema()},
    "k-diffusion": lambda: {"model": raw(), "model_ema": ema(), "step": 3},
    "ema_model": lambda: {"state_dict": raw() | {f"ema_model.{k}": v for k, v in ema().items()}},
    "Composer": lambda: {
        "state": {"model": raw(), "algorithms": [("EMA", {"ema_model": {"params": ema()}})]}
    },
    "Lightning's WeightAveraging": lambda: {"state_dict": ema(), "current_model_state": raw()},
    "a list, as diffusers' EMAModel": lambda: {
        "vae": raw(),
        "ema": {"decay": 0.9999, "shadow_params": list(ema().values())},
    },
    "of the decoder alone": lambda: {
        "vae": raw(),
        "ema_vae": {k: v for k, v in ema().items() if not k.startswith(("encoder", "quant"))},
    },
}


@pytest.mark.parametrize("kind", BOTH)
def test_the_average_is_taken_unless_raw_is_asked_for(tmp_path, kind):
    path = save_zip(BOTH[kind](), tmp_path / "x.pt")
    averaged, plain = read(path, "ema"), read(path, "raw")
    trained = [k for k in raw() if k.startswith(("decoder.", "post_quant_conv."))]
    assert all(torch.equal(averaged.autoencoder[key], ema()[key]) for key in trained)
    assert same(plain.autoencoder, raw())
    assert "the EMA below" in averaged.notes[0]
    assert "raw weights are taken" in plain.notes[0]
    found = weight_file.report(*weight_file.read_weights(path))
    assert averaged.notes[0] in weight_file.describe(found)


@pytest.mark.parametrize(
    "content",
    [
        lambda: {"model_ema": ema()},
        lambda: {"state_dict": dotless(ema())},
        lambda: {"ema_state_dict": {f"module.{k}": v for k, v in ema().items()}},
    ],
)
def test_an_average_alone_is_accepted(tmp_path, content):
    path = save_zip(content(), tmp_path / "x.pt")
    assert same(read(path).autoencoder, ema())
    with pytest.raises(MissingInputError, match=r"without the raw weights; give init\.select=ema"):
        read(path, "raw")


def test_torchs_averaged_model_alone(tmp_path):
    model = AveragedModel(samples.tiny_vae())
    assert same(read(save_zip(model.state_dict(), tmp_path / "x.pt")).autoencoder, raw())


def test_an_average_that_lacks_tensors_is_said(tmp_path):
    part = {k: v for k, v in ema().items() if k != "decoder.conv_out.bias"}
    weights = read(save_zip({"model": raw(), "model_ema": part}, tmp_path / "x.pt"))
    assert same(weights.autoencoder, raw())
    assert "is left out: it lacks decoder.conv_out.bias" in weights.notes[0]


def test_a_list_of_another_length_is_refused(tmp_path):
    content = {"vae": raw(), "ema": {"shadow_params": list(ema().values())[3:]}}
    path = save_zip(content, tmp_path / "x.pt")
    with pytest.raises(MissingInputError, match=r"list of .* without names.*init\.select=raw"):
        read(path)
    assert same(read(path, "raw").autoencoder, raw())


# --- attention, shards ----------------------------------------------------------------------


def with_attention(change) -> State:
    state: State = {}
    for key, value in raw().items():
        state |= change(key, value) if ".attn_1." in key else {key: value}
    return state


def joined(name: str) -> State:
    state = {k: v for k, v in raw().items() if not any(f".attn_1.{p}." in k for p in "qkv")}
    for part in ("encoder", "decoder"):
        for kind in ("weight", "bias"):
            three = [raw()[f"{part}.mid.attn_1.{p}.{kind}"] for p in "qkv"]
            state[f"{part}.mid.attn_1.{name}.{kind}"] = torch.cat(three)
    return state


@pytest.mark.parametrize(
    "state",
    [
        with_attention(lambda k, v: {k: v.flatten(1) if v.ndim == 4 else v}),
        with_attention(lambda k, v: {k: v[..., 0] if v.ndim == 4 else v}),
        joined("qkv"),
        joined("to_qkv"),
        {k.replace(".to_out.0.", ".to_out."): v for k, v in to_diffusers(raw()).items()},
    ],
)
def test_attention_in_every_spelling_and_rank(tmp_path, state):
    assert same(read(save_zip(state, tmp_path / "x.pt")).autoencoder, raw())


def several_files(folder: Path, suffix: str = "safetensors") -> tuple[Path, dict[str, str]]:
    """A folder as save_pretrained writes it with max_shard_size: its index, and what that maps."""
    state, places = to_diffusers(raw()), {}
    for number in (1, 2):
        name = f"diffusion_pytorch_model-0000{number}-of-00002.{suffix}"
        part = {k: v.clone() for i, (k, v) in enumerate(state.items()) if i % 2 == number - 1}
        (save_file if suffix == "safetensors" else save_zip)(part, folder / name)
        places |= dict.fromkeys(part, name)
    index = folder / f"diffusion_pytorch_model.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index, places


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_folder_in_several_files(tmp_path, suffix):
    index, places = several_files(tmp_path, suffix)
    assert same(read(tmp_path).autoencoder, raw())
    digest = weight_file.sha256(index)
    index.write_text(json.dumps({"weight_map": {**places, "x": "../secret.safetensors"}}))
    with pytest.raises(MissingInputError, match="outside its folder"):
        read(tmp_path)
    index.write_text(
        json.dumps({"weight_map": {**places, "decoder.x": next(iter(places.values()))}})
    )
    with pytest.raises(MissingInputError, match=r"its files lack decoder\.x"):
        read(tmp_path)
    assert len(digest) == 64


def test_several_files_of_a_variant(tmp_path):
    index, _ = several_files(tmp_path)
    index.rename(tmp_path / "diffusion_pytorch_model.safetensors.index.fp16.json")
    assert same(read(tmp_path).autoencoder, raw())


def test_an_index_that_lacks_a_tensor(tmp_path):
    """The tensor is in a file, but the index does not name it: it was never read."""
    index, places = several_files(tmp_path)
    del places["decoder.conv_in.weight"]
    index.write_text(json.dumps({"weight_map": places}))
    with pytest.raises(MissingInputError, match=r"decoder\.conv_in\.weight"):
        weight_file.load_autoencoder(tmp_path)
    found = weight_file.report(*weight_file.read_weights(tmp_path))
    assert found["tensors"] == len(places)


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 3}}']
)
def test_an_index_that_is_none(tmp_path, content):
    several_files(tmp_path)[0].write_text(content)
    with pytest.raises(MissingInputError, match="not an index: expected weight_map"):
        read(tmp_path)


def test_an_index_without_all_its_files(tmp_path):
    index, _ = several_files(tmp_path)
    second = tmp_path / "diffusion_pytorch_model-00002-of-00002.safetensors"
    second.unlink()
    for _ in ("gone", "a broken link"):
        with pytest.raises(
            MissingInputError, match=r"1 of the 2 files .* not there.*00002-of-00002"
        ):
            read(tmp_path)
        second.unlink(missing_ok=True)
        second.symlink_to(tmp_path / "nowhere")
    with pytest.raises(MissingInputError, match="is one of several files; give their folder"):
        read(index.with_name("diffusion_pytorch_model-00001-of-00002.safetensors"))


# --- objects and counts ---------------------------------------------------------------------


class Hyper:
    """Somebody's class, which is not here when the file is read."""

    def __init__(self) -> None:
        self.rate = 1e-4


def foreign() -> dict:
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.no_decay = True  # type: ignore[attr-defined]
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
    return {
        "scheduler": torch.optim.lr_scheduler.MultiStepLR(optimizer, [10]).state_dict(),
        "parameter": weight,
        "partial": functools.partial(torch.optim.Adam, lr=1e-4),
        "module": torch.nn.MSELoss(),
        "version": torch.__version__,
        "date": datetime.datetime(2024, 1, 1),
        "complex": torch.zeros(2, dtype=torch.complex64),
        "class": Hyper(),
        "path": Path("/x"),
        "subclass": torch.zeros(2).as_subclass(torch.nn.Parameter),
    }


@pytest.mark.parametrize("save", [save_zip, save_legacy])
@pytest.mark.parametrize("name", foreign())
def test_foreign_objects_are_passed_over_and_named(tmp_path, save, name):
    path = save({"state_dict": raw(), "extra": foreign()[name]}, tmp_path / "x.pt")
    contents, weights = weight_file.read_weights(path)
    assert same(weights.autoencoder, raw())
    if name == "class":
        assert contents.stubbed == [f"{__name__}.Hyper"]


def lightning(global_step: int, batches: int, optimizers: int = 2) -> dict:
    progress = {"total": {"ready": batches, "completed": batches}}
    return {
        "state_dict": raw(),
        "global_step": global_step,
        "optimizer_states": [{"state": {}, "param_groups": []}] * optimizers,
        "loops": {"fit_loop": {"epoch_loop.batch_progress": progress}},
    }


@pytest.mark.parametrize(
    ("content", "iteration"),
    [
        (lightning(20, 10), 10),
        (lightning(10, 10), 10),
        (lightning(10, 10, 1), 10),
        ({"state_dict": raw(), "global_step": 7}, 7),
        ({"model": raw(), "global_steps": 8}, 8),
        ({"model": raw(), "step": 9}, 9),
    ],
)
def test_the_iteration_counts_updates_of_the_decoder(tmp_path, content, iteration):
    assert weight_file.read(save_zip(content, tmp_path / "x.pt")).iteration == iteration


# --- discriminators -------------------------------------------------------------------------


def test_another_kind_of_discriminator_is_left_out_and_a_new_one_warms_up(tmp_path, capsys):
    shards = runs.make_shards(tmp_path)
    path = runs.make_weights(tmp_path / "model.ckpt")
    content = torch.load(path, weights_only=True)
    state = content["state_dict"]
    content["state_dict"] = {
        k.replace("running_mean", "loc"): v
        for k, v in state.items()
        if not (k.startswith("loss.disc") and k.endswith(("running_var", "num_batches_tracked")))
    }
    torch.save(content, path)
    extra = (f"data.sources={shards}", "stop_iteration=101", "adversarial.warmup_iterations=2")
    assert train(runs.recipe(tmp_path, "run", *extra)) == 0
    shown = capsys.readouterr().out
    assert "of another kind and left out: a new one trains alone for 2 iterations" in shown


def test_a_discriminator_of_another_size_names_it_and_a_new_one_can_be_asked_for(tmp_path):
    shards = runs.make_shards(tmp_path)
    runs.make_weights(tmp_path / "model.ckpt")
    extra = (f"data.sources={shards}", "stop_iteration=101", "adversarial.ndf=8")
    with pytest.raises(MissingInputError, match=r"adversarial\.ndf=16 and adversarial\.n_layers=2"):
        train(runs.recipe(tmp_path, "run", *extra))
    assert train(runs.recipe(tmp_path, "run", *extra, "init.discriminator=new")) == 0


def test_a_discriminator_that_is_not_finite_is_refused_at_the_start(tmp_path):
    """Training would leave out every update, and blame the learning rate."""
    shards = runs.make_shards(tmp_path)
    content = torch.load(runs.make_weights(tmp_path / "model.ckpt"), weights_only=True)
    content["state_dict"]["loss.discriminator.main.0.weight"][0] = torch.nan
    torch.save(content, tmp_path / "model.ckpt")
    extra = (f"data.sources={shards}", "stop_iteration=101")
    with pytest.raises(MissingInputError, match=r"main\.0\.weight first.*init\.discriminator=new"):
        train(runs.recipe(tmp_path, "run", *extra))


# --- other architectures --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensors", "what"),
    [
        ({"decoder.middle.0.residual.0.gamma": (4, 1, 1, 1)}, "Wan"),
        ({"encoder.down_blocks.0.norm1.gamma": (4, 1, 1, 1)}, "Wan's or Qwen-Image's"),
        ({"bn.running_mean": (128,), "encoder.conv_in.weight": (8, 3, 3, 3)}, "FLUX.2"),
        ({"decoder.stages.0.0.main.conv.weight": (8, 8, 3, 3)}, "DC-AE"),
        ({"encoder.down_blocks.0.0.conv1.weight": (8, 8, 3, 3)}, "DC-AE"),
        ({"encoder.layers.0.weight": (64, 3, 3, 3)}, "TAESD"),
        ({"decoder.1.weight": (64, 4, 3, 3)}, "TAESD"),
        ({f"decoder.conv{i}.weight": (4, 4, 3, 3, 3) for i in range(3)}, "video"),
        ({"quantize.embedding.weight": (8, 4), "encoder.conv_in.weight": (8, 3, 3, 3)}, "VQ"),
    ],
)
def test_other_architectures_are_refused_by_name(tmp_path, tensors, what):
    save_file({k: torch.zeros(shape) for k, shape in tensors.items()}, tmp_path / "w")
    with pytest.raises(MissingInputError, match=f"{what}.*another architecture"):
        read(tmp_path / "w")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("AutoencoderKLWan", "Wan's"),
        ("AutoencoderTiny", "TAESD"),
        ("AutoencoderKLNew", "KLNew"),
        ("VQModel", "VQ autoencoder"),
        ("ConsistencyDecoderVAE", "consistency decoder"),
    ],
)
def test_other_classes_are_refused_by_name(tmp_path, name, what):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": name}))
    save_file(to_diffusers(raw()), tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(MissingInputError, match=f"{what}.*another architecture"):
        read(tmp_path)


def test_another_activation_is_refused(tmp_path):
    """No tensor shows it, and the network would compute something else."""
    save_file(to_diffusers(raw()), tmp_path / "diffusion_pytorch_model.safetensors")
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"_class_name": "AutoencoderKL", "act_fn": "swish"}))
    assert same(read(tmp_path).autoencoder, raw())
    config.write_text(json.dumps({"_class_name": "AutoencoderKL", "act_fn": "gelu"}))
    with pytest.raises(MissingInputError, match="act_fn=gelu, another architecture"):
        read(tmp_path)


def test_a_file_that_wants_to_run_something_is_refused(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.system, ("true",)

    path = save_zip({"state_dict": raw(), "extra": Attack()}, tmp_path / "x.pt")
    with pytest.raises(MissingInputError, match=r"asks to run posix\.system"):
        read(path)
