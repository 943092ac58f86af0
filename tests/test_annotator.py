"""The simulated annotator: its rubric worked by hand, its noise reproducible, its settings felt."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.annotator import Rubric, SimulatedAnnotator

SOURCE = (
    "Lake Ormin is a shallow freshwater lake in the north of Halland. It was formed about 9,000 years ago "
    "when the Torvald Glacier melted. Since 1978 its western shore has been a nature reserve."
)
FIRST = SOURCE.split(". ")[0] + "."
JUDGE = Rubric()


def test_key_facts_by_hand():
    assert JUDGE.facts(SOURCE) == (
        "shallow freshwater lake north Halland", "9,000", "Torvald Glacier", "1978")  # fmt: skip
    assert Rubric(max_facts=2).facts(SOURCE) == JUDGE.facts(SOURCE)[:2]
    assert JUDGE.facts("") == ()


def test_judgement_by_hand():
    found = JUDGE.judge(SOURCE, FIRST)
    assert found.coverage == 0.25 and found.missing == ("9,000", "Torvald Glacier", "1978")
    assert (found.support, found.repetition, found.length, found.spans) == (1, 0, 1, ())
    assert found.category == "coverage" and found.accuracy == 1 and found.score == (0.25 + 3) / 4
    whole = JUDGE.judge(SOURCE, SOURCE)
    assert (
        whole.coverage == 1
        and whole.missing == ()
        and whole.score == 1
        and whole.category == "none"
    )


def test_errors_are_found_where_they_stand():
    added = f"{FIRST} It was sold to a bank in 2011. {FIRST}"
    found = JUDGE.judge(SOURCE, added)
    texts = [(added[s.start : s.end], s.category) for s in found.spans]
    assert texts == [("It was sold to a bank in 2011.", "support"), (FIRST, "repetition")]
    assert found.support < 1 and found.repetition > 0


@pytest.mark.parametrize("text", ["", "   ", "\n", "...", "😀"])
def test_nothing_said_earns_nothing(text):
    found = JUDGE.judge(SOURCE, text)
    assert (found.coverage, found.support, found.accuracy, found.spans) == (0, 0, 0, ())


def test_length_by_hand():
    short, long = JUDGE.judge(SOURCE, "A lake."), JUDGE.judge(SOURCE, "lake " * 90)
    assert short.length == 2 / 8 and long.length == 0.5
    assert JUDGE.judge(SOURCE, "lake " * 500).length == 0


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=200), st.text(max_size=200))
def test_any_text_can_be_judged(source, response):
    found = JUDGE.judge(source, response)
    for part in (found.coverage, found.support, found.repetition, found.length, found.score):
        assert 0 <= part <= 1
    ends = [0] + [x for span in found.spans for x in (span.start, span.end)]
    assert ends == sorted(ends) and ends[-1] <= len(response)


# --- the annotator -------------------------------------------------------------------------------


def annotator(**options):
    return SimulatedAnnotator(**options)


def test_without_noise_quality_decides():
    sure = annotator(rating_noise=0, ranking_noise=0, position_bias=0)
    texts = [SOURCE, FIRST, "A lake.", ""]
    scores = sure.rate([SOURCE] * 4, texts)
    assert scores[0] == 7 and list(scores) == sorted(scores, reverse=True) and scores[-1] == 1
    assert sure.rank([SOURCE] * 3, [SOURCE, "", FIRST], ["", SOURCE, "A lake."]) == [
        "(a)",
        "(b)",
        "(a)",
    ]


def test_the_same_question_has_one_answer_and_another_occasion_asks_again():
    noisy = annotator(rating_noise=2)
    sources, texts = [SOURCE] * 60, [f"{FIRST} {k}" for k in range(60)]
    once = noisy.rate(sources, texts)
    assert np.array_equal(noisy.rate(sources[::-1], texts[::-1])[::-1], once)
    assert not np.array_equal(noisy.rate(sources, texts, occasion=1), once)
    assert not np.array_equal(annotator(rating_noise=2, seed=1).rate(sources, texts), once)


def test_position_bias_shows_as_equal_verdicts():
    sources, left = [SOURCE] * 50, [f"{FIRST} {k}" for k in range(50)]
    right = [f"{FIRST} {k + 50}" for k in range(50)]
    biased = annotator(position_bias=1.0, ranking_noise=0)
    assert set(biased.compare(sources, left, right)) == {"(a)"}
    assert set(biased.rank(sources, left, right)) == {"equal"}


def test_protocols_weigh_density_as_told():
    dense = f"{SOURCE} It was sold to a bank in 2011 by nobody whom anybody knows or has met."
    rater = annotator(rating_density=1.0, ranking_density=0.0)
    by_rating, by_ranking = (
        rater.quality([SOURCE] * 2, [dense, FIRST], p) for p in ("rating", "ranking")
    )
    assert by_rating[0] > by_rating[1] and by_ranking[0] < by_ranking[1]
    one = annotator(rating_density=0.5, ranking_density=0.5)
    assert np.array_equal(
        one.quality([SOURCE], [dense], "rating"), one.quality([SOURCE], [dense], "ranking")
    )


def test_critique_names_the_worst_part():
    said = annotator().remark(SOURCE, FIRST)
    assert said.category == "coverage" and said.text.endswith(".")
    missing = annotator().rubric.judge(SOURCE, FIRST).missing
    named = {annotator(seed=seed).remark(SOURCE, FIRST).target for seed in range(40)}
    assert said.target in said.text and named == set(missing)  # any of them, as the seed draws
    wrong = f"{SOURCE} Tomas Reed, mayor of Lindholm, sold everything to a bank for money in 2011."
    assert "Tomas Reed" in annotator().remark(SOURCE, wrong).text
    assert annotator().remark(SOURCE, SOURCE).text == ""


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="rating_density is 2; allowed: 0 to 1"):
        annotator(rating_density=2)
    with pytest.raises(ValueError, match="noise must be at least 0"):
        annotator(ranking_noise=-1)
    with pytest.raises(ValueError, match="protocol is 'both'"):
        annotator().quality([SOURCE], [FIRST], "both")
