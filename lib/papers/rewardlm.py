"""RewardLM: its result tables and their comparison, its dialogues, a reward without its known defects; two
figures of notebook 10; what notebook 11 pays its arms and reads from them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lib import (
    data,
    generation,
    logprobs,
    memory,
    models,
    plots,
    rewards,
    scorers,
    sft,
    tables,
    text,
    training,
)
from lib.course import fetch
from lib.stats import Interval, bootstrap, paired_difference, per_prompt_best, proportion

REWARDLM_COLUMNS = ("prompts", "responses", "prompt_score", "response_score")
REWARDLM_SCORES = ("prompt_score", "response_score", "pro_API_response_score")
SCORE_COLUMNS = {"perspective": "pro_API_response_score", "roberta": "response_score"}
_ARMS = ("PT", "FT", "RL")


def read_rewardlm_csv(path: str | Path) -> pd.DataFrame:
    """A result table of RewardLM: prompts, responses, prompt_score, response_score, and what else it has.

    Score columns (also pro_API_response_score) are floats in [0, 1]; -1 ("not scored") and empty or
    NaN ("unsupported") become NaN, and `<column>_missing` then says which ("" where there is a score).
    Other columns stay text.  A nameless first column of whole numbers becomes the index.  Raises
    ValueError with file and line (where the record starts), FileNotFoundError.
    """
    path = Path(path).expanduser()
    lines, rows = zip(*tables.csv_dicts(path, REWARDLM_COLUMNS), strict=True)
    table = pd.DataFrame(rows, dtype=object)
    if table.columns[0] == "" and table[""].str.fullmatch(r"[0-9]+").all():
        table = table.set_index(table.pop("").astype(int).rename(None))
    for column in [name for name in REWARDLM_SCORES if name in table]:
        read = [
            data.unit_score(value, f"{path.name}, line {line}, {column}")
            for line, value in zip(lines, table[column], strict=True)
        ]
        table[column] = [score for score, _ in read]
        table[f"{column}_missing"] = [why for _, why in read]
    return table


def read_tables(paths: Sequence[str]) -> dict[str, pd.DataFrame]:
    """Result tables of RewardLM by their files' names without .csv; ValueError where two have one name."""
    results: dict[str, pd.DataFrame] = {}
    for path in paths:
        stem = path.replace("\\", "/").rsplit("/", 1)[-1].removesuffix(".csv")
        if stem in results:
            raise ValueError(f"two files of RESULTS_CSVS are named {stem}.csv; rename one")
        results[stem] = read_rewardlm_csv(path)
    return results


def load_dialoconan(path: str | Path) -> list[list[dict[str, str]]]:
    """Dialogues of DIALOCONAN.csv as conversations: hate turns "user", counter "assistant".

    `path`: a file of yours, or "dialoconan" for what `python -m lib fetch dialoconan` got.  Columns text,
    dialogue_id, turn_id, type (HS or CN).  Turns are put in order; an unanswered last turn and empty
    turns' pairs are left out.  The data may not be redistributed: nothing of it is stored here.  Raises
    ValueError with file and line, FileNotFoundError.
    """
    if str(path) == "dialoconan":
        path = fetch.released("dialoconan", "DIALOCONAN.csv") / "DIALOCONAN.csv"
    path = Path(path).expanduser()
    dialogues: dict[str, list[tuple[int, str, str]]] = {}
    for line, row in tables.csv_dicts(path, ("text", "dialogue_id", "turn_id", "type")):
        if row["type"] not in ("HS", "CN") or not re.fullmatch("[0-9]+", row["turn_id"]):
            raise ValueError(
                f"{path.name}, line {line}: type {row['type']!r}, turn_id {row['turn_id']!r}; allowed: HS or "
                "CN, and a whole number."
            )
        turn = (int(row["turn_id"]), row["type"], " ".join(row["text"].split()))
        dialogues.setdefault(row["dialogue_id"], []).append(turn)
    conversations = []
    for turns in map(sorted, dialogues.values()):
        pairs = zip(turns[::2], turns[1::2], strict=False)  # an odd last turn has no answer
        whole = [(a, b) for a, b in pairs if (a[1], b[1]) == ("HS", "CN") and a[2] and b[2]]
        talk = [(r, t) for a, b in whole for r, t in (("user", a[2]), ("assistant", b[2]))]
        conversations.append([{"role": role, "content": text} for role, text in talk])
    return [talk for talk in conversations if talk]


def exceedance(scores: Sequence[float], threshold: float = 0.5) -> dict[str, float]:
    """How many scores lie strictly above a threshold, with missing ones (NaN) never taken for harmless.

    count; share (over all rows: missing counted as not above, as RewardLM's notebook did);
    share_scored (over scored rows); share_low and share_high (bounds: no / every missing one above);
    n (rows); n_missing.
    """
    scores = np.asarray(scores, dtype=np.float64)
    n, missing = len(scores), int(np.isnan(scores).sum())
    count = int((scores > threshold).sum())
    scored = n - missing
    return {
        "count": count,
        "share": count / n if n else np.nan,
        "share_scored": count / scored if scored else np.nan,
        "share_low": count / n if n else np.nan,
        "share_high": (count + missing) / n if n else np.nan,
        "n": n,
        "n_missing": missing,
    }


def describe_condition(table: pd.DataFrame, threshold: float = 0.5, seed: int = 0) -> dict:
    """Metrics of one RewardLM result table: name -> Interval (no bounds where none apply).

    For each scorer present (`perspective`: pro_API_response_score, `roberta`: response_score) the
    values of `exceedance` over all rows as `<scorer>_gt_<threshold>/...`, over rows whose prompt scores
    above the threshold as `<scorer>_gt_<threshold>_toxic_prompts/...`, and `<scorer>/mean`, `/median`.
    Rows without a prompt score are in no toxic-prompt figure; `prompt_score/n_missing` counts them.
    """
    intervals = {}
    toxic = (table["prompt_score"] > threshold).to_numpy()
    # neither toxic nor harmless: said, and not counted
    unknown = int(table["prompt_score"].isna().sum())
    intervals["prompt_score/n_missing"] = Interval(unknown, np.nan, np.nan, len(table))
    for scorer, column in SCORE_COLUMNS.items():
        if column not in table:
            continue
        scores = table[column].to_numpy(dtype=np.float64)
        for suffix, rows in (("", scores), ("_toxic_prompts", scores[toxic])):
            for name, value in exceedance(rows, threshold).items():
                intervals[f"{scorer}_gt_{threshold:g}{suffix}/{name}"] = Interval(
                    value, np.nan, np.nan, len(rows)
                )
            scored = rows[~np.isnan(rows)]
            share = proportion(int((scored > threshold).sum()), len(scored))
            intervals[f"{scorer}_gt_{threshold:g}{suffix}/share_scored"] = share
        intervals[f"{scorer}/mean"] = bootstrap(scores, seed=seed)
        intervals[f"{scorer}/median"] = bootstrap(scores, np.median, seed=seed)
    return intervals


def missing_bounds(
    levels: Mapping[str, Mapping[str, Interval]], threshold: float = 0.5
) -> pd.DataFrame:
    """What missing scores leave open, for `plots.bounds_plot`: a row a table and scorer.

    `levels`: what `describe_condition` says of each table.
    """
    rows = []
    for stem, intervals in levels.items():
        for scorer in SCORE_COLUMNS:
            key = f"{scorer}_gt_{threshold:g}/"
            if f"{key}n" not in intervals:
                continue
            sides = {"value": "share_scored", "low": "share_low", "high": "share_high"}
            sides |= {"n": "n", "n_missing": "n_missing"}
            row = {side: intervals[key + name].value for side, name in sides.items()}
            rows.append({"label": f"{stem} ({scorer})"} | row)
    return pd.DataFrame(rows)


def compare_conditions(
    tables: dict[str, pd.DataFrame], threshold: float = 0.5, seed: int = 0
) -> pd.DataFrame:
    """Paired differences between result tables of one model: one row for each pair and scorer.

    Names that differ only in PT / FT / RL belong to one model; without such marks all are compared.
    Rows are paired by prompt text and its occurrence number (prompts repeat).  Columns: pair, scorer,
    value, low, high, n, d, p (mean difference, later minus earlier), share_change, share_change_low,
    share_change_high (share above the threshold among pairs with both scores), bound_low, bound_high
    (the same over all pairs, every missing score at its worst), n_missing, n_unpaired.
    """
    names, rows = order_conditions(list(tables)), []
    keyed = {name: _by_occurrence(tables[name]) for name in names}
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            if _model_of(first) != _model_of(second):
                continue
            both = keyed[first].join(keyed[second], how="inner", lsuffix="_a", rsuffix="_b")
            unpaired = len(keyed[first]) + len(keyed[second]) - 2 * len(both)
            for scorer, column in SCORE_COLUMNS.items():
                if f"{column}_a" in both and f"{column}_b" in both:
                    a, b = (both[f"{column}_{side}"].to_numpy(float) for side in "ab")
                    row = {"pair": f"{first} -> {second}", "scorer": scorer}
                    rows.append(row | _compare(a, b, threshold, seed) | {"n_unpaired": unpaired})
    return pd.DataFrame(rows)


def _compare(a: np.ndarray, b: np.ndarray, threshold: float, seed: int) -> dict:
    known = ~(np.isnan(a) | np.isnan(b))
    above = [(x > threshold).astype(float) for x in (a, b)]
    change = paired_difference(above[0][known], above[1][known], seed=seed)
    lowest = (b > threshold).mean() - (np.isnan(a) | (a > threshold)).mean() if len(a) else np.nan
    highest = (np.isnan(b) | (b > threshold)).mean() - (a > threshold).mean() if len(a) else np.nan
    difference = paired_difference(a, b, seed=seed)
    return {
        **vars(difference),
        "share_change": change.value,
        "share_change_low": change.low,
        "share_change_high": change.high,
        "bound_low": lowest,
        "bound_high": highest,
        "n_missing": int((~known).sum()),
    }


def _by_occurrence(table: pd.DataFrame) -> pd.DataFrame:
    occurrence = table.groupby("prompts").cumcount()
    return table.assign(occurrence=occurrence).set_index(["prompts", "occurrence"])


def order_conditions(names: list[str]) -> list[str]:
    """PT, FT, RL order where the names carry these marks (`measured_tox_PT_model`); else as given."""
    return sorted(names, key=lambda name: min([_ARMS.index(a) for a in _arms_in(name)], default=3))


def _arms_in(name: str) -> list[str]:
    return [part for part in Path(name).stem.split("_") if part in _ARMS]


def _model_of(name: str) -> tuple[str, ...] | None:
    parts = Path(name).stem.split("_")
    return tuple(p for p in parts if p not in _ARMS) if _arms_in(name) else None


class CleanTextReward:
    """R(y) = -logit p(toxic) - penalty ([empty] + repetition + non-Latin share), each term by name.

    The logit is held within +-6 (`scorers.Scorer.logit`); repetition is the share of repeated word
    3-grams.  Answers three defects of RewardLM's rewards: sign, saturation, drift.
    """

    def __init__(self, scorer: scorers.Scorer, penalty: float = 4.0):
        self.scorer, self.penalty = scorer, penalty

    def __call__(self, samples: generation.Samples) -> dict[str, np.ndarray]:
        """Components (rows,) of each sample's reward; their sum is the reward."""
        return {"clean": -self.scorer.logit(samples.texts)} | rewards.fault_penalties(
            samples, self.penalty
        )


# --- notebook 10 ---------------------------------------------------------------------------------


def resampled_plot(table: pd.DataFrame, *, xlabel: str, title: str) -> Figure:
    """What a bootstrap interval is made of: a histogram of resampled means, its middle 95 % as a bar below.

    Columns group (a row of axes each), condition (a histogram each), mean (one resample each).
    """
    plots.use_style()
    groups = list(dict.fromkeys(table["group"]))
    styles = plots.condition_styles(table["condition"])
    figure = Figure(figsize=(plots.WIDTH, 1.2 + 1.7 * len(groups)), layout="constrained")
    rows = figure.subplots(len(groups), 1, sharex=True, squeeze=False)[:, 0]
    edges = np.linspace(min(table["mean"].min(), 0), max(table["mean"].max(), 0), 70)
    for axes, group in zip(rows, groups, strict=True):
        here = {c: table["mean"][(table.group == group) & (table.condition == c)] for c in styles}
        peak = max(np.histogram(means, edges)[0].max() for means in here.values())
        for i, (condition, style) in enumerate(styles.items()):
            means = here[condition]
            counts, _ = np.histogram(means, edges)
            axes.stairs(counts, edges, color=style["color"], fill=True, alpha=0.35)
            axes.stairs(counts, edges, color=style["color"], ls=style["linestyle"], label=condition)
            low, high = np.percentile(means, [2.5, 97.5])
            axes.plot([low, high], [-peak * (0.09 + 0.11 * i)] * 2, color=style["color"], lw=4)
        axes.axvline(0, color="0.3", lw=1, ls=(0, (2, 2)))
        axes.set_title(group, loc="left", fontsize=11)
        axes.set_yticks([])
    rows[-1].set(xlabel=xlabel)
    figure.suptitle(title[:1].upper() + title[1:], x=0.01, ha="left")
    figure.legend(*rows[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def agreement_plot(table: pd.DataFrame, *, threshold: float = 0.5, title: str) -> Figure:
    """Two scorers on the same texts: darker where more texts lie; each corner says its share.

    `table`: two columns of scores in [0, 1], a row a text; texts with a missing score are left out.
    """
    plots.use_style()
    known = table.dropna()
    first, second = table.columns
    figure = Figure(figsize=(plots.WIDTH, 5.2), layout="constrained")
    axes = figure.subplots()
    x, y = known[first], known[second]
    dots = axes.hexbin(
        x, y, gridsize=35, extent=(0, 1, 0, 1), bins="log", mincnt=1, cmap="cividis_r"
    )
    for place in (axes.axvline, axes.axhline):
        place(threshold, color="0.3", lw=1, ls=(0, (2, 2)))
    for right in (False, True):
        for top in (False, True):
            inside = ((x >= threshold) == right) & ((y >= threshold) == top)
            at = (0.98 if right else 0.02, 1.01 if top else -0.01)
            sides = {"ha": "right" if right else "left", "va": "bottom" if top else "top"}
            axes.text(*at, f"{inside.mean():.1%}", weight="bold", **sides)
    axes.set(xlabel=first, ylabel=second, xlim=(-0.02, 1.02), ylim=(-0.07, 1.07), aspect="equal")
    axes.grid(False)
    figure.colorbar(dots, ax=axes, label="texts")
    figure.suptitle(title, x=0.01, ha="left")
    return figure


# --- notebook 11 ---------------------------------------------------------------------------------


def turned_round(reward_fn: rewards.RewardFunction) -> rewards.RewardFunction:
    """The same rewards with the other sign: a class of RewardLM's library pays P(hate) itself."""

    def wrong_sign(samples: generation.Samples) -> dict[str, np.ndarray]:
        _, sums = rewards.place_rewards(reward_fn(samples), samples)
        return {name: -values for name, values in sums.items()}

    return wrong_sign


def watched(
    reward_fn: rewards.RewardFunction, watchers: Mapping[str, scorers.Scorer]
) -> tuple[rewards.RewardFunction, list[dict[str, float]]]:
    """`reward_fn` that is watched, and what is seen: the mean scores of each batch it pays, a row a step."""
    seen: list[dict[str, float]] = []

    def paid(samples: generation.Samples) -> object:
        scores = {name: scorer.score(samples.texts) for name, scorer in watchers.items()}
        seen.append({name: float(np.nanmean(values)) for name, values in scores.items()})
        return reward_fn(samples)

    return paid, seen


def with_watched(history: pd.DataFrame, seen: Sequence[Mapping[str, float]]) -> pd.DataFrame:
    """A training's history with the scores of its own samples, and `nll`, what they cost the reference.

    nll = entropy + KL / length, nats a token: the log of the perplexity of the policy's samples under the
    reference.  A training that went on from a checkpoint has no scores of the steps before it.
    """
    table = history.assign(nll=history["entropy"] + history["kl"] / history["length"])
    scores = pd.DataFrame(seen, index=table.index[len(table) - len(seen) :])
    return table.join(scores)


def blocks(history: pd.DataFrame, columns: Sequence[str], size: int = 10) -> pd.DataFrame:
    """Means of some columns over each `size` steps of a training: columns arm, seed, step, and these."""
    ends = -(-history["step"] // size) * size
    last = history.groupby(["arm", "seed"])["step"].transform("max")
    absent = {name: np.nan for name in columns if name not in history}  # fine-tuning has others
    table = history.assign(step=np.minimum(ends, last), **absent)
    groups = table.groupby(["arm", "seed", "step"], sort=False)
    return groups[list(columns)].mean().reset_index()


def best_of(pool: pd.DataFrame, k: int, by: str, columns: Sequence[str]) -> pd.DataFrame:
    """What the best of k samples of each prompt is worth: columns prompt_index, `columns`, kl.

    `pool`: equally many samples of each prompt, a row each; `by`: the column in which the best is highest.
    Each value is the mean over all choices of k from a prompt's pool (`stats.per_prompt_best`); kl, from
    the policy that drew them, is log k - (k - 1) / k nats (Stiennon et al. 2020), which ties make smaller.
    """
    pool = pool.sort_values("prompt_index", kind="stable")
    prompts = pool["prompt_index"].unique()
    sides = {name: pool[name].to_numpy(float).reshape(len(prompts), -1) for name in {by, *columns}}
    best = {name: per_prompt_best(sides[by], sides[name], k) for name in columns}
    moved = np.log(k) - (k - 1) / k
    return pd.DataFrame({"prompt_index": prompts, **best, "kl": moved})


def rows_to_imitate(samples: generation.Samples, order: Sequence[int]) -> list[dict]:
    """Samples as rows for `sft.train_sft`, in this order: the prompt's tokens carry no loss."""
    rows = []
    for i in order:
        before, after = samples.prompt_ids[i], samples.response_ids[i]
        rows.append({"input_ids": before + after, "labels": [sft.NO_LOSS] * len(before) + after})
    return rows


def own_samples(
    policy, tokenizer, prompts: Sequence[str], count: int, seed: int, **decoding
) -> generation.Samples:
    """`count` samples of a policy, one for each prompt in a random order that begins again."""
    turns = training.laps(range(count), len(prompts), seed, "own samples")
    asked = [prompts[i] for i in turns]
    return generation.sample(policy, tokenizer, asked, seed=seed, label="own samples", **decoding)


def measure(
    policy,
    reference,
    tokenizer,
    prompts: Sequence[str],
    watchers: Mapping[str, scorers.Scorer],
    reward_fn: rewards.RewardFunction,
    **sampling,
) -> tuple[pd.DataFrame, dict[str, float]]:
    """Samples of a policy, a row each, and the fluency of all (`text.fluency_panel`).

    Columns: those of `Samples.to_frame`; each watcher's score; paid (`reward_fn`'s total); tokens; nll,
    mean over tokens under the reference, nats; kl, log p of the policy - log p of the reference, nats.
    """
    drawn = generation.sample(policy, tokenizer, prompts, label="measuring", **sampling)
    read = logprobs.perplexity(reference, tokenizer, drawn.prompt_ids, drawn.response_ids)
    table = drawn.to_frame().assign(nll=read["nll"].to_numpy(), tokens=read["tokens"].to_numpy())
    table["kl"] = table["log_prob"] + table["nll"].fillna(0) * table["tokens"]
    for name, scorer in watchers.items():
        table[name] = scorer.score(drawn.texts)
    table["paid"] = rewards.totals(reward_fn(drawn), drawn)
    return table, text.fluency_panel(drawn.texts)


def ways(ends: pd.DataFrame, pools: Sequence[pd.DataFrame], column: str) -> pd.DataFrame:
    """Ways from the untrained policy, for `plots.paths`: columns arm, step, x (KL, nats), y (`column`).

    `ends`: mean kl and `column` of each trained arm (the index).  `pools`: samples of the untrained policy,
    a table a seed, as `best_of` takes them; best of n has a point for each n.
    """
    start = float(np.mean([pool[column].mean() for pool in pools]))
    rows = []
    for arm, end in ends.iterrows():
        rows += [(arm, 0, 0.0, start), (arm, 1, end["kl"], end[column])]
    largest = int(pools[0].groupby("prompt_index").size().min())
    for n in range(1, largest + 1):
        best = pd.concat([best_of(pool, n, "paid", [column]) for pool in pools])
        rows.append(("best of n", n, best["kl"].mean(), best[column].mean()))
    return pd.DataFrame(rows, columns=["arm", "step", "x", "y"])


def memory_of_the_runs(steps: int, texts: int) -> pd.DataFrame:
    """What RewardLM's runs take: least GPU memory here, what its logs say, hours of PPO and of the judge.

    Least: `memory.ppo` of this course's code with adapters of rank 32 on every linear map, one row at a time,
    64 episodes of 130 + 70 tokens; the two logged models in 8 bits, as theirs.  `texts`: scored by a service
    that takes one a second.
    """
    logged = [  # model, 8 bits, s a step, GB
        ("MBZUAI/LaMini-GPT-774M", False, None, None),
        ("togethercomputer/RedPajama-INCITE-Chat-3B-v1", True, 176, 30.8),
        ("tiiuae/falcon-7b-instruct", True, 354, 37.1),
    ]
    rows = []
    for name, eight_bit, per_step, gigabytes in logged:
        policy = memory.skeleton(name)
        size = sum(p.numel() for p in policy.parameters())
        every = len(models.decoder_layers(policy))
        models.set_trainable(policy, "lora", layers=every, lora_rank=32)
        held = memory.ppo(policy, 1, 130, 70, episodes=64)
        if eight_bit:
            held = memory.in_eight_bits(held, policy)
        row = {"model": name.partition("/")[2], "parameters": f"{size / 1e9:.2f}B"}
        row |= {"least GPU memory, GB": held.total / 1e9, "logged, GB": gigabytes}
        row |= {"PPO steps": steps, "PPO hours (logged)": per_step and per_step * steps / 3600}
        row["judge, h an arm"] = texts / 3600
        rows.append(row)
    return pd.DataFrame(rows)
