"""Notebook 41's measures on questions that a model has not seen, and its two figures."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from lib import reward_models, runtime
from lib.papers.fine_grained import figures, unseen
from lib.papers.fine_grained import models as fine_grained
from lib.papers.fine_grained import schema as qa
from lib.reward_models import Feedback, TrainConfig


def judged(n=200, seed=0, shift=1.0):
    """Segments of 40 records in five folds; a wrong one scores lower by `shift`."""
    rng = np.random.default_rng(seed)
    wrong = (rng.random(n) < 0.3).astype(float)
    score = rng.normal(size=n) - shift * wrong
    table = pd.DataFrame({"wrong": wrong, "score": score, "record": np.arange(n) % 40})
    table = table.assign(fold=table.record % 5, segment=np.arange(n), kind="whole", seed=0)
    return table.assign(model="R1", margin=margins(table))


def margins(table):
    """Scores minus the threshold that is best on the other folds."""
    limits = {}
    for fold in table.fold.unique():
        others = table[table.fold != fold]
        limits[fold] = unseen.best_threshold(others.wrong.to_numpy(), others.score.to_numpy())
    return table.score - np.nextafter(table.fold.map(limits), np.inf)


def test_auc_counts_pairs_and_half_of_the_ties():
    wrong, score = np.array([1.0, 0, 1, 0, 0]), np.array([-2.0, 0.5, 0.7, 1.5, 0.7])
    assert unseen.auc(wrong, score) == pytest.approx((3 + 1 + 0.5) / 6)
    assert unseen.auc(wrong, 10 * score + 3) == unseen.auc(wrong, score)
    assert np.isnan(unseen.auc(np.ones(3), np.arange(3.0)))


def test_the_best_threshold_is_the_best_of_all_cuts():
    table = judged(60)
    wrong, score = table.wrong.to_numpy(), table.score.to_numpy()
    best = unseen.best_threshold(wrong, score)
    levels = [unseen.f1(wrong, score - np.nextafter(cut, np.inf)) for cut in score]
    assert unseen.f1(wrong, score - np.nextafter(best, np.inf)) == max(levels)


def test_scores_of_two_trainings_are_not_compared():
    wrong, score = np.array([1.0, 0, 1, 0]), np.array([0.0, 1, 10, 11])
    assert unseen.auc(wrong, score) == 0.75
    assert unseen.auc_within(wrong, score, np.array([0, 0, 1, 1])) == 1.0
    assert unseen.auc_within(wrong, score, np.arange(4) // 3) == pytest.approx(
        0.5
    )  # fine: one pair
    assert np.isnan(unseen.auc_within(np.ones(4), score, np.zeros(4)))


@pytest.fixture(scope="module")
def learned():
    """A model, its features, and marked records that it learns from, in three folds."""
    path = runtime.project_root() / "data" / "samples" / "passages.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    records = fine_grained.constructed_records([(x["title"], x["post"]) for x in lines][:15])
    backbone, words = reward_models.load_backbone("tiny-encoder-decoder")
    model = fine_grained.FineGrainedModel(backbone.requires_grad_(False), words, unit="sentence")
    feedback = fine_grained.feedback_for("R2", records)
    features = model.features(feedback.prompts, feedback.responses)
    return model, feedback, features, np.arange(15) % 3


def test_a_threshold_knows_nothing_of_its_own_fold(learned):
    model, feedback, features, folds = learned
    options = {"config": TrainConfig(epochs=3, learning_rate=1e-2), "features": features}
    before = unseen.thresholds(model, feedback, feedback.labels, folds, **options)
    inside = folds[feedback.row] == 2
    labels = np.where(inside, 1 - feedback.labels, feedback.labels)
    turned = replace(feedback, labels=labels)
    after = unseen.thresholds(model, turned, labels, folds, **options)
    assert after[2] == before[2] and after[0] != before[0] and after[1] != before[1]
    assert not model.head.weight.any()  # the model is given back untrained


def test_every_known_segment_has_its_score_and_its_folds_threshold(learned):
    model, feedback, features, _ = learned
    config = TrainConfig(epochs=1, learning_rate=1e-2)
    kinds = ("whole", "balanced")
    how = {"seeds": [0, 1], "n_folds": 3, "features": features}
    trainings = list(unseen.runs(lambda: model, feedback, kinds, config, **how))
    table = unseen.segment_table(feedback, trainings)
    known = ~np.isnan(feedback.labels)
    assert len(table) == 4 * known.sum() and (table.score.notna()).all()
    rows = table[(table.kind == "whole") & (table.seed == 1)]
    (training,) = [t for t in trainings if (t.kind, t.seed) == ("whole", 1)]
    np.testing.assert_array_equal(rows.score, np.concatenate(training.scores)[known])
    limits = rows.fold.map(training.thresholds)
    assert ((rows.margin < 0) == (rows.score <= limits)).all()
    assert table[table.kind == "balanced"].margin.isna().all()


def test_a_chosen_threshold_gains_nothing_where_scores_know_nothing():
    gain = unseen.MEASURES["gain in F1, chosen threshold"][1]
    gains = [gain(t.wrong, t.margin) for t in (judged(seed=s, shift=0.0) for s in range(20))]
    strong = judged(shift=2.0)
    assert np.mean(gains) < 0 < gain(strong.wrong, strong.margin)


def test_results_name_every_measure_with_its_records():
    results = unseen.segment_results(judged(), seed=0).set_index("measure")
    assert list(results.index) == list(unseen.MEASURES) and (results.n == 40).all()
    assert results.value["AUC"] > 0.6 and results.low["AUC"] < results.value["AUC"]


def test_a_kind_without_thresholds_has_no_measure_of_them():
    results = unseen.segment_results(judged().assign(margin=np.nan), seed=0)
    assert set(results.measure) == {m for m in unseen.MEASURES if "threshold" not in m}


def test_the_plan_counts_every_fit():
    records = qa.load_feedback(runtime.project_root() / "data" / "samples" / "qa_feedback.json")
    settings = {"folds": 3, "seeds": 2, "epochs": 1, "max_length": 100}
    plan = unseen.plan({"R1": records, "R2": [], "R3": records}, settings).set_index("model")
    # 4 kinds, 2 seeds, 3 folds; 2 kinds, 2 seeds, 3 pairs of folds; all records
    assert plan.fits.to_dict() == {"R1": 24 + 12 + 1, "R3": 2 * 2 * 3 + 1}


def test_halves_are_compared_on_the_same_segments():
    table = pd.concat(
        [judged(), judged(shift=3.0).assign(kind="relations only")], ignore_index=True
    )
    (row,) = unseen.differences(table, [("whole", "relations only")], seed=0).itertuples()
    right = [((t.score < 0) == (t.wrong == 1)).mean() for _, t in table.groupby("kind", sort=False)]
    assert row.difference == "relations only - whole"
    assert row.value == pytest.approx(right[1] - right[0]) and row.n == 40


def test_one_half_sets_the_other_to_zero_and_keeps_missing_rows():
    rows = torch.ones(2, 5 + fine_grained.RELATIONS)
    rows[1] = torch.nan
    states, relations = (unseen.one_half([rows], kind)[0] for kind in unseen.HALVES)
    assert states[0].sum() == 5 and relations[0].sum() == fine_grained.RELATIONS
    assert states[1].isnan().all() and unseen.one_half([rows], "whole")[0] is rows


def test_pairs_are_ordered_beside_the_longer_answer():
    answers = ["one two three", "one", "a b", "a b"]
    feedback = Feedback(
        ["q"] * 4, answers, np.zeros(4, int), pairs=np.array([[0, 1], [2, 3], [1, 2]])
    )
    scores = [np.array([x]) for x in (0.0, 1.0, 2.0, 1.0)]
    trainings = [unseen.Training("whole", seed, np.zeros(4), scores) for seed in (0, 1)]
    table = unseen.pair_table(feedback, np.array([7, 7, 8, 8]), trainings, seed=0)
    value = table.groupby(["kind", "seed"]).value.apply(list)
    assert value["longer", 0] == [1.0, 0.5, 0.0] and value["whole", 1] == [0.0, 1.0, 0.0]
    table = table.assign(model="R3")
    table["gain"] = unseen.gain_over_longer(table)
    gains = unseen.pair_results(table, "gain", seed=0).set_index("condition")
    assert gains.value["longer"] == 0 and gains.value["whole"] == pytest.approx(-0.5 / 3)
    assert gains.seeds["whole"] == 2 and gains.n["whole"] == 2
    other = table.assign(model="preference", gain=table.gain - 1)
    both = pd.concat([table, other])
    easier, each = unseen.gain_of_r3(both[both.kind == "whole"], seed=0)
    assert easier.value == pytest.approx(1.0) and each == pytest.approx([1.0, 1.0])


def test_overlap_counts_runs_of_words_and_sentences():
    passages = [("Lake", "The lake is old. Cats sat there.")]
    prompt = qa.prompt("What is old?", passages)
    row, empty = unseen.overlap_numbers([prompt] * 2, ["the lake is deep", ""])
    expected = [
        3 / 4,
        np.log(4),
        2 / 3,
        np.log(3),
        1 / 2,
        np.log(2),
        np.log(2),
        1 / 4,
        np.log(5),
        1,
    ]
    np.testing.assert_allclose(row, expected)  # of "question: What is old" it has "is"
    assert not empty.any()
    feedback = Feedback([prompt], ["the lake is deep"], np.zeros(1, int))
    (features,) = unseen.overlap_features(feedback, 30)
    assert features.shape == (1, 30) and not features[0, 10:].any()
    np.testing.assert_allclose(features[0, :10], expected, rtol=1e-6)


def test_a_marked_text_has_its_rows_and_leaves_the_unknown_grey():
    rows = [("people", "Her workshop burned.", np.nan, "[unknown]"), ("people", "Six.", -1.0, "[wrong]"),
            ("R2", "Her workshop burned.", 0.4, "[0.70]")]  # fmt: skip
    table = pd.DataFrame(rows, columns=["row", "piece", "value", "note"])
    axes = figures.marked_text(table, title="t", label="l").axes[0]
    words = [text.get_text() for text in axes.texts]
    assert words.count("people") == 1 and "R2" in words and "[unknown]" in words
    grey, wrong = axes.patches[0].get_facecolor(), axes.patches[4].get_facecolor()
    assert grey[:3] == (0.88, 0.88, 0.88) and wrong[0] > wrong[2]


def test_roc_curves_rise_from_nothing_to_all():
    table = judged()
    axes = figures.roc_curves(table, title="t").axes[0]
    x, y = axes.lines[0].get_data()
    assert (np.diff(x) >= 0).all() and (np.diff(y) >= 0).all() and x[-1] == y[-1] == 1
    area = np.sum(np.diff(np.r_[0, x]) * np.asarray(y))
    assert area == pytest.approx(
        unseen.auc(table.wrong.to_numpy(), table.score.to_numpy()), abs=0.01
    )
