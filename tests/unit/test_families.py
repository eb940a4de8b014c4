"""What a family of models is: LCM's guidance embedding, and a family that is registered from
outside.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import sdlite
from sdlite import families
from sdlite.artifact import Artifact
from sdlite.errors import InputError
from sdlite.families.sd import StableDiffusion, guidance_embedding
from sdlite.families.sdxl import StableDiffusionXL
from sdlite.spec import Tensor
from tests import folders

pytest.importorskip("torch", reason="needs the torch extra")
pytest.importorskip("diffusers", reason="needs the torch extra")


@pytest.mark.parametrize(("guidance", "width"), [(8.5, 256), (1.0, 8), (0.0, 7), (7.3, 32)])
def test_guidance_embedding_is_diffusers(guidance, width):
    import torch
    from diffusers import LatentConsistencyModelPipeline as Pipe

    right = Pipe.get_guidance_scale_embedding(None, torch.tensor([guidance - 1]), width).numpy()
    np.testing.assert_allclose(
        guidance_embedding(guidance, width), right, atol=1e-3
    )  # ulp of an angle of 7500: 5e-4


@pytest.fixture(scope="module")
def lcm(tmp_path_factory, plain):
    """The tiny pipeline with a guidance embedding."""
    return remade(plain, tmp_path_factory.mktemp("lcm") / "lcm", time_cond_proj_dim=16)


def remade(plain, out, pipeline="StableDiffusionPipeline", **unet):
    """A copy of a folder whose UNet is made anew with other keys."""
    import shutil

    import torch
    from diffusers import UNet2DConditionModel

    shutil.copytree(plain, out)
    config = json.loads((out / "unet" / "config.json").read_text()) | unet
    torch.manual_seed(0)
    UNet2DConditionModel.from_config(config).save_pretrained(out / "unet")
    folders.configure(out / "model_index.json", _class_name=pipeline)
    return out


def images(folder, backend="torch", **call):
    with sdlite.Pipeline.from_pretrained(folder, backend=backend, threads=1) as pipe:
        call = {"seed": 0, "num_inference_steps": 2} | call
        return np.asarray(pipe(["a fox", "a cat"], **call).images)


@pytest.mark.filterwarnings("ignore")
def test_guidance_goes_into_the_unet_and_makes_no_second_row(lcm):
    rows = []
    with sdlite.Pipeline.from_pretrained(lcm, backend="torch", threads=1) as pipe:
        inner = pipe.networks.unet.inner

        def watched(**inputs):
            rows.append({k: v.shape for k, v in inputs.items()})
            return inner(**inputs)

        pipe.networks.unet.inner = watched
        pipe(["a fox", "a cat"], seed=0, num_inference_steps=2, guidance_scale=8.0)
    assert rows[0]["timestep_cond"] == (2, 16)
    assert rows[0]["sample"][0] == 2
    assert (images(lcm, guidance_scale=8.0) != images(lcm, guidance_scale=3.0)).any()
    with pytest.raises(InputError, match=r"no effect: .* takes its guidance as an input"):
        images(lcm, negative_prompt="a dog", guidance_scale=8.0)


@pytest.mark.filterwarnings("ignore")
def test_a_converted_lcm_is_torchs_on_every_engine_and_in_int8(lcm, tmp_path):
    for package in ("onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(package, reason="needs the dev extra")
    sdlite.convert(lcm, tmp_path / "model")
    right = images(lcm, guidance_scale=8.0).astype(int)
    for backend in ("onnxruntime", "openvino"):
        got = images(tmp_path / "model", backend, guidance_scale=8.0)
        assert np.abs(right - got).max() <= 1, backend
    exported(tmp_path)
    from sdlite.quant import Calibration, Gate

    gate = Gate(prompts=["a fox"], seeds=[0], engines=["onnxruntime"], psnr_mean=20, psnr_worst=20)
    sdlite.quantize(
        tmp_path / "model",
        "int8-static",
        out=tmp_path / "int8",
        calibration=Calibration(prompts=["a fox"], samples=1, num_inference_steps=2),
        gate=gate,
        threads=1,
    )
    assert Artifact.open(tmp_path / "int8").spec("unet").inputs[-1].name == "timestep_cond"


def exported(tmp_path, guidance=8.0, targets=("onnx-fixed", "openvino"), **size):
    """Exports make the model's images, by the code of their README too."""
    from sdlite.exporters.export import export
    from sdlite.exporters.profile import assets

    call = {"num_inference_steps": 2, "guidance_scale": guidance, **size}
    right = images(tmp_path / "model", "onnxruntime", **call).astype(int)[:1]
    for name in targets:
        folder, path = tmp_path / name, tmp_path / f"{name}.toml"
        text = (assets() / "profiles" / path.name).read_text()
        path.write_text("".join(f"{k} = {v}\n" for k, v in size.items()) + text)
        export(tmp_path / "model", folder, target=path, num_inference_steps=2, threads=1)
        got = images(folder, "auto", **call)[:1]
        assert np.abs(right - got).max() <= 1, name
    text = (folder / "README.md").read_text()
    code = "".join(re.findall(r"```python\n(.*?)```", text, re.S))
    code = re.sub(r"steps, guidance = .*", f"steps, guidance = 2, {guidance}", code)
    asked = r"prompt, negative_prompt, seed = "
    code = re.sub(f"{asked}.*", f'{asked}"a fox", None, 0', code)
    run = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(run, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    made = np.asarray(Image.open(folder / "image.png")).astype(int)
    assert np.abs(right[0] - made).max() <= 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_exports_of_sdxl_make_its_images(tmp_path):
    for package in ("onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(package, reason="needs the dev extra")
    from benchmarks import published_models

    if published_models.merges_file() is None:
        pytest.skip("needs the open_clip_torch wheel, for CLIP's merges")
    published_models.write("vega", tmp_path / "vega")
    sdlite.convert(tmp_path / "vega", tmp_path / "model")
    exported(tmp_path, 9.0, height=256, width=256)


def test_steps_and_guidance_of_a_folder_that_does_not_say(lcm, plain, tmp_path):
    assert Artifact.open(plain).sampler_defaults.num_inference_steps == 50
    folder = remade(plain, tmp_path / "x", "LatentConsistencyModelPipeline", time_cond_proj_dim=16)
    own = Artifact.open(folder).sampler_defaults
    assert (own.num_inference_steps, own.guidance_scale) == (4, 8.5)


# --- SDXL: two encoders


class Spelled:
    """Encoders that answer with the number of letters and one; the second one's are negative."""

    def __init__(self, zeros=True, **unet):
        self.index = {"force_zeros_for_empty_prompt": zeros}
        self.unet_config = unet

    def tokenize(self, prompts, part="text_encoder"):
        return np.array([[len(p) + 1] for p in prompts])

    def encode(self, part, ids):
        sign = -1 if part == "text_encoder_2" else 1
        states = np.repeat(np.float32(sign * ids[:, :, None]), 2, axis=2)
        pooled = {"text_embeds": states[:, 0]} if sign < 0 else {}
        return {**pooled, "hidden_states.3": states}


def told(negatives, more=None, guidance=5.0, **encoders):
    call = families.Call(["fox", "a cat"], negatives, guidance, 64, 96, more or {})
    return StableDiffusionXL().conditions(Spelled(**encoders), call)


def test_both_encoders_of_sdxl_stand_side_by_side_and_sizes_are_told():
    cond, uncond = told([])
    assert uncond is None
    states = cond["encoder_hidden_states"]
    np.testing.assert_array_equal(states[:, 0], [[4, 4, -4, -4], [6, 6, -6, -6]])
    np.testing.assert_array_equal(cond["text_embeds"], [[-4, -4], [-6, -6]])
    np.testing.assert_array_equal(cond["time_ids"], [[64, 96, 0, 0, 64, 96]] * 2)
    assert {v.dtype.name for v in cond.values()} == {"float32"}
    cond, _ = told([], {"prompt_2": ["x", "xy"]})
    np.testing.assert_array_equal(cond["encoder_hidden_states"][:, 0, 1:3], [[4, -2], [6, -3]])


def test_no_negative_prompt_is_zeros_where_the_pipeline_says_so_and_an_empty_one_is_not():
    for negatives, zeros, more, lengths in (
        ([None, None], True, {}, [[0, 0], [0, 0]]),
        ([None, "four"], True, {}, [[0, 0], [5, -5]]),
        (["", "four"], True, {"negative_prompt_2": ["one", "no"]}, [[1, -4], [5, -3]]),
        ([None, "four"], False, {}, [[1, -1], [5, -5]]),
    ):
        _, uncond = told(negatives, more, zeros=zeros)
        np.testing.assert_array_equal(uncond["encoder_hidden_states"][:, 0, 1:3], lengths)
        np.testing.assert_array_equal(uncond["text_embeds"][:, 0], [b for _, b in lengths])
    _, uncond = told([None, None], {"negative_original_size": (8, 9)})
    np.testing.assert_array_equal(uncond["time_ids"], [[8, 9, 0, 0, 64, 96]] * 2)


def by_the_readme(negative, guidance, zeros=True, **unet):
    """Conditions as the code of an export's README makes them, with `Spelled` for the networks."""
    encoders = Spelled(zeros, **unet)

    class Tokenizer:
        from_pretrained = classmethod(lambda cls, folder: cls())

        def __call__(self, text, **padded):
            assert padded["max_length"] == 7
            return SimpleNamespace(input_ids=encoders.tokenize([text]))

    names = {"np": np, "CLIPTokenizer": Tokenizer, "prompt": "fox", "negative_prompt": negative}
    names |= {"guidance": guidance, "height": 64, "width": 96}
    names["load"] = lambda part: lambda input_ids: encoders.encode(part, input_ids)
    code = StableDiffusionXL().snippet(encoders.index, unet).replace("@WINDOW@", "7")
    exec(code, names)
    return names["conditions"]


@pytest.mark.parametrize(
    ("negative", "guidance", "more"),
    [
        (None, 5.0, {}),
        ("", 5.0, {}),
        ("four", 5.0, {}),
        (None, 5.0, {"zeros": False}),
        (None, 0.0, {}),
        (None, 8.0, {"time_cond_proj_dim": 16}),
    ],
)
def test_the_readmes_code_makes_the_conditions_of_sdxl(negative, guidance, more):
    one = guidance <= 1 or "time_cond_proj_dim" in more
    call = families.Call(["fox"], [] if one else [negative], guidance, 64, 96, {})
    want = [c for c in StableDiffusionXL().conditions(Spelled(**more), call) if c]
    made = by_the_readme(negative, guidance, **more)
    assert [c.keys() for c in made] == [c.keys() for c in want]
    for ours, right in zip(made, want, strict=True):
        for name, x in right.items():
            np.testing.assert_allclose(ours[name], x, atol=1e-3, err_msg=name)
            assert ours[name].dtype == np.float32


@pytest.mark.parametrize(
    ("vae", "kept"),
    [
        ({"force_upcast": True}, True),  # SDXL's
        ({"force_upcast": False}, False),  # madebyollin/sdxl-vae-fp16-fix
        ({}, True),
        ({"_class_name": "AutoencoderTiny"}, False),
    ],
)
def test_a_vae_that_overflows_stays_in_float32(vae, kept):
    from sdlite.exporters import profile, targets

    assert StableDiffusion().overflowing({"vae": vae}.__getitem__) == {}
    for name in ("onnx-fp16", "openvino-fp16", "ncnn-fp16", "onnx"):
        target = targets.of(profile.load(name))
        target.overflowing = StableDiffusionXL().overflowing({"vae": vae}.__getitem__)
        wide = kept or name == "onnx"
        assert target.precision("vae_decoder") == ("fp32" if wide else "fp16"), name
        assert target.precision("unet") == ("fp32" if name == "onnx" else "fp16")


def test_an_lcm_of_sdxl_is_told_its_guidance_too():
    cond, _ = told([], guidance=8.0, time_cond_proj_dim=16)
    assert cond["timestep_cond"].shape == (2, 16)
    inputs = StableDiffusionXL().unet_inputs({"time_cond_proj_dim": 16})
    assert [t.name for t in inputs] == ["timestep_cond", "text_embeds", "time_ids"]
    assert [t.shape[1] for t in inputs] == ["16", "1280", "6"]


XL = {
    "unet": {
        "addition_embed_type": "text_time",
        "cross_attention_dim": 2048,
        "projection_class_embeddings_input_dim": 2816,
    },
    "vae": {},
    "text_encoder": {"hidden_size": 768},
    "text_encoder_2": {"hidden_size": 1280, "projection_dim": 1280},
}
XL_INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    **{p: ["lib", kinds[0]] for p, kinds in StableDiffusionXL.networks.items()},
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
}


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("unet", {"addition_embed_type": "text_image"}, "told no sizes"),
        ("unet", {"cross_attention_dim": 768}, "text of width 768.* give 768 and 1280"),
        ("unet", {"encoder_hid_dim": 4096}, "projected embeddings"),
        ("unet", {"in_channels": 8}, "takes 8 channels"),
        ("text_encoder_2", {"projection_dim": 512}, "pooled text of width 1280.* gives 512"),
        ("vae", {"latents_mean": [0, 0, 0, 0]}, "scales each channel"),
    ],
)
def test_a_pipeline_with_sdxls_parts_that_do_not_fit_is_refused_in_its_words(part, change, words):
    configs = {**XL, part: XL[part] | change}
    assert families.refusal("m", XL_INDEX, XL.__getitem__) == ""
    assert families.family_of(XL_INDEX, XL.__getitem__).name == "sdxl"
    assert re.search(words, said := families.refusal("m", XL_INDEX, configs.__getitem__)), said


class Labelled(StableDiffusion):
    """UNets with a class label: every image is of class 3."""

    name = "labelled"

    def refusal(self, index, configs):
        unet = dict(configs("unet"))
        if unet.pop("num_class_embeds", None) is None:
            return "it has no class labels"
        return super().refusal(index, lambda part: unet if part == "unet" else configs(part))

    def unet_inputs(self, unet):
        return (Tensor("class_labels", ("B",), "int64", "0 to num_class_embeds - 1"),)

    def conditions(self, encoders, call):
        both = super().conditions(encoders, call)
        for rows in filter(None, both):
            rows["class_labels"] = np.full(len(call.prompts), 3, np.int64)
        return both


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("convert", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_family_from_outside_is_one_class(plain, tmp_path, monkeypatch, convert):
    folder = remade(plain, tmp_path / "labelled", num_class_embeds=5)
    with pytest.raises(sdlite.errors.ArtifactError, match="num_class_embeds=5"):
        Artifact.open(folder)
    monkeypatch.setattr(families, "_FAMILIES", list(families._FAMILIES))
    families.register(Labelled())
    assert families.known() == ["labelled", "sd-controlnet", "sdxl", "sd"]
    right = images(folder, guidance_scale=4.0).astype(int)
    if convert:
        pytest.importorskip("onnxscript", reason="needs the export extra")
        sdlite.convert(folder, tmp_path / "model")
        got = images(tmp_path / "model", "onnxruntime", guidance_scale=4.0)
        assert np.abs(right - got).max() <= 1
    monkeypatch.setattr(Labelled, "conditions", StableDiffusion.conditions)  # without its label
    with pytest.raises(sdlite.errors.SdliteError):
        images(folder, guidance_scale=4.0)
    assert Artifact.open(plain).family.name == "sd"
