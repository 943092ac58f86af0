"""Files of rows: what is written is read, text stays text, and a bad row is refused by its line."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib import data, tables

WORDS = [
    "NA",
    "null",
    "None",
    "nan",
    "N/A",
    "true",
    "True",
    "007",
    "7",
    "1e5",
    "-0",
    "inf",
    "",
    " x ",
]
BREAKS = [
    "one\rtwo",
    "\r",
    "50%\r100%",
    "a\r\nb",
    "a\n\rb",
    'say "hi"',
    "a;b",
    "a,b",
    "\tx",
    "é\u2028",
]


def test_texts_and_numbers_come_back_as_they_were(tmp_path):
    texts = WORDS + BREAKS
    n = len(texts)
    table = pd.DataFrame(
        {
            "text": texts,
            "id": [f"{i:03d}" for i in range(n)],
            "digits": [str(i) for i in range(n)],
            "count": range(n),
            "share": [i / 7 for i in range(n)],
            "small": [1e-9] * n,
            "missing": [np.nan, 0.5] * (n // 2),
            "good": [True, False] * (n // 2),
        }
    )
    back = tables.read_csv(tables.write_csv(table, tmp_path / "t.csv"))
    pd.testing.assert_frame_equal(back, table)
    plain = pd.read_csv(tmp_path / "t.csv", keep_default_na=False)  # texts whole for others too
    assert plain["text"].tolist() == texts


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@given(st.lists(st.tuples(TEXTS, st.floats(allow_nan=False), TEXTS), min_size=1, max_size=6))
def test_any_text_survives(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("t") / "t.csv"
    table = pd.DataFrame(rows, columns=["a", "b", "c"])
    back = tables.read_csv(tables.write_csv(table, path))
    assert back.values.tolist() == table.values.tolist()


@pytest.mark.parametrize("values", [["", "a", "nan"], [1.5, np.nan, 2.0], ["7", "8"], [1, 2]])
def test_a_table_of_one_column(tmp_path, values):
    back = tables.read_csv(tables.write_csv(pd.DataFrame({"x": values}), tmp_path / "t.csv"))
    assert back["x"].tolist() == pytest.approx(values, nan_ok=True)


def test_a_missing_text_alone_in_its_row_stays_missing(tmp_path):
    table = pd.DataFrame({"x": ["a", None, "b"]})
    back = tables.read_csv(tables.write_csv(table, tmp_path / "t.csv"))
    assert back["x"].isna().tolist() == [False, True, False]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_sheets_of_other_places(tmp_path, separator, mark, end):
    rows = [["prompt", "category"], ['"x, y; z"', "007"], ["NA", "null"]]
    text = mark + end.join(separator.join(row) for row in rows) + end
    (tmp_path / "t.csv").write_bytes(text.encode("utf-8"))
    prompts = data.load_prompts(tmp_path / "t.csv")
    assert prompts["prompt"] == ["x, y; z", "NA"] and prompts["category"] == ["007", "null"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_what_spreadsheets_leave_in_a_sheet(tmp_path, end):
    """A line that names the separator, empty columns at the side, cleared rows, Excel's Unicode text."""
    path = tmp_path / "t.csv"
    lines = ["sep=;", "prompt;category;;", "a,b;x;;", ";;;", "c;007;;", ";;;"]
    path.write_bytes(end.join([*lines, ""]).encode("utf-16"))
    prompts = data.load_prompts(path)
    assert prompts["prompt"] == ["a,b", "c"] and prompts["category"] == ["x", "007"]
    assert [line for line, _ in tables.csv_dicts(path, ["prompt"])] == [3, 5]
    path.write_text(end.join(["prompt,category,", ",x,"]))
    with pytest.raises(ValueError, match="line 2: prompt is ''"):
        data.load_prompts(path)


def test_empty_texts_and_rows_of_our_own_tables_stay(tmp_path):
    table = pd.DataFrame({"a": ["", "x"], "b": [None, None], "": ["", ""]}, dtype=object)
    tables.write_csv(table, tmp_path / "t.csv")
    back = tables.read_csv(tmp_path / "t.csv")
    assert list(back) == ["a", "b", ""] and back["a"].tolist() == ["", "x"]
    assert back["b"].isna().all() and back[""].tolist() == ["", ""]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_blank_lines_hold_no_record(tmp_path, end):
    (tmp_path / "t.jsonl").write_bytes(
        end.join(['{"prompt": "a"}', "", '{"prompt": 3}', " "]).encode()
    )
    with pytest.raises(ValueError, match="t.jsonl, line 3"):
        data.load_prompts(tmp_path / "t.jsonl")
    (tmp_path / "t.jsonl").write_bytes(end.join(['{"prompt": "a"}', "", "  ", ""]).encode())
    assert data.load_prompts(tmp_path / "t.jsonl")["prompt"] == ["a"]
    (tmp_path / "t.txt").write_bytes(end.join(["a", "b", "", ""]).encode())
    assert data.load_prompts(tmp_path / "t.txt")["prompt"] == ["a", "b"]


def test_a_lone_carriage_return_without_quotes_is_part_of_the_text(tmp_path):
    (tmp_path / "t.csv").write_bytes(b'prompt,category\n50%\r100%,a\n"x\ry",b\n')
    prompts = data.load_prompts(tmp_path / "t.csv")
    assert prompts["prompt"] == ["50%\r100%", "x\ry"]


def test_columns_are_numbers_only_where_every_field_is(tmp_path):
    (tmp_path / "t.csv").write_text("a,b,c,d,e\n1,1,007,1.5,True\n2,x,8,,False\n")
    table = tables.read_csv(tmp_path / "t.csv")
    assert table["a"].tolist() == [1, 2] and table["b"].tolist() == ["1", "x"]
    assert table["c"].tolist() == ["007", "8"] and table["e"].tolist() == [True, False]
    assert table["d"][0] == 1.5 and np.isnan(table["d"][1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('a,b\nx,"y\nz', "line 2: broken CSV"),
        ('a,b\n"x"y,1\n', "line 2: broken CSV"),
        ('a,b\n"x\ny",1\n1\n', "line 4: 1 fields; the header has 2"),
        (" \n", "is empty"),
    ],
)
def test_broken_files_are_refused_by_line(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        tables.read_csv(tmp_path / "t.csv")


def test_columns_that_are_missing_or_stand_twice(tmp_path):
    (tmp_path / "t.csv").write_text("a,a,b\n1,2,3\n")
    with pytest.raises(ValueError, match="line 1: column 'a' twice"):
        list(tables.csv_dicts(tmp_path / "t.csv", ["a"]))
    with pytest.raises(ValueError, match="line 1: missing column 'c'"):
        list(tables.csv_dicts(tmp_path / "t.csv", ["c"]))
    (tmp_path / "t.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match="a header but no rows"):
        list(tables.csv_dicts(tmp_path / "t.csv", ["a"]))

    (tmp_path / "t.csv").write_text("a,b,b\n1,2,3\n")
    with pytest.raises(ValueError, match="line 1: column 'b' twice; found: a, b, b"):
        tables.read_csv(tmp_path / "t.csv")


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_half_an_emoji_is_refused_by_line(tmp_path, kind):
    whole, half = '{"a": "\\ud83d\\ude00 and \\\\ud83d"}', '{"a": ["x", "cut \\uD83D"]}'
    text = f"[{whole},\n{half}]" if kind == "json" else f"{whole}\n{half}\n"
    (tmp_path / f"t.{kind}").write_text(text)
    records = tables.json_records(tmp_path / f"t.{kind}")
    assert next(records)[1] == {"a": "\U0001f600 and \\ud83d"}
    with pytest.raises(ValueError, match=rf"t.{kind}, line 2: half an emoji .*cut"):
        next(records)


def test_json_lines_keep_types(tmp_path):
    table = pd.DataFrame(
        {
            "text": WORDS,
            "score": pd.array([1, None] * (len(WORDS) // 2), dtype="Int64"),
            "share": [0.1 + 0.2, np.nan] * (len(WORDS) // 2),
            "good": [True, False] * (len(WORDS) // 2),
            "list": [[1, "a"]] * len(WORDS),
        }
    )
    path = tables.write_jsonl(table, tmp_path / "t.jsonl")
    back = tables.read_jsonl(path)
    pd.testing.assert_frame_equal(back, table.astype({"text": object}))
    path.write_text(path.read_text() + "[1]\n")
    with pytest.raises(ValueError, match=f"line {len(WORDS) + 1}: not a JSON object"):
        tables.read_jsonl(path)
    assert json.loads(path.read_text().splitlines()[1])["score"] is None
