"""Students to other formats. `onnx.convert` makes the artefact that the onnxruntime backend
runs.
"""

CONVERT_NEEDS = (
    "torch",
    "diffusers",
    "transformers",
    "onnx",
    "onnx_ir",
    "onnxscript",
)  # modules of `onnx.convert`: the extra `export`
