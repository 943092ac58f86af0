"""Arms of notebook 50 in the invented world: each trained from the same base, and measured the same way."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib import ppo, rewards, runtime
from lib.papers.alt import conditions, critics, loop, toy
from lib.papers.alt.labels import DataPool, Product, Quantiles
from lib.text import distinct_n

NO_REQUEST = "none"
EDGES = (-0.55, -0.2, 0.2, 0.55)  # between the levels of the reward that `count_levels` counts
LEVELS = ("above 0.55", "0.2 to 0.55", "about 0", "-0.55 to -0.2", "below -0.55")
BOTH = Product(
    (
        Quantiles(("positive", "negative")),
        Quantiles(("short", "long"), of="brevity", ties="share"),
    )
)


@dataclass(frozen=True)
class Arm:
    """What tells one arm from another: who gives feedback, how it becomes a label, how the label is written.

    `best` and `worst` name the requests under which the trained arm is measured.
    """

    feedback: critics.Feedback
    labeller: object
    style: str = "text"
    template: str = toy.PREFIX
    tokens: tuple[str, ...] = toy.TAGS
    factored: bool = True
    best: str = toy.TAGS[0]
    worst: str = toy.TAGS[-1]
    settings: Mapping = field(default_factory=dict)  # fields of ConditioningConfig


class Trained(NamedTuple):
    """What one arm left: tables as the notebook stores them, and what it ended with."""

    scores: pd.DataFrame  # `rows_of` the last iteration
    levels: pd.DataFrame  # `count_levels`
    checks: pd.DataFrame  # step, value: mean reward of the validation prompts, asked for the best
    first: pd.DataFrame  # `rows_of` iteration 1
    policy: PreTrainedModel


def combination_arm(
    style: str, steps: int, tokens: tuple[str, ...] = (), factored: bool = True
) -> Arm:
    """Mood and size at once, without the combination "positive and short", which is asked for later.

    One iteration of `steps`, whose last weights stay: a check would have to ask for that combination.
    """
    settings = {"iterations": 1, "steps": steps, "check_every": 0, "without": ((0, 0),)}
    feedback = critics.scored(toy.mood, brevity=toy.brevity)
    ends = {"best": "positive, short", "worst": "negative, long"}
    return Arm(feedback, BOTH, style, tokens=tokens, factored=factored, **ends, settings=settings)


@dataclass
class World:
    """A base model with its prompts, and the settings that every arm shares."""

    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: toy.Split
    settings: Mapping  # fields of ConditioningConfig
    seed: int
    folder: Path

    def start(self, arm: Arm, name: str) -> tuple[loop.Learner, loop.Task, Path]:
        """A learner on a copy of the base, its task, and the folder from which a killed run goes on."""
        policy, first = copy.deepcopy(self.base), None
        if arm.style == "token":
            first = conditions.add_tokens(policy, len(arm.tokens), seed=self.seed)
        conditioner = conditions.Conditioner(
            self.tokenizer,
            arm.style,
            template=arm.template,
            join=" , and ",
            tokens=arm.tokens,
            first_id=first,
            factored=arm.factored,
        )
        fields = {**self.settings, "forward_rows": 64, "seed": self.seed, **arm.settings}
        config = loop.ConditioningConfig(**fields)
        validation = self.prompts.validation if config.check_every else ()
        nothing = {NO_REQUEST: ()} if arm.style == "none" else None
        task = loop.Task(
            self.prompts.train,
            arm.feedback,
            arm.labeller,
            conditioner,
            held_out=self.prompts.test,
            judge=toy.mood,
            requests=nothing,
            validation=validation,
        )
        folder = self.folder / f"{name}-{runtime.content_hash(name, fields)[:12]}"
        return loop.make_learner(policy, self.tokenizer, config), task, folder

    def train(self, arm: Arm, name: str) -> Trained:
        """Train one arm and measure it on the test prompts after every iteration."""
        learner, task, folder = self.start(arm, name)
        result = loop.train(learner, task, folder=folder)
        table = result.evaluation
        if isinstance(arm.labeller, Product):
            table["met"] = both_met(table, result.pool)
        last = table[table.iteration == learner.config.iterations]
        checks = pd.DataFrame(result.history.attrs["checks"], columns=["step", "value"])
        scores, first = (rows_of(part, arm) for part in (last, table[table.iteration == 1]))
        return Trained(scores, count_levels(last, arm), checks, first, learner.policy)

    def train_ppo(self, learning_rate: float = 1e-3) -> Trained:
        """PPO on the same prompts and reward, with about as many scored samples and the same early stop."""
        policy, shared = copy.deepcopy(self.base), self.settings
        total = len(self.prompts.train) * shared["samples_per_prompt"] * shared["iterations"]
        size = min(64, len(self.prompts.train))
        config = ppo.PPOConfig(
            steps=max(1, total // size),
            prompts_per_step=size,
            train="all",
            minibatch_size=size // 2,
            max_new_tokens=shared["max_new_tokens"],
            forward_rows=64,
            learning_rate=learning_rate,
            kl_coef=shared["beta"],
            eval_every=1,
            seed=self.seed,
        )
        validation = [p for p in self.prompts.validation for _ in range(shared["eval_samples"])]
        history = ppo.train_ppo(
            policy,
            self.tokenizer,
            self.prompts.train,
            rewards.from_judge(toy.mood),
            config,
            held_out=validation,
        )
        arm = Arm(critics.scored(toy.mood), Quantiles(toy.TAGS), "none", best=NO_REQUEST)
        learner, task, _ = self.start(arm, "PPO")
        learner.policy.load_state_dict(policy.state_dict())  # the reference stays the base
        scores = rows_of(loop.measure(learner, task, {NO_REQUEST: ()}), arm)
        updates = config.epochs * config.prompts_per_step // config.minibatch_size
        checks = pd.DataFrame({"step": history.step * updates, "value": history.held_out_reward})
        start = pd.DataFrame({"step": [0], "value": [history.attrs["held_out_start"]]})
        checks = pd.concat([start, checks], ignore_index=True)
        return Trained(scores, pd.DataFrame(), checks, scores, policy)

    def measure_base(self) -> dict[str, pd.DataFrame]:
        """Rows of the untrained model: "base" is asked for nothing, "asking" in words for best and worst."""
        plain = Arm(critics.scored(toy.mood), Quantiles(toy.TAGS))
        learner, task, _ = self.start(plain, "base")
        requests = {NO_REQUEST: (), toy.TAGS[0]: toy.TAGS[:1], toy.TAGS[-1]: toy.TAGS[-1:]}
        table = loop.measure(learner, task, requests)
        nothing = Arm(plain.feedback, plain.labeller, "none", best=NO_REQUEST, worst=NO_REQUEST)
        return {"base": rows_of(table, nothing), "asking": rows_of(table, plain)}

    def measure_chance(self) -> pd.DataFrame:
        """How often the untrained model is positive and short by chance: rows with `met`."""
        arm = combination_arm("none", 1)
        learner, task, _ = self.start(arm, "chance")
        pool = DataPool(task.labeller)
        pool.add(loop.ask(task.feedback, loop.sample_items(learner, task, pool, 1)))
        table = loop.measure(learner, task, {arm.best: ()})
        table["met"] = both_met(table, pool)
        return rows_of(table, arm)


def both_met(table: pd.DataFrame, pool: DataPool) -> pd.Series:
    """Above the pool's median reward, and at or below its median length: 1.0 or 0.0 for each sample."""
    kind = table.score > np.median([item.score for item in pool.items])
    longest = -np.median([item.attributes["brevity"] for item in pool.items])
    return (kind & (table.text.str.split().str.len() <= longest)).astype(float)


def rows_of(table: pd.DataFrame, arm: Arm) -> pd.DataFrame:
    """One row a test prompt, from samples of `loop.measure`.

    reward, log_ppl (nats a token under the base, the prompt alone before it), distinct_2 (within the
    prompt's samples) and words, all under the request for the best; gap: reward at the best minus at the
    worst request; met, where the samples have it.
    """
    best = table[table.request == arm.best]
    by_prompt = best.groupby("prompt_index")
    sums = by_prompt[["nll", "tokens"]].sum()
    rows = {
        "reward": by_prompt.score.mean(),
        "log_ppl": sums.nll / sums.tokens.clip(lower=1),
        "distinct_2": by_prompt.text.agg(lambda texts: distinct_n(list(texts), 2)),
        "words": by_prompt.text.agg(lambda texts: texts.str.split().str.len().mean()),
    }
    worst = table[table.request == arm.worst].groupby("prompt_index").score.mean()
    rows["gap"] = rows["reward"] - worst
    if "met" in table:
        rows["met"] = by_prompt.met.mean()
    return pd.DataFrame(rows).reset_index()


def count_levels(table: pd.DataFrame, arm: Arm) -> pd.DataFrame:
    """How many samples of each requested level came out at each level of the reward.

    Columns requested and obtained (0 is best) and n; no rows for an arm that has no five levels to ask for.
    """
    names = getattr(arm.labeller, "tags", ())
    rows = table[table.request.isin(names)]
    if len(names) != len(LEVELS) or arm.style == "none":
        return pd.DataFrame(columns=["requested", "obtained", "n"])
    asked = rows.request.map({name: place for place, name in enumerate(names)})
    got = len(EDGES) - np.searchsorted(EDGES, rows.score)
    counts = pd.DataFrame({"requested": asked, "obtained": got}).value_counts()
    return counts.rename("n").reset_index().sort_values(["requested", "obtained"])


def level_matrix(counts: pd.DataFrame, names: tuple[str, ...]) -> pd.DataFrame:
    """`count_levels` of one or more runs as a square: requested levels down, obtained ones across."""
    places = range(len(LEVELS))
    square = counts.pivot_table("n", "requested", "obtained", aggfunc="sum", fill_value=0)
    square = square.reindex(index=places, columns=places, fill_value=0).astype(int)
    return square.set_axis(names).set_axis(LEVELS, axis=1)
