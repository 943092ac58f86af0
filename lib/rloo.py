"""RLOO: PPO's loop without a value function (Ahmadian et al. 2024, "Back to Basics").

Each response gets one number: what it is paid, minus what the other responses to its prompt are paid on
average.  Everything else is `ppo`'s: what trains, the sampler, the KL penalty, the clipped loss, the
checkpoints.  So two runs with one `PPOConfig` differ in how they give credit, and in nothing else.

Simplified: several updates on one batch, clipped as PPO clips them; the paper argues for one update on each.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib import losses, models, ppo, rewards


def train_rloo(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    reward_fn: rewards.RewardFunction,
    config: ppo.PPOConfig,
    *,
    held_out: Sequence[str] = (),
    folder: Path | str | None = None,
    accelerator: Accelerator | None = None,
) -> pd.DataFrame:
    """Train `policy` in place; return its history: the columns of `ppo.train_ppo` but those on values.

    The arguments are those of `train_ppo`; gamma, lam and the settings of values have no part.  Per-token
    rewards are summed.  Raises ValueError for samples_per_prompt < 2.
    """
    learner = ppo.make_learner(policy, tokenizer, config, None, accelerator)
    run = ppo.Loop(learner, prompts, reward_fn, held_out, folder, what="RLOO")
    with models.fast_float32(learner.network):
        run.start()
        for step in run.steps():
            # 1 to 3: sample, score, roll out and penalise, as in PPO
            samples = ppo.sample(learner, prompts, step)
            run.clock.lap("sample")
            scores, components = rewards.place_rewards(reward_fn(samples), samples)
            run.clock.lap("score")
            rollout = ppo.roll_out(learner, samples)
            paid = ppo.penalise(scores, rollout.log_probs, rollout.ref_log_probs, run.kl_coef)
            # 4 advantages: how much better than the prompt's other responses
            advantages = estimate_advantages(learner, paid, rollout.mask)
            run.clock.lap("forward")
            # 5 update: the clipped policy loss alone
            update_means = ppo.update(learner, rollout, advantages, None, step)
            run.clock.lap("update")
            run.finish_step(step, samples, components, rollout, None, update_means)
    return run.close(values=False)


def estimate_advantages(
    learner: ppo.Learner, paid: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """A response's leave-one-out advantage at each of its tokens, (batch, time); whitened as PPO's are."""
    totals = paid.masked_fill(mask == 0, 0.0).sum(1)
    each = losses.leave_one_out(totals, learner.config.samples_per_prompt)
    advantages = each[:, None] * mask
    return ppo.whiten(learner, advantages, mask) if learner.config.whiten_advantages else advantages
