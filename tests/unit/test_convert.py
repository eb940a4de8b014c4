"""`convert` on folders as they are published: any latent size, weights stored once, and a result
that others open too.
"""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

import sdlite
from sdlite.artifact import Artifact
from sdlite.errors import ArtifactError
from sdlite.io import read_json
from sdlite.spec import SPECS
from tests import folders
from tests.helpers import psnr

torch = pytest.importorskip("torch", reason="needs the torch extra")
diffusers = pytest.importorskip("diffusers", reason="needs the torch extra")
pytest.importorskip("onnxscript", reason="needs the export extra")
pytest.importorskip("onnxruntime", reason="needs the cpu extra")

from sdlite.converter import _copy  # noqa: E402
from sdlite.torch_networks import open_network  # noqa: E402
from sdlite.tracing import _link_weights, network  # noqa: E402
from sdlite.tryout import try_out  # noqa: E402

CALL = {"seed": 3, "num_inference_steps": 2, "guidance_scale": 3.0}
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def old_attention(tensors):
    """The VAE's names before diffusers 0.16."""
    for new, old in OLD_NAMES.items():
        tensors = {
            k.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): v for k, v in tensors.items()
        }
    return tensors


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A tiny model with what published folders have besides: an integer buffer, old names,
    variants, parts that no one runs.
    """
    out = folders.write(tmp_path_factory.mktemp("sd") / "tiny")
    folders.change(
        out,
        "text_encoder",
        lambda t: {**t, "text_model.embeddings.position_ids": torch.arange(26)[None]},
    )
    folders.change(out, "vae", old_attention)
    shutil.copy(
        out / "unet" / folders.WEIGHTS["unet"],
        out / "unet" / "diffusion_pytorch_model.fp16.safetensors",
    )
    folders.configure(
        out / "vae" / "config.json", scaling_factor=...
    )  # diffusers' default, and another of optimum's
    checker = {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "requires_safety_checker": True,
    }
    folders.configure(
        out / "model_index.json",
        **checker,
        feature_extractor=["transformers", "CLIPImageProcessor"],
    )
    (out / "unet").chmod(0o555)  # as in a container's layer
    yield out
    (out / "unet").chmod(0o755)


@pytest.fixture(scope="module")
def converted(published, tmp_path_factory):
    return sdlite.convert(published, tmp_path_factory.mktemp("out") / "artifact")


def pixels(folder, backend, **call):
    pipe = sdlite.Pipeline.from_pretrained(folder, backend=backend, precision="fp32", threads=1)
    return np.stack(
        [np.asarray(i) for i in pipe(["a red fox", "two cats"], **{**CALL, **call}).images]
    )


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("size", [(64, 64), (136, 200), (16, 24)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_images_of_any_multiple_of_the_vaes_stride_are_torchs(published, converted, backend, size):
    pytest.importorskip(backend)
    height, width = size
    want = pixels(published, "torch", height=height, width=width)
    assert want.shape == (2, height, width, 3)
    assert psnr(pixels(converted, backend, height=height, width=width), want) >= 80
    assert Artifact.open(converted).manifest.size_multiple == 8


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_converted_model_reads_prompts_longer_than_the_window(published, converted, backend):
    """The graph takes any number of hidden states."""
    pytest.importorskip(backend, reason="needs the dev extra")
    long = {"prompt_weighting": "a1111", "negative_prompt": "blue BREAK and BREAK green"}
    want, got = pixels(published, "torch", **long), pixels(converted, backend, **long)
    assert psnr(got, want) >= 80


def test_weights_are_stored_once_and_nothing_else_is_copied(converted):
    names = {p.relative_to(converted).as_posix() for p in converted.rglob("*") if p.is_file()}
    assert not [n for n in names if "fp16" in n or n.startswith(("safety", "feature"))]
    table = read_json(converted / "text_encoder" / "config.json")["vocab_size"] * 16 * 4
    assert (converted / "text_encoder" / "model.onnx").stat().st_size < table
    assert (converted / "unet" / "model.onnx").stat().st_size < (
        converted / "unet" / folders.WEIGHTS["unet"]
    ).stat().st_size


def test_tensor_is_linked_by_its_values_where_its_name_is_another(tmp_path):
    import onnx
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    table, other = (rng.standard_normal((30, 8)).astype(np.float32) for _ in range(2))
    stored = {
        "text_model.embeddings.token_embedding.weight": table,
        "text_model.embeddings.position_ids": np.arange(30)[None],
    }
    save_file(stored, tmp_path / "model.safetensors")
    values = {
        "module.embeddings.token_embedding.weight": table,
        "transposed": np.ascontiguousarray(table.T),
        "other": other,
    }
    graph = onnx.helper.make_graph(
        [], "g", [], [], [onnx.numpy_helper.from_array(v, k) for k, v in values.items()]
    )
    model = onnx.helper.make_model(graph)
    assert _link_weights(model, [tmp_path / "model.safetensors"], "module.") == other.nbytes
    assert [(n.op_type, n.output[0]) for n in model.graph.node] == [
        ("Identity", next(iter(values))),
        ("Transpose", "transposed"),
    ]


def test_diffusers_opens_what_was_converted(published, converted):
    pipe = diffusers.DiffusionPipeline.from_pretrained(converted)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.safety_checker is None
    latents = torch.from_numpy(
        np.random.default_rng(0).standard_normal((1, 4, 8, 8), dtype=np.float32)
    )
    call = {"num_inference_steps": 2, "guidance_scale": 3.0}
    theirs = pipe("a red fox", latents=latents, **call).images[0]
    ours = sdlite.Pipeline.from_pretrained(converted, threads=1)(
        "a red fox", latents=latents.numpy(), **call
    ).images[0]
    assert psnr(np.asarray(theirs), np.asarray(ours)) >= 80


def test_optimum_opens_what_was_converted_and_what_was_exported(converted, tmp_path):
    optimum = pytest.importorskip("optimum.onnxruntime", reason="needs the optimum extra")
    sdlite.export(converted, tmp_path / "exported", target="onnx", num_inference_steps=1, threads=1)
    latents = np.random.default_rng(0).standard_normal((1, 4, 8, 8), dtype=np.float32)
    ours = sdlite.Pipeline.from_pretrained(converted, threads=1)(
        "a red fox", latents=latents, **{**CALL, "seed": None}
    ).images[0]
    for folder in (converted, tmp_path / "exported"):
        pipe = optimum.ORTStableDiffusionPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        theirs = pipe(
            "a red fox",
            latents=torch.from_numpy(latents),
            num_inference_steps=2,
            guidance_scale=3.0,
        ).images[0]
        assert psnr(np.asarray(theirs), np.asarray(ours)) >= 80, folder.name


def test_bfloat16_is_copied_as_float32_exactly(tmp_path):
    half, out = folders.write(tmp_path / "half", dtype="bfloat16"), tmp_path / "out"
    out.mkdir()
    _copy(Artifact.open(half), out)
    folders.configure(out / "model_index.json", _sdlite=...)  # a plain folder again
    pipe = sdlite.Pipeline.from_pretrained(out, backend="torch")
    assert {n.storage for n in pipe.report.networks} == {"float32"}
    assert (pixels(out, "torch") == pixels(half, "torch")).all()


@pytest.mark.parametrize("size", ["1GB", "20KB"])
def test_a_variant_alone_is_copied_under_the_default_names(tmp_path, size):
    source, out = folders.write(tmp_path / "tiny"), tmp_path / "out"
    network = open_network(source / "unet")
    (source / "unet" / folders.WEIGHTS["unet"]).unlink()
    network.half().save_pretrained(source / "unet", variant="fp16", max_shard_size=size)
    out.mkdir()
    _copy(Artifact.open(source), out)
    assert not list(out.rglob("*fp16*"))
    copied = open_network(out / "unet").state_dict()
    assert all(torch.equal(v, copied[k].half()) for k, v in network.state_dict().items())


# --- what must not be converted


@pytest.fixture
def damaged(published, tmp_path):
    out = shutil.copytree(published, tmp_path / "tiny")
    (out / "unet").chmod(0o755)
    return out


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_weights_that_are_not_the_networks_are_not_converted(damaged, part, tmp_path):
    folders.change(damaged, part, lambda t: {"_orig_mod." + k: v for k, v in t.items()})
    with pytest.raises(ArtifactError, match=r"lacks \d+ .*saved compiled"):
        sdlite.convert(damaged, tmp_path / "out")
    with pytest.raises(ArtifactError, match=r"lacks \d+ .*saved compiled"):
        network(damaged, SPECS[part.replace("vae", "vae_decoder")])
    assert [p.name for p in tmp_path.iterdir()] == ["tiny"]


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae_decoder"])
def test_network_that_answers_nan_is_not_called_done(damaged, part):
    source = part.removesuffix("_decoder")
    folders.change(
        damaged,
        source,
        lambda t: {k: torch.full_like(v, torch.nan) if "norm" in k else v for k, v in t.items()},
    )
    with pytest.raises(ArtifactError, match=rf"{part} of tiny answers NaN or infinity"):
        try_out(damaged)


def test_folder_without_a_tokenizer_is_not_converted(damaged, tmp_path):
    for name in ("vocab.json", "tokenizer.json"):
        (damaged / "tokenizer" / name).unlink(missing_ok=True)
    with pytest.raises(ArtifactError, match="tokenizer"):
        sdlite.convert(damaged, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["tiny"]


def test_teacher_whose_weights_are_not_its_own_is_not_trained_on(damaged, tmp_path):
    pytest.importorskip("accelerate", reason="needs the distill extra")
    from sdlite.distill.recipe import Recipe
    from sdlite.distill.run import run

    folders.change(
        damaged,
        "text_encoder",
        lambda t: {k.replace("layers.1.mlp", "layers.1.ffn"): v for k, v in t.items()},
    )
    recipe = Recipe.parse({"name": "x", "stage": [{"kind": "output", "images": 4}]})
    with pytest.raises(ArtifactError, match=r"lacks 4 .*mlp.* and holds 4 .*ffn"):
        run(recipe, teacher=damaged, data=tmp_path, out=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_teacher_with_published_taesd_has_its_size(damaged):
    pytest.importorskip("accelerate", reason="needs the distill extra")
    from sdlite.distill.teacher import Teacher

    shutil.rmtree(damaged / "vae")
    blocks = {"encoder_block_out_channels": [8] * 4, "decoder_block_out_channels": [8] * 4}
    diffusers.AutoencoderTiny(**blocks).save_pretrained(damaged / "vae")
    folders.configure(damaged / "vae" / "config.json", block_out_channels=...)
    assert "block_out_channels" not in json.loads((damaged / "vae" / "config.json").read_text())
    folders.configure(damaged / "model_index.json", vae=["diffusers", "AutoencoderTiny"])
    assert Teacher(damaged).size == (64, 64)
    assert pixels(damaged, "torch").shape == (2, 64, 64, 3)
