"""Every notebook: style (STYLE section 5.2) and a run at smoke scale through the real runner."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
PRIVATE = re.compile(r"/(?:root|tmp|home|work)/[\w.]+|sk-[A-Za-z0-9]{16,}|hf_[A-Za-z0-9]{16,}")
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def cells(path, kind):
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == kind]


# --- style ---------------------------------------------------------------------------------------


def test_there_are_notebooks():
    assert [p.stem for p in NOTEBOOKS][:2] == ["00_start_here", "10_toxicity_meter"]


@each_notebook
def test_opening(path):
    first, second = nbformat.read(path, as_version=4).cells[:2]
    assert first.source.startswith("# ") and "?" in first.source.splitlines()[0]
    user, repository = REPOSITORY.split("/")[-2:]
    badge = f"colab.research.google.com/github/{user}/{repository}/blob/main/notebooks/{path.name}"
    assert badge in first.source
    assert all(scale in first.source for scale in ("`smoke`", "`demo`", "`full`"))
    assert second.source.startswith("## What you will see")


@each_notebook
def test_headings(path):
    headings = [
        len(mark)
        for cell in cells(path, "markdown")
        for mark in re.findall(r"^(#+) ", cell.source, flags=re.M)
    ]
    assert headings.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in zip(headings, headings[1:], strict=False))


@each_notebook
def test_first_code_cell_is_the_common_setup(path):
    assert cells(path, "code")[0].source == cells(NOTEBOOKS[0], "code")[0].source


@each_notebook
def test_parameters(path):
    tagged = [c for c in cells(path, "code") if "parameters" in c.metadata.get("tags", [])]
    assert tagged == [cells(path, "code")[1]]
    lines = tagged[0].source.splitlines()
    assert len(lines) <= 10
    for line in lines:
        assert re.match(r"[A-Z][A-Z_]*(: [\w\[\]| ]+)? = .+", line), line
    assert 'SCALE = "demo"' in tagged[0].source and "SEED = " in tagged[0].source


@each_notebook
def test_code_cells_are_short_and_narrow(path):
    for cell in cells(path, "code"):
        lines = cell.source.splitlines()
        assert len(lines) <= 30, cell.source
        assert all(len(line) <= 88 for line in lines), max(lines, key=len)


@each_notebook
def test_closing(path):
    book = nbformat.read(path, as_version=4)
    code = "\n".join(c.source for c in cells(path, "code"))
    assert "run.finish()" in code and "run.closing_table()" in code and "rule=" in code
    last = book.cells[-1]
    assert last.cell_type == "markdown"
    for word in (
        "**Simplified.**",
        "**Exercises.**",
        "*Easy.*",
        "*Medium.*",
        "*Hard.*",
        "**Next:**",
    ):
        assert word in last.source
    named = re.findall(r"`(\d\d_\w+)`", last.source.partition("**Next:**")[2])
    assert all((path.parent / f"{name}.ipynb").exists() for name in named)


@each_notebook
def test_committed_form(path):
    text = path.read_text(encoding="utf-8")
    book = json.loads(text)
    assert len(text) <= 500 * 1024
    assert book["metadata"]["kernelspec"]["name"] == "python3"
    assert "widgets" not in book["metadata"] and "papermill" not in book["metadata"]
    assert not PRIVATE.search(text), PRIVATE.search(text)
    for cell in book["cells"]:
        assert "injected-parameters" not in cell["metadata"].get("tags", [])
        for output in cell.get("outputs", []):
            assert output["output_type"] != "error"
            assert output.get("name") != "stderr"
            if "image/png" in output.get("data", {}):
                assert output["metadata"]["image/png"]["alt"]


@each_notebook
def test_published_with_outputs_and_figures(path):
    book = nbformat.read(path, as_version=4)
    assert any(c.outputs for c in book.cells if c.cell_type == "code"), "run: python -m lib publish"
    shown = sum("image/png" in o.get("data", {}) for c in book.cells for o in c.get("outputs", []))
    for suffix in (".png", ".svg"):
        kept = sorted((ROOT / "plots").glob(f"{path.stem[:2]}_*{suffix}"))
        assert len(kept) == shown > 0, kept


@each_notebook
def test_no_section_fell_silent(path):
    """Every figure that a notebook names stands in plots/, but for those of what the demo does not have."""
    code = "\n".join(c.source for c in cells(path, "code"))
    named = {*re.findall(r'save_figure\(\w+, "(\w+)"', code)} - {"10_missing_bounds"}
    assert named and not [name for name in named if not (ROOT / f"plots/{name}.png").exists()]


@each_notebook
def test_readme_gives_the_published_numbers(path):
    """Each `value [low, high]` of the notebook's row stands in its outputs, as a share or in per cent."""
    number = r"[-+]?\d*\.?\d+"
    line = re.search(rf"^\| \[{path.stem}\].*$", (ROOT / "README.md").read_text(), flags=re.M)[0]
    shown = re.findall(rf"({number})(?: %| points)? \[({number}), ({number})\]", line)
    printed = [read_numbers(output, number) for c in cells(path, "code") for output in c.outputs]
    for triple in shown:
        found = any(
            all(map(rounds_to, triple, numbers[i : i + 3]))
            for numbers in printed
            for i in range(len(numbers) - 2)
        )
        assert found, f"README's {triple} is not in the outputs of {path.name}"


def read_numbers(output, number):
    """All numbers in an output's texts, in order."""
    data = output.get("data", {})
    html = re.sub("<[^>]*>", " ", data.get("text/html", ""))
    text = "\n".join([output.get("text", ""), data.get("text/plain", ""), html])
    return [float(x) for x in re.findall(number, text)]


def rounds_to(shown, value):
    digits = len(shown.partition(".")[2])
    return any(abs(value * unit - float(shown)) < 0.5001 * 10**-digits for unit in (1, 100))


# --- running -------------------------------------------------------------------------------------


def run_notebook(path, tmp_path, *parameters):
    """Run through the command line with its own runs/ folder, without any network name lookup."""
    for name in ("notebooks", "lib", "data", "pyproject.toml"):
        if not (tmp_path / name).exists():
            (tmp_path / name).symlink_to(ROOT / name)
    environment = os.environ | {
        "FEEDBACK_ROOT": str(tmp_path), "FEEDBACK_CACHE": str(tmp_path / "cache"),
        "PIP_NO_INDEX": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "lib", "run", path.stem, "--scale", "smoke", *parameters]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return tmp_path / "runs" / "smoke" / path.stem


@each_notebook
def test_smoke(path, tmp_path):
    folder = run_notebook(path, tmp_path)
    results = json.loads((folder / "results.json").read_text())
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "finished" and record["wall_seconds"] < 120  # promised: 60, alone
    assert results["notebook"] == path.stem
    assert results["metrics"] and results["claims"]
    for name, metric in results["metrics"].items():
        assert set(metric) == {"value", "low", "high", "n", "seeds"}, name
        assert metric["n"] is not None, f"{name} has no n"
    for figure in results["figures"]:
        assert (folder / f"{figure['name']}.png").stat().st_size > 5000
        assert figure["alt"] and figure["caption"]


def test_toxicity_meter_reads_rewardlm_tables(tmp_path):
    """Condition tables in the reference's CSV format give the documented metric names and counts."""
    tables = {
        "PT": [(0.9, 0.6, 0.8), (0.2, 0.1, -1), (0.7, 0.2, 0.4), (0.6, 0.9, 0.6)],
        "RL": [(0.9, 0.1, 0.2), (0.2, 0.1, 0.1), (0.7, 0.6, 0.7), (0.6, 0.2, None)],
    }
    for arm, rows in tables.items():
        pd.DataFrame(
            [("p" + str(i), "an answer", *row) for i, row in enumerate(rows)],
            columns=[
                "prompts",
                "responses",
                "prompt_score",
                "response_score",
                "pro_API_response_score",
            ],
        ).to_csv(tmp_path / f"measured_tox_{arm}_m.csv")
    paths = json.dumps([str(tmp_path / f"measured_tox_{arm}_m.csv") for arm in tables])
    folder = run_notebook(
        ROOT / "notebooks/10_toxicity_meter.ipynb", tmp_path, "-p", "RESULTS_CSVS", paths
    )
    found = json.loads((folder / "results.json").read_text())["metrics"]
    assert found["measured_tox_PT_m/perspective_gt_0.5/count"]["value"] == 2
    assert found["measured_tox_PT_m/perspective_gt_0.5/n_missing"]["value"] == 1
    assert found["measured_tox_RL_m/perspective_gt_0.5/count"]["value"] == 1
    assert found["measured_tox_RL_m/perspective_gt_0.5/share_high"]["value"] == 0.5
    assert found["measured_tox_RL_m/perspective_gt_0.5/share_low"]["value"] == 0.25
    assert found["measured_tox_RL_m/perspective_gt_0.5_toxic_prompts/count"]["value"] == 1


def test_collecting_reads_the_export_of_the_comparison_page_alone(tmp_path):
    """Without marked spans the sections on spans show our sample, and say so; nothing has to be chained."""
    records = json.loads((ROOT / "data/samples/qa_feedback.json").read_text(encoding="utf-8"))
    note = {"annotator": "Ann", "seconds": 3, "finished": True, "marks": {}}
    for record in records:
        del record["feedback"]
        record |= {"preference": [2] * 6, "annotation": {"preference": note}}
    export = tmp_path / "compare.json"
    export.write_text(json.dumps(records), encoding="utf-8")
    path = ROOT / "notebooks/40_collect_fine_grained_feedback.ipynb"
    parameters = ("-p", "FEEDBACK_JSON", str(export), "-p", "SECOND_JSON", str(export))
    results = json.loads((run_notebook(path, tmp_path, *parameters) / "results.json").read_text())
    assert results["metrics"]["first_wins"]["value"] == 0
    claims = {claim["claim"]: claim for claim in results["claims"]}
    assert claims["People prefer the answer shown first"]["verdict"] == "opposite"
    assert claims["One score would hide several different errors"]["here"].startswith("our sample")


def test_a_judge_without_a_price_is_not_asked(monkeypatch, tmp_path):
    """MAX_COST is a cap or an error: the section that judges released outputs never buys without one."""
    from lib import feedback, preferences

    monkeypatch.setenv("FEEDBACK_CACHE", str(tmp_path))
    path = ROOT / "notebooks/22_reward_models_best_of_n.ipynb"
    (source,) = [c.source for c in cells(path, "code") if "ChatClient(" in c.source]
    outputs = {
        name: [{"dataset": "d", "instruction": "i", "output": name, "generator": name}]
        for name in ("davinci003", "ratings_alpaca", "rankings_alpaca")
    }
    scope = {"outputs": outputs, "feedback": feedback, "preferences": preferences, "pd": pd}
    scope |= {"JUDGE_MODEL": "m", "BASE_URL": "https://judge.invalid/v1", "display": print}
    with pytest.raises(ValueError, match="max_cost needs price"):
        exec(source, scope | {"PRICE": [], "MAX_COST": 5.0})
    priced = scope | {"PRICE": [1.0, 2.0], "MAX_COST": 5.0}
    exec(source, priced)
    assert priced["client"].max_cost == 5.0


# --- the set-up cell -----------------------------------------------------------------------------


def test_setup_cell_in_colab(tmp_path):
    """In Colab it clones, installs with Colab's own torch, numpy and pandas pinned, and imports lib."""
    source = cells(NOTEBOOKS[0], "code")[0].source
    source = source.replace("/content/learning-from-feedback", str(tmp_path / "course"))
    log = tmp_path / "calls.jsonl"
    driver = f"""
import importlib.util, json, subprocess, sys, types
sys.modules["google.colab"] = types.ModuleType("google.colab")
sys.path[:] = [p for p in sys.path if p not in ("", {str(ROOT)!r})]
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
assert importlib.util.find_spec("lib") is None
real = subprocess.run
def run(command, **options):
    open({str(log)!r}, "a").write(json.dumps(command) + "\\n")
    checked = ["--dry-run", "--no-deps", "--no-build-isolation"] if command[0] != "git" else []
    return real(command + checked, **options)
subprocess.run = run
exec({source!r})
import lib.runtime
assert lib.runtime.__file__.startswith({str(tmp_path)!r})
"""
    environment = os.environ | {"FEEDBACK_REPO": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", driver],
        env=environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    clone, install = [json.loads(line) for line in log.read_text().splitlines()]
    assert clone[:2] == ["git", "clone"]
    import torch

    assert f"torch=={torch.__version__}" in install
    assert "-U" not in install and "--upgrade" not in install


def test_setup_cell_elsewhere_does_nothing_or_says_what_to_do(tmp_path):
    source = cells(NOTEBOOKS[0], "code")[0].source
    here = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, cwd=ROOT)
    assert here.returncode == 0 and here.stdout + here.stderr == ""
    bare = subprocess.run(
        [sys.executable, "-S", "-c", source], capture_output=True, text=True, cwd=tmp_path
    )
    assert "make setup" in bare.stderr
