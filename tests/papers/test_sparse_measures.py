"""What notebook 22 measures: evaluation files, win rates, released outputs, choices, annotators by hand."""

import numpy as np
import pandas as pd
import pytest

from lib import preferences
from lib.course.record import Run
from lib.papers.sparse_feedback import choices, measures
from lib.stats import Interval


@pytest.fixture
def run(tmp_path):
    return Run("22_reward_models_best_of_n", "smoke", 0, tmp_path)


def test_evaluation_files_hold_the_pairs_of_the_two_generators_the_reference_first(run):
    rows = [("i", "p", "a1", 4.4, "A"), ("i", "p", "a2", 4.6, "A"), ("i", "p", "b1", 5.5, "B")]
    ratings = pd.DataFrame(rows, columns=["instruction", "input", "response", "score", "generator"])
    pairs = [("a1", "b1", "(b)"), ("b1", "a2", "(b)"), ("a1", "a2", "(a)")]
    rows = [("i", "p", *pair) for pair in pairs]
    rankings = pd.DataFrame(rows, columns=preferences.RANKING)
    paths = measures.write_evaluation(ratings, rankings, ("A", "B"), run.folder)
    reference, policy = map(preferences.read_ratings, paths[:2])
    ranked = preferences.read_rankings(paths[2])
    assert ranked[["response1", "response2", "verdict"]].values.tolist() == [
        ["a1", "b1", "(b)"],
        ["a2", "b1", "(a)"],
    ]
    assert reference["score"].tolist() == [4, 5] and policy["score"].tolist() == [6, 6]
    assert set(ranked["instruction"]) == {"i\n\nPassage: p"}


def test_win_rates_of_files_are_metrics(run):
    points = {
        "rating": pd.DataFrame({"instruction": list("abc"), "points": [1.0, 0.5, 0.0]}),
        "ranking": pd.DataFrame({"instruction": list("abd"), "points": [1.0, 1.0, 0.0]}),
    }
    points = {k: t.assign(response1="x y", response2="x z") for k, t in points.items()}
    table = measures.win_rates(run, points)
    assert table["wins"].tolist() == [1, 2] and table["ties"].tolist() == [1, 0]
    assert run.metrics["rating_win_rate_pct"]["value"] == pytest.approx(50)
    assert run.metrics["ranking_n"]["value"] == 3
    said = measures.common_win_rates(run, points)
    assert run.metrics["common_n"]["value"] == 2 and said.endswith("sign test p = 1.000")


def test_the_interaction_of_released_outputs_by_hand(run):
    names = ("davinci003", "ratings_alpaca", "rankings_alpaca")
    scores = dict(zip(names, ([4, 4, 4], [5, 5, 3], [3, 3, 5]), strict=True))
    rated = {
        name: pd.DataFrame({"instruction": list("abc"), "input": "", "response": name, "score": s})
        for name, s in scores.items()
    }
    verdicts = {"ratings_alpaca": "(a)", "rankings_alpaca": "(b)"}
    ranked = {
        name: pd.DataFrame(
            {"instruction": list("abc"), "input": "", "response1": "davinci003"}
        ).assign(response2=name, verdict=verdict)
        for name, verdict in verdicts.items()
    }
    report, interaction = measures.interaction_of_released(run, rated, ranked)
    # by ranking the lead is +1 each; by rating -1, -1, +1: differences 2, 2, 0
    assert interaction.value == pytest.approx(100 * 4 / 3) and interaction.n == 3
    assert "passes" in report and "released/interaction_points" in run.metrics


def test_learned_needs_more_than_every_shuffle(run):
    how = {"rule": "r", "why": ""}
    high = Interval(0.7, 0.6, 0.8, 30)
    chance = np.array([0.5, 0.65])
    assert measures.claim_learned(run, "t", high, chance, **how) == "same direction"
    assert measures.claim_learned(run, "t", high, chance + 0.1, **how) == "not demonstrated"
    low = Interval(0.6, 0.45, 0.7, 30)
    assert measures.claim_learned(run, "t", low, chance, **how) == "not demonstrated"


def test_pairs_as_trl_takes_them():
    rows = [("i", "p", "a", "b", "(b)"), ("i", "p", "a", "c", "equal"), ("i", "p", "d", "e", "(a)")]
    table = pd.DataFrame(rows, columns=preferences.RANKING)
    pairs = measures.chat_pairs(table, 5, lambda instruction, passage: f"{instruction}/{passage}")
    assert pairs["prompt"] == [[{"role": "user", "content": "i/p"}]] * 2
    assert [side[0]["content"] for side in pairs["chosen"]] == ["b", "d"]
    assert [side[0]["content"] for side in pairs["rejected"]] == ["a", "e"]


def test_the_training_figure_shows_means_by_epoch_and_every_step_is_saved(run):
    steps = {"epoch": [0.5, 1.0, 1.5, 2.0], "loss": [1.0, 0.5, 0.4, 0.2]}
    fitted = {kind: ({}, pd.DataFrame(steps)) for kind in ("ratings", "rankings")}
    image = measures.training_figure(run, fitted, name="22_training")
    assert image.alt.startswith("Loss curves: ")
    assert image.alt.count("RM from 0.750 to 0.300") == 2
    saved = pd.read_csv(run.folder / "history.csv")
    assert saved["value"].tolist() == steps["loss"] * 2
    assert saved["arm"].unique().tolist() == ["ratings RM", "rankings RM"]


def test_the_calibration_figure_says_where_each_model_begins_and_ends(run):
    bins = pd.DataFrame({"condition": "ratings RM", "predicted": [0.2, 0.8], "value": [0.1, 0.9]})
    bins = bins.assign(low=bins["value"] - 0.1, high=bins["value"] + 0.1)
    image = measures.calibration_figure(run, bins, name="22_calibration")
    assert image.alt.endswith(": ratings RM 0.10 to 0.90")


@pytest.mark.parametrize("missing", [0, 1])
def test_a_judge_of_whom_a_judgement_is_missing_has_no_rows(missing, monkeypatch, capsys):
    """Only the main judge is asked to compare, and only the best of the most responses."""
    pool = choices.shuffled_pool(made_items(2, 4))
    picks = pool[pool["place"] == 1].assign(arm="ratings", seed=11)
    columns = ["id", "arm", "seed", "n", "place", "generator", "sample"]
    picks = pd.concat([picks.assign(n=n) for n in (2, 4)])[columns]
    answered, asked = [], []

    class Stored:
        def __init__(self, model, *, ask):
            self.model = model
            asked.append((model, ask))

    def judge(annotator, picks, pool, *, compare):
        answered.append((annotator.model, compare))
        rows = pool.assign(reference="x", rating=5.0, reference_rating=4.0)
        rows["p_better"] = np.where(compare & (rows["place"] == 1), 0.7, np.nan)
        if annotator.model == "large":
            rows.loc[rows.index[rows["place"] == 1][:missing], "p_better"] = np.nan
        return rows

    monkeypatch.setattr(measures, "LocalAnnotator", Stored)
    monkeypatch.setattr(choices, "judge", judge)
    unit = {"rating": 1.0, "ranking": 1.0}
    judges = {"main": "large", "unseen": "small"}
    worth = measures.judge_choices(judges, picks, pool, unit, ask=False)
    assert asked == [("large", False), ("small", False)]
    assert answered == [("large", True), ("small", False)]
    assert [len(table) for table in worth.values()] == [0 if missing else 4, 4]
    assert list(worth) == ["main", "unseen"] and (worth["unseen"]["rating"] == 1).all()
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"{model}: {n} judgements of 4 choices are missing"
        for model, n in (("large", missing), ("small", 0))
    ]


PASSAGE = "Alba is a town in Nord with {n} people. It has a mill, a lake and {n} bridges."


def made_items(prompts, size):
    rows = [
        {"id": f"p{i}", "instruction": f"Tell {i}.", "input": PASSAGE.format(n=10 + i)}
        | {"response": " ".join(PASSAGE.format(n=10 + i).split()[: 3 + 2 * k]) + "."}
        | {"generator": "g", "sample": k}
        for i in range(prompts)
        for k in range(size)
    ]
    return pd.DataFrame(rows)


def test_annotators_made_by_hand_go_through_the_whole_chain(run):
    ratings = made_items(4, 3)
    pairs = ratings.merge(ratings, on=["id", "instruction", "input"], suffixes=("1", "2"))
    pairs = pairs[pairs["sample1"] < pairs["sample2"]]
    pool = choices.shuffled_pool(made_items(3, 6))
    learner = choices.load_learner("tiny", learning_rate=1e-3, epochs=2)
    table, points = measures.by_hand(run, learner, ratings, pairs, pool, 3)
    assert table["group"].tolist() == [taste for taste in measures.TASTES for _ in range(3)]
    assert set(points["policy"]) == {"base", "ratings RM", "rankings RM"}
    base = points[points["policy"] == "base"]
    assert set(base["points"]) == {50.0}  # the reference against itself
    assert all(f"interaction_points/{taste}" in run.metrics for taste in measures.TASTES)
    image = measures.by_hand_figure(run, table, name="22_by_hand")
    assert all(f"{taste} " in image.alt for taste in measures.TASTES)


def test_arms_and_curve_of_measured_choices(run):
    rows = [
        {"id": f"p{i}", "arm": arm, "seed": seed, "n": n, "rating": 1.0, "ranking": 2.0}
        | {"difference": 1.0, "words": 9, "reference_words": 5}
        | {column: 50.0 + 50 * (i % 2) for column in measures.WINS.values()}
        for i in range(4)
        for arm in choices.ARMS
        for seed in (11, 12)
        for n in (4, 64)
    ]
    table = pd.DataFrame(rows)
    arms = measures.arms_of(run, table, 64)
    assert arms.names == list(choices.ARMS) and len(arms.table) == 24
    wins = measures.win_table(arms, "judge")
    assert wins["value"].unique().tolist() == [75.0] and wins["more words"].unique().tolist() == [
        4.0
    ]
    curve = measures.curve(run, table, 11)
    assert sorted(curve["k"].unique()) == [1, 4, 64] and "control RM" not in set(curve["condition"])
    image = measures.win_figure(run, wins, 64, name="22_win_rates")
    assert image.alt.startswith("ratings RM by rating 75 %; ") and image.alt.count(";") == 5
    image = measures.curve_figure(run, curve, name="22_best_of_n_rating")
    assert image.alt == "Curves: ratings RM ends at 75 %; rankings RM ends at 75 %."
    power = measures.power_table(arms, ("control", "rankings"))
    assert power["seeds"].tolist() == [3, 6, 12]
    assert set(power["smallest"]) == {choices.SMALLEST}
