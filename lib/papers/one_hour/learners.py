"""What learns from feedback in notebook 90: reward models on one footing, and DPO.

Every reward model reads the same: what the frozen first policy sees of an answer (`toy_models`), through a
linear head.  They differ in what they are told alone: grades, pairs, marks, or words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from lib import losses, models, rewards, training
from lib.papers.fine_grained import toy, toy_models
from lib.papers.one_hour import annotator, world
from lib.policy import SharedTrunkPolicy, TokenBatch
from lib.rewards import RewardFunction

# --- reward models -------------------------------------------------------------------------------


def whole_features(features: toy_models.Features) -> torch.Tensor:
    """(answers, width) of whole answers: their end's features beside the means over clauses and sentences."""
    columns = [torch.cat(features["R3"])]
    for name in ("R1", "R2"):
        width = columns[0].shape[1]
        columns.append(
            torch.stack([x.mean(0) if len(x) else torch.zeros(width) for x in features[name]])
        )
    return torch.cat(columns, 1)


@dataclass(frozen=True)
class Scorer:
    """One score for a whole answer: a linear head on standardised `whole_features`."""

    centre: torch.Tensor  # (width,)
    scale: torch.Tensor  # (width,)
    weight: torch.Tensor  # (width + 1,), the bias last

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """(answers, width) -> (answers,)."""
        return (features - self.centre) / self.scale @ self.weight[:-1] + self.weight[-1]

    def score(self, features: toy_models.Features) -> np.ndarray:
        """(answers,) of the features of segments."""
        return self.logits(whole_features(features)).double().numpy()


def fit_scorer(features: torch.Tensor, misfit: Callable, decay: float) -> Scorer:
    """The head of least misfit(logits) + decay |w|^2 / answers, by LBFGS; `features` (answers, width)."""
    centre, scale = features.mean(0), features.std(0).clamp(min=1e-3)
    weight = torch.zeros(features.shape[1] + 1, requires_grad=True)
    scorer = Scorer(centre, scale, weight)
    optimiser = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        total = misfit(scorer.logits(features))
        total = total + decay * weight[:-1].square().sum() / len(features)
        total.backward()
        return total

    optimiser.step(loss)
    return Scorer(centre, scale, weight.detach())


def indifferent(features: torch.Tensor) -> Scorer:
    """A scorer that finds all answers alike: nothing was learned.  `features` (answers, width)."""
    width = features.shape[1]
    return Scorer(torch.zeros(width), torch.ones(width), torch.zeros(width + 1))


def learn_from_ratings(features: torch.Tensor, values: np.ndarray, decay: float) -> Scorer:
    """Sparse feedback's regression on ratings (answers,) from 1 to 7."""
    targets = losses.rating_target(torch.tensor(values, dtype=torch.float32))
    return fit_scorer(features, lambda logits: losses.regression_loss(logits, targets), decay)


def learn_from_pairs(better: torch.Tensor, worse: torch.Tensor, decay: float) -> Scorer:
    """Bradley-Terry on the features of preferred and rejected answers, (pairs, width) each."""

    def misfit(logits: torch.Tensor) -> torch.Tensor:
        return losses.pairwise_loss(*logits.chunk(2))

    return fit_scorer(torch.cat([better, worse]), misfit, decay)


def reward_of(scorer: Scorer, see: Callable, tokenizer, pool) -> RewardFunction:
    """A scorer's score, standardised on the pool's answers, paid at the last token.

    Nothing is paid beyond what the best of the pool's answers gets: a linear score has no end, and PPO
    would go where it is highest, to answers of two tokens.  `see(prompts, answers)`: the segments' features.
    """
    known = scorer.score(see(pool.prompts, pool.texts))

    def score(prompts, answers):
        scores = scorer.score(see(prompts, answers))
        return np.clip(scores, known.min(), known.max())[:, None]

    part = rewards.SegmentReward("score", toy.Segmenter("sequence"), score)
    return rewards.compose([part.fitted(pool.prompts, pool.texts)], tokenizer)


# --- words, paid where they speak of -------------------------------------------------------------

SPEAKS_OF = {"wrong": "true", "not asked": "asked", "said twice": "asked", "missing": "complete"}
UNITS = {"true": ("R1", "clause"), "asked": ("R1", "clause"), "complete": ("R3", "sequence")}


def spans_of_words(answers: Sequence[str], sentences: Sequence[str]) -> dict[str, list[np.ndarray]]:
    """Each sentence mapped onto what it speaks of: 1 where nothing was said, -1 at the last clause it names.

    Columns true and asked: an array a clause; complete: one number an answer, 0 where something is missing.
    What nobody named may still be wrong: the annotator names one flaw of an answer.
    """
    marks: dict[str, list[np.ndarray]] = {name: [] for name in UNITS}
    for answer, sentence in zip(answers, sentences, strict=True):
        name, _, flaw = sentence.partition(" is ")
        names = [(clause.split() or [""])[0] for clause in world.clauses_of(answer)]
        places = [i for i, said in enumerate(names) if said == name]
        about = SPEAKS_OF.get(flaw)
        for mark in ("true", "asked"):
            row = np.ones(len(names))
            if about == mark and places:
                row[places[-1]] = -1.0
            marks[mark].append(row)
        marks["complete"].append(np.array([float(about != "complete")]))
    return marks


def reward_from_words(
    features: toy_models.Features, bought: annotator.Bought, see: Callable, tokenizer, pool,
    weights: Sequence[float],
) -> RewardFunction:  # fmt: skip
    """A reward at each clause, and at the end, learned from where the annotator's sentences point.

    It pays the probability that nothing would be said, standardised on the pool: a class would be "nothing"
    nearly always, as one flaw is named of each answer.
    """
    parts = []
    marks = spans_of_words(bought.answers, bought.sentences)
    for (name, (source, unit)), weight in zip(UNITS.items(), weights, strict=True):
        model = toy_models.fit(source, features[source], marks[name])

        def score(prompts, answers, model=model, source=source):
            return [_unsaid(model, x) for x in see(prompts, answers)[source]]

        part = rewards.SegmentReward(name, toy.Segmenter(unit), score, weight)
        parts.append(part.fitted(pool.prompts, pool.texts))
    return rewards.compose(parts, tokenizer)


def _unsaid(model: toy_models.MarkedModel, features: torch.Tensor) -> np.ndarray:
    """(segments,) how likely it is that nothing would be said of each."""
    if not len(features):
        return np.zeros(0)
    logits = model.logits(features)
    chance = torch.sigmoid(logits[:, 0]) if model.name == "R3" else logits.softmax(1)[:, 1]
    return chance.double().numpy()


# --- DPO -----------------------------------------------------------------------------------------


def train_dpo(
    policy, tokenizer, prompts: Sequence[str], better: Sequence[str], worse: Sequence[str], *,
    beta: float, passes: int, learning_rate: float, batch: int, seed: int,
) -> list[float]:  # fmt: skip
    """Direct preference optimisation (Rafailov et al. 2023) of `policy`, in place; the losses of its steps.

    trl.DPOTrainer has the same loss; each of its runs starts a trainer, a data set and a second model, which
    takes longer here than the training itself.
    """
    network, tokens = pairs_on_network(policy, tokenizer, prompts, better, worse)
    optimizer = torch.optim.Adam(policy.parameters(), lr=learning_rate)
    history = []
    for number in range(passes):
        generator = training.generator_for(seed, "dpo", number)
        for pairs in torch.randperm(len(prompts), generator=generator).split(batch):
            rows = tokens.rows(torch.cat([pairs, pairs + len(prompts)]))
            with torch.no_grad():
                reference = log_probs_of(network, rows, reference=True)
            loss = losses.dpo_loss(log_probs_of(network, rows), reference, beta)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            history.append(float(loss.detach()))
    return history


def pairs_on_network(
    policy, tokenizer, prompts: Sequence[str], better: Sequence[str], worse: Sequence[str]
) -> tuple[SharedTrunkPolicy, TokenBatch]:
    """The policy beside its start, and the pairs as (2 pairs,) rows: the preferred, then the rejected."""
    models.set_trainable(policy, "all")
    asked = [tokenizer(prompt)["input_ids"] for prompt in [*prompts, *prompts]]
    said = [[*tokenizer(x)["input_ids"], tokenizer.eos_token_id] for x in [*better, *worse]]
    return SharedTrunkPolicy(policy, 0), TokenBatch.of(policy, tokenizer, asked, said)


def log_probs_of(network: SharedTrunkPolicy, rows: TokenBatch, reference: bool = False):
    """log p(answer | prompt) of each row, (rows,)."""
    logits = network(rows, reference)[0]
    chosen = -cross_entropy(logits, rows.response_ids[rows.places], reduction="none")
    return rows.spread(chosen).sum(1)
