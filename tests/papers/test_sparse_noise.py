"""Agreement across protocols against agreement within: by hand, and on annotators whose truth is known."""

import numpy as np
import pandas as pd
import pytest

from lib import stats
from lib.papers.sparse_feedback import noise, prompts, protocols


def ratings_of(scores):
    rows = [("i", "x", text, score) for text, score in scores.items()]
    return pd.DataFrame(rows, columns=["instruction", "input", "response", "score"])


def rankings_of(verdicts):
    rows = [("i", "x", *pair, verdict) for pair, verdict in verdicts.items()]
    return pd.DataFrame(rows, columns=["instruction", "input", "response1", "response2", "verdict"])


def test_pairs_that_both_protocols_judged_twice_by_hand():
    ratings = [ratings_of({"a": 5, "b": 2, "c": 2}), ratings_of({"a": 1, "b": 4, "c": 2})]
    pairs = {("a", "b"): "(a)", ("b", "c"): "equal"}
    rankings = [rankings_of(pairs), rankings_of(pairs | {("a", "b"): "(b)", ("a", "c"): "(a)"})]
    table = noise.asked_twice(ratings, rankings)
    assert table[noise.PREFERENCES].to_numpy().tolist() == [[3, -3, 1, -1], [0, 2, 0, 0]]
    assert table["prompt"].tolist() == [0, 0]
    values = noise.agreements_of(*table[noise.PREFERENCES].to_numpy().T)
    assert values[noise.WITHIN[0]] == 0.25 and values[noise.WITHIN[1]] == 0.25
    assert values[noise.ACROSS] == pytest.approx(0.5)


def test_probabilities_go_before_verdicts_and_missing_ones_are_left_out():
    ratings = [ratings_of({"a": 5, "b": 2, "c": np.nan})] * 2
    rankings = rankings_of({("a", "b"): "equal", ("b", "c"): "(a)"}).assign(p_first=[0.75, 0.5])
    table = noise.asked_twice(ratings, [rankings] * 2)
    assert len(table) == 1 and table["ranking_0"].item() == 0.25


def test_a_thing_annotated_twice_in_one_file_gives_two_occasions():
    twice = pd.concat([ratings_of({"a": 5, "b": 2}), ratings_of({"a": 1})], ignore_index=True)
    first, second = noise.occasions(twice)
    assert first["score"].tolist() == [5, 2] and second["score"].tolist() == [1]


def test_one_yardstick_by_hand():
    assert noise.one_yardstick(1, 1) == pytest.approx(1)
    assert noise.one_yardstick(0.5, 0.9) == noise.one_yardstick(0.4, 0.9) == pytest.approx(0.5)
    # correlations 1/2 and 1/2 (agreement 2/3): the geometric mean is 1/2
    assert noise.one_yardstick(2 / 3, 2 / 3) == pytest.approx(2 / 3)
    # correlations 1 and 1/4: their geometric mean is 1/2
    assert noise.one_yardstick(1, 0.5 + np.arcsin(0.25) / np.pi) == pytest.approx(2 / 3)


@pytest.mark.parametrize("sizes", [(0.3, 0.3), (0.2, 2.0), (3.0, 0.1)])
def test_noise_alone_makes_disagreement_but_no_protocol_effect(sizes):
    effects = []
    for seed in range(8):
        table = noise.simulate(150, 4, noise=sizes, apart=0.0, seed=seed)
        values = noise.agreements_of(*table[noise.PREFERENCES].to_numpy().T)
        effects.append(values[noise.EFFECT])
        assert values[noise.ACROSS] < 0.95
    assert abs(np.mean(effects)) < 0.02


def test_two_yardsticks_are_seen_through_the_noise():
    table = noise.simulate(150, 4, noise=(0.5, 1.0), apart=np.pi / 3, seed=0)
    rows = noise.agreements(table).set_index("name")
    assert rows.loc[noise.EFFECT, "high"] < -0.05
    assert rows.loc[noise.EXPECTED, "low"] > rows.loc[noise.ACROSS, "high"]
    assert (rows["n"] == 150).all()


@pytest.mark.parametrize("uneven", [0.5, 1.0, 1.5])
def test_pairs_of_uneven_difficulty_make_at_most_the_effect_that_the_rule_allows_for(uneven):
    options = {"apart": 0.0, "seed": 0, "uneven": uneven}
    for sizes in ((0.2, 4.0), (4.0, 0.2), (0.2, 2.0), (0.5, 0.5), (1.0, 2.0)):
        table = noise.simulate(60_000, 1, noise=sizes, **options)
        effect = noise.agreements_of(*table[noise.PREFERENCES].to_numpy().T)[noise.EFFECT]
        assert -noise.UNEVEN - 0.004 < effect < 0.01


@pytest.mark.parametrize(
    ("bounds", "verdict"),
    [
        ((-0.09, -0.12, -0.06), ("same direction", False)),
        ((-0.04, -0.045, -0.031), ("same direction", True)),  # there, and too small to matter
        ((-0.02, -0.04, -0.005), ("not demonstrated", True)),  # uneven pairs may have made it
        ((0.0, -0.02, 0.02), ("not demonstrated", True)),
        ((0.0, -0.06, 0.06), ("not demonstrated", False)),
        ((0.03, 0.01, 0.05), ("opposite", False)),
    ],
)
def test_the_rule_by_hand(bounds, verdict):
    assert noise.decide(stats.Interval(*bounds, 154)) == verdict


def test_both_wordings_ask_the_same_of_the_same_item():
    for texts, prompt, options in (
        (("do it", "the text", "an answer"), prompts.rating_prompt, "1 to 7"),
        (("do it", "the text", "one", "two"), prompts.ranking_prompt, "Output (a)"),
    ):
        first, second = (prompt(*texts, wording=k) for k in (0, 1))
        assert first != second
        for shown in (first, second):
            assert options in shown and all(text in shown for text in texts)
    question = protocols.ranking_question("do it", "the text", "one", "two", wording=1)
    assert question.shared.endswith("the text") and question.lead == "Output ("
    with pytest.raises(IndexError):
        prompts.rating_prompt("i", "", "x", wording=2)
    assert "Equal" in prompts.ranking_prompt("i", "", "x", "y", equal=True, wording=1)
