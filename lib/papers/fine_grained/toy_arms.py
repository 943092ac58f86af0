"""Training in the toy world (notebooks 42 and 44): rewards, the learned rival, PPO measured on the way.

Last, what the paper's own run would hold.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from transformers.modeling_outputs import SequenceClassifierOutput

from lib import generation, memory, ppo, reward_models, rewards, stats
from lib.papers.fine_grained import toy
from lib.rewards import RewardFunction

PARTS = {  # name -> unit of its segments, score
    "R1": ("clause", toy.relevance),
    "R2": ("sentence", toy.factuality),
    "R3": ("sequence", toy.completeness),
}
PLACES = {  # where the same total is paid
    "dense": lambda reward: reward,
    "at the end": rewards.at_end,
    "shuffled": rewards.shuffled,
}


def dense_reward(
    tokenizer, answers: generation.Samples, weights: Sequence[float], errors: float = 0.0,
    scores: Mapping[str, Callable] | None = None,
) -> RewardFunction:  # fmt: skip
    """R1, R2 and R3 with these weights, each paid at the last token of its segment.

    R3 is standardised with mean and deviation of the first policy's `answers`; a part of weight 0 is left
    out.  `errors`: the share of segments whose score is turned round (`toy.erring`).  `scores`: name -> a
    score in the place of the program's, such as a learned one.
    """
    parts = []
    for (name, (unit, score)), weight in zip(PARTS.items(), weights, strict=True):
        if weight == 0:
            continue
        score = scores[name] if scores else score
        score = toy.erring(score, name, errors) if errors else score
        part = rewards.SegmentReward(name, toy.Segmenter(unit), score, weight)
        parts.append(part.fitted(answers.prompts, answers.texts) if name == "R3" else part)
    return rewards.compose(parts, tokenizer)


def describe_answers(samples: generation.Samples, reward: RewardFunction) -> pd.DataFrame:
    """One row an answer: the judge's f1, shares of right parts (0 if it is empty), total reward, tokens."""
    table = toy.panel(samples.prompts, samples.texts)
    shares = {
        "relevance": table.relevant / table.clauses,
        "factuality": table.factual / table.sentences,
    }
    shares = {name: share.astype(float).fillna(0.0) for name, share in shares.items()}
    tokens = [len(ids) for ids in samples.response_ids]
    total = rewards.totals(reward(samples), samples)
    table = table[["f1", "coverage", "clauses"]].assign(**shares, total=total, tokens=tokens)
    return table.assign(prompt_index=list(samples.prompt_index))


def train_measured(
    policy,
    tokenizer,
    prompts: Sequence[str],
    reward: RewardFunction,
    config: ppo.PPOConfig,
    measure: Callable[[], pd.DataFrame],
    every: int,
) -> pd.DataFrame:
    """`ppo.train_ppo`, with what `measure()` says before it, after every `every` steps, and at the end.

    Returns those tables below one another, with the columns step and kl (nats an answer over the steps since
    the last measurement; 0 before training).
    """
    tables, numbers = [], itertools.count()

    def watched(samples):
        paid, step = reward(samples), next(numbers)
        if step % every == 0:
            tables.append(measure().assign(step=step))
        return paid

    history = ppo.train_ppo(policy, tokenizer, prompts, watched, config)
    tables.append(measure().assign(step=config.steps))
    table = pd.concat(tables, ignore_index=True)
    last = -(-history.step // every) * every
    kl = history.groupby(last.clip(upper=config.steps)).kl_k3.mean()
    return table.assign(kl=table.step.map(kl).fillna(0.0))


def scores_of_questions(table: pd.DataFrame) -> pd.DataFrame:
    """One row a question: the last measurement, and `area`, the mean f1 of all measurements."""
    last = table[table.step == table.step.max()].drop(columns=["step", "kl"])
    area = table.groupby("prompt_index").f1.mean()
    return last.assign(area=last.prompt_index.map(area))


def scores_of_thirds(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """A question's means over the first and the last third of the training, without the untrained policy."""
    trained = table[table.step > 0]
    third = trained.step.max() / 3
    parts = {"first third": trained.step <= third, "last third": trained.step > 2 * third}
    return {
        name: trained[rows]
        .groupby("prompt_index")
        .mean()
        .drop(columns=["step", "kl"])
        .reset_index()
        for name, rows in parts.items()
    }


def steps_to(curves: pd.DataFrame, level: float) -> pd.DataFrame:
    """Steps until the mean f1 of an arm's measurement reaches `level`: columns arm, seed, steps.

    An arm that never does counts as one interval between measurements beyond its last: a lower bound.
    """
    rows = []
    for (arm, seed), curve in curves.groupby(["arm", "seed"], sort=False):
        means = curve.groupby("step").f1.mean()
        reached = means.index[means >= level]
        late = 2 * means.index[-1] - means.index[-2]
        rows.append(
            {"arm": arm, "seed": seed, "steps": float(reached[0] if len(reached) else late)}
        )
    return pd.DataFrame(rows)


# --- the rival: one reward model learned from comparisons of whole answers ------------------------


class LikelihoodModel(reward_models.RewardModel):
    """A language model that scores an answer by the mean probability of its tokens: a z + b.

    Trained on pairs it makes the tokens of preferred answers likelier, and others less likely.  Small models
    learn this sooner than a head on pooled states, which must first learn to compare an answer's values with
    the facts; a fine-tuned policy knows that already.
    """

    def _add_head(self, width: int, outputs: int) -> None:
        super()._add_head(1, outputs)
        torch.nn.init.constant_(self.head.weight, 8.0)  # a difference of .4 is nearly sure

    def likelihood(self, input_ids, attention_mask, response_mask) -> torch.Tensor:
        """Mean probability of the response's tokens, (rows, 1)."""
        logits = self.backbone(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1]
        chosen = logits.log_softmax(-1).gather(2, input_ids[:, 1:, None])[..., 0].exp()
        mask = response_mask[:, 1:].float()
        return ((chosen * mask).sum(1) / mask.sum(1))[:, None]

    def forward(self, input_ids, attention_mask, response_mask, **_) -> SequenceClassifierOutput:
        """Token ids and masks (rows, time) -> .logits (rows, 1)."""
        likelihood = self.likelihood(input_ids, attention_mask, response_mask)
        return SequenceClassifierOutput(logits=self.read(likelihood))

    @torch.inference_mode()
    def features(self, prompts: Sequence[str], responses: Sequence[str], **_) -> torch.Tensor:
        """`likelihood` of each pair, (pairs, 1)."""
        rows = self.encode(prompts, responses)
        batches = [rows[i : i + 128] for i in range(0, len(rows), 128)]
        return torch.cat([self.likelihood(**self.batch(batch)) for batch in batches]).cpu()


def train_preference_model(
    policy, tokenizer, answers: generation.Samples, config: reward_models.TrainConfig, *,
    per_question: int, held_out: int, noise: float,
) -> tuple[LikelihoodModel, pd.DataFrame]:  # fmt: skip
    """A scalar reward model of simulated preferences, and how many held-out pairs it orders rightly.

    `policy` becomes the model.  `answers`: `per_question` answers to each question; the first `held_out`
    questions are not learned from.  The table's rows: the model; "the longer answer"; and the ceiling, the
    noiseless quality itself.  Ties count half.
    """
    quality = toy.quality(answers.prompts, answers.texts)
    pairs = toy.preferred_pairs(quality, per_question, noise, config.seed)
    first = held_out * per_question
    feedback = reward_models.Feedback(
        answers.prompts[first:],
        answers.texts[first:],
        np.array(answers.prompt_index[first:]),
        pairs=pairs[held_out:].reshape(-1, 2) - first,
    )
    model = LikelihoodModel(policy, tokenizer)
    reward_models.train(model, feedback, config)
    model.eval()
    scores = {
        "preference model": model.score(answers.prompts[:first], answers.texts[:first]),
        "the longer answer": np.array([len(ids) for ids in answers.response_ids[:first]]),
        "ceiling: quality without noise": quality[:first],
    }
    rows = {name: _accuracy(values, pairs[:held_out]) for name, values in scores.items()}
    table = pd.DataFrame([interval._asdict() for interval in rows.values()], index=list(rows))
    return model, table.rename_axis("orders pairs by")


def _accuracy(values: np.ndarray, pairs: np.ndarray) -> stats.Interval:
    """Share of pairs (questions, pairs, 2) whose preferred answer has the higher value; ties count half."""
    better, worse = values[pairs[..., 0]], values[pairs[..., 1]]
    right = (better > worse) + (better == worse) / 2
    return stats.bootstrap(right.mean(1))


def preference_reward(model, tokenizer, answers: generation.Samples) -> RewardFunction:
    """The model's score, standardised on these answers, paid at the last token."""

    def score(prompts, responses):
        return model.score(prompts, responses)[:, None]

    part = rewards.SegmentReward("preference", toy.Segmenter("sequence"), score)
    return rewards.compose([part.fitted(answers.prompts, answers.texts)], tokenizer)


# --- the plan of the paper's own run ---------------------------------------------------------------


def plan() -> tuple[pd.DataFrame, float]:
    """What the paper's PPO on its long-form answers holds at its peak: `memory.table`, and all of it in GB.

    A T5-large policy with T5-base values, and three Longformers as R1, R2 and R3; no weight is loaded.
    """
    policy, values = memory.skeleton("google-t5/t5-large"), memory.skeleton("google-t5/t5-base")
    reader = memory.bytes_of(memory.skeleton("allenai/longformer-base-4096"))
    stages = (
        memory.ppo(policy, 4, 1024, 200, episodes=64, value_model=values),
        memory.Stage("R1, R2, R3", {"weights": 3 * reader}),
    )
    return memory.table(*stages), sum(stage.total for stage in stages) / 1e9
