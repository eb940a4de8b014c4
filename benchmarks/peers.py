"""The engines of a case: what each needs on disk, and a callable that makes its images. Settings
are named in `cases.SETTINGS`.

Peers' packages are the `optimum`, `torchao` and `peers` extras; each is imported by its own engine
alone, so a missing one is an error in its row and in no other.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cases import Case
from sdlite import hub
from sdlite.errors import UnknownNameError
from sdlite.io import sha256

TEACHER = "emoji-teacher"  # of the embedded student: its UNet, with the student's other parts
HERE = Path(__file__).parent
NARROW = "narrow:"  # a key of published_models.MODELS follows
PROMPT = "red apple on a blue background"
Call = Callable[
    [np.ndarray], tuple[np.ndarray, dict[str, float]]
]  # latents -> (image uint8 (B, H, W, 3), seconds per stage)


# --- what is on disk


def prepare(case: Case, cache: Path, teacher: Path | None = None) -> Path:
    """The folder or file that the case's engine opens, made once into `cache`.

    Args:
        teacher: the UNet of the embedded student's teacher; default: the released asset.
    """

    def plain() -> Path:
        return plain_folder(case, cache, teacher)

    def model() -> Path:
        return model_folder(case, cache, teacher)

    if case.engine == "openvino-genai":
        return genai_folder(model(), case, cache)
    if case.engine == "stable-diffusion.cpp":
        return gguf(case, plain(), cache)
    if case.engine.startswith("sdlite"):
        return quantized(case, model(), cache)
    return model() if case.engine == "optimum-ort" else plain()


def plain_folder(case: Case, cache: Path, teacher: Path | None = None) -> Path:
    """diffusers' own layout; random-weight shapes and the embedded student's teacher are written
    once.
    """
    if case.model == TEACHER:
        unet = teacher or hub.asset(TEACHER)
        weights = unet / "diffusion_pytorch_model.safetensors"
        out = cache / f"{TEACHER}-{sha256(weights)[:8]}"
        if not out.exists():
            from benchmarks.emoji.assemble_teacher import assemble

            assemble(out.with_suffix(".part"), unet).rename(out)
        return out
    if case.model.startswith(NARROW):
        return _narrow_folder(case.model, cache)
    if not case.model.startswith("shape:"):
        return model_folder(case, cache)
    out = cache / case.model.removeprefix("shape:")
    if not (out / "model_index.json").exists():
        from benchmarks.shapes import write_sd_folder

        write_sd_folder(case.model.removeprefix("shape:"), out)
    return out


def _narrow_folder(model: str, cache: Path) -> Path:
    """`narrow:NAME`: a published folder of `benchmarks.published_models`, written once."""
    from benchmarks.published_models import MODELS, write

    name = model.removeprefix(NARROW)
    if name not in MODELS:
        raise UnknownNameError(f"{model}: choose one of {', '.join(MODELS)}.")
    out = cache / f"narrow-{name}"
    return out if (out / "model_index.json").exists() else write(name, out)


def model_folder(case: Case, cache: Path, teacher: Path | None = None) -> Path:
    """The case's model; random-weight shapes and narrow published models are written and converted
    once into `cache`, these with the sampler of their files and the steps of their cards (four at
    most).
    """
    if case.model != TEACHER and not case.model.startswith(("shape:", NARROW)):
        return hub.resolve(case.model)
    plain = plain_folder(case, cache, teacher)
    out = cache / f"{plain.name}-onnx"
    if not (out / "sdlite.json").exists():
        from sdlite.converter import convert

        convert(plain, out, sampler=_sampler(case.model))
    return out


def _sampler(model: str) -> dict[str, object]:
    """What a model converted here is called with."""
    if not model.startswith(NARROW):
        return {"name": "ddim", "num_inference_steps": 4, "guidance_scale": 1.0}
    from benchmarks.published_models import MODELS

    made_for = MODELS[model.removeprefix(NARROW)]
    return {"num_inference_steps": made_for.steps, "guidance_scale": made_for.guidance}


def quantized(case: Case, folder: Path, cache: Path) -> Path:
    """The case's folder in its precision; int8 is made once into `cache`, with a gate that measures
    and lets everything pass.
    """
    if not case.precision.startswith("int8"):
        return folder
    model = case.model.removeprefix("shape:")
    out = cache / f"{model}-{case.precision}-{sha256(folder / 'sdlite.json')[:8]}"
    if not out.exists():
        from sdlite.quant import Calibration, Gate, quantize, read_prompts

        emoji = case.model == "emoji"
        prompts = read_prompts(
            Path(__file__).parents[1]
            / "export"
            / "calibration"
            / ("emoji.txt" if emoji else "sd.txt")
        )
        quantize(
            folder,
            case.precision,
            out=out,
            threads=case.threads,
            calibration=Calibration(prompts=prompts, samples=8 if emoji else 2),
            gate=Gate(
                psnr_mean=0,
                psnr_worst=0,
                ssim_mean=-1,
                num_prompts=8 if emoji else 1,
                seeds=(0,),
                engines=["onnxruntime"],
            ),
        )
    return out


def genai_folder(folder: Path, case: Case, cache: Path) -> Path:
    """OpenVINO IR in the layout that openvino-genai opens, from our ONNX graphs and
    openvino_tokenizers; int8 by NNCF.
    """
    kind = "int8" if case.precision == "int8" else "float"
    out = (
        cache
        / f"{case.model.removeprefix('shape:')}-genai-{kind}-{sha256(folder / 'sdlite.json')[:8]}"
    )
    if out.exists():
        return out
    import openvino as ov
    from openvino_tokenizers import convert_tokenizer
    from transformers import AutoTokenizer

    tmp = Path(tempfile.mkdtemp(dir=cache))
    for part, source in (
        ("text_encoder", "text_encoder"),
        ("unet", "unet"),
        ("vae_decoder", "vae"),
    ):
        graph = ov.Core().read_model(str(folder / part / "model.onnx"))
        if kind == "int8":
            graph = _nncf(graph, part, case)
        if part == "unet":
            _integer_timestep(graph)
        ov.save_model(
            graph, tmp / part / "openvino_model.xml", compress_to_fp16=True
        )  # optimum-intel's own default for these sizes
        shutil.copy(folder / source / "config.json", tmp / part / "config.json")
    for part in ("scheduler", "tokenizer"):
        shutil.copytree(folder / part, tmp / part)
    shutil.copy(folder / "model_index.json", tmp)
    tokenizer = convert_tokenizer(
        AutoTokenizer.from_pretrained(folder / "tokenizer"), with_detokenizer=False
    )
    ov.save_model(tokenizer, tmp / "tokenizer" / "openvino_tokenizer.xml")
    tmp.rename(out)
    return out


def _nncf(graph: Any, part: str, case: Case) -> Any:
    """int8 as OpenVINO's notebooks do it for latent consistency models: the UNet fully, of the
    other networks the weights.
    """
    import nncf

    if part != "unet":
        return nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_SYM)
    rng = np.random.default_rng(0)
    text = next(i for i in graph.inputs if "encoder_hidden_states" in i.names).partial_shape
    channels = next(i for i in graph.inputs if "sample" in i.names).partial_shape[1].get_length()
    side = case.size_px // 8
    inputs = [
        {
            "sample": rng.standard_normal((1, channels, side, side)).astype(np.float32),
            "timestep": np.array(t, np.float32),
            "encoder_hidden_states": (
                rng.standard_normal((1, text[1].get_length(), text[2].get_length())).astype(
                    np.float32
                )
            ),
        }
        for t in (999.0, 499.0)
    ]  # weights are random, so are the inputs: only speed and memory are read off this row
    quick = nncf.AdvancedQuantizationParameters(disable_bias_correction=True)
    return nncf.quantize(
        graph,
        nncf.Dataset(inputs),
        subset_size=len(inputs),
        model_type=nncf.ModelType.TRANSFORMER,
        advanced_parameters=quick,
    )


def _integer_timestep(graph: Any) -> None:
    """In place: openvino-genai feeds an int64 timestep of shape (1,), our graphs take a float32
    scalar.
    """
    import openvino as ov
    from openvino import opset13 as ops

    old = next(p for p in graph.get_parameters() if p.get_friendly_name() == "timestep")
    new = ops.parameter([1], ov.Type.i64, name="timestep_i64")
    new.output(0).set_names({"timestep"})
    old.output(0).replace(ops.squeeze(ops.convert(new, "f32"), ops.constant([0])).output(0))
    graph.remove_parameter(old)
    graph.add_parameters([new])
    graph.validate_nodes_and_infer_types()


def gguf(case: Case, folder: Path, cache: Path) -> Path:
    """One file in the case's weight type, by stable-diffusion.cpp's own converter."""
    out = cache / f"{folder.name}-{case.precision}.gguf"
    if not out.exists():
        from stable_diffusion_cpp import StableDiffusion

        part = out.with_suffix(".part.gguf")
        done = StableDiffusion(verbose=False).convert(
            input_path=str(folder), output_path=str(part), output_type=case.precision
        )
        if not done:
            raise RuntimeError("stable-diffusion.cpp could not convert the folder")
        part.rename(out)
    return out


def weight_bytes(case: Case, path: Path) -> int:
    """Bytes of the weights and graphs that the engine opens for text encoder, UNet and VAE."""
    if path.is_file():
        return path.stat().st_size
    if case.engine.startswith("sdlite") and case.engine != "sdlite-torch":
        from sdlite.artifact import Artifact

        manifest = Artifact.open(path).manifest
        assert manifest is not None
        parts = manifest.variants["fp32" if case.precision == "bf16" else case.precision].values()
        return sum(manifest.files[f]["bytes"] for p in parts for f in (p["file"], *p["weights"]))
    kinds = {
        "openvino-genai": (".bin", ".xml"),
        "optimum-ort": (".onnx", ".data", ".safetensors"),
    }.get(case.engine, (".safetensors",))
    # optimum reads the decoder's graph, which has weights of its own
    skip = "tokenizer" if case.engine != "optimum-ort" else "vae/"
    return sum(
        p.stat().st_size
        for p in path.rglob("*")
        if p.suffix in kinds and skip not in p.relative_to(path).as_posix()
    )


# --- the engines


def load(case: Case, path: Path) -> Call:
    if case.engine.startswith("sdlite"):
        return _sdlite(case, path)
    if case.engine == "openvino-genai":
        return _genai(case, path)
    if case.engine == "stable-diffusion.cpp":
        return _sdcpp(case, path)
    return _diffusers(case, path)


def _sdlite(case: Case, path: Path) -> Call:
    import sdlite

    backend = {"sdlite-ort": "onnxruntime", "sdlite-openvino": "openvino", "sdlite-torch": "torch"}[
        case.engine
    ]
    precision, arithmetic = (
        ("fp32", "bfloat16") if case.precision == "bf16" else (case.precision, None)
    )
    pipes = [
        sdlite.Pipeline.from_pretrained(
            path, precision=precision, backend=backend, threads=case.threads, arithmetic=arithmetic
        )
        for _ in range(case.pipelines)
    ]
    for pipe in pipes:
        if case.tile_px:
            pipe.enable_vae_tiling(case.tile_px)

    def call(latents: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
        for pipe in pipes:
            out = pipe(
                [PROMPT] * case.batch,
                latents=latents,
                seed=0,
                sampler="ddim",
                num_inference_steps=case.steps,
                guidance_scale=case.guidance,
            )
        return np.stack([np.asarray(i) for i in out.images]), out.timings

    return call


def _diffusers(case: Case, path: Path) -> Call:
    import torch
    from diffusers import DDIMScheduler

    torch.set_num_threads(case.threads)
    pipe = _optimum(case, path) if case.engine == "optimum-ort" else _torch_pipeline(case, path)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    marks: list[float] = []

    def step_end(_: Any, __: int, ___: Any, state: dict[str, Any]) -> dict[str, Any]:
        marks.append(time.perf_counter())
        return state

    def call(latents: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
        marks.clear()
        begin = time.perf_counter()
        out = pipe(
            [PROMPT] * case.batch,
            latents=torch.from_numpy(latents).to(dtype),
            num_inference_steps=case.steps,
            guidance_scale=case.guidance,
            callback_on_step_end=step_end,
        )
        return np.stack([np.asarray(i) for i in out.images]), stages(
            begin, marks, time.perf_counter()
        )

    return call


def stages(begin: float, marks: list[float], end: float) -> dict[str, float]:
    """Seconds per stage from the times at which steps ended; the first step is taken to last as
    long as the others.
    """
    if len(marks) < 2:
        return {}
    step = (marks[-1] - marks[0]) / (len(marks) - 1)
    text = max(marks[0] - begin - step, 0.0)
    return {
        "text_encoder": text,
        "unet": marks[-1] - begin - text,
        "vae_decoder": end - marks[-1],
        "total": end - begin,
    }


def _optimum(case: Case, path: Path) -> Any:
    import onnxruntime
    from optimum.onnxruntime import ORTStableDiffusionPipeline

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = case.threads
    return ORTStableDiffusionPipeline.from_pretrained(path, session_options=options)


def _torch_pipeline(case: Case, path: Path) -> Any:
    import torch
    from diffusers import StableDiffusionPipeline

    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    pipe = StableDiffusionPipeline.from_pretrained(path, torch_dtype=dtype)
    if case.engine.startswith("diffusers-torchao"):
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantize_(pipe.unet, Int8DynamicActivationInt8WeightConfig())
    if case.engine in ("diffusers-compile", "diffusers-torchao"):
        import torch._inductor.config

        # what pytorch.org names for inference on x86: weights are folded and packed
        torch._inductor.config.freezing = True
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
        pipe.unet = torch.compile(pipe.unet, fullgraph=True)
        pipe.vae.decode = torch.compile(pipe.vae.decode, fullgraph=True)
    return pipe


def _genai(case: Case, path: Path) -> Call:
    import openvino_genai as genai

    pipe = genai.Text2ImagePipeline(str(path))
    pipe.set_scheduler(
        genai.Scheduler.from_config(
            str(path / "scheduler" / "scheduler_config.json"), genai.Scheduler.Type.DDIM
        )
    )
    pipe.reshape(case.batch, case.size_px, case.size_px, case.guidance)
    hint = {"fp32": {"INFERENCE_PRECISION_HINT": "f32"}}.get(
        case.precision, {}
    )  # else its own choice: bf16 where the CPU has it
    pipe.compile("CPU", INFERENCE_NUM_THREADS=case.threads, PERFORMANCE_HINT="LATENCY", **hint)

    def call(latents: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
        begin = time.perf_counter()
        out = pipe.generate(
            PROMPT,
            num_images_per_prompt=case.batch,
            height=case.size_px,
            width=case.size_px,
            num_inference_steps=case.steps,
            guidance_scale=case.guidance,
            generator=genai.TorchGenerator(0),
        )
        total, took = time.perf_counter() - begin, pipe.get_performance_metrics()
        seconds = {
            "text_encoder": sum(took.get_text_encoder_infer_duration().values()) / 1e3,
            "unet": took.get_unet_infer_duration().mean / 1e3 * case.steps,
            "vae_decoder": took.get_vae_decoder_infer_duration() / 1e3,
        }
        return np.array(out.data), {**seconds, "total": total}

    return call


def _sdcpp(case: Case, path: Path) -> Call:
    from stable_diffusion_cpp import StableDiffusion

    model = StableDiffusion(
        model_path=str(path),
        n_threads=case.threads,
        vae_decode_only=True,
        diffusion_flash_attn=True,
        verbose=False,
    )

    def call(latents: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
        images = model.generate_image(
            prompt=PROMPT,
            width=case.size_px,
            height=case.size_px,
            cfg_scale=case.guidance,
            sample_method="ddim_trailing",
            sample_steps=case.steps,
            seed=0,
            batch_count=case.batch,
        )
        return np.stack([np.asarray(i) for i in images]), {}

    return call
