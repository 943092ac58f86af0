"""Grounded question answering whose errors a program judges exactly: PROGRAMMATIC REWARDS, for dense PPO.

A prompt holds facts and asks for some of them; an answer is a list of clauses in sentences:

    colour red, metal iron, age nine, city oslo? metal city:   ->   metal iron, city oslo.

The three kinds of error of fine-grained RLHF (Wu et al. 2023, section 4) are known by construction:
C1 a clause not asked for, repeated or no clause at all (judged for each clause), C2 a wrong value (for each
sentence), C3 an asked fact missing (for the whole answer).  `f1`, the judge, is in no reward: it compares
what was rightly answered with all that was said and all that was asked, so padding costs.  A true sentence
is paid once: said again it earns nothing, so that saying more needs more facts.

Simplified: a world of 12 attributes and 8 values each; words are tokens; nothing is paraphrased.
"""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pandas as pd
import torch

from lib import models, segments

ATTRIBUTES = {
    "colour": "red blue green black white brown grey pink",
    "metal": "iron gold silver copper tin lead zinc nickel",
    "city": "oslo paris rome cairo lima delhi quito tokyo",
    "animal": "owl fox cat dog horse eagle wolf bear",
    "age": "one two three four five six seven eight",
    "tree": "oak pine elm birch cedar maple willow palm",
    "fruit": "apple pear plum grape lemon melon cherry peach",
    "month": "march april may june july august october december",
    "sport": "golf chess tennis rugby hockey judo rowing archery",
    "tool": "hammer saw drill chisel file wrench spade axe",
    "shape": "cube cone disc ring star cross square sphere",
    "craft": "weaving pottery baking carving sewing painting glazing tanning",
}
ATTRIBUTES = {name: tuple(values.split()) for name, values in ATTRIBUTES.items()}
MARKS = (",", ".", "?", ":")
_SEGMENTS = {"clause": r"[^,.]*[,.](?:\s+$)?|[^,.]+$", "sentence": r"[^.]*\.(?:\s+$)?|[^.]+$"}


def tokenizer_and_model(seed: int = 0, **sizes):
    """A small decoder with random weights over the task's words, and its tokenizer.

    `sizes`: fields of the model's configuration, as in `models.build_tiny_model`.
    """
    words = [*MARKS, *ATTRIBUTES, *(value for values in ATTRIBUTES.values() for value in values)]
    return models.build_tiny_model(words=words, seed=seed, **sizes)


def load_policy(name: str):
    """A kept policy of this task, in float32.  ValueError for a model that does not know the task's words."""
    policy, tokenizer = models.load_policy(name, dtype=torch.float32)
    if tokenizer.get_vocab() != tokenizer_and_model()[1].get_vocab():
        raise ValueError(
            f"{name} has other tokens than the words of this task. Give a policy that was trained on it: "
            "notebook 42 keeps one in runs/<scale>/42_dense_reward_ppo/models/dense."
        )
    return policy


@dataclass(frozen=True)
class Question:
    """Facts (attribute -> value) and the attributes asked for."""

    facts: dict[str, str]
    asked: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """The text given to the policy; `read` turns it back."""
        facts = ", ".join(f"{name} {value}" for name, value in self.facts.items())
        return f"{facts}? {' '.join(self.asked)}:"


def read(prompt: str) -> Question:
    """The question of a prompt.  Raises ValueError for a text of another form."""
    match = re.fullmatch(r"(.+)\?(.+):", prompt)
    pairs = [fact.split() for fact in match[1].split(",")] if match else [()]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"not a prompt of this task: {prompt!r}; try Question(...).prompt.")
    return Question(dict(pairs), tuple(match[2].split()))


def draw_questions(n: int, seed: int, facts: int = 6, asked: int = 3) -> list[Question]:
    """n questions, all different; ValueError where asked > facts or facts > the attributes there are."""
    if not 0 < asked <= facts <= len(ATTRIBUTES):
        raise ValueError(
            f"facts is {facts} and asked {asked}; allowed: asked up to facts, facts up to {len(ATTRIBUTES)}."
        )
    rng = np.random.default_rng(seed)
    questions = {}
    while len(questions) < n:
        names = rng.permutation(list(ATTRIBUTES))[:facts].tolist()
        known = {name: str(rng.choice(ATTRIBUTES[name])) for name in names}
        question = Question(known, tuple(rng.permutation(names)[:asked].tolist()))
        questions[question.prompt] = question
    return list(questions.values())


def demonstrate(
    questions: Sequence[Question], seed: int, *, relevant: float = 0.6, right: float = 0.75
) -> list[str]:
    """One noisy answer to each question, for the first fine-tuning.

    2 clauses up to one a fact, none twice; each is about an asked attribute with probability `relevant` while
    both kinds are left, has the right value with probability `right`, and ends its sentence half of the time.
    """
    rng, answers = np.random.default_rng(seed), []
    for question in questions:
        asked, text = rng.permutation(question.asked).tolist(), ""
        others = rng.permutation([x for x in question.facts if x not in question.asked]).tolist()
        for _ in range(rng.integers(2, len(question.facts) + 1)):
            wanted = rng.random() < relevant
            name = (asked if asked and (wanted or not others) else others).pop()
            wrong = rng.random() >= right
            value = str(rng.choice(ATTRIBUTES[name])) if wrong else question.facts[name]
            text += f" {name} {value}" + (",", ".")[rng.integers(2)]
        answers.append(text[1:-1] + ".")
    return answers


# --- segments and their errors -------------------------------------------------------------------


@dataclass(frozen=True)
class Segmenter(segments.Segmenter):
    """Segments of this task's answers: unit "clause" (up to , or .), "sentence" (up to .) or "sequence".

    The rule for English prose merges pieces under five words; here a clause has two.
    """

    def __post_init__(self):
        if self.unit not in (*_SEGMENTS, "sequence"):
            raise ValueError(f"unit is {self.unit!r}; allowed: {', '.join(_SEGMENTS)}, sequence.")

    def spans(self, text: str) -> list[tuple[int, int]]:
        """(start, end) of the segments: they partition the text; an unfinished last one counts.

        As a "sequence" an empty answer is one segment: saying nothing is judged too.
        """
        if self.unit == "sequence":
            return [(0, len(text))]
        return [match.span() for match in re.finditer(_SEGMENTS[self.unit], text)]


@dataclass(frozen=True)
class Errors:
    """What is right in one answer."""

    relevant: np.ndarray  # (clauses,) asked for, and not said before
    true: np.ndarray  # (clauses,) the facts say so
    sentences: np.ndarray  # (sentences,) every clause is true
    new: np.ndarray  # (sentences,) some clause states rightly what was not stated before
    coverage: float  # share of the asked facts that are stated rightly
    asked: int

    @property
    def f1(self) -> float:
        """2 right / (clauses said + facts asked); right: asked for, true, said for the first time."""
        right = (self.relevant & self.true).sum()
        return float(2 * right / (len(self.true) + self.asked))


@lru_cache(maxsize=100_000)
def judge(prompt: str, text: str) -> Errors:
    """The errors of one answer, exactly; an answer without text has no clauses and covers nothing."""
    question, said = read(prompt), {}
    relevant, true, sentences, new = [], [], [], []
    for start, end in Segmenter("sentence").spans(text):
        first = len(true)
        before = sum(said.values())
        for left, right in Segmenter("clause").spans(text[start:end]):
            words = text[start:end][left:right].rstrip(" ,.").split()
            name, value = words if len(words) == 2 else ("", "")
            relevant.append(name in question.asked and name not in said)
            true.append(bool(name) and question.facts.get(name) == value)
            said[name] = said.get(name, False) or true[-1]
        sentences.append(all(true[first:]))
        new.append(sum(said.values()) > before)
    asked = len(question.asked)
    coverage = sum(said.get(name, False) for name in question.asked) / asked
    marks = (np.array(x, dtype=bool) for x in (relevant, true, sentences, new))
    return Errors(*marks, coverage, asked)


def relevance(prompts: Sequence[str], responses: Sequence[str]) -> list[np.ndarray]:
    """R1 for each clause: 1 if asked for and not said before, else -1."""
    return [2.0 * judge(p, r).relevant - 1 for p, r in zip(prompts, responses, strict=True)]


def factuality(prompts: Sequence[str], responses: Sequence[str]) -> list[np.ndarray]:
    """R2 for each sentence: 1 if every value in it is right, -1 if one is wrong, 0 if all was said before."""
    errors = [judge(p, r) for p, r in zip(prompts, responses, strict=True)]
    return [np.where(e.sentences, e.new, -1.0) for e in errors]


def completeness(prompts: Sequence[str], responses: Sequence[str]) -> list[np.ndarray]:
    """R3 for the whole answer, (1,): the share of the asked facts that it states rightly."""
    return [np.array([judge(p, r).coverage]) for p, r in zip(prompts, responses, strict=True)]


def panel(prompts: Sequence[str], responses: Sequence[str]) -> pd.DataFrame:
    """One row an answer: clauses, relevant ones, sentences, factual ones, coverage, and f1, the judge."""
    judgements = [judge(p, r) for p, r in zip(prompts, responses, strict=True)]
    rows = [
        (len(e.true), e.relevant.sum(), len(e.sentences), e.sentences.sum(), e.coverage, e.f1)
        for e in judgements
    ]
    columns = ["clauses", "relevant", "sentences", "factual", "coverage", "f1"]
    return pd.DataFrame(rows, columns=columns)


# --- rewards that err, preferences ---------------------------------------------------------------

SCALES = {"R1": (-1.0, 1.0), "R2": (-1.0, 1.0), "R3": (0.0, 1.0)}  # lowest and highest score


def erring(score: Callable, name: str, share: float, seed: int = 0) -> Callable:
    """The scores of R1, R2 or R3 (`name`), each segment's turned round with probability `share`.

    Turned round: lowest + highest - score.  A text gets the same errors whenever it is scored, as a learned
    model would make them.  Raises ValueError for a share outside 0 to 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share!r}; allowed: 0 to 1.")

    def scored(prompts: Sequence[str], responses: Sequence[str]) -> list[np.ndarray]:
        rows = score(prompts, responses)
        texts = zip(prompts, responses, strict=True)
        return [
            _turned(row, text, name, share, seed) for row, text in zip(rows, texts, strict=True)
        ]

    return scored


def _turned(row: np.ndarray, text: tuple[str, str], name: str, share: float, seed: int):
    key = zlib.crc32("\n".join((name, *text)).encode())
    turn = np.random.default_rng([seed, key]).random(len(row)) < share
    return np.where(turn, sum(SCALES[name]) - row, row)


def quality(prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
    """(answers,) overall quality: mean of the shares of relevant clauses, true sentences, asked facts."""
    table = panel(prompts, responses)
    shares = table.relevant / table.clauses, table.factual / table.sentences, table.coverage
    return sum(share.fillna(0).to_numpy(dtype=float) for share in shares) / 3


def preferred_pairs(values: np.ndarray, per_question: int, noise: float, seed: int) -> np.ndarray:
    """(questions, pairs, 2) all pairs of a question's answers, the preferred one's number first.

    `values` (answers,) stand question by question.  An annotator prefers the higher value plus normal noise
    of deviation `noise`, drawn anew in each pair.
    """
    rows = np.arange(len(values)).reshape(-1, per_question)
    pairs = rows[:, list(itertools.combinations(range(per_question), 2))]
    seen = values[pairs] + np.random.default_rng(seed).normal(0, noise, pairs.shape)
    return np.take_along_axis(pairs, np.argsort(-seen, axis=-1), axis=-1)
