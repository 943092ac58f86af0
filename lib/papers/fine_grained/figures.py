"""Drawings of notebook 41 (an answer beside its marks, ROC curves) and 44 (gain by error of the model)."""

from __future__ import annotations

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lib import plots

SHADES = ("#e8a33d", "#ffffff", "#4a90c8")  # wrong, undecided, right


def marked_text(table: pd.DataFrame, *, title: str, label: str, per_line: int = 72) -> Figure:
    """One text in several rows, each coloured by what that row says of its pieces: orange wrong, blue right.

    Columns row, piece, value (-1 wrong to 1 right; NaN: it says nothing), note (written behind the piece).
    """
    plots.use_style()
    boxes, names, line = [], {}, 0
    for name, pieces in table.groupby("row", sort=False):
        names[name], column = line, 0
        for piece in pieces.itertuples():
            for word in f"{piece.piece} {piece.note}".split():
                if column + len(word) > per_line:
                    line, column = line + 1, 0
                boxes.append((line, column, word, piece.value))
                column += len(word) + 1
        line += 1.6
    figure = Figure(figsize=(plots.WIDTH, 1.2 + 0.28 * line), layout="constrained")
    axes = figure.subplots()
    colours = matplotlib.colors.LinearSegmentedColormap.from_list("right", SHADES)
    scale = matplotlib.colors.Normalize(-1, 1)
    for row, start, word, value in boxes:
        shade = "0.88" if np.isnan(value) else colours(scale(value))
        axes.add_patch(Rectangle((start, -row - 0.45), len(word) + 1, 0.9, color=shade, lw=0))
        axes.text(start, -row, word, family="monospace", va="center", fontsize=9)
    for name, row in names.items():
        axes.text(-1.5, -row, name, ha="right", va="center", weight="bold", fontsize=10)
    axes.set(xlim=(-14, per_line + 1), ylim=(-line + 0.6, 0.7))
    axes.axis("off")
    bar = matplotlib.cm.ScalarMappable(scale, colours)
    figure.colorbar(bar, ax=axes, orientation="horizontal", label=label, aspect=50, pad=0.02)
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def roc_curves(table: pd.DataFrame, *, title: str) -> Figure:
    """Share of wrong segments found against share of fine ones called wrong, for every threshold.

    A panel a model, a curve a kind of training (all its seeds' scores together).  Columns model, kind, wrong
    (0, 1), score (low: wrong).
    """
    plots.use_style()
    panels = list(dict.fromkeys(table.model))
    figure = Figure(figsize=(plots.WIDTH, 4.4), layout="constrained")
    row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    styles = plots.condition_styles(table.kind)
    for axes, model in zip(row, panels, strict=True):
        for kind, style in styles.items():
            rows = table[(table.model == model) & (table.kind == kind)].sort_values("score")
            hits, alarms = rows.wrong.cumsum(), (1 - rows.wrong).cumsum()
            hits, alarms = hits / max(1, hits.iloc[-1]), alarms / max(1, alarms.iloc[-1])
            axes.plot(alarms, hits, color=style["color"], ls=style["linestyle"], label=kind)
        axes.plot([0, 1], [0, 1], color="0.5", lw=1, ls=":")
        axes.text(0.97, 0.05, model, ha="right", weight="bold")
        axes.set(xlabel="fine segments called wrong", aspect="equal")
    row[0].set_ylabel("wrong segments found")
    figure.suptitle(title, x=0.01, ha="left")
    figure.legend(*row[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
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
