"""The course as a static site: every page of words and every committed notebook, read in a browser.

Nothing is executed, and no page loads a script: formulas are MathML, styles are one file beside the pages.
A page keeps its place in the repository (`docs/scales.md` -> `docs/scales.html`); README is `index.html`.

Simplified: files of an earlier build are overwritten, not removed.
"""

from __future__ import annotations

import base64
import os
import re
import shutil
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import unquote

import jinja2
import nbformat
from bs4 import BeautifulSoup, Tag

from lib import runtime
from lib.course import address, notebooks, report

if TYPE_CHECKING:
    from nbconvert import HTMLExporter

PARTS = {  # first digit of a notebook's number -> the paper or part it belongs to
    "0": "Start",
    "1": "RewardLM",
    "2": "Peering Through Preferences",
    "3": "Language feedback (ILF)",
    "4": "Fine-Grained RLHF",
    "5": "ALT and Quark",
}


# parts that the menu folds, but for the one where the reader is
FOLDED = ("Solutions", "Using the course", "Behind it", "The project")


@dataclass
class Page:
    """A file of the course on its way to the site; `source` and `place` are relative paths."""

    source: PurePosixPath
    part: str  # heading under which the navigation lists it
    label: str = ""
    title: str = ""
    note: str = ""  # said above the text
    body: str = ""
    sections: list[tuple[str, str]] = field(default_factory=list)  # (anchor, words)

    @property
    def called(self) -> str:
        """Its label where the heading of its part is not beside it."""
        return f"Solutions: {self.label}" if self.part == "Solutions" else self.label

    @property
    def place(self) -> PurePosixPath:
        if self.source.name == "README.md" and len(self.source.parts) == 1:
            return PurePosixPath("index.html")
        return self.source.with_suffix(".html")

    def path_to(self, place: PurePosixPath | str) -> str:
        """The link from this page to another place of the site."""
        return os.path.relpath(place, self.place.parent).replace(os.sep, "/")


def list_pages(root: Path) -> list[Page]:
    """Every page of the site in reading order: front page, notebooks, solutions, docs, cards."""
    patterns = {
        "": ["README.md"],
        "lessons": ["notebooks/[!.]*.ipynb"],
        "Solutions": ["notebooks/solutions/[!.]*.ipynb"],
        "Using the course": ["docs/*.md", "TROUBLESHOOTING.md"],
        "Behind it": ["data/README.md", "data/results/*/README.md", "plots/README.md"],
        "The project": ["CONTRIBUTING.md", "CHANGELOG.md"],
    }
    pages = []
    for part, globs in patterns.items():
        for path in (path for pattern in globs for path in sorted(root.glob(pattern))):
            lesson = PARTS.get(path.name[0], "More lessons")
            source = PurePosixPath(path.relative_to(root).as_posix())
            pages.append(Page(source, lesson if part == "lessons" else part))
    return pages


def slug(heading: str) -> str:
    """A heading's anchor as GitHub makes it, so that one link works there and here."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


# --- one page ------------------------------------------------------------------------------------


def _read(page: Page, root: Path) -> nbformat.NotebookNode:
    """The page as a notebook: Markdown is a notebook of one cell; a solution is shown as source."""
    path = root / page.source
    if path.suffix == ".md":
        text = path.read_text(encoding="utf-8")
        return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)])
    notebook = notebooks.read_notebook(path)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if page.part == "Solutions":
        for cell in code:
            cell.outputs = []
        page.note = "A solution, as source: run it to see its results."
    elif not any(cell.outputs for cell in code):
        page.note = f"No outputs are committed for this notebook yet: run {path.stem} to see them."
    return notebook


def _finish_headings(soup: BeautifulSoup, page: Page) -> None:
    """Unique anchors; the first heading is the title, those of the second level are the sections."""
    taken: dict[str, int] = {}
    for heading in soup.find_all(re.compile("^h[1-6]$")):
        for mark in heading.find_all("a", "anchor-link"):
            mark.decompose()
        words = heading.get_text().strip()
        anchor = slug(words)
        taken[anchor] = taken.get(anchor, -1) + 1
        heading["id"] = f"{anchor}-{taken[anchor]}" if taken[anchor] else anchor
        page.title = page.title or words
        if heading.name == "h2":
            page.sections.append((heading["id"], words))


def _goal(page: Page, target: str, root: Path) -> PurePosixPath:
    """The file of the course that a link of this page names; raises RequestError where there is none."""
    path = os.path.normpath(page.source.parent / unquote(target)).replace(os.sep, "/")
    if path.startswith("..") or not (root / path).exists():
        raise notebooks.RequestError(
            f"{page.source} links to {target}, which is no file of the course. Write the path as seen "
            f"from {page.source}'s folder."
        )
    return PurePosixPath(path)


def _finish_links(soup: BeautifulSoup, page: Page, known: dict, root: Path) -> None:
    """Links to pages lead to pages, other files to the course's address; without one they are words."""
    home = address.read(root)
    for link in soup.find_all("a", href=True):
        target, _, anchor = link["href"].partition("#")
        if re.match(r"\w+:", target) or not target:
            continue
        if "runs" in PurePosixPath(target).parts:  # a file of the run that was published
            link.unwrap()
            continue
        goal = _goal(page, target, root)
        if goal in known:
            link["href"] = page.path_to(known[goal].place) + (f"#{anchor}" if anchor else "")
        elif home:
            link["href"] = f"{home}/blob/main/{goal}"
        else:
            link.unwrap()


def _finish_images(soup: BeautifulSoup, page: Page, root: Path) -> set[PurePosixPath]:
    """Images are looked for beside the pages; returns the files that must come along."""
    images = set()
    for image in soup.find_all("img"):
        if not re.match(r"\w+:", image["src"]):
            goal = _goal(page, image["src"], root)
            image["src"] = page.path_to(goal)
            if goal.suffix == ".svg":  # a drawing: its words stay legible on a phone
                image["class"] = "drawing"
            images.add(goal)
    return images


BROAD = 900  # pixels; most figures have 853
CELLS = ((60, "long"), (24, "words"))  # a text of so many characters needs some width


def _finish_tables(soup: BeautifulSoup) -> None:
    """A table wider than its page moves alone, by keyboard too; its sides are set by one style.

    A cell with a longer text keeps a width to be read in: on a phone it would be a column of single words.
    """
    for table in soup.find_all("table"):
        del table["border"]
        for cell in table.find_all("td"):
            if needs := [name for size, name in CELLS if len(cell.get_text()) > size]:
                cell["class"] = needs[0]
        for name in table.find_all(string=re.compile(r"\w_\w")):  # a long name may break
            *parts, last = name.split("_")
            broken = [x for part in parts for x in (f"{part}_", soup.new_tag("wbr"))]
            name.replace_with(*broken, last)
        box = {"class": "wide", "tabindex": "0", "role": "region", "aria-label": "Table"}
        table.wrap(soup.new_tag("div", attrs=box))


def _finish_outputs(soup: BeautifulSoup) -> None:
    """Printed columns stay under each other; a figure with many small texts stays legible on a phone."""
    for text in soup.find_all("div", "output_text"):
        if re.search(r"\S {3,}\S", text.get_text()):
            text["class"] = [*text["class"], "aligned"]
    for image in soup.select(".output_png img"):
        header = base64.b64decode(image["src"].partition("base64,")[2][:64])
        width = int.from_bytes(header[16:20], "big")  # which a PNG file begins with
        if width > BROAD:
            image["class"], image["style"] = "broad", f"--wide: {round(0.75 * width)}px"


def _drop_foreign_styles(soup: BeautifulSoup) -> None:
    """Styles that pandas and IPython put into outputs hold for the whole page, and know no dark one."""
    for style in soup.find_all("style"):
        if style.has_attr("scoped") or ".output_html" in style.get_text():
            style.decompose()


def _fold_setup(soup: BeautifulSoup) -> None:
    """The set-up cell, the same in every notebook, is opened by who wants it."""
    first_line = address.SETUP_CELL.partition("\n")[0]
    for cell in soup.find_all("div", "code_cell"):
        if cell.get_text().strip().startswith(first_line):
            folded: Tag = cell.wrap(soup.new_tag("details"))
            summary = soup.new_tag("summary")
            summary.string = "Set-up cell, the same in every notebook"
            folded.insert(0, summary)


def _make_exporter() -> HTMLExporter:
    """Cells without prompts; code is not cleaned of scripts, which costs half the time: it is ours."""
    return report.make_exporter(
        template_name="basic",
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        filters={"clean_html": lambda html: html},
    )


def _fill(page: Page, known: dict, root: Path, exporter: HTMLExporter) -> set[PurePosixPath]:
    """Write the page's title, sections and body; return the images it shows."""
    html = report.export_html(_read(page, root), page.source.stem, exporter)
    soup = BeautifulSoup(html, "html.parser")
    _finish_headings(soup, page)
    _finish_links(soup, page, known, root)
    _finish_tables(soup)
    _finish_outputs(soup)
    _drop_foreign_styles(soup)
    _fold_setup(soup)
    images = _finish_images(soup, page, root)
    page.body = str(soup)
    lesson = page.source.suffix == ".ipynb"
    page.label = page.source.stem.replace("_", " ") if lesson else page.title.partition(":")[0]
    if not page.part:
        page.label = "About the course"
    return images


# --- the site ------------------------------------------------------------------------------------


def _styles() -> str:
    """The site's style, and the colours of code in the light and in the dark."""
    from pygments.formatters import HtmlFormatter

    light, dark = (
        HtmlFormatter(style=name).get_style_defs(".highlight")
        for name in ("default", "github-dark")
    )
    own = (report.TEMPLATES / "site.css").read_text(encoding="utf-8")
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n{own}"


def build(out: Path) -> Path:
    """Write the site into a folder; return its front page.

    Raises RequestError where a page links to a file that is not there.
    """
    root = runtime.project_root()
    pages = list_pages(root)
    known = {page.source: page for page in pages}
    exporter = _make_exporter()
    images = set().union(*(_fill(page, known, root, exporter) for page in pages))
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(report.TEMPLATES), autoescape=True
    )
    template = templates.get_template("site.html.j2")
    parts = [(part, list(group)) for part, group in groupby(pages, lambda page: page.part)]
    for page, before, after in zip(pages, [None, *pages], [*pages[1:], None], strict=False):
        html = template.render(page=page, parts=parts, folded=FOLDED, before=before, after=after)
        runtime.write_atomic(out / page.place, html)
    for image in images:
        (out / image).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / image, out / image)
    runtime.write_atomic(out / "site.css", _styles())
    return out / "index.html"
