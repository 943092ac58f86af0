"""PPO in which any token may carry a reward.

`rewards` is (batch, time); a reward for the whole response is the case where only the last token's is
not zero.  Per token: reward - beta (log pi - log pi_ref), i.e. a KL penalty by the k1 estimate (Ziegler
et al. 2019; fine-grained RLHF, section 2); k3 is logged beside it.  A rollout's log-probabilities come
from the forward pass that trains, dropout is off, and by default tokens are drawn from the distribution
of the ratios, softmax(logits / temperature); with top-k or top-p the ratios still use the unfiltered one.

Random numbers depend on (seed, step) only, so resuming needs no generator state; minibatches take one
row from each of `minibatch_size` strata, so any number of processes makes the same ones.
Simplified: data parallel only (`accelerate launch`, one process or DDP); no learning-rate decay.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.nn.functional import cross_entropy, pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib import encoding, generation, logprobs, losses, models, rewards, runtime
from lib.policy import SharedTrunkPolicy, TokenBatch

STAGES = ("sample", "score", "forward", "update")
MAY_BE_ZERO = {"top_k", "warmup_steps", "gamma", "lam", "entropy_coef", "kl_coef", "seed"}
MAY_BE_ZERO |= {"value_pretrain_steps", "stop_entropy"}
DECODING = ("max_new_tokens", "temperature", "top_k", "top_p")  # passed on to generation.sample
STATE = ("kl_coef", "history", "stopped", "best", "held_out_start")  # in a checkpoint, with weights


@dataclass(frozen=True)
class PPOConfig:
    """Settings of `train_ppo` and, where they apply, of `rloo.train_rloo`."""

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
    value_clip: float = 0.2  # in units of reward: how far a value may move in one step
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
        for name, value in asdict(self).items():
            number = type(value) in (int, float)
            if number and (value < 0 or (value == 0 and name not in MAY_BE_ZERO)):
                allowed = "at least" if name in MAY_BE_ZERO else "above"
                raise ValueError(f"{name} is {value!r}; it must be {allowed} 0.")
            if name in ("gamma", "lam", "top_p") and value > 1:
                raise ValueError(f"{name} is {value!r}; it must be at most 1.")
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


def train_ppo(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    reward_fn: rewards.RewardFunction,
    config: PPOConfig | None = None,
    *,
    held_out: Sequence[str] = (),
    value_model: PreTrainedModel | None = None,
    folder: Path | str | None = None,
    accelerator: Accelerator | None = None,
) -> pd.DataFrame:
    """Train `policy` in place; return its history, one row a step (columns: `PPO.log`).

    `reward_fn(samples)` returns what `rewards.place_rewards` takes.  With `held_out` prompts the policy ends
    with the weights of the best mean reward on them, else with the last.  With `folder`, a killed run
    continues from its last checkpoint.  `history.attrs`: stopped (the reason, or None), best_step,
    held_out_start, ratio_distribution.  Raises ValueError for settings that do not fit together, and
    FloatingPointError naming step and minibatch where a loss or gradient is not finite.
    """
    config = config or PPOConfig()
    run = PPO(policy, tokenizer, prompts, reward_fn, config, value_model, accelerator)
    bar = runtime.progress(total=config.steps, label="PPO", unit="step")
    with models.fast_float32(run.shared):
        run.open(folder, held_out)
        bar.update(len(run.history))
        while len(run.history) < config.steps and run.stopped is None:
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
    """What must be 0, up to rounding, before training, over the tokens of a first rollout.

    ratio_error: largest |ratio - 1|, the rollout evaluated again in the update's shuffled minibatches by
    the forward pass that trains.  kl: largest |log pi - log pi_ref| of that pass.  sampler_error, nats a
    token: |mean of log p drawn with - log pi|.  Filters (top-k, top-p) raise it; ratio and kl compare
    training passes with each other and cannot see them.  A mean, because a sampler in bfloat16 is off by
    up to 0.3 at single tokens, in both directions.
    """
    run = PPO(policy, tokenizer, prompts, lambda samples: [0.0] * len(samples), config)
    samples, error = run.sample(0), 0.0
    with models.fast_float32(run.shared), torch.no_grad():
        rollout = run.roll_out(samples, run.score(samples)[0])
        for part in map(rollout.rows, run.minibatches(0, 0)):
            log_probs = run.evaluate(part.tokens)[0]
            ratio = (log_probs - part.log_probs).masked_fill(part.mask == 0, 0).exp()
            error = max(error, (ratio - 1).abs().max().item())
    mask, drawn = rollout.mask, samples.padded("log_probs")[0].to(rollout.log_probs)
    kl = losses.kl_estimate(rollout.log_probs, rollout.ref_log_probs, "k1")
    return {
        "ratio_error": error,
        "kl": kl.masked_fill(mask == 0, 0).abs().max().item(),
        "sampler_error": losses.masked_mean(drawn - rollout.log_probs, mask).abs().item(),
    }


@dataclass
class Rollout:
    """One process's episodes of a step; every tensor is (batch, time)."""

    tokens: TokenBatch
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
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self._check_sizes()
        policy.to(self.accelerator.device)
        size = {"layers": config.layers, "lora_rank": config.lora_rank}
        frozen = models.set_trainable(policy, config.train, **size)
        self.shared = SharedTrunkPolicy(policy, frozen, value_model)
        rates = (config.learning_rate, config.value_learning_rate)
        groups = zip(self.shared.parameter_groups(), rates, strict=True)
        groups = [{"params": p, "lr": rate, "peak": rate} for p, rate in groups]
        optimizer = torch.optim.Adam(groups, fused=True)
        self.network, self.optimizer = self.accelerator.prepare(self.shared, optimizer)
        self.kl_coef, self.history, self.stopped = config.kl_coef, [], None
        self.folder, self.held_out, self.held_out_start, self.best = None, [], None, None

    def _check_sizes(self) -> None:
        each, size = self.config.prompts_per_step, self.config.minibatch_size
        if size % self.world or each % self.world:
            raise ValueError(
                f"minibatch_size {size} and prompts_per_step {each} must be multiples of the number "
                f"of processes, {self.world}."
            )
        if len(self.prompts) < each:
            raise ValueError(
                f"{len(self.prompts)} prompts are fewer than prompts_per_step {each}; give more "
                "prompts or lower it."
            )

    def step(self, step: int) -> dict[str, float]:
        """One step of PPO: sample, score, advantage, update, log.  Returns its row of the history."""
        runtime.set_seed(self._seed("reward", step))  # for rewards that draw random numbers
        clock = [time.perf_counter()]
        # 1 sample
        samples = self.sample(step)
        clock.append(time.perf_counter())
        # 2 score
        paid, components = self.score(samples)
        clock.append(time.perf_counter())
        # 3 advantage: the training forward over the rollout, KL penalty, GAE
        rollout = self.roll_out(samples, paid)
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
        places = [divmod(place, count) for place in range(step * each, (step + 1) * each)]
        laps = {lap: self._generator("order", lap) for lap, _ in places}
        orders = {lap: torch.randperm(count, generator=g) for lap, g in laps.items()}
        chosen = [self.prompts[orders[lap][place]] for lap, place in places]
        return self._sample(chosen, self.config.samples_per_prompt, "sample", step)

    def _sample(self, prompts, n: int, *seed) -> generation.Samples:
        """This process's share of the samples for `prompts`; the draws do not depend on the shares."""
        share, how = math.ceil(len(prompts) / self.world), asdict(self.config)
        size = (share * self.world * n, self.config.max_new_tokens)
        noise = torch.rand(size, generator=self._generator(*seed))
        mine = prompts[self.rank * share : (self.rank + 1) * share]
        noise = noise[self.rank * share * n :][: len(mine) * n]
        how = {name: how[name] for name in DECODING}
        return generation.sample(self.policy, self.tokenizer, mine, n=n, noise=noise, **how)

    def score(self, samples: generation.Samples) -> tuple[torch.Tensor, dict[str, np.ndarray]]:
        """Per-token rewards (batch, time) and the components' sums; see `rewards.place_rewards`."""
        return rewards.place_rewards(self.reward_fn(samples), samples)

    @torch.no_grad()
    def roll_out(self, samples: generation.Samples, paid: torch.Tensor) -> Rollout:
        """Log-probabilities of policy and reference, values and entropies, a few rows at a time.

        Logits are dropped after each few rows; the trunk's hidden states are kept for the update.
        """
        side = "right" if self.policy.config.is_encoder_decoder else "left"
        fill, device = encoding.pad_id(self.tokenizer), self.policy.device
        padded = encoding.pad_rows(samples.prompt_ids, fill, side)
        padded += encoding.pad_rows(samples.response_ids, fill, "right")
        prompt_ids, prompt_mask, response_ids, mask = (x.to(device) for x in padded)
        tokens = TokenBatch(prompt_ids, prompt_mask, response_ids, mask)
        done, parts = [], []
        # prompts of like length need little padding
        order = prompt_mask.sum(1).argsort(stable=True)
        for rows in order.split(self.config.forward_rows):
            part = tokens.rows(rows)
            log_probs, values, entropy = self.evaluate(part)
            ref_log_probs = self.evaluate(part, reference=True)[0]
            parts.append((log_probs, ref_log_probs, values, entropy))
            done.append((rows, part))
        if part.trunk is not None:
            for rows, few in done:
                tokens.keep_trunk(rows, few)
        joined = (torch.cat(x)[order.argsort()] for x in zip(*parts, strict=True))
        return Rollout(tokens, mask.float(), paid.to(device), *joined)

    def evaluate(
        self, tokens: TokenBatch, reference: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Log-probabilities of the response tokens, values, entropies, (batch, time); used everywhere."""
        wanted = not reference and (self.config.entropy_coef > 0 or not torch.is_grad_enabled())
        chosen, temperature = tokens.response_ids[tokens.places], self.config.temperature
        if self._reads_states(wanted):
            states, values = self.network(tokens, reference, False)
            weight = self.policy.get_output_embeddings().weight
            found = losses.chosen_log_probs(states, weight, chosen, temperature, wanted)
        else:
            logits, values = self.network(tokens, reference)
            logits = logits / temperature if temperature != 1 else logits
            log_probs = -cross_entropy(logits, chosen, reduction="none")
            found = log_probs, losses.entropy(logits) if wanted else None
        log_probs, entropy = (None if x is None else tokens.spread(x) for x in found)
        return log_probs, tokens.spread(values), entropy

    def _reads_states(self, entropy: bool) -> bool:
        """Whether logits are no more than a fixed matrix times what the output layer reads (measured on
        CPUs only, so elsewhere they are computed)."""
        head, learns = self.policy.get_output_embeddings(), entropy and torch.is_grad_enabled()
        plain = learns or runtime.plain_mode() or logprobs.changes_logits(self.policy)
        if plain or type(head) is not torch.nn.Linear or head.bias is not None:
            return False
        weight = head.weight
        fixed = not weight.requires_grad and weight.dtype == torch.float32
        return fixed and weight.device.type == "cpu"

    def add_advantages(self, rollout: Rollout) -> None:
        """Rewards less the KL penalty, then GAE; statistics are taken over all processes."""
        config, mask = self.config, rollout.mask
        kl = losses.kl_estimate(rollout.log_probs, rollout.ref_log_probs, "k1")
        total = rollout.rewards - self.kl_coef * kl
        if config.whiten_rewards:
            total = self._whiten(total, mask, shift_mean=False)
        advantages, returns = losses.gae(total, rollout.values, mask, config.gamma, config.lam)
        if config.whiten_advantages:
            advantages = self._whiten(advantages, mask)
        rollout.advantages, rollout.returns = advantages, returns

    def update(self, rollout: Rollout, step: int) -> dict[str, float]:
        """Epochs over shuffled minibatches; the means of what `_accumulate` returns, and grad_norm's.

        ratio_error is the first minibatch's alone: nothing has changed yet, so it is 0 up to rounding.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * min(1.0, (step + 1) / max(1, self.config.warmup_steps))
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        learns, rows = float(step >= self.config.value_pretrain_steps), []
        for epoch in range(self.config.epochs):
            for number, index in enumerate(self.minibatches(step, epoch)):
                stats = self._accumulate(rollout.rows(index), learns)
                norm = self.accelerator.clip_grad_norm_(trained, self.config.max_grad_norm)
                rows.append({**stats, "grad_norm": float(norm)})
                if not all(map(math.isfinite, rows[-1].values())):
                    raise FloatingPointError(
                        f"step {step + 1}, epoch {epoch}, minibatch {number}: not finite: {rows[-1]}. "
                        "Lower learning_rate or max_grad_norm, or look at the rewards of this step."
                    )
                self.optimizer.step()
                self.optimizer.zero_grad()
        return {**pd.DataFrame(rows).mean().to_dict(), "ratio_error": rows[0]["ratio_error"]}

    def minibatches(self, step: int, epoch: int) -> torch.Tensor:
        """Rows of this process in each minibatch, (minibatches, rows): one row of each of its strata."""
        size = self.config.minibatch_size
        noise = torch.rand(
            size, self.config.batch // size, generator=self._generator("mix", step, epoch)
        )
        order = noise.argsort(1).chunk(self.world)[self.rank]
        return (order + torch.arange(len(order))[:, None] * order.shape[1]).T

    def _accumulate(self, part: Rollout, learns: float) -> dict[str, float]:
        """Gradients of one minibatch's loss, `forward_rows` rows at a time; its loss over all processes.

        ratio_error: mean |log ratio|.
        """
        config, sums = self.config, 0.0
        count = self.accelerator.reduce(part.mask.sum(), "sum")
        for rows in torch.arange(len(part.mask)).split(config.forward_rows):
            few = part.rows(rows)
            mask, old = few.mask, few.log_probs
            log_probs, values, entropy = self.evaluate(few.tokens)
            policy = losses.policy_loss(log_probs, old, few.advantages, mask, config.clip, count)
            value = losses.value_loss(
                values, few.values, few.returns, mask, config.value_clip, count
            )
            loss = learns * policy + value
            if entropy is not None:
                loss = loss - learns * config.entropy_coef * losses.masked_mean(
                    entropy, mask, count
                )
            self.accelerator.backward(
                loss * self.world
            )  # DDP averages over processes; we want the sum
            clipped = losses.clip_fraction(log_probs, old, mask, config.clip, count)
            error = losses.masked_mean((log_probs - old).abs(), mask, count)
            sums = sums + torch.stack([policy, value, clipped, error]).detach()
        names = ("policy_loss", "value_loss", "clip_fraction", "ratio_error")
        return dict(zip(names, self.accelerator.reduce(sums, "sum").tolist(), strict=True))

    def log(self, step, samples, components, rollout, update, seconds) -> dict[str, float]:
        """One row: step (from 1), stage, reward and reward/<component> (means of row sums), kl (k1) and
        kl_k3 (nats a sequence, before the update), entropy (nats a token), length, finished, kl_coef,
        explained_variance, update's means, learning_rate, tokens_* and seconds_* by stage.
        """
        mask, pair = rollout.mask, (rollout.log_probs, rollout.ref_log_probs)
        sums = {"kl": losses.kl_estimate(*pair, "k1"), "kl_k3": losses.kl_estimate(*pair, "k3")}
        sums |= {"entropy": rollout.entropy, "length": torch.ones_like(mask)}
        table = {k: v.masked_fill(mask == 0, 0).sum(1).tolist() for k, v in sums.items()}
        table |= {"reward": sum(components.values()), "finished": samples.finished}
        table |= {f"reward/{name}": values for name, values in components.items()}
        table |= {"prompt": [len(ids) for ids in samples.prompt_ids]}
        episodes = pd.DataFrame(gather_object(pd.DataFrame(table).to_dict("records")))
        row = episodes.drop(columns="prompt").mean().to_dict()
        row["entropy"] /= row["length"]
        response, whole = episodes["length"].sum(), episodes[["length", "prompt"]].sum().sum()
        tokens = (response, response, whole, whole * self.config.epochs)
        gathered = [self._gather(x) for x in (rollout.values, rollout.returns, mask)]
        row |= {"kl_coef": self.kl_coef, "explained_variance": losses.explained_variance(*gathered)}
        row |= {**update, "learning_rate": self.optimizer.param_groups[0]["lr"]}
        row |= {f"tokens_{stage}": n for stage, n in zip(STAGES, tokens, strict=True)}
        row |= {f"seconds_{stage}": t for stage, t in zip(STAGES, seconds, strict=True)}
        row = {name: float(value) for name, value in row.items()}
        return {"step": step + 1, "value_only": step < self.config.value_pretrain_steps, **row}

    def finish_step(self, row: dict[str, float]) -> None:
        """Keep the row; held-out reward, KL controller, stops, checkpoint."""
        config, step = self.config, row["step"]
        self.history.append(row)
        if config.kl_target is not None:
            how = (config.kl_target, config.batch, config.kl_horizon)
            self.kl_coef = adapt_kl_coef(self.kl_coef, row["kl"], *how)
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
        history, where = pd.DataFrame(self.history), "softmax(logits / temperature)"
        if self.config.top_k > 0 or self.config.top_p < 1:
            where += ", unfiltered, unlike sampling"
        best = self.best["step"] if self.best else len(history)
        told = {"stopped": self.stopped, "best_step": best, "held_out_start": self.held_out_start}
        history.attrs = {**told, "ratio_distribution": where}
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
        return white.chunk(self.world)[self.rank][:, : values.shape[1]]
