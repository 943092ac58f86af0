"""How good a reward model is: accuracy on pairs, rank correlation, calibration."""

import math

import numpy as np
import pandas as pd
import pytest

from lib import preferences
from lib.papers.sparse_feedback import analysis


def rankings(verdicts):
    rows = [("q" + str(i // 2), "", "a", "b", v) for i, v in enumerate(verdicts)]
    return pd.DataFrame(rows, columns=preferences.RANKING)


def test_pairwise_accuracy_by_hand():
    table = rankings(["(a)", "(b)", "equal", "(a)", "(b)", "(a)"])
    margins = analysis.pair_margins(table, [1, 1, 9, -1, -2, 0], np.zeros(6))
    assert margins["won"].tolist() == [1, 0, 1, 0, 1]
    unjudged = analysis.pair_margins(rankings(["(a)", None]), [1, 1], [0, 0])
    assert unjudged["won"].tolist() == [1]
    found = analysis.pairwise_accuracy(margins)  # right, wrong, wrong, right, tie
    assert found.value == pytest.approx(0.5) and found.n == 3 and found.low <= 0.5 <= found.high


def test_rank_correlation():
    z = np.array([0.1, 0.2, 5.0, 6.0])
    assert analysis.rank_correlation(z, [1, 2, 3, 7], [0, 0, 1, 1]).value == pytest.approx(1)
    # the level of a prompt's scores says nothing: only the order within prompts counts
    assert analysis.rank_correlation(z, [6, 7, 1, 2], [0, 0, 1, 1]).value == pytest.approx(1)
    assert analysis.rank_correlation(z, [6, 7, 1, 1], [0, 0, 1, 1]).n == 1
    assert np.isnan(analysis.rank_correlation(z, [4, 4, 4, 4], [0, 0, 1, 1]).value)


def test_calibration_finds_over_confidence():
    rng = np.random.default_rng(0)
    margin = rng.normal(0, 1.5, 4000)
    won = rng.random(4000) < 1 / (1 + np.exp(-margin))
    table = rankings(np.where(won, "(a)", "(b)"))
    honest = analysis.calibration(analysis.pair_margins(table, margin, 0 * margin))
    boastful = analysis.calibration(analysis.pair_margins(table, 3 * margin, 0 * margin))
    assert honest.attrs["error"] < 0.02 < 0.1 < boastful.attrs["error"]
    assert len(honest) == 5 and honest["n"].sum() == 4000
    np.testing.assert_allclose(honest["value"] + honest["value"][::-1].to_numpy(), 1)


@pytest.mark.filterwarnings("error")
def test_measures_of_no_pair_one_pair_and_missing_scores():
    none = pd.DataFrame({"margin": [], "won": [], "prompt": []})
    assert math.isnan(analysis.pairwise_accuracy(none).value)
    assert analysis.calibration(none).empty
    assert math.isnan(analysis.calibration(none).attrs["error"])
    one = pd.DataFrame({"margin": [2e3, np.nan], "won": [1.0, 0.0], "prompt": [0, 1]})
    assert analysis.pairwise_accuracy(one)[::3] == (1.0, 1)  # a missing margin is not "right"
    assert analysis.calibration(one)["n"].tolist() == [1, 1]
    scores = pd.array([1, 2, None, 3], dtype="Int64")
    found = analysis.rank_correlation(np.array([1.0, 2.0, 0.0, 3.0]), scores, ["p"] * 4)
    assert found.value == 1 and found.n == 1
    assert analysis.rank_correlation(np.zeros(0), [], []).n == 0
