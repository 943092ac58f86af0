"""One annotator, one pair of eyes, five ways to say what it saw: what a budget of minutes buys (notebook 90).

The annotator looks at each clause of an answer, and may misjudge whether it was asked for and whether it is
true (`eyes`: a program that errs, or a language model).  A rating, a comparison, a sentence or spans are then
exact reports of such a look; a demonstration it writes itself.  So kinds of feedback differ in what they
report and in the time that takes, not in how well the annotator sees.

`SECONDS` of an item.  ILF (Scheurer et al. 2023) timed comparison, feedback in words and an ideal summary on
one task.  Fine-grained RLHF (Wu et al. 2023) states about 6 minutes for marking spans and about 15 for
writing an answer, of another task: spans cost 6/15 of an ideal answer here.  No paper of this course timed
a rating: it reads one answer where a comparison reads two, so it costs half.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from lib import generation, preferences, tables
from lib.papers.fine_grained import schema, toy
from lib.papers.one_hour import world
from lib.papers.one_hour.eyes import Eyes, errors_of, facts_of, generator
from lib.papers.sparse_feedback import sheets

IDEAL = 195.5  # seconds
SECONDS = {
    "ratings": 61.5 / 2,
    "rankings": 61.5,
    "spans": IDEAL * 6 / 15,
    "words": 182.5,
    "demonstrations": IDEAL,
}
LOWEST, HIGHEST = 1, 7  # the ratings of sparse feedback
EXAMPLES = 40  # answers among which one is looked for that shows what a look is


@dataclass(frozen=True)
class Bought:
    """What some minutes bought of one kind; entries of the lists belong together.

    ratings: `answers` and `values` (n,) from 1 to 7.  rankings: `answers` is the preferred, `rejected` the
    other; equal pairs are left out, though they were paid for.  spans: `answers` and `marks`, name -> the
    scores of each answer's segments (`toy_arms.PARTS`).  words: `answers` and `sentences`.
    demonstrations: `answers` alone.
    """

    kind: str
    items: int  # paid for
    prompts: list[str]
    answers: list[str]
    rejected: list[str] = field(default_factory=list)
    values: np.ndarray | None = None
    marks: dict[str, list[np.ndarray]] = field(default_factory=dict)
    sentences: list[str] = field(default_factory=list)

    @property
    def sides(self) -> tuple[list[str], list[str]]:
        """The preferred answers of rankings, and the rejected ones."""
        return self.answers, self.rejected


def quality_seen(prompts, answers, eyes: Eyes, kind: str = "") -> np.ndarray:
    """(answers,) complete x faithful as the annotator sees it."""
    return np.array([world.grade(errors).quality for errors in eyes.looks(prompts, answers, kind)])


def items_of(kind: str, minutes: float, seconds: Mapping[str, float] = SECONDS) -> int:
    """How many items of a kind the minutes buy; at least two.  ValueError for an unknown kind."""
    if kind not in seconds:
        raise ValueError(f"kind is {kind!r}; allowed: {', '.join(seconds)}.")
    return max(2, int(minutes * 60 / seconds[kind]))


def buy(kind: str, items: int, pool: generation.Samples, eyes: Eyes) -> Bought:
    """So many items of one kind, question by question; `pool` holds two answers to each question.

    More items begin with the fewer ones.  ValueError where the pool has not so many questions.
    """
    if 2 * items > len(pool):
        raise ValueError(f"{items} {kind}, but the pool has {len(pool) // 2} questions. Draw more.")
    prompts = pool.prompts[: 2 * items : 2]
    first, second = pool.texts[: 2 * items : 2], pool.texts[1 : 2 * items : 2]
    if kind == "ratings":
        values = LOWEST + np.rint((HIGHEST - LOWEST) * quality_seen(prompts, first, eyes, kind))
        return Bought(kind, items, prompts, first, values=values)
    if kind == "rankings":
        return _ranked(items, prompts, first, second, eyes)
    if kind == "demonstrations":
        return _written(items, prompts, eyes)
    looks = eyes.looks(prompts, first, kind)
    if kind == "spans":
        return Bought(kind, items, prompts, first, marks=marks_of(looks))
    triples = zip(prompts, first, looks, strict=True)
    said = [str(generator(eyes.seed, p, a).choice(world.flaws_of(p, a, e))) for p, a, e in triples]
    return Bought(kind, items, prompts, first, sentences=said)


def _ranked(items, prompts, first, second, eyes) -> Bought:
    a, b = (quality_seen(prompts, x, eyes, "rankings") for x in (first, second))
    rows = zip(prompts, first, second, a, b, strict=True)
    rows = [(p, x, y) if u > v else (p, y, x) for p, x, y, u, v in rows if u != v]
    asked, better, worse = map(list, zip(*rows, strict=True)) if rows else ([], [], [])
    return Bought("rankings", items, asked, better, worse)


def _written(items, prompts, eyes) -> Bought:
    """Demonstrations; one that cannot be read is lost, though it was paid for."""
    rows = [(p, text) for p, text in zip(prompts, eyes.ideals(prompts), strict=True) if text]
    asked, answers = map(list, zip(*rows, strict=True)) if rows else ([], [])
    return Bought("demonstrations", items, asked, answers)


def telling_example(pool: generation.Samples, eyes: Eyes) -> int:
    """The number of an answer of four clauses, or about, of which one look misjudges one, or about.

    Of the pool's first `EXAMPLES` answers.
    """
    far = []
    prompts, answers = pool.prompts[:EXAMPLES], pool.texts[:EXAMPLES]
    looks = eyes.looks(prompts, answers, "")
    for prompt, answer, seen in zip(prompts, answers, looks, strict=True):
        truth = toy.judge(prompt, answer)
        misjudged = (truth.true != seen.true).sum() + (truth.relevant != seen.relevant).sum()
        kinds = len({*zip(truth.relevant, truth.true, strict=True)})
        far.append(2 * abs(misjudged - 1) + abs(len(truth.true) - 4) - kinds)
    return int(np.argmin(far))


def misjudged(bought: Bought, eyes: Eyes) -> pd.DataFrame:
    """How a kind's looks at the answers that were bought err: a row for true and for asked and new.

    Columns: clauses, error (share misjudged), missed (of what is so), invented (of what is not).
    """
    looks = eyes.looks(bought.prompts, bought.answers, bought.kind)
    truths = [toy.judge(*pair) for pair in zip(bought.prompts, bought.answers, strict=True)]
    rows = []
    for name, label in (("true", "true"), ("relevant", "asked and new")):
        so, seen = (np.concatenate([getattr(e, name) for e in x]) for x in (truths, looks))
        rows.append(
            {
                "what": label,
                "clauses": len(so),
                "error": (so != seen).mean(),
                "missed": (~seen[so]).mean(),
                "invented": seen[~so].mean(),
            }
        )
    return pd.DataFrame(rows)


def marks_of(looks: Sequence[toy.Errors]) -> dict[str, list[np.ndarray]]:
    """The scores that `toy_models.learn` takes, of the errors that were seen."""
    return {
        "R1": [2.0 * e.relevant - 1 for e in looks],
        "R2": [np.where(e.sentences, e.new, -1.0) for e in looks],
        "R3": [np.array([e.coverage]) for e in looks],
    }


# --- your own hour -------------------------------------------------------------------------------

GUIDELINES = """# In short
An answer should give the facts that the question asks for, each once, and nothing else. The question names
them after its question mark; the passage says what is true. Mark whole clauses ("metal tin"), then correct.

# What to mark
- Irrelevant: a fact that nobody asked for, be it true or false.
- Repetition: a fact that the answer has given before.
- Wrong fact: another value than the passage's.
What is missing needs no mark, it is read off the answer: where that is all, tick that nothing is wrong."""
UNWANTED = ("Irrelevant", "Redundant")  # the other types of error say that a clause is not true


def to_mark(pool: generation.Samples, n: int) -> list[dict]:
    """The first n different questions of the pool with one answer each, as items of the page of spans."""
    pairs = list(dict.fromkeys(zip(pool.prompts[::2], pool.texts[::2], strict=True)))
    return [
        {"instruction": prompt, "input": facts_of(toy.read(prompt)), "responses": [answer]}
        for prompt, answer in pairs[:n]
        if answer.strip()
    ]


def from_file(path: Path | str) -> Bought:
    """What somebody gave: spans of the page's export (.json), or comparisons of a filled sheet."""
    path = Path(path).expanduser()
    return from_page(path) if path.suffix == ".json" else from_sheet(path)


def from_page(path: Path | str) -> Bought:
    """The spans of an export of the page of `to_mark`'s items."""
    records = schema.load_feedback(path, needed=["feedback"])
    prompts, answers = ([r[name] for r in records] for name in ("question", "prediction 1"))
    looks = [errors_of(*_clauses_marked(record)) for record in records]
    return Bought("spans", len(records), prompts, answers, marks=marks_of(looks))


def _clauses_marked(record: dict) -> tuple[str, str, np.ndarray, np.ndarray]:
    """Question, answer, and whether each clause was asked for and new, and true, (clauses,) each.

    A clause is what a mark says of any part of it.
    """
    answer, errors = record["prediction 1"], record["feedback"]["errors"]
    clauses = toy.Segmenter("clause").spans(answer)
    relevant, true = np.ones((2, len(clauses)), bool)
    for i, (start, end) in enumerate(clauses):
        kinds = {e["error type"] for e in errors if e["start"] < end and e["end"] > start}
        relevant[i] = kinds.isdisjoint(UNWANTED)
        true[i] = kinds.issubset(UNWANTED)
    return record["question"], answer, relevant, true


def from_sheet(path: Path | str) -> Bought:
    """The decided comparisons of a sheet that `sparse_feedback.sheets` wrote and somebody filled in."""
    columns = ("instruction", "input", "output (a)", "output (b)")
    lines = tables.csv_records(Path(path).expanduser(), columns)
    _, header = next(lines)
    cells = [dict(zip(header, map(str, fields), strict=True)) for _, fields in lines]
    shown = [[sheets.sheet_text(row[name]) for name in columns] for row in cells]
    table = pd.DataFrame(shown, columns=preferences.RANKING[:-1])
    ranked = preferences.decided(sheets.import_from_humans(path, table))
    first = ranked.verdict == "(a)"
    better = ranked.response1.where(first, ranked.response2).tolist()
    worse = ranked.response2.where(first, ranked.response1).tolist()
    return Bought("rankings", len(cells), ranked.instruction.tolist(), better, worse)
