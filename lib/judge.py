"""A language model as annotator: it answers by the probabilities of the allowed answers.

Ratings from 1 to 7 are the expectation over the digits' probabilities; a comparison is asked in both
orders, and its P(first better) averaged; a yes/no question is scored by log P(Yes) - log P(No), each answer
summed over its spellings.  Critiques and refinements are text.  What a text's questions share goes through
the model once.

`LocalAnnotator` runs the model here.  Every answer is kept: in tables that ship with the course (no model
is needed to read them), and in a file of replies under `runtime.cache_dir()`.  An answer that neither has is
asked of the model, or, where the model may not be asked, is missing (NaN, None) and counted in a warning; it
is never guessed.  `EndpointAnnotator` asks a model behind an OpenAI-compatible address the same questions.

Simplified: answers count by their first tokens, so they must differ there or be scored in more passes.
"""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd

from lib import data, generation, hub, logprobs, models, runtime, tables, training
from lib.answers import first_tokens
from lib.chat import ChatClient, Reply, chat, with_defaults
from lib.course import assets
from lib.questions import (
    Question,
    both_orders,
    expected,
    log_odds,
    normalised,
    pair_question,
    rating_question,
    support_question,
)
from lib.replies import open_store

CHUNK = 32  # questions that go to the model together; a killed run asks at most these again


class Judge(Protocol):
    """Anything that scores responses, such as `LocalAnnotator.rate`: one number a prompt and response."""

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray: ...


# --- replies -------------------------------------------------------------------------------------


def model_key(name: str) -> str:
    """What a model's replies are kept under: an asset's hash, a commit on the Hub, or the weights' hash."""
    if name in assets.ASSETS:
        return assets.ASSETS[name].sha256[:16]
    if name in models.TINY_MODELS:
        return name
    folder = hub.resolve_model(name)
    commit = hub.commit_of(folder)
    if commit:
        return f"{hub.parse_name(name).name}@{commit}"
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def read_replies(folder: Path, file: str) -> dict[str, object]:
    """The replies of a model's shipped tables (rows of key, kind, reply) by key; {} where there are none."""
    paths = sorted(folder.glob(f"{file}.*.jsonl.gz"))
    return {row["key"]: row["reply"] for path in paths for row in tables.read_packed(path)}


# --- what an annotator is asked -------------------------------------------------------------------


class Annotator:
    """The kinds of questions, made of closed ones: whoever has `log_probs` is an annotator."""

    name: str

    def log_probs(self, questions: Sequence[Question]) -> np.ndarray:
        """log p of each question's options, summed over spellings: (questions, most options)."""
        raise NotImplementedError

    def write(self, prompts: Sequence[str], **options) -> list[list[tuple[str, bool]] | None]:
        """Texts for each prompt, each with whether it ended by itself."""
        raise NotImplementedError

    def rate(self, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        """Expected ratings from 1 to 7, (responses,).  A `Judge`."""
        questions = [rating_question(*texts) for texts in zip(prompts, responses, strict=True)]
        return expected(self.log_probs(questions), range(1, 8))

    def compare(
        self,
        prompts: Sequence[str],
        first: Sequence[str],
        second: Sequence[str],
        question=pair_question,
    ) -> pd.DataFrame:
        """Both orders of each pair: the table of `both_orders`.

        question: `pair_question`, or `grounded_pair_question` where the prompts are texts.
        """
        asked = []
        for prompt, a, b in zip(prompts, first, second, strict=True):
            asked += [question(prompt, a, b), question(prompt, b, a)]
        odds = log_odds(self.log_probs(asked))
        return both_orders(odds[::2], odds[1::2])

    def supports(self, texts: Sequence[str], statements: Sequence[str]) -> np.ndarray:
        """log P(Yes) - log P(No) that a text supports a statement, (statements,).  A `Judge`.

        It orders; where a threshold is needed, fit one on tuning items.
        """
        questions = [support_question(*pair) for pair in zip(texts, statements, strict=True)]
        return log_odds(self.log_probs(questions))

    def classify(
        self, texts: Sequence[str], question: str, options: Sequence[str], *, system: str = ""
    ) -> np.ndarray:
        """Probabilities of the categories named in `options` for each text, (texts, options)."""
        spellings = tuple((option,) for option in options)
        rest = f"{question} Reply with one of: {', '.join(options)}."
        asked = [Question(f"Text: {text}\n\n", rest, spellings, system) for text in texts]
        return np.exp(normalised(self.log_probs(asked)))


# --- a model that runs here ------------------------------------------------------------------------


class LocalAnnotator(Annotator):
    """A local model as annotator.  See the module's description.

    name: of the model, as for `models.load_policy`; it is loaded when a first answer is missing.  shipped: a
    folder with tables of replies, `<name>.<job>.jsonl.gz` (default: `data/results/annotators`).  ask: whether
    the model may be asked; None: yes, unless it is an asset that has not been fetched.
    """

    def __init__(
        self,
        name: str,
        *,
        shipped: Path | None = None,
        ask: bool | None = None,
        tokens_per_batch: int = 4096,
    ):
        self.name = name
        self.key = model_key(name)
        self.file = Path(name).name
        self.folder = shipped or runtime.project_root() / "data" / "results" / "annotators"
        self.shipped = read_replies(self.folder, self.file)
        file = f"{self.file}-{runtime.content_hash(self.key)[:8]}.sqlite"
        self.store = open_store(runtime.cache_dir() / "replies" / file)
        self.ask = ask
        self.tokens_per_batch = tokens_per_batch
        self.used: dict[str, dict] = {}  # every reply this object gave, for `export`

    @cached_property
    def loaded(self) -> tuple:
        """The model and its tokenizer."""
        return models.load_policy(self.name)

    def may_ask(self) -> bool:
        """Whether the model is asked for what no table has."""
        if self.ask is not None:
            return self.ask
        asset = assets.ASSETS.get(self.name)
        return asset is None or (asset.folder / "manifest.json").exists()

    def log_probs(self, questions: Sequence[Question]) -> np.ndarray:
        """log p of each question's options, summed over spellings: (questions, most options).

        NaN where an answer is missing, and past the end of a shorter list of options.
        """
        keys = [
            runtime.content_hash(self.key, q.system, q.shared, q.rest, q.lead, q.options)[:20]
            for q in questions
        ]
        replies = self._replies("answer", keys, questions, self._answer)
        width = max((len(q.options) for q in questions), default=0)
        table = np.full((len(questions), width), np.nan)
        for row, reply in zip(table, replies, strict=True):
            if reply is not None:
                row[: len(reply)] = reply
        return table

    def _answer(self, questions: Sequence[Question]) -> list[list[float]]:
        """The log-probabilities of a chunk's options, from the model."""
        model, tokenizer = self.loaded
        answers: list = [None] * len(questions)
        for options in dict.fromkeys(q.options for q in questions):
            places = [i for i, q in enumerate(questions) if q.options == options]
            spellings = [word for option in options for word in option]
            prompts = [self._prompt(questions[i]) for i in places]
            scores = logprobs.answer_log_probs(
                model, tokenizer, prompts, spellings, self.tokens_per_batch
            )
            ends = np.cumsum([len(option) for option in options])[:-1]
            parts = [np.logaddexp.reduce(part, axis=1) for part in np.split(scores, ends, axis=1)]
            for place, row in zip(places, np.stack(parts, 1).round(4).tolist(), strict=True):
                answers[place] = row
        return answers

    def _prompt(self, question: Question) -> str:
        style = "auto+system" if question.system else "auto"
        (shown,) = data.apply_template(
            [question.shared + question.rest], self.loaded[1], style, system=question.system or None
        )
        return shown + question.lead

    def write(
        self, prompts: Sequence[str], *, n: int = 1, seed: int = 0, system: str = "", **decoding
    ) -> list[list[tuple[str, bool]] | None]:
        """n texts for each prompt, each with whether it ended by itself; None where they are missing.

        `decoding`: see `generation.Decoding` (default: 96 new tokens, temperature 0).
        """
        decoding = {"max_new_tokens": 96, "temperature": 0.0} | decoding
        settings = [n, seed, system, sorted(decoding.items())]
        keys = [runtime.content_hash(self.key, "text", p, settings)[:20] for p in prompts]

        def draw(part: Sequence[str]) -> list[list[tuple[str, bool]]]:
            model, tokenizer = self.loaded
            style = "auto+system" if system else "auto"
            shown = data.apply_template(part, tokenizer, style, system=system or None)
            drawn = generation.sample(
                model, tokenizer, shown, n=n, seed=training.seed_for(seed, *part), **decoding
            )
            texts = [text.strip() for text in drawn.texts]
            pairs = list(zip(texts, drawn.finished, strict=True))
            return [pairs[i : i + n] for i in range(0, len(pairs), n)]

        replies = self._replies("text", keys, prompts, draw)
        return [r and [(text, bool(finished)) for text, finished in r] for r in replies]

    def _replies(self, kind: str, keys: list[str], asked: Sequence, answer) -> list:
        """The reply of each key: shipped, stored, or from the model, chunk by chunk; None where missing.

        A chunk goes to the model whole, whatever of it is known, so that its arithmetic, and the last digits,
        do not depend on where an earlier run was killed.
        """
        known = {key: self.shipped[key] for key in keys if key in self.shipped}
        known = self.store.get_many(key for key in keys if key not in known) | known
        missing = sum(key not in known for key in keys)
        if missing and not self.may_ask():
            warnings.warn(
                f"{missing} of {len(keys)} answers of {self.name} are missing: neither the tables in "
                f"{self.folder} nor the replies kept here have them, and the model may not be asked. Try "
                "ask=True (it is downloaded once), or python -m lib replies.",
                stacklevel=3,
            )
        elif missing:
            bar = runtime.progress(total=len(keys), label=f"asking {self.name}", unit="question")
            for start in range(0, len(keys), CHUNK):
                part = keys[start : start + CHUNK]
                if not all(key in known for key in part):
                    fresh = answer(asked[start : start + CHUNK])
                    new = {k: v for k, v in zip(part, fresh, strict=True) if k not in known}
                    self.store.put_many(new)
                    known |= new
                bar.update(len(part))
            bar.close()
        for key in keys:
            if key in known:
                self.used[key] = {"key": key, "kind": kind, "reply": known[key]}
        return [known.get(key) for key in keys]

    def export(self, job: str) -> Path:
        """Write the replies that this object gave as the shipped table of a job; return its path."""
        rows = [self.used[key] for key in sorted(self.used)]
        return tables.write_packed(rows, self.folder / f"{self.file}.{job}.jsonl.gz")


# --- a model at an endpoint ------------------------------------------------------------------------

UNSEEN = -20.0  # log p of an option that a reply does not show
LIKELIEST = 20  # first tokens whose probabilities are asked for: the most that endpoints give


class EndpointAnnotator(Annotator):
    """A model at an OpenAI-compatible endpoint as annotator; the client keeps what it bought.

    Where a reply shows the probabilities of its first token, they count; else the option that it names first
    (log p 0, the others' `UNSEEN`).  A reply that names none is missing (NaN), and counted in a warning.

    probabilities: whether they are asked for; False for a model that refuses `logprobs`.  parameters: more of
    a request; a reasoning model wants max_completion_tokens=2000, temperature=None.
    """

    def __init__(self, client: ChatClient, *, probabilities: bool = True, **parameters):
        self.client = client
        self.name = client.model
        self.parameters = with_defaults({"temperature": 0.0}, parameters)
        self.shown = {"logprobs": True, "top_logprobs": LIKELIEST} if probabilities else {}

    def requests(self, questions: Sequence[Question]) -> list[dict]:
        """What `log_probs` would ask, for `ChatClient.estimate`."""
        parameters = with_defaults({"max_tokens": 16, **self.shown}, self.parameters)
        return [chat(q.shared + q.rest, system=q.system, **parameters) for q in questions]

    def log_probs(self, questions: Sequence[Question]) -> np.ndarray:
        """log p of each question's options, summed over spellings: (questions, most options).

        Raises chat.EndpointError and BudgetReached.
        """
        width = max((len(q.options) for q in questions), default=0)
        table = np.full((len(questions), width), np.nan)
        replies = self.client.ask(self.requests(questions), label=f"asking {self.name}")
        for row, question, reply in zip(table, questions, replies, strict=True):
            row[: len(question.options)] = _options_of(question, reply)
        if missing := int(np.isnan(table[:, :1]).sum()):
            warnings.warn(
                f"{missing} of {len(questions)} replies of {self.name} name none of the answers that were "
                "allowed; they count as missing.",
                stacklevel=2,
            )
        return table

    def write(
        self,
        prompts: Sequence[str],
        *,
        n: int = 1,
        seed: int = 0,
        system: str = "",
        max_new_tokens: int = 96,
        **decoding,
    ) -> list[list[tuple[str, bool]]]:
        """n texts for each prompt, each with whether it ended by itself; another seed asks afresh."""
        decoding = with_defaults({**self.parameters, "max_tokens": max_new_tokens}, decoding)
        numbers = range(1000 * seed, 1000 * seed + n)
        asked = [chat(p, system=system, replicate=k, **decoding) for p in prompts for k in numbers]
        replies = self.client.ask(asked, label=f"{self.name} writes")
        texts = [(reply.answer.strip(), reply.finish_reason != "length") for reply in replies]
        return [texts[i : i + n] for i in range(0, len(texts), n)]


def _options_of(question: Question, reply: Reply) -> np.ndarray:
    """log p of a question's options as a reply shows them, (options,); NaN where it names none."""
    row = np.full(len(question.options), UNSEEN)
    starts_here = not question.lead and reply.answer == reply.text  # no reasoning stands before it
    for token, log_p in first_tokens(reply.raw) if starts_here else []:
        named = [k for k, words in enumerate(question.options) if _begins(words, token.strip())]
        if len(named) == 1:
            row[named[0]] = np.logaddexp(row[named[0]], log_p)
    if (row > UNSEEN).any():
        return row
    text = reply.answer.split(question.lead, 1)[-1] if question.lead else reply.answer
    for flags in (0, re.IGNORECASE):
        places = [_place(words, text, flags) for words in question.options]
        if min(places) < math.inf:
            row[int(np.argmin(places))] = 0.0
            return row
    return np.full(len(row), np.nan)


def _begins(words: Sequence[str], token: str) -> bool:
    """Whether a token begins one of the spellings."""
    return bool(token) and any(word.startswith(token) for word in words)


def _place(words: Sequence[str], text: str, flags: int) -> float:
    """Where the first of the spellings stands in a text as a word; infinity where none does."""
    matches = [re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, flags) for word in words]
    return min((match.start() for match in matches if match), default=math.inf)
