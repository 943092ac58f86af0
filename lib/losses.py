"""Losses and estimators of learning from feedback: pure functions, tensors -> tensor, no model inside.

`(batch, time)` holds one value per response token, padded on the right; `mask` has 1 at real tokens, 0
at padding, where any value may stand, even NaN.  `count` is the number of tokens to divide by when a
batch is split over micro-batches or processes: the parts then add up to the loss of the whole.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

ROUNDING = 16  # relative precisions: sums of many equal numbers are off by a few
MAX_LOG_RATIO = 20.0  # exp() of a difference of log-probabilities stays finite in float32


def masked_mean(
    values: torch.Tensor, mask: torch.Tensor, count: torch.Tensor | float | None = None
) -> torch.Tensor:
    """Mean over real tokens: sum_t m_t x_t / sum_t m_t, or / `count` where given.  Scalar.

    Raises ValueError for a mask of another shape, or without any real token and no `count`.
    """
    if values.shape != mask.shape:
        raise ValueError(
            f"values {tuple(values.shape)} and mask {tuple(mask.shape)} differ in shape."
        )
    if count is None and not mask.any():
        raise ValueError("the mask has no real token, so there is nothing to average.")
    real = values.masked_fill(mask == 0, 0.0)
    return real.sum() / (mask.sum().to(real.dtype) if count is None else count)


def whiten(values: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
    """(x - mean) / std over real tokens (population std); padding becomes 0.  Same shape.

    With shift_mean=False the mean is put back after scaling, as for rewards, whose sign carries
    meaning (Stiennon et al. 2020).  Values that are equal up to rounding become 0 (or their mean).
    """
    mean = masked_mean(values, mask)
    centred = values - mean
    std = _spread(values, mask)
    scaled = centred / torch.where(std > 0, std, 1.0)
    scaled = torch.where(std > 0, scaled, 0.0)
    return (scaled if shift_mean else scaled + mean).masked_fill(mask == 0, 0.0)


def explained_variance(
    values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """1 - Var(returns - values) / Var(returns) over real tokens: 1 is a perfect value model, 0 a constant.

    NaN where all returns are equal, because then there is nothing to explain.
    """
    unexplained = _variance(returns - values, mask) / _variance(returns, mask)
    return torch.where(_spread(returns, mask) > 0, 1 - unexplained, torch.nan)


def rounding(values: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """A deviation up to this is rounding, not spread: it grows with the values and their precision.

    Equal rewards of 77.7 have a computed deviation of about 1e-5, and dividing by it makes noise of size 1.
    """
    largest = values.abs().amax() if dim is None else values.abs().amax(dim)
    return ROUNDING * torch.finfo(values.dtype).eps * largest


def _variance(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Population variance over real tokens."""
    centred = (values - masked_mean(values, mask)).masked_fill(mask == 0, 0.0)
    return masked_mean(centred**2, mask)


def _spread(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Population deviation over real tokens; exactly 0 where they are equal up to rounding."""
    std = _variance(values, mask).sqrt()
    least = rounding(values.masked_fill(mask == 0, 0.0))
    return torch.where(std > least, std, 0.0)


# --- PPO -----------------------------------------------------------------------------------------


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns, both (batch, time), by generalised advantage estimation.

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1};  return_t = A_t + V_t
    (Schulman et al. 2016, section 3), over real tokens only: V and A after the last real token are 0.
    Rewards may stand on any token.  Raises ValueError unless real tokens come first in every row.
    """
    if (mask[:, 1:] > mask[:, :-1]).any():
        raise ValueError("mask has a real token after padding; pad responses on the right.")
    rewards, values = (x.masked_fill(mask == 0, 0.0) for x in (rewards, values))
    advantage = next_value = torch.zeros_like(values[:, 0])
    columns = []
    for t in range(rewards.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * advantage
        next_value = values[:, t]
        columns.append(advantage)
    advantages = torch.stack(columns[::-1], 1).masked_fill(mask == 0, 0.0)
    return advantages, advantages + values


def policy_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    clip: float = 0.2,
    count: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """-mean_t min(rho_t A_t, clamp(rho_t, 1 - clip, 1 + clip) A_t), rho = exp(log_probs - old).

    The clipped surrogate of PPO (Schulman et al. 2017, section 3); all inputs (batch, time).
    """
    ratio = _ratio(log_probs, old_log_probs, mask)
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -masked_mean(surrogate, mask, count)


def leave_one_out(totals: torch.Tensor, samples_per_prompt: int) -> torch.Tensor:
    """Advantages of whole responses, (rows,): A_i = R_i - mean of the R_j of its prompt's other samples.

    RLOO's estimator (Ahmadian et al. 2024, section 3).  `totals`: what each response is paid, (rows,), the
    samples of a prompt together.  Raises ValueError for fewer than two samples of a prompt.
    """
    if samples_per_prompt < 2:
        raise ValueError(
            f"samples_per_prompt is {samples_per_prompt}; each sample is compared with the others of its "
            "prompt: give 2 or more."
        )
    groups = totals.view(-1, samples_per_prompt)
    others = (groups.sum(1, keepdim=True) - groups) / (samples_per_prompt - 1)
    return (groups - others).view(-1)


def clip_fraction(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    mask: torch.Tensor,
    clip: float = 0.2,
    count: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """Share of real tokens whose ratio lies outside [1 - clip, 1 + clip]."""
    outside = (_ratio(log_probs, old_log_probs, mask) - 1).abs() > clip
    return masked_mean(outside.to(log_probs.dtype), mask, count)


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    clip: float = 0.2,
    count: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """1/2 mean_t max((V - R)^2, (V_clipped - R)^2) with V_clipped = V_old + clamp(V - V_old, -clip, clip).

    All inputs (batch, time).  Stiennon et al. 2020 and fine-grained RLHF (section 2) use it with 0.2.
    """
    values, old_values, returns = (
        x.masked_fill(mask == 0, 0.0) for x in (values, old_values, returns)
    )
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    squared = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * masked_mean(squared, mask, count)


def _ratio(log_probs: torch.Tensor, old: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    difference = (log_probs - old).masked_fill(mask == 0, 0.0)
    return difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


# --- distance between policies -------------------------------------------------------------------


def kl_estimate(
    log_probs: torch.Tensor, ref_log_probs: torch.Tensor, kind: str = "k3"
) -> torch.Tensor:
    """Per-token estimate of KL(policy || reference) from tokens the policy sampled.  Same shape.

    With d = log ref - log policy: k1 = -d (unbiased, may be negative), k2 = d^2 / 2 (biased, low
    variance), k3 = exp(d) - 1 - d (unbiased, never negative).  Schulman, "Approximating KL
    Divergence", 2020.  Padding is passed through: average with `masked_mean`.
    """
    difference = ref_log_probs - log_probs
    if kind == "k1":
        return -difference
    if kind == "k2":
        return 0.5 * difference**2
    if kind == "k3":
        bounded = difference.clamp(max=MAX_LOG_RATIO)
        return torch.expm1(bounded) - difference
    raise ValueError(f"kind is {kind!r}; allowed: 'k1', 'k2', 'k3'.")


def kl_divergence(
    logits: torch.Tensor, ref_logits: torch.Tensor, direction: str = "reverse"
) -> torch.Tensor:
    """KL over the whole vocabulary: logits (..., vocabulary) -> (...).

    reverse = KL(policy || reference) = sum_v p (log p - log q), the penalty of RLHF; forward =
    KL(reference || policy), the one written in the Quark paper's objective (Lu et al. 2022).
    """
    p, q = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    if direction == "reverse":
        return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    if direction == "forward":
        return F.kl_div(p, q, reduction="none", log_target=True).sum(-1)
    raise ValueError(f"direction is {direction!r}; allowed: 'reverse', 'forward'.")


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """-sum_v p log p in nats: logits (..., vocabulary) -> (...).  Logits of -inf count as probability 0."""
    log_probs = logits.log_softmax(-1)
    finite = log_probs.clamp(min=torch.finfo(log_probs.dtype).min)
    return -(log_probs.exp() * finite).sum(-1)


def pairwise_loss(preferred: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """-mean log sigmoid(z_preferred - z_rejected): Bradley-Terry.  (pairs,); ln 2 where scores are equal."""
    return -F.logsigmoid(preferred - rejected).mean()


def dpo_loss(log_probs: torch.Tensor, ref_log_probs: torch.Tensor, beta: float) -> torch.Tensor:
    """`pairwise_loss` of the implied rewards beta (log pi - log pi_ref) of whole answers: DPO.

    Both (2 pairs,): first the preferred answers, then the rejected ones of the same pairs (Rafailov et al.
    2023, equation 7).  ln 2 before training.
    """
    preferred, rejected = (beta * (log_probs - ref_log_probs)).chunk(2)
    return pairwise_loss(preferred, rejected)


def rating_target(score: torch.Tensor, lowest: float = 1.0, highest: float = 7.0) -> torch.Tensor:
    """Rating as a target in [0, 1]: (s - lowest) / (highest - lowest); (s - 1) / 6 for the scale 1 to 7."""
    if ((score < lowest) | (score > highest)).any():
        raise ValueError(f"a rating lies outside [{lowest:g}, {highest:g}]: {score.tolist()}")
    return (score - lowest) / (highest - lowest)


def regression_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """mean (t - sigmoid(z))^2 for targets t in [0, 1] (sparse feedback: ratings reward model).  (rows,)."""
    return F.mse_loss(torch.sigmoid(logits), targets)
