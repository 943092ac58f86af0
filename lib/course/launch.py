"""A training stage on several processes: `accelerate launch` of a module, as a notebook calls it.

A stage is a function of a JSON file that leaves its files in a folder.  With `PROCESSES = 1` a notebook calls
it, with `PROCESSES = n` it has n processes call it, and reads the same files either way.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from lib import runtime

# accelerate's settings: one GPU a process, each with the whole model
DDP = Path(__file__).with_name("ddp.yaml")


def command(module: str, *arguments: str, processes: int) -> list[str]:
    """`accelerate launch` of `python -m module arguments`."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    options = ["--config_file", str(DDP), "--num_processes", str(processes)]
    return [*launcher, *options, "-m", module, *arguments]


def loopback() -> dict[str, str]:
    """What keeps processes on this machine's CPU from talking over another network than its own."""
    on_cpu = sys.platform == "linux" and runtime.get_device().type == "cpu"
    return {"GLOO_SOCKET_IFNAME": "lo"} if on_cpu else {}


def launch(module: str, *arguments: str, processes: int) -> None:
    """Run `command` and wait.  Raises RuntimeError with the end of what it said where it fails."""
    paths = [str(runtime.project_root()), os.environ.get("PYTHONPATH", "")]
    settings = {"FEEDBACK_HEADLESS": "1", "OMP_NUM_THREADS": "1", **os.environ}
    settings["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    settings |= loopback()
    done = subprocess.run(
        command(module, *arguments, processes=processes),
        env=settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(
            f"{module} {' '.join(arguments)} on {processes} processes ended with {done.returncode}:\n"
            f"{done.stdout[-4000:]}"
        )
