"""How a notebook shows a table: texts to the left and whole, numbers to the right.

pandas aligns everything to the right and cuts texts.  The alignment is written into each cell, since pages
such as GitHub's strip style sheets.
"""

from __future__ import annotations

import re

import pandas as pd


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


def table_html(table: pd.DataFrame) -> str:
    """The table as pandas writes it, with the columns of text aligned to the left, their headings too."""
    index = [table.index.get_level_values(level) for level in range(table.index.nlevels)]
    columns = [pd.Series(values) for values in index]
    columns += [table.iloc[:, place] for place in range(table.shape[1])]
    sides = ["left" if _is_text(values) else "right" for values in columns]
    markup = table._repr_html_() or ""
    return re.sub(r"(?s)<tr[^>]*>.*?</tr>", lambda row: _aligned(row, sides), markup)


def show_tables_so() -> None:
    """From here on this kernel shows tables so; without a kernel nothing happens."""
    pd.set_option("display.max_colwidth", None, "display.max_columns", 40)
    from IPython import get_ipython

    shell = get_ipython()
    if shell is not None:
        shell.display_formatter.formatters["text/html"].for_type(pd.DataFrame, table_html)
