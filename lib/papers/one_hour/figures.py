"""Drawings of notebook 90: quality by annotator minutes, a panel a kind; and which pairs are decided."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from lib import plots
from lib.course.arms import Arms, decide, is_equal


def quality_by_minutes(
    table: pd.DataFrame, levels: Mapping[str, float], *, title: str, ylabel: str
) -> Figure:
    """A panel for each kind of feedback, a line for each learner, grey lines for what no minutes bought.

    Columns kind, learner, minutes, value, low, high.  `levels`: name -> height of a grey line.
    """
    plots.use_style()
    kinds = list(dict.fromkeys(table.kind))
    rows = -(-len(kinds) // 3)
    figure = Figure(figsize=(plots.WIDTH, 2.9 * rows), layout="constrained")
    grid = figure.subplots(rows, min(3, len(kinds)), sharey=True, squeeze=False)
    panels = iter(grid.flat)
    learners = pd.Categorical(table.learner, categories=list(dict.fromkeys(table.learner)))
    styles = plots.condition_styles(learners)
    for kind, axes in zip(kinds, panels, strict=False):
        _panel(axes, table[table.kind == kind], styles)
        for (name, value), dash in zip(levels.items(), (":", "--", "-."), strict=False):
            axes.axhline(value, color="0.45", lw=1, ls=dash, label=name)
        axes.set(title=kind, xscale="log", xlabel="annotator minutes")
        ticks = sorted(set(table.minutes))
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
    for axes in list(panels):  # panels without a kind
        axes.set_axis_off()
    for axes in grid[:, 0]:
        axes.set_ylabel(ylabel)
    entries = {}
    for axes in figure.axes:
        entries |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    figure.suptitle(title, x=0.01, ha="left")
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=4)
    return figure


def _panel(axes, table: pd.DataFrame, styles: Mapping[str, dict]) -> None:
    for learner, rows in table.groupby("learner", sort=False, observed=True):
        rows = rows.sort_values("minutes")
        style = styles[learner]
        axes.plot(rows.minutes, rows.value, **style, label=learner)
        band = (rows.low.astype(float), rows.high.astype(float))
        axes.fill_between(rows.minutes, *band, color=style["color"], alpha=0.15, lw=0)


def compare_pairs(
    arms: Arms, labels: Mapping[str, str], column: str, smallest: float
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every arm minus every other, and what is decided about the pair: (arms, arms) tables, in this order.

    `labels`: the name that a table shows -> the arm's.  "equal": the interval lies within the smallest effect
    that matters; "decided": it lies on one side of 0; else, and with fewer seeds than decide, "open".
    """
    names = list(labels)
    differences = pd.DataFrame(np.nan, index=names, columns=names)
    verdicts = pd.DataFrame("", index=names, columns=names)
    for a, b in itertools.combinations(names, 2):
        effect = arms.effect(labels[b], labels[a], column)
        differences.loc[a, b], differences.loc[b, a] = effect.value, -effect.value
        verdict = "open" if decide(effect, "higher") == "not demonstrated" else "decided"
        verdict = "equal" if is_equal(effect, smallest) else verdict
        verdicts.loc[a, b] = verdicts.loc[b, a] = verdict
    return differences, verdicts


def pair_differences(
    differences: pd.DataFrame, verdicts: pd.DataFrame, *, title: str, label: str
) -> Figure:
    """Each row's arm minus each column's, as coloured numbers with what is decided about the pair.

    Both tables are (arms, arms) in one order.  `verdicts`: "decided", "equal" or "open"; a decided number
    is bold, an equal one has "=" before it, an open one is grey.
    """
    names: Sequence[str] = list(differences.index)
    values = differences.to_numpy(dtype=float)
    plots.use_style()
    side = 1.2 + 0.52 * len(names)
    figure = Figure(figsize=(max(plots.WIDTH, side + 2.2), side), layout="constrained")
    axes = figure.subplots()
    largest = max(np.nanmax(np.abs(values)), 1e-9)
    image = axes.imshow(values, cmap="RdBu", vmin=-1.4 * largest, vmax=1.4 * largest)
    looks = {"decided": ("", "black", "bold"), "equal": ("=", "black", "normal")}
    for (row, column), value in np.ndenumerate(values):
        if row == column or np.isnan(value):
            continue
        mark, colour, weight = looks.get(verdicts.iloc[row, column], ("", "0.5", "normal"))
        options = {"ha": "center", "va": "center", "fontsize": 8, "color": colour}
        axes.text(column, row, f"{mark}{value:+.2f}", fontweight=weight, **options)
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.grid(False)
    figure.colorbar(image, ax=axes, label=label, shrink=0.6)
    figure.suptitle(title, x=0.01, ha="left")
    return figure
