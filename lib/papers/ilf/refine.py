"""Refinement with language feedback (ILF, Scheurer et al. 2023): summary -> feedback -> refinements -> best.

Tables carry the pipeline.  Articles: id, title, post, summary (the initial one), and feedback, with
feedback_class and feedback_target where they are known (`give_feedback`).  Refinements: the article's
columns, then candidate (0 to n-1), refinement and its flags.  A *writer* turns prompts into drafts (a
local model or an endpoint); a *chooser* is any function of a table of refinements that gives each row a
score; `choose` takes the best of each article.

Simplified: prompts have the parts of the paper's in our own words; the rubric decides whether feedback
was incorporated, so it is known only for feedback of the simulated annotator.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib import data, embeddings, encoding, generation, logprobs, runtime, stats, tables
from lib.annotator import CATEGORIES, Critique, Rubric, SimulatedAnnotator, stems
from lib.answers import without_reasoning
from lib.chat import ChatClient, chat, with_defaults
from lib.judge import LocalAnnotator
from lib.papers.ilf.data import load_slf5k, wikipedia_as_slf5k
from lib.segments import Segmenter
from lib.text import is_empty, words

SAMPLING = {"temperature": 1.0, "top_p": 0.95}  # the paper's; 48 new tokens
ARTICLE = ("id", "title", "post", "summary", "feedback", "feedback_class", "feedback_target")


# --- articles ------------------------------------------------------------------------------------

SENTENCES = Segmenter("sentence")
SAMPLE_SPLITS = {"pool": (0, 12), "train": (12, 20), "test": (20, 26)}


def load_articles(
    source: str, split: str, n: int | None = None, *, rubric: Rubric | None = None, min_facts: int = 4
) -> pd.DataFrame:  # fmt: skip
    """Articles to summarise: id, title, post and what else the source has; the first n of the split.

    `source`: "samples" (26 passages of the project's own; splits pool, train, test), "wikipedia"
    (`data.wikipedia_as_slf5k`, passages with at least `min_facts` key facts of the rubric), or SLF5K's Hub
    id, folder or file.  SLF5K brings its own summary (generated_summary_for_feedback) and its human
    feedback.  Raises ValueError for an unknown split or too large an n.
    """
    if source == "wikipedia":
        judge = rubric or Rubric()
        fit = lambda text: len(judge.facts(text)) >= min_facts  # noqa: E731
        return pd.DataFrame(wikipedia_as_slf5k(split, n, keep=fit).to_list())
    if source == "samples":
        if split not in SAMPLE_SPLITS:
            raise ValueError(f"split is {split!r}; allowed: {', '.join(SAMPLE_SPLITS)}.")
        path = runtime.project_root() / "data" / "samples" / "passages.jsonl"
        table = pd.DataFrame([record for _, record in tables.jsonl_records(path)])
        table = table[slice(*SAMPLE_SPLITS[split])].reset_index(drop=True)
        table.insert(0, "id", [f"own_{runtime.content_hash(t)[:12]}" for t in table["title"]])
    else:
        table = load_slf5k(source, split).to_pandas()
        summary = table["generated_summary_for_feedback"]
        table = table.assign(summary=summary, feedback_target="")
    if n is not None and not 0 < n <= len(table):
        raise ValueError(f"n is {n!r}; split {split!r} of {source} has {len(table)} articles.")
    return table[:n]


# --- prompts -------------------------------------------------------------------------------------


def summary_prompt(title: str, post: str) -> str:
    """The prompt for an initial summary: instruction, title, text, cue (section 1.2 of the pipeline)."""
    return f"Write an excellent, short summary of the text.\n\nTitle: {title}\n\nText: {post}\n\nTL;DR:"


def feedback_prompt(title: str, post: str, summary: str) -> str:
    """The prompt with which a model writes the feedback, one to three sentences."""
    return (
        "A summary of a text is given. Say in one to three sentences what is most important to improve: "
        "what is missing, what the text does not support, or what to cut. Do not write a new summary."
        f"\n\nTitle: {title}\n\nText: {post}\n\nSummary: {summary}\n\nFeedback on summary:"
    )


def refinement_prompt(title: str, post: str, summary: str, feedback: str | None = None) -> str:
    """The prompt for a refinement; without feedback it asks for a second try (the paper's control)."""
    follow = "" if feedback is None else " that follows the feedback"
    remark = "" if feedback is None else f"Feedback on summary: {feedback}\n\n"
    return (
        f"Write an excellent, short summary of the text{follow} and is better than the summary given."
        f"\n\nTitle: {title}\n\nText: {post}\n\nSummary: {summary}\n\n{remark}Improved TL;DR:"
    )


def tidy(text: str) -> str:
    """What the paper does to every generated summary (section 1.2 of the pipeline).

    Dropped: what precedes the first letter or digit, all lines but the first, runs of blanks, and an
    unfinished last sentence (a text without . ? or ! is kept whole).
    """
    lines = re.sub(r"^[\W_]+", "", text).split("\n")
    line = " ".join(lines[0].split())
    end = max(line.rfind(mark) for mark in ".?!")
    return line[: end + 1] if end >= 0 else line


# --- writers -------------------------------------------------------------------------------------


class Draft(NamedTuple):
    """One sampled text without the model's reasoning, and whether it ended within the token limit."""

    text: str
    finished: bool


class Writer(Protocol):
    """Anything that samples n texts for each prompt."""

    def __call__(self, prompts: Sequence[str], n: int = 1, seed: int = 0) -> list[list[Draft]]: ...


@dataclass
class LocalWriter:
    """A writer over `generation.sample`; the paper's sampling unless given; style: `data.apply_template`."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int = 48
    temperature: float = SAMPLING["temperature"]
    top_p: float = SAMPLING["top_p"]
    style: str = "raw"

    def __call__(self, prompts: Sequence[str], n: int = 1, seed: int = 0) -> list[list[Draft]]:
        """n drafts of each prompt.  A line end ends a draft: `tidy` keeps the first line only."""
        prompts = data.apply_template(prompts, self.tokenizer, self.style)
        drawn = generation.sample(
            self.model, self.tokenizer, prompts, n=n, seed=seed, label="writing",
            max_new_tokens=self.max_new_tokens, temperature=self.temperature, top_p=self.top_p,
        )  # fmt: skip
        drafts = []
        for text, finished in zip(drawn.texts, drawn.finished, strict=True):
            text = without_reasoning(text)
            drafts.append(Draft(text, finished or "\n" in text.strip()))
        return [drafts[i : i + n] for i in range(0, len(drafts), n)]


@dataclass
class AnnotatorWriter:
    """A writer over a local annotator: its texts are stored, and those that ship need no model."""

    annotator: LocalAnnotator
    max_new_tokens: int = 48
    temperature: float = SAMPLING["temperature"]
    top_p: float = SAMPLING["top_p"]
    system: str = ""

    def __call__(self, prompts: Sequence[str], n: int = 1, seed: int = 0) -> list[list[Draft]]:
        """n drafts of each prompt.  Raises ValueError where texts are missing and no model may be asked."""
        rows = self.annotator.write(
            prompts,
            n=n,
            seed=seed,
            system=self.system,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
        )
        if missing := rows.count(None):
            raise ValueError(
                f"{missing} of {len(rows)} texts of {self.annotator.name} are missing. Try "
                "LocalAnnotator(..., ask=True): the model is downloaded once."
            )
        return [[Draft(without_reasoning(text), done) for text, done in row] for row in rows]


class ApiWriter:
    """A writer over an endpoint; every reply is stored, so a run that breaks off buys none again.

    A reasoning model wants max_completion_tokens=2000, temperature=None, top_p=None.
    """

    def __init__(self, client: ChatClient, max_tokens: int | None = 48, **parameters):
        self.client = client
        self.parameters = with_defaults({"max_tokens": max_tokens, **SAMPLING}, parameters)

    def requests(self, prompts: Sequence[str], n: int = 1, seed: int = 0) -> list[dict]:
        """What a call would ask, for `ChatClient.estimate`; another seed asks afresh."""
        numbers = range(1000 * seed, 1000 * seed + n)
        return [chat(p, replicate=k, **self.parameters) for p in prompts for k in numbers]

    def __call__(self, prompts: Sequence[str], n: int = 1, seed: int = 0) -> list[list[Draft]]:
        """n drafts of each prompt.  Raises chat.EndpointError and BudgetReached."""
        replies = self.client.ask(self.requests(prompts, n, seed), label="writing")
        drafts = [Draft(reply.answer, reply.finish_reason != "length") for reply in replies]
        return [drafts[i : i + n] for i in range(0, len(drafts), n)]


# --- the pipeline --------------------------------------------------------------------------------


def summarise(writer: Writer, articles: pd.DataFrame, *, n: int = 1, seed: int = 0) -> pd.DataFrame:
    """The articles with summary, and for n > 1 summary_2, ... (the paper compares two, criticises a third).

    Summaries are tidied; one that is empty stays empty and has its words counted as 0.
    """
    prompts = [summary_prompt(a.title, a.post) for a in articles.itertuples()]
    drafts = writer(prompts, n, seed)
    names = ["summary", *(f"summary_{k}" for k in range(2, n + 1))]
    return articles.assign(
        **{name: [tidy(row[k].text) for row in drafts] for k, name in enumerate(names)}
    )


def give_feedback(
    articles: pd.DataFrame, annotator: SimulatedAnnotator, *, name_facts: bool = True
) -> pd.DataFrame:
    """The articles with the simulated annotator's feedback, feedback_class and feedback_target.

    Articles whose summary leaves nothing to criticise are left out: attrs["without_feedback"] counts them.
    """
    remarks = [
        annotator.remark(a.post, a.summary, name_facts=name_facts) for a in articles.itertuples()
    ]
    table = articles.assign(
        feedback=[r.text for r in remarks],
        feedback_class=[r.category for r in remarks],
        feedback_target=[r.target for r in remarks],
    )
    criticised = table[table["feedback"] != ""].reset_index(drop=True)
    criticised.attrs["without_feedback"] = len(table) - len(criticised)
    return criticised


def write_feedback(writer: Writer, articles: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """The articles with feedback written by a model (class and target are not known: "")."""
    prompts = [feedback_prompt(a.title, a.post, a.summary) for a in articles.itertuples()]
    texts = [" ".join(row[0].text.split()) for row in writer(prompts, 1, seed)]
    return articles.assign(feedback=texts, feedback_class="", feedback_target="")


def shuffled_feedback(articles: pd.DataFrame) -> pd.Series:
    """The control: each article's feedback replaced by the next one's (class and target stay its own)."""
    if len(articles) < 2:
        raise ValueError(
            f"{len(articles)} article(s); feedback can be exchanged between two or more."
        )
    return pd.Series(np.roll(articles["feedback"], 1), index=articles.index)


def refine(
    writer: Writer, articles: pd.DataFrame, *, n: int = 5, extra: int = 0, seed: int = 0,
    feedback: Sequence[str] | None | str = "feedback",
) -> pd.DataFrame:  # fmt: skip
    """n refinements of each article's summary, one row each, in the articles' order.

    `feedback`: the column that the prompt shows, a text for each article, or None for a second try
    without.  n + `extra` drafts are drawn; first come different texts that are not empty, then repeated
    ones, then empty ones, each in order of generation, and n are kept.  Adds candidate, refinement, and
    empty, overlong (cut at the token limit), duplicate (of an earlier candidate), unchanged (equal to the
    summary), words.  Raises ValueError where an article's feedback is empty.
    """
    shown = articles[feedback] if isinstance(feedback, str) else feedback
    shown = [None] * len(articles) if shown is None else list(shown)
    if "" in shown:
        raise ValueError("an article has no feedback; leave it out, or use feedback=None for all.")
    prompts = [
        refinement_prompt(a.title, a.post, a.summary, f)
        for a, f in zip(articles.itertuples(), shown, strict=True)
    ]
    rows = []
    known = [name for name in ARTICLE if name in articles]
    for article, drafts in zip(
        articles[known].to_dict("records"), writer(prompts, n + extra, seed), strict=True
    ):
        rows += [article | c for c in _candidates(drafts, article["summary"])[:n]]
    table = pd.DataFrame(rows)
    return table.assign(candidate=table.groupby("id", sort=False).cumcount())


def _candidates(drafts: Sequence[Draft], summary: str) -> list[dict]:
    rows, seen = [], set()
    for draft in drafts:
        text = tidy(draft.text)
        flags = {"empty": not text, "overlong": not draft.finished, "duplicate": text in seen}
        flags |= {"unchanged": text == summary, "words": len(words(text))}
        rows.append({"refinement": text, **flags})
        seen.add(text)
    return sorted(rows, key=lambda c: (c["empty"], c["duplicate"]))


# --- was the feedback followed? ------------------------------------------------------------------


def incorporates(
    rubric: Rubric, source: str, summary: str, critique: Critique, refinement: str
) -> bool:
    """Whether a refinement does what the critique of the summary asks, by the rubric.

    coverage: it states the missing fact.  support: the words of the clause that the source does not have
    are gone (all of the source's foreign words, where no clause was named).  repetition: nothing is
    repeated.  length: within the rubric's limits.  An empty refinement follows nothing.
    """
    if is_empty(refinement) or critique.category == "none":
        return False
    after = rubric.judge(source, refinement)
    if critique.category == "coverage":
        return rubric.states(refinement, critique.target)
    if critique.category == "support":
        wrong = rubric.foreign(source, critique.target or summary)
        return not wrong & rubric.foreign(source, refinement)
    return after.repetition == 0 if critique.category == "repetition" else after.length == 1


def measure(table: pd.DataFrame, rubric: Rubric) -> pd.DataFrame:
    """The refinements with the rubric's coverage, support, repetition, length, score and `incorporated`.

    `incorporated` (1.0 or 0.0) is NaN where the feedback's class is not known (a person's, a model's).
    """
    judged = rubric.judge_all(table["post"], table["refinement"])
    parts = ("coverage", "support", "repetition", "length", "score")
    table = table.assign(**{name: [getattr(j, name) for j in judged] for name in parts})
    followed = []
    for row in table.itertuples():
        known = row.feedback_class in CATEGORIES
        critique = Critique(row.feedback_class, row.feedback_target, row.feedback)
        texts = (row.post, row.summary, critique, row.refinement)
        followed.append(float(incorporates(rubric, *texts)) if known else np.nan)
    return table.assign(incorporated=followed)


# --- choosers ------------------------------------------------------------------------------------


def choose(table: pd.DataFrame, scores: Sequence[float]) -> pd.DataFrame:
    """The refinement with the highest score of each article, in the articles' order.

    Ties go to the first candidate.  An empty refinement is chosen only where all are empty.  Adds
    choice_score.  Raises ValueError for a score that is missing.
    """
    scores = np.asarray(scores, dtype=float)
    if scores.shape != (len(table),) or np.isnan(scores).any():
        raise ValueError(
            f"scores have shape {scores.shape}, {int(np.isnan(scores).sum())} missing; needed is a number "
            f"for each of the {len(table)} refinements."
        )
    ranked = table.assign(choice_score=scores, _row=np.arange(len(table)))
    order = ranked.sort_values(
        ["empty", "choice_score", "candidate"], ascending=[True, False, True], kind="stable"
    )
    return order.groupby("id", sort=False).head(1).sort_values("_row").drop(columns="_row")


def tied(table: pd.DataFrame, scores: Sequence[float]) -> np.ndarray:
    """Whether an article's highest score belongs to more than one text, (articles,) in order; such a choice
    is the order of generation, not the score.  Empty refinements do not count.
    """
    filled = table.assign(_score=np.asarray(scores, dtype=float))[~table["empty"].to_numpy(bool)]
    top = filled["_score"] == filled.groupby("id")["_score"].transform("max")
    return (filled[top].groupby("id", sort=False)["refinement"].nunique() > 1).to_numpy()


def longest(table: pd.DataFrame) -> np.ndarray:
    """Chooser: words of the refinement."""
    return table["refinement"].map(lambda text: len(words(text))).to_numpy(float)


class EmbeddingSimilarity:
    """Chooser: cosine of feedback and refinement, as mean last hidden states of a sentence encoder."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.model, self.tokenizer = model, tokenizer

    def __call__(self, table: pd.DataFrame) -> np.ndarray:
        texts = list(dict.fromkeys([*table["feedback"], *table["refinement"]]))
        place = {text: i for i, text in enumerate(texts)}
        vectors = embeddings.embed(self.model, self.tokenizer, texts)
        left, right = (vectors[table[c].map(place)] for c in ("feedback", "refinement"))
        return (left * right).sum(1)


# --- InstructRM: a language model asked whether the feedback was followed ------------------------


class Question(NamedTuple):
    """A prompt with the fields title, post, summary, feedback, refinement, and its two answers."""

    prompt: str
    yes: str = " Yes"
    no: str = " No"


_FIELDS = (
    "Title: {title}\n\nText: {post}\n\nOriginal summary: {summary}\n\nFeedback: {feedback}\n\n"
    "New summary: {refinement}\n\n"
)
QUESTIONS = (  # the roles of the paper's five prompts, in our words
    Question(
        "A good summary is short, true to the text, and clear. A summary was criticised and written "
        "anew. Say whether the new one does what the feedback asks.\n\n"
        + _FIELDS
        + "Does the new summary follow the feedback? Answer Yes or No.\nAnswer:"
    ),
    Question(_FIELDS + "Does the new summary follow the feedback? Answer Yes or No.\nAnswer:"),
    Question(
        "Judge whether a new summary follows the feedback on the original summary.\n\n"
        + _FIELDS
        + "The new summary follows the feedback. True or False?\nAnswer:",
        " True",
        " False",
    ),
    Question(
        "Judge whether a new summary does what the feedback asks.\n\nTitle: {title}\n\nText: {post}\n\n"
        "Original summary: {summary}\n\nThis feedback was given on the original summary: {feedback}\n\n"
        "The new summary should do what it asks: {refinement}\n\n"
        "Does the new summary follow the feedback? Answer Yes or No.\nAnswer:"
    ),
    Question(
        "Feedback: {feedback}\n\n"
        + _FIELDS
        + 'The feedback was: "{feedback}" The new summary follows it. True or False?\nAnswer:',
        " True",
        " False",
    ),
)


class InstructRM:
    """Chooser: the probability of "yes" against "no", averaged over several questions (section 1.5).

    Each question's probability is p(yes) / (p(yes) + p(no)) = sigmoid(log p(yes) - log p(no)), where the
    log-probability of an answer sums over the tokens it is split into.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
        questions: Sequence[Question] = QUESTIONS,
    ):  # fmt: skip
        self.model, self.tokenizer, self.questions = model, tokenizer, tuple(questions)

    def __call__(self, table: pd.DataFrame) -> np.ndarray:
        return self.probabilities(table).mean(1)

    def probabilities(self, table: pd.DataFrame) -> np.ndarray:
        """One column a question, (rows, questions), each in [0, 1]."""
        fields = table[["title", "post", "summary", "feedback", "refinement"]].to_dict("records")
        columns = []
        for question in self.questions:
            prompts = [question.prompt.format(**row) for row in fields]
            answers = (question.yes, question.no)
            log_probs = logprobs.answer_log_probs(self.model, self.tokenizer, prompts, answers)
            columns.append(1 / (1 + np.exp(log_probs[:, 1] - log_probs[:, 0])))
        return np.stack(columns, 1)


# --- what the choosers did -----------------------------------------------------------------------


def chooser_report(
    table: pd.DataFrame, scores: dict[str, np.ndarray], *, seed: int = 0,
    measures: Sequence[str] = ("incorporated", "score", "words"),
) -> pd.DataFrame:  # fmt: skip
    """What each chooser takes, against a random choice, from a measured table: a row a chooser and measure.

    Columns chooser, measure, value, low, high, n (articles), and difference, difference_low,
    difference_high to a random choice, paired by article.  Measures: those named (score is one), and
    points, the choice's score against a random candidate's (1 higher, 0.5 the same, 0 lower).  The random
    choice is exact, the mean over an article's candidates that are not empty; its rows are "random".
    """
    some = _choosable(table)
    means = some.groupby("id", sort=False)[list(measures)].mean()
    arms = {"random": means.assign(points=0.5)}
    for name, values in scores.items():
        chosen = choose(table, values).set_index("id")
        gap = some["id"].map(chosen["score"]) - some["score"]
        points = ((1 + np.sign(gap.round(9))) / 2).groupby(some["id"]).mean()
        arms[name] = chosen.assign(points=points)
    rows = []
    for name, measured in itertools.product(arms, (*measures, "points")):
        here = arms[name][measured].to_numpy(float)
        there = arms["random"].loc[arms[name].index, measured].to_numpy(float)
        change = stats.paired_difference(there, here, seed=seed, resamples=1000)
        rows.append({"chooser": name, "measure": measured})
        rows[-1] |= stats.bootstrap(here, seed=seed)._asdict()
        rows[-1] |= {"difference": change.value, "difference_low": change.low}
        rows[-1] |= {"difference_high": change.high}
    return pd.DataFrame(rows)


def _choosable(table: pd.DataFrame) -> pd.DataFrame:
    """The refinements that a chooser may take: those that are not empty, or all of an article."""
    empty = table["empty"].astype(bool)
    return table[~empty | empty.groupby(table["id"]).transform("all")]


def chooser_agreement(table: pd.DataFrame, scores: dict[str, np.ndarray]) -> pd.DataFrame:
    """Share of articles for which two choosers take the same text: category, condition (the two), value,
    low, high, n.  What two random choices would have is `chance_agreement`.
    """
    chosen = {
        name: choose(table, values)["refinement"].to_numpy() for name, values in scores.items()
    }
    rows = []
    for a, b in itertools.product(chosen, repeat=2):
        same = chosen[a] == chosen[b]
        interval = stats.proportion(int(same.sum()), len(same))
        rows.append({"category": a, "condition": b} | interval._asdict())
    return pd.DataFrame(rows)


def chance_agreement(table: pd.DataFrame) -> float:
    """How often two random choices take the same text: sum of squared shares of texts, mean over articles."""
    shares = _choosable(table).groupby("id")["refinement"].value_counts(normalize=True)
    return float((shares**2).groupby("id").sum().mean())


# --- warm-up: examples of following feedback -----------------------------------------------------


def rule_edit(rubric: Rubric, source: str, summary: str, critique: Critique) -> str:
    """A refinement made by rule: what was right is kept, what the critique names is put right.

    Sentences with something that the source does not support, or that is said before, go; for a missing
    fact, and for a summary that is too short, "Also:" and the words of the source that state it are added.
    Where no sentence is left, the source's first one takes their place: a text of "Also:" alone would
    teach a model to write nothing else.
    "" where the edit would not do what the critique asks, or would lower the rubric's score.
    """
    wrong = rubric.judge(source, summary).spans
    sentences = [
        _sentence(summary[start:end])
        for start, end in SENTENCES.spans(summary)
        if not any(start <= span.start < end for span in wrong)
    ]
    sentences = sentences or [_opening(source)]
    left = rubric.judge(source, " ".join(sentences)).missing
    fact = critique.target if critique.category == "coverage" else (left[0] if left else "")
    if fact and critique.category != "repetition":
        added = _statement(rubric, source, fact)
        stated = set(stems(added))
        sentences = [s for s in sentences if not stated.issuperset(stems(s))] or [_opening(source)]
        if not rubric.states(" ".join(sentences), fact):
            sentences.append(added)
    refined = " ".join(sentences).strip()
    if not incorporates(rubric, source, summary, critique, refined):
        return ""
    better = rubric.judge(source, refined).score >= rubric.judge(source, summary).score
    return refined if better else ""


def _sentence(text: str) -> str:
    """Blanks and left-over marks put right, a capital at the start, a full stop at the end."""
    text = re.sub(r"\s+([.,;:!?])", r"\1", " ".join(text.split())).lstrip(" .,;:!?")
    text = re.sub(r"[,;:]+$", "", text.rstrip())
    return text[:1].upper() + text[1:] + ("" if not text or text[-1] in ".!?" else ".")


def _clause_ends(words: Sequence[str]) -> list[int]:
    """How many words stand up to the end of each clause."""
    return [i + 1 for i, word in enumerate(words) if re.search(r"[,;:.!?]$", word)]


def _statement(rubric: Rubric, source: str, fact: str, most: int = 12) -> str:
    """What the source says from the fact on, to the end of the clause or `most` words; "" if nothing.

    A fact that ends its clause brings the few words before it.
    """
    needed = set(stems(fact))
    for start, end in SENTENCES.spans(source):
        words = source[start:end].split()
        at = next((i for i, word in enumerate(words) if needed & set(stems(word))), None)
        if at is None or not rubric.states(" ".join(words[at : at + most]), fact):
            continue
        stops = [stop for stop in _clause_ends(words) if stop > at]
        stop = next((i for i in stops if rubric.states(" ".join(words[at:i]), fact)), at)
        stop = min(max(stop, at + 1), at + most)
        said = words[max(0, stop - 4) if stop - at < 3 else at : stop]
        return "Also: " + " ".join(said).strip(' .,;:!?"') + "."
    return ""


def _opening(source: str, most: int = 24) -> str:
    """The source's first sentence, or as many of its clauses as fit in `most` words."""
    words = next(iter(SENTENCES.texts(source)), "").split()
    fit = [stop for stop in _clause_ends(words) if stop <= most]
    return _sentence(" ".join(words[: fit[-1] if fit else most]))


def warm_up_examples(
    articles: pd.DataFrame, rubric: Rubric, *, without_feedback: float = 0.25
) -> pd.DataFrame:
    """prompt and completion of rule-edited refinements, for `sft.encode_completions`.

    One row an article whose summary can be edited by rule, and for every 1 / `without_feedback`th article
    the same target after the prompt without feedback, so that the control's prompt is as well known.
    attrs["left_out"] counts articles without an edit.
    """
    rows, edited = [], 0
    every = round(1 / without_feedback) if without_feedback else 0
    for a in articles.itertuples():
        critique = Critique(a.feedback_class, a.feedback_target, a.feedback)
        target = rule_edit(rubric, a.post, a.summary, critique)
        if not target:
            continue
        shown = [a.feedback, None] if every and edited % every == 0 else [a.feedback]
        for text in shown:
            prompt = refinement_prompt(a.title, a.post, a.summary, text)
            rows.append({"id": a.id, "prompt": prompt, "completion": f" {target}"})
        edited += 1
    table = pd.DataFrame(rows, columns=["id", "prompt", "completion"])
    table.attrs["left_out"] = len(articles) - edited
    return table


# --- targeted word removal (Table 1 of the paper) ------------------------------------------------

OFFENSIVE = (  # mild, our own list
    "a blockhead", "a bore", "a brute", "a bully", "a cheat", "a clown", "a coward", "a crook",
    "a dunce", "a fool", "a liar", "a loser", "a pest", "a slob", "a snob", "a twit", "a weasel",
    "an airhead", "an idiot", "an oaf",
)  # fmt: skip
COMPLIMENT = "a nice person"


def word_removal_items(
    n: int, *, words: int = 3, remove: int = 1, seed: int = 0, offensive: Sequence[str] = OFFENSIVE
) -> pd.DataFrame:
    """n sentences with `words` insults and one compliment, and the request to remove some of the insults.

    Columns sentence, remove (list), keep (list), target (the sentence without them) and prompt, which ends
    in "You are".  Raises ValueError unless 1 <= remove <= words <= number of insults.
    """
    if not 1 <= remove <= words <= len(offensive):
        raise ValueError(
            f"remove={remove}, words={words}; allowed: 1 <= remove <= words <= {len(offensive)}."
        )
    rng, rows = np.random.default_rng(seed), []
    for _ in range(n):
        names = [offensive[i] for i in rng.permutation(len(offensive))[:words]]
        out = sorted(rng.permutation(names)[:remove].tolist(), key=names.index)
        names.insert(int(rng.integers(words + 1)), COMPLIMENT)
        keep = [name for name in names if name not in out]
        sentence, target = (f"You are such {_listed(part)}." for part in (names, keep))
        nouns = _listed([name.split(" ", 1)[1] for name in out])
        prompt = (
            f"This sentence contains insults: {sentence}\n\nRemove the word{'s' * (remove > 1)} {nouns} from "
            "it and leave the rest as it is.\n\nThe sentence without: You are"
        )
        rows.append(
            {"sentence": sentence, "remove": out, "keep": keep, "target": target, "prompt": prompt}
        )
    return pd.DataFrame(rows)


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _begun(line: str) -> str:
    """The sentence that an answer makes of "You are"; a chat model often begins it anew."""
    begun = line.strip().lower().startswith("you are")
    return " ".join((line if begun else encoding.join_texts("You are", line)).split())


def word_removal(writer: Writer, items: pd.DataFrame) -> pd.DataFrame:
    """The items with answer (first line), exact (equals the target), removed and kept (shares of words).

    Ask greedily (temperature 0), as the paper does.  An empty answer removes everything and keeps nothing.
    """
    drafts = writer(list(items["prompt"]), 1, 0)
    first_lines = [row[0].text.split("\n")[0] for row in drafts]
    answers = [_begun(line) for line in first_lines]

    def share(answer, names, wanted):
        held = set(words(answer))
        return np.mean([(name.split()[-1] in held) == wanted for name in names])

    return items.assign(
        answer=answers,
        exact=[float(a == t) for a, t in zip(answers, items["target"], strict=True)],
        removed=[share(a, names, False) for a, names in zip(answers, items["remove"], strict=True)],
        kept=[share(a, names, True) for a, names in zip(answers, items["keep"], strict=True)],
    )
