"""The paper's two reward models that answer a question with one token: is it excellent, which is better?

    pairs (a rankings table) -> rows whose last token, the answer, has loss -> `imitate.fine_tune`
                             -> log-odds of the answers

Simplified: a comparison is learned and read in both orders (in the paper, in one).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib import logprobs, sft
from lib.papers.ilf.refine import Question
from lib.questions import log_odds

CLASSIFICATION = Question(
    "{asked}\n\nSummary: {text}\n\nIs this summary excellent, that is coherent, accurate, concise and "
    "detailed? Answer Yes or No.\nAnswer:"
)
COMPARISON = Question(
    "{asked}\n\nSummary A: {first}\n\nSummary B: {second}\n\nWhich summary is better, A or B?\nAnswer:",
    " A",
    " B",
)
FORMS = ("classification", "comparison")


def rows(tokenizer: PreTrainedTokenizerBase, pairs: pd.DataFrame, form: str) -> list[dict]:
    """Two adjacent rows a pair, with loss on the answer alone.

    pairs: a rankings table (instruction, response1, response2, verdict).  classification: "Yes" after the
    preferred response, "No" after the other.  comparison: the preferred one's letter, in both orders.
    Raises ValueError for another form, and for a pair without a verdict.
    """
    if form not in FORMS:
        raise ValueError(f"form is {form!r}; allowed: {', '.join(FORMS)}.")
    undecided = pairs["verdict"][~pairs["verdict"].isin(["(a)", "(b)"])]
    if len(undecided):
        raise ValueError(
            f"verdict is {undecided.iloc[0]!r} in {len(undecided)} of {len(pairs)} pairs; allowed: (a) or "
            "(b). Leave undecided pairs out."
        )
    table = []
    for pair in pairs.itertuples():
        first, second = pair.response1, pair.response2
        first_wins = pair.verdict == "(a)"
        if form == "classification":
            for text, good in ((first, first_wins), (second, not first_wins)):
                asked = CLASSIFICATION.prompt.format(asked=pair.instruction, text=text)
                table.append(_answer_row(tokenizer, CLASSIFICATION, asked, good))
        else:
            for a, b, a_wins in ((first, second, first_wins), (second, first, not first_wins)):
                asked = COMPARISON.prompt.format(asked=pair.instruction, first=a, second=b)
                table.append(_answer_row(tokenizer, COMPARISON, asked, a_wins))
    return table


def _answer_row(tokenizer, question: Question, asked: str, yes: bool) -> dict:
    """Context without loss, the answer's tokens with; split as `logprobs.answer_log_probs` scores them."""
    context, tails = logprobs.split_answers(tokenizer, asked, (question.yes, question.no))
    answer = tails[0 if yes else 1]
    return {"input_ids": context + answer, "labels": [sft.NO_LOSS] * len(context) + answer}


def excellence(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], texts: Sequence[str]
) -> np.ndarray:  # fmt: skip
    """log P(Yes) - log P(No) of each text, (texts,): the reward of a classification reward model."""
    asked = [
        CLASSIFICATION.prompt.format(asked=prompt, text=text)
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    return _log_odds(model, tokenizer, asked, CLASSIFICATION)


def margins(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: pd.DataFrame, form: str
) -> np.ndarray:
    """By how much the first response of each pair is the better one, nats, (pairs,)."""
    prompts, first, second = (
        pairs[name].tolist() for name in ("instruction", "response1", "response2")
    )
    if form == "classification":
        sides = [excellence(model, tokenizer, prompts, side) for side in (first, second)]
        return sides[0] - sides[1]
    sides = []
    for one, other in ((first, second), (second, first)):
        asked = [
            COMPARISON.prompt.format(asked=prompt, first=a, second=b)
            for prompt, a, b in zip(prompts, one, other, strict=True)
        ]
        sides.append(_log_odds(model, tokenizer, asked, COMPARISON))
    return (sides[0] - sides[1]) / 2


def _log_odds(model, tokenizer, asked: list[str], question: Question) -> np.ndarray:
    answers = (question.yes, question.no)
    return log_odds(logprobs.answer_log_probs(model, tokenizer, asked, answers))
