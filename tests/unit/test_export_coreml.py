"""Core ML: operations that its converter knows by another name only. What it makes runs on Apple's
systems alone, so constants are read here.
"""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the coreml extra")
ct = pytest.importorskip("coremltools", reason="needs the coreml extra")

from sdlite.exporters.targets import coreml  # noqa: E402


class Masked(torch.nn.Module):
    def forward(self, x):
        seen = torch.ones(4, 4, dtype=torch.bool).tril()
        return x + torch.where(
            seen, torch.zeros(()), -1e4
        )  # the mask of transformers 5: `where` with a number


def test_where_with_a_number_is_the_mask_that_torch_makes():
    coreml._teach()
    program = torch.export.export(Masked(), (torch.zeros(4, 4),)).run_decompositions({})
    assert any(str(n.target) == "aten.where.ScalarOther" for n in program.graph.nodes)
    made = ct.convert(
        program,
        inputs=[ct.TensorType(name="x", shape=(4, 4))],
        convert_to="milinternal",
        compute_precision=ct.precision.FLOAT32,
    )
    added = next(op for op in made.functions["main"].operations if op.op_type == "add")
    mask = next(v.val for v in (added.x, added.y) if v.val is not None)
    np.testing.assert_array_equal(mask, Masked()(torch.zeros(4, 4)).numpy())
