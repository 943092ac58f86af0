"""Runs the notebooks, one kernel each, and remembers what has run.

Through papermill, into `runs/<scale>/<notebook>/`: `executed.ipynb`, `run.json` (this module),
`results.json`, tables and figures (`record.Run`, inside the notebook).  A finished notebook is repeated
only when what its result depends on has changed (`notebooks.fingerprint`).

Several notebooks run one after the other, or side by side in processes of their own.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import platform
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from importlib import metadata
from pathlib import Path

import filelock
import papermill
import psutil
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from nbformat import NotebookNode
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError
from papermill.log import logger as papermill_log

from lib import runtime
from lib.course import notebooks, ranks, side_by_side
from lib.course.record import SHOWN_PACKAGES
from lib.course.report import describe, duration, memory, summary, write_report

DEAD_KERNEL = (
    "the kernel died. The usual reason is too little memory (seen here: {seen}). Close other programs, "
    "choose smaller values with -p or a smaller --scale, and run again: finished steps are kept."
)


# --- execution -----------------------------------------------------------------------------------


class Watch(threading.Thread):
    """Follows one kernel: its peak memory, the cell it is in, and the progress line on a terminal.

    Of a run on several processes it counts the memory of all, and ends the kernel where another has failed.
    """

    def __init__(self, label: str, others: ranks.Others | None = None):
        super().__init__(daemon=True)
        self.label, self.peak, self.cells = label, 0, 0
        self.others = others or ranks.Others(1)
        self.index, self.heading = -1, ""  # of the cell that runs
        self.started: list[dict] = []  # one for each cell of the executed notebook
        self.began, self.stopped = time.time(), threading.Event()
        self.live = sys.stdout.isatty() and bool(label)

    def attach(self, client: PapermillNotebookClient) -> None:
        """Begin to watch the kernel of a client that has just started it."""
        self.kernel = psutil.Process(client.km.provisioner.pid)
        self.cells = sum(
            not notebooks.has_tag(cell, "injected-parameters") for cell in client.nb.cells
        )
        self.start()

    def cell_started(self, cell: NotebookNode, cell_index: int) -> None:
        """Called by nbclient before each cell; the injected parameters are no cell of the source."""
        self.index += not notebooks.has_tag(cell, "injected-parameters")
        line = next(iter(cell.source.strip().splitlines()), "")
        self.started.append({"index": self.index, "line": line[:100]})
        if cell.cell_type == "markdown":
            headings = re.findall(r"^#+\s+(.+)$", cell.source, re.MULTILINE)
            self.heading = headings[-1] if headings else self.heading

    def run(self) -> None:
        """Sample the process tree every 0.2 s, draw about once a second."""
        for tick in itertools.count():
            with contextlib.suppress(psutil.Error):
                if self.others.failure():
                    self.kernel.kill()
                roots = [self.kernel, *self.others.running()]
                tree = [p for root in roots for p in (root, *root.children(recursive=True))]
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


class OwnKernel(AsyncKernelManager):
    """The kernel of the Python that runs this, whatever other Python a kernelspec "python3" names."""

    @property
    def kernel_spec(self) -> KernelSpec:
        """How this Python starts its kernel."""
        return KernelSpec(**get_kernel_dict())


class CourseEngine(NBClientEngine):
    """papermill's engine with the kernel's environment and a watch on it."""

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, *, env, watch, start_timeout, **_):
        """Execute the notebook in a kernel of its own."""
        client = PapermillNotebookClient(
            nb_man, kernel_name=kernel_name, startup_timeout=start_timeout, timeout=None,
            log=papermill_log, on_notebook_start=lambda notebook: watch.attach(client),
            on_cell_start=watch.cell_started,
            kernel_manager_class=OwnKernel,
            extra_arguments=["--IPKernelApp.log_level=CRITICAL"],  # quiet about its own matters
        )  # fmt: skip
        return client.execute(env=env)


papermill_engines.register("course", CourseEngine)


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _new_record(name: str, scale: str, values: dict, source_hash: str) -> dict:
    defaults = notebooks.read_parameters(notebooks.find_notebooks()[name])
    used = {k: v for k, v in defaults.items() if v is not notebooks.NOT_LITERAL} | values
    used |= {"SCALE": scale} if "SCALE" in defaults else {}
    packages = (*SHOWN_PACKAGES, "papermill")
    return {
        "notebook": name, "scale": scale, "status": "running", "given": values, "parameters": used,
        "seed": used.get("SEED"), "fingerprint": source_hash,
        "code": notebooks.code_hash(notebooks.find_notebooks()[name]),
        "device": runtime.describe_device(),
        "cpu_count": os.cpu_count(), "python": platform.python_version(),
        "versions": {package: metadata.version(package) for package in packages},
        "git_commit": runtime.git_commit(), "pid": os.getpid(), "started": _now(),
        "finished": None, "wall_seconds": None, "peak_memory_bytes": None, "error": None,
    }  # fmt: skip


def _clear_folder(folder: Path, everything: bool) -> None:
    """Remove what an older run left; its finished steps (`work/`) only if `everything` is to go.

    What it trained stays until this run keeps something under the same name.
    """
    stays = (".lock", "models") if everything else (".lock", "models", "work")
    for path in folder.iterdir():
        if path.name not in stays:
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
    others, source = watch.others, notebooks.find_notebooks()[record["notebook"]]
    others.start(source, values, folder, env)
    env |= others.environment(0)
    paths = [source, folder / "executed.ipynb"]
    paths = [str(p).replace("{", "{{").replace("}", "}}") for p in paths]  # papermill formats them
    try:
        papermill.execute_notebook(
            *paths, values, engine_name="course", kernel_name="python3", language="python",
            progress_bar=False, cwd=root, start_timeout=180, watch=watch, env=env,
        )  # fmt: skip
        others.wait()
    except PapermillExecutionError as error:
        if error.ename == "StopHere" and (folder / "results.json").exists():
            return "finished", None
        return _failure(watch, error.ename, error.evalue, error.cell_index)
    except DeadKernelError:
        if failure := others.failure():
            return _failure(watch, "ProcessFailed", failure)
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


def run_notebook(
    name: str, scale: str, values: dict, *, force: bool, label: str, processes: int = 1
) -> dict:
    """Run one notebook, on several processes if asked to, unless its finished result still holds.

    Returns its record, whose `status` is finished, skipped, failed, interrupted or busy (another process
    runs it).
    """
    folder = notebooks.run_folder(name, scale)
    folder.mkdir(parents=True, exist_ok=True)
    failure = {"notebook": name, "status": "failed"}
    try:
        with filelock.FileLock(folder / ".lock", timeout=0):
            record = notebooks.read_json(folder / "run.json")
            now = notebooks.fingerprint(notebooks.find_notebooks()[name], scale, values)
            whole = record.get("status") == "finished" and (folder / "results.json").exists()
            if whole and record["fingerprint"] == now and not force:
                return record | {"status": "skipped"}
            record = _new_record(name, scale, values, now) | {"processes": processes}
            return _run_locked(record, folder, force, label)
    except filelock.Timeout:
        pid = notebooks.read_json(folder / "run.json").get("pid", "unknown")
        busy = f"process {pid} is running it now; wait for it or end it, then try again"
        return failure | {"status": "busy", "error": {"name": "Busy", "message": busy}}
    except notebooks.RequestError as error:  # its file was damaged since the check
        return failure | {"error": {"name": "RequestError", "message": str(error)}}


def _run_locked(record: dict, folder: Path, force: bool, label: str) -> dict:
    # checkpoints and tables of other code would be taken for this code's
    stale = notebooks.read_json(folder / "run.json").get("code") != record["code"]
    _clear_folder(folder, everything=force or stale)
    runtime.write_atomic(folder / "run.json", runtime.to_json(record))
    watch = Watch(label, ranks.Others(record["processes"]))
    try:
        record["status"], record["error"] = _papermill(record, folder, watch)
    finally:
        watch.stop()
        watch.others.stop()
    record["finished"] = _now()
    record["wall_seconds"] = round(time.time() - watch.began, 2)
    record["peak_memory_bytes"] = watch.peak
    runtime.write_atomic(folder / "run.json", runtime.to_json(record))
    return record


def prepare() -> None:
    """What a process that runs notebooks needs once."""
    papermill_log.setLevel(logging.CRITICAL)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite end keeps the record whole


def _run_one(name: str, chosen: dict[str, dict], options: dict, label: str = "") -> dict:
    """Run one of several notebooks."""
    prepare()
    return run_notebook(name, values=chosen[name], label=label, **options)


def _one_by_one(run_one: Callable, names: list[str]) -> Iterator[tuple[str, dict]]:
    """Name and record of each notebook, until one is interrupted."""
    for i, name in enumerate(names, start=1):
        try:
            record = run_one(name, label=f"[{i}/{len(names)}] {name}")
        except KeyboardInterrupt:
            record = {"notebook": name, "status": "interrupted"}
        yield name, record
        if record["status"] == "interrupted":
            return


def run_notebooks(
    names: list[str],
    scale: str,
    chosen: dict[str, dict],
    *,
    force: bool = False,
    processes: int = 1,
    jobs: int = 1,
) -> tuple[int, list[dict]]:
    """Run notebooks, refreshing the report after each; print a summary.

    processes: how many run each of them (`ranks`).  jobs: how many notebooks run at a time.

    Returns the exit code (0 all finished, 1 some failed, 130 interrupted) and the records.
    """
    prepare()
    options = {"scale": scale, "force": force, "processes": processes}
    run_one = partial(_run_one, chosen=chosen, options=options)
    records: list[dict] = []
    report = None
    try:
        several = jobs > 1 and len(names) > 1
        if several:
            # the first, which is a greeting, then the longest: none is left alone at the end
            rest = sorted(names[1:], key=notebooks.minutes_at_demo, reverse=True)
            each = side_by_side.run(run_one, [names[0], *rest], jobs)
        else:
            each = _one_by_one(run_one, names)
        for name, record in each:
            records.append(record)
            print(f"[{len(records)}/{len(names)}] {name}  {describe(record)}", flush=True)
            with contextlib.suppress(
                notebooks.RequestError
            ):  # another notebook is just being saved
                report = write_report(scale)
    except KeyboardInterrupt:
        records.append({"notebook": "the report", "status": "interrupted"})
    print(summary(records, scale))
    print(f"Report: {report}" if report else "No report yet.")
    states = {record["status"] for record in records}
    if "interrupted" in states:
        return 130, records
    return (0 if states <= {"finished", "skipped"} else 1), records
