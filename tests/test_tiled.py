"""Tiled decoding is that of the programs it is named after, and measured against the whole."""

import itertools
import math

import pytest
import torch
from diffusers import AutoencoderKL as DiffusersAutoencoderKL
from torch import Tensor

from kl_f8_train import images, shipped
from kl_f8_train.core.model import AutoencoderKL
from kl_f8_train.score import tiled
from kl_f8_train.weights import weight_file
from kl_f8_train.weights.names import to_diffusers


@pytest.fixture(scope="module")
def mini() -> AutoencoderKL:
    return weight_file.load_autoencoder(shipped.BASE_NAME)


@pytest.fixture(scope="module")
def latents(mini) -> Tensor:
    """Of a photograph, 20 x 32: not a whole number of tiles."""
    picture = images.decode(sorted(shipped.HELD_OUT.glob("*.jpg"))[5].read_bytes())
    with torch.no_grad():
        return mini.encode(images.to_float(picture[None, :, :160])).mean


def on_diffusers(mini: AutoencoderKL, sample_size: int) -> DiffusersAutoencoderKL:
    model = DiffusersAutoencoderKL(
        block_out_channels=(16, 32, 64, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=sample_size,
    )
    model.load_state_dict(to_diffusers(mini.state_dict()))
    model.enable_tiling()
    return model.eval()


@pytest.mark.parametrize("sample_size", [64, 96, 128])
def test_diffusers_tiles_are_those_of_diffusers(mini, latents, sample_size):
    with torch.no_grad():
        theirs = on_diffusers(mini, sample_size).decode(latents).sample
        ours = tiled.decode_as_diffusers(mini.decode, latents, sample_size // 8, 8)
        whole = mini.decode(latents)
    assert ours.shape == theirs.shape == whole.shape
    assert (ours - theirs).abs().max() < 1e-4
    assert (ours - whole).abs().max() > 0.01


def test_what_fits_in_a_tile_is_decoded_at_once(mini, latents):
    part = latents[:, :, :16, :12]
    decodes = tiled.tiled_decodes(mini.decode, part, 256, 8)  # ComfyUI's are half as wide, too
    found = tiled.seams(decodes["whole"], decodes)
    assert torch.equal(decodes["whole"], decodes["diffusers"])
    assert math.isinf(found["diffusers"].psnr)
    assert found["ComfyUI"].psnr > 120  # the mean of three equal passes


def seen_by_comfyui(length: int, tile: int, overlap: int, factor: int) -> Tensor:
    """Tile by tile the weight of every pixel of a line, one step of the ramp after the other."""
    starts = [0]
    while length > tile and starts[-1] + (tile - overlap) < length - overlap:
        starts.append(starts[-1] + tile - overlap)
    lines = []
    for start in starts:
        line, end = torch.zeros(length * factor), min(start + tile, length)
        line[start * factor : end * factor] = 1.0
        for t, side in itertools.product(range(overlap * factor), (0, 1)):
            place = end * factor - 1 - t if side else start * factor + t
            line[place] *= (t + 1) / (overlap * factor)
        lines.append(line)
    return torch.stack(lines)


def test_a_pass_of_comfyui_is_a_weighted_mean():
    """Each tile "decodes" to its own number: what comes out are the weights."""
    numbers = itertools.count(1)

    def decode(z: Tensor) -> Tensor:
        return torch.full((1, 3, z.shape[2] * 8, z.shape[3] * 8), float(next(numbers)))

    z = torch.zeros(1, 4, 8, 38)
    found = tiled._weighted_pass(decode, z, (8, 16), 4, 8)[0, 0, 0]
    weights = seen_by_comfyui(38, 16, 4, 8)
    assert len(weights) == 3
    expected = (weights * torch.arange(1.0, 4.0)[:, None]).sum(0) / weights.sum(0)
    torch.testing.assert_close(found, expected)


def test_tiles_of_comfyui_reach_the_end():
    assert list(tiled._starts(38, 16, 4)) == [0, 12, 24]
    assert list(tiled._starts(28, 16, 4)) == [0, 12]
    assert list(tiled._starts(16, 16, 4)) == [0]
    for length, tile, overlap in itertools.product(range(17, 90), (16, 8), (0, 1, 3)):
        starts = list(tiled._starts(length, tile, overlap))
        covered = {i for start in starts for i in range(start, min(length, start + tile))}
        assert covered == set(range(length))
        assert all(b - a <= tile - overlap for a, b in itertools.pairwise(starts))


@pytest.mark.parametrize("way", tiled.WAYS)
@pytest.mark.parametrize("shape", [(24, 40), (9, 70), (70, 9), (33, 33)])
def test_a_decoder_that_sees_no_neighbours_has_no_seams(way, shape):
    z = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0))

    def decode(part: Tensor) -> Tensor:
        return part.repeat_interleave(8, 2).repeat_interleave(8, 3)

    found = tiled.WAYS[way](decode, z, 8, 8)
    torch.testing.assert_close(found, decode(z))


def test_seams_are_measured_against_whole_and_photograph(mini, latents):
    decodes = tiled.tiled_decodes(mini.decode, latents, 64, 8)
    image = decodes["whole"].clone()
    image[:, 0] = (image[:, 0] + 0.02).clamp(0, 1)
    for way, found in tiled.seams(image, decodes).items():
        error = (decodes["whole"] - decodes[way]).square().mean().item()
        assert found.psnr == pytest.approx(-10 * math.log10(error))
        assert 15 < found.psnr < 60
        assert 1 < found.largest < 255
        assert found.loss > 0
