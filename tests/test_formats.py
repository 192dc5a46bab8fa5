import pytest
import samples
import torch

from kl_f8_train.errors import MissingInputError
from kl_f8_train.weights import names

OLD_SPELLING = {
    ".to_q.": ".query.",
    ".to_k.": ".key.",
    ".to_v.": ".value.",
    ".to_out.0.": ".proj_attn.",
}


def old_spelling(state: names.State) -> names.State:
    """The attention names of diffusers before 0.18."""
    renamed = {}
    for key, value in state.items():
        for new, old in OLD_SPELLING.items():
            key = key.replace(new, old)
        renamed[key] = value
    return renamed


def full_state() -> names.State:
    return dict(samples.meta_vae(**samples.FULL).state_dict())


def tiny_state() -> names.State:
    return dict(samples.tiny_vae().state_dict())


def shapes(state: names.State) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


def equal(one: names.State, other: names.State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def diffusers_vae(shape: dict) -> torch.nn.Module:
    from diffusers import AutoencoderKL

    settings = names.diffusers_config(
        shape["ch"], list(shape["ch_mult"]), shape["num_res_blocks"], shape["z_channels"], 256
    )
    return AutoencoderKL.from_config(settings)


# --- names ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_full_table_is_diffusers_own():
    with torch.device("meta"):
        theirs = shapes(diffusers_vae(samples.FULL).state_dict())
    ours = full_state()
    assert len(ours) == len(theirs) == 248
    assert shapes(names.to_diffusers(ours)) == theirs


def test_full_table_there_and_back():
    ours = full_state()
    there = names.to_diffusers(ours)
    assert len(there) == 248
    assert shapes(names.from_diffusers(there)) == shapes(ours)
    assert list(names.from_diffusers(there)) == list(ours)


def test_full_table_from_the_old_spelling():
    ours = full_state()
    old = old_spelling(names.to_diffusers(ours))
    assert sum(".query." in key or ".proj_attn." in key for key in old) == 8
    assert shapes(names.from_diffusers(old)) == shapes(ours)


@pytest.mark.parametrize(
    ("compvis", "diffusers"),
    [
        ("encoder.conv_in.weight", "encoder.conv_in.weight"),
        ("encoder.down.1.block.0.conv1.bias", "encoder.down_blocks.1.resnets.0.conv1.bias"),
        ("decoder.up.0.block.0.nin_shortcut.x", "decoder.up_blocks.3.resnets.0.conv_shortcut.x"),
        ("encoder.down.2.downsample.conv.bias", "encoder.down_blocks.2.downsamplers.0.conv.bias"),
        ("encoder.mid.block_1.norm1.weight", "encoder.mid_block.resnets.0.norm1.weight"),
        ("decoder.mid.block_2.conv2.bias", "decoder.mid_block.resnets.1.conv2.bias"),
        ("decoder.mid.attn_1.norm.weight", "decoder.mid_block.attentions.0.group_norm.weight"),
        ("decoder.mid.attn_1.q.weight", "decoder.mid_block.attentions.0.to_q.weight"),
        ("decoder.mid.attn_1.proj_out.bias", "decoder.mid_block.attentions.0.to_out.0.bias"),
        ("decoder.up.0.block.2.conv1.weight", "decoder.up_blocks.3.resnets.2.conv1.weight"),
        ("decoder.up.3.upsample.conv.bias", "decoder.up_blocks.0.upsamplers.0.conv.bias"),
        ("decoder.norm_out.weight", "decoder.conv_norm_out.weight"),
        ("decoder.conv_out.bias", "decoder.conv_out.bias"),
        ("quant_conv.weight", "quant_conv.weight"),
        ("post_quant_conv.bias", "post_quant_conv.bias"),
    ],
)  # fmt: skip
def test_names(compvis, diffusers):
    assert names.diffusers_name(compvis, levels=4) == diffusers
    assert names.compvis_name(diffusers, levels=4) == compvis


def test_attention_weights_change_rank_and_nothing_else():
    ours = tiny_state()
    theirs = names.to_diffusers(ours)
    key = "decoder.mid_block.attentions.0.to_q.weight"
    assert theirs[key].shape == (64, 64)
    assert torch.equal(theirs[key], ours["decoder.mid.attn_1.q.weight"][:, :, 0, 0])
    assert sum(value.ndim == 2 for value in theirs.values()) == 8
    assert equal(names.from_diffusers(theirs), ours)


def test_attention_weights_of_rank_4_are_accepted():
    ours = tiny_state()
    theirs = old_spelling(names.to_diffusers(ours))
    for key in list(theirs):
        if theirs[key].ndim == 2:
            theirs[key] = theirs[key][:, :, None, None]
    assert equal(names.from_diffusers(theirs), ours)


@pytest.mark.slow
def test_diffusers_computes_the_same():
    ours = samples.tiny_vae()
    theirs = diffusers_vae(samples.TINY)
    theirs.load_state_dict(names.to_diffusers(ours.state_dict()), strict=True)
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        posterior, expected = ours.encode(images), theirs.encode(images).latent_dist
        torch.testing.assert_close(posterior.mean, expected.mean, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(posterior.logvar, expected.logvar, atol=1e-5, rtol=1e-4)
        decoded = theirs.decode(expected.mean).sample
        torch.testing.assert_close(ours.decode(posterior.mean), decoded, atol=1e-5, rtol=1e-4)


# --- recognising ----------------------------------------------------------------------------


def test_compvis_autoencoder():
    weights = names.recognise(tiny_state())
    assert weights.layout == "CompVis autoencoder"
    assert equal(weights.autoencoder, tiny_state())
    assert weights.discriminator is None
    assert weights.logvar is None
    assert weights.dropped == []


def test_original_training_file():
    state = tiny_state() | {
        "loss.logvar": torch.tensor(0.25),
        "loss.discriminator.main.0.weight": torch.ones(2),
        "loss.discriminator.main.0.bias": torch.zeros(2),
        "loss.perceptual_loss.net.slice1.0.weight": torch.ones(3),
        "model_ema.decay": torch.tensor(0.5),
        "model_ema.num_updates": torch.tensor(250, dtype=torch.int32),
        "model_ema.decoderconv_inweight": torch.ones(1),
    }
    weights = names.recognise(state)
    assert equal(weights.autoencoder, tiny_state())
    assert weights.discriminator is not None
    assert set(weights.discriminator) == {"main.0.weight", "main.0.bias"}
    assert weights.logvar == 0.25
    assert weights.ema_scalars == {"model_ema.decay": 0.5, "model_ema.num_updates": 250.0}
    assert set(weights.dropped) == {
        "loss.perceptual_loss.net.slice1.0.weight",
        "model_ema.decoderconv_inweight",
    }
    wanted = set(names.relevant(state))
    assert set(state) - wanted == set(weights.dropped)


def test_stable_diffusion_checkpoint():
    state = {f"first_stage_model.{key}": value for key, value in tiny_state().items()}
    state["model.diffusion_model.out.weight"] = torch.ones(1)
    state["model_ema.decay"] = torch.tensor(0.5)
    weights = names.recognise(state)
    assert weights.layout == "Stable Diffusion checkpoint"
    assert equal(weights.autoencoder, tiny_state())
    assert weights.ema_scalars == {"model_ema.decay": 0.5}
    assert weights.dropped == ["model.diffusion_model.out.weight"]
    assert set(names.relevant(state)) == set(state) - set(weights.dropped)


def test_stable_diffusion_xl_is_told_by_its_text_encoders():
    state = {f"first_stage_model.{key}": value for key, value in tiny_state().items()}
    state["conditioner.embedders.0.transformer.x"] = torch.ones(1)
    assert names.recognise(state).layout == "Stable Diffusion XL checkpoint"


@pytest.mark.parametrize("rename", [dict, names.to_diffusers])
@pytest.mark.parametrize("prefix", ["module.", "model.vae.", "autoencoder."])
def test_below_a_wrappers_name(prefix, rename):
    state = {f"{prefix}{key}": value for key, value in rename(tiny_state()).items()}
    state |= {f"{prefix}loss.logvar": torch.tensor(0.25), "other.weight": torch.ones(1)}
    weights = names.recognise(state)
    assert equal(weights.autoencoder, tiny_state())
    assert weights.logvar == 0.25
    assert weights.dropped == ["other.weight"]
    assert set(names.relevant(state)) == set(state) - {"other.weight"}


def test_two_autoencoders_in_one_file():
    state = {f"{p}{k}": v for p in ("model.", "model_copy.") for k, v in tiny_state().items()}
    for look in (names.relevant, names.recognise):
        with pytest.raises(
            MissingInputError, match=r"several autoencoders .* model\., model_copy\."
        ):
            look(state)


def test_scalars_that_are_none():
    state = tiny_state() | {"loss.logvar": torch.ones(3), "model_ema.decay": torch.ones(2)}
    weights = names.recognise(state)
    assert weights.logvar is None
    assert weights.ema_scalars == {}


@pytest.mark.parametrize("rename", [dict, old_spelling])
def test_diffusers_autoencoder(rename):
    weights = names.recognise(rename(names.to_diffusers(tiny_state())))
    assert weights.layout == "diffusers autoencoder"
    assert equal(weights.autoencoder, tiny_state())


def training_checkpoint() -> names.State:
    raw = tiny_state()
    return {
        **{f"autoencoder.{key}": value for key, value in raw.items()},
        "ema.decoder.conv_in.bias": raw["decoder.conv_in.bias"] + 1,
        "discriminator.main.0.weight": torch.ones(1),
        "logvar": torch.tensor(0.0),
    }


def test_training_checkpoint():
    raw = names.recognise(training_checkpoint(), "raw")
    ema = names.recognise(training_checkpoint(), "ema")
    assert equal(raw.autoencoder, tiny_state())
    changed = [k for k, v in ema.autoencoder.items() if not torch.equal(v, raw.autoencoder[k])]
    assert changed == ["decoder.conv_in.bias"]
    assert list(ema.autoencoder) == list(raw.autoencoder)
    assert "EMA" in ema.layout
    assert "raw" in raw.layout
    assert set(ema.discriminator or {}) == {"main.0.weight"}


def test_training_checkpoint_with_a_broken_ema():
    without = {k: v for k, v in training_checkpoint().items() if not k.startswith("ema.")}
    with pytest.raises(MissingInputError, match="EMA"):
        names.recognise(without, "ema")
    assert names.recognise(without, "raw").autoencoder
    foreign = training_checkpoint() | {"ema.elsewhere.weight": torch.ones(1)}
    with pytest.raises(MissingInputError, match=r"elsewhere\.weight"):
        names.recognise(foreign, "ema")


@pytest.mark.parametrize("state", [{}, {"model.weight": torch.ones(1)}, {"conv_in": torch.ones(1)}])
def test_nothing_found(state):
    with pytest.raises(MissingInputError, match="no autoencoder in this file"):
        names.recognise(state)


# --- shapes ---------------------------------------------------------------------------------


def test_check_shapes_accepts_what_fits():
    names.check_shapes(tiny_state(), shapes(tiny_state()))


def test_check_shapes_names_what_differs():
    expected = shapes(tiny_state())
    state = tiny_state()
    del state["encoder.conv_in.bias"]
    state["surplus"] = torch.ones(1)
    state["decoder.conv_out.weight"] = torch.ones(3, 7, 3, 3)
    with pytest.raises(MissingInputError) as caught:
        names.check_shapes(state, expected)
    message = str(caught.value)
    assert "missing encoder.conv_in.bias" in message
    assert "unexpected surplus" in message
    assert "decoder.conv_out.weight is (3, 7, 3, 3), expected (3, 32, 3, 3)" in message


@pytest.mark.parametrize(
    ("change", "first"),
    [
        ({"ch": 64}, "encoder.conv_in.weight is (64, 3, 3, 3), expected (128, 3, 3, 3)"),
        ({"z_channels": 16, "embed_dim": 16}, "encoder.conv_out.weight is (32, 512, 3, 3), "
         "expected (8, 512, 3, 3)"),
        ({"ch_mult": (1, 2, 4)}, "missing encoder.down.2.downsample.conv.weight, "
         "expected (512, 512, 3, 3)"),
    ],
)  # fmt: skip
def test_the_first_difference_comes_first(change, first):
    state = samples.meta_vae(**{**samples.FULL, **change}).state_dict()
    with pytest.raises(MissingInputError) as caught:
        names.check_shapes(state, shapes(full_state()))
    assert str(caught.value).split("\n")[1].strip() == first


def test_whole_numbers_are_no_weights():
    state = tiny_state() | {"decoder.conv_out.bias": torch.ones(3, dtype=torch.int32)}
    with pytest.raises(MissingInputError, match=r"conv_out\.bias is torch\.int32, expected float"):
        names.check_shapes(state, shapes(tiny_state()))


def test_check_shapes_shows_the_first_and_counts_the_rest():
    expected = shapes(tiny_state())
    with pytest.raises(MissingInputError) as caught:
        names.check_shapes({}, expected)
    assert next(iter(expected)) in str(caught.value)
    assert f"and {len(expected) - 5} more" in str(caught.value)


@pytest.mark.parametrize(
    "shape",
    [
        samples.TINY,
        samples.FULL,
        {"ch": 64, "ch_mult": (1, 1, 3), "num_res_blocks": 3, "z_channels": 5, "embed_dim": 3},
        {"ch": 32, "ch_mult": (2,), "num_res_blocks": 1, "z_channels": 16, "embed_dim": 16},
    ],
)
def test_architecture(shape):
    assert names.architecture(samples.meta_vae(**shape).state_dict()) == shape


@pytest.mark.parametrize(
    "absent", ["encoder.conv_in.weight", "decoder.conv_in.weight", "post_quant_conv.weight"]
)
def test_architecture_of_a_part(absent):
    state = tiny_state()
    del state[absent]
    with pytest.raises(MissingInputError, match=absent):
        names.architecture(state)


def test_architecture_of_a_decoder_alone():
    state = {k: v for k, v in tiny_state().items() if k.startswith("decoder.")}
    with pytest.raises(MissingInputError, match="not a whole autoencoder"):
        names.architecture(state)
