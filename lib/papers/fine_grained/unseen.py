"""Notebook 41: how good R1, R2, R3 and the preference model are on questions that they have not seen.

Every segment and pair is scored by a model that saw neither its question nor its answer.  Tables have a row
for each segment (or pair), kind of training and seed; intervals draw whole records, with their seeds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata

from lib import stats, text
from lib.papers.fine_grained import models as fine_grained
from lib.papers.fine_grained import schema as qa
from lib.reward_models import Feedback, TrainConfig
from lib.segments import Segmenter

SEGMENT_KINDS = ("whole", "balanced", "shuffled labels", "shuffled, balanced")
PAIR_KINDS = ("whole", "shuffled labels")
OVERLAP = "ten overlap numbers"
HALVES = ("states only", "relations only")
CUT_KINDS = ("whole", "relations only", "shuffled labels")  # for which thresholds are chosen
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


@dataclass
class Training:
    """What one kind and seed of training says of every row: its fold, its scores (segments,) out of fold.

    `thresholds`: fold -> the score below which a segment of that fold is called wrong; {} for pairs.
    """

    kind: str
    seed: int
    folds: np.ndarray
    scores: list[np.ndarray]
    thresholds: dict[int, float] = field(default_factory=dict)


def runs(
    build: Callable[[], fine_grained.FineGrainedModel], feedback: Feedback, kinds: Sequence[str],
    config: TrainConfig, *, seeds: Sequence[int], n_folds: int, features=None, folder: Path | None = None,
) -> Iterator[Training]:  # fmt: skip
    """Every kind and seed of training; `folder` for their histories."""
    for kind, seed in itertools.product(kinds, seeds):
        folds = fine_grained.question_folds(feedback, n_folds, seed)
        shuffled = kind.startswith("shuf")
        labelled = fine_grained.shuffled(feedback, seed) if shuffled else feedback
        options = {"config": replace(config, seed=seed), "balance": kind.endswith("balanced")}
        options["features"] = None if features is None else one_half(features, kind)
        place = None if folder is None else folder / f"{kind.replace(' ', '_')}-{seed}"
        scores = fine_grained.out_of_fold(build(), labelled, folds, folder=place, **options)
        training = Training(kind, seed, folds, scores)
        if kind in CUT_KINDS and feedback.pairs is None:
            training.thresholds = thresholds(build(), labelled, feedback.labels, folds, **options)
        yield training


def thresholds(
    model: fine_grained.FineGrainedModel, feedback: fine_grained.SegmentFeedback, labels: np.ndarray,
    folds: np.ndarray, **options,
) -> dict[int, float]:  # fmt: skip
    """Fold -> the threshold of largest F1 on the other folds, by models that saw neither of the two.

    For each two folds one model learns from the rest and scores both: the other's scores help to choose the
    threshold of the one.  `labels` (segments,) people's, also where `feedback` holds shuffled ones.
    """
    fresh = model.trained_state()
    inner: dict[int, list[tuple]] = {fold: [] for fold in np.unique(folds).tolist()}
    for pair in itertools.combinations(inner, 2):
        model.load_state_dict(fresh, strict=False)
        left_out = np.isin(folds, pair)
        scores = fine_grained.score_the_rest(model, feedback, ~left_out, **options)
        segments = left_out[feedback.row]
        table = pd.DataFrame({"fold": folds[feedback.row], "wrong": labels})[segments]
        table = table.assign(score=np.concatenate(scores)).dropna()
        for fold, other in (pair, pair[::-1]):
            inner[fold].append(table[table.fold == other])
    model.load_state_dict(fresh, strict=False)
    chosen = {fold: pd.concat(parts) for fold, parts in inner.items()}
    return {
        fold: best_threshold(rows.wrong.to_numpy(), rows.score.to_numpy())
        for fold, rows in chosen.items()
    }


def segment_table(
    feedback: fine_grained.SegmentFeedback, trainings: Iterable[Training]
) -> pd.DataFrame:
    """A row a known segment, kind and seed: segment, record, wrong (0, 1), score, margin, kind, seed, fold.

    `margin`: the score minus its fold's threshold, below 0 where it is called wrong; NaN without one.
    """
    tables = []
    for training in trainings:
        fold = training.folds[feedback.row]
        columns = {"record": feedback.row, "fold": fold, "wrong": feedback.labels}
        table = pd.DataFrame(columns | {"score": np.concatenate(training.scores)})
        limits = {f: np.nextafter(limit, np.inf) for f, limit in training.thresholds.items()}
        table["margin"] = table.score - table.fold.map(limits).astype(float)
        table = table.assign(kind=training.kind, seed=training.seed)
        tables.append(table.rename_axis("segment").reset_index())
    return pd.concat(tables).dropna(subset="wrong")


def pair_table(
    feedback: Feedback, asked: np.ndarray, trainings: Iterable[Training], *, seed: int
) -> pd.DataFrame:
    """A row a pair, kind and seed: value 1 if ordered as people did, 0.5 if equal, or 0; and "longer".

    `asked` (rows,): the number of each row's question, by which intervals are drawn.
    """
    lengths = np.array([len(answer.split()) for answer in feedback.responses], dtype=float)
    arms = {("longer", seed): lengths}
    for training in trainings:
        scores = [row[0] if len(row) else 0.0 for row in training.scores]
        arms[training.kind, training.seed] = np.array(scores)
    better, worse = feedback.pairs.T
    tables = []
    for (kind, number), scores in arms.items():
        value = (np.sign(scores[better] - scores[worse]) + 1) / 2
        table = pd.DataFrame(
            {"record": asked[better], "value": value, "kind": kind, "seed": number}
        )
        tables.append(table.rename_axis("pair").reset_index())
    return pd.concat(tables)


# --- a rival that counts words -------------------------------------------------------------------


def overlap_numbers(prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
    """(rows, 10) what counting words says of each answer and the passages in its prompt.

    For runs of one, two and three words: the share of the answer's that the passages have, and log(1 + how
    many).  Passage sentences half of whose words it has, log(1 + count); the share of the question's words
    in it; log(1 + its words), and the share of its words that differ.
    """
    read: dict[
        str, tuple
    ] = {}  # of each prompt: question's words, passages' runs, words by sentence
    rows = []
    for prompt, response in zip(prompts, responses, strict=True):
        if prompt not in read:
            question, _, passages = prompt.partition(" context: ")
            runs = [set(text.word_ngrams(passages, n)) for n in (1, 2, 3)]
            sentences = [set(text.words(x)) for x in Segmenter("sentence").texts(passages)]
            read[prompt] = set(text.words(question)), runs, sentences
        question, runs, sentences = read[prompt]
        words = text.words(response)
        row = []
        for n, there in enumerate(runs, 1):
            own = set(text.word_ngrams(response, n))
            row += [len(own & there) / max(1, len(own)), np.log1p(len(own & there))]
        distinct = set(words)
        held = sum(2 * len(sentence & distinct) >= len(sentence) > 0 for sentence in sentences)
        row += [np.log1p(held), len(question & distinct) / max(1, len(question))]
        rows.append([*row, np.log1p(len(words)), len(distinct) / max(1, len(words))])
    return np.array(rows).reshape(-1, 10)


def overlap_features(feedback: Feedback, width: int) -> list[torch.Tensor]:
    """Features (1, width) for `runs`: the ten numbers, and 0 where the encoder's would stand."""
    features = torch.zeros(len(feedback.responses), width)
    numbers = overlap_numbers(feedback.prompts, feedback.responses)
    features[:, : numbers.shape[1]] = torch.as_tensor(numbers)
    return list(features[:, None])


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


def auc_within(wrong: np.ndarray, score: np.ndarray, training: np.ndarray) -> float:
    """AUC over the pairs that one training scored: scores of two trainings have no common scale."""
    areas, pairs = [], []
    for number in np.unique(training):
        mine = training == number
        areas.append(auc(wrong[mine], score[mine]))
        pairs.append(wrong[mine].sum() * (1 - wrong[mine]).sum())
    pairs = np.array(pairs)
    return float(np.nansum(areas * pairs) / pairs.sum()) if pairs.any() else np.nan


def _over_constant(wrong: np.ndarray, score: np.ndarray) -> float:
    """F1 minus that of calling every segment wrong, 2 q / (1 + q) with the share q of wrong ones."""
    return f1(wrong, score) - 2 * wrong.mean() / (1 + wrong.mean())


MEASURES = {  # name: columns, statistic of them
    "accuracy": (("wrong", "score"), accuracy),
    "gain in accuracy": (
        ("wrong", "score"),
        lambda w, s: accuracy(w, s) - max(w.mean(), 1 - w.mean()),
    ),
    "F1": (("wrong", "score"), f1),
    "gain in F1": (("wrong", "score"), _over_constant),
    "F1, chosen threshold": (("wrong", "margin"), f1),
    "gain in F1, chosen threshold": (("wrong", "margin"), _over_constant),
    "AUC": (("wrong", "score", "training"), auc_within),
}


def _interval(values, statistic=np.mean, *, clusters: pd.Series, seed: int) -> stats.Interval:
    options = {"clusters": clusters.to_numpy(), "seed": seed, "resamples": RESAMPLES}
    return stats.bootstrap(values, statistic, **options)


def segment_results(judged: pd.DataFrame, *, seed: int) -> pd.DataFrame:
    """Every measure of every model and kind: model, kind, measure, value, low, high, n (records)."""
    rows = []
    for (name, kind), table in judged.groupby(["model", "kind"], sort=False):
        table = table.assign(training=table.groupby(["seed", "fold"]).ngroup())
        for measure, (columns, statistic) in MEASURES.items():
            if table[[*columns]].isna().any(axis=None):  # a kind whose threshold is not chosen
                continue
            values = tuple(table[column].to_numpy() for column in columns)
            interval = _interval(values, statistic, clusters=table.record, seed=seed)
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

    R1 and R2 also learn from all but two folds, for their thresholds.  1.4 tokens a word, 6 operations a
    parameter and token, a Longformer of 149M, an assumed 50 TFLOP/s.
    """
    rows, n_folds = [], settings["folds"]
    for name in filter(records.get, records):
        pairs = name in ("R3", "preference")
        total = 0.0  # tokens of one pass
        for record in records[name]:
            asked = fine_grained.prompt_of(record)
            asked = asked.partition(" context: ")[0] if name == "R1" else asked
            texts = [f"{asked} {record[p]}" for p in qa.PREDICTIONS[: 4 if pairs else 1]]
            total += sum(min(1.4 * len(x.split()), settings["max_length"]) for x in texts)
        kinds = PAIR_KINDS if pairs else SEGMENT_KINDS
        fits = len(kinds) * settings["seeds"] * n_folds
        passes = fits * (1 - 1 / n_folds) + 1  # the last learns from all records
        if not pairs:
            cut = len(set(CUT_KINDS) & set(kinds)) * settings["seeds"] * math.comb(n_folds, 2)
            fits += cut
            passes += cut * (1 - 2 / n_folds)
        read = total * settings["epochs"] * passes
        rows.append((name, fits + 1, read / 1e6, 6 * 149e6 * read / 5e13 / 3600))
    return pd.DataFrame(rows, columns=["model", "fits", "million tokens", "hours"])
