"""Annotation pages for fine-grained feedback: one HTML file each, which works without a network.

`spans`: error spans, missing information and a corrected answer (feedback of the qa-feedback schema).
`compare`: six preferences between four answers.  A page saves in the browser as one works.  Its export holds
records of exactly the schema that `schema.load_feedback` reads, and beside it, under `annotation`, the
annotator's name, the seconds spent, and the marks from which any copy of the page can go on.  Texts are
shown as text: they travel as JSON, are never parsed as markup, and the page's policy forbids every script
but its own.

Simplified: no accounts, no server, no adjudication; one annotator at a time in a browser.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import jinja2
import numpy as np
from IPython.display import HTML
from markupsafe import Markup

from lib import runtime, tables
from lib.course.show import HtmlWithText
from lib.papers.fine_grained import schema
from lib.papers.fine_grained.schema import CATEGORIES, PREDICTIONS, record_id
from lib.segments import Segmenter

HERE = Path(__file__).parent
KINDS = {"spans": "feedback", "compare": "preference"}  # page -> the field it fills
TITLES = {"spans": "Mark what is wrong in an answer", "compare": "Compare four answers"}
# (name, short tag, title, explanation), in the order of priority of the paper's guidelines
TYPES = (
    ("Irrelevant", "IRR", "Irrelevant", "true or false, it does not help to answer the question"),
    ("Redundant", "REP", "Repetition", "the answer has said it before"),
    ("Wrong-Grounding", "WRONG", "Wrong fact", "a sentence of a passage says otherwise"),
    ("Unverifiable", "UNVER", "Unverifiable", "no passage says it, and none contradicts it"),
    ("Incoherent", "INCOH", "Incoherent", "the words make no sense; a cut-off end does not count"),
)
MISSING_TYPES = (
    ("Missing-Answer", "Answer", "a passage answers the question, this text does not"),
    ("Missing-Major-Auxiliary", "Major detail", "without it the answer is hard to understand"),
    ("Missing-Minor-Auxiliary", "Minor detail", "it would make the answer more helpful"),
)


# --- building a page -----------------------------------------------------------------------------


def read_items(path: str | Path) -> list[dict]:
    """Items of a JSON file: qa-feedback records or {instruction, input, responses}; ValueError by line."""
    path = Path(path).expanduser()
    items = []
    for line, item in tables.json_records(path):
        record = schema.to_record(item)
        items.append(schema.check_record(record, f"{path.name}, line {line}"))
    return items


def display_order(record: dict) -> list[int]:
    """The answers' numbers (0 to 3) in the order the compare page shows them, a function of the texts."""
    return np.random.default_rng(int(record_id(record), 16)).permutation(4).tolist()


def _sentences(text: str, words: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """(first, last) word of each sentence: what a repetition can be said to repeat."""
    sentences = []
    for start, end in Segmenter("sentence").spans(text):
        inside = [i for i, (first, _) in enumerate(words) if start <= first < end]
        if inside:
            sentences.append((inside[0], inside[-1]))
    return sentences


def _page_items(items: Sequence[dict], kind: str) -> list[dict]:
    entries = []
    for number, item in enumerate(items, 1):
        record = schema.check_record(schema.to_record(item), f"item {number}")
        entry = {"id": record_id(record), "record": record, "texts": ["prediction 1"]}
        if kind == "spans":
            entry["words"] = schema.word_spans(record["prediction 1"])
            entry["sentences"] = _sentences(record["prediction 1"], entry["words"])
        elif all(isinstance(record.get(name), str) for name in PREDICTIONS):
            entry |= {"texts": PREDICTIONS, "order": display_order(record)}
        else:
            raise ValueError(
                f"item {number}: comparisons need four answers, prediction 1 to prediction 4. Give four "
                "responses an item, or build the spans page."
            )
        entries.append(entry)
    if not entries or len({entry["id"] for entry in entries}) < len(entries):
        raise ValueError(
            f"{len(entries)} items, some of them twice; a page needs different ones, >= 1."
        )
    return entries


def read_guidelines(text: str) -> list[tuple[str, list[str]]]:
    """(heading, list or text; its texts) of plain text: "# " begins a heading, "- " an item of a list."""
    blocks = []
    for line in filter(str.strip, text.splitlines()):
        mark, _, rest = line.strip().partition(" ")
        if mark == "-" and blocks and blocks[-1][0] == "list":
            blocks[-1][1].append(rest)
        elif mark in ("-", "#"):
            blocks.append(("list" if mark == "-" else "heading", [rest]))
        else:
            blocks.append(("text", [line.strip()]))
    if not blocks:
        raise ValueError("the guidelines are empty. Give some text, or None for the page's own.")
    return blocks


def build(
    items: Sequence[dict],
    kind: str = "spans",
    title: str | None = None,
    guidelines: str | None = None,
) -> str:
    """The page as HTML.  Items: records (those with feedback open for review) or course items.

    kind: "spans" or "compare" (four answers needed).  guidelines: your own text in place of the page's (see
    `read_guidelines`; examples: lib/annotate/guidelines_*.txt).  Raises ValueError for unfit items.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; allowed: {', '.join(KINDS)}.")
    if guidelines is None:
        guidelines = (HERE / f"guidelines_{kind}.txt").read_text(encoding="utf-8")
    entries = _page_items(items, kind)
    sources = [HERE / name for name in ("page.js", f"{kind}.js")]
    script = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    page_data = {
        "kind": kind,
        "field": KINDS[kind],
        "key": runtime.content_hash(kind, [entry["record"] for entry in entries])[:16],
        "items": entries,
        "types": [dict(zip(("name", "short", "title", "text"), row, strict=True)) for row in TYPES],
        "missing": [
            dict(zip(("name", "title", "text"), row, strict=True)) for row in MISSING_TYPES
        ],
    }
    templates = jinja2.Environment(loader=jinja2.FileSystemLoader(HERE), autoescape=True)
    return templates.get_template("page.html.j2").render(
        title=title or TITLES[kind],
        guidelines=read_guidelines(guidelines),
        script=Markup(script),
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=page_data,
    )


def write(
    items: Sequence[dict],
    path: str | Path,
    kind: str = "spans",
    title: str | None = None,
    guidelines: str | None = None,
) -> Path:
    """Write the page of `build` to a file."""
    page = build(items, kind, title, guidelines)
    return runtime.write_atomic(Path(path).expanduser(), page)


# --- a page in a notebook ------------------------------------------------------------------------


def show(path: str | Path, height: int = 640) -> HtmlWithText:
    """A page that `write` has written, inside a Jupyter or Colab output, `height` pixels high.

    GitHub and notebooks that are not trusted take frames out.  So the frame lies on top of a still excerpt of
    the page with the place of the file, which needs no script and is what is seen where the frame is not.
    """
    if str(path).lstrip().startswith("<"):
        raise ValueError("show takes the path that `write` returns, not the page's text.")
    path = Path(path).expanduser()
    page = path.read_text(encoding="utf-8")
    root = runtime.project_root()
    place = path.relative_to(root) if path.is_relative_to(root) else path
    near = path.absolute().drive == Path.cwd().drive  # Windows has no relative way to another drive
    link = (
        os.path.relpath(path) if near else str(path)
    )  # from the notebook's folder, where its kernel runs
    plain = f"Annotation page: {place} (open it in a browser)"
    frame = (
        f'<iframe title="Annotation page" srcdoc="{html.escape(page)}" style="grid-area: 1 / 1; width: 100%; '
        f'height: {int(height)}px; border: 1px solid #8c959f; background: Canvas"></iframe>'
    )
    return HtmlWithText(
        f'<p>Annotation page: <a href="{html.escape(link)}">{html.escape(str(place))}</a> '
        f"(open it in a browser; it needs no network)</p>"
        '<div style="display: grid; grid-template-columns: minmax(0, 1fr)">'
        '<div style="grid-area: 1 / 1; padding: 1em">'
        f"{_excerpt(page)}</div>{frame}</div>",
        plain,
    )


def _excerpt(page: str) -> str:
    """The first record of a page as HTML without script, forms or styles."""
    page_data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    first = page_data["items"][0]
    record = first["record"]
    rows = [("Question", record["question"])]
    rows += [(f"Passage {i}", passage[0]) for i, passage in enumerate(record["passages"], 1)]
    shown = zip("ABCD", first.get("order", [0]), strict=False)
    rows += [(f"Answer {place}", record[PREDICTIONS[i]]) for place, i in shown]
    task = "Mark: " + ", ".join(row["title"].lower() for row in page_data["types"])
    if page_data["kind"] == "compare":
        task = (
            "Decide six pairs: the first is better, the second is better, or they are equally good"
        )
    body = "".join(f"<tr><th>{name}</th><td>{_text(text)}</td></tr>" for name, text in rows)
    return (
        f"<p><b>Still excerpt: record 1 of {len(page_data['items'])}.</b> {task}.</p>"
        f'<table class="tex2jax_ignore mathjax_ignore">{body}</table>'
    )


def _text(text: str, longest: int = 400) -> str:
    return html.escape(text if len(text) <= longest else f"{text[:longest]} ...")


# --- taking an export back -----------------------------------------------------------------------


def import_annotations(path: str | Path, items: Sequence[dict], kind: str = "spans") -> list[dict]:
    """Finished records of an export of the page of these items, checked: schema, texts, nothing twice.

    And consistent: corrected where something is labelled and only there; no conflicting triple.  Records
    begun and not finished are left out with a warning.  Raises ValueError naming file, record and field.
    """
    known = {record_id(schema.to_record(item)) for item in items}
    records = schema.load_feedback(path, needed=[KINDS[kind]])
    seen = set()
    for number, record in enumerate(records, 1):
        where, key = f"{Path(path).name}, record {number}", record_id(record)
        if key not in known:
            why = "is none of these items, or its texts changed"
            raise ValueError(f"{where}: {why}: {record['question'][:60]!r}.")
        if key in seen:
            raise ValueError(f"{where}: stands there twice: {record['question'][:60]!r}.")
        seen.add(key)
        wrong = inconsistencies(record)
        if wrong:
            raise ValueError(f"{where}: {'; '.join(wrong)}. Open it in the page and correct it.")
    return records


def inconsistencies(record: dict) -> list[str]:
    """What the pages would not let through, as sentences; empty for a record that may be finished."""
    problems = []
    if "feedback" in record:
        feedback = record["feedback"]
        labelled = bool(feedback["errors"] or feedback["missing-info"])
        texts = (feedback["corrected-prediction"], record["prediction 1"])
        before, after = (" ".join(text.split()) for text in texts)
        if labelled == (before == after):
            what = "labels but no correction" if labelled else "a correction but no labels"
            problems.append(f"feedback: {what}")
    for triple in schema.conflicts(record.get("preference") or [None] * 6):
        names = ", ".join(str(i + 1) for i in triple)
        problems.append(f"preference: answers {names} contradict each other")
    return problems


# --- one record, read-only -----------------------------------------------------------------------

_SPAN_STYLES = (  # a colour, and a kind of underline for those who do not see it
    "#ffe3c2; text-decoration: underline solid",
    "#e3d9ff; text-decoration: underline double",
    "#ffd3da; text-decoration: underline dashed",
    "#cdeed9; text-decoration: underline dotted",
    "#e1e4e8; text-decoration: underline wavy",
)


def show_record(record: dict) -> HTML:
    """An annotated record: prediction 1 with its spans named and coloured, missing facts, the correction."""
    text = record["prediction 1"]
    types = {name: (tag, title) for name, tag, title, _ in TYPES}
    parts, last = [], 0
    for error in sorted(record["feedback"]["errors"], key=lambda e: e["start"]):
        kind = error["error type"]
        tag, name = types[kind]
        style = _SPAN_STYLES[list(types).index(kind)]
        inside = html.escape(text[error["start"] : error["end"]])
        parts.append(html.escape(text[last : error["start"]]))
        parts.append(
            f'<mark style="color: #1b1f24; background: {style}" title="{name}, {CATEGORIES[kind]}">'
            f"<b>[{tag}</b> {inside}<b>]</b></mark>"
        )
        last = error["end"]
    parts.append(html.escape(text[last:]))
    titles = {name: title for name, title, _ in MISSING_TYPES}
    missing = "".join(
        f"<li>{titles[m['error type']]}: passage {m['passage_id']}, sentence "
        f"{', '.join(map(str, m['sentence_id']))}</li>"
        for m in record["feedback"]["missing-info"]
    )
    corrected = html.escape(record["feedback"]["corrected-prediction"])
    legend = ", ".join(f"{tag} {name.lower()}" for tag, name in types.values())
    return HTML(  # texts are not formulas: mathjax_ignore
        '<div class="tex2jax_ignore mathjax_ignore">'
        f"<p><b>Question.</b> {html.escape(record['question'])}</p>"
        f'<p style="line-height: 2; white-space: pre-wrap">{"".join(parts)}</p><p><small>{legend}</small></p>'
        f"<p><b>Missing.</b></p><ul>{missing or '<li>nothing</li>'}</ul>"
        f"<p><b>Corrected.</b> {corrected or '(nothing is left)'}</p></div>"
    )
