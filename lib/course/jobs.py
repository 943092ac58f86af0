"""Training stages on several processes: `accelerate launch` of a module, as a notebook calls it.

A stage is a function of a JSON file that leaves its files in a folder: a notebook with `PROCESSES = 1` calls
it, with `PROCESSES = n` it has n processes call it, and reads the same files either way.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from lib import runtime

CONFIGS = Path(__file__).with_name("accelerate")


def command(module: str, *arguments: str, processes: int, config: str = "ddp") -> list[str]:
    """`accelerate launch` of `python -m module arguments`; `config` is a file of `accelerate/`, or a path."""
    path = CONFIGS / f"{config}.yaml"
    if not path.exists():
        path = Path(config)
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    options = ["--config_file", str(path), "--num_processes", str(processes)]
    return [*launcher, *options, "-m", module, *arguments]


def launch(module: str, *arguments: str, processes: int, config: str = "ddp") -> None:
    """Run `command` and wait.  Raises RuntimeError with the end of what it said where it fails."""
    settings = {"FEEDBACK_HEADLESS": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    if runtime.get_device().type == "cpu":  # nothing leaves this machine
        settings["GLOO_SOCKET_IFNAME"] = "lo"
    done = subprocess.run(
        command(module, *arguments, processes=processes, config=config),
        env=settings | dict(os.environ),
        cwd=runtime.project_root(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(
            f"{module} {' '.join(arguments)} on {processes} processes ended with {done.returncode}:\n"
            f"{done.stdout[-4000:]}"
        )
