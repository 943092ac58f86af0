"""RLOO by `trl.RLOOTrainer`: what a reader would use instead of `lib.rloo` and `lib.ppo`.

TRL samples and trains by its own code; its reference is the model without adapters, so adapters learn.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib import adapters, encoding, generation, models, ppo, rewards, runtime, sft

TRL_NAMES = {
    "kl": "kl",
    "entropy": "entropy",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "clip_ratio/region_mean": "clip_fraction",
    "loss": "policy_loss",
}


def train_rloo(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    reward_fn: rewards.RewardFunction,
    config: ppo.PPOConfig,
    *,
    folder: Path | str | None = None,
    **trl_settings,
) -> pd.DataFrame:
    """Train LoRA adapters on `policy`'s top layers in place; return the columns of `train_ppo` TRL can fill.

    Adapters of rank `config.lora_rank` whatever `config.train` says; all layers compute in float32.  Those
    that the policy has already are put into its weights: they belong to the reference.  Per-token rewards
    are summed; KL is TRL's, a fixed beta.  `folder`: for `history.csv`, written as the run goes; there are
    no checkpoints.  `trl_settings`: further arguments of `trl.RLOOConfig`.  Raises ValueError for
    samples_per_prompt < 2 and for encoder-decoder models.
    """
    check_settings(policy, config)
    runtime.quiet_libraries()
    if not models.is_eight_bit(policy):
        adapters.merge(policy)  # TRL's reference is the policy without adapters
    models.to_dtype(policy, torch.float32)
    score = _Score(reward_fn, tokenizer, encoding.end_tokens(tokenizer, policy))
    # optimizer steps on one rollout
    updates = config.epochs * config.batch // config.minibatch_size
    started = time.perf_counter()

    def history_of(logged: list[dict]) -> pd.DataFrame:
        return _history(logged, score.rows, updates, time.perf_counter() - started)

    def newest_row(logged: list[dict]) -> dict | None:
        if "loss" not in logged[-1] or logged[-1]["step"] % updates:
            return None
        return {**history_of(logged).iloc[-1], "step": logged[-1]["step"] // updates}

    with tempfile.TemporaryDirectory() as scratch, sft.own_precision():
        settings = _trl_config(config, scratch, policy.device, trl_settings)
        trainer = _trainer(policy, tokenizer, prompts, score, settings, config)
        trainer.add_callback(sft.Recorder("RLOO", folder, asdict(config), newest_row))
        sft.train_in_float32(policy)
        trainer.train()
    policy.eval()
    adapters.adopt(policy)
    return history_of(trainer.state.log_history)


def check_settings(policy: PreTrainedModel, config: ppo.PPOConfig) -> None:
    """Raise ValueError for what TRL's RLOO cannot train."""
    models.check_policy(policy.config)
    if config.samples_per_prompt < 2:
        raise ValueError(
            f"samples_per_prompt is {config.samples_per_prompt}; RLOO compares samples: give 2 or more."
        )
    if policy.config.is_encoder_decoder:
        raise ValueError("TRL's RLOO trains decoder-only models; use ppo.train_ppo for this one.")


def _trl_config(config: ppo.PPOConfig, folder: str, device: torch.device, trl_settings: dict):
    """The same settings in TRL's words."""
    import trl

    slices = config.batch // config.minibatch_size
    return trl.RLOOConfig(
        output_dir=folder,
        max_steps=config.steps * config.epochs * slices,
        num_iterations=config.epochs,
        per_device_train_batch_size=config.minibatch_size,
        gradient_accumulation_steps=1,
        steps_per_generation=slices,
        num_generations=config.samples_per_prompt,
        max_completion_length=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        beta=config.kl_coef,
        epsilon=config.clip,
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        disable_dropout=True,
        save_strategy="no",
        use_cpu=device.type == "cpu",
        **{"bf16": False, **sft.PLAIN, **trl_settings},
    )


def _trainer(policy, tokenizer, prompts, score, settings, config):
    import datasets
    import trl

    top = models.decoder_layers(policy)[-config.layers :]
    rows = {"prompt": _without_start(tokenizer, prompts), "asked": list(prompts)}
    trainer = trl.RLOOTrainer(
        policy,
        reward_funcs=score,
        args=settings,
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_dict(rows),
        peft_config=adapters.lora_config(policy, top, config.lora_rank),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def _without_start(tokenizer, prompts: Sequence[str]) -> list[str]:
    """The prompts as TRL must get them: it has the tokenizer write a start token, so none stands there."""
    written = tokenizer.bos_token if encoding.writes_start(tokenizer) else ""
    return [prompt.removeprefix(written) for prompt in prompts]


class _Score:
    """A reward function as TRL calls it; keeps a row of means for each rollout."""

    __name__ = "reward"

    def __init__(self, reward_fn, tokenizer, ends: Sequence[int]):
        self.reward_fn = reward_fn
        self.tokenizer = tokenizer
        self.ends = ends
        self.rows = []

    def __call__(self, prompts, completions, completion_ids, asked, **_) -> list[float]:
        started, none = time.perf_counter(), [np.full(len(ids), np.nan) for ids in completion_ids]
        ended = [encoding.is_finished(ids, self.ends) for ids in completion_ids]
        samples = generation.Samples(
            prompts=asked,
            prompt_index=list(range(len(asked))),
            texts=completions,
            prompt_ids=[encoding.encode(self.tokenizer, prompt).prompt for prompt in asked],
            response_ids=completion_ids,
            log_probs=none,
            model_log_probs=none,
            finished=ended,
        )
        totals, components = rewards.place_rewards(self.reward_fn(samples), samples)
        row = {f"reward/{name}": values.mean() for name, values in components.items()}
        row |= {"length": np.mean([len(ids) for ids in completion_ids]), "finished": np.mean(ended)}
        row |= {"tokens_sample": samples.tokens, "seconds_score": time.perf_counter() - started}
        self.rows.append({"reward": float(totals.sum(1).mean()), **row})
        return totals.sum(1).tolist()


def _history(logged: list[dict], scored: list[dict], updates: int, seconds: float) -> pd.DataFrame:
    table = pd.DataFrame([row for row in logged if "loss" in row]).rename(columns=TRL_NAMES)
    table["step"] = (table["step"] - 1) // updates + 1
    means = (
        table.reindex(columns=["step", *TRL_NAMES.values()]).groupby("step").mean().reset_index()
    )
    history = pd.concat([means, pd.DataFrame(scored)], axis=1)
    history["kl"] = history["kl"] * history["length"]  # TRL logs nats a token
    history["seconds_step"] = seconds / len(history)  # TRL does not report stages
    return history
