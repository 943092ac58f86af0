"""The rehearsal: counts alone are lowered, the plan knows every notebook, and two notebooks run at `full`."""

import json

import pytest

from lib.course import notebooks, record
from rehearsal import plan, run

OTHERS = ["of another scale"] * 3
SETTINGS = {
    "model": (*OTHERS, "a/b"),
    "models": (*OTHERS, ["a/b", "c/d"]),
    "steps": (*OTHERS, 600),
    "sizes": (*OTHERS, [100, 1000]),
    "rate": (*OTHERS, 1e-5),
    "eight_bit": (*OTHERS, True),
    "warm_up": (*OTHERS, 0),
}


def lowered(monkeypatch, task=None, **counts):
    monkeypatch.setenv("FEEDBACK_COUNTS", json.dumps(counts))
    return record.scale_settings(SETTINGS, "full", task)


def test_counts_are_lowered_and_nothing_else_changes(monkeypatch):
    plain = record.scale_settings(SETTINGS, "full")
    small = lowered(monkeypatch, steps=2, sizes=[4, 8])
    assert small == plain | {"steps": 2, "sizes": [4, 8]}
    assert lowered(monkeypatch, {"steps": 50}, steps=2)["steps"] == 2  # of a task, too


@pytest.mark.parametrize(
    "counts",
    [
        {"model": "c/d"},
        {"models": ["a/b"]},
        {"steps": 601},
        {"steps": 0},
        {"steps": "2"},
        {"steps": 2.0},
        {"steps": True},
        {"sizes": [4]},
        {"sizes": [4, 1001]},
        {"sizes": 4},
        {"rate": 1e-6},
        {"eight_bit": False},
        {"eight_bit": 0},
        {"warm_up": 0},
        {"models": []},
    ],
)
def test_only_whole_numbers_can_be_lowered(monkeypatch, counts):
    with pytest.raises(ValueError, match="only whole numbers above 0 can be lowered"):
        lowered(monkeypatch, **counts)


def test_a_count_of_no_setting_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="'stpes', which is no setting here; there are model"):
        lowered(monkeypatch, stpes=2)


def test_a_rehearsed_result_is_no_other_result(monkeypatch):
    path = next(iter(notebooks.find_notebooks().values()))
    plain = notebooks.fingerprint(path, "full", {})
    monkeypatch.setenv("FEEDBACK_COUNTS", '{"steps": 2}')
    assert notebooks.fingerprint(path, "full", {}) != plain


def test_every_notebook_is_planned_at_every_scale_of_the_plan():
    for scale in plan.scales():
        assert scale in record.SCALES
        parts = plan.parts_of(list(notebooks.find_notebooks()), scale)
        assert {part.notebook for part in parts} == set(notebooks.find_notebooks())
        assert len({(part.notebook, part.variant) for part in parts}) == len(parts)


def test_an_unplanned_notebook_is_refused(capsys, monkeypatch):
    with pytest.raises(notebooks.RequestError, match="no counts for 99_new at full"):
        plan.parts_of(["99_new"], "full")
    assert run.main(["98"]) == 2
    assert "unknown notebook '98'" in capsys.readouterr().err


def test_parameters_may_name_the_environment(monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    part = plan.Part("20", {}, {"BASE_URL": "$OPENAI_BASE_URL", "N": 3})
    assert part.resolved == {"BASE_URL": "http://127.0.0.1:1/v1", "N": 3}
    assert part.variant == "OPENAI_BASE_URL-3"


def test_two_notebooks_run_with_the_settings_of_the_papers(tmp_path, monkeypatch, capsys):
    """A T5 trains on released questions; a GPT-2 is detoxified by Perspective, judged by a classifier."""
    monkeypatch.setattr(run, "FOLDER", tmp_path)
    status = run.main(["40", "43"])
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert printed.count("finished") == 4  # a line and a row each
    for name, model in (("40", "google-t5/t5-large"), ("43", "openai-community/gpt2-large")):
        [folder] = (tmp_path / "full" / "plain").glob(f"{name}_*")
        text = (folder / "executed.ipynb").read_text(encoding="utf-8")
        assert model in text and "rehearsal: counts lowered" in text
        assert json.loads((folder / "results.json").read_text())["scale"] == "full"
    assert run.main(["40"]) == 0  # finished before: not run again
    assert "skipped" in capsys.readouterr().out
