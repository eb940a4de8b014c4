"""Quantising: `quantize` and what it takes. The function is also `sdlite.quantize`."""

from sdlite.quant.api import KEEP_FLOAT, quantize, table
from sdlite.quant.calibrate import Calibration, read_prompts
from sdlite.quant.gate import Gate

__all__ = ["KEEP_FLOAT", "Calibration", "Gate", "quantize", "read_prompts", "table"]
