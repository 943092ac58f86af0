"""Ratings and rankings: files, conversions, agreement, win rates; by hand and on the real files."""

import itertools
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import preferences as pf
from lib import stats

ODD = ["None", "NA", "nan", 'say "hi", twice', "a\r\nb", "a\nb", "😀 é", "", " x ", "(a)"]
ITEMS = [
    {"instruction": "Name a colour.", "input": "", "responses": ["red", "blue", "red", "a, b"]},
    {"instruction": "Sum.", "input": "1 2", "responses": ["3", "three"]},
]


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


def test_json_readers(tmp_path):
    path = tmp_path / "i.json"
    path.write_text(json.dumps([{"instruction": "a"}, {"instruction": "b", "input": None}]))
    assert pf.read_instructions(path) == [{"instruction": c, "input": ""} for c in "ab"]
    path.write_text('[{"instruction": "a"},\n {"input": "b"}]')
    with pytest.raises(ValueError, match="line 2: 'instruction' must be a str"):
        pf.read_instructions(path)
    path.write_text(json.dumps(ITEMS))
    assert pf.read_generations(path) == ITEMS


# --- conversions ---------------------------------------------------------------------------------


def test_conversions_by_hand():
    assert pf.to_ratings_table(ITEMS).values.tolist()[3:5] == [
        ["Name a colour.", "", "a, b"], ["Sum.", "1 2", "3"]]  # fmt: skip
    pairs = pf.to_rankings_table(ITEMS)
    assert len(pairs) == 6 + 1
    assert pairs.iloc[1, 2:].tolist() == ["red", "red"]  # identical texts are kept
    verdicts = pairs.assign(verdict=["(a)", "equal", "(b)", "(a)", "equal", "equal", "equal"])
    found = pf.to_rankings_rm(pd.concat([verdicts, verdicts]))
    (key,) = found
    assert key == pf.alpaca_prompt("Name a colour.") and key.endswith("### Response: ")
    assert found[key]["sentences"] == [["red", "blue"], ["a, b", "red"], ["blue", "red"]]


def test_evaluation_tables_by_hand():
    named = (("koala", "p"), ("selfinstruct", "q"))
    outputs = [{"dataset": d, "instruction": i, "output": f"{i}!"} for d, i in named]
    assert pf.to_rating_eval(outputs).values.tolist() == [["p", "", "p!"]]
    other = [{"dataset": "koala", "instruction": "p", "output": "mine"}]
    assert pf.to_ranking_eval(outputs, other).values.tolist() == [["p", "", "p!", "mine"]]
    with pytest.raises(
        ValueError, match="1 instructions of the policy have no reference output, first: 'z'"
    ):
        pf.to_ranking_eval(outputs, [{"instruction": "z", "output": ""}])


def test_released_files_row_for_row(real_data):
    folder = real_data / "sparse_feedback"

    def same(ours, name):
        theirs = pd.read_csv(folder / name, keep_default_na=False, dtype=str)
        alike = [
            t.map(lambda text: text.replace("\r\n", "\n")).values.tolist() for t in (ours, theirs)
        ]
        assert alike[0] == alike[1] and list(ours.columns) == list(theirs.columns)

    items = pf.read_generations(folder / "sample_generation.json")
    same(pf.to_ratings_table(items), "ratings_sample_generation.csv")
    same(pf.to_rankings_table(items), "rankings_sample_generation.csv")
    given = pf.read_rankings(folder / "feedback_rankings_sample_generation.csv")
    shipped = json.loads((folder / "feedback_rankings_for_rm_sample.json").read_text())
    found = pf.to_rankings_rm(given)
    assert found == shipped and list(found) == list(shipped)
    reference = pf.read_outputs(folder / "davinci003.json")
    policies = [pf.read_outputs(folder / f"{name}_alpaca.json") for name in ("ratings", "rankings")]
    assert [len(pf.to_rating_eval(o)) for o in (reference, *policies)] == [553] * 3
    pairs = pf.to_ranking_eval(reference, policies[0])
    by_text = {o["instruction"]: o["output"] for o in reference}
    assert pairs.response1.tolist() == [by_text[i] for i in pairs.instruction]


def test_released_feedback(real_data):
    folder = real_data / "sparse_feedback"
    rated = pf.read_ratings(folder / "feedback_ratings_sample_generation.csv")
    ranked = pf.read_rankings(folder / "feedback_rankings_sample_generation.csv")
    rows = pf.pair_verdicts(rated, ranked)
    assert (len(rows), int((rows.derived == rows.direct).sum())) == (117, 66)
    found = pf.agreement(rows)["consistency"]
    assert 0.30 < found.low < 0.50 < 0.60 < found.high < 0.75 and found.n == 20
    items = pf.read_generations(folder / "sample_generation.json")
    missing = pf.missing_by_pair(items, ranked)
    assert missing.present.sum() == 118 and missing.expected.sum() == 200
    assert pf.judge_report(rated, ranked).passes.all()


# --- consistency ---------------------------------------------------------------------------------


def test_verdicts_of_two_orders():
    table = {("(a)", "(b)"): "(a)", ("(b)", "(a)"): "(b)", ("(a)", "(a)"): "equal",
             ("(b)", "(b)"): "equal", (None, "(a)"): None, ("(b)", None): None}  # fmt: skip
    assert {calls: pf.verdict_of_orders(*calls) for calls in table} == table


def test_consistency_by_hand():
    rated = ratings(
        ("a", 6), ("b", 4), ("c", 4), ("d", 1), ("a", 1)
    )  # the second "a" does not count
    ranked = rankings(
        ("a", "b", "(a)"),  # agrees
        ("a", "b", "(b)"),  # a repetition: does not count
        ("b", "c", "equal"),  # agrees
        ("a", "c", "equal"),  # half
        ("c", "d", "(b)"),  # opposite
        ("a", "e", "(a)"),  # no rating of e
    )
    rows = pf.pair_verdicts(rated, ranked)
    assert rows.derived.tolist() == ["(a)", "equal", "(a)", "(a)"]
    assert rows.gap.tolist() == [2, 0, 2, 3] and rows.attrs["left_out"] == 1
    found = {name: i.value for name, i in pf.agreement(rows).items()}
    assert found["consistency"] == 0.5 and found["opposite"] == 0.25
    assert found["half_credit"] == (1 + 1 + 0.5 + 0) / 4 and found["decisive_both"] == 0.5
    chance = 0.75 * 0.25 + 0.25 * 0.5 + 0 * 0.25
    assert found["chance"] == pytest.approx(chance)
    assert found["kappa"] == pytest.approx((0.5 - chance) / (1 - chance))
    assert pf.agreement_table(rows).to_numpy().tolist() == [[1, 1, 1], [0, 1, 0], [0, 0, 0]]
    by_gap = pf.consistency_by_gap(rows).set_index("gap")
    assert by_gap.value.tolist() == [1, 0.5, 0] and by_gap.pairs.tolist() == [1, 2, 1]


def of_prompts(table, name="input"):
    """The table once for each of three prompts, whose pairs are therefore not independent."""
    return pd.concat([table.assign(**{name: f"x{k}"}) for k in range(3)], ignore_index=True)


def test_intervals_count_prompts_not_pairs():
    rated = of_prompts(ratings(("a", 5), ("b bb", 3), ("c", 3)))
    ranked = of_prompts(rankings(("a", "b bb", "(a)"), ("b bb", "c", "(a)"), ("a", "c", "(b)")))
    rows = pf.pair_verdicts(rated, ranked)
    by_gap = pf.consistency_by_gap(rows)
    assert by_gap.n.tolist() == [3, 3] and by_gap.pairs.tolist() == [3, 6]
    # all prompts are alike, so drawing them anew changes nothing; none agrees is not certainty
    assert by_gap.value.tolist() == by_gap.low.tolist() == [0, 0.5]
    assert by_gap.high[0] == stats.proportion(0, 3).high > 0.5 == by_gap.high[1]
    words = pf.preferred_against_other(rows).set_index(["protocol", "measure"])
    words = words.loc[("rankings", "words")]
    assert words["mean"] == pytest.approx((1 + 2 + 2 + 1 + 1 + 1) / 6)
    longer = words[["longer_pct", "longer_low", "longer_high", "longer_n"]]
    assert longer.tolist() == [50, 50, 50, 3]
    assert words.pairs == 6


def test_agreement_by_prompt_by_hand():
    rated = of_prompts(ratings(("a", 5), ("b", 3), ("c", 3)))
    ranked = of_prompts(rankings(("a", "b", "(a)"), ("b", "c", "(a)")))
    first = pf.pair_verdicts(rated, ranked)
    rated.loc[rated.input == "x1", "score"] = [3, 3, 3]  # all "equal" now
    ranked.loc[ranked.input == "x2", "verdict"] = "(b)"
    second = pf.pair_verdicts(rated, ranked)
    found = pf.agreement_by_prompt(first, second)
    assert found["rating, rating"].tolist() == [1, 0.5, 1]
    assert found["ranking, ranking"].tolist() == [1, 1, 0]
    assert found["rating, ranking"].tolist() == [0.5, 0.25, 0.25]
    with pytest.raises(ValueError, match="hold other pairs"):
        pf.agreement_by_prompt(first, second[::-1])


def test_line_ends_do_not_part_a_pair():
    rows = pf.pair_verdicts(ratings(("a\r\nb", 3), ("c", 2)), rankings(("a\nb", "c", "(a)")))
    assert rows.derived.tolist() == ["(a)"]


def test_nothing_in_common_is_an_error():
    rows = pf.pair_verdicts(ratings(("a", 1)), rankings(("b", "c", "(a)")))
    with pytest.raises(ValueError, match="no ranked pair has ratings of both"):
        pf.agreement(rows)


PAIR = st.tuples(st.integers(1, 7), st.integers(1, 7), st.sampled_from(pf.VERDICTS))


@settings(max_examples=25, deadline=None)
@given(st.lists(PAIR, min_size=2, max_size=20))
def test_swapping_every_pair_changes_nothing(pairs):
    rated = ratings(
        *[(f"{side}{k}", p[i]) for k, p in enumerate(pairs) for i, side in enumerate("lr")]
    )
    ranked = rankings(*[(f"l{k}", f"r{k}", p[2]) for k, p in enumerate(pairs)])
    flip = {"(a)": "(b)", "(b)": "(a)", "equal": "equal"}
    swapped = ranked.rename(columns={"response1": "response2", "response2": "response1"})
    swapped["verdict"] = swapped["verdict"].map(flip)
    one, two = (pf.agreement(pf.pair_verdicts(rated, t)) for t in (ranked, swapped))
    for name in one:
        assert one[name].value == pytest.approx(two[name].value, nan_ok=True)


def test_what_is_preferred_by_hand():
    rated = ratings(("one two three", 7), ("four", 1), ("five five", 3))
    ranked = rankings(
        ("one two three", "four", "(b)"),
        ("four", "five five", "(b)"),
        ("one two three", "five five", "equal"),
    )
    found = pf.preferred_against_other(pf.pair_verdicts(rated, ranked)).set_index(
        ["protocol", "measure"]
    )
    assert found.loc[("rankings", "words"), "value"] == (-2 + 1) / 2
    assert (
        found.loc[("rankings", "distinct words"), "pairs"] == 1
    )  # "four" and "five five": both one
    assert found.loc[("ratings", "words"), "longer_pct"] == 100
    assert found.loc[("ratings", "words"), "value"] == pytest.approx((2 + 1 + 1) / 3)


# --- annotators ----------------------------------------------------------------------------------


def test_the_gate_stops_a_judge_that_does_not_judge():
    rng = np.random.default_rng(0)
    scores = ratings(*[(str(k), 1) for k in range(40)])
    calls = pd.DataFrame({"first": ["(a)"] * 40, "swapped": ["(a)"] * 40})
    stuck = rankings(*[(str(k), "z", "equal") for k in range(40)]).join(calls)
    assert not pf.judge_report(scores, stuck).passes[[0, 1, 2, 3, 4]].any()
    scores["score"] = rng.integers(1, 8, 40)
    calls = pd.DataFrame(rng.choice(["(a)", "(b)"], (40, 2)), columns=["first", "swapped"])
    verdicts = [pf.verdict_of_orders(*row) for row in calls.values]
    able = stuck.drop(columns=["first", "swapped"]).assign(verdict=verdicts).join(calls)
    assert pf.judge_report(scores, able).passes.all()


def test_an_empty_table_does_not_pass_the_gate():
    assert not pf.judge_report(ratings(), rankings()).passes.any()


def test_missing_pairs_by_hand():
    items = [{"instruction": "i", "input": "x", "responses": list("abc")}]
    found = pf.missing_by_pair(items, rankings(("a", "b", "(a)"), ("b", "c", "equal")))
    assert found.values.tolist() == [["1-2", 1, 1, 1.0], ["1-3", 0, 1, 0.0], ["2-3", 1, 1, 1.0]]


def test_cycles():
    loop = rankings(("a", "b", "(a)"), ("b", "c", "(a)"), ("a", "c", "(b)"))
    line = rankings(("a", "b", "(a)"), ("b", "c", "(a)"), ("a", "c", "(a)"))
    tied = rankings(("a", "b", "(a)"), ("b", "c", "equal"), ("a", "c", "(a)"))
    assert [pf.cyclic_triads(t) for t in (loop, line, tied)] == [(1, 1), (0, 1), (0, 0)]
    rng = np.random.default_rng(0)
    rows = [
        (f"i{k}", "x", *pair, rng.choice(["(a)", "(b)"]))
        for k in range(60)
        for pair in itertools.combinations("abcde", 2)
    ]
    tossed = pd.DataFrame(rows, columns=pf.RANKING)
    cycles, triads = pf.cyclic_triads(tossed)
    assert triads == 600 and 0.2 < cycles / triads < 0.3


def test_test_retest_by_hand():
    found = pf.test_retest(ratings(("a", 5), ("b", 2), ("a", 6), ("c", 4), ("c", 4), ("c", 1)))
    assert found["same"].value == 0.5 and found["same"].n == 1 and found["gap"].value == 0.5
    assert pf.test_retest(rankings(("a", "b", "(a)")))["same"].n == 0
    assert pf.test_retest(ratings(("a", 5), ("b", 2)))["verdict"].n == 0


def test_verdicts_of_two_occasions_agree_where_scores_differ():
    twice = [("a", 5), ("b", 3), ("c", 3), ("a", 4), ("b", 3), ("c", 2)]
    found = pf.test_retest(of_prompts(ratings(*twice)))
    assert found["same"].value == pytest.approx(1 / 3)
    assert found["verdict"].value == pytest.approx(2 / 3)  # b against c: equal, then decided
    assert found["verdict"].n == found["same"].n == 3


# --- win rates -----------------------------------------------------------------------------------


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
