"""Figures of an experiment's arms as a notebook shows them: drawn, saved with an alt text, displayed.

Only seeds that decide are drawn (`Arms.deciding`); the alt text says what is seen, from the data.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from IPython.display import display

from lib import plots
from lib.course.arms import Arms, Pair


def curves(
    arms: Arms, history: pd.DataFrame, names: Sequence[str], column: str, *,
    name: str, ylabel: str, title: str, caption: str,
) -> None:  # fmt: skip
    """Learning curves of some arms, in this order; `history` has columns step, arm, seed and `column`.

    Where none of them ran, a line says so.
    """
    rows = history[history.arm.isin(names) & history.seed.isin(arms.deciding().seed)]
    if rows.empty:
        print("none of these arms ran:", ", ".join(names))
        return
    rows = rows.assign(value=rows[column], place=rows.arm.map(list(names).index))
    rows = rows.sort_values(["place", "seed", "step"])
    figure = plots.learning_curve(rows, ylabel=ylabel, title=title)
    parts = []
    for arm, curve in rows.groupby("arm", sort=False):
        means = curve.groupby("step").value.mean()
        parts.append(f"{arm} {_course(means)}")
    alt = f"Curves over {rows.step.max()} steps: " + "; ".join(parts)
    display(arms.run.save_figure(figure, name, caption=caption, alt=alt))


def _course(means: pd.Series) -> str:
    """A curve in words: where it begins and ends, its lowest and highest value where these are no ends."""
    words = f"from {means.iloc[0]:.2f} to {means.iloc[-1]:.2f}"
    known = means.dropna()
    extremes = {"lowest": known.idxmin(), "highest": known.idxmax()} if len(known) else {}
    for name, step in extremes.items():
        if step not in (means.index[0], means.index[-1]):
            words += f", {name} {means[step]:.2f} at step {step}"
    return words


def effects(
    arms: Arms, pairs: Sequence[Pair], columns: Sequence[str], *,
    name: str, title: str, caption: str, tabled: Sequence[str] = (), minus: Pair | None = None,
) -> None:  # fmt: skip
    """Differences b - a of each pair and column with intervals, as a figure and a table, each a metric.

    `tabled`: columns of another unit, which stand in the table alone.  Pairs of which one side did not run
    are left out; where none is left, a line says so.  More than five pairs are the figure's rows, and the
    columns its legend.
    """
    pairs = [pair for pair in pairs if set(pair) <= set(arms.names)]
    if not pairs:
        print("none of these comparisons ran")
        return
    rows = arms.effects(pairs, [*columns, *tabled], minus=minus)
    drawn = rows[rows.group.isin(columns)]
    if (drawn.n <= 1).all():  # one number a seed: no n of prompts for the title
        drawn = drawn.drop(columns="n")
    shown = drawn
    if len(pairs) > 5:  # nobody reads a legend of more
        shown = drawn.rename(columns={"group": "condition", "condition": "group"})
    figure = plots.interval_plot(shown, xlabel="difference", reference=0, title=title)
    bounded = drawn[drawn.low.notna()]
    named = bounded[(bounded.low > 0) | (bounded.high < 0)]
    alt = f"{len(named)} of {len(bounded)} intervals lie on one side of 0"
    if bounded.empty:  # of one seed
        named, alt = drawn[drawn.value.notna()], "Dots without intervals"
    alt += "".join(
        f"; {row.condition}, {row.group}: {row.value:+.2f}" for row in named.itertuples()
    )
    display(arms.run.save_figure(figure, name, caption=caption, alt=alt))
    display(rows.round(3))
