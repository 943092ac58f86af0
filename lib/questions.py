"""Questions with a closed set of answers, and what the answers' probabilities say.

A `judge.LocalAnnotator` gives the log-probability of each answer; here are the questions that the course
asks, and what becomes of the log-probabilities: an expected rating, log odds, a comparison in both orders.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lib import preferences

DIGITS = tuple((str(n),) for n in range(preferences.SCALE[0], preferences.SCALE[1] + 1))
YES_NO = (("Yes", "yes", "YES"), ("No", "no", "NO"))
LETTERS = (("A",), ("B",))

CHECKER = "You check statements against a text."
GRADER = "You grade answers."
REFEREE = "You compare answers."


@dataclass(frozen=True)
class Question:
    """A question with a closed set of answers.

    shared: what comes first and is the same for all questions about one item (they stand side by side in a
    list); rest: what is asked.  options: the answers, each a tuple of spellings.  lead: how the answer begins
    ("Output ("), where it does not begin with an option.
    """

    shared: str
    rest: str
    options: tuple[tuple[str, ...], ...]
    system: str = ""
    lead: str = ""


def support_question(text: str, statement: str) -> Question:
    """Does the text support the statement?  Yes or no."""
    rest = f"Statement: {statement}\n\nIs the statement supported by the text? Answer Yes or No."
    return Question(f"Text: {text}\n\n", rest, YES_NO, CHECKER)


def rating_question(prompt: str, response: str, wording: int = 0) -> Question:
    """How good is the response, from 1 to 7?  In one of two wordings."""
    asked = (
        "How good is the answer: right, complete and clear? Reply with a number from 1 (useless) to 7 "
        "(nothing could be improved).",
        "Mark the answer with a number from 1 to 7 for being true, whole and easy to read: 7 could not be "
        "better, 1 is of no use.",
    )[wording]
    rest = f"Answer: {response}\n\n{asked}"
    return Question(f"Task: {prompt}\n\n", rest, DIGITS, GRADER)


def pair_question(prompt: str, first: str, second: str) -> Question:
    """Which of two responses is better, A or B?"""
    rest = (
        f"Answer A: {first}\n\nAnswer B: {second}\n\nWhich answer is better: right, complete and clear? "
        "Reply with A or B."
    )
    return Question(f"Task: {prompt}\n\n", rest, LETTERS, REFEREE)


CRITERIA = (  # each in two wordings
    (
        "The answer says only what the passage says.",
        "The answer claims nothing that the passage does not.",
    ),
    (
        "The answer states what matters most in the passage.",
        "The answer holds the passage's main points.",
    ),
    (
        "The answer keeps to the subject of the passage.",
        "The answer does not stray from the passage's subject.",
    ),
)


def criterion_pair_question(prompt: str, first: str, second: str, criterion: str) -> Question:
    """Of which of two responses is a criterion truer, A or B?"""
    asked = f'Of which answer is it truer to say: "{criterion}" Reply with A or B.'
    rest = f"Answer A: {first}\n\nAnswer B: {second}\n\n{asked}"
    return Question(f"Task: {prompt}\n\n", rest, LETTERS, REFEREE)


def grounded_pair_question(text: str, first: str, second: str) -> Question:
    """Which of two statements does the text support, A or B?"""
    rest = (
        f"Statement A: {first}\n\nStatement B: {second}\n\nOnly one of the statements is supported by the "
        "text. Which one? Reply with A or B."
    )
    return Question(f"Text: {text}\n\n", rest, LETTERS, CHECKER)


# --- what the answers' probabilities say ---------------------------------------------------------


def normalised(log_probs: np.ndarray) -> np.ndarray:
    """log p among the options alone, (questions, options); what the model puts on other words is dropped."""
    with np.errstate(invalid="ignore"):  # NaN is a missing answer
        return log_probs - np.logaddexp.reduce(log_probs, axis=1, keepdims=True)


def expected(log_probs: np.ndarray, values: Sequence[float]) -> np.ndarray:
    """The expectation of the options' values, (questions,); NaN for a missing answer."""
    return np.exp(normalised(log_probs)) @ np.asarray(values, float)


def log_odds(log_probs: np.ndarray) -> np.ndarray:
    """log p of the first of two options minus log p of the second, (questions,)."""
    return log_probs[:, 0] - log_probs[:, 1]


def both_orders(shown: np.ndarray, swapped: np.ndarray) -> pd.DataFrame:
    """Comparisons from the log odds of the first place, asked as given and with the responses swapped.

    p_first: P(first response is better), averaged over the orders.  first, swapped: what each call chose,
    "(a)" its first place, "(b)" its second, None where it is missing; verdict as in
    `preferences.verdict_of_orders`. order_effect: how much likelier the first place is than the response
    there makes it, P(first place) - 1/2 averaged over the orders.
    """
    p_shown, p_swapped = (1 / (1 + np.exp(-odds)) for odds in (shown, swapped))
    calls = [
        [None if math.isnan(p) else "(a)" if p > 0.5 else "(b)" for p in column]
        for column in (p_shown, p_swapped)
    ]
    table = pd.DataFrame({"p_first": (p_shown + 1 - p_swapped) / 2})
    table["verdict"] = pd.Series(map(preferences.verdict_of_orders, *calls), dtype=object)
    table["first"] = pd.Series(calls[0], dtype=object)
    table["swapped"] = pd.Series(calls[1], dtype=object)
    table["order_effect"] = (p_shown + p_swapped) / 2 - 0.5
    return table
