"""JupyterLab as the course starts it: `make lab` or `python -m lib lab`.

Two things differ from plain `jupyter lab`.  It opens the course's root, so that README, data and results
can be reached.  And a notebook that was only opened is not "unsaved": JupyterLab writes the running
Python's name and version into each notebook it opens; `TidyContents` hands them out when a notebook is
read and takes them out when it is saved, so that neither the tab nor git shows a change that nobody made.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ipykernel.ipkernel import IPythonKernel
from ipykernel.kernelspec import get_kernel_dict
from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager

KERNELSPEC = {"display_name": "Python 3", "language": "python", "name": "python3"}
LANGUAGE = {"name": "python"}


def as_opened(metadata: dict) -> dict:
    """A notebook's metadata as JupyterLab would complete it with the kernel of this Python."""
    if metadata.get("kernelspec") != KERNELSPEC or metadata.get("language_info") != LANGUAGE:
        return metadata  # another kernel's notebook: left as it is
    completed = dict(metadata)
    completed["kernelspec"] = {**KERNELSPEC, "display_name": get_kernel_dict()["display_name"]}
    completed["language_info"] = dict(IPythonKernel.language_info)
    return completed


def as_committed(metadata: dict) -> dict:
    """The metadata as the repository keeps it: no display name and no version of one machine's Python."""
    if metadata.get("kernelspec", {}).get("name") != KERNELSPEC["name"]:
        return metadata
    tidied = dict(metadata)
    tidied["kernelspec"] = dict(KERNELSPEC)
    tidied["language_info"] = dict(LANGUAGE)
    return tidied


class TidyContents(AsyncLargeFileManager):
    """Jupyter's files, with notebooks' kernel metadata completed on reading and tidied on saving."""

    async def get(self, path, content=True, type=None, format=None, **options):
        """As the base class; a notebook comes with this Python's kernel metadata."""
        model = await super().get(path, content=content, type=type, format=format, **options)
        if model["type"] == "notebook" and model.get("content"):
            model["content"]["metadata"] = as_opened(model["content"]["metadata"])
        return model

    async def save(self, model, path=""):
        """As the base class; kernel metadata is written in the committed form."""
        if model.get("type") == "notebook" and model.get("content"):
            model["content"]["metadata"] = as_committed(model["content"]["metadata"])
        return await super().save(model, path)


def command(root: Path, arguments: list[str]) -> list[str]:
    """The command line that opens the course; `arguments` are passed on to JupyterLab."""
    words = [sys.executable, "-m", "jupyterlab", "--notebook-dir", str(root)]
    words.append("--ServerApp.contents_manager_class=lib.course.lab.TidyContents")
    words.extend(arguments)
    if not any(argument.endswith(".ipynb") for argument in arguments):
        words.append(str(root / "notebooks" / "00_start_here.ipynb"))
    return words


def start(root: Path, arguments: list[str]) -> None:
    """Become JupyterLab (does not return)."""
    words = command(root, arguments)
    os.execv(words[0], words)
