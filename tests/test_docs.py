"""The README and the pages of docs/: their links resolve, and what they name exists."""

import re
from pathlib import Path

import pytest
import yaml

from lib.course import cli

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path
    for folder in (
        ROOT,
        ROOT / "docs",
        ROOT / "data",
        ROOT / "plots",
        *(ROOT / "data/results").iterdir(),
    )
    for path in folder.glob("*.md")
)


def anchors(page):
    """The headings of a page as GitHub links to them."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_inner_links_resolve(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        goal = (page.parent / path) if path else page
        assert goal.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(goal), f"{page.name}: {target}"


def test_readme_is_one_screen_and_names_every_notebook():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 100 and "![" in text
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        assert f"[{path.stem}](notebooks/{path.name})" in text
    for page in (ROOT / "docs").glob("*.md"):
        assert f"docs/{page.name}" in text, f"README has no way to docs/{page.name}"


def test_commands_that_pages_name_exist():
    known = cli.build_parser()._subparsers._group_actions[0].choices
    for page in PAGES:
        for command in re.findall(r"python -m lib (\w+)", page.read_text(encoding="utf-8")):
            assert command in known, f"{page.name}: python -m lib {command}"


def test_the_citation_is_valid_yaml_with_all_papers():
    cite = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    numbers = {reference["url"].rpartition("/")[2] for reference in cite["references"]}
    linked = set(re.findall(r"arxiv\.org/abs/([\d.]+)", (ROOT / "README.md").read_text()))
    assert numbers == linked and cite["license"] == "Apache-2.0"


def test_the_glossary_is_in_order_and_points_to_notebooks():
    rows = re.findall(
        r"^\| (?!word|---)([^|]+) \|", (ROOT / "docs/glossary.md").read_text(), flags=re.M
    )
    words = [re.sub(r"[^a-z0-9 ]", "", row.lower()) for row in rows]
    assert words == sorted(words) and len(set(words)) == len(words)
    numbers = {path.name[:2] for path in (ROOT / "notebooks").glob("*.ipynb")}
    named = re.findall(r"\[(\d\d(?:, \d\d)*)\]", (ROOT / "docs/glossary.md").read_text())
    assert {number for group in named for number in group.split(", ")} <= numbers
