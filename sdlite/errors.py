"""Every error that sdlite raises on purpose. Each message says what is wrong, what was given, what
is accepted, what to do next.
"""

from __future__ import annotations

import importlib.util
import unicodedata


def printable(text: object, most: int = 2000) -> str:
    """Text for a terminal or a log: control characters, line ends and lone surrogates as
    escapes.
    """
    whole = str(text)
    shown = whole if len(whole) <= most else f"{whole[:most]}... ({len(whole)} characters)"
    return "".join(_escaped(c) if unicodedata.category(c) in _UNSAFE else c for c in shown)


_UNSAFE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def _escaped(c: str) -> str:
    return c.encode("unicode_escape").decode("ascii")


class SdliteError(Exception):
    """Base class: `except sdlite.errors.SdliteError` catches all that the package raises on
    purpose.

    Its text is one line that a terminal or a log can show: what names and values of a file hold of
    control characters is escaped.
    """

    def __str__(self) -> str:
        return printable(super().__str__(), 10_000)


class UnknownNameError(SdliteError, ValueError):
    """A name (model, sampler, precision, backend, device, ...) is not one of the accepted ones."""


class AttributeNameError(UnknownNameError, AttributeError):
    """A pipeline has no attribute of this name."""


class ShapeError(SdliteError, ValueError):
    """A size or an array shape is not accepted."""


class InputError(SdliteError, ValueError):
    """An argument or an input file cannot be used."""


class ArtifactError(SdliteError):
    """A model folder is missing something, damaged, unsafe, or of an unknown format."""


class PrecisionError(SdliteError, ValueError):
    """The precision is known but this model or backend does not have it."""


class MissingExtraError(SdliteError, ImportError):
    """An optional package is not installed; the message names the extra."""


class EngineError(SdliteError):
    """An engine could not run a network, or gave what the network does not give."""


class QuantizationError(SdliteError):
    """The quantized model is too far from the float one; nothing was written."""


class ExportError(SdliteError):
    """A converter refuses a graph, or the exported model is too far from the original; nothing was
    written.
    """


class HubError(SdliteError):
    """A model could not be fetched from the hub or found in its cache."""


class TrainingError(SdliteError):
    """Training cannot start or go on."""


class Cancelled(SdliteError):
    """A callback returned False."""


class SdliteWarning(UserWarning):
    """What is done as asked, and probably not what is wanted: `warnings.simplefilter("error",
    SdliteWarning)` refuses it.
    """


# modules that `sdlite.convert` needs: the extra `export`
CONVERT_NEEDS = ("torch", "diffusers", "transformers", "onnx", "onnx_ir", "onnxscript")


def need(purpose: str, extra: str, *modules: str) -> None:
    """Look for the modules that a long job comes to at its end, before it begins.

    Raises:
        MissingExtraError: one cannot be found; the message names all of them and the extra.
    """
    missing = [m for m in modules if importlib.util.find_spec(m) is None]
    if missing:
        raise MissingExtraError(
            f"{purpose} needs {', '.join(missing)}: pip install 'sdlite[{extra}]'."
        )
