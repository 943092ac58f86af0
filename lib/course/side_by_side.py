"""Several notebooks at a time, each run by a process of its own with its share of the cores.

Most of a notebook at `demo` keeps one core busy, so two at a time take little more than half as long.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection

import psutil

from lib import runtime
from lib.course import ranks
from lib.course.report import duration

SCALES = ("smoke", "demo")  # at which as many run as fit
MEMORY = 7e9  # bytes: more than any notebook takes at `demo` (6.1 GB measured)
MOST = 4  # the longest notebook takes as long as all others on so many cores
ENDS = 30  # seconds that an interrupted notebook has to write its record


def cores() -> int:
    """The cores that this process may use."""
    return len(psutil.Process().cpu_affinity()) if sys.platform == "linux" else os.cpu_count() or 1


def fitting() -> int:
    """How many notebooks this machine runs at a time; one where they would share the memory of a GPU."""
    if runtime.get_device().type != "cpu":
        return 1
    memory = int(psutil.virtual_memory().total / MEMORY)
    return max(1, min(cores(), memory, MOST))


class Worker:
    """A process that runs one notebook after another."""

    def __init__(self, run_one: Callable[[str], dict], jobs: int):
        start = multiprocessing.get_context("spawn")
        self.pipe, far = start.Pipe()
        self.process = start.Process(target=_work, args=(run_one, far, jobs, os.getpid()))
        self.process.start()
        far.close()
        self.name, self.began = "", 0.0

    def take(self, name: str) -> None:
        """Begin with a notebook."""
        self.name, self.began = name, time.time()
        self.pipe.send(name)

    def record(self) -> dict:
        """What it sends of its notebook, or that it has died."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            message = f"its process ended with {self.process.exitcode}"
            error = {"name": "ProcessFailed", "message": message}
            return {"notebook": self.name, "status": "failed", "error": error}

    def stop(self) -> None:
        """End it; a notebook that runs has a while to write its record."""
        self.process.terminate()
        self.process.join(ENDS)
        self.process.kill()


def run(
    run_one: Callable[[str], dict], names: Sequence[str], jobs: int
) -> Iterator[tuple[str, dict]]:
    """Name and record of each notebook as it is done; `run_one` can be pickled, and gives the record.

    After an interruption the records of those that ran, then nothing more.
    """
    waiting, busy = list(names), []
    try:
        while waiting and len(busy) < jobs:
            busy.append(Worker(run_one, jobs))
            busy[-1].take(waiting.pop(0))
        while busy:
            ready = connection.wait([worker.pipe for worker in busy], timeout=1.0)
            for worker in [worker for worker in busy if worker.pipe in ready]:
                yield worker.name, worker.record()
                busy.remove(worker)
                if waiting:
                    busy.append(worker if worker.process.is_alive() else Worker(run_one, jobs))
                    busy[-1].take(waiting.pop(0))
                else:
                    worker.stop()
            _show(busy)
    except KeyboardInterrupt:
        for worker in busy:
            worker.stop()
            yield worker.name, worker.record()
    finally:
        for worker in busy:
            worker.stop()


def _work(run_one: Callable[[str], dict], pipe, jobs: int, first: int) -> None:
    """A worker's process: Ctrl-C goes to the first one alone, whose end ends this one too."""
    if hasattr(os, "setsid"):
        os.setsid()
    threading.Thread(target=ranks.end_with, args=(first,), daemon=True).start()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // jobs)))
    status = ""
    with contextlib.suppress(KeyboardInterrupt, EOFError):  # told to stop with nothing to do
        while status != "interrupted":
            record = run_one(pipe.recv())
            pipe.send(record)
            status = record["status"]


def _show(busy: Sequence[Worker]) -> None:
    """What is running, on a terminal."""
    if sys.stdout.isatty():
        now = time.time()
        parts = [f"{worker.name} {duration(now - worker.began)}" for worker in busy]
        print("\r\x1b[K" + "   ".join(parts), end="\r" if parts else "", flush=True)
