"""A notebook on several processes: what it gives, who writes, and how it ends where one fails."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import named
from test_runner import CODE, PARAMETERS, write

from lib.course import notebooks, ranks, runner, together
from lib.course.cli import main

TRAIN = """
import os
import pandas as pd
from lib import models, processes, sft
from lib.course import record

run = record.start_run("10_shared", scale=SCALE, seed=SEED)
model, tokenizer = models.load_policy("tiny")
prompts = [f"{word} {word}" for word in "the cat a dog sat".split()]
rows = sft.encode_completions(tokenizer, prompts, prompts[::-1])
history = sft.train_sft(
    model, tokenizer, rows, per_device_train_batch_size=2, max_steps=3, learning_rate=1e-2
)
"""
KEEP = """
made = run.cached("made", lambda: pd.DataFrame({"rank": [int(os.environ.get("RANK", 0))], "n": N}))
run.save_table(made, "made")
run.metric("loss", float(history.loss.iloc[-1]))
run.metric("processes", processes.world())
run.finish()
print("process", os.environ.get("RANK"))
"""
FAILS = """
import os, time
if os.environ["RANK"] == "1":
    raise MemoryError("none is left here")
time.sleep(600)
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with a notebook that trains, and one of whose processes the second fails."""
    monkeypatch.setenv("FEEDBACK_ROOT", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(CODE))
    write(tmp_path, "10_shared", TRAIN, KEEP)
    write(tmp_path, "20_fails", FAILS)
    return tmp_path


def run(name, **options):
    return runner.run_notebook(name, "smoke", {"N": 5}, force=False, label=name, **options)


def test_two_processes_give_what_one_gives_and_the_first_writes(project, monkeypatch):
    results = {}
    for processes in (1, 2):
        monkeypatch.setenv("FEEDBACK_OUT", str(project / f"out-{processes}"))
        record = run("10_shared", processes=processes)
        folder = notebooks.run_folder("10_shared", "smoke")
        assert record["status"] == "finished" and record["processes"] == processes, record["error"]
        results[processes] = json.loads((folder / "results.json").read_text())["metrics"]
        assert (folder / "made.csv").read_text().split() == ["rank,n", "0,5"]
    assert results[2]["processes"]["value"] == 2
    assert results[2]["loss"]["value"] == pytest.approx(results[1]["loss"]["value"], abs=1e-4)
    assert "process 1" in (folder / "process-1.txt").read_text()
    again = run("10_shared", processes=2)
    assert again["status"] == "skipped"


def test_where_one_process_fails_all_end_and_its_words_are_shown(project):
    began = time.time()
    record = run("20_fails", processes=2)
    assert record["status"] == "failed" and time.time() - began < 120
    assert record["error"]["name"] == "ProcessFailed"
    assert record["error"]["message"].rstrip().endswith("MemoryError: none is left here")
    assert "process 1 ended with 1" in record["error"]["message"]


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_runner_that_is_killed_takes_the_others_with_it(project):
    write(project, "30_waits", "import time\ntime.sleep(600)")
    command = [sys.executable, "-m", "lib", "run", "30", "--scale", "smoke", "--processes", "2"]
    started = subprocess.Popen(command, cwd=project, env={**os.environ, "FEEDBACK_OUT": "out"})
    tree: list[psutil.Process] = []
    end = time.time() + 120
    while not named(tree, "lib.course.ranks"):
        assert time.time() < end and started.poll() is None
        tree = psutil.Process(started.pid).children(recursive=True)
        time.sleep(0.2)
    started.send_signal(signal.SIGKILL)
    started.wait()
    _, alive = psutil.wait_procs(tree, timeout=60)
    assert not alive


@pytest.mark.parametrize("gpus, asked, allowed", [(0, 0, "1 or more"), (2, 3, "1 to 2, the GPUs")])
def test_what_cannot_be_is_refused(monkeypatch, gpus, asked, allowed):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    with pytest.raises(ValueError, match=f"--processes is {asked}; allowed: {allowed}"):
        ranks.check(asked)
    ranks.check(gpus or 7)


@pytest.mark.parametrize("gpus, processes", [(0, 2), (2, 1)])
def test_shards_need_gpus_and_processes(monkeypatch, gpus, processes):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    with pytest.raises(ValueError, match=f"--shards with --processes {processes} and {gpus} GPUs"):
        ranks.check(processes, shards=True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    ranks.check(2, shards=True)


def test_the_command_line_says_so(capsys):
    assert main(["run", "00", "--processes", "0"]) != 0
    assert "--processes is 0" in capsys.readouterr().err
    assert main(["run", "00", "--processes", "2", "--shards"]) != 0
    assert "--shards with --processes 2" in capsys.readouterr().err


def test_alone_nothing_is_started_or_set(tmp_path):
    others = ranks.Others(1)
    others.start(tmp_path / "none.ipynb", {}, tmp_path, {})
    assert others.environment(0) == {} and others.started == [] and others.failure() == ""
    assert together.is_first() and not together.several()
    assert PARAMETERS and not together.is_there(tmp_path / "none")
