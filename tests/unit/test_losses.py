from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="needs the distill extra")

from sdlite.distill import losses  # noqa: E402
from sdlite.distill.features import Taps  # noqa: E402
from sdlite.distill.losses import feature_loss, output_loss  # noqa: E402
from sdlite.errors import InputError  # noqa: E402


def test_output_loss_is_the_scaled_kl_of_two_gaussians():
    s, t = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    one = torch.ones_like(s)
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(t, one), torch.distributions.Normal(s, one)
    ).mean()
    torch.testing.assert_close(output_loss(s, t), 2 * kl)


def test_feature_loss_is_relative_to_the_teachers_scale():
    f = {"a": torch.randn(2, 4, 3, 3)}
    g = {"a": f["a"] * 1.1}
    one = feature_loss(g, f, {"a": 1.0})
    torch.testing.assert_close(
        one, feature_loss({"a": g["a"] * 50}, {"a": f["a"] * 50}, {"a": 1.0})
    )
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


def pair(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g), torch.randn(*shape, generator=g)


def test_gaussian_kl_is_a_scaled_squared_error():
    s, t = pair(3, 4, 8, 8)
    normal = torch.distributions.Normal
    want = torch.distributions.kl_divergence(normal(t, 0.7), normal(s, 0.7)).flatten(1).sum(1)
    torch.testing.assert_close(losses.gaussian_kl(s, t, 0.7), want)
    torch.testing.assert_close(
        losses.gaussian_kl(s, t, 0.7).mean() * 2 * 0.49 / 256, output_loss(s, t)
    )


def test_articles_soft_loss_is_blind_to_a_common_offset_and_ours_is_not():
    s, _ = pair(2, 4, 8, 8)
    assert losses.article.soft_loss(s + 3, s) < 1e-3
    assert output_loss(s + 3, s) == pytest.approx(9, rel=1e-4)
    small, large = (losses.article.soft_loss(*pair(2, 4, n, n)) for n in (8, 32))
    assert large / small == pytest.approx(16, rel=0.2)  # it grows with the picture
    assert (
        0.02 < losses.article.consistency_mask(torch.randn(4, 4, 32, 32)).mean() < 0.25
    )  # on pure noise
    s, t = pair(2, 4, 8, 8)
    torch.testing.assert_close(losses.article.total(s, t, t, hard=1.0), output_loss(s, t))


def test_channel_loss():
    s, t = pair(2, 3, 5, 5)
    assert losses.channel_loss(t, t, 4.0).abs() < 1e-6
    assert (
        losses.channel_loss(s + 7, s).abs() < 1e-5
    )  # an offset over positions does not matter, per channel
    d = s - t
    centred = (d - d.mean((2, 3), keepdim=True)).pow(2).mean((2, 3)).mean() / 2
    torch.testing.assert_close(
        losses.channel_loss(s, t, 100.0), centred, rtol=2e-2, atol=1e-3
    )  # its limit for high temperature
    for bad in ((s, t[:, :2], 1.0), (s, t, 0.0)):
        with pytest.raises(InputError):
            losses.channel_loss(*bad)


def test_multi_scale_loss():
    s, t = pair(2, 4, 7, 9)
    torch.testing.assert_close(losses.multi_scale_loss(s, t, [1.0]), output_loss(s, t) / t.var())
    assert losses.multi_scale_loss(t, t) == 0
    a = torch.randn(1, 1, 8, 8)
    checker = a + torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(4, 4)
    assert (
        losses.multi_scale_loss(checker, a, [0.5]) < 1e-10
    )  # what averaging removes is not seen at half size
    with pytest.raises(InputError, match=r"\(0, 1\]"):
        losses.multi_scale_loss(s, t, [2.0])
    with pytest.raises(InputError, match="one weight for each"):
        losses.multi_scale_loss(s, t, [1.0, 0.5], [1.0])


def test_confidence_follows_the_teachers_error():
    target, _ = pair(4, 4, 6, 6)
    t = torch.tensor([10, 10, 900, 900])
    assert torch.all(losses.confidence(target, target, t) == 1)
    error = torch.rand(4, 1, 6, 6)
    mask = losses.confidence(target + error, target, t)
    assert mask.shape == (4, 1, 6, 6)
    assert mask.min() > 0
    assert mask.max() <= 1
    low, high = error[:2].flatten().argsort(), mask[:2].flatten().argsort(descending=True)
    assert torch.equal(low, high)  # order-preserving within a timestep bin
    scaled = losses.confidence(
        target + error * torch.tensor([1, 1, 10, 10.0]).view(-1, 1, 1, 1), target, t
    )
    torch.testing.assert_close(
        scaled, mask, rtol=1e-3, atol=1e-4
    )  # a bin of large errors is not masked out as a whole
    s, _ = pair(4, 4, 6, 6, seed=3)
    torch.testing.assert_close(
        losses.masked_loss(s, target, torch.ones(4, 1, 6, 6)), output_loss(s, target)
    )


def test_temperature_is_a_pure_function_that_ends():
    values = [losses.temperature_at(k, 10) for k in (0, 5, 10, 50)]
    assert values == [4.0, 2.5, 1.0, 1.0]
    assert values == [losses.temperature_at(k, 10) for k in (0, 5, 10, 50)]
    assert losses.temperature_at(5, 10, kind="cosine") == pytest.approx(2.5)
    with pytest.raises(InputError, match="linear or cosine"):
        losses.temperature_at(1, 10, kind="step")


def test_min_snr_weights_and_the_terminal_step():
    a = torch.tensor([0.0, 0.5, 0.99])  # SNR 0, 1, 99
    torch.testing.assert_close(losses.min_snr_weight(a, "epsilon"), torch.tensor([1.0, 1.0, 0.1]))
    torch.testing.assert_close(
        losses.min_snr_weight(a, "v_prediction"), torch.tensor([0.1, 0.5, 0.1])
    )  # the floor, not 0
    torch.testing.assert_close(
        losses.min_snr_weight(a, "v_prediction", floor=0.0), torch.tensor([0.0, 0.5, 0.05])
    )
    torch.testing.assert_close(losses.min_snr_weight(a, "sample"), torch.tensor([0.1, 1.0, 5.0]))
    with pytest.raises(InputError, match="epsilon, v_prediction or sample"):
        losses.min_snr_weight(a, "x")


def test_huber_loss_is_linear_far_and_square_near():
    zero = torch.zeros(4)
    assert losses.huber_loss(zero + 10, zero) == pytest.approx(10, rel=1e-3)
    assert losses.huber_loss(zero + 1e-5, zero) == pytest.approx(5e-8, rel=1e-1)
