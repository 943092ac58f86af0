"""Losses: cases worked by hand, float64 loops as reference, gradient checks, padding never matters."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import losses

MASK = torch.tensor([[1.0, 1, 1], [1, 0, 0]])


def random_case(seed, batch=4, time=6):
    """Right-padded float64 tensors and their mask; every row has at least one token."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, time + 1, (batch,), generator=generator)
    mask = (torch.arange(time) < lengths[:, None]).double()
    tensors = [torch.randn(batch, time, generator=generator, dtype=torch.float64) for _ in range(4)]
    return tensors, mask


def check_gradient(function, *inputs):
    inputs = [x.clone().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(function, inputs)


def test_leave_one_out_by_hand():
    totals = torch.tensor([1.0, 2, 6, 5, 5, 5])  # two prompts, three samples each
    expected = torch.tensor([1 - 4.0, 2 - 3.5, 6 - 1.5, 0, 0, 0])
    torch.testing.assert_close(losses.leave_one_out(totals, 3), expected)
    with pytest.raises(ValueError, match="samples_per_prompt is 1"):
        losses.leave_one_out(totals, 1)


# --- masked statistics ---------------------------------------------------------------------------


def test_masked_mean_by_hand():
    values = torch.tensor([[1.0, 2, 3], [6, 99, math.nan]])
    assert losses.masked_mean(values, MASK).item() == 3.0  # (1 + 2 + 3 + 6) / 4
    assert losses.masked_mean(values, MASK, count=8).item() == 1.5


def test_masked_mean_refuses_empty_masks_and_other_shapes():
    with pytest.raises(ValueError, match="no real token"):
        losses.masked_mean(torch.ones(2, 2), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="differ in shape"):
        losses.masked_mean(torch.ones(2, 3), torch.ones(2, 2))
    assert losses.masked_mean(torch.ones(2, 2), torch.zeros(2, 2), count=4).item() == 0.0


def test_whiten_divides_by_the_standard_deviation():
    values = torch.tensor([[1.0, 2, 3], [6, 50, 50]])  # mean 3, variance (4 + 1 + 0 + 9) / 4 = 3.5
    std = math.sqrt(3.5)
    expected = torch.tensor([[-2 / std, -1 / std, 0], [3 / std, 0, 0]])
    torch.testing.assert_close(losses.whiten(values, MASK), expected)
    kept_mean = losses.whiten(values, MASK, shift_mean=False)
    torch.testing.assert_close(kept_mean, (expected + 3) * MASK)  # and padding stays 0


def test_whiten_of_constant_values_is_not_noise():
    constant = torch.full((2, 3), 0.7)
    assert losses.whiten(constant, MASK).abs().max() < 1e-3
    torch.testing.assert_close(losses.whiten(constant, MASK, shift_mean=False), 0.7 * MASK)


@pytest.mark.parametrize("shape", [(3, 1), (7, 1), (16, 20), (32, 48)])
@pytest.mark.parametrize("value", [0.1, 0.3, 3.3, 77.7, -1000.1, 1e-9, 0.0])
def test_equal_rewards_have_no_spread_whatever_their_size(value, shape):
    """The deviation of equal numbers is computed as rounding dust; dividing by it makes noise."""
    equal, mask = torch.full(shape, value), torch.ones(shape)
    dust = equal * (1 + 1e-7 * torch.arange(equal.numel()).view(shape).remainder(2))
    for values in (equal, dust):
        assert (losses.whiten(values, mask) == 0).all()
        kept_mean = losses.whiten(values, mask, shift_mean=False)
        torch.testing.assert_close(kept_mean, equal, rtol=1e-5, atol=0)
        assert losses.explained_variance(torch.zeros(shape), values, mask).isnan()


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e6])
def test_whitening_does_not_depend_on_the_unit(size):
    values = size * torch.tensor([[1.0, 2, 3], [6, 50, 50]])
    torch.testing.assert_close(losses.whiten(values, MASK), losses.whiten(values / size, MASK))
    explained = losses.explained_variance(0.5 * values, values, MASK)
    assert explained.item() == pytest.approx(0.75, abs=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_whitened_values_have_mean_0_and_variance_1(seed):
    (values, *_), mask = random_case(seed, batch=5, time=7)
    white = losses.whiten(values, mask)
    real = white[mask == 1].numpy()
    if len(real) > 1:
        assert abs(real.mean()) < 1e-9 and abs(real.var() - 1) < 1e-9
    assert (white[mask == 0] == 0).all()


def test_explained_variance():
    returns = torch.tensor([[1.0, 2, 3], [6, 50, 50]])
    assert losses.explained_variance(returns, returns, MASK).item() == 1.0
    assert losses.explained_variance(torch.zeros(2, 3), returns, MASK).item() == pytest.approx(0)
    values = returns + torch.tensor([[1.0, -1, 1], [-1, 0, 0]])  # error variance 1, of 3.5
    assert losses.explained_variance(values, returns, MASK).item() == pytest.approx(1 - 1 / 3.5)
    assert losses.explained_variance(returns, torch.ones(2, 3), MASK).isnan()


# --- log-probabilities from hidden states --------------------------------------------------------


# --- GAE -----------------------------------------------------------------------------------------


def gae_reference(rewards, values, mask, gamma, lam):
    """The definition, term by term: A_t = sum_l (gamma lam)^l delta_{t+l} within the row's tokens."""
    advantages = np.zeros(rewards.shape)
    for row in range(len(rewards)):
        length = int(mask[row].sum())
        value = [*values[row, :length].tolist(), 0.0]
        delta = [rewards[row, t].item() + gamma * value[t + 1] - value[t] for t in range(length)]
        for t in range(length):
            advantages[row, t] = sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, length))
    return torch.tensor(advantages)


def test_gae_by_hand():
    rewards = torch.tensor([[0.0, 1, 2], [1, 7, 7]])
    values = torch.tensor([[1.0, 2, 3], [0.5, 7, 7]])
    # gamma 0.5, lambda 0.5; row 0: delta_2 = 2 - 3 = -1; delta_1 = 1 + 1.5 - 2 = 0.5;
    # delta_0 = 0 + 1 - 1 = 0; A_2 = -1; A_1 = 0.5 - 0.25 = 0.25; A_0 = 0.0625.  Row 1: A_0 = 0.5.
    advantages, returns = losses.gae(rewards, values, MASK, gamma=0.5, lam=0.5)
    torch.testing.assert_close(advantages, torch.tensor([[0.0625, 0.25, -1], [0.5, 0, 0]]))
    torch.testing.assert_close(returns, torch.tensor([[1.0625, 2.25, 2], [1, 0, 0]]))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(0, 1))
def test_gae_equals_the_definition(seed, gamma, lam):
    (rewards, values, *_), mask = random_case(seed)
    advantages, returns = losses.gae(rewards, values, mask, gamma, lam)
    torch.testing.assert_close(advantages, gae_reference(rewards, values, mask, gamma, lam))
    torch.testing.assert_close(returns, (advantages + values) * mask)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_dense_and_final_reward_of_equal_total_give_equal_first_returns(seed):
    (dense, values, *_), mask = random_case(seed)
    dense = dense * mask
    final = torch.zeros_like(dense)
    final[torch.arange(len(dense)), mask.sum(1).long() - 1] = dense.sum(1)
    dense_returns = losses.gae(dense, values, mask, 1.0, 1.0)[1]
    final_returns = losses.gae(final, values, mask, 1.0, 1.0)[1]
    torch.testing.assert_close(dense_returns[:, 0], final_returns[:, 0])
    torch.testing.assert_close(dense_returns[:, 0], dense.sum(1))  # whatever the values are


def test_gae_refuses_left_padding():
    with pytest.raises(ValueError, match="pad responses on the right"):
        losses.gae(torch.ones(1, 2), torch.ones(1, 2), torch.tensor([[0.0, 1]]), 1.0, 1.0)


# --- clipped losses ------------------------------------------------------------------------------


def test_policy_loss_by_hand():
    old = torch.zeros(2, 3)
    log_probs = torch.tensor([[1.5, 0.5, 1.0], [1.5, 9, 9]]).log()
    advantages = torch.tensor([[1.0, 1, 2], [-1, 9, 9]])
    # clip 0.2: min(1.5, 1.2) = 1.2; min(0.5, 0.8) = 0.5; 2; min(-1.5, -1.2) = -1.5: mean 2.2 / 4
    loss = losses.policy_loss(log_probs, old, advantages, MASK, clip=0.2)
    assert loss.item() == pytest.approx(-0.55)
    assert losses.clip_fraction(log_probs, old, MASK, 0.2).item() == pytest.approx(3 / 4)


def test_policy_loss_has_no_gradient_where_clipping_holds():
    log_probs = torch.tensor([[1.5, 1.0, 0.5]]).log().requires_grad_()
    advantages = torch.tensor([[1.0, 1.0, -1.0]])
    losses.policy_loss(log_probs, torch.zeros(1, 3), advantages, torch.ones(1, 3)).backward()
    torch.testing.assert_close(log_probs.grad, torch.tensor([[0.0, -1 / 3, 0.0]]))


def policy_reference(log_probs, old, advantages, mask, clip):
    total, tokens = 0.0, 0
    for row, t in mask.nonzero().tolist():
        ratio, advantage = math.exp(log_probs[row, t] - old[row, t]), advantages[row, t].item()
        total += min(ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage)
        tokens += 1
    return -total / tokens


def value_reference(values, old, returns, mask, clip):
    errors = []
    for row, t in mask.nonzero().tolist():
        value, before, target = (x[row, t].item() for x in (values, old, returns))
        clipped = before + min(max(value - before, -clip), clip)
        errors.append(max((value - target) ** 2, (clipped - target) ** 2))
    return 0.5 * sum(errors) / len(errors)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.05, 0.5))
def test_clipped_losses_equal_their_definitions(seed, clip):
    (a, b, c, _), mask = random_case(seed)
    assert losses.policy_loss(a, b, c, mask, clip).item() == pytest.approx(
        policy_reference(a, b, c, mask, clip)
    )
    assert losses.value_loss(a, b, c, mask, clip).item() == pytest.approx(
        value_reference(a, b, c, mask, clip)
    )


def test_value_loss_by_hand():
    values = torch.tensor([[1.0, 0.1, 2.0], [0.0, 9, 9]])
    old, returns = torch.zeros(2, 3), torch.tensor([[1.0, 1.0, 0.0], [3.0, 9, 9]])
    # clipped to 0.2, 0.1, 0.2, 0: max(0, .64) = .64; .81; max(4, .04) = 4; 9: 14.45 / 4 / 2
    assert losses.value_loss(values, old, returns, MASK, 0.2).item() == pytest.approx(14.45 / 8)


def test_losses_of_parts_add_up_to_the_loss_of_the_whole():
    (a, b, c, _), mask = random_case(3, batch=6)
    count = mask.sum()
    for loss in (losses.policy_loss, losses.value_loss):
        parts = [loss(a[i], b[i], c[i], mask[i], count=count) for i in (slice(0, 2), slice(2, 6))]
        torch.testing.assert_close(sum(parts), loss(a, b, c, mask))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([math.nan, math.inf, -1e30]))
def test_padding_never_leaks_into_losses_or_gradients(seed, garbage):
    (a, b, c, d), mask = random_case(seed)
    wide = [torch.cat([x, torch.full_like(x[:, :2], garbage)], 1) for x in (b, c, d)]
    wide = [x.masked_fill(torch.cat([mask, mask[:, :2] * 0], 1) == 0, garbage) for x in wide]
    wide_mask = torch.cat([mask, mask[:, :2] * 0], 1)
    for loss in (losses.policy_loss, losses.value_loss):
        narrow_input = a.clone().requires_grad_()
        wide_input = torch.cat([a, a[:, :2]], 1).requires_grad_()
        expected = loss(narrow_input, b, c, mask)
        found = loss(wide_input, wide[0], wide[1], wide_mask)
        torch.testing.assert_close(found, expected)
        expected.backward()
        found.backward()
        torch.testing.assert_close(wide_input.grad[:, : a.shape[1]], narrow_input.grad)
        assert (wide_input.grad[wide_mask == 0] == 0).all()
    for narrow, broad in zip(
        losses.gae(b, c, mask, 0.9, 0.8),
        losses.gae(wide[0], wide[1], wide_mask, 0.9, 0.8),
        strict=True,
    ):
        torch.testing.assert_close(broad[:, : a.shape[1]], narrow)
        assert (broad[wide_mask == 0] == 0).all()
    torch.testing.assert_close(
        losses.whiten(wide[0], wide_mask)[:, : a.shape[1]], losses.whiten(b, mask)
    )


# --- distances -----------------------------------------------------------------------------------


def test_kl_estimates_by_hand():
    policy, reference = torch.tensor([0.5]).log(), torch.tensor([0.25]).log()
    values = {k: losses.kl_estimate(policy, reference, k).item() for k in ("k1", "k2", "k3")}
    assert values["k1"] == pytest.approx(math.log(2))
    assert values["k2"] == pytest.approx(math.log(2) ** 2 / 2)
    assert values["k3"] == pytest.approx(0.5 - 1 + math.log(2))
    with pytest.raises(ValueError, match="allowed: 'k1', 'k2', 'k3'"):
        losses.kl_estimate(policy, reference, "k4")


def test_k3_stays_accurate_for_tiny_differences():
    """exp(d) - 1 - d cancels in float32; expm1 keeps the d^2 / 2 that remains."""
    d = 1e-3
    found = losses.kl_estimate(torch.tensor([0.0]), torch.tensor([d]), "k3").item()
    assert found == pytest.approx(math.expm1(d) - d, rel=1e-3)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_k1_and_k3_average_to_the_full_divergence(seed):
    """Exactly, when the average over tokens is taken under the policy: both are unbiased."""
    logits, ref_logits = torch.randn(2, 7, generator=torch.Generator().manual_seed(seed)).double()
    p, q = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    full = losses.kl_divergence(logits, ref_logits)
    for kind in ("k1", "k3"):
        torch.testing.assert_close((p.exp() * losses.kl_estimate(p, q, kind)).sum(), full)
    assert (losses.kl_estimate(p, q, "k3") >= 0).all() and full >= 0


def test_full_kl_by_hand_in_both_directions():
    p, q = torch.tensor([0.5, 0.5]).double(), torch.tensor([0.9, 0.1]).double()
    reverse = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    forward = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    found = [losses.kl_divergence(p.log(), q.log(), d).item() for d in ("reverse", "forward")]
    assert found == pytest.approx([reverse, forward])
    assert losses.kl_divergence(p.log() + 3, p.log()).item() == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="allowed: 'reverse', 'forward'"):
        losses.kl_divergence(p, q, "sideways")


def test_entropy_by_hand():
    assert losses.entropy(torch.zeros(8)).item() == pytest.approx(math.log(8))
    logits = torch.tensor([0.0, 0.0, -math.inf])  # a filtered token has probability 0
    assert losses.entropy(logits).item() == pytest.approx(math.log(2))
    p = [0.7, 0.2, 0.1]
    expected = -sum(x * math.log(x) for x in p)
    assert losses.entropy(torch.tensor(p).log()).item() == pytest.approx(expected)


# --- reward models -------------------------------------------------------------------------------


def test_pairwise_loss_by_hand():
    assert losses.pairwise_loss(torch.zeros(3), torch.zeros(3)).item() == pytest.approx(math.log(2))
    found = losses.pairwise_loss(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 1.0])).item()
    assert found == pytest.approx((math.log1p(math.exp(-2)) + math.log1p(math.exp(1))) / 2)
    far = losses.pairwise_loss(torch.tensor([-500.0]), torch.tensor([500.0]))
    assert far.item() == pytest.approx(1000)  # log(sigmoid(x)) would be -inf


def test_regression_loss_by_hand():
    targets = losses.rating_target(torch.tensor([1.0, 4.0, 7.0]))
    torch.testing.assert_close(targets, torch.tensor([0.0, 0.5, 1.0]))
    found = losses.regression_loss(torch.zeros(3), targets).item()
    assert found == pytest.approx((0.25 + 0 + 0.25) / 3)
    with pytest.raises(ValueError, match=r"outside \[1, 7\]"):
        losses.rating_target(torch.tensor([0.0]))


# --- gradients -----------------------------------------------------------------------------------


def test_gradients_equal_finite_differences():
    (a, b, c, d), mask = random_case(11)
    check_gradient(lambda x: losses.masked_mean(x, mask), a)
    check_gradient(lambda x: losses.whiten(x, mask), a)
    check_gradient(lambda x: losses.policy_loss(x, b, c, mask), a)
    check_gradient(lambda x: losses.value_loss(x, b, c, mask), a)
    check_gradient(lambda x, y: losses.gae(x, y, mask, 0.9, 0.8), a, d)
    for kind in ("k1", "k2", "k3"):
        check_gradient(lambda x, y, kind=kind: losses.kl_estimate(x, y, kind), a, b)
    for direction in ("reverse", "forward"):
        check_gradient(lambda x, y, d=direction: losses.kl_divergence(x, y, d), a, b)
    check_gradient(losses.entropy, a)
    check_gradient(losses.pairwise_loss, a[0], b[0])
    check_gradient(lambda x: losses.regression_loss(x, torch.sigmoid(b)), a)
