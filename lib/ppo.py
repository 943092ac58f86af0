"""PPO in which any token may carry a reward.

`rewards` is a (batch, time) tensor: a reward for the whole response is the case where only the last
token's is not zero.  One step: sample, score, advantage, update, log.  Per-token reward:
R_t - beta (log pi(a_t) - log pi_ref(a_t)), with the k1 estimate of KL as penalty (Ziegler et al. 2019;
fine-grained RLHF, section 2).  Log-probabilities of a rollout come from the same forward pass that
trains, dropout is off throughout, and by default tokens are sampled from the distribution that the
ratios use: softmax(logits / temperature).  With top-k or top-p the ratios still use the unfiltered one.

Random numbers depend on (seed, step) only, so a resumed run needs no generator state, and minibatches
take one row from each of `minibatch_size` strata of the batch, so that any number of processes makes
the same ones.  Simplified: data parallel only (`accelerate launch`: one process or DDP).
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.nn.functional import cross_entropy, pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib import generation, losses, models, runtime

RewardFunction = Callable[[generation.Samples], object]
STAGES = ("sample", "score", "forward", "update")
STATE = ("kl_coef", "history", "stopped", "best", "held_out_start")  # in a checkpoint, with weights


@dataclass(frozen=True)
class PPOConfig:
    """Settings of `train_ppo` (and, where they apply, of `train_rloo`)."""

    steps: int = 20
    prompts_per_step: int = 32
    samples_per_prompt: int = 1
    max_new_tokens: int = 20
    temperature: float = 1.0
    top_k: int = 0  # 0 and 1.0 below: no filter, so sampling matches the ratios' distribution
    top_p: float = 1.0
    train: str = "top"  # "top", "lora" or "all": see models.set_trainable
    layers: int = 2
    lora_rank: int = 8
    epochs: int = 4  # passes over each rollout
    minibatch_size: int = 8  # rows of an optimizer step, over all processes
    forward_rows: int = 16  # rows in memory at once; bounds the logits kept
    learning_rate: float = 1e-4
    value_learning_rate: float = 1e-3
    warmup_steps: int = 0  # the learning rate rises linearly over these steps, then stays
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    value_clip: float = 0.2
    entropy_coef: float = 0.0
    kl_coef: float = 0.05  # beta
    kl_target: float | None = None  # nats a sequence; None keeps beta fixed
    kl_horizon: int = 10_000
    whiten_rewards: bool = False  # divide rewards by their deviation, keep their mean
    whiten_advantages: bool = True
    value_pretrain_steps: int = 0  # first steps in which only the value function learns
    max_grad_norm: float = 1.0
    stop_kl: float = math.inf  # nats a sequence (k3)
    stop_entropy: float = 0.0  # nats a token
    eval_every: int = 10
    checkpoint_every: int = 10
    seed: int = 0

    def __post_init__(self):
        whole = "steps prompts_per_step samples_per_prompt epochs minibatch_size forward_rows"
        above = (
            f"{whole} temperature learning_rate value_learning_rate clip value_clip max_grad_norm"
        )
        for name in f"{above} kl_horizon eval_every checkpoint_every".split():
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be above 0.")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must lie in [0, 1].")
        other = "kl_coef entropy_coef warmup_steps value_pretrain_steps stop_entropy"
        for name in other.split():
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must not be negative.")
        if self.batch % self.minibatch_size:
            raise ValueError(
                f"minibatch_size {self.minibatch_size} does not divide prompts_per_step x "
                f"samples_per_prompt = {self.batch}; choose one that does."
            )

    @property
    def batch(self) -> int:
        """Episodes of one step."""
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def decoding(self) -> dict:
        """Arguments of `generation.sample`."""
        names = ("max_new_tokens", "temperature", "top_k", "top_p")
        return {name: getattr(self, name) for name in names}


# --- rewards -------------------------------------------------------------------------------------


def place_rewards(
    given: object, samples: generation.Samples
) -> tuple[torch.Tensor, dict[str, np.ndarray]]:
    """What a reward function returned, as per-token rewards (batch, time) and each component's row sums.

    Given: one number a row (paid at its last real token), one array a row (a number for each response
    token), or a dict of named components, each one of these; everything is added up.  Raises
    ValueError for missing rows, arrays of another length than the response, and non-finite rewards.
    """
    parts = given if isinstance(given, dict) else {"reward": given}
    lengths = [len(ids) for ids in samples.response_ids]
    total, sums = torch.zeros(len(lengths), max(lengths)), {}
    for name, rows in parts.items():
        if len(rows) != len(lengths):
            raise ValueError(f"reward {name!r} has {len(rows)} rows for {len(lengths)} samples.")
        sums[name] = np.zeros(len(lengths))
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            row = np.asarray(row, dtype=np.float64)
            if row.shape not in ((), (length,)) or not np.isfinite(row).all():
                raise ValueError(
                    f"reward {name!r} of sample {i} is {row}; give one finite number, or one for each "
                    f"of its {length} response tokens."
                )
            where = slice(length - 1, length) if row.shape == () else slice(0, length)
            total[i, where] += torch.from_numpy(np.atleast_1d(row)).float()
            sums[name][i] = row.sum()
    return total, sums


def segment_rewards(ends: Sequence[int], values: Sequence[float], length: int) -> np.ndarray:
    """(length,) with each segment's reward at its last token; rewards that meet there are added.

    Raises ValueError for an end outside the response.
    """
    if any(not 0 <= end < length for end in ends):
        raise ValueError(
            f"segment ends {list(ends)} do not all lie in a response of {length} tokens."
        )
    row = np.zeros(length)
    np.add.at(row, np.asarray(ends, dtype=int), np.asarray(values, dtype=float))
    return row


def shuffled(reward_fn: RewardFunction) -> RewardFunction:
    """The control: whole-sequence totals of `reward_fn`, handed to the wrong rows of the batch.

    The same rewards are paid, but they say nothing about the response (drawn from numpy's generator,
    which `train_ppo` seeds at every step).
    """

    def control(samples: generation.Samples) -> dict[str, np.ndarray]:
        _, sums = place_rewards(reward_fn(samples), samples)
        order = np.random.permutation(len(samples))
        return {name: values[order] for name, values in sums.items()}

    return control


def adapt_kl_coef(kl_coef: float, kl: float, target: float, episodes: int, horizon: int) -> float:
    """beta (1 + clip(KL / target - 1, -0.2, 0.2) episodes / horizon)   (Ziegler et al. 2019, section 2.2).

    From 0.2, 128 steps of 64 episodes at a KL far below target end at 0.16976, as in RewardLM's log.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * episodes / horizon)


# --- training ------------------------------------------------------------------------------------


def train_ppo(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    reward_fn: RewardFunction,
    config: PPOConfig | None = None,
    *,
    held_out: Sequence[str] = (),
    value_model: PreTrainedModel | None = None,
    folder: Path | str | None = None,
    accelerator: Accelerator | None = None,
) -> pd.DataFrame:
    """Train `policy` in place; return its history, one row a step (columns: `PPO.log`).

    `reward_fn(samples)` returns what `place_rewards` takes.  With `held_out` prompts the policy ends
    with the weights of the best mean reward on them, else with the last.  With `folder`, a killed run
    continues from its last checkpoint.  `history.attrs`: stopped (the reason, or None), best_step,
    held_out_start, ratio_distribution.  Raises ValueError for settings that do not fit together, and
    FloatingPointError naming step and minibatch where a loss or gradient is not finite.
    """
    run = PPO(
        policy, tokenizer, prompts, reward_fn, config or PPOConfig(), value_model, accelerator
    )
    run.open(folder, held_out)
    bar = runtime.progress(total=run.config.steps, label="PPO", unit="step")
    bar.update(len(run.history))
    while len(run.history) < run.config.steps and run.stopped is None:
        run.finish_step(run.step(len(run.history)))
        bar.update(1)
    bar.close()
    return run.close()


def before_update(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    config: PPOConfig,
) -> dict[str, float]:
    """Largest |ratio - 1| and |KL| over the tokens of a first rollout: both 0, up to rounding.

    The rollout is evaluated again in the update's shuffled minibatches, by the forward pass that trains.
    """
    run = PPO(policy, tokenizer, prompts, lambda samples: [0.0] * len(samples), config)
    samples = run.sample(0)
    rollout, error = run.roll_out(samples, run.score(samples)[0]), 0.0
    for part in map(rollout.rows, run.minibatches(0, 0)):
        with torch.no_grad():
            log_probs = run.evaluate(part.tokens)[0]
        ratio = (log_probs - part.log_probs).masked_fill(part.mask == 0, 0).exp()
        error = max(error, (ratio - 1).abs().max().item())
    kl = losses.kl_estimate(rollout.log_probs, rollout.ref_log_probs, "k1")
    return {"ratio_error": error, "kl": kl.masked_fill(rollout.mask == 0, 0).abs().max().item()}


@dataclass
class Rollout:
    """One process's episodes of a step; every tensor is (batch, time)."""

    tokens: models.TokenBatch
    mask: torch.Tensor
    rewards: torch.Tensor  # as scored, without the KL penalty
    log_probs: torch.Tensor
    ref_log_probs: torch.Tensor
    values: torch.Tensor
    entropy: torch.Tensor
    advantages: torch.Tensor | None = None
    returns: torch.Tensor | None = None

    def rows(self, index) -> Rollout:
        """The same, for some of the rows."""
        parts = {k: v[index] for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return Rollout(tokens=self.tokens.rows(index), **parts)


class PPO:
    """State of one run: network, optimizer, KL coefficient, history.  `train_ppo` drives it."""

    def __init__(
        self, policy, tokenizer, prompts, reward_fn, config, value_model=None, accelerator=None
    ):
        self.policy, self.tokenizer, self.prompts = policy, tokenizer, list(prompts)
        self.reward_fn, self.config = reward_fn, config
        self.accelerator = accelerator or Accelerator(cpu=policy.device.type == "cpu")
        self._check_sizes()
        frozen = models.set_trainable(
            policy, config.train, layers=config.layers, lora_rank=config.lora_rank
        )
        self.shared = models.SharedTrunkPolicy(policy, frozen, value_model)
        rates = (config.learning_rate, config.value_learning_rate)
        groups = zip(self.shared.parameter_groups(), rates, strict=True)
        optimizer = torch.optim.Adam(
            [{"params": p, "lr": lr, "peak": lr} for p, lr in groups], fused=True
        )
        self.network, self.optimizer = self.accelerator.prepare(self.shared, optimizer)
        self.kl_coef, self.history, self.stopped = config.kl_coef, [], None
        self.folder, self.held_out, self.held_out_start, self.best = None, [], None, None

    def _check_sizes(self) -> None:
        world, config = self.accelerator.num_processes, self.config
        if config.minibatch_size % world or config.prompts_per_step % world:
            raise ValueError(
                f"{world} processes do not divide minibatch_size {config.minibatch_size} and "
                f"prompts_per_step {config.prompts_per_step}; choose multiples of {world}."
            )
        if len(self.prompts) < config.prompts_per_step:
            raise ValueError(
                f"{len(self.prompts)} prompts are fewer than prompts_per_step "
                f"{config.prompts_per_step}; give more prompts or lower it."
            )

    def step(self, step: int) -> dict[str, float]:
        """One step of PPO: sample, score, advantage, update, log.  Returns its row of the history."""
        runtime.set_seed(self._seed("reward", step))  # for rewards that draw random numbers
        clock = [time.perf_counter()]
        # 1 sample
        samples = self.sample(step)
        clock.append(time.perf_counter())
        # 2 score
        rewards, components = self.score(samples)
        clock.append(time.perf_counter())
        # 3 advantage: the training forward over the rollout, KL penalty, GAE
        rollout = self.roll_out(samples, rewards)
        self.add_advantages(rollout)
        clock.append(time.perf_counter())
        # 4 update
        update = self.update(rollout, step)
        clock.append(time.perf_counter())
        # 5 log
        return self.log(step, samples, components, rollout, update, np.diff(clock))

    def sample(self, step: int) -> generation.Samples:
        """This process's episodes; prompts go round in a new random order each time through."""
        count, each = len(self.prompts), self.config.prompts_per_step
        places = [divmod(p, count) for p in range(step * each, (step + 1) * each)]
        orders = {
            r: torch.randperm(count, generator=self._generator("order", r)) for r, _ in places
        }
        chosen = [self.prompts[orders[lap][place]] for lap, place in places]
        return self._sample(chosen, self.config.samples_per_prompt, "sample", step)

    def _sample(self, prompts, n: int, *seed) -> generation.Samples:
        """This process's share of the samples for `prompts`; the draws do not depend on the shares."""
        config, rank, world = (
            self.config,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        share = math.ceil(len(prompts) / world)
        noise = torch.rand(
            share * world * n, config.max_new_tokens, generator=self._generator(*seed)
        )
        mine = prompts[rank * share : (rank + 1) * share]
        noise = noise[rank * share * n :][: len(mine) * n]
        return generation.sample(
            self.policy, self.tokenizer, mine, n=n, noise=noise, **config.decoding
        )

    def score(self, samples: generation.Samples) -> tuple[torch.Tensor, dict[str, np.ndarray]]:
        """Per-token rewards (batch, time) and the components' sums; see `place_rewards`."""
        return place_rewards(self.reward_fn(samples), samples)

    @torch.no_grad()
    def roll_out(self, samples: generation.Samples, rewards: torch.Tensor) -> Rollout:
        """Log-probabilities of policy and reference, values and entropies, a few rows at a time.

        Logits are dropped after each few rows; the trunk's hidden states are kept for the update.
        """
        side = "right" if self.policy.config.is_encoder_decoder else "left"
        fill, device = self.tokenizer.pad_token_id, self.policy.device
        padded = generation.pad_rows(samples.prompt_ids, fill, side)
        padded += generation.pad_rows(samples.response_ids, fill, "right")
        prompt_ids, prompt_mask, response_ids, mask = (x.to(device) for x in padded)
        tokens = models.TokenBatch(prompt_ids, prompt_mask, response_ids)
        parts = []
        for rows in torch.arange(len(samples)).split(self.config.forward_rows):
            part = tokens.rows(rows)
            log_probs, values, entropy = self.evaluate(part)
            ref_log_probs = self.evaluate(part, reference=True)[0]
            parts.append((log_probs, ref_log_probs, values, entropy, part.trunk))
        *joined, trunks = zip(*parts, strict=True)
        tokens.trunk = None if trunks[0] is None else torch.cat(trunks)
        return Rollout(tokens, mask.float(), rewards.to(device), *map(torch.cat, joined))

    def evaluate(
        self, tokens: models.TokenBatch, reference: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Log-probabilities of the response tokens, values, entropies, (batch, time); used everywhere."""
        logits, values = self.network(tokens, reference)
        if self.config.temperature != 1:
            logits = logits / self.config.temperature
        log_probs = -cross_entropy(
            logits.flatten(0, 1), tokens.response_ids.flatten(), reduction="none"
        )
        wanted = not reference and (self.config.entropy_coef > 0 or not torch.is_grad_enabled())
        log_probs = log_probs.view_as(values)
        return log_probs, values, losses.entropy(logits) if wanted else None

    def add_advantages(self, rollout: Rollout) -> None:
        """Rewards less the KL penalty, then GAE; statistics are taken over all processes."""
        config, mask = self.config, rollout.mask
        kl = losses.kl_estimate(rollout.log_probs, rollout.ref_log_probs, "k1")
        rewards = rollout.rewards - self.kl_coef * kl
        if config.whiten_rewards:
            rewards = self._whiten(rewards, mask, shift_mean=False)
        advantages, returns = losses.gae(rewards, rollout.values, mask, config.gamma, config.lam)
        rollout.advantages = (
            self._whiten(advantages, mask) if config.whiten_advantages else advantages
        )
        rollout.returns = returns

    def update(self, rollout: Rollout, step: int) -> dict[str, float]:
        """Epochs over shuffled minibatches; returns mean losses and what the first minibatch tells."""
        warm = min(1.0, (step + 1) / max(1, self.config.warmup_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * warm
        learns = float(step >= self.config.value_pretrain_steps)
        rows = []
        for epoch in range(self.config.epochs):
            for number, index in enumerate(self.minibatches(step, epoch)):
                stats = self._accumulate(rollout.rows(index), learns)
                trained = [p for group in self.optimizer.param_groups for p in group["params"]]
                norm = self.accelerator.clip_grad_norm_(trained, self.config.max_grad_norm)
                rows.append({**stats, "grad_norm": float(norm)})
                if not all(map(math.isfinite, rows[-1].values())):
                    raise FloatingPointError(
                        f"step {step}, epoch {epoch}, minibatch {number}: not finite: {rows[-1]}. "
                        "Lower learning_rate or max_grad_norm, or look at the rewards of this step."
                    )
                self.optimizer.step()
                self.optimizer.zero_grad()
        return {**pd.DataFrame(rows).mean().to_dict(), "ratio_error": rows[0]["ratio_error"]}

    def minibatches(self, step: int, epoch: int) -> torch.Tensor:
        """Row numbers of this process's part of each minibatch, (minibatches, rows).

        The batch is cut into `minibatch_size` strata; each minibatch takes one row of each, so it does
        not depend on how many processes share the strata.
        """
        size, world = self.config.minibatch_size, self.accelerator.num_processes
        noise = torch.rand(
            size, self.config.batch // size, generator=self._generator("mix", step, epoch)
        )
        order = noise.argsort(1).chunk(world)[self.accelerator.process_index]
        return (order + torch.arange(len(order))[:, None] * order.shape[1]).T

    def _accumulate(self, part: Rollout, learns: float) -> dict[str, float]:
        """Gradients of one minibatch's loss, `forward_rows` rows at a time; its loss over all processes."""
        config, world = self.config, self.accelerator.num_processes
        count = self.accelerator.reduce(part.mask.sum(), "sum")
        sums = torch.zeros(4, device=part.mask.device)
        for rows in torch.arange(len(part.mask)).split(config.forward_rows):
            few = part.rows(rows)
            log_probs, values, entropy = self.evaluate(few.tokens)
            policy = losses.policy_loss(
                log_probs, few.log_probs, few.advantages, few.mask, config.clip, count
            )
            value = losses.value_loss(
                values, few.values, few.returns, few.mask, config.value_clip, count
            )
            loss = learns * policy + value
            if entropy is not None:
                loss = loss - learns * config.entropy_coef * losses.masked_mean(
                    entropy, few.mask, count
                )
            self.accelerator.backward(loss * world)  # DDP averages over processes; we want the sum
            change = (log_probs.detach() - few.log_probs).exp() - 1
            clipped = (change.abs() > config.clip).float()
            means = [losses.masked_mean(x, few.mask, count) for x in (clipped, change.abs())]
            sums += torch.stack([policy.detach(), value.detach(), *means])
        names = ("policy_loss", "value_loss", "clip_fraction", "ratio_error")
        return dict(zip(names, self.accelerator.reduce(sums, "sum").tolist(), strict=True))

    def log(self, step, samples, components, rollout, update, seconds) -> dict[str, float]:
        """One row: step (from 1), stage, reward and reward/<component> (means of row sums), kl (k1) and
        kl_k3 (nats a sequence, before the update), entropy (nats a token), length, finished, kl_coef,
        explained_variance, update's means, learning_rate, tokens_* and seconds_* by stage.
        """
        mask = rollout.mask
        kls = {
            name: losses.kl_estimate(rollout.log_probs, rollout.ref_log_probs, kind)
            for name, kind in (("kl", "k1"), ("kl_k3", "k3"))
        }
        sums = {**kls, "entropy": rollout.entropy, "length": torch.ones_like(mask)}
        table = {k: v.masked_fill(mask == 0, 0).sum(1).tolist() for k, v in sums.items()}
        named = {f"reward/{name}": values for name, values in components.items()}
        table |= {"reward": sum(components.values()), **named, "finished": samples.finished}
        table["prompt_tokens"] = list(map(len, samples.prompt_ids))
        episodes = pd.DataFrame(gather_object(pd.DataFrame(table).to_dict("records")))
        row = episodes.drop(columns=["prompt_tokens"]).mean().to_dict()
        row["entropy"] = row["entropy"] / row["length"]
        response, prompt = int(episodes["length"].sum()), int(episodes["prompt_tokens"].sum())
        tokens = (response, response, prompt + response, self.config.epochs * (prompt + response))
        gathered = [self._gather(x) for x in (rollout.values, rollout.returns, mask)]
        row |= {"kl_coef": self.kl_coef, "explained_variance": losses.explained_variance(*gathered)}
        row |= {**update, "learning_rate": self.optimizer.param_groups[0]["lr"]}
        row |= {f"tokens_{s}": n for s, n in zip(STAGES, tokens, strict=True)}
        row |= {f"seconds_{s}": t for s, t in zip(STAGES, seconds, strict=True)}
        stage = "value" if step < self.config.value_pretrain_steps else "ppo"
        return {"step": step + 1, "stage": stage, **{k: float(v) for k, v in row.items()}}

    def finish_step(self, row: dict[str, float]) -> None:
        """Keep the row; held-out reward, KL controller, stops, checkpoint."""
        config, step = self.config, row["step"]
        self.history.append(row)
        if config.kl_target is not None:
            self.kl_coef = adapt_kl_coef(
                self.kl_coef, row["kl"], config.kl_target, config.batch, config.kl_horizon
            )
        if row["kl_k3"] > config.stop_kl:
            self.stopped = f"step {step}: KL {row['kl_k3']:.3g} is above stop_kl {config.stop_kl:g}"
        if row["entropy"] < config.stop_entropy:
            self.stopped = f"step {step}: entropy {row['entropy']:.3g} is below stop_entropy"
        ends = self.stopped is not None or step == config.steps
        if self.held_out and (ends or step % config.eval_every == 0):
            row["held_out_reward"] = self._evaluate_held_out(step)
        if self.folder and (ends or step % config.checkpoint_every == 0):
            self._save()

    def _evaluate_held_out(self, step: int) -> float:
        samples = self._sample(self.held_out, 1, "held out")
        totals = [] if not len(samples) else self.score(samples)[0].sum(1).tolist()
        reward = float(np.mean(gather_object(totals)))
        if self.best is None or reward > self.best["reward"]:
            weights = {n: p.detach().clone() for n, p in self._weights().items()}
            self.best = {"step": step, "reward": reward, "weights": weights}
        return reward

    # --- checkpoints

    def open(self, folder: Path | str | None, held_out: Sequence[str]) -> None:
        """Continue from the folder's checkpoint where there is one; else measure the start."""
        self.held_out = list(held_out)
        if folder:
            start = [p.flatten()[:4].tolist() for p in self._weights().values()]
            key = (asdict(self.config), self.prompts, self.held_out, start)
            self.folder = runtime.claim_folder(folder, "PPO", *key)
            self.accelerator.wait_for_everyone()
            if (self.folder / "checkpoint.pt").exists():
                return self._load()
        if self.held_out:
            runtime.set_seed(self._seed("start"))
            self.held_out_start = self._evaluate_held_out(0)

    def close(self) -> pd.DataFrame:
        """Put the best weights back, where held-out rewards chose them, and return the history."""
        if self.best is not None:
            self._set_weights(self.best["weights"])
        history = pd.DataFrame(self.history)
        best = self.best["step"] if self.best else len(history)
        filtered = self.config.top_k > 0 or self.config.top_p < 1
        where = "softmax(logits / temperature)" + (
            ", unfiltered, unlike sampling" if filtered else ""
        )
        history.attrs.update(
            stopped=self.stopped, best_step=best, held_out_start=self.held_out_start,
            ratio_distribution=where,
        )  # fmt: skip
        return history

    def _weights(self) -> dict[str, torch.Tensor]:
        return {n: p for n, p in self.shared.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def _set_weights(self, weights: dict[str, torch.Tensor]) -> None:
        for name, parameter in self._weights().items():
            parameter.copy_(weights[name])

    def _save(self) -> None:
        state = {name: getattr(self, name) for name in STATE}
        state |= {"weights": self._weights(), "optimizer": self.optimizer.state_dict()}
        if self.accelerator.is_main_process:
            buffer = io.BytesIO()
            torch.save(state, buffer)
            runtime.write_atomic(self.folder / "checkpoint.pt", buffer.getvalue())
        self.accelerator.wait_for_everyone()

    def _load(self) -> None:
        path, device = self.folder / "checkpoint.pt", self.policy.device
        state = torch.load(path, map_location=device, weights_only=True)
        self._set_weights(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in STATE:
            setattr(self, name, state[name])

    # --- processes and random numbers

    def _seed(self, *key) -> int:
        return int(runtime.content_hash(self.config.seed, *key)[:8], 16)

    def _generator(self, *key) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed(*key))

    def _gather(self, values: torch.Tensor) -> torch.Tensor:
        """The rows of all processes, (batch, max_new_tokens)."""
        missing = self.config.max_new_tokens - values.shape[1]
        return self.accelerator.gather(pad(values, (0, missing)))

    def _whiten(self, values, mask, shift_mean: bool = True) -> torch.Tensor:
        white = losses.whiten(self._gather(values), self._gather(mask), shift_mean)
        return white.chunk(self.accelerator.num_processes)[self.accelerator.process_index][
            :, : values.shape[1]
        ]
