"""The command: starts the stand-ins, runs the parts one after the other, prints what happened.

Results are in `runs/rehearsal/<scale>/<variant>/<notebook>/`, as those of any run; a part that finished is
not run again until what it depends on changes, and a killed one goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from lib import runtime
from lib.course import notebooks, runner
from lib.course.report import duration, memory
from rehearsal import data, models, plan
from rehearsal.hub import Hub
from rehearsal.services import Services

FOLDER = runtime.project_root() / "runs" / "rehearsal"
# what would lead a client past the stand-ins
UNSET = (
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "HF_DATASETS_OFFLINE",
    "HF_HUB_CACHE",
    "HF_DATASETS_CACHE",
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0: every part finished, 1: one failed, 2: the request cannot be met."""
    parser = argparse.ArgumentParser(
        prog="python -m rehearsal", description=__doc__.splitlines()[0]
    )
    parser.add_argument("notebooks", nargs="*", metavar="NN", help="number or name (default: all)")
    parser.add_argument("--scale", choices=plan.scales(), default="full")
    parser.add_argument("--force", action="store_true", help="run again what has finished")
    options = parser.parse_args(arguments)
    try:
        names = notebooks.resolve_notebooks(options.notebooks)
        parts = plan.parts_of(names, options.scale)
    except notebooks.RequestError as error:
        print(error, file=sys.stderr)
        return 2
    return rehearse(parts, options.scale, force=options.force)


def rehearse(parts: list[plan.Part], scale: str, *, force: bool = False) -> int:
    """Run these parts and print a line each and a table; the exit code."""
    runner.prepare()
    records = []
    with stand_ins(FOLDER):
        for i, part in enumerate(parts, 1):
            label = f"[{i}/{len(parts)}] {part.notebook} ({part.variant})"
            records.append(run_part(part, scale, FOLDER, force, label))
            print(f"{label}: {in_words(records[-1])}", flush=True)
            if records[-1]["status"] == "interrupted":
                return 130
    print(table(parts, records).to_string(index=False))
    return 0 if all(record["status"] in ("finished", "skipped") for record in records) else 1


def run_part(part: plan.Part, scale: str, root: Path, force: bool, label: str) -> dict:
    """Run one part with its counts; return the runner's record."""
    own = {
        "FEEDBACK_COUNTS": json.dumps(part.counts),
        "FEEDBACK_OUT": str(root / scale / part.variant),
    }
    with environment(own):
        return runner.run_notebook(part.notebook, scale, part.resolved, force=force, label=label)


@contextlib.contextmanager
def stand_ins(root: Path) -> Iterator[None]:
    """Within: kernels find a Hub, a chat endpoint and Perspective on loopback, and a cache of their own."""
    print("building what is missing of the models ...", flush=True)
    models.build(root / "hub")
    data.write_hub(root / "hub")
    data.write_released(root / "released")
    link_assets(root / "cache")
    hub, services = Hub(root / "hub"), Services()
    known = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HOME": str(root / "hf")}
    known |= {"OPENAI_BASE_URL": f"{services.url}/v1", "OPENAI_API_KEY": "rehearsal"}
    known |= {"PERSPECTIVE_URL": services.url, "PERSPECTIVE_API_KEY": "rehearsal"}
    known |= {"FEEDBACK_CACHE": str(root / "cache"), "FEEDBACK_DATA": str(root / "released")}
    known |= {"NO_PROXY": "127.0.0.1,localhost"}
    try:
        with environment(known | dict.fromkeys(UNSET)):
            yield
    finally:
        hub.close()
        services.close()


def link_assets(cache: Path) -> None:
    """A cache of its own that shares the downloaded assets: no stand-in's reply mixes with real ones."""
    assets = runtime.cache_dir() / "assets"
    assets.mkdir(exist_ok=True)
    cache.mkdir(parents=True, exist_ok=True)
    if not (cache / "assets").is_symlink():
        (cache / "assets").symlink_to(assets, target_is_directory=True)


@contextlib.contextmanager
def environment(values: dict[str, str | None]) -> Iterator[None]:
    """Within: these environment variables, None for none; then those from before."""
    before = {name: os.environ.get(name) for name in values}
    _set(values)
    try:
        yield
    finally:
        _set(before)


def _set(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def in_words(record: dict) -> str:
    """Status of one run, and where and why it failed."""
    error = record.get("error") or {}
    where = f" in cell {error['index']} ({error['line']})" if "index" in error else ""
    why = f"{where}: {error['name']}: {error['message']}" if error else ""
    return f"{record['status']}{why}"


def table(parts: list[plan.Part], records: list[dict]) -> pd.DataFrame:
    """One row a part: notebook | variant | status | time | memory | first error."""
    rows = []
    for part, record in zip(parts, records, strict=True):
        error = record.get("error") or {}
        message = f"{error['name']}: {error['message']}".splitlines()[0][:80] if error else ""
        seconds, peak = record.get("wall_seconds"), record.get("peak_memory_bytes")
        row = (
            part.notebook,
            part.variant,
            record["status"],
            duration(seconds or 0),
            memory(peak or 0),
        )
        rows.append((*row, message))
    columns = ["notebook", "variant", "status", "time", "memory", "first error"]
    return pd.DataFrame(rows, columns=columns)
