"""Ratings and rankings: tables, verdicts, win rates, by hand."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest

from lib import preferences as pf
from lib import tables

ODD = ["None", "NA", "nan", 'say "hi", twice', "a\r\nb", "a\nb", "😀 é", "", " x ", "(a)"]


def ratings(*rows):
    return pd.DataFrame([("i", "x", r, s) for r, s in rows], columns=pf.RATING)


def rankings(*rows):
    return pd.DataFrame([("i", "x", *row) for row in rows], columns=pf.RANKING)


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", [True, False])
def test_tables_survive_a_round_trip(tmp_path, header):
    pairs = list(
        itertools.product(ODD[:2] + ODD[3:], repeat=2)
    )  # a reference "nan" input means none
    table = pd.DataFrame([("do", a, b, 4) for a, b in pairs], columns=pf.RATING)
    back = pf.read_ratings(pf.write_table(table, tmp_path / "r.csv", header=header))
    assert back[pf.RATING].values.tolist() == table.values.tolist()
    table = pd.DataFrame([("do", "", a, b, "equal") for a, b in pairs], columns=pf.RANKING)
    back = pf.read_rankings(pf.write_table(table, tmp_path / "p.csv", header=header))
    assert back[pf.RANKING].values.tolist() == table.values.tolist()


def test_extra_columns_are_kept_and_a_missing_input_is_empty(tmp_path):
    table = ratings(("r", 5)).assign(annotator="A7")
    back = pf.read_ratings(pf.write_table(table, tmp_path / "r.csv"))
    assert back.annotator.tolist() == ["A7"]
    (tmp_path / "ref.csv").write_text("do it,nan,answer,6\n")
    assert pf.read_ratings(tmp_path / "ref.csv").input.tolist() == [""]
    table.input = "nan"  # in our own files it is a word
    assert pf.read_ratings(pf.write_table(table, tmp_path / "o.csv")).input.tolist() == ["nan"]


@pytest.mark.parametrize(
    "line, read, message",
    [
        ("i,x,r,five", pf.read_ratings, "line 2: score 'five'"),
        ("i,x,r,٣", pf.read_ratings, "line 2: score"),
        ("i,x,r,6.5", pf.read_ratings, "line 2: score '6.5'"),
        ("i,x,r," + "9" * 30, pf.read_ratings, "line 2: score '999"),
        ("i,x,r", pf.read_ratings, "line 2: 3 fields"),
        ("i,x,a,b,(c)", pf.read_rankings, "line 2: verdict '(c)'"),
        ("i,x,a,b,A", pf.read_rankings, "line 2: verdict 'A'"),
    ],
)
def test_bad_rows_are_refused_with_their_line(tmp_path, line, read, message):
    first = "i,x,r,5\n" if read is pf.read_ratings else "i,x,a,b,equal\n"
    (tmp_path / "f.csv").write_text(first + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        read(tmp_path / "f.csv")


@pytest.mark.parametrize(
    "header, message",
    [
        ("Instruction,Input,Response,Score", "line 1: the header has Instruction, .* written so"),
        ("instruction,input,output,score", "line 1: the header has instruction, input, output"),
        ("instruction,input,response,score,score", "line 1: column 'score' twice"),
    ],
)
def test_headers_that_are_nearly_right_are_refused(tmp_path, header, message):
    (tmp_path / "f.csv").write_text(f"{header}\ni,x,r,5{',6' * (header.count(',') - 3)}\n")
    with pytest.raises(ValueError, match=message):
        pf.read_ratings(tmp_path / "f.csv")


def test_a_table_of_the_wrong_kind_is_refused(tmp_path):
    (tmp_path / "f.csv").write_text("i,x,a,b,equal\n")
    with pytest.raises(
        ValueError, match="5 columns; ratings need instruction, input, response, score"
    ):
        pf.read_ratings(tmp_path / "f.csv")


def test_scores_outside_the_scale_are_kept_with_a_warning(tmp_path):
    (tmp_path / "f.csv").write_text("i,x,a,0\ni,x,b,8\ni,x,c,7\n")
    with pytest.warns(UserWarning, match="2 scores lie outside 1-7"):
        assert pf.read_ratings(tmp_path / "f.csv").score.tolist() == [0, 8, 7]


def test_missing_scores_and_verdicts_stay_missing(tmp_path):
    table = ratings(("r", 5), ("s", None))
    with pytest.warns(UserWarning, match="1 of 2 rows have no score"):
        back = pf.read_ratings(pf.write_table(table, tmp_path / "r.csv"))
    assert back.score.tolist() == [5, pd.NA] and pf.judged(back).score.tolist() == [5]
    table = rankings(("a", "b", "(a)"), ("a", "c", None))
    with pytest.warns(UserWarning, match="1 of 2 rows have no verdict"):
        back = pf.read_rankings(pf.write_table(table, tmp_path / "p.csv"))
    assert back.verdict.tolist() == ["(a)", None]


def test_the_log_of_an_annotation_run_is_read(tmp_path):
    log = rankings(("a", "b", "(a)"), ("a", "c", None)).assign(at="2025", prompt_tokens=7)
    expected = [["i", "x", "a", "b", "(a)"], ["i", "x", "a", "c", None]]
    path = tables.write_jsonl(log, tmp_path / "rankings.jsonl")
    with pytest.warns(UserWarning, match="no verdict"):
        assert pf.read_rankings(path)[pf.RANKING].values.tolist() == expected
    path = tables.write_jsonl(ratings(("r", 5)), tmp_path / "ratings.jsonl")
    assert pf.read_ratings(path).score.tolist() == [5]
    path.write_text('{"instruction": "i", "input": null, "response": 3, "score": 4}\n')
    with pytest.raises(ValueError, match="line 1: response is 3, not text"):
        pf.read_ratings(path)


# --- verdicts ------------------------------------------------------------------------------------


def test_verdicts_of_two_orders():
    table = {("(a)", "(b)"): "(a)", ("(b)", "(a)"): "(b)", ("(a)", "(a)"): "equal",
             ("(b)", "(b)"): "equal", (None, "(a)"): None, ("(b)", None): None}  # fmt: skip
    assert {calls: pf.verdict_of_orders(*calls) for calls in table} == table


def test_a_missing_verdict_is_nobodys():
    table = rankings(("a", "b", "(a)"), ("a", "c", None), ("b", "c", "equal"))
    assert len(pf.judged(table)) == 2 and len(pf.decided(table)) == 1
    with pytest.raises(ValueError, match="verdict 'tie'; allowed"):
        pf.decided(rankings(("a", "b", "tie")))
    points = pf.win_points_by_ranking(table).points
    assert points.tolist()[::2] == [0, 0.5] and np.isnan(points[1])
    found = pf.win_rate(points)
    assert (found.percent, found.n, found.losses, found.ties) == (25, 2, 1, 1)
    scores = ratings(("a", 3)).assign(score=pd.array([None], dtype="Int64"))
    assert pf.win_points_by_rating(ratings(("a", 3)), scores).empty
    assert np.isnan(pf.win_points([None, 1], [2, np.nan])).all()
    assert (
        pf.length_controlled(pf.win_points_by_ranking(table), resamples=10).n == 1
    )  # an instruction


def test_no_pair_at_all():
    nothing = pf.win_points_by_ranking(rankings())
    assert np.isnan(pf.win_rate(nothing.points).percent) and pf.win_rate([]).n == 0
    assert np.isnan(pf.length_controlled(nothing).value)
    assert pf.common_points(nothing, nothing).empty and np.isnan(pf.win_rate([1.0]).half_width)


# --- win rates -----------------------------------------------------------------------------------


def test_points_of_scores_without_bounds():
    scores = [math.inf, math.inf, -math.inf, -math.inf, None, 1]
    against = [math.inf, 1, -math.inf, 1, 1, math.nan]
    assert pf.win_points(scores, against)[:4].tolist() == [0.5, 1, 0.5, 0]
    assert np.isnan(pf.win_points(scores, against)[4:]).all()


def test_win_rates_by_hand():
    reference = pd.DataFrame(
        [(i, "", "ref", s) for i, s in zip("pqrs", (4, 4, 4, 4), strict=True)], columns=pf.RATING
    )
    policy = pd.DataFrame(
        [(i, "", "pol", s) for i, s in zip("ppqrt", (6, 1, 4, 2, 7), strict=True)],
        columns=pf.RATING,
    )
    points = pf.win_points_by_rating(reference, policy)
    assert points.instruction.tolist() == ["p", "q", "r"] and points.points.tolist() == [1, 0.5, 0]
    found = pf.win_rate(points.points)
    assert (found.percent, found.n, found.wins, found.ties, found.losses) == (50, 3, 1, 1, 1)
    assert (
        found.half_width == pytest.approx(196 * 0.5 / np.sqrt(3))
        and found.without_ties.value == 0.5
    )
    ranked = pd.DataFrame(
        [(i, "", "ref", "pol", v) for i, v in zip("ppz", ("(b)", "equal", "(a)"), strict=True)],
        columns=pf.RANKING,
    )
    by_ranking = pf.win_points_by_ranking(ranked)
    assert by_ranking.points.tolist() == [1, 0.5, 0]  # every row counts
    common = pf.common_points(points, by_ranking)
    assert common.index.tolist() == ["p"] and common.loc["p"].tolist() == [1, 1]


def test_sign_test_by_hand():
    assert pf.sign_test([0] * 6, [1] * 6) == pytest.approx(2 / 2**6)
    assert pf.sign_test([0, 1, 0.5], [1, 0, 0.5]) == 1 and pf.sign_test([], []) == 1


def test_length_control_removes_a_bias_for_length():
    rng = np.random.default_rng(0)
    sizes = rng.integers(5, 60, (400, 2))
    texts = [[" ".join(["w"] * n) for n in row] for row in sizes]
    table = pd.DataFrame(texts, columns=["response1", "response2"])
    table["instruction"] = np.arange(400).astype(str)
    p = 1 / (
        1 + np.exp(-(sizes[:, 1] - sizes[:, 0] - 10) / 10)
    )  # wins by length, loses at equal length
    table["points"] = (rng.random(400) < p).astype(float)
    expected = 1 / (1 + np.exp(1))
    found = pf.length_controlled(table, resamples=100)
    assert found.low < expected < found.high and found.high - found.low < 0.3
    assert table.points.mean() > found.value


def test_tables_that_are_still_to_be_annotated_are_read(tmp_path):
    rated = pd.DataFrame({"instruction": ["do"], "input": [""], "response": ["one, two"]})
    path = pf.write_table(rated, tmp_path / "ratings.csv")
    assert pf.read_to_annotate(path).to_dict("records") == rated.to_dict("records")
    pairs = rated.drop(columns="response").assign(response1="a", response2="b")
    path = pf.write_table(pairs, tmp_path / "rankings.csv")
    assert pf.read_to_annotate(path)["response2"].tolist() == ["b"]
    path = pf.write_table(pairs.drop(columns="response2"), tmp_path / "neither.csv")
    with pytest.raises(ValueError, match="response"):
        pf.read_to_annotate(path)
