"""Runs the notebooks, remembers what has run, publishes them, and writes the page of results.

One kernel per notebook, through papermill, into `runs/<scale>/<notebook>/`: `executed.ipynb`,
`run.json` (this module), `results.json`, tables and figures (`course.record.Run`, inside the notebook).
A finished notebook is repeated only when its source, parameters, small data files, or a `lib` module
it imports (directly or through others) has changed.

Simplified: notebooks run one after the other; changed package versions do not make a result outdated.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import difflib
import hashlib
import itertools
import json
import logging
import os
import platform
import re
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from datetime import datetime
from importlib import metadata
from pathlib import Path

import filelock
import jinja2
import nbformat
import papermill
import psutil
from IPython.core.inputtransformer2 import TransformerManager
from nbclient.exceptions import DeadKernelError
from nbformat import NotebookNode
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError
from papermill.log import logger as papermill_log

from lib import runtime
from lib.course.record import SCALES, SHOWN_PACKAGES, VERDICTS

LIB = Path(__file__).parent
MAX_DATA_FILE = 5_000_000  # bytes; larger files do not count into a fingerprint
MAX_PUBLISHED = 500_000  # bytes of a committed notebook
KEYS = re.compile(r"\b(?:sk-[\w-]{16,}|hf_[A-Za-z0-9]{16,}|AIza[\w-]{35})")
DEAD_KERNEL = (
    "the kernel died. The usual reason is too little memory (seen here: {seen}). Close other programs, "
    "choose smaller values with -p or a smaller --scale, and run again: finished steps are kept."
)
BADGE = re.compile(r"!\[([^]]*)\]\(https?:[^)]*\)")  # an image from the net; its text is kept
LOCAL_LINK = re.compile(r"\]\((?!\w+:|#)([^)\s]+)\)")
NOT_LITERAL = object()  # a parameter whose default is computed, so its type is unknown
FORMULA = re.compile(  # code and escaped dollars stand first, so that no formula begins in them
    r"(?s)(?P<code>```.*?```|~~~.*?~~~|``.*?``|`[^`]*`|\\\$)|\$\$(?P<block>.+?)\$\$"
    r"|(?<![\w$])\$(?P<inline>[^\s$`](?:[^$\n`]*[^\s$\\`])?)\$(?![\d$])"
)


class RequestError(ValueError):
    """A request that cannot be met; the message says what was given, what is allowed, what to try."""


# --- notebooks and their parameters --------------------------------------------------------------


def find_notebooks() -> dict[str, Path]:
    """Name -> path of the notebooks of the course, in the order they are read."""
    folder = runtime.project_root() / "notebooks"
    return {path.stem: path for path in sorted(folder.glob("[!.]*.ipynb"))}


def run_folder(name: str, scale: str) -> Path:
    """Where a notebook's results at this scale are."""
    return runtime.project_root() / "runs" / scale / name


def read_notebook(path: Path) -> NotebookNode:
    """Read a notebook; raises RequestError for a file that is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # cells without ids get them here
            return nbformat.read(path, as_version=4)
    except (OSError, ValueError, nbformat.ValidationError) as error:
        raise RequestError(f"{path} cannot be read as a notebook: {error}") from None


def has_tag(cell: NotebookNode, *tags: str) -> bool:
    return not set(tags).isdisjoint(cell.metadata.get("tags", []))


def _suggest(given: str, known) -> str:
    close = difflib.get_close_matches(given, known, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    return f"{hint} Known: {', '.join(known) or 'none'}."


def resolve_notebooks(given: list[str]) -> list[str]:
    """Names of the notebooks asked for (name, file name, path or number prefix); all if none is.

    Raises RequestError for an unknown or ambiguous one.
    """
    known = find_notebooks()
    if not known:
        raise RequestError(f"there are no notebooks in {runtime.project_root() / 'notebooks'}")
    return list(dict.fromkeys(_resolve(text, known) for text in given)) or list(known)


def _resolve(text: str, known: dict[str, Path]) -> str:
    name = Path(text).name.removesuffix(".ipynb")
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
    found = {}
    try:
        body = ast.parse(cells[0].source).body if cells else []
    except SyntaxError as error:
        raise RequestError(f"the parameters cell of {path} is no valid Python: {error}") from None
    for node in body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value:
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            try:
                found[ast.unparse(target)] = ast.literal_eval(node.value)
            except (ValueError, TypeError):
                found[ast.unparse(target)] = NOT_LITERAL
    return found


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


def assign_parameters(names: list[str], given: list[tuple[str, str]]) -> dict[str, dict]:
    """Notebook -> the given parameters that it has, checked against its parameters cell.

    Raises RequestError for a name that no chosen notebook has and for a value of another type.
    """
    known = {name: read_parameters(find_notebooks()[name]) for name in names}
    chosen: dict[str, dict] = {name: {} for name in names}
    for parameter, text in given:
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


def _imported_modules(source: str, package: Path) -> set[Path]:
    """Modules of the package that this Python source imports."""
    names = {"__init__"}
    every = {path.stem for path in package.glob("*.py")}
    for plain in (str, TransformerManager().transform_cell):  # a cell may have IPython's % and !
        with contextlib.suppress(SyntaxError):
            tree = ast.parse(plain(source))
            break
    else:  # it will fail when it runs; until then it may depend on anything
        return {package / f"{name}.py" for name in every}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("lib.")}
        elif isinstance(node, ast.ImportFrom):
            base = ("lib." * bool(node.level) + (node.module or "")).strip(".").split(".")
            if base[0] == "lib":
                names |= set(base[1:2]) or {alias.name for alias in node.names}
    return {package / f"{name}.py" for name in (every if "*" in names else names & every)}


def lib_modules(notebook: NotebookNode, package: Path) -> list[Path]:
    """The `lib` modules that a notebook imports, and those that they import, and so on."""
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    found: set[Path] = set()
    while sources:
        new = {m for source in sources for m in _imported_modules(source, package)} - found
        found |= new
        sources = [module.read_text("utf-8") for module in new]
    return sorted(found)


def _small_data() -> list[list[str]]:
    root = runtime.project_root()
    files = [p for kind in ("samples", "results") for p in (root / "data" / kind).rglob("*")]
    small = [p for p in sorted(files) if p.is_file() and p.stat().st_size <= MAX_DATA_FILE]
    return [[str(p.relative_to(root)), hashlib.sha256(p.read_bytes()).hexdigest()] for p in small]


def fingerprint(path: Path, scale: str, parameters: dict) -> str:
    """Hash of everything a notebook's result depends on: its cells, not its outputs, ids or metadata."""
    notebook = read_notebook(path)
    cells = [[cell.cell_type, cell.source, has_tag(cell, "parameters")] for cell in notebook.cells]
    return runtime.content_hash(cells, scale, parameters, code_hash(path), _small_data())


def code_hash(path: Path) -> str:
    """Hash of a notebook's code cells and of the modules they use: what half-done work was made by."""
    notebook = read_notebook(path)
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    modules = [[module.name, module.read_text("utf-8")] for module in lib_modules(notebook, LIB)]
    return runtime.content_hash(code, modules)


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


# --- execution -----------------------------------------------------------------------------------


def duration(seconds: float | None) -> str:
    """Seconds in words: 7 s, 3 min 12 s, 1 h 02 min."""
    if not seconds:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def memory(size: int | None) -> str:
    """Bytes in words."""
    return f"{size / 1e9:.1f} GB" if size else ""


class Watch(threading.Thread):
    """Follows one kernel: its peak memory, the cell it is in, and the progress line on a terminal."""

    def __init__(self, label: str):
        super().__init__(daemon=True)
        self.label, self.peak, self.cells = label, 0, 0
        self.index, self.heading = -1, ""  # of the cell that runs
        self.started: list[dict] = []  # one for each cell of the executed notebook
        self.began, self.stopped = time.time(), threading.Event()
        self.live = sys.stdout.isatty()

    def attach(self, client: PapermillNotebookClient) -> None:
        """Begin to watch the kernel of a client that has just started it."""
        self.kernel = psutil.Process(client.km.provisioner.pid)
        self.cells = sum(not has_tag(cell, "injected-parameters") for cell in client.nb.cells)
        self.start()

    def cell_started(self, cell: NotebookNode, cell_index: int) -> None:
        """Called by nbclient before each cell; the injected parameters are no cell of the source."""
        self.index += not has_tag(cell, "injected-parameters")
        line = next(iter(cell.source.strip().splitlines()), "")
        self.started.append({"index": self.index, "line": line[:100]})
        if cell.cell_type == "markdown":
            headings = re.findall(r"^#+\s+(.+)$", cell.source, re.MULTILINE)
            self.heading = headings[-1] if headings else self.heading

    def run(self) -> None:
        """Sample the process tree every 0.2 s, draw about once a second."""
        for tick in itertools.count():
            with contextlib.suppress(psutil.Error):
                tree = [self.kernel, *self.kernel.children(recursive=True)]
                self.peak = max(self.peak, sum(_resident(process) for process in tree))
            if self.live and tick % 5 == 0:
                spent = duration(time.time() - self.began)
                text = f"{self.label}  cell {self.index + 1}/{self.cells}  {spent}  {self.heading}"
                self._draw(text[: shutil.get_terminal_size().columns - 1])
            if self.stopped.wait(0.2):
                return

    def _draw(self, text: str) -> None:
        print(f"\r\x1b[K{text}", end="", flush=True)

    def stop(self) -> None:
        """End the thread and clear the line."""
        self.stopped.set()
        if self.ident:
            self.join()
        if self.live:
            self._draw("")


def _resident(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.Error):
        return process.memory_info().rss
    return 0


class CourseEngine(NBClientEngine):
    """papermill's engine with the kernel's environment and a watch on it."""

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, *, env, watch, start_timeout, **_):
        """Execute the notebook in a kernel of its own."""
        client = PapermillNotebookClient(
            nb_man, kernel_name=kernel_name, startup_timeout=start_timeout, timeout=None,
            log=papermill_log, on_notebook_start=lambda notebook: watch.attach(client),
            on_cell_start=watch.cell_started,
            extra_arguments=["--IPKernelApp.log_level=CRITICAL"],  # quiet about its own matters
        )  # fmt: skip
        return client.execute(env=env)


papermill_engines.register("course", CourseEngine)


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _new_record(name: str, scale: str, given: dict, source_hash: str) -> dict:
    defaults = read_parameters(find_notebooks()[name])
    used = {k: v for k, v in defaults.items() if v is not NOT_LITERAL} | given
    used |= {"SCALE": scale} if "SCALE" in defaults else {}
    packages = (*SHOWN_PACKAGES, "papermill")
    return {
        "notebook": name, "scale": scale, "status": "running", "given": given, "parameters": used,
        "seed": used.get("SEED"), "fingerprint": source_hash, "code": code_hash(find_notebooks()[name]),
        "device": runtime.describe_device(),
        "cpu_count": os.cpu_count(), "python": platform.python_version(),
        "versions": {package: metadata.version(package) for package in packages},
        "git_commit": runtime.git_commit(), "pid": os.getpid(), "started": _now(),
        "finished": None, "wall_seconds": None, "peak_memory_bytes": None, "error": None,
    }  # fmt: skip


def _clear_folder(folder: Path, everything: bool) -> None:
    """Remove what an older run left; its finished steps (`work/`) only if `everything` is to go."""
    for path in folder.iterdir():
        if path.name not in ((".lock",) if everything else (".lock", "work")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _failure(watch: Watch, name: str, message: str, cell: int = -1) -> tuple[str, dict]:
    """Status and error, with the failing cell's place in the source (0 is the first) and first line."""
    place = watch.started[cell] if watch.started else {}
    return "failed", {**place, "name": name, "message": message}


def _papermill(record: dict, folder: Path, watch: Watch) -> tuple[str, dict | None]:
    """Execute one notebook; return its status and, where it failed, the failing cell."""
    scale, root = record["scale"], runtime.project_root()
    values = record["given"] | ({"SCALE": scale} if "SCALE" in record["parameters"] else {})
    env = {**os.environ, "FEEDBACK_RUN_DIR": str(folder), "FEEDBACK_HEADLESS": "1"}
    env["FEEDBACK_FINGERPRINT"] = record["fingerprint"]
    env |= {"HF_HUB_OFFLINE": "1"} if scale == "smoke" else {}
    paths = [find_notebooks()[record["notebook"]], folder / "executed.ipynb"]
    paths = [str(p).replace("{", "{{").replace("}", "}}") for p in paths]  # papermill formats them
    try:
        papermill.execute_notebook(
            *paths, values, engine_name="course", kernel_name="python3", language="python",
            progress_bar=False, cwd=root, start_timeout=180, watch=watch, env=env,
        )  # fmt: skip
    except PapermillExecutionError as error:
        if error.ename == "StopHere" and (folder / "results.json").exists():
            return "finished", None
        return _failure(watch, error.ename, error.evalue, error.cell_index)
    except DeadKernelError:
        seen = f"{memory(watch.peak)} of {memory(psutil.virtual_memory().total)}"
        return _failure(watch, "DeadKernelError", DEAD_KERNEL.format(seen=seen))
    except KeyboardInterrupt:
        return "interrupted", None
    except Exception as error:  # a kernel that does not start, a full disk: the others still run
        return _failure(watch, type(error).__name__, str(error))
    if not (folder / "results.json").exists():
        missing = "the notebook did not call run.finish(), so there is no results.json"
        return "failed", {"name": "NoResults", "message": missing}
    return "finished", None


def run_notebook(name: str, scale: str, given: dict, *, force: bool, label: str) -> dict:
    """Run one notebook unless its finished result still holds; return its record.

    The record's `status` is finished, skipped, failed, interrupted or busy (another process runs it).
    """
    folder = run_folder(name, scale)
    folder.mkdir(parents=True, exist_ok=True)
    failure = {"notebook": name, "status": "failed"}
    try:
        with filelock.FileLock(folder / ".lock", timeout=0):
            record = read_json(folder / "run.json")
            now = fingerprint(find_notebooks()[name], scale, given)
            whole = record.get("status") == "finished" and (folder / "results.json").exists()
            if whole and record["fingerprint"] == now and not force:
                return record | {"status": "skipped"}
            return _run_locked(_new_record(name, scale, given, now), folder, force, label)
    except filelock.Timeout:
        pid = read_json(folder / "run.json").get("pid", "unknown")
        busy = f"process {pid} is running it now; wait for it or end it, then try again"
        return failure | {"status": "busy", "error": {"name": "Busy", "message": busy}}
    except RequestError as error:  # its file was damaged since the check
        return failure | {"error": {"name": "RequestError", "message": str(error)}}


def _run_locked(record: dict, folder: Path, force: bool, label: str) -> dict:
    # checkpoints and tables of other code would be taken for this code's
    stale = read_json(folder / "run.json").get("code") != record["code"]
    _clear_folder(folder, everything=force or stale)
    runtime.write_atomic(folder / "run.json", runtime.to_json(record))
    watch = Watch(label)
    try:
        record["status"], record["error"] = _papermill(record, folder, watch)
    finally:
        watch.stop()
    record["finished"] = _now()
    record["wall_seconds"] = round(time.time() - watch.began, 2)
    record["peak_memory_bytes"] = watch.peak
    runtime.write_atomic(folder / "run.json", runtime.to_json(record))
    return record


def run_notebooks(
    names: list[str], scale: str, chosen: dict[str, dict], *, force: bool = False
) -> tuple[int, list[dict]]:
    """Run notebooks one after the other, refreshing the report after each; print a summary.

    Returns the exit code (0 all finished, 1 some failed, 130 interrupted) and the records.
    """
    papermill_log.setLevel(logging.CRITICAL)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite end keeps the record whole
    records: list[dict] = []
    report = None
    try:
        for i, name in enumerate(names, start=1):
            label = f"[{i}/{len(names)}] {name}"
            record = run_notebook(name, scale, chosen[name], force=force, label=label)
            records.append(record)
            print(f"{label}  {describe(record)}", flush=True)
            with contextlib.suppress(RequestError):  # another notebook is just being saved
                report = write_report(scale)
            if record["status"] == "interrupted":
                break
    except KeyboardInterrupt:
        records.append({"notebook": name, "status": "interrupted"})
    print(summary(records, scale))
    print(f"Report: {report}" if report else "No report yet.")
    states = {record["status"] for record in records}
    if "interrupted" in states:
        return 130, records
    return (0 if states <= {"finished", "skipped"} else 1), records


def describe(record: dict) -> str:
    """One line about a run: status, time, and the failing cell where there is one."""
    status = {"skipped": "unchanged, not repeated"}.get(record["status"], record["status"])
    line = f"{status}  {duration(record.get('wall_seconds'))}".rstrip()
    error = record.get("error")
    if not error:
        return line
    if "index" not in error:
        return f"{line}: {error['message']}"
    return f"{line} in cell {error['index'] + 1} ({error['line']}): {error['name']}: {error['message']}"


def _count_verdicts(results: dict) -> str:
    verdicts = [claim["verdict"] for claim in results.get("claims", [])]
    short = {"same direction": "same"}
    counts = [(verdicts.count(v), short.get(v, v)) for v in VERDICTS]
    return ", ".join(f"{count} {verdict}" for count, verdict in counts if count)


def summary(records: list[dict], scale: str) -> str:
    """The table printed at the end: notebook, status, wall time, peak memory, claims."""
    rows = [("notebook", "status", "wall time", "peak memory", "claims")]
    for record in records:
        results = read_json(run_folder(record["notebook"], scale) / "results.json")
        claims = _count_verdicts(results) if record["status"] in ("finished", "skipped") else ""
        spent, peak = record.get("wall_seconds"), record.get("peak_memory_bytes")
        rows.append((record["notebook"], record["status"], duration(spent), memory(peak), claims))
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join(["", *lines])


def question(notebook: NotebookNode) -> str:
    """The question a notebook asks: its title, where that is one, else its first cell's first question."""
    text = next((c.source for c in notebook.cells if c.cell_type == "markdown"), "")
    title = re.match(r"# (?:\d+ )?(.*\?)", text)
    if title:
        return title[1].removeprefix("Start here: ")
    text = re.sub(r"^#.*$|<[^>]+>|\[!\[.*?\)\]\(.*?\)|!\[.*?\]\(.*?\)", "", text, flags=re.M)
    text = re.sub(r"\*\*|`|\[(?=[^\]]*\]\()|\]\([^)]*\)", "", text).strip()  # marks go, words stay
    sentences = re.split(r"(?<=[.?!])\s+|\n\s*\n", text)
    asked = next((s for s in sentences if s.endswith("?")), sentences[0])
    return " ".join(asked.split())


def list_notebooks() -> str:
    """Each notebook with its question and, per scale, its state and wall time."""
    lines = []
    for name in resolve_notebooks([]):
        lines.append(f"{name}\n    {question(read_notebook(find_notebooks()[name]))}")
        states = {scale: run_state(name, scale) for scale in SCALES}
        parts = [
            f"{scale}: {state} {duration(record.get('wall_seconds'))}".rstrip()
            for scale, (state, record) in states.items()
        ]
        lines.append("    " + " | ".join(parts))
    return "\n".join(lines)


# --- the page of results -------------------------------------------------------------------------


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "–" if value is None else str(value)


def _math_to_mathml(text: str) -> str:
    """Markdown with its formulas as MathML: the page needs no script, and screen readers read it."""
    from latex2mathml.converter import convert

    def replace(match: re.Match) -> str:
        if match["code"]:
            return match[0]
        formula = re.sub(r"\{aligned\}", "{align*}", match["block"] or match["inline"])
        try:
            html = convert(formula, display="block" if match["block"] else "inline")
        except Exception:  # latex2mathml has no common error class
            return f"`{match[0]}`"
        html = re.sub(' xmlns="[^"]*"', "", html)  # nbconvert would rename the tags in headings
        return re.sub(r"[*_|\\`$~]", lambda mark: f"&#{ord(mark[0])};", html)  # no markdown in it

    return FORMULA.sub(replace, text)


def _link_from_run(link: re.Match) -> str:
    """A notebook's link to another one leads to its results, others to the same file as before."""
    if link[1].endswith(".ipynb"):
        return f"](../index.html#{Path(link[1]).stem})"
    return f"](../../../notebooks/{link[1]})"


def notebook_html(notebook: NotebookNode, title: str) -> str:
    """An executed notebook as one HTML page that needs no network and fits a phone."""
    from nbconvert import HTMLExporter

    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            text = LOCAL_LINK.sub(_link_from_run, BADGE.sub(r"\1", cell.source))
            cell.source = _math_to_mathml(text)
    exporter = HTMLExporter(
        template_name="classic",  # the default template drops the figures' alt text
        extra_template_basedirs=[str(LIB)],
        extra_loaders=[jinja2.FileSystemLoader(LIB)],
        template_file="executed.html.j2",
    )
    return exporter.from_notebook_node(notebook, {"metadata": {"name": title}})[0]


def _refresh_html(folder: Path) -> bool:
    """Bring `executed.html` up to date with `executed.ipynb`; False where there is nothing to show."""
    source, page = folder / "executed.ipynb", folder / "executed.html"
    if not source.exists():
        return False
    if not page.exists() or page.stat().st_mtime < source.stat().st_mtime:
        try:
            html = notebook_html(read_notebook(source), folder.name)
        except RequestError:  # cut off in the middle of a save
            return False
        runtime.write_atomic(page, html)
    return True


def _report_row(name: str, scale: str) -> dict:
    """What the page says about one notebook."""
    state, record = run_state(name, scale)
    folder = run_folder(name, scale)
    results = read_json(folder / "results.json") if state in ("finished", "outdated") else {}
    figures = [f for f in results.get("figures", []) if (folder / f"{f['name']}.png").exists()]
    for figure in figures:
        figure["large"] = "svg" if (folder / f"{figure['name']}.svg").exists() else "png"
    html = state not in ("running", "not run") and _refresh_html(folder)
    asked = question(read_notebook(find_notebooks()[name]))
    return {
        "name": name, "state": state, "record": record, "results": results, "figures": figures,
        "question": asked, "html": html, "verdicts": _count_verdicts(results),
    }  # fmt: skip


def write_report(scale: str) -> Path:
    """Write `runs/<scale>/index.html` from what has run at this scale; return its path."""
    rows = [_report_row(name, scale) for name in resolve_notebooks([])]
    ran = [row["record"] for row in rows if row["record"]]
    templates = jinja2.Environment(loader=jinja2.FileSystemLoader(LIB), autoescape=True)
    templates.filters |= {"number": _number, "duration": duration, "memory": memory}
    page = templates.get_template("report.html.j2").render(
        scale=scale, rows=rows, date=datetime.now().strftime("%Y-%m-%d %H:%M"),
        devices=list(dict.fromkeys(record["device"] for record in ran)),
        commits=list(dict.fromkeys(record["git_commit"] for record in ran)),
    )  # fmt: skip
    return runtime.write_atomic(runtime.project_root() / "runs" / scale / "index.html", page)


# --- publishing ----------------------------------------------------------------------------------


def _map_text(value: object, change: Callable[[str], str]) -> object:
    """Apply `change` to every text in a JSON value, images aside."""
    if isinstance(value, dict):
        return {
            k: v if re.match("image/(?!svg)", k) else _map_text(v, change) for k, v in value.items()
        }
    if isinstance(value, list):
        return [_map_text(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def _hide_paths(text: str) -> str:
    for folder, sign in ((runtime.project_root(), "."), (Path.home(), "~")):
        if len(folder.parts) > 1:
            text = re.sub(rf"(?<![\w.-]){re.escape(str(folder))}(?![\w-])", sign, text)
    return text


def _clean_outputs(cell: NotebookNode) -> list:
    kept = []
    for output in cell.outputs:
        widget = any("widget-view" in kind for kind in output.get("data", {}))
        if output.get("name") != "stderr" and not widget:
            if "execution_count" in output:
                output.execution_count = None
            kept.append(nbformat.from_dict(_map_text(output, _hide_paths)))
    return kept


def clean_notebook(source: NotebookNode, executed: NotebookNode) -> NotebookNode:
    """The source notebook with the outputs of its execution, and nothing of the machine that made them.

    Raises RequestError where the two do not have the same cells.
    """
    ran = [cell for cell in executed.cells if not has_tag(cell, "injected-parameters")]
    if [cell.source for cell in ran] != [cell.source for cell in source.cells]:
        raise RequestError("it was changed while it ran; publish it again")
    clean = copy.deepcopy(source)
    for i, (cell, done) in enumerate(zip(clean.cells, ran, strict=True)):
        cell.setdefault("id", runtime.content_hash(i, cell.source)[:8])
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = _clean_outputs(done), None
    for node in (clean, *clean.cells):
        for key in ("papermill", "widgets", "execution", "ExecuteTime"):
            node.metadata.pop(key, None)
    clean.metadata.kernelspec = dict(display_name="Python 3", language="python", name="python3")
    clean.metadata.language_info = {"name": "python"}
    clean.nbformat_minor = max(clean.nbformat_minor, 5)
    return clean


def _publishable_text(notebook: NotebookNode) -> str:
    """The notebook as text; raises RequestError for a key, a private path, or too large a file."""

    def refuse_keys(text: str) -> str:
        if KEYS.search(text):
            raise RequestError(f"cell {i} shows what looks like a key; remove and revoke it")
        return text

    for i, cell in enumerate(notebook.cells, start=1):
        _map_text(cell, refuse_keys)
        if _hide_paths(cell.source) != cell.source:
            raise RequestError(f"cell {i} names a folder of this machine; write a relative path")
    text = nbformat.writes(notebook, indent=1) + "\n"
    if len(text.encode()) > MAX_PUBLISHED:
        sizes = [(len(json.dumps(cell)), i) for i, cell in enumerate(notebook.cells, start=1)]
        biggest = [f"cell {i} ({size // 1000} kB)" for size, i in sorted(sizes)[:-4:-1]]
        limit = f"{len(text) // 1000} kB, over the limit of {MAX_PUBLISHED // 1000} kB"
        raise RequestError(f"{limit}; the biggest: {', '.join(biggest)}")
    return text


def _publish_figures(name: str, folder: Path) -> None:
    """Copy the figures to `plots/` and remove those that the notebook no longer makes."""
    plots, number = runtime.project_root() / "plots", name.split("_")[0]
    made = set()
    for figure in read_json(folder / "results.json").get("figures", []):
        title = figure["name"].removeprefix(f"{number}_")
        for kind in ("png", "svg"):
            source, target = folder / f"{figure['name']}.{kind}", plots / f"{number}_{title}.{kind}"
            if source.exists():
                runtime.write_atomic(target, source.read_bytes())
                made.add(target)
    for old in {*plots.glob(f"{number}_*.png"), *plots.glob(f"{number}_*.svg")} - made:
        old.unlink()


def publish(names: list[str]) -> int:
    """Run at demo scale what is not up to date, write `notebooks/` and `plots/`; return the exit code."""
    code, records = run_notebooks(names, "demo", {name: {} for name in names})
    for name in (r["notebook"] for r in records if r["status"] in ("finished", "skipped")):
        path, folder = find_notebooks()[name], run_folder(name, "demo")
        try:
            executed = read_notebook(folder / "executed.ipynb")
            text = _publishable_text(clean_notebook(read_notebook(path), executed))
        except RequestError as error:
            print(f"{name} is not published: {error}")
            code = code or 1
            continue
        runtime.write_atomic(path, text)
        _publish_figures(name, folder)
        print(f"{name} published ({len(text) // 1000} kB)")
    return code
