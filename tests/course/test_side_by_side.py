"""Several notebooks at a time: the records that each has alone, and an end that leaves nothing behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import nbformat
import psutil
import pytest
from conftest import named
from test_runner import CODE, FINISH, write

from lib.course import notebooks, runner, side_by_side
from lib.course.cli import main

WAITS = "import time\ntime.sleep(600)"
THREADS = "import os, pathlib, torch\nprint('threads', torch.get_num_threads())\n" + FINISH


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty project, from which `lib` can be imported."""
    monkeypatch.setenv("FEEDBACK_ROOT", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(CODE))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return tmp_path


def test_each_notebook_has_the_record_that_it_has_alone(project, monkeypatch, capsys):
    monkeypatch.setattr(side_by_side, "cores", lambda: 1)
    write(project, "10_runs", THREADS)
    write(project, "20_fails", "raise ValueError('too small')")
    write(project, "21_dies", "import os\nos.kill(os.getpid(), 9)")
    write(project, "30_runs", FINISH)
    names = list(notebooks.find_notebooks())
    code, records = runner.run_notebooks(names, "smoke", dict.fromkeys(names, {}), jobs=2)
    states = {record["notebook"]: record["status"] for record in records}
    assert code == 1 and len(records) == 4
    assert states == {name: "finished" if "runs" in name else "failed" for name in names}
    errors = {r["notebook"]: r["error"]["name"] for r in records if r["error"]}
    assert errors == {"20_fails": "ValueError", "21_dies": "DeadKernelError"}
    said = capsys.readouterr().out
    assert [f"[{i}/4]" in said for i in (1, 2, 3, 4)] == [True] * 4
    executed = (project / "runs/smoke/10_runs/executed.ipynb").read_text()
    assert int(re.search(r"threads (\d+)", executed)[1]) >= 1
    again = runner.run_notebooks(["10_runs", "30_runs"], "smoke", dict.fromkeys(names, {}), jobs=2)
    assert again[0] == 0 and {record["status"] for record in again[1]} == {"skipped"}


def test_the_first_begins_then_the_longest(project, monkeypatch):
    minutes = {"00_map": 1, "10_short": 2, "20_long": 9, "30_middle": 5}
    for name, number in minutes.items():
        place = write(project, name, FINISH)
        book = nbformat.read(place, 4)
        row = f"# {name}\n\n| scale | time |\n|---|---|\n| `demo` | about {number} minutes on 2 CPU cores |"
        book.cells.insert(0, nbformat.v4.new_markdown_cell(row))
        nbformat.write(book, place)
    begun = []
    monkeypatch.setattr(side_by_side, "run", lambda run_one, names, jobs: begun.extend(names) or [])
    names = [*minutes]
    runner.run_notebooks(names, "smoke", dict.fromkeys(names, {}), jobs=2)
    assert begun == ["00_map", "20_long", "30_middle", "10_short"]


def test_every_notebook_says_its_minutes():
    read = {name: notebooks.minutes_at_demo(name) for name in notebooks.find_notebooks()}
    assert all(0 < minutes < 15 for minutes in read.values()), read


def start(project, *options):
    """`lib run` of two notebooks that wait, once both kernels are at it; the process and its descendants."""
    for name in ("10_waits", "20_waits"):
        write(project, name, WAITS)
    command = [sys.executable, "-m", "lib", "run", "--scale", "smoke", "--jobs", "2"]
    process = subprocess.Popen(command, cwd=project)
    end, tree = time.time() + 120, []
    while len(named(tree, "ipykernel_launcher")) < 2:
        assert time.time() < end and process.poll() is None
        time.sleep(0.3)
        tree = psutil.Process(process.pid).children(recursive=True)
    time.sleep(3)  # the kernels are in their cells
    return process, tree


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_ends_all_and_every_record_says_so(project, sent):
    process, tree = start(project)
    process.send_signal(sent)
    assert process.wait(90) == 130
    assert not psutil.wait_procs(tree, timeout=30)[1]
    for name in ("10_waits", "20_waits"):
        record = json.loads((project / "runs/smoke" / name / "run.json").read_text())
        assert record["status"] == "interrupted"


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_killed_command_leaves_no_process(project):
    process, tree = start(project)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not psutil.wait_procs(tree, timeout=60)[1]


def test_how_many_fit_is_what_cores_and_memory_allow(monkeypatch):
    monkeypatch.setattr(side_by_side, "cores", lambda: 16)
    for memory, fit in ((4e9, 1), (15e9, 2), (1e12, side_by_side.MOST)):
        total = type("Memory", (), {"total": memory})
        monkeypatch.setattr("psutil.virtual_memory", lambda total=total: total)
        assert side_by_side.fitting() == fit
    monkeypatch.setattr(side_by_side, "cores", lambda: 1)
    assert side_by_side.fitting() == 1


def test_the_command_line_refuses_a_number_below_0(capsys):
    assert main(["run", "--jobs", "-1"]) != 0
    assert "--jobs is -1; allowed: 1 or more" in capsys.readouterr().err
    assert os.environ.get("FEEDBACK_OUT") is None
