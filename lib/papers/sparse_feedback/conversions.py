"""Files of "sparse feedback" (Bansal, Dang and Grover, ICLR 2024) and the five conversions between them.

An item is a dict {instruction, input, responses}; `preferences` says what a ratings or rankings table holds.
Text is kept exactly: a missing input is "".
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd
import pydantic

from lib import runtime, tables
from lib.preferences import RANKING, RATING, alpaca_prompt, decided, read_rankings


class _Record(pydantic.BaseModel):
    """What all files share; fields that are not named here are left out."""

    model_config = pydantic.ConfigDict(strict=True)
    instruction: str


class _Instruction(_Record):
    input: str | None = None

    @pydantic.model_validator(mode="before")
    @classmethod
    def _other_names(cls, record):
        """Dolly calls the input `context`; Self-Instruct's user-oriented set has it in `instances`."""
        if not isinstance(record, dict) or "input" in record:
            return record
        first = next(iter(record.get("instances") or ()), None)
        own = first.get("input") if isinstance(first, dict) else record.get("context")
        return record | {"input": own}

    @pydantic.field_validator("input", mode="before")
    @classmethod
    def _missing(cls, value):
        return None if value != value else value  # pandas writes NaN for a missing text


class _Generation(_Instruction):
    responses: list[str]

    @pydantic.model_validator(mode="before")
    @classmethod
    def _outputs(cls, record):
        """The reference's pools of 64 say `outputs`."""
        if isinstance(record, dict) and "outputs" in record and "responses" not in record:
            return record | {"responses": record["outputs"]}
        return record


class _Output(_Record):
    model_config = pydantic.ConfigDict(extra="allow")
    dataset: str
    output: str


def _read_json(path: str | Path, kind: type[_Record]) -> list[dict]:
    """Checked records of a JSON list or JSON lines.  Raises ValueError with file, line and field."""
    path = Path(path).expanduser()
    records = []
    for line, record in tables.json_records(path):
        try:
            records.append(kind.model_validate(record).model_dump())
        except pydantic.ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"]))
            allowed = "list" if where == "responses" else "str" if where else "record"
            needed = [name for name, f in kind.model_fields.items() if f.is_required()]
            raise ValueError(
                f"{path.name}, line {line}: {where!r} must be a {allowed}; each record needs "
                f"{', '.join(needed)}. Given: {str(record)[:200]}"
            ) from None
    return records


def read_instructions(path: str | Path) -> list[dict]:
    """instructions.json: a list of {instruction, input}; a missing or null input becomes "".

    The paper's three sets are read as they are: Dolly ({instruction, context, ...}), Self-Instruct's
    user-oriented one ({instruction, instances: [{input, output}]}) and Super-Natural Instructions.
    """
    return [r | {"input": r["input"] or ""} for r in _read_json(path, _Instruction)]


def read_generations(path: str | Path) -> list[dict]:
    """A generation file: a list of {instruction, input, responses: [text, ...]}, or `outputs` for pools."""
    return [r | {"input": r["input"] or ""} for r in _read_json(path, _Generation)]


def read_outputs(path: str | Path) -> list[dict]:
    """Model outputs in AlpacaEval's form: a list of {dataset, instruction, output, generator}."""
    return _read_json(path, _Output)


def read_pool(path: str | Path) -> pd.DataFrame:
    """A pool in a generation file, a row a response: id, instruction, input, response, generator, sample.

    Raises ValueError where instructions have different numbers of responses, or fewer than two.
    """
    items = read_generations(path)
    sizes = sorted({len(item["responses"]) for item in items})
    if len(sizes) != 1 or sizes[0] < 2:
        raise ValueError(
            f"{Path(path).name}: {', '.join(map(str, sizes))} responses an instruction; a pool has the same "
            "number, two or more, for each."
        )
    return pd.DataFrame(
        [
            {
                "id": runtime.content_hash(item["instruction"], item["input"])[:12],
                "instruction": item["instruction"],
                "input": item["input"],
                "response": text,
                "generator": Path(path).name,
                "sample": k,
            }
            for item in items
            for k, text in enumerate(item["responses"])
        ]
    )


def to_outputs(picked: pd.DataFrame, generator: str, dataset: str = "pool") -> list[dict]:
    """Chosen responses in AlpacaEval's form, as `read_outputs` reads them: the reference's re-ranked file."""
    return [
        {"dataset": dataset, "instruction": r.instruction, "input": r.input}
        | {"output": r.response, "generator": generator}
        for r in picked.itertuples()
    ]


# --- the five conversions (section 1.3 of the reference's pipeline) ------------------------------


def to_ratings_table(items: Iterable[dict]) -> pd.DataFrame:
    """One row a response: instruction, input, response; prompt order, then response order."""
    rows = [(i["instruction"], i.get("input") or "", r) for i in items for r in i["responses"]]
    return pd.DataFrame(rows, columns=RATING[:-1], dtype=object)


def to_rankings_table(items: Iterable[dict]) -> pd.DataFrame:
    """One row a pair i < j of a prompt's responses, in lexicographic order; equal texts are kept."""
    rows = [
        (i["instruction"], i.get("input") or "", *pair)
        for i in items
        for pair in itertools.combinations(i["responses"], 2)
    ]
    return pd.DataFrame(rows, columns=RANKING[:-1], dtype=object)


def to_rankings_rm(rankings: pd.DataFrame) -> dict[str, dict[str, list[list[str]]]]:
    """{Alpaca prompt: {"sentences": [[preferred, rejected], ...]}}: decided pairs, exact duplicates once.

    A prompt whose verdicts are all "equal" or missing vanishes.
    """
    pairs: dict[str, dict[str, list]] = {}
    for row in decided(rankings)[RANKING].drop_duplicates().itertuples(index=False):
        pair = [row.response1, row.response2]
        entry = pairs.setdefault(alpaca_prompt(row.instruction, row.input), {"sentences": []})
        entry["sentences"].append(pair if row.verdict == "(a)" else pair[::-1])
    return pairs


def compare_shipped(folder: Path) -> dict[str, tuple[int, int]]:
    """Conversion -> (equal, rows): ours of the authors' sample against the files that they ship beside it.

    The two tables are compared row for row, cell by cell; the reward-model pairs prompt by prompt.
    """
    sample = "sample_generation"
    items = read_generations(folder / f"{sample}.json")
    compared = {}
    for kind, convert in (("ratings", to_ratings_table), ("rankings", to_rankings_table)):
        records = tables.csv_records(folder / f"{kind}_{sample}.csv")
        _, *rows = (cells for _, cells in records)  # the header is no row
        equal = sum(map(list.__eq__, convert(items).to_numpy().tolist(), rows))
        compared[f"{kind} table"] = (equal, len(rows))
    pairs = to_rankings_rm(read_rankings(folder / f"feedback_rankings_{sample}.csv"))
    shipped = json.loads((folder / "feedback_rankings_for_rm_sample.json").read_text())
    equal = sum(pairs.get(prompt) == entry for prompt, entry in shipped.items())
    return compared | {"reward-model pairs, by prompt": (equal, len(shipped))}


def to_rating_eval(
    outputs: Iterable[dict], skip: Sequence[str] = ("selfinstruct",)
) -> pd.DataFrame:
    """Outputs as a table to rate: instruction, input (always ""), response; `skip` data sets left out."""
    rows = [(o["instruction"], "", o["output"]) for o in outputs if o["dataset"] not in skip]
    return pd.DataFrame(rows, columns=RATING[:-1], dtype=object)


def to_ranking_eval(reference: Iterable[dict], policy: Iterable[dict]) -> pd.DataFrame:
    """Pairs to rank: response1 is the reference's output, response2 the policy's; policy order.

    Raises ValueError for a policy instruction that the reference did not answer.
    """
    answers = {o["instruction"]: o["output"] for o in reference}
    policy = list(policy)
    missing = [o["instruction"] for o in policy if o["instruction"] not in answers]
    if missing:
        raise ValueError(
            f"{len(missing)} instructions of the policy have no reference output, first: "
            f"{missing[0][:80]!r}. Try the reference file that answers the same instructions."
        )
    rows = [(o["instruction"], "", answers[o["instruction"]], o["output"]) for o in policy]
    return pd.DataFrame(rows, columns=RANKING[:-1], dtype=object)
