"""Files of rows: text, JSON, JSON lines and CSV, read with their line numbers and with text kept as text.

One reader and one writer of CSV for everything here.  "NA", "null", "007" and "1e5" are words unless a
column holds numbers only, a lone carriage return in a text is part of it, and `;` or a tab may separate
(as spreadsheets of other countries save).  A bad row is refused by file and line, never skipped.

Simplified: files are read whole.
"""

from __future__ import annotations

import codecs
import gzip
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from lib import runtime

SEPARATORS = (",", ";", "\t")
# A number as Python writes it: 7, -0.5, 1e-07; not 007, 1e5 or 1_000, which are more likely names.
_NUMBER = re.compile(r"-?(?:0|[1-9]\d{0,17})(?:\.\d+)?(?:e[+-]\d+)?|-?inf", re.ASCII)
_WHOLE = re.compile(r"-?(?:0|[1-9]\d{0,17})", re.ASCII)


# --- text and JSON -------------------------------------------------------------------------------


def read_text(path: Path) -> str:
    """The file's text, line ends untouched, without a byte-order mark; `.gz` is unpacked.

    UTF-8, or UTF-16 with its mark (what Excel calls Unicode text).
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file. Try the full path; now in {Path.cwd()}.")
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError) as error:
            raise ValueError(f"{path.name} is no whole gzip file ({error}).") from None
    marked = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if marked else "utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{path.name}, line {line}: not UTF-8. Try to save it as UTF-8.") from None
    if not text.strip():
        raise ValueError(f"{path.name} is empty; at least one row is needed.")
    return text


def text_lines(path: Path) -> list[str]:
    """Lines ended by LF or CRLF; other separators (U+2028, form feed) belong to the text.

    Blank lines at the end are none.
    """
    text = re.sub(r"(?:\r?\n)+\Z", "", read_text(path))
    return [line.removesuffix("\r") for line in text.split("\n")]


def jsonl_records(path: Path) -> Iterator[tuple[int, dict]]:
    """Records of JSON lines with their line numbers; ValueError names the line that is not JSON.

    A blank line holds no record.
    """
    for number, line in enumerate(text_lines(path), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path.name}, line {number}: not JSON ({error.msg}, column {error.colno}); "
                'each line must be one object such as {"prompt": "..."}.'
            ) from None
        yield number, _whole_letters(record, line, f"{path.name}, line {number}")


def _whole_letters(record: object, written: str, where: str) -> object:
    """The record of this JSON; ValueError for half an emoji, which no file, hash or tokenizer takes."""
    if "\\ud" in written.lower():
        try:
            json.dumps(record, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            half = error.object[max(0, error.start - 40) : error.end]
            raise ValueError(
                f"{where}: half an emoji (a lone surrogate) at the end of {half!r}: a text was cut there. "
                "Try to drop it from the text."
            ) from None
    return record


def json_records(path: Path) -> Iterator[tuple[int, dict]]:
    """Records of a JSON list, with the line each starts on; a file of JSON lines is read as such."""
    text = read_text(path)
    if text.lstrip()[0] != "[":
        yield from jsonl_records(path)
        return
    gap = re.compile(r"[\s,]*")
    decoder = json.JSONDecoder()
    try:
        json.loads(text)  # commas and brackets
        position, line, counted = text.index("[") + 1, 1, 0
        while text[position := gap.match(text, position).end()] != "]":
            line, counted = line + text.count("\n", counted, position), position
            start = position
            record, position = decoder.raw_decode(text, start)
            yield line, _whole_letters(record, text[start:position], f"{path.name}, line {line}")
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name}, line {error.lineno}: not JSON ({error.msg}).") from None


# --- CSV: text in, text out ----------------------------------------------------------------------


class _Cell(str):
    """A field of a CSV; `quoted` where it stood in quotes, so that "" and "7" there are texts."""

    __slots__ = ()
    quoted = False


class _Quoted(_Cell):
    __slots__ = ()
    quoted = True


def csv_records(path: Path, needed: Sequence[str] = ()) -> Iterator[tuple[int, list[str]]]:
    """(physical line on which the record starts, fields); the header comes first.

    The separator is the one of `SEPARATORS` under which the first record holds the columns `needed`; failing
    that, a comma unless only another one parts the first record.  A first line `sep=;`, as Excel reads it,
    says it too.  Columns after the last named one in which nothing stands are left out.  Raises ValueError
    with file and line, also for a header with the columns `needed` in which a name stands twice.
    """
    text = read_text(path)
    stated = re.match(r'"?sep=([,;\t])"?(?=\r?\n)', text)
    text = (
        text[stated.end() :] if stated else text
    )  # leaves a blank line: lines are counted as in the file
    separator = stated[1] if stated else _separator(text, needed, path.name)
    records = list(_split(text, separator, path.name))
    line, header = records[0]
    width = len(header)
    named = width
    while named > 1 and not any(_filled(cells[named - 1 : named]) for _, cells in records):
        named -= 1
    if needed and set(needed) <= set(header):
        _check_names(header[:named], f"{path.name}, line {line}")
    for line, cells in records:
        if len(cells) != width:
            raise ValueError(
                f"{path.name}, line {line}: {len(cells)} fields; the header has {width}. "
                "Try to quote texts that hold commas or line breaks."
            )
        yield line, cells[:named]


def _check_names(header: Sequence[str], where: str) -> None:
    """ValueError for a name that stands twice: which of the columns is meant is not known."""
    if repeated := sorted({str(name) for name in header if header.count(name) > 1}):
        raise ValueError(
            f"{where}: column {repeated[0]!r} twice; found: {', '.join(header)}. Rename or drop one."
        )


def _filled(cells: Sequence[_Cell]) -> bool:
    """Whether anything stands in these cells; quotes with nothing in them count."""
    return any(cell or cell.quoted for cell in cells)


def _separator(text: str, needed: Sequence[str], name: str) -> str:
    """The separator of a CSV, by its first record."""
    widths = dict.fromkeys(SEPARATORS, 0)
    for separator in SEPARATORS:
        try:
            _, cells = next(_split(text, separator, name))
        except ValueError:  # quotes that make no sense with this one
            continue
        if needed and set(needed) <= set(cells):
            return separator
        widths[separator] = len(cells)
    return "," if widths[","] > 1 else max(SEPARATORS, key=widths.get)


def _split(text: str, separator: str, name: str) -> Iterator[tuple[int, list[_Cell]]]:
    """(line, cells) of each record that is not blank."""
    # Outside quotes too a CR ends a line only before LF: pandas does not quote one inside a text.
    # Files of old Macs, without any LF, end their lines in CR.
    end = r"\r?\n" if "\n" in text else r"\r"
    quoted = r'"([^"]*(?:""[^"]*)*)"'
    run = rf"[^{separator}\r\n]*"
    plain = rf"({run}(?:\r(?!\n){run})*)" if "\n" in text else rf"({run})"
    field = re.compile(rf'(?:{quoted}|(?!"){plain})({separator}|{end}|\Z)')
    position, line = 0, 1
    while position < len(text):
        start = position
        cells = []
        following = separator
        while following == separator:
            match = field.match(text, position)
            if match is None:
                raise ValueError(
                    f"{name}, line {line}: broken CSV (a quote is not closed, or text follows a closing "
                    "quote). Try to double a quote that belongs to a text."
                )
            inside_quotes, bare, following = match.groups()
            cells.append(
                _Cell(bare) if bare is not None else _Quoted(inside_quotes.replace('""', '"'))
            )
            position = match.end()
        if len(cells) > 1 or cells[0] or cells[0].quoted:  # a blank line holds no record
            yield line, cells
        line += text.count("\n" if "\n" in following else "\r", start, position)


def csv_dicts(path: Path, needed: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, record) of a CSV with a header that names the columns `needed`, and others if it likes.

    A row of empty cells, such as a spreadsheet leaves where one was cleared, is no record.  Raises ValueError
    with file and line for a column that is missing or stands twice, and for no rows.
    """
    records = csv_records(path, needed)
    line, header = next(records)
    if missing := [name for name in needed if name not in header]:
        raise ValueError(
            f"{path.name}, line {line}: missing column {missing[0]!r}; found: {', '.join(header)}; "
            f"needed, once each: {', '.join(needed)}. Columns may be separated by a comma, a semicolon "
            "or a tab."
        )
    row = None
    for line, row in records:
        if not _filled(row):
            continue
        yield line, dict(zip(map(str, header), map(str, row), strict=True))
    if row is None:
        raise ValueError(f"{path.name} has a header but no rows; at least one is needed.")


def csv_text(
    header: Sequence[str] | None, rows: Iterable[Sequence], *, typed: bool = False, line_end="\n"
) -> str:
    """CSV of rows of values, under a header unless it is None; missing values are empty fields.

    `typed`: texts that `read_csv` would take for a number or a missing value are quoted.
    """
    lines = [header, *rows] if header is not None else rows
    return "".join(
        ",".join(_field(value, typed, len(line)) for value in line) + line_end for line in lines
    )


def _field(value: object, typed: bool, width: int) -> str:
    if not isinstance(value, str):
        missing = (
            value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))
        )
        if missing:
            return "nan" if width == 1 else ""  # alone in its row it would be a blank line
        value, typed = str(value), False
    special = re.search(r'[",;\t\r\n]|^\s|\s$', value)
    if special or (typed and _looks_typed(value)) or (width == 1 and not value):
        return '"' + value.replace('"', '""') + '"'
    return value


def _looks_typed(text: str) -> bool:
    return text in ("", "nan", "True", "False") or bool(_NUMBER.fullmatch(text))


# --- tables --------------------------------------------------------------------------------------


def write_csv(table: pd.DataFrame, path: Path | str, *, header: bool = True) -> Path:
    """A table as CSV such that `read_csv` gives the same numbers and texts."""
    names = list(map(str, table.columns)) if header else None
    rows = table.itertuples(index=False, name=None)
    return runtime.write_atomic(path, csv_text(names, rows, typed=True))


def read_csv(path: Path | str) -> pd.DataFrame:
    """A table from CSV.  A column is numbers or True/False where every field of it is; else it is text.

    Fields in quotes are text, so are "NA", "null" and "007"; an empty one is missing.  Raises ValueError with
    file and line, FileNotFoundError.
    """
    path = Path(path).expanduser()
    (line, header), *records = csv_records(path)
    _check_names(header, f"{path.name}, line {line}")
    table = {}
    for place, name in enumerate(header):
        table[str(name)] = _typed([cells[place] for _, cells in records], alone=len(header) == 1)
    return pd.DataFrame(table)


def _typed(cells: Sequence[_Cell], alone: bool) -> list:
    """The cells of a column as numbers, truth values or texts; what is missing is NaN or None."""
    missing = ("", "nan") if alone else ("",)
    known = [cell for cell in cells if cell.quoted or cell not in missing]
    if any(cell.quoted for cell in known):
        return [str(cell) if cell.quoted or cell not in missing else None for cell in cells]
    if known and all(cell in ("True", "False") for cell in known):
        return [None if cell in missing else cell == "True" for cell in cells]
    if all(_NUMBER.fullmatch(cell) for cell in known):
        convert = int if all(_WHOLE.fullmatch(cell) for cell in known) else float
        return [math.nan if cell in missing else convert(cell) for cell in cells]
    return [None if cell in missing else str(cell) for cell in cells]


def write_jsonl(table: pd.DataFrame, path: Path | str) -> Path:
    """One JSON object a row: missing values are null, numbers and texts kept exactly."""
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in to_records(table)]
    return runtime.write_atomic(path, "".join(lines))


def to_records(table: pd.DataFrame) -> list[dict]:
    """One dict a row, ready for JSON: missing values are None, text is kept exactly."""
    names = list(map(str, table.columns))
    rows = table.itertuples(index=False, name=None)
    return [dict(zip(names, map(_plain, row), strict=True)) for row in rows]


def _plain(value: object) -> object:
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    missing = value is pd.NA or value is pd.NaT or (isinstance(value, float) and math.isnan(value))
    return None if missing else value


def read_jsonl(path: Path | str) -> pd.DataFrame:
    """A table written by `write_jsonl`; whole numbers among which some are missing are Int64.

    Raises ValueError with the line that is not a JSON object.
    """
    path = Path(path).expanduser()
    records = []
    for line, record in jsonl_records(path):
        if not isinstance(record, dict):
            raise ValueError(f"{path.name}, line {line}: not a JSON object: {str(record)[:80]}.")
        records.append(record)
    names = list(dict.fromkeys(name for record in records for name in record))
    return pd.DataFrame({name: _column([r.get(name) for r in records]) for name in names})


def write_packed(rows: Iterable[dict], path: Path | str) -> Path:
    """Dicts as compressed JSON lines (.jsonl.gz); equal rows give an equal file."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return runtime.write_atomic(path, gzip.compress(lines.encode("utf-8"), 9, mtime=0))


def read_packed(path: Path | str) -> list[dict]:
    """The dicts that `write_packed` wrote."""
    lines = gzip.decompress(Path(path).read_bytes()).decode("utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def _column(values: list) -> pd.Series:
    kinds = {type(value) for value in values if value is not None}
    missing = None in values
    if kinds == {int} and missing:
        return pd.Series(pd.array(values, dtype="Int64"))
    if kinds and kinds <= {int, float}:
        return pd.Series(values, dtype=float if float in kinds else int)
    return pd.Series(values, dtype=bool if kinds == {bool} and not missing else object)
