"""Hostile and damaged files: what a stranger, a bad disk or a cut download may hand to sdlite.

    corpus    bad model folders made from the embedded model: seed 0 is fixed, others are drawn
    run       every folder through verify, info and the pipelines, each in a process of its own
    fuzz      seeded mutation of real files; readers: one target for each reader of the package

`python -m benchmarks.hostile` runs them, writes `results/hostile.jsonl` and prints the table.
"""
