"""What the papers' own runs take: memory, samples to score, steps and hours of each task."""

from __future__ import annotations

from typing import NamedTuple

import pandas as pd


class PaperRun(NamedTuple):
    """One task with the settings of its reference code (notebook 50 names the repositories)."""

    task: str
    model: str
    size: float  # parameters
    weight_bytes: int
    trained: float  # share of the parameters
    samples: float  # to be drawn and scored
    context: int  # tokens of a conditioned prompt
    tokens: int  # of a response
    steps: int
    batch: int


RUNS = (
    PaperRun("toxicity", "GPT-2 large", 0.774e9, 4, 1.0, 1.36e6, 40, 20, 32_000, 32),
    PaperRun("TL;DR", "GPT-J 6B", 6.05e9, 2, 0.3, 1.97e6, 500, 64, 25_600, 16),
    PaperRun("dialogue", "Pythia 2.8B", 2.78e9, 2, 1.0, 0.82e6, 400, 256, 10_240, 64),
)


def table(flops: float = 1e14) -> pd.DataFrame:
    """One row a task: GPU memory in GB, samples to score, optimizer steps, hours at `flops` a second.

    Memory: policy and reference, and 16 bytes (gradient, master weight, two moments) for each parameter
    that trains; activations and caches come on top.  Work: 2 flops a parameter and token of a forward pass,
    4 more a trained one of a backward pass.
    """
    rows = []
    for run in RUNS:
        length = run.context + run.tokens
        learned = run.steps * run.batch * length
        work = 2 * run.size * run.samples * length  # sampling
        work += (2 + 2 + 4 * run.trained) * run.size * learned  # reference, forward, backward
        memory = (2 * run.weight_bytes + 16 * run.trained) * run.size
        row = {"task": run.task, "model": run.model, "GPU memory, GB": round(memory / 1e9, 1)}
        row |= {"samples to score": int(run.samples), "optimizer steps": run.steps}
        rows.append(row | {"hours": round(work / flops / 3600, 1)})
    return pd.DataFrame(rows)
