"""What people have: one file in the original layout, LoRAs, textual inversions, pickles. Each is
held against diffusers' own reading of the same file.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import zipfile

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("diffusers", reason="needs the export extra")
pytest.importorskip("onnxscript", reason="needs the export extra")

import diffusers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from benchmarks import published_models  # noqa: E402
from sdlite import families, image_input, metrics  # noqa: E402
from sdlite.artifact import Artifact  # noqa: E402
from sdlite.checkpoints import (  # noqa: E402
    embeddings,
    few_step,
    layouts,
    lora,
    originals,
    pickles,
    single_file,
    sources,
)
from sdlite.checkpoints.sources import Extras  # noqa: E402
from sdlite.errors import ArtifactError, InputError, SdliteError  # noqa: E402
from sdlite.pipeline import Pipeline  # noqa: E402
from sdlite.sampling import sampler_of  # noqa: E402
from tests import ldm  # noqa: E402
from tests.folders import configure  # noqa: E402

needs_clip = pytest.mark.skipif(
    published_models.merges_file() is None, reason="needs open_clip_torch for CLIP's vocabulary"
)
pytestmark = [needs_clip, pytest.mark.filterwarnings("ignore")]
PROMPT, SIZE = "two cats in the snow", 64


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Name -> a published folder, made once."""
    root, made = tmp_path_factory.mktemp("published"), {}

    def get(name):
        if name not in made:
            made[name] = published_models.write(name, root / name)
        return made[name]

    return get


@pytest.fixture(scope="module")
def file(folders, tmp_path_factory):
    """SD 1.4's layout as one file."""
    path = tmp_path_factory.mktemp("files") / "my model é.safetensors"
    save_file(ldm.checkpoint(folders("sd14")), path)
    return path


def ours(folder, prompt=PROMPT, **call):
    with Pipeline.from_pretrained(folder, backend="torch", threads=1) as pipe:
        call = {"num_inference_steps": 3, "height": SIZE, "width": SIZE, "seed": 0} | call
        return np.asarray(pipe(prompt, **call).images[0])


def theirs(pipe, prompt=PROMPT, **call):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    call |= {"height": SIZE, "width": SIZE, "num_inference_steps": 3}
    return np.asarray(pipe(prompt, generator=generator, **call).images[0])


def diffusers_pipe(folder):
    kind = diffusers.StableDiffusionPipeline
    return kind.from_pretrained(folder, safety_checker=None, local_files_only=True)


def xl_pipe(folder):
    """diffusers' pipeline; its text encoder's config says float16, which transformers 5 would
    load.
    """
    kind, dtype = diffusers.StableDiffusionXLPipeline, torch.float32
    return kind.from_pretrained(folder, local_files_only=True, torch_dtype=dtype)


def same(a, b):
    return metrics.psnr(a, b) >= 60


# --- one file


def opened(path, tmp_path, **narrow):
    """A file, recognized and written out; `narrow`: what narrow networks have of their own."""
    layout = layouts.recognized(path, single_file.Header.read(path).shapes)
    layout.configs["unet"].update(narrow)
    layout.write(tmp_path / "model")
    return layout, single_file.SingleFile(path, layout, tmp_path / "model")


def same_weights(network, right):
    got, right = network.state_dict(), right.state_dict()
    assert set(got) == set(right)
    assert all(torch.equal(got[k], right[k]) for k in right)


NARROW = {"sd14": {}, "sd21": {"norm_num_groups": 8}}


@pytest.mark.parametrize("name", NARROW)
def test_one_file_is_the_folder_that_it_was_made_from(folders, tmp_path, name):
    source, path = folders(name), tmp_path / "one.safetensors"
    save_file(ldm.checkpoint(source), path)
    assert not single_file.Header.read(path).half
    layout, file = opened(path, tmp_path, **NARROW[name])
    published = published_models.MODELS[name]
    assert layout.version == ("2" if name == "sd21" else "1")
    assert layout.configs["text_encoder"]["num_hidden_layers"] == (23 if name == "sd21" else 12)
    assert built(layout.configs["unet"]) == built(published.unet)
    pipe = diffusers_pipe(source)
    for part in layout.configs:
        same_weights(file.network(part), getattr(pipe, part))


def built(config):
    """What a configuration makes: its tensors' names and shapes, and its flags."""
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(config)
    flags = ("attention_head_dim", "addition_time_embed_dim", "sample_size", "upcast_attention")
    shapes = {k: tuple(v.shape) for k, v in unet.state_dict().items()}
    return shapes, [list(np.ravel(unet.config[f])) for f in flags]


# SSD-1B's and Vega's single files are in this layout.
XL = ("sdxl", "ssd-1b", "vega", "koala-700m", "koala-1b")


def at_true_width(name):
    """A published UNet's configuration; on the meta device its widths cost nothing."""
    return published_models.MODELS[name].unet | {
        "block_out_channels": [320, 640, 1280],
        "cross_attention_dim": 2048,
        "norm_num_groups": 32,
        "projection_class_embeddings_input_dim": 2816,
    }


XL_UNET = at_true_width("sdxl")


def header(config):
    """Tensor name -> shape of an SDXL file whose UNet has this configuration; true widths."""
    shapes, _ = built(config)
    plain = [i for i, kind in enumerate(config["up_block_types"]) if kind == "UpBlock2D"]
    names = {k: ldm.unet_name(k, config["layers_per_block"], plain) for k in shapes}
    out = {f"{layouts.UNET}{names[k]}": v for k, v in shapes.items()}
    out[f"{layouts.CLIP_XL}embeddings.token_embedding.weight"] = (49408, 768)
    out[f"{layouts.OPEN_CLIP_XL}token_embedding.weight"] = (49408, 1280)
    out[f"{layouts.OPEN_CLIP_XL}text_projection"] = (1280, 1280)
    for i in range(32):
        out[f"{layouts.OPEN_CLIP_XL}transformer.resblocks.{i}.mlp.c_fc.weight"] = (5120, 1280)
    for i in range(12):
        out[f"{layouts.CLIP_XL}encoder.layers.{i}.mlp.fc1.weight"] = (3072, 768)
    return out


@pytest.mark.parametrize("name", XL)
def test_names_and_shapes_tell_sdxl_and_its_students(name, tmp_path):
    config = at_true_width(name)
    layout = layouts.recognized(tmp_path / "x.safetensors", header(config))
    assert built(layout.configs["unet"]) == built(config)
    assert layout.version == "xl"
    assert not layout.has_vae
    text = layout.configs["text_encoder_2"]
    assert [text[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers")] == [
        1280,
        5120,
        32,
    ]
    assert layout.scheduler["prediction_type"] == "epsilon"
    if name == "sdxl":  # as published
        [shapes, _] = built(layout.configs["unet"])
        assert sum(map(math.prod, shapes.values())) == 2_567_463_684
        own = {k: v for k, v in layout.configs["unet"].items() if k in XL_UNET}
        assert own == {k: XL_UNET[k] for k in own}


def test_markers_of_sdxl_files(tmp_path):
    path, shapes = tmp_path / "x.safetensors", header(XL_UNET)
    marked = layouts.recognized(path, {**shapes, "v_pred": (0,), "ztsnr": (0,)}).scheduler
    assert (marked["prediction_type"], marked["rescale_betas_zero_snr"]) == ("v_prediction", True)
    plain = layouts.recognized(path, {**shapes, "v_pred": (0,)}).scheduler
    assert "rescale_betas_zero_snr" not in plain
    given = layouts.recognized(path, {**shapes, "v_pred": (0,)}, "epsilon").scheduler
    assert given["prediction_type"] == "epsilon"
    for marker, words in (
        ("edm_mean", "Playground 2.5"),
        ("edm_vpred.sigma_max", "EDM v-prediction"),
        ("conditioner.embedders.0.model.text_projection", "SDXL's refiner"),
    ):
        with pytest.raises(ArtifactError, match=words):
            layouts.recognized(path, {**shapes, marker: (1,)})


def test_an_sdxl_file_for_inpainting_is_known_by_its_channels(tmp_path):
    for channels, kind in ((9, "InpaintPipeline"), (4, "Pipeline"), (8, None)):
        first = f"{layouts.UNET}input_blocks.0.0.weight"
        shapes = {**header(XL_UNET), first: (320, channels, 3, 3)}
        layout = layouts.recognized(tmp_path / "x.safetensors", shapes)
        why = families.refusal("x", layout.index, layout.config)
        if kind is None:
            assert "its UNet takes 8 channels" in why
        else:
            assert why == ""
            assert layout.index["_class_name"] == f"StableDiffusionXL{kind}"


def test_unets_that_diffusers_has_no_configuration_for_are_told(tmp_path):
    path, shapes = tmp_path / "x.safetensors", header(XL_UNET)
    for pattern, words in (
        (r"middle_block\.1\.transformer_blocks\.9\.", "middle block is 9 transformers deep"),
        (r"input_blocks\.5\.1\.", "with and without transformers"),
        (r"input_blocks\.5\.", r"without the tensor model.diffusion_model.input_blocks\.5"),
        (r"input_blocks\.[78]\.", "middle block is 10 transformers deep, the last 2"),
        (r"label_emb", "label_emb"),
    ):
        left = {k: v for k, v in shapes.items() if not re.search(pattern, k)}
        with pytest.raises(ArtifactError, match=words):
            layouts.recognized(path, left)


@pytest.mark.parametrize("name", ["sdxl", "ssd-1b"])
def test_one_sdxl_file_is_diffusers_reading_of_it(folders, tmp_path, name):
    source = folders(name)
    tensors = ldm.checkpoint(source)
    save_file(tensors, tmp_path / "xl.safetensors")
    layout, file = opened(tmp_path / "xl.safetensors", tmp_path, norm_num_groups=8)
    assert layout.index["force_zeros_for_empty_prompt"] is True
    kind = diffusers.StableDiffusionXLPipeline
    right = xl_pipe(source)
    theirs = kind.from_single_file(
        str(file.path), config=str(source), local_files_only=True, torch_dtype=torch.float32
    )
    for part in layout.configs:
        network = file.network(part)
        same_weights(network, getattr(right, part))
        same_weights(network, getattr(theirs, part))
    extra = f"{layouts.UNET}time_embed.cond_proj.weight"  # LCM's, which diffusers leaves out
    save_file({**tensors, extra: torch.zeros(4, 4)}, file.path)
    with pytest.raises(ArtifactError, match=f"no place for .*{extra}"):
        file.network("unet")


def test_the_image_of_a_file_is_diffusers(file, tmp_path):
    got = sources.prepared(file, Extras(), tmp_path)
    pipe = diffusers.StableDiffusionPipeline.from_single_file(
        str(file), config=str(got.folder), local_files_only=True, safety_checker=None
    )
    right = theirs(pipe)
    assert same(ours(got.folder), right)
    assert not same(ours(got.folder, "a red fox"), right)


def test_the_image_of_an_sdxl_file_is_diffusers(folders, tmp_path, monkeypatch):
    monkeypatch.setitem(originals.UNET_XL, "norm_num_groups", 8)  # of narrow networks
    save_file(ldm.checkpoint(folders("vega")), tmp_path / "vega.safetensors")
    got = sources.prepared(tmp_path / "vega.safetensors", Extras(), fresh(tmp_path))
    pipe = diffusers.StableDiffusionXLPipeline.from_single_file(
        str(tmp_path / "vega.safetensors"), config=str(got.folder), local_files_only=True
    )
    right = theirs(pipe)
    assert same(ours(got.folder), right)
    assert not same(ours(got.folder, "a red fox"), right)


def test_tokenizer_is_the_published_one(tmp_path):
    layouts.write_tokenizer(tmp_path / "ours", "<|endoftext|>")
    published_models.write_tokenizer(tmp_path / "theirs", "sd1")
    for name in ("vocab.json", "merges.txt"):
        a, b = ((tmp_path / f / name).read_text() for f in ("ours", "theirs"))
        assert (json.loads(a) == json.loads(b)) if name.endswith("json") else a == b


def test_half_precision_stays_and_can_be_asked_for(folders, file, tmp_path):
    half = {k: v.half() for k, v in load_file(file).items()}
    save_file(half, tmp_path / "half.safetensors")
    for source, extras, dtype in (
        (tmp_path / "half.safetensors", Extras(), torch.float16),
        (tmp_path / "half.safetensors", Extras(precision="fp32"), torch.float32),
        (file, Extras(precision="fp16"), torch.float16),
        (folders("sd14"), Extras(precision="fp16"), torch.float16),
    ):
        scratch = tmp_path / f"{source.name}-{extras.precision}"
        scratch.mkdir()
        folder = sources.prepared(source, extras, scratch).folder
        weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
        assert {v.dtype for v in weights.values()} == {dtype}
        Artifact.open(folder)


def test_a_file_without_autoencoder_asks_for_one_and_takes_any_form(folders, file, tmp_path):
    tensors = load_file(file)
    vae = {k: v for k, v in tensors.items() if k.startswith(layouts.VAE)}
    save_file({k: v for k, v in tensors.items() if k not in vae}, tmp_path / "no.safetensors")
    with pytest.raises(InputError, match=r"no autoencoder .*vae="):
        sources.prepared(tmp_path / "no.safetensors", Extras(), fresh(tmp_path))
    bare = {k.removeprefix(layouts.VAE): v for k, v in vae.items()}
    save_file(bare, tmp_path / "vae.safetensors")
    save_file(vae, tmp_path / "prefixed.safetensors")
    own = shutil.copytree(folders("sd14") / "vae", tmp_path / "sd-vae-ft-mse")
    right = load_file(own / "diffusion_pytorch_model.safetensors")
    for given in ("vae.safetensors", "prefixed.safetensors", own, folders("sd14")):
        extras = Extras(vae=tmp_path / given)
        got = sources.prepared(tmp_path / "no.safetensors", extras, fresh(tmp_path)).folder
        weights = load_file(got / "vae" / "diffusion_pytorch_model.safetensors")
        name = "decoder.conv_in.weight"
        assert torch.equal(weights[name], right[name])


def fresh(tmp_path):
    folder = tmp_path / f"scratch-{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    return folder


def test_prediction_type_of_a_2x_file(folders, tmp_path):
    path = tmp_path / "two.safetensors"
    save_file(ldm.checkpoint(folders("sd21")), path)
    shapes = single_file.Header.read(path).shapes
    assert layouts.recognized(path, shapes).scheduler["prediction_type"] == "v_prediction"
    base = layouts.recognized(path, shapes, "epsilon")
    assert base.scheduler["prediction_type"] == "epsilon"
    assert base.configs["unet"]["sample_size"] == 64
    with pytest.raises(InputError, match="accepted: epsilon or v_prediction"):
        layouts.recognized(path, shapes, "v")


def test_what_a_source_has_no_use_for_is_not_passed_over(folders, file, tmp_path):
    extras = Extras(prediction_type="epsilon")
    refused(folders("sd14"), tmp_path, "prediction_type='epsilon' is for one file", extras)
    with pytest.raises(InputError, match="revision='main' is for hub models"):
        Pipeline.from_pretrained(file, revision="main")


def _without(path, out, pattern):
    save_file({k: v for k, v in load_file(path).items() if not re.search(pattern, k)}, out)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("^cond_stage_model", "no text encoder"),
        (r"input_blocks\.4\.", "without the tensor model.diffusion_model.input_blocks.4"),
        (r"output_blocks\.5\.1\.", "with and without transformers"),
        (r"output_blocks\.5\.1\.norm", "lacks tensors"),
        (r"^model\.", "an autoencoder alone: give it as vae="),
        (r"^model\.|decoder\.conv_in", "of no layout that sdlite knows"),
    ],
)
def test_files_that_lack_something_are_one_line(file, tmp_path, pattern, words):
    _without(file, tmp_path / "x.safetensors", pattern)
    refused(tmp_path / "x.safetensors", tmp_path, words)


def test_what_is_wrong_is_said_alone_and_names_what_was_given(file, folders, tmp_path, caplog):
    import sdlite

    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="cut off"):
        Pipeline.from_pretrained(cut)
    assert not caplog.records  # nothing of a conversion that does not come
    for name in ("lora", "embedding", "vae"):
        gone = tmp_path / "none.safetensors"
        given = str(gone) if name == "vae" else [str(gone)]
        refused(file, tmp_path, f"^{name}=.*does not exist; give", Extras(**{name: given}))
    lacks = shutil.copytree(folders("sd14"), tmp_path / "lacks")
    _without(f := lacks / "unet" / "diffusion_pytorch_model.safetensors", f, r"conv_in\.bias")
    with pytest.raises(ArtifactError, match=f"^{re.escape(str(f))} lacks 1 .*conv_in.bias"):
        sdlite.convert(lacks, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def refused(source, tmp_path, words, extras=None):
    with pytest.raises(SdliteError, match=words) as error:
        sources.prepared(source, extras or Extras(), fresh(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("lora_unet_x.lora_up.weight",), "a LoRA: give it as lora="),
        (("emb_params",), "a textual inversion: give it as embedding="),
        (("control_model.time_embed.0.weight",), "a ControlNet"),
        (("model.diffusion_model.x", "edm_mean"), "Playground 2.5"),
        (("model.diffusion_model.joint_blocks.0.x",), "Stable Diffusion 3's"),
        (("model.diffusion_model.double_blocks.0.x",), "FLUX's"),
        (("down_blocks.0.x",), "one network of a diffusers folder"),
        (("whatever",), "of no layout"),
    ],
)
def test_files_of_other_kinds_are_one_line(tmp_path, names, words):
    save_file({n: torch.zeros(4) for n in names}, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", tmp_path, words)


def test_damaged_files_are_one_line(file, tmp_path):
    data = file.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[: len(data) // 2])
    (tmp_path / "page.safetensors").write_bytes(b"<html>not found</html>" * 40)
    for name in ("cut", "page"):
        refused(tmp_path / f"{name}.safetensors", tmp_path, name)
    refused(tmp_path / "none.safetensors", tmp_path, "does not exist")


def with_channels(tensors, more):
    """The checkpoint with further channels of the latents."""
    name = "model.diffusion_model.input_blocks.0.0.weight"
    return tensors | {
        name: torch.cat([tensors[name], tensors[name].flip(1).repeat(1, 2, 1, 1)[:, :more]], dim=1)
    }


def test_a_file_of_another_number_of_channels_is_told(file, tmp_path):
    save_file(with_channels(load_file(file), 4), tmp_path / "edit.safetensors")
    refused(tmp_path / "edit.safetensors", tmp_path, "its UNet takes 8 channels")


def test_the_image_of_an_inpainting_file_is_diffusers(file, tmp_path):
    save_file(with_channels(load_file(file), 5), tmp_path / "inpaint.safetensors")
    got = sources.prepared(tmp_path / "inpaint.safetensors", Extras(), fresh(tmp_path))
    pipe = diffusers.StableDiffusionInpaintPipeline.from_single_file(
        str(tmp_path / "inpaint.safetensors"),
        config=str(got.folder),
        local_files_only=True,
        safety_checker=None,
    )
    image, mask = image_input.example(SIZE, SIZE)
    right = theirs(pipe, image=image, mask_image=mask)
    half = SIZE // 2  # what is painted
    made = ours(got.folder, image=image, mask_image=mask)
    assert same(made[:, half:], right[:, half:])
    other = ours(got.folder, image=image.rotate(180), mask_image=mask)
    assert not same(other[:, half:], right[:, half:])


def test_a_2x_inpainting_file_predicts_noise(folders, tmp_path):
    save_file(with_channels(ldm.checkpoint(folders("sd21")), 5), tmp_path / "two.safetensors")
    shapes = single_file.Header.read(tmp_path / "two.safetensors").shapes
    layout = layouts.recognized(tmp_path / "two.safetensors", shapes)
    assert layout.scheduler["prediction_type"] == "epsilon"
    assert layout.configs["unet"]["sample_size"] == 64
    plain = {
        k: (v[0], 4, *v[2:]) if k.endswith("input_blocks.0.0.weight") else v
        for k, v in shapes.items()
    }
    assert layouts.recognized(tmp_path / "x", plain).scheduler["prediction_type"] == "v_prediction"


# --- variants


def test_the_variant_that_is_asked_for_is_diffusers(folders, tmp_path, monkeypatch, caplog):
    from sdlite.cli import main

    source = shutil.copytree(folders("sd14"), tmp_path / "two")
    file = source / "unet" / "diffusion_pytorch_model.safetensors"
    other = {k: v.half() * 0.9 for k, v in load_file(file).items()}
    save_file(other, file.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
    kind = diffusers.StableDiffusionPipeline
    given = {"safety_checker": None, "local_files_only": True}
    pipe = kind.from_pretrained(source, variant="fp16", torch_dtype=torch.float32, **given)
    with Pipeline.from_pretrained(source, backend="torch", threads=1, variant="fp16") as own:
        call = {"num_inference_steps": 3, "height": SIZE, "width": SIZE, "seed": 0}
        image = np.asarray(own(PROMPT, **call).images[0])
        own.save_pretrained(tmp_path / "saved")
    assert same(image, theirs(pipe))
    assert not same(image, ours(source))
    assert "no fp16 of text_encoder, vae: the default weights are taken" in caplog.text
    assert same(image, ours(tmp_path / "saved"))
    made = sources.prepared(source, Extras(variant="fp16", precision="fp32"), fresh(tmp_path))
    assert same(image, ours(made.folder))
    out = tmp_path / "out"
    assert main(["convert", str(source), "--variant", "fp8", "--out", str(out)]) == 1
    assert not out.exists()


def test_variants_where_there_can_be_none_are_one_line(file, tmp_path):
    refused(file, tmp_path, "variant='fp16' is for diffusers folders", Extras(variant="fp16"))
    for model, words in ((file, "is a file"), ("emoji", "model of sdlite that holds fp16, ")):
        with pytest.raises(InputError, match=f"variant='fp16' is for diffusers folders.*{words}"):
            Pipeline.from_pretrained(model, variant="fp16")
    with pytest.raises(InputError, match=r"clip_skip=1 is for diffusers folders.*--clip-skip 1"):
        Pipeline.from_pretrained("emoji", clip_skip=1)


# --- pickles


def test_pickles_are_read_only_when_asked_for_and_without_code(file, tmp_path):
    torch.save({"state_dict": load_file(file), "global_step": 3}, tmp_path / "m.ckpt")
    refused(tmp_path / "m.ckpt", tmp_path, "is a pickle.*--from-pickle")
    got = sources.prepared(tmp_path / "m.ckpt", Extras(from_pickle=True), fresh(tmp_path)).folder
    right = sources.prepared(file, Extras(), fresh(tmp_path)).folder
    name = "unet/diffusion_pytorch_model.safetensors"
    assert (got / name).read_bytes() == (right / name).read_bytes()


class Runs:
    def __reduce__(self):
        return (print, ("code has run",))


def test_pickles_that_want_code_run_and_files_that_are_none_are_refused(tmp_path, capsys):
    torch.save({"state_dict": {"a": torch.zeros(3), "b": Runs()}}, tmp_path / "evil.ckpt")
    with zipfile.ZipFile(tmp_path / "zip.ckpt", "w") as z:
        z.writestr("data.txt", "no tensors")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "text.bin").write_text("hello")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "list.pt").read_bytes()[:400])
    for name, words in (
        ("evil.ckpt", ""),
        ("zip.ckpt", "is a zip archive, and not one of torch's"),
        ("cut.pt", "it is cut off, or damaged"),
        ("list.pt", "holds no tensors"),
        ("text.bin", ""),
    ):
        with pytest.raises(ArtifactError, match=f"{re.escape(name)}.*{words}") as error:
            pickles.to_safetensors(tmp_path / name, tmp_path / "out.safetensors")
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out.safetensors").exists()
    assert "code has run" not in capsys.readouterr().out


def test_a_folder_of_pickles(folders, tmp_path):
    source = shutil.copytree(folders("sd14"), tmp_path / "old")
    for part, name in (("unet", "diffusion_pytorch_model"), ("text_encoder", "pytorch_model")):
        [weights] = (source / part).glob("*.safetensors")
        torch.save(load_file(weights), source / part / f"{name}.bin")
        weights.unlink()
    with pytest.raises(SdliteError):
        ours(source)
    folder = sources.prepared(source, Extras(from_pickle=True), fresh(tmp_path)).folder
    assert same(ours(folder), ours(folders("sd14")))


def test_the_second_text_encoder_as_pickle_or_as_shards_of_a_variant(folders, tmp_path):
    source = shutil.copytree(folders("vega"), tmp_path / "xl")
    part = source / "text_encoder_2"
    network = sources.open_network(part)
    [weights] = part.glob("*.safetensors")
    torch.save(load_file(weights), part / "pytorch_model.bin")
    weights.unlink()
    refused(source, tmp_path, "text_encoder_2 holds only pytorch_model.bin", Extras(clip_skip=0))
    got = sources.prepared(source, Extras(from_pickle=True), fresh(tmp_path)).folder
    same_weights(sources.open_network(got / "text_encoder_2"), network)
    (part / "pytorch_model.bin").unlink()
    network.half().save_pretrained(part, variant="fp16", max_shard_size="4MB")
    assert len(list(part.glob("model*fp16*.safetensors"))) > 1
    same_weights(sources.open_network(part), network.float())
    got = sources.prepared(source, Extras(vae=source), fresh(tmp_path)).folder
    kinds = {v.dtype for v in load_file(got / "text_encoder_2" / "model.safetensors").values()}
    assert kinds == {torch.float16}  # as it was stored; the others in float32
    kinds = {v.dtype for v in load_file(got / "text_encoder" / "model.safetensors").values()}
    assert kinds == {torch.float32}


# --- LoRA

LAYERS = {
    "unet": (
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "down_blocks.1.attentions.1.transformer_blocks.0.attn2.to_out.0",
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
        "up_blocks.1.attentions.2.proj_in",
        "up_blocks.2.resnets.0.conv1",
    ),
    "text_encoder": (
        "text_model.encoder.layers.0.self_attn.q_proj",
        "text_model.encoder.layers.0.self_attn.out_proj",
        "text_model.encoder.layers.3.mlp.fc2",
    ),
}


XL_LAYERS = {
    "unet": (
        "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q",
        "down_blocks.2.attentions.1.proj_in",
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
        "up_blocks.0.attentions.2.transformer_blocks.0.attn2.to_out.0",
        "up_blocks.1.resnets.0.conv1",
    ),
    "text_encoder": LAYERS["text_encoder"],
    "text_encoder_2": (
        "text_model.encoder.layers.1.self_attn.v_proj",
        "text_model.encoder.layers.1.self_attn.out_proj",  # by which diffusers knows old names
        "text_model.encoder.layers.2.mlp.fc1",
    ),
}


def layers_of(folder):
    """Of a model's networks, those that the LoRAs here are for."""
    return XL_LAYERS if (folder / "text_encoder_2").exists() else LAYERS


def weights_of(folder, part):
    [file] = (folder / part).glob("*.safetensors")
    return load_file(file)


def deltas(folder, seed=1, parts=None):
    """(part, module, down, up, alpha): another rank in each layer."""
    torch.manual_seed(seed)
    for part, names in layers_of(folder).items():
        weights = weights_of(folder, part) if parts is None or part in parts else {}
        for i, name in enumerate(names if weights else ()):
            weight = weights[f"{name}.weight"]
            rank, tail = 2 + i, weight.shape[2:]
            down = torch.randn(rank, weight.shape[1], *tail) * 0.3
            up = torch.randn(weight.shape[0], rank, *([1] * len(tail))) * 0.3
            yield part, name, down, up, rank / 2 + i


def kohya(folder, path, sgm=False, **kind):
    """`sgm`: the UNet's layers by the names of the original layout, as kohya trains SDXL."""
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
    if (folder / "text_encoder_2").exists():
        prefix |= {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    out = {}
    for part, name, down, up, alpha in deltas(folder, **kind):
        if sgm and part == "unet":
            name = ldm.unet_name(f"{name}.weight", plain=(2,)).removesuffix(".weight")
        key = prefix[part] + name.replace(".", "_")
        out |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        out[f"{key}.alpha"] = torch.tensor(float(alpha))
    save_file(out, path)
    return path


def sgm(folder, path, **kind):
    return kohya(folder, path, sgm=True, **kind)


def peft_layout(folder, path, **kind):
    out = {}
    for part, name, down, up, _ in deltas(folder, **kind):
        out |= {f"{part}.{name}.lora_A.weight": down, f"{part}.{name}.lora_B.weight": up}
    save_file(out, path)
    return path


def processors(folder, path):
    """The layout of diffusers before 0.22: attention alone, in its processors."""
    out = {}
    for _, name, down, up, _ in deltas(folder, parts=("unet",)):
        attention, _, which = name.rpartition(".to_")
        if attention:
            key = f"unet.{attention}.processor.to_{which.removesuffix('.0')}_lora"
            out |= {f"{key}.down.weight": down, f"{key}.up.weight": up}
    save_file(out, path)
    return path


@pytest.mark.parametrize("layout", [kohya, peft_layout, processors])
def test_a_fused_lora_is_diffusers_image_with_it_loaded(folders, tmp_path, layout):
    pytest.importorskip("peft", reason="needs the lora extra")
    source = folders("sd14")
    path = layout(source, tmp_path / "style.safetensors")
    pipe = diffusers_pipe(source)
    plain = theirs(pipe)
    pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name="a")
    pipe.set_adapters(["a"], [0.7])
    right = theirs(pipe)
    got = sources.prepared(source, Extras(lora=[f"{path}:0.7"]), fresh(tmp_path))
    assert same(ours(got.folder), right)
    assert not same(plain, right)
    assert not got.notes
    assert not list(got.folder.rglob("adapter*"))


@pytest.mark.parametrize("layout", [kohya, sgm, peft_layout])
def test_a_fused_sdxl_lora_is_diffusers_fused(folders, tmp_path, layout):
    pytest.importorskip("peft", reason="needs the lora extra")
    source = folders("sdxl")
    path = layout(source, tmp_path / "style.safetensors")
    ours, theirs = (xl_pipe(source) for _ in range(2))
    theirs.load_lora_weights(path.parent, weight_name=path.name, adapter_name="a")
    theirs.set_adapters(["a"], [0.7])
    theirs.fuse_lora(adapter_names=["a"])
    theirs.unload_lora_weights()
    read = lora.read(lora.Lora.given(f"{path}:0.7"), ours.unet.config, list(XL_LAYERS))
    for part, names in XL_LAYERS.items():
        network, right = getattr(ours, part), getattr(theirs, part).state_dict()
        plain = {k: v.clone() for k, v in network.state_dict().items()}
        assert lora.fuse(part, network, [read], False) == []
        got = network.state_dict()
        assert set(got) == set(right)
        changed = {k for k in got if not torch.equal(got[k], plain[k])}
        # transformers 5.6 names a CLIPTextModel's layers without text_model
        assert {k.removeprefix("text_model.") for k in changed} == {
            f"{n.removeprefix('text_model.')}.weight" for n in names
        }
        assert all(torch.allclose(got[k], right[k], atol=1e-6) for k in got)


def test_the_image_of_sdxl_with_a_lora_and_a_word_is_diffusers(folders, tmp_path):
    pytest.importorskip("peft", reason="needs the lora extra")
    source = folders("sdxl")
    path = sgm(source, tmp_path / "sdxl_lightning_4step_lora.safetensors")
    vectors = {"clip_l": torch.randn(2, 48), "clip_g": torch.randn(2, 80)}
    save_file(vectors, tmp_path / "zqtoy.safetensors")
    pipe = xl_pipe(source)
    pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name="a")
    pipe.set_adapters(["a"], [0.3])
    for key, end in (("clip_l", ""), ("clip_g", "_2")):
        encoder, tokenizer = (getattr(pipe, f"{p}{end}") for p in ("text_encoder", "tokenizer"))
        pipe.load_textual_inversion(
            vectors[key], token="<toy>", text_encoder=encoder, tokenizer=tokenizer
        )
    kind = diffusers.EulerDiscreteScheduler
    pipe.scheduler = kind.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    extras = Extras(lora=[(path, 0.3)], embedding=[f"{tmp_path / 'zqtoy.safetensors'}:<toy>"])
    got = sources.prepared(source, extras, fresh(tmp_path))
    assert got.sampler == {"name": "euler", "num_inference_steps": 4, "guidance_scale": 1.0}
    prompt = "a <toy> in the snow"
    right = theirs(pipe, prompt, guidance_scale=1.0)
    assert same(ours(got.folder, prompt, guidance_scale=1.0), right)
    assert not same(ours(source, prompt, guidance_scale=1.0), right)


def test_loras_of_another_base_are_counted(folders, tmp_path):
    pytest.importorskip("peft", reason="needs the lora extra")
    small, large = folders("sd14"), folders("sdxl")
    for_small = kohya(small, tmp_path / "sd.safetensors", parts=("unet",))
    for_large = kohya(large, tmp_path / "xl.safetensors", parts=("unet",))
    both = kohya(large, tmp_path / "both.safetensors")
    words = r"is a LoRA of another base: 3 of its 11 layers are of a second text encoder, as SDXL"
    refused(small, tmp_path, words, Extras(lora=[both], lora_skip_missing=True))
    words = r"another base: 3 of its 5 .* another size; .* 2 of its 5 layers .* not in this model"
    refused(small, tmp_path, words, Extras(lora=[for_large]))
    read = lora.read(lora.Lora(for_small), {}, list(XL_LAYERS))
    unet = diffusers.UNet2DConditionModel.from_pretrained(large / "unet")
    words = r"another base: \d of its 5 layers of the unet have another size; its .* is \d+ x \d+"
    with pytest.raises(ArtifactError, match=words) as error:
        lora.fuse("unet", unet, [read], True)
    assert "not in this model (unet.down_blocks.0.attentions.0" in str(error.value)
    save_file({"transformer.x.lora_A.weight": torch.ones(2, 2)}, tmp_path / "flux.safetensors")
    refused(
        small, tmp_path, "no network of this model", Extras(lora=[tmp_path / "flux.safetensors"])
    )


def test_several_loras_add_up(folders, tmp_path):
    pytest.importorskip("peft", reason="needs the lora extra")
    source = folders("sd14")
    a = kohya(source, tmp_path / "a.safetensors", seed=1)
    b = peft_layout(source, tmp_path / "b.safetensors", seed=2, parts=("unet",))
    pipe = diffusers_pipe(source)
    for name, path in (("a", a), ("b", b)):
        pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
    pipe.set_adapters(["a", "b"], [0.5, -0.4])
    got = sources.prepared(source, Extras(lora=[(a, 0.5), f"{b}:-0.4"]), fresh(tmp_path))
    assert same(ours(got.folder), theirs(pipe))


def test_layers_that_a_student_lacks_are_counted_and_left_out_when_asked(folders, tmp_path):
    pytest.importorskip("peft", reason="needs the lora extra")
    path = kohya(folders("sd14"), tmp_path / "style.safetensors", parts=("unet",))
    student = folders("bk-sdm-small")
    words = r"\d of its 5 layers of the unet are not in this model .*--lora-skip-missing"
    refused(student, tmp_path, words, Extras(lora=[path]))
    extras = Extras(lora=[path], lora_skip_missing=True)
    got = sources.prepared(student, extras, fresh(tmp_path))
    assert "left out" in got.notes[0]
    assert not same(ours(got.folder), ours(student))


def test_loras_of_another_base_and_other_kinds_are_one_line(folders, tmp_path):
    pytest.importorskip("peft", reason="needs the lora extra")
    source = folders("sd14")
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    wide = {
        f"{name}.lora_A.weight": torch.ones(2, 320),
        f"{name}.lora_B.weight": torch.ones(320, 2),
    }
    save_file(wide, tmp_path / "wide.safetensors")
    save_file({"lora_unet_x.hada_w1_a": torch.ones(2)}, tmp_path / "loha.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "wide.safetensors").read_bytes()[:300])
    for name, words in (
        ("wide", "LoRA of another base: .* is 320 x 320, this model's is 32 x 32"),
        ("loha", "is a LoHa"),
        ("none", "holds no LoRA"),
        ("cut", "cut"),
    ):
        refused(source, tmp_path, words, Extras(lora=[tmp_path / f"{name}.safetensors"]))
    for given in ("x.safetensors:much", "x.pt", 3):
        refused(source, tmp_path, "lora", Extras(lora=[given]))


@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        ("lcm-lora-sdv1-5/pytorch_lora_weights.safetensors", ("lcm", 4)),
        ("Hyper-SD15-8steps-lora.safetensors", ("tcd", 8)),
        ("Hyper-SD15-1step-lora.safetensors", ("tcd", 1)),
        ("Hyper-SDXL-8steps-lora.safetensors", ("tcd", 8)),
        ("lcm-lora-sdxl/pytorch_lora_weights.safetensors", ("lcm", 4)),
        ("sdxl_lightning_2step_lora.safetensors", ("euler", 2)),
        ("SDXL-Lightning/sdxl_lightning_8step_lora.safetensors", ("euler", 8)),
        ("style.safetensors", None),
    ],
)
def test_few_step_loras_bring_their_sampler(name, sampler):
    got = lora.Lora.given(name).few_step
    assert sampler == (got and (got.sampler["name"], got.sampler["num_inference_steps"]))
    if got:
        trailing = got.scheduler.get("timestep_spacing") == "trailing"
        assert trailing == (got.sampler["name"] == "euler")


@pytest.mark.parametrize(
    ("name", "sampler", "kind"),
    [
        ("sd_xl_turbo_1.0_fp16.safetensors", ("euler-ancestral", 1), "EulerAncestralDiscrete"),
        ("sdxl_lightning_4step.safetensors", ("euler", 4), "EulerDiscrete"),
        ("sdxl-turbo/model.safetensors", ("euler-ancestral", 1), "EulerAncestralDiscrete"),
        ("dreamshaperXL_turboDpmppSDE.safetensors", None, "EulerDiscrete"),
        ("sd_xl_base_1.0.safetensors", None, "EulerDiscrete"),
    ],
)
def test_few_step_files_are_known_by_their_names(tmp_path, name, sampler, kind):
    got = few_step.by_name(tmp_path / name, few_step.FILES["xl"])
    assert sampler == (got and (got.sampler["name"], got.sampler["num_inference_steps"]))
    layout = layouts.recognized(tmp_path / name, header(XL_UNET))
    layout = layout.changed(got.unet, got.scheduler, None) if got else layout
    assert layout.scheduler["_class_name"] == f"{kind}Scheduler"
    spacing = "trailing" if got else "leading"
    assert layout.scheduler["timestep_spacing"] == spacing
    assert layout.configs["unet"]["sample_size"] == (64 if "turbo" in name and got else 128)
    assert sampler_of(layout.scheduler) == (sampler[0] if sampler else "euler")


def test_sd_turbo_is_no_v_prediction(folders, tmp_path):
    path = tmp_path / "sd_turbo.safetensors"
    save_file(ldm.checkpoint(folders("sd-turbo")), path)
    made = few_step.by_name(path, few_step.FILES["2"])
    layout = layouts.recognized(path, single_file.Header.read(path).shapes)
    scheduler = layout.changed(made.unet, made.scheduler, None).scheduler
    published = published_models.SCHEDULERS["sd-turbo"]
    assert scheduler == {k: v for k, v in published.items() if k in scheduler}
    assert layout.changed({}, made.scheduler, "v_prediction").scheduler["prediction_type"][0] == "v"


# --- textual inversion


@pytest.mark.parametrize("key", ["<toy>", "emb_params"])
def test_a_textual_inversion_is_diffusers(folders, tmp_path, key):
    source = folders("sd14")
    torch.manual_seed(3)
    save_file({key: torch.randn(3, 48) * 20}, tmp_path / "zqtoy.safetensors")
    word = "<toy>" if key == "<toy>" else "zqtoy"
    prompt = f"a photo of {word} in the snow"
    pipe = diffusers_pipe(source)
    plain = theirs(pipe, prompt)
    pipe.load_textual_inversion(str(tmp_path / "zqtoy.safetensors"), token=word)
    right = theirs(pipe, prompt)
    extras = Extras(embedding=[tmp_path / "zqtoy.safetensors"])
    got = sources.prepared(source, extras, fresh(tmp_path))
    assert same(ours(got.folder, prompt), right)
    assert not same(plain, right)
    assert repr(word) in got.notes[0]


def test_a_textual_inversion_of_sdxl_goes_into_both_encoders(folders, tmp_path):
    source, path = folders("sdxl"), tmp_path / "zqtoy.safetensors"
    ours, theirs = (xl_pipe(source) for _ in range(2))
    widths = {"clip_l": 48, "clip_g": published_models.TEXT_2_SDXL["hidden_size"]}
    vectors = {k: torch.randn(2, w) for k, w in widths.items()}
    save_file(vectors, path)
    word = embeddings.read(embeddings.Embedding(path), list(XL_LAYERS))
    assert word.token == "zqtoy"
    for part, key in (("text_encoder", "clip_l"), ("text_encoder_2", "clip_g")):
        folder = part.replace("text_encoder", "tokenizer")
        tokenizer, right = getattr(theirs, folder), getattr(theirs, part)
        theirs.load_textual_inversion(
            vectors[key], token="zqtoy", text_encoder=right, tokenizer=tokenizer
        )
        embeddings.add(part, getattr(ours, part), getattr(ours, folder), word)
        same_weights(getattr(ours, part), right)
        assert getattr(ours, folder).get_vocab() == tokenizer.get_vocab()
    refused(folders("sd14"), tmp_path, "for SDXL's two text encoders", Extras(embedding=[path]))
    save_file({"<a>": torch.ones(1, 48)}, path)
    with pytest.raises(ArtifactError, match=r"accepted for this model: .* clip_l and clip_g"):
        embeddings.read(embeddings.Embedding(path), list(XL_LAYERS))


def test_textual_inversions_that_do_not_fit_are_one_line(folders, tmp_path):
    source = folders("sd14")
    save_file({"<a>": torch.ones(1, 1024)}, tmp_path / "wide.safetensors")
    save_file({"<a>": torch.ones(48), "b": torch.ones(48)}, tmp_path / "two.safetensors")
    save_file({"cat</w>": torch.ones(48)}, tmp_path / "known.safetensors")
    for name, words in (
        ("wide.safetensors", "width 1024, this model's text encoder has 48"),
        ("two.safetensors", "holds 2 tensors"),
        ("known.safetensors", "has the word"),
        ("x.pt", "accepted: a .safetensors file"),
    ):
        refused(source, tmp_path, words, Extras(embedding=[tmp_path / name]))


# --- layers of the text encoder


@pytest.mark.parametrize("layers", [0, 2])
def test_clip_skip_is_diffusers(folders, tmp_path, layers):
    source = folders("sd14")
    got = sources.prepared(source, Extras(clip_skip=layers), fresh(tmp_path)).folder
    config = json.loads((got / "text_encoder" / "config.json").read_text())
    assert config["num_hidden_layers"] == 12 - layers
    pipe = diffusers_pipe(source)
    if not hasattr(pipe.text_encoder, "text_model"):
        pytest.skip("diffusers 0.42 cannot leave out layers with transformers 5.6 and later")
    alone = ours(got, guidance_scale=1.0)
    assert same(alone, theirs(pipe, clip_skip=layers, guidance_scale=1.0))
    assert same(alone, theirs(pipe, guidance_scale=1.0)) == (layers == 0)
    # diffusers itself reads the negative prompt with all layers; here both are read alike
    with_prompt, without = (
        pipe.encode_prompt(p, "cpu", 1, False, clip_skip=layers)[0] for p in (PROMPT, "")
    )
    given = {"prompt_embeds": with_prompt, "negative_prompt_embeds": without}
    assert same(ours(got), theirs(pipe, None, **given))


def test_clip_skips_that_cannot_be_are_one_line(folders, tmp_path):
    for given in (-1, 12, 1.0, True):
        words = r"clip_skip=.*accepted: a whole number, 0 to 11"
        refused(folders("sd14"), tmp_path, words, Extras(clip_skip=given))
        refused(folders("vega"), tmp_path, words, Extras(clip_skip=given))


def test_clip_skip_of_sdxl_is_diffusers(folders, tmp_path):
    source = folders("vega")
    made = sources.prepared(source, Extras(clip_skip=2), fresh(tmp_path)).folder
    pipe = xl_pipe(source)
    if not hasattr(pipe.text_encoder, "text_model"):
        pytest.skip("diffusers 0.42 cannot leave out layers with transformers 5.6 and later")
    # no negative prompt is zeros in both; a given one is read with all layers by diffusers alone
    right = theirs(pipe, clip_skip=2, guidance_scale=5.0)
    assert same(ours(made, guidance_scale=5.0), right)
    assert not same(theirs(pipe, guidance_scale=5.0), right)
    # all layers stay, for the pooled text: diffusers needs the keyword with the folder
    assert same(theirs(xl_pipe(made), clip_skip=2, guidance_scale=5.0), right)
    again = sources.prepared(made, Extras(precision="fp16"), fresh(tmp_path)).folder
    texts = ("text_encoder", "text_encoder_2")
    specs = [Artifact.open(again).spec(p).outputs[-1].name for p in texts]
    assert specs == ["hidden_states.9", "hidden_states.29"]
    back = sources.prepared(made, Extras(clip_skip=0), fresh(tmp_path)).folder
    assert same(ours(back, guidance_scale=5.0), theirs(pipe, guidance_scale=5.0))
    configure(made / "text_encoder_2" / "config.json", _sdlite_clip_skip=32)
    with pytest.raises(ArtifactError, match="text_encoder_2 is to pass over 32 of its 32 layers"):
        Artifact.open(made)


# --- through the door


def test_a_file_with_a_lora_becomes_a_model_by_the_command(file, folders, tmp_path, monkeypatch):
    pytest.importorskip("peft", reason="needs the lora extra")
    from sdlite.cli import main

    style = kohya(folders("sd14"), tmp_path / "lcm-lora-style.safetensors", parts=("unet",))
    out = tmp_path / "model"
    given = ["--lora", f"{style}:0.5", "--clip-skip", "1"]
    assert main(["convert", str(file), *given, "--out", str(out)]) == 0
    model = Artifact.open(out)
    assert model.student["clip_skip"] == 1
    assert model.name == "my model é"
    assert model.sampler["name"] == "lcm"  # by the LoRA's name
    assert model.sampler["num_inference_steps"] == 4
    extras = Extras(lora=[(style, 0.5)], clip_skip=1)
    got = sources.prepared(file, extras, fresh(tmp_path)).folder
    call = {"sampler": "lcm", "guidance_scale": 1.0}
    with Pipeline.from_pretrained(out, backend="onnxruntime", threads=1) as pipe:
        again = {"num_inference_steps": 3, "height": SIZE, "width": SIZE, "seed": 0} | call
        image = np.asarray(pipe(PROMPT, **again).images[0])
    assert same(image, ours(got, **call))


@pytest.mark.slow
def test_an_sdxl_file_becomes_a_model(folders, tmp_path, monkeypatch):
    import sdlite

    monkeypatch.setitem(originals.UNET_XL, "norm_num_groups", 8)  # of narrow networks
    save_file(ldm.checkpoint(folders("vega")), tmp_path / "sd_xl_turbo_vega.safetensors")
    out = sdlite.convert(tmp_path / "sd_xl_turbo_vega.safetensors", tmp_path / "out", clip_skip=1)
    model = Artifact.open(out)
    assert model.samples_with == {
        "name": "euler-ancestral",
        "num_inference_steps": 1,
        "guidance_scale": 1.0,
    }
    pipe = xl_pipe(folders("vega"))
    kind = diffusers.EulerDiscreteScheduler
    pipe.scheduler = kind.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    with Pipeline.from_pretrained(out, backend="onnxruntime", threads=1) as own:
        call = {"sampler": "euler", "num_inference_steps": 3, "guidance_scale": 1.0, "seed": 0}
        image = np.asarray(own(PROMPT, height=SIZE, width=SIZE, **call).images[0])
    assert same(image, theirs(pipe, guidance_scale=1.0, clip_skip=1))
    assert not same(image, theirs(pipe, guidance_scale=1.0))


@pytest.mark.slow
def test_a_pipeline_opens_a_file_and_converts_it_once(file, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("SDLITE_CACHE", str(tmp_path / "cache"))
    for _ in range(2):
        with Pipeline.from_pretrained(file, threads=1) as pipe:
            assert any("converted from" in n for n in pipe.report.notes)
    assert len(list((tmp_path / "cache" / "onnx").glob("my model*"))) == 1
    assert caplog.text.count("converting it once") == 1
    for name, words in (("no.safetensors", "does not exist"), ("no.ckpt", "does not exist")):
        with pytest.raises(InputError, match=words):
            Pipeline.from_pretrained(tmp_path / name)
    (tmp_path / "m.ckpt").write_bytes(b"x")
    with pytest.raises(InputError, match=r"is a pickle.*sdlite convert --from-pickle"):
        Pipeline.from_pretrained(tmp_path / "m.ckpt")


def test_nothing_is_written_when_a_source_is_refused(file, tmp_path):
    import sdlite

    save_file({"a": torch.ones(2)}, tmp_path / "none.safetensors")
    with pytest.raises(ArtifactError, match="holds no LoRA"):
        sdlite.convert(file, tmp_path / "out", lora=[tmp_path / "none.safetensors"])
    assert not (tmp_path / "out").exists()
