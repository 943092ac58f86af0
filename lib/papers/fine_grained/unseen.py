"""Notebook 41: how good R1, R2, R3 and the preference model are on questions that they have not seen.

Every segment and pair is scored by a model that saw neither its question nor its answer.  Tables have a row
for each segment (or pair), kind of training and seed; intervals draw whole records, with their seeds.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata

from lib import stats
from lib.papers.fine_grained import models as fine_grained
from lib.papers.fine_grained import schema as qa
from lib.reward_models import Feedback, TrainConfig

SEGMENT_KINDS = ("whole", "balanced", "shuffled labels", "shuffled, balanced")
PAIR_KINDS = ("whole", "shuffled labels")
HALVES = ("states only", "relations only")
RESAMPLES = 500


# --- scores --------------------------------------------------------------------------------------


def one_half(features: Sequence[torch.Tensor], kind: str) -> list[torch.Tensor]:
    """Features (segments, width) with the other half set to 0: the states come first, then the relations."""
    if kind not in HALVES:
        return list(features)
    width = features[0].shape[1] - fine_grained.RELATIONS
    keep = torch.zeros(features[0].shape[1])
    part = slice(0, width) if kind == "states only" else slice(width, None)
    keep[part] = 1
    return [rows * keep for rows in features]


def held_out(
    model: fine_grained.FineGrainedModel, feedback: Feedback, kind: str, config: TrainConfig, *,
    folds: np.ndarray, features: Sequence[torch.Tensor] | None = None, folder: Path | None = None,
) -> list[np.ndarray]:  # fmt: skip
    """Out-of-fold scores (segments,) of each row; `kind` is one of the kinds above."""
    labelled = fine_grained.shuffled(feedback, config.seed) if kind.startswith("shuf") else feedback
    how = {"balance": kind.endswith("balanced"), "folder": folder}
    how["features"] = None if features is None else one_half(features, kind)
    return fine_grained.out_of_fold(model, labelled, folds, config, **how)


def runs(
    build: Callable[[], fine_grained.FineGrainedModel], feedback: Feedback, kinds: Sequence[str],
    config: TrainConfig, *, seeds: Sequence[int], n_folds: int, features=None, folder: Path | None = None,
):  # fmt: skip
    """(kind, seed, fold of each row, scores of each row) of every training; `folder` for their histories."""
    for kind, seed in itertools.product(kinds, seeds):
        folds = fine_grained.question_folds(feedback, n_folds, seed)
        place = None if folder is None else folder / f"{kind.replace(' ', '_')}-{seed}"
        how = {"folds": folds, "features": features, "folder": place}
        yield (
            kind,
            seed,
            folds,
            held_out(build(), feedback, kind, replace(config, seed=seed), **how),
        )


def segment_table(feedback: fine_grained.SegmentFeedback, trainings) -> pd.DataFrame:
    """A row a known segment, kind and seed: segment, record, fold, wrong (0, 1), score, kind, seed."""
    tables = []
    for kind, seed, folds, scores in trainings:
        columns = {"record": feedback.row, "fold": folds[feedback.row], "wrong": feedback.labels}
        table = pd.DataFrame(
            columns | {"score": np.concatenate(scores), "kind": kind, "seed": seed}
        )
        tables.append(table.rename_axis("segment").reset_index())
    return pd.concat(tables).dropna()


def pair_table(feedback: Feedback, asked: np.ndarray, trainings, *, seed: int) -> pd.DataFrame:
    """A row a pair, kind and seed: value 1 if ordered as people did, 0.5 if equal, or 0; and "longer".

    `asked` (rows,): the number of each row's question, by which intervals are drawn.
    """
    lengths = np.array([len(text.split()) for text in feedback.responses], dtype=float)
    arms = {("longer", seed): lengths}
    for kind, number, _, scores in trainings:
        arms[kind, number] = np.nan_to_num([row[0] if len(row) else np.nan for row in scores])
    better, worse = feedback.pairs.T
    tables = []
    for (kind, number), scores in arms.items():
        value = (np.sign(scores[better] - scores[worse]) + 1) / 2
        table = pd.DataFrame(
            {"record": asked[better], "value": value, "kind": kind, "seed": number}
        )
        tables.append(table.rename_axis("pair").reset_index())
    return pd.concat(tables)


# --- measures of segments ------------------------------------------------------------------------


def accuracy(wrong: np.ndarray, score: np.ndarray) -> float:
    """Share of segments on the right side of 0: below it, a segment is called wrong."""
    return float(((score < 0) == (wrong == 1)).mean())


def f1(wrong: np.ndarray, score: np.ndarray) -> float:
    """F1 of the wrong segments: 2 hits / (called wrong + wrong)."""
    called = score < 0
    return float(2 * (called * wrong).sum() / max(1, called.sum() + wrong.sum()))


def auc(wrong: np.ndarray, score: np.ndarray) -> float:
    """How often a wrong segment scores below a fine one; ties count half.  NaN without both."""
    n, m = wrong.sum(), (1 - wrong).sum()
    ranks = rankdata(-score)[wrong == 1].sum() - n * (n + 1) / 2
    return float(ranks / (n * m)) if n * m else np.nan


def best_threshold(wrong: np.ndarray, score: np.ndarray) -> float:
    """The score up to which calling a segment wrong gives these segments the largest F1."""
    order = np.argsort(score, kind="stable")
    hits = np.cumsum(wrong[order])
    called = np.arange(1, len(order) + 1)
    return float(score[order[np.argmax(2 * hits / (called + wrong.sum()))]])


def over_threshold(judged: pd.DataFrame) -> pd.Series:
    """Each score minus a threshold that is chosen on the other folds' scores of the same training."""
    margin = pd.Series(np.nan, index=judged.index)
    for _, rows in judged.groupby(["model", "kind", "seed"]):
        for fold in rows.fold.unique():
            others = rows[rows.fold != fold]
            threshold = best_threshold(others.wrong.to_numpy(), others.score.to_numpy())
            here = rows.index[rows.fold == fold]
            margin[here] = judged.score[here] - np.nextafter(threshold, np.inf)
    return margin


MEASURES = {  # name: column of scores, statistic of (wrong, score)
    "accuracy": ("score", accuracy),
    "gain in accuracy": ("score", lambda w, s: accuracy(w, s) - max(w.mean(), 1 - w.mean())),
    "F1": ("score", f1),
    "gain in F1": ("score", lambda w, s: f1(w, s) - 2 * w.mean() / (1 + w.mean())),
    "F1, chosen threshold": ("margin", f1),
    "gain in F1, chosen threshold": (
        "margin",
        lambda w, s: f1(w, s) - 2 * w.mean() / (1 + w.mean()),
    ),
    "AUC": ("score", auc),
}


def _interval(values, statistic=np.mean, *, clusters: pd.Series, seed: int) -> stats.Interval:
    how = {"clusters": clusters.to_numpy(), "seed": seed, "resamples": RESAMPLES}
    return stats.bootstrap(values, statistic, **how)


def segment_results(judged: pd.DataFrame, *, seed: int) -> pd.DataFrame:
    """Every measure of every model and kind: model, kind, measure, value, low, high, n (records)."""
    rows = []
    for (name, kind), table in judged.groupby(["model", "kind"], sort=False):
        for measure, (column, statistic) in MEASURES.items():
            pair = table.wrong.to_numpy(), table[column].to_numpy()
            interval = _interval(pair, statistic, clusters=table.record, seed=seed)
            rows.append({"model": name, "kind": kind, "measure": measure, **interval._asdict()})
    return pd.DataFrame(rows, columns=["model", "kind", "measure", *stats.Interval._fields])


def differences(
    judged: pd.DataFrame, pairs: Sequence[tuple[str, str]], *, seed: int
) -> pd.DataFrame:
    """Accuracy of kind b minus that of kind a on the same segments, with the difference in each seed."""
    rows = []
    for (name, table), (a, b) in itertools.product(judged.groupby("model"), pairs):
        right = ((table.score < 0) == (table.wrong == 1)).astype(float)
        index = ["record", "segment", "seed"]
        sides = table.assign(right=right).pivot(index=index, columns="kind", values="right")
        gap = (sides[b] - sides[a]).reset_index(name="gap")
        interval = _interval(gap.gap.to_numpy(), clusters=gap.record, seed=seed)
        each = " ".join(f"{value:+.3f}" for value in gap.groupby("seed").gap.mean())
        rows.append((name, f"{b} - {a}", *interval, each))
    names = ["model", "difference", "value", "low", "high", "n", "each seed"]
    return pd.DataFrame(rows, columns=names)


# --- measures of pairs ---------------------------------------------------------------------------


def gain_over_longer(ordered: pd.DataFrame) -> pd.Series:
    """Each pair's value minus what "take the longer answer" has for it."""
    longer = ordered[ordered.kind == "longer"].set_index(["model", "pair"]).value
    same = pd.MultiIndex.from_frame(ordered[["model", "pair"]])
    return ordered.value - longer.reindex(same).to_numpy()


def pair_results(ordered: pd.DataFrame, column: str, *, seed: int) -> pd.DataFrame:
    """Mean of a column by model and kind: group, condition, value, low, high, n (questions), seeds, each."""
    rows = []
    for (name, kind), table in ordered.groupby(["model", "kind"], sort=False):
        interval = _interval(table[column].to_numpy(), clusters=table.record, seed=seed)
        each = tuple(table.groupby("seed")[column].mean())
        row = {"group": name, "condition": kind, **interval._asdict()}
        rows.append(row | {"seeds": len(each), "each": each})
    columns = ["group", "condition", *stats.Interval._fields, "seeds", "each"]
    return pd.DataFrame(rows, columns=columns)


def gain_of_r3(whole: pd.DataFrame, *, seed: int) -> tuple[stats.Interval, list[float]]:
    """R3's mean gain over the longer answer minus the preference model's: in all, and in each seed."""

    def more(gain, third):
        return gain[third == 1].mean() - gain[third == 0].mean()

    pair = whole.gain.to_numpy(), (whole.model == "R3").to_numpy(float)
    each = [more(rows.gain, rows.model == "R3") for _, rows in whole.groupby("seed")]
    return _interval(pair, more, clusters=whole.record, seed=seed), each


# --- the plan of a full run ----------------------------------------------------------------------


def plan(records: Mapping[str, Sequence[dict]], settings: Mapping) -> pd.DataFrame:
    """Fits, tokens and hours of each model's training: every kind, seed and fold, and once on all records.

    1.4 tokens a word, 6 operations a parameter and token, a Longformer of 149M, an assumed 50 TFLOP/s.
    """
    rows, share = [], 1 - 1 / settings["folds"]
    for name in filter(records.get, records):
        pairs = name in ("R3", "preference")
        total = 0.0  # tokens of one pass
        for record in records[name]:
            asked = fine_grained.prompt_of(record)
            asked = asked.partition(" context: ")[0] if name == "R1" else asked
            texts = [f"{asked} {record[p]}" for p in qa.PREDICTIONS[: 4 if pairs else 1]]
            total += sum(min(1.4 * len(text.split()), settings["max_length"]) for text in texts)
        fits = len(PAIR_KINDS if pairs else SEGMENT_KINDS) * settings["seeds"] * settings["folds"]
        read = total * settings["epochs"] * (fits * share + 1)
        rows.append((name, fits + 1, read / 1e6, 6 * 149e6 * read / 5e13 / 3600))
    return pd.DataFrame(rows, columns=["model", "fits", "million tokens", "hours"])
