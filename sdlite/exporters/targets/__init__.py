"""One module for each runtime. A module has:

PACKAGES: names whose versions go into the report
PRECISIONS: what it can make
DYNAMIC: whether free shapes are possible
OPTIONS: (optional) what a profile's options may say; default: nothing
FREE_SIZE: (optional) False where only the batch can be free quantise(graphs, pipe, profile, shown,
    steps, threads) -> (graphs, facts)   (optional) integer graphs, calibrated on prompts other than
    `shown` prepare(part, graph, profile) -> graph           (optional) what the converter and the
    gate see instead judged(part, graph, profile) -> graph            (optional) what the gate sees
    instead of it where the runtime does not run convert(part, graph, out, profile) -> files
    from an ONNX file with the profile's shapes (weights beside it) convert_torch(part, network,
    example, out, profile) -> files       (instead of `convert`) from the torch network run(part,
    files, profile, threads) -> callable   like a backend's network; raises NotRunnable with the
    reason finish(out, artifact, profile, latent_shape) -> files              (optional) what the
    folder holds besides the networks run_all(out, profile, threads) -> ({part: callable}, close,
    clock)  (optional) instead of `run`, when one process runs all three;
    clock(prompt, steps) -> seconds of the runtime's own pictures
"""

from __future__ import annotations


class NotRunnable(Exception):
    """The runtime of this export does not exist on this machine; the message says why. The report
    says `not run`.
    """
