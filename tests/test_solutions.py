"""Solutions of the exercises: one notebook a lesson, source only, each runs alone at smoke, offline."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
LESSONS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SOLUTIONS = sorted((ROOT / "notebooks" / "solutions").glob("*.ipynb"))
PRIVATE = re.compile(r"/(?:root|tmp|home|work)/[\w.]+|sk-[A-Za-z0-9]{16,}|hf_[A-Za-z0-9]{16,}")
LINK = re.compile(r"\]\(solutions/(\w+)\.ipynb\)")
each_solution = pytest.mark.parametrize("path", SOLUTIONS, ids=lambda p: p.stem)


def text_of(path):
    return "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells)


def test_every_lesson_that_names_solutions_has_them_and_every_solution_is_named_by_its_lesson():
    named = {(path.stem, name) for path in LESSONS for name in LINK.findall(text_of(path))}
    assert all(lesson == name for lesson, name in named), named
    assert {name for _, name in named} == {path.stem for path in SOLUTIONS}


@each_solution
def test_form(path):
    """Source only, narrow, no private path, and a way back to the lesson."""
    book = nbformat.read(path, as_version=4)
    assert book.metadata.kernelspec.name == "python3"
    assert f"](../{path.name})" in text_of(path)
    assert not PRIVATE.search(path.read_text(encoding="utf-8"))
    for cell in book.cells:
        lines = cell.source.splitlines()
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None, "clear the outputs"
            assert len(lines) <= 30 and all(len(line) <= 88 for line in lines), cell.source


@each_solution
def test_runs_alone_at_smoke_without_a_network(path, tmp_path, cpu_seconds):
    environment = os.environ | {
        "FEEDBACK_CACHE": str(tmp_path / "cache"), "FEEDBACK_RUN_DIR": str(tmp_path / "run"),
        "PYTHONPATH": str(ROOT), "PIP_NO_INDEX": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    executed = tmp_path / "executed.ipynb"
    command = [sys.executable, "-m", "papermill", path, executed, "-p", "SCALE", "smoke"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    book = nbformat.read(executed, as_version=4)
    assert cpu_seconds() < 120  # promised: a minute of two cores that do nothing else
    assert any(cell.get("outputs") for cell in book.cells), "a solution shows its result"


def test_tools_look_at_solutions_too():
    """`make lint` checks them for what must not be committed; ruff finds them by itself."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    line = next(line for line in makefile.splitlines() if "nbstripout" in line)
    assert "$(wildcard notebooks/*.ipynb notebooks/solutions/*.ipynb)" in line
    for path in SOLUTIONS:
        files = subprocess.run(
            [sys.executable, "-m", "ruff", "check", "--show-files", str(path)],
            capture_output=True, text=True, cwd=ROOT,
        )  # fmt: skip
        assert path.name in files.stdout
