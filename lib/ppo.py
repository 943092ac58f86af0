"""PPO in which any token may carry a reward.

`rewards` is (batch, time); a reward for the whole response is the case where only the last token's is
not zero.  Per token: reward - beta (log pi - log pi_ref), i.e. a KL penalty by the k1 estimate (Ziegler
et al. 2019; fine-grained RLHF, section 2); k3 is logged beside it.  A rollout's log-probabilities come
from the forward pass that trains, dropout is off, and by default tokens are drawn from the distribution
of the ratios, softmax(logits / temperature); with top-k or top-p the ratios still use the unfiltered one.

`train_ppo` is the algorithm; its five stages are the plain functions below it, from tensors to tensors
(`rloo` uses four of them).  What stands around a loop (seeds, checkpoints, history) is in `training`.
Random numbers depend on (seed, step) only; minibatches take one row from each of `minibatch_size` strata,
so any number of processes makes the same ones.
Simplified: data parallel only (`accelerate launch`, one process or DDP; see `processes`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.nn.functional import cross_entropy, pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib import generation, losses, models, processes, rewards, runtime, training
from lib.policy import SharedTrunkPolicy, TokenBatch
from lib.values import ValueFunction

STAGES = ("sample", "score", "forward", "update")
MAY_BE_ZERO = {"top_k", "warmup_steps", "gamma", "lam", "kl_coef", "seed"}


@dataclass(frozen=True)
class PPOConfig:
    """Settings of `train_ppo` and, where they apply, of `rloo.train_rloo`.

    Comments name what the papers' code uses: FG is fine-grained RLHF (Wu et al. 2023, T5-large on
    qa-feedback), RLM is RewardLM (Scalena et al. 2023, through TRL 0.4).
    """

    steps: int = 20  # FG: 1250, RLM: 129
    prompts_per_step: int = 32  # FG: 16
    samples_per_prompt: int = 1  # FG: 4
    max_new_tokens: int = 20  # FG: 200, RLM: 70
    temperature: float = 1.0  # FG: 0.7 with top_k 20
    top_k: int = 0  # 0 and 1.0 below: no filter, so sampling matches the ratios' distribution
    top_p: float = 1.0
    train: str = "top"  # "top", "lora" or "all": see models.set_trainable.  FG: "all", RLM: "lora"
    layers: int = 2
    lora_rank: int = 8  # RLM: 32
    epochs: int = 4  # passes over each rollout.  FG, RLM: 4
    minibatch_size: int = (
        8  # rows of an optimizer step, over all processes.  FG: 64, the whole rollout
    )
    forward_rows: int = 16  # rows in memory at once; bounds the logits kept
    learning_rate: float = 1e-4  # FG: 1e-5, RLM: 5e-6
    value_learning_rate: float = 1e-3  # FG, RLM: as learning_rate
    warmup_steps: int = 0  # the learning rates rise linearly over these steps.  FG: 100
    decay: bool = False  # then they stay, or fall linearly to 0.  FG: True
    adam_eps: float = 1e-8  # FG: 1e-5
    gamma: float = 1.0  # FG, RLM: 1
    lam: float = 0.95  # FG: 0.95, and 0.99 for holistic rewards
    clip: float = 0.2  # FG, RLM: 0.2
    value_clip: float = (
        0.2  # in units of reward: how far a value may move in one step.  FG, RLM: 0.2
    )
    kl_coef: float = 0.05  # beta.  FG: 0.3, and 0.2 for holistic rewards; RLM: 0.2, adaptive
    kl_target: float | None = None  # nats a sequence; None keeps beta fixed.  RLM: 6
    kl_horizon: int = 10_000  # episodes over which beta adapts.  RLM: 10,000
    whiten_rewards: bool = False  # divide rewards by their deviation, keep their mean.  FG: True
    whiten_advantages: bool = True  # FG, RLM: True
    max_grad_norm: float = 1.0  # math.inf: no clipping.  FG, RLM: no clipping
    stop_kl: float = math.inf  # nats a sequence (k3).  FG: 10
    stop_kl_times: int = 1  # the run stops at this many steps above stop_kl.  FG: 5
    eval_every: int = 10  # FG: 50
    greedy_held_out: bool = False  # held-out responses by the likeliest tokens.  FG: True
    checkpoint_every: int = 10
    seed: int = 0  # FG: 42

    def __post_init__(self):
        training.check_numbers(asdict(self), MAY_BE_ZERO)
        for name in ("gamma", "lam", "top_p"):
            if getattr(self, name) > 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be at most 1.")
        if self.batch % self.minibatch_size:
            raise ValueError(
                f"minibatch_size {self.minibatch_size} does not divide prompts_per_step x "
                f"samples_per_prompt = {self.batch}; choose one that does."
            )

    @property
    def batch(self) -> int:
        """Episodes of one step."""
        return self.prompts_per_step * self.samples_per_prompt


def adapt_kl_coef(kl_coef: float, kl: float, target: float, episodes: int, horizon: int) -> float:
    """beta (1 + clip(KL / target - 1, -0.2, 0.2) episodes / horizon)   (Ziegler et al. 2019, section 2.2).

    From 0.2, 128 steps of 64 episodes at a KL far below target end at 0.16976, as in RewardLM's log.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * episodes / horizon)


# --- the algorithm -------------------------------------------------------------------------------


def train_ppo(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    reward_fn: rewards.RewardFunction,
    config: PPOConfig | None = None,
    *,
    held_out: Sequence[str] = (),
    value_model: PreTrainedModel | ValueFunction | None = None,
    folder: Path | str | None = None,
    accelerator: Accelerator | None = None,
) -> pd.DataFrame:
    """Train `policy` in place; return its history, one row a step (columns: `describe_step`).

    Its `value_function`, trained with it, is kept by `models.save`.

    Args:
        reward_fn: samples -> numbers for responses or for tokens, in any form `rewards.as_components` takes.
        held_out: prompts whose mean reward chooses the weights that the policy ends with; without
            them it ends with the last.
        value_model: a language model of any size over the same tokens; None: a head on the policy.  The
            `policy.value_function` of an earlier training goes on.
        folder: for history and checkpoints, from which a killed run continues.

    `history.attrs`: stopped (the reason, or None), best_step, held_out_start, ratio_distribution.  Raises
    ValueError for settings that do not fit together, FloatingPointError where a loss is not finite.
    """
    learner = make_learner(policy, tokenizer, config or PPOConfig(), value_model, accelerator)
    run = Loop(learner, prompts, reward_fn, held_out, folder)
    with models.fast_float32(learner.network):
        run.start()
        for step in run.steps():
            # 1 sample: responses of the policy as it is now
            samples = sample(learner, prompts, step)
            run.clock.lap("sample")
            # 2 score: rewards (batch, time), on any token, and the components' sums
            scores, components = rewards.place_rewards(reward_fn(samples), samples)
            run.clock.lap("score")
            # 3 roll out: log-probabilities under policy and reference, values; the KL penalty
            rollout = roll_out(learner, samples)
            paid = penalise(scores, rollout.log_probs, rollout.ref_log_probs, run.kl_coef)
            # 4 advantages: how much better than the value function expected
            advantages, returns = estimate_advantages(learner, paid, rollout.values, rollout.mask)
            run.clock.lap("forward")
            # 5 update: epochs of minibatches with clipped policy and value loss
            update_means = update(learner, rollout, advantages, returns, step)
            run.clock.lap("update")
            run.finish_step(step, samples, components, rollout, returns, update_means)
    return run.close()


@dataclass
class Learner:
    """What learns: policy, reference and value on one network, an optimizer, and the processes."""

    policy: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: PPOConfig
    shared: SharedTrunkPolicy
    network: torch.nn.Module  # `shared`, or DDP around it
    optimizer: torch.optim.Optimizer
    accelerator: Accelerator
    at_once: training.RowsAtOnce

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def world(self) -> int:
        return self.accelerator.num_processes

    def weights(self) -> dict[str, torch.Tensor]:
        """What trains, by name."""
        return {n: p for n, p in self.shared.named_parameters() if p.requires_grad}


@dataclass
class Rollout:
    """One process's responses; every tensor is (batch, time), each row as the policy was before."""

    tokens: TokenBatch
    mask: torch.Tensor  # 1 = a token of the response, 0 = padding
    log_probs: torch.Tensor
    ref_log_probs: torch.Tensor
    values: torch.Tensor
    entropy: torch.Tensor

    def rows(self, index: torch.Tensor) -> Rollout:
        """The same, for some of the rows."""
        parts = {k: v[index] for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return Rollout(tokens=self.tokens.rows(index), **parts)


def make_learner(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: PPOConfig,
    value_model: PreTrainedModel | ValueFunction | None = None,
    accelerator: Accelerator | None = None,
) -> Learner:
    """Choose what trains and make its optimizer.

    Raises ValueError where the processes do not divide the rows, and for a value model that cannot read
    the policy's tokens.
    """
    models.check_policy(policy.config)
    own_model = value_model.model if isinstance(value_model, ValueFunction) else value_model
    if own_model is not None:
        check_value_model(own_model, tokenizer)
    accelerator = accelerator or processes.begin(policy.device)
    world = accelerator.num_processes
    if config.minibatch_size % world or config.prompts_per_step % world:
        raise ValueError(
            f"minibatch_size {config.minibatch_size} and prompts_per_step {config.prompts_per_step} "
            f"must be multiples of the number of processes, {world}."
        )
    policy.to(accelerator.device)
    size = {"layers": config.layers, "lora_rank": config.lora_rank}
    frozen = models.set_trainable(policy, config.train, **size)
    shared = SharedTrunkPolicy(policy, frozen, value_model)
    rates = (config.learning_rate, config.value_learning_rate)
    groups = [
        {"params": parameters, "lr": rate, "peak": rate}
        for parameters, rate in zip(shared.parameter_groups(), rates, strict=True)
    ]
    optimizer = torch.optim.Adam(groups, eps=config.adam_eps, fused=True)
    network, optimizer = accelerator.prepare(shared, optimizer)
    at_once = training.RowsAtOnce(config.forward_rows)
    return Learner(policy, tokenizer, config, shared, network, optimizer, accelerator, at_once)


def check_value_model(value_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError unless this is a language model over the tokenizer's tokens."""
    if value_model.get_output_embeddings() is None:
        raise ValueError(
            f"value_model is a {type(value_model).__name__}, which has no output layer; give a language "
            "model of the policy's tokenizer, as `models.load_policy` loads it."
        )
    known = value_model.get_input_embeddings().weight.shape[0]
    if known < len(tokenizer):
        raise ValueError(
            f"value_model knows {known} tokens, the policy's tokenizer {len(tokenizer)}; give a model that "
            "was made for the same tokenizer."
        )


# --- 1 sample ------------------------------------------------------------------------------------


def sample(learner: Learner, prompts: Sequence[str], step: int) -> generation.Samples:
    """This process's episodes; prompts go round in a new random order each time through.

    Raises ValueError for fewer prompts than a step takes.
    """
    config = learner.config
    check_prompts(prompts, config)
    turn = range(step * config.prompts_per_step, (step + 1) * config.prompts_per_step)
    chosen = [prompts[i] for i in training.laps(turn, len(prompts), config.seed, "order")]
    return draw(learner, chosen, config.samples_per_prompt, "sample", step)


def check_prompts(prompts: Sequence[str], config: PPOConfig) -> None:
    """Raise ValueError for fewer prompts than a step takes."""
    if len(prompts) < config.prompts_per_step:
        raise ValueError(
            f"{len(prompts)} prompts are fewer than prompts_per_step {config.prompts_per_step}; give "
            "more prompts or lower it."
        )


def draw(
    learner: Learner, prompts: Sequence[str], n: int, *key, greedy: bool = False
) -> generation.Samples:
    """This process's share of n samples of each prompt; the draws do not depend on the shares."""
    config, share = learner.config, processes.share(len(prompts))
    generator = training.generator_for(config.seed, *key)
    noise = torch.rand(len(prompts) * n, config.max_new_tokens, generator=generator)
    mine = prompts[share]
    noise = noise[share.start * n : share.stop * n]
    decoding = generation.decoding_of(config)
    if greedy:  # of many prompts: as many at a time as a step samples
        decoding |= {"temperature": 0.0, "rows_per_batch": config.batch}
    return generation.sample(learner.policy, learner.tokenizer, mine, n=n, noise=noise, **decoding)


# --- 3 roll out ----------------------------------------------------------------------------------


@torch.no_grad()
def roll_out(learner: Learner, samples: generation.Samples) -> Rollout:
    """Log-probabilities of policy and reference, values and entropies, a few rows at a time.

    Logits are dropped after each few rows; the trunk's hidden states are kept for the update.
    """
    return learner.at_once.run(partial(_roll_out, learner, samples))


def _roll_out(learner: Learner, samples: generation.Samples, rows_at_once: int) -> Rollout:
    pair = (samples.prompt_ids, samples.response_ids)
    tokens = TokenBatch.of(learner.policy, learner.tokenizer, *pair)
    finished, parts = [], []
    # prompts of like length need little padding
    order = tokens.prompt_mask.sum(1).argsort(stable=True)
    for rows in order.split(rows_at_once):
        part = tokens.rows(rows)
        log_probs, values, entropy = evaluate(learner, part)
        ref_log_probs = evaluate(learner, part, reference=True)[0]
        parts.append((log_probs, ref_log_probs, values, entropy))
        finished.append((rows, part))
    if part.trunk is not None:
        for rows, few in finished:
            tokens.keep_trunk(rows, few)
    back = order.argsort()
    joined = (torch.cat(columns)[back] for columns in zip(*parts, strict=True))
    return Rollout(tokens, tokens.response_mask.float(), *joined)


def evaluate(
    learner: Learner, tokens: TokenBatch, reference: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Log-probabilities of the response tokens, values, entropies, (batch, time); used everywhere.

    The reference has no values; entropies, which are only looked at, are those of a rollout.
    """
    wanted = not reference and not torch.is_grad_enabled()
    parts = read_responses(learner, tokens, reference, wanted)
    return tuple(None if part is None else tokens.spread(part) for part in parts)


@runtime.accelerated
def read_responses(
    learner: Learner, tokens: TokenBatch, reference: bool, entropy: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """`evaluate` at the responses' real tokens alone, (tokens,) each, row by row."""
    logits, values = learner.network(tokens, reference)
    logits = logits / learner.config.temperature
    log_probs = -cross_entropy(logits, tokens.response_ids[tokens.places], reduction="none")
    return log_probs, values, losses.entropy(logits) if entropy else None


def penalise(
    scores: torch.Tensor, log_probs: torch.Tensor, ref_log_probs: torch.Tensor, kl_coef: float
) -> torch.Tensor:
    """score - beta (log pi - log pi_ref), each (batch, time): every token pays for leaving the reference."""
    kl = losses.kl_estimate(log_probs, ref_log_probs, "k1")
    return scores.to(kl.device) - kl_coef * kl


# --- 4 advantages --------------------------------------------------------------------------------


def estimate_advantages(
    learner: Learner, paid: torch.Tensor, values: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns by GAE, each (batch, time); statistics are taken over all processes."""
    config = learner.config
    if config.whiten_rewards:
        paid = whiten(learner, paid, mask, shift_mean=False)
    advantages, returns = losses.gae(paid, values, mask, config.gamma, config.lam)
    if config.whiten_advantages:
        advantages = whiten(learner, advantages, mask)
    return advantages, returns


def whiten(learner: Learner, values, mask, shift_mean: bool = True) -> torch.Tensor:
    """`losses.whiten` with the statistics of all processes' rows, (batch, time)."""
    white = losses.whiten(_gather(learner, values), _gather(learner, mask), shift_mean)
    return white.chunk(learner.world)[learner.rank][:, : values.shape[1]]


def _gather(learner: Learner, values: torch.Tensor) -> torch.Tensor:
    """The rows of all processes, (batch, max_new_tokens)."""
    missing = learner.config.max_new_tokens - values.shape[1]
    return learner.accelerator.gather(pad(values, (0, missing)))


# --- 5 update ------------------------------------------------------------------------------------


def update(
    learner: Learner,
    rollout: Rollout,
    advantages: torch.Tensor,
    returns: torch.Tensor | None,
    step: int,
) -> dict[str, float]:
    """Epochs over shuffled minibatches; the means of what `backward` returns, and grad_norm's.

    Without returns no value function learns.  ratio_error is the first minibatch's alone: nothing has
    changed yet, so it is 0 up to rounding.
    """
    config, optimizer, accelerator = learner.config, learner.optimizer, learner.accelerator
    share = training.rate_share(step, config.steps, config.warmup_steps, config.decay)
    training.set_rates(optimizer, share)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    rows = []
    for epoch in range(config.epochs):
        for number, index in enumerate(
            minibatches(config, step, epoch, learner.rank, learner.world)
        ):
            part = rollout.rows(index)
            expected = None if returns is None else returns[index]
            means = backward(learner, part, advantages[index], expected)
            norm = accelerator.clip_grad_norm_(trained, config.max_grad_norm)
            rows.append({**means, "grad_norm": float(norm)})
            training.check_finite(
                rows[-1],
                f"step {step + 1}, epoch {epoch}, minibatch {number}",
                "Lower learning_rate or max_grad_norm, or look at the rewards of this step.",
            )
            optimizer.step()
            optimizer.zero_grad()
    return {**pd.DataFrame(rows).mean().to_dict(), "ratio_error": rows[0]["ratio_error"]}


def minibatches(
    config: PPOConfig, step: int, epoch: int, rank: int = 0, world: int = 1
) -> torch.Tensor:
    """Rows of this process in each minibatch, (minibatches, rows): one row of each of its strata."""
    size = config.minibatch_size
    generator = training.generator_for(config.seed, "mix", step, epoch)
    noise = torch.rand(size, config.batch // size, generator=generator)
    order = noise.argsort(1).chunk(world)[rank]
    return (order + torch.arange(len(order))[:, None] * order.shape[1]).T


def backward(
    learner: Learner,
    rollout: Rollout,
    advantages: torch.Tensor,
    returns: torch.Tensor | None,
) -> dict[str, float]:
    """Gradients of one minibatch's loss, `forward_rows` rows at a time; its means over all processes."""
    attempt = partial(_backward, learner, rollout, advantages, returns)
    return learner.at_once.run(attempt)


def _backward(learner: Learner, rollout, advantages, returns, rows_at_once: int) -> dict:
    config, accelerator = learner.config, learner.accelerator
    learner.optimizer.zero_grad()  # of an attempt for which memory was too small
    # all tokens of the minibatch, so that the parts add up to the loss of the whole
    count = accelerator.reduce(rollout.mask.sum(), "sum").clamp(min=1)
    sums: dict[str, torch.Tensor] = {}
    parts_of_mine = torch.arange(len(rollout.mask)).split(rows_at_once)
    for rows in processes.passes(parts_of_mine, learner.network, accelerator):
        few = rollout.rows(rows)
        log_probs, values, _ = evaluate(learner, few.tokens)
        expected = None if returns is None else returns[rows]
        loss, parts = ppo_loss(log_probs, values, few, advantages[rows], expected, config, count)
        accelerator.backward(loss * learner.world)  # DDP averages over processes; we want the sum
        sums = {name: sums.get(name, 0.0) + value.detach() for name, value in parts.items()}
    total = accelerator.reduce(torch.stack([*sums.values()]), "sum")
    return dict(zip(sums, total.tolist(), strict=True))


def ppo_loss(
    log_probs: torch.Tensor,
    values: torch.Tensor,
    old: Rollout,
    advantages: torch.Tensor,
    returns: torch.Tensor | None,
    config: PPOConfig,
    count: torch.Tensor,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Clipped policy loss + clipped value loss, and the parts, each a scalar; no value loss without returns.

    Args:
        log_probs, values: of the network as it is now, (batch, time).
        old: the same as it was when the responses were drawn.
        advantages, returns: (batch, time).
        count: tokens to divide by.
    """
    mask = old.mask
    policy = losses.policy_loss(log_probs, old.log_probs, advantages, mask, config.clip, count)
    parts = {
        "policy_loss": policy,
        "clip_fraction": losses.clip_fraction(log_probs, old.log_probs, mask, config.clip, count),
        "ratio_error": losses.masked_mean((log_probs - old.log_probs).abs(), mask, count),
    }
    if returns is None:  # DDP wants a gradient, if only of 0, for everything that trains
        return policy + 0 * losses.masked_mean(values, mask, count), parts
    value = losses.value_loss(values, old.values, returns, mask, config.value_clip, count)
    return policy + value, parts | {"value_loss": value}


# --- what must hold before training, and what is logged -----------------------------------------


def before_update(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    config: PPOConfig,
) -> dict[str, float]:
    """What must be 0, up to rounding, before training, over the tokens of a first rollout.

    ratio_error: largest |ratio - 1|, the rollout evaluated again in the update's shuffled minibatches by
    the forward pass that trains.  kl: largest |log pi - log pi_ref| of that pass.  sampler_error, nats a
    token: |mean of log p drawn with - log pi|.  Filters (top-k, top-p) raise it; ratio and kl compare
    training passes with each other and cannot see them.  A mean, because a sampler in bfloat16 is off by
    up to 0.3 at single tokens, in both directions.
    """
    learner = make_learner(policy, tokenizer, config)
    samples, error = sample(learner, prompts, 0), 0.0
    with models.fast_float32(learner.network), torch.no_grad():
        rollout = roll_out(learner, samples)
        for index in minibatches(config, 0, 0, learner.rank, learner.world):
            part = rollout.rows(index)
            log_probs = evaluate(learner, part.tokens)[0]
            ratio = (log_probs - part.log_probs).masked_fill(part.mask == 0, 0).exp()
            error = max(error, (ratio - 1).abs().max().item())
    mask, drawn = rollout.mask, samples.padded("log_probs")[0].to(rollout.log_probs)
    kl = losses.kl_estimate(rollout.log_probs, rollout.ref_log_probs, "k1")
    return {
        "ratio_error": error,
        "kl": kl.masked_fill(mask == 0, 0).abs().max().item(),
        "sampler_error": losses.masked_mean(drawn - rollout.log_probs, mask).abs().item(),
    }


def describe_step(
    learner: Learner,
    samples: generation.Samples,
    components: dict[str, np.ndarray],
    rollout: Rollout,
    returns: torch.Tensor | None,
) -> dict[str, float]:
    """What one step saw, over all processes: reward and reward/<component> (means of row sums), kl (k1)
    and kl_k3 (nats a sequence, before the update), entropy (nats a token), length, finished,
    explained_variance (where there are returns), and tokens_* by stage.

    A row of the history has these and step (from 1), kl_coef, the means of `update`,
    learning_rate, seconds_* by stage and, at times, held_out_reward.
    """
    mask = rollout.mask
    pair = (rollout.log_probs, rollout.ref_log_probs)
    sums = {
        "kl": losses.kl_estimate(*pair, "k1"),
        "kl_k3": losses.kl_estimate(*pair, "k3"),
        "entropy": rollout.entropy,
        "length": torch.ones_like(mask),
    }
    table = {name: x.masked_fill(mask == 0, 0).sum(1).tolist() for name, x in sums.items()}
    table["reward"] = sum(components.values())
    table["finished"] = samples.finished
    for name, values in components.items():
        table[f"reward/{name}"] = values
    table["prompt"] = [len(ids) for ids in samples.prompt_ids]
    episodes = pd.DataFrame(gather_object(pd.DataFrame(table).to_dict("records")))
    row = episodes.drop(columns="prompt").mean().to_dict()
    row["entropy"] /= max(row["length"], 1e-9)
    if returns is not None:
        gathered = [_gather(learner, x) for x in (rollout.values, returns, mask)]
        row["explained_variance"] = losses.explained_variance(*gathered)
    response, whole = episodes["length"].sum(), episodes[["length", "prompt"]].sum().sum()
    tokens = (response, response, whole, whole * learner.config.epochs)
    for stage, count in zip(STAGES, tokens, strict=True):
        row[f"tokens_{stage}"] = count
    return {name: float(value) for name, value in row.items()}


# --- around the loop -----------------------------------------------------------------------------


class Loop:
    """What a training keeps besides the network: history, best weights, beta, stops, checkpoints."""

    def __init__(self, learner, prompts, reward_fn, held_out=(), folder=None, what="PPO"):
        self.what = what
        self.learner = learner
        self.config = learner.config
        self.reward_fn = reward_fn
        self.held_out = list(held_out)
        self.folder = None
        self.kl_coef = self.config.kl_coef
        self.stopped = None
        self.held_out_start = None
        self.best = training.Best()
        self.clock = training.Clock()
        check_prompts(prompts, self.config)
        if folder:
            start = [p.flatten()[:4].tolist() for p in learner.weights().values()]
            key = (asdict(self.config), list(prompts), self.held_out, start)
            self.folder = training.claim_folder(folder, what, *key)
            learner.accelerator.wait_for_everyone()

    def start(self) -> None:
        """Continue from the folder's checkpoint where there is one; else measure the start."""
        checkpoint = None
        if self.folder:
            checkpoint = training.load_checkpoint(self.folder, self.learner.policy.device)
        rows = self._restore(checkpoint) if checkpoint else []
        self.history = training.History(self.what, self.folder, asdict(self.config), rows)
        if self.held_out and not checkpoint:
            runtime.set_seed(training.seed_for(self.config.seed, "start"))
            self.held_out_start = self._evaluate_held_out(0)

    def steps(self):
        """The steps that are left, until one stops the run."""
        with runtime.progress(total=self.config.steps, label=self.what, unit="step") as bar:
            bar.update(len(self.history))
            while len(self.history) < self.config.steps and self.stopped is None:
                step = len(self.history)
                # for rewards that draw random numbers
                runtime.set_seed(training.seed_for(self.config.seed, "reward", step))
                self.clock = training.Clock()
                yield step
                bar.update(1)

    def finish_step(self, step, samples, components, rollout, returns, means) -> None:
        """Held-out reward, KL controller, stops; the row of history; a checkpoint."""
        config, learner, number = self.config, self.learner, step + 1
        row = {"step": number} | describe_step(learner, samples, components, rollout, returns)
        row |= {"kl_coef": self.kl_coef, **means}
        row["learning_rate"] = learner.optimizer.param_groups[0]["lr"]
        row |= {f"seconds_{stage}": self.clock.seconds[stage] for stage in STAGES}
        if config.kl_target is not None:
            size = (config.kl_target, config.batch, config.kl_horizon)
            self.kl_coef = adapt_kl_coef(self.kl_coef, row["kl"], *size)
        self.stopped = why_stop(config, [*self.history.rows, row])
        ends = self.stopped is not None or number == config.steps
        if self.held_out and (ends or number % config.eval_every == 0):
            row["held_out_reward"] = self._evaluate_held_out(number)
        self.history.add(row)
        if self.folder and (ends or number % config.checkpoint_every == 0):
            self._save(number)

    def _evaluate_held_out(self, step: int) -> float:
        greedy = self.config.greedy_held_out
        samples = draw(self.learner, self.held_out, 1, "held out", greedy=greedy)
        totals = []
        if len(samples):
            scores, _ = rewards.place_rewards(self.reward_fn(samples), samples)
            totals = scores.sum(1).tolist()
        reward = float(np.mean(gather_object(totals)))
        self.best.offer(step, reward, self.learner.weights())
        return reward

    def _save(self, step: int) -> None:
        state = {
            "kl_coef": self.kl_coef,
            "stopped": self.stopped,
            "held_out_start": self.held_out_start,
            "best_step": self.best.step,
            "best_value": self.best.value,
            "history": self.history.rows,
        }
        tensors = {"weights": self.learner.weights()}
        if self.best.step is not None:
            tensors["best"] = self.best.weights
        if self.learner.accelerator.is_main_process:
            optimizer = self.learner.optimizer.state_dict()
            training.save_checkpoint(self.folder, step, state, tensors, optimizer)
        self.learner.accelerator.wait_for_everyone()

    def _restore(self, checkpoint: training.Checkpoint) -> list[dict]:
        state = checkpoint.state
        training.copy_weights(checkpoint.tensors["weights"], self.learner.weights())
        self.learner.optimizer.load_state_dict(checkpoint.optimizer)
        self.kl_coef, self.stopped = state["kl_coef"], state["stopped"]
        self.held_out_start = state["held_out_start"]
        if state["best_step"] is not None:
            best = checkpoint.tensors["best"]
            self.best = training.Best(state["best_step"], state["best_value"], best)
        return state["history"]

    def close(self, values: bool = True) -> pd.DataFrame:
        """Put the best weights back, where held-out rewards chose them, and return the history.

        `values`: the value function that was trained stays with the policy.
        """
        self.history.close()
        history = self.history.frame()
        best = len(history)
        if self.best.step is not None:
            training.copy_weights(self.best.weights, self.learner.weights())
            best = self.best.step
        shared = self.learner.shared
        vars(self.learner.policy).pop("value_function", None)
        if values:
            trained = ValueFunction(shared.value_head, shared.value_model)
            self.learner.policy.value_function = trained
        distribution = "softmax(logits / temperature)"
        if self.config.top_k > 0 or self.config.top_p < 1:
            distribution += ", unfiltered, unlike sampling"
        history.attrs = {
            "stopped": self.stopped,
            "best_step": best,
            "held_out_start": self.held_out_start,
            "ratio_distribution": distribution,
        }
        return history


def why_stop(config: PPOConfig, rows: Sequence[dict]) -> str | None:
    """Why a run with this history stops now, or None."""
    step, kl = rows[-1]["step"], rows[-1]["kl_k3"]
    above = sum(row["kl_k3"] > config.stop_kl for row in rows)
    if kl > config.stop_kl and above >= config.stop_kl_times:
        return f"step {step}: KL {kl:.3g} is above stop_kl {config.stop_kl:g}"
    return None
