"""Students to other formats. `onnx.convert` makes the artefact that the onnxruntime backend runs."""
