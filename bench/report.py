"""What was measured: tables, the figure, kept records, and the command."""

from __future__ import annotations

import concurrent.futures
import json
import math
import multiprocessing
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from bench import cases, measure
from lib import plots, runtime

QUICK_SECONDS = 70  # six benchmarks, with what they load, within eight minutes


def course_table() -> str:
    """Markdown: wall time and peak memory of each notebook's last finished run at demo scale."""
    lines = ["| notebook | time | memory | device |", "|---|---|---|---|"]
    for path in sorted((runtime.project_root() / "runs" / "demo").glob("*/run.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        if run["status"] == "finished":
            spent, peak = run["wall_seconds"] / 60, run["peak_memory_bytes"] / 1e9
            device = f"{run['device']}, {run['cpu_count']} cores"
            lines.append(f"| {run['notebook']} | {spent:.1f} min | {peak:.1f} GB | {device} |")
    return "\n".join(lines)


def speed_table(records: Sequence[dict]) -> str:
    """Markdown: ours beside each peer."""
    lines = ["| benchmark | beside | times as fast [least, most] | memory added, ours / theirs |"]
    lines += ["|---|---|---|---|"]
    for record in records:
        ours, *peers = measure.summary(record).itertuples()
        for peer in peers:
            ratio = f"{peer.ratio:.1f} [{peer.low:.1f}, {peer.high:.1f}]"
            memory = f"{ours.memory / 1e6:.0f} / {peer.memory / 1e6:.0f} MB"
            lines.append(f"| `{record['name']}` | {peer.side} | {ratio} | {memory} |")
    return "\n".join(lines)


def figure(records: Sequence[dict]):
    """Ours over each peer, median and range over rounds, of kept records."""
    rows = pd.concat([measure.summary(record) for record in records])
    rows = rows[rows["side"] != "ours"]
    table = rows.assign(group=rows["benchmark"] + ": " + rows["side"], value=rows["ratio"])
    table = table.assign(condition="ours / peer, useful units per second")
    title = f"Speed beside what a reader would use instead, {records[0]['device']}"
    return plots.interval_plot(table, xlabel="times as fast", title=title, reference=1)


def stored() -> list[dict]:
    """The records in `data/results/bench/`, in the order of `BENCHMARKS`."""
    folder = runtime.project_root() / "data" / "results" / "bench"
    paths = [folder / f"{name}.json" for name in cases.BENCHMARKS]
    return [json.loads(p.read_text(encoding="utf-8")) for p in paths if p.exists()]


def run(
    names: Sequence[str],
    path: str | None = None,
    *,
    rounds: int = measure.ROUNDS,
    size: str = "real",
    growth: bool = False,
) -> list[dict]:
    """Measure the benchmarks named, print each, and keep the records at `path` (a file or a folder).

    Without a name: all, and where they are quick, those that have a goal.  The "quick" size takes at most
    `QUICK_SECONDS` a benchmark and ends with what it decides.  `growth` measures inputs of growing size
    instead.  `course` prints `course_table`, `table` the `speed_table` of the kept results, and `figure`
    draws them into `plots/`.  Raises ValueError for other names.
    """
    commands = {"course": lambda: print(course_table()), "figure": _draw}
    commands["table"] = lambda: print(speed_table(stored()))
    known = cases.WITH_GROWTH if growth else [*cases.BENCHMARKS, *commands]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"unknown benchmark {', '.join(unknown)}; allowed: {', '.join(known)}.")
    everything = cases.WITH_GOAL if size == "quick" else cases.BENCHMARKS
    records = []
    for name in names or (cases.WITH_GROWTH if growth else everything):
        if name in commands:
            commands[name]()
            continue
        records.append(_apart(name, size, rounds, growth))
        print(measure.growth_text(records[-1]) if growth else measure.to_text(records[-1]))
        _keep(records, path, f"{name}-growth" if growth else name)
    if size == "quick" and not growth:
        print(*(measure.decision(record) for record in records if record["goal"]), sep="\n")
    return records


def _keep(records: list[dict], path: str | None, name: str) -> None:
    """Write the newest record into a folder under its name, or all of them into a file."""
    if path and Path(path).is_dir():
        runtime.write_atomic(Path(path) / f"{name}.json", runtime.to_json(records[-1]))
    elif path:
        runtime.write_atomic(path, runtime.to_json(records))


def _apart(*arguments) -> dict:
    """`_measured` in a process of its own: what one benchmark leaves in the heap would count in the memory
    of the next (seen: 272 MB in place of 85)."""
    start = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=start) as process:
        return process.submit(_measured, *arguments).result()


def _measured(name: str, size: str, rounds: int, growth: bool) -> dict:
    runtime.quiet_libraries()
    benchmark = cases.BENCHMARKS[name](size)
    if growth:
        return measure.grow(name, benchmark)
    seconds = QUICK_SECONDS if size == "quick" else math.inf
    return measure.measure(name, benchmark, rounds, seconds)


def _draw() -> None:
    drawn, folder = figure(stored()), runtime.project_root() / "plots"
    for kind, metadata_ in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
        drawn.savefig(
            folder / f"bench_speed.{kind}", dpi=120, bbox_inches="tight", metadata=metadata_
        )
    print(f"Figure: {folder / 'bench_speed.png'}")
