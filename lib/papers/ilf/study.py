"""Feedback in words from a real model: what is written, and what each text then states and gets right.

    articles -> first summaries (student) -> feedback (writer) -> refinements, and their controls (writer)
             -> facts of the article that a text states, sentences that the article supports (judge)

The three are local annotators, whose texts and answers are stored, so that the tables come again without a
model.  The judge is another model than the writer and is asked grounded questions only, which it passes
(`lib/course/gate.py`).  *Complete*: share of the article's sentences that a text states.  *Unnamed*: the
same of those that the feedback does not give away.  *Faithful*: share of its own sentences that the article
supports.

Simplified: a fact is a sentence of the article, stated wholly or not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from lib import data, runtime, stats
from lib.judge import Annotator, LocalAnnotator
from lib.papers.ilf import refine
from lib.papers.ilf.refine import SENTENCES, AnnotatorWriter, Writer
from lib.questions import Question, log_odds
from lib.text import words

# Chosen on the tuning part: two thirds of the 135M student's sentences are supported, nine tenths of the 0.5B
# model's; both state a third of the article's.  The judge told what an article's first two sentences state
# from what they do not in all cases.
STUDENT, WRITER, JUDGE = "policy", "qwen-1.5b", "qwen-0.5b"
PARTS = {"tuning": 24, "test": 96, "train": 96}  # articles; more can be added to a part at its end
N_WORDS = (60, 110)
N = {"feedback": 5, "second try": 2, "other feedback": 2}  # texts an article
# InstructRM's questions that choose for the train part (the paper's are five)
CHOOSING = refine.QUESTIONS[:3]
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


def _writer(annotator: LocalAnnotator | Writer, kind: str) -> Writer:
    """A writer over a local annotator; a writer, such as `refine.ApiWriter`, is one already."""
    if callable(annotator):
        return annotator
    return AnnotatorWriter(annotator, max_new_tokens=TOKENS[kind], temperature=0.7)


def first_summaries(student: LocalAnnotator | Writer, articles: pd.DataFrame) -> pd.DataFrame:
    """The articles with `summary`, the student's first, in two or three sentences."""
    prompts = [refine.summary_prompt(a.title, a.post) + LENGTH for a in articles.itertuples()]
    drafts = _writer(student, "summary")(prompts, 1, 0)
    return articles.assign(summary=[refine.tidy(row[0].text) for row in drafts])


def criticise(writer: LocalAnnotator | Writer, articles: pd.DataFrame) -> pd.DataFrame:
    """The articles with `feedback`, the writer's on the student's summary."""
    return refine.write_feedback(_writer(writer, "feedback"), articles)


def prepare(
    student: LocalAnnotator | Writer, writer: LocalAnnotator | Writer, articles: pd.DataFrame
) -> pd.DataFrame:
    """The articles with summary and feedback: a person's, where they have them, else written here."""
    if "summary" not in articles:
        articles = first_summaries(student, articles)
    return articles if "feedback" in articles else criticise(writer, articles)


def texts(
    writer: LocalAnnotator | Writer, articles: pd.DataFrame, kinds: Sequence[str] = (*N, OWN)
) -> pd.DataFrame:
    """The texts of the study, a row each: id, arm, candidate, text.

    Arms: the student's first summary, and of these the `kinds`: refinements with feedback, without (a second
    try), with another article's feedback; the writer's own first summary, which says what it can do without
    any of it.
    """
    write = _writer(writer, "summary")
    shown = {
        "feedback": articles["feedback"],
        "second try": None,
        "other feedback": refine.shuffled_feedback(articles),
    }
    rows = [_rows(articles["id"], FIRST, [[text] for text in articles["summary"]])]
    for arm, feedback in shown.items():
        if arm not in kinds:
            continue
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
    if OWN in kinds:
        asked = [refine.summary_prompt(a.title, a.post) + LENGTH for a in articles.itertuples()]
        own = [[refine.tidy(row[0].text)] for row in write(asked, 1, 2)]
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


def known_answers(articles: pd.DataFrame) -> pd.DataFrame:
    """Questions whose answers are known: text, statement, right (True or False).

    Does the start of an article (its first two sentences) state each of its sentences?  Does the article
    support its own sentences, and the next article's under its own title?
    """
    rows = []
    following = np.roll(articles["post"].to_numpy(), -1)
    for article, other in zip(articles.itertuples(), following, strict=True):
        cut = [sentence.strip() for sentence in SENTENCES.texts(article.post)]
        facts = statements(article.title, article.post)
        start = " ".join(cut[:2])
        rows += [(start, fact, k < 2) for k, fact in enumerate(facts)]
        rows += [(article.post, fact, True) for fact in facts]
        rows += [(article.post, fact, False) for fact in statements(article.title, other)]
    return pd.DataFrame(rows, columns=["text", "statement", "right"])


def fit_threshold(annotator: Annotator, articles: pd.DataFrame) -> tuple[float, float]:
    """Where to cut log P(Yes) - log P(No), and the mean of both rates of right answers there.

    Fitted on `known_answers` of tuning articles; NaN where an answer is missing.
    """
    asked = known_answers(articles)
    odds = annotator.supports(asked["text"], asked["statement"])
    if np.isnan(odds).any():
        return np.nan, np.nan
    cuts = np.unique(odds)
    cuts = np.concatenate([(cuts[1:] + cuts[:-1]) / 2, cuts[:1]])
    right = asked["right"].to_numpy()
    yes = odds[:, None] > cuts
    balanced = (yes[right].mean(0) + 1 - yes[~right].mean(0)) / 2
    return float(cuts[balanced.argmax()]), float(balanced.max())


def is_named(title: str, fact: str, feedback: str, share: float = 0.25) -> bool:
    """Whether feedback gives a fact away: it has at least a `share` of the fact's own words.

    Own words: four letters or more, or a number, and not of the title.
    """
    known = set(words(title))
    own = {w for w in words(fact) if (len(w) > 3 or w.isdigit()) and w not in known}
    return len(own & set(words(feedback))) >= share * max(len(own), 1)


def ask(annotator: Annotator, articles: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Every question about the texts: row (of the table), column, statement, named, odds.

    column: "complete" or "faithful".  named: whether the article's own feedback gives the fact away
    (`is_named`; False without feedback).
    """
    by_id = articles.set_index("id")
    asked: list[tuple[int, str, str, bool, str]] = []  # the last: the text that is read
    for i, row in enumerate(table.itertuples()):
        article = by_id.loc[row.id]
        feedback = article.get("feedback", "")
        for fact in statements(article.title, article.post):
            given_away = is_named(article.title, fact, feedback)
            asked.append((i, "complete", fact, given_away, row.text or "(empty)"))
        for sentence in statements(article.title, row.text):
            asked.append((i, "faithful", sentence, False, article.post))
    # questions about one text stand side by side, so that it is read once
    asked.sort(key=lambda question: question[:2])
    answers = pd.DataFrame(asked, columns=["row", "column", "statement", "named", "read"])
    odds = annotator.supports(answers["read"], answers["statement"])
    return answers.drop(columns="read").assign(odds=odds)


def shares(table: pd.DataFrame, answers: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """The texts with complete, unnamed, faithful (each 0 to 1, NaN where an answer is missing) and n_words.

    complete: share of the article's sentences that the text states; unnamed: the same of those that the
    feedback does not give away; faithful: share of the text's sentences that the article supports.  An
    empty text states nothing, and has no sentence that could be right.
    """
    yes = np.where(answers["odds"].isna(), np.nan, answers["odds"] > threshold)
    answers = answers.assign(yes=yes)
    kinds = {name: answers["column"] == name for name in ("complete", "faithful")}
    kinds["unnamed"] = kinds["complete"] & ~answers["named"]

    def mean(rows: pd.Series) -> np.ndarray:
        by_row = answers[rows].groupby("row")["yes"].agg(lambda part: part.mean(skipna=False))
        return by_row.reindex(range(len(table))).to_numpy(float)

    columns = {name: mean(rows) for name, rows in kinds.items()}
    return table.assign(**columns, n_words=[len(words(text)) for text in table["text"]])


def judge(
    annotator: Annotator, articles: pd.DataFrame, table: pd.DataFrame, threshold: float
) -> pd.DataFrame:
    """The texts with what they state and get right (`ask`, `shares`)."""
    return shares(table, ask(annotator, articles, table), threshold)


def words_slope(table: pd.DataFrame, column: str = "unnamed") -> float:
    """What a word more brings: the slope of a column over n_words among the texts of one article.

    Pooled over articles; 0 where lengths do not differ.
    """
    rows = table.dropna(subset=[column])
    groups = rows.groupby("id")[["n_words", column]]
    apart = rows[["n_words", column]] - groups.transform("mean")
    square = float((apart["n_words"] ** 2).sum())
    return float((apart["n_words"] * apart[column]).sum()) / square if square else 0.0


def at_equal_length(table: pd.DataFrame, slope: float, column: str = "unnamed") -> pd.Series:
    """A column as if each text had the mean length of its article's texts; slope: of tuning articles."""
    mean = table.groupby("id")["n_words"].transform("mean")
    return table[column] - slope * (table["n_words"] - mean)


def by_article(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """Mean of a column over an arm's candidates: a row an article, a column an arm."""
    return table.groupby(["id", "arm"], sort=False)[column].mean().unstack()


def effects(
    table: pd.DataFrame, pairs: Sequence[tuple[str, str]], columns: Sequence[str], *, seed: int = 0
) -> pd.DataFrame:
    """Arm b minus arm a over articles: group (the pair), condition (the column), value, low, high, n."""
    rows = []
    for a, b in pairs:
        for column in columns:
            sides = by_article(table, column)
            gap = stats.paired_difference(sides[a], sides[b], seed=seed)
            rows.append({"group": f"{b} - {a}", "condition": column, "value": gap.value})
            rows[-1] |= {"low": gap.low, "high": gap.high, "n": gap.n}
    return pd.DataFrame(rows)


def power(
    table: pd.DataFrame, pairs: Sequence[tuple[str, str]], columns: Sequence[str], sizes: Sequence[int]
) -> pd.DataFrame:  # fmt: skip
    """Half the 95 % interval to expect of b - a with n articles: 1.96 SD / sqrt(n), SD that of `table`."""
    rows = {}
    for a, b in pairs:
        for column in columns:
            sides = by_article(table, column)
            spread = (sides[b] - sides[a]).std()
            rows[f"{b} - {a}", column] = {n: 1.96 * spread / np.sqrt(n) for n in sizes}
    return pd.DataFrame(rows).T


# --- who chooses ---------------------------------------------------------------------------------


def refinements(articles: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """The refinements with feedback, and of what: title, post, summary, feedback, refinement, empty."""
    rows = table[table["arm"] == "feedback"].rename(columns={"text": "refinement"})
    names = ["id", "title", "post", "summary", "feedback"]
    rows = rows.merge(articles[names], on="id", validate="many_to_one")
    return rows.assign(empty=rows["refinement"] == "")


def candidates(articles: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """The refinements with feedback as `refine.choose` and the choosers take them, with their measures.

    score: mean of complete and faithful (0 where a text has no sentence).
    """
    rows = refinements(articles, table)
    score = rows[["complete", "faithful"]].fillna(0).mean(axis=1)
    return rows.assign(words=rows["n_words"], score=score)


def instruct_rm(
    annotator: Annotator,
    rows: pd.DataFrame,
    asked_for: Sequence[refine.Question] = refine.QUESTIONS,
) -> np.ndarray:
    """P(yes) of each question on each refinement, (rows, questions): does it follow the feedback?

    InstructRM: asked in the annotator's chat form; its mean over the questions is the reward.
    """
    fields = rows[["title", "post", "summary", "feedback", "refinement"]].to_dict("records")
    # question by question: an article's refinements then follow each other and share what stands before them
    asked = [_closed(question, row) for question in asked_for for row in fields]
    odds = log_odds(annotator.log_probs(asked)).reshape(len(asked_for), len(rows)).T
    return 1 / (1 + np.exp(-odds))


def _closed(question: refine.Question, fields: dict) -> Question:
    """One of InstructRM's questions with its two answers, each in three spellings."""
    answers = (question.yes.strip(), question.no.strip())
    options = tuple((word, word.lower(), word.upper()) for word in answers)
    return Question("", question.prompt.format(**fields), options)


def to_rank(articles: pd.DataFrame, table: pd.DataFrame, a: str, b: str) -> pd.DataFrame:
    """Two arms' first texts of each article, for people: id, title, post, text_1, text_2, choice.

    Which stands first is decided by a hash of the article's id; choice is empty, for a person's 1 or 2.
    """
    firsts = table[table["candidate"] == 0].pivot(index="id", columns="arm", values="text")
    rows = articles[["id", "title", "post"]].reset_index(drop=True)
    turned = [_turned(key) for key in rows["id"]]
    sides = firsts.loc[rows["id"], [a, b]].to_numpy()
    shown = [pair[::-1] if turn else pair for pair, turn in zip(sides, turned, strict=True)]
    first, second = zip(*shown, strict=True)
    return rows.assign(text_1=first, text_2=second, choice="")


def ranks_won(ranks: pd.DataFrame) -> np.ndarray:
    """Whether b was chosen (1.0 or 0.0) in each row of `to_rank`; rows without 1 or 2 are left out."""
    ranks = ranks.assign(choice=pd.to_numeric(ranks["choice"], errors="coerce"))
    ranks = ranks[ranks["choice"].isin([1, 2])]
    turned = np.array([_turned(key) for key in ranks["id"]], bool)
    return np.where(turned, ranks["choice"] == 1, ranks["choice"] == 2).astype(float)


def _turned(key: str) -> bool:
    return int(runtime.content_hash("to rank", key)[:8], 16) % 2 == 1


# --- word removal --------------------------------------------------------------------------------

REMOVAL = ((2, 1), (4, 1), (4, 2))  # insults in a sentence, how many of them to remove


def word_removal(annotator: LocalAnnotator | Writer, n: int, *, seed: int = 0) -> pd.DataFrame:
    """`refine.word_removal` in three settings, n sentences each, greedily; adds setting."""
    write = annotator
    if not callable(write):
        write = AnnotatorWriter(annotator, max_new_tokens=40, temperature=0.0, top_p=1.0)
    rows = []
    for held, remove in REMOVAL:
        asked = refine.word_removal_items(n, words=held, remove=remove, seed=seed)
        rows.append(refine.word_removal(write, asked).assign(setting=f"{remove} of {held}"))
    return pd.concat(rows, ignore_index=True)
