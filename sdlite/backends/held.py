"""What a model folder holds of a precision, verified, or why it does not hold it."""

from __future__ import annotations

from sdlite import graphs
from sdlite.artifact import Artifact
from sdlite.backends import registry
from sdlite.errors import PrecisionError
from sdlite.manifest import NetworkRow


def entry(artifact: Artifact, part: str, precision: str) -> tuple[NetworkRow, int]:
    """The listing's row of a network, its files verified and looked into, and their bytes.

    Raises:
        PrecisionError: the folder does not hold the precision. ArtifactError: a file is missing,
            cut off or changed, or holds what an engine may not open.
    """
    if not artifact.holds(precision):
        raise lacking(artifact, precision)
    files = artifact.network_files(precision, part)
    artifact.verify(files)
    graphs.check_row(artifact.folder, files)
    return artifact.network(precision, part), artifact.bytes_of(files)


def lacking(artifact: Artifact, precision: str) -> PrecisionError:
    """The error of a precision that a model does not hold: what it holds instead, and how to get
    the precision.
    """
    held = artifact.precisions
    has = f"holds {', '.join(held)}, not {precision}" if held else f"has no {precision} ONNX graphs"
    if held and not artifact.export and all(h.startswith("int8") for h in held):
        has = f"was quantized and {has}"
        how = "leave precision out, or load the float model that it was made from"
    elif artifact.export:
        how = f"leave precision out, or export the model again as {precision}"
    elif precision.startswith("int8"):
        how = f"make it: sdlite quantize {artifact.folder} --precision {precision} --out NEW"
    elif not held:
        torch = "" if registry.installed("torch") else " (pip install 'sdlite[torch]')"
        how = f"convert it (sdlite.convert(folder, out)), or use backend='torch'{torch}"
    elif precision == "fp16" and "fp32" in held:
        how = f"make it: sdlite export {artifact.folder} --target onnx-fp16 --out NEW"
    else:
        how = "choose one that it holds"
    return PrecisionError(f"{artifact.name} {has}; {how}.")
