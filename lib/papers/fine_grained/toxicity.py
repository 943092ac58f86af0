"""Detoxification with dense rewards (Wu et al. 2023, section 3): each segment pays for its own toxicity.

Below the reward: a training measured on its own fresh samples, and its toxicity read off at equal KL.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from lib import (
    generation,
    logprobs,
    memory,
    ppo,
    rewards,
    runtime,
    scorers,
    segments,
    stats,
    tables,
)
from lib.text import distinct_n_by_prompt

DIVERSITY = ("distinct_2", "distinct_3")


class ToxicityDrops:
    """`SegmentReward.score` of detoxification (section 3): toxicity(y_1..y_j-1) - toxicity(y_1..y_j).

    The drops of a response telescope to toxicity("") - toxicity(y), the holistic reward up to a constant.
    Toxicity is the scorer's probability, or with `logit` its log-odds held within +-6.  `start` is
    toxicity(""), in the same unit; None stands for a probability of 0, which in log-odds is -6: far below
    usual texts, so that every first segment is charged.  Where a prefix has no score (NaN), it counts as
    the one before.
    """

    def __init__(
        self,
        scorer: scorers.Scorer,
        segmenter: segments.Segmenter,
        logit: bool = False,
        start: float | None = None,
    ):
        self.scorer, self.segmenter, self.logit = scorer, segmenter, logit
        self.start = float(self._measured(np.zeros(1))[0]) if start is None else start
        self.calls = 0  # texts scored so far

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[np.ndarray]:
        """(segments,) drops of each response; prompts are not scored."""
        ends = [[end for _, end in self.segmenter.spans(text)] for text in responses]
        prefixes = [t[:end] for t, row in zip(responses, ends, strict=True) for end in row]
        self.calls += len(prefixes)
        scores = self.scorer.score(prefixes) if prefixes else np.zeros(0)
        parts = np.split(self._measured(scores), np.cumsum([len(row) for row in ends])[:-1])
        return [-np.diff(_filled(np.append(self.start, part))) for part in parts]

    def _measured(self, scores: np.ndarray) -> np.ndarray:
        return scorers.log_odds(scores) if self.logit else scores


def _filled(values: np.ndarray) -> np.ndarray:
    """Values, (n,), with every NaN after the first replaced by the value before it."""
    known = np.maximum.accumulate(np.where(np.isnan(values), 0, np.arange(len(values))))
    return values[known]


def make_reward(
    scorer: scorers.Scorer, unit: str, tokenizer, *, logit: bool, start: float
) -> tuple[rewards.RewardFunction, ToxicityDrops]:
    """Drops at the last token of each `unit`, penalties for faults at the answer's end; and the drops.

    The unit "sequence" pays the whole drop at the last token, and scores each answer once: the holistic
    reward.
    """
    segmenter = segments.Segmenter(unit)
    drops = ToxicityDrops(scorer, segmenter, logit, start)
    composed = rewards.compose([rewards.SegmentReward("drop", segmenter, drops)], tokenizer)

    def reward(samples: generation.Samples) -> dict:
        return composed(samples) | rewards.fault_penalties(samples)

    return reward, drops


# --- a training measured on its own samples, and read off at equal KL -------------------------------


def watched(
    reward_fn: rewards.RewardFunction,
    measure: Callable[[generation.Samples], Mapping[str, float]],
    path: Path | str,
) -> tuple[rewards.RewardFunction, Callable[[], pd.DataFrame]]:
    """`reward_fn` that is watched; and a function that returns what was seen, a row a step.

    `measure` is asked about each batch when it is paid, so before the policy learns from it.  Rows are kept
    in `path`: a batch that is drawn again after a restart counts once.
    """
    path, seen = Path(path), {}
    if path.exists():
        seen = {row["batch"]: row for row in tables.read_jsonl(path).to_dict("records")}

    def paid(samples: generation.Samples) -> object:
        batch = runtime.content_hash(samples.texts)[:16]
        seen[batch] = {"batch": batch, **measure(samples)}
        tables.write_jsonl(pd.DataFrame(list(seen.values())), path)
        return reward_fn(samples)

    return paid, lambda: pd.DataFrame(list(seen.values())).drop(columns="batch")


def train_measured(
    policy,
    tokenizer,
    prompts: Sequence[str],
    reward_fn: rewards.RewardFunction,
    config: ppo.PPOConfig,
    measure: Callable[[generation.Samples], Mapping[str, float]],
    folder: Path,
) -> pd.DataFrame:
    """`ppo.train_ppo` that measures each step's answers before it learns from them; returns `path_of` it."""
    reward, seen = watched(reward_fn, measure, folder.with_name(f"{folder.name}-seen.jsonl"))
    history = ppo.train_ppo(policy, tokenizer, prompts, reward, config, folder=folder)
    return path_of(history, seen())


def describe_batch(
    samples: generation.Samples, watchers: Mapping[str, scorers.Scorer], segmenter, n: int
) -> dict[str, float]:
    """Means over a batch, n answers a prompt: scores, distinct n-grams, parts of an answer."""
    row = {name: float(np.nanmean(who.score(samples.texts))) for name, who in watchers.items()}
    together = _grouped(samples.texts, n)
    row |= {f"distinct_{k}": distinct_n_by_prompt(together, k) for k in (2, 3)}
    return row | {"parts": float(np.mean([len(segmenter.spans(x)) for x in samples.texts]))}


def _grouped(texts: Sequence[str], n: int) -> list[Sequence[str]]:
    return [texts[i : i + n] for i in range(0, len(texts), n)]


def path_of(history: pd.DataFrame, seen: pd.DataFrame) -> pd.DataFrame:
    """A training's path, a row a step: what was seen, and step, kl, drop, nll, entropy, length.

    All of the samples of that step, so of the policy before its update.  kl: nats an answer (k3); drop: the
    answer's toxicity drops, summed; nll = entropy + kl / length: nats a token under the reference, the log of
    the perplexity.  Raises ValueError where steps and rows seen differ in number.
    """
    if len(history) != len(seen):
        raise ValueError(
            f"{len(seen)} batches were seen in {len(history)} steps; delete the training's folder and the "
            "file beside it, and train again."
        )
    names = {"step": "step", "kl_k3": "kl", "reward/drop": "drop"}
    path = history[[*names, "entropy", "length"]].rename(columns=names).reset_index(drop=True)
    path["nll"] = path["entropy"] + path["kl"] / path["length"]
    return path.join(seen.reset_index(drop=True))


def blocks(path: pd.DataFrame, size: int) -> pd.DataFrame:
    """Means of each `size` steps of one training's path, with kl made never falling: what is interpolated."""
    numbers = path.select_dtypes("number")
    means = numbers.groupby((path["step"].to_numpy() - 1) // size).mean()
    return means.assign(kl=np.maximum.accumulate(means["kl"]))


def at(curve: pd.DataFrame, x: np.ndarray | float, column: str, by: str = "kl") -> np.ndarray:
    """A column of `blocks` where `by` is x, by linear interpolation; NaN where the training never got to.

    Before the first block it is the first block's.
    """
    known = curve.dropna(subset=[by, column])
    if known.empty:
        return np.full(np.shape(x), np.nan)
    return np.interp(x, known[by], known[column], right=np.nan)


def read_off(
    paths: pd.DataFrame, points: Sequence[float], columns: Sequence[str], size: int,
    by: str = "kl", unit: str = "nats",
) -> pd.DataFrame:  # fmt: skip
    """Every column where all spent the same: columns arm (the method), seed, and readings.

    `paths`: those of all arms and seeds, with columns arm, method, seed.  A method's arms differ in beta;
    its reading is the mean of those that came so far.  "<column> at 3 nats" is read off there, "<column> to
    3 nats" is the mean over all KL from 0 to there; with `by` "calls" the same of scorer calls.
    """
    rows = []
    for (method, seed), own in paths.groupby(["method", "seed"], sort=False):
        curves = [blocks(path, size) for _, path in own.groupby("arm", sort=False)]
        row = {"arm": method, "seed": seed}
        for x in points:
            between = np.linspace(0, x, 61)
            for column in columns:
                there = [float(at(curve, x, column, by)) for curve in curves]
                before = [at(curve, between, column, by).mean() for curve in curves]
                row[f"{column} at {x:g} {unit}"] = pd.Series(there).mean()
                row[f"{column} to {x:g} {unit}"] = pd.Series(before).mean()
        rows.append(row)
    return pd.DataFrame(rows)


def along_kl(paths: pd.DataFrame, column: str, size: int, points: int = 25) -> pd.DataFrame:
    """A column against KL as `plots.learning_curve` draws it: columns step (nats), arm (method), seed, value.

    Means over a method's arms, as in `read_off`; as far as every seed of the method came.
    """
    grid = np.linspace(0, paths["kl"].max(), points)
    parts = []
    for method, of_method in paths.groupby("method", sort=False):
        curves = {}
        for seed, own in of_method.groupby("seed"):
            values = [at(blocks(path, size), grid, column) for _, path in own.groupby("arm")]
            curves[seed] = pd.DataFrame(values).mean()
        values = pd.DataFrame(curves).set_axis(grid).dropna()
        long = values.rename_axis("step").melt(var_name="seed", ignore_index=False)
        parts.append(long.reset_index().assign(arm=method))
    return pd.concat(parts, ignore_index=True)


# --- test prompts, as in Table 1 --------------------------------------------------------------------


def measure_policy(
    policy, reference, tokenizer, prompts: Sequence[str], watchers: Mapping[str, scorers.Scorer],
    n: int, **sampling,
) -> tuple[pd.DataFrame, list[str]]:  # fmt: skip
    """One row a prompt, and the first of its n answers.

    Columns: each scorer's maximum over the answers, distinct_2 and distinct_3 of them together, log_ppl (nats
    a token under the reference), and their sums of nll, tokens and log_prob (under the policy), in nats.
    """
    drawn = generation.sample(policy, tokenizer, prompts, n=n, label="measuring", **sampling)
    read = logprobs.perplexity(reference, tokenizer, drawn.prompt_ids, drawn.response_ids)
    table = {
        name: stats.per_prompt_maximum(who.score(drawn.texts).reshape(-1, n), n)
        for name, who in watchers.items()
    }
    for k in (2, 3):
        table[f"distinct_{k}"] = [
            distinct_n_by_prompt([texts], k) for texts in _grouped(drawn.texts, n)
        ]
    sums = {
        "nll": read["nll"].fillna(0) * read["tokens"],
        "tokens": read["tokens"],
        "log_prob": [row.sum() for row in drawn.model_log_probs],
    }
    table |= {name: np.reshape(values, (-1, n)).sum(1) for name, values in sums.items()}
    table = pd.DataFrame(table).rename_axis("prompt").reset_index()
    return table.assign(log_ppl=table["nll"] / table["tokens"]), drawn.texts[::n]


def plan(steps: int, episodes: int, model: str, parts: int = 3) -> pd.DataFrame:
    """Episodes, scorer calls, hours of a scorer that takes one text a second, and PPO's memory, an arm.

    `parts`: of an answer.  Memory as `memory.ppo` says it, with prompts of 20 and answers of 48 tokens.
    """
    rows = ppo.PPOConfig().forward_rows
    stage = memory.ppo(memory.skeleton(model), rows, 20, 48, episodes=episodes)
    calls = np.array([steps * episodes, parts * steps * episodes])
    columns = {"episodes": steps * episodes, "scorer calls": calls, "hours of calls": calls / 3600}
    table = pd.DataFrame(columns, index=["holistic", f"dense, {parts} parts an answer"])
    return table.assign(**{"PPO, GB": stage.total / 1e9})
