"""The qa-feedback schema of fine-grained RLHF: records, prompts, statistics, agreement of annotators.

Wu et al. (NeurIPS 2023) collect, for a question with passages and four answers: error spans of the
first answer, information it misses, a corrected answer, and a preference for each pair of answers.
A feedback record is a dict with the fields of the released files: `question`; `passages`, lists of a title
and its sentences; `gold`; `prediction 1` to `prediction 4`; `feedback` {`errors`, `missing-info`,
`corrected-prediction`} on prediction 1; `preference`, six of 1 (first better), 2, 0 (equal) for `PAIRS`.
Offsets count characters (code points), ends are exclusive, and spans start and end with whole words.

Simplified: spans are compared by position, without alignment of near misses; one prompt layout.
"""

from __future__ import annotations

import itertools
import json
import re
import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import cohen_kappa_score
from transformers import PreTrainedTokenizerBase

from lib import runtime, stats, tables
from lib.segments import Segmenter

CATEGORIES = {  # error type -> what its reward model judges (section 4 of the paper)
    "Irrelevant": "C1", "Redundant": "C1", "Incoherent": "C1", "Wrong-Grounding": "C2",
    "Unverifiable": "C2",
}  # fmt: skip
MISSING = ("Missing-Answer", "Missing-Major-Auxiliary", "Missing-Minor-Auxiliary")
FIELDS = ("feedback", "preference")
PAIRS = tuple(itertools.combinations(range(4), 2))
PREDICTIONS = tuple(f"prediction {i}" for i in range(1, 5))
VERDICTS = {"first": 1, "equal": 0, "second": 2}  # what a preference says of its pair
LEVELS = ("any", "category", "type")  # how fine a label must agree
NO_LABEL = "none"


# --- reading -------------------------------------------------------------------------------------


def word_spans(text: str) -> list[tuple[int, int]]:
    """(start, end) of the words: runs of characters that are not white space."""
    return [word.span() for word in re.finditer(r"\S+", text)]


def record_id(record: dict) -> str:
    """16 hex digits of the hash of what is annotated: question, passages, answers."""
    texts = [record.get(name) for name in PREDICTIONS]
    return runtime.content_hash(record["question"], record["passages"], texts)[:16]


def load_feedback(
    path: str | Path | Sequence[str | Path], *, needed: Sequence[str] = ()
) -> list[dict]:
    """Checked records of a feedback file (a JSON list, or JSON lines), or of several that belong together.

    A record holds feedback, preference or both; `needed` names those that every record must have.  Of several
    files, such as the exports of both annotation pages, records with the same texts become one.  What a page
    has exported unfinished is left out with a warning.  Raises ValueError that names file, line, record and
    field, FileNotFoundError.
    """
    paths = [Path(p).expanduser() for p in ([path] if isinstance(path, str | Path) else path)]
    if len(paths) == 1:
        return _load_file(paths[0], needed)
    joined: dict[str, dict] = {}
    for file in paths:
        for number, record in enumerate(_load_file(file, ()), 1):
            known = joined.setdefault(record_id(record), {})
            for field in known.keys() & record.keys() & set(FIELDS):
                where = f"{file.name}, record {number}, {field}"
                _need(False, where, "in one of the files only", record["question"])
            notes = known.get("annotation", {}) | record.get("annotation", {})
            known |= record | ({"annotation": notes} if notes else {})
    for record in joined.values():
        where = f"{' and '.join(file.name for file in paths)}, {record['question'][:60]!r}"
        check_record(record, where, needed=needed)
    return list(joined.values())


def _load_file(path: Path, needed: Sequence[str]) -> list[dict]:
    """The finished records of one file, checked."""
    records, unfinished = [], 0
    for number, (line, record) in enumerate(tables.json_records(path), 1):
        where = f"{path.name}, line {line}, record {number}"
        if _unfinished(record, needed or FIELDS):
            unfinished += 1
            continue
        check_record(record, where, needed=needed)
        fits = any(name in record for name in FIELDS)
        _need(fits, f"{where}, feedback", "given, or preference (annotate it first)", None)
        records.append(record)
    if unfinished:
        text = f"{path.name}: {unfinished} records are begun and not finished"
        if not records:
            raise ValueError(f"{text}, the others too. Open the file in its page and finish some.")
        warnings.warn(f"{text}; they are left out.", stacklevel=3)
    return records


def _unfinished(record: object, fields: Sequence[str]) -> bool:
    """Whether an annotation page has exported the record before any of these fields was finished."""
    notes = record.get("annotation") if isinstance(record, dict) else None
    if not isinstance(notes, dict) or any(name in record for name in fields):
        return False
    begun = [notes[name] for name in fields if isinstance(notes.get(name), dict)]
    return any(note.get("finished") is False for note in begun)


def check_record(record: object, where: str = "record", *, needed: Sequence[str] = ()) -> dict:
    """The record itself; ValueError naming `where` and the field that breaks the schema.

    White space at the edges of an error span is taken off the span, in the record.
    """
    _need(
        isinstance(record, dict), where, "an object with question, passages, prediction 1", record
    )
    for name in ("question", "prediction 1"):
        _need(_is_text(record.get(name)), f"{where}, {name}", "a text", record.get(name))
    four = PREDICTIONS if "preference" in record else ()
    for name in {"gold", *PREDICTIONS} & record.keys() | set(four):
        _need(_is_text(record.get(name)), f"{where}, {name}", "a text", record.get(name))
    passages = record.get("passages")
    _need(isinstance(passages, list), f"{where}, passages", "a list of passages", passages)
    for i, passage in enumerate(passages, 1):
        fits = isinstance(passage, list) and passage and all(map(_is_text, passage))
        _need(fits, f"{where}, passage {i}", "a list: title, then sentences", passage)
    for name in needed:
        _need(name in record, f"{where}, {name}", "given (annotate it first)", None)
    if "feedback" in record:
        _check_feedback(record, where)
    if "preference" in record:
        values = record["preference"]
        fits = isinstance(values, list) and len(values) == 6
        fits = fits and all(type(v) is int and v in (0, 1, 2) for v in values)
        _need(fits, f"{where}, preference", "six of 1, 2, 0 (pairs 12 13 14 23 24 34)", values)
    return record


def _need(fits: bool, where: str, allowed: str, value: object) -> None:
    if not fits:
        raise ValueError(f"{where}: must be {allowed}; given: {str(value)[:120]!r}.")


def _is_text(value: object) -> bool:
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def _check_feedback(record: dict, where: str) -> None:
    feedback = record["feedback"]
    _need(isinstance(feedback, dict), f"{where}, feedback", "an object", feedback)
    for name, kind in (("errors", list), ("missing-info", list), ("corrected-prediction", str)):
        value = feedback.get(name)
        _need(isinstance(value, kind), f"{where}, feedback.{name}", f"a {kind.__name__}", value)
    words = word_spans(record["prediction 1"])
    starts, ends = {start for start, _ in words}, {end for _, end in words}
    spans = []
    for i, error in enumerate(feedback["errors"]):
        place = f"{where}, feedback.errors[{i}]"
        _need(isinstance(error, dict), place, "an object", error)
        kind, start, end = (error.get(k) for k in ("error type", "start", "end"))
        _need(kind in CATEGORIES, f"{place}, error type", f"one of {', '.join(CATEGORIES)}", kind)
        whole = type(start) is type(end) is int and 0 <= start < end
        if whole:
            error["start"], error["end"] = _without_edges(record["prediction 1"], start, end)
            whole = error["start"] in starts and error["end"] in ends
        _need(
            whole, f"{place}, start and end", "offsets of whole words in prediction 1", (start, end)
        )
        start, end = error["start"], error["end"]
        _check_explanation(error, record["passages"], f"{place}, explanation")
        spans.append((start, end))
    for (_, end), (start, _) in itertools.pairwise(sorted(spans)):
        _need(end <= start, f"{where}, feedback.errors", "spans that do not overlap", (start, end))
    for i, missing in enumerate(feedback["missing-info"]):
        place = f"{where}, feedback.missing-info[{i}]"
        kind = missing.get("error type") if isinstance(missing, dict) else missing
        _need(kind in MISSING, f"{place}, error type", f"one of {', '.join(MISSING)}", kind)
        _check_source(missing, record["passages"], place)


def _without_edges(text: str, start: int, end: int) -> tuple[int, int]:
    """A span without white space at its edges: three of the first 24 records released for training mark
    the line break that ends the answer, too."""
    inside = text[start:end]
    return start + len(inside) - len(inside.lstrip()), end - len(inside) + len(inside.rstrip())


def _check_explanation(error: dict, passages: list, where: str) -> None:
    text, kind = error.get("explanation"), error["error type"]
    _need(_is_text(text), where, 'a text ("" where none is asked for)', text)
    if kind == "Redundant":
        _need(bool(text.strip()), where, "the earlier text that is repeated", text)
    if kind == "Wrong-Grounding":
        try:
            source = json.loads(text)
        except json.JSONDecodeError:
            source = None
        _check_source(source, passages, where)


def _check_source(source: object, passages: list, where: str) -> None:
    """passage_id counts from 1; sentence_id is a list of numbers, 0 for the title."""
    source = source if isinstance(source, dict) else {}
    passage, sentences = source.get("passage_id"), source.get("sentence_id")
    fits = type(passage) is int and 1 <= passage <= len(passages)
    _need(fits, f"{where}, passage_id", f"a number from 1 to {len(passages)}", passage)
    last = len(passages[passage - 1]) - 1
    fits = isinstance(sentences, list) and len(sentences) > 0
    fits = fits and all(type(s) is int and 0 <= s <= last for s in sentences)
    _need(fits, f"{where}, sentence_id", f"a list of numbers from 0 to {last}", sentences)


def to_record(item: dict) -> dict:
    """A course item {instruction, input, responses} as a record without feedback; a record stays as it is.

    The input becomes passage 1, titled "Input", cut into sentences.
    """
    if not isinstance(item, dict) or "responses" not in item:
        return item
    sentences = Segmenter("sentence").texts(item.get("input") or "")
    passages = [["Input", *sentences]] if sentences else []
    answers = dict(zip(PREDICTIONS, item["responses"], strict=False))
    return {"question": item.get("instruction"), "passages": passages, "gold": "", **answers}


# --- prompts: the one builder of SFT, reward models and RL ---------------------------------------


def passages_of(record: dict) -> list[tuple[str, str]]:
    """(title, text) of each passage, of a feedback record or of a question record."""
    if record["passages"] and isinstance(record["passages"][0], dict):
        return [(p["wikipage"], p["content"]) for p in record["passages"]]
    return [(title, " ".join(sentences)) for title, *sentences in record["passages"]]


def prompt(
    question: str, passages: Iterable[tuple[str, str]] | None = (), answer: str | None = None
) -> str:
    """`question: Q context: wikipage: T text: P | wikipage: ... answer: A`, the released files' layout.

    passages=None leaves the context out (the relevance model sees none); answer=None leaves the answer
    out (prompts of the released files), and answer="" ends in "answer:" (for decoder-only models).
    """
    parts = [f"question: {question}"]
    if passages is not None:
        parts.append(f"context: {' | '.join(f'wikipage: {t} text: {p}' for t, p in passages)}")
    if answer is not None:
        parts.append(f"answer: {answer}".rstrip())
    return " ".join(parts)


def prompt_size(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Tokens of a text as a model reads it, special ones counted."""
    return len(tokenizer(text, verbose=False)["input_ids"])


def fit_prompt(
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    passages: Iterable[tuple[str, str]] | None = (),
    answer: str | None = None,
    *,
    max_tokens: int,
) -> str:
    """`prompt` in at most `max_tokens` tokens, special ones counted: the context loses words from its end.

    Question and answer stay whole.  Raises ValueError where they alone do not fit.
    """
    passages = None if passages is None else list(passages)

    def shortened(count: int) -> str:  # to so many words of context
        if count == len(words):
            return prompt(question, passages, answer)
        start = f"question: {question} context: {context[: words[count - 1][1] if count else 0]}"
        return start if answer is None else f"{start} answer: {answer}".rstrip()

    size = partial(prompt_size, tokenizer)
    context = prompt("", passages)[len("question:  context: ") :] if passages else ""
    words = word_spans(context)
    if size(shortened(len(words))) <= max_tokens:
        return shortened(len(words))
    if size(shortened(0)) > max_tokens:
        raise ValueError(
            f"question and answer take {size(shortened(0))} tokens without any passage; max_tokens is "
            f"{max_tokens}. Raise it, or leave this record out: {question[:60]!r}."
        )
    low, high = 0, len(words) - 1  # `low` words fit
    while low < high:
        middle = (low + high + 1) // 2
        fits = size(shortened(middle)) <= max_tokens
        low, high = (middle, high) if fits else (low, middle - 1)
    return shortened(low)


def truncation_table(
    tokenizer: PreTrainedTokenizerBase, records: Sequence[dict], limits: Sequence[int]
) -> pd.DataFrame:
    """What a limit in tokens takes from prompts that end in answer 1; one row for each limit.

    Columns max_tokens; value, low, high, n (share of answers that a plain cut at the end shortens); can_fit
    (records whose question and answer alone are within the limit); whole (those of them whose answer
    `fit_prompt` keeps).
    """
    parts = [(r["question"], passages_of(r), r["prediction 1"]) for r in records]
    sizes = [prompt_size(tokenizer, prompt(*part)) for part in parts]
    least = [prompt_size(tokenizer, prompt(q, [], answer)) for q, _, answer in parts]
    rows = []
    for limit in limits:
        fits = [part for part, size in zip(parts, least, strict=True) if size <= limit]
        texts = [fit_prompt(tokenizer, *part, max_tokens=limit) for part in fits]
        whole = [t.endswith(a.rstrip()) for t, (_, _, a) in zip(texts, fits, strict=True)]
        cut = stats.proportion(sum(size > limit for size in sizes), len(sizes))
        counts = {"can_fit": len(fits), "whole": sum(whole)}
        rows.append({"max_tokens": limit, **cut._asdict(), **counts})
    return pd.DataFrame(rows)


def load_questions(path: str | Path) -> list[dict]:
    """SFT and RL records (train_1k.json, dev.json): question, passages, text (the prompt), answer (list).

    Raises ValueError naming line and field, also where `text` is not what `prompt` builds (white space
    aside): then training and reward models would see different prompts.  FileNotFoundError.
    """
    path, records = Path(path).expanduser(), []
    for line, record in tables.json_records(path):
        where = f"{path.name}, line {line}"
        _need(isinstance(record, dict), where, "an object", record)
        for name in ("question", "text"):
            _need(_is_text(record.get(name)), f"{where}, {name}", "a text", record.get(name))
        for name, fields in (("passages", {"wikipage", "content"}), ("answer", None)):
            fits = isinstance(record.get(name), list)
            fits = fits and all(
                _is_text(x) if fields is None else isinstance(x, dict) and fields <= x.keys()
                for x in record[name]
            )
            what = f"objects with {' and '.join(sorted(fields))}" if fields else "texts"
            _need(fits, f"{where}, {name}", f"a list of {what}", record.get(name))
        _need(len(record["answer"]) > 0, f"{where}, answer", "a list with a text", [])
        built = prompt(record["question"], passages_of(record))
        same = built.split() == record["text"].split()
        _need(same, f"{where}, text", "the prompt of question and passages", record["text"])
        records.append(record)
    return records


# --- statistics ----------------------------------------------------------------------------------


def span_table(records: Sequence[dict]) -> pd.DataFrame:
    """One row for each error span: record, type, category, start, end, words, characters."""
    rows = []
    for number, record in enumerate(records):
        for error in record["feedback"]["errors"] if "feedback" in record else []:
            start, end, kind = error["start"], error["end"], error["error type"]
            n_words = len(record["prediction 1"][start:end].split())
            rows.append((number, kind, CATEGORIES[kind], start, end, n_words, end - start))
    names = ["record", "type", "category", "start", "end", "words", "characters"]
    return pd.DataFrame(rows, columns=names)


def marks_table(record: dict) -> pd.DataFrame:
    """One row for each label of a record, read out: type, category, where, text (marked, or missing)."""
    rows = []
    for error in record["feedback"]["errors"]:
        kind, start, end = error["error type"], error["start"], error["end"]
        text = record["prediction 1"][start:end]
        rows.append((kind, CATEGORIES[kind], f"answer, characters {start} to {end}", text))
    for piece in record["feedback"]["missing-info"]:
        passage = record["passages"][piece["passage_id"] - 1]
        numbers = piece["sentence_id"]
        where = f"passage {piece['passage_id']}, sentence {', '.join(map(str, numbers))}"
        text = " ".join(passage[number] for number in numbers)
        rows.append((piece["error type"], "C3", where, text))
    return pd.DataFrame(rows, columns=["type", "category", "where", "text"])


def class_counts(records: Sequence[dict], seed: int = 0) -> pd.DataFrame:
    """For each error type, spans or missing pieces: count, and per answer with an interval over records.

    Columns group (spans, missing), type, category, count, records (with at least one), value, low, high, n.
    """
    records = [record for record in records if "feedback" in record]
    listed = [[e["error type"] for e in r["feedback"]["errors"]] for r in records]
    missed = [[e["error type"] for e in r["feedback"]["missing-info"]] for r in records]
    kinds = [("spans", t, c, listed) for t, c in CATEGORIES.items()]
    kinds += [("missing", t, "C3", missed) for t in MISSING]
    rows = []
    for group, name, category, labels in kinds:
        counts = np.array([types.count(name) for types in labels], dtype=float)
        row = {"group": group, "type": name, "category": category, "count": int(counts.sum())}
        interval = stats.bootstrap(counts, seed=seed)._asdict()
        rows.append(row | {"records": int((counts > 0).sum())} | interval)
    return pd.DataFrame(rows)


def labels_table(records: Sequence[dict]) -> pd.DataFrame:
    """One row for each marked answer: labels (spans and missing pieces), of each category, and categories.

    Columns C1, C2, C3 (labels of that category), labels (their sum), categories (how many of the three).
    """
    rows = []
    for record in records:
        marked = [CATEGORIES[error["error type"]] for error in record["feedback"]["errors"]]
        marked += ["C3"] * len(record["feedback"]["missing-info"])
        counts = {category: marked.count(category) for category in ("C1", "C2", "C3")}
        rows.append({**counts, "labels": len(marked), "categories": len(set(marked))})
    return pd.DataFrame(rows)


def length_gap(spans: pd.DataFrame, long: str, short: str, seed: int = 0) -> stats.Interval:
    """Mean words of the spans of type `long` minus those of type `short`, interval over records.

    `spans`: a `span_table`.  NaN where a type has no span.
    """
    spans = spans[spans.type.isin([long, short])]

    def gap(words: np.ndarray, is_long: np.ndarray) -> float:
        both = 0 < is_long.sum() < len(is_long)
        return words[is_long == 1].mean() - words[is_long == 0].mean() if both else np.nan

    columns = (spans.words.to_numpy(), (spans.type == long).to_numpy())
    return stats.bootstrap(columns, gap, clusters=spans.record, seed=seed)


def preference_table(records: Sequence[dict]) -> pd.DataFrame:
    """One row for each pair: record, pair ("1-2"), value (1, 2, 0), first_words, second_words."""
    rows = []
    for number, record in enumerate(records):
        if "preference" not in record:
            continue
        lengths = [len(record[name].split()) for name in PREDICTIONS]
        for (a, b), value in zip(PAIRS, record["preference"], strict=True):
            rows.append((number, f"{a + 1}-{b + 1}", value, lengths[a], lengths[b]))
    names = ["record", "pair", "value", "first_words", "second_words"]
    return pd.DataFrame(rows, columns=names)


def first_wins(table: pd.DataFrame, seed: int = 0) -> stats.Interval:
    """Share of decided pairs of a `preference_table` won by the first answer, interval over records."""
    decided = table[table.value.isin([1, 2])]  # neither equal nor not asked
    return stats.bootstrap((decided.value == 1).to_numpy(), clusters=decided.record, seed=seed)


def preference_shares(table: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """How the pairs of a `preference_table` were decided: all of them, and those of each two places.

    Columns group ("all pairs", "pair 1-2", ...), first, equal, second (shares of the pairs), and value, low,
    high, n of `first_wins`.
    """
    groups = [("all pairs", table), *((f"pair {name}", t) for name, t in table.groupby("pair"))]
    rows = []
    for name, pairs in groups:
        shares = {word: float((pairs.value == x).mean()) for word, x in VERDICTS.items()}
        rows.append({"group": name, **shares, **first_wins(pairs, seed)._asdict()})
    return pd.DataFrame(rows)


def longer_wins(table: pd.DataFrame, seed: int = 0) -> stats.Interval:
    """Share of decided pairs of unequal length won by the longer answer (words), interval over records."""
    decided = table[table.value.isin([1, 2]) & (table.first_words != table.second_words)]
    longer = (decided.value == 1) == (decided.first_words > decided.second_words)
    return stats.bootstrap(longer.to_numpy(), clusters=decided.record, seed=seed)


def conflicts(preference: Sequence[int | None]) -> list[tuple[int, int, int]]:
    """Triples of answers (0 to 3) whose three preferences contradict each other; None is not asked yet.

    A triple conflicts if it is a cycle, or if two answers are equal and the third beats only one of them
    or loses to only one.  Two equal pairs and a decided one are allowed, as in the released data: small
    differences add up.
    """
    relation: dict[tuple[int, int], int | None] = {}
    for (a, b), value in zip(PAIRS, preference, strict=True):
        relation[a, b] = None if value is None else (0, 1, -1)[value]
        relation[b, a] = None if value is None else (0, -1, 1)[value]

    def broken(x: int, y: int, z: int) -> bool:  # x >= y >= z, but x is not as far above z
        xy, yz, xz = relation[x, y], relation[y, z], relation[x, z]
        return xy >= 0 and yz >= 0 and xz < max(xy, yz)

    triads = []
    for triple in itertools.combinations(range(4), 3):
        known = [relation[pair] for pair in itertools.combinations(triple, 2)]
        asked = None not in known and known.count(0) < 2
        if asked and any(broken(*order) for order in itertools.permutations(triple)):
            triads.append(triple)
    return triads


# --- agreement of two annotators -----------------------------------------------------------------


def in_both(first: Sequence[dict], second: Sequence[dict]) -> tuple[list[dict], list[dict]]:
    """The records of the same texts that stand in both, in the order of the first."""
    known = {record_id(record): record for record in second}
    shared = [record for record in first if record_id(record) in known]
    return shared, [known[record_id(record)] for record in shared]


def _label(kind: str, level: str) -> str:
    return {"any": "error", "category": CATEGORIES[kind], "type": kind}[level]


def unit_labels(record: dict, unit: str, level: str) -> list[str]:
    """The label of each character or word of prediction 1, or of each passage sentence ("sentence")."""
    if unit == "sentence":
        places = [(p, s) for p, x in enumerate(record["passages"], 1) for s in range(len(x))]
        labels = dict.fromkeys(places, NO_LABEL)
        for piece in record["feedback"]["missing-info"]:
            kind = piece["error type"] if level == "type" else "missing"
            labels |= {(piece["passage_id"], s): kind for s in piece["sentence_id"]}
        return list(labels.values())
    labels = [NO_LABEL] * len(record["prediction 1"])
    for error in record["feedback"]["errors"]:
        length = error["end"] - error["start"]
        labels[error["start"] : error["end"]] = [_label(error["error type"], level)] * length
    words = word_spans(record["prediction 1"])
    return labels if unit == "character" else [labels[start] for start, _ in words]


def _shared(a: dict, b: dict, unit: str, level: str) -> tuple[int, int]:
    """(labels both gave, labels of a plus labels of b), of whole spans or of characters."""
    if unit == "span":
        first, second = (
            {
                (e["start"], e["end"], _label(e["error type"], level))
                for e in r["feedback"]["errors"]
            }
            for r in (a, b)
        )
        return len(first & second), len(first) + len(second)
    first, second = unit_labels(a, unit, level), unit_labels(b, unit, level)
    both = sum(x == y != NO_LABEL for x, y in zip(first, second, strict=True))
    return both, sum(x != NO_LABEL for x in first + second)


def agreement(
    first: Sequence[dict], second: Sequence[dict], *, clusters: Sequence | None = None,
    seed: int = 0, resamples: int = 200,
) -> pd.DataFrame:  # fmt: skip
    """How far two annotators agree on the same records, intervals over records.

    `clusters` (records,) names what is drawn as one where records repeat; n counts clusters then.

    Columns unit, level (`LEVELS`), measure, value, low, high, n (records).  F1 of exact spans and of
    characters (micro: 2 x shared / all given); Cohen's kappa of words and of passage sentences named as
    missing; kappa of preferences.  Fields that not all records have are left out.  Raises ValueError where
    the records are not the same ones, or share no field.
    """
    texts = [[(r["question"], r["prediction 1"]) for r in side] for side in (first, second)]
    if texts[0] != texts[1] or not first:
        raise ValueError(
            f"{len(first)} and {len(second)} records; both must hold the same answers in the same order, "
            "at least one. Try to sort both by question, and leave out what only one has annotated."
        )
    pairs = list(zip(first, second, strict=True))
    marked, compared = (all(name in r for pair in pairs for r in pair) for name in FIELDS)
    if not marked and not compared:
        raise ValueError(f"no field of {' and '.join(FIELDS)} stands in every record of both.")
    clusters = np.arange(len(pairs)) if clusters is None else np.asarray(clusters)
    options = {"clusters": clusters, "seed": seed, "resamples": resamples}
    rows = _span_agreement(pairs, **options) if marked else []
    if compared:
        labels = [(a["preference"], b["preference"]) for a, b in pairs]
        rows.append(("preference", "type", "kappa", *_kappa(labels, **options)))
    names = ["unit", "level", "measure", "value", "low", "high", "n"]
    return pd.DataFrame(rows, columns=names)


def _span_agreement(pairs: Sequence[tuple[dict, dict]], **options) -> list[tuple]:
    """The rows of `agreement` that are about spans and missing sentences."""

    def f1(shared: np.ndarray, total: np.ndarray) -> float:
        return 2 * shared.sum() / total.sum() if total.sum() else np.nan

    rows = []
    for unit, level in itertools.product(("span", "character"), LEVELS):
        counts = np.array([_shared(a, b, unit, level) for a, b in pairs]).T
        rows.append((unit, level, "F1", *stats.bootstrap((counts[0], counts[1]), f1, **options)))
    units = [("word", level) for level in LEVELS] + [("sentence", "any"), ("sentence", "type")]
    for unit, level in units:
        labels = [(unit_labels(a, unit, level), unit_labels(b, unit, level)) for a, b in pairs]
        rows.append((unit, level, "kappa", *_kappa(labels, **options)))
    return rows


def _kappa(labels: Sequence[tuple[Sequence, Sequence]], clusters, **options) -> stats.Interval:
    """Cohen's kappa over all units; NaN where both used one label only.  `clusters` (records,)."""
    joined = [list(itertools.chain.from_iterable(side)) for side in zip(*labels, strict=True)]
    if not joined[0]:
        return stats.bootstrap([], **options)
    codes = np.unique(np.concatenate(joined), return_inverse=True)[1].reshape(2, -1)
    clusters = np.repeat(clusters, [len(a) for a, _ in labels])

    def kappa(a: np.ndarray, b: np.ndarray) -> float:
        same = len(np.union1d(a, b)) == 1
        return np.nan if same else cohen_kappa_score(a.astype(int), b.astype(int))

    return stats.bootstrap((codes[0], codes[1]), kappa, clusters=clusters, **options)
