"""The fixed items that the annotators judge: tasks about Wikipedia leads, and models' responses to them.

`data/items/prompts.jsonl` holds the prompts: a question that was written for the lead by hand, a summary or
an explanation.  Parts: train, tuning and test have five responses each from two generators, pool (held out)
has 64.  `data/items/responses.jsonl.gz` holds the responses.  `python -m lib replies items` makes both
again; killed, it goes on where it stopped.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd

from lib import data, generation, models, runtime, tables, training
from lib.judge import model_key
from lib.replies import ReplyStore, open_store

PARTS = {"train": 90, "tuning": 30, "test": 34, "pool": 60}
GENERATORS = {
    "policy": (3, 32),
    "qwen-0.5b": (2, 32),
}  # samples a prompt: of the pool, of the others
DECODING = {"max_new_tokens": 80, "temperature": 1.0, "top_p": 0.95}
ROWS = 32  # samples in a batch, which is what a killed job repeats
N_WORDS = (60, 110)
SUMMARIES = (
    "Summarise the passage in two sentences.",
    "Write a summary of the passage for the front page of a reference work, in at most 40 words.",
    "What are the three most important facts in the passage? Write them as running text.",
    "Sum up the passage for a reader who knows nothing about the subject, in two or three sentences.",
)
EXPLANATIONS = (
    "Explain to a ten-year-old what the passage is about: {title}.",
    "A friend asks you what {title} means. Explain it in your own words, using the passage only.",
    "Explain why somebody might want to know about the subject of the passage, {title}. Use its facts.",
    "Write a short text on {title} for a quiz card: what it is, and two facts to remember.",
)


def folder() -> Path:
    """Where the items are."""
    return runtime.project_root() / "data" / "items"


def select_prompts() -> pd.DataFrame:
    """The prompts: id, part, kind, title, instruction, input (the lead).

    Leads of 60 to 110 words with a number in them, not about people, in an order by hash; every article with
    a question written for it is among them.
    """
    questions = json.loads(tables.read_text(folder() / "questions.json"))
    low, high = N_WORDS
    leads = {}
    for article in data.load_wikipedia():
        text = article["text"]
        fit = low <= article["n_words"] <= high and re.search(r"\d", text) and "\n" not in text
        if article["topic"] != "People" and fit:
            leads[article["title"]] = " ".join(text.split())

    def order(title: str, what: str) -> str:
        return runtime.content_hash("annotators", what, title)

    others = sorted(set(leads) - set(questions), key=lambda title: order(title, "article"))
    missing = sum(PARTS.values()) - len(questions)
    chosen = sorted([*questions, *others[:missing]], key=lambda title: order(title, "part"))
    parts = [part for part, n in PARTS.items() for _ in range(n)]
    rows = []
    for title, part in zip(chosen, parts, strict=True):
        kind, instruction = _task(title, questions, int(order(title, "task")[:8], 16))
        key = runtime.content_hash(instruction, leads[title])[:12]
        rows.append((key, part, kind, title, instruction, leads[title]))
    return pd.DataFrame(rows, columns=["id", "part", "kind", "title", "instruction", "input"])


def _task(title: str, questions: dict[str, str], draw: int) -> tuple[str, str]:
    """Kind and instruction of an article's task."""
    if title in questions:
        return "question", questions[title]
    kind, wordings = (("summary", SUMMARIES), ("explanation", EXPLANATIONS))[draw % 2]
    return kind, wordings[draw // 2 % len(wordings)].format(title=title)


def write_prompts() -> Path:
    """Write the prompts' file; return its path."""
    return tables.write_jsonl(select_prompts(), folder() / "prompts.jsonl")


def read_prompts(*parts: str) -> pd.DataFrame:
    """The committed prompts, of these parts or of all.  Raises ValueError for an unknown part."""
    if unknown := set(parts) - set(PARTS):
        raise ValueError(f"part {min(unknown)!r}; allowed: {', '.join(PARTS)}.")
    table = tables.read_jsonl(folder() / "prompts.jsonl")
    return table[table["part"].isin(parts or PARTS)].reset_index(drop=True)


def read_responses(*parts: str) -> pd.DataFrame:
    """The committed responses with their prompts: the columns of `read_prompts`, then generator, sample,
    response (stripped), finished (whether it ended by itself).

    Raises FileNotFoundError where they have not been sampled yet.
    """
    prompts = read_prompts(*parts)
    path = folder() / "responses.jsonl.gz"
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there. Try: python -m lib replies items (an hour)")
    rows = tables.read_packed(path)
    return prompts.merge(pd.DataFrame(rows), on="id", validate="one_to_many")


# --- the job -------------------------------------------------------------------------------------


def user_message(instruction: str, input: str) -> str:
    """What a generator reads: the instruction, and the passage under it."""
    return f"{instruction}\n\nPassage: {input}"


def generate(*names: str, store: ReplyStore | None = None) -> Path:
    """Sample every response that is not there yet, and write the responses' file; return its path.

    names: generators, all where none is named.  Batches are fixed by the list of prompts, and one is stored
    whole or not at all, so that a killed job gives what one that ran through gives.
    """
    if store is None:
        store = open_store(runtime.cache_dir() / "replies" / "items.sqlite")
    names = names or tuple(GENERATORS)
    prompts = read_prompts()
    batches = [b for name in names for b in _batches(prompts, name)]
    held = store.get_many(key for _, key, *_ in batches)
    bar = runtime.progress(total=len(batches), label="responses", unit="batch")
    for name in names:
        loaded = None
        for _, key, rows, n in (b for b in batches if b[0] == name):
            bar.update()
            if key in held:
                continue
            loaded = loaded or models.load_policy(name)
            store.put(key, _sample(*loaded, rows, n))
        runtime.free_memory(*(loaded or ())[:1])
    bar.close()
    sampled = store.get_many(key for _, key, *_ in batches)
    rows = []
    for name, key, batch, n in batches:
        for i, (text, finished) in enumerate(sampled[key]):
            facts = {"id": batch["id"].iloc[i // n], "generator": name, "sample": i % n}
            rows.append(facts | {"response": text, "finished": finished})
    return tables.write_packed(rows, folder() / "responses.jsonl.gz")


def _batches(prompts: pd.DataFrame, name: str) -> list[tuple[str, str, pd.DataFrame, int]]:
    """(generator, key, prompts, samples a prompt) of each batch."""
    batches = []
    for pool, n in zip((False, True), GENERATORS[name], strict=True):
        rows = prompts[(prompts["part"] == "pool") == pool]
        size = max(1, ROWS // n)
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            key = runtime.content_hash(model_key(name), n, DECODING, batch["id"].tolist())
            batches.append((name, key, batch, n))
    return batches


def _sample(model, tokenizer, rows: pd.DataFrame, n: int) -> list[tuple[str, bool]]:
    """n (text, finished) of each prompt."""
    asked = [user_message(*texts) for texts in zip(rows["instruction"], rows["input"], strict=True)]
    shown = data.apply_template(asked, tokenizer, "chat")
    seed = training.seed_for(0, *rows["id"])
    drawn = generation.sample(model, tokenizer, shown, n=n, seed=seed, **DECODING)
    texts = [text.strip() for text in drawn.texts]
    return list(zip(texts, drawn.finished, strict=True))
