from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from sdlite.errors import InputError
from sdlite.tiling import Tiling, decode, encode, grid

FAST = {"num_inference_steps": 1, "guidance_scale": 1.0, "seed": 0}


def upscale(latents):
    """A decoder with no context: each latent is one block of pixels, so tiles must not be seen at
    all.
    """
    return np.repeat(np.repeat(latents[:, :3], 8, axis=2), 8, axis=3)


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (2, 4, 20, 13), (1, 4, 9, 8), (1, 4, 33, 40)])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
def test_tiles_of_a_decoder_without_context_are_not_seen(shape, overlap):
    z = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    np.testing.assert_allclose(
        decode(upscale, z, Tiling(64, overlap), 8), upscale(z), rtol=1e-6, atol=1e-6
    )


def test_no_call_sees_more_than_a_tile():
    sizes = []
    decode(
        lambda z: sizes.append(z.shape[2:]) or upscale(z),
        np.zeros((1, 4, 40, 24), np.float32),
        Tiling(64),
        8,
    )
    assert max(max(s) for s in sizes) <= 8
    assert len(set(sizes)) == 1, "an engine that compiles for a shape would compile again"


@pytest.mark.parametrize(
    ("length", "most", "overlap", "side", "starts"),
    [
        (8, 8, 0.25, 8, [0]),
        (64, 40, 0.25, 37, [0, 27]),  # 512 px in tiles of 320 or less
        (64, 32, 0.25, 26, [0, 19, 38]),
        (64, 32, 0.0, 32, [0, 32]),
        (9, 8, 0.5, 6, [0, 3]),
    ],
)
def test_grid_is_the_fewest_tiles_of_one_size(length, most, overlap, side, starts):
    assert grid(length, most, overlap) == (side, starts)
    assert all(b - a <= side - int(overlap * side) for a, b in pairwise(starts))
    assert starts[-1] + side == length


@pytest.mark.parametrize("axis", [2, 3])
def test_a_tile_fades_in_over_the_one_before(axis):
    """Tiles of 0, then of 1: linear from the first shared line to the last, in both directions
    (diffusers' blend_h, blend_v).
    """
    values = iter([0.0, 1.0])

    def flat(z):
        return np.full((1, 3, 8 * z.shape[2], 8 * z.shape[3]), next(values), np.float32)

    got = decode(
        flat, np.zeros((1, 4, 6, 4) if axis == 2 else (1, 4, 4, 6), np.float32), Tiling(32, 0.5), 8
    )
    line = np.moveaxis(got, axis, -1)[0, 0, 0]
    np.testing.assert_allclose(line, [0] * 16 + [i / 16 for i in range(16)] + [1] * 16)


def test_tiled_decode_is_about_as_close_to_the_whole_as_diffusers():
    torch = pytest.importorskip("torch", reason="needs the torch extra")
    AutoencoderKL = pytest.importorskip("diffusers", reason="needs the torch extra").AutoencoderKL
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        sample_size=32,
        norm_num_groups=4,
    ).eval()
    z = torch.randn(2, 4, 19, 26)

    def network(tile):
        with torch.no_grad():
            return vae.decode(torch.from_numpy(tile), return_dict=False)[0].numpy()

    got = decode(network, z.numpy(), Tiling(32, 0.25), 4)
    whole = network(z.numpy())
    vae.enable_tiling()
    ours, theirs = (float(np.sqrt(np.square(x - whole).mean())) for x in (got, network(z.numpy())))
    assert 1e-3 < ours < 1.15 * theirs, (
        "tiles cannot be seen at all, or are seen more than diffusers' larger ones are"
    )


@pytest.mark.parametrize("side", [(6, 11), (4, 9), (5, 5)])
def test_encoding_in_tiles_is_encoding_where_a_latent_sees_its_own_pixels(side):
    pixels = np.random.default_rng(0).random((2, 3, 8 * side[0], 8 * side[1])).astype(np.float32)
    seen = []

    def mean(tile):
        seen.append(tile.shape[2:])
        b, c, h, w = tile.shape
        return tile.reshape(b, c, h // 8, 8, w // 8, 8).mean((3, 5))

    got = encode(mean, pixels, Tiling(32, 0.25), 8)
    assert len(seen) > 1
    assert len(set(seen)) == 1
    assert max(seen[0]) <= 32
    np.testing.assert_allclose(got, mean(pixels), rtol=0, atol=1e-6)


def test_an_edit_encodes_in_tiles_too(emoji):
    image = emoji("pizza", height=128, width=128, **FAST).images[0]
    call = {"image": image, "strength": 0.0, "output_type": "latent", **FAST}
    whole = emoji("pizza", **call).images
    try:
        emoji.enable_vae_tiling(64)
        tiled = emoji("pizza", **call).images
    finally:
        emoji.disable_vae_tiling()
    assert tiled.shape == whole.shape
    assert 1e-4 < np.abs(tiled - whole).mean() < 0.3 * np.abs(whole).mean()


def test_pipeline_tiles_only_larger_pictures_and_says_so(emoji):
    plain = np.asarray(emoji("pizza", height=128, width=64, **FAST).images[0])
    small = np.asarray(emoji("pizza", **FAST).images[0])
    try:
        emoji.enable_vae_tiling()
        assert any("tiles of at most 64 px" in n for n in emoji.report.notes)
        assert (np.asarray(emoji("pizza", **FAST).images[0]) == small).all()
        tiled = np.asarray(emoji("pizza", height=128, width=64, **FAST).images[0])
        assert tiled.shape == plain.shape
        assert 0 < np.abs(tiled.astype(int) - plain).mean() < 25
        emoji.enable_vae_tiling(32, overlap=0.5)
        assert sum("tiles of" in n for n in emoji.report.notes) == 1
    finally:
        emoji.disable_vae_tiling()
    assert not any("tiles of" in n for n in emoji.report.notes)
    assert (np.asarray(emoji("pizza", height=128, width=64, **FAST).images[0]) == plain).all()


@pytest.mark.parametrize(
    ("size", "overlap"),
    [
        (60, 0.25),
        (-8, 0.25),
        (64, 1.0),
        (64, -0.1),
        (64.0, 0.25),
        ("64", 0.25),
        (True, 0.25),
        (64, "0.25"),
        (64, float("nan")),
    ],
)
def test_tile_that_cannot_be_is_refused(emoji, size, overlap):
    with pytest.raises(InputError, match="tile"):
        emoji.enable_vae_tiling(size, overlap)
