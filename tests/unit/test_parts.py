"""Tiny decoder and smaller text encoder: exact at the start, convention of scale, stages of a
recipe, models that run everywhere.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the distill extra")
pytest.importorskip("accelerate", reason="needs the distill extra")
pytest.importorskip("diffusers", reason="needs the distill extra")

from diffusers.configuration_utils import FrozenDict  # noqa: E402

from sdlite import Pipeline  # noqa: E402
from sdlite.artifact import Artifact  # noqa: E402
from sdlite.distill.preview import decode_scaled  # noqa: E402
from sdlite.distill.recipe import Recipe  # noqa: E402
from sdlite.distill.run import plan, run  # noqa: E402
from sdlite.distill.students import StudentSpec, build, parameters  # noqa: E402
from sdlite.distill.tasks.base import V_ZERO_SNR, Given  # noqa: E402
from sdlite.distill.tasks.other_networks import (  # noqa: E402
    TextEncoder,
    TinyDecoder,
    smaller_text_encoder,
    tiny_vae,
)
from sdlite.distill.teacher import Teacher  # noqa: E402
from sdlite.distill.train import step_generator  # noqa: E402
from sdlite.errors import ArtifactError, InputError  # noqa: E402
from sdlite.tokenizer import ClipTokenizer  # noqa: E402
from tests.conftest import EMOJI  # noqa: E402
from tests.helpers import psnr  # noqa: E402

RECIPE = """
name = "parts"
[train]
batch_size = 2
sample_every = 0
[[stage]]
kind = "text-encoder"
images = 4
layers = 1
[[stage]]
kind = "tiny-decoder"
images = 4
width = 8
blocks = 1
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A pipeline folder of some ten thousand random weights, 16 px, on the emoji tokenizer."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    folder, words = (
        tmp_path_factory.mktemp("small") / "teacher",
        ClipTokenizer.from_pretrained(EMOJI / "tokenizer"),
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=words.vocab_size,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            projection_dim=16,
            max_position_embeddings=words.max_length,
            bos_token_id=words.bos,
            eos_token_id=words.eos,
            pad_token_id=words.pad,
        )
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.5,
    )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=CLIPTokenizer.from_pretrained(EMOJI / "tokenizer"),
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, timestep_spacing="trailing"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "prompts.txt"
    path.write_text("red apple\ndog face\npizza\n")
    return path


@pytest.fixture(scope="module")
def trained(small, prompts, tmp_path_factory):
    """A run of both stages, without the artefact."""
    out = tmp_path_factory.mktemp("run")
    done = run(
        parse(RECIPE), teacher=small, data=prompts, out=out / "run", export=False, progress=False
    )
    return out / "run", done


def parse(text):
    import tomllib

    return Recipe.parse(tomllib.loads(text))


def pieces(small, prompts, tmp_path):
    teacher = Teacher(small)
    source = teacher.source(prompts, tmp_path / "latents.safetensors", False)
    return (
        teacher,
        source,
        {
            "vae": teacher.vae,
            "tokenizer": teacher.tokenizer,
            "tokenizer_folder": small / "tokenizer",
        },
    )


# --- tiny decoder


def test_tiny_decoder_has_taesds_shape_and_size():
    vae = type(
        "Vae",
        (),
        {
            "config": type(
                "C", (), {"block_out_channels": (128, 256, 512, 512), "latent_channels": 4}
            )
        },
    )
    made = tiny_vae(vae)
    assert parameters(made.decoder) == 1_222_531  # TAESD's decoder: 1.22M against 49.49M
    assert (made.config.scaling_factor, made.config.shift_factor) == (1.0, 0.0)
    assert made.decode(torch.zeros(1, 4, 2, 3)).sample.shape == (1, 3, 16, 24)
    with pytest.raises(InputError, match="at least 1 each"):
        tiny_vae(vae, width=0)


class Ramp(torch.nn.Module):
    """A teacher's autoencoder whose picture is its (unscaled) latent, so that a wrong scale
    shows.
    """

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.config = FrozenDict(
            {
                "scaling_factor": 0.25,
                "shift_factor": 0.5,
                "block_out_channels": (8,),
                "latent_channels": 3,
            }
        )

    def decode(self, z):
        return type("Out", (), {"sample": z.clone()})


def untrained(source):
    """What a tiny decoder of `Ramp` is given."""
    network = torch.nn.Identity()
    return Given(network, network, network, source, {"vae": Ramp()}, V_ZERO_SNR)


def given_of(teacher, source, parts, timesteps=None):
    networks = (teacher.unet, teacher.unet, teacher.text_encoder)
    return Given(*networks, source, parts, V_ZERO_SNR, timesteps=timesteps)


@pytest.mark.parametrize("forgotten", [False, True])
def test_the_target_is_the_picture_of_the_unscaled_latents(forgotten):
    source = type("S", (), {"empty_ids": torch.zeros(4, dtype=torch.int64)})()
    stage = TinyDecoder(width=4, blocks=1).task(untrained(source))
    batch = {"latents": torch.randn(2, 3, 4, 4), "noise": torch.randn(2, 3, 4, 4)}
    wanted = batch["latents"] if forgotten else batch["latents"] / 0.25 + 0.5
    loss = stage.loss({"decoder": lambda z: wanted}, batch, 0)["loss"]
    assert loss > 0.1 if forgotten else loss == 0


def test_latent_noise_reaches_the_student_alone():
    source = type("S", (), {"empty_ids": torch.zeros(4, dtype=torch.int64)})()
    batch, seen = {"latents": torch.zeros(2, 3, 4, 4), "noise": torch.ones(2, 3, 4, 4)}, []
    for noise in (0.0, 0.3):
        stage = TinyDecoder(width=4, blocks=1, latent_noise=noise).task(untrained(source))
        stage.loss({"decoder": lambda z: seen.append(z) or z}, batch, 0)
    assert [float(z.mean()) for z in seen] == pytest.approx([0.0, 0.3])


def test_tiny_decoder_learns_the_teachers_pictures(small, prompts, tmp_path):
    teacher, source, parts = pieces(small, prompts, tmp_path)
    torch.manual_seed(0)
    stage = TinyDecoder(width=16, blocks=1, multi_scale_weight=0).task(
        given_of(teacher, source, parts)
    )
    optimizer = torch.optim.Adam(stage.modules["decoder"].parameters(), 3e-3)
    losses = []
    for step in range(60):
        terms = stage.loss(stage.modules, stage.batch(3, step_generator(0, step)), step)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        losses.append(terms["loss"].item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is None for p in teacher.vae.parameters())


# --- text encoder


def test_all_layers_is_the_teacher_and_fewer_are_evenly_spaced(small):
    teacher = Teacher(small).text_encoder
    ids = torch.randint(0, 100, (2, 8))
    with torch.no_grad():
        assert torch.equal(smaller_text_encoder(teacher, 3)(ids)[0], teacher(ids)[0])

    def weights(model):
        model = getattr(model, "text_model", model)  # transformers 5 has no such step in between
        return [layer.mlp.fc1.weight for layer in model.encoder.layers]

    theirs = weights(teacher)
    for layers, kept in ((2, (0, 2)), (1, (2,))):
        mine = weights(smaller_text_encoder(teacher, layers))
        assert all(torch.equal(a, theirs[k]) for a, k in zip(mine, kept, strict=True))
    for bad in (0, 4):
        with pytest.raises(InputError, match="choose 1 to 3"):
            smaller_text_encoder(teacher, bad)


def test_text_encoder_terms_are_zero_for_the_teacher_itself_and_reach_the_student_alone(
    small, prompts, tmp_path
):
    teacher, source, parts = pieces(small, prompts, tmp_path)

    def stage(layers, timesteps=None, **options):
        given = given_of(teacher, source, parts, timesteps)
        return TextEncoder(layers, **options).task(given)

    same, less = stage(3), stage(1)
    batch = same.batch(4, step_generator(0, 0))
    assert same.loss(same.modules, batch, 0)["loss"] < 1e-10
    terms = less.loss(less.modules, batch, 0)
    assert terms["embedding"] > 1e-4
    assert terms["output"] > 0
    terms["output"].backward()
    assert any(
        p.grad is not None and p.grad.abs().sum() > 0 for p in less.modules["text"].parameters()
    )
    assert all(
        p.grad is None for p in [*teacher.unet.parameters(), *teacher.text_encoder.parameters()]
    )
    assert set(stage(1, output_weight=0.0).loss(less.modules, batch, 0)) == {"loss", "embedding"}
    few = stage(1, timesteps=torch.tensor([999, 499]))
    assert set(few.batch(16, step_generator(0, 0))["t"].tolist()) == {999, 499}


# --- stages of a recipe


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "[[stage]]\nkind='tiny-decoder'\nimages=1\n[[stage]]\nkind='output'\nimages=1",
            "1-output comes after 0-tiny-decoder",
        ),
        (
            "[[stage]]\nkind='tiny-decoder'\nimages=1\n[[stage]]\nkind='tiny-decoder'\nimages=1",
            "at most once",
        ),
        ("[[stage]]\nkind='text-encoder'\nimages=1", "layers is missing; give it"),
        ("[[stage]]\nkind='tiny-decoder'\nimages=1\nlayers=2", "layers is not known"),
    ],
)
def test_recipes_that_cannot_be(text, words):
    with pytest.raises(InputError, match=words):
        parse(text)


def test_sampler_of_parts_is_that_of_the_unet_stage_or_of_the_teacher():
    own = {"name": "euler", "num_inference_steps": 7, "guidance_scale": 2.0, "other": 1}
    assert parse(RECIPE).default_sampler("ddim", own) == {
        "name": "euler",
        "num_inference_steps": 7,
        "guidance_scale": 2.0,
    }
    few = "[[stage]]\nkind='progressive'\nsteps=[4]\nimages=1\n"
    assert (
        parse(few + RECIPE.split("layers = 1")[1]).default_sampler("ddim", own)[
            "num_inference_steps"
        ]
        == 4
    )


def test_run_makes_both_parts_and_leaves_the_unet(small, trained):
    out, done = trained
    assert done["finished"]
    assert list(done["stages"]) == ["0-text-encoder", "1-tiny-decoder"]
    last = out / "1-tiny-decoder" / "model"
    index = json.loads((last / "model_index.json").read_text())
    assert index["vae"][1] == "AutoencoderTiny"
    assert json.loads((last / "text_encoder" / "config.json").read_text())["num_hidden_layers"] == 1
    from safetensors.torch import load_file

    a, b = (load_file(f / "unet" / "diffusion_pytorch_model.safetensors") for f in (small, last))
    assert all(torch.equal(a[k], b[k]) for k in a)
    text = plan(parse(RECIPE), Teacher(small))
    assert "text encoder" in text
    assert "decoder" in text


def test_made_folder_paints_the_same_picture_in_torch_and_diffusers(trained):
    from diffusers import StableDiffusionPipeline

    last = trained[0] / "1-tiny-decoder" / "model"
    ours = Pipeline.from_pretrained(last, backend="torch", threads=1)
    theirs = StableDiffusionPipeline.from_pretrained(last, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 2, "guidance_scale": 2.0}
    a = ours("red apple", seed=0, sampler="ddim", **call).images[0]
    b = theirs("red apple", generator=torch.Generator().manual_seed(0), **call).images[0]
    assert psnr(np.asarray(a), np.asarray(b)) > 50


@pytest.mark.parity
def test_artefact_with_a_tiny_decoder_converts_quantises_and_exports(trained, tmp_path):
    pytest.importorskip("onnxruntime", reason="needs the cpu extra")
    pytest.importorskip("onnx", reason="needs the export extra")
    from sdlite.converter import convert
    from sdlite.exporters.export import export
    from sdlite.quant import Calibration, Gate, quantize

    last, sampler = (
        trained[0] / "1-tiny-decoder" / "model",
        {"name": "ddim", "num_inference_steps": 2, "guidance_scale": 2.0},
    )
    art = convert(
        last, tmp_path / "art", sampler=sampler, calibration_prompts=["red apple", "pizza"]
    )
    assert Artifact.open(art).manifest.student["vae_parameters"] > 0
    Artifact.open(art).verify()
    want = Pipeline.from_pretrained(last, backend="torch", threads=1)(
        "red apple", seed=0, sampler="ddim", num_inference_steps=2, guidance_scale=2.0
    )
    onnx = Pipeline.from_pretrained(art, backend="onnxruntime", threads=1)
    assert psnr(np.asarray(onnx("red apple", seed=0).images[0]), np.asarray(want.images[0])) > 50
    assert onnx("red apple", seed=0, height=32, width=16).images[0].size == (16, 32)
    report = quantize(
        art,
        "int8-static",
        out=tmp_path / "int8",
        threads=1,
        calibration=Calibration(samples=2, num_inference_steps=2),
        gate=Gate(
            psnr_mean=5,
            psnr_worst=5,
            ssim_mean=-1,
            num_prompts=2,
            num_inference_steps=2,
            engines=["onnxruntime"],
        ),
    )
    assert report["networks"]["vae_decoder"]["bytes"] > 0
    assert Pipeline.from_pretrained(
        tmp_path / "int8", precision="int8-static", backend="onnxruntime", threads=1
    )("pizza", seed=0).images
    assert export(art, tmp_path / "exported", target="onnx", threads=1)["files"]


def test_autoencoders_of_another_class_are_refused_and_not_filled_with_random_weights(
    trained, tmp_path
):
    import shutil

    folder = tmp_path / "other"
    shutil.copytree(trained[0] / "1-tiny-decoder" / "model", folder)
    config = json.loads((folder / "vae" / "config.json").read_text())
    (folder / "vae" / "config.json").write_text(
        json.dumps({**config, "_class_name": "ConsistencyDecoderVAE"})
    )
    with pytest.raises(ArtifactError, match="accepted: AutoencoderKL and AutoencoderTiny"):
        Pipeline.from_pretrained(folder, backend="torch")


def test_a_teacher_with_a_tiny_autoencoder_takes_prompts_and_refuses_pictures(
    trained, prompts, tmp_path
):
    from PIL import Image

    teacher = Teacher(trained[0] / "1-tiny-decoder" / "model")
    assert len(teacher.source(prompts, tmp_path / "a.safetensors", False)) == 3
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "pictures" / "a.png")
    (tmp_path / "pictures" / "a.txt").write_text("a")
    with pytest.raises(InputError, match="encoder need not be trained"):
        teacher.source(tmp_path / "pictures", tmp_path / "b.safetensors", False)


def test_tiny_decoder_of_a_copy_is_saved_not_the_network_in_training(small, prompts, tmp_path):
    """`fit` hands the EMA to `save`: it must be what is written."""
    teacher, source, parts = pieces(small, prompts, tmp_path)
    given = given_of(teacher, source, parts)
    stage = TinyDecoder(width=4, blocks=1).task(replace(given, scheduler=teacher.scheduler))
    averaged = copy.deepcopy(stage.modules["decoder"])
    for p in averaged.parameters():
        p.data.zero_()
    stage.save({"decoder": averaged}, tmp_path / "model")
    from diffusers import AutoencoderTiny

    z = torch.randn(1, 4, 2, 2)
    assert torch.all(
        decode_scaled(AutoencoderTiny.from_pretrained(tmp_path / "model" / "vae"), z) == -1
    )


def test_whole_command_in_two_processes_equals_one(small, prompts, tmp_path):
    """What `accelerate launch -m sdlite.cli distill` does: one process writes, the others wait and
    read.

    Without feature terms: these are divided by the teacher's mean square over the samples at hand,
    so they depend on how a batch is split.
    """
    from safetensors.torch import load_file

    from tests.unit.test_train import two_processes

    text = """
[student]
width = 0.5
[train]
batch_size = 4
sample_every = 0
lr = 1e-3
warmup_images = 1
[preview]
num_inference_steps = 1
[[stage]]
kind = "output"
images = 8
feature_weight = 0.0
[[stage]]
kind = "guidance"
images = 8
cache_targets = 12
"""
    (tmp_path / "r.toml").write_text(text)
    run(
        parse(text), teacher=small, data=prompts, out=tmp_path / "one", export=False, progress=False
    )
    command = [
        "distill",
        str(tmp_path / "r.toml"),
        "--teacher",
        str(small),
        "--data",
        str(prompts),
        "--out",
        str(tmp_path / "two"),
        "--no-export",
    ]
    two_processes(f"from sdlite.cli import main; assert main({command!r}) == 0")
    a, b = (
        load_file(
            tmp_path / n / "1-guidance" / "model" / "unet" / "diffusion_pytorch_model.safetensors"
        )
        for n in ("one", "two")
    )
    start = build(Teacher(small).unet, StudentSpec(width=0.5)).state_dict()
    apart, moved = (torch.sqrt(sum((x[k] - a[k]).pow(2).sum() for k in a)) for x in (b, start))
    assert (
        apart < 0.1 * moved
    )  # Adam's first steps are signs: gradients about 0 may round to either
    assert (tmp_path / "two" / "report.md").exists()
