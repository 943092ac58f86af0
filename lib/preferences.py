"""Ratings and rankings of responses: tables, the five conversions of "sparse feedback", agreement, win rates.

Bansal, Dang and Grover (ICLR 2024) collect two kinds of feedback on the same responses: a rating from
1 to 7 for each, and a comparison of each pair, asked in both orders.  An item is a dict {instruction,
input, responses}; a ratings table has the columns instruction, input, response, score; a rankings
table instruction, input, response1, response2, verdict, where "(a)" prefers response1, "(b)" response2
and "equal" neither.  Text is kept exactly: a missing input is "", and "None" or "NA" are words.

Simplified: joins are on text, as in the reference files, with line ends made alike.
"""

from __future__ import annotations

import csv
import io
import itertools
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import optimize, stats
from sklearn.metrics import cohen_kappa_score

from lib import data, runtime
from lib.stats import Interval, bootstrap, proportion, spread
from lib.text import words

VERDICTS = ("(a)", "equal", "(b)")  # the order of rows and columns in tables
SCALE = (1, 7)
ITEM = ["instruction", "input"]
RATING = [*ITEM, "response", "score"]
RANKING = [*ITEM, "response1", "response2", "verdict"]
# The Alpaca prompt formats (Stanford, 2023), which the released reward-model file uses as keys.
_ALPACA = {
    True: "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response: ",
    False: "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n### Response: ",
}


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """The Alpaca prompt, with its input part where there is one; it ends in one blank."""
    return _ALPACA[bool(input)].format(instruction=instruction, input=input)


def item_id(instruction: str, input: str, *responses: str) -> str:
    """A stable name for an annotated thing: 16 hex digits of the hash of its texts."""
    return runtime.content_hash(instruction, input, *responses)[:16]


# --- files ---------------------------------------------------------------------------------------


def _read_json(path: str | Path, needed: dict[str, type]) -> list[dict]:
    path = Path(path).expanduser()
    records = []
    for line, record in data.json_records(path):
        for name, kind in needed.items():
            if not isinstance(record, dict) or not isinstance(record.get(name), kind):
                raise ValueError(
                    f"{path.name}, line {line}: {name!r} must be a {kind.__name__}; each record needs "
                    f"{', '.join(needed)}."
                )
        records.append(record)
    return records


def read_instructions(path: str | Path) -> list[dict]:
    """instructions.json: a list of {instruction, input}; a missing or null input becomes ""."""
    found = _read_json(path, {"instruction": str})
    return [{"instruction": r["instruction"], "input": r.get("input") or ""} for r in found]


def read_generations(path: str | Path) -> list[dict]:
    """A generation file: a list of {instruction, input, responses: [text, ...]}."""
    found = _read_json(path, {"instruction": str, "responses": list})
    return [
        {
            "instruction": r["instruction"],
            "input": r.get("input") or "",
            "responses": r["responses"],
        }
        for r in found
    ]


def read_outputs(path: str | Path) -> list[dict]:
    """Model outputs in AlpacaEval's form: a list of {dataset, instruction, output, generator}."""
    return _read_json(path, {"dataset": str, "instruction": str, "output": str})


def _read_table(path: str | Path, columns: list[str], what: str) -> pd.DataFrame:
    """Our CSV (with a header), or the reference's (without; it writes "nan" for a missing input)."""
    path = Path(path).expanduser()
    lines, rows = zip(*data.csv_records(path), strict=True)
    ours = set(columns) <= set(rows[0])
    names, rows, lines = (rows[0], rows[1:], lines[1:]) if ours else (columns, rows, lines)
    if rows and len(rows[0]) != len(names):
        raise ValueError(
            f"{path.name}: {len(rows[0])} columns; {what} need {', '.join(columns)}, "
            "with these names as a header or in this order without one."
        )
    table = pd.DataFrame(rows, columns=list(names), dtype=object)
    if not ours:
        table["input"] = table["input"].where(table["input"] != "nan", "")
    table.attrs["lines"] = lines
    return table


def read_ratings(path: str | Path) -> pd.DataFrame:
    """A ratings table from CSV, ours or the reference's without a header.

    Scores become whole numbers; other values raise ValueError with their line.  Scores outside 1-7,
    which the reference's parser lets through, are kept with a warning.
    """
    table = _read_table(path, RATING, "ratings")
    lines, name = table.attrs.pop("lines"), Path(path).name
    for line, score in zip(lines, table["score"], strict=True):
        if not (score.isascii() and score.isdigit()):
            raise ValueError(f"{name}, line {line}: score {score!r}; allowed: a whole number, 1-7.")
    table["score"] = table["score"].astype(int)
    if outside := int((~table["score"].between(*SCALE)).sum()):
        warnings.warn(f"{name}: {outside} scores lie outside 1-7; kept as they are", stacklevel=2)
    return table


def read_rankings(path: str | Path) -> pd.DataFrame:
    """A rankings table from CSV, ours or the reference's without a header.  Raises ValueError."""
    table = _read_table(path, RANKING, "rankings")
    for line, verdict in zip(table.attrs.pop("lines"), table["verdict"], strict=True):
        if verdict not in VERDICTS:
            raise ValueError(
                f"{Path(path).name}, line {line}: verdict {verdict!r}; allowed: (a), (b), equal."
            )
    return table


def write_table(table: pd.DataFrame, path: str | Path, *, header: bool = True) -> Path:
    """A ratings or rankings table as CSV, text exactly kept; header=False gives the reference's form."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if header:
        writer.writerow(table.columns)
    writer.writerows(table.itertuples(index=False))
    return runtime.write_atomic(path, text.getvalue().encode("utf-8"))


# --- the five conversions (section 1.3 of the reference's pipeline) ------------------------------


def to_ratings_table(items: Iterable[dict]) -> pd.DataFrame:
    """One row a response: instruction, input, response; prompt order, then response order."""
    rows = [(i["instruction"], i.get("input") or "", r) for i in items for r in i["responses"]]
    return pd.DataFrame(rows, columns=RATING[:-1], dtype=object)


def to_rankings_table(items: Iterable[dict]) -> pd.DataFrame:
    """One row a pair i < j of a prompt's responses, in lexicographic order; equal texts are kept."""
    rows = [
        (i["instruction"], i.get("input") or "", *pair)
        for i in items
        for pair in itertools.combinations(i["responses"], 2)
    ]
    return pd.DataFrame(rows, columns=RANKING[:-1], dtype=object)


def to_rankings_rm(rankings: pd.DataFrame) -> dict[str, dict[str, list[list[str]]]]:
    """{Alpaca prompt: {"sentences": [[preferred, rejected], ...]}}: exact duplicates and equals left out.

    A prompt whose verdicts are all "equal" vanishes.
    """
    pairs: dict[str, dict[str, list]] = {}
    for row in rankings[RANKING].drop_duplicates().itertuples(index=False):
        if row.verdict != "equal":
            pair = [row.response1, row.response2]
            entry = pairs.setdefault(alpaca_prompt(row.instruction, row.input), {"sentences": []})
            entry["sentences"].append(pair if row.verdict == "(a)" else pair[::-1])
    return pairs


def to_rating_eval(
    outputs: Iterable[dict], skip: Sequence[str] = ("selfinstruct",)
) -> pd.DataFrame:
    """Outputs as a table to rate: instruction, input (always ""), response; `skip` data sets left out."""
    rows = [(o["instruction"], "", o["output"]) for o in outputs if o["dataset"] not in skip]
    return pd.DataFrame(rows, columns=RATING[:-1], dtype=object)


def to_ranking_eval(reference: Iterable[dict], policy: Iterable[dict]) -> pd.DataFrame:
    """Pairs to rank: response1 is the reference's output, response2 the policy's; policy order.

    Raises ValueError for a policy instruction that the reference did not answer.
    """
    answers = {o["instruction"]: o["output"] for o in reference}
    policy = list(policy)
    missing = [o["instruction"] for o in policy if o["instruction"] not in answers]
    if missing:
        raise ValueError(
            f"{len(missing)} instructions of the policy have no reference output, first: "
            f"{missing[0][:80]!r}. Try the reference file that answers the same instructions."
        )
    rows = [(o["instruction"], "", answers[o["instruction"]], o["output"]) for o in policy]
    return pd.DataFrame(rows, columns=RANKING[:-1], dtype=object)


def verdict_of_orders(first: str | None, swapped: str | None) -> str | None:
    """The verdict of a pair from its two calls ("(a)", "(b)" or None), the second with responses swapped.

    The same letter twice means that the annotator followed the position: "equal".
    """
    if first is None or swapped is None:
        return None
    return "equal" if first == swapped else first


# --- consistency ---------------------------------------------------------------------------------


def _keys(table: pd.DataFrame, columns: Sequence[str]) -> list[tuple]:
    texts = [table[name].str.replace("\r\n", "\n", regex=False) for name in columns]
    return list(zip(*texts, strict=True))


def first_of_each(table: pd.DataFrame) -> pd.DataFrame:
    """The table without later annotations of the same thing (the reference keeps the first)."""
    last = "response" if "response" in table else ["response1", "response2"]
    keys = pd.Series(_keys(table, [*ITEM, *np.atleast_1d(last)]), index=table.index, dtype=object)
    return table[~keys.duplicated()]


def pair_verdicts(ratings: pd.DataFrame, rankings: pd.DataFrame) -> pd.DataFrame:
    """Ranked pairs whose responses both have a rating, first annotation of each.

    Columns of the rankings table, score1, score2, gap = |score1 - score2|, derived (the verdict that the
    ratings imply; equal scores are "equal"), direct (the verdict), prompt (number of the instruction and
    input).  attrs["left_out"]: pairs without both scores.
    """
    rated = first_of_each(ratings)
    scores = dict(zip(_keys(rated, [*ITEM, "response"]), rated["score"], strict=True))
    ranked = first_of_each(rankings)
    both = pd.DataFrame(
        {
            f"score{k}": [scores.get(key, np.nan) for key in _keys(ranked, [*ITEM, f"response{k}"])]
            for k in (1, 2)
        },
        index=ranked.index,
    )
    rows = ranked.join(both).dropna(subset=["score1", "score2"]).reset_index(drop=True)
    order = np.sign(rows["score1"] - rows["score2"])
    rows["gap"] = (rows["score1"] - rows["score2"]).abs()
    rows["derived"] = order.map({1.0: "(a)", 0.0: "equal", -1.0: "(b)"})
    rows["direct"] = rows["verdict"]
    rows["prompt"] = pd.factorize(pd.Series(_keys(rows, ITEM), dtype=object))[0]
    rows.attrs["left_out"] = len(ranked) - len(rows)
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
    found = []
    for gap, part in rows.groupby("gap"):
        same = (part["derived"] == part["direct"]).to_numpy()
        interval = bootstrap(same, clusters=part["prompt"].to_numpy(), seed=seed)
        if interval.value in (0, 1):
            interval = proportion(round(interval.value * interval.n), interval.n)
        found.append({"gap": int(gap), **interval._asdict()})
        found[-1] |= {"agree": int(same.sum()), "pairs": len(same)}
    return pd.DataFrame(found)


def agreement_by_prompt(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """How often two annotations of the same pairs agree, within and across protocols: one row a prompt.

    `first` and `second` are tables of `pair_verdicts` with the same pairs in the same order.  Columns
    "rating, rating" (verdicts implied by ratings), "ranking, ranking", "rating, ranking" (within each
    annotation, the mean of both); index prompt.  Raises ValueError for tables of other pairs.
    """
    pairs = [list(zip(*(t[name] for name in RANKING[:-1]), strict=True)) for t in (first, second)]
    if pairs[0] != pairs[1]:
        raise ValueError(
            "the two tables hold other pairs, or in another order; give the same pairs."
        )
    across = [t["derived"] == t["direct"] for t in (first, second)]
    same = {
        "rating, rating": first["derived"] == second["derived"],
        "ranking, ranking": first["direct"] == second["direct"],
        "rating, ranking": (across[0].astype(float) + across[1]) / 2,
    }
    return pd.DataFrame(same).astype(float).groupby(first["prompt"]).mean()


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
    found = []
    for protocol, column in (("rankings", "direct"), ("ratings", "derived")):
        decided = rows[rows[column] != "equal"]
        for measure, count in counts.items():
            size1, size2 = (decided[r].map(count).to_numpy() for r in ("response1", "response2"))
            more = np.where(decided[column] == "(a)", size1 - size2, size2 - size1).astype(float)
            prompts, differ = decided["prompt"].to_numpy(), more != 0
            interval = bootstrap(more, clusters=prompts, seed=seed)
            longer = bootstrap(100.0 * (more > 0)[differ], clusters=prompts[differ], seed=seed)
            found.append({"protocol": protocol, "measure": measure, **interval._asdict()})
            found[-1] |= {"mean": (size1.mean() + size2.mean()) / 2, "pairs": int(differ.sum())}
            names = ("longer_pct", "longer_low", "longer_high", "longer_n")
            found[-1] |= zip(names, longer, strict=True)
    return pd.DataFrame(found)


# --- is the annotator an annotator? --------------------------------------------------------------


def _entropy(values: Sequence) -> float:
    """Shannon entropy of the values' frequencies, in bits."""
    return float(stats.entropy(pd.Series(values).value_counts(), base=2)) if len(values) else np.nan


def judge_report(ratings: pd.DataFrame, rankings: pd.DataFrame) -> pd.DataFrame:
    """The degeneracy gate: an annotator that always answers the same is no annotator.

    One row a check: check, value, limit, n, passes.  Ratings: share of the commonest score and entropy
    (bits).  Rankings: share of "equal" (both orders gave the same letter), entropy of verdicts, and, where
    the columns first and swapped hold the two calls' letters, the share of calls that chose the first
    response (an unbiased annotator is near 0.5).
    """
    scores, verdicts = ratings["score"].to_numpy(), rankings["verdict"].to_numpy()
    top = pd.Series(scores).value_counts(normalize=True).max() if len(scores) else np.nan
    checks = [
        ("ratings: commonest score's share", top, 0.9, "at most", len(scores)),
        ("ratings: entropy, bits", _entropy(scores), 0.5, "at least", len(scores)),
        (
            "rankings: share of equal",
            rankings["verdict"].eq("equal").mean(),
            0.8,
            "at most",
            len(verdicts),
        ),
        ("rankings: entropy, bits", _entropy(verdicts), 0.5, "at least", len(verdicts)),
    ]
    if {"first", "swapped"} <= set(rankings):
        calls = pd.concat([rankings["first"], rankings["swapped"]]).dropna()
        share = (calls == "(a)").mean()
        checks.append(("calls: first position's share", share, 0.9, "at most", len(calls)))
        checks.append(("calls: first position's share", share, 0.1, "at least", len(calls)))
    report = pd.DataFrame(checks, columns=["check", "value", "limit", "side", "n"])
    below, above = report["value"] <= report["limit"], report["value"] >= report["limit"]
    report["passes"] = np.where(report["side"] == "at most", below, above)
    report["limit"] = report.pop("side") + " " + report["limit"].astype(str)
    return report


def missing_by_pair(items: Iterable[dict], rankings: pd.DataFrame) -> pd.DataFrame:
    """Which pairs of an item's responses were ranked: pair ("1-2", ...), present, expected, share.

    An uneven column shows losses that are not random (such as every second call failing).
    """
    ranked = Counter(_keys(rankings, RANKING[:-1]))
    rows = []
    for item in items:
        table = to_rankings_table([item])
        numbers = itertools.combinations(range(1, len(item["responses"]) + 1), 2)
        for (i, j), key in zip(numbers, _keys(table, table.columns), strict=True):
            rows.append((f"{i}-{j}", ranked[key] > 0))
            ranked[key] -= 1  # a row answers one pair, also where two responses are alike
    found = pd.DataFrame(rows, columns=["pair", "present"]).groupby("pair", sort=False)["present"]
    return found.agg(present="sum", expected="size", share="mean").reset_index()


def cyclic_triads(rankings: pd.DataFrame) -> tuple[int, int]:
    """(cycles, triads): among three responses of a prompt with three decisive verdicts, a > b > c > a.

    Verdicts tossed by coin make a quarter of the triads cyclic.
    """
    decided = first_of_each(rankings)
    decided = decided[decided["verdict"] != "equal"]
    cycles = triads = 0
    for _, group in decided.groupby(ITEM, sort=False):
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
    column = "score" if "score" in table else "verdict"
    texts = [*ITEM, "response"] if column == "score" else RANKING[:-1]
    keys = pd.Series(_keys(table, texts), index=table.index, dtype=object)
    groups = {k: g.tolist()[:2] for k, g in table[column].groupby(keys, sort=False) if len(g) > 1}
    items = pd.factorize(pd.Series([key[:2] for key in groups], dtype=object))[0]
    first, second = (np.array([pair[k] for pair in groups.values()]) for k in (0, 1))
    found = {"same": bootstrap(first == second, clusters=items, seed=seed)}
    if column == "score":
        found["gap"] = bootstrap(np.abs(first - second), clusters=items, seed=seed)
        rows = [itertools.combinations(np.flatnonzero(items == i), 2) for i in np.unique(items)]
        left, right = np.array([*itertools.chain(*rows)], dtype=int).reshape(-1, 2).T
        implied = [np.sign(scores[left] - scores[right]) for scores in (first, second)]
        same = implied[0] == implied[1]
        found["verdict"] = bootstrap(same, clusters=items[left], seed=seed)
    return found


test_retest.__test__ = False  # its name would make pytest collect it


# --- win rates -----------------------------------------------------------------------------------


def win_points_by_rating(reference: pd.DataFrame, policy: pd.DataFrame) -> pd.DataFrame:
    """The policy's points against the reference under rating evaluation (section 1.10 of the pipeline).

    First rating of each instruction, joined on the instruction alone: 1 for the higher score, 0.5 for the
    same, 0 for the lower.  Columns instruction, response1 (reference), response2 (policy), points.
    """
    columns = ["instruction", "response", "score"]
    left, right = (t.drop_duplicates("instruction")[columns] for t in (reference, policy))
    rows = left.merge(right, on="instruction", suffixes=("1", "2"))
    rows["points"] = (1 + np.sign(rows["score2"] - rows["score1"])) / 2
    return rows[["instruction", "response1", "response2", "points"]]


def win_points_by_ranking(rankings: pd.DataFrame) -> pd.DataFrame:
    """The same under ranking evaluation: response2 is the policy's, so "(b)" is 1 and "equal" 0.5.

    Every row counts, as in the reference.
    """
    points = rankings["verdict"].map({"(a)": 0.0, "equal": 0.5, "(b)": 1.0})
    return rankings[["instruction", "response1", "response2"]].assign(points=points)


class WinRate(NamedTuple):
    """Win rate in per cent, the half-width of its interval (1.96 standard errors), and the counts."""

    percent: float
    half_width: float
    n: int
    wins: int
    ties: int
    losses: int
    without_ties: Interval  # wins / (wins + losses), a fraction

    def __str__(self) -> str:
        return f"{self.percent:.1f} % +- {self.half_width:.1f}, n = {self.n}"


def win_rate(points: Sequence[float]) -> WinRate:
    """Mean points with 1.96 standard errors (n - 1), wins, ties, losses, and the rate without ties."""
    points = np.asarray(points, dtype=float)
    n = len(points)
    counts = [int((points == value).sum()) for value in (1, 0.5, 0)]
    error = points.std(ddof=1) / np.sqrt(n) if n > 1 else np.nan
    mean = points.mean() if n else np.nan
    decided = proportion(counts[0], counts[0] + counts[2])
    return WinRate(100 * float(mean), 196 * float(error), n, *counts, decided)


def common_points(by_rating: pd.DataFrame, by_ranking: pd.DataFrame) -> pd.DataFrame:
    """Points of the instructions evaluated under both protocols (first row of each): rating, ranking."""
    tables = {"rating": by_rating, "ranking": by_ranking}
    firsts = {
        name: table.drop_duplicates("instruction").set_index("instruction")["points"]
        for name, table in tables.items()
    }
    return pd.concat(firsts, axis=1, join="inner")


def sign_test(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p of the sign test on pairs; pairs without a difference do not count, none gives 1."""
    difference = np.asarray(b, dtype=float) - np.asarray(a, dtype=float)
    up, down = int((difference > 0).sum()), int((difference < 0).sum())
    return float(stats.binomtest(up, up + down).pvalue) if up + down else 1.0


def length_controlled(rows: pd.DataFrame, seed: int = 0, resamples: int = 200) -> Interval:
    """The win rate (a fraction) that a logistic regression gives for two responses of equal length.

    P(policy wins) = sigmoid(a + b x), x = difference in words over its standard deviation; a tie counts as
    half a win and half a loss; a small ridge on b (0.01) keeps separable data finite.  Value: sigmoid(a).
    """
    sizes = [rows[name].map(lambda text: len(words(text))) for name in ("response1", "response2")]
    x, y = (sizes[1] - sizes[0]).to_numpy(float), rows["points"].to_numpy(float)
    x = x / (spread(x) or 1.0)

    def at_equal_length(x, y):
        def loss(w):
            z = w[0] + w[1] * x
            return (np.logaddexp(0, z) - y * z).mean() + 0.01 * w[1] ** 2

        return 1 / (1 + np.exp(-optimize.minimize(loss, np.zeros(2)).x[0]))

    clusters = rows["instruction"].to_numpy()
    return bootstrap((x, y), at_equal_length, clusters=clusters, seed=seed, resamples=resamples)
