"""Figures of notebook 90: quality by annotator minutes, which pairs are decided, by whose eyes looked.

What is saved of an experiment's arms writes what its alt text says from the data.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from lib import plots
from lib.course.arms import Arms, decide, is_equal
from lib.course.record import Run
from lib.papers.one_hour.arms import label_of


def quality_by_minutes(
    table: pd.DataFrame, levels: Mapping[str, float], *, title: str, ylabel: str
) -> Figure:
    """A panel with its own legend for each kind of feedback, a line for each learner, grey: without minutes.

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
        greys = [
            axes.axhline(value, color="0.45", lw=1, ls=dash)
            for value, dash in zip(levels.values(), (":", "--", "-."), strict=False)
        ]
        axes.set(title=kind, xscale="log", xlabel="annotator minutes")
        axes.legend(loc="upper left", fontsize=8, handlelength=1.6)
        ticks = sorted(set(table.minutes))
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
    empty = list(panels)  # panels without a kind
    for axes in empty:
        axes.set_axis_off()
    place = {"loc": "center left"} if empty else {"loc": "outside upper right", "ncols": 3}
    (empty[0] if empty else figure).legend(greys, levels, title="without minutes", **place)
    for axes in grid[:, 0]:
        axes.set_ylabel(ylabel)
    return plots.finish(figure, title)


def save_quality_by_minutes(
    arms: Arms, budgets: Sequence[tuple[str, float]], free: Sequence[str], *,
    name: str, title: str, caption: str,
):  # fmt: skip
    """Save `quality_by_minutes` of some arms; return the image to show.  Each quality becomes a metric.

    `budgets`: arm and minutes, of which those that did not run are left out.  `free`: the arms that no
    minutes bought, drawn as grey lines.
    """
    rows, levels = [], {}
    for arm, minutes in budgets:
        label = label_of(arm, minutes)
        if label in arms.names:
            level = arms.level(label, "quality")
            arms.run.metric(f"quality/{label}", level)
            row = dict(zip(("kind", "learner"), arm.split(", ", 1), strict=True))
            row |= {"value": level.value, "low": level.low, "high": level.high}
            rows.append(row | {"minutes": minutes})
    for arm in free:
        level = arms.level(arm, "quality")
        arms.run.metric(f"quality/{arm}", level)
        levels[arm] = level.value
    table = pd.DataFrame(rows)
    figure = quality_by_minutes(table, levels, title=title, ylabel="quality")
    last = table[table.minutes == table.minutes.max()].sort_values("value")
    ends = last.iloc[[0, -1]].itertuples()
    worst, best = (f"{x.value:.2f} ({x.kind}, {x.learner})" for x in ends)
    alt = f"At {table.minutes.max():g} minutes from {worst} to {best}"
    alt += "".join(f"; {arm} {value:.2f}" for arm, value in levels.items())
    return arms.run.save_figure(figure, name, caption=caption, alt=alt)


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


def save_pairs(
    arms: Arms, labels: Mapping[str, str], column: str, smallest: float, *,
    name: str, title: str, caption: str,
):  # fmt: skip
    """Save `pair_differences` of `compare_pairs`; return the image to show.

    How many pairs are decided, equal and open becomes a metric each.  `labels`: from the best arm to the
    worst.
    """
    differences, verdicts = compare_pairs(arms, labels, column, smallest)
    pairs = verdicts.stack().value_counts() // 2
    for verdict in ("decided", "equal", "open"):
        arms.run.metric(f"pairs/{verdict}", int(pairs.get(verdict, 0)), n=len(labels))
    figure = pair_differences(differences, verdicts, title=title, label=column)
    counts = ", ".join(f"{verdict} {n}" for verdict, n in pairs.items() if verdict)
    names = list(labels)
    alt = f"{len(names)} arms; pairs: {counts}; highest: {names[0]}, lowest: {names[-1]}."
    return arms.run.save_figure(figure, name, caption=caption, alt=alt)


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
        mark, colour, weight = looks.get(verdicts.iloc[row, column], ("", "0.35", "normal"))
        options = {"ha": "center", "va": "center", "fontsize": 8, "color": colour}
        axes.text(column, row, f"{mark}{value:+.2f}", fontweight=weight, **options)
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.grid(False)
    figure.colorbar(image, ax=axes, label=label, shrink=0.6)
    return plots.finish(figure, title)


def save_by_eyes(
    run: Run, groups: Sequence[tuple[str, Arms]], names: Sequence[str], minutes: float, *,
    name: str, title: str, caption: str,
):  # fmt: skip
    """Save the quality of arms at one budget, by whose eyes looked; return the image to show.

    `groups`: an annotator and the arms that learned from it.  None where no arm is named.
    """
    rows = []
    for arm, (annotator, arms) in itertools.product(names, groups):
        if label_of(arm, minutes) in arms.names:
            level = arms.level(label_of(arm, minutes), "quality")
            row = {"value": level.value, "low": level.low, "high": level.high}
            rows.append({"group": arm, "condition": annotator, **row})
    if not rows:
        return None
    table = pd.DataFrame(rows)
    figure = plots.interval_plot(table, xlabel="quality", title=title)
    top = table.sort_values("value").groupby("condition").tail(1).itertuples()
    parts = [f"{x.condition}: {x.group}, {x.value:.2f}" for x in top]
    alt = f"{len(names)} arms; highest: {'; '.join(parts)}"
    return run.save_figure(figure, name, caption=caption, alt=alt)
