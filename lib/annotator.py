"""A simulated annotator with a published rubric: every kind of feedback, from one judgement.

People are not at hand on a laptop, and a 135M model is no judge.  This module judges a response about a
passage by rules that anyone can read, and gives the feedback that the papers collect: a rating, a
comparison, a ranking, error spans, missing facts, a sentence of critique, a category, a number.  It is
right by construction, and it is SIMULATED: wherever it is used, the notebook says so.

The rubric, all shares in [0, 1]:
  coverage    key facts of the passage that the response states.  Key facts: what the subject is (content
              words after the first "is"), then names and numbers of the passage, at most `max_facts`.
  support     content words, names and numbers of the response that stand in the passage.
  repetition  repeated three-word runs of the response.
  length      1 between `min_words` and `max_words`, falling to 0 at none and at twice the maximum.

Simplified: words are compared by their first five letters; paraphrase, negation and order of facts are
not understood, so a response can be wrong and be called supported.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from lib import preferences, runtime
from lib.text import repetition_share, words

CATEGORIES = ("coverage", "support", "repetition", "length")
_WORD = re.compile(r"\w+(?:['’.,]\w+)*")
_NAME = re.compile(r"(?:[A-Z][\w’'-]*|\d[\d.,]*\d|\d)(?:\s+(?:[A-Z][\w’'-]*|\d[\d.,]*\d|\d))*")
_CLAUSE = re.compile(r"[^.!?;:,\n]+(?:[.!?;:,\n]+(?=\s|$)|$|[.!?;:,\n]+)")
_COPULA = re.compile(r"\b(?:is|are|was|were)\b(.+?)(?:[.;]|$)", re.S)


@dataclass(frozen=True)
class Span:
    """A stretch of the response, response[start:end], with the rubric's category of its error."""

    start: int
    end: int
    category: str


@dataclass(frozen=True)
class Critique:
    """One remark: its category, the fact or clause it is about ("" for none), and the sentence."""

    category: str
    target: str
    text: str


@dataclass(frozen=True)
class Judgement:
    """What the rubric finds in one response.  Shares in [0, 1]; `missing` names facts of the passage."""

    coverage: float
    support: float
    repetition: float
    length: float
    words: int
    missing: tuple[str, ...]
    spans: tuple[Span, ...]

    @property
    def accuracy(self) -> float:
        """support x (1 - repetition) x length: how much of what is said may be said."""
        return self.support * (1 - self.repetition) * self.length

    @property
    def score(self) -> float:
        """Mean of the four parts, repetition counted as 1 - repetition."""
        return (self.coverage + self.support + 1 - self.repetition + self.length) / 4

    @property
    def category(self) -> str:
        """The worst of the four parts, or "none" where nothing is to be criticised."""
        parts = (self.coverage, self.support, 1 - self.repetition, self.length)
        worst = int(np.argmin(parts))
        return CATEGORIES[worst] if parts[worst] < 1 else "none"


def stems(text: str) -> list[str]:
    """First five letters of each content word (no function words), numbers whole."""
    content = [w for w in words(text) if w not in ENGLISH_STOP_WORDS]
    return [w if w[0].isdigit() else w.removesuffix("'s").removesuffix("’s")[:5] for w in content]


@lru_cache(maxsize=4096)
def _stem_set(text: str) -> frozenset[str]:
    return frozenset(stems(text))


@lru_cache(maxsize=4096)
def key_facts(source: str, max_facts: int = 6) -> tuple[str, ...]:
    """The passage's key facts as phrases: what its subject is, then names and numbers in order.

    Words of the subject itself (before the first "is") are no facts: the question names them.
    """
    copula = _COPULA.search(source)
    definition = " ".join(_content(copula[1])[:5]) if copula else ""
    known = set(stems(source[: copula.start()] if copula else ""))
    known.update(stems(definition))
    facts = [definition] if definition else []
    body = source[copula.start() :] if copula else source
    for name in _NAME.finditer(body):
        words = name[0].split()
        before = body[: name.start()].rstrip()
        opens = not before or before[-1] in ".!?"  # of a sentence: its capital may mean nothing
        if words[0].lower() in ENGLISH_STOP_WORDS:
            words = words[1:]
        elif opens and len(words) == 1 and not words[0][0].isdigit():
            words = []
        phrase = " ".join(words).strip(".,")
        new = [stem for stem in stems(phrase) if stem not in known]
        if new:
            facts.append(phrase)
            known.update(new)
    return tuple(facts[:max_facts])


def _content(text: str) -> list[str]:
    return [w for w in _WORD.findall(text) if w.lower() not in ENGLISH_STOP_WORDS]


@dataclass(frozen=True)
class Rubric:
    """The published rubric (module docstring); its settings are its whole state."""

    max_facts: int = 6
    min_words: int = 8
    max_words: int = 60

    def facts(self, source: str) -> tuple[str, ...]:
        """The key facts that a response about `source` should state."""
        return key_facts(source, self.max_facts)

    def states(self, response: str, fact: str) -> bool:
        """Whether the response states the fact: at least half of its content words occur in it."""
        needed = stems(fact)
        held = _stem_set(response)
        return bool(needed) and sum(stem in held for stem in needed) >= len(needed) / 2

    def judge(self, source: str, response: str) -> Judgement:
        """Judge one response about the passage `source`.  An empty response covers and supports nothing."""
        facts = self.facts(source)
        missing = tuple(fact for fact in facts if not self.states(response, fact))
        said, held = stems(response), _stem_set(source)
        n_words = len(words(response))
        repeated = repetition_share(response)
        return Judgement(
            coverage=(len(facts) - len(missing)) / len(facts) if facts else float(bool(said)),
            support=sum(stem in held for stem in said) / len(said) if said else 0.0,
            repetition=0.0 if np.isnan(repeated) else float(repeated),
            length=self._length(n_words),
            words=n_words,
            missing=missing,
            spans=tuple(self._spans(source, response)),
        )

    def judge_all(self, sources: Sequence[str], responses: Sequence[str]) -> list[Judgement]:
        """`judge` for pairs of source and response."""
        return [self.judge(s, r) for s, r in zip(sources, responses, strict=True)]

    def _length(self, n_words: int) -> float:
        if n_words < self.min_words:
            return n_words / self.min_words
        return float(np.clip(2 - n_words / self.max_words, 0, 1))

    def _spans(self, source: str, response: str):
        """Clauses that say again what was said (repetition), or less than half of it is in the source."""
        held, seen = _stem_set(source), set()
        for clause in _CLAUSE.finditer(response):
            said = stems(clause[0])
            if not said:
                continue
            key = tuple(said)
            start = clause.start() + len(clause[0]) - len(clause[0].lstrip())
            foreign = [stem for stem in said if stem not in held]
            if len(said) > 1 and key in seen:
                yield Span(start, clause.end(), "repetition")
            elif len(foreign) > len(said) / 2 or any(stem[0].isdigit() for stem in foreign):
                yield Span(start, clause.end(), "support")
            seen.add(key)


# --- the annotator -------------------------------------------------------------------------------

_WORDINGS = {
    "coverage": (
        "It does not say {0}.",
        "The text should also mention {0}.",
        "What is missing is {0}.",
    ),
    "support": (
        "The passage does not say: {0}.",
        "Take out what the passage does not support: {0}.",
        "This is not in the passage: {0}.",
    ),
    "repetition": ("It repeats itself.", "Say each thing once.", "Cut the repetition."),
    "length": ("It is too {0}.", "The length is wrong: too {0}.", "Make it {1}."),
}


@dataclass(frozen=True)
class SimulatedAnnotator:
    """Feedback of every kind from the rubric, with protocol weights, noise and position bias as settings.

    quality = (1 - w) accuracy + w coverage, with w = `rating_density` when rating and w =
    `ranking_density` when comparing (the paper's finding: raters prize density, rankers accuracy).
    A rating is 1 + 6 (quality - worst) / (best - worst) + noise, rounded and kept within 1-7.  A call
    of a comparison prefers the first response if quality1 - quality2 + position_bias + noise > 0.
    Noise is normal with the stated standard deviations (ratings: points; comparisons: quality), and is
    a function of the seed, the texts and `occasion`: the same question gets the same answer, in any
    order; another occasion asks again.  Raises ValueError for settings out of range.
    """

    rubric: Rubric = field(default_factory=Rubric)
    rating_density: float = 0.8
    ranking_density: float = 0.2
    rating_noise: float = 0.7
    ranking_noise: float = 0.1
    position_bias: float = 0.03
    worst: float = 0.1
    best: float = 0.9
    seed: int = 0

    def __post_init__(self):
        for name in ("rating_density", "ranking_density"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: 0 to 1.")
        if self.rating_noise < 0 or self.ranking_noise < 0 or self.worst >= self.best:
            raise ValueError("noise must be at least 0, and worst below best.")

    def quality(
        self, sources: Sequence[str], responses: Sequence[str], protocol: str = "rating"
    ) -> np.ndarray:
        """Noise-free quality in [0, 1] as one protocol ("rating" or "ranking") weighs it."""
        if protocol not in ("rating", "ranking"):
            raise ValueError(f"protocol is {protocol!r}; allowed: rating, ranking.")
        weight = self.rating_density if protocol == "rating" else self.ranking_density
        judgements = self.rubric.judge_all(sources, responses)
        return np.array([(1 - weight) * j.accuracy + weight * j.coverage for j in judgements])

    def rate(
        self, sources: Sequence[str], responses: Sequence[str], occasion: int = 0
    ) -> np.ndarray:
        """Ratings, whole numbers from 1 to 7."""
        low, high = preferences.SCALE
        share = (self.quality(sources, responses) - self.worst) / (self.best - self.worst)
        noise = self._noise("rate", occasion, zip(sources, responses, strict=True))
        exact = low + (high - low) * share + self.rating_noise * noise
        return np.clip(np.rint(exact), low, high).astype(int)

    def compare(
        self, sources: Sequence[str], first: Sequence[str], second: Sequence[str], occasion: int = 0
    ) -> list[str]:
        """One call for each pair, as shown: "(a)" for the first response, "(b)" for the second."""
        gap = self.quality(sources, first, "ranking") - self.quality(sources, second, "ranking")
        noise = self._noise("compare", occasion, zip(sources, first, second, strict=True))
        lead = gap + self.position_bias + self.ranking_noise * noise
        return ["(a)" if value > 0 else "(b)" for value in lead]

    def rank(
        self, sources: Sequence[str], first: Sequence[str], second: Sequence[str], occasion: int = 0
    ) -> list[str]:
        """Verdicts from both orders, as the paper asks: "(a)", "(b)", or "equal" where they conflict."""
        shown = self.compare(sources, first, second, occasion)
        swapped = self.compare(sources, second, first, occasion)
        return list(map(preferences.verdict_of_orders, shown, swapped))

    def remark(self, source: str, response: str) -> Critique:
        """A sentence on the worst part, as a person would write it, with its category and what it is about.

        `target` is the missing fact, or the clause to drop; `text` is "" if nothing is wrong.
        """
        judgement = self.rubric.judge(source, response)
        category, target = judgement.category, ""
        if category == "none":
            return Critique(category, "", "")
        texts = _WORDINGS[category]
        draw = int(runtime.content_hash(self.seed, "critique", source, response)[:8], 16)
        wording = texts[draw % len(texts)]
        if category == "coverage":
            missing = judgement.missing  # one of them, drawn: not always the definition
            target = missing[draw // 8 % len(missing)] if missing else ""
            filled = [target or "an important fact"]
        elif category == "support":
            wrong = [s for s in judgement.spans if s.category == "support"]
            target = response[wrong[0].start : wrong[0].end].strip(" .,;:!?") if wrong else ""
            filled = [f'"{target}"' if target else "some of its statements"]
        else:
            short = judgement.words < self.rubric.min_words
            filled = ["short", "longer"] if short else ["long", "shorter"]
        return Critique(category, target, wording.format(*filled))

    def _noise(self, what: str, occasion: int, texts) -> np.ndarray:
        """One standard normal number a question, a function of seed, kind, occasion and texts."""
        seeds = [int(runtime.content_hash(self.seed, what, occasion, *t)[:15], 16) for t in texts]
        return np.array([np.random.default_rng(seed).standard_normal() for seed in seeds])
