"""The committed emoji shard and what the trainings make of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs the distill extra")
sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks" / "emoji"))

import build_data  # noqa: E402
import emoji as emoji_data  # noqa: E402


@pytest.fixture(scope="module")
def data():
    return emoji_data.load()


def test_shard_is_whole_small_and_held_out_by_hash(data):
    assert emoji_data.SHARD.stat().st_size < 12e6
    assert len(data) == 3511
    assert int(data.heldout.sum()) == 107
    assert [build_data.is_heldout(k) for k in data.keys] == data.heldout.tolist()
    toned = [k for k in data.keys if build_data.SKIN_TONES & set(k.split("-"))]
    assert 0.03 < 107 / len(toned) < 0.07


def test_heldout_pictures_are_never_drawn(data):
    drawn = torch.multinomial(
        data.weights(), 100_000, replacement=True, generator=torch.Generator().manual_seed(0)
    )
    assert not data.heldout[drawn].any()
    assert len(set(drawn.tolist())) > 3300


def test_a_concept_with_many_variants_is_not_drawn_in_proportion(data):
    weights = data.weights()
    share = {}
    for concept, w in zip(data.concepts, weights.tolist(), strict=True):
        share.setdefault(concept, []).append(w)
    single = next(v for v in share.values() if len(v) == 1)
    many = max(share.values(), key=len)
    assert sum(many) / sum(single) == pytest.approx(sum(w > 0 for w in many) ** 0.5, rel=1e-3)


@pytest.mark.parametrize(
    ("hexcode", "concept"),
    [
        (
            "1F469-1F3FB-200D-1F680",
            "1F9D1-200D-1F680",
        ),  # woman astronaut, light skin tone -> astronaut
        ("1F468-200D-1F680", "1F9D1-200D-1F680"),
        ("1F3C3-1F3FF-200D-2640", "1F3C3"),  # woman running -> person running
        ("1F34E", "1F34E"),
    ],
)
def test_concept_drops_skin_tone_and_gender(hexcode, concept):
    assert build_data.concept_of(hexcode) == concept


def test_background_is_the_named_colour(data):
    i = data.captions.index("red apple")
    x = data.composite(torch.tensor([i, i]), torch.tensor([emoji_data.NAMES.index("blue"), 0]))
    assert x.shape == (2, 3, 64, 64)
    assert ((x[0, :, 0, 0] + 1) * 127.5).round().int().tolist() == list(emoji_data.COLOURS["blue"])
    assert x[1, :, 0, 0].tolist() == [1, 1, 1]


def test_prompts_name_the_colour_and_are_repeatable(data):
    i = data.captions.index("red apple")
    assert data.prompt(i, 6, [0.9, 0.5, 0.9, 0.9]) == "red apple on a blue background"
    assert data.prompt(i, 0, [0.9, 0.5, 0.1, 0.1]) == "a red apple"
    assert data.prompt(i, 0, [0.05, 0.3, 0.9, 0.1]) == data.prompt(i, 0, [0.05, 0.3, 0.9, 0.1])


def test_folded_normalisation_gives_unit_latents_and_the_same_pictures():
    pytest.importorskip("diffusers", reason="needs the distill extra")
    from diffusers import AutoencoderKL
    from latents import fold_normalisation

    torch.manual_seed(0)
    vae = AutoencoderKL(
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        block_out_channels=(8, 8),
        sample_size=16,
        mid_block_add_attention=False,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()
    x = torch.randn(8, 3, 16, 16)
    with torch.no_grad():
        before = vae.encode(x).latent_dist
        mean, std = before.mean.mean((0, 2, 3)), before.mean.std((0, 2, 3))
        picture = vae.decode(before.mean).sample
        fold_normalisation(vae, mean, std)
        after = vae.encode(x).latent_dist
        torch.testing.assert_close(
            after.mean,
            (before.mean - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1),
            rtol=1e-4,
            atol=1e-5,
        )
        torch.testing.assert_close(
            after.std, before.std / std.view(1, -1, 1, 1), rtol=1e-4, atol=1e-6
        )
        torch.testing.assert_close(vae.decode(after.mean).sample, picture, rtol=1e-4, atol=1e-5)
    assert vae.config.scaling_factor == 1.0
