"""Whose eyes look at the answers of notebook 90: a program's that errs, or a language model's.

Both say of each clause of an answer whether it was asked for, and not said before, and whether it is true.
What is reported of such a look (a rating, a comparison, spans, a sentence) is the same for both
(`annotator.buy`); a demonstration each writes itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np

from lib import questions, training
from lib.chat import ChatClient, Reply
from lib.course import gate
from lib.judge import Annotator, EndpointAnnotator, LocalAnnotator
from lib.papers.fine_grained import toy
from lib.papers.one_hour import world
from lib.questions import Question

SIMULATED = "simulated"
CASES = 60  # questions of the world with known answers, on which a model's thresholds are fitted
KINDS = ("true", "asked", "said")


class Eyes(Protocol):
    """An annotator: what it sees in answers, and what it writes itself."""

    seed: int

    def looks(
        self, prompts: Sequence[str], answers: Sequence[str], kind: str
    ) -> list[toy.Errors]: ...

    def ideals(self, prompts: Sequence[str]) -> list[str]: ...


@dataclass
class Nobody:
    """In the place of a chat client: keeps what it is asked, sends nothing, and answers No."""

    model: str
    requests: list[dict] = field(default_factory=list)

    def ask(self, requests: Sequence[dict], **options) -> list[Reply]:
        """A reply to each request."""
        self.requests += requests
        return [Reply("No", self.model, {}, "") for _ in requests]


def of(name: str, error: float, seed: int, client: ChatClient | Nobody | None = None) -> Eyes:
    """The eyes of an annotator: `SIMULATED`, which errs with a probability, or a model by its name.

    client: of the endpoint where the model is asked; None: it is a local one.
    """
    if client:
        return Model(EndpointAnnotator(client), seed)
    if name == SIMULATED:
        return Simulated(error, seed)
    return Model(LocalAnnotator(name, ask=True), seed)


def generator(seed: int, *key) -> np.random.Generator:
    """The generator of an annotator's choices."""
    return np.random.default_rng(training.seed_for(seed, *key))


def errors_of(prompt: str, answer: str, relevant: np.ndarray, true: np.ndarray) -> toy.Errors:
    """The errors of an answer to someone who sees its clauses so, (clauses,) each; its sentences follow."""
    asked = len(toy.read(prompt).asked)
    names = [world.name_of(clause) for clause in world.clauses_of(answer)]
    sentences, new, stated, first = [], [], set(), 0
    for start, end in toy.Segmenter("sentence").spans(answer):
        last = first + len(world.clauses_of(answer[start:end]))
        now = {name for name, fact in zip(names[first:last], true[first:last], strict=True) if fact}
        sentences.append(bool(true[first:last].all()))
        new.append(bool(now - stated))
        stated |= now
        first = last
    covered = min(1.0, (relevant & true).sum() / asked)
    return toy.Errors(relevant, true, np.array(sentences), np.array(new), covered, asked)


# --- a program that errs -------------------------------------------------------------------------


@dataclass(frozen=True)
class Simulated:
    """Knows the truth of each clause, and misjudges it with a probability; each kind is another look."""

    error: float
    seed: int

    def looks(self, prompts, answers, kind="") -> list[toy.Errors]:
        """What it sees in each answer."""
        return [self._look(*pair, kind) for pair in zip(prompts, answers, strict=True)]

    def _look(self, prompt: str, answer: str, kind: str) -> toy.Errors:
        truth = toy.judge(prompt, answer)
        draws = generator(self.seed, kind, prompt, answer).random((2, len(truth.true)))
        relevant, true = np.array([truth.relevant, truth.true]) ^ (draws < self.error)
        return errors_of(prompt, answer, relevant, true)

    def ideals(self, prompts) -> list[str]:
        """All that was asked, each value wrong with probability `error`."""
        return [self._ideal(prompt) for prompt in prompts]

    def _ideal(self, prompt: str) -> str:
        question, rng = toy.read(prompt), generator(self.seed, "ideal", prompt)
        clauses = []
        for name in question.asked:
            wrong = rng.random() < self.error
            value = rng.choice(toy.ATTRIBUTES[name]) if wrong else question.facts[name]
            clauses.append(f"{name} {value}")
        return ", ".join(clauses) + "."


# --- a language model ----------------------------------------------------------------------------


@dataclass(eq=False)
class Model:
    """A model, asked about each clause: is it true, was it asked for, was it said before?

    A yes or no that a short text decides, as the gate found such a model to be good at; where to cut its log
    odds is fitted on cases with known answers (`thresholds`), which are no question of the notebook.  A
    question that an endpoint does not answer counts as no.
    """

    judge: Annotator
    seed: int

    def looks(self, prompts, answers, kind="") -> list[toy.Errors]:
        """What it sees in each answer, the same for every kind; an empty clause is neither true nor asked."""
        pairs = list(zip(prompts, answers, strict=True))
        asked: dict[tuple[int, int, str], Question] = {}  # by answer, clause, kind of question
        for i, (prompt, answer) in enumerate(pairs):
            question, before = toy.read(prompt), []
            for j, clause in enumerate(world.clauses_of(answer)):
                about = questions_about(question, clause, before)
                asked |= {(i, j, what): text for what, text in about.items()}
                before.append(clause.rstrip(" ,."))
        yes = self._answers(asked)
        looks = []
        for i, pair in enumerate(pairs):
            places = range(len(world.clauses_of(pair[1])))
            true, wanted, again = (
                np.array([yes.get((i, j, what), False) for j in places], bool) for what in KINDS
            )
            looks.append(errors_of(*pair, wanted & ~again, true))
        return looks

    def _answers(self, asked: dict) -> dict:
        """Yes (True) or no to each question; one that stands there twice is asked once."""
        unique = list(dict.fromkeys(asked.values()))
        odds = questions.log_odds(self.judge.log_probs(unique)) if unique else []
        odds = dict(zip(unique, odds, strict=True))
        return {key: odds[text] > self.thresholds[key[-1]] for key, text in asked.items()}

    @cached_property
    def thresholds(self) -> dict[str, float]:
        """Where the log odds are cut, for each kind of question: fewest errors on `known_answers`."""
        odds = self.on_known_answers()
        return {what: gate.fit_threshold(np.nan_to_num(pairs)) for what, pairs in odds.items()}

    def on_known_answers(self) -> dict[str, np.ndarray]:
        """Log odds of cases whose answer is yes beside cases whose answer is no, (cases, 2) a kind."""
        cases = known_answers()
        flat = [text for pairs in cases.values() for pair in pairs for text in pair]
        odds = questions.log_odds(self.judge.log_probs(flat)).reshape(len(KINDS), -1, 2)
        return dict(zip(cases, odds, strict=True))

    def ideals(self, prompts) -> list[str]:
        """What it writes when it is asked itself, in the world's form; "" where that cannot be read."""
        written = self.judge.write([demonstration_prompt(toy.read(p)) for p in prompts])
        return [in_form(texts[0][0]) if texts else "" for texts in written]


def facts_of(question: toy.Question) -> str:
    """The facts of a question in sentences."""
    return " ".join(f"The {name} is {value}." for name, value in question.facts.items())


def asked_for(question: toy.Question) -> str:
    """What a question asks for, in words."""
    *others, last = [f"the {name}" for name in question.asked]
    return f"{', '.join(others)} and {last}" if others else last


def questions_about(question: toy.Question, clause: str, before: Sequence[str]) -> dict:
    """What a model is asked about a clause: {} for an empty one; "said" only where clauses stand before."""
    name, rest = world.name_of(clause), " ".join(clause.rstrip(" ,.").split()[1:])
    if not name:
        return {}
    text = f"{facts_of(question)} A person asks only for {asked_for(question)}."
    asked = {
        "true": questions.support_question(text, f"The {name} is {rest}."),
        "asked": questions.support_question(text, f"The person asks for the {name}."),
    }
    if before:
        said = f"The answer so far: {', '.join(before)}."
        asked["said"] = questions.support_question(said, f"The {name} is already stated.")
    return asked


def known_answers(n: int = CASES, seed: int = 2) -> dict[str, list[tuple[Question, Question]]]:
    """Questions of each kind in pairs, to the first of which yes is right, to the second no.

    true: a fact, and the same with another value.  asked: one of what was asked for, at any place, and
    another fact.  said: one of one to four clauses that stand before, and a fact that none of them states.
    """
    cases: dict[str, list] = {what: [] for what in KINDS}
    for question in toy.draw_questions(n, seed):
        rng = generator(seed, question.prompt)
        known = question.facts
        asked = str(rng.choice(question.asked))
        other = str(rng.choice(sorted({*known} - {*question.asked})))
        wrong = str(rng.choice([x for x in toy.ATTRIBUTES[asked] if x != known[asked]]))
        new, *rest = (f"{name} {known[name]}" for name in rng.permutation(list(known)))
        before = rest[: rng.integers(1, 5)]
        pairs = {
            "true": (f"{asked} {known[asked]}", f"{asked} {wrong}"),
            "asked": (f"{asked} {known[asked]}", f"{other} {known[other]}"),
            "said": (str(rng.choice(before)), new),
        }
        for what, pair in pairs.items():
            cases[what].append(tuple(questions_about(question, x, before)[what] for x in pair))
    return cases


def demonstration_prompt(question: toy.Question) -> str:
    """What a model reads that is to answer itself: one example, of words that are not the world's."""
    facts = ", ".join(f"{name} {value}" for name, value in question.facts.items())
    return (
        "Give what is asked for, each as its name and its value.\n\nFacts: river long, lamp old, stone grey, "
        "bread fresh. Asked: stone, river.\nAnswer: stone grey, river long.\n\n"
        f"Facts: {facts}. Asked: {', '.join(question.asked)}.\nAnswer:"
    )


def in_form(text: str) -> str:
    """A text in the world's form, "metal iron, city oslo."; "" where no part of it has that form."""
    known = set(world.vocabulary())
    parts = (
        re.sub(r"\b(the|is)\b|[^a-z ]", " ", x).split() for x in re.split(r"[,.;\n]", text.lower())
    )
    clauses = [" ".join(words) for words in parts if len(words) == 2 and known.issuperset(words)]
    return ", ".join(clauses) + "." if clauses else ""
