"""What is rehearsed: notebooks, the parameters of their variants, and the counts that are lowered.

`counts.json`: scale -> notebook -> a list of parts, {"parameters": {...}, "counts": {...}}.  A notebook
has several parts where its parameters choose between tasks or annotators.  `$NAME` in a parameter is an
environment variable, such as the address of the chat endpoint.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from lib.course import notebooks

COUNTS = Path(__file__).with_name("counts.json")


@dataclass(frozen=True)
class Part:
    """One run of a notebook."""

    notebook: str
    counts: dict = field(default_factory=dict)
    parameters: dict = field(default_factory=dict)

    @property
    def variant(self) -> str:
        """What sets this part apart from the notebook's others, as a folder's name; "plain" for the first."""
        values = [x for v in self.parameters.values() for x in (v if isinstance(v, list) else [v])]
        names = [str(value).strip("$") for value in values]
        return "-".join(names).replace("/", "-") or "plain"

    @property
    def resolved(self) -> dict:
        """The parameters with their environment variables replaced."""
        return {
            name: os.path.expandvars(value) if isinstance(value, str) else value
            for name, value in self.parameters.items()
        }


def scales() -> list[str]:
    """The scales that `counts.json` knows."""
    return list(json.loads(COUNTS.read_text(encoding="utf-8")))


def parts_of(names: list[str], scale: str) -> list[Part]:
    """The parts of these notebooks in their order.

    Raises RequestError where `counts.json` has none of a notebook.
    """
    table = json.loads(COUNTS.read_text(encoding="utf-8"))[scale]
    missing = [name for name in names if name not in table]
    if missing:
        raise notebooks.RequestError(
            f"{COUNTS.name} has no counts for {', '.join(missing)} at {scale}. Add them there."
        )
    return [Part(name, **entry) for name in names for entry in table[name]]
