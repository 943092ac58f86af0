"""Drawings of notebooks 42 and 44: what tokens are paid and credited with, PPO's clip, gains by error."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from lib import losses, plots


def token_heatmap(table: pd.DataFrame, tokens: Sequence[str], *, title: str, label: str) -> Figure:
    """An answer's tokens from left to right; each row of the table (rows, tokens) as coloured numbers.

    Red is below 0, blue above; rows stand in their order.  ValueError unless there is a column a token.
    """
    if table.shape[1] != len(tokens):
        raise ValueError(f"{table.shape[1]} columns for {len(tokens)} tokens; give one a token.")
    plots.use_style()
    values = table.to_numpy(dtype=float)
    largest = max(np.abs(values).max(), 1e-9)
    figure = Figure(figsize=(max(plots.WIDTH, 2.2 + 0.6 * len(tokens)), 1.3 + 0.5 * len(table)))
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    image = axes.imshow(values, cmap="RdBu", vmin=-largest, vmax=largest, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        colour = "white" if abs(value) > 0.6 * largest else "black"
        text = f"{value:+.2f}" if abs(value) >= 0.005 else "0"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=9)
    axes.set_xticks(range(len(tokens)), [token.strip() or repr(token)[1:-1] for token in tokens])
    axes.set_yticks(range(len(table)), table.index)
    axes.grid(False)
    axes.xaxis.tick_top()
    figure.colorbar(image, ax=axes, label=label)
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def clipped_objective(clip: float = 0.2) -> Figure:
    """What a token adds to PPO's objective by the ratio of its probabilities, for A = +1 and A = -1."""
    plots.use_style()
    ratio = torch.linspace(0.4, 1.6, 241)
    one = torch.ones(1, 1)
    figure = Figure(figsize=(plots.WIDTH, 3.2), layout="constrained")
    for axes, advantage in zip(figure.subplots(1, 2, sharey=True), (1.0, -1.0), strict=True):
        gain = [
            -losses.policy_loss(x.log(), 0 * x, advantage * one, one, clip)
            for x in ratio.view(-1, 1, 1)
        ]
        axes.plot(ratio, advantage * ratio, color="0.6", ls="--", label="ratio x A")
        axes.plot(ratio, gain, color="black", label="PPO's objective")
        axes.axvspan(1 - clip, 1 + clip, color="0.92", label=f"within {clip:g} of 1")
        axes.axvline(1, color="0.3", lw=1, ls=":")
        wanted = "raise it" if advantage > 0 else "lower it"
        axes.set(xlabel="ratio: probability now / then", title=f"A = {advantage:+g}: {wanted}")
    figure.axes[0].set_ylabel("objective of this token")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def gain_by_error(table: pd.DataFrame, *, title: str, xlabel: str, ylabel: str) -> Figure:
    """A gain with its interval against the error of the reward model; a line for each kind of error.

    Columns kind, level (written at its point), error, value, low, high; bounds may be NaN.
    """
    plots.use_style()
    figure = Figure(figsize=(plots.WIDTH, 4.2), layout="constrained")
    axes = figure.subplots()
    for kind, style in plots.condition_styles(table.kind).items():
        rows = table[table.kind == kind].sort_values("error")
        axes.plot(rows.error, rows.value, **style, label=kind)
        axes.fill_between(rows.error, rows.low, rows.high, color=style["color"], alpha=0.15, lw=0)
        axes.vlines(rows.error, rows.low, rows.high, color=style["color"], lw=1)
        for row in rows.itertuples():
            place = (row.error, row.value)
            axes.annotate(row.level, place, (4, 6), textcoords="offset points", fontsize=8)
    axes.axhline(0, color="0.3", lw=1, ls=":")
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.legend()
    figure.suptitle(title, x=0.01, ha="left")
    return figure
