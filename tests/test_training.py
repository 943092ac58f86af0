"""Seeds by key, learning rates, checkpoints that a kill cannot break, a history on disk as it goes."""

import errno
import importlib.util
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from lib import training

ROOT = Path(__file__).parents[1]


# --- random numbers and rates --------------------------------------------------------------------


def test_a_seed_depends_on_its_key_alone():
    assert training.seed_for(0, "sample", 3) == training.seed_for(0, "sample", 3)
    seeds = {training.seed_for(seed, name, 3) for seed in (0, 1) for name in ("sample", "mix")}
    assert len(seeds) == 4 and all(0 <= seed < 2**32 for seed in seeds)
    first = torch.rand(3, generator=training.generator_for(0, "sample", 3))
    torch.rand(5)  # what was drawn before does not matter
    assert torch.equal(first, torch.rand(3, generator=training.generator_for(0, "sample", 3)))


def test_laps_hold_every_number_once_whatever_the_turns():
    whole = training.laps(range(25), 10, 0, "order")
    assert sorted(whole[:10]) == sorted(whole[10:20]) == list(range(10))
    assert whole[:10] != whole[10:20]
    parts = [training.laps(range(i, i + 5), 10, 0, "order") for i in range(0, 25, 5)]
    assert sum(parts, []) == whole


def test_the_rate_rises_stays_or_falls():
    rise = [training.rate_share(done, 10, warmup=4) for done in range(6)]
    assert rise == [0.25, 0.5, 0.75, 1, 1, 1]
    fall = [training.rate_share(done, 10, warmup=2, decay=True) for done in range(10)]
    assert fall == [0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([{"params": [parameter], "lr": 1.0, "peak": 0.4}])
    training.set_rates(optimizer, 0.5)
    assert optimizer.param_groups[0]["lr"] == 0.2


def test_what_is_not_finite_names_its_place():
    training.check_finite({"loss": 1.0}, "step 1", "")
    with pytest.raises(FloatingPointError, match="step 3, minibatch 2: not finite.*Lower it"):
        training.check_finite({"loss": math.nan, "norm": 1.0}, "step 3, minibatch 2", "Lower it.")


def test_the_best_weights_are_those_of_the_highest_value():
    best, weight = training.Best(), torch.nn.Parameter(torch.zeros(2))
    for step, value in enumerate((1.0, 3.0, 3.0, 2.0)):
        with torch.no_grad():
            weight.fill_(step)
        best.offer(step, value, {"w": weight})
    assert best.step == 1 and best.value == 3.0
    training.copy_weights(best.weights, {"w": weight})
    assert weight.tolist() == [1, 1]


# --- checkpoints ---------------------------------------------------------------------------------


def an_optimizer(steps=2):
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([{"params": [parameter], "lr": 0.1, "peak": 0.1}])
    for _ in range(steps):
        parameter.grad = torch.ones(3)
        optimizer.step()
    return parameter, optimizer


def test_a_checkpoint_comes_back_bit_by_bit(tmp_path):
    parameter, optimizer = an_optimizer()
    state = {"beta": 0.1 + 0.2, "history": [{"step": 1, "kl": math.nan}], "stopped": None}
    tensors = {"weights": {"w": parameter}, "best": {"w": torch.ones(4, 2).T.bfloat16()}}
    training.save_checkpoint(tmp_path, 7, state, tensors, optimizer.state_dict())
    found = training.load_checkpoint(tmp_path)
    assert found.step == 7 and found.state["beta"] == 0.1 + 0.2 and found.state["stopped"] is None
    assert math.isnan(found.state["history"][0]["kl"])
    assert torch.equal(found.tensors["weights"]["w"], parameter)
    assert found.tensors["best"]["w"].dtype == torch.bfloat16
    other = an_optimizer(steps=0)[1]
    other.load_state_dict(found.optimizer)
    moments = [next(iter(o.state_dict()["state"].values())) for o in (optimizer, other)]
    assert torch.equal(moments[0]["exp_avg"], moments[1]["exp_avg"])
    assert other.param_groups[0]["peak"] == 0.1


def test_only_the_newest_checkpoint_stays(tmp_path):
    assert training.load_checkpoint(tmp_path) is None
    (tmp_path / ".checkpoint-left-by-a-kill").mkdir()
    for step in (2, 10, 100):
        training.save_checkpoint(tmp_path, step, {"at": step}, {})
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoint-000100"]
    assert training.load_checkpoint(tmp_path).state == {"at": 100}
    (tmp_path / "checkpoint-1000000").mkdir()
    assert training.newest_checkpoint(tmp_path).name == "checkpoint-1000000"


def test_a_checkpoint_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_sync", lambda path: shutil.rmtree(path.parent))
    with pytest.raises(RuntimeError, match="another process trains into"):
        training.save_checkpoint(tmp_path, 1, {}, {})

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(training, "_sync", full)
    with pytest.raises(OSError, match="No space left"):
        training.save_checkpoint(tmp_path, 1, {}, {})
    assert not [*tmp_path.iterdir()]


KILLED_WHILE_SAVING = """
import os, signal, sys
import torch
from lib import training

training.save_checkpoint(sys.argv[1], 1, {"at": 1}, {"weights": {"w": torch.ones(2)}})
save, torch.save = torch.save, lambda *_: os.kill(os.getpid(), signal.SIGKILL)
training.save_checkpoint(sys.argv[1], 2, {"at": 2}, {"weights": {"w": torch.zeros(2)}}, {})
"""


def test_a_kill_while_saving_leaves_the_checkpoint_before(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", KILLED_WHILE_SAVING, str(tmp_path)]
    killed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    found = training.load_checkpoint(tmp_path)
    assert found.state == {"at": 1} and found.tensors["weights"]["w"].tolist() == [1, 1]


def test_a_folder_belongs_to_one_run(tmp_path):
    training.claim_folder(tmp_path / "run", "PPO", {"lr": 1})
    training.claim_folder(tmp_path / "run", "PPO", {"lr": 1})
    with pytest.raises(ValueError, match="other settings or data"):
        training.claim_folder(tmp_path / "run", "PPO", {"lr": 2})


# --- history -------------------------------------------------------------------------------------


def test_the_history_is_on_disk_after_every_row(tmp_path):
    history = training.History("PPO", tmp_path)
    history.add({"step": 1, "reward": 0.5})
    assert pd.read_csv(tmp_path / "history.csv").to_dict("records") == [{"step": 1, "reward": 0.5}]
    history.add({"step": 2, "reward": 0.7, "held_out_reward": 0.1})
    table = pd.read_csv(tmp_path / "history.csv")
    assert list(table) == ["step", "reward", "held_out_reward"] and len(table) == 2
    pd.testing.assert_frame_equal(table, history.frame())
    history.add({"step": 2, "reward": 0.8})  # the same step again
    history.add({"step": 3, "reward": 0.9})
    table = pd.read_csv(tmp_path / "history.csv")
    assert table["reward"].tolist() == [0.5, 0.8, 0.9] and len(history) == 3
    pd.testing.assert_frame_equal(table, history.frame())
    # a killed run goes on from its checkpoint's rows: what came after is dropped and comes again
    again = training.History("PPO", tmp_path, rows=history.rows[:1])
    assert len(pd.read_csv(tmp_path / "history.csv")) == len(again) == 1


def test_no_folder_and_other_processes_write_no_file(tmp_path):
    training.History("PPO").add({"step": 1})
    training.History("PPO", tmp_path, writes=False).add({"step": 1})
    assert not list(tmp_path.iterdir())


def test_a_reporter_that_cannot_be_had_is_told_before_training(monkeypatch):
    monkeypatch.setenv("REPORT_TO", "mlflow")
    with pytest.raises(ValueError, match="allowed: trackio, wandb, tensorboard"):
        training.History("PPO")
    monkeypatch.setenv("REPORT_TO", "wandb")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install wandb"):
        training.History("PPO")
    monkeypatch.setenv("REPORT_TO", "none")
    training.History("PPO")


def report(folder, monkeypatch, name):
    """Two runs in one folder, the second of which continues the first."""
    monkeypatch.setenv("REPORT_TO", name)
    history = training.History("PPO run", folder, {"lr": 0.1})
    for step in (1, 2, 3):
        history.add({"step": step, "reward": step / 2, "value_only": False, "note": "no number"})
    history.close()
    history = training.History("PPO run", folder, {"lr": 0.1}, rows=history.rows[:2])
    history.add({"step": 3, "reward": 1.5})
    history.add({"step": 4, "reward": 2.0})
    history.close()


def test_rows_are_reported_to_tensorboard(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report(tmp_path, monkeypatch, "tensorboard")
    (run,) = (tmp_path / "tensorboard").iterdir()  # one name for both
    events = EventAccumulator(str(run)).Reload()
    last = {event.step: event.value for event in events.Scalars("reward")}
    assert last == {1: 0.5, 2: 1.0, 3: 1.5, 4: 2.0}


def test_rows_are_reported_to_trackio(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    trackio = pytest.importorskip("trackio")
    report(tmp_path, monkeypatch, "trackio")
    (run,) = trackio.Api().runs(training.PROJECT)
    assert run.name.startswith("PPO-run-")


def test_rows_are_reported_to_wandb(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    report(tmp_path, monkeypatch, "wandb")
    mark = (tmp_path / "report_id.txt").read_text()
    runs = [path for path in (tmp_path / "wandb").glob("offline-run-*") if path.is_dir()]
    assert runs and all(path.name.endswith(mark) for path in runs)


def test_a_state_that_json_cannot_hold_is_no_checkpoint(tmp_path):
    with pytest.raises(TypeError):
        training.save_checkpoint(tmp_path, 1, {"model": object()}, {})
    assert training.load_checkpoint(tmp_path) is None
