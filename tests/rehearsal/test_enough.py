"""At `full` a notebook asks for no more articles than there are, which lowered counts would hide."""

import ast
from pathlib import Path

import nbformat
import pytest
from conftest import asset

from lib.course import record
from lib.papers.fine_grained import first_policy, passages

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def wikipedia():
    asset("wikipedia")


def cell(number, text):
    """The source of the code cell of a notebook that holds this text."""
    [path] = (ROOT / "notebooks").glob(f"{number}_*.ipynb")
    cells = nbformat.read(path, as_version=4).cells
    return next(c.source for c in cells if c.cell_type == "code" and text in c.source)


def full_counts(number):
    """Setting -> value at `full`, of those that are written as a number."""
    assigned = [
        n for n in ast.parse(cell(number, "SETTINGS = {")).body if isinstance(n, ast.Assign)
    ]
    table = next(n.value for n in assigned if ast.unparse(n.targets[0]) == "SETTINGS")
    column = record.SCALES.index("full")
    values = {k.value: row.elts[column] for k, row in zip(table.keys, table.values, strict=True)}
    return {name: v.value for name, v in values.items() if isinstance(v, ast.Constant)}


def test_40_has_pairs_for_training_and_held_out_loss():
    counts = full_counts("40")
    wanted = counts["n_train"] + counts["n_held_out"]
    pairs = first_policy.wikipedia_pairs(wanted, words=(20, 400))
    assert len(pairs) == wanted == 1500


def test_44_has_articles_for_each_of_its_parts():
    wanted = sum(passages.SETTINGS[part][3] for part in passages.PARTS)
    assert len(passages.articles("full")) >= wanted == 7000
