"""Do ratings and rankings agree, is the annotator one, and how good is a reward model trained on either?

Consistency, the degeneracy gate, repetitions; accuracy on pairs, rank correlation, calibration.

Simplified: joins are on text, as in the reference files, with line ends made alike.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from scipy import stats
from scipy.special import expit
from sklearn.metrics import cohen_kappa_score

from lib.papers.sparse_feedback.conversions import to_rankings_table
from lib.preferences import ITEM, RANKING, VERDICTS, decided, first_of_each, judged, text_keys
from lib.stats import Interval, bootstrap, correlation, proportion
from lib.text import words


def pair_verdicts(ratings: pd.DataFrame, rankings: pd.DataFrame) -> pd.DataFrame:
    """Ranked pairs whose responses both have a rating, first annotation of each.

    Columns of the rankings table, score1, score2, gap = |score1 - score2|, derived (the verdict that the
    ratings imply; equal scores are "equal"), direct (the verdict), prompt (number of the instruction and
    input).  attrs["left_out"]: pairs without a verdict or without both scores.
    """
    rated = first_of_each(judged(ratings))
    scores = dict(zip(text_keys(rated, [*ITEM, "response"]), rated["score"], strict=True))
    ranked = first_of_each(judged(rankings))
    both = pd.DataFrame(
        {
            f"score{k}": [
                scores.get(key, np.nan) for key in text_keys(ranked, [*ITEM, f"response{k}"])
            ]
            for k in (1, 2)
        },
        index=ranked.index,
    )
    rows = ranked.join(both).dropna(subset=["score1", "score2"]).reset_index(drop=True)
    order = np.sign(rows["score1"] - rows["score2"])
    rows["gap"] = (rows["score1"] - rows["score2"]).abs()
    rows["derived"] = order.map({1.0: "(a)", 0.0: "equal", -1.0: "(b)"})
    rows["direct"] = rows["verdict"]
    rows["prompt"] = pd.factorize(pd.Series(text_keys(rows, ITEM), dtype=object))[0]
    rows.attrs["left_out"] = len(first_of_each(rankings)) - len(rows)
    return rows


def agreement_table(rows: pd.DataFrame) -> pd.DataFrame:
    """3 x 3 counts: verdicts derived from ratings (rows) against rankings (columns)."""
    table = pd.crosstab(rows["derived"], rows["direct"])
    return table.reindex(index=VERDICTS, columns=VERDICTS, fill_value=0)


def _chance(derived, direct) -> float:
    return float(sum((derived == v).mean() * (direct == v).mean() for v in (-1, 0, 1)))


AGREEMENT = {  # statistics of two arrays of verdicts coded -1 (a), 0 (equal), 1 (b)
    "consistency": lambda x, y: (x == y).mean(),
    "chance": _chance,
    "kappa": lambda x, y: cohen_kappa_score(x, y) if _chance(x, y) < 1 else np.nan,
    "opposite": lambda x, y: (x * y == -1).mean(),
    "half_credit": lambda x, y: 1 - np.abs(x - y).mean() / 2,
    "decisive_both": lambda x, y: (x == y)[x * y != 0].mean() if (x * y != 0).any() else np.nan,
}


def _code(verdicts: pd.Series) -> np.ndarray:
    return verdicts.map({"(a)": -1, "equal": 0, "(b)": 1}).to_numpy()


def agreement(rows: pd.DataFrame, seed: int = 0) -> dict[str, Interval]:
    """How far ratings and rankings agree, each with a bootstrap interval over prompts.

    consistency: share of pairs with the same verdict, equal being a class of its own (the paper's).
    chance: what independent verdicts with these frequencies would reach; kappa: (consistency - chance) /
    (1 - chance).  opposite: share of reversed verdicts.  half_credit: a decisive verdict against "equal"
    counts one half.  decisive_both: consistency of the pairs where neither says "equal".
    """
    if not len(rows):
        raise ValueError(
            "no ranked pair has ratings of both responses; check that the files belong together."
        )
    codes = (_code(rows["derived"]), _code(rows["direct"]))
    clusters = rows["prompt"].to_numpy()
    return {
        name: bootstrap(codes, statistic, clusters=clusters, seed=seed)
        for name, statistic in AGREEMENT.items()
    }


def consistency_by_gap(rows: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Consistency for each |difference of the two ratings|, prompts resampled.

    Columns gap, value, low, high, n (prompts), agree and pairs (counts).  Where all pairs agree or none
    does, resampling shows no spread; then the bounds are Wilson's for n prompts.
    """
    table = []
    for gap, part in rows.groupby("gap"):
        same = (part["derived"] == part["direct"]).to_numpy()
        interval = bootstrap(same, clusters=part["prompt"].to_numpy(), seed=seed)
        if interval.value in (0, 1):
            interval = proportion(round(interval.value * interval.n), interval.n)
        counts = {"agree": int(same.sum()), "pairs": len(same)}
        table.append({"gap": int(gap), **interval._asdict(), **counts})
    return pd.DataFrame(table, columns=["gap", *Interval._fields, "agree", "pairs"])


def preferred_against_other(rows: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Length and distinct words of preferred minus unpreferred responses, under either protocol.

    One row a protocol and measure (characters, words, distinct words): value (mean difference), low, high,
    n (prompts), mean (of all responses in these pairs), longer_pct, longer_low, longer_high (how often the
    preferred one has more, of the pairs that differ), pairs and longer_n (their number, and their prompts').
    """
    counts = {
        "characters": len,
        "words": lambda text: len(words(text)),
        "distinct words": lambda text: len(set(words(text))),
    }
    table = []
    for protocol, column in (("rankings", "direct"), ("ratings", "derived")):
        pairs = decided(rows.assign(verdict=rows[column]))
        prompts = pairs["prompt"].to_numpy()
        first = (pairs["verdict"] == "(a)").to_numpy()
        for measure, count in counts.items():
            sizes = np.array([[*map(count, pairs[f"response{k}"])] for k in (1, 2)], dtype=float)
            more = np.where(first, sizes[0] - sizes[1], sizes[1] - sizes[0])
            differ = more != 0
            interval = bootstrap(more, clusters=prompts, seed=seed)
            longer = bootstrap(100.0 * (more > 0)[differ], clusters=prompts[differ], seed=seed)
            row = {"protocol": protocol, "measure": measure, **interval._asdict()}
            row["mean"] = sizes.mean() if sizes.size else np.nan
            row["pairs"] = int(differ.sum())
            names = ("longer_pct", "longer_low", "longer_high", "longer_n")
            table.append(row | dict(zip(names, longer, strict=True)))
    return pd.DataFrame(table)


# --- is the annotator an annotator? --------------------------------------------------------------


def _entropy(values: Sequence) -> float:
    """Shannon entropy of the values' frequencies, in bits."""
    counts = pd.Series(values).value_counts().to_numpy(float)
    return float(stats.entropy(counts, base=2)) if len(values) else np.nan


def judge_report(ratings: pd.DataFrame, rankings: pd.DataFrame) -> pd.DataFrame:
    """The degeneracy gate: an annotator that always answers the same is no annotator.

    One row a check: check, value, limit, n, passes.  Ratings: share of the commonest score and entropy
    (bits).  Rankings: share of "equal" (both orders gave the same letter), entropy of verdicts, and, where
    the columns first and swapped hold the two calls' letters, the share of calls that chose the first
    response (an unbiased annotator is near 0.5).
    """
    scores = judged(ratings)["score"]
    verdicts = judged(rankings)["verdict"]
    top = scores.value_counts(normalize=True).max() if len(scores) else np.nan
    equal = (verdicts == "equal").mean()
    checks = [
        ("ratings: commonest score's share", top, 0.9, "at most", len(scores)),
        ("ratings: entropy, bits", _entropy(scores), 0.5, "at least", len(scores)),
        ("rankings: share of equal", equal, 0.8, "at most", len(verdicts)),
        ("rankings: entropy, bits", _entropy(verdicts), 0.5, "at least", len(verdicts)),
    ]
    if {"first", "swapped"} <= set(rankings):
        calls = pd.concat([rankings["first"], rankings["swapped"]])
        calls = calls[calls.isin(["(a)", "(b)"])]  # "equal" follows no position
        share = (calls == "(a)").mean()
        checks.append(("calls: first position's share", share, 0.9, "at most", len(calls)))
        checks.append(("calls: first position's share", share, 0.1, "at least", len(calls)))
    report = pd.DataFrame(checks, columns=["check", "value", "limit", "side", "n"])
    below, above = report["value"] <= report["limit"], report["value"] >= report["limit"]
    report["passes"] = np.where(report["side"] == "at most", below, above)
    report["limit"] = report.pop("side") + " " + report["limit"].astype(str)
    return report


def missing_by_pair(items: Iterable[dict], rankings: pd.DataFrame) -> pd.DataFrame:
    """Which pairs of an item's responses have a verdict: pair ("1-2", ...), present, expected, share.

    An uneven column shows losses that are not random (such as every second call failing).
    """
    ranked = Counter(text_keys(judged(rankings), RANKING[:-1]))
    rows = []
    for item in items:
        table = to_rankings_table([item])
        numbers = itertools.combinations(range(1, len(item["responses"]) + 1), 2)
        for (i, j), key in zip(numbers, text_keys(table, table.columns), strict=True):
            rows.append((f"{i}-{j}", ranked[key] > 0))
            ranked[key] -= 1  # a row answers one pair, also where two responses are alike
    asked = pd.DataFrame(rows, columns=["pair", "present"])
    presence = asked.groupby("pair", sort=False)["present"]
    return presence.agg(present="sum", expected="size", share="mean").reset_index()


def cyclic_triads(rankings: pd.DataFrame) -> tuple[int, int]:
    """(cycles, triads): among three responses of a prompt with three decisive verdicts, a > b > c > a.

    Verdicts tossed by coin make a quarter of the triads cyclic.
    """
    pairs = decided(first_of_each(judged(rankings)))
    cycles = triads = 0
    for _, group in pairs.groupby(ITEM, sort=False):
        beats: dict[frozenset, str] = {}
        for row in group.itertuples():
            winner = row.response1 if row.verdict == "(a)" else row.response2
            beats[frozenset((row.response1, row.response2))] = winner
        texts = sorted(set(group["response1"]) | set(group["response2"]))
        for triple in itertools.combinations(texts, 3):
            winners = [beats.get(frozenset(p)) for p in itertools.combinations(triple, 2)]
            if None not in winners:
                triads += 1
                cycles += len(set(winners)) == 3
    return cycles, triads


def test_retest(table: pd.DataFrame, seed: int = 0) -> dict[str, Interval]:
    """Agreement of repeated annotations of the same thing, first against second, items resampled.

    Rankings: same (share of equal verdicts).  Ratings: same (share of equal scores), gap (mean
    |difference|), verdict (share of the pairs of an item's responses for which the scores of both
    occasions imply the same verdict, the share to set beside agreement with rankings).
    """
    table = judged(table)
    column = "score" if "score" in table else "verdict"
    texts = [*ITEM, "response"] if column == "score" else RANKING[:-1]
    keys = pd.Series(text_keys(table, texts), index=table.index, dtype=object)
    groups = {k: g.tolist()[:2] for k, g in table[column].groupby(keys, sort=False) if len(g) > 1}
    items = pd.factorize(pd.Series([key[:2] for key in groups], dtype=object))[0]
    first, second = (np.array([pair[k] for pair in groups.values()]) for k in (0, 1))
    intervals = {"same": bootstrap(first == second, clusters=items, seed=seed)}
    if column == "score":
        intervals["gap"] = bootstrap(np.abs(first - second), clusters=items, seed=seed)
        rows = [itertools.combinations(np.flatnonzero(items == i), 2) for i in np.unique(items)]
        left, right = np.array([*itertools.chain(*rows)], dtype=int).reshape(-1, 2).T
        implied = [np.sign(scores[left] - scores[right]) for scores in (first, second)]
        same = implied[0] == implied[1]
        intervals["verdict"] = bootstrap(same, clusters=items[left], seed=seed)
    return intervals


test_retest.__test__ = False  # its name would make pytest collect it


# --- how good is a reward model ------------------------------------------------------------------


def pair_margins(rankings: pd.DataFrame, z1: np.ndarray, z2: np.ndarray) -> pd.DataFrame:
    """Decided pairs with margin = z1 - z2 and won (1 where response1 was preferred), and their prompt."""
    rows = rankings.assign(margin=np.asarray(z1) - np.asarray(z2))
    rows["prompt"] = pd.factorize(rows["instruction"] + "\x1f" + rows["input"])[0]
    rows = decided(rows)
    return rows.assign(won=(rows["verdict"] == "(a)").astype(float))


def pairwise_accuracy(pairs: pd.DataFrame, seed: int = 0) -> Interval:
    """Share of decided pairs ordered as the annotator did, equal scores one half; prompts resampled.

    Pairs without a margin are left out.
    """
    side = np.sign(pairs["margin"].to_numpy(float))  # NaN stays NaN
    right = np.where(pairs["won"] == 1, 1 + side, 1 - side) / 2
    return bootstrap(right, clusters=pairs["prompt"].to_numpy(), seed=seed)


def rank_correlation(
    z: np.ndarray, scores: Sequence[float], prompts: Sequence, seed: int = 0
) -> Interval:
    """Mean over prompts of the Spearman correlation, within the prompt, of scores z with ratings.

    Within, because a Bradley-Terry score has no level that prompts share.  Prompts are resampled; those
    where a side does not vary are left out, and n counts the others.  So are responses without a score.
    """
    table = pd.DataFrame({"z": np.asarray(z, dtype=float), "prompt": np.asarray(prompts)})
    table["score"] = pd.Series(scores).astype(float).to_numpy()
    correlations = [
        correlation(*rows[["z", "score"]].rank().to_numpy().T)
        for _, rows in table.dropna(subset=["z", "score"]).groupby("prompt", sort=False)
    ]
    return bootstrap(correlations, seed=seed)


def calibration(pairs: pd.DataFrame, bins: int = 5) -> pd.DataFrame:
    """Predicted against observed preference, in `bins` of equal size by sigmoid(margin).

    Columns predicted (mean), value (share won), low, high (Wilson), n.  Every pair stands in it from both
    sides, so the table is symmetric; n and the intervals count it once.  attrs["error"]: the expected
    calibration error, sum over bins of n/N |value - predicted|; NaN where there is no pair.
    """
    pairs = pairs[pairs["margin"].notna()]
    predicted = expit(pairs["margin"].to_numpy(float))
    won = pairs["won"].to_numpy(float)
    both, outcome = np.append(predicted, 1 - predicted), np.append(won, 1 - won)
    bins = max(1, min(bins, len(both)))
    rows = []
    for part in np.array_split(np.argsort(both, kind="stable"), bins) if len(both) else ():
        n = max(1, len(part) // 2)
        share = outcome[part].mean()
        interval = proportion(round(share * n), n)
        rows.append((both[part].mean(), share, interval.low, interval.high, n))
    table = pd.DataFrame(rows, columns=["predicted", "value", "low", "high", "n"])
    gaps = (table["value"] - table["predicted"]).abs()
    table.attrs["error"] = float(np.average(gaps, weights=table["n"])) if rows else np.nan
    return table
