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


class Timed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 4)

    def forward(self, timestep):
        angle = timestep[:, None].float() * torch.linspace(0.5, 1, 4)
        return self.linear(torch.cat([angle.sin(), angle.cos()], -1))


@pytest.mark.parametrize(("kept", "half"), [(True, "fp32"), (False, "fp16")])
def test_float16_leaves_a_timesteps_angles_in_float32(kept, half):
    """And coremltools' own float16 does not."""
    program = torch.export.export(Timed(), (torch.zeros(1),)).run_decompositions({})
    precision = coreml._half(ct) if kept else ct.precision.FLOAT16
    inputs = [ct.TensorType(name="timestep", shape=(1,))]
    made = ct.convert(program, inputs=inputs, convert_to="milinternal", compute_precision=precision)
    kinds = {}
    for op in made.functions["main"].operations:
        kinds.setdefault(op.op_type, set()).add(op.outputs[0].dtype)
    angles = {kind.__name__ for name in ("sin", "cos", "mul") for kind in kinds[name]}
    assert angles == {half}
    assert {kind.__name__ for kind in kinds["linear"]} == {"fp16"}


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
