"""Detoxification with dense rewards (Wu et al. 2023, section 3): each segment pays for its own toxicity.

Below the reward: a training measured on its own fresh samples, and its toxicity read off at equal KL.
"""

from __future__ import annotations

import itertools
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
from lib.course.arms import Arms
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
    in `path`: a batch (prompts and answers) that is drawn again after a restart counts once.
    """
    path, seen = Path(path), {}
    if path.exists():
        seen = {row["batch"]: row for row in tables.read_jsonl(path).to_dict("records")}

    def paid(samples: generation.Samples) -> object:
        batch = runtime.content_hash(samples.prompts, samples.texts)[:16]
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
    """The curve of one training's path: its first step, then the means of each `size` steps.

    A mean stands at the last of its steps.  At the first step nothing is learned, so kl is 0 there; after it
    kl is made never falling, for it is noisy and readings are interpolated in it.
    """
    numbers = path.select_dtypes("number")
    together = numbers.groupby((path["step"].to_numpy() - 1) // size)
    means = together.mean().assign(step=together["step"].max())
    curve = pd.concat([numbers.iloc[:1].assign(kl=0.0), means]).drop_duplicates("step")
    return curve.assign(kl=np.maximum.accumulate(curve["kl"])).reset_index(drop=True)


def at(curve: pd.DataFrame, x: np.ndarray | float, column: str, by: str = "kl") -> np.ndarray:
    """A column of `blocks` where `by` is x, by linear interpolation; NaN where the training never was."""
    known = curve.dropna(subset=[by, column])
    if known.empty:
        return np.full(np.shape(x), np.nan)
    return np.interp(x, known[by], known[column], left=np.nan, right=np.nan)


def read_off(
    paths: pd.DataFrame, points: Sequence[float], columns: Sequence[str], size: int,
    by: str = "kl", unit: str = "nats", together: Sequence[str] = (),
) -> pd.DataFrame:  # fmt: skip
    """Every column where all spent the same: columns arm (the method), seed, and readings.

    `paths`: those of all arms and seeds, with columns method, seed, beta.  "<column> at 3 nats" is read off
    there, "<column> to 3 nats" is the mean over all KL from 0 to there; with `by` "calls" the same of scorer
    calls.  A method's reading is the mean over its values of beta.  Methods that stand `together` are read
    at the same places: for each seed and beta as far as all of them came (column "compared", in `unit`).
    "PT" is read at the first step, before any update.
    """
    curves = {
        key: blocks(path, size)
        for key, path in paths.groupby(["method", "seed", "beta"], sort=False)
    }
    rows = []
    for (method, seed, beta), curve in curves.items():
        far = _reach(curves, (method, seed, beta), by, together)
        if far is None:
            continue
        row = {"arm": method, "seed": seed, "compared": min(max(points), far)}
        for x, column in itertools.product(points, columns):
            way = at(curve, np.linspace(0, min(x, far), 61), column, by)
            row[f"{column} at {x:g} {unit}"] = way[-1] if x <= far else np.nan
            row[f"{column} to {x:g} {unit}"] = way.mean()
        rows.append(row)
    for seed, first in paths[paths["step"] == 1].groupby("seed"):
        places = itertools.product(columns, ("at", "to"), points)
        start = {f"{name} {word} {x:g} {unit}": first[name].mean() for name, word, x in places}
        rows.append({"arm": "PT", "seed": seed} | start)
    return pd.DataFrame(rows).groupby(["arm", "seed"], sort=False).mean().reset_index()


def _reach(
    curves: Mapping[tuple, pd.DataFrame], key: tuple, by: str, together: Sequence[str]
) -> float | None:
    """How far a curve is read: as far as it and its rivals came; None where a rival has no such beta."""
    method, seed, beta = key
    ran = {name for name, its_seed, _ in curves if its_seed == seed}
    rivals = [name for name in together if name in ran] if method in together else [method]
    wanted = [(name, seed, beta) for name in rivals]
    if not all(rival in curves for rival in wanted):
        return None
    return min(curves[rival][by].max() for rival in wanted)


def readings(
    paths: pd.DataFrame, scores: Sequence[str], others: Sequence[str], size: int, *,
    nats: Sequence[float], calls: int, together: Sequence[str],
) -> pd.DataFrame:  # fmt: skip
    """All that 43 reads off of its trainings: columns arm (the method), seed, and the readings.

    `read_off` of the scores and the `others` at each of `nats`, and of the scores at so many scorer calls.
    Of the trainings at each method's first beta: "<score>, second half", the mean of the later half of the
    steps, and "sum of drops, all steps".
    """
    keys, together = ["arm", "seed"], {"together": together}
    read = read_off(paths, nats, [*scores, *others], size, **together)
    asked = read_off(paths, [calls], scores, size, by="calls", unit="calls", **together)
    single = paths[paths["arm"] == paths["method"]]
    late = single[single["step"] > single["step"].max() / 2].groupby(keys)[list(scores)].mean()
    drop = single.groupby(keys)["drop"].mean().rename("sum of drops, all steps")
    asked = asked.set_index(keys).drop(columns="compared")
    for table in (asked, late.add_suffix(", second half"), drop):
        read = read.join(table, on=keys)
    return read


def along_kl(paths: pd.DataFrame, column: str, size: int, points: int = 41) -> pd.DataFrame:
    """A column against KL as `plots.learning_curve` draws it: columns step (nats), arm (method), seed, value.

    Means over a method's values of beta, as far as every training of the method came.
    """
    grid = np.linspace(0, paths["kl"].max(), points)
    parts = []
    for method, of_method in paths.groupby("method", sort=False):
        curves = {}
        for seed, own in of_method.groupby("seed"):
            values = [at(blocks(path, size), grid, column) for _, path in own.groupby("beta")]
            curves[seed] = np.mean(values, axis=0)
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


def levels_on_test(arms: Arms, measures: Mapping[str, str]) -> pd.DataFrame:
    """Each arm's measures on test prompts as "0.123 [0.100, 0.150]", (arms, measures); each becomes a metric.

    `measures`: name -> column of `measure_policy`.  Beside them stands perplexity, of log_ppl.
    """
    rows = {}
    for arm in arms.names:
        levels = {name: arms.level(arm, column) for name, column in measures.items()}
        ends = {name: (x.value, x.low, x.high) for name, x in levels.items()}
        nll = arms.level(arm, "log_ppl")
        ends["perplexity"] = tuple(np.exp([nll.value, nll.low, nll.high]))
        for name, values in ends.items():
            arms.run.metric(f"{arm}/{name}", *values, n=nll.n, seeds=nll.seeds)
        rows[arm] = {name: "{:.3f} [{:.3f}, {:.3f}]".format(*x) for name, x in ends.items()}
    return pd.DataFrame(rows).T


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
