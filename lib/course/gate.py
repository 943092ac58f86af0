"""Which judge is a judge: questions whose answers are known, because a program made them from a text.

Four kinds: a grounded yes/no question and a grounded pair (is this statement supported by the text, which
of these two is), an open rating and an open pair (of two answers to a task).  The wrong statement has a
number changed, is another article's sentence, or describes another article of the topic; the worse answer
has a number changed, a sentence dropped, a sentence of another article added, or is another article's.  How
a kind is asked is chosen on the tuning cases; the test cases are asked so, and once, and beside "take the
longer one".
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pandas as pd

from lib import data, preferences, questions, runtime, stats
from lib.annotator import SimulatedAnnotator
from lib.course import items
from lib.judge import Annotator
from lib.papers.sparse_feedback import protocols
from lib.questions import DIGITS, Question
from lib.segments import Segmenter

CASES = {"tuning": 24, "test": 108}
WRONG = ("number", "sentence", "description")  # what is wrong with a statement
WORSE = ("number", "dropped", "added", "foreign")  # what is wrong with an answer
TASK = "Write a summary of the passage in two or three sentences."
CRITERIA = [wordings[0] for wordings in questions.CRITERIA]
_NUMBER = re.compile(r"(?<![\w.,])\d{1,3}(?:,\d{3})+|(?<![\w.,])\d{2,}(?![\w]|[.,]\d)")
_SENTENCES = Segmenter("sentence")


# --- cases ---------------------------------------------------------------------------------------


def build_cases() -> pd.DataFrame:
    """The cases: part, title, text, wrong_kind, right, wrong (statements), worse_kind, better, worse
    (answers).

    Leads of 50 to 110 words in three sentences or more, one of which has a number, that are not among the
    items; their order is by hash, and part and kinds follow from it.
    """
    known = set(items.read_prompts()["title"])
    articles = []
    for article in data.load_wikipedia():
        text = " ".join(article["text"].split())
        cut = [sentence.strip() for sentence in _SENTENCES.texts(text)]
        numbers = [s for s in cut if _NUMBER.search(s) and 8 <= len(s.split()) <= 45]
        fit = len(cut) >= 3 and numbers and 50 <= article["n_words"] <= 110
        if fit and article["title"] not in known:
            facts = {"title": article["title"], "topic": article["topic"], "text": text}
            facts |= {"description": article["description"], "cut": cut, "numbers": numbers}
            articles.append(facts)
    articles.sort(key=lambda a: runtime.content_hash("gate", a["title"]))
    total = sum(CASES.values())
    rows = []
    for i, article in enumerate(articles[:total]):
        same = [a for a in articles[total:] if a["topic"] == article["topic"]]
        other = same[i % len(same)]
        part = "tuning" if i < CASES["tuning"] else "test"
        row = {"part": part, "title": article["title"], "text": article["text"]}
        rows.append(row | _statements(article, other, i) | _answers(article, other, i))
    return pd.DataFrame(rows)


def _statements(article: dict, other: dict, i: int) -> dict:
    """A statement that the text supports, and one that it does not."""
    kind = WRONG[i % len(WRONG)]
    right = article["numbers"][i % len(article["numbers"])]
    wrong = change_number(right) if kind == "number" else other["cut"][1]
    if kind == "description":
        right, wrong = (f"{article['title']}: {a['description']}." for a in (article, other))
    return {"wrong_kind": kind, "right": right, "wrong": wrong}


def _answers(article: dict, other: dict, i: int) -> dict:
    """A summary of the text's own sentences, and one that is worse."""
    kind = WORSE[i % len(WORSE)]
    numbered = article["numbers"][0]
    picked = [s for s in article["cut"] if s in (article["cut"][0], numbered)]
    picked = picked if len(picked) > 1 else article["cut"][:2]
    worse = {
        "number": [change_number(s) if s == numbered else s for s in picked],
        "dropped": picked[1:],
        "added": [*picked, other["cut"][1]],
        "foreign": other["cut"][: len(picked)],
    }[kind]
    return {"worse_kind": kind, "better": " ".join(picked), "worse": " ".join(worse)}


def change_number(sentence: str) -> str:
    """The sentence with its first number changed: a year by 5 to 40, another number by a tenth to a half.

    Raises ValueError for a sentence without a number of at least two digits.
    """
    match = _NUMBER.search(sentence)
    if match is None:
        raise ValueError(f"no number of two digits or more in {sentence!r}.")
    old = int(match[0].replace(",", ""))
    draw = int(runtime.content_hash("number", sentence)[:8], 16)
    year = 1000 <= old <= 2100 and "," not in match[0]
    step = 5 + draw % 36 if year else max(1, round(old * (0.1 + draw % 41 / 100)))
    new = old - step if draw // 64 % 2 and old > 2 * step else old + step
    shown = f"{new:,}" if "," in match[0] else str(new)
    return sentence[: match.start()] + shown + sentence[match.end() :]


# --- how a kind is asked -------------------------------------------------------------------------

# Each takes (annotator, cases) and gives one row a case: for yes/no and ratings the scores of the right and
# the wrong one, for pairs the log odds of the first place, as (right, wrong) and as (wrong, right).
Asking = Callable[[Annotator, pd.DataFrame], np.ndarray]


def _ratings(log_probs: np.ndarray) -> np.ndarray:
    return questions.expected(log_probs, range(1, 8))


def _supported(annotator: Annotator, cases: pd.DataFrame) -> np.ndarray:
    asked = [
        questions.support_question(c.text, s)
        for c in cases.itertuples()
        for s in (c.right, c.wrong)
    ]
    return questions.log_odds(annotator.log_probs(asked)).reshape(-1, 2)


def _supported_calibrated(annotator: Annotator, cases: pd.DataFrame) -> np.ndarray:
    """Against the same question about no statement (content-free, Zhao et al. 2021)."""
    free = annotator.supports(cases["text"].tolist(), ["N/A"] * len(cases))
    return _supported(annotator, cases) - free[:, None]


def _pairs(texts: list[str], right: str, wrong: str, *wordings: Callable) -> Asking:
    """Both orders of each case's two texts; of several wordings the mean."""

    def ask(annotator: Annotator, cases: pd.DataFrame) -> np.ndarray:
        asked = []
        for case in cases.to_dict("records"):
            item = [case[name] for name in texts]
            for first, second in ((right, wrong), (wrong, right)):
                asked += [question(*item, case[first], case[second]) for question in wordings]
        odds = questions.log_odds(annotator.log_probs(asked))
        return odds.reshape(-1, 2, len(wordings)).mean(-1)

    return ask


def _task(text: str) -> str:
    return items.user_message(TASK, text)


def _open_pair(text: str, a: str, b: str) -> Question:
    return questions.pair_question(_task(text), a, b)


def _paper_pair(text: str, a: str, b: str) -> Question:
    return protocols.ranking_question(TASK, text, a, b)


def _reference_pair(text: str, reference: str, a: str, b: str) -> Question:
    task = f"{_task(text)}\n\nA good answer (for comparison): {reference}"
    return questions.pair_question(task, a, b)


def _criterion_pair(criterion: str) -> Callable:
    return lambda text, a, b: questions.criterion_pair_question(_task(text), a, b, criterion)


def _calibrated_pairs(annotator: Annotator, cases: pd.DataFrame) -> np.ndarray:
    free = annotator.log_probs([_open_pair(text, "N/A", "N/A") for text in cases["text"]])
    asked = _pairs(["text"], "better", "worse", _open_pair)(annotator, cases)
    return asked - questions.log_odds(free)[:, None]


def _rated(*wordings: Callable) -> Asking:
    """The ratings of each case's two answers; of several wordings the mean."""

    def ask(annotator: Annotator, cases: pd.DataFrame) -> np.ndarray:
        names = ("better", "worse")
        records = cases.to_dict("records")
        asked = [question(c, c[name]) for c in records for name in names for question in wordings]
        return _ratings(annotator.log_probs(asked)).reshape(-1, 2, len(wordings)).mean(-1)

    return ask


def _open_rating(case: dict, response: str) -> Question:
    return questions.rating_question(_task(case["text"]), response)


def _paper_rating(case: dict, response: str) -> Question:
    return protocols.rating_question(TASK, case["text"], response)


def _reference_rating(case: dict, response: str) -> Question:
    reference = first_sentences(case["text"])
    task = f"{_task(case['text'])}\n\nA good answer (for comparison): {reference}"
    return questions.rating_question(task, response)


def _criterion_rating(criterion: str) -> Callable:
    def question(case: dict, response: str) -> Question:
        asked = f'How true is it to say: "{criterion}"'
        asked += " Reply with a number from 1 (not at all) to 7 (entirely)."
        rest = f"Answer: {response}\n\n{asked}"
        return Question(f"Task: {_task(case['text'])}\n\n", rest, DIGITS, questions.GRADER)

    return question


def _calibrated_ratings(annotator: Annotator, cases: pd.DataFrame) -> np.ndarray:
    """Digits' probabilities over those after an answer "N/A" to the same task."""
    records = cases.to_dict("records")
    free = annotator.log_probs([_open_rating(case, "N/A") for case in records])
    asked = [_open_rating(c, c[name]) for c in records for name in ("better", "worse")]
    log_probs = annotator.log_probs(asked) - np.repeat(free, 2, axis=0)
    return _ratings(log_probs).reshape(-1, 2)


def first_sentences(text: str) -> str:
    """The first two sentences: what a case's judge sees as a reference, where it sees one."""
    return " ".join(sentence.strip() for sentence in _SENTENCES.texts(text)[:2])


KINDS: dict[str, dict[str, Asking]] = {
    "grounded yes/no": {"plain": _supported, "calibrated": _supported_calibrated},
    "grounded pair": {
        "plain": _pairs(["text"], "right", "wrong", questions.grounded_pair_question)
    },
    "open rating": {
        "plain": _rated(_open_rating),
        "paper's prompt": _rated(_paper_rating),
        "criteria one by one": _rated(*map(_criterion_rating, CRITERIA)),
        "calibrated": _calibrated_ratings,
        "with a reference": _rated(_reference_rating),
    },
    "open pair": {
        "plain": _pairs(["text"], "better", "worse", _open_pair),
        "paper's prompt": _pairs(["text"], "better", "worse", _paper_pair),
        "criteria one by one": _pairs(["text"], "better", "worse", *map(_criterion_pair, CRITERIA)),
        "calibrated": _calibrated_pairs,
        "with a reference": _pairs(["text", "reference"], "better", "worse", _reference_pair),
    },
}


# --- the gate ------------------------------------------------------------------------------------


def run(annotator: Annotator) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The gate of one annotator: the table of kinds (test cases), and that of every way of asking (tuning).

    Columns: model, kind, asked, part, n, accuracy with low and high (95 %, over cases; a tie counts as
    half), longer and gain (with low and high) over "take the longer one"; for pairs first_share (the first
    place chosen) and consistency (both orders choose the same response), each with low and high; for yes/no
    the threshold that tuning cases give, and threshold_accuracy with it.
    """
    cases = build_cases()
    cases["reference"] = cases["text"].map(first_sentences)
    tuning, test = (cases[cases["part"] == part] for part in CASES)
    tried, passed = [], []
    for kind, askings in KINDS.items():
        rows = []
        for name, ask in askings.items():
            scores = ask(annotator, tuning)
            rows.append({"asked": name} | measure(kind, tuning, scores, scores))
        best = max(rows, key=lambda row: row["accuracy"])
        tried += [{"model": annotator.name, "kind": kind, "part": "tuning"} | row for row in rows]
        ask = askings[best["asked"]]
        row = measure(kind, test, ask(annotator, test), ask(annotator, tuning))
        facts = {"model": annotator.name, "kind": kind, "part": "test", "asked": best["asked"]}
        passed.append(facts | row)
    return pd.DataFrame(passed), pd.DataFrame(tried)


def run_simulated(annotator: SimulatedAnnotator, cases: pd.DataFrame) -> pd.DataFrame:
    """The two open kinds for the simulated annotator, which knows no statements: rows as those of `run`.

    A comparison counts as log odds of 1 for the place that it names.
    """
    texts, better, worse = (cases[name].tolist() for name in ("text", "better", "worse"))
    ratings = np.stack([annotator.rate(texts, answers) for answers in (better, worse)], 1)
    calls = [annotator.compare(texts, *pair) for pair in ((better, worse), (worse, better))]
    places = np.stack([np.where(np.array(letters) == "(a)", 1.0, -1.0) for letters in calls], 1)
    rows = []
    for kind, scores in (("open rating", ratings), ("open pair", places)):
        rows.append({"kind": kind, "asked": "its rubric"} | measure(kind, cases, scores, scores))
    return pd.DataFrame(rows).assign(model="simulated", part="test")


def measure(kind: str, cases: pd.DataFrame, scores: np.ndarray, tuning: np.ndarray) -> dict:
    """The figures of one kind from its scores, (cases, 2); `tuning`: the scores that set a threshold."""
    pair = kind.endswith("pair")
    # in a pair, the log odds of the first place: right first minus wrong first
    points = preferences.win_points(scores[:, 0], scores[:, 1])
    columns = ("right", "wrong") if kind.startswith("grounded") else ("better", "worse")
    longer = preferences.win_points(*(cases[name].str.len() for name in columns))
    row = {"n": len(cases)} | _interval("accuracy", points) | {"longer": float(longer.mean())}
    row |= _interval("gain", points - longer)
    if pair:
        row |= _interval("first_share", (scores > 0).mean(axis=1))
        row |= _interval("consistency", (np.sign(scores[:, 0]) != np.sign(scores[:, 1])) * 1.0)
    if kind == "grounded yes/no":
        row["threshold"] = fit_threshold(tuning)
        right = [scores[:, 0] > row["threshold"], scores[:, 1] <= row["threshold"]]
        row |= _interval("threshold_accuracy", np.mean(right, axis=0))
    return row


def fit_threshold(scores: np.ndarray) -> float:
    """The threshold between right and wrong statements' scores, (cases, 2), with the fewest errors.

    Of several, the middle of the lowest and the highest.
    """
    ordered = np.sort(scores.ravel())
    middles = (ordered[1:] + ordered[:-1]) / 2
    errors = [(scores[:, 0] <= m).sum() + (scores[:, 1] > m).sum() for m in middles]
    best = middles[np.array(errors) == min(errors)]
    return float((best[0] + best[-1]) / 2)


def _interval(name: str, values: np.ndarray) -> dict[str, float]:
    """Mean of a value a case, with its interval (Wilson's where values are 0 or 1), as three columns."""
    values = np.asarray(values, float)
    if np.isin(values, (0, 1)).all():
        interval = stats.proportion(int(values.sum()), len(values))
    else:
        interval = stats.bootstrap(values)
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
