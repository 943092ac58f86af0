"""Feedback in words from a real model: what is written, and what each text then states and gets right.

    articles -> first summaries (student) -> feedback (writer) -> refinements, and their controls (writer)
             -> facts of the article that a text states, sentences that the article supports (judge)

The three are local annotators, whose texts and answers are stored, so that the tables come again without a
model.  The judge is another model than the writer and is asked grounded questions only, which it passes
(`lib/course/gate.py`).  *Complete*: share of the article's sentences that a text states.  *Faithful*: share
of its own sentences that the article supports.

Simplified: a fact is a sentence of the article, stated wholly or not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from lib import data, runtime
from lib.judge import LocalAnnotator
from lib.papers.ilf import refine
from lib.papers.ilf.refine import SENTENCES, AnnotatorWriter
from lib.text import words

# Chosen on the tuning part: two thirds of the 135M student's sentences are supported, nine tenths of the 0.5B
# model's; both state a third of the article's.  The judge told what an article's first two sentences state
# from what they do not in all cases.
STUDENT, WRITER, JUDGE = "policy", "qwen-1.5b", "qwen-0.5b"
PARTS = {"tuning": 24, "test": 96, "train": 160}  # articles; more can be added to a part at its end
N_WORDS = (60, 110)
N = {"feedback": 5, "second try": 2, "other feedback": 2}  # texts an article
FIRST, OWN = "first summary", "writer's summary"
LENGTH = " Write two or three sentences."
TOKENS = {"summary": 90, "feedback": 70}


def select_articles(part: str, n: int | None = None, *, taken: Sequence[str] = ()) -> pd.DataFrame:
    """The first n articles of a part: id, title, post, in an order by hash that more articles do not change.

    Wikipedia leads of 60 to 110 words in three sentences or more, but not those whose titles are `taken`.
    Raises ValueError for an unknown part.
    """
    if part not in PARTS:
        raise ValueError(f"part is {part!r}; allowed: {', '.join(PARTS)}.")
    rows = []
    for article in data.load_wikipedia():
        text = " ".join(article["text"].split())
        key = runtime.content_hash("ilf", article["title"])
        fit = N_WORDS[0] <= article["n_words"] <= N_WORDS[1] and len(SENTENCES.texts(text)) >= 3
        mine = list(PARTS)[int(key[:8], 16) % len(PARTS)] == part
        if fit and mine and article["title"] not in taken:
            rows.append({"id": key[:12], "title": article["title"], "post": text})
    table = pd.DataFrame(sorted(rows, key=lambda row: row["id"]))
    return table.head(PARTS[part] if n is None else n).reset_index(drop=True)


# --- what is written -----------------------------------------------------------------------------


def _writer(annotator: LocalAnnotator, kind: str) -> AnnotatorWriter:
    return AnnotatorWriter(annotator, max_new_tokens=TOKENS[kind], temperature=0.7)


def first_summaries(student: LocalAnnotator, articles: pd.DataFrame) -> pd.DataFrame:
    """The articles with `summary`, the student's first, in two or three sentences."""
    prompts = [refine.summary_prompt(a.title, a.post) + LENGTH for a in articles.itertuples()]
    drafts = _writer(student, "summary")(prompts, 1, 0)
    return articles.assign(summary=[refine.tidy(row[0].text) for row in drafts])


def criticise(writer: LocalAnnotator, articles: pd.DataFrame) -> pd.DataFrame:
    """The articles with `feedback`, the writer's on the student's summary."""
    return refine.write_feedback(_writer(writer, "feedback"), articles)


def texts(writer: LocalAnnotator, articles: pd.DataFrame) -> pd.DataFrame:
    """Every text of the study, a row each: id, arm, candidate, text.

    Arms: the student's first summary; refinements with feedback, without (a second try), with another
    article's feedback; and the writer's own first summary, which says what it can do without any of it.
    """
    write = _writer(writer, "summary")
    shown = {
        "feedback": articles["feedback"],
        "second try": None,
        "other feedback": refine.shuffled_feedback(articles),
    }
    rows = [_rows(articles["id"], FIRST, [[text] for text in articles["summary"]])]
    for arm, feedback in shown.items():
        prompts = [
            refine.refinement_prompt(a.title, a.post, a.summary, f) + LENGTH
            for a, f in zip(
                articles.itertuples(),
                [None] * len(articles) if feedback is None else feedback,
                strict=True,
            )
        ]
        drafts = write(prompts, N[arm], 1)
        tidied = [[refine.tidy(draft.text) for draft in row] for row in drafts]
        rows.append(_rows(articles["id"], arm, tidied))
    prompts = [refine.summary_prompt(a.title, a.post) + LENGTH for a in articles.itertuples()]
    own = [[refine.tidy(row[0].text)] for row in write(prompts, 1, 2)]
    rows.append(_rows(articles["id"], OWN, own))
    return pd.concat(rows, ignore_index=True)


def _rows(ids: Sequence[str], arm: str, candidates: list[list[str]]) -> pd.DataFrame:
    rows = [
        {"id": key, "arm": arm, "candidate": k, "text": text}
        for key, row in zip(ids, candidates, strict=True)
        for k, text in enumerate(row)
    ]
    return pd.DataFrame(rows)


# --- what a text states, and what of it is supported ----------------------------------------------


def statements(title: str, text: str) -> list[str]:
    """A text's sentences, each with the article's title, so that "it" and "he" have a meaning."""
    cut = (sentence.strip() for sentence in SENTENCES.texts(text))
    return [f"{title}: {sentence}" for sentence in cut if sentence]


def judge(
    annotator: LocalAnnotator, articles: pd.DataFrame, table: pd.DataFrame, threshold: float
) -> pd.DataFrame:
    """The texts with complete, faithful (each 0 to 1, NaN where an answer is missing) and n_words.

    threshold: of log P(Yes) - log P(No), as the gate fitted it.  An empty text states nothing, and nothing
    in it is wrong.
    """
    by_id = articles.set_index("id")
    asked: list[tuple[int, str, str, str]] = []  # row, column, text, statement
    for i, row in enumerate(table.itertuples()):
        article = by_id.loc[row.id]
        facts = statements(article.title, article.post)
        asked += [(i, "complete", row.text or "(empty)", fact) for fact in facts]
        own = statements(article.title, row.text)
        asked += [(i, "faithful", article.post, sentence) for sentence in own]
    # questions about one text stand side by side, so that it is read once
    asked.sort(key=lambda question: (question[0], question[1]))
    odds = annotator.supports([q[2] for q in asked], [q[3] for q in asked])
    answers = pd.DataFrame([q[:2] for q in asked], columns=["row", "column"])
    answers["yes"] = np.where(np.isnan(odds), np.nan, odds > threshold)
    shares = answers.groupby(["row", "column"])["yes"].agg(lambda yes: yes.mean(skipna=False))
    shares = shares.unstack().reindex(range(len(table)))
    return table.assign(
        complete=shares["complete"].to_numpy(),
        faithful=shares.get("faithful", pd.Series(np.nan, shares.index)).to_numpy(),
        n_words=[len(words(text)) for text in table["text"]],
    )
