import math

import pytest
import torch

from nanotoolrl import losses
from nanotoolrl.config import Config
from nanotoolrl.losses import MAX_LOG_RATIO, kl_k3, likelihood_drop

CONFIG = Config()  # the defaults, which a run passes on


def relative_advantages(rewards, divide_by_std=CONFIG.adv_std):
    return losses.relative_advantages(rewards, divide_by_std)


def policy_loss(*inputs, clip_low=CONFIG.clip, clip_high=CONFIG.clip_high, dual_clip=CONFIG.dual_clip):
    return losses.policy_loss(*inputs, clip_low, clip_high, dual_clip)


def shaped_loss(*inputs):
    return losses.shaped_loss(*inputs, CONFIG.clip, CONFIG.clip_high)


def close(tensor, expected, abs=1e-6):
    assert tensor.tolist() == pytest.approx(expected, abs=abs)


# ---------------------------------------------------------------------------------------------- advantages
def test_advantages_by_hand():
    # mean 1/3, squared deviations 4/9 + 1/9 + 1/9 = 2/3, over (3 - 1): std = sqrt(1/3) = 0.57735
    first, second = relative_advantages(torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]))
    close(first, [2 / math.sqrt(3), -1 / math.sqrt(3), -1 / math.sqrt(3)], 1e-5)
    close(second, [1 / math.sqrt(3), 1 / math.sqrt(3), -2 / math.sqrt(3)], 1e-5)


def test_advantages_without_std():
    result = relative_advantages(torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.0, 1.0]]), divide_by_std=False)
    close(result[0], [2 / 3, -1 / 3, -1 / 3])
    close(result[1], [0.0, -0.5, 0.5])


def test_small_spread_is_bounded_by_the_epsilon():
    """std 1e-6 + epsilon 1e-6: half of the advantages that a large spread gives."""
    result = relative_advantages(torch.tensor([[1e-6, 0.0, -1e-6]]))
    close(result[0], [0.5, 0.0, -0.5], 1e-4)


@pytest.mark.parametrize("divide", [True, False])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3, 1e-8, 12345.678])
@pytest.mark.parametrize("group", [1, 3, 7, 8])
def test_equal_rewards_are_exactly_zero(value, divide, group):
    """The mean of equal numbers may differ from them in the last bit; no advantage may come of that."""
    result = relative_advantages(torch.full((2, group), value), divide)
    assert result.tolist() == [[0.0] * group] * 2


def test_groups_do_not_mix():
    rewards = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    together = relative_advantages(rewards)
    assert all(torch.equal(together[i], relative_advantages(rewards[i : i + 1])[0]) for i in range(3))
    assert together[1].tolist() == [0.0, 0.0, 0.0]


# --------------------------------------------------------------------------------------------- policy loss
BRANCHES = [
    # ratio, advantage, loss, clipped, slope d loss / d logprob (-A r, or 0 where clipped)
    (1.0, 2.0, -2.0, False, -2.0),
    (1.0, -2.0, 2.0, False, 2.0),
    (1.1, 2.0, -2.2, False, -2.2),  # inside the band
    (0.9, -2.0, 1.8, False, 1.8),
    (1.5, 2.0, -2.4, True, 0.0),  # already likelier than 1.2 times
    (0.5, 2.0, -1.0, False, -1.0),  # good but rarer: pulled back up at full strength
    (1.5, -2.0, 3.0, False, 3.0),  # bad but likelier: pushed down at full strength
    (0.5, -2.0, 1.6, True, 0.0),  # already rarer than 0.8 times
    (2.9, -2.0, 5.8, False, 5.8),  # just under the dual clip
    (5.0, -2.0, 6.0, True, 0.0),  # dual clip: at most 3 |A|
    (5.0, 2.0, -2.4, True, 0.0),
    (0.5, 0.0, 0.0, False, 0.0),
    (5.0, 0.0, 0.0, False, 0.0),
]


@pytest.mark.parametrize("ratio, advantage, loss, clipped, slope", BRANCHES)
def test_each_branch_by_hand(ratio, advantage, loss, clipped, slope):
    logprob = torch.tensor([math.log(ratio) - 1.5], requires_grad=True)
    value, flag = policy_loss(logprob, torch.tensor([-1.5]), torch.tensor([advantage]))
    close(value.detach(), [loss], 1e-5)
    close(torch.autograd.grad(value.sum(), logprob)[0], [slope], 1e-5)
    assert flag.tolist() == [clipped]


def test_tokens_are_independent():
    """All branches at once give what each gives alone."""
    ratio, advantage, loss, clipped, slope = map(list, zip(*BRANCHES, strict=True))
    logprobs = torch.tensor(ratio).log().requires_grad_()
    values, flags = policy_loss(logprobs, torch.zeros(len(ratio)), torch.tensor(advantage))
    close(values.detach(), loss, 1e-5)
    close(torch.autograd.grad(values.sum(), logprobs)[0], slope, 1e-5)
    assert flags.tolist() == clipped


def test_clip_settings():
    old = torch.zeros(4)
    logprobs = torch.tensor([1.25, 1.35, 0.65, 0.55]).log()
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])
    values, flags = policy_loss(logprobs, old, advantages, clip_low=0.4, clip_high=0.3)
    close(values, [-1.25, -1.3, 0.65, 0.6], 1e-5)
    assert flags.tolist() == [False, True, False, True]
    capped, flags = policy_loss(torch.tensor([2.5]).log(), torch.zeros(1), -torch.ones(1), dual_clip=2.0)
    close(capped, [2.0], 1e-5)
    assert flags.tolist() == [True]


def test_policy_loss_central_differences():
    generator = torch.Generator().manual_seed(0)
    logprobs = torch.randn(200, generator=generator, dtype=torch.double) * 0.8
    old, advantages = torch.randn(2, 200, generator=generator, dtype=torch.double) * 0.8
    logprobs.requires_grad_()
    gradient = torch.autograd.grad(policy_loss(logprobs, old, advantages)[0].sum(), logprobs)[0]
    with torch.no_grad():
        step = 1e-6
        above = policy_loss(logprobs + step, old, advantages)[0]
        slope = (above - policy_loss(logprobs - step, old, advantages)[0]) / (2 * step)
    torch.testing.assert_close(gradient, slope, atol=1e-6, rtol=1e-6)
    flags = policy_loss(logprobs, old, advantages)[1]
    assert 20 < flags.sum() < 180 and (gradient[flags] == 0).all() and (gradient[~flags] != 0).all()


@pytest.mark.parametrize("log_ratio", [-1000.0, -100.0, 100.0, 1000.0])
@pytest.mark.parametrize("advantage", [-1.5, 0.0, 1.5])
def test_huge_log_ratios_stay_finite(log_ratio, advantage):
    logprobs = torch.tensor([log_ratio], requires_grad=True)
    loss, _ = policy_loss(logprobs, torch.zeros(1), torch.tensor([advantage]))
    gradient = torch.autograd.grad(loss.sum(), logprobs)[0]
    assert loss.isfinite().all() and gradient.isfinite().all()
    assert abs(loss.item()) <= 3 * 1.5 and abs(gradient.item()) <= 3 * 1.5


# ---------------------------------------------------------------------------------------------------- k3
def test_k3_by_hand():
    """d = reference - policy; exp(d) - d - 1; its slope in the policy's log-prob is 1 - exp(d)."""
    d = [0.0, math.log(2), -math.log(2)]
    logprobs = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    value = kl_k3(logprobs, torch.tensor([-1.0 + x for x in d]))
    close(value.detach(), [0.0, 1 - math.log(2), math.log(2) - 0.5])
    close(torch.autograd.grad(value.sum(), logprobs)[0], [0.0, -1.0, 0.5])


def test_k3_estimates_the_divergence():
    """Its mean under the policy is KL(policy || reference), not the other direction."""
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    mean = (p * kl_k3(p.log(), q.log())).sum().item()
    assert mean == pytest.approx((p * (p / q).log()).sum().item(), abs=1e-6)
    assert mean != pytest.approx((q * (q / p).log()).sum().item(), abs=1e-2)


def test_k3_is_never_negative():
    d = torch.cat([torch.linspace(-5, 5, 2001), torch.logspace(-9, -1, 500), -torch.logspace(-9, -1, 500)])
    assert (kl_k3(torch.zeros_like(d), d) >= 0).all()
    shifted = torch.full_like(d, -3.21)  # as it is used: two negative log-probs
    assert (kl_k3(shifted, shifted + d) >= 0).all()


def test_k3_pulls_beyond_its_bound_only_where_it_has_none():
    """A control token that fell to a ten-thousandth: no gradient under the published bound of 10."""
    gradients = []
    for bound in (10.0, math.inf):
        logprobs = torch.tensor([math.log(1e-4)], requires_grad=True)
        kl_k3(logprobs, torch.zeros(1), bound).sum().backward()
        gradients.append(logprobs.grad.item())
    assert gradients[0] == 0 and gradients[1] == pytest.approx(1 - 1e4)


def test_k3_central_differences():
    logprobs = torch.linspace(-3, 2, 50, dtype=torch.double).requires_grad_()
    reference = torch.linspace(0, -3, 50, dtype=torch.double)
    gradient = torch.autograd.grad(kl_k3(logprobs, reference).sum(), logprobs)[0]
    with torch.no_grad():
        above, below = kl_k3(logprobs + 1e-6, reference), kl_k3(logprobs - 1e-6, reference)
    torch.testing.assert_close(gradient, (above - below) / 2e-6, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("d", [-1000.0, -MAX_LOG_RATIO - 1, MAX_LOG_RATIO + 1, 1000.0])
def test_k3_is_bounded(d):
    logprobs = torch.zeros(1, requires_grad=True)
    value = kl_k3(logprobs, torch.tensor([d]))
    assert value.item() == 10.0
    assert torch.autograd.grad(value.sum(), logprobs)[0].isfinite().all()


# ----------------------------------------------------------------------------------------------- clip borders
@pytest.mark.parametrize("advantage, border, inside", [(1.0, 1.2, -1), (-1.0, 0.8, 1), (-1.0, 3.0, -1)])
def test_gradient_ends_at_the_border(advantage, border, inside):
    """A hair inside there is a gradient, a hair outside there is none."""
    for side, expected in ((inside, True), (-inside, False)):
        logprob = torch.tensor([border * (1 + side * 1e-4)]).log().requires_grad_()
        loss, clipped = policy_loss(logprob, torch.zeros(1), torch.tensor([advantage]))
        slope = torch.autograd.grad(loss.sum(), logprob)[0].item()
        assert (slope != 0) is expected and clipped.item() is not expected


# ------------------------------------------------------------------------------------------ off-policy tokens
@pytest.mark.parametrize(
    "p, advantage, loss, slope",
    [
        # w = p / (p + 0.1), dw / dlog p = w (1 - w) = 0.1 p / (p + 0.1)^2
        (0.1, 2.0, -1.0, -0.5),  # w = 1/2
        (0.4, 1.0, -0.8, -0.16),  # w = 0.8, the lower clamp
        (0.9, 1.0, -0.9, -0.09),  # inside the band
        (0.9, -1.0, 0.9, 0.09),
        (0.1, -2.0, 1.6, 0.0),  # a bad one below the band is left alone: 2 * 0.8
        (0.1, 0.0, 0.0, 0.0),
    ],
)
def test_shaped_loss_by_hand(p, advantage, loss, slope):
    logprob = torch.tensor([math.log(p)], requires_grad=True)
    value = shaped_loss(logprob, torch.tensor([advantage]))
    close(value.detach(), [loss], 1e-5)
    if p != 0.4:  # at the clamp itself the slope is one of two
        close(torch.autograd.grad(value.sum(), logprob)[0], [slope], 1e-5)


def test_shaped_loss_central_differences():
    logprobs = torch.linspace(-6, -0.01, 60, dtype=torch.double).requires_grad_()
    advantages = torch.tensor([1.3, -0.7], dtype=torch.double).repeat(30)
    gradient = torch.autograd.grad(shaped_loss(logprobs, advantages).sum(), logprobs)[0]
    with torch.no_grad():
        above, below = shaped_loss(logprobs + 1e-6, advantages), shaped_loss(logprobs - 1e-6, advantages)
    torch.testing.assert_close(gradient, (above - below) / 2e-6, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("logprob", [-1e4, -1e30, -math.inf])
def test_hopeless_tokens_have_no_gradient_when_shaped(logprob):
    logprobs = torch.tensor([logprob], requires_grad=True)
    loss = shaped_loss(logprobs, torch.ones(1))
    assert loss.item() == 0 and torch.autograd.grad(loss.sum(), logprobs)[0].item() == 0


# --------------------------------------------------------------------------------------- fallen likelihoods
def test_likelihood_drop_by_hand():
    """Rows: fell by 0.3 in all, rose, fell but is not preferred. Only tokens that fell count."""
    old = torch.tensor([-1.0, -1.0, -2.0, -2.0, -1.0])
    logprobs = torch.tensor([-1.5, -0.8, -1.9, -1.9, -3.0], requires_grad=True)
    row = torch.tensor([0, 0, 1, 1, 2])
    preferred = torch.tensor([True, True, True, True, False])
    loss = likelihood_drop(logprobs, old, preferred, row)
    close(loss.detach(), [0.5, 0.0, 0.0, 0.0, 0.0])
    close(torch.autograd.grad(loss.sum(), logprobs)[0], [-1.0, 0.0, 0.0, 0.0, 0.0])


def test_likelihood_drop_central_differences():
    generator = torch.Generator().manual_seed(0)
    logprobs = torch.randn(40, generator=generator, dtype=torch.double).requires_grad_()
    old = torch.randn(40, generator=generator, dtype=torch.double)
    row, preferred = torch.arange(40) // 5, (torch.arange(40) // 5) % 2 == 0
    gradient = torch.autograd.grad(likelihood_drop(logprobs, old, preferred, row).sum(), logprobs)[0]
    with torch.no_grad():
        above = likelihood_drop(logprobs + 1e-7, old, preferred, row)
        slope = (above - likelihood_drop(logprobs - 1e-7, old, preferred, row)) / 2e-7
    torch.testing.assert_close(gradient, slope, atol=1e-6, rtol=1e-6)
    assert 0 < (gradient != 0).sum() < 20


@pytest.mark.parametrize("drop", [0.0, 1e-4, 1e4])
def test_likelihood_drop_at_the_edges(drop):
    """One token; nothing fell; a fall that may be rounding; a hopeless token, whose pull is 1, no more;
    no tokens at all."""
    logprobs = torch.tensor([-drop], requires_grad=True)
    loss = likelihood_drop(logprobs, torch.zeros(1), torch.ones(1, dtype=torch.bool), torch.zeros(1).long())
    real = drop > 1e-3
    assert loss.item() == drop * real
    assert torch.autograd.grad(loss.sum(), logprobs)[0].item() == -float(real)
    nothing = torch.zeros(0)
    assert likelihood_drop(nothing, nothing, nothing.bool(), nothing.long()).shape == (0,)


# ------------------------------------------------------------------------------------------ other ratios
def test_cispo_by_hand():
    """Ratios 1, 1.5 (clipped to 1.2, and still teaching), 0.5; slope of a token: -A w."""
    old = torch.zeros(3)
    logprobs = torch.tensor([1.0, 1.5, 0.5]).log().requires_grad_()
    advantages = torch.tensor([2.0, 2.0, -1.0])
    loss, clipped = losses.cispo_loss(logprobs, old, advantages, 0.2)
    assert clipped.tolist() == [False, True, False]
    close(torch.autograd.grad(loss.sum(), logprobs)[0], [-2.0, -2.4, 0.5])


def test_gspo_by_hand():
    """Row 0: mean change log 1.1, within the band; row 1: log 1.5, clipped whole; row 2: bad and rarer."""
    change = torch.tensor([0.0, 2 * math.log(1.1), math.log(1.5), math.log(1.5), math.log(0.5)])
    row, advantages = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0])
    old = torch.tensor([-1.0, -2.0, -3.0, -1.0, -1.0])
    logprobs = (old + change).requires_grad_()
    loss, clipped = losses.gspo_loss(logprobs, old, advantages, row, 0.2, 0.2)
    close(loss.detach(), [-1.1, -1.1, -1.2, -1.2, 0.8])
    assert clipped.tolist() == [False, False, True, True, True]
    close(torch.autograd.grad(loss.sum(), logprobs)[0], [-1.1, -1.1, 0.0, 0.0, 0.0])
    nothing = torch.zeros(0)
    assert losses.gspo_loss(nothing, nothing, nothing, nothing.long(), 0.2, 0.2)[0].shape == (0,)


def test_all_losses_agree_on_policy():
    """At ratio 1 each has GRPO's gradient, -A."""
    advantages, row = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0, 0, 1])
    for loss in ("policy", "cispo", "gspo"):
        logprobs = torch.tensor([-1.0, -2.0, -0.1], requires_grad=True)
        given = logprobs, logprobs.detach(), advantages
        found = {
            "policy": lambda given=given: policy_loss(*given),
            "cispo": lambda given=given: losses.cispo_loss(*given, 0.2),
            "gspo": lambda given=given: losses.gspo_loss(*given, row, 0.2, 0.2),
        }[loss]()[0]
        close(torch.autograd.grad(found.sum(), logprobs)[0], (-advantages).tolist())
