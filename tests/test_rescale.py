"""A rescaled decoder does not overflow in fp16, and in float32 is the same to the bit."""

import json
from pathlib import Path

import pytest
import runs
import samples
import torch
from safetensors.torch import save_file
from test_half_precision import loud

from kl_f8_train import images
from kl_f8_train.__main__ import main
from kl_f8_train.core.model import AutoencoderKL
from kl_f8_train.publish import half_precision, rescale
from kl_f8_train.publish.export import export
from kl_f8_train.run.train import train
from kl_f8_train.weights import weight_file

PICTURES = [half_precision.pattern(32)]


def latents(model: AutoencoderKL) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model.encode(images.to_float(picture[None])).mean for picture in PICTURES]


def blown_up(k: int = 17, seed: int = 0) -> AutoencoderKL:
    """A tiny decoder whose stream and inner activations are 2^k times what they were."""
    model = samples.tiny_vae()
    up = rescale.Rescaling(-k, {name: -k for name in blocks(model)})
    model.load_state_dict(up.apply(model.state_dict()))
    return model


def blocks(model: AutoencoderKL) -> list[str]:
    names = [name for name, _ in model.named_modules()]
    return [n.removesuffix(".conv1") for n in names if n.startswith("decoder.") and "conv1" in n]


@torch.no_grad()
@pytest.mark.parametrize("make", [blown_up, lambda: loud(samples.tiny_vae(), 2.0**20)])
def test_a_decoder_that_overflows_is_made_safe_and_stays_the_same(make):
    model = make()
    before = half_precision.measure(model, PICTURES)
    assert half_precision.overflows(before)
    probes = rescale.probes(latents(model))
    rescaling = rescale.plan_rescaling(model, probes)
    safe = samples.tiny_vae()
    safe.load_state_dict(rescaling.apply(model.state_dict()))
    rescale.prove(rescaling, model, safe, probes)
    after = half_precision.measure(safe, PICTURES)
    assert not half_precision.overflows(after)
    assert after["largest_activation"] <= half_precision.LIMIT / rescale.HEADROOM
    assert after["float16"]["mean"] < 0.5
    for z in latents(model):
        torch.testing.assert_close(safe.decode(z), model.decode(z), atol=2e-5, rtol=0)
    assert rescaling.proof["float32_largest_difference_in_levels"] <= rescale.EXACT_LEVELS
    assert 0 < rescaling.proof["largest_eps_share"] < 1


@torch.no_grad()
def test_where_eps_is_negligible_every_bit_is_the_same():
    model = blown_up(24)
    probes = latents(model)
    rescaling = rescale.Rescaling(8, {name: 8 for name in blocks(model)})
    safe = samples.tiny_vae()
    safe.load_state_dict(rescaling.apply(model.state_dict()))
    rescale.prove(rescaling, model, safe, probes)
    assert rescaling.proof["float32_bit_equal"]


def test_a_rescaling_that_eps_would_show_is_refused():
    model = samples.tiny_vae()
    rescaling = rescale.Rescaling(12, {})
    quiet = samples.tiny_vae()
    quiet.load_state_dict(rescaling.apply(model.state_dict()))
    with pytest.raises(Exception, match="eps"):
        rescale.prove(rescaling, model, quiet, latents(model))


def test_only_the_decoder_changes_and_no_bit_is_lost():
    state = samples.tiny_vae().state_dict()
    scaled = rescale.Rescaling(9, {"decoder.mid.block_1": 3}).apply(state)
    changed = {key for key in state if not torch.equal(state[key], scaled[key])}
    assert changed
    assert all(key.startswith("decoder.") for key in changed)
    back = rescale.Rescaling(-9, {"decoder.mid.block_1": -3}).apply(scaled)
    assert all(torch.equal(back[key], state[key]) for key in state)
    assert not any(".norm" in key or "conv_out" in key for key in changed)


@pytest.fixture(scope="module")
def loud_run(tmp_path_factory) -> Path:
    """A run whose decoder overflows in fp16."""
    folder = tmp_path_factory.mktemp("loud")
    runs.make_shards(folder)
    runs.make_weights(folder / "model.ckpt")
    content = torch.load(folder / "model.ckpt", weights_only=True)
    state = content["state_dict"]
    names = {k.removesuffix(".conv1.weight") for k in state if k.endswith(".conv1.weight")}
    up = rescale.Rescaling(-20, {n: -20 for n in names if n.startswith("decoder.")})
    content["state_dict"] = up.apply(state)
    torch.save(content, folder / "model.ckpt")
    train(runs.recipe(folder, "run", "stop_iteration=101", *runs.NO_ADVERSARIAL))
    return folder


def test_export_rescales_by_itself_says_so_and_keeps_the_proof(loud_run):
    said: list[str] = []
    out = export(loud_run / "run", force=True, say=said.append)
    record = json.loads((out / "export.json").read_text())
    proof = record["half_precision"]["rescaled"]
    assert half_precision.overflows(proof["before"])
    assert not half_precision.overflows(record["half_precision"])
    assert any(line.startswith("fp16-safe: ") for line in said)
    assert "half precision: safe" in said
    assert json.loads((out / "diffusers/config.json").read_text())["force_upcast"] is False
    trained = weight_file.load_autoencoder(loud_run / "run")
    exported = weight_file.load_autoencoder(out / "diffusers")
    z = latents(trained)[0]
    with torch.no_grad():
        assert half_precision.levels(trained.decode(z), exported.decode(z))[1] <= 1e-2
        assert torch.equal(latents(exported)[0], z)


def test_export_without_it_warns_and_offers_the_next_command(loud_run, tmp_path):
    said: list[str] = []
    export(loud_run / "run", tmp_path / "out", fp16_safe=False, say=said.append)
    (warning,) = [line for line in said if line.startswith("WARNING")]
    assert "--fp16-safe" in warning


def test_a_lone_file_is_made_safe(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file(blown_up().state_dict(), tmp_path / "loud.safetensors")
    assert main(["fp16-safe", "loud.safetensors", "--out", "safe"]) == 0
    assert "fp16-safe: the decoder's residual stream x 2^-" in capsys.readouterr().out
    record = json.loads(Path("safe/export.json").read_text())
    assert record["half_precision"]["rescaled"]["probes"] >= 9
    before = weight_file.load_autoencoder("loud.safetensors").state_dict()
    after = weight_file.load_autoencoder("safe/loud-fp16-safe.safetensors").state_dict()
    frozen = [key for key in before if key.startswith(("encoder.", "quant_conv."))]
    assert all(torch.equal(before[key], after[key]) for key in frozen)
    assert main(["fp16-safe", "loud.safetensors", "--out", "safe"]) == 2  # there already


def written(tmp_path: Path, model: AutoencoderKL, *flags: str, **config: object) -> dict:
    """config.json of `fp16-safe` of a diffusers-like file that states `config`."""
    about = {name: json.dumps(value) for name, value in config.items()}
    save_file(model.state_dict(), tmp_path / "w.safetensors", metadata=about)
    out = tmp_path / "o"
    assert main(["fp16-safe", str(tmp_path / "w.safetensors"), "--out", str(out), *flags]) == 0
    return json.loads((out / "diffusers/config.json").read_text())


@pytest.mark.parametrize("stated", [{}, {"force_upcast": True}, {"force_upcast": False}])
def test_nothing_is_rescaled_where_nothing_overflows(tmp_path, capsys, stated):
    assert written(tmp_path, samples.tiny_vae(), **stated)["force_upcast"] is False
    said = capsys.readouterr().out
    assert "nothing to rescale" in said
    assert "the same weights, bit for bit" in said
    changed = "stays" if stated.get("force_upcast") is False else "becomes"
    assert f"force_upcast {changed} false" in said
    copy = weight_file.load_autoencoder(tmp_path / "o/w-fp16-safe.safetensors").state_dict()
    assert samples.equal(copy, samples.tiny_vae().state_dict())


def loud_encoder() -> AutoencoderKL:
    model = samples.tiny_vae()
    model.encoder.mid.block_1.conv1.weight *= 2.0**20  # the norm behind it undoes that
    return model


@pytest.mark.parametrize("make", [loud_encoder, lambda: with_loud_attention(samples.tiny_vae())])
def test_pipelines_still_turn_to_float32_where_rescaling_cannot_help(tmp_path, capsys, make):
    assert written(tmp_path, make(), force_upcast=False)["force_upcast"] is True
    said = capsys.readouterr().out
    assert "force_upcast becomes true: the " in said


def with_loud_attention(model: AutoencoderKL) -> AutoencoderKL:
    """v large and proj_out small: an overflow that is neither in the stream nor in a block."""
    attention = model.decoder.mid.attn_1
    attention.v.weight *= 2.0**24
    attention.v.bias *= 2.0**24
    attention.proj_out.weight *= 2.0**-24
    return model


def test_a_run_exported_as_safe_states_it_and_one_that_overflows_does_not(loud_run, tmp_path):
    runs.make_weights(tmp_path / "model.ckpt")
    (tmp_path / "shards").symlink_to(loud_run / "shards")
    train(runs.recipe(tmp_path, "run", "stop_iteration=101", *runs.NO_ADVERSARIAL))
    said: list[str] = []
    for safe, folder in ((True, "safe"), (None, "as_is")):
        export(tmp_path / "run", tmp_path / folder, fp16_safe=safe, say=said.append)
    assert (
        json.loads((tmp_path / "safe/diffusers/config.json").read_text())["force_upcast"] is False
    )
    assert (
        json.loads((tmp_path / "as_is/diffusers/config.json").read_text())["force_upcast"] is True
    )
    assert sum("nothing to rescale" in line for line in said) == 1
    export(loud_run / "run", tmp_path / "loud", fp16_safe=False)
    assert json.loads((tmp_path / "loud/export.json").read_text())["facts"]["force_upcast"] is True
