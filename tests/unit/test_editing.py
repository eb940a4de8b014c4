"""What a call edits: images and masks of every kind, strength, and what stays as it was."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

import sdlite
from sdlite import image_input
from sdlite.errors import InputError, SdliteError, ShapeError

FAST = {"seed": 1, "num_inference_steps": 4}


@pytest.fixture(scope="module")
def pipe():
    with sdlite.Pipeline.from_pretrained("emoji", backend="onnxruntime", threads=1) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def apple(pipe):
    return pipe("a red apple on a white background", **FAST).images[0]


def half(size=(64, 64)):
    """White on the right."""
    mask = np.zeros(size[::-1], np.uint8)
    mask[:, size[0] // 2 :] = 255
    return Image.fromarray(mask)


def array(image):
    return np.asarray(image).astype(int)


# --- strength


def test_strength_0_gives_the_image_back_and_1_ignores_it(pipe, apple):
    back = pipe("a blue ball", image=apple, strength=0, **FAST)
    assert back.calls == 0
    assert np.abs(array(back.images[0]) - array(apple)).mean() < 10
    anew = pipe("a blue ball", image=apple, strength=1, **FAST)
    plain = pipe("a blue ball", **FAST)
    assert (array(anew.images[0]) == array(plain.images[0])).all()
    assert anew.calls == plain.calls == 4
    some = pipe("a blue ball", image=apple, strength=0.5, **FAST)
    assert some.calls == 2
    assert some.images[0].info["strength"] == "0.5"
    assert "vae_encoder" in some.timings
    assert [n.part for n in some.report.networks][-1] == "vae_encoder"


def test_steps_that_callbacks_see_are_those_that_are_made(pipe, apple):
    seen = []
    pipe("x", image=apple, strength=0.75, callback=lambda *a: seen.append(a[:2]), **FAST)
    assert seen == [(1, 3), (2, 3), (3, 3)]
    at = []
    ends = {"callback_on_step_end": lambda pipe, i, t, given: at.append(float(t)) or {}}
    pipe("x", image=apple, strength=0.5, **ends, **FAST)
    plain = []
    ends = {"callback_on_step_end": lambda pipe, i, t, given: plain.append(float(t)) or {}}
    pipe("x", **ends, **FAST)
    assert at == plain[2:]


# --- what stays


def test_what_is_not_painted_is_the_images_own_bit_by_bit(pipe, apple):
    made = pipe("a green apple", image=apple, mask_image=half(), **FAST).images[0]
    assert (array(made)[:, :32] == array(apple)[:, :32]).all()
    assert (array(made)[:, 32:] != array(apple)[:, 32:]).any()
    floats = pipe("a green apple", image=apple, mask_image=half(), output_type="np", **FAST)
    assert (np.round(floats.images[0] * 255) == array(made)).all()


def test_a_crop_around_the_mask_is_put_back_into_the_whole_image(pipe, apple):
    large = apple.resize((200, 120))
    mask = np.zeros((120, 200), np.uint8)
    mask[40:60, 120:150] = 255
    call = {"image": large, "mask_image": Image.fromarray(mask), "padding_mask_crop": 8}
    made = pipe("a ball", **call, **FAST).images[0]
    assert made.size == (200, 120)
    assert (array(made) == array(large))[mask == 0].all()
    assert (array(made) != array(large))[mask > 0].any()
    floats = pipe("a ball", output_type="np", **call, **FAST).images[0]
    assert np.abs(floats * 255 - array(made)).max() < 1


def test_a_batch_edits_each_image_as_alone(pipe, apple):
    other = apple.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    call = {"strength": 0.5, "num_inference_steps": 4}
    both = pipe(["a ball", "a fox"], image=[apple, other], seed=[5, 9], **call).images
    for prompt, image, seed, got in zip(
        ("a ball", "a fox"), (apple, other), (5, 9), both, strict=True
    ):
        alone = pipe(prompt, image=image, seed=seed, **call).images[0]
        assert (array(alone) == array(got)).all()


def test_an_image_grows_outward(pipe, apple):
    canvas, mask = image_input.extended(apple, left=32, bottom=32)
    assert canvas.size == mask.size == (96, 96)
    made = pipe("a red apple", image=canvas, mask_image=mask, **FAST).images[0]
    assert (array(made)[:64, 32:] == array(apple)).all()
    with pytest.raises(InputError, match=r"border .* one of them above 0"):
        image_input.extended(apple)


# --- sizes


def test_the_size_is_the_images_own_rounded_down_or_the_calls(pipe, apple):
    made = pipe("x", image=apple.resize((100, 70)), strength=0.25, **FAST).images[0]
    assert made.size == (96, 64)
    made = pipe("x", image=apple.resize((100, 70)), strength=0.25, height=96, width=64, **FAST)
    assert made.images[0].size == (64, 96)
    with pytest.raises(ShapeError, match="max_pixels"):
        pipe("x", image=np.zeros((4096, 1024, 3), np.uint8), **FAST)
    with pytest.raises(ShapeError, match="height=20000"):
        pipe("x", image=np.zeros((20_000, 64, 3), np.uint8), **FAST)


def test_covering_keeps_the_middle():
    wide = np.zeros((10, 40, 3), np.uint8)
    wide[:, 15:25] = 255
    out = array(image_input.covering(Image.fromarray(wide), 20, 20))
    assert out.shape == (20, 20, 3)
    assert out[:, 2:-2].min() > 200


@pytest.mark.parametrize(
    ("box", "size", "pad", "right"),
    [
        ((10, 10, 20, 20), (64, 64), 0, (10, 10, 20, 20)),
        ((10, 10, 20, 20), (64, 64), 4, (6, 6, 24, 24)),
        ((0, 0, 10, 20), (64, 64), 0, (0, 0, 20, 20)),
        ((90, 40, 100, 60), (64, 64), 0, (80, 40, 100, 60)),
        ((0, 0, 100, 10), (64, 64), 0, (0, 0, 100, 60)),
        ((20, 20, 40, 30), (32, 64), 2, (16, 18, 44, 32)),
    ],
)
def test_crop_region_is_diffusers(box, size, pad, right):
    mask = np.zeros((60, 100), np.uint8)
    mask[box[1] : box[3], box[0] : box[2]] = 255
    painted = Image.fromarray(mask)
    assert image_input.crop_region(painted, *size, pad) == right
    diffusers = pytest.importorskip("diffusers", reason="needs the torch extra")
    theirs = diffusers.image_processor.VaeImageProcessor.get_crop_region
    assert tuple(theirs(painted, size[1], size[0], pad=pad)) == right


# --- images of every kind


def rgb(given):
    [image] = image_input.images("image", given, 1)
    return array(image)


def test_images_become_rgb_by_stated_rules(tmp_path):
    base = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5)
    assert (rgb(base) == array(base)).all()
    assert (rgb(array(base).astype(np.uint8)) == array(base)).all()
    assert (rgb(array(base) / 255) == array(base)).all()
    base.save(tmp_path / "a.png")
    assert (rgb(tmp_path / "a.png") == array(base)).all()
    assert (rgb(str(tmp_path / "a.png")) == array(base)).all()
    clear = base.convert("RGBA")
    clear.putalpha(0)
    assert (rgb(clear) == 255).all(), "transparent pixels over white"
    assert (rgb(base.convert("L")) == array(base.convert("L"))[..., None]).all()
    assert (rgb(base.convert("CMYK")) == array(base.convert("CMYK").convert("RGB"))).all()
    deep = Image.fromarray(np.full((4, 4), 65535 // 2, np.uint16))
    assert set(rgb(deep).ravel()) <= {127, 128}
    turned = Image.fromarray(np.zeros((4, 8, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "t.jpg", exif=exif)
    assert rgb(tmp_path / "t.jpg").shape == (8, 4, 3), "turned as EXIF says"
    assert rgb(base.convert("P", palette=Image.Palette.ADAPTIVE)).shape == (4, 4, 3)
    assert rgb(base.convert("1")).max() == 255


def test_transparency_as_a_mask():
    clear = Image.new("RGBA", (2, 1), (9, 9, 9, 255))
    clear.putpixel((1, 0), (9, 9, 9, 0))
    assert array(image_input.alpha_mask(clear)).tolist() == [[0, 255]]
    with pytest.raises(InputError, match="mode 'RGB', without transparency"):
        image_input.alpha_mask(clear.convert("RGB"))
    palette = Image.new("P", (2, 1), 1)
    palette.putpixel((1, 0), 0)
    palette.info["transparency"] = 0
    assert array(image_input.alpha_mask(palette)).tolist() == [[0, 255]]


def test_openais_mask_from_a_shell(pipe, apple, tmp_path, capsys):
    """The image's own transparency, or another file's."""
    from sdlite.cli import main

    clear = apple.convert("RGBA")
    clear.putalpha(Image.fromarray(np.uint8(255) - np.asarray(half())))
    clear.save(tmp_path / "clear.png")
    apple.save(tmp_path / "apple.png")
    where = np.asarray(half()) == 0
    start = ["generate", "a ball", "--steps", "1", "--seed", "1", "--quiet", "--alpha-mask"]
    for given in (["clear.png"], ["apple.png", "--mask", "clear.png"]):
        out = tmp_path / "out.png"
        files = [str(tmp_path / g) if g.endswith("png") else g for g in given]
        assert main([*start, "--image", *files, "--out", str(out)]) == 0
        made = np.asarray(Image.open(out))
        assert (made[where] == np.asarray(apple)[where]).all()
        assert (made[~where] != np.asarray(apple)[~where]).any()
    for given, says in (
        (["--image", "apple.png"], "without transparency"),
        ([], "without --image"),
    ):
        files = [str(tmp_path / g) if g.endswith("png") else g for g in given]
        assert main([*start, *files, "--out", str(tmp_path / "no.png")]) == 1
        assert says in capsys.readouterr().err
    assert not (tmp_path / "no.png").exists()


WRONG = Image.new("RGB", (64, 64))
BAD = [
    ({"image": 3}, "image=3; accepted: a PIL image"),
    ({"image": np.zeros((64, 64))}, r"array \(64, 64\); accepted"),
    ({"image": np.zeros((0, 64, 3), np.uint8)}, "accepted"),
    ({"image": np.full((64, 64, 3), np.nan)}, "NaN or infinity"),
    ({"image": np.full((64, 64, 3), 7.0)}, "from 7 to 7; accepted"),
    ({"image": np.zeros((64, 64, 3), np.int64)}, "image is int64"),
    ({"image": "no-such-file.png"}, "no-such-file.png does not exist"),
    ({"image": __file__}, "cannot be read as an image"),
    ({"image": [WRONG] * 3}, "3 images for 1 images; give one"),
    ({"image": WRONG, "strength": 1.5}, "strength=1.5"),
    ({"image": WRONG, "strength": "high"}, "strength='high'"),
    ({"image": WRONG, "strength": 0.2}, "strength=0.2 of 4 steps is not one step.* at least 0.25"),
    ({"strength": 0.5}, "strength is given without image"),
    ({"mask_image": WRONG}, "mask_image is given without image"),
    ({"image": WRONG, "padding_mask_crop": 4}, "padding_mask_crop is given without mask_image"),
    ({"image": WRONG, "mask_image": Image.new("L", (32, 64))}, "32x64 pixels, the image 64x64"),
    ({"image": WRONG, "mask_image": Image.new("L", (64, 64))}, "mask_image is empty"),
    ({"image": Image.new("I", (64, 64), 1 << 20)}, "values outside 0 to 65535"),
]


@pytest.mark.parametrize(("call", "says"), BAD)
def test_what_is_no_image_or_mask_is_one_line(pipe, call, says):
    with pytest.raises(SdliteError, match=says) as e:
        pipe("x", **FAST, **call)
    assert "\n" not in str(e.value)


def test_a_mask_that_is_lost_by_scaling_is_said(pipe):
    mask = np.zeros((640, 640), np.uint8)
    mask[3, 3] = 255
    call = {"image": Image.new("RGB", (640, 640)), "mask_image": Image.fromarray(mask)}
    with pytest.raises(InputError, match=r"mask_image is empty at 64x64: .* padding_mask_crop"):
        pipe("x", height=64, width=64, **call, **FAST)


def test_one_pixel_is_scaled_up(pipe):
    made = pipe("x", image=Image.new("RGB", (1, 1), "red"), strength=0.25, **FAST).images[0]
    assert made.size == (32, 32)


def test_a_model_without_an_encoder_says_how_to_get_one(copy, apple):
    import json

    from tests import folders

    path = copy / "sdlite.json"
    told = json.loads(path.read_text())
    for parts in told["variants"].values():
        del parts["vae_encoder"]
    path.write_text(json.dumps(told))
    folders.relist(copy)
    with sdlite.Pipeline.from_pretrained(copy, backend="onnxruntime", threads=1) as old:
        assert old("a ball", **FAST).images
        with pytest.raises(InputError, match=r"holds no vae_encoder.*\(sdlite convert\)"):
            old("a ball", image=apple, **FAST)
