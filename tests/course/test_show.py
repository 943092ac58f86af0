"""Tables in notebooks: texts to the left and whole, numbers to the right."""

import re

import pandas as pd

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
