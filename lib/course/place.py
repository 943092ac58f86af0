"""Where a notebook writes its results, and that no two runs write into one folder.

The runner names the folder itself (`FEEDBACK_RUN_DIR`).  Plain `papermill in.ipynb some/out.ipynb` tells
its kernel nothing, so
the kernel reads the command line of papermill and writes into `some/out/`.  A notebook that is
opened in Jupyter writes into `runs/interactive/<notebook>/`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from pathlib import Path

import filelock
import psutil

from lib import runtime

_HELD: dict[Path, filelock.FileLock] = {}  # folders of this process, until it ends


def output_argument(words: list[str]) -> str | None:
    """The output path in papermill's command line; None where it is no such line or names no local file."""
    at = [i for i, word in enumerate(words[:4]) if Path(word).stem == "papermill"]
    if not at:
        return None
    from papermill.cli import papermill as command

    context = command.make_context("papermill", list(words[at[0] + 1 :]), resilient_parsing=True)
    output = context.params.get("output_path")
    if not output or output == "-" or "://" in output or "{" in output:
        return None
    return output


def papermill_output() -> Path | None:
    """The notebook that plain papermill writes from this kernel; None where it did not start it."""
    for ancestor in psutil.Process().parents()[:3]:  # a launcher may stand between
        with contextlib.suppress(psutil.Error):
            output = output_argument(ancestor.cmdline())
            if output:
                return Path(ancestor.cwd(), output)
    return None


def claim(wanted: Path) -> Path:
    """The folder wanted, or one with -2, -3, ... at its end where another process writes into it."""
    for number in itertools.count(1):
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        if folder in _HELD:
            return folder
        runtime.make_folder(folder, "FEEDBACK_RUN_DIR")
        lock = filelock.FileLock(folder / ".lock", timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout:
            continue
        _HELD[folder] = lock
        if number > 1:
            print(f"Another run writes into {wanted}: this one writes into {folder}.")
        return folder


def results_folder(notebook: str) -> Path:
    """The folder of this run's results, made and held until the process ends."""
    chosen = os.environ.get("FEEDBACK_RUN_DIR")
    if chosen:  # the runner holds its lock
        folder = Path(chosen)
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    output = papermill_output()
    if output:
        os.environ.setdefault("FEEDBACK_HEADLESS", "1")  # nobody watches a bar move
        return claim(output.with_suffix(""))
    return claim(runtime.project_root() / "runs" / "interactive" / notebook)
