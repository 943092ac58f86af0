"""Annotation pages for fine-grained feedback: one HTML file each, which works without a network.

`spans`: error spans, missing information and a corrected answer (feedback of the qa-feedback schema).
`compare`: six preferences between four answers.  A page saves in the browser as one works, and exports
records of exactly the schema that `schema.load_feedback` reads; an export of one page is the input
of the other.  Texts are shown as text: they travel as JSON, are never parsed as markup, and the page's
policy forbids every script but its own.

Simplified: one annotator and one browser a page; no accounts, no server, no adjudication.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Sequence
from pathlib import Path

import jinja2
import numpy as np
from IPython.display import HTML
from markupsafe import Markup

from lib import data, runtime
from lib.papers.fine_grained import schema
from lib.papers.fine_grained.schema import CATEGORIES, PREDICTIONS

LIB = Path(__file__).parent
KINDS = {"spans": "feedback", "compare": "preference"}  # page -> the field it fills
TITLES = {"spans": "Mark what is wrong in an answer", "compare": "Compare four answers"}
# name -> (short tag, title, explanation), in the order of priority of the paper's guidelines
TYPES = {
    "Irrelevant": ("IRR", "Irrelevant", "true or false, it does not help to answer the question"),
    "Redundant": ("REP", "Repetition", "the answer has said it before"),
    "Wrong-Grounding": ("WRONG", "Wrong fact", "a sentence of a passage says otherwise"),
    "Unverifiable": ("UNVER", "Unverifiable", "no passage says it, and none contradicts it"),
    "Incoherent": ("INCOH", "Incoherent", "broken grammar or no sense; a cut-off end does not count"),
}  # fmt: skip
MISSING_TEXTS = {
    "Missing-Answer": ("Answer", "a passage answers the question, this text does not"),
    "Missing-Major-Auxiliary": ("Major detail", "without it the answer is hard to understand"),
    "Missing-Minor-Auxiliary": ("Minor detail", "it would make the answer more helpful"),
}
HELP = {
    "spans": (
        "Read the question and the passages, then the answer. Mark spans as short as possible, one piece "
        "of information each; where several types fit, take the first in the list.",
        "Add what is missing only if a passage says it. Then correct the answer with as few changes as "
        "possible. A record can be finished once labels and correction agree.",
    ),
    "compare": (
        "Judge each pair by correctness first, then by completeness, then by how much of the answer is to "
        "the point. Length is no merit. Call two answers equal only if you cannot tell.",
        "The answers stand in an order drawn for each record, so that none gains from its place. The page "
        "names three answers whose comparisons contradict each other.",
    ),
}  # fmt: skip


def read_items(path: str | Path) -> list[dict]:
    """Items of a JSON file: qa-feedback records or {instruction, input, responses}; ValueError by line."""
    path, items = Path(path).expanduser(), []
    for line, item in data.json_records(path):
        items.append(schema.check_record(schema.to_record(item), f"{path.name}, line {line}"))
    return items


def record_id(record: dict) -> str:
    """16 hex digits of the hash of what is annotated: question, passages, answers."""
    texts = [record.get(name) for name in PREDICTIONS]
    return runtime.content_hash(record["question"], record["passages"], texts)[:16]


def display_order(record: dict) -> list[int]:
    """The answers' numbers (0 to 3) in the order the compare page shows them, a function of the texts."""
    return np.random.default_rng(int(record_id(record), 16)).permutation(4).tolist()


def _page_items(items: Sequence[dict], kind: str) -> list[dict]:
    found = []
    for number, item in enumerate(items, 1):
        record = schema.check_record(schema.to_record(item), f"item {number}")
        entry = {"id": record_id(record), "record": record, "texts": ["prediction 1"]}
        if kind == "spans":
            entry["words"] = schema.word_spans(record["prediction 1"])
        elif all(isinstance(record.get(name), str) for name in PREDICTIONS):
            entry |= {"texts": PREDICTIONS, "order": display_order(record)}
        else:
            raise ValueError(
                f"item {number}: comparisons need four answers, prediction 1 to prediction 4. Give four "
                "responses an item, or build the spans page."
            )
        found.append(entry)
    if not found or len({entry["id"] for entry in found}) < len(found):
        raise ValueError(
            f"{len(found)} items, some of them twice; a page needs different ones, >= 1."
        )
    return found


def build(items: Sequence[dict], kind: str = "spans", title: str | None = None) -> str:
    """The page as HTML.  Items: records (those with feedback open for review) or course items.

    kind: "spans" or "compare" (four answers needed).  Raises ValueError for unfit items.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; allowed: {', '.join(KINDS)}.")
    entries = _page_items(items, kind)
    sources = [LIB / name for name in ("annotate.js.j2", f"annotate_{kind}.js.j2")]
    script = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    types = [
        dict(zip(("name", "short", "title", "text"), (k, *v), strict=True))
        for k, v in TYPES.items()
    ]
    missing = [
        dict(zip(("name", "title", "text"), (k, *v), strict=True)) for k, v in MISSING_TEXTS.items()
    ]
    key = runtime.content_hash(kind, [entry["record"] for entry in entries])[:16]
    templates = jinja2.Environment(loader=jinja2.FileSystemLoader(LIB), autoescape=True)
    return templates.get_template("annotate.html.j2").render(
        title=title or TITLES[kind], help=HELP[kind], script=Markup(script),
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data={
            "kind": kind, "field": KINDS[kind], "key": key, "items": entries, "types": types,
            "missing": missing,
        },
    )  # fmt: skip


def write(items: Sequence[dict], path: str | Path, kind: str = "spans") -> Path:
    """Write the page of `build` to a file."""
    return runtime.write_atomic(Path(path).expanduser(), build(items, kind))


def show(page: str, height: int = 640, title: str = "Annotation page") -> HTML:
    """A page inside a Jupyter or Colab output, in a frame of its own, `height` pixels high."""
    frame = (
        f'<iframe title="{html.escape(title)}" srcdoc="{html.escape(page)}" '
        f'style="width: 100%; height: {int(height)}px; border: 1px solid #8c959f"></iframe>'
    )
    return HTML(f"<div>{frame}</div>")


def import_annotations(path: str | Path, items: Sequence[dict], kind: str = "spans") -> list[dict]:
    """Records exported by the page of these items, checked: schema, same texts, nothing twice, consistent.

    Consistent: corrected where something is labelled and only there; no conflicting triple.  Raises
    ValueError naming record and field.
    """
    known = {record_id(schema.to_record(item)) for item in items}
    records, seen = schema.load_feedback(path, needed=[KINDS[kind]]), set()
    for number, record in enumerate(records, 1):
        where, key = f"{Path(path).name}, record {number}", record_id(record)
        if key not in known or key in seen:
            why = (
                "stands there twice"
                if key in seen
                else "is none of these items, or its texts changed"
            )
            raise ValueError(f"{where}: {why}: {record['question'][:60]!r}.")
        seen.add(key)
        wrong = inconsistencies(record)
        if wrong:
            raise ValueError(f"{where}: {'; '.join(wrong)}. Open it in the page and correct it.")
    return records


def inconsistencies(record: dict) -> list[str]:
    """What the pages would not let through, as sentences; empty for a record that may be finished."""
    found = []
    if "feedback" in record:
        feedback = record["feedback"]
        labelled = bool(feedback["errors"] or feedback["missing-info"])
        texts = (feedback["corrected-prediction"], record["prediction 1"])
        before, after = (" ".join(text.split()) for text in texts)
        if labelled == (before == after):
            what = "labels but no correction" if labelled else "a correction but no labels"
            found.append(f"feedback: {what}")
    for triple in schema.conflicts(record.get("preference") or [None] * 6):
        names = ", ".join(str(i + 1) for i in triple)
        found.append(f"preference: answers {names} contradict each other")
    return found


# --- one record, read-only -----------------------------------------------------------------------

_SPAN_STYLES = (  # a colour, and a kind of underline for those who do not see it
    "#ffe3c2; text-decoration: underline solid", "#e3d9ff; text-decoration: underline double",
    "#ffd3da; text-decoration: underline dashed", "#cdeed9; text-decoration: underline dotted",
    "#e1e4e8; text-decoration: underline wavy",
)  # fmt: skip


def show_record(record: dict) -> HTML:
    """An annotated record: prediction 1 with its spans named and coloured, missing facts, the correction."""
    text, parts, last = record["prediction 1"], [], 0
    for error in sorted(record["feedback"]["errors"], key=lambda e: e["start"]):
        kind, (tag, name, _) = error["error type"], TYPES[error["error type"]]
        style = _SPAN_STYLES[list(TYPES).index(kind)]
        inside = html.escape(text[error["start"] : error["end"]])
        parts.append(html.escape(text[last : error["start"]]))
        parts.append(
            f'<mark style="color: #1b1f24; background: {style}" title="{name}, {CATEGORIES[kind]}">'
            f"<b>[{tag}</b> {inside}<b>]</b></mark>"
        )
        last = error["end"]
    parts.append(html.escape(text[last:]))
    missing = "".join(
        f"<li>{MISSING_TEXTS[m['error type']][0]}: passage {m['passage_id']}, sentence "
        f"{', '.join(map(str, m['sentence_id']))}</li>"
        for m in record["feedback"]["missing-info"]
    )
    corrected = html.escape(record["feedback"]["corrected-prediction"])
    legend = ", ".join(f"{tag} {name.lower()}" for tag, name, _ in TYPES.values())
    return HTML(  # texts are not formulas: mathjax_ignore
        '<div class="tex2jax_ignore mathjax_ignore">'
        f"<p><b>Question.</b> {html.escape(record['question'])}</p>"
        f'<p style="line-height: 2; white-space: pre-wrap">{"".join(parts)}</p><p><small>{legend}</small></p>'
        f"<p><b>Missing.</b></p><ul>{missing or '<li>nothing</li>'}</ul>"
        f"<p><b>Corrected.</b> {corrected or '(nothing is left)'}</p></div>"
    )
