"""Whether this process is one of several that run a notebook (`course.ranks`), and which."""

from __future__ import annotations

import os
from pathlib import Path

from lib import runtime


def several() -> bool:
    """Whether this process is one of several that run a notebook."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first() -> bool:
    """Whether this process writes files: the only one, or the first of several."""
    return os.environ.get("RANK", "0") == "0"


def meet() -> None:
    """Wait for the other processes, if there are any."""
    if several():
        from lib import processes

        processes.meet(runtime.get_device())


def is_there(path: Path) -> bool:
    """Whether a file is there: every process looks before the first goes on and may write it."""
    if not several():
        return path.exists()
    from lib import processes

    return processes.is_there(path)
