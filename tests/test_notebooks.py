"""Every notebook: style (STYLE section 5.2) and a run at smoke scale through the real runner."""

import ast
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from lib import data, generation, models, reward_models
from lib.course import record
from lib.papers.alt import conditions, critics
from lib.papers.fine_grained import models as fine_grained
from lib.papers.fine_grained import schema as qa
from lib.papers.ilf import forms, refine

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
RESULTS = ROOT / "docs" / "results.md"
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
def test_parameters(path):
    tagged = [c for c in cells(path, "code") if "parameters" in c.metadata.get("tags", [])]
    assert tagged == [cells(path, "code")[1]]
    lines = tagged[0].source.splitlines()
    assert len(lines) <= 12
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
def test_a_lesson_is_read_in_one_sitting(path):
    """25 to 50 cells, and at most 400 lines of code; bookkeeping belongs to lib."""
    lines = [line for cell in cells(path, "code") for line in cell.source.splitlines()]
    assert sum(bool(line.strip()) for line in lines) <= 400
    assert 25 <= sum(len(cells(path, kind)) for kind in ("code", "markdown")) <= 50


@each_notebook
def test_closing(path):
    book = nbformat.read(path, as_version=4)
    code = "\n".join(c.source for c in cells(path, "code"))
    assert "run.finish()" in code
    assert "run.closing_table()" in code or "run.other_table()" in code  # 00 re-runs no paper
    assert "rule=" in code or "arms.claim(" in code  # which brings its own rule
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


def shows(source):
    """Whether a cell prints or displays something whatever happens in it."""
    calls = [
        node.value for node in ast.parse(source).body
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ]  # fmt: skip
    return any(isinstance(c.func, ast.Name) and c.func.id in ("print", "display") for c in calls)


@each_notebook
def test_what_a_cell_shows_is_published(path):
    for cell in cells(path, "code"):
        assert cell.outputs or not shows(cell.source), f"publish again: {cell.source[:200]}"


RAW = re.compile(r"PosixPath\(|np\.(float|int|bool_)\w*\(|^['\"]")


@each_notebook
def test_outputs_are_words_and_numbers_not_reprs(path):
    """No path, numpy scalar or string in quotes that a last line returned by the way."""
    for cell in cells(path, "code"):
        for output in cell.outputs:
            data = output.get("data", {})
            if output.output_type == "execute_result" and "text/html" not in data:
                assert not RAW.search(data["text/plain"]), (
                    f"{cell.source[-200:]}: {data['text/plain']}"
                )


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
    named = {*re.findall(r'(?:save_figure\(\s*\w+,\s*|name=)"(\d\d_\w+)"', code)}
    # bounds where Perspective is missing; best of n, which comes with 31's first stored seed
    named -= {"10_missing_bounds", "31_best_of_n"}
    assert named and not [name for name in named if not (ROOT / f"plots/{name}.png").exists()]


@each_notebook
def test_results_page_gives_the_published_numbers(path):
    """Each `value [low, high]` of the notebook's row stands in its outputs, as a share or in per cent."""
    number = r"[-+]?\d*\.?\d+"
    line = re.search(rf"^\| \[{path.stem}\].*$", RESULTS.read_text(), flags=re.M)[0]
    shown = re.findall(rf"({number})(?: %| points)? \[({number}), ({number})\]", line)
    printed = [read_numbers(output, number) for c in cells(path, "code") for output in c.outputs]
    for triple in shown:
        found = any(
            all(map(rounds_to, triple, numbers[i : i + 3]))
            for numbers in printed
            for i in range(len(numbers) - 2)
        )
        assert found, f"{RESULTS.name}: {triple} is not in the outputs of {path.name}"


def read_numbers(output, number):
    """All numbers in an output's texts, in order."""
    data = output.get("data", {})
    html = re.sub("<[^>]*>", " ", data.get("text/html", ""))
    text = "\n".join([output.get("text", ""), data.get("text/plain", ""), html])
    return [float(x) for x in re.findall(number, text)]


def rounds_to(shown, value):
    digits = len(shown.partition(".")[2])
    return any(abs(value * unit - float(shown)) < 0.5001 * 10**-digits for unit in (1, 100))


# --- stored results ------------------------------------------------------------------------------

WITH_STORED = [p for p in NOTEBOOKS if any((ROOT / "data/results" / p.stem).glob("*/*.csv*"))]


def settle(path, tmp_path, monkeypatch) -> dict:
    """Run a notebook's own code up to its settings at demo scale, and its calls of `run.stored`."""
    monkeypatch.setenv("FEEDBACK_RUN_DIR", str(tmp_path))
    scope = {"display": print}
    code = [cell.source for cell in cells(path, "code")][1:]
    settled = next(i for i, source in enumerate(code) if "describe_run(run" in source)
    for source in code[: settled + 1]:
        exec(source, scope)
    for source in code[settled + 1 :]:
        if "run.stored(" not in source:
            continue
        for node in ast.parse(source).body:
            if isinstance(node, ast.Assign):
                with contextlib.suppress(NameError):  # what is measured in between did not run
                    exec(ast.unparse(node), scope)
    return scope


def with_parameter(path, name, value, copy):
    """Write a copy of a notebook in which a parameter has another value."""
    book = nbformat.read(path, as_version=4)
    for cell in book.cells:
        cell.source = re.sub(rf"(?m)^{name} = .*", f"{name} = {value!r}", cell.source)
    nbformat.write(book, copy)


@pytest.mark.parametrize("path", WITH_STORED, ids=lambda p: p.stem)
def test_stored_runs_have_the_settings_of_the_demo(path, tmp_path, monkeypatch, capsys):
    """All of them are used where nothing is changed, and the run's own settings are written down."""
    read = []
    real = record.Run.stored

    def spy(run, name="", **rest):
        tables = real(run, name, **rest)
        read.append(f"demo-{name}" if name else "demo")
        assert tables, f"nothing is stored in {read[-1]}"
        return tables

    monkeypatch.setattr(record.Run, "stored", spy)
    settle(path, tmp_path, monkeypatch)
    assert "not mixed" not in capsys.readouterr().out
    folder = ROOT / "data/results" / path.stem
    assert sorted(read) == sorted(p.name for p in folder.iterdir() if p.is_dir())
    assert json.loads((tmp_path / "settings.json").read_text())
    for place in read:  # no settings without a run
        named = {p.stem.partition("-")[2] for p in (folder / place).glob("settings-*.json")}
        tables = {p.name.partition(".csv")[0] for p in (folder / place).glob("*.csv*")}
        assert named == {name.partition("-")[2] for name in tables}


@pytest.mark.parametrize("name", ["STEPS", "ANNOTATOR"])
def test_stored_runs_of_other_settings_are_left_out(name, tmp_path, monkeypatch, capsys):
    """One more step, another annotator: nothing stored is averaged in, and a line says why."""
    number, value = {"STEPS": ("42", 40), "ANNOTATOR": ("90", "qwen-0.5b")}[name]
    path = next(p for p in WITH_STORED if p.stem.startswith(number))
    with_parameter(path, name, value, tmp_path / path.name)
    scope = settle(tmp_path / path.name, tmp_path, monkeypatch)
    said = capsys.readouterr().out
    assert scope["stored"] == {}
    eyes = ("annotator=simulated", "annotator=qwen-0.5b")
    was, here = {"STEPS": ("steps=150", "steps=40"), "ANNOTATOR": eyes}[name]
    assert f"made with {was}, this run has {here}: not mixed" in said


def test_a_reward_written_into_11_is_not_mixed_with_stored_runs(tmp_path, monkeypatch, capsys):
    """No curve or effect of another reward stands in for it; a line says what is left out."""
    path = ROOT / "notebooks/11_fine_tune_and_rlaf.ipynb"
    scope = settle(path, tmp_path, monkeypatch)
    (source,) = [c.source for c in cells(path, "code") if "isinstance(reward_fn" in c.source]
    (check,) = [node for node in ast.parse(source).body if isinstance(node, ast.If)]
    folder = tmp_path / "data/results" / path.stem / "demo"
    folder.mkdir(parents=True)
    (folder / "settings-1.json").write_text(json.dumps(scope["SETUP"]))
    (folder / "scores-1.csv").write_text("arm,seed\nPPO,1\n")
    monkeypatch.setenv("FEEDBACK_ROOT", str(tmp_path))
    scope["reward_fn"] = scope["rewardlm"].CleanTextReward(None)
    exec(ast.unparse(check), scope)
    assert scope["run"].stored(settings=scope["SETUP"])
    scope["reward_fn"] = lambda samples: [len(ids) for ids in samples.response_ids]
    exec(ast.unparse(check), scope)
    capsys.readouterr()
    assert scope["run"].stored(settings=scope["SETUP"]) == {}
    assert "reward_fn=nothing" in (said := capsys.readouterr().out) and "not mixed" in said


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
def test_smoke(path, tmp_path, cpu_seconds):
    folder = run_notebook(path, tmp_path)
    results = json.loads((folder / "results.json").read_text())
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "finished"
    assert cpu_seconds() < 120  # promised: a minute of two cores that do nothing else
    assert results["notebook"] == path.stem
    assert results["metrics"] and results["claims"]
    for name, metric in results["metrics"].items():
        assert set(metric) == {"value", "low", "high", "n", "seeds"}, name
        assert metric["n"] is not None, f"{name} has no n"
    for figure in results["figures"]:
        assert (folder / f"{figure['name']}.png").stat().st_size > 5000
        assert figure["alt"] and figure["caption"]
    executed = nbformat.read(folder / "executed.ipynb", as_version=4)
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    said = "".join(o.text for o in outputs if o.output_type == "stream")
    assert "lie over each other" not in said  # of texts in a figure


def test_what_11_trains_is_measured_by_10_and_trained_on(tmp_path):
    """PPO's policy of 11 is kept; 10 loads it by its folder, and 11 goes on from it with own prompts."""
    path = ROOT / "notebooks/11_fine_tune_and_rlaf.ipynb"
    folder = run_notebook(path, tmp_path, "-p", "ARMS", '["PPO"]', "-p", "STEPS", "2")
    kept = tmp_path / "kept"
    shutil.copytree(folder / "models" / "PPO", kept)
    card = json.loads((kept / "card.json").read_text())
    assert card["settings"]["notebook"] == path.stem and card["settings"]["steps"] == 2
    meter = ROOT / "notebooks/10_toxicity_meter.ipynb"
    measured = run_notebook(meter, tmp_path, "-p", "MODELS", json.dumps([str(kept)]))
    assert json.loads((measured / "results.json").read_text())["metrics"]
    assert json.loads((measured / "run.json").read_text())["parameters"]["MODELS"] == [str(kept)]
    prompts = tmp_path / "mine.txt"
    lines = [
        f"The {a} {b} the" for a in ("cat", "dog", "man", "king") for b in ("saw", "ate", "hit")
    ]
    prompts.write_text("\n".join(lines + [f"You {line[4:]}" for line in lines]))
    options = ["-p", "MODEL", str(kept), "-p", "PROMPTS", str(prompts), "-p", "ARMS", '["PPO"]']
    again = run_notebook(path, tmp_path, *options, "-p", "STEPS", "1")
    assert json.loads((again / "settings.json").read_text())["model"] == str(kept)


def test_kept_reward_models_of_41_pay_in_44(tmp_path):
    """R1 finds nothing right and R2 nothing wrong, once their heads say so: the notebook pays that."""
    kept = run_notebook(ROOT / "notebooks/41_fine_grained_reward_models.ipynb", tmp_path) / "models"
    assert sorted(p.name for p in kept.iterdir()) == ["R1", "R2", "R3", "preference"]
    loaded = fine_grained.load_all(kept)
    assert {name: model.segmenter.unit for name, model in loaded.items()} == {
        "R1": "sub_sentence", "R2": "sentence", "R3": "sequence",
    }  # fmt: skip
    assert loaded["R3"].std > 0 and not loaded["R1"].context
    for name, bias in {"R1": -5.0, "R2": 5.0}.items():
        torch.nn.init.zeros_(loaded[name].head.weight)
        torch.nn.init.constant_(loaded[name].head.bias, bias)
        models.save(loaded[name], loaded[name].tokenizer, kept / name)
    folder = run_notebook(
        ROOT / "notebooks/44_learned_dense_rewards.ipynb",
        tmp_path, "-p", "REWARD_MODELS", str(kept),
    )  # fmt: skip
    scores = pd.read_csv(folder / "scores.csv")
    assert {"SFT", "dense"} == set(scores.arm)
    assert (scores.R1 <= -0.3).all() and (scores.R2 >= 0.5).all()
    metrics = json.loads((folder / "results.json").read_text())["metrics"]
    assert "R1/learned/accuracy" in metrics and "R1/shuffled labels/accuracy" not in metrics
    assert [p.name for p in (folder / "models").iterdir()] == ["dense"]
    models.load_policy(str(folder / "models" / "dense"))


@pytest.mark.parametrize("field", ["feedback", "preference"])
def test_41_trains_what_records_of_one_kind_can_teach(field, tmp_path):
    """Spans alone teach R1 and R2, comparisons alone the preference model; a line says what is left out."""
    unneeded = {"feedback": ["preference", *qa.PREDICTIONS[1:]], "preference": ["feedback"]}[field]
    records = json.loads((ROOT / "data/samples/qa_feedback.json").read_text())
    records = [{k: v for k, v in r.items() if k not in unneeded} for r in records]
    begun = {"question": "Begun?", "passages": [], "prediction 1": "Yes.", "prediction 2": "No."}
    begun |= {"annotation": {field: {"finished": False, "marks": {}}}}
    (tmp_path / "export.json").write_text(json.dumps([begun, *records]))
    notebook = ROOT / "notebooks/41_fine_grained_reward_models.ipynb"
    folder = run_notebook(notebook, tmp_path, "-p", "FEEDBACK_JSON", str(tmp_path / "export.json"))
    trained = {"feedback": ["R1", "R2"], "preference": ["preference"]}[field]
    missing = {"R1", "R2", "R3", "preference"} - set(trained)
    assert sorted(path.name for path in (folder / "models").iterdir()) == trained
    outputs = [o for c in cells(folder / "executed.ipynb", "code") for o in c.outputs]
    said = "".join(o.text for o in outputs if o.output_type == "stream")
    assert set(re.findall("left out here and below: (\\w+)", said)) == missing
    assert len(re.findall("left out here and below", said)) == len(missing)
    results = json.loads((folder / "results.json").read_text())
    named = {name.partition("/")[0] for name in results["metrics"]} - {"dense"}
    assert named == set(trained)
    claims = " ".join(claim["claim"] for claim in results["claims"])
    assert len(results["claims"]) == {"feedback": 6, "preference": 1}[field]
    assert "R3" not in claims and ("R1" in claims) == ("R1" in trained)
    figures = {
        "feedback": {"41_segment_models", "41_marks", "41_dense_reward"},
        "preference": {"41_sequence_models"},
    }
    assert {figure["name"] for figure in results["figures"]} == figures[field]


def test_a_kept_policy_of_43_is_the_one_that_was_measured(tmp_path):
    """Every part is another than the scale's; the kept policy gives the samples that were measured."""
    for name, seed in {"base": 3, "start": 4}.items():
        models.save(*models.build_tiny_model("tiny", seed=seed), tmp_path / name)
    texts = [f"{a} {b} {c}" for a in ("you", "we", "they") for b in ("like", "see", "are")
             for c in ("one", "two", "three", "four")]  # fmt: skip
    (tmp_path / "prompts.txt").write_text("\n".join(texts))
    swapped = {
        "MODEL": tmp_path / "base", "START_FROM": tmp_path / "start", "PROMPTS": tmp_path / "prompts.txt",
        "REWARD": "lexicon-threats", "JUDGE": "lexicon-insults", "ARMS": '["dense"]',
    }  # fmt: skip
    options = [part for name, value in swapped.items() for part in ("-p", name, str(value))]
    folder = run_notebook(
        ROOT / "notebooks/43_detoxify_with_dense_rewards.ipynb", tmp_path, *options
    )
    kept = folder / "models" / "dense"
    policy, tokenizer = models.load_policy(str(kept), dtype=torch.float32)
    ids = torch.tensor([[6, 7, 8, 9], [9, 8, 7, 6]]).to(policy.device)
    plain = AutoModelForCausalLM.from_pretrained(kept).to(policy.device)
    before = models.load_policy(str(tmp_path / "start"), dtype=torch.float32)[0]
    with torch.no_grad():
        logits, again, old = (model(ids).logits for model in (policy, plain, before))
    torch.testing.assert_close(logits, again)
    assert (logits - old).abs().max() > 1e-3

    prompts = data.load_prompts(tmp_path / "prompts.txt", n=48, seed=0)
    _, test = data.split_groups(prompts, n_test=16, seed=0)
    drawn = generation.sample(policy, tokenizer, test["prompt"], n=4, seed=1, max_new_tokens=12)
    sums = np.reshape([row.sum() for row in drawn.model_log_probs], (-1, 4)).sum(1)
    measured = pd.read_csv(folder / "measured.csv")
    np.testing.assert_allclose(measured[measured.arm == "dense"].log_prob, sums, rtol=1e-4)


def test_refinements_and_a_reward_model_of_your_own_are_used_by_31(tmp_path):
    """The student learns from the file's texts, is tested on other articles, and the reward model chooses."""
    model, tokenizer = models.build_tiny_model("tiny", seed=3)
    reward = reward_models.RewardModel(model.base_model, tokenizer)
    torch.nn.init.normal_(reward.head.weight)
    models.save(reward, tokenizer, tmp_path / "reward")
    models.save(model, tokenizer, tmp_path / "student")
    mine = refine.load_articles("samples", "train", 4)[["id", "title"]]
    mine = mine.assign(summary="It is here.", feedback="Say where.")
    mine["refinement"] = [f"It is in the north, number {i}." for i in range(4)]
    mine.to_csv(tmp_path / "mine.csv", index=False)
    parameters = {"REFINEMENTS": str(tmp_path / "mine.csv"), "REWARD": str(tmp_path / "reward"),
                  "STUDENT": str(tmp_path / "student"), "SIZES": "[4]",
                  "ARMS": '["refinement", "writer\'s summary", "reward model"]'}  # fmt: skip
    options = [part for name, value in parameters.items() for part in ("-p", name, value)]
    folder = run_notebook(ROOT / "notebooks/31_learn_from_refinements.ipynb", tmp_path, *options)
    targets = pd.read_csv(folder / "targets.csv", keep_default_na=False)
    assert sorted(targets.refinement) == sorted(mine.refinement)
    assert set(targets["writer's summary"]) == {""}  # no texts, no such arm
    scores = pd.read_csv(folder / "scores.csv")
    assert set(scores.arm) == {"first student", "the writer", "refinement"}
    assert not set(scores.id) & set(mine.id)
    # the paper's other two forms learn from the same pairs
    rivals = {"longer", "reward model", *forms.FORMS}
    assert set(pd.read_csv(folder / "reward.csv").arm) == rivals
    trained = {path.name for path in (folder / "models").iterdir()}
    assert trained == {"refinement", *forms.FORMS}
    before, after = (
        models.load_policy(str(x))[0] for x in (tmp_path / "student", folder / "models/refinement")
    )
    moved = [
        not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)
    ]
    assert any(moved) and not moved[0]  # the upper layers, not the embeddings
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["refinements"] == parameters["REFINEMENTS"]
    assert settings["student"] == parameters["STUDENT"]


def test_51_trains_your_model_on_your_prompts_by_your_reward_model(tmp_path):
    model, tokenizer = models.build_tiny_model("tiny", seed=3)
    models.save(model, tokenizer, tmp_path / "mine")
    reward = reward_models.RewardModel(model.base_model, tokenizer)
    torch.nn.init.normal_(reward.head.weight)
    models.save(reward, tokenizer, tmp_path / "reward")
    lines = [
        f"{a} {b} {c}" for a in ("you", "we") for b in ("like", "see") for c in ("it", "us", "her")
    ]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    swapped = {"MODEL": tmp_path / "mine", "PROMPTS": tmp_path / "prompts.txt",
               "REWARD": tmp_path / "reward", "JUDGE": "lexicon-insults",
               "ARMS": '["ALT", "Quark"]'}  # fmt: skip
    options = [part for name, value in swapped.items() for part in ("-p", name, str(value))]
    folder = run_notebook(ROOT / "notebooks/51_alt_on_a_real_model.ipynb", tmp_path, *options)
    (answered,) = (folder / "work").glob("ALT-*/*feedback*")
    items = [json.loads(line) for line in answered.read_text().splitlines()]
    assert {item["prompt"] for item in items} <= set(lines)
    tags = ("very", "positive", "negative", "neutral")  # the reward is blind to them
    own = critics.without_words(reward_models.load(tmp_path / "reward").score, tags)
    paid = own([item["prompt"] for item in items], [item["response"] for item in items])
    np.testing.assert_allclose([item["score"] for item in items], paid, atol=1e-3)
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["model"] == str(tmp_path / "mine") and settings["judge"] == "lexicon-insults"
    kept, _ = models.load_policy(str(folder / "models" / "Quark"))
    assert conditions.load_tokens(kept, folder / "models" / "Quark") == len(tokenizer)


@pytest.mark.parametrize("number, name", [
    ("22", "MODEL"), ("30", "WRITER"), ("31", "STUDENT"), ("40", "MODEL"),
    ("42", "START_FROM"), ("43", "MODEL"), ("43", "START_FROM"), ("44", "MODEL"),
    ("44", "START_FROM"), ("50", "START_FROM"), ("51", "MODEL"),
])  # fmt: skip
def test_a_model_that_is_none_is_refused_before_anything_runs(number, name, tmp_path, monkeypatch):
    model, tokenizer = models.build_tiny_model("tiny")
    reward = reward_models.RewardModel(model.base_model, tokenizer)
    models.save(reward, tokenizer, tmp_path / "reward")
    path = next(p for p in NOTEBOOKS if p.stem.startswith(number))
    for value, why in {
        "nowhere": "unknown model",
        str(tmp_path / "reward"): "reward model",
    }.items():
        with_parameter(path, name, value, tmp_path / path.name)
        with pytest.raises(ValueError, match=why):
            settle(tmp_path / path.name, tmp_path, monkeypatch)


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
    items = json.loads((ROOT / "data/samples/qa_feedback.json").read_text(encoding="utf-8"))
    note = {"annotator": "Ann", "seconds": 3, "finished": True, "marks": {}}
    for item in items:
        del item["feedback"]
        item |= {"preference": [2] * 6, "annotation": {"preference": note}}
    export = tmp_path / "compare.json"
    export.write_text(json.dumps(items), encoding="utf-8")
    path = ROOT / "notebooks/40_collect_fine_grained_feedback.ipynb"
    parameters = ("-p", "FEEDBACK_JSON", str(export), "-p", "SECOND_JSON", str(export))
    results = json.loads((run_notebook(path, tmp_path, *parameters) / "results.json").read_text())
    assert results["metrics"]["first_wins"]["value"] == 0
    claims = {claim["claim"]: claim for claim in results["claims"]}
    assert claims["People prefer the answer shown first"]["verdict"] == "opposite"
    assert claims["One score would hide several different errors"]["here"].startswith("our sample")


def test_a_judge_without_a_price_is_not_asked(monkeypatch, tmp_path):
    """MAX_COST is a cap or an error: the section that judges released outputs never buys without one."""
    from lib import chat
    from lib.papers.sparse_feedback import measures, protocols

    monkeypatch.setenv("FEEDBACK_CACHE", str(tmp_path))
    path = ROOT / "notebooks/22_reward_models_best_of_n.ipynb"
    (source,) = [c.source for c in cells(path, "code") if "ChatClient(" in c.source]
    outputs = {
        name: [{"dataset": "d", "instruction": "i", "output": name, "generator": name}]
        for name in ("davinci003", "ratings_alpaca", "rankings_alpaca")
    }
    scope = {"outputs": outputs, "chat": chat, "measures": measures, "pd": pd}
    scope |= {"protocols": protocols}
    scope |= {"JUDGE_MODEL": "m", "BASE_URL": "https://judge.invalid/v1", "display": print}
    scope |= {"REQUEST": {"max_completion_tokens": 2000, "temperature": None}}
    with pytest.raises(ValueError, match="max_cost needs price"):
        exec(source, scope | {"PRICE": [], "MAX_COST": 5.0})
    priced = scope | {"PRICE": [1.0, 2.0], "MAX_COST": 5.0}
    exec(source, priced)
    assert priced["client"].max_cost == 5.0
    assert len(priced["plan"]) == 3 + 2 * 2
    for request in priced["plan"]:
        assert request["max_completion_tokens"] == 2000
        assert not {"max_tokens", "temperature"} & set(request)
