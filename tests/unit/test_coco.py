"""COCO evaluation with stand-ins for clean-fid and open_clip: the protocol, resuming, and what is
refused.
"""

from __future__ import annotations

import json
import sys
import types

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch", reason="needs the torch extra")
pytest.importorskip("accelerate", reason="needs the distill extra")

from benchmarks import coco, quality  # noqa: E402


@pytest.fixture
def tools(monkeypatch):
    """clean-fid by mean colours, open_clip by whether a picture is as red as its caption says."""

    def features(folder):
        return np.stack(
            [
                np.asarray(Image.open(p).convert("RGB"), float).reshape(-1, 3).mean(0)
                for p in sorted(coco.Path(folder).glob("*.png"))
            ]
        )

    def checked(metric):
        def compute(a, b, *, mode, num_workers, device, use_dataparallel, verbose):
            assert (mode, device.type) == ("clean", "cpu")
            return metric(features(a), features(b))

        return compute

    class Clip(torch.nn.Module):
        def encode_image(self, x):
            return torch.stack([x[:, 0].mean((1, 2)), 1 - x[:, 0].mean((1, 2))], 1)

        def encode_text(self, ids):
            return torch.stack([ids.float(), 1 - ids.float()], 1)

    fid = types.SimpleNamespace(
        compute_fid=checked(quality.fid),
        compute_kid=checked(lambda a, b: quality.kid(a / 255, b / 255) / 1000),
    )
    clip = types.SimpleNamespace(
        create_model_and_transforms=lambda name, pretrained: (
            Clip(),
            None,
            lambda i: torch.from_numpy(np.asarray(i, np.float32).copy()).permute(2, 0, 1) / 255,
        ),
        get_tokenizer=lambda name: lambda texts: torch.tensor([int("red" in t) for t in texts]),
    )
    monkeypatch.setitem(sys.modules, "cleanfid", types.ModuleType("cleanfid"))
    monkeypatch.setitem(sys.modules, "cleanfid.fid", fid)
    monkeypatch.setitem(sys.modules, "open_clip", clip)


class Painter:
    """A pipeline that paints the colour of its prompt; `seeds` has what it was asked for."""

    artifact = types.SimpleNamespace(name="painter")
    report = types.SimpleNamespace(precision="fp32", backend="torch", engine="none")
    defaults = types.SimpleNamespace(num_inference_steps=4, guidance_scale=1.0)
    default_sampler = "ddim"

    def __init__(self, wrong=False):
        self.seeds, self.wrong = [], wrong

    def __call__(self, prompts, *, seed):
        self.seeds += seed
        rng = np.random.default_rng(seed)
        shades = [
            (
                (int(rng.integers(150, 255)), 0, 0)
                if ("red" in p) is not self.wrong
                else (0, int(rng.integers(150, 255)), 0)
            )
            for p in prompts
        ]
        return types.SimpleNamespace(images=[Image.new("RGB", (512, 512), c) for c in shades])


@pytest.fixture
def data(tmp_path):
    """12 pictures with two captions each, and the real ones."""
    notes = [
        {"image_id": i, "id": 2 * i + k, "caption": f"a {('red', 'green')[i % 2]}\n thing {k}"}
        for i in range(12)
        for k in range(2)
    ]
    (tmp_path / "captions.json").write_text(json.dumps({"annotations": notes}))
    (tmp_path / "val").mkdir()
    rng = np.random.default_rng(1)
    for i in range(12):
        colour = (
            (int(rng.integers(150, 255)), 0, 0)
            if i % 2 == 0
            else (0, int(rng.integers(150, 255)), 0)
        )
        Image.new("RGB", (300, 260), colour).save(tmp_path / "val" / f"{i}.jpg")
    assert coco.real(tmp_path / "val", tmp_path / "real") == 12
    return tmp_path


def test_captions_are_one_for_each_picture_and_the_same_for_everybody(data):
    a, b = (coco.captions(data / "captions.json", 10) for _ in range(2))
    assert a == b
    assert len({i for i, _ in a}) == 10
    assert "\n" not in a[0][1]
    with pytest.raises(SystemExit, match="12 pictures, 13 are asked for"):
        coco.captions(data / "captions.json", 13)
    with pytest.raises(SystemExit, match="not a COCO captions file"):
        coco.captions(data / "none.json", 1)


def test_pictures_are_256_px_and_an_interrupted_run_goes_on(data):
    chosen = coco.captions(data / "captions.json", 12)
    first = Painter()
    coco.generate(first, chosen, data / "made", batch=4)
    assert first.seeds == list(range(12))
    assert Image.open(data / "made" / f"{chosen[0][0]:012d}.png").size == (256, 256)
    (data / "made" / f"{chosen[5][0]:012d}.png").unlink()
    again = Painter()
    coco.generate(again, chosen, data / "made", batch=4)
    assert again.seeds == [5]
    with pytest.raises(SystemExit, match="another model, setting or caption set"):
        coco.generate(again, chosen[:3], data / "made")


def test_score_prefers_the_model_that_paints_what_the_caption_says(data, tools, monkeypatch):
    chosen, rows = coco.captions(data / "captions.json", 12), {}
    for name, wrong in (("good", False), ("bad", True)):
        coco.generate(Painter(wrong), chosen, data / name)
        rows[name] = coco.score(data / name, data / "real", least=12)
    assert rows["good"]["clip_score"] > rows["bad"]["clip_score"] + 0.3
    assert rows["good"]["pictures"] == 12
    assert rows["good"]["clip_model"] == "ViT-g-14 laion2b_s34b_b88k"
    for p in (data / "bad").glob("*.png"):
        Image.new("RGB", (256, 256), "blue").save(p)
    assert coco.score(data / "bad", data / "real", least=12)["fid"] > 10 * abs(rows["good"]["fid"])
    monkeypatch.setattr(coco, "LEAST", 12)
    monkeypatch.setattr(coco.score, "__defaults__", ("cpu", 12))
    assert (
        coco.main(
            [
                "score",
                str(data / "good"),
                "--real",
                str(data / "real"),
                "--out",
                str(data / "rows.jsonl"),
            ]
        )
        == 0
    )
    assert json.loads((data / "rows.jsonl").read_text())["fid"] == rows["good"]["fid"]


def test_what_cannot_be_scored_says_why(data, tools):
    chosen = coco.captions(data / "captions.json", 12)
    with pytest.raises(SystemExit, match=r"no about\.json"):
        coco.score(data, data / "real")
    coco.generate(Painter(), chosen, data / "made")
    with pytest.raises(SystemExit, match="at least 2048 of each"):
        coco.score(data / "made", data / "real")
    next((data / "made").glob("*.png")).unlink()
    with pytest.raises(SystemExit, match="1 of 12 pictures are missing"):
        coco.score(data / "made", data / "real")


@pytest.mark.parametrize(
    ("module", "package"), [("cleanfid.fid", "clean-fid"), ("open_clip", "open_clip_torch")]
)
def test_missing_package_names_its_command(module, package, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, module.split(".")[0], None)
    with pytest.raises(SystemExit, match=f"pip install {package}"):
        coco.load(module)
