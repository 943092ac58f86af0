"""Seeds, records, caches: what every notebook stands on."""

import ast
import errno
import json
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

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
    with pytest.raises(ValueError, match="SCALE is 'big'; allowed: smoke, demo, gpu, full"):
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


def test_what_could_not_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(runtime.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        runtime.write_atomic(tmp_path / "file.txt", "a")
    assert not [*tmp_path.iterdir()]


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
    monkeypatch.setenv("SOME_KEY", " abc\r\n")
    assert runtime.secret("SOME_KEY", "The test") == "abc"
    for damaged in ("“abc”", "a b", "a\nb"):
        monkeypatch.setenv("SOME_KEY", damaged)
        with pytest.raises(ValueError, match="SOME_KEY holds a space") as caught:
            runtime.secret("SOME_KEY", "The test")
        assert damaged not in str(caught.value)


def test_plain_mode_samples_in_float32(monkeypatch):
    monkeypatch.delenv("LIB_DTYPE", raising=False)
    monkeypatch.setenv("LIB_PLAIN", "1")
    assert runtime.inference_dtype() == torch.float32


def test_the_number_type_is_chosen_by_what_the_machine_is_or_by_a_setting(monkeypatch):
    monkeypatch.delenv("LIB_DTYPE", raising=False)
    monkeypatch.delenv("LIB_PLAIN", raising=False)
    cpu, card = torch.device("cpu"), torch.device("cuda")
    for flags, known in ((["amx_bf16"], True), (["avx512_bf16"], True), (["avx512f"], False)):
        monkeypatch.setattr(runtime, "cpu_flags", lambda flags=flags: set(flags))
        runtime.cpu_has_bfloat16.cache_clear()
        supported = known and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        expected = torch.bfloat16 if supported else torch.float32
        assert runtime.inference_dtype(cpu) == expected
    runtime.cpu_has_bfloat16.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for native in (True, False):  # a T4 has bfloat16 by emulation alone

        def supported(including_emulation=True, native=native):
            return native or including_emulation

        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        assert runtime.inference_dtype(card) == (torch.bfloat16 if native else torch.float16)
    for name in ("float32", "bfloat16", "float16"):
        monkeypatch.setenv("LIB_DTYPE", name)
        assert runtime.inference_dtype(cpu) == runtime.inference_dtype(card) == getattr(torch, name)
    monkeypatch.setenv("LIB_DTYPE", "int8")
    with pytest.raises(
        ValueError, match="LIB_DTYPE is 'int8'; allowed: float32, bfloat16, float16"
    ):
        runtime.inference_dtype()


CLOCKS = {"perf_counter", "monotonic", "process_time", "time", "time_ns", "perf_counter_ns"}
MAY_WAIT = {
    "course",
    "serve.py",
    "chat.py",
    "scorers.py",
}  # deadlines and pauses of downloads and calls


def decisions_by_time(tree: ast.AST) -> list[str]:
    """Comparisons, in a function that reads a clock, of what it read or of what was made of it."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return [f"{f.name}: {text}" for f in functions for text in _compared_times(f)]


def _compared_times(function: ast.FunctionDef) -> list[str]:
    timed: set[str] = set()

    def of_time(node: ast.AST) -> bool:
        names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        calls = {called(n) for n in ast.walk(node) if isinstance(n, ast.Call)}
        return bool(names & timed or calls & CLOCKS)

    for _ in range(3):  # what is made of a time may be made into something else again
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and of_time(node.value):
                timed |= {
                    n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)
                }
            adds = isinstance(node, ast.Call) and called(node) in ("append", "extend")
            if adds and any(map(of_time, node.args)) and isinstance(node.func.value, ast.Name):
                timed.add(node.func.value.id)
    compared = [node for node in ast.walk(function) if isinstance(node, ast.Compare)]
    return [ast.unparse(node) for node in compared if of_time(node)]


def called(node: ast.Call) -> str:
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def test_no_function_decides_by_a_stopwatch():
    """Two runs on one machine must take the same numeric path, however busy it is."""
    sample = "def f():\n    t = []\n    t.append(time.perf_counter())\n    return t[0] > 1.2 * t[1]"
    assert decisions_by_time(ast.parse(sample)) == ["f: t[0] > 1.2 * t[1]"]
    root = runtime.project_root() / "lib"
    for path in root.rglob("*.py"):
        if not MAY_WAIT & set(path.relative_to(root).parts):
            source = path.read_text(encoding="utf-8")
            assert not decisions_by_time(ast.parse(source)), path


def test_scale_settings_names_what_is_missing():
    with pytest.raises(ValueError, match="b: give a value for each of smoke, demo, gpu, full"):
        record.scale_settings({"a": (1, 2, 3, 4), "b": (1, 2, 3)}, "full")
    with pytest.raises(ValueError, match="a: give a value for each of .*, full, paper"):
        record.scale_settings({"a": (1, 2, 3, 4), "b": (1, 2, 3, 4, "as here")}, "full")


def test_scale_settings_are_the_scale_s_column_with_the_paper_s_beside():
    settings = {"model": ("tiny", "policy", "a", "b", "GPT-2"), "steps": (1, 2, 3, 4, 500)}
    assert record.scale_settings(settings, "gpu") == {"model": "a", "steps": 3}
    assert record.scale_settings(settings, "full", {"steps": 7}) == {"model": "b", "steps": 7}
    table = record.settings_table(settings)
    assert list(table) == [*record.SCALES, "paper"] and table.paper.steps == 500


@pytest.fixture
def keep(tmp_path, monkeypatch):
    """Keep a run's table and settings as `data/results/test/<place>/`; None: without settings."""
    monkeypatch.setenv("FEEDBACK_ROOT", str(tmp_path))

    def keep_run(name, settings, place="smoke", table="scores"):
        folder = tmp_path / "data" / "results" / "test" / place
        folder.mkdir(parents=True, exist_ok=True)
        seed = int(name[-1])
        pd.DataFrame({"seed": [seed]}).to_csv(folder / f"{table}-{name}.csv", index=False)
        if settings is not None:
            (folder / f"settings-{name}.json").write_text(json.dumps(settings))

    return keep_run


def test_stored_runs_of_the_same_settings_are_joined_by_table(run, keep, capsys):
    same = {"model": "policy", "steps": 20, "rate": 1e-4, "sizes": [16, 32]}
    keep("seed1", same)
    keep("seed2", same)
    keep("seed2", same, table="panel")
    asked = same | {"sizes": (16, 32), "rate": np.float64(1e-4)}  # as a notebook may have them
    stored = run.stored(settings=asked)
    assert list(stored["scores"].seed) == [1, 2] and list(stored["panel"].seed) == [2]
    assert capsys.readouterr().out == ""
    assert run.stored(settings=asked, use=False) == {}
    assert json.loads((run.folder / "settings.json").read_text()) == same  # to keep this run too


def test_stored_runs_of_other_settings_are_left_out_and_a_line_says_why(run, keep, capsys):
    same = {"model": "policy", "data": "a", "steps": 20}
    keep("seed1", same)
    keep("seed2", same)
    keep("seed3", same | {"steps": 40})
    keep("seed4", None)
    keep("seed5", same | {"layers": 4})
    stored = run.stored(settings=same | {"steps": 40})
    assert list(stored["scores"].seed) == [3]
    assert capsys.readouterr().out.splitlines() == [
        "stored seed1, seed2: made with steps=20, this run has steps=40: not mixed",
        "stored seed4: there is no settings-seed4.json that says how it was made: not mixed",
        "stored seed5: made with steps=20, layers=4, this run has steps=40, layers=nothing: not mixed",
    ]
    assert run.stored(settings=same | {"model": "mine", "data": "b"}) == {}
    assert "made with model=policy, data=a, this run has model=mine, data=b" in (
        capsys.readouterr().out
    )


def test_a_stored_set_differs_by_what_is_asked_for(run, keep, capsys):
    same = {"model": "policy", "steps": 6}
    keep("seed1", same | {"steps": 20}, place="smoke-long")
    assert list(run.stored("long", settings=same, steps=20)["scores"].seed) == [1]
    assert run.stored(settings=same) == {} == run.stored("none", settings=same)
    assert capsys.readouterr().out == ""
    assert run.stored("long", settings=same, steps=60) == {}  # not what was asked for
    assert "made with steps=20, this run has steps=60" in capsys.readouterr().out
    assert (
        json.loads((run.folder / "settings.json").read_text()) == same
    )  # of this run, not the set


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
    (folder / "settings-seed0.json").write_text("{}")
    stored = run.stored(settings={})
    pd.testing.assert_frame_equal(stored["scores"], table)
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
    layer = torch.nn.BatchNorm1d(10)
    runtime.free_memory(layer)
    assert {x.device.type for x in [*layer.parameters(), *layer.buffers()]} == {"meta"}


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "model"
    with pytest.raises(KeyError), runtime.atomic_folder(target) as staging:
        (staging / "weights").write_text("half")
        raise KeyError
    assert not [*tmp_path.iterdir()]
    for text in ("old", "new"):
        with runtime.atomic_folder(target) as staging:
            (staging / "weights").write_text(text)
            assert (target / "weights").exists() == (text == "new")
        assert (target / "weights").read_text() == text
    with pytest.raises(KeyError), runtime.atomic_folder(target) as staging:
        raise KeyError
    assert (target / "weights").read_text() == "new" and [*tmp_path.iterdir()] == [target]


def test_writers_of_one_folder_do_not_disturb_each_other(tmp_path):
    def write(name):
        for _ in range(20):
            with runtime.atomic_folder(tmp_path / "model") as staging:
                (staging / "first").write_text(name)
                (staging / "second").write_text(name)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, "abcd"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    first, second = (tmp_path / "model" / name for name in ("first", "second"))
    assert first.read_text() == second.read_text()


KILLED = """
import os, signal, sys
from lib import runtime
with runtime.atomic_folder(sys.argv[1]) as staging:
    (staging / "config.json").write_text("{}")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_writer_leaves_nothing_that_could_be_loaded(tmp_path):
    target = tmp_path / "model"
    done = subprocess.run([sys.executable, "-c", KILLED, str(target)])
    assert done.returncode == -signal.SIGKILL and not target.exists()
    assert all(path.name.startswith(".") for path in tmp_path.iterdir())
    with runtime.atomic_folder(target) as staging:
        (staging / "config.json").write_text("{}")
    assert [*tmp_path.iterdir()] == [target]


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
