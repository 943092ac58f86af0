"""docs/library.md: every public name of the shared shelf, one line each, as its docstring begins.

    python -m lib.course.reference     writes the page

Nothing is imported: the page is read off the source files.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from lib import runtime

HEAD = """# The shared library, name by name

What `lib/*.py` offers, module by module. The signatures, shapes, units and errors stand in each docstring
(`help(name)`, or `record.show_source(name)` in a notebook). Written by `python -m lib.course.reference`.
"""


def page(root: Path) -> str:
    """The text of docs/library.md for the library under `root`."""
    parts = [HEAD]
    for path in sorted((root / "lib").glob("*.py")):
        if not path.stem.startswith("__"):
            parts.append(_section(path))
    return "\n".join(parts)


def _section(path: Path) -> str:
    """A module's heading, its own first line, and its public names in their order."""
    module = ast.parse(path.read_text(encoding="utf-8"))
    public = [
        node
        for node in module.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    rows = [f"* `{path.stem}.{node.name}`: {_first_sentence(node)}" for node in public]
    return "\n".join([f"## lib/{path.name}", "", _first_sentence(module), "", *rows, ""])


def _first_sentence(node: ast.AST) -> str:
    """The first sentence of a docstring, on one line; a <tag> in it is code, or a page would swallow it."""
    lines = (ast.get_docstring(node) or "").split("\n\n")[0].split()
    sentence = re.split(r"(?<!et al)(?<=\.) (?=[A-Z`])", " ".join(lines))[0]
    parts = sentence.split("`")  # every second one is code already
    parts[::2] = [re.sub(r"<[^<>]+>", r"`\g<0>`", part) for part in parts[::2]]
    return "`".join(parts)


def write(root: Path) -> Path:
    """Write docs/library.md; return its path."""
    target = root / "docs" / "library.md"
    runtime.write_atomic(target, page(root))
    return target


if __name__ == "__main__":
    print(write(runtime.project_root()))
