"""Backends: (model, precision, device) -> three networks. They differ in arithmetic alone.

`base` says what a backend is, `registry` knows them by name, `auto` chooses, `loading` loads.
Sampling, guidance, tokens and pixels are shared and not here.
"""

from sdlite.backends.auto import choose
from sdlite.backends.base import Backend
from sdlite.backends.checked import Checked, words_of
from sdlite.backends.held import entry, lacking
from sdlite.backends.loading import Networks, load
from sdlite.backends.network import Network, Overflowing, RowByRow, fixed_tokens, rows
from sdlite.backends.registry import get_backend, installed, installed_with, names, ready, register
from sdlite.backends.report import NetworkReport, Report

__all__ = [
    "Backend",
    "Checked",
    "Network",
    "NetworkReport",
    "Networks",
    "Overflowing",
    "Report",
    "RowByRow",
    "choose",
    "entry",
    "fixed_tokens",
    "get_backend",
    "installed",
    "installed_with",
    "lacking",
    "load",
    "names",
    "ready",
    "register",
    "rows",
    "words_of",
]
