"""The address of the course: one line of pyproject.toml, and everything that is derived from it.

The set-up cells clone from it and the badges lead to it, so it must belong to whoever publishes the
course.  Where none is set there is no badge, and a set-up cell says what to do.  After a fork:
`python -m lib address https://github.com/YOU/FORK`.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import nbformat
from nbformat import NotebookNode

BADGE_IMAGE = "https://colab.research.google.com/assets/colab-badge.svg"
BADGE = re.compile(r" ?\[!\[(?:Open in )?Colab\]\([^)]*\)\]\([^)]*\)")
GITHUB = re.compile(r"https://github\.com/([\w.-]+)/([\w.-]+?)(?:\.git)?/?")
SETUP_CELL = """\
# Set-up: nothing to do where the course is installed; elsewhere it is fetched.
import glob
import os
import runpy
import subprocess

REPOSITORY = "{repository}"  # git address of the course; the variable COURSE_REPO goes first
try:
    import lib.course  # noqa: F401
except ImportError:
    address = os.environ.get("COURSE_REPO") or REPOSITORY
    home = os.environ.get("COURSE_HOME", "learning-from-feedback")
    places = [home, ".", "..", "/kaggle/input/*", "/content/drive/MyDrive/*"]
    installers = [p for x in places for p in glob.glob(f"{{x}}/lib/course/install.py")]
    if not installers and not address:
        raise ModuleNotFoundError(
            "The course is not installed here, and no address of it is known. On your "
            "own machine: `make setup`, then `make lab`. On a hosted one: upload or "
            "mount the course and set COURSE_HOME to its folder, or set COURSE_REPO to "
            "its git address (`%env COURSE_REPO=https://...`). Then run it again."
        ) from None
    if not installers:
        print(f"Fetching the course from {{address}} ...")
        subprocess.run(
            ["git", "clone", "-q", "--depth", "1", address, home], check=True
        )
        installers = [f"{{home}}/lib/course/install.py"]
    runpy.run_path(installers[0], run_name="__main__")"""


def read(root: Path) -> str:
    """The address in the project's metadata; empty where none is set."""
    metadata = root / "pyproject.toml"
    if not metadata.exists():  # lib installed without its checkout
        return ""
    project = tomllib.loads(metadata.read_text("utf-8"))["project"]
    return project.get("urls", {}).get("Repository", "")


def check(address: str) -> str:
    """The address without a trailing slash; raises ValueError for one that git cannot clone safely."""
    address = address.rstrip("/")
    if address and not re.fullmatch(r"https://[\w.-]+(?:/[\w.~-]+)+", address):
        raise ValueError(
            f"{address!r} is no address that the set-up cells can clone from. Allowed: an https address "
            "without user name, query or spaces. Try https://github.com/YOU/FORK"
        )
    return address


def setup_cell(address: str) -> str:
    """Source of the first code cell of every notebook."""
    return SETUP_CELL.format(repository=check(address))


def badge(address: str, name: str) -> str:
    """Markdown of the badge that opens a notebook in Colab; empty where the address is not on GitHub."""
    match = GITHUB.fullmatch(address)
    if not match:
        return ""
    target = f"https://colab.research.google.com/github/{match[1]}/{match[2]}"
    return f"[![Open in Colab]({BADGE_IMAGE})]({target}/blob/main/notebooks/{name}.ipynb)"


def write_into_notebook(notebook: NotebookNode, name: str, address: str) -> None:
    """Bring the badge under the title and the set-up cell up to date, in place."""
    title = notebook.cells[0]
    heading, _, rest = BADGE.sub("", title.source).partition("\n")
    parts = [heading, badge(address, name), rest.strip("\n")]
    title.source = "\n\n".join(part for part in parts if part)
    for cell in notebook.cells:
        if cell.cell_type == "code" and cell.source.startswith("# Set-up"):
            cell.source = setup_cell(address)


def write_into_readme(text: str, address: str) -> str:
    """README with a badge behind each notebook's link in its table, or without any."""
    link = re.compile(r"^(\| *(?:\d+ *\| *)?\[(\d\d_\w+)\]\(notebooks/\2\.ipynb\))", re.MULTILINE)

    def with_badge(match: re.Match) -> str:
        return f"{match[1]} {badge(address, match[2])}".rstrip()

    return link.sub(with_badge, BADGE.sub("", text))


def write_into_metadata(text: str, address: str) -> str:
    """pyproject.toml with the address in [project.urls], or without that table."""
    text = re.sub(r"\[project\.urls\]\n(?:\w+ = .*\n)*\n?", "", text)
    if not address:
        return text
    return text.replace("[tool.", f'[project.urls]\nRepository = "{address}"\n\n[tool.', 1)


def write_everywhere(root: Path, address: str) -> list[Path]:
    """Set the address in the metadata and in all that is derived from it; return the files written.

    Outputs of the notebooks stay as they are.  Raises ValueError for an address that `check` refuses.
    """
    address = check(address)
    written = []
    for name, change in (
        ("pyproject.toml", write_into_metadata),
        ("README.md", write_into_readme),
    ):
        path = root / name
        path.write_text(change(path.read_text("utf-8"), address), "utf-8")
        written.append(path)
    for path in sorted((root / "notebooks").glob("[!.]*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        write_into_notebook(notebook, path.stem, address)
        path.write_text(nbformat.writes(notebook, indent=1) + "\n", "utf-8")
        written.append(path)
    return written
