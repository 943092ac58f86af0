"""A drawing of notebook 44: what density gains, by the error of the reward model."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from lib import plots


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
