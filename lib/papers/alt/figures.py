"""Figures of notebooks 50 and 51 that no other paper needs."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from lib import plots


def trade_off(points: pd.DataFrame, *, xlabel: str, ylabel: str, title: str) -> Figure:
    """A point an arm with an interval on each axis.

    Columns arm, x and y, the last two with value, low and high (`stats.Effect`, `stats.Interval`).
    Raises ValueError for a table without rows, or with more than eight arms.
    """
    if points.empty:
        raise ValueError("nothing to draw: no arm has a point.")
    plots.use_style()
    figure = Figure(figsize=(plots.WIDTH, 4.4), layout="constrained")
    axes = figure.subplots()
    styles = plots.condition_styles(points["arm"])
    for row in points.itertuples():
        style = {**styles[row.arm], "linestyle": ""}
        axes.plot(row.x.value, row.y.value, **style, label=row.arm)
        axes.hlines(row.y.value, row.x.low, row.x.high, color=style["color"], lw=1.5)
        axes.vlines(row.x.value, row.y.low, row.y.high, color=style["color"], lw=1.5)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    return plots.finish(figure, title)
