"""The card beside everything that was trained and kept: what it is, made from what, and how well it does.

`card.json` is for programs (`models.load_policy` and `reward_models.load` read it), `README.md` says the
same to people and to the Hub, which shows it as the model's page.
"""

from __future__ import annotations

import json
import time
from importlib import metadata
from pathlib import Path

from lib import runtime

CARD, PAGE = "card.json", "README.md"
PACKAGES = ("torch", "transformers", "peft")
TELLING = ("settings", "metrics")  # parts of a card that are tables of names and values


def describe(card: dict | None) -> dict:
    """What the user says of a training run, in the form in which it is kept.

    `card`: data (anything JSON can hold: only its hash is kept), settings and metrics (dicts of names and
    values), licence (an SPDX name), and whatever else is worth saying.  Raises ValueError for settings or
    metrics that are no dict.
    """
    facts = dict(card or {})
    for name in TELLING:
        if not isinstance(facts.setdefault(name, {}), dict):
            raise ValueError(f"card[{name!r}] is {facts[name]!r}; give a dict of names and values.")
    if "data" in facts:
        facts["data_hash"] = runtime.content_hash(facts.pop("data"))
    return facts


def write(folder: Path, facts: dict) -> None:
    """Write `card.json` and `README.md` into a folder that holds a model."""
    versions = {name: metadata.version(name) for name in PACKAGES}
    facts = {**facts, "saved": time.strftime("%Y-%m-%d", time.gmtime()), "versions": versions}
    runtime.write_atomic(folder / CARD, runtime.to_json(facts))
    runtime.write_atomic(folder / PAGE, _page(facts))


def read(folder: Path | str) -> dict:
    """What `write` wrote, or {} where a folder has no card.  ValueError for a card that is damaged."""
    path = Path(folder) / CARD
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{path} is damaged: it is no JSON. Save the model again.") from None


def _page(facts: dict) -> str:
    """The card as a page in Markdown, with the lines at its head that the Hub reads."""
    base = facts.get("base") or {}
    head = {"license": facts.get("licence"), "base_model": base.get("name")}
    library = "peft" if facts.get("training") == "lora" else "transformers"
    lines = ["---"]
    lines += [f"{name}: {json.dumps(value)}" for name, value in head.items() if value]
    lines += [f"library_name: {library}", "---", f"# A {facts.get('kind', 'model')}", ""]
    plain = {k: v for k, v in facts.items() if k not in TELLING and v not in (None, {}, "")}
    for title, table in (("What it is", plain), *((name, facts[name]) for name in TELLING)):
        if table:
            lines += [f"## {title.capitalize()}", "", "| name | value |", "|---|---|"]
            lines += [f"| {name} | {_cell(value)} |" for name, value in table.items()]
            lines.append("")
    return "\n".join(lines)


def _cell(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text.replace("|", "\\|").replace("\n", " ")
