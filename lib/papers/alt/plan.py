"""What the papers' own runs take: memory, samples to score, steps and hours of each task."""

from __future__ import annotations

from typing import NamedTuple

import pandas as pd
import torch

from lib import memory, models


class PaperRun(NamedTuple):
    """One task with the settings of its reference code (notebook 50 names the repositories)."""

    task: str
    model: str
    hub: str  # id of the model
    dtype: torch.dtype  # of what does not train; the rest is float32
    layers: int  # uppermost ones that train; 0: the whole model
    samples: float  # to be drawn and scored
    context: int  # tokens of a conditioned prompt
    tokens: int  # of a response
    steps: int
    batch: int


GPT2, GPTJ, PYTHIA = "openai-community/gpt2-large", "EleutherAI/gpt-j-6b", "EleutherAI/pythia-2.8b"
RUNS = (
    PaperRun("toxicity", "GPT-2 large", GPT2, torch.float32, 0, 1.36e6, 40, 20, 32_000, 32),
    PaperRun("TL;DR", "GPT-J 6B", GPTJ, torch.bfloat16, 9, 1.97e6, 500, 64, 25_600, 16),
    PaperRun("dialogue", "Pythia 2.8B", PYTHIA, torch.bfloat16, 0, 0.82e6, 400, 256, 10_240, 64),
)


def outline(run: PaperRun) -> torch.nn.Module:
    """The run's model without weights, with what trains."""
    model = memory.skeleton(run.hub, run.dtype)
    if run.layers:
        models.set_trainable(model, "top", layers=run.layers)
    else:
        models.set_trainable(model, "all")
    return model


def table(flops: float = 1e14) -> pd.DataFrame:
    """One row a task: GPU memory in GB, samples to score, optimizer steps, hours at `flops` a second.

    Memory: `memory.conditioning` with one row at a time, a batch of responses drawn at once.  Work: 2 flops
    a parameter and token of a forward pass, 4 more a trained one of a backward pass.
    """
    rows = []
    for run in RUNS:
        model = outline(run)
        held = memory.conditioning(model, 1, run.context, run.tokens, drawn=run.batch)
        size = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        length = run.context + run.tokens
        learned = run.steps * run.batch * length
        work = 2 * size * run.samples * length  # sampling
        work += (2 * size + 2 * size + 4 * trained) * learned  # reference, forward, backward
        row = {"task": run.task, "model": run.model, "GPU memory, GB": round(held.total / 1e9, 1)}
        row |= {"samples to score": int(run.samples), "optimizer steps": run.steps}
        rows.append(row | {"hours": round(work / flops / 3600, 1)})
    return pd.DataFrame(rows)
