"""Reward models choose from a pool and are judged: the control by hand, and the job on a tiny model."""

import numpy as np
import pandas as pd
import pytest

from lib import models, reward_models, runtime
from lib.course import annotators, items
from lib.judge import LocalAnnotator
from lib.papers.sparse_feedback import choices, protocols


def ratings_of(scores):
    rows = [("i", "x", text, score) for text, score in scores.items()]
    return pd.DataFrame(rows, columns=["instruction", "input", "response", "score"])


def rankings_of(verdicts):
    rows = [("i", "x", *pair, verdict) for pair, verdict in verdicts.items()]
    return pd.DataFrame(rows, columns=["instruction", "input", "response1", "response2", "verdict"])


def test_the_control_has_the_contradictions_but_not_where_the_rankings_have_them():
    texts = [f"t{k}" for k in range(40)]
    ratings = ratings_of({text: 7 - k / 10 for k, text in enumerate(texts)})
    pairs = {(a, b): "(a)" for a, b in zip(texts[::2], texts[1::2], strict=True)}
    pairs |= dict.fromkeys(list(pairs)[:5], "(b)")  # contradict the ratings
    rankings = rankings_of(pairs | {("t0", "t9"): "equal", ("t0", "?"): "(a)"})
    controls = [choices.contradicted(ratings, rankings, seed) for seed in (0, 1)]
    for control in controls:
        assert len(control) == 20 and (control["verdict"] == "(b)").sum() == 5
    assert controls[0]["verdict"].tolist() != controls[1]["verdict"].tolist()
    assert controls[0]["verdict"].tolist()[:5] != ["(b)"] * 5
    assert choices.implied(ratings, rankings).tolist()[-1] is None


def test_resampled_feedback_repeats_whole_prompts_and_keeps_pairs_on_their_rows():
    table = pd.concat(
        [
            rankings_of({("a", "b"): "(a)", ("b", "c"): "(b)"}).assign(input=f"x{k}")
            for k in range(9)
        ]
    )
    feedback = reward_models.from_rankings(table, choices.prompt_of)
    drawn = choices.resampled(feedback, 1)
    counts = np.bincount(drawn.group)
    assert (counts == 3).all() and len(counts) == 9 and len(set(drawn.prompts)) < 9
    for better, worse in drawn.pairs:
        assert drawn.group[better] == drawn.group[worse]
        assert (drawn.responses[better], drawn.responses[worse]) in {("a", "b"), ("c", "b")}
    rated = reward_models.from_ratings(
        pd.concat([ratings_of({"a": 1, "b": 7}).assign(input=f"x{k}") for k in range(9)]),
        choices.prompt_of,
    )
    again = choices.resampled(rated, 1)
    assert list(dict.fromkeys(again.prompts)) == list(dict.fromkeys(drawn.prompts))
    assert {(r, float(t)) for r, t in zip(again.responses, again.targets, strict=True)} == {
        ("a", 0.0),
        ("b", 1.0),
    }


def pool_of(n=3, size=8):
    rows = [
        {"id": f"p{i}", "instruction": f"i{i}", "input": f"passage {i}", "response": f"answer {k}"}
        | {"generator": "g", "sample": k}
        for i in range(n)
        for k in range(size)
    ]
    return choices.shuffled_pool(pd.DataFrame(rows))


def test_the_best_of_n_is_among_the_first_n_places_of_a_random_order():
    pool = pool_of()
    assert pool.groupby("id")["place"].apply(list).tolist() == [list(range(8))] * 3
    assert pool[pool["place"] == 0]["sample"].nunique() > 1
    scores = pool["place"].astype(float)
    assert choices.best_of(pool, scores, 4)["place"].tolist() == [3, 3, 3]
    assert choices.best_of(pool, 0 * scores, 8)["place"].tolist() == [0, 0, 0]


class Scores:
    """An annotator whose answers are fixed by the lengths of what it reads."""

    name = "scores"

    def log_probs(self, questions):
        rows = []
        for question in questions:
            n = len(question.options)
            liked = len(question.shared + question.rest) % n
            rows.append([0.0 if k == liked else -1.0 for k in range(n)])
        width = max((len(row) for row in rows), default=0)
        return np.array([row + [np.nan] * (width - len(row)) for row in rows]).reshape(-1, width)


def test_points_against_the_reference_by_hand():
    pool = pool_of(n=1)
    picks = pd.DataFrame({"id": "p0", "place": [0, 3, 5], "arm": list("abc"), "seed": 11, "n": 8})
    judged = choices.judge(Scores(), picks, pool)
    assert sorted(judged["place"]) == [0, 3, 5]
    assert judged.set_index("place")["p_better"][0] == 0.5
    judged["rating"] = judged["place"].map({0: 4.0, 3: 5.0, 5: 3.0})
    judged["reference_rating"], judged["p_better"] = (
        4.0,
        judged["place"].map({0: 0.5, 3: 0.4, 5: 0.9}),
    )
    table = choices.measured(picks, judged, {"rating": 0.5, "ranking": 2.0})
    assert table["rating"].tolist() == [0, 2, -2]
    assert table["wins by rating"].tolist() == [50, 100, 0]
    np.testing.assert_allclose(table["ranking"], [0, -0.2027, 1.0986], atol=1e-4)
    assert table["wins by ranking"].tolist() == [50, 0, 100]
    assert table["difference"].tolist() == (table["ranking"] - table["rating"]).tolist()
    assert table["words"].tolist() == [2, 2, 2]


def test_a_responses_deviation_is_one_by_either_protocol():
    rng = np.random.default_rng(0)
    worth = rng.normal(size=(400, 5))
    rows = [(f"i{i}", "", f"r{k}", 4 + 0.3 * worth[i, k]) for i in range(400) for k in range(5)]
    ratings = pd.DataFrame(rows, columns=["instruction", "input", "response", "score"])
    gap = 0.7 * (worth[:, 0] - worth[:, 1])
    unit = choices.units(ratings, pd.DataFrame({"p_first": 1 / (1 + np.exp(-gap))}))
    assert unit["rating"] == pytest.approx(0.3, rel=0.05)
    assert unit["ranking"] == pytest.approx(0.7, rel=0.1)


WORDS = "1 2 3 4 5 6 7 a b A B ( ) Output Task Answer train tuning test pool word".split()  # noqa: SIM905


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A project of few items, annotated by a tiny model."""
    monkeypatch.setenv("FEEDBACK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(runtime, "project_root", lambda: tmp_path)
    rows = []
    for part, n, size in (("train", 5, 5), ("tuning", 3, 5), ("test", 2, 5), ("pool", 3, 6)):
        for i in range(n):
            for k in range(size):
                row = {"id": f"{part}{i}", "part": part, "generator": "g", "sample": k}
                row |= {"instruction": f"Say {part} {i}.", "input": f"The passage {i} of {part}."}
                rows.append(row | {"response": f"{part} {i} " + "word " * k})
    table = pd.DataFrame(rows)
    monkeypatch.setattr(items, "read_responses", lambda *parts: table[table["part"].isin(parts)])
    monkeypatch.setattr(annotators, "TEACHER", "tiny")
    monkeypatch.setattr(models, "load_policy", lambda name: models.build_tiny_model(words=WORDS))
    backbone = {"name": "tiny", "keep_layers": None}
    monkeypatch.setattr(choices, "BACKBONE", backbone)
    monkeypatch.setattr(choices, "SIZES", (2, 6))
    monkeypatch.setattr(choices, "HEAD", choices.HEAD | {"epochs": 2})
    return tmp_path


def test_the_job_chooses_once_and_asks_all_that_the_notebook_reads(small):
    annotators.judge_items("tiny")
    paths = annotators.judge_choices("tiny")
    assert [path.name for path in paths] == ["choices.csv", "tiny.choices.jsonl.gz"]
    table = choices.read_choices()
    assert set(table["arm"]) == set(choices.ARMS) and set(table["seed"]) == set(choices.SEEDS)
    assert set(table[table["seed"] == choices.SEEDS[-1]]["n"]) == {choices.SIZES[-1]}
    assert set(table[(table["seed"] == 11) & (table["arm"] == "rankings")]["n"]) == set(
        choices.SIZES
    )
    before = choices.path().read_bytes()
    assert [path.name for path in annotators.judge_choices("tiny")] == ["tiny.choices.jsonl.gz"]
    assert choices.path().read_bytes() == before
    silent = LocalAnnotator("tiny", ask=False)
    silent.store = type("Empty", (), {"get_many": lambda self, keys: {}})()
    judged = choices.judge(silent, table, choices.course_pool())
    worth = choices.measured(table, judged, {"rating": 1.0, "ranking": 1.0})
    assert worth["rating"].notna().all()
    assert worth["ranking"].isna().any() and worth["ranking"][worth["n"] == 6].notna().all()
    again = choices.choose(
        choices.load_learner(**choices.BACKBONE, **choices.HEAD),
        *annotators.taught(*choices.TAUGHT, model="tiny"),
        choices.course_pool(),
        sizes=choices.SIZES,
    )
    columns = ["id", "arm", "seed", "n", "place"]
    pd.testing.assert_frame_equal(again[columns], table[columns])


def test_missing_judgements_are_named(small, monkeypatch):
    def rate(annotator, table):
        return table.assign(score=np.nan)

    monkeypatch.setattr(protocols, "judge_ratings", rate)
    monkeypatch.setattr(protocols, "judge_rankings", lambda a, table: table.assign(p_first=0.4))
    with pytest.raises(ValueError, match="25 of .* judgements of tiny are missing"):
        annotators.taught("train", model="tiny")


def test_a_judge_that_does_not_compare_has_no_win_rate_by_ranking():
    pool = pool_of(n=1)
    picks = pd.DataFrame({"id": "p0", "place": [0, 3, 5], "arm": list("abc"), "seed": 11, "n": 8})
    judged = choices.judge(Scores(), picks, pool, compare=False)
    table = choices.measured(picks, judged, {"rating": 0.5, "ranking": 2.0})
    assert table[["rating", "wins by rating"]].notna().all(axis=None)
    assert table[["ranking", "wins by ranking", "difference"]].isna().all(axis=None)
