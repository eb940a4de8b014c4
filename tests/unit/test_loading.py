"""Whatever opens a network: every tensor comes from its file and none is left over; other kinds of
models are refused at once.
"""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest

import sdlite
from sdlite import families
from sdlite.artifact import Artifact
from sdlite.errors import ArtifactError, UnknownNameError
from tests import folders

torch = pytest.importorskip("torch", reason="needs the torch extra")
pytest.importorskip("diffusers", reason="needs the torch extra")

from sdlite.files import Files  # noqa: E402
from sdlite.torch_networks import open_network  # noqa: E402
from sdlite.weights import (  # noqa: E402
    index_name,
    model_files,
    plain_name,
    stem,
    weight_files,
    weight_index,
    widen,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return folders.write(tmp_path_factory.mktemp("sd") / "tiny")


@pytest.fixture
def damaged(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "tiny")


def rename(old, new):
    return lambda tensors: {k.replace(old, new): v for k, v in tensors.items()}


def prefix(text):
    return lambda tensors: {text + k: v for k, v in tensors.items()}


def without_one(tensors):
    return dict(sorted(tensors.items())[1:])


def with_one_more(tensors):
    return {**tensors, "surprise.weight": torch.zeros(3)}


def narrower(tensors):
    return {k: v[..., :-1] if v.ndim == 2 else v for k, v in tensors.items()}


# --- weights that are not the network's


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (prefix("_orig_mod."), r"lacks \d+ .*saved compiled"),
        (prefix("module."), r"lacks \d+ .*DistributedDataParallel"),
        (without_one, r"lacks 1 of the network's tensors \(first: \w"),
        (with_one_more, r"holds 1 that the network does not have \(first: surprise\.weight\)"),
        (narrower, r"holds \d+ of another shape than config\.json's \(first: .*instead of"),
    ],
    ids=["compiled", "ddp", "missing", "left over", "shape"],
)
def test_every_tensor_of_each_network_is_from_its_file(damaged, part, edit, says):
    folders.change(damaged, part, edit)
    with pytest.raises(ArtifactError, match=says) as e:
        open_network(damaged / part)
    assert "\n" not in str(e.value)
    assert f"{part}/{folders.WEIGHTS[part]}" in str(e.value)


def test_fused_lora_that_was_not_unloaded_is_named(damaged):
    folders.change(damaged, "unet", rename("to_q.weight", "to_q.base_layer.weight"))
    with pytest.raises(
        ArtifactError, match=r"LoRA was fused but not unloaded.*unload_lora_weights"
    ):
        open_network(damaged / "unet")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4665dd\nsize 3438167534\n",
            "git-lfs pointer",
        ),
        (b"<!doctype html><title>404</title>", "not a safetensors file"),
        (b"", "not a safetensors file"),
    ],
)
@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_file_that_holds_no_tensors_is_named(damaged, part, content, says):
    (damaged / part / folders.WEIGHTS[part]).write_bytes(content)
    with pytest.raises(ArtifactError, match=says):
        open_network(damaged / part)


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_cut_file_is_named(damaged, part):
    file = damaged / part / folders.WEIGHTS[part]
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ArtifactError, match="cut off"):
        open_network(damaged / part)


def test_integers_and_eight_bit_floats_are_no_weights(damaged):
    folders.change(
        damaged,
        "unet",
        lambda t: {k: v.to(torch.float8_e4m3fn) if "conv_in" in k else v for k, v in t.items()},
    )
    with pytest.raises(
        ArtifactError, match=r"conv_in.* as F8_E4M3; accepted: float32, float16, bfloat16"
    ):
        open_network(damaged / "unet")
    folders.change(
        damaged,
        "vae",
        lambda t: {
            k: v.to(torch.int32) if k == "decoder.conv_in.weight" else v for k, v in t.items()
        },
    )
    with pytest.raises(ArtifactError, match=r"decoder\.conv_in\.weight as I32"):
        open_network(damaged / "vae")


def test_buffers_and_other_halves_of_clip_are_no_left_overs(damaged, whole):
    more = {
        "text_model.embeddings.position_ids": torch.arange(26)[None],
        "text_projection.weight": torch.zeros(4, 16),
        "vision_model.encoder.x": torch.zeros(2),
        "logit_scale": torch.zeros(()),
    }
    folders.change(damaged, "text_encoder", lambda t: t | more)
    ids = torch.zeros(1, 26, dtype=torch.int64)
    assert torch.equal(
        open_network(damaged / "text_encoder")(ids)[0], open_network(whole / "text_encoder")(ids)[0]
    )


# --- which files


def shard(folder, part, size="20KB"):
    network = open_network(folder / part)
    (folder / part / folders.WEIGHTS[part]).unlink()
    network.save_pretrained(folder / part, max_shard_size=size)


def test_shards_are_what_the_index_lists(damaged, whole):
    shard(damaged, "unet")
    listed = weight_files(damaged / "unet")
    assert len(listed) > 1
    older = open_network(whole / "unet").state_dict()
    changed = {k: v + 1 for k, v in older.items()}
    from safetensors.torch import save_file

    save_file(
        changed, damaged / "unet" / folders.WEIGHTS["unet"], metadata={"format": "pt"}
    )  # a stale single file
    save_file(
        changed, damaged / "unet" / "diffusion_pytorch_model-00001-of-00099.safetensors"
    )  # a left-over shard
    assert weight_files(damaged / "unet") == listed
    assert all(
        torch.equal(v, older[k]) for k, v in open_network(damaged / "unet").state_dict().items()
    )


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
@pytest.mark.parametrize("size", ["1GB", "20KB"])
def test_a_variant_alone_is_read(damaged, whole, part, size):
    network = open_network(damaged / part)
    (damaged / part / folders.WEIGHTS[part]).unlink()
    network.half().save_pretrained(damaged / part, variant="fp16", max_shard_size=size)
    names = [w.name for w in weight_files(damaged / part)]
    assert all(".fp16" in n for n in names)
    assert (len(names) > 1) == (size == "20KB")
    assert {plain_name(n, stem(part)).count("fp16") for n in names} == {0}
    older = open_network(whole / part).state_dict()
    got = open_network(damaged / part).state_dict()
    assert all(torch.equal(v, older[k].half().float()) for k, v in got.items())
    files = model_files(Files.of(damaged), [part], [])
    assert (f"{part}/{index_name(stem(part), 'fp16')}" in files) == (len(names) > 1)
    if len(names) > 1:
        (damaged / part / index_name(stem(part), "fp16")).unlink()
        with pytest.raises(ArtifactError, match=r"shards .* no .*index\.fp16\.json"):
            weight_files(damaged / part)


def test_two_variants_alone_are_told(damaged):
    file = damaged / "unet" / folders.WEIGHTS["unet"]
    for name in ("fp16", "non_ema"):
        shutil.copy(file, file.with_suffix(f".{name}.safetensors"))
    assert [w.name for w in weight_files(damaged / "unet")] == [file.name]
    for name in ("fp16", "non_ema"):
        [chosen] = weight_files(Artifact.open(damaged, variant=name).files.part("unet"))
        assert chosen.name == file.with_suffix(f".{name}.safetensors").name
    [other] = weight_files(Artifact.open(damaged, variant="fp16").files.part("vae"))
    assert other.name == file.name  # which has no variant
    said = r"has no weights of variant 'bf16'; it has fp16, non_ema\. Take one"
    with pytest.raises(UnknownNameError, match=said):
        Artifact.open(damaged, variant="bf16")
    file.unlink()
    with pytest.raises(ArtifactError, match=r"several variants \(fp16, non_ema\).*--variant fp16"):
        weight_files(damaged / "unet")


def test_shards_without_an_index_or_with_one_missing_are_refused(damaged):
    shard(damaged, "unet")
    index = damaged / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    gone = weight_files(damaged / "unet")[0]
    gone.rename(gone.with_suffix(".away"))
    with pytest.raises(ArtifactError, match=rf"lists {gone.name}, which is missing"):
        open_network(damaged / "unet")
    index.unlink()
    with pytest.raises(
        ArtifactError, match=r"\d shards .*no diffusion_pytorch_model\.safetensors\.index\.json"
    ):
        open_network(damaged / "unet")


def test_index_may_not_name_files_elsewhere(damaged):
    index = damaged / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "../../elsewhere.safetensors"}}))
    with pytest.raises(ArtifactError, match="no weight_map"):
        weight_files(damaged / "unet")


@pytest.mark.parametrize("named", [3, None, ["a.safetensors"], {"a": 1}, "x/y.safetensors"])
def test_an_index_names_files_by_text(damaged, named):
    index = damaged / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {"a": "diffusion_pytorch_model.safetensors", "b": named}})
    )
    with pytest.raises(ArtifactError, match="no weight_map"):
        weight_files(damaged / "unet")


def test_pickles_alone_are_named_with_the_way_out(damaged):
    file = damaged / "vae" / folders.WEIGHTS["vae"]
    file.rename(file.with_name("diffusion_pytorch_model.bin"))
    with pytest.raises(ArtifactError, match=r"only diffusion_pytorch_model\.bin.*Pickles"):
        open_network(damaged / "vae")


def test_widened_file_holds_the_same_values(tmp_path):
    half = folders.write(tmp_path / "half", dtype="bfloat16")
    out = tmp_path / "wide.safetensors"
    widen(weight_files(half / "vae"), out)
    from safetensors.torch import load_file

    wide, own = load_file(out), load_file(half / "vae" / folders.WEIGHTS["vae"])
    assert {v.dtype for v in wide.values()} == {torch.float32}
    assert all(torch.equal(wide[k], v.float()) for k, v in own.items())
    index = weight_index(weight_files(half / "vae"))
    assert all(np.array_equal(index[k].read(), v.float().numpy()) for k, v in own.items())


@pytest.mark.parametrize(
    ("dtype", "precision"), [("float16", "fp32"), ("bfloat16", "fp32"), ("float32", "fp16")]
)
def test_report_says_what_is_on_disk(tmp_path, dtype, precision):
    pipe = sdlite.Pipeline.from_pretrained(
        folders.write(tmp_path / "sd", dtype=dtype), backend="torch", precision=precision
    )
    assert {(n.storage, n.arithmetic) for n in pipe.report.networks} == {(dtype, "float32")}


# --- kinds of models


SDXL = {
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer_2": ["transformers", "T5Tokenizer"],
}
SD3 = {
    "unet": ...,
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_3": ["transformers", "T5EncoderModel"],
}
PIXART = {
    "unet": ...,
    "transformer": ["diffusers", "PixArtTransformer2DModel"],
    "text_encoder": ["transformers", "T5EncoderModel"],
}
OTHERS = [
    ("StableDiffusionXLPipeline", SDXL, {}, "its text_encoder_2 is of class T5EncoderModel"),
    (
        "StableDiffusion3Pipeline",
        SD3,
        {},
        "it has no unet, but text_encoder_2, text_encoder_3, transformer",
    ),
    ("PixArtSigmaPipeline", PIXART, {}, "it has no unet, but transformer"),
    (
        "StableDiffusionControlNetPipeline",
        {"controlnet": ["diffusers", "MultiControlNetModel"]},
        {},
        "its controlnet is of class MultiControlNetModel",
    ),
    (
        "AltDiffusionPipeline",
        {"text_encoder": ["alt_diffusion", "RobertaSeries"]},
        {},
        "text_encoder is of class RobertaSeries",
    ),
    (
        "OnnxStableDiffusionPipeline",
        {"unet": ["diffusers", "OnnxRuntimeModel"]},
        {},
        "unet is of class OnnxRuntimeModel",
    ),
    (
        "StableDiffusionInstructPix2PixPipeline",
        {},
        {"in_channels": 8},
        "takes 8 channels, the latents have 4",
    ),
    (
        "StableDiffusionUpscalePipeline",
        {},
        {"in_channels": 7, "num_class_embeds": 1000},
        r"noise level \(num_class_embeds=1000\)",
    ),
    ("StableUnCLIPPipeline", {}, {"class_embed_type": "projection"}, "class embedding"),
    (
        "StableDiffusionPipeline",
        {},
        {"addition_embed_type": "text_time"},
        r"further embeddings .*addition_embed_type='text_time'",
    ),
    ("IFPipeline", {}, {"encoder_hid_dim": 64}, "encoder_hid_dim=64"),
    (
        "StableDiffusionPipeline",
        {},
        {"cross_attention_dim": 24},
        "reads text of width 24, its text encoder gives 16",
    ),
]


@pytest.fixture(params=OTHERS, ids=lambda o: f"{o[0]}-{','.join(o[2])}")
def other(request, damaged):
    name, index, unet, says = request.param
    folders.configure(damaged / "model_index.json", _class_name=name, **index)
    folders.configure(damaged / "unet" / "config.json", **unet)
    for part in folders.WEIGHTS.values():
        for file in damaged.glob(f"*/{part}"):
            file.write_bytes(b"")  # what is refused is refused before its weights are looked at
    return damaged, rf"tiny is a {name}, which is not supported: .*{says}.* sdlite runs"


def test_other_kinds_are_refused_in_one_line_by_everything_that_opens_a_model(other, tmp_path):
    folder, says = other
    for backend in ("auto", "onnxruntime", "openvino", "torch"):
        with pytest.raises(ArtifactError, match=says) as e:
            sdlite.Pipeline.from_pretrained(folder, backend=backend)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "other",
    OTHERS[:1] + OTHERS[6:7] + OTHERS[8:9],
    indirect=True,
    ids=["sdxl", "pix2pix", "unclip"],
)
def test_other_kinds_are_refused_by_every_command(other, tmp_path, capsys):
    pytest.importorskip("onnxscript", reason="needs the export extra")
    pytest.importorskip("accelerate", reason="needs the distill extra")
    from sdlite.cli import main

    folder, says = str(other[0]), other[1]
    recipe, prompts, out = tmp_path / "r.toml", tmp_path / "p.txt", str(tmp_path / "out")
    recipe.write_text('name = "x"\n[[stage]]\nkind = "output"\nimages = 8\n')
    prompts.write_text("a fox\n")
    teach = ["--teacher", folder, "--data", str(prompts)]
    for command in (
        ["generate", "a", "--model", folder, "--out", str(tmp_path / "a.png")],
        [
            "quantize",
            folder,
            "--precision",
            "int8-dynamic",
            "--prompts",
            str(prompts),
            "--out",
            out,
        ],
        ["export", folder, "--target", "onnx", "--out", out],
        ["bench", folder],
        ["distill", str(recipe), *teach, "--out", out],
        ["distill", str(recipe), *teach, "--dry-run"],
        ["distill", "doctor", str(recipe), *teach],
        ["distill", "advise", "--teacher", folder],
    ):
        assert main(command) == 1, command
        said = capsys.readouterr().err.strip()
        assert re.search(says, said), (command, said)
        assert "\n" not in said, command
    with pytest.raises(ArtifactError, match=says):
        sdlite.convert(folder, out)
    assert main(["info", folder]) == 0
    said = capsys.readouterr().out
    assert re.search(says, said)
    assert "runs with" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name",
    [
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "LatentConsistencyModelPipeline",
        None,
    ],
)
def test_kinds_with_the_same_parts_open(damaged, name):
    more = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    folders.configure(damaged / "model_index.json", _class_name=name, **more)
    assert Artifact.open(damaged).refusal() == ""


def test_stride_of_each_autoencoder():
    taesd = {
        "_class_name": "AutoencoderTiny",
        "encoder_block_out_channels": [64] * 4,
        "decoder_block_out_channels": [64] * 4,
    }
    assert families.vae_stride(taesd) == 8  # as its authors publish it
    assert (
        families.vae_stride(
            {
                "_class_name": "AutoencoderTiny",
                "decoder_block_out_channels": [8] * 3,
                "block_out_channels": [8],
            }
        )
        == 4
    )
    assert (
        families.vae_stride(
            {"_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512]}
        )
        == 8
    )
    assert families.vae_stride({"_class_name": "AutoencoderTiny"}) == 8


def test_vaes_config_has_what_diffusers_adds_in_memory():
    tiny = {"_class_name": "AutoencoderTiny", "decoder_block_out_channels": [8] * 4}
    assert families.vae_config(tiny) == {
        **tiny,
        "scaling_factor": 1.0,
        "block_out_channels": [8] * 4,
    }
    assert families.vae_config({"block_out_channels": [8, 8]}) == {
        "scaling_factor": 0.18215,
        "block_out_channels": [8, 8],
    }
    assert (
        families.vae_config({"block_out_channels": [8], "scaling_factor": 0.13})["scaling_factor"]
        == 0.13
    )


# --- code and weights from elsewhere


CODE = [
    ("text_encoder/config.json", {"auto_map": {"AutoModel": "evil.Evil"}}),
    ("text_encoder/config.json", {"_attn_implementation": "evil-org/evil-kernel"}),
    ("text_encoder/config.json", {"attn_implementation": "evil-org/evil-kernel"}),
    ("text_encoder/config.json", {"quantization_config": {"quant_method": "evil"}}),
    ("text_encoder/config.json", {"transformers_weights": "other.safetensors"}),
    ("unet/config.json", {"quantization_config": {"quant_method": "bitsandbytes"}}),
    ("unet/config.json", {"trust_remote_code": True}),
    ("vae/config.json", {"auto_map": {"AutoModel": "evil.Evil"}}),
]
ADAPTER = {
    "peft_type": "LORA",
    "base_model_name_or_path": "/other/folder",
    "r": 1,
    "target_modules": ["q_proj"],
}


def every_way_to_open(folder, out):
    """What opens the networks of a folder."""
    from sdlite.distill.teacher import Teacher

    return [
        lambda: sdlite.Pipeline.from_pretrained(folder, backend="torch"),
        lambda: sdlite.convert(folder, out),
        lambda: Teacher(folder),
    ]


def refused_in_one_line(folder, out, match):
    for call in every_way_to_open(folder, out):
        with pytest.raises(ArtifactError, match=match) as e:
            call()
        assert str(e.value).isprintable()
    assert not out.exists()


@pytest.mark.parametrize(
    ("file", "keys"), CODE, ids=lambda x: x if isinstance(x, str) else next(iter(x))
)
def test_a_config_that_asks_for_code_is_refused_by_everything_that_loads_it(
    damaged, tmp_path, file, keys
):
    pytest.importorskip("onnxscript", reason="needs the export extra")
    pytest.importorskip("accelerate", reason="needs the distill extra")
    folders.configure(damaged / file, **keys)
    refused_in_one_line(
        damaged, tmp_path / "out", rf"{file} has {next(iter(keys))}=.*accepted: none"
    )
    with pytest.raises(ArtifactError, match=next(iter(keys))):
        open_network(damaged / file.split("/")[0])


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_an_adapter_is_refused_by_everything_that_loads_it(damaged, tmp_path, part):
    pytest.importorskip("onnxscript", reason="needs the export extra")
    pytest.importorskip("accelerate", reason="needs the distill extra")
    (damaged / part / "adapter_config.json").write_text(json.dumps(ADAPTER))
    refused_in_one_line(
        damaged, tmp_path / "out", rf"{part}/adapter_config\.json puts other weights"
    )


def test_transformers_is_told_its_config_and_nothing_is_asked_of_a_network(
    damaged, whole, monkeypatch
):
    """What transformers does not know of CLIP is not said to it; where names of repositories stand,
    nobody asks there.
    """
    import socket

    import transformers

    def asked(*args, **more):
        raise AssertionError(f"a connection to {args}")

    monkeypatch.setattr(socket.socket, "connect", asked)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    told, real = [], transformers.CLIPTextModel.from_pretrained
    monkeypatch.setattr(
        transformers.CLIPTextModel,
        "from_pretrained",
        lambda *args, **more: told.append(more) or real(*args, **more),
    )
    folders.configure(
        damaged / "text_encoder/config.json",
        _name_or_path="org/evil",
        base_model="org/evil",
        use_kernels=True,
        dtype="float64",
    )
    folders.configure(
        damaged / "unet/config.json", _name_or_path="org/evil", _class_name="EvilModel"
    )
    for part in ("text_encoder", "unet"):
        mine, theirs = (
            open_network(damaged / part).state_dict(),
            open_network(whole / part).state_dict(),
        )
        assert all(torch.equal(v, theirs[k]) for k, v in mine.items())
    assert told[0]["attn_implementation"] == "sdpa"
    assert told[0]["local_files_only"] is True
    assert not hasattr(told[0]["config"], "use_kernels")
    ours, plain = (told[i]["config"].to_dict() for i in (0, 1))
    assert {**ours, "dtype": None} == {
        **plain,
        "dtype": None,
    }  # a key of every configuration in transformers 5; the network is float32


DAMAGE = {
    "cut": lambda raw: raw[:-100],
    "header": lambda raw: raw[:4],
    "random": lambda raw: bytes(range(256)) * (len(raw) // 256),
    "empty": lambda raw: b"",
    "long header": lambda raw: b"\xff" * 8 + raw[8:],
}


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_weights_are_one_line_for_everything_that_loads_them(damaged, tmp_path, part, how):
    pytest.importorskip("onnxscript", reason="needs the export extra")
    pytest.importorskip("accelerate", reason="needs the distill extra")
    file = damaged / part / folders.WEIGHTS[part]
    file.write_bytes(DAMAGE[how](file.read_bytes()))
    refused_in_one_line(damaged, tmp_path / "out", rf"{part}/{folders.WEIGHTS[part]}")


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "\xff", "null", '{"a":' * 5000 + "1" + "}" * 5000],
    ids=["empty", "cut", "list", "latin", "null", "deep"],
)
def test_a_damaged_config_is_one_line_for_everything_that_loads_it(
    damaged, tmp_path, part, content
):
    pytest.importorskip("onnxscript", reason="needs the export extra")
    pytest.importorskip("accelerate", reason="needs the distill extra")
    (damaged / part / "config.json").write_bytes(content.encode("latin-1"))
    refused_in_one_line(damaged, tmp_path / "out", rf"{part}/config\.json")
