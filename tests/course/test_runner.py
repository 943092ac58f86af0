"""The runner on small notebooks of its own: refuse, skip, fail, continue, publish, report."""

import html.parser
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import nbformat
import psutil
import pytest
from conftest import CHROMIUM
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from lib import runtime
from lib.course import notebooks, publish, report, runner
from lib.course.cli import main

CODE = Path(runner.__file__).parents[2]
PARAMETERS = 'SCALE = "demo"\nSEED = 0\nN: int = 3  # how many\nRATE = 0.5\nFAST = False\n' + (
    'MODEL = "a=b#c"\nFILES = []\nLIMIT = None\nOTHER = {\n    "a": 1,\n}'
)
# What a notebook's `run.finish()` leaves, without the seconds that importing the library takes.
FINISH = (
    "import json, os, pathlib\nfolder = pathlib.Path(os.environ['FEEDBACK_RUN_DIR'])\n"
    "(folder / 'results.json').write_text('{}')"
)
MEASURE = """
import sys
from pathlib import Path
from lib.course.record import Run
run = Run("10_measure", SCALE, SEED, Path(os.environ["FEEDBACK_RUN_DIR"]))
print(run.folder, Path.home() / "models", "at", Path.cwd())
print("noise", file=sys.stderr)
"""
FIGURE = """
import matplotlib.pyplot as plt
figure, axes = plt.subplots(figsize=(9, 3))
axes.plot([1, 2, 3])
run.save_figure(figure, "10_curve", caption="It rises to 3.", alt="a line that rises from 1 to 3")
"""
RECORD = """
run.metric("toxicity/mean", 0.123456, 0.1, 0.2, n=100)
run.claim("Tuning <helps>", paper="0.3 (Table 2)", here="0.12", rule="interval below 0.3",
          verdict="same direction", why="a smaller model")
run.claim("More helps", paper="0.1 (Table 3)", here="0.1", rule="p < 0.05", verdict="not demonstrated")
run.finish()
"""
LESSON = (
    r"""## 1 Loss $a_1 * b_2 * c$

$$\mathcal{L} = -\log \sigma(r_\theta(x, y_w) - r_\theta(x, y_l))
+ \sum_{t=1}^{T} \gamma^t \hat{A}_t + \frac{1}{2}\mathbb{E}[x]$$

It costs $5, not $10, and `$code$` stays. [![Colab](https://example.com/badge.svg)](https://example.com)

| a | b |
|---|---|
| $|x|$ | """
    + "wide " * 80
    + "|"
)


def write(root, name, *cells, parameters=PARAMETERS):
    """Write a notebook: a title with a question, the parameters cell, and these cells of code."""
    first = new_code_cell(parameters)
    first.metadata["tags"] = ["parameters"]
    title = new_markdown_cell(
        f"# {name}\n\nA [course](#x) with [data](../data/README.md) and [more](20_fails.ipynb). "
        f"Does **{name}** run? It does."
    )
    cells = [c if isinstance(c, dict) else new_code_cell(c) for c in cells]
    book = new_notebook(cells=[title, first, *cells])
    book.metadata.kernelspec = {"name": "python3", "display_name": "mine", "language": "python"}
    for i, cell in enumerate(book.cells):
        cell.id = f"cell-{i}"
    path = root / "notebooks" / f"{name}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(book, path)
    return path


def record_of(root, name, scale="demo"):
    return json.loads((root / "runs" / scale / name / "run.json").read_text())


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty project."""
    monkeypatch.setenv("FEEDBACK_ROOT", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A project in which four notebooks have run: one well, three failing in different ways."""
    root = tmp_path_factory.mktemp("course")
    (root / "data").mkdir()
    (root / "data" / "README.md").touch()
    lesson, table = new_markdown_cell(LESSON), "import pandas\npandas.DataFrame([range(40)])"
    write(root, "10_measure", "import os", MEASURE, lesson, table, FIGURE, RECORD)
    write(root, "20_fails", "print('before')", "x = 1\nraise ValueError('too small')", "print(2)")
    write(root, "21_dies", "import os\nos.kill(os.getpid(), 9)")
    write(root, "22_forgets", "1 + 1")
    write(root, "30_waits", FINISH)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEEDBACK_ROOT", str(root))
        code, records = runner.run_notebooks(
            ["20_fails", "21_dies", "22_forgets", "10_measure"],
            "demo",
            dict.fromkeys(["20_fails", "21_dies", "22_forgets", "10_measure"], {}),
        )
        assert code == 1
        yield root


# --- naming notebooks and parameters -------------------------------------------------------------


@pytest.mark.parametrize("text", ["10_a", "10_a.ipynb", "notebooks/10_a.ipynb", "10"])
def test_a_notebook_is_found_by_name_file_and_number(root, text):
    write(root, "10_a")
    write(root, "11_b")
    assert notebooks.resolve_notebooks([text, "10_a"]) == ["10_a"]
    assert notebooks.resolve_notebooks([]) == ["10_a", "11_b"]


def test_solutions_are_no_notebooks_of_the_course(root):
    lesson = write(root, "10_a")
    solution = write(root, "solutions/10_a")
    assert list(notebooks.find_notebooks().values()) == [lesson]
    assert notebooks.resolve_notebooks([str(lesson)]) == ["10_a"]
    with pytest.raises(notebooks.RequestError, match="is no notebook of the course"):
        notebooks.resolve_notebooks([str(solution)])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "10_toxcity"], ["10_toxcity", "Did you mean 10_toxicity?", "11_other"]),
        (["run", "1"], ["ambiguous", "10_toxicity, 11_other"]),
        (["run", "12"], ["'12'", "10_toxicity, 11_other"]),
        (["publish", "nothing"], ["nothing", "Known: 10_toxicity"]),
        (["run", "-p", "SEDE", "1"], ["'SEDE'", "Did you mean SEED?", "LIMIT"]),
        (["run", "-p", "SCALE", "smoke"], ["--scale smoke"]),
        (["run", "10", "-p", "N", "many"], ["N", "'many'", "str", "int", "3"]),
        (["run", "10", "-p", "N", "2.5"], ["'2.5'", "float", "int"]),
        (["run", "10", "-p", "N", "true"], ["bool", "int"]),
        (["run", "10", "-p", "FAST", "1"], ["int", "bool", "false"]),
        (["run", "10", "-p", "FAST", "True"], ["str", "bool"]),
        (["run", "10", "-p", "RATE", "high"], ["str", "float"]),
        (["run", "10", "-p", "MODEL", "5"], ["int", "str", "'\"5\"'"]),
        (["run", "10", "-p", "MODEL", "null"], ["NoneType", "str"]),
        (["run", "10", "-p", "FILES", "a.csv"], ["str", "list"]),
        (["run", "10", "-p", "OTHER", "[1]"], ["list", "dict"]),
        (["run", "10", "--scale", "huge"], ["huge", "smoke", "demo", "full"]),
    ],
)
def test_a_wrong_request_is_refused_before_anything_runs(root, capsys, arguments, said):
    write(root, "10_toxicity")
    write(root, "11_other")
    try:
        code = main(arguments)
    except SystemExit as stop:  # argparse's own
        code = stop.code
    assert code == 2
    message = capsys.readouterr().err
    assert all(part in message for part in said), message
    assert not (root / "runs").exists()


def test_refusals_from_the_shell_show_no_traceback(root):
    write(root, "10_toxicity")
    for arguments in (["run", "nothing"], ["run", "-p", "N", "x"]):
        done = subprocess.run(
            [sys.executable, "-m", "lib", *arguments], cwd=CODE, capture_output=True, text=True
        )
        assert done.returncode == 2 and done.stderr.startswith("error: ")
        assert "Traceback" not in done.stderr


def test_values_are_json_where_they_fit_and_go_to_the_notebooks_that_have_them(root):
    write(root, "10_a")
    write(root, "11_b", parameters="SEED = 0\nSIZE = 2 * 3")
    given = [("N", "7"), ("RATE", "2"), ("FILES", '["a", "b"]'), ("MODEL", "org/x"), ("SEED", "4")]
    given += [("LIMIT", "no limit"), ("FAST", "true"), ("OTHER", '{"b": 2}'), ("SIZE", "9")]
    chosen = notebooks.assign_parameters(["10_a", "11_b"], given)
    assert chosen["10_a"] == {
        "N": 7, "RATE": 2, "FILES": ["a", "b"], "MODEL": "org/x", "SEED": 4, "LIMIT": "no limit",
        "FAST": True, "OTHER": {"b": 2},
    }  # fmt: skip
    assert chosen["11_b"] == {"SEED": 4, "SIZE": 9}


def test_broken_files_are_named(root):
    write(root, "10_a", parameters="SCALE = = 1")
    with pytest.raises(notebooks.RequestError, match="10_a.ipynb"):
        notebooks.assign_parameters(["10_a"], [])
    (root / "notebooks" / "11_b.ipynb").write_text("{")
    with pytest.raises(notebooks.RequestError, match="11_b.ipynb cannot be read"):
        notebooks.assign_parameters(["11_b"], [])


# --- skipping ------------------------------------------------------------------------------------


def test_lib_modules_follow_every_form_of_import(tmp_path):
    sources = {
        "__init__": "", "a": "from lib import b, no_module", "b": "def f():\n    import lib.c as c",
        "c": "from .d import x", "d": "", "e": "from lib.f import y", "f": "", "g": "",
    }  # fmt: skip
    for name, source in sources.items():
        (tmp_path / f"{name}.py").write_text(source)

    def closure(*code):
        notebook = new_notebook(cells=[new_code_cell(source) for source in code])
        return {path.stem for path in notebooks.lib_modules(notebook, tmp_path)}

    assert closure("import torch") == {"__init__"}
    assert closure("%matplotlib inline\nfrom lib.a import x") == {"__init__", "a", "b", "c", "d"}
    assert closure("import lib.e", "!ls\nfrom lib import (\n  d,\n)") == {"__init__", "d", "e", "f"}
    assert closure("importlib.import_module('lib.c')") == {"__init__", "c", "d"}
    assert closure("from lib import *") == set(sources)
    assert closure("def broken(") == set(sources)


def test_lib_modules_follow_imports_into_packages(tmp_path):
    sources = {
        "__init__": "", "a": "from lib.shelf import b", "shelf/__init__": "from lib import e",
        "shelf/b": "from .c import x\nfrom . import d", "shelf/c": "from ..f import y", "shelf/d": "",
        "e": "", "f": "", "shelf/deep/__init__": "", "shelf/deep/g": "from ..c import x", "h": "",
    }  # fmt: skip
    for name, source in sources.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.py").write_text(source)

    def closure(code):
        notebook = new_notebook(cells=[new_code_cell(code)])
        found = notebooks.lib_modules(notebook, tmp_path)
        return {str(path.relative_to(tmp_path).with_suffix("")) for path in found}

    shelf = {"__init__", "shelf/__init__", "e"}
    assert closure("import lib.shelf") == shelf
    assert closure("from lib import shelf") == shelf
    assert closure("from lib.shelf.c import x") == shelf | {"shelf/c", "f"}
    assert closure("import lib.shelf.deep.g as g") == shelf | {
        "shelf/deep/__init__", "shelf/deep/g", "shelf/c", "f",
    }  # fmt: skip
    assert closure("from lib import a") == shelf | {"a", "shelf/b", "shelf/c", "shelf/d", "f"}


def test_every_notebook_depends_on_what_is_imported_by_name_and_on_the_pages_it_writes():
    def used(code):
        notebook = new_notebook(cells=[new_code_cell(code)])
        files = notebooks.lib_files(notebook, notebooks.LIB)
        return {str(path.relative_to(notebooks.LIB)) for path in files}

    assert "fast.py" in used("from lib import generation")
    pages = {f"annotate/{name}" for name in ("page.js", "spans.js", "page.css", "page.html.j2")}
    assert pages <= used("from lib import annotate")
    assert not pages & used("from lib import stats")
    assert "course/released.json" in used("from lib.course import fetch")
    assert "course/report.html.j2" not in used("from lib.course import fetch, record")


def test_a_fingerprint_changes_with_what_a_result_depends_on_only(root, monkeypatch):
    package = root / "package"
    package.mkdir()
    for name in ("__init__", "used", "unused"):
        (package / f"{name}.py").write_text("")
    (package / "page.css").write_text("")
    (package / "report.css").write_text("")
    (package / "unused.py").write_text("'report.css'")
    monkeypatch.setattr(notebooks, "LIB", package)
    path = write(root, "10_a", "from lib import used")
    before = notebooks.fingerprint(path, "demo", {})

    book = nbformat.read(path, 4)
    book.cells[2].update(outputs=[new_output("stream", text="seen")], execution_count=9, id="new")
    book.metadata["widgets"] = {}
    nbformat.write(book, path)
    (package / "unused.py").write_text("changed = 'report.css'")
    (package / "report.css").write_text("changed")
    (root / "data" / "results").mkdir(parents=True)
    (root / "data" / "results" / "big.csv").write_bytes(b"0" * (notebooks.MAX_DATA_FILE + 1))
    assert notebooks.fingerprint(path, "demo", {}) == before

    seen = {
        before,
        notebooks.fingerprint(path, "smoke", {}),
        notebooks.fingerprint(path, "demo", {"N": 1}),
    }
    (package / "used.py").write_text("changed = 1")
    seen.add(notebooks.fingerprint(path, "demo", {}))
    (package / "page.css").write_text("changed")
    seen.add(notebooks.fingerprint(path, "demo", {}))
    (root / "data" / "results" / "small.csv").write_text("a,b")
    seen.add(notebooks.fingerprint(path, "demo", {}))
    write(root, "10_a", "from lib import used  # changed")
    seen.add(notebooks.fingerprint(path, "demo", {}))
    assert len(seen) == 7


def test_a_console_that_lacks_a_letter_ends_nothing(monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", console)
    monkeypatch.setattr(report, "list_notebooks", lambda: "better \u2192 worse \U0001f600")
    assert main(["list"]) == 0
    console.flush()
    assert console.buffer.getvalue().split(b"\n")[0] == rb"better \u2192 worse \U0001f600"


def test_a_finished_run_is_repeated_only_when_it_must_be(root, capsys):
    count = "\nopen('count.txt', 'a').write(f'{N} ')"
    write(root, "10_a", FINISH + count)
    folder, runs = root / "runs" / "smoke" / "10_a", lambda: (root / "count.txt").read_text()
    command = ["run", "10", "--scale", "smoke"]
    assert main(command) == 0 and runs() == "3 "
    (folder / "old.png").touch()
    (folder / "work").mkdir()
    (folder / "work" / "step").touch()

    capsys.readouterr()
    assert main(command) == 0 and runs() == "3 "
    assert "unchanged, not repeated" in capsys.readouterr().out
    assert main([*command, "-p", "N", "4"]) == 0 and runs() == "3 4 "
    assert not (folder / "old.png").exists() and (folder / "work" / "step").exists()
    record = record_of(root, "10_a", "smoke")
    assert record["status"] == "finished" and record["scale"] == "smoke" and record["seed"] == 0
    assert record["parameters"]["N"] == 4 and record["parameters"]["SCALE"] == "smoke"
    assert record["peak_memory_bytes"] > 1e7 and 0 < record["wall_seconds"] < 30
    assert record["versions"]["torch"] and record["error"] is None

    (folder / "results.json").unlink()
    assert main([*command, "-p", "N", "4"]) == 0 and runs() == "3 4 4 "
    assert main([*command, "-p", "N", "4", "--force"]) == 0 and runs() == "3 4 4 4 "
    assert not (folder / "work").exists()

    capsys.readouterr()
    assert main(["list"]) == 0
    listed = capsys.readouterr().out
    assert (
        "Does 10_a run?\n" in listed and "demo: not run" in listed and "smoke: finished" in listed
    )
    (folder / "work").mkdir()
    write(root, "10_a", FINISH + count + "  # changed")
    main(["list"])
    assert "smoke: outdated" in capsys.readouterr().out
    assert main(command) == 0 and not (folder / "work").exists(), "other code's work was kept"


# --- failing, dying, stopping --------------------------------------------------------------------


def test_a_failing_notebook_names_its_cell_and_the_others_run(course):
    record = record_of(course, "20_fails")
    assert record["status"] == "failed"
    assert record["error"] == {
        "index": 3, "line": "x = 1", "name": "ValueError", "message": "too small",
    }  # fmt: skip
    partial = (course / "runs/demo/20_fails/executed.ipynb").read_text()
    assert "before" in partial and "too small" in partial
    assert record_of(course, "10_measure")["status"] == "finished"


def test_a_dead_kernel_and_missing_results_are_explained(course):
    dead = record_of(course, "21_dies")
    assert dead["status"] == "failed" and dead["error"]["index"] == 2
    assert "too little memory" in dead["error"]["message"] and "-p" in dead["error"]["message"]
    forgot = record_of(course, "22_forgets")
    assert forgot["status"] == "failed" and "run.finish()" in forgot["error"]["message"]


def test_the_summary_has_one_line_for_each_notebook(course):
    names = ("10_measure", "20_fails")
    lines = report.summary([record_of(course, name) for name in names], "demo").strip().splitlines()
    assert re.sub(r"\s{2,}", "|", lines[0]) == "notebook|status|wall time|peak memory|claims"
    assert lines[1].startswith("10_measure  finished")
    assert lines[1].endswith("1 same, 1 not demonstrated")
    assert re.match(r"20_fails +failed +\d+ s +\d\.\d GB$", lines[2])


def test_a_second_runner_is_refused_and_names_the_first(root, capsys):
    write(root, "10_a", FINISH)
    folder = root / "runs" / "demo" / "10_a"
    folder.mkdir(parents=True)
    record = {"status": "running", "pid": os.getpid(), "started": runner._now(), "given": {}}
    record |= {"device": "CPU", "git_commit": "abc", "seed": 0}
    (folder / "run.json").write_text(json.dumps(record))
    with filelock.FileLock(folder / ".lock"):
        assert main(["run", "10_a"]) == 1
    assert f"process {os.getpid()} is running it" in capsys.readouterr().out
    assert notebooks.run_state("10_a", "demo")[0] == "running"
    (folder / "run.json").write_text(json.dumps(record | {"pid": 2**22 + 1}))
    assert notebooks.run_state("10_a", "demo")[0] == "killed"


def start_and_wait(root, sign):
    """Start the command line on 10_a and wait until the notebook has written `sign`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lib", "run", "10_a"], cwd=CODE, stdout=subprocess.PIPE, text=True
    )
    for _ in range(600):
        if (root / sign).exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    assert (root / sign).exists()
    return process, psutil.Process(process.pid).children(recursive=True)


def test_a_killed_run_continues_with_what_was_finished(root):
    step = (
        "import os, pandas, time\nfrom pathlib import Path\nfrom lib.course.record import Run\n"
        "run = Run('10_a', SCALE, SEED, Path(os.environ['FEEDBACK_RUN_DIR']))\n"
        "def make():\n    open('made.txt', 'a').write('x')\n    return pandas.DataFrame({'a': [1, 2]})\n"
        "table = run.cached('step', make, n=N)"
    )
    wait = "if not Path('waited').exists():\n    Path('waited').touch()\n    time.sleep(120)"
    shutil.copytree(
        notebooks.LIB, root / "lib"
    )  # the step's key holds a hash of lib, which may be edited
    write(root, "10_a", step, wait, "run.metric('sum', int(table.a.sum()))\nrun.finish()")
    process, kernels = start_and_wait(root, "waited")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert kernels and not psutil.wait_procs(kernels, timeout=20)[1]  # no kernel lives on
    assert notebooks.run_state("10_a", "demo")[0] == "killed"
    assert main(["run", "10_a"]) == 0
    assert (root / "made.txt").read_text() == "x"
    results = json.loads((root / "runs/demo/10_a/results.json").read_text())
    assert results["metrics"]["sum"]["value"] == 3


def test_an_interrupted_run_says_so(root):
    write(root, "10_a", "import pathlib, time\npathlib.Path('on').touch()\ntime.sleep(120)")
    process, kernels = start_and_wait(root, "on")
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "10_a      interrupted" in out and "Report: " in out
    assert record_of(root, "10_a")["status"] == "interrupted"
    assert not psutil.wait_procs(kernels, timeout=20)[1]


def test_the_progress_line_shows_notebook_cell_section_and_time(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    watch = runner.Watch("[2/9] 10_a")
    watch.live, watch.kernel, watch.cells = True, psutil.Process(), 7
    watch.cell_started(new_markdown_cell("# Title\ntext\n## The loss " + "x" * 99), 0)
    watch.start()
    watch.stop()
    line = capsys.readouterr().out.split("\r\x1b[K")[1]
    assert line.startswith("[2/9] 10_a  cell 1/7  0 s  The loss xxx") and len(line) == 59
    assert watch.peak > 1e7


# --- publishing ----------------------------------------------------------------------------------


def test_publish_cleans_and_does_not_make_the_run_outdated(course, capsys):
    (course / "plots").mkdir(exist_ok=True)
    for name in ("10_stale.png", "11_other.png", "README.md"):
        (course / "plots" / name).touch()
    source = nbformat.read(course / "notebooks/10_measure.ipynb", 4)
    assert main(["publish", "10"]) == 0
    assert "unchanged, not repeated" in capsys.readouterr().out
    text = (course / "notebooks/10_measure.ipynb").read_text()
    book = nbformat.reads(text, 4)
    nbformat.validate(book)
    assert text == nbformat.writes(book, indent=1) + "\n"
    assert [(c.id, c.source) for c in book.cells] == [(c.id, c.source) for c in source.cells]
    assert book.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert all(set(c.metadata) <= {"tags"} for c in book.cells)
    printed = book.cells[3].outputs
    assert [o.name for o in printed] == ["stdout"]  # stderr is gone
    assert printed[0].text == "./runs/demo/10_measure ~/models at .\n"
    shown = book.cells[6].outputs[0]
    assert shown.metadata["image/png"]["alt"] == "a line that rises from 1 to 3"
    plots = {path.name for path in (course / "plots").iterdir()}
    assert plots == {"10_curve.png", "10_curve.svg", "11_other.png", "README.md"}
    assert main(["publish", "10"]) == 0
    assert (course / "notebooks/10_measure.ipynb").read_text() == text
    assert notebooks.run_state("10_measure", "demo")[0] == "finished"


def test_a_failed_notebook_is_not_published(course, capsys):
    before = (course / "notebooks/22_forgets.ipynb").read_text()
    assert main(["publish", "22"]) == 1
    assert (course / "notebooks/22_forgets.ipynb").read_text() == before
    assert "published" not in capsys.readouterr().out


def one_cell(source="1", **data):
    outputs = [new_output("display_data", data={k.replace("_", "/"): v for k, v in data.items()})]
    return new_notebook(cells=[new_code_cell(source, outputs=outputs)])


@pytest.mark.parametrize(
    ("notebook", "said"),
    [
        (one_cell('key = "sk-abcdefghij0123456789"'), "cell 1 .* key"),
        (one_cell(text_plain="\nhf_abcdefghij0123456789"), "cell 1 .* key"),
        (one_cell(text_html="x" * 600_000), r"600 kB.*cell 1 \(600 kB\)"),
        (one_cell(f'open("{Path.home()}/x.csv")'), "cell 1 names a folder"),
    ],
)
def test_what_must_not_be_published_is_refused(root, notebook, said):
    with pytest.raises(notebooks.RequestError, match=said):
        publish._publishable_text(notebook)


def test_clean_notebook_drops_widgets_and_notices_a_changed_source(root):
    source, executed = one_cell(), one_cell(**{"application_vnd.jupyter.widget-view+json": {}})
    executed.cells[0].metadata["execution"] = {"time": 1}
    clean = publish.clean_notebook(source, executed)
    assert clean.cells[0].outputs == [] and clean.cells[0].metadata == {}
    with pytest.raises(notebooks.RequestError, match="changed while it ran"):
        publish.clean_notebook(one_cell("2"), executed)


# --- the page of results -------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """Links and images of a page, and its visible text."""

    def __init__(self, path):
        super().__init__()
        self.path, self.targets, self.alts, self.tags, self.words = path, [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.targets += [attributes[key] for key in ("href", "src") if key in attributes]
        self.alts += [attributes.get("alt")] if tag == "img" else []

    def handle_data(self, data):
        self.words.append(data)

    def broken(self):
        """Local targets that do not exist."""
        local = [t for t in self.targets if not re.match(r"#|data:|https?:", t)]
        return [t for t in local if not (self.path.parent / t.split("#")[0]).exists()]


def test_the_report_holds_what_ran_at_this_scale(course, capsys):
    assert main(["report"]) == 0
    path = course / "runs/demo/index.html"
    assert str(path) in capsys.readouterr().out
    page = Page(path)
    for part in (
        "✓ same direction", "○ not demonstrated", "0.3 (Table 2)", "interval below 0.3",
        "Tuning <helps>", "toxicity/mean 0.1235 0.1 to 0.2 100 1", "It rises to 3.",
        "ValueError: too small", "Failed in cell 4 : x = 1", "30_waits ○ not run", "demo scale",
        "Does 10_measure run?", runtime.describe_device(),
    ):  # fmt: skip
        assert part in page.text, part
    assert page.alts == ["a line that rises from 1 to 3"] and page.broken() == []
    assert "10_measure/executed.html" in page.targets and "script" not in page.tags
    assert main(["report", "--scale", "full"]) == 0
    other = Page(course / "runs/full/index.html").text
    assert "nothing has run yet" in other and "same direction" not in other


def test_an_executed_notebook_is_a_page_without_network(course):
    page = Page(course / "runs/demo/10_measure/executed.html")
    assert "script" not in page.tags and page.tags.count("math") == 3
    assert page.alts == ["a line that rises from 1 to 3"] and page.broken() == []
    assert "../index.html#20_fails" in page.targets
    assert not any(
        t.startswith("http") and t.endswith((".js", ".css", ".svg")) for t in page.targets
    )
    assert "It costs $5, not $10, and $code$ stays." in page.text


def test_formulas_become_mathml_and_nothing_else_does():
    convert = report.math_to_mathml
    for text in (r"\$5 and $6", "`$x$`", "```\n$x$\n```", "$ x $", "10$ and 20$", "a$b$5"):
        assert convert(text) == text
    made = convert("so $a * b_1 * c$ and $$x$$")
    assert made.count("<math") == 2 and 'display="block"' in made
    assert not set("*_") & set(made)
    assert "mtable" in convert(r"$$\begin{aligned} a &= b \\ c &= d \end{aligned}$$")
    assert convert(r"$\frac{$") == r"`$\frac{$`"


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt install chromium)")
@pytest.mark.parametrize("name", ["index", "10_measure/executed", "20_fails/executed"])
def test_pages_fit_a_phone_and_load_their_images_in_a_browser(course, name, tmp_path):
    path = course / "runs/demo" / f"{name}.html"
    probe = """<script>addEventListener("load", () => parent.postMessage({
      broken: [...document.images].filter(image => !image.naturalWidth).map(image => image.src),
      images: document.images.length, width: document.documentElement.scrollWidth,
    }, "*"))</script></body>"""
    copy, frame = path.with_name("probe.html"), path.with_name("frame.html")
    copy.write_text(path.read_text(encoding="utf-8").replace("</body>", probe), encoding="utf-8")
    # A window cannot be as narrow as a phone, a frame can.
    frame.write_text(
        "<body><script>onmessage = e => { document.body.textContent = JSON.stringify(e.data) }"
        '</script><iframe src="probe.html" width="375" height="800" style="border:0"></iframe>'
    )
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
        "--disable-background-networking", "--hide-scrollbars", f"--user-data-dir={tmp_path}",
        "--virtual-time-budget=5000", "--dump-dom", frame.as_uri(),
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    finally:
        copy.unlink()
        frame.unlink()
    found = json.loads(re.search(r"<body>(\{.*?\})", done.stdout)[1])
    assert found["broken"] == [] and found["width"] == 375
    assert found["images"] == (0 if name.startswith("20") else 1)
