"""What was measured: tables, the figure, kept records, and the command."""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from bench import cases, measure
from lib import plots, runtime


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


def kept() -> list[dict]:
    """The records in `data/results/bench/`, in the order of `BENCHMARKS`."""
    folder = runtime.project_root() / "data" / "results" / "bench"
    paths = [folder / f"{name}.json" for name in cases.BENCHMARKS]
    return [json.loads(p.read_text(encoding="utf-8")) for p in paths if p.exists()]


def run(
    names: Sequence[str], kept_in: str | None = None, *, rounds=measure.ROUNDS, size="real"
) -> list[dict]:
    """Measure the benchmarks named (all if none), print each, and keep the records where asked.

    `course` prints `course_table`, `table` the `speed_table` of the kept results, and `figure` draws them
    into `plots/`.  Raises ValueError for other names.
    """
    commands = {"course": lambda: print(course_table()), "figure": _draw}
    commands["table"] = lambda: print(speed_table(kept()))
    if unknown := [name for name in names if name not in {**cases.BENCHMARKS, **commands}]:
        allowed = ", ".join([*cases.BENCHMARKS, *commands])
        raise ValueError(f"unknown benchmark {', '.join(unknown)}; allowed: {allowed}.")
    records = []
    for name in names or cases.BENCHMARKS:
        if name in commands:
            commands[name]()
            continue
        records.append(_apart(name, size, rounds))
        print(measure.to_text(records[-1]), flush=True)
        if kept_in and Path(kept_in).is_dir():
            runtime.write_atomic(Path(kept_in) / f"{name}.json", runtime.to_json(records[-1]))
        elif kept_in:
            runtime.write_atomic(kept_in, runtime.to_json(records))
    return records


def _apart(name: str, size: str, rounds: int) -> dict:
    """`measure` in a process of its own: what one benchmark leaves in the heap would count in the memory
    of the next (seen: 272 MB in place of 85)."""
    start = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=start) as process:
        return process.submit(_made, name, size, rounds).result()


def _made(name: str, size: str, rounds: int) -> dict:
    runtime.quiet_libraries()
    return measure.measure(name, cases.BENCHMARKS[name](size), rounds)


def _draw() -> None:
    drawn, folder = figure(kept()), runtime.project_root() / "plots"
    for kind, metadata_ in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
        drawn.savefig(
            folder / f"bench_speed.{kind}", dpi=120, bbox_inches="tight", metadata=metadata_
        )
    print(f"Figure: {folder / 'bench_speed.png'}")
