"""RewardLM: conditions described and compared, with missing scores."""

import numpy as np
import pandas as pd
import pytest

from lib.papers import rewardlm

nan = np.nan


def table(rows, column="pro_API_response_score"):
    frame = pd.DataFrame(rows, columns=["prompts", "prompt_score", "response_score", column])
    return frame.assign(responses="r")


def test_exceedance_is_strict_and_bounds_missing():
    found = rewardlm.exceedance([0.5, 0.51, nan, 0.9])
    assert found == {
        "count": 2, "share": 0.5, "share_scored": 2 / 3, "share_low": 0.5, "share_high": 0.75,
        "n": 4, "n_missing": 1,
    }  # fmt: skip


def test_describe_condition_counts_toxic_prompts_apart():
    found = rewardlm.describe_condition(
        table([("a", 0.9, 0.6, 0.8), ("b", 0.2, 0.7, nan), ("c", 0.8, 0.1, 0.2)])
    )
    assert found["perspective_gt_0.5/count"].value == 1
    assert found["perspective_gt_0.5/n_missing"].value == 1
    assert found["perspective_gt_0.5/share_high"].value == pytest.approx(2 / 3)
    assert found["roberta_gt_0.5/count"].value == 2
    assert found["roberta_gt_0.5_toxic_prompts/count"].value == 1
    assert found["roberta_gt_0.5_toxic_prompts/n"].value == 2
    assert found["roberta/median"].value == 0.6
    assert found["perspective/mean"].n == 2


def test_rows_without_a_prompt_score_are_counted():
    found = rewardlm.describe_condition(table([("a", nan, 0.9, 0.9), ("b", 0.8, 0.9, 0.1)]))
    assert found["prompt_score/n_missing"].value == 1
    assert found["perspective_gt_0.5_toxic_prompts/n"].value == 1


def test_compare_conditions_pairs_repeated_prompts_by_occurrence():
    before = table([("a", 0.9, 0.9, 0.9), ("a", 0.9, 0.1, 0.1), ("b", 0.9, 0.5, nan)])
    after = table(
        [("a", 0.9, 0.7, 0.7), ("b", 0.9, 0.5, 0.5), ("a", 0.9, 0.1, 0.3), ("z", 1, 1, 1)]
    )
    found = rewardlm.compare_conditions({"tox_RL_m": after, "tox_PT_m": before}).set_index("scorer")
    assert set(found.pair) == {"tox_PT_m -> tox_RL_m"}
    row = found.loc["perspective"]
    assert row.value == pytest.approx((-0.2 + 0.2) / 2) and row.n == 2
    assert row.n_missing == 1 and row.n_unpaired == 1
    assert row.share_change == 0
    assert (row.bound_low, row.bound_high) == (pytest.approx(-1 / 3), pytest.approx(0))
    assert found.loc["roberta"].n == 3


def test_tables_of_different_models_are_not_paired():
    one = table([("a", 0.9, 0.9, 0.9)])
    names = ["x_RL_falcon", "x_FT_falcon", "x_PT_falcon", "x_PT_other"]
    found = rewardlm.compare_conditions(dict.fromkeys(names, one))
    assert set(found.pair) == {
        "x_PT_falcon -> x_FT_falcon", "x_PT_falcon -> x_RL_falcon", "x_FT_falcon -> x_RL_falcon",
    }  # fmt: skip
    assert len(rewardlm.compare_conditions({"mine": one, "yours": one})) == 2
