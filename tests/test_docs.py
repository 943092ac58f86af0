"""The README and the pages of docs/: their links resolve, what they name exists, their examples run."""

import importlib
import re
from pathlib import Path

import pytest
import yaml

from lib.course import cli, reference

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


MODULES = {path.stem for path in (ROOT / "lib").glob("*.py")}
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def quoted(page):
    """What stands between single backticks."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    return re.findall(r"`([^`\n]+)`", text)


def anchors(page):
    """The headings of a page as GitHub links to them."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@each_page
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


@each_page
def test_files_that_pages_name_exist(page):
    """Named from the course's root; what runs make (runs/, data/cache/) is not there yet."""
    for text in quoted(page):
        for name in re.findall(r"^(?:lib|bench|tests|docs|data/samples)/[\w./]+$", text):
            assert (ROOT / name).exists(), f"{page.name} names {name}"


@each_page
def test_names_of_the_library_that_pages_name_exist(page):
    """`module.name` and `module.Class.name`, with or without a call."""
    for text in quoted(page):
        match = re.match(r"(?:lib\.)?(\w+)((?:\.[A-Za-z_]\w*)+)", text)
        if not match or match[1] not in MODULES or match[2] in (".py", ".csv", ".txt"):
            continue
        thing = importlib.import_module(f"lib.{match[1]}")
        for name in match[2].split(".")[1:]:
            assert hasattr(thing, name), f"{page.name} names {text}"
            thing = getattr(thing, name)


def test_the_library_is_documented_name_by_name():
    """docs/library.md is what its command writes, and says something of every public name."""
    text = (ROOT / "docs/library.md").read_text(encoding="utf-8")
    assert text == reference.page(ROOT), "run: python -m lib.course.reference"
    names = re.findall(r"^\* `(\w+\.\w+)`: \S", text, re.MULTILINE)
    assert "ppo.train_ppo" in names and len(names) == len(re.findall(r"^\* ", text, re.MULTILINE))


def test_the_scorer_of_contributing_scores():
    from lib import scorers

    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    try:
        exec(example, {})
        scores = scorers.load_scorer("shouting").score(["AB", "Ab", "", "ab"])
    finally:
        scorers.SCORERS.pop("shouting", None)
    assert scores.tolist() == [1, 0.5, 0, 0]


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


def test_the_questions_cover_every_notebook_and_hide_their_answers():
    text = (ROOT / "docs/questions.md").read_text()
    asked = set(re.findall(r"^\*\*\[(\d\d)\]", text, flags=re.M))
    assert asked == {path.name[:2] for path in (ROOT / "notebooks").glob("[0-9]*.ipynb")}
    assert (
        text.count("<details>")
        == text.count("</details>")
        == len(re.findall(r"^\*\*\[", text, flags=re.M))
    )
