"""Items for human annotators: a CSV to fill in, and the table of a filled one."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pandas as pd

from lib import preferences, runtime, tables
from lib.papers.sparse_feedback.protocols import checked_texts, parse_rating

_SHEETS = {  # columns shown, and the one to fill
    "rating": (["instruction", "input", "response"], "grade (1-7)"),
    "ranking": (["instruction", "input", "output (a)", "output (b)"], "better (a, b or equal)"),
}
_ANSWERS = {"a": "(a)", "(a)": "(a)", "b": "(b)", "(b)": "(b)", "equal": "equal"}
_COMPUTED = tuple("=+-@\t")
_SWAPPED = {"(a)": "(b)", "(b)": "(a)", "equal": "equal"}


def _shown(text: str) -> str:
    """A cell's text, with a quote before what a spreadsheet would compute."""
    return "'" + text if text[:1] in _COMPUTED else text


def sheet_text(text: str) -> str:
    """What a text and its cell in a sheet have in common: without that quote, with LF line ends."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text[1:] if text[:1] == "'" and text[1:2] in _COMPUTED else text


def _kind(table: pd.DataFrame) -> tuple[str, list[str]]:
    kind = "ranking" if "response1" in table else "rating"
    columns = preferences.RANKING if kind == "ranking" else preferences.RATING
    return kind, columns[:-1]


def export_for_humans(table: pd.DataFrame, path: Path | str, *, seed: int = 0) -> Path:
    """The items of a ratings or rankings table as a CSV to fill in: no ids, models or other answers.

    Rows are shuffled, and half of the pairs swapped, so that position says nothing.  UTF-8 with a mark,
    as spreadsheets want it.
    """
    kind, columns = _kind(table)
    rows = checked_texts(table, columns)[columns].drop_duplicates().to_numpy().tolist()
    order = np.random.default_rng(seed)
    order.shuffle(rows)
    if kind == "ranking":
        turned = order.random(len(rows)) < 0.5
        rows = [[*r[:2], r[3], r[2]] if t else r for r, t in zip(rows, turned, strict=True)]
    shown, answer = _SHEETS[kind]
    cells = [[*map(_shown, row), ""] for row in rows]
    text = tables.csv_text([*shown, answer], cells, line_end="\r\n")
    return runtime.write_atomic(path, text.encode("utf-8-sig"))


def import_from_humans(
    path: Path | str, table: pd.DataFrame, *, annotator: str = "human"
) -> pd.DataFrame:
    """The ratings or rankings table of a filled sheet, in the order of the table it was made from.

    Rows without an answer are left out, with a warning.  Raises ValueError with the line of a bad answer,
    of a row that is not in the table (texts must not be edited) or of one answered twice differently.
    """
    kind, columns = _kind(table)
    path = Path(path).expanduser()
    sheet = _read_sheet(path, kind)
    rows = checked_texts(table, columns)[columns].drop_duplicates()
    answers, used = [], set()
    for row in rows.itertuples(index=False):
        key = tuple(map(sheet_text, row))
        turned = (*key[:2], *key[:1:-1])
        used |= {key, turned}
        answer = sheet.get(key, (None,))[0]
        if answer is None and kind == "ranking" and turned in sheet:
            answer = _SWAPPED[sheet[turned][0]]
        answers.append(answer)
    if unknown := [line for key, (_, line) in sheet.items() if key not in used]:
        raise ValueError(
            f"{path.name}, line {unknown[0]}: this row is not in the table ({len(unknown)} such rows); "
            "texts must stay as exported. Export again, or give the table that was exported."
        )
    column = "verdict" if kind == "ranking" else "score"
    rows = rows.assign(**{column: pd.Series(answers, index=rows.index, dtype=object)})
    answered = rows[rows[column].notna()].reset_index(drop=True).assign(annotator=annotator)
    if left := len(rows) - len(answered):
        warnings.warn(f"{path.name}: {left} of {len(rows)} rows have no answer", stacklevel=2)
    return answered.astype({column: int}) if kind == "rating" else answered


def _read_sheet(path: Path, kind: str) -> dict[tuple, tuple]:
    """{texts as shown: (answer, line)} of the rows that have an answer."""
    shown, column = _SHEETS[kind]
    lines = tables.csv_records(path, (*shown, column))
    _, header = next(lines)
    if missing := [name for name in (*shown, column) if name not in header]:
        raise ValueError(
            f"{path.name} lacks the columns {', '.join(missing)}; it has {', '.join(header)}. Keep the "
            "header as exported; a comma, a semicolon or a tab may separate the columns."
        )
    answers: dict[tuple, tuple] = {}
    for line, fields in lines:
        cells = dict(zip(header, map(str, fields), strict=True))
        filled = cells[column].strip()
        if not filled:
            continue
        answer = parse_rating(filled)[0] if kind == "rating" else _ANSWERS.get(filled.lower())
        if answer is None:
            allowed = "a whole number from 1 to 7" if kind == "rating" else "a, b or equal"
            raise ValueError(f"{path.name}, line {line}: answer {filled!r}; allowed: {allowed}.")
        key = tuple(sheet_text(cells[name]) for name in shown)
        if answers.setdefault(key, (answer, line))[0] != answer:
            first = answers[key][1]
            raise ValueError(
                f"{path.name}, line {line}: {filled!r}, but line {first} answers the same row "
                "differently. Keep one of them."
            )
    return answers
