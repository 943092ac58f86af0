"""RewardLM: conditions described and compared, with missing scores."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from lib import models, ppo, sft
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


def test_bounds_of_missing_scores_stand_a_row_for_each_scorer_that_a_table_has():
    rows = [("a", 0.9, 0.6, 0.8), ("b", 0.2, 0.7, nan), ("c", 0.8, 0.1, 0.2), ("d", 0.8, 0.1, 0.2)]
    levels = {"both": rewardlm.describe_condition(table(rows))}
    levels["one"] = rewardlm.describe_condition(table(rows).drop(columns="pro_API_response_score"))
    found = rewardlm.missing_bounds(levels).set_index("label")
    assert list(found.index) == ["both (perspective)", "both (roberta)", "one (roberta)"]
    row = found.loc["both (perspective)"]
    assert (row.value, row.low, row.high) == (pytest.approx(1 / 3), 0.25, 0.5)
    assert (row.n, row.n_missing) == (4, 1)


def test_two_tables_of_one_name_are_refused(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        lines = "prompts,responses,prompt_score,response_score\np,r,0.5,0.5\n"
        (tmp_path / folder / "x_PT.csv").write_text(lines)
    one, two = (str(tmp_path / folder / "x_PT.csv") for folder in ("a", "b"))
    assert list(rewardlm.read_tables([one])) == ["x_PT"]
    with pytest.raises(ValueError, match="two files of RESULTS_CSVS are named x_PT.csv"):
        rewardlm.read_tables([one, two])


# --- notebook 10 ---------------------------------------------------------------------------------


def test_resampled_plot_draws_the_middle_95_percent_of_each_condition():
    means = np.linspace(0, 1, 201)
    parts = [
        pd.DataFrame({"mean": means + i, "group": group, "condition": condition})
        for i, (group, condition) in enumerate([("g", "a"), ("g", "b"), ("h", "a"), ("h", "b")])
    ]
    figure = rewardlm.resampled_plot(pd.concat(parts), xlabel="x", title="t")
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["g", "h"]
    for number, axes in enumerate(figure.axes):
        bars = [line.get_xdata() for line in axes.lines if line.get_linewidth() == 4]
        expected = [[2 * number + i + 0.025, 2 * number + i + 0.975] for i in (0, 1)]
        np.testing.assert_allclose(bars, expected)


def test_agreement_plot_says_each_corner_share_without_missing_scores():
    scores = pd.DataFrame({"one": [0.1, 0.5, 0.9, 0.9, nan], "two": [0.1, 0.2, 0.5, 0.4, 0.9]})
    figure = rewardlm.agreement_plot(scores, title="t")
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("one", "two")
    # left below, left above, right below, right above
    assert [text.get_text() for text in axes.texts] == ["25.0%", "0.0%", "50.0%", "25.0%"]


# --- notebook 11 ---------------------------------------------------------------------------------

LINES = ["the cat", "a dog", "you are", "the man"]
CONFIG = ppo.PPOConfig(
    steps=2, prompts_per_step=4, samples_per_prompt=2, minibatch_size=8, max_new_tokens=4, train="all"
)  # fmt: skip


def lengths(samples):
    return {"length": np.array([float(len(text)) for text in samples.texts])}


def test_a_reward_turned_round_keeps_its_names():
    samples = SimpleNamespace(texts=["a", "abc"], response_ids=[[1], [1, 2]])
    turned = rewardlm.turned_round(lengths)(samples)
    assert {name: row.tolist() for name, row in turned.items()} == {"length": [-1.0, -3.0]}


def test_a_training_is_watched_without_being_changed():
    scorer = SimpleNamespace(score=lambda texts: np.array([nan, *map(len, texts[1:])], dtype=float))
    histories = []
    for watchers in ({}, {"letters": scorer}):
        policy, tokenizer = models.build_tiny_model("tiny")
        reward, seen = rewardlm.watched(lengths, watchers)
        history = ppo.train_ppo(policy, tokenizer, LINES, reward, CONFIG)
        histories.append(rewardlm.with_watched(history, seen))
    plain, watched = histories
    assert (plain.reward == watched.reward).all() and watched.letters.notna().all()
    expected = watched.entropy + watched.kl / watched.length
    np.testing.assert_allclose(watched.nll, expected)
    later = rewardlm.with_watched(history, seen[1:])  # as after a checkpoint
    assert later.letters.isna().tolist() == [True, False]


def test_blocks_end_at_the_last_step():
    history = pd.DataFrame({"arm": "a", "seed": 0, "step": range(1, 6), "x": [1.0, 3, 5, 7, 9]})
    blocks = rewardlm.blocks(history, ["x", "y"], size=2)
    assert blocks.step.tolist() == [2, 4, 5] and blocks.x.tolist() == [2, 6, 9]
    assert blocks.y.isna().all()


def test_best_of_and_the_ways_there():
    pool = pd.DataFrame({"prompt_index": [1, 0, 1, 0], "paid": [1.0, 5, 2, 4]})
    pool["judge"] = [0.4, 0.1, 0.2, 0.3]
    best = rewardlm.best_of(pool, 2, "paid", ["judge"])
    assert best.prompt_index.tolist() == [0, 1] and best.judge.tolist() == [0.1, 0.2]
    np.testing.assert_allclose(best.kl, np.log(2) - 0.5)
    ends = pd.DataFrame({"kl": [3.0], "judge": [0.05]}, index=["PPO"])
    ways = rewardlm.ways(ends, [pool, pool], "judge").set_index(["arm", "step"])
    np.testing.assert_allclose(ways.loc["PPO"], [[0, 0.25], [3, 0.05]])
    np.testing.assert_allclose(ways.loc["best of n"], [[0, 0.25], [np.log(2) - 0.5, 0.15]])


def test_measured_samples_are_what_the_reference_makes_of_them():
    policy, tokenizer = models.build_tiny_model("tiny")
    scorer = SimpleNamespace(score=lambda texts: np.zeros(len(texts)))
    table, panel = rewardlm.measure(
        policy, policy, tokenizer, LINES, {"none": scorer}, lengths, n=3, seed=1, max_new_tokens=4
    )
    assert len(table) == 12 and panel["mean_words"] > 0 and (table.none == 0).all()
    np.testing.assert_allclose(table.kl, 0, atol=1e-4)  # the policy is the reference
    own = rewardlm.own_samples(policy, tokenizer, LINES, 6, seed=1, max_new_tokens=4)
    assert len(own) == 6 and set(own.prompts[:4]) == set(LINES)
    (row,) = rewardlm.rows_to_imitate(own, [2])
    assert row["input_ids"] == own.prompt_ids[2] + own.response_ids[2]
    assert row["labels"].count(sft.NO_LOSS) == len(own.prompt_ids[2])


def test_the_logged_runs_hours_and_what_they_hold():
    plan = rewardlm.memory_of_the_runs(129, 5549).set_index("model")
    assert plan["PPO hours (logged)"].round(1).dropna().tolist() == [6.3, 12.7]
    held, logged = plan["least GPU memory, GB"], plan["logged, GB"]
    assert (held > [4 * 0.77, 2.78, 6.92]).all()  # a float32 model, and two with a byte a weight
    assert (held.iloc[1:] < logged.iloc[1:]).all() and plan.parameters.iloc[-1] == "6.92B"
