"""Learning from refinements (ILF, Scheurer et al. 2023): what is imitated, and how it is measured.

`refine` makes the table of articles with summary, feedback and chosen refinement.  Here it becomes
training data for policies (`targets`) and for reward models that answer a question with one token
(`classification_rows`, `comparison_rows`); plus the objective's weights, the distance from the base
model, and win rates.

Simplified: a plain summary ends with the end token (the paper's ended at 48 tokens); loss falls on
completions only (the paper's prompt loss weight was between 0 and 0.1).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib import encoding, logprobs, sft, tables
from lib.annotator import SimulatedAnnotator
from lib.papers.ilf import refine
from lib.papers.ilf.imitate import (  # noqa: F401 (notebook 31 takes them from here)
    CUE,
    critique_prompt,
    effective_number,
    target_weights,
    written_refinement,
)
from lib.papers.ilf.refine import Question
from lib.preferences import win_points

KINDS = {  # what a policy imitates -> the column of articles that holds it
    "initial": "summary",
    "refinement": "chosen",
    "description": "reference",
    "shuffled": "shuffled",
}


# --- what a policy imitates ----------------------------------------------------------------------


def targets(articles: pd.DataFrame, kind: str) -> pd.DataFrame:
    """prompt and completion of each article, for `sft.encode_completions`.

    `kind`: one of `KINDS`, or "feedback + refinement": from text and summary to the feedback and, after
    the cue, the refinement.  Empty targets are left out; attrs["left_out"] counts them.  Raises
    ValueError for another kind.
    """
    both = "feedback + refinement"
    if kind != both and kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; allowed: {', '.join([*KINDS, both])}.")
    column = "chosen" if kind == both else KINDS[kind]
    rows = []
    for a in articles[articles[column].fillna("") != ""].to_dict("records"):
        prompt, completion = refine.summary_prompt(a["title"], a["post"]), f" {a[column]}"
        if kind == both:
            prompt = critique_prompt(a["title"], a["post"], a["summary"])
            completion = f" {a['feedback']}\n\n{CUE}{completion}"
        rows.append((a["id"], prompt, completion))
    table = pd.DataFrame(rows, columns=["id", "prompt", "completion"])
    table.attrs["left_out"] = len(articles) - len(table)
    return table


def shorten(text: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> str:
    """The text's first `max_tokens` tokens: cut the post, never the question or answer after it."""
    _, places = encoding.token_places(tokenizer, text)
    return text if len(places) <= max_tokens else text[: places[max_tokens - 1][1]]


# --- reward models that answer a question --------------------------------------------------------

_TEXT = "Title: {title}\n\nText: {post}\n\n"
CLASSIFICATION = Question(
    _TEXT
    + "TL;DR: {summary}\n\nIs this summary excellent, that is coherent, accurate, concise and "
    "detailed? Answer Yes or No.\nAnswer:"
)
COMPARISON = Question(
    _TEXT
    + "Summary A: {first}\n\nSummary B: {second}\n\nWhich summary is better, A or B?\nAnswer:",
    " A",
    " B",
)


def comparison_pairs(
    articles: pd.DataFrame, annotator: SimulatedAnnotator | None = None
) -> pd.DataFrame:
    """Pairs of initial summaries: id, title, post, first, second, preferred (1.0 first, 0.0 second).

    With an annotator it compares summary_2 and summary_3 (asked in both orders); without, SLF5K's
    comparison_preference between its summaries A and B holds.  Undecided pairs are left out;
    attrs["left_out"] counts them.
    """
    if annotator is None:
        sides = [f"generated_summary_for_comparison_{letter}" for letter in "AB"]
        verdicts = articles["comparison_preference"].map({"Summary A": 1.0, "Summary B": 0.0})
    else:
        sides = ["summary_2", "summary_3"]
        preferred = annotator.rank(articles["post"], *(articles[side] for side in sides))
        verdicts = pd.Series(preferred, articles.index, dtype=object).map({"(a)": 1.0, "(b)": 0.0})
    named = dict(zip(sides, ("first", "second"), strict=True))
    table = articles[["id", "title", "post", *sides]].rename(columns=named)
    table = table.assign(preferred=verdicts).dropna(subset=["preferred"]).reset_index(drop=True)
    table.attrs["left_out"] = len(articles) - len(table)
    return table


def shuffled_pairs(pairs: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """The control: each preference turned round by a coin."""
    turn = np.random.default_rng(seed).random(len(pairs)) < 0.5
    return pairs.assign(preferred=np.where(turn, 1 - pairs["preferred"], pairs["preferred"]))


def _decided(pairs: pd.DataFrame) -> list[dict]:
    """The pairs as dicts.  Raises ValueError where a preference is neither 1 nor 0: it would count as one."""
    undecided = pairs["preferred"][~pairs["preferred"].isin([0, 1])]
    if len(undecided):
        raise ValueError(
            f"preferred is {undecided.iloc[0]} in {len(undecided)} of {len(pairs)} pairs; allowed: 1.0 "
            "(first) or 0.0 (second). Leave undecided pairs out, as `comparison_pairs` does."
        )
    return pairs.to_dict("records")


def classification_rows(tokenizer: PreTrainedTokenizerBase, pairs: pd.DataFrame) -> list[dict]:
    """Two adjacent rows a pair: "Yes" after the preferred summary, "No" after the other; loss on it only."""
    rows = []
    for pair in _decided(pairs):
        for side, good in (("first", pair["preferred"]), ("second", 1 - pair["preferred"])):
            asked = CLASSIFICATION.prompt.format(**pair, summary=pair[side])
            rows.append(_answer_row(tokenizer, CLASSIFICATION, asked, good))
    return rows


def comparison_rows(
    tokenizer: PreTrainedTokenizerBase, pairs: pd.DataFrame, *, both_orders: bool = False
) -> list[dict]:
    """One row a pair, the letter of the preferred summary with loss; `both_orders`: also swapped (ours)."""
    rows = []
    for pair in _decided(pairs):
        shown = [pair, _swapped(pair)] if both_orders else [pair]
        for p in shown:
            asked = COMPARISON.prompt.format(**p)
            rows.append(_answer_row(tokenizer, COMPARISON, asked, p["preferred"]))
    return rows


def _swapped(pair: dict) -> dict:
    return pair | {
        "first": pair["second"], "second": pair["first"], "preferred": 1 - pair["preferred"]
    }  # fmt: skip


def _answer_row(tokenizer, question: Question, asked: str, yes: float) -> dict:
    """Context without loss, the answer's tokens with; split as `logprobs.answer_log_probs` scores them."""
    context, tails = logprobs.split_answers(tokenizer, asked, (question.yes, question.no))
    answer = tails[0 if yes else 1]
    return {"input_ids": context + answer, "labels": [sft.NO_LOSS] * len(context) + answer}


def classification_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, titles: Sequence[str],
    posts: Sequence[str], summaries: Sequence[str],
) -> np.ndarray:  # fmt: skip
    """log P(Yes) - log P(No) of each summary, (rows,): the reward of a classification reward model."""
    asked = [
        CLASSIFICATION.prompt.format(title=t, post=p, summary=s)
        for t, p, s in zip(titles, posts, summaries, strict=True)
    ]
    return _log_odds(model, tokenizer, asked, CLASSIFICATION)


def comparison_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: pd.DataFrame, *,
    both_orders: bool = True,
) -> np.ndarray:  # fmt: skip
    """Log-odds that the first summary is the better one, (pairs,); mean of both orders, or as given."""
    records = pairs.to_dict("records")

    def asked(shown):
        return _log_odds(
            model, tokenizer, [COMPARISON.prompt.format(**p) for p in shown], COMPARISON
        )

    log_odds = asked(records)
    return (log_odds - asked([*map(_swapped, records)])) / 2 if both_orders else log_odds


def _log_odds(model, tokenizer, asked: list[str], question: Question) -> np.ndarray:
    answers = (question.yes, question.no)
    log_probs = logprobs.answer_log_probs(model, tokenizer, asked, answers)
    return log_probs[:, 0] - log_probs[:, 1]


def pair_accuracy(pairs: pd.DataFrame, margins: np.ndarray) -> np.ndarray:
    """1 where the margin (first minus second) has the preference's sign, 0.5 where it is 0, else 0.

    NaN where there is no preference.
    """
    preferred = pairs["preferred"].map({1.0: 1.0, 0.0: -1.0}).to_numpy(float)
    return (1 + np.sign(margins) * preferred) / 2


# --- win rates -----------------------------------------------------------------------------------


def read_ranks(path, methods: Sequence[str], against: str) -> pd.DataFrame:
    """Win points from people's ranks: a CSV with id and one column of ranks (1 is best) a method.

    One row an id and method: id (text), method, points against `against`; ties are 0.5.  Raises ValueError
    with file and line for a column that is missing, an id that stands twice (average the annotators' ranks
    first, or name the rows apart), and a rank that is not from 1 to the number of methods in the sheet.
    """
    path = Path(path).expanduser()
    wanted = [name for name in methods if name != against]
    needed = ["id", against, *wanted]
    _, header = next(tables.csv_records(path, needed))
    if missing := [name for name in needed if name not in header]:
        raise ValueError(
            f"{path.name}: no column {', '.join(missing)}; found: {', '.join(header)}."
        )
    lines, rows = zip(*tables.csv_dicts(path, needed), strict=True)
    ranked = [
        name for name in rows[0] if name != "id" and all(_is_number(row[name]) for row in rows)
    ]
    first_line: dict[str, int] = {}
    for line, row in zip(lines, rows, strict=True):
        if first_line.setdefault(row["id"], line) != line:
            raise ValueError(
                f"{path.name}, line {line}: id {row['id']!r} stands on line {first_line[row['id']]} too."
            )
        for name in (against, *wanted):
            highest = max(len(ranked), 1 + len(wanted))
            if not _is_number(row[name]) or not 1 <= float(row[name]) <= highest:
                raise ValueError(
                    f"{path.name}, line {line}: rank {row[name]!r} of {name}; allowed: a number from 1 "
                    f"(best) to {highest}; ties are allowed."
                )
    table = pd.DataFrame(rows)
    ranks = table[[against, *wanted]].astype(float)
    parts = []
    for name in wanted:
        points = win_points(-ranks[name], -ranks[against])
        parts.append(pd.DataFrame({"id": table["id"], "method": name, "points": points}))
    return pd.concat(parts, ignore_index=True)


def _is_number(text: str) -> bool:
    return bool(re.fullmatch(r"\s*-?[0-9]+(\.[0-9]+)?\s*", text))
