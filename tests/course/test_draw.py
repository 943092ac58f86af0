"""Figures of arms: those that ran, of the seeds that decide, with an alt text that says what is seen."""

import pandas as pd
import pytest

from lib.course import draw, record
from lib.course.arms import Arms


@pytest.fixture
def arms(tmp_path, monkeypatch):
    """Two arms over eight questions: a tuning seed in which nothing differs, three seeds in which b leads."""
    monkeypatch.setenv("FEEDBACK_RUN_DIR", str(tmp_path))
    arms = Arms(record.start_run("42_x", scale="smoke", seed=0))
    for seed in (0, 11, 12, 13):
        for arm in ("a", "b"):
            f1 = [0.3 + 0.01 * i + 0.2 * (arm == "b" and seed > 0) for i in range(8)]
            rows = pd.DataFrame({"prompt_index": range(8), "f1": f1, "tokens": 7.0})
            arms.add(rows, arm=arm, seed=seed)
    return arms


def test_curves_show_the_seeds_that_decide_in_the_order_asked_for(arms, capsys):
    rows = [
        (arm, seed, step, 0.1 * step * (seed > 0))
        for arm in "ab"
        for seed in (0, 11)
        for step in (0, 5)
    ]
    history = pd.DataFrame(rows, columns=["arm", "seed", "step", "f1"])
    words = {"ylabel": "F1", "title": "Title", "caption": "What it is"}
    draw.curves(arms, history, ["b", "a", "c"], "f1", name="42_one", **words)
    (figure,) = arms.run.figures
    assert figure["alt"] == "Curves over 5 steps: b from 0.00 to 0.50; a from 0.00 to 0.50"
    draw.curves(arms, history, ["c"], "f1", name="42_none", **words)
    assert len(arms.run.figures) == 1 and "none of these arms ran: c" in capsys.readouterr().out


def test_the_alt_text_of_curves_names_the_extremes_that_are_no_ends(arms):
    history = pd.DataFrame({"step": [0, 5, 10, 15], "f1": [0.3, 0.9, 0.1, 0.5]})
    history = history.assign(arm="a", seed=11)
    words = {"ylabel": "F1", "title": "Title", "caption": "What it is"}
    draw.curves(arms, history, ["a"], "f1", name="42_one", **words)
    course = "a from 0.30 to 0.50, lowest 0.10 at step 10, highest 0.90 at step 5"
    assert arms.run.figures[0]["alt"] == f"Curves over 15 steps: {course}"


def test_effects_are_metrics_and_the_alt_text_names_those_that_are_clear(arms, capsys):
    words = {"title": "Title", "caption": "What it is"}
    pairs = [("a", "b"), ("a", "c")]
    draw.effects(arms, pairs, ["f1"], name="42_two", tabled=["tokens"], **words)
    assert arms.run.metrics["b - a/f1"]["value"] == pytest.approx(0.2)
    assert arms.run.metrics["b - a/f1"]["seeds"] == 3 and "b - a/tokens" in arms.run.metrics
    alt = "1 of 1 intervals lie on one side of 0; b - a, f1: +0.20"
    assert [figure["alt"] for figure in arms.run.figures] == [alt]
    draw.effects(arms, [("a", "c")], ["f1"], name="42_none", **words)
    assert "none of these comparisons ran" in capsys.readouterr().out


def test_without_intervals_the_alt_text_names_every_difference(arms):
    arms.table = arms.table[arms.table.seed == 11].assign(unit=0).rename(columns={"unit": "level"})
    arms.unit = "level"
    draw.effects(arms, [("a", "b")], ["f1"], name="42_dots", title="Title", caption="What it is")
    (figure,) = arms.run.figures
    assert figure["alt"] == "Dots without intervals; b - a, f1: +0.20"
