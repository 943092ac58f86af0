"""Ratings and rankings of responses: tables, verdicts, win points, win rates.

Two kinds of feedback on the same responses: a rating from 1 to 7 for each, and a comparison of each pair,
asked in both orders.  A ratings table has the columns instruction, input, response, score; a rankings table
instruction, input, response1, response2, verdict, where "(a)" prefers response1, "(b)" response2 and "equal"
neither.  A score or verdict that could not be had is missing, and never counts for one side.  Text is kept
exactly: a missing input is "", and "None" or "NA" are words.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import optimize, stats

from lib import runtime, tables
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


def _read_table(path: str | Path, columns: list[str], what: str) -> tuple[pd.DataFrame, list[int]]:
    """A table of texts, and each row's line: our CSV (with a header), JSON lines, the reference's CSV.

    The reference writes no header, and "nan" for a missing input.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() in (".json", ".jsonl"):
        return _from_json(path, columns)
    lines, rows = map(list, zip(*tables.csv_records(path, columns), strict=True))
    names = columns
    ours = set(columns) <= set(rows[0])
    if ours:
        names, rows, lines = rows[0], rows[1:], lines[1:]
    elif len({name.strip().lower() for name in rows[0]} & set(columns)) > 1:
        raise ValueError(
            f"{path.name}, line {lines[0]}: the header has {', '.join(rows[0])}; {what} need "
            f"{', '.join(columns)}, written so."
        )
    if not rows:
        raise ValueError(f"{path.name} has a header but no rows; at least one is needed.")
    if len(rows[0]) != len(names):
        raise ValueError(
            f"{path.name}: {len(rows[0])} columns; {what} need {', '.join(columns)}, "
            "with these names as a header or in this order without one."
        )
    rows = [list(map(str, row)) for row in rows]
    table = pd.DataFrame(rows, columns=list(map(str, names)), dtype=object)
    if not ours:
        table["input"] = table["input"].where(table["input"] != "nan", "")
    return table, lines


def _from_json(path: Path, columns: list[str]) -> tuple[pd.DataFrame, list[int]]:
    """The same from JSON lines, such as the log of an annotation run."""
    lines, rows = [], []
    for line, record in tables.json_records(path):
        record = record if isinstance(record, dict) else {}
        if missing := [name for name in columns if name not in record]:
            raise ValueError(f"{path.name}, line {line}: no field {', '.join(missing)}.")
        values = {name: "" if record[name] is None else record[name] for name in columns}
        for name in columns[:-1]:
            if not isinstance(values[name], str):
                raise ValueError(f"{path.name}, line {line}: {name} is {values[name]!r}, not text.")
        lines.append(line)
        rows.append(record | values | {columns[-1]: str(values[columns[-1]])})
    return pd.DataFrame(rows, dtype=object), lines


def read_ratings(path: str | Path) -> pd.DataFrame:
    """A ratings table from CSV or JSON lines, ours or the reference's CSV without a header.

    Scores become whole numbers; an empty one is missing (then the column is Int64), other values raise
    ValueError with their line.  Scores outside 1-7, which the reference's parser lets through, are kept
    with a warning.
    """
    table, lines = _read_table(path, RATING, "ratings")
    name = Path(path).name
    for line, score in zip(lines, table["score"], strict=True):
        # pandas writes a column of whole numbers as 5.0 where one is missing
        if score and not re.fullmatch(r"[0-9]{1,9}(\.0+)?", score):
            raise ValueError(f"{name}, line {line}: score {score!r}; allowed: a whole number, 1-7.")
    scores = pd.array(
        [int(float(score)) if score else None for score in table["score"]], dtype="Int64"
    )
    table["score"] = scores if scores.isna().any() else scores.astype(int)
    _warn_of_missing(table, name)
    if outside := int((~judged(table)["score"].between(*SCALE)).sum()):
        warnings.warn(f"{name}: {outside} scores lie outside 1-7; kept as they are", stacklevel=2)
    return table


def read_rankings(path: str | Path) -> pd.DataFrame:
    """A rankings table from CSV or JSON lines, ours or the reference's CSV without a header.

    An empty verdict is missing (None); other values raise ValueError with their line.
    """
    table, lines = _read_table(path, RANKING, "rankings")
    for line, verdict in zip(lines, table["verdict"], strict=True):
        if verdict not in ("", *VERDICTS):
            raise ValueError(
                f"{Path(path).name}, line {line}: verdict {verdict!r}; allowed: (a), (b), equal."
            )
    verdicts = [verdict or None for verdict in table["verdict"]]
    table["verdict"] = pd.Series(verdicts, dtype=object)
    _warn_of_missing(table, Path(path).name)
    return table


def read_to_annotate(path: str | Path) -> pd.DataFrame:
    """A ratings or rankings table whose last column is still to come: a row a response, or a row a pair.

    From CSV or JSON lines; the columns response1 and response2 make it rankings.  Raises ValueError for a
    file that has neither.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() in (".json", ".jsonl"):
        names = set(next(record for _, record in tables.json_records(path)))
    else:
        names = set(next(iter(tables.csv_records(path)))[1])
    pairs = {"response1", "response2"} <= names
    table, _ = _read_table(path, (RANKING if pairs else RATING)[:-1], "things to annotate")
    return table


def read_feedback(path: str | Path) -> pd.DataFrame:
    """A ratings or a rankings table, whichever a file holds: what `read_ratings`, `read_rankings` read.

    A header with response1 and response2, or five columns without a header, are rankings.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() in (".json", ".jsonl"):
        names = next(record for _, record in tables.json_records(path))
        pairs = {"response1", "response2"} <= set(names)
    else:
        names = next(iter(tables.csv_records(path)))[1]
        pairs = {"response1", "response2"} <= set(names) or (
            not set(RATING) <= set(names) and len(names) == len(RANKING)
        )
    return read_rankings(path) if pairs else read_ratings(path)


def _warn_of_missing(table: pd.DataFrame, name: str) -> None:
    if missing := len(table) - len(judged(table)):
        column = "score" if "score" in table else "verdict"
        warnings.warn(f"{name}: {missing} of {len(table)} rows have no {column}", stacklevel=3)


def write_table(table: pd.DataFrame, path: str | Path, *, header: bool = True) -> Path:
    """A ratings or rankings table as CSV, text exactly kept; header=False gives the reference's form."""
    names = list(table.columns) if header else None
    text = tables.csv_text(names, table.itertuples(index=False, name=None))
    return runtime.write_atomic(path, text)


# --- verdicts ------------------------------------------------------------------------------------


def verdict_of_orders(first: str | None, swapped: str | None) -> str | None:
    """The verdict of a pair from its two calls ("(a)", "(b)" or None), the second with responses swapped.

    The same letter twice means that the annotator followed the position: "equal".
    """
    if first is None or swapped is None:
        return None
    return "equal" if first == swapped else first


def judged(table: pd.DataFrame) -> pd.DataFrame:
    """The rows that have a score or a verdict.  ValueError for a verdict that is none of `VERDICTS`."""
    column = "score" if "score" in table else "verdict"
    rows = table[table[column].notna()]
    if column == "verdict" and (wrong := set(rows["verdict"]) - set(VERDICTS)):
        raise ValueError(f"verdict {min(map(str, wrong))!r}; allowed: {', '.join(VERDICTS)}.")
    return rows


def decided(rankings: pd.DataFrame) -> pd.DataFrame:
    """The rows whose verdict prefers one response: neither "equal" nor missing."""
    rows = judged(rankings)
    return rows[rows["verdict"] != "equal"]


def text_keys(table: pd.DataFrame, columns: Sequence[str]) -> list[tuple]:
    """The texts of each row, with line ends made alike: what rows of two tables are joined by."""
    texts = [table[name].str.replace("\r\n", "\n", regex=False) for name in columns]
    return list(zip(*texts, strict=True))


def first_of_each(table: pd.DataFrame) -> pd.DataFrame:
    """The table without later annotations of the same thing (the reference keeps the first)."""
    responses = ["response"] if "response" in table else ["response1", "response2"]
    keys = pd.Series(text_keys(table, [*ITEM, *responses]), index=table.index, dtype=object)
    return table[~keys.duplicated()]


# --- win rates -----------------------------------------------------------------------------------


def win_points(scores: Sequence[float], against: Sequence[float]) -> np.ndarray:
    """1 for the higher score, 0.5 for the same (to 9 digits), 0 for the lower; NaN where one is missing."""
    left, right = (pd.Series(values).astype(float).to_numpy() for values in (scores, against))
    gap = np.zeros_like(left)  # inf against inf is a tie
    np.subtract(left, right, out=gap, where=left != right)
    return (1 + np.sign(gap.round(9))) / 2


def win_points_by_rating(reference: pd.DataFrame, policy: pd.DataFrame) -> pd.DataFrame:
    """The policy's points against the reference under rating evaluation (section 1.10 of the pipeline).

    First rating of each instruction, joined on the instruction alone: 1 for the higher score, 0.5 for the
    same, 0 for the lower.  Columns instruction, response1 (reference), response2 (policy), points.
    """
    columns = ["instruction", "response", "score"]
    left, right = (judged(t).drop_duplicates("instruction")[columns] for t in (reference, policy))
    rows = left.merge(right, on="instruction", suffixes=("1", "2"))
    rows["points"] = win_points(rows["score2"], rows["score1"])
    return rows[["instruction", "response1", "response2", "points"]]


def win_points_by_ranking(rankings: pd.DataFrame) -> pd.DataFrame:
    """The same under ranking evaluation: response2 is the policy's, so "(b)" is 1 and "equal" 0.5.

    Every row counts, as in the reference; points are NaN where there is no verdict.
    """
    points = rankings["verdict"].map({"(a)": 0.0, "equal": 0.5, "(b)": 1.0}).astype(float)
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
    """Mean points with 1.96 standard errors (n - 1), wins, ties, losses, and the rate without ties.

    Missing points (NaN) are left out.  No points give NaN; one gives no half-width (NaN).
    """
    points = np.asarray(points, dtype=float)
    points = points[~np.isnan(points)]
    n = len(points)
    counts = [int((points == value).sum()) for value in (1, 0.5, 0)]
    error = points.std(ddof=1) / np.sqrt(n) if n > 1 else np.nan
    mean = points.mean() if n else np.nan
    without_ties = proportion(counts[0], counts[0] + counts[2])
    return WinRate(100 * float(mean), 196 * float(error), n, *counts, without_ties)


def common_points(by_rating: pd.DataFrame, by_ranking: pd.DataFrame) -> pd.DataFrame:
    """Points of the instructions evaluated under both protocols (first row of each): rating, ranking."""
    firsts = {}
    for name, rows in (("rating", by_rating), ("ranking", by_ranking)):
        known = rows[rows["points"].notna()].drop_duplicates("instruction")
        firsts[name] = known.set_index("instruction")["points"]
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
    Rows without points are left out.
    """
    rows = rows[rows["points"].notna()]
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
