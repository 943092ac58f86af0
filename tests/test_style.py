"""The words and sizes that the library keeps to: CONTRIBUTING.md says why."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted([*(ROOT / "lib").rglob("*.py"), *(ROOT / "bench").rglob("*.py")])
# say nothing of what a thing is; the field has words: interval, scores, pairs, options, ...
EMPTY_WORDS = {"found", "how", "told", "kept", "given"}
MAX_FUNCTION, MAX_CLASS = 50, 200  # lines


def bound_names(tree: ast.AST):
    """Every name that a module binds, and its line: variables, arguments, functions, classes, imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.ExceptHandler)):
            yield node.name, node.lineno
        elif isinstance(node, ast.alias):
            yield node.asname or node.name, node.lineno


def test_every_way_to_bind_a_name_is_seen():
    ways = [
        "found = 1",
        "def f(found): pass",
        "def f(**found): pass",
        "lambda found: 1",
        "for found in x: pass",
        "[found for found in x]",
        "with x as found: pass",
        "import x as found",
        "(found := 1)",
        "def found(): pass",
        "class found: pass",
        "try: pass\nexcept E as found: pass",
        "a, (b, *found) = x",
    ]
    for text in ways:
        assert "found" in dict(bound_names(ast.parse(text))), text
    assert "found" not in dict(bound_names(ast.parse("x.found = f(found=y['found'])")))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_say_what_they_name(path):
    names = bound_names(ast.parse(path.read_text(encoding="utf-8")))
    empty = [f"line {line}: {name}" for name, line in names if name in EMPTY_WORDS]
    assert not empty, f"{path.name} binds {'; '.join(empty)}: use the field's word for what it is."


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_and_classes_fit_on_a_screen(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            lines = node.end_lineno - node.lineno + 1
            limit = MAX_CLASS if isinstance(node, ast.ClassDef) else MAX_FUNCTION
            assert lines <= limit, f"{path.name}: {node.name} has {lines} lines, at most {limit}."


@pytest.mark.parametrize("folder", ["lib", "lib/annotate", "bench"])
def test_the_formatter_formats(folder):
    """Of the shared code: a line that the formatter would spoil is two statements, or a table in a file."""
    for path in sorted((ROOT / folder).glob("*.py")):
        assert "fmt: " + "skip" not in path.read_text(encoding="utf-8"), path.name
