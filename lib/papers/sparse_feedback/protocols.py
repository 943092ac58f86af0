"""The two protocols: a rating from 1 to 7 for each response, and a ranking of each pair in both orders.

Simplified: the prompts (`prompts.py`) are our own with the parts of the paper's.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lib import preferences, questions
from lib.answers import CUT_OFF, first_line, parse_whole
from lib.chat import ChatClient, EndpointError, Reply, chat, with_defaults
from lib.papers.sparse_feedback.prompts import item_text, ranking_prompt, rating_prompt
from lib.questions import DIGITS, Question, both_orders, expected, log_odds

if TYPE_CHECKING:  # it loads torch, which tables of feedback do without
    from lib.annotator import SimulatedAnnotator
    from lib.judge import LocalAnnotator

_GRADE_LABEL = re.compile(r"(?:overall\s+)?(?:rating|score|grade)\s*[:=]?\s*", re.I)
_VERDICT = re.compile(
    r"(?:(?:better|answer)\s*:\s*)?(?:output\s*)?(?:\(([ab])\)(?:[.,:;].*)?|([ab])\.?)", re.I
)


def parse_rating(text: str | None) -> tuple[int | None, str]:
    """(score, status) of a reply.  Status: ok, out_of_range, unparsed, empty, no_reply.

    The first line after any reasoning must be a whole number in plain digits, alone or as in "Rating: 6",
    "6/7", "6 out of 7", "**6**", "6.": other words, decimals and other scales are not guessed at.
    """
    line = first_line(text)
    if not line:
        return None, "no_reply" if text is None else "empty"
    label = _GRADE_LABEL.match(line)
    return parse_whole(line[label.end() :] if label else line, *preferences.SCALE)


def parse_rating_reference(text: str) -> int | None:
    """The reference's rule: the first line, kept if it is digits only (0, 8 and other scripts' too)."""
    line = text.split("\n")[0]
    try:
        return int(line) if line.isnumeric() else None
    except ValueError:  # "½" is numeric; the reference's bare except drops it
        return None


def parse_verdict(text: str | None, *, equal: bool = False) -> tuple[str | None, str]:
    """(letter, status) of a ranking reply: "(a)", "(b)" or, where it was offered, "equal".

    The first line after any reasoning must be the letter, as in "Output (b)", "(b)", "b" or "Answer: b";
    after a letter in brackets and a full stop, comma or colon a reason may follow.  A line with both letters
    in brackets is "ambiguous"; the other statuses are those of `parse_rating`.
    """
    line = first_line(text)
    if not line:
        return None, "no_reply" if text is None else "empty"
    if re.fullmatch(r"(?:better\s*:\s*)?(?:output\s*)?(?:equal|tie)\.?", line, re.I):
        return ("equal", "ok") if equal else (None, "out_of_range")
    if len({mark.lower() for mark in re.findall(r"\([ab]\)", line, re.I)}) > 1:
        return None, "ambiguous"
    match = _VERDICT.fullmatch(line)
    return (f"({(match[1] or match[2]).lower()})", "ok") if match else (None, "unparsed")


def checked_texts(table: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """The table with text columns checked; a missing input becomes ""."""
    if missing := [name for name in columns if name not in table]:
        raise ValueError(
            f"the table lacks the columns {', '.join(missing)}; it has {', '.join(table)}. "
            "conversions.to_ratings_table and to_rankings_table make such tables from items."
        )
    table = table.reset_index(drop=True).assign(
        input=[text if isinstance(text, str) else "" for text in table["input"]]
    )
    for name in columns:
        for row, text in enumerate(table[name]):
            if not isinstance(text, str):
                raise ValueError(f"row {row}: {name} is {text!r}, not text; drop or fill it first.")
    return table


def rating_requests(table: pd.DataFrame, *, wording: int = 0, **parameters) -> list[dict]:
    """One request a row of a ratings table (instruction, input, response)."""
    rows = checked_texts(table, preferences.RATING[:-1])
    parameters = with_defaults({"max_tokens": 4, "temperature": 0.0}, parameters)
    return [
        chat(rating_prompt(*texts, wording=wording), **parameters)
        for texts in zip(*(rows[name] for name in preferences.RATING[:-1]), strict=True)
    ]


def ranking_requests(
    table: pd.DataFrame, *, equal: bool = False, wording: int = 0, **parameters
) -> list[dict]:
    """Two requests a row of a rankings table: as it stands, then with the responses swapped."""
    rows = checked_texts(table, preferences.RANKING[:-1])
    parameters = with_defaults({"max_tokens": 6, "temperature": 0.0}, parameters)
    return [
        chat(
            ranking_prompt(r.instruction, r.input, *order, equal=equal, wording=wording),
            **parameters,
        )
        for r in rows.itertuples()
        for order in ((r.response1, r.response2), (r.response2, r.response1))
    ]


def rate(
    client: ChatClient | LocalAnnotator, table: pd.DataFrame, *, wording: int = 0, **parameters
) -> pd.DataFrame:
    """A rating from 1 to 7 for each row of (instruction, input, response).

    wording: which of the prompt's two (`prompts.RATING`): two askings say how much of a rating is luck of the
    words.  A `LocalAnnotator` answers by probabilities: see `rate_locally`.  An endpoint answers in words:
    `parameters` go to the endpoint (default max_tokens 4, temperature 0; a reasoning model wants
    max_completion_tokens=2000, temperature=None; replicate=1 asks afresh).  Adds score (whole number or
    <NA>), status (see `parse_rating`, or why there was nothing to parse: "no_reply" where the endpoint
    refused, "cut_off", "filtered", "refused"), reply, and id, protocol, model, parameters, at, prompt_tokens,
    completion_tokens, cached, error.  `usable` keeps the rows with a score.  Raises EndpointError,
    BudgetReached and ValueError.
    """
    if not isinstance(client, ChatClient):
        return rate_locally(client, table, wording=wording, **parameters)
    requests = rating_requests(table, wording=wording, **parameters)
    replies = client.ask(requests, label="rating", on_error="keep")
    parsed = [_read(parse_rating, reply) for reply in replies]
    _warn_of_cut(status for _, status in parsed)
    rows = checked_texts(table, preferences.RATING[:-1])
    return rows.assign(
        score=pd.array([score for score, _ in parsed], dtype="Int64"),
        status=[status for _, status in parsed],
        reply=[reply.text for reply in replies],
        **_facts(rows, preferences.RATING[:-1], "rating", [[reply] for reply in replies]),
    )


def rank(
    client: ChatClient | LocalAnnotator,
    table: pd.DataFrame,
    *,
    equal: bool = False,
    wording: int = 0,
    **parameters,
) -> pd.DataFrame:
    """A verdict for each row of (instruction, input, response1, response2), asked in both orders.

    A `LocalAnnotator` answers by probabilities: see `rank_locally`.  An endpoint answers in words:
    Adds first and swapped (the letters of the two calls, each as the call showed the responses), verdict
    ("(a)": response1; "(b)": response2; "equal": position was followed, or a call said equal; None where
    a call is missing), status ("ok", else the first call's or the swapped one's), both replies and the
    columns `rate` adds.  Every call is stored by itself: a later run asks for the missing one only.
    """
    if not isinstance(client, ChatClient):
        return rank_locally(client, table, wording=wording, **parameters)
    requests = ranking_requests(table, equal=equal, wording=wording, **parameters)
    replies = client.ask(requests, label="ranking", on_error="keep")
    parsed = [_read(partial(parse_verdict, equal=equal), reply) for reply in replies]
    _warn_of_cut(status for _, status in parsed)
    columns = preferences.RANKING[:-1]
    rows = checked_texts(table, columns)
    first_calls, swapped_calls = parsed[::2], parsed[1::2]
    calls = [list(pair) for pair in zip(replies[::2], replies[1::2], strict=True)]
    verdicts, statuses = [], []
    for first, swapped in zip(first_calls, swapped_calls, strict=True):
        verdicts.append(_verdict(first[0], swapped[0]))
        statuses.append(first[1] if first[1] != "ok" else swapped[1])
    return rows.assign(
        verdict=pd.Series(verdicts, dtype=object),
        first=pd.Series([letter for letter, _ in first_calls], dtype=object),
        swapped=pd.Series([letter for letter, _ in swapped_calls], dtype=object),
        status=statuses,
        first_reply=[reply.text for reply, _ in calls],
        swapped_reply=[reply.text for _, reply in calls],
        **_facts(rows, columns, "ranking", calls),
    )


def _verdict(first: str | None, swapped: str | None) -> str | None:
    if first and swapped and "equal" in (first, swapped):
        return "equal"
    return preferences.verdict_of_orders(first, swapped)


def simulate(
    annotator: SimulatedAnnotator, ratings: pd.DataFrame, rankings: pd.DataFrame, occasion: int = 0
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Ratings with score, and rankings with first, swapped and verdict, by the simulated annotator."""
    rated, ranked = ratings.copy(), rankings.copy()
    rated["score"] = annotator.rate(rated["input"], rated["response"], occasion)
    first, second = ranked["response1"], ranked["response2"]
    ranked["first"] = annotator.compare(ranked["input"], first, second, occasion)
    ranked["swapped"] = annotator.compare(ranked["input"], second, first, occasion)
    calls = zip(ranked["first"], ranked["swapped"], strict=True)
    ranked["verdict"] = [preferences.verdict_of_orders(*pair) for pair in calls]
    return rated, ranked


# --- a local annotator ---------------------------------------------------------------------------


def rate_locally(
    annotator: LocalAnnotator, table: pd.DataFrame, *, wording: int = 0
) -> pd.DataFrame:
    """`rate` by the probabilities of the digits 1 to 7 after the same prompt.

    Adds score (the expectation, a fraction), likeliest (the most probable digit, Int64), status ("ok", or
    "missing", see `LocalAnnotator`), and id, protocol, model.
    """
    rows = checked_texts(table, preferences.RATING[:-1])
    texts = list(zip(*(rows[name] for name in preferences.RATING[:-1]), strict=True))
    log_probs = annotator.log_probs([rating_question(*text, wording=wording) for text in texts])
    log_probs = log_probs.reshape(-1, len(DIGITS))
    scores = expected(log_probs, range(preferences.SCALE[0], preferences.SCALE[1] + 1))
    likeliest = [
        None if pd.isna(score) else int(row.argmax()) + preferences.SCALE[0]
        for score, row in zip(scores, log_probs, strict=True)
    ]
    status = ["missing" if pd.isna(score) else "ok" for score in scores]
    facts = {"id": [preferences.item_id(*text) for text in texts], "protocol": "rating"}
    return rows.assign(
        score=scores,
        likeliest=pd.array(likeliest, dtype="Int64"),
        status=status,
        **facts,
        model=annotator.name,
    )


def rank_locally(
    annotator: LocalAnnotator, table: pd.DataFrame, *, wording: int = 0
) -> pd.DataFrame:
    """`rank` by P("Output (a)") against P("Output (b)") after the same prompt, in both orders.

    Adds p_first (P(response1 is better), averaged over the orders), verdict, first, swapped, order_effect
    (see `judge.both_orders`), status ("ok" or "missing"), and id, protocol, model.
    """
    columns = preferences.RANKING[:-1]
    rows = checked_texts(table, columns)
    asked = []
    for r in rows.itertuples():
        for pair in ((r.response1, r.response2), (r.response2, r.response1)):
            asked.append(ranking_question(r.instruction, r.input, *pair, wording=wording))
    odds = log_odds(annotator.log_probs(asked).reshape(-1, 2))
    comparisons = both_orders(odds[::2], odds[1::2])
    texts = rows[columns].itertuples(index=False)
    return rows.assign(
        **comparisons,
        status=["missing" if pd.isna(p) else "ok" for p in comparisons["p_first"]],
        id=[preferences.item_id(*text) for text in texts],
        protocol="ranking",
        model=annotator.name,
    )


def judge_ratings(
    annotator: LocalAnnotator, table: pd.DataFrame, *, wording: int = 0
) -> pd.DataFrame:
    """`rate_locally` as the gate found to work better than the paper's prompt: asked plainly.

    Adds score and likeliest.
    """
    rows = checked_texts(table, preferences.RATING[:-1])
    columns = (rows[name] for name in preferences.RATING[:-1])
    asked = [
        questions.rating_question(task_of(instruction, input), response, wording)
        for instruction, input, response in zip(*columns, strict=True)
    ]
    log_probs = annotator.log_probs(asked).reshape(-1, len(DIGITS))
    known = ~np.isnan(log_probs).any(1)
    likeliest = pd.Series(log_probs.argmax(1) + preferences.SCALE[0]).where(known)
    scores = expected(log_probs, range(preferences.SCALE[0], preferences.SCALE[1] + 1))
    return rows.assign(score=scores, likeliest=likeliest.astype("Int64"))


def judge_rankings(
    annotator: LocalAnnotator, table: pd.DataFrame, *, wording: int = 0
) -> pd.DataFrame:
    """`rank_locally` as the gate found to work better: by single criteria, in both orders.

    The log odds of a pair are the mean over `questions.CRITERIA`.  Adds the columns of
    `questions.both_orders`; the verdict is the mean's over both orders, so it is never "equal".
    """
    rows = checked_texts(table, preferences.RANKING[:-1])
    shown = list(zip(rows["response1"], rows["response2"], strict=True))
    asked = [  # all as shown, then all swapped: more of them begin alike
        questions.criterion_pair_question(task_of(*item), *pair, criterion[wording])
        for pairs in (shown, [pair[::-1] for pair in shown])
        for *item, pair in zip(rows["instruction"], rows["input"], pairs, strict=True)
        for criterion in questions.CRITERIA
    ]
    odds = log_odds(annotator.log_probs(asked).reshape(-1, 2))
    odds = odds.reshape(2, -1, len(questions.CRITERIA)).mean(-1)
    comparisons = both_orders(*odds)
    letters = comparisons["p_first"].map(
        lambda p: None if pd.isna(p) else "(a)" if p > 0.5 else "(b)"
    )
    return rows.assign(**comparisons).assign(verdict=letters.astype(object))


def task_of(instruction: str, input: str) -> str:
    """What was asked, as the gate's plain questions show it: the instruction, and the passage under it."""
    return f"{instruction}\n\nPassage: {input}" if input.strip() else instruction


def rating_question(instruction: str, input: str, response: str, *, wording: int = 0) -> Question:
    """The rating protocol's prompt for a local annotator."""
    prompt = rating_prompt(instruction, input, response, wording=wording)
    return Question(*_around_item(prompt, instruction, input), DIGITS)


def ranking_question(
    instruction: str, input: str, first: str, second: str, *, wording: int = 0
) -> Question:
    """The ranking protocol's prompt for a local annotator, whose answer begins with "Output ("."""
    prompt = ranking_prompt(instruction, input, first, second, wording=wording)
    before, after = _around_item(prompt, instruction, input)
    return Question(before, after, (("a",), ("b",)), lead="Output (")


def _around_item(prompt: str, instruction: str, input: str) -> tuple[str, str]:
    """A prompt up to the end of its item, which the item's questions share, and the rest."""
    item = item_text(instruction, input)
    end = prompt.rindex(item) + len(item)
    return prompt[:end], prompt[end:]


_UNREAD = {"length": "cut_off", "content_filter": "filtered", "refusal": "refused"}


def _read(parse: Callable, reply: Reply) -> tuple:
    """What a parser finds in a reply; where that is nothing, the status says if the reply was cut."""
    value, status = parse(reply.text)
    return value, status if value is not None else _UNREAD.get(reply.finish_reason, status)


def _warn_of_cut(statuses: Iterable[str]) -> None:
    statuses = list(statuses)
    if cut := statuses.count("cut_off"):
        warnings.warn(
            f"{cut} of {len(statuses)} replies were cut off before an answer. Try a larger max_tokens; "
            "a reasoning model wants max_completion_tokens of a few thousand.",
            stacklevel=3,
        )


def _facts(rows: pd.DataFrame, texts: Sequence[str], protocol: str, calls: list[list[Reply]]):
    """The columns that say where an annotation came from, summed over its calls."""
    texts = rows[list(texts)].itertuples(index=False)
    facts = {"id": [preferences.item_id(*row) for row in texts]}
    facts |= {"protocol": protocol, "model": [c[0].model for c in calls]}
    facts["parameters"] = [c[0].parameters for c in calls]
    facts["at"] = [max(reply.at for reply in c) for c in calls]
    for side in ("prompt", "completion"):
        counts = [[reply.tokens(side) for reply in c] for c in calls]
        counts = [None if None in c else sum(c) for c in counts]
        facts[f"{side}_tokens"] = pd.array(counts, dtype="Int64")
    facts["cached"] = [all(reply.cached for reply in c) for c in calls]
    facts["error"] = ["; ".join(reply.error for reply in c if reply.error) for c in calls]
    return facts


def usable(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of `rate`'s or `rank`'s table that have a score (as int) or a verdict."""
    rows = preferences.judged(table).reset_index(drop=True)
    return rows.astype({"score": int}) if "score" in table else rows


def generate(client: ChatClient, items: Iterable[dict], n: int = 5, **parameters) -> list[dict]:
    """n responses to each {instruction, input}: the same items with `responses` (and their model).

    `parameters` go to the endpoint (default max_tokens 128, temperature 1).  A model's reasoning is left
    out; a response that was refused, filtered or empty is "", with a warning.  Raises EndpointError, also
    where responses ended inside their reasoning; what was answered is stored.
    """
    if n < 1:
        raise ValueError(f"n is {n!r}; at least one response per instruction is needed.")
    items = [{**item, "input": item.get("input") or ""} for item in items]
    parameters = with_defaults({"max_tokens": 128, "temperature": 1.0}, parameters)
    start = parameters.pop("replicate", 0)
    prompts = ["\n\n".join(filter(None, (i["instruction"], i["input"]))) for i in items]
    requests = [chat(p, replicate=start + k, **parameters) for p in prompts for k in range(n)]
    replies = client.ask(requests, label="responses")
    if cut := [reply for reply in replies if reply.finish_reason == "length" and not reply.answer]:
        raise EndpointError(f"{len(cut)} of {len(replies)} responses are empty: {CUT_OFF}.")
    if silent := [reply.error for reply in replies if not reply.answer]:
        warnings.warn(
            f"{len(silent)} of {len(replies)} responses are empty, first: {silent[0]}", stacklevel=2
        )
    texts = [reply.answer for reply in replies]
    return [
        {**item, "responses": texts[k * n : (k + 1) * n], "generator": client.model}
        for k, item in enumerate(items)
    ]
