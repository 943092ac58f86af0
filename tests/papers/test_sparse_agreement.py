"""Sparse feedback: files, conversions, agreement, the gate; by hand and on the real files."""

import itertools
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import preferences, stats
from lib.papers.sparse_feedback import analysis, conversions

ITEMS = [
    {"instruction": "Name a colour.", "input": "", "responses": ["red", "blue", "red", "a, b"]},
    {"instruction": "Sum.", "input": "1 2", "responses": ["3", "three"]},
]


def ratings(*rows):
    return pd.DataFrame([("i", "x", r, s) for r, s in rows], columns=preferences.RATING)


def rankings(*rows):
    return pd.DataFrame([("i", "x", *row) for row in rows], columns=preferences.RANKING)


def test_json_readers(tmp_path):
    path = tmp_path / "i.json"
    path.write_text(json.dumps([{"instruction": "a"}, {"instruction": "b", "input": None}]))
    assert conversions.read_instructions(path) == [{"instruction": c, "input": ""} for c in "ab"]
    path.write_text('[{"instruction": "a"},\n {"input": "b"}]')
    with pytest.raises(ValueError, match="line 2: 'instruction' must be a str"):
        conversions.read_instructions(path)
    path.write_text(json.dumps(ITEMS))
    assert conversions.read_generations(path) == ITEMS
    path.write_text('[{"instruction": "a", "responses": ["x", 3]}]')
    with pytest.raises(ValueError, match="line 1: 'responses.1' must be a str"):
        conversions.read_generations(path)
    path.write_text('[{"instruction": "a", "input": NaN},\n"b"]')
    with pytest.raises(ValueError, match="line 2: '' must be a record"):
        conversions.read_instructions(path)


# --- conversions ---------------------------------------------------------------------------------


def test_conversions_by_hand():
    assert conversions.to_ratings_table(ITEMS).values.tolist()[3:5] == [
        ["Name a colour.", "", "a, b"], ["Sum.", "1 2", "3"]]  # fmt: skip
    pairs = conversions.to_rankings_table(ITEMS)
    assert len(pairs) == 6 + 1
    assert pairs.iloc[1, 2:].tolist() == ["red", "red"]  # identical texts are kept
    verdicts = pairs.assign(verdict=["(a)", "equal", "(b)", "(a)", "equal", "equal", "equal"])
    found = conversions.to_rankings_rm(pd.concat([verdicts, verdicts]))
    (key,) = found
    assert key == preferences.alpaca_prompt("Name a colour.") and key.endswith("### Response: ")
    assert found[key]["sentences"] == [["red", "blue"], ["a, b", "red"], ["blue", "red"]]


def test_every_row_that_differs_from_a_shipped_file_is_counted(tmp_path):
    (tmp_path / "sample_generation.json").write_text(json.dumps(ITEMS))
    rated, pairs = conversions.to_ratings_table(ITEMS), conversions.to_rankings_table(ITEMS)
    pairs.to_csv(tmp_path / "rankings_sample_generation.csv", index=False)
    rated.loc[[0, 5], "response"] = ["Red", "Three"]
    rated.to_csv(tmp_path / "ratings_sample_generation.csv", index=False)
    ranked = pairs.assign(verdict="(a)")
    ranked.to_csv(tmp_path / "feedback_rankings_sample_generation.csv", index=False)
    shipped = conversions.to_rankings_rm(ranked)
    shipped[preferences.alpaca_prompt("Sum.", "1 2")]["sentences"][0].reverse()
    path = tmp_path / "feedback_rankings_for_rm_sample.json"
    path.write_text(json.dumps(shipped))
    assert conversions.compare_shipped(tmp_path) == {
        "ratings table": (4, 6),
        "rankings table": (7, 7),
        "reward-model pairs, by prompt": (1, 2),
    }


def test_evaluation_tables_by_hand():
    named = (("koala", "p"), ("selfinstruct", "q"))
    outputs = [{"dataset": d, "instruction": i, "output": f"{i}!"} for d, i in named]
    assert conversions.to_rating_eval(outputs).values.tolist() == [["p", "", "p!"]]
    other = [{"dataset": "koala", "instruction": "p", "output": "mine"}]
    assert conversions.to_ranking_eval(outputs, other).values.tolist() == [["p", "", "p!", "mine"]]
    with pytest.raises(
        ValueError, match="1 instructions of the policy have no reference output, first: 'z'"
    ):
        conversions.to_ranking_eval(outputs, [{"instruction": "z", "output": ""}])


def test_released_files_row_for_row(real_data):
    folder = real_data / "sparse_feedback"

    def same(ours, name):
        theirs = pd.read_csv(folder / name, keep_default_na=False, dtype=str)
        alike = [
            t.map(lambda text: text.replace("\r\n", "\n")).values.tolist() for t in (ours, theirs)
        ]
        assert alike[0] == alike[1] and list(ours.columns) == list(theirs.columns)

    items = conversions.read_generations(folder / "sample_generation.json")
    same(conversions.to_ratings_table(items), "ratings_sample_generation.csv")
    same(conversions.to_rankings_table(items), "rankings_sample_generation.csv")
    given = preferences.read_rankings(folder / "feedback_rankings_sample_generation.csv")
    shipped = json.loads((folder / "feedback_rankings_for_rm_sample.json").read_text())
    found = conversions.to_rankings_rm(given)
    assert found == shipped and list(found) == list(shipped)
    assert conversions.compare_shipped(folder) == {
        "ratings table": (100, 100),
        "rankings table": (200, 200),
        "reward-model pairs, by prompt": (len(shipped), len(shipped)),
    }
    reference = conversions.read_outputs(folder / "davinci003.json")
    policies = [
        conversions.read_outputs(folder / f"{name}_alpaca.json") for name in ("ratings", "rankings")
    ]
    assert [len(conversions.to_rating_eval(o)) for o in (reference, *policies)] == [553] * 3
    pairs = conversions.to_ranking_eval(reference, policies[0])
    by_text = {o["instruction"]: o["output"] for o in reference}
    assert pairs.response1.tolist() == [by_text[i] for i in pairs.instruction]


def test_released_feedback(real_data):
    folder = real_data / "sparse_feedback"
    rated = preferences.read_ratings(folder / "feedback_ratings_sample_generation.csv")
    ranked = preferences.read_rankings(folder / "feedback_rankings_sample_generation.csv")
    rows = analysis.pair_verdicts(rated, ranked)
    assert (len(rows), int((rows.derived == rows.direct).sum())) == (117, 66)
    found = analysis.agreement(rows)["consistency"]
    assert 0.30 < found.low < 0.50 < 0.60 < found.high < 0.75 and found.n == 20
    items = conversions.read_generations(folder / "sample_generation.json")
    missing = analysis.missing_by_pair(items, ranked)
    assert missing.present.sum() == 118 and missing.expected.sum() == 200
    assert analysis.judge_report(rated, ranked).passes.all()


# --- consistency ---------------------------------------------------------------------------------


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
    rows = analysis.pair_verdicts(rated, ranked)
    assert rows.derived.tolist() == ["(a)", "equal", "(a)", "(a)"]
    assert rows.gap.tolist() == [2, 0, 2, 3] and rows.attrs["left_out"] == 1
    found = {name: i.value for name, i in analysis.agreement(rows).items()}
    assert found["consistency"] == 0.5 and found["opposite"] == 0.25
    assert found["half_credit"] == (1 + 1 + 0.5 + 0) / 4 and found["decisive_both"] == 0.5
    chance = 0.75 * 0.25 + 0.25 * 0.5 + 0 * 0.25
    assert found["chance"] == pytest.approx(chance)
    assert found["kappa"] == pytest.approx((0.5 - chance) / (1 - chance))
    assert analysis.agreement_table(rows).to_numpy().tolist() == [[1, 1, 1], [0, 1, 0], [0, 0, 0]]
    by_gap = analysis.consistency_by_gap(rows).set_index("gap")
    assert by_gap.value.tolist() == [1, 0.5, 0] and by_gap.pairs.tolist() == [1, 2, 1]


def of_prompts(table, name="input"):
    """The table once for each of three prompts, whose pairs are therefore not independent."""
    return pd.concat([table.assign(**{name: f"x{k}"}) for k in range(3)], ignore_index=True)


def test_intervals_count_prompts_not_pairs():
    rated = of_prompts(ratings(("a", 5), ("b bb", 3), ("c", 3)))
    ranked = of_prompts(rankings(("a", "b bb", "(a)"), ("b bb", "c", "(a)"), ("a", "c", "(b)")))
    rows = analysis.pair_verdicts(rated, ranked)
    by_gap = analysis.consistency_by_gap(rows)
    assert by_gap.n.tolist() == [3, 3] and by_gap.pairs.tolist() == [3, 6]
    # all prompts are alike, so drawing them anew changes nothing; none agrees is not certainty
    assert by_gap.value.tolist() == by_gap.low.tolist() == [0, 0.5]
    assert by_gap.high[0] == stats.proportion(0, 3).high > 0.5 == by_gap.high[1]
    words = analysis.preferred_against_other(rows).set_index(["protocol", "measure"])
    words = words.loc[("rankings", "words")]
    assert words["mean"] == pytest.approx((1 + 2 + 2 + 1 + 1 + 1) / 6)
    longer = words[["longer_pct", "longer_low", "longer_high", "longer_n"]]
    assert longer.tolist() == [50, 50, 50, 3]
    assert words.pairs == 6


def test_line_ends_do_not_part_a_pair():
    rows = analysis.pair_verdicts(ratings(("a\r\nb", 3), ("c", 2)), rankings(("a\nb", "c", "(a)")))
    assert rows.derived.tolist() == ["(a)"]


def test_a_missing_verdict_or_score_counts_for_no_side():
    rated = ratings(("a b", 6), ("b", 2), ("c", None), ("d", 4))
    ranked = rankings(
        ("a b", "b", "(a)"),  # the one pair with everything
        ("a b", "d", None),
        ("c", "d", "(a)"),
        ("b", "d", None),
    )
    rows = analysis.pair_verdicts(rated, ranked)
    assert rows.response2.tolist() == ["b"] and rows.attrs["left_out"] == 3
    assert analysis.agreement(rows)["consistency"].value == 1
    assert analysis.consistency_by_gap(rows)[["agree", "pairs"]].values.tolist() == [[1, 1]]
    preferred = analysis.preferred_against_other(rows.assign(derived=None))
    assert preferred.set_index("protocol").loc["ratings", "longer_n"].tolist() == [0, 0, 0]
    items = [{"instruction": "i", "input": "x", "responses": ["a b", "b", "d"]}]
    assert analysis.missing_by_pair(items, ranked).present.tolist() == [1, 0, 0]
    assert conversions.to_rankings_rm(ranked.iloc[[1, 3]]) == {}
    triad = rankings(("a", "b", "(a)"), ("b", "c", "(a)"), ("a", "c", None))
    assert analysis.cyclic_triads(triad) == (0, 0)
    twice = pd.concat([rankings(("a", "b", None)), rankings(("a", "b", None))])
    assert analysis.test_retest(twice)["same"].n == 0
    report = analysis.judge_report(rated, ranked).set_index("check")
    assert report.n.tolist() == [3, 3, 2, 2]


def test_a_later_annotation_counts_where_the_first_is_missing():
    rows = analysis.pair_verdicts(
        ratings(("a", None), ("b", 2), ("a", 5)), rankings(("a", "b", None), ("a", "b", "(b)"))
    )
    assert rows[["score1", "direct"]].values.tolist() == [[5, "(b)"]]


def test_an_equal_answer_follows_no_position():
    calls = pd.DataFrame({"first": ["equal", "(a)"], "swapped": ["equal", "(b)"]})
    table = rankings(("a", "b", "equal"), ("c", "d", "(a)")).join(calls)
    share = analysis.judge_report(ratings(), table).set_index("check").value
    assert share["calls: first position's share"].tolist() == [0.5, 0.5]


@pytest.mark.filterwarnings("error")
def test_one_pair_and_none():
    one = analysis.pair_verdicts(ratings(("a", 5), ("b", 3)), rankings(("a", "b", "(a)")))
    none = analysis.pair_verdicts(ratings(), rankings())
    found = analysis.agreement(one)
    assert found["consistency"].value == 1 and np.isnan(found["consistency"].low)
    assert analysis.consistency_by_gap(none).empty and "pairs" in analysis.consistency_by_gap(none)
    assert analysis.preferred_against_other(none)["n"].tolist() == [0] * 6
    assert not analysis.judge_report(ratings(("a", None)), rankings(("a", "b", None))).passes.any()


def test_nothing_in_common_is_an_error():
    rows = analysis.pair_verdicts(ratings(("a", 1)), rankings(("b", "c", "(a)")))
    with pytest.raises(ValueError, match="no ranked pair has ratings of both"):
        analysis.agreement(rows)


PAIR = st.tuples(st.integers(1, 7), st.integers(1, 7), st.sampled_from(preferences.VERDICTS))


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
    one, two = (analysis.agreement(analysis.pair_verdicts(rated, t)) for t in (ranked, swapped))
    for name in one:
        assert one[name].value == pytest.approx(two[name].value, nan_ok=True)


def test_what_is_preferred_by_hand():
    rated = ratings(("one two three", 7), ("four", 1), ("five five", 3))
    ranked = rankings(
        ("one two three", "four", "(b)"),
        ("four", "five five", "(b)"),
        ("one two three", "five five", "equal"),
    )
    found = analysis.preferred_against_other(analysis.pair_verdicts(rated, ranked)).set_index(
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
    assert not analysis.judge_report(scores, stuck).passes[[0, 1, 2, 3, 4]].any()
    scores["score"] = rng.integers(1, 8, 40)
    calls = pd.DataFrame(rng.choice(["(a)", "(b)"], (40, 2)), columns=["first", "swapped"])
    verdicts = [preferences.verdict_of_orders(*row) for row in calls.values]
    able = stuck.drop(columns=["first", "swapped"]).assign(verdict=verdicts).join(calls)
    assert analysis.judge_report(scores, able).passes.all()


def test_an_empty_table_does_not_pass_the_gate():
    assert not analysis.judge_report(ratings(), rankings()).passes.any()


def test_missing_pairs_by_hand():
    items = [{"instruction": "i", "input": "x", "responses": list("abc")}]
    found = analysis.missing_by_pair(items, rankings(("a", "b", "(a)"), ("b", "c", "equal")))
    assert found.values.tolist() == [["1-2", 1, 1, 1.0], ["1-3", 0, 1, 0.0], ["2-3", 1, 1, 1.0]]


def test_cycles():
    loop = rankings(("a", "b", "(a)"), ("b", "c", "(a)"), ("a", "c", "(b)"))
    line = rankings(("a", "b", "(a)"), ("b", "c", "(a)"), ("a", "c", "(a)"))
    tied = rankings(("a", "b", "(a)"), ("b", "c", "equal"), ("a", "c", "(a)"))
    assert [analysis.cyclic_triads(t) for t in (loop, line, tied)] == [(1, 1), (0, 1), (0, 0)]
    rng = np.random.default_rng(0)
    rows = [
        (f"i{k}", "x", *pair, rng.choice(["(a)", "(b)"]))
        for k in range(60)
        for pair in itertools.combinations("abcde", 2)
    ]
    tossed = pd.DataFrame(rows, columns=preferences.RANKING)
    cycles, triads = analysis.cyclic_triads(tossed)
    assert triads == 600 and 0.2 < cycles / triads < 0.3


def test_test_retest_by_hand():
    found = analysis.test_retest(
        ratings(("a", 5), ("b", 2), ("a", 6), ("c", 4), ("c", 4), ("c", 1))
    )
    assert found["same"].value == 0.5 and found["same"].n == 1 and found["gap"].value == 0.5
    assert analysis.test_retest(rankings(("a", "b", "(a)")))["same"].n == 0
    assert analysis.test_retest(ratings(("a", 5), ("b", 2)))["verdict"].n == 0


def test_verdicts_of_two_occasions_agree_where_scores_differ():
    twice = [("a", 5), ("b", 3), ("c", 3), ("a", 4), ("b", 3), ("c", 2)]
    found = analysis.test_retest(of_prompts(ratings(*twice)))
    assert found["same"].value == pytest.approx(1 / 3)
    assert found["verdict"].value == pytest.approx(2 / 3)  # b against c: equal, then decided
    assert found["verdict"].n == found["same"].n == 3
