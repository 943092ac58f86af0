"""Tables in notebooks: texts to the left and whole, numbers to the right."""

import re

import numpy as np
import pandas as pd
from bs4 import BeautifulSoup

from lib.course import show


def sides(markup, tag):
    return re.findall(rf'<{tag} align="(\w+)"', markup)


def test_texts_stand_left_and_numbers_right():
    table = pd.DataFrame({"arm": ["dense", "holistic"], "reward": [0.5, 0.25], "ok": [True, False]})
    markup = show.table_html(table)
    assert sides(markup, "td") == ["left", "right", "right"] * 2
    assert sides(markup, "th") == ["right", "left", "right", "right", "right", "right"]
    named = show.table_html(table.set_index("arm"))
    assert sides(named, "th")[0] == "left"


def test_texts_are_whole_after_show_tables_so():
    show.show_tables_so()
    text = "x" * 900 + "END"
    assert "END" in show.table_html(pd.DataFrame({"text": [text]}))
    assert "mathjax_ignore" in show.table_html(pd.DataFrame({"text": ["$5 to $10"]}))


def test_wide_tables_and_grouped_headers_still_show():
    wide = pd.DataFrame([[1] * 60])
    assert "<table" in show.table_html(wide)
    grouped = pd.DataFrame([[1, 2]], columns=pd.MultiIndex.from_tuples([("a", "x"), ("a", "y")]))
    assert "<table" in show.table_html(grouped)


def test_tables_have_no_missing_floats_or_breaks_that_a_reader_must_decode():
    table = pd.DataFrame(
        {
            "n": [96.0, np.nan], "share": [0.5, np.nan], "rate": [1e-5, 2.0], "huge": [np.inf, 1.0],
            "text": ["one\n\ntwo", None], "tex": [r"\nabla", "x"],
        }
    )  # fmt: skip
    markup = show.table_html(table)
    cells = BeautifulSoup(markup, "html.parser").find_all("td")
    read = [cell.get_text().split() for cell in cells]
    first = [["96"], ["0.5"], ["0.00001"], ["inf"], ["one", "↵", "↵", "two"], [r"\nabla"]]
    assert read == [*first, ["-"], ["-"], ["2.00000"], ["1.0"], ["-"], ["x"]]
    assert table.n.dtype == float and table.text[0] == "one\n\ntwo"  # the table itself stays
    twice = pd.concat([table[["n"]], table[["n"]]], axis=1)
    assert show.table_html(twice).count(">96</td>") == 2
