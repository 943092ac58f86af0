"""Simulated annotators: copies of an annotation with errors of known kinds, to try measures of agreement on.

A copy loses a label with probability `noise / 2`, moves each end of a span by one or two words with
probability `noise`, and takes another type with probability `noise / 2`; a missing piece may also be named by
the sentence before or after (probability `noise`).

Simplified: the errors of two copies are independent, and a copy never adds a label.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from lib.papers.fine_grained import schema


def noisy_copy(record: dict, noise: float, rng: np.random.Generator) -> dict:
    """The record as a second annotator might have marked it; spans stay whole words and do not overlap.

    `noise` (0 to 1) as in the module's text; explanations and the corrected answer stay as they
    were.
    """
    words = schema.word_spans(record["prediction 1"])
    first = {start: number for number, (start, _) in enumerate(words)}
    last = {end: number for number, (_, end) in enumerate(words)}
    errors, free = [], 0  # `free`: the first word that no span has taken yet
    for error in sorted(record["feedback"]["errors"], key=lambda e: e["start"]):
        moved = rng.integers(1, 3, 2) * rng.choice([-1, 1], 2) * (rng.random(2) < noise)
        lost, confused = rng.random(2) < noise / 2
        other = rng.choice([kind for kind in schema.CATEGORIES if kind != error["error type"]])
        start = max(free, first[error["start"]] + moved[0])
        end = min(len(words) - 1, last[error["end"]] + moved[1])
        if lost or start > end:
            continue
        kind = str(other) if confused else error["error type"]
        errors.append(error | {"error type": kind, "start": words[start][0], "end": words[end][1]})
        free = end + 1
    copied = {"errors": errors, "missing-info": _noisy_missing(record, noise, rng)}
    return record | {"feedback": record["feedback"] | copied}


def _noisy_missing(record: dict, noise: float, rng: np.random.Generator) -> list[dict]:
    """The copy's missing pieces: some lost, confused, or named by a neighbouring sentence."""
    pieces = []
    for piece in record["feedback"]["missing-info"]:
        lost, confused = rng.random(2) < noise / 2
        step = int(rng.choice([-1, 1]) * (rng.random() < noise))
        last = len(record["passages"][piece["passage_id"] - 1]) - 1
        named = {min(max(sentence + step, 0), last) for sentence in piece["sentence_id"]}
        other = rng.choice([kind for kind in schema.MISSING if kind != piece["error type"]])
        if lost:
            continue
        kind = str(other) if confused else piece["error type"]
        pieces.append(piece | {"error type": kind, "sentence_id": sorted(named)})
    return pieces


def agreement_by_noise(
    records: Sequence[dict], noises: Sequence[float], *, repeats: int, seed: int = 0,
    resamples: int = 100,
) -> pd.DataFrame:  # fmt: skip
    """`schema.agreement` of two noisy copies of each record, for each noise, `repeats` times.

    Columns of `schema.agreement`, noise, and name ("span F1, any").  Intervals are over records, the copies
    of one record together; n counts records.
    """
    records = [{k: v for k, v in record.items() if k != "preference"} for record in records]
    number = np.tile(np.arange(len(records)), repeats)
    tables = []
    for noise in noises:
        sides: list[list[dict]] = [[], []]
        for repeat in range(repeats):
            for side, copies in enumerate(sides):
                rng = np.random.default_rng([seed, repeat, side])
                copies += [noisy_copy(record, noise, rng) for record in records]
        table = schema.agreement(*sides, clusters=number, seed=seed, resamples=resamples)
        tables.append(table.assign(noise=noise))
    joined = pd.concat(tables, ignore_index=True)
    return joined.assign(name=joined.unit + " " + joined.measure + ", " + joined.level)
