"""One benchmark: its sides in turn, with time and memory, and the record of it as a table and as text."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from lib import runtime
from lib.course.record import SHOWN_PACKAGES

ROUNDS = 5


@dataclass(frozen=True)
class Work:
    """What one run did: useful units, and the arithmetic and weight bytes that these need at least."""

    units: float
    flops: float = 0.0
    moved: float = 0.0


Thunk = Callable[[], Work]


@dataclass
class Benchmark:
    """Sides by name, ours first; each gives, untimed, the function that is timed."""

    unit: str
    goal: float  # how many times as fast as the first peer
    what: str
    sides: dict[str, Callable[[], Thunk]]
    dtype: torch.dtype = torch.float32
    limit: float | None = None  # units a second that no side can pass
    growth: dict[int, Thunk] = field(default_factory=dict)  # size -> our side on that many
    grows: str = ""  # what the sizes count


# --- measuring -----------------------------------------------------------------------------------


def ceilings(dtype: torch.dtype, device: torch.device | None = None) -> dict[str, float]:
    """Matrix arithmetic (flop/s) in `dtype` and memory copies (byte/s) of this machine, measured now."""
    device = device or runtime.get_device()
    size, items = (8192, 2**28) if device.type == "cuda" else (2048, 2**26)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.empty(items, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    matrix = min(_seconds(lambda: left @ right, device) for _ in range(5))
    copying = min(_seconds(lambda: target.copy_(source), device) for _ in range(5))
    return {"flops_per_s": 2 * size**3 / matrix, "bytes_per_s": 2 * items / copying}


def _seconds(work: Callable, device: torch.device) -> float:
    _finish(device)
    started = time.perf_counter()
    work()
    _finish(device)
    return time.perf_counter() - started


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PeakMemory:
    """Within: the rise of memory in use, in bytes, as `.rise` afterwards; NaN where it cannot be had.

    CUDA: the allocator's peak.  Linux: the process's resident peak, after freed memory went back.
    """

    STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def __enter__(self):
        gc.collect()
        self.rise, self.cuda = float("nan"), torch.cuda.is_available()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)
                self.RESET.write_text("5")
            self.before = self._resident("VmRSS")
        return self

    def __exit__(self, *_):
        peak = torch.cuda.max_memory_allocated() if self.cuda else self._resident("VmHWM")
        self.rise = max(0.0, peak - self.before)

    def _resident(self, name: str) -> float:
        with contextlib.suppress(OSError):
            lines = self.STATUS.read_text().splitlines()
            return 1024.0 * next(int(x.split()[1]) for x in lines if x.startswith(name))
        return float("nan")


@contextlib.contextmanager
def quietly():
    """Within: no advice about arguments that are being renamed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def measure(
    name: str, benchmark: Benchmark, rounds: int = ROUNDS, seconds: float = math.inf
) -> dict:
    """Run all sides in turn, `rounds` times after a warm-up, in changing order; the record of it.

    Prints each run as it ends.  No round begins that would probably end after `seconds`, but one there
    always is.  Raises ValueError for fewer than one round.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; at least one is needed.")
    record = _header(name, benchmark) | {"ceilings": ceilings(benchmark.dtype), "runs": []}
    started = time.perf_counter()
    for number in range(rounds + 1):  # number 0 warms up
        before = time.perf_counter()
        sides = [*benchmark.sides]
        for side in sides if number % 2 else reversed(sides):
            run = _run(benchmark.sides[side]())
            label = f"round {number} of {rounds}" if number else "warm-up"
            print(f"{name}, {label}, {side}: {run['seconds']:.1f} s", flush=True)
            if number:
                record["runs"].append({"round": number, "side": side, **run})
        now = time.perf_counter()
        if number and now - started + (now - before) > seconds:
            break
    return record


def grow(name: str, benchmark: Benchmark) -> dict:
    """Run our side on inputs of growing size, once each; the record of it."""
    record = _header(name, benchmark) | {"grows": benchmark.grows, "growth": []}
    for size, thunk in benchmark.growth.items():
        run = _run(thunk)
        print(f"{name}, {size:,} {benchmark.grows}: {run['seconds']:.1f} s", flush=True)
        record["growth"].append({"size": size, **run})
    return record


def _header(name: str, benchmark: Benchmark) -> dict:
    """What was measured, and on which machine and versions."""
    return {
        "name": name,
        "unit": benchmark.unit,
        "goal": benchmark.goal,
        "what": benchmark.what,
        "limit": benchmark.limit,
        "sides": [*benchmark.sides],
        "dtype": str(benchmark.dtype).removeprefix("torch."),
        "device": runtime.describe_device(),
        "versions": {package: metadata.version(package) for package in SHOWN_PACKAGES},
        "commit": runtime.git_commit(),
        "plain": runtime.plain_mode(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _run(thunk: Thunk) -> dict[str, float]:
    with PeakMemory() as memory, quietly():
        _finish(device := runtime.get_device())
        started = time.perf_counter()
        work = thunk()
        _finish(device)
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "memory": memory.rise, **vars(work)}


def summary(record: dict) -> pd.DataFrame:
    """One row a side: rate, ours / this side (median, low, high over rounds), memory, share, n."""
    runs, top = pd.DataFrame(record["runs"]), record["ceilings"]
    runs["rate"] = runs["units"] / runs["seconds"]
    least = np.maximum(runs["flops"] / top["flops_per_s"], runs["moved"] / top["bytes_per_s"])
    runs["share"] = runs["rate"] / record["limit"] if record["limit"] else least / runs["seconds"]
    rates, rows = runs.pivot(index="round", columns="side", values="rate"), []
    for side in ["ours", *(name for name in rates if name != "ours")]:
        mine, ratio = runs[runs["side"] == side], rates["ours"] / rates[side]
        row = {"benchmark": record["name"], "side": side, "unit": record["unit"]}
        row |= {"rate": mine["rate"].median(), "ratio": ratio.median(), "low": ratio.min()}
        row |= {"high": ratio.max(), "memory": mine["memory"].median()}
        rows.append({**row, "share": mine["share"].median(), "n": len(mine)})
    return pd.DataFrame(rows)


def growth_fit(record: dict) -> dict[str, float]:
    """Exponent b of time ~ size^b over the record's sizes (1 = linear), and the largest rise of memory."""
    table = pd.DataFrame(record["growth"])
    slope = np.polyfit(np.log(table["size"]), np.log(table["seconds"]), 1)[0]
    spread = table["memory"].max() - table["memory"].min()
    return {"time_exponent": float(slope), "memory_spread": float(spread)}


def to_text(record: dict) -> str:
    """The record as lines to read."""
    lines = [f"{record['name']}: {record['what']}"]
    for row in summary(record).itertuples():
        ratio = f"ours is {row.ratio:.2f}x [{row.low:.2f}, {row.high:.2f}]"
        lines.append(
            f"  {row.side:<34} {row.rate:10.1f} {row.unit}/s  {ratio:<30} memory {row.memory / 1e6:7.0f} MB"
            f"  share of ceiling {row.share:6.1%}  n = {row.n}"
        )
    return "\n".join(lines)


def growth_text(record: dict) -> str:
    """A record of `grow` as a line to read."""
    fit = growth_fit(record)
    sizes = ", ".join(f"{row['size']:,}" for row in record["growth"])
    return (
        f"{record['name']}: growth over {sizes} {record['grows']}: time ~ size^{fit['time_exponent']:.2f}, "
        f"memory differs by {fit['memory_spread'] / 1e6:.0f} MB"
    )


def decision(record: dict) -> str:
    """Whether the median over rounds meets the goal, which is over the first peer; in words."""
    peer = record["sides"][1]
    row = summary(record).set_index("side").loc[peer]
    verdict = "met" if row["ratio"] >= record["goal"] else "missed"
    ratio = f"{row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}], n = {row['n']}"
    return f"{record['name']}: goal {record['goal']:g} times as fast as {peer}: {verdict} ({ratio})"
