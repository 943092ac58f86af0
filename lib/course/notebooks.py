"""The notebooks of the course: their names, parameters, and what their results depend on.

A result is outdated when the notebook's source, parameters, small data files, or a `lib` module it imports
(directly, through others, or by its name in a string) or a file that belongs to it has changed.

Simplified: changed package versions do not make a result outdated.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import json
import os
import re
import warnings
from datetime import datetime
from pathlib import Path

import nbformat
import psutil
from IPython.core.inputtransformer2 import TransformerManager
from nbformat import NotebookNode

from lib import runtime

LIB = Path(__file__).parents[1]
MAX_DATA_FILE = 5_000_000  # bytes; larger files do not count into a fingerprint
NOT_LITERAL = object()  # a parameter whose default is computed, so its type is unknown


class RequestError(ValueError):
    """A request that cannot be met; the message says what was given, what is allowed, what to try."""


# --- notebooks and their parameters --------------------------------------------------------------


def find_notebooks() -> dict[str, Path]:
    """Name -> path of the notebooks of the course, in the order they are read."""
    folder = runtime.project_root() / "notebooks"
    return {path.stem: path for path in sorted(folder.glob("[!.]*.ipynb"))}


def results_root(scale: str) -> Path:
    """Folder of all results at a scale: `$FEEDBACK_OUT` (set by `run --out`), else `runs/<scale>/`."""
    out = os.environ.get("FEEDBACK_OUT")
    return Path(out).resolve() if out else runtime.project_root() / "runs" / scale


def run_folder(name: str, scale: str) -> Path:
    """Where a notebook's results at this scale are."""
    return results_root(scale) / name


def read_notebook(path: Path) -> NotebookNode:
    """Read a notebook; raises RequestError for a file that is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # cells without ids get them here
            return nbformat.read(path, as_version=4)
    except (OSError, ValueError, nbformat.ValidationError) as error:
        raise RequestError(f"{path} cannot be read as a notebook: {error}") from None


def minutes_at_demo(name: str) -> float:
    """Minutes at `demo` on two cores, as the notebook's first table says; 0 where it says none."""
    cells = read_notebook(find_notebooks()[name]).cells
    row = re.search(
        r"\| `demo` \| (?:about )?([\d.]+|an?) minute", cells[0].source if cells else ""
    )
    return 0.0 if not row else 1.0 if row[1].startswith("a") else float(row[1])


def has_tag(cell: NotebookNode, *tags: str) -> bool:
    """Whether a cell has one of these tags."""
    return not set(tags).isdisjoint(cell.metadata.get("tags", []))


def _suggest(name: str, known) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    return f"{hint} Known: {', '.join(known) or 'none'}."


def resolve_notebooks(requests: list[str]) -> list[str]:
    """Names of the notebooks asked for (name, file name, path or number prefix); all if none is.

    Raises RequestError for an unknown or ambiguous one.
    """
    known = find_notebooks()
    if not known:
        raise RequestError(f"there are no notebooks in {runtime.project_root() / 'notebooks'}")
    return list(dict.fromkeys(_resolve(text, known) for text in requests)) or list(known)


def _resolve(text: str, known: dict[str, Path]) -> str:
    path = Path(text)
    if path.is_file() and path.resolve() not in [other.resolve() for other in known.values()]:
        raise RequestError(
            f"{text} is no notebook of the course (solutions are not), so nothing is recorded of it. Open it "
            "in JupyterLab (python -m lib lab), or run it with papermill."
        )
    name = path.name.removesuffix(".ipynb")
    if name in known:
        return name
    matches = [other for other in known if name.isdigit() and other.startswith(name)]
    if len(matches) > 1:
        raise RequestError(f"notebook {text!r} is ambiguous: {', '.join(matches)}.")
    if not matches:
        raise RequestError(f"unknown notebook {text!r}.{_suggest(name, known)}")
    return matches[0]


def read_parameters(path: Path) -> dict[str, object]:
    """Name -> default of each parameter, from the cell tagged `parameters`.

    Read from the syntax tree: papermill's `inspect_notebook` loses defaults that contain `=` or `#`.
    """
    cells = [c for c in read_notebook(path).cells if has_tag(c, "parameters")]
    parameters = {}
    try:
        body = ast.parse(cells[0].source).body if cells else []
    except SyntaxError as error:
        raise RequestError(f"the parameters cell of {path} is no valid Python: {error}") from None
    for node in body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value:
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            try:
                parameters[ast.unparse(target)] = ast.literal_eval(node.value)
            except (ValueError, TypeError):
                parameters[ast.unparse(target)] = NOT_LITERAL
    return parameters


def _fits(value: object, default: object) -> bool:
    if default is None or default is NOT_LITERAL:
        return True
    if isinstance(value, bool) or isinstance(default, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    wider = {float: (int, float), tuple: (list,)}
    return isinstance(value, wider.get(type(default), type(default)))


def _check_parameter(name: str, text: str, default: object) -> object:
    """The value given on the command line, as JSON where it is JSON; raises RequestError on a misfit."""
    try:
        value = json.loads(text, parse_constant=str)
    except ValueError:
        value = text
    if _fits(value, default):
        return value
    hint = f""" Try -p {name} '"{text}"'.""" if isinstance(default, str) else ""
    raise RequestError(
        f"parameter {name} was given {text!r} ({type(value).__name__}); expected "
        f"{type(default).__name__}, like its default {json.dumps(default)}.{hint}"
    )


def assign_parameters(names: list[str], values: list[tuple[str, str]]) -> dict[str, dict]:
    """Notebook -> the given parameters that it has, checked against its parameters cell.

    Raises RequestError for a name that no chosen notebook has and for a value of another type.
    """
    known = {name: read_parameters(find_notebooks()[name]) for name in names}
    chosen: dict[str, dict] = {name: {} for name in names}
    for parameter, text in values:
        if parameter == "SCALE":
            raise RequestError(f"SCALE is set with --scale: try --scale {text}.")
        owners = [name for name in names if parameter in known[name]]
        if not owners:
            every = list(dict.fromkeys(p for n in names for p in known[n] if p != "SCALE"))
            raise RequestError(f"unknown parameter {parameter!r}.{_suggest(parameter, every)}")
        for name in owners:
            chosen[name][parameter] = _check_parameter(parameter, text, known[name][parameter])
    return chosen


# --- what a result depends on --------------------------------------------------------------------


def _module_paths(package: Path) -> dict[str, Path]:
    """Dotted name -> file of every module of `lib`, "lib" itself included."""
    paths = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        paths[".".join(["lib", *parts]).removesuffix(".__init__")] = path
    return paths


def _folder(known: dict[str, Path], name: str) -> str:
    """The package in which a module's relative imports begin."""
    return name if known[name].stem == "__init__" else name.rpartition(".")[0]


def _imported_modules(source: str, inside: str, known: dict[str, Path]) -> set[str]:
    """Modules of `lib` that this Python source imports; `inside`: the package it stands in."""
    names = {"lib"}
    for plain in (str, TransformerManager().transform_cell):  # a cell may have IPython's % and !
        with contextlib.suppress(SyntaxError):
            tree = ast.parse(plain(source))
            break
    else:  # it will fail when it runs; until then it may depend on anything
        return set(known)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = inside.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(filter(None, (package, node.module)))
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value)  # of import_module, python -m, runpy
    if "lib.*" in names:
        return set(known)
    parts = [name.split(".") for name in names]
    above = {".".join(name[:size]) for name in parts for size in range(1, len(name) + 1)}
    return above & set(known)  # importing a module runs the packages above it


def lib_modules(notebook: NotebookNode, package: Path) -> list[Path]:
    """The `lib` modules that a notebook imports, and those that they import, and so on."""
    known = _module_paths(package)
    sources = [("", cell.source) for cell in notebook.cells if cell.cell_type == "code"]
    imported: set[str] = set()
    while sources:
        imports = (_imported_modules(source, inside, known) for inside, source in sources)
        new = set().union(*imports) - imported
        imported |= new
        sources = [(_folder(known, name), known[name].read_text("utf-8")) for name in new]
    return sorted(known[name] for name in imported)


def lib_files(notebook: NotebookNode, package: Path) -> list[Path]:
    """`lib_modules`, and the templates, scripts and tables beside them.

    Those that only a module which is not imported names (the report's pages) are left out.
    """
    modules = lib_modules(notebook, package)
    texts = {path: path.read_text("utf-8") for path in _module_paths(package).values()}
    files = list(modules)
    for path in (path for folder in {m.parent for m in modules} for path in folder.iterdir()):
        if path.is_dir() or path.suffix in (".py", ".pyc") or path.name.startswith("."):
            continue
        naming = {m for m in path.parent.glob("*.py") if path.name in texts[m]}
        if not naming or naming & set(modules):
            files.append(path)
    return sorted(files)


def _small_data() -> list[list[str]]:
    root = runtime.project_root()
    files = [p for kind in ("samples", "results") for p in (root / "data" / kind).rglob("*")]
    small = [p for p in sorted(files) if p.is_file() and p.stat().st_size <= MAX_DATA_FILE]
    return [[str(p.relative_to(root)), runtime.file_hash(p)] for p in small]


def fingerprint(path: Path, scale: str, parameters: dict) -> str:
    """Hash of everything a notebook's result depends on: its cells, not its outputs, ids or metadata."""
    notebook = read_notebook(path)
    cells = [[cell.cell_type, cell.source, has_tag(cell, "parameters")] for cell in notebook.cells]
    made_by = [code_hash(path), _small_data()]
    counts = os.environ.get("FEEDBACK_COUNTS")  # of a rehearsal
    return runtime.content_hash(cells, scale, parameters, *made_by, *filter(None, [counts]))


def code_hash(path: Path) -> str:
    """Hash of a notebook's code cells and of what they use of `lib`: what half-done work was made by."""
    notebook = read_notebook(path)
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    files = [
        [str(path.relative_to(LIB)), runtime.file_hash(path)] for path in lib_files(notebook, LIB)
    ]
    return runtime.content_hash(code, files)


def read_json(path: Path) -> dict:
    """A JSON file's content; empty where there is none."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}


def _alive(record: dict) -> bool:
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(record["pid"])
        began = datetime.fromisoformat(record["started"]).timestamp()
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= began + 1
    return False


def run_state(name: str, scale: str) -> tuple[str, dict]:
    """State of a notebook at a scale and its `run.json`.

    States: not run, running, killed, interrupted, failed, finished, outdated.
    """
    folder = run_folder(name, scale)
    record = read_json(folder / "run.json")
    state = record.get("status", "not run")
    if state == "running" and not _alive(record):
        state = "killed"
    if state == "finished":
        now = fingerprint(find_notebooks()[name], scale, record["given"])
        current = now == record["fingerprint"] and (folder / "results.json").exists()
        state = "finished" if current else "outdated"
    return state, record
