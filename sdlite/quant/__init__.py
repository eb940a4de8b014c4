"""Quantizing: `quantize` and what it takes. The function is also `sdlite.quantize`."""

from sdlite.quant.api import quantize
from sdlite.quant.calibrate import Calibration, read_prompts
from sdlite.quant.gate import Gate
from sdlite.quant.options import KEEP_FLOAT
from sdlite.quant.reports import table

__all__ = ["KEEP_FLOAT", "Calibration", "Gate", "quantize", "read_prompts", "table"]
