"""A notebook on several processes: its kernel is the first, and others run the same code cells beside it.

`python -m lib run NOTEBOOK --processes 4` trains on four GPUs.  Every process runs every line; the trainers
share each batch (`lib.processes`), and end with what one process would have.  What is not training (sampling
for a test, a judge) each process does for itself, and the first one alone writes files and shows outputs.

The processes find each other as those of `torchrun` do, by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT;
each GPU holds every model whole.  What another process prints goes to `process-<number>.txt` in the run's
folder.  Where one fails, all end; where the runner dies, they end too.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

from lib import runtime
from lib.course.launch import loopback

GOES_ON = 120  # seconds that the others have after the first process has finished
HERE = "127.0.0.1"


# --- in the process that runs notebooks ----------------------------------------------------------


def check(processes: int, shards: bool = False) -> None:
    """ValueError where so many processes cannot run here, or cannot share a model's weights out."""
    if processes == 1 and not shards:
        return
    import torch

    gpus = torch.cuda.device_count()
    if shards and (processes == 1 or not gpus):
        raise ValueError(
            f"--shards with --processes {processes} and {gpus} GPUs; it needs two GPUs or more, and as many "
            "processes."
        )
    if processes < 1 or (gpus and processes > gpus):
        allowed = f"1 to {gpus}, the GPUs of this machine" if gpus else "1 or more"
        raise ValueError(f"--processes is {processes}; allowed: {allowed}.")


class Others:
    """The other processes of a run; without any where `processes` is 1."""

    def __init__(self, processes: int):
        self.processes = processes
        self.started: list[subprocess.Popen] = []
        self.logs: list[Path] = []
        with socket.socket() as free:
            free.bind((HERE, 0))
            self.port = free.getsockname()[1]

    def environment(self, number: int) -> dict[str, str]:
        """What the process of this number (the kernel is 0) has in its environment."""
        if self.processes == 1:
            return {}
        shared = {"WORLD_SIZE": self.processes, "MASTER_ADDR": HERE, "MASTER_PORT": self.port}
        shared |= {"RANK": number, "LOCAL_RANK": number, "LOCAL_WORLD_SIZE": self.processes}
        settings = {name: str(value) for name, value in shared.items()}
        return settings | {"OMP_NUM_THREADS": "1"} | loopback()

    def start(self, notebook: Path, values: dict, folder: Path, env: dict[str, str]) -> None:
        """Start them on a notebook's code cells, with these parameters."""
        for number in range(1, self.processes):
            log = folder / f"process-{number}.txt"
            command = [sys.executable, "-m", "lib.course.ranks", str(notebook)]
            with open(log, "w", encoding="utf-8") as output:
                process = subprocess.Popen(
                    [*command, json.dumps(values), str(os.getpid())],
                    env=env | self.environment(number) | {"MPLBACKEND": "agg"},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd=runtime.project_root(),
                )
            self.started.append(process)
            self.logs.append(log)

    def running(self) -> list[psutil.Process]:
        """Those that have not ended."""
        return [psutil.Process(one.pid) for one in self.started if one.poll() is None]

    def failure(self) -> str:
        """The end of what a process said that has failed; "" while none has."""
        for number, process in enumerate(self.started):
            if process.poll():
                said = self.logs[number].read_text(encoding="utf-8", errors="replace")
                said = re.sub(r"\x1b\[[\d;]*m", "", said)  # a traceback's colours
                return f"process {number + 1} ended with {process.returncode}: {said[-2000:]}"
        return ""

    def wait(self) -> None:
        """Let them finish, as the first process has."""
        end = time.time() + GOES_ON
        for process in self.started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.time()))

    def stop(self) -> None:
        """End those that still run."""
        for process in self.started:
            process.kill()
            process.wait()


# --- in one of the others ------------------------------------------------------------------------


def run_cells(notebook: Path, values: dict) -> int:
    """Run a notebook's code cells in order with these parameters; 1 where one fails."""
    from IPython.core.interactiveshell import InteractiveShell

    from lib.course import notebooks
    from lib.course.record import StopHere

    shell = InteractiveShell.instance()
    for cell in notebooks.read_notebook(notebook).cells:
        if cell.cell_type != "code":
            continue
        result = shell.run_cell(cell.source)
        if isinstance(result.error_in_exec, StopHere):
            return 0
        if not result.success:
            return 1
        if notebooks.has_tag(cell, "parameters"):
            shell.push(values)
    return 0


def end_with(runner: int) -> None:
    """End this process when its runner is gone: it would wait for the first one for hours."""
    while psutil.pid_exists(runner):
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=end_with, args=(int(sys.argv[3]),), daemon=True).start()
    sys.exit(run_cells(Path(sys.argv[1]), json.loads(sys.argv[2])))
