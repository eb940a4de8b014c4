from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="needs the distill extra")

from sdlite.distill.features import Taps  # noqa: E402
from sdlite.distill.losses import feature_loss, output_loss  # noqa: E402
from sdlite.errors import InputError  # noqa: E402


def test_output_loss_is_the_scaled_kl_of_two_gaussians():
    s, t = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    one = torch.ones_like(s)
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(t, one), torch.distributions.Normal(s, one)).mean()
    torch.testing.assert_close(output_loss(s, t), 2 * kl)


def test_feature_loss_is_relative_to_the_teachers_scale():
    f = {"a": torch.randn(2, 4, 3, 3)}
    g = {"a": f["a"] * 1.1}
    one = feature_loss(g, f, {"a": 1.0})
    torch.testing.assert_close(one, feature_loss({"a": g["a"] * 50}, {"a": f["a"] * 50}, {"a": 1.0}))
    torch.testing.assert_close(one, torch.tensor(0.01), rtol=1e-3, atol=1e-5)
    assert feature_loss(f, f, {"a": 1.0}) == 0


def test_feature_loss_refuses_what_does_not_match():
    f = {"a": torch.randn(2, 4, 3, 3)}
    with pytest.raises(InputError, match="taps differ"):
        feature_loss(f, f, {"a": 1.0, "b": 1.0})
    with pytest.raises(InputError, match="projector"):
        feature_loss({"a": torch.randn(2, 2, 3, 3)}, f, {"a": 1.0})


def test_taps_record_and_leave_no_hooks():
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
    with Taps(net, {"first": "0"}) as taps:
        net(torch.ones(1, 2))
    assert taps.features["first"].shape == (1, 3)
    assert not net[0]._forward_hooks
    with pytest.raises(InputError, match="no module"):
        Taps(net, {"x": "nope"})
