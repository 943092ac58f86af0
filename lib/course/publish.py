"""Publishes notebooks: the source with its demo outputs, and nothing of the machine that made them."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from lib import runtime
from lib.course import address, notebooks, runner

MAX_PUBLISHED = 500_000  # bytes of a committed notebook
KEYS = re.compile(r"\b(?:sk-[\w-]{16,}|hf_[A-Za-z0-9]{16,}|AIza[\w-]{35})")


# --- publishing ----------------------------------------------------------------------------------


def _map_text(value: object, change: Callable[[str], str]) -> object:
    """Apply `change` to every text in a JSON value, images aside."""
    if isinstance(value, dict):
        return {
            k: v if re.match("image/(?!svg)", k) else _map_text(v, change) for k, v in value.items()
        }
    if isinstance(value, list):
        return [_map_text(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def _hide_paths(text: str) -> str:
    for folder, sign in ((runtime.project_root(), "."), (Path.home(), "~")):
        if len(folder.parts) > 1:
            text = re.sub(rf"(?<![\w.-]){re.escape(str(folder))}(?![\w-])", sign, text)
    return text


def _clean_outputs(cell: NotebookNode, styles: set[str]) -> list:
    """A cell's outputs without warnings and widgets, and without what only makes the file larger.

    That is LaTeX beside HTML, and style sheets that an earlier output brought (`styles`): they hold for the
    whole page.
    """
    outputs = []
    for output in cell.outputs:
        data = output.get("data", {})
        widget = any("widget-view" in kind for kind in data)
        if output.get("name") == "stderr" or widget:
            continue
        if "execution_count" in output:
            output.execution_count = None
        if "text/html" in data:
            data.pop("text/latex", None)
            data["text/html"] = _without_known_styles(data["text/html"], styles)
        outputs.append(nbformat.from_dict(_map_text(output, _hide_paths)))
    return outputs


def _without_known_styles(markup: str, styles: set[str]) -> str:
    def once(match: re.Match) -> str:
        known = match[0] in styles
        styles.add(match[0])
        return "" if known else match[0]

    return re.sub(r"<style.*?</style>", once, markup, flags=re.DOTALL)


def clean_notebook(source: NotebookNode, executed: NotebookNode) -> NotebookNode:
    """The source notebook with the outputs of its execution, and nothing of the machine that made them.

    Raises RequestError where the two do not have the same cells.
    """
    ran = [cell for cell in executed.cells if not notebooks.has_tag(cell, "injected-parameters")]
    if [cell.source for cell in ran] != [cell.source for cell in source.cells]:
        raise notebooks.RequestError("it was changed while it ran; publish it again")
    clean = copy.deepcopy(source)
    styles: set[str] = set()
    for i, (cell, done) in enumerate(zip(clean.cells, ran, strict=True)):
        cell.setdefault("id", runtime.content_hash(i, cell.source)[:8])
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = _clean_outputs(done, styles), None
    for node in (clean, *clean.cells):
        for key in ("papermill", "widgets", "execution", "ExecuteTime"):
            node.metadata.pop(key, None)
    clean.metadata.kernelspec = dict(display_name="Python 3", language="python", name="python3")
    clean.metadata.language_info = {"name": "python"}
    clean.nbformat_minor = max(clean.nbformat_minor, 5)
    return clean


def _publishable_text(notebook: NotebookNode) -> str:
    """The notebook as text; raises RequestError for a key, a private path, or too large a file."""

    def refuse_keys(text: str) -> str:
        if KEYS.search(text):
            raise notebooks.RequestError(
                f"cell {i} shows what looks like a key; remove and revoke it"
            )
        return text

    for i, cell in enumerate(notebook.cells, start=1):
        _map_text(cell, refuse_keys)
        if _hide_paths(cell.source) != cell.source:
            raise notebooks.RequestError(
                f"cell {i} names a folder of this machine; write a relative path"
            )
    text = nbformat.writes(notebook, indent=1) + "\n"
    if len(text.encode()) > MAX_PUBLISHED:
        sizes = [(len(json.dumps(cell)), i) for i, cell in enumerate(notebook.cells, start=1)]
        biggest = [f"cell {i} ({size // 1000} kB)" for size, i in sorted(sizes)[:-4:-1]]
        limit = f"{len(text) // 1000} kB, over the limit of {MAX_PUBLISHED // 1000} kB"
        raise notebooks.RequestError(f"{limit}; the biggest: {', '.join(biggest)}")
    return text


def _publish_figures(name: str, folder: Path) -> None:
    """Copy the figures to `plots/` and remove those that the notebook no longer makes."""
    plots, number = runtime.project_root() / "plots", name.split("_")[0]
    made = set()
    for figure in notebooks.read_json(folder / "results.json").get("figures", []):
        title = figure["name"].removeprefix(f"{number}_")
        for kind in ("png", "svg"):
            source, target = folder / f"{figure['name']}.{kind}", plots / f"{number}_{title}.{kind}"
            if source.exists():
                runtime.write_atomic(target, source.read_bytes())
                made.add(target)
    for old in {*plots.glob(f"{number}_*.png"), *plots.glob(f"{number}_*.svg")} - made:
        old.unlink()


def publish(names: list[str]) -> int:
    """Run at demo scale what is not up to date, write `notebooks/` and `plots/`; return the exit code."""
    code, records = runner.run_notebooks(names, "demo", {name: {} for name in names})
    for name in (r["notebook"] for r in records if r["status"] in ("finished", "skipped")):
        path, folder = notebooks.find_notebooks()[name], notebooks.run_folder(name, "demo")
        try:
            executed = notebooks.read_notebook(folder / "executed.ipynb")
            clean = clean_notebook(notebooks.read_notebook(path), executed)
            address.write_into_notebook(clean, name, address.read(runtime.project_root()))
            text = _publishable_text(clean)
        except notebooks.RequestError as error:
            print(f"{name} is not published: {error}")
            code = code or 1
            continue
        runtime.write_atomic(path, text)
        _publish_figures(name, folder)
        print(f"{name} published ({len(text) // 1000} kB)")
    return code
