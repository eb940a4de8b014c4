"""What is measured: one frozen row per case. Engines that make the same images from the same
weights, steps and threads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

SETTINGS: dict[
    str, str
] = {  # engine -> how it is set up: for peers the fastest that its documentation names for a CPU
    "sdlite-ort": "onnxruntime CPU provider, graphs of any shape",
    "sdlite-openvino": "openvino, LATENCY; int8: float layers in bfloat16 where the CPU has it",
    "sdlite-torch": "torch eager",
    "diffusers": "eager, scaled_dot_product_attention",
    "diffusers-compile": (
        "channels_last, torch.compile(fullgraph=True) of UNet and VAE decoder, inductor freezing"
    ),
    "diffusers-torchao": (
        "torchao Int8DynamicActivationInt8WeightConfig on the UNet, torch.compile of UNet and"
        " VAE decoder"
    ),
    "diffusers-torchao-eager": (
        "torchao Int8DynamicActivationInt8WeightConfig on the UNet, not compiled"
    ),
    "optimum-ort": "ORTStableDiffusionPipeline, CPU provider",
    "openvino-genai": (
        "Text2ImagePipeline, reshaped to the fixed size; int8: UNet by nncf.quantize"
        " (transformer), other networks' weights by nncf.compress_weights"
    ),
    "stable-diffusion.cpp": (
        "flash attention in the UNet (diffusion_flash_attn), built for this CPU (GGML_NATIVE)"
    ),
}
FLOAT_ENGINES = (
    "sdlite-ort",
    "sdlite-openvino",
    "sdlite-torch",
    "diffusers",
    "diffusers-compile",
    "optimum-ort",
)

INT8 = [  # the float rows are the measure
    ("sdlite-ort", "fp32"),
    ("sdlite-ort", "int8-static"),
    ("sdlite-ort", "int8-dynamic"),
    ("sdlite-openvino", "fp32"),
    ("sdlite-openvino", "int8-static"),
    ("diffusers", "fp32"),
]
PEERS = [  # everything that a user would pick instead, each in the precisions that it has
    ("sdlite-ort", "fp32"),
    ("sdlite-openvino", "int8-static"),
    ("sdlite-openvino", "bf16"),
    ("openvino-genai", "int8"),
    ("openvino-genai", "bf16"),
    ("diffusers", "bf16"),
    ("diffusers-compile", "bf16"),
    ("stable-diffusion.cpp", "q8_0"),
    ("stable-diffusion.cpp", "f16"),
    ("sdlite-ort", "int8-static"),
    ("diffusers-torchao", "int8-dynamic"),
    ("diffusers-torchao-eager", "int8-dynamic"),
    ("optimum-ort", "fp32"),
    ("sdlite-openvino", "fp32"),
    ("openvino-genai", "fp32"),
    ("diffusers", "fp32"),
    ("diffusers-compile", "fp32"),
]


@dataclass(frozen=True)
class Case:
    model: str  # embedded name, or "shape:<name>" of benchmarks.shapes (random weights)
    engine: str
    steps: int
    size_px: int
    guidance: float = 1.0
    batch: int = 1
    threads: int = 2
    # the engine's own word: fp32, bf16, int8-static, int8-dynamic; int8 (openvino-genai); f16, q8_0
    # (sd.cpp)
    precision: str = "fp32"
    repeats: int = 5
    tile_px: int = 0  # sdlite: VAE tiles of this size; 0 decodes at once
    pipelines: int = 1  # sdlite: pipelines loaded in the one process, called in turn

    @property
    def key(self) -> str:
        more = (f" tiles={self.tile_px}" if self.tile_px else "") + (
            f" pipelines={self.pipelines}" if self.pipelines > 1 else ""
        )
        return (
            f"{self.model} {self.size_px}px {self.steps} steps g={self.guidance:g} b={self.batch}"
            f" t={self.threads}{more} {self.engine} {self.precision}"
        )


def _zoo() -> list[Case]:
    """The article's ladder and the published students: original, 340M, 340M int8, 123M with a tiny
    decoder, in float and int8.
    """
    case = Case("shape:sd14", "sdlite-openvino", 4, 512, repeats=2)
    rows = [replace(case, engine="diffusers"), case]
    rows += [
        replace(case, model=f"shape:{m}")
        for m in ("w0.62", "bk-base", "bk-small", "bk-tiny", "extreme-120m")
    ]
    rows += [replace(case, model="shape:w0.62", precision="int8-static")]
    for model in ("bk-tiny", "extreme-120m"):
        rows += [
            replace(case, model=f"shape:{model}", precision="int8-static", batch=b)
            for b in (1, 2, 4)
        ]
    return rows


def _best() -> list[Case]:
    """Each model at the steps that its kind needs: 25 guided for what imitates the original, 4
    without guidance for a few-step student.
    """
    many = Case("shape:sd14", "sdlite-openvino", 25, 512, guidance=7.5, repeats=1)
    few = replace(many, steps=4, guidance=1.0, precision="int8-static", repeats=3)
    rows = [many, replace(many, model="shape:bk-tiny", precision="int8-static")]
    return rows + [replace(few, model=f"shape:{m}") for m in ("w0.62", "bk-tiny", "extreme-120m")]


def _scaling() -> list[Case]:
    """One thing at a time around BK-Tiny int8, 512 px, 4 steps."""
    base = Case("shape:bk-tiny", "sdlite-openvino", 4, 512, precision="int8-static", repeats=3)
    rows = [replace(base, steps=s) for s in (1, 2, 4, 8)]
    rows += [replace(base, batch=b) for b in (2, 4)]
    rows += [replace(base, threads=1)]
    rows += [replace(base, size_px=s, repeats=2) for s in (256, 768, 1024)]
    rows += [replace(base, size_px=s, repeats=2, tile_px=256) for s in (512, 768, 1024)]
    return rows + [replace(base, size_px=256, repeats=2, pipelines=n) for n in (1, 2, 4) if n > 1]


SUITES: dict[str, list[Case]] = {
    "emoji": (
        [Case("emoji", e, 4, 64, repeats=20) for e in FLOAT_ENGINES]
        + [Case("emoji", e, 25, 64, guidance=4.0, repeats=5) for e in FLOAT_ENGINES]
    ),
    # the embedded student against the 50 guided steps that it was distilled from, by the same
    # engines
    "teacher": [
        *[
            Case(m, e, n, 64, guidance=g, repeats=r)
            for e in ("sdlite-ort", "sdlite-openvino", "sdlite-torch", "diffusers")
            for m, n, g, r in (("emoji", 4, 1.0, 20), ("emoji-teacher", 50, 2.0, 3))
        ]
    ],
    "peers-512": [Case("shape:bk-tiny", e, 4, 512, precision=p, repeats=2) for e, p in PEERS],
    "zoo-512": _zoo(),
    "best-512": _best(),
    "scaling": _scaling(),
    "memory-512": [  # the least memory of an image
        Case("shape:bk-tiny", e, 4, 512, precision="int8-static", repeats=1, tile_px=t)
        for e in ("sdlite-openvino", "sdlite-ort")
        for t in (0, 320)
    ],
    "bk-tiny-256": [Case("shape:bk-tiny", e, 4, 256, repeats=3) for e in FLOAT_ENGINES],
    "bk-tiny-512": [Case("shape:bk-tiny", e, 4, 512, repeats=3) for e in FLOAT_ENGINES],
    "int8-emoji": [Case("emoji", e, 4, 64, precision=p, repeats=20) for e, p in INT8],
    "int8-bk-tiny-512": [Case("shape:bk-tiny", e, 4, 512, precision=p, repeats=3) for e, p in INT8],
    # a network of no interest, to see that every engine runs: minutes on a busy machine
    "plumbing": [
        *[Case("shape:mini", e, 2, 64, precision=p, repeats=1, threads=1) for e, p in PEERS],
        Case(
            "shape:mini-tiny-vae",
            "sdlite-openvino",
            2,
            64,
            precision="int8-static",
            repeats=1,
            threads=1,
            batch=2,
        ),
        Case("shape:mini", "sdlite-ort", 2, 128, repeats=1, threads=1, tile_px=64, pipelines=2),
    ],
}
