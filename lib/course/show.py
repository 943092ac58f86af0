"""How a notebook shows tables: texts to the left and whole, texts that may offend blurred until clicked."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

import numpy as np
import pandas as pd
from IPython.display import HTML

_CSS = """<style>
.veiled {overflow-x: auto} .veiled table {border-collapse: collapse; width: 100%}
.veiled :is(th, td) {text-align: left; vertical-align: top; padding: .4em .6em}
.veiled tr {border-bottom: 1px solid #8886}
.veiled bdi {white-space: pre-wrap; overflow-wrap: break-word} .veiled details {min-width: 9em}
.veiled summary {cursor: pointer} .veiled details[open] span[aria-hidden] {display: none}
.veiled span[aria-hidden] {filter: blur(3px); opacity: .55; overflow-wrap: anywhere; user-select: none}
</style>"""
_WARNING = "Content warning: click a blurred text, or press Enter on it, to read it."


class HtmlWithText(HTML):
    """HTML for a cell's output with a plain-text form of its own, which terminals and text exports show."""

    def __init__(self, markup: str, plain: str):
        super().__init__(markup)
        self.plain = plain

    def __repr__(self) -> str:
        return self.plain


def blurred_examples(
    rows: pd.DataFrame | Sequence[dict], *, text_columns: Sequence[str] | None = None,
    reveal: bool = False,
) -> HtmlWithText:  # fmt: skip
    """Rows as a table whose texts stay hidden until clicked (or reached by Tab and opened with Enter).

    What is blurred is a stand-in of the same shape, and the text sits in a closed <details>: pages that
    strip styles (GitHub) hide it too, and no script is needed.  `text_columns` defaults to every column
    that holds text; `reveal` shows all.  Everything is escaped.
    """
    table = pd.DataFrame(rows).reset_index(drop=True)
    if text_columns is None:
        text_columns = [c for c in table if table[c].map(lambda v: isinstance(v, str)).any()]
    if unknown := [c for c in text_columns if c not in table]:
        raise ValueError(f"no column {', '.join(unknown)}; allowed: {', '.join(map(str, table))}.")
    hidden = [] if reveal else list(text_columns)
    rows = [[_cell(row[c], c in hidden) for c in table] for row in table.to_dict("records")]
    body = "".join(f"<tr><td>{'</td><td>'.join(cells)}</td></tr>" for cells in rows)
    head = "".join(f'<th scope="col">{_escape(c)}</th>' for c in table)
    note = f"<p>{_WARNING}</p>" if hidden else ""
    markup = f'{_CSS}{note}<div class="veiled"><table><thead><tr>{head}</tr></thead>'
    lengths = {c: [f"[{len(str(v))} characters, hidden]" for v in table[c]] for c in hidden}
    plain = table.assign(**lengths).to_string(index=False)
    return HtmlWithText(f"{markup}<tbody>{body}</tbody></table></div>", plain)


def _cell(value: object, hidden: bool) -> str:
    if not isinstance(value, str):
        if pd.api.types.is_scalar(value) and pd.isna(value):
            return "missing"
        return _escape(f"{value:.2f}" if isinstance(value, float) else value)
    if not value.strip():
        return "<i>empty</i>"
    text = f'<bdi dir="auto">{_escape(value)}</bdi>'
    if not hidden:
        return text
    veil = " ".join("\u2592" * min(len(word), 12) for word in value.split()[:30])
    label = f"show or hide a text of {len(value)} characters"
    return (
        f'<details><summary aria-label="{label}"><span aria-hidden="true">{veil}</span>'
        f"</summary>{text}</details>"
    )


def _escape(value: object) -> str:
    """HTML-escaped; dollar signs and backslashes are set apart, or pages would typeset them as formulas."""
    text = str(value).encode("utf-8", "replace").decode("utf-8")
    return html.escape(text).replace("$", "<span>$</span>").replace("\\", "<span>\\</span>")


# --- any table -----------------------------------------------------------------------------------


def _is_text(values: pd.Series) -> bool:
    return not (pd.api.types.is_numeric_dtype(values) or pd.api.types.is_bool_dtype(values))


def _aligned(row: re.Match, sides: list[str]) -> str:
    """One <tr> of pandas' HTML with a side for each of its cells."""
    cells = re.findall(r"<t[hd][ >]", row[0])
    if len(cells) != len(sides):  # a header over several columns, or columns left out by "..."
        return row[0]
    side = iter(sides)

    def mark(match: re.Match) -> str:
        chosen = next(side)
        return f'<{match[1]} align="{chosen}" style="text-align: {chosen}"{match[2]}'

    return re.sub(r"<(t[hd])([ >])", mark, row[0])


def _readable(values: pd.Series) -> pd.Series:
    """A text's line breaks as a sign, and whole numbers without a point."""
    if pd.api.types.is_float_dtype(values) and len(known := values.dropna()):
        whole = np.isfinite(known).all() and (known == known.round()).all()
        return values.astype("Int64") if whole and known.abs().max() < 2**53 else values
    if _is_text(values):
        return values.map(lambda v: v.replace("\n", " ↵ ") if isinstance(v, str) else v)
    return values


def table_html(table: pd.DataFrame) -> str:
    """The table as pandas writes it, with the columns of text aligned to the left, their headings too.

    What is not there is "-", a line break "↵"; a column of whole numbers has no points.
    """
    table = table.copy()
    for place in range(table.shape[1]):
        table.isetitem(place, _readable(table.iloc[:, place]))
    index = [table.index.get_level_values(level) for level in range(table.index.nlevels)]
    columns = [pd.Series(values) for values in index]
    columns += [table.iloc[:, place] for place in range(table.shape[1])]
    sides = ["left" if _is_text(values) else "right" for values in columns]
    markup = re.sub(r">(NaN|nan|None|NaT|&lt;NA&gt;)</td>", ">-</td>", table._repr_html_() or "")
    return re.sub(r"(?s)<tr[^>]*>.*?</tr>", lambda row: _aligned(row, sides), markup)


def show_tables_so() -> None:
    """From here on this kernel shows tables so; without a kernel nothing happens."""
    pd.set_option("display.max_colwidth", None, "display.max_columns", 40)
    pd.set_option("display.html.use_mathjax", False)  # "$5 to $10" is a text, no formula
    from IPython import get_ipython

    shell = get_ipython()
    if shell is not None:
        shell.display_formatter.formatters["text/html"].for_type(pd.DataFrame, table_html)
