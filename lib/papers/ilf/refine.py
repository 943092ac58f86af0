"""Refinement with language feedback (ILF, Scheurer et al. 2023): prompts, writers, choosers, word removal.

Articles: a table with id, title, post, summary (the initial one) and feedback.  A *writer* turns prompts
into drafts (a local model or an endpoint).  A *chooser* is any function of a table of refinements (id,
candidate, refinement, empty) that gives each row a score; `choose` takes the best of each article.

Simplified: prompts have the parts of the paper's in our own words.
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

from lib import data, embeddings, encoding, generation, runtime, stats, tables
from lib.annotator import Rubric
from lib.answers import without_reasoning
from lib.chat import ChatClient, chat, with_defaults
from lib.judge import LocalAnnotator
from lib.papers.ilf.data import load_slf5k, wikipedia_as_slf5k
from lib.segments import Segmenter
from lib.text import words

SAMPLING = {"temperature": 1.0, "top_p": 0.95}  # the paper's; 48 new tokens


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
        table = table.assign(summary=summary)
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


# --- feedback ------------------------------------------------------------------------------------


def write_feedback(writer: Writer, articles: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """The articles with feedback written by a model."""
    prompts = [feedback_prompt(a.title, a.post, a.summary) for a in articles.itertuples()]
    texts = [" ".join(row[0].text.split()) for row in writer(prompts, 1, seed)]
    return articles.assign(feedback=texts)


def shuffled_feedback(articles: pd.DataFrame) -> pd.Series:
    """The control: each article's feedback replaced by the next one's."""
    if len(articles) < 2:
        raise ValueError(
            f"{len(articles)} article(s); feedback can be exchanged between two or more."
        )
    return pd.Series(np.roll(articles["feedback"], 1), index=articles.index)


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


# --- what the choosers did -----------------------------------------------------------------------


def chooser_report(
    table: pd.DataFrame, scores: dict[str, np.ndarray], *, seed: int = 0,
    measures: Sequence[str] = ("score", "words"),
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
