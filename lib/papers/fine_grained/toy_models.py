"""Reward models learned from marked answers of the toy world (notebook 44); how often they err is known.

The marks are those of `toy.judge`, as a careful person would set them: each clause relevant or not (R1),
each sentence wrong, right, or nothing new (R2), the share of the asked facts that the answer states (R3).
Each model is a linear head on what the frozen first policy sees of a segment, so that it needs seconds.

Simplified: the paper trains a whole network for each, and R3 on pairs; here R3 learns the share itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, normalize, pad

from lib import encoding, generation, losses, rewards, runtime, stats
from lib.papers.fine_grained import toy, toy_arms
from lib.rewards import RewardFunction

CLASSES = {"R1": (-1.0, 1.0), "R2": (-1.0, 0.0, 1.0)}  # the scores there are; R3 is a share
Features = dict[str, list[torch.Tensor]]  # name -> (segments, width) of each answer
Scores = Mapping[str, Callable]  # name -> what `rewards.SegmentReward` takes as its score


class _Row(NamedTuple):
    prompt: list[int]
    answer: list[int]  # with the end token
    asked: int  # how many tokens of the prompt stand behind its "?"
    ends: dict[str, np.ndarray]  # name -> (segments,) index into `answer` of each last token


def _row(tokenizer, prompt: str, answer: str) -> _Row:
    ids, places = encoding.token_places(tokenizer, answer)
    starts = [start for start, _ in places]
    ends = {}
    for name, (unit, _) in toy_arms.PARTS.items():
        stops = [stop for _, stop in toy.Segmenter(unit).spans(answer)]
        ends[name] = np.searchsorted(starts, stops) - 1
    ends["R3"] = np.array([len(ids)])  # a whole answer is read at its end token
    asked = len(encoding.bare_ids(tokenizer, prompt.partition("?")[2]))
    prompt_ids = encoding.bare_ids(tokenizer, prompt)
    return _Row(prompt_ids, [*ids, tokenizer.eos_token_id], asked, ends)


@torch.inference_mode()
def segment_features(policy, tokenizer, prompts: Sequence[str], answers: Sequence[str]) -> Features:
    """What the policy sees of each segment of each answer: its last token's state, and `_relations`."""
    features: Features = {name: [] for name in toy_arms.PARTS}
    bar = runtime.progress(total=len(answers), label="segment features", unit="text")
    for i in range(0, len(answers), 256):
        some = zip(prompts[i : i + 256], answers[i : i + 256], strict=True)
        rows = [_row(tokenizer, *pair) for pair in some]
        for name, parts in _batch_features(policy, tokenizer, rows).items():
            features[name] += parts
        bar.update(len(rows))
    bar.close()
    return features


def _batch_features(policy, tokenizer, rows: Sequence[_Row]) -> Features:
    texts = [row.prompt + row.answer for row in rows]
    ids, mask = encoding.pad_rows(texts, encoding.pad_id(tokenizer), "right")
    out = policy(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    chosen = out.logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    probability = pad(chosen.exp(), (1, 0))  # (rows, time) of each token, given those before
    states = out.hidden_states[-1]
    units = normalize(states, dim=-1)
    like = units @ units.transpose(1, 2)  # (rows, time, time) cosines of two tokens' states
    begins = torch.tensor([len(row.prompt) for row in rows])
    asked = torch.tensor([row.asked for row in rows])
    features = {}
    for name in toy_arms.PARTS:
        counts = [len(row.ends[name]) for row in rows]
        owner = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(counts))
        begin = begins[owner]
        last = torch.tensor(np.concatenate([row.ends[name] for row in rows])) + begin
        new_row = pad(owner[1:] != owner[:-1], (1, 0), value=True)
        first = torch.where(new_row, begin, pad(last[:-1], (1, 0)) + 1)
        places = (begin - asked[owner], begin, first, last)
        numbers = _relations(probability[owner], like[owner], *places)
        features[name] = list(torch.cat([states[owner, last], numbers], 1).split(counts))
    return features


def _relations(probability, like, asked, begin, first, last) -> torch.Tensor:
    """(segments, 7) from (segments, time), (segments, time, time) and places (segments,) in the text.

    `asked` and `begin`: where the asked words and the answer begin; `first`, `last`: of the segment.  Mean
    and least probability of its tokens; mean and largest likeness to an asked word; the same to a token of
    the answer before it; log of its length.
    """
    time = torch.arange(probability.shape[1])

    def within(start, stop):
        return (time >= start[:, None]) & (time < stop[:, None])

    inside = within(first, last + 1)
    length = inside.sum(1)
    columns = [(probability * inside).sum(1) / length]
    columns.append(probability.masked_fill(~inside, 1.0).amin(1))
    for elsewhere in (within(asked, begin), within(begin, first)):
        nearest = like.masked_fill(~elsewhere[:, None, :], -1.0).amax(2)  # (segments, time)
        columns.append((nearest * inside).sum(1) / length)
        columns.append(nearest.masked_fill(~inside, -1.0).amax(1))
    return torch.stack([*columns, length.float().log()], 1)


@dataclass(frozen=True)
class MarkedModel:
    """One of R1, R2, R3: a linear head on standardised features of a segment."""

    name: str
    centre: torch.Tensor  # (width,)
    scale: torch.Tensor  # (width,)
    weight: torch.Tensor  # (width, outputs)
    bias: torch.Tensor  # (outputs,)

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """(segments, width) -> (segments, outputs)."""
        return (features - self.centre) / self.scale @ self.weight + self.bias

    def score(self, features: torch.Tensor) -> np.ndarray:
        """(segments,) R1 and R2 the likeliest of their `CLASSES`, as the paper pays; R3 a share."""
        logits = self.logits(features)
        if self.name == "R3":
            return torch.sigmoid(logits[:, 0]).double().numpy()
        return np.array(CLASSES[self.name])[logits.argmax(1).numpy()]


def fit(name: str, features: Sequence[torch.Tensor], scores: Sequence[np.ndarray]) -> MarkedModel:
    """Learn the marks (segments,) of each answer from its features: cross-entropy, small weight decay."""
    inputs = torch.cat(list(features))
    truth = torch.tensor(np.concatenate(scores), dtype=torch.float32)
    centre, scale = inputs.mean(0), inputs.std(0).clamp(min=1e-3)
    outputs = len(CLASSES.get(name, (1,)))
    weight = torch.zeros(inputs.shape[1], outputs, requires_grad=True)
    bias = torch.zeros(outputs, requires_grad=True)
    model = MarkedModel(name, centre, scale, weight, bias)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        logits = model.logits(inputs)
        if name == "R3":
            misfit = binary_cross_entropy_with_logits(logits[:, 0], truth)
        else:
            classes = torch.tensor(CLASSES[name])
            misfit = cross_entropy(logits, torch.searchsorted(classes, truth))
        total = misfit + weight.square().sum() / len(inputs)
        total.backward()
        return total

    optimiser.step(loss)
    return MarkedModel(name, centre, scale, weight.detach(), bias.detach())


def true_scores(prompts: Sequence[str], answers: Sequence[str]) -> dict[str, list[np.ndarray]]:
    """Name -> the scores that the program gives to each answer's segments: the marks."""
    return {name: score(prompts, answers) for name, (_, score) in toy_arms.PARTS.items()}


def learn(features: Features, marks: Mapping[str, Sequence], n: int) -> dict[str, MarkedModel]:
    """R1, R2 and R3 from the first n marked answers."""
    return {name: fit(name, features[name][:n], marks[name][:n]) for name in toy_arms.PARTS}


def scores_of(models: Mapping[str, MarkedModel], policy, tokenizer) -> Scores:
    """The learned scores, as `toy_arms.dense_reward` takes them; `policy` is the one they learned on."""

    @functools.lru_cache(maxsize=1)  # three scores of the same answers need one pass
    def seen(prompts: tuple, answers: tuple) -> Features:
        return segment_features(policy, tokenizer, prompts, answers)

    def scored(name: str) -> Callable:
        def score(prompts, answers):
            features = seen(tuple(prompts), tuple(answers))[name]
            return [models[name].score(x) if len(x) else np.zeros(0) for x in features]

        return score

    return {name: scored(name) for name in models}


def flipped(share: float) -> Scores:
    """The program's scores, each turned round with this probability (`toy.erring`)."""
    parts = toy_arms.PARTS.items()
    return {name: toy.erring(score, name, share) for name, (_, score) in parts}


def errors(scores: Scores, prompts: Sequence[str], answers: Sequence[str]) -> pd.DataFrame:
    """How wrong scores are, one row a segment: reward, answer (its number), error.

    `error`: 1 where R1 or R2 misjudge the segment, else 0; for R3 how far its share is off.
    """
    truth, tables = true_scores(prompts, answers), []
    for name, score in scores.items():
        off = [abs(a - b) for a, b in zip(score(prompts, answers), truth[name], strict=True)]
        owner = np.repeat(np.arange(len(answers)), [len(row) for row in off])
        error = np.concatenate([np.zeros(0), *off])
        error = error if name == "R3" else (error > 0).astype(float)
        tables.append(pd.DataFrame({"reward": name, "answer": owner, "error": error}))
    return pd.concat(tables, ignore_index=True)


def error_rates(
    scores: Scores, prompts: Sequence[str], answers: Sequence[str], seed: int
) -> pd.DataFrame:
    """Mean errors with intervals over answers, indexed by R1, R2, R3 and misjudged (R1 and R2 together)."""
    table = errors(scores, prompts, answers)
    groups = dict(list(table.groupby("reward")))
    groups["misjudged"] = table[table.reward != "R3"]
    rows = [stats.bootstrap(x.error, clusters=x.answer, seed=seed) for x in groups.values()]
    return pd.DataFrame([row._asdict() for row in rows], index=list(groups))


def credit(
    samples: generation.Samples, reward: RewardFunction, lam: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(answers, time) rewards, advantages before training (V = 0), and 1 where an answer has a token."""
    paid, _ = rewards.place_rewards(reward(samples), samples)
    lengths = torch.tensor([len(ids) for ids in samples.response_ids])
    mask = (torch.arange(paid.shape[1]) < lengths[:, None]).to(paid)
    advantages, _ = losses.gae(paid, torch.zeros_like(paid), mask, 1.0, lam)
    return paid, advantages, mask


PLACEMENTS = {"dense": 0.95, "at the end": 1.0}  # where the same sum is paid -> lambda


def credit_of_tokens(
    samples: generation.Samples, number: int, kinds: Mapping[str, RewardFunction]
) -> pd.DataFrame:
    """Rewards and advantages of one answer, (rows, tokens), by each kind of reward at each placement."""
    length, rows = len(samples.response_ids[number]), {}
    for place, lam in PLACEMENTS.items():
        for kind, reward in kinds.items():
            paid, advantages, _ = credit(samples, toy_arms.PLACES[place](reward), lam)
            rows["reward", place, kind] = paid[number, :length].numpy()
            rows["advantage", place, kind] = advantages[number, :length].numpy()
    names = [(what, x, y) for x in PLACEMENTS for what in ("reward", "advantage") for y in kinds]
    return pd.DataFrame([rows[name] for name in names], index=map(", ".join, names))


def agreement(
    samples: generation.Samples, true: RewardFunction, erring: Mapping[str, RewardFunction]
) -> pd.DataFrame:
    """How advantages from erring rewards correlate with the true dense ones, a column a placement.

    Before training (V = 0), over all tokens of the samples.
    """
    _, truth, mask = credit(samples, true, PLACEMENTS["dense"])
    inside, rows = mask > 0, {}
    for name, reward in erring.items():
        rows[name] = {}
        for place, lam in PLACEMENTS.items():
            _, advantages, _ = credit(samples, toy_arms.PLACES[place](reward), lam)
            pair = truth[inside].numpy(), advantages[inside].numpy()
            rows[name][place] = stats.correlation(*pair)
    return pd.DataFrame.from_dict(rows, orient="index")


def one_misjudged(samples: generation.Samples, scores: Scores) -> int:
    """The number of the answer that comes nearest to four clauses, one segment misjudged, and R3 right."""
    table = errors(scores, samples.prompts, samples.texts)
    wrong = table[table.error > 0.2].groupby(["answer", "reward"]).size().unstack(fill_value=0)
    wrong = wrong.reindex(range(len(samples.texts)), columns=[*toy_arms.PARTS], fill_value=0)
    clauses = toy.panel(samples.prompts, samples.texts).clauses
    far = 2 * (wrong.R1 + wrong.R2 - 1).abs() + 2 * wrong.R3 + (clauses - 4).abs()
    return int(far.argmin())


def describe_answers(
    samples: generation.Samples, true: RewardFunction, paid: RewardFunction, scores: Scores
) -> pd.DataFrame:
    """`toy_arms.describe_answers` by the true reward, and what the erring one does, one row an answer.

    Adds paid (the total by the erring reward) and misjudged (the share of its clauses and sentences that R1
    and R2 misjudge; NaN for an empty answer).
    """
    table = toy_arms.describe_answers(samples, true)
    wrong = errors(scores, samples.prompts, samples.texts)
    wrong = wrong[wrong.reward != "R3"].groupby("answer").error.mean()
    table["paid"] = rewards.totals(paid(samples), samples)
    return table.assign(misjudged=wrong.reindex(range(len(table))).to_numpy())


def pooled(table: pd.DataFrame, arms: Sequence[str]) -> pd.DataFrame:
    """Each question's mean over these arms, a row a seed and question; of seeds in which all of them ran."""
    rows = table[table.arm.isin(arms)]
    ran = rows.groupby("seed").arm.nunique()
    rows = rows[rows.seed.isin(ran.index[ran == len(arms)])]
    return rows.drop(columns="arm").groupby(["seed", "prompt_index"], as_index=False).mean()


def scores_of_questions(table: pd.DataFrame) -> pd.DataFrame:
    """`toy_arms.scores_of_questions`, and drift: misjudged at the end minus misjudged before training."""
    before = table[table.step == 0].set_index("prompt_index").misjudged
    rows = toy_arms.scores_of_questions(table)
    return rows.assign(drift=rows.misjudged - rows.prompt_index.map(before))
