"""Arms: effects over units and seeds, the rule, the control, power; and that the intervals cover."""

import numpy as np
import pandas as pd
import pytest

from lib import stats
from lib.course import arms as arms_module
from lib.course.arms import Arms
from lib.course.record import Run


@pytest.fixture
def run(tmp_path):
    return Run("10_test", "smoke", 0, tmp_path)


def table(rng, effects, *, seeds=range(11, 15), units=40, noise=0.2):
    """Rows of arms whose units and seeds differ; each arm has its effect added."""
    rows = []
    level = rng.normal(0, 1, units)
    for seed in seeds:
        for arm, effect in effects.items():
            shift = rng.normal(0, noise)
            scores = level + effect + shift + rng.normal(0, noise, units)
            part = {"arm": arm, "seed": seed, "prompt_index": range(units), "score": scores}
            rows.append(pd.DataFrame(part))
    return pd.concat(rows, ignore_index=True)


def filled(run, rng, effects, **options):
    arms = Arms(run)
    arms.with_stored(table(rng, effects, **options))
    return arms


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    for n_seeds in (3, 5, 12):
        hits = 0
        for trial in range(300):
            seeds = rng.normal(0, 0.3, (n_seeds, 1))
            units = rng.normal(0, 0.5, (1, 30))
            cells = 0.4 + seeds + units + rng.normal(0, 0.5, (n_seeds, 30))
            effect = stats.over_units_and_seeds(pd.DataFrame(cells), seed=trial, resamples=400)
            hits += effect.low < 0.4 < effect.high
        assert 0.9 <= hits / 300 <= 0.99, f"{n_seeds} seeds: {hits / 300}"


def test_one_unit_gives_students_interval_over_seeds():
    cells = pd.DataFrame([[0.1], [0.3], [0.2], [0.5]])
    effect = stats.over_units_and_seeds(cells)
    assert (effect.value, effect.low, effect.high) == pytest.approx(stats.t_interval(cells[0])[:3])
    assert (effect.n, effect.seeds) == (1, 4)


def test_one_seed_and_no_rows_say_so():
    one = stats.over_units_and_seeds(pd.DataFrame([[0.1, 0.2, 0.4]]))
    assert one.seeds == 1 and one.low < one.value < one.high
    none = stats.over_units_and_seeds(pd.DataFrame())
    assert none.seeds == 0 and np.isnan(none.value)


def test_missing_units_are_left_out_and_the_rest_counts():
    cells = pd.DataFrame([[1.0, np.nan, 3.0], [1.0, 2.0, np.nan], [np.nan] * 3])
    effect = stats.over_units_and_seeds(cells)
    assert effect.value == pytest.approx(7 / 4) and (effect.n, effect.seeds) == (3, 2)


def test_a_claim_is_decided_by_the_interval_and_the_number_of_seeds(run):
    rng = np.random.default_rng(1)
    arms = filled(run, rng, {"a": 0.0, "b": 1.0, "c": 0.0}, noise=0.1)
    assert (
        arms.claim("b is more", "a", "b", "score", better="higher", smallest=0.5)
        == "same direction"
    )
    assert arms.claim("b is less", "a", "b", "score", better="lower", smallest=0.5) == "opposite"
    level = arms.claim("c is more", "a", "c", "score", better="higher", smallest=0.5)
    assert level == "not demonstrated" and "equal within 0.5" in run.claims[-1].here
    two = filled(run, rng, {"a": 0.0, "b": 1.0}, seeds=(11, 12))
    assert two.claim("b", "a", "b", "score", better="higher", smallest=0.1) == "not demonstrated"
    assert arms.claim("x", "a", "x", "score", better="higher", smallest=1) == "not demonstrated"
    assert run.claims[-1].here == "did not run: x"


def test_a_control_is_taken_away(run):
    arms = filled(run, np.random.default_rng(2), {"start": 0.0, "trained": 1.0, "control": 0.9})
    plain = arms.effect("start", "trained", "score")
    rest = arms.effect("start", "trained", "score", minus=("start", "control"))
    assert rest.value == pytest.approx(plain.value - arms.effect("start", "control", "score").value)
    verdict = arms.claim(
        "training helps", "start", "trained", "score", better="higher", smallest=0.5,
        minus=("start", "control"),
    )  # fmt: skip
    assert "minus control - start" in run.claims[-1].here and verdict != "opposite"


def test_seeds_on_which_settings_were_chosen_do_not_decide(run):
    rng = np.random.default_rng(3)
    tuned = table(rng, {"a": 0.0, "b": 5.0}, seeds=(0, 1, 2))
    arms = Arms(run)
    arms.add(tuned[tuned.seed == 0].drop(columns=["arm", "seed"]), arm="a", seed=0)
    arms.with_stored(pd.concat([tuned, table(rng, {"a": 0.0, "b": 0.0})]))
    effect = arms.effect("a", "b", "score")
    assert effect.seeds == 4 and abs(effect.value) < 1
    only = Arms(run, table=tuned)
    assert only.effect("a", "b", "score").value > 4


def test_live_rows_go_before_stored_ones_of_the_same_arm_and_seed(run):
    rows = pd.DataFrame({"prompt_index": [0, 1], "score": [1.0, 2.0]})
    arms = Arms(run)
    arms.add(rows, arm="a", seed=11)
    arms.with_stored(rows.assign(arm="a", seed=11, score=9.0))
    assert list(arms.table.score) == [1.0, 2.0] and arms.names == ["a"]
    with pytest.raises(ValueError, match="no column 'prompt_index'"):
        arms.add(pd.DataFrame({"score": [1]}), arm="b", seed=11)


def test_effects_become_metrics_and_rows_of_a_plot(run):
    arms = filled(run, np.random.default_rng(4), {"a": 0.0, "b": 1.0})
    rows = arms.effects([("a", "b")], ["score"])
    metric = run.metrics["b - a/score"]
    assert metric["value"] == rows.value[0] and (metric["n"], metric["seeds"]) == (40, 4)
    assert len(rows["by seed"][0].split()) == 4


def test_levels_of_every_arm_become_metrics_and_rows_of_a_plot(run):
    arms = filled(run, np.random.default_rng(7), {"PPO": 0.0, "DPO": 1.0})
    rows = arms.levels(["score"], "here/{arm}/{column}")
    assert rows["group"].tolist() == ["PPO", "DPO"] and rows["n"].tolist() == [40, 40]
    assert (
        rows["value"][1]
        == run.metrics["here/DPO/score"]["value"]
        == arms.level("DPO", "score").value
    )
    assert Arms(run).levels(["score"]).empty


def test_power_says_how_wide_the_interval_will_be(run):
    rng = np.random.default_rng(5)
    tuned = filled(run, rng, {"a": 0.0, "b": 0.3}, seeds=(0, 1, 2), noise=0.3)
    few, many = (
        tuned.power([("a", "b")], ["score"], smallest=0.3, seeds=n).iloc[0] for n in (3, 30)
    )
    assert few["half width"] > many["half width"] and bool(many.enough)
    effect = filled(run, rng, {"a": 0.0, "b": 0.3}, seeds=range(11, 41), noise=0.3)
    found = effect.effect("a", "b", "score")
    assert (found.high - found.low) / 2 == pytest.approx(many["half width"], rel=0.8)


def test_tables_are_split_by_what_the_paper_has_a_figure_of(run):
    words = {"here": "1", "rule": arms_module.RULE, "verdict": "same direction"}
    run.claim("theirs", paper="2 (Table 1)", **words)
    run.claim("ours", paper="", **words)
    assert list(run.closing_table().claim) == ["theirs"]
    assert list(run.other_table().claim) == ["ours"] and run.other_table()["shown?"][0] == "yes"
    assert "why" not in run.other_table()  # nobody gave a reason
    run.claim("ours too", paper="", why="few seeds", **words)
    assert list(run.other_table().why) == ["", "few seeds"]


def test_planned_says_how_many_seeds_are_here_and_whether_they_decide(run, tmp_path, monkeypatch):
    monkeypatch.setenv("FEEDBACK_ROOT", str(tmp_path))
    (tmp_path / "data/results/10_test").mkdir(parents=True)
    (tmp_path / "data/results/10_test/design.json").write_text('{"seeds": [11, 12, 13, 14, 15]}')
    rng = np.random.default_rng(0)
    tuned = filled(run, rng, {"a": 0.0, "b": 0.1}, seeds=[0])
    line = "0 of 5 planned seeds are here; used below: 0. It takes 3: nothing below is decided."
    assert tuned.planned() == line and tuned.resampled("prompts") == "prompts (one seed)"
    two = filled(run, rng, {"a": 0.0, "b": 0.1}, seeds=[0, 11, 12])
    assert two.planned().startswith("2 of 5 planned seeds are here; used below: 11, 12. It takes 3")
    assert two.resampled("prompts") == "prompts and seeds"
    assert two.claim("b", "a", "b", "score", better="higher", smallest=0.01) == "not demonstrated"
    four = filled(run, rng, {"a": 0.0, "b": 0.1}, seeds=[11, 12, 13, 15])
    assert four.planned() == "4 of 5 planned seeds are here; used below: 11, 12, 13, 15."
