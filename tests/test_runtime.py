"""Seeds, records, caches: what every notebook stands on."""

import json
import re
import subprocess
import sys
import threading

import numpy as np
import pandas as pd
import pytest
import torch

from lib import runtime
from lib.course import record


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("FEEDBACK_RUN_DIR", str(tmp_path / "run"))
    return record.start_run("test", scale="smoke", seed=3)


def test_start_run_refuses_bad_scale_and_seed():
    with pytest.raises(ValueError, match="SCALE is 'big'; allowed: smoke, demo, full"):
        record.start_run("x", scale="big", seed=0)
    for seed in (-1, 1.5, "0", True):
        with pytest.raises(ValueError, match="SEED is"):
            record.start_run("x", scale="smoke", seed=seed)


def test_start_run_seeds_everything(run, tmp_path, monkeypatch):
    first = torch.rand(2), np.random.rand()
    monkeypatch.setenv("FEEDBACK_RUN_DIR", str(tmp_path / "other"))
    record.start_run("test", scale="smoke", seed=3)
    again = torch.rand(2), np.random.rand()
    record.start_run("test", scale="smoke", seed=3)
    assert torch.equal(torch.rand(2), again[0])
    assert np.random.rand() == again[1]
    assert first[0].shape == (2,)


def test_results_json_has_the_agreed_shape(run):
    run.metric("emt", np.float32(0.5), 0.4, float("nan"), n=np.int64(7), seeds=2)
    run.claim("c", paper="p", here="h", rule="r", verdict="not demonstrated", why="w")
    run.finish()
    stored = json.loads((run.folder / "results.json").read_text())
    assert stored["notebook"] == "test" and stored["scale"] == "smoke" and stored["seed"] == 3
    assert stored["metrics"]["emt"] == {"value": 0.5, "low": 0.4, "high": None, "n": 7, "seeds": 2}
    assert stored["claims"][0]["verdict"] == "not demonstrated"
    assert list(run.closing_table()["same direction?"]) == ["not demonstrated"]


def test_unknown_verdict_is_refused(run):
    with pytest.raises(ValueError, match="verdict is 'yes'; allowed: same direction"):
        run.claim("c", paper="p", here="h", rule="r", verdict="yes")


def test_figure_is_written_twice_and_carries_alt_text(run):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots()
    axes.plot([0, 1])
    image = run.save_figure(figure, "line", caption="c", alt="a rising line")
    data, metadata = image._repr_mimebundle_()
    assert metadata["image/png"]["alt"] == "a rising line" and "image/png" in data
    assert (run.folder / "line.png").stat().st_size > 1000
    assert (run.folder / "line.svg").read_text().lstrip().startswith("<?xml")
    assert run.figures == [{"name": "line", "caption": "c", "alt": "a rising line"}]


def test_cached_step_is_made_once_and_again_for_another_key(run):
    calls = []

    def make():
        calls.append(1)
        return pd.DataFrame(
            {"text": ["None", "NA", "1", "a\r\nb", "é", ""], "x": [0.1, 1, 2, 3, 4, 5]}
        )

    first = run.cached("step", make, n=1)
    again = run.cached("step", make, n=1)
    assert len(calls) == 1
    pd.testing.assert_frame_equal(first, again, check_dtype=False)
    run.cached("step", make, n=2)
    assert len(calls) == 2


def test_write_atomic_never_shows_a_part(tmp_path):
    path = tmp_path / "file.txt"
    contents = ["a" * 200_000, "b" * 200_000]
    runtime.write_atomic(path, contents[0])
    seen = set()
    done = threading.Event()

    def read():
        while not done.is_set():
            seen.add(path.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(30):
        runtime.write_atomic(path, contents[i % 2])
    done.set()
    reader.join()
    assert seen <= set(contents)
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_json_is_plain():
    text = runtime.to_json({"a": np.arange(2), "b": torch.tensor(1.5), "c": float("inf"), 1: {2}})
    assert json.loads(text) == {"a": [0, 1], "b": 1.5, "c": None, "1": [2]}


def test_secret_reads_dotenv_and_names_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("FEEDBACK_ROOT", str(tmp_path))
    monkeypatch.delenv("SOME_KEY", raising=False)
    with pytest.raises(ValueError, match="SOME_KEY, which is not set"):
        runtime.secret("SOME_KEY", "The test")
    (tmp_path / ".env").write_text("SOME_KEY=abc\n")
    assert runtime.secret("SOME_KEY", "The test") == "abc"


def test_plain_mode_samples_in_float32(monkeypatch):
    runtime.inference_dtype.cache_clear()
    monkeypatch.setenv("LIB_PLAIN", "1")
    assert runtime.inference_dtype() == torch.float32
    runtime.inference_dtype.cache_clear()


def test_scale_settings_names_what_is_missing():
    with pytest.raises(ValueError, match="no 'full' value for the settings b"):
        record.scale_settings({"a": {"full": 1}, "b": {"demo": 2}}, "full")


def test_stored_tables_are_joined_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("FEEDBACK_ROOT", str(tmp_path))
    folder = tmp_path / "data" / "results" / "11_x" / "demo"
    folder.mkdir(parents=True)
    for seed in (1, 2):
        pd.DataFrame({"seed": [seed]}).to_csv(folder / f"scores-seed{seed}.csv", index=False)
    stored = record.stored_tables("11_x", "demo")
    assert list(stored) == ["scores"] and list(stored["scores"].seed) == [1, 2]
    assert record.stored_tables("11_x", "full") == {}


def test_a_saved_table_comes_back_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setenv("FEEDBACK_ROOT", str(tmp_path))
    folder = tmp_path / "data" / "results" / "11_x" / "demo"
    table = pd.DataFrame(
        {
            "text": ["50%\r100%", "NA", "null", "", "a\r\nb", "1e5"],
            "id": ["007", "7", "8", "9", "10", "11"],
            "score": [0.1 + 0.2, np.nan, 1.0, 2.0, 3.0, 4.0],
            "good": [True, False] * 3,
        }
    )
    run = record.Run("11_x", "demo", 0, folder)
    run.save_table(table, "scores-seed0")
    pd.testing.assert_frame_equal(record.stored_tables("11_x", "demo")["scores"], table)
    first = run.cached("step", lambda: table)
    pd.testing.assert_frame_equal(run.cached("step", lambda: None), first, check_dtype=False)
    assert run.cached("step", lambda: None)["id"].tolist() == table["id"].tolist()
    assert run.cached("none", lambda: table[:0]).columns.tolist() == list(table)


def test_what_ran_here_takes_the_place_of_what_was_kept():
    live = pd.DataFrame({"arm": ["FT", "FT"], "seed": [0, 0], "score": [1.0, 2.0]})
    kept = pd.DataFrame({"arm": ["FT", "FT", "PPO"], "seed": [0, 1, 0], "score": [7.0, 8.0, 9.0]})
    joined = record.with_stored(live, kept)
    assert joined.score.tolist() == [1, 2, 8, 9] and joined.index.tolist() == [0, 1, 2, 3]
    assert record.with_stored(live, kept, keys=("arm",)).score.tolist() == [1, 2, 9]
    for nothing in (None, live.head(0)):
        assert record.with_stored(live, nothing) is live
        assert record.with_stored(nothing, kept) is kept
    assert list(record.with_stored(None, None)) == ["arm", "seed"]


def test_free_memory_releases_a_models_weights():
    layer = torch.nn.Linear(10, 10)
    runtime.free_memory(layer)
    assert layer.weight.device.type == "meta"


def test_troubleshooting_quotes_what_the_code_says():
    root = runtime.project_root()
    sources = [
        *(root / "lib").rglob("*.py"),
        root / "Makefile",
        *(root / "notebooks").glob("*.ipynb"),
    ]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    rows = (root / "TROUBLESHOOTING.md").read_text(encoding="utf-8").splitlines()[4:]
    seen = [text for row in rows for text in re.findall("`([^`]+)`", row.split("|")[1])]
    parts = [part.strip(" ,:") for text in seen for part in text.split("...")]
    assert len(parts) > 15
    assert not [part for part in parts if part not in code]


def test_tables_and_figures_do_without_torch():
    modules = (
        "annotator, chat, course.record, papers.sparse_feedback.sheets, plots, preferences, stats"
    )
    imports = ", ".join(f"lib.{name}" for name in modules.split(", "))
    code = f"import sys, {imports}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
