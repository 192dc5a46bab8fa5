"""Overflow in fp16 is foreseen; the emulation agrees with torch's own half-precision kernels."""

import pytest
import samples
import torch

from kl_f8_train import images
from kl_f8_train.errors import MissingInputError, RunFailedError
from kl_f8_train.publish import half_precision


def loud(model, factor=1e6):
    """The same decoder in float32: a convolution scaled up, and the norm behind it undoes it."""
    model.decoder.mid.block_1.conv1.weight *= factor
    model.decoder.mid.block_1.conv1.bias *= factor
    return model


def warnings(model):
    result = half_precision.measure(model, [half_precision.pattern(32)])
    lines = half_precision.describe({"images": "a pattern", **result})
    return result, [line for line in lines if line.startswith("WARNING")]


@torch.no_grad()
def test_an_ordinary_decoder_is_fine():
    result, warned = warnings(samples.tiny_vae())
    assert warned == []
    assert result["largest_activation"] < 100
    assert result["float16"]["black"] == 0
    assert 0 < result["float16"]["mean"] < result["float16"]["max"] < 1
    assert result["float16"]["max"] < result["bfloat16"]["max"] < 10


@torch.no_grad()
def test_overflow_is_told_with_the_layer():
    exact = samples.tiny_vae().decode(torch.ones(1, 4, 8, 8))
    scaled = loud(samples.tiny_vae()).decode(torch.ones(1, 4, 8, 8))
    torch.testing.assert_close(scaled, exact, atol=1e-3, rtol=0)
    result, warned = warnings(loud(samples.tiny_vae()))
    assert len(warned) == 1
    assert "black in fp16" in warned[0]
    assert result["layer"] == "decoder.mid.block_1.conv1"
    assert result["largest_activation"] > 65504
    assert result["float16"] == {"mean": None, "max": None, "black": 1}
    assert result["bfloat16"]["black"] == 0


@torch.no_grad()
def test_a_decoder_broken_in_float32_is_refused():
    with pytest.raises(RunFailedError, match="float32"):
        warnings(loud(samples.tiny_vae(), float("inf")))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_emulation_agrees_with_real_kernels(dtype):
    picture = half_precision.pattern(32)
    model = samples.tiny_vae()
    latents = model.encode(images.to_float(picture[None])).mean
    exact = model.decode(latents)
    emulated = half_precision.measure(model, [picture])[str(dtype)[6:]]
    real = half_precision.levels(model.to(dtype).decode(latents.to(dtype)).float(), exact)
    assert 0.5 < emulated["mean"] / real[0] < 2
    assert 0.4 < emulated["max"] / real[1] < 2.5


@torch.no_grad()
def test_measuring_leaves_the_model_as_it_was():
    model, before = samples.tiny_vae(), samples.tiny_vae().state_dict()
    half_precision.measure(model, [half_precision.pattern(32)])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_images_are_chosen_and_named(tmp_path):
    named, chosen = half_precision.choose_images(None, 64)
    assert named == "3 photographs of the package at 64 x 64"
    assert [tuple(image.shape) for image in chosen] == [(3, 64, 64)] * 3
    (tmp_path / "p.png").write_bytes(samples.encode(samples.noise_picture(0), "PNG"))
    named, chosen = half_precision.choose_images(tmp_path, 32)
    assert named == f"1 image of {tmp_path.name} at 32 x 32"
    assert len(chosen) == 1
    (tmp_path / "p.png").unlink()
    with pytest.raises(MissingInputError, match="no images"):
        half_precision.choose_images(tmp_path, 32)
