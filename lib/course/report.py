"""What has run: one line for each notebook, the summary of a run, and the page of results."""

from __future__ import annotations

import os
import re
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
from nbformat import NotebookNode

from lib import runtime
from lib.course import notebooks
from lib.course.record import SCALES, VERDICTS

if TYPE_CHECKING:
    from nbconvert import HTMLExporter

BADGE = re.compile(r"!\[([^]]*)\]\(https?:[^)]*\)")  # an image from the net; its text is kept
TEMPLATES = Path(__file__).parent
LOCAL_LINK = re.compile(r"\]\((?!\w+:|#)([^)\s]+)\)")
FORMULA = re.compile(  # code and escaped dollars stand first, so that no formula begins in them
    r"(?s)(?P<code>```.*?```|~~~.*?~~~|``.*?``|`[^`]*`|\\\$)|\$\$(?P<block>.+?)\$\$"
    r"|(?<![\w$])\$(?P<inline>[^\s$`](?:[^$\n`]*[^\s$\\`])?)\$(?![\d$])"
)


def duration(seconds: float | None) -> str:
    """Seconds in words: 7 s, 3 min 12 s, 1 h 02 min."""
    if not seconds:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def memory(size: int | None) -> str:
    """Bytes in words."""
    return f"{size / 1e9:.1f} GB" if size else ""


def describe(record: dict) -> str:
    """One line about a run: status, time, and the failing cell where there is one."""
    status = {"skipped": "unchanged, not repeated"}.get(record["status"], record["status"])
    line = f"{status}  {duration(record.get('wall_seconds'))}".rstrip()
    error = record.get("error")
    if not error:
        return line
    if "index" not in error:
        return f"{line}: {error['message']}"
    return f"{line} in cell {error['index'] + 1} ({error['line']}): {error['name']}: {error['message']}"


def _count_verdicts(results: dict) -> str:
    verdicts = [claim["verdict"] for claim in results.get("claims", [])]
    short = {"same direction": "same"}
    counts = [(verdicts.count(v), short.get(v, v)) for v in VERDICTS]
    return ", ".join(f"{count} {verdict}" for count, verdict in counts if count)


def summary(records: list[dict], scale: str) -> str:
    """The table printed at the end: notebook, status, wall time, peak memory, claims."""
    rows = [("notebook", "status", "wall time", "peak memory", "claims")]
    for record in records:
        results = notebooks.read_json(
            notebooks.run_folder(record["notebook"], scale) / "results.json"
        )
        claims = _count_verdicts(results) if record["status"] in ("finished", "skipped") else ""
        spent, peak = record.get("wall_seconds"), record.get("peak_memory_bytes")
        rows.append((record["notebook"], record["status"], duration(spent), memory(peak), claims))
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join(["", *lines])


def question(notebook: NotebookNode) -> str:
    """The question a notebook asks: its title, where that is one, else its first cell's first question."""
    text = next((c.source for c in notebook.cells if c.cell_type == "markdown"), "")
    title = re.match(r"# (?:\d+ )?(.*\?)", text)
    if title:
        return title[1].removeprefix("Start here: ")
    text = re.sub(r"^#.*$|<[^>]+>|\[!\[.*?\)\]\(.*?\)|!\[.*?\]\(.*?\)", "", text, flags=re.M)
    text = re.sub(r"\*\*|`|\[(?=[^\]]*\]\()|\]\([^)]*\)", "", text).strip()  # marks go, words stay
    sentences = re.split(r"(?<=[.?!])\s+|\n\s*\n", text)
    asked = next((s for s in sentences if s.endswith("?")), sentences[0])
    return " ".join(asked.split())


def list_notebooks() -> str:
    """Each notebook with its question and, per scale, its state and wall time."""
    lines = []
    for name in notebooks.resolve_notebooks([]):
        lines.append(
            f"{name}\n    {question(notebooks.read_notebook(notebooks.find_notebooks()[name]))}"
        )
        states = {scale: notebooks.run_state(name, scale) for scale in SCALES}
        parts = [
            f"{scale}: {state} {duration(record.get('wall_seconds'))}".rstrip()
            for scale, (state, record) in states.items()
        ]
        lines.append("    " + " | ".join(parts))
    return "\n".join(lines)


# --- the page of results -------------------------------------------------------------------------


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "–" if value is None else str(value)


def math_to_mathml(text: str) -> str:
    """Markdown with its formulas as MathML: the page needs no script, and screen readers read it."""
    from latex2mathml.converter import convert

    def replace(match: re.Match) -> str:
        if match["code"]:
            return match[0]
        formula = re.sub(r"\{aligned\}", "{align*}", match["block"] or match["inline"])
        try:
            html = convert(formula, display="block" if match["block"] else "inline")
        except Exception:  # latex2mathml has no common error class
            return f"`{match[0]}`"
        html = re.sub(' xmlns="[^"]*"', "", html)  # nbconvert would rename the tags in headings
        return re.sub(r"[*_|\\`$~]", lambda mark: f"&#{ord(mark[0])};", html)  # no markdown in it

    return FORMULA.sub(replace, text)


def _link_from_run(link: re.Match, folder: Path) -> str:
    """A notebook's link to another one leads to its results, others to the same file as before."""
    if link[1].endswith(".ipynb") and "/" not in link[1]:
        return f"](../index.html#{Path(link[1]).stem})"
    here = os.path.relpath(runtime.project_root() / "notebooks", folder).replace(os.sep, "/")
    return f"]({here}/{link[1]})"


def make_exporter(**options) -> HTMLExporter:
    """nbconvert to HTML with this folder's templates at hand; the options are nbconvert's.

    Its default template drops the figures' alt texts; `classic` and `basic` have them.
    """
    from nbconvert import HTMLExporter

    return HTMLExporter(
        extra_template_basedirs=[str(TEMPLATES)],
        extra_loaders=[jinja2.FileSystemLoader(TEMPLATES)],
        **options,
    )


def export_html(notebook: NotebookNode, title: str, exporter: HTMLExporter) -> str:
    """A notebook as HTML that needs no network: its formulas are MathML, its badges words."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = math_to_mathml(BADGE.sub(r"\1", cell.source))
    return exporter.from_notebook_node(notebook, {"metadata": {"name": title}})[0]


def notebook_html(notebook: NotebookNode, folder: Path) -> str:
    """An executed notebook as one page for its run's folder; fits a phone."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = LOCAL_LINK.sub(lambda link: _link_from_run(link, folder), cell.source)
    exporter = make_exporter(template_name="classic", template_file="executed.html.j2")
    return export_html(notebook, folder.name, exporter)


def _refresh_html(folder: Path) -> bool:
    """Bring `executed.html` up to date with `executed.ipynb`; False where there is nothing to show."""
    source, page = folder / "executed.ipynb", folder / "executed.html"
    if not source.exists():
        return False
    if not page.exists() or page.stat().st_mtime < source.stat().st_mtime:
        try:
            html = notebook_html(notebooks.read_notebook(source), folder)
        except notebooks.RequestError:  # cut off in the middle of a save
            return False
        runtime.write_atomic(page, html)
    return True


def _report_row(name: str, scale: str) -> dict:
    """What the page says about one notebook."""
    state, record = notebooks.run_state(name, scale)
    folder = notebooks.run_folder(name, scale)
    results = (
        notebooks.read_json(folder / "results.json") if state in ("finished", "outdated") else {}
    )
    figures = [f for f in results.get("figures", []) if (folder / f"{f['name']}.png").exists()]
    for figure in figures:
        figure["large"] = "svg" if (folder / f"{figure['name']}.svg").exists() else "png"
    html = state not in ("running", "not run") and _refresh_html(folder)
    asked = question(notebooks.read_notebook(notebooks.find_notebooks()[name]))
    return {
        "name": name, "state": state, "record": record, "results": results, "figures": figures,
        "question": asked, "html": html, "verdicts": _count_verdicts(results),
    }  # fmt: skip


def write_report(scale: str) -> Path:
    """Write `index.html` beside the results from what has run at this scale; return its path."""
    rows = [_report_row(name, scale) for name in notebooks.resolve_notebooks([])]
    ran = [row["record"] for row in rows if row["record"]]
    templates = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True)
    templates.filters |= {"number": _number, "duration": duration, "memory": memory}
    page = templates.get_template("report.html.j2").render(
        scale=scale, rows=rows, date=datetime.now().strftime("%Y-%m-%d %H:%M"),
        devices=list(dict.fromkeys(record["device"] for record in ran)),
        commits=list(dict.fromkeys(record["git_commit"] for record in ran)),
    )  # fmt: skip
    return runtime.write_atomic(notebooks.results_root(scale) / "index.html", page)
