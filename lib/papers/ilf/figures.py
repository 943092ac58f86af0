"""Notebook 31's figures and the tables behind them: students by what they imitated, likelihood, distance."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from IPython.display import Image

from lib import plots
from lib.course.arms import TUNING_SEEDS, Arms
from lib.course.record import Run
from lib.papers.ilf import study


def students(run: Run, levels: pd.DataFrame, column: str, first: str, *, name: str) -> Image:
    """A saved figure of a measure of every arm, of `Arms.levels`; `first`: the arm that is the line."""
    rows = levels[levels["condition"] == column]
    line = float(rows.loc[rows["group"] == first, "value"].iloc[0])
    rows = rows[rows["group"] != first]
    figure = plots.interval_plot(
        rows,
        xlabel="share of the facts stated, at equal length",
        title=f"Students by what they imitated; line: the {first}",
        reference=line,
    )
    parts = ", ".join(f"{r.group} {r.value:.2f}" for r in rows.itertuples())
    return run.save_figure(
        figure,
        name,
        caption="Facts stated at equal length by each student; 95 % over articles and seeds.",
        alt=f"The line stands at {line:.2f}. From top down: {parts}.",
    )


def likelihood_levels(likely: Arms) -> pd.DataFrame:
    """nll and perplexity of each kind of target under each student: a row each, columns arm and target.

    likely: arms named "<student>/<target>".
    """
    levels = likely.levels(["nll", "perplexity"], "{column}/{arm}")
    names = levels["group"].str.split("/", expand=True)
    return levels.assign(arm=names[0], target=names[1] + " targets")


def likelihood(run: Run, levels: pd.DataFrame, shown: Sequence[str], *, name: str) -> Image:
    """A saved figure of the targets' nll (`likelihood_levels`) under the students `shown`."""
    rows = levels[(levels["condition"] == "nll") & levels["arm"].isin(shown)]
    rows = rows.assign(group=rows["target"], condition=rows["arm"])
    figure = plots.interval_plot(
        rows,
        xlabel="negative log-likelihood, nats a token",
        title="How likely each kind of target is, by student",
    )
    parts = [f"{r.group} under {r.condition} {r.value:.2f}" for r in rows.itertuples()]
    return run.save_figure(
        figure,
        name,
        caption="Likelihood of targets under the first student and after fine-tuning.",
        alt=f"Nats a token, from top down: {', '.join(parts)}.",
    )


def by_direction(kl: pd.DataFrame) -> pd.DataFrame:
    """Log-ratios of texts (arm, seed, direction, value) with a column a direction, a row a text of each."""
    texts = kl.groupby(["arm", "seed", "direction"]).cumcount()
    index = ["arm", "seed", "text"]
    wide = kl.assign(text=texts).pivot(index=index, columns="direction", values="value")
    return wide.reset_index()


def expected_half_intervals(
    arms: Arms,
    others: pd.DataFrame,
    pairs: Sequence[tuple[str, str]],
    columns: Sequence[str],
    sizes: Sequence[int],
) -> pd.DataFrame:
    """`study.power` from the students of tuning seeds; from `others`, a study's texts, where none was judged.

    The pairs are of students; where it is the study's texts, of the writer's summaries and second tries
    against refinements.  Prints which it was.
    """
    tuned = arms.table[arms.table["seed"].isin(TUNING_SEEDS)]
    known = [pair for pair in pairs if set(pair) <= set(tuned["arm"])]
    print("expected half intervals, from", "students of the tuning seed" if known else "30's texts")
    if known:
        return study.power(tuned, known, columns, sizes)
    pairs = [(study.OWN, "feedback"), ("second try", "feedback")]
    return study.power(others, pairs, columns, sizes)
