"""Where results go: beside papermill's output, in a folder that no other run has."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from lib.course import place

ROOT = Path(__file__).parents[2]
SOURCE = """\
from lib.course import record
run = record.start_run("00_tiny", scale="smoke", seed=SEED)
from lib import runtime
for _ in runtime.progress(range(3), label="counting"):
    pass
import time
from pathlib import Path
while UNTIL and not Path(UNTIL).exists():
    time.sleep(0.2)
run.metric("seed", SEED, n=1)
run.finish()
"""


@pytest.fixture
def notebook(tmp_path):
    """A notebook of two cells with the parameters SEED and UNTIL (a file to wait for)."""
    cells = [nbformat.v4.new_code_cell('SEED = 0\nUNTIL = ""'), nbformat.v4.new_code_cell(SOURCE)]
    cells[0].metadata["tags"] = ["parameters"]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    path = tmp_path / "in put" / "tiny.ipynb"
    path.parent.mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)
    return path


def papermill(*words, cwd):
    """Start plain papermill as a user does, from any folder."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment = {k: v for k, v in environment.items() if k not in ("FEEDBACK_HEADLESS", "CI")}
    command = [sys.executable, "-m", "papermill", *map(str, words)]
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def seed_in(folder):
    return json.loads((folder / "results.json").read_text())["metrics"]["seed"]["value"]


def test_plain_papermill_writes_beside_its_output(notebook, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for seed in (1, 2):
        run = papermill(notebook, f"seed {seed}.ipynb", "-p", "SEED", seed, cwd=elsewhere)
        assert run.wait() == 0, run.stdout.read()
    assert seed_in(elsewhere / "seed 1") == 1 and seed_in(elsewhere / "seed 2") == 2
    executed = nbformat.read(elsewhere / "seed 1.ipynb", as_version=4)
    assert not [o for c in executed.cells for o in c.outputs if o.output_type == "stream"]


def test_two_runs_at_once_never_share_a_folder(notebook, tmp_path):
    signal = tmp_path / "the second is done"
    first = papermill(
        notebook, tmp_path / "out.ipynb", "-p", "SEED", 1, "-p", "UNTIL", signal, cwd=tmp_path
    )
    while not (tmp_path / "out" / ".lock").exists():
        time.sleep(0.2)
        assert first.poll() is None
    second = papermill(notebook, tmp_path / "out.ipynb", "-p", "SEED", 2, cwd=tmp_path)
    assert second.wait() == 0
    signal.touch()
    assert first.wait() == 0
    assert seed_in(tmp_path / "out") == 1 and seed_in(tmp_path / "out-2") == 2


@pytest.mark.parametrize(
    "words, output",
    [
        (["/x/bin/papermill", "a.ipynb", "b/c.ipynb", "-p", "SEED", "3"], "b/c.ipynb"),
        (["python", "-m", "papermill", "-k", "python3", "a.ipynb", "c.ipynb"], "c.ipynb"),
        (
            ["python", "/x/papermill", "--cwd", "/tmp", "a.ipynb", "c.ipynb", "-y", "a: 1"],
            "c.ipynb",
        ),
        (["python", "/x/papermill", "a.ipynb", "s3://bucket/c.ipynb"], None),
        (["python", "/x/papermill", "a.ipynb", "-"], None),
        (["python", "-m", "jupyterlab"], None),
        (["bash"], None),
    ],
)
def test_the_output_is_read_from_the_command_line(words, output):
    assert place.output_argument(words) == output
