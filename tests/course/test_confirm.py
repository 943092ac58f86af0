"""`python -m lib confirm`: only committed rules, only fresh seeds, nothing run twice."""

import json
import re
import subprocess

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from lib import tables
from lib.course import confirm, record
from lib.course.cli import main

CELL = """
import pandas as pd
from lib.course import record
run = record.start_run("10_small", scale=SCALE, seed=SEED)
run.stored(settings={"steps": STEPS}, use=USE_STORED)
assert not USE_STORED
if SEED == FAIL: raise RuntimeError("as asked")
run.save_table(pd.DataFrame({"arm": ["a"], "seed": [SEED], "score": [0.5 * SEED]}), "scores")
run.finish()
"""
DESIGN = {
    "seeds": [11, 12], "scale": "smoke", "parameters": {"STEPS": 7}, "tables": ["scores"],
    "rules": ["score rises"],
}  # fmt: skip


def git(root, *arguments):
    subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A checkout with one small notebook and its committed design."""
    monkeypatch.setenv("FEEDBACK_ROOT", str(tmp_path))
    first = new_code_cell(
        'SCALE = "demo"\nSEED = 0\nSTEPS = 1\nUSE_STORED = True\nFAIL = 0',
        metadata={"tags": ["parameters"]},
    )
    book = new_notebook(cells=[new_markdown_cell("# 10 Does it run?"), first, new_code_cell(CELL)])
    (tmp_path / "notebooks").mkdir()
    nbformat.write(book, tmp_path / "notebooks" / "10_small.ipynb")
    (tmp_path / ".gitignore").write_text("runs/\n")
    folder = tmp_path / "data" / "results" / "10_small"
    folder.mkdir(parents=True)
    (folder / "design.json").write_text(json.dumps(DESIGN))
    git(tmp_path, "init", "-q")
    git(tmp_path, "config", "user.email", "a@example.org")
    git(tmp_path, "config", "user.name", "A")
    commit(tmp_path)
    return tmp_path


def commit(root):
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "rules")


def write_design(root, name="design.json", **changes):
    path = root / "data" / "results" / "10_small" / name
    path.write_text(json.dumps(DESIGN | changes))


def test_each_seed_runs_once_and_its_tables_are_found_again(root, capsys):
    assert main(["confirm", "10"]) == 0
    folder = root / "data" / "results" / "10_small"
    made = json.loads((folder / "made.json").read_text())
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True)
    assert list(made) == ["11", "12"] and head.stdout.startswith(made["11"]["rules"])
    assert tables.read_csv(folder / "smoke" / "scores-12.csv.gz").score[0] == 6.0
    packed = (folder / "smoke" / "scores-12.csv.gz").read_bytes()
    assert main(["confirm", "10"]) == 0
    assert "2 of 2 seeds stored" in capsys.readouterr().out
    run = record.Run("10_small", "smoke", 0, root)
    assert list(run.stored(settings={"steps": 7})["scores"].seed) == [11, 12]
    assert run.stored(settings={"steps": 8}) == {}
    assert (folder / "smoke" / "scores-12.csv.gz").read_bytes() == packed


def test_a_failed_seed_is_not_stored_and_runs_again(root, capsys):
    write_design(root, parameters={"STEPS": 7, "FAIL": 12})
    commit(root)
    assert main(["confirm", "10"]) == 1
    folder = root / "data" / "results" / "10_small"
    assert list(json.loads((folder / "made.json").read_text())) == ["11"]
    assert "as asked" in capsys.readouterr().out
    write_design(root)
    commit(root)
    assert main(["confirm", "10"]) == 0
    assert list(json.loads((folder / "made.json").read_text())) == ["11", "12"]


def test_a_second_set_of_runs_stands_apart(root, capsys):
    write_design(root, "design-real.json", seeds=[11], parameters={"STEPS": 3})
    commit(root)
    assert main(["confirm", "10", "--set", "real"]) == 0
    folder = root / "data" / "results" / "10_small"
    assert [path.name for path in folder.glob("made*")] == ["made-real.json"]
    assert main(["confirm", "10"]) == 0
    run = record.Run("10_small", "smoke", 0, root)
    assert list(run.stored(settings={"steps": 7})["scores"].seed) == [11, 12]
    assert list(run.stored("real", settings={"steps": 7}, steps=3)["scores"].seed) == [11]
    assert main(["confirm", "10", "--set", "other"]) == 2
    assert "design-other.json is missing" in capsys.readouterr().err


def test_rules_and_notebook_must_be_committed(root, capsys):
    write_design(root, rules=["score falls"])
    assert main(["confirm", "10"]) == 2
    assert "design.json" in capsys.readouterr().err
    commit(root)
    notebook = root / "notebooks" / "10_small.ipynb"
    notebook.write_text(notebook.read_text().replace("0.5", "0.6"))
    assert main(["confirm", "10"]) == 2
    assert "10_small.ipynb" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seeds": [1, 11]}, r"seeds \[1\] are for tuning"),
        ({"rules": []}, "has no rules"),
        ({"parameters": {"STEP": 3}}, "unknown parameter 'STEP'"),
    ],
)
def test_a_wrong_design_is_refused_in_words(root, changes, message, capsys):
    write_design(root, **changes)
    commit(root)
    assert main(["confirm", "10"]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_design_that_is_missing_or_no_json(root):
    path = root / "data" / "results" / "10_small" / "design.json"
    path.write_text("{")
    with pytest.raises(Exception, match="line 1"):
        confirm.read_design(path)
    path.unlink()
    with pytest.raises(Exception, match="is missing"):
        confirm.read_design(path)
